# SPDX-License-Identifier: Apache-2.0
"""The modules that subclass torchvision's, against torchvision's own code or the reference behind the same module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet as PlainRetinaNet
from torchvision.models.detection import roi_heads, transform
from torchvision.models.detection.anchor_utils import AnchorGenerator as PlainAnchorGenerator
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign as PlainPooler

from fpn_fast import backends, integrations, nn
from fpn_fast.ops._schemas import FOCAL_TILE
from fpn_fast.verify.checks import bottom_up, register
from fpn_fast.verify.checks.detections import head_maps
from fpn_fast.verify.checks.roi_align import boxes_in
from fpn_fast.verify.draw import Draw, padded, text_of
from fpn_fast.verify.trial import Trial, against_reference, boxes_rule, decision, linear, not_worse

_SINGLE = (torch.float32, torch.float64)

register("nn.FrozenBatchNorm2d", ops=bottom_up.OPS, keys=bottom_up.KEYS, module=True)(bottom_up.frozen_batch_norm)


class _GivenHead(torch.nn.Module):
    """A head whose features are its outputs: A logits, then 4A deltas."""

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        anchors = features[0].size(1) // 5
        return [f[:, :anchors] for f in features], [f[:, anchors:] for f in features]


def _generators(draw: Draw, levels: int) -> tuple[PlainAnchorGenerator, nn.AnchorGenerator]:
    sizes = tuple((draw.integer(8, 20) << i,) for i in range(levels))
    ratios = (draw.choice(((1.0,), (0.5, 1.0, 2.0))),) * levels
    return PlainAnchorGenerator(sizes, ratios), nn.AnchorGenerator(sizes, ratios)


def _on(device: str, images: ImageList) -> ImageList:
    return ImageList(images.tensors.to(device), images.image_sizes)


@register("nn.AnchorGenerator", backends=("reference",), dtypes=_SINGLE)
def anchor_generator(draw: Draw) -> Trial:
    sizes = draw.pyramid(draw.integer(1, 4))
    plain, fast = _generators(draw, len(sizes))
    maps = [torch.zeros(2, 1, *size, dtype=draw.dtype, device=draw.device) for size in sizes]
    images = ImageList(torch.zeros(2, 3, 100, 168, device=draw.device), [(100, 160), (90, 168)])
    return decision(
        text_of(maps), lambda: fast(images, maps), lambda: plain(_on("cpu", images), [m.cpu() for m in maps])
    )


@register("nn.RegionProposalNetwork", ops=("generate_proposals", "match_anchors"), dtypes=_SINGLE)
def region_proposal_network(draw: Draw) -> Trial:
    """Proposals and, in training, the losses of the same random sample."""
    sizes = draw.pyramid(draw.integer(1, 3))
    generator = _generators(draw, len(sizes))[1]
    anchors, batch = generator.num_anchors_per_location()[0], draw.integer(1, 2)
    counts = {"training": draw.integer(1, 300), "testing": draw.integer(1, 200)}
    module = nn.RegionProposalNetwork(
        generator, _GivenHead(), 0.7, 0.3, 64, 0.5, counts, counts, draw.choice((0.5, 0.7)), draw.choice((0.0, 0.3))
    )  # fmt: skip
    module.train(draw.flavour("training", "evaluation") == "training")
    logits, deltas = head_maps(draw, batch, anchors, sizes, "apart")
    features = [torch.cat(each, 1) for each in zip(logits, deltas, strict=True)]
    images = ImageList(torch.zeros(batch, 3, 100, 168, device=draw.device), [(100, 160), (90, 168)][:batch])
    truths = [boxes_in(draw, draw.integer(0, 6), 90, 160) for _ in range(batch)]
    sampler_seed = draw.random.getrandbits(60)

    def run(device: str) -> list[Tensor]:
        own = copy.deepcopy(module)
        named = {str(i): f.to(device) for i, f in enumerate(features)}
        targets = [{"boxes": boxes.to(device, draw.dtype)} for boxes in truths] if module.training else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sampler_seed)
            boxes, losses = own(_on(device, images), named, targets)
        # The sampler's random numbers differ on a GPU, and so do the losses.
        found = losses.values() if device == draw.device == "cpu" else ()
        return [*(padded(b, module.post_nms_top_n()) for b in boxes), *found]

    return against_reference(draw, f"{text_of(features)}, {_mode(module)}", run)


def _mode(module: torch.nn.Module) -> str:
    return "training" if module.training else "evaluation"


@register("nn.RoIHeads", ops=("match_anchors",), dtypes=_SINGLE)
def roi_heads_matching(draw: Draw) -> Trial:
    """The matches of proposals, against torchvision's IoU matrix."""
    pooler = PlainPooler(["0"], 2, 2)
    numbers = (0.5, draw.choice((0.3, 0.5)), 64, 0.25, None, 0.05, 0.5, 100)
    plain, fast = (kind(pooler, None, None, *numbers) for kind in (roi_heads.RoIHeads, nn.RoIHeads))
    truths = [draw.place(boxes_in(draw, draw.integer(0, 6), 100, 168)) for _ in range(draw.integer(1, 3))]
    proposals = [draw.place(boxes_in(draw, draw.integer(1, 300), 100, 168)) for _ in truths]
    labels = [draw.integers(1, 5, len(boxes)).to(draw.device) for boxes in truths]

    def run(module: Any, device: str) -> list[Tensor]:
        lists = ([t.to(device) for t in each] for each in (proposals, truths, labels))
        indices, found = module.assign_targets_to_proposals(*lists)
        return [*indices, *found]

    text = f"{[len(p) for p in proposals]} proposals, {[len(t) for t in truths]} ground truths"
    return decision(text, lambda: run(fast, draw.device), lambda: run(plain, "cpu"))


@register("nn.GeneralizedRCNNTransform", ops=("paste_masks",), dtypes=_SINGLE)
def postprocess(draw: Draw) -> Trial:
    """Boxes and masks in images of their original size, against torchvision's loop over masks."""
    plain, fast = (
        kind(64, 128, [0.0] * 3, [1.0] * 3).eval()
        for kind in (transform.GeneralizedRCNNTransform, nn.GeneralizedRCNNTransform)
    )
    count, size = draw.integer(0, 5), (draw.integer(20, 70), draw.integer(20, 70))
    masks = draw.place((draw.normal(count, 1, 28, 28) * 4).sigmoid())
    boxes = boxes_in(draw, count, 64, 96).clamp(min=0).to(torch.float32).to(draw.device)

    def run(module: Any, inputs: list[Tensor]) -> list[Tensor]:
        result = [{"boxes": boxes.to(inputs[0].device), "masks": inputs[0]}]
        return [module.postprocess(result, [(64, 96)], [size])[0]["masks"]]

    return Trial(
        f"{count} masks into {size[0]}x{size[1]}",
        [masks],
        lambda inputs: run(fast, inputs),
        lambda inputs: run(plain, inputs),
        lambda i: not_worse(256),
    )


class _Pyramid(torch.nn.Module):
    """A backbone that subsamples the images; only the sizes of its maps matter."""

    out_channels = 1

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        # A detector's device is that of its parameters.
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(i): images[:, :1, :: 8 << i, :: 8 << i] for i in range(self.levels)}


class _GivenDenseHead(torch.nn.Module):
    """A head with random outputs from a seed, whose losses are the matches that it is given."""

    def __init__(self, draw: Draw, anchors: list[int], numbers: dict[str, int]) -> None:
        super().__init__()
        self.anchors, self.numbers, self.seed, self.dtype = anchors, numbers, draw.random.getrandbits(60), draw.dtype

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        rows = sum(a * f.shape[2] * f.shape[3] for a, f in zip(self.anchors, features, strict=True))
        generator = torch.Generator().manual_seed(self.seed)
        tables = {}
        for name, numbers in self.numbers.items():
            table = torch.randn(len(features[0]), rows, numbers, generator=generator, dtype=torch.float64)
            # FCOS's head predicts distances, which are not negative.
            table = table.abs() if "bbox_ctrness" in self.numbers and name == "bbox_regression" else table
            tables[name] = table.to(self.dtype).to(features[0].device)
        return tables

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matches: list[Tensor]) -> dict[str, Tensor]:
        return {str(i): match for i, match in enumerate(matches)}


def _dense_detector(draw: Draw, kind: str, levels: int) -> Any:
    classes, size = draw.integer(2, 5), 64
    common = {"score_thresh": draw.choice((0.2, 0.5)), "nms_thresh": draw.choice((0.3, 0.5)),
              "detections_per_img": draw.integer(1, 60), "topk_candidates": draw.integer(1, 200)}  # fmt: skip
    shape = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    tables = {"cls_logits": classes, "bbox_regression": 4}
    backbone = _Pyramid(levels)
    if kind == "SSD":
        boxes = DefaultBoxGenerator([[2]] * levels)
        head = _GivenDenseHead(draw, boxes.num_anchors_per_location(), tables)
        return nn.SSD(backbone, boxes, (size, size), classes, head=head, **common, **shape)
    ratios = 1 if kind == "FCOS" else draw.integer(1, 3)
    generator = nn.AnchorGenerator(tuple((8 << i,) for i in range(levels)), ((0.5, 1.0, 2.0)[:ratios],) * levels)
    head = _GivenDenseHead(draw, [ratios] * levels, tables | ({"bbox_ctrness": 1} if kind == "FCOS" else {}))
    build = nn.FCOS if kind == "FCOS" else nn.RetinaNet
    return build(
        backbone, classes, min_size=size, max_size=2 * size, anchor_generator=generator, head=head, **common, **shape
    )


@register("nn.RetinaNet", ops=("select_detections", "match_anchors"), dtypes=_SINGLE, kind="RetinaNet")
@register("nn.FCOS", ops=("select_detections",), dtypes=_SINGLE, kind="FCOS")
@register("nn.SSD", ops=("select_box_detections",), dtypes=_SINGLE, kind="SSD")
def dense_detector(draw: Draw, kind: str) -> Trial:
    """Detections from random outputs of a head; in training, RetinaNet's matches."""
    module = _dense_detector(draw, kind, draw.integer(1, 3))
    module.train(kind == "RetinaNet" and draw.flavour("training", "evaluation", "evaluation") == "training")
    sizes = [(draw.integer(30, 100), draw.integer(30, 100)) for _ in range(draw.integer(1, 2))]
    images = [torch.zeros(3, *size, dtype=draw.dtype) for size in sizes]
    truths = [boxes_in(draw, draw.integer(0, 6), *size) for size in sizes]
    # torchvision refuses a box without area.
    truths = [torch.cat([b[:, :2], torch.maximum(b[:, 2:], b[:, :2] + 1)], 1) for b in truths]

    def run(device: str) -> list[Tensor]:
        own = copy.deepcopy(module)
        placed = [image.to(device) for image in images]
        if own.training:
            labels = [torch.zeros(len(boxes), dtype=torch.int64, device=device) for boxes in truths]
            pairs = zip(truths, labels, strict=True)
            targets = [{"boxes": boxes.to(device, draw.dtype), "labels": of} for boxes, of in pairs]
            return list(own(placed, targets).values())
        return [padded(table, own.detections_per_img) for found in own(placed) for table in found.values()]

    return against_reference(draw, f"{kind}, images {sizes}, {_mode(module)}", run)


@register("nn.StaticDetector", ops=("select_detections",), dtypes=_SINGLE)
def static_detector(draw: Draw) -> Trial:
    """A batch of a fixed size, against the same detector on a list of images."""
    kind = draw.flavour("RetinaNet", "FCOS")
    module = _dense_detector(draw, kind, draw.integer(1, 3)).eval()
    size, batch = (draw.integer(30, 100), draw.integer(30, 100)), draw.integer(1, 2)
    images = torch.zeros(batch, 3, *size, dtype=draw.dtype)

    names = ("boxes", "scores", "labels")

    def call() -> list[Tensor]:
        own = copy.deepcopy(module).to(draw.device, draw.dtype)
        found = nn.StaticDetector(own, size, batch)(images.to(draw.device))
        return [found[name] for name in (*names, "counts")]

    def plain() -> list[Tensor]:
        with backends.use("reference"):
            lists = copy.deepcopy(module).to("cpu", draw.dtype)(list(images))
        room = module.detections_per_img
        tables = [torch.stack([padded(f[name], room, 0) for f in lists]) for name in names]
        return [*tables, torch.tensor([len(f["labels"]) for f in lists])]

    return decision(f"{kind}, {batch} images {size}", call, plain, boxes_rule(draw.dtype))


@register("nn.StaticTraining", ops=("match_anchors", "sigmoid_focal_loss"), dtypes=_SINGLE)
def static_training(draw: Draw) -> Trial:
    """The losses of a batch of a fixed size, against torchvision's of a list of images."""
    levels, classes, batch = draw.integer(1, 3), draw.integer(2, 5), draw.integer(1, 2)
    size = (32 * draw.integer(1, 3), 32 * draw.integer(1, 3))
    generator = _generators(draw, levels)[0]
    shape = {"min_size": min(size), "max_size": max(size), "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw.random.getrandbits(60))
        plain = PlainRetinaNet(_Pyramid(levels), classes, anchor_generator=generator, **shape).train()
    fast = copy.deepcopy(plain)
    integrations.accelerate(fast)
    truths = [boxes_in(draw, draw.integer(0, 6), *size) for _ in range(batch)]
    # torchvision refuses a box without area.
    truths = [torch.cat([b[:, :2], torch.maximum(b[:, 2:], b[:, :2] + 1)], 1) for b in truths]
    labels = [draw.integers(0, classes - 1, len(boxes)) for boxes in truths]
    names = ("classification", "bbox_regression")

    def targets(dtype: torch.dtype) -> list[dict[str, Tensor]]:
        return [{"boxes": b.to(dtype), "labels": of} for b, of in zip(truths, labels, strict=True)]

    def call(inputs: list[Tensor]) -> list[Tensor]:
        own = copy.deepcopy(fast).to(draw.device, draw.dtype)
        training = nn.StaticTraining(own, size, batch, max_targets=6)
        placed = [each.to(draw.device) for each in training.pack(list(inputs[0].cpu()), targets(draw.dtype))]
        losses = training(*placed)
        return [losses[name] for name in names]

    def losses(inputs: list[Tensor]) -> list[Tensor]:
        images = inputs[0].cpu()
        found = copy.deepcopy(plain).to(images.dtype)(list(images), targets(images.dtype))
        return [found[name] for name in names]

    images = draw.normal(batch, 3, *size)
    # Codes of boxes are differences of coordinates over the sides of anchors, which are 8 or longer.
    codes = not_worse(max(size), torch.tensor(max(size) / 8))
    classification = losses([images.double()])[0].detach()
    # As in tests/helpers/focal_losses.py: tiles are summed in one order and torchvision sums in another.
    rules = [linear(classification, terms=30 + FOCAL_TILE + images.numel() // FOCAL_TILE, roundings=3), codes]
    text = f"RetinaNet, {batch} images {size}, {[len(boxes) for boxes in truths]} ground truths"
    return Trial(text, [draw.place(images)], call, losses, lambda i: rules[i])
