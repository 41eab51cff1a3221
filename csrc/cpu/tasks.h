// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>

#include "parallel.h"

namespace fpn_fast {

// Tasks of unequal length: each thread takes the next one when it is done with its last. `body(next)` runs once a
// thread, with room for scratch memory of its own, and calls `next()` until that is `tasks` or more.
template <class Body>
void parallel_tasks(int64_t tasks, int64_t elements_per_task, const Body& body) {
  std::atomic<int64_t> taken{0};
  parallel_rows(tasks, elements_per_task,
                [&](int64_t, int64_t) { body([&] { return taken.fetch_add(1, std::memory_order_relaxed); }); });
}

}  // namespace fpn_fast
