// SPDX-License-Identifier: Apache-2.0
// Every op schema, and nothing else. What each op does stands in fpn_fast/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fpn_fast, library) {
  library.def("top_down(Tensor[] laterals, int mode, bool average) -> Tensor[]");
  library.def(
      "top_down_backward(Tensor[] grads, SymInt coarse_height, SymInt coarse_width, int mode, bool average) -> "
      "Tensor[]");
  library.def(
      "multiscale_roi_align(Tensor[] features, Tensor rois, Tensor? levels, SymInt pooled_height, SymInt pooled_width, "
      "float[] scales, float[] thresholds, int sampling_ratio, bool aligned) -> Tensor");
  library.def(
      "multiscale_roi_align_backward(Tensor grad, Tensor rois, Tensor? levels, SymInt batch, SymInt[] sizes, float[] "
      "scales, float[] thresholds, int sampling_ratio, bool aligned, bool channels_last) -> Tensor[]");
}
