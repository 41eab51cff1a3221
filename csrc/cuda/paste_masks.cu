// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "../torch/cuda.h"
#include "../torch/paste_masks.h"
#include "kernel_table.h"
#include "paste_masks.cuh"

namespace fpn_fast {
namespace {

struct Cuda {
  template <class T>
  static void run(const Tensor& masks, const Tensor& boxes, int padding, const std::optional<double>& threshold,
                  const Tensor& out) {
    MaskPasting<T> pasting{};
    pasting.masks = data<const T>(masks), pasting.boxes = boxes.data_ptr();
    pasting.double_boxes = boxes.scalar_type() == ScalarType::Double;
    pasting.count = masks.size(0), pasting.size = static_cast<int>(masks.size(3)), pasting.padding = padding;
    pasting.box_scale = static_cast<double>(pasting.size + 2 * padding) / pasting.size;
    pasting.height = static_cast<int>(out.size(2)), pasting.width = static_cast<int>(out.size(3));
    if (threshold.has_value()) {
      pasting.above = data<bool>(out), pasting.threshold = static_cast<acc_type<T>>(*threshold);
    } else {
      pasting.values = data<T>(out);
    }
    run_on(masks, [&](const auto& launch) { paste_in_launch(pasting, launch); });
  }
};

const RegisterKernels kernels([](KernelTable& table) {
  for_map_types([&]<class T>(const std::string& type) {
    table.add("paste_masks_kernel<" + type + ">", &paste_masks_kernel<T, false>, kPasteThreads);
    table.add("paste_masks_kernel<" + type + ", above>", &paste_masks_kernel<T, true>, kPasteThreads);
  });
});

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) { library.impl("paste_masks", TORCH_BOX(&paste_masks<Cuda>)); }

}  // namespace fpn_fast
