// SPDX-License-Identifier: Apache-2.0
#include "../torch/nms.h"

#include <torch/csrc/stable/library.h>

#include "segmented_nms.h"

namespace fpn_fast {
namespace {

struct Cpu {
  template <class acc_t>
  static void run(const NmsInput<acc_t>& input, const OverlapRule<acc_t>& rule, int64_t max_output, int64_t* keep,
                  int64_t* kept, const Tensor&) {
    suppress_segments(input, rule, max_output, keep, kept);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CPU, library) { library.impl("segmented_nms", TORCH_BOX(&segmented_nms<Cpu>)); }

}  // namespace fpn_fast
