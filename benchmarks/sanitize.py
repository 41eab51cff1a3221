# SPDX-License-Identifier: Apache-2.0
"""Calls every compiled kernel on small odd sizes, for compute-sanitizer: ``python -m benchmarks.sanitize``.

The calls, forward and backward, are ``fpn_fast verify``'s on the sizes below, and are checked as there. A sanitizer
slows kernels a hundredfold, so these are few.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any
from unittest import mock

import torch

from fpn_fast.__main__ import ends_with_its_reader
from fpn_fast.verify import report, run

#: Ratios of two and others, a single pixel at the top.
_MAPS = {"batch": 2, "sizes": [[13, 19], [7, 9], [4, 5], [1, 1]]}
#: Channels that do and do not fill accesses of 16 bytes.
_CHANNELS = [{**_MAPS, "channels": channels} for channels in (3, 16)]
_POOLED = [{**each, "rois": 28, "output_size": size} for each in _CHANNELS for size in (7, [3, 5], 14)]
#: By op: sizes on either side of its kernels' blocks and tiles.
SIZES: dict[str, list[dict[str, Any]]] = {
    "top_down": _CHANNELS,
    "multiscale_roi_align": _POOLED,
    "multiscale_roi_align(max)": _POOLED,
    "generate_proposals": [_MAPS],
    "select_detections": [{**_MAPS, "classes": classes} for classes in (3, 91)],
    "select_box_detections": [{"batch": 2, "boxes": 300, "classes": classes} for classes in (2, 40)],
    # Boxes that fill no block, several, and a group that many blocks share.
    "segmented_nms": [{"boxes": boxes} for boxes in (7, 500, 1500)],
    "match_anchors": [{"batch": 2, "ground_truths": 300}],
    "paste_masks": [{"masks": 7, "mask_size": 28, "image": [45, 67]}],
    "sigmoid_focal_loss": [{"anchors": 101, "classes": 91}],
    "heatmaps_to_keypoints": [{"boxes": 7, "keypoints": 3}],
}


@ends_with_its_reader
def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    device = parser.parse_args(arguments).device
    # Two random contents and sets of options for each size.
    plan = run.Plan(list(SIZES), ["cpp"], seed=0, cases=2, shapes=SIZES)
    with mock.patch.object(run, "devices", return_value=[device]):
        rows = run.run(plan)
    print(report.table(rows))
    return 0 if rows and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
