// SPDX-License-Identifier: Apache-2.0
// The launch of mask pasting. The kernel is in the .cuh file beside this one.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../torch/cuda.h"
#include "../torch/paste_masks.h"
#include "kernel_table.h"
#include "paste_masks.cuh"

namespace fpn_fast {
namespace {

Tensor paste_masks_cuda(Tensor masks, Tensor boxes, int64_t height, int64_t width, int64_t padding,
                        std::optional<double> threshold) {
  Tensor out = empty_pasted(masks, boxes, height, width, padding, threshold.has_value());
  if (out.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(masks.get_device_index());
  const cudaStream_t stream = current_stream(masks);
  dispatch_floating(masks.scalar_type(), "paste_masks", [&](auto tag) {
    using T = typename decltype(tag)::type;
    MaskPasting<T> pasting{};
    pasting.masks = static_cast<const T*>(masks.data_ptr()), pasting.boxes = boxes.data_ptr();
    pasting.double_boxes = boxes.scalar_type() == ScalarType::Double;
    pasting.count = masks.size(0), pasting.size = static_cast<int>(masks.size(3));
    pasting.padding = static_cast<int>(padding);
    pasting.box_scale = static_cast<double>(pasting.size + 2 * pasting.padding) / pasting.size;
    pasting.height = static_cast<int>(height), pasting.width = static_cast<int>(width);
    if (threshold.has_value()) {
      pasting.above = static_cast<bool*>(out.data_ptr()), pasting.threshold = static_cast<acc_type<T>>(*threshold);
    } else {
      pasting.values = static_cast<T*>(out.data_ptr());
    }
    paste_in_launch(pasting, [&](auto kernel, const LaunchConfig& config, const auto& argument) {
      launch(kernel, config, stream, argument);
    });
  });
  return out;
}

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  const auto add = [&]<class T>(TypeTag<T>, const std::string& type) {
    all.push_back({"paste_masks_kernel<" + type + ">", reinterpret_cast<const void*>(&paste_masks_kernel<T, false>),
                   kPasteThreads});
    all.push_back({"paste_masks_kernel<" + type + ", above>",
                   reinterpret_cast<const void*>(&paste_masks_kernel<T, true>), kPasteThreads});
  };
  add(TypeTag<double>{}, "float64"), add(TypeTag<float>{}, "float32");
  add(TypeTag<Half>{}, "float16"), add(TypeTag<BFloat16>{}, "bfloat16");
  return all;
}

const RegisterKernels kernels(entries());

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpn_fast, CUDA, library) { library.impl("paste_masks", TORCH_BOX(&paste_masks_cuda)); }

}  // namespace fpn_fast
