// SPDX-License-Identifier: Apache-2.0
// The kernels in this library, for `python -m fpn_fast info` and the tests.
#pragma once

#include <string>
#include <vector>

#include "../common/scalar.h"

namespace fpn_fast {

struct KernelTable {
  struct Entry {
    std::string name;
    const void* function;
    int threads;
  };
  std::vector<Entry> entries;

  template <class Argument>
  void add(const std::string& name, void (*kernel)(Argument), int threads) {
    entries.push_back({name, reinterpret_cast<const void*>(kernel), threads});
  }
};

// The one table of the library, which every .cu file fills while the library loads.
KernelTable& kernel_table();

struct RegisterKernels {
  template <class Fill>
  explicit RegisterKernels(const Fill& fill) {
    fill(kernel_table());
  }
};

// Calls `body.template operator()<T>(name)` for the types of boxes.
template <class Body>
void for_box_types(const Body& body) {
  body.template operator()<double>("float64"), body.template operator()<float>("float32");
}

// The same for the types of maps.
template <class Body>
void for_map_types(const Body& body) {
  for_box_types(body);
  body.template operator()<Half>("float16"), body.template operator()<BFloat16>("bfloat16");
}

}  // namespace fpn_fast
