# SPDX-License-Identifier: Apache-2.0
"""The ops in Triton, in ``fpn_fast_triton::`` with the schemas of ``fpn_fast::``. Imported where Triton can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fpn_fast import backends
from fpn_fast.ops._schemas import SCHEMAS

_library = torch.library.Library("fpn_fast_triton", "DEF")


def register(name: str, function: Callable[..., Any], by_torch: str | None = None) -> None:
    """Register `function` as op `name` for CUDA tensors, in Triton's interpreter also for CPU tensors.

    by_torch: the steps that PyTorch's operators compute, for `backends.explain`.
    """
    if by_torch is not None:
        backends.declare_torch_part(name, "triton", by_torch)
    _library.define(name + SCHEMAS[name])
    for device in ("CUDA", "CPU") if backends.triton_interprets() else ("CUDA",):
        _library.impl(name, function, device)


from fpn_fast.triton import (  # noqa: E402, F401  they register their ops
    frozen_batch_norm,
    fuse_maps,
    generate_proposals,
    heatmaps_to_keypoints,
    match_anchors,
    multiscale_roi_align,
    multiscale_roi_align_max,
    paste_masks,
    segmented_nms,
    select_box_detections,
    select_detections,
    sigmoid_focal_loss,
    top_down,
)
