// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>

#include "parallel.h"

namespace fpn_fast {

// Runs tasks of unequal length: each thread takes the next task when it has finished one. `body(next)` runs once per
// thread and can hold scratch memory. It calls `next()` until that returns `tasks` or more.
template <class Body>
void parallel_tasks(int64_t tasks, int64_t elements_per_task, const Body& body) {
  std::atomic<int64_t> taken{0};
  parallel_rows(tasks, elements_per_task,
                [&](int64_t, int64_t) { body([&] { return taken.fetch_add(1, std::memory_order_relaxed); }); });
}

}  // namespace fpn_fast
