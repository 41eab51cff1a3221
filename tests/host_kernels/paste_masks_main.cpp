// SPDX-License-Identifier: Apache-2.0
// Runs mask pasting: paste_masks_main values|above CASE_FILE. Numbers: type, whether boxes are double, padding, and the
// bits of the threshold in float64. Tensors: masks [K, 1, M, M], boxes, and the images [K, 1, H, W].
#include <bit>

#include "../../csrc/cuda/paste_masks.cuh"
#include "case_file.h"

namespace fpn_fast {
namespace {

template <class T>
void run(bool above, const host_cuda::CaseFile& file) {
  const auto &masks = file.tensors.at(0), &boxes = file.tensors.at(1), &out = file.tensors.at(2);
  MaskPasting<T> pasting{};
  pasting.masks = masks.data<const T>(), pasting.boxes = boxes.data<const char>();
  pasting.double_boxes = file.numbers.at(1);
  pasting.count = masks.sizes[0], pasting.size = static_cast<int>(masks.sizes[3]);
  pasting.padding = static_cast<int>(file.numbers.at(2));
  pasting.box_scale = static_cast<double>(pasting.size + 2 * pasting.padding) / pasting.size;
  pasting.height = static_cast<int>(out.sizes[2]), pasting.width = static_cast<int>(out.sizes[3]);
  if (above) {
    pasting.above = out.data<bool>();
    pasting.threshold = static_cast<acc_type<T>>(std::bit_cast<double>(file.numbers.at(3)));
  } else {
    pasting.values = out.data<T>();
  }
  paste_in_launch(pasting, host_cuda::kLaunch);
}

}  // namespace
}  // namespace fpn_fast

int main(int count, char** arguments) {
  return host_cuda::main_of(count, arguments, []<class T>(const auto& kernel, const auto& file) {
    fpn_fast::run<T>(kernel == "above", file);
  });
}
