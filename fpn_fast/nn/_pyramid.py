# SPDX-License-Identifier: Apache-2.0
"""The forward pass that the feature pyramids of all libraries share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fpn_fast import ops

Layer = Callable[[Tensor], Tensor]


def merge_pyramid(
    features: Iterable[Tensor], lateral_convs: Iterable[Layer], output_convs: Iterable[Layer], **merge: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Lateral convolutions, the top-down merge, and output convolutions.

    Args:
        features: maps [N, C_l, H_l, W_l], finest first.
        lateral_convs, output_convs: one layer per map.
        merge: options of :func:`ops.top_down`.

    Returns:
        (merged maps, output maps), finest first.
    """
    laterals = [conv(feature) for conv, feature in zip(lateral_convs, features, strict=True)]
    merged = ops.top_down(laterals, **merge)
    return merged, [conv(map) for conv, map in zip(output_convs, merged, strict=True)]
