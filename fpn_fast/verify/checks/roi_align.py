# SPDX-License-Identifier: Apache-2.0
"""RoIAlign of one map and of a pyramid, the rule of levels, and the poolers over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpn_fast import nn, ops, reference
from fpn_fast.ops.levels import level_thresholds
from fpn_fast.reference.multiscale_roi_align import LEVEL_FORMULAS
from fpn_fast.verify.checks import register
from fpn_fast.verify.draw import INF, NAN, Draw, form_of, text_of
from fpn_fast.verify.trial import Rule, Trial, chosen, decision, not_worse

_KEYS = ("batch", "channels", "sizes", "rois", "output_size")
#: The checks of the ops cover the other types.
_OF_MODULES = (torch.float32, torch.bfloat16)
#: Spreads the RoIs of such small maps over all levels.
_CANONICAL_SCALE = 64


def _odd_box(draw: Draw, height: int, width: int) -> tuple[float, float, float, float]:
    """Inverted, without area, infinite, far off, huge, or with a NaN."""
    x, y = draw.random.uniform(0, width), draw.random.uniform(0, height)
    return draw.choice(
        (
            (NAN, y, x, y),
            (x, y, x + 9, NAN),
            (x, y, x / 2, y + 9),
            (x, y, x + 9, y / 2),
            (x, y, x / 2, y / 2),
            (x, y, x, y),
            (x, y, x, y + 30),
            (x, y, INF, y + 30),
            (-INF, -INF, INF, INF),
            (INF, INF, INF, INF),
            (1000 + x, 1000 + y, 1100 + x, 1100 + y),
            (-4000.0, -3000.0, 5000.0, 4000.0),
            (1e30, 1e30, 2e30, 2e30),
        )
    )


def boxes_in(draw: Draw, count: int, height: int, width: int, *, odd: bool = False) -> Tensor:
    """[count, 4] float64 boxes of an image: of a few to all of its pixels, some over its edges; or `odd` ones."""
    rows: list[tuple[float, ...]] = []
    for _ in range(count):
        if odd and draw.chance(0.7):
            rows.append(_odd_box(draw, height, width))
            continue
        w, h = (2 + (side - 2) * draw.random.random() ** 2 for side in (width, height))
        x, y = draw.random.uniform(0, width - w), draw.random.uniform(0, height - h)
        if draw.chance(0.25):
            x, y = x + draw.random.uniform(-w, w), y + draw.random.uniform(-h, h)
        corners = [x, y, x + w, y + h]
        # Half of the boxes have coordinates that divide exactly, to hit the edges of maps and sampling grids.
        rows.append(tuple(round(c * 64) / 64 for c in corners) if draw.chance(0.5) else tuple(corners))
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def _threshold_boxes(draw: Draw, count: int, maps: int, rule: dict[str, Any]) -> Tensor:
    """[count, 4] boxes whose areas are the thresholds of levels, or the floats next to them."""
    areas = torch.tensor(level_thresholds(2, 1 + maps, *rule.values())).view(torch.int32)
    areas = areas[draw.integers(0, len(areas) - 1, count)] + draw.integers(-1, 1, count).int()
    # Division by a power of two is exact. Boxes begin at x = 0, because a sum would round.
    wide = areas.view(torch.float32).double() / 64
    # Keeps samples off the edge of a map, which float32 and float64 may see on different sides.
    top = draw.integers(0, 500, count) / 8 + 1 / 32
    return torch.stack([torch.zeros(count).double(), top, wide, top + 64], 1)


@dataclass
class Scene:
    """A pyramid, RoIs on it, and how to pool them. sizes: (H, W) of each map; rois: [K, 5] on the device."""

    batch: int
    sizes: list[tuple[int, int]]
    scales: list[float]
    maps: list[Tensor]
    rois: Tensor
    layout: str
    output_size: tuple[int, int]
    sampling_ratio: int
    aligned: bool


def _scene(
    draw: Draw, levels: int, rule: dict[str, Any], *, flavour: str = "any", images: bool = False, flat: bool = False
) -> Scene:
    """images: whether RoIs are sorted by image and none names another; flat: whether many pixels are equal."""
    sizes = draw.pyramid(levels)
    if flavour == "one pixel":
        sizes = [(1, 1)] * len(sizes)
    batch = 0 if flavour == "no images" else draw.size("batch", lambda: draw.integer(1, 3))
    channels, layout = draw.channels(), draw.layout()
    numbers = [draw.normal(batch, channels, *size) for size in sizes]
    maps = [draw.place(n.relu() if flat else n, layout) for n in numbers]
    count = 0 if flavour == "no RoIs" else draw.size("rois", lambda: draw.integer(1, 4 if draw.small else 9))
    height, width = 4 * max(sizes[0][0], 2), 4 * max(sizes[0][1], 2)
    if flavour == "thresholds" and len(sizes) > 1:
        boxes = _threshold_boxes(draw, count, len(sizes), rule)
    else:
        boxes = boxes_in(draw, count, height, width, odd=flavour == "odd RoIs")
    image = draw.integers(0, max(batch - 1, 0), count).double()
    if images:
        image = image.sort().values
    elif flavour == "odd RoIs":
        absent = torch.tensor([-1.0, batch, NAN, INF, 1e20], dtype=torch.float64)
        image = torch.where(draw.uniform(count) < 0.2, absent[draw.integers(0, 4, count)], image)
    rois = torch.cat([image[:, None], boxes], 1).to(draw.wide).to(draw.device)
    scales = [2.0 ** -(2 + i) for i in range(len(sizes))]
    largest = 3 if draw.small else 7
    bins = draw.size("output_size", lambda: (draw.integer(1, largest), draw.integer(1, largest)))
    output_size = (bins, bins) if isinstance(bins, int) else (int(bins[0]), int(bins[1]))
    ratio = draw.choice((0, -1, 1, 2, 2, 3))
    return Scene(batch, sizes, scales, maps, rois, layout, output_size, ratio, draw.chance(0.5))


def _trial(
    draw: Draw,
    scene: Scene,
    levels: Tensor,
    call: Callable[[list[Tensor]], list[Tensor]],
    *,
    maximum: bool = False,
    form: torch.memory_format | None = None,
    text: str = "",
) -> Trial:
    """A trial of `call`, which pools `scene`. levels: [K], the map of each RoI."""
    output_size, largest = scene.output_size, max(max(size) for size in scene.sizes)

    def arguments(like: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return scene.rois.to(like.device, wide), levels.to(like.device)

    numbers: Any = (scene.scales, scene.sampling_ratio, scene.aligned)

    def plain(maps: list[Tensor]) -> list[Tensor]:
        if maximum:
            return [reference.multiscale_roi_align_max(maps, *arguments(maps[0]), output_size, *numbers)[0]]
        return [reference.multiscale_roi_align(maps, *arguments(maps[0]), output_size, *numbers)]

    def plain_gradients(maps: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
        rest: Any = (*arguments(maps[0]), scene.batch, scene.sizes, *numbers)
        if not maximum:
            return reference.multiscale_roi_align_backward(seeds[0], *rest)
        # The features' own type decides which sample is the largest.
        own = [m.to(maps[0].device) for m in scene.maps]
        _, winners = reference.multiscale_roi_align_max(own, *arguments(own[0]), output_size, *numbers)
        return reference.multiscale_roi_align_max_backward(seeds[0], winners, *rest)

    absolute = [m.cpu().double().abs() for m in scene.maps]
    magnitude = None if maximum else plain(absolute)[0]

    def gradient_rules(seeds: list[Tensor], *_: list[Tensor]) -> list[Rule]:
        magnitudes = plain_gradients(absolute, [seeds[0].cpu().double().abs()])
        return [not_worse(largest, each) for each in magnitudes]

    return Trial(
        f"{text_of(scene.maps)}, {scene.layout}, {len(scene.rois)} RoIs, {output_size[0]}x{output_size[1]} bins, "
        f"ratio {scene.sampling_ratio}, aligned {scene.aligned}{text}",
        scene.maps,
        call,
        plain,
        lambda i: chosen if maximum else not_worse(largest, magnitude),
        gradient_rules,
        plain_gradients,
        form=form,
        output_seeds=draw.seeds,
    )


_FLAVOURS = ("any", "odd RoIs", "any", "one pixel", "thresholds", "any", "no RoIs", "odd RoIs", "any", "no images")


@register("multiscale_roi_align", keys=_KEYS)
@register("multiscale_roi_align(max)", ops=("multiscale_roi_align_max",), keys=_KEYS, maximum=True)
def multiscale_roi_align(draw: Draw, maximum: bool = False) -> Trial:
    rule: dict[str, Any] = {
        "canonical_scale": _CANONICAL_SCALE,
        "canonical_level": draw.choice((3, 4)),
        "level_formula": draw.choice(tuple(LEVEL_FORMULAS)),
    }
    flavour = draw.flavour(*_FLAVOURS)
    levels = draw.integer(2 if flavour == "thresholds" else 1, 3 if draw.small else 5)
    scene = _scene(draw, levels, rule, flavour=flavour, flat=maximum and draw.chance(0.5))
    given = None
    if draw.chance(0.15):
        given = draw.integers(-1, len(scene.maps), len(scene.rois)).to(draw.device)
    expected = ops.assign_levels(scene.rois, scene.scales, **rule) if given is None else given

    def call(maps: list[Tensor]) -> list[Tensor]:
        pooled = ops.multiscale_roi_align(
            maps, scene.rois, scene.output_size, scene.scales, sampling_ratio=scene.sampling_ratio,
            aligned=scene.aligned, levels=given, pool_mode="max" if maximum else "avg", **rule,
        )  # fmt: skip
        return [pooled]

    text = f", {rule['level_formula']}{'' if given is None else ', given levels'}"
    return _trial(draw, scene, expected, call, maximum=maximum, form=form_of(scene.maps, scene.layout), text=text)


@register("roi_align", ops=("multiscale_roi_align",), keys=_KEYS)
@register("nn.RoIAlign", ops=("multiscale_roi_align",), dtypes=_OF_MODULES, keys=_KEYS, module=True)
def roi_align(draw: Draw, module: bool = False) -> Trial:
    scene = _scene(draw, 1, {}, flavour=draw.flavour("any", "odd RoIs", "any", "one pixel", "any", "no RoIs"))
    numbers = (scene.output_size, 1 / 4, scene.sampling_ratio, scene.aligned)
    levels = torch.where(scene.rois.isnan().any(1), -1, 0)

    def call(maps: list[Tensor]) -> list[Tensor]:
        return [nn.RoIAlign(*numbers)(maps[0], scene.rois) if module else ops.roi_align(maps[0], scene.rois, *numbers)]

    scene.maps, scene.sizes, scene.scales = scene.maps[:1], scene.sizes[:1], scene.scales[:1]
    return _trial(draw, scene, levels, call, form=form_of(scene.maps, scene.layout))


@register("assign_levels", backends=("reference",), dtypes=(torch.float32,), keys=("rois",))
def assign_levels(draw: Draw) -> Trial:
    """The area thresholds, against the logarithm that they replace."""
    maps, formula = draw.integer(2, 6), draw.choice(tuple(LEVEL_FORMULAS))
    rule: dict[str, Any] = {"canonical_scale": draw.choice((56, 100, 224)), "canonical_level": draw.choice((2, 3, 4))}
    rule["level_formula"] = formula
    count = draw.size("rois", lambda: 300)
    boxes = boxes_in(draw, count, 800, 1344, odd=draw.flavour("any", "odd") == "odd")
    boxes = torch.cat([boxes, _threshold_boxes(draw, count, maps, rule)])
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], 1).float()
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    # Leave out areas whose square root torch does not round correctly.
    usable = (area.sqrt() == area.double().sqrt().float()) | ~(area > 0)
    rois = rois[usable].to(draw.device)
    scales = [2.0 ** -(2 + i) for i in range(maps)]
    return decision(
        f"{len(rois)} RoIs, {maps} maps, {formula}",
        lambda: [ops.assign_levels(rois, scales, **rule)],
        lambda: [reference.assign_levels(rois.cpu(), 2, 1 + maps, **rule)],
    )


@register("nn.MultiScaleRoIAlign", ops=("multiscale_roi_align",), dtypes=_OF_MODULES, keys=_KEYS)
@register(
    "nn.detectron2.ROIPooler", ops=("multiscale_roi_align",), dtypes=_OF_MODULES, keys=_KEYS, library="detectron2"
)
@register("nn.mmdet.SingleRoIExtractor", ops=("multiscale_roi_align",), dtypes=_OF_MODULES, keys=_KEYS, library="mmdet")
def pooler(draw: Draw, library: str = "torchvision") -> Trial:
    """The poolers, with the arguments and boxes of their libraries."""
    rule: dict[str, Any] = {"canonical_scale": _CANONICAL_SCALE, "canonical_level": 4, "level_formula": library}
    flavour = draw.flavour("any", "odd RoIs", "any", "no RoIs")
    # Heights from which torchvision's module infers these scales.
    draw.given.setdefault("sizes", [(8 >> i, draw.integer(1, 12 >> i)) for i in range(draw.integer(1, 3))])
    scene = _scene(draw, 1, rule, flavour=flavour, images=True)
    scene.aligned = scene.aligned and library != "torchvision"
    bins, ratio = scene.output_size, scene.sampling_ratio
    levels = torch.where(scene.rois.isnan().any(1), -1, 0)
    if len(scene.maps) > 1:
        levels = ops.assign_levels(scene.rois, scene.scales, **rule)
    boxes = [scene.rois[scene.rois[:, 0] == i, 1:] for i in range(scene.batch)]
    names = [str(i) for i in range(len(scene.maps))]
    module: Any
    if library == "torchvision":
        module = nn.MultiScaleRoIAlign(names, bins, ratio, canonical_scale=_CANONICAL_SCALE)
        images = [(4 * scene.sizes[0][0], 4 * scene.sizes[0][1])] * scene.batch
        call = lambda maps: [module(dict(zip(names, maps, strict=True)), boxes, images)]  # noqa: E731
    elif library == "detectron2":
        kind = "ROIAlignV2" if scene.aligned else "ROIAlign"
        module = nn.detectron2.ROIPooler(bins, scene.scales, ratio, kind, _CANONICAL_SCALE)
        call = lambda maps: [module(maps, boxes)]  # noqa: E731
    else:
        layer = {"type": "RoIAlign", "output_size": bins, "sampling_ratio": ratio, "aligned": scene.aligned}
        strides = [4 * 2**i for i in range(len(scene.maps))]
        module = nn.mmdet.SingleRoIExtractor(layer, scene.maps[0].size(1), strides, _CANONICAL_SCALE / 4)
        call = lambda maps: [module(maps, scene.rois)]  # noqa: E731
    return _trial(draw, scene, levels, call)
