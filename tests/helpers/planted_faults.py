# SPDX-License-Identifier: Apache-2.0
"""A copy of the package whose CPU library has faults in its kernels, one of which can be switched on.

The faults are in the copy's sources alone: each replaces a text of a kernel by a choice between it and a wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers import copied_package

#: The number of the fault that is on; none without it.
VARIABLE = "PLANTED_FAULT"

_SWITCH = f"""
#include <cstdlib>
namespace fpn_fast {{
inline const int planted_fault = std::getenv("{VARIABLE}") != nullptr ? std::atoi(std::getenv("{VARIABLE}")) : 0;
}}
"""


@dataclass(frozen=True)
class Fault:
    """`right`, an expression or a statement that `file` has once, is `wrong` when the fault is on; op: what notices."""

    name: str
    op: str
    file: str
    right: str
    wrong: str

    def planted(self, text: str, number: int) -> str:
        """`text` of the file with the fault as `number`."""
        if text.count(self.right) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.right)} times {self.right!r}, not once")
        chosen = f"(planted_fault == {number} ? ({self.wrong}) : ({self.right}))"
        if self.right.endswith(";"):
            chosen = f"if (planted_fault == {number}) {{ {self.wrong} }} else {{ {self.right} }}"
        return text.replace(self.right, chosen)


FAULTS = (
    Fault("wrong_tap", "top_down", "common/resample.h", "lo < axis.in - 1 ? lo + 1 : lo", "lo"),
    Fault("gradient_of_its_own_dropped", "top_down", "cpu/top_down_backward.cpp",
          "(sums(i) + to_acc(grad[i])) * factor", "sums(i) * factor"),
    Fault("wrong_sample_tap", "roi_align", "common/roi_align.h", "floor + 1", "floor"),
    Fault("lost_tail_of_a_vector", "roi_align", "cpu/multiscale_roi_align.cpp",
          "c < channels", "c < channels / kPackLanes * kPackLanes"),
    Fault("unwritten_row", "multiscale_roi_align", "cpu/multiscale_roi_align.cpp",
          "if (rois[k].reads_nothing()) clear_row(out, k);", ""),
    Fault("off_by_one_level", "multiscale_roi_align", "common/levels.h",
          "if (level < rule.levels) roi.level = level;", "roi.level = level > 0 ? level - 1 : 0;"),
    Fault("above_a_threshold_for_at_least", "multiscale_roi_align", "common/levels.h",
          "area >= rule.threshold[i]", "area > rule.threshold[i]"),
    # Veltkamp's split: of a float32's 24 bits the first 11 stay, as many as half precision has.
    Fault("half_precision_coordinate", "multiscale_roi_align", "common/levels.h",
          "row[1]", "row[1] * acc_t(8193) - (row[1] * acc_t(8193) - row[1])"),
    Fault("gradient_not_divided_by_the_samples", "multiscale_roi_align", "cpu/multiscale_roi_align_backward.cpp",
          "to_acc(bins[pw * grad.stride_w]) * roi.inverse_count", "to_acc(bins[pw * grad.stride_w])"),
    Fault("last_of_equal_samples", "multiscale_roi_align(max)", "common/roi_align_max.h",
          "value > largest.value", "value >= largest.value"),
    Fault("missing_clip", "generate_proposals", "common/head_decoding.h",
          "return clip(decoded, size[0], size[1]);", "return decoded;"),
    Fault("wrong_channel", "generate_proposals", "common/head_decoding.h",
          "4 * int64_t{anchor} + i", "int64_t{i} * anchors + anchor"),
    Fault("dropped_last_level", "generate_proposals", "cpu/generate_proposals.cpp",
          "level < count", "level < count - 1"),
    Fault("kept_at_the_threshold", "nms", "common/boxes.h",
          "divide(shared, united) > rule.threshold", "divide(shared, united) >= rule.threshold"),
    Fault("wrong_label", "select_detections", "cpu/select_detections.cpp",
          "index % heads.classes", "(index + 1) % heads.classes"),
    Fault("tie_by_the_wrong_index", "match_anchors", "cpu/match_anchors.cpp",
          "iou[i] > best[i] ? index : match[i]", "iou[i] >= best[i] ? index : match[i]"),
    Fault("no_low_quality_match", "match_anchors", "cpu/match_anchors.cpp", "highest[g] > top", "true"),
    Fault("swapped_axes", "match_anchors", "cpu/match_anchors.cpp",
          "anchor_at(coding, around, y, x, stride_y, stride_x)", "anchor_at(coding, around, x, y, stride_x, stride_y)"),
    Fault("last_row_and_column_left_out", "paste_masks", "common/paste_masks.h",
          "last + 1 < extent ? last + 1 : extent", "last < extent ? last : extent"),
    Fault("own_class_as_any_other", "sigmoid_focal_loss", "cpu/sigmoid_focal_loss.cpp",
          "own >= 0 && own < run", "own > 0 && own < run"),
    Fault("statistics_without_eps", "frozen_batch_norm", "common/frozen_batch_norm.h",
          "add(variance, static_cast<V>(eps))", "variance"),
    Fault("relu_lets_every_gradient_pass", "frozen_batch_norm", "common/frozen_batch_norm.h",
          "y <= acc_t(0) ? acc_t(0) : grad", "grad"),
    Fault("channels_do_not_advance", "frozen_batch_norm", "cpu/frozen_batch_norm.cpp",
          "++channel == maps.channels", "false"),
    Fault("sums_of_raw_values", "frozen_batch_norm", "cpu/frozen_batch_norm.cpp",
          "g * (to_acc(x[i]) - mean)", "g * to_acc(x[i])"),
)  # fmt: skip


def _sources() -> dict[str, str]:
    """The sources of the CPU library, with every fault, by their paths."""
    texts = copied_package.sources()
    for number, fault in enumerate(FAULTS, start=1):
        path = f"csrc/{fault.file}"
        texts[path] = fault.planted(texts[path], number)
    texts["csrc/common/host_device.h"] += _SWITCH
    return texts


def build() -> Path:
    """A folder with a package that has the faulty library."""
    # A quarter of the time to build, and nothing here is timed.
    return copied_package.build("planted_faults", _sources(), ("-O0", "-g0"))
