# SPDX-License-Identifier: Apache-2.0
"""mmdetection's FPN and PAFPN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsInt

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast.nn._shared import merge_pyramid
from fpn_fast.nn.mmdet._neck import XAVIER, Neck, stages_of
from fpn_fast.nn.mmdet.conv_module import ConvModule

__all__ = ["FPN", "PAFPN"]

_EXTRA_CONVS = (False, True, "on_input", "on_lateral", "on_output")


def merge_options(upsample_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """upsample_cfg, the arguments of F.interpolate -> options of :func:`fpn_fast.ops.top_down`.

    Without a scale_factor each map is upsampled to the lateral's size, whatever the ratio is. Raises ValueError for an
    option that the op does not have.
    """
    options = dict(upsample_cfg)
    mode, scale = options.pop("mode", "nearest"), options.pop("scale_factor", None)
    corners = options.pop("align_corners", None)
    if options:
        raise ValueError(f"upsample_cfg has unknown keys {', '.join(map(str, options))}")
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"upsample_cfg's mode must be 'nearest' or 'bilinear', got {mode!r}")
    if corners and mode == "nearest":
        raise ValueError("upsample_cfg's align_corners goes with mode 'bilinear', got 'nearest'")
    if scale is not None and (not isinstance(scale, SupportsInt) or int(scale) < 1 or int(scale) != scale):
        raise ValueError(f"upsample_cfg's scale_factor must be a positive integer, got {scale}")
    return {"mode": mode, "align_corners": bool(corners), "scale_factor": None if scale is None else int(scale)}


class FPNForward:
    """The forward pass of FPN, for our module and for mmdetection's, which have the same attributes."""

    in_channels: list[int]
    num_outs: int
    start_level: int
    backbone_end_level: int
    add_extra_convs: bool | str
    relu_before_extra_convs: bool
    upsample_cfg: Mapping[str, Any]
    lateral_convs: nn.ModuleList
    fpn_convs: nn.ModuleList

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of all stages [N, in_channels[i], H_i, W_i], finest first -> num_outs maps [N, out_channels, H, W].

        Raises:
            ValueError: the number of maps differs from that of in_channels; others: see :func:`fpn_fast.ops.top_down`.
        """
        merged, outs = self._pyramid(inputs)
        return self._extend(inputs, merged, outs)

    def _pyramid(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        stages = stages_of(self, inputs)
        # The others make the extra levels.
        output_convs = list(self.fpn_convs)[: len(self.lateral_convs)]
        return merge_pyramid(stages, self.lateral_convs, output_convs, **merge_options(self.upsample_cfg))

    def _extend(self, inputs: Sequence[Tensor], merged: list[Tensor], outs: list[Tensor]) -> tuple[Tensor, ...]:
        """Appends coarser levels to `outs`, up to num_outs."""
        if not self.add_extra_convs:
            for _ in range(self.num_outs - len(outs)):
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
            return tuple(outs)
        sources = {"on_input": inputs[self.backbone_end_level - 1], "on_lateral": merged[-1], "on_output": outs[-1]}
        source = sources[str(self.add_extra_convs)]
        for conv in list(self.fpn_convs)[len(self.lateral_convs) :]:
            outs.append(conv(source))
            # No ReLU comes before the first extra level.
            source = F.relu(outs[-1]) if self.relu_before_extra_convs else outs[-1]
        return tuple(outs)


class FPN(FPNForward, Neck):
    """Feature Pyramid Network (Lin et al., 2017): drop-in for mmdetection's ``FPN`` neck.

    Constructor, ``state_dict`` keys and outputs are mmdetection's. One call of :func:`fpn_fast.ops.top_down` merges all
    levels. The constructor draws the weights that mmdetection draws in ``init_weights()``.

    Args:
        in_channels: channels of every stage of the backbone, finest first.
        out_channels: channels of every output.
        num_outs: number of outputs. Those above the backbone's last stage are extra levels.
        start_level, end_level: first and last stage to use; -1 is the backbone's last stage. Extra levels exist only
            after the backbone's last stage.
        add_extra_convs: what makes the extra levels. False: every second pixel of the last output. Otherwise strided
            3x3 convolutions, whose first input is the last stage for ``"on_input"`` or True, its lateral for
            ``"on_lateral"``, and the last output for ``"on_output"``.
        relu_before_extra_convs: adds a ReLU before each of these convolutions but the first.
        no_norm_on_lateral: leaves lateral convolutions without normalisation.
        conv_cfg, norm_cfg, act_cfg: for every convolution, see :class:`~fpn_fast.nn.mmdet.conv_module.ConvModule`.
        upsample_cfg: ``mode``, "nearest" or "bilinear"; ``align_corners`` for bilinear; ``scale_factor``, an integer
            ratio that neighbouring maps must have. Default: nearest, at any ratio.
        init_cfg: mmdetection's default, or None to keep mmcv's initialisation of convolutions.

    Raises:
        ValueError: an argument is none of these; the message names it and its value.

    Source: mmdet/models/necks/fpn.py.

    >>> import torch
    >>> neck = FPN([8, 16, 32], 4, num_outs=4, start_level=1, add_extra_convs="on_output")
    >>> maps = neck([torch.rand(1, 8 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(3)])
    >>> {map.shape[2]: tuple(map.shape) for map in maps}
    {8: (1, 4, 8, 8), 4: (1, 4, 4, 4), 2: (1, 4, 2, 2), 1: (1, 4, 1, 1)}
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        no_norm_on_lateral: bool = False,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        upsample_cfg: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = XAVIER,
    ) -> None:
        if add_extra_convs not in _EXTRA_CONVS:
            raise ValueError(f"add_extra_convs must be one of {_EXTRA_CONVS}, got {add_extra_convs!r}")
        layers: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
        lateral_layers = {**layers, "norm_cfg": None} if no_norm_on_lateral else layers
        super().__init__(in_channels, out_channels, num_outs, start_level, end_level, init_cfg, XAVIER, lateral_layers)
        self.add_extra_convs = "on_input" if add_extra_convs is True else add_extra_convs
        self.relu_before_extra_convs = relu_before_extra_convs
        self.no_norm_on_lateral = no_norm_on_lateral
        self.upsample_cfg = {"mode": "nearest"} if upsample_cfg is None else dict(upsample_cfg)
        merge_options(self.upsample_cfg)
        self.fpn_convs = nn.ModuleList(ConvModule(out_channels, out_channels, 3, **layers) for _ in self.lateral_convs)
        if self.add_extra_convs:
            for i in range(num_outs - len(self.lateral_convs)):
                of_input = i == 0 and self.add_extra_convs == "on_input"
                channels = self.in_channels[self.backbone_end_level - 1] if of_input else out_channels
                self.fpn_convs.append(ConvModule(channels, out_channels, 3, stride=2, **layers))
        self.init_weights()


class PAFPNForward(FPNForward):
    """The forward pass of PAFPN, for our module and for mmdetection's."""

    downsample_convs: nn.ModuleList
    pafpn_convs: nn.ModuleList

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See :class:`FPN`."""
        merged, outs = self._pyramid(inputs)
        for i, conv in enumerate(self.downsample_convs):
            outs[i + 1] = outs[i + 1] + conv(outs[i])
        outs[1:] = [conv(out) for conv, out in zip(self.pafpn_convs, outs[1:], strict=True)]
        return self._extend(inputs, merged, outs)


class PAFPN(PAFPNForward, FPN):
    """Path aggregation (Liu et al., 2018): drop-in for mmdetection's ``PAFPN`` neck.

    It adds a bottom-up path to the outputs of :class:`FPN`. Arguments and errors are those of FPN; there is no
    upsample_cfg, because upsampling is nearest.

    Source: mmdet/models/necks/pafpn.py.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        no_norm_on_lateral: bool = False,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = XAVIER,
    ) -> None:
        super().__init__(
            in_channels, out_channels, num_outs, start_level, end_level, add_extra_convs, relu_before_extra_convs,
            no_norm_on_lateral, conv_cfg, norm_cfg, act_cfg, init_cfg=init_cfg,
        )  # fmt: skip
        layers: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": act_cfg}
        self.downsample_convs, self.pafpn_convs = nn.ModuleList(), nn.ModuleList()
        for _ in range(len(self.lateral_convs) - 1):
            self.downsample_convs.append(ConvModule(out_channels, out_channels, 3, stride=2, **layers))
            self.pafpn_convs.append(ConvModule(out_channels, out_channels, 3, **layers))
        self.init_weights()
