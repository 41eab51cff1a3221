# SPDX-License-Identifier: Apache-2.0
"""mmdetection's FPN_CARAFE: a pyramid with learned upsampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fpn_fast import ops
from fpn_fast.nn._pyramid import add_blocks, blocks_of, crop_to, size_of
from fpn_fast.nn.mmdet._neck import XAVIER, Neck, stages_of
from fpn_fast.nn.mmdet.conv_module import ConvModule

__all__ = ["FPN_CARAFE"]

_UPSAMPLES = ("nearest", "bilinear", "deconv", "pixel_shuffle", None)


class _PixelShuffle(nn.Module):
    """A convolution to four times the channels, whose groups of four are the pixels of a 2x2 block."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.upsample_conv = nn.Conv2d(channels, 4 * channels, kernel, padding=(kernel - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample_conv(x)


class FPN_CARAFE(Neck):
    """A pyramid with learned upsampling: drop-in for mmdetection's ``FPN_CARAFE`` neck, without CARAFE itself.

    Constructor, ``state_dict`` keys and outputs are mmdetection's. In ``lateral + upsample(top)`` a deconvolution of
    kernel 2 is a 1x1 convolution to four times the channels, and the addition reads these as 2x2 blocks, without an
    upsampled copy. Extra levels are strided convolutions and take part in the merge.

    Args:
        in_channels, out_channels, num_outs, start_level, end_level: see :class:`FPN`.
        norm_cfg, act_cfg: of every convolution, see :class:`~fpn_fast.nn.mmdet.conv_module.ConvModule`.
        order: of a block, ("conv", "norm", "act") or ("act", "conv", "norm").
        upsample_cfg: ``type``: "nearest", "bilinear", "deconv", "pixel_shuffle" or None; ``upsample_kernel`` for the
            last two but None. It must be given, because mmdetection's default is CARAFE.

    Raises:
        ValueError: an argument is none of these.

    Source: mmdet/models/necks/fpn_carafe.py.

    >>> import torch
    >>> neck = FPN_CARAFE([4, 6], 8, num_outs=2, upsample_cfg=dict(type="deconv", upsample_kernel=2))
    >>> [tuple(map.shape) for map in neck([torch.rand(1, 4, 7, 12), torch.rand(1, 6, 4, 6)])]
    [(1, 8, 7, 12), (1, 8, 4, 6)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        order: tuple[str, ...] = ("conv", "norm", "act"),
        init_cfg: Mapping[str, Any] | None = None,
        *,
        upsample_cfg: Mapping[str, Any],
    ) -> None:
        if tuple(order) not in (("conv", "norm", "act"), ("act", "conv", "norm")):
            raise ValueError(f"order must be ('conv', 'norm', 'act') or ('act', 'conv', 'norm'), got {order}")
        kind, kernel = upsample_cfg.get("type"), int(upsample_cfg.get("upsample_kernel", 0))
        if kind not in _UPSAMPLES:
            raise ValueError(f"upsample_cfg must be of type {', '.join(map(str, _UPSAMPLES))}, got {kind!r}")
        if kind in ("deconv", "pixel_shuffle") and kernel < 1:
            raise ValueError(f"upsample_cfg must have a positive upsample_kernel, got {dict(upsample_cfg)}")
        layers: dict[str, Any] = {"norm_cfg": norm_cfg, "act_cfg": act_cfg, "order": tuple(order)}
        super().__init__(in_channels, out_channels, num_outs, start_level, end_level, init_cfg, XAVIER, layers)
        self.upsample = kind
        channels = self.in_channels[self.backbone_end_level - 1]
        for _ in range(num_outs - len(self.lateral_convs)):
            self.lateral_convs.append(ConvModule(channels, out_channels, 3, stride=2, **layers))
            channels = out_channels
        self.fpn_convs = nn.ModuleList(ConvModule(out_channels, out_channels, 3, **layers) for _ in range(num_outs))
        self.upsample_modules = nn.ModuleList(_upsampling(kind, out_channels, kernel) for _ in range(num_outs - 1))
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the weights of all convolutions and deconvolutions anew, which the constructor has done already."""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of all stages [N, in_channels[i], H_i, W_i], finest first -> num_outs maps [N, out_channels, H_l, W_l].

        Raises:
            ValueError: the number of maps differs from that of in_channels; a map is larger than twice the next one.
        """
        stages = list(stages_of(self, inputs))
        laterals: list[Tensor] = []
        for i, conv in enumerate(self.lateral_convs):
            # The first extra level is made from the last stage, every other one from the level before it.
            source = stages[i] if i < len(stages) else stages[-1] if i == len(stages) else laterals[-1]
            laterals.append(conv(source))
        for i in reversed(range(len(laterals) - 1)):
            laterals[i] = self._merge(laterals[i], laterals[i + 1], self.upsample_modules[i])
        return tuple(conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True))

    def _merge(self, lateral: Tensor, top: Tensor, layer: nn.Module) -> Tensor:
        (height, width), (h, w) = size_of(lateral), size_of(top)
        factor = 1 if self.upsample is None else 2
        if height > factor * h or width > factor * w:
            raise ValueError(f"a map must be at most {factor} times as large as the next one, got {height} x {width} "
                             f"above {h} x {w}")  # fmt: skip
        if isinstance(layer, _PixelShuffle):
            return add_blocks(lateral, layer(top))
        blocks = blocks_of(top, layer) if isinstance(layer, nn.ConvTranspose2d) else None
        if blocks is not None:
            return add_blocks(lateral, blocks)
        if self.upsample != "deconv" and (height, width) == (factor * h, factor * w):
            return ops.upsample_add(lateral, top, self.upsample or "nearest")
        return lateral + crop_to(layer(top), lateral)


def _upsampling(kind: str | None, channels: int, kernel: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    if kind == "pixel_shuffle":
        return _PixelShuffle(channels, kernel)
    if kind == "deconv":
        margin = (kernel - 1) // 2
        return nn.ConvTranspose2d(channels, channels, kernel, 2, margin, margin)
    return nn.Upsample(scale_factor=2, mode=kind, align_corners=False if kind == "bilinear" else None)
