# SPDX-License-Identifier: Apache-2.0
"""The ops: each file holds one op's contract, and whichever backend is chosen computes it."""

from fpn_fast.ops.levels import assign_levels
from fpn_fast.ops.multiscale_roi_align import multiscale_roi_align, roi_align
from fpn_fast.ops.top_down import top_down, upsample_add

__all__ = ["assign_levels", "multiscale_roi_align", "roi_align", "top_down", "upsample_add"]
