# SPDX-License-Identifier: Apache-2.0
"""torchvision's detectors on any of its backbones whose stages halve the image, with a choice of pyramids and norms."""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from processes import UsageError
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

TWO_STAGE = ("faster_rcnn", "mask_rcnn")
ONE_STAGE = ("retinanet", "fcos")
NORMS = ("group", "frozen", "batch", "sync")
# Those of fpn_fast.nn.
FAMILY = ("pafpn", "bifpn", "nasfpn", "vitdet")
PYRAMIDS = ("fpn", *FAMILY, "no-top-down", "c4")
HEADS = ("tiny", "small", "torchvision")
# A backbone of our own, for training from random weights on CPUs: the channels of its stem and of its four stages.
SLIM, SLIM_CHANNELS = "slim_resnet", (16, 32, 64, 96, 128)
ASPECT_RATIOS = (0.5, 1.0, 2.0)
SMALL_HEAD_WIDTH, SMALL_MASK_WIDTH = 256, 128
# Any size that can be halved five times.
PROBE_SIZE = 128


class NoTopDownPyramid(FeaturePyramidNetwork):
    """Lateral and output convolutions on every level, without a top-down pathway: the FPN paper's Table 1 (d)."""

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        names, inputs = list(maps), list(maps.values())
        blocks = zip(inputs, self.inner_blocks, self.layer_blocks, strict=True)
        results = [layer(inner(each)) for each, inner, layer in blocks]
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, inputs, names)
        return OrderedDict(zip(names, results, strict=True))


class FamilyPyramid(nn.Module):
    """A pyramid of fpn_fast.nn behind torchvision's interface: maps by name in, maps by name out."""

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.member = member

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.member(list(maps.values()))
        levels = found.values() if isinstance(found, dict) else found
        return OrderedDict((str(i), each) for i, each in enumerate(levels))


class FirstMap(nn.Module):
    """What ViTDet's pyramid takes for a backbone: the one map that it is given, C4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def output_shape(self) -> dict[str, Any]:
        from fpn_fast.nn.detectron2 import ShapeSpec

        return {"c4": ShapeSpec(channels=self.channels, stride=16)}

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {"c4": maps[0]}


class ChannelsLastTrunk(nn.Sequential):
    """Swin's stages, whose maps are [N, H, W, C]."""


class ChannelsFirstLayerGetter(IntermediateLayerGetter):
    """The maps of a ChannelsLastTrunk as [N, C, H, W]."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict((name, each.permute(0, 3, 1, 2)) for name, each in super().forward(x).items())


class PlainTrunk(nn.Sequential):
    """A plain vision transformer, which has one map."""


class PlainVisionTransformer(nn.Module):
    """The last map of torchvision's VisionTransformer, for images of any multiple of the patch's size.

    As in ViTDet, the class token is left out, and the position embedding is resampled to the image.
    """

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.conv_proj, self.encoder = network.conv_proj, network.encoder

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x)
        n, channels, height, width = x.shape
        position = self.encoder.pos_embedding[:, 1:]
        side = math.isqrt(position.shape[1])
        grid = position.transpose(1, 2).reshape(1, channels, side, side)
        x = x + nn.functional.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        tokens = self.encoder.ln(self.encoder.layers(self.encoder.dropout(x.flatten(2).transpose(1, 2))))
        return tokens.transpose(1, 2).reshape(n, channels, height, width)


def build_detector(
    model: str,
    backbone: str,
    classes: int,
    image_size: int,
    *,
    norm: str = "group",
    frozen_stages: int = 0,
    pretrained: bool = False,
    pyramid: str = "fpn",
    heads: str = "small",
    channels: int = 256,
    multi_scale: tuple[int, int] | None = None,
) -> nn.Module:
    """Build a detector of `classes` classes and the background, for images whose shorter side becomes `image_size`.

    heads: "torchvision" for its sizes, meant for images of 800 pixels; "small" for about a tenth of them: fewer and
    smaller anchors, proposals and samples, and narrower heads; "tiny" for half the samples of "small", half of them
    objects.
    channels: of every pyramid level, and with it of the heads.
    multi_scale: in training, each image's shorter side is drawn from these two and every 32 pixels between them.
    """
    small = heads != "torchvision"
    body = build_backbone(backbone, model in TWO_STAGE, norm, frozen_stages, pretrained, pyramid, channels)
    training_sizes = () if multi_scale is None else tuple(range(multi_scale[0], multi_scale[1] + 1, 32))
    # torchvision draws from all of them in training, and takes the last one in evaluation.
    sizes = (*training_sizes, image_size)
    # torchvision's default proportion is 800 to 1333.
    common: dict[str, Any] = {"min_size": sizes, "max_size": max(sizes) * 5 // 3}
    anchor = 16 if small else 32
    if model in ONE_STAGE:
        kind = FCOS if model == "fcos" else RetinaNet
        if model == "retinanet":
            thirds = [tuple(int(anchor * 2 ** (level + third / 3)) for third in range(3)) for level in range(5)]
            common["anchor_generator"] = AnchorGenerator(tuple(thirds), (ASPECT_RATIOS,) * 5)
        return kind(body, classes + 1, **common)
    scales = tuple(anchor * 2**level for level in range(5))
    per_level = (scales,) if pyramid == "c4" else tuple((scale,) for scale in scales)
    common["rpn_anchor_generator"] = AnchorGenerator(per_level, (ASPECT_RATIOS,) * len(per_level))
    if small:
        common |= {
            "rpn_pre_nms_top_n_train": 500,
            "rpn_post_nms_top_n_train": 300,
            "rpn_pre_nms_top_n_test": 300,
            "rpn_post_nms_top_n_test": 150,
            "box_batch_size_per_image": 64 if heads == "tiny" else 128,
            "box_positive_fraction": 0.5 if heads == "tiny" else 0.25,
            "box_head": TwoMLPHead(channels * 7 * 7, SMALL_HEAD_WIDTH),
            "box_predictor": FastRCNNPredictor(SMALL_HEAD_WIDTH, classes + 1),
        }
    if small and model == "mask_rcnn":
        common["mask_head"] = MaskRCNNHeads(channels, (SMALL_MASK_WIDTH,) * 2, 1)
        common["mask_predictor"] = MaskRCNNPredictor(SMALL_MASK_WIDTH, SMALL_MASK_WIDTH, classes + 1)
    kind = MaskRCNN if model == "mask_rcnn" else FasterRCNN
    return kind(body, None if small else classes + 1, **common)


def build_backbone(
    name: str, two_stage: bool, norm: str, frozen_stages: int, pretrained: bool, pyramid: str, channels: int = 256
) -> nn.Sequential:
    """A classifier's stages and a pyramid: P2 to P6 for a two-stage detector, P3 to P7 for one stage, or C4 alone.

    The checkpoint keys are those of torchvision's BackboneWithFPN.
    """
    trunk = _trunk(name, pretrained)
    wanted = (4,) if pyramid in ("c4", "vitdet") else (2, 3, 4, 5) if two_stage else (3, 4, 5)
    ends = _stage_ends(trunk, name, wanted if isinstance(trunk, PlainTrunk) else (2, 3, 4, 5))
    if frozen_stages and frozen_stages not in ends:
        raise UsageError(f"--frozen-stages {frozen_stages}: {name} has no stage of stride {2**frozen_stages}")
    names = [child_name for child_name, _ in trunk.named_children()]
    frozen = names[: ends[frozen_stages][0] + 1] if frozen_stages else []
    # Running statistics of a frozen stage stay as they are.
    _replace_batch_norms(trunk, frozen, "group" if norm == "group" else "frozen")
    for child_name in frozen:
        trunk.get_submodule(child_name).requires_grad_(False)
    _replace_batch_norms(trunk, names, norm)
    getter = ChannelsFirstLayerGetter if isinstance(trunk, ChannelsLastTrunk) else IntermediateLayerGetter
    body = getter(trunk, {names[ends[level][0]]: str(i) for i, level in enumerate(wanted)})
    fpn = _pyramid(pyramid, [ends[level][1] for level in wanted], channels, two_stage, norm)
    backbone = nn.Sequential(OrderedDict(body=body, fpn=fpn))
    # torchvision's detectors read it.
    backbone.out_channels = channels
    return backbone


def _pyramid(pyramid: str, widths: list[int], channels: int, two_stage: bool, norm: str) -> nn.Module:
    """A pyramid of five levels, or one of C4 alone, over maps of these channels."""
    if pyramid in FAMILY:
        return FamilyPyramid(_member(pyramid, widths, channels, two_stage, norm))
    kind = NoTopDownPyramid if pyramid == "no-top-down" else FeaturePyramidNetwork
    extra = LastLevelMaxPool() if two_stage else LastLevelP6P7(channels, channels)
    # From random weights, a sum over levels of different scale learns more slowly.
    norms = _group_norm if norm == "group" else None
    return kind(widths, channels, None if pyramid == "c4" else extra, norms)


def _member(pyramid: str, widths: list[int], channels: int, two_stage: bool, norm: str) -> nn.Module:
    from fpn_fast.nn import detectron2, effdet, mmdet

    groups = {"type": "GN", "num_groups": _group_norm(channels).num_groups} if norm == "group" else None
    if pyramid == "pafpn":
        extra = False if two_stage else "on_output"
        return mmdet.PAFPN(widths, channels, 5, add_extra_convs=extra, norm_cfg=groups)
    if pyramid == "nasfpn":
        return mmdet.NASFPN(widths, channels, 5, stack_times=3, norm_cfg=groups)
    if pyramid == "bifpn":
        layers = {} if norm != "group" else {"norm_layer": _group_norm, "norm_kwargs": {}}
        config = effdet.BiFpnConfig(fpn_channels=channels, **layers)
        return effdet.BiFpn(config, [{"num_chs": width} for width in widths])
    top = detectron2.LastLevelMaxPool() if two_stage else detectron2.LastLevelP6P7(channels, channels, "p5")
    scales = [4.0, 2.0, 1.0, 0.5][0 if two_stage else 1 :]
    return detectron2.SimpleFeaturePyramid(FirstMap(widths[0]), "c4", channels, scales, top)


def _trunk(name: str, pretrained: bool) -> nn.Module:
    """A classifier's layers before its pooling, as a module that calls its children one after another."""
    if name == SLIM:
        return _slim_resnet()
    try:
        network = get_model(name, weights="DEFAULT" if pretrained else None)
    except (KeyError, ValueError) as error:
        raise UsageError(f"torchvision has no model {name!r}") from error
    if isinstance(network, SwinTransformer):
        return ChannelsLastTrunk(OrderedDict(network.features.named_children()))
    if isinstance(network, VisionTransformer):
        return PlainTrunk(OrderedDict(vit=PlainVisionTransformer(network)))
    if isinstance(getattr(network, "features", None), nn.Sequential):
        return network.features
    if hasattr(network, "trunk_output"):
        return nn.Sequential(OrderedDict([("stem", network.stem), *network.trunk_output.named_children()]))
    return network


def _slim_resnet() -> nn.Sequential:
    """A stem and one basic block per stage: 0.6 million parameters."""
    stages: list[tuple[str, nn.Module]] = [("stem", Conv2dNormActivation(3, SLIM_CHANNELS[0], 3, 2))]
    for i, (before, after) in enumerate(pairwise(SLIM_CHANNELS), start=1):
        shortcut = Conv2dNormActivation(before, after, 1, 2, activation_layer=None)
        stages.append((f"layer{i}", BasicBlock(before, after, 2, shortcut)))
    return nn.Sequential(OrderedDict(stages))


def _stage_ends(trunk: nn.Module, name: str, wanted: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """For each level l, the last child whose map has stride 2^l: (index of the child, channels)."""
    # Where the stem goes to stride 4 at once, there is nothing to freeze before it.
    ends = {1: (-1, 3)}
    was_training = trunk.training
    maps = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE)
    with torch.no_grad():
        for index, child in enumerate(trunk.eval().children()):
            try:
                maps = child(maps)
            except (AssertionError, RuntimeError, TypeError):
                break
            if not isinstance(maps, Tensor) or maps.dim() != 4:
                break
            shape = maps.movedim(3, 1).shape if isinstance(trunk, ChannelsLastTrunk) else maps.shape
            if shape[2] != shape[3]:
                break
            level = math.log2(PROBE_SIZE / shape[2])
            # A pool after the last stage belongs to the classifier.
            if level.is_integer() and level <= 5:
                ends[int(level)] = (index, shape[1])
    trunk.train(was_training)
    for level in wanted:
        if level not in ends:
            raise UsageError(f"--backbone {name} has no stage with maps of stride {2**level} in a simple sequence")
    return ends


def _group_norm(channels: int) -> nn.GroupNorm:
    """The norm of a pyramid's maps: eight channels per group, like 256 channels in 32 groups."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


def _replace_batch_norms(module: nn.Module, names: list[str], norm: str) -> None:
    """Replace every BatchNorm2d in the children of these names by `norm`; other norms stay."""
    for name in names:
        child = getattr(module, name)
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _norm_like(child, norm))
        else:
            _replace_batch_norms(child, [each for each, _ in child.named_children()], norm)


def _norm_like(old: nn.BatchNorm2d, norm: str) -> nn.Module:
    if norm == "batch":
        return old
    if norm == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(old)
    if norm == "frozen":
        frozen = FrozenBatchNorm2d(old.num_features, old.eps)
        frozen.load_state_dict(old.state_dict())
        return frozen
    # Statistics of one image alone train from random weights in small batches.
    return nn.GroupNorm(math.gcd(32, old.num_features), old.num_features)
