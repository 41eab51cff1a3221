# SPDX-License-Identifier: Apache-2.0
"""Drop-in for effdet's BiFpn, the pyramid of EfficientDet. effdet is not needed."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpn_fast.nn import _pyramid
from fpn_fast.nn._pyramid import ACTIVATIONS, Norm, block, conv, fused_activation, size_of

__all__ = ["BiFpn", "BiFpnConfig", "Node", "graph"]

#: effdet's weight methods -> options of :func:`fpn_fast.ops.fuse_maps`.
_RULES: dict[str, dict[str, Any]] = {
    "attn": {"weight_rule": "softmax"}, "fastattn": {"weight_rule": "fast"}, "sum": {},
}  # fmt: skip


class Node(NamedTuple):
    """A node of a cell: the level of its output, the maps that it sums, and the rule of their weights.

    Levels count from the finest, 0. Inputs count the maps of all levels first and the nodes after them.
    """

    level: int
    inputs: tuple[int, ...]
    method: str


def graph(name: str, levels: int) -> list[Node]:
    """The nodes of a cell of `levels` levels. Its outputs are the last `levels` nodes, finest first.

    Args:
        name: "bifpn_fa", "bifpn_attn", "bifpn_sum", "pan_fa", "pan_sum", "qufpn_fa" or "qufpn_sum".

    Raises:
        ValueError: the name is none of these.

    Source: effdet/config/fpn_config.py.

    >>> [node.inputs for node in graph("bifpn_fa", 3)]
    [(1, 2), (0, 3), (1, 3, 4), (2, 5)]
    """
    kind, _, method = name.partition("_")
    if name not in ("bifpn_fa", "bifpn_attn", "bifpn_sum", "pan_fa", "pan_sum", "qufpn_fa", "qufpn_sum"):
        raise ValueError(f"fpn_name must be a bifpn_, pan_ or qufpn_ with fa or sum, or bifpn_attn, got {name!r}")
    method = {"fa": "fastattn"}.get(method, method)
    nodes: list[Node] = []
    # The maps of each level so far, oldest first.
    made = [[level] for level in range(levels)]

    def node(level: int, *inputs: int, method: str = method) -> None:
        made[level].append(levels + len(nodes))
        nodes.append(Node(level, inputs, method))

    top = levels - 1
    if kind == "bifpn":
        for level in reversed(range(top)):
            node(level, made[level][-1], made[level + 1][-1])
        for level in range(1, levels):
            node(level, *made[level], made[level - 1][-1])
    elif kind == "pan":
        for level in reversed(range(levels)):
            node(level, made[level][-1], *(above[-1] for above in made[level + 1 : level + 2]))
        for level in range(levels):
            node(level, made[level][-1], *([made[level - 1][-1]] if level else []))
    else:
        # Down and up, then up and down, each pair from the inputs; made[level][2] and [4] are what they end in.
        for level in reversed(range(top)):
            node(level, made[level][-1], made[level + 1][-1])
        made[top].append(made[top][-1])
        for level in range(1, top):
            node(level, *made[level], made[level - 1][-1])
        node(top, made[top][0], made[top - 1][-1])
        made[0].append(made[0][-1])
        for level in range(1, levels):
            node(level, made[level][0], made[level - 1][0 if level == 1 else -1])
        made[0].append(made[0][-1])
        for level in reversed(range(1, top)):
            node(level, made[level][0], made[level][-1], made[level + 1][-1])
        node(0, made[0][0], made[1][-1])
        made[top].append(made[top][-1])
        for level in range(levels):
            node(level, made[level][2], made[level][4], method="fastattn")
    return nodes


@dataclass
class BiFpnConfig:
    """The settings that :class:`BiFpn` reads of a configuration of effdet, with the values of efficientdet_d0."""

    fpn_name: str | None = None
    fpn_config: Any = None
    fpn_channels: int = 64
    fpn_cell_repeats: int = 3
    min_level: int = 3
    num_levels: int = 5
    pad_type: str = ""
    act_type: str = "swish"
    norm_layer: Norm | None = None
    norm_kwargs: Mapping[str, Any] = field(default_factory=lambda: {"eps": 1e-3, "momentum": 0.01})
    separable_conv: bool = True
    apply_resample_bn: bool = True
    conv_after_downsample: bool = False
    conv_bn_relu_pattern: bool = False
    downsample_type: str = "max"
    upsample_type: str = "nearest"
    redundant_bias: bool = False


class _Combine(nn.Module):
    """The weighted sum of a node."""

    def __init__(self, node: Node, sources: Sequence[tuple[int, int]], config: Any, norm: Norm) -> None:
        """sources: (level, channels) of every map so far."""
        super().__init__()
        self.inputs, self.method = node.inputs, node.method
        self.forms = [_form(node.level - sources[i][0], config) for i in node.inputs]
        self.resample = nn.ModuleDict({str(i): _projection(sources[i][1], config, norm) for i in node.inputs})
        self.edge_weights = None if node.method == "sum" else nn.Parameter(torch.ones(len(node.inputs)))

    def forward(self, x: Sequence[Tensor], size: tuple[int, int], activation: str | None = None) -> Tensor:
        edges = [project(x[i]) for i, project in zip(self.inputs, self.resample.values(), strict=True)]
        weights = self.edge_weights
        return _pyramid.add(edges, size, self.forms, weights=weights, activation=activation, **_RULES[self.method])


class _Node(nn.Module):
    """A sum, an activation and a convolution."""

    def __init__(self, node: Node, sources: Sequence[tuple[int, int]], config: Any, norm: Norm) -> None:
        super().__init__()
        self.combine = _Combine(node, sources, config, norm)
        act = ACTIVATIONS[config.act_type]
        first = not config.conv_bn_relu_pattern
        channels, bias = config.fpn_channels, config.redundant_bias and first
        if config.separable_conv:
            layers = {
                "conv_dw": conv(channels, channels, 3, groups=channels, bias=False),
                "conv_pw": conv(channels, channels, 1, bias=bias),
            }
        else:
            layers = {"conv": conv(channels, channels, 3, bias=bias)}
        convolution = block(**layers, bn=norm(channels), act=None if first else act())
        self.after_combine = block(act=act() if first else None, conv=convolution)

    def forward(self, x: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        fused = fused_activation(self.after_combine[0])
        summed = self.combine(x, size, fused)
        return self.after_combine.conv(summed) if fused else self.after_combine(summed)  # type: ignore[operator]


class _Cell(nn.Module):
    def __init__(self, nodes: Sequence[Node], sources: Sequence[tuple[int, int]], config: Any, norm: Norm) -> None:
        super().__init__()
        self.num_levels = config.num_levels
        every = [*sources, *((node.level, config.fpn_channels) for node in nodes)]
        self.levels = [node.level for node in nodes]
        self.fnode = nn.ModuleList(_Node(node, every, config, norm) for node in nodes)

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        maps, sizes = list(x), [size_of(each) for each in x]
        for node, level in zip(self.fnode, self.levels, strict=True):
            maps.append(node(maps, sizes[level]))
        return maps[-self.num_levels :]


class BiFpn(nn.Module):
    """BiFPN (Tan et al., 2020), PAN and QuadFPN: drop-in for effdet's ``BiFpn``.

    Constructor, ``state_dict`` keys and outputs are effdet's. One call of :func:`fpn_fast.ops.fuse_maps` per node
    resamples, weighs and sums its maps and applies the activation. The constructor draws the weights that EfficientDet
    draws.

    Note:
        Images need not have the configured size, where effdet fails: each map has half the size of the one before,
        rounded up. The list of maps and `feature_info` stay as they are, to which effdet appends. Under CUDA's autocast
        effdet's sums are float32; ours have the dtype of their maps.

    Args:
        config: a configuration of effdet, or :class:`BiFpnConfig`. It is read for ``fpn_name`` or the nodes of
            ``fpn_config``, ``fpn_channels``, ``fpn_cell_repeats``, ``min_level``, ``num_levels``, ``pad_type`` ("" for
            symmetric padding, "same" for TensorFlow's), ``act_type``, ``norm_layer``, ``norm_kwargs``,
            ``separable_conv``, ``apply_resample_bn``, ``conv_bn_relu_pattern``, ``redundant_bias``,
            ``downsample_type`` ("max" or "bilinear") and ``upsample_type`` ("nearest" or "bilinear").
        feature_info: for each map of the backbone, finest first, ``{"num_chs": channels, "reduction": stride}``. The
            strides double.

    Raises:
        ValueError: a setting is none of these; an edge of fpn_config joins levels that are not neighbours.

    Source: effdet/efficientdet.py.

    >>> pyramid = BiFpn(BiFpnConfig(fpn_channels=8, fpn_cell_repeats=1), [dict(num_chs=4, reduction=8)] * 3)
    >>> [tuple(map.shape) for map in pyramid([torch.rand(1, 4, 16 // 2**i, 24 // 2**i) for i in range(3)])]
    [(1, 8, 16, 24), (1, 8, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3), (1, 8, 1, 2)]
    """

    def __init__(self, config: Any, feature_info: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        if config.act_type not in ACTIVATIONS:
            raise ValueError(f"act_type must be one of {', '.join(ACTIVATIONS)}, got {config.act_type!r}")
        self.config = config
        levels, channels = config.num_levels, [int(info["num_chs"]) for info in feature_info]
        self.num_levels, self.num_inputs = levels, len(channels)
        norm: Norm = functools.partial(config.norm_layer or nn.BatchNorm2d, **(config.norm_kwargs or {}))
        # Maps beyond the backbone's have a projection where channels differ, and half the size.
        self.resample = nn.Sequential()
        for level in range(self.num_inputs, levels):
            self.resample.add_module(str(level), _projection(channels[-1], config, norm))
            channels.append(config.fpn_channels)
        nodes = graph(config.fpn_name or "bifpn_fa", levels) if not config.fpn_config else _nodes_of(config)
        self._down = _form(1, config)
        self.cell = nn.Sequential()
        for repeat in range(config.fpn_cell_repeats):
            self.cell.add_module(str(repeat), _Cell(nodes, list(enumerate(channels)), config, norm))
            channels = [config.fpn_channels] * levels
        self.apply(_initialise)

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the backbone [N, C_l, H_l, W_l] -> num_levels maps [N, fpn_channels, H_l, W_l], all finest first.

        Raises:
            ValueError: the number of maps is not that of feature_info; others: see :func:`fpn_fast.ops.fuse_maps`.
        """
        _pyramid.check_count(x, self.num_inputs, "x")
        maps = list(x)
        for project in self.resample:
            projected = project(maps[-1])
            height, width = size_of(projected)
            maps.append(_pyramid.add([projected], (-(-height // 2), -(-width // 2)), [self._down]))
        return self.cell(maps)


def _nodes_of(config: Any) -> list[Node]:
    """The nodes of a configuration's own graph, whose levels count from an image's."""
    return [
        Node(int(node["feat_level"]) - config.min_level, tuple(node["inputs_offsets"]), str(node["weight_method"]))
        for node in config.fpn_config.nodes
    ]


def _form(step: int, config: Any) -> str:
    """How an edge resamples a map that is `step` levels finer than its node."""
    down = {"max": "max_pool_same" if config.pad_type == "same" else "max_pool", "bilinear": "bilinear"}
    up = {"nearest": "nearest", "bilinear": "bilinear"}
    if step == 0:
        return "identity"
    if abs(step) > 1:
        raise ValueError(f"an edge must join neighbouring levels, got one over {abs(step)}")
    kind, forms = (config.downsample_type, down) if step > 0 else (config.upsample_type, up)
    if (kind or next(iter(forms))) not in forms:
        name = "downsample_type" if step > 0 else "upsample_type"
        raise ValueError(f"{name} must be one of {', '.join(forms)}, got {kind!r}")
    return forms[kind or next(iter(forms))]


def _projection(channels: int, config: Any, norm: Norm) -> nn.Sequential:
    """The 1x1 convolution of an edge whose map does not have the pyramid's channels; nothing otherwise."""
    if channels == config.fpn_channels:
        return nn.Sequential()
    normed = config.apply_resample_bn
    layer = conv(channels, config.fpn_channels, 1, bias=not normed or config.redundant_bias)
    return block(conv=block(conv=layer, bn=norm(config.fpn_channels) if normed else None))


def _initialise(layer: nn.Module) -> None:
    """EfficientDet's: uniform by the mean of fan-in and fan-out, the latter per group."""
    if isinstance(layer, nn.Conv2d):
        area = math.prod(layer.kernel_size)
        fan_in, fan_out = layer.weight.shape[1] * area, layer.weight.shape[0] * area // layer.groups
        limit = math.sqrt(3 / max(1.0, (fan_in + fan_out) / 2))
        nn.init.uniform_(layer.weight, -limit, limit)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
