# SPDX-License-Identifier: Apache-2.0
"""Every op's schema, for the namespaces that Python defines; csrc/ops.cpp has the same for the compiled one."""

SCHEMAS = {
    "top_down": "(Tensor[] laterals, int mode, bool average) -> Tensor[]",
    "top_down_backward": (
        "(Tensor[] grads, SymInt coarse_height, SymInt coarse_width, int mode, bool average) -> Tensor[]"
    ),
    "multiscale_roi_align": (
        "(Tensor[] features, Tensor rois, Tensor? levels, SymInt pooled_height, SymInt pooled_width, float[] scales, "
        "float[] thresholds, int sampling_ratio, bool aligned) -> Tensor"
    ),
    "multiscale_roi_align_backward": (
        "(Tensor grad, Tensor rois, Tensor? levels, SymInt batch, SymInt[] sizes, float[] scales, float[] thresholds, "
        "int sampling_ratio, bool aligned, bool channels_last) -> Tensor[]"
    ),
}
