# SPDX-License-Identifier: Apache-2.0
"""mmcv's ConvModule for necks: a convolution, a normalisation and an activation from dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

#: type -> (name of the submodule in mmcv, layer).
_NORMS: dict[str, tuple[str, type[nn.Module]]] = {
    "BN": ("bn", nn.BatchNorm2d),
    "BN2d": ("bn", nn.BatchNorm2d),
    "SyncBN": ("bn", nn.SyncBatchNorm),
    "GN": ("gn", nn.GroupNorm),
}
_ACTIVATIONS = ("ReLU", "LeakyReLU", "PReLU", "RReLU", "ReLU6", "ELU", "Sigmoid", "Tanh", "SiLU", "GELU")
#: mmcv's Swish multiplies by the sigmoid, which rounds twice.
_RENAMED = {"Swish": "SiLU"}


class ConvModule(nn.Module):
    """A padded convolution with optional normalisation and activation.

    Keys: ``conv.weight``, ``conv.bias``, ``bn.*`` or ``gn.*``. Initialisation is mmcv's.

    Args:
        conv_cfg: must be None; other convolutions are not supported.
        norm_cfg: ``type``, "BN", "SyncBN" or "GN", ``requires_grad`` and the layer's arguments. Default: none.
        act_cfg: ``type``, a name in torch.nn such as "ReLU", and its arguments. Default: none.
        groups: of the convolution.
        bias: of the convolution. Default: only without normalisation.
        order: of the three.

    Raises:
        ValueError: a dict has an unknown type; GN without num_groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        groups: int = 1,
        bias: bool | None = None,
        order: tuple[str, ...] = ("conv", "norm", "act"),
    ) -> None:
        super().__init__()
        if conv_cfg is not None:
            raise ValueError(f"conv_cfg must be None, for an ordinary convolution, got {dict(conv_cfg)}")
        self.order = order
        bias = norm_cfg is None if bias is None else bias
        options: dict[str, Any] = {"padding": kernel_size // 2, "groups": groups, "bias": bias}
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, **options)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm_name = None
        if norm_cfg is not None:
            self.norm_name, norm = make_norm(norm_cfg, out_channels)
            self.add_module(self.norm_name, norm)
        self.activate = None
        if act_cfg is not None:
            options = dict(act_cfg)
            kind = options.pop("type", None)
            kind = _RENAMED.get(kind, kind)
            if kind not in _ACTIVATIONS:
                raise ValueError(f"act_cfg must be of type {', '.join(_ACTIVATIONS)}, got {kind!r}")
            self.activate = getattr(nn, kind)(**options)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]"""
        for step in self.order:
            if step == "conv":
                x = self.conv(x)
            elif step == "norm" and self.norm_name is not None:
                x = getattr(self, self.norm_name)(x)
            elif step == "act" and self.activate is not None:
                x = self.activate(x)
        return x


def make_norm(norm_cfg: Mapping[str, Any], channels: int) -> tuple[str, nn.Module]:
    """(name of the submodule in mmcv, layer) of a `norm_cfg`; raises ValueError for an unknown type."""
    options = dict(norm_cfg)
    kind, trained = options.pop("type", None), options.pop("requires_grad", True)
    if kind not in _NORMS:
        raise ValueError(f"norm_cfg must be of type {', '.join(_NORMS)}, got {kind!r}")
    name, layer = _NORMS[kind]
    if kind == "GN":
        if "num_groups" not in options:
            raise ValueError(f"norm_cfg of type 'GN' must have num_groups, got {dict(norm_cfg)}")
        options["num_channels"] = channels
    else:
        options["num_features"] = channels
    norm = layer(**options)
    for parameter in norm.parameters():
        parameter.requires_grad = trained
    return name, norm
