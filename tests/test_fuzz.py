# SPDX-License-Identifier: Apache-2.0
"""Every op with arguments that nobody should give it: a documented error, or a result that is the reference's.

Each example is a call that is right, in which up to three arguments are then replaced: numbers out of range or none at
all, tensors of another type, shape or memory layout or with numbers that are none. The compiled library and the
reference must do alike: both refuse, with a TypeError or a ValueError, or both give the same. ``make fuzz`` runs
FPN_FAST_FUZZ_EXAMPLES of them, of new random numbers each time.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpn_fast import backends, ops

EXAMPLES = int(os.environ.get("FPN_FAST_FUZZ_EXAMPLES", "0"))
#: What the docstrings say may be raised.
DOCUMENTED = (TypeError, ValueError)
NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

#: What takes an argument's place, by what the argument is. A size is small: what it asks for is allocated.
REPLACEMENTS: dict[str, list[Any]] = {
    "size": [-1, 0, 1, 3, 1.5, NAN, "x", None],
    "count": [-1, 0, 1, 2**31, 2**40, 1.5, NAN, "x", None],
    "number": [-1.0, 0, 0.5, 1e30, NAN, INF, -INF, "x", None],
    "word": ["nonsense", "", None, 3],
    "flag": [True, False],
    "list": [[], None, [None], 3, "x"],
    "four": [[], (1.0, 1.0, 1.0), (1.0, NAN, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0), None],
}


def spoiled(tensor: Tensor, kind: str, generator: torch.Generator) -> Any:
    """`tensor` with something about it that is not as it should be, or is but seldom so."""
    if kind == "none":
        return None
    if kind == "a number":
        return 1.0
    if kind == "integers":
        return tensor.nan_to_num().long()
    if kind == "bools":
        return tensor.bool()
    if kind == "complex":
        return tensor.to(torch.complex64)
    if kind == "one dimension more":
        return tensor[None]
    if kind == "one dimension less":
        return tensor[0] if tensor.dim() and len(tensor) else tensor.sum()
    if kind == "shorter":
        return tensor[..., :-1]
    if kind == "no rows":
        return tensor[:0]
    if kind == "twice":
        return torch.cat([tensor, tensor]) if tensor.dim() else tensor
    if kind == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if kind == "every second":
        return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor
    if kind == "not finite" and tensor.is_floating_point():
        bad = torch.tensor([NAN, INF, -INF, 1e30], dtype=torch.float64)
        chosen = bad[torch.randint(4, tensor.shape, generator=generator)].to(tensor.dtype)
        return torch.where(torch.rand(tensor.shape, generator=generator) < 0.2, chosen, tensor)
    if kind == "large" and tensor.is_floating_point():
        return tensor * 1e4
    if kind == "large":
        return tensor + 2**40
    if kind == "negative":
        return -tensor - 1
    return tensor


KINDS = ("none", "a number", "integers", "bools", "complex", "one dimension more", "one dimension less", "shorter",
         "no rows", "twice", "transposed", "every second", "not finite", "large", "negative")  # fmt: skip
#: Those that leave a tensor one that an op takes.
VALUES = ("transposed", "every second", "not finite", "large", "negative", "no rows")


@dataclass
class Call:
    """A call that is right: the op, its arguments by name, and what kind of thing each of those is that is no tensor.

    sums: results are sums of so many products at most, compared as such; None: they are decisions, compared exactly.
    finite: tensors that are not given numbers that are none, because what the sums are then depends on their order.
    """

    op: Callable[..., Any]
    arguments: dict[str, Any]
    kinds: dict[str, str]
    sums: int | None = None
    finite: tuple[str, ...] = ()


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _boxes(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    corners = torch.rand(*shape, 2, 2, generator=generator, dtype=torch.float64) * 60
    return corners.sort(-2).values.flatten(-2).to(dtype)


def _maps(generator: torch.Generator, dtype: torch.dtype, channels: int) -> list[Tensor]:
    return [_normal(generator, dtype, 2, channels, height, width) for height, width in ((9, 12), (5, 6))]


def top_down(g: torch.Generator, dtype: torch.dtype) -> Call:
    arguments = {"laterals": _maps(g, dtype, 3), "mode": "nearest", "align_corners": False, "scale_factor": None,
                 "fuse": "sum"}  # fmt: skip
    kinds = {"mode": "word", "align_corners": "flag", "scale_factor": "size", "fuse": "word"}
    return Call(ops.top_down, arguments, kinds, sums=8)


def upsample_add(g: torch.Generator, dtype: torch.dtype) -> Call:
    lateral, top = _maps(g, dtype, 3)
    kinds = {"mode": "word", "align_corners": "flag", "scale_factor": "size", "fuse": "word"}
    arguments = {"lateral": lateral, "top": top, "mode": "bilinear", "align_corners": True, "scale_factor": None,
                 "fuse": "avg"}  # fmt: skip
    return Call(ops.upsample_add, arguments, kinds, sums=16, finite=("lateral", "top"))


def multiscale_roi_align(g: torch.Generator, dtype: torch.dtype) -> Call:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rois = torch.cat([torch.randint(2, (6, 1), generator=g).to(wide), _boxes(g, wide, 6)], 1)
    arguments = {"features": _maps(g, dtype, 3), "rois": rois, "output_size": 3, "scales": [0.25, 0.125],
                 "sampling_ratio": 2, "aligned": False, "canonical_scale": 224, "canonical_level": 4,
                 "level_formula": "torchvision", "pool_mode": "avg"}  # fmt: skip
    kinds = {"output_size": "size", "scales": "list", "sampling_ratio": "size", "aligned": "flag",
             "canonical_scale": "number", "canonical_level": "number", "level_formula": "word",
             "pool_mode": "word"}  # fmt: skip
    return Call(ops.multiscale_roi_align, arguments, kinds, sums=64, finite=("features",))


def roi_align(g: torch.Generator, dtype: torch.dtype) -> Call:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rois = torch.cat([torch.randint(2, (6, 1), generator=g).to(wide), _boxes(g, wide, 6)], 1)
    arguments = {"input": _maps(g, dtype, 3)[0], "boxes": rois, "output_size": 3, "spatial_scale": 0.25,
                 "sampling_ratio": 2, "aligned": True}  # fmt: skip
    kinds = {"output_size": "size", "spatial_scale": "number", "sampling_ratio": "size", "aligned": "flag"}
    return Call(ops.roi_align, arguments, kinds, sums=64, finite=("input",))


def assign_levels(g: torch.Generator, dtype: torch.dtype) -> Call:
    rois = torch.cat([torch.zeros(6, 1), _boxes(g, torch.float32, 6) * 10], 1)
    arguments = {"rois": rois, "scales": [0.25, 0.125], "canonical_scale": 224, "canonical_level": 4}
    kinds = {"scales": "list", "canonical_scale": "number", "canonical_level": "number"}
    return Call(ops.assign_levels, arguments, kinds)


_CELLS = [[(-8.0, -4.0, 8.0, 4.0), (-6.0, -6.0, 6.0, 6.0)], [(-16.0, -8.0, 16.0, 8.0), (-12.0, -12.0, 12.0, 12.0)]]


def generate_proposals(g: torch.Generator, dtype: torch.dtype) -> Call:
    arguments = {
        "objectness": _maps(g, dtype, 2), "deltas": [m * 0.2 for m in _maps(g, dtype, 8)], "cell_anchors": _CELLS,
        "strides": [(4, 4), (8, 8)], "image_sizes": torch.tensor([[36, 48], [30, 40]]), "pre_nms_top_n": 20,
        "post_nms_top_n": 10, "nms_thresh": 0.7, "score_thresh": 0.0, "min_size": 1e-3, "weights": (1.0,) * 4,
        "means": (0.0,) * 4, "stds": (1.0,) * 4, "scale_clamp": 4.0, "clamp": "max", "center": "corner",
        "center_clamp": INF, "center_offset": 0.0, "strict_size": False, "scores": "probability",
        "convention": "torchvision",
    }  # fmt: skip
    kinds = {
        "cell_anchors": "list", "strides": "list", "pre_nms_top_n": "count", "post_nms_top_n": "size",
        "nms_thresh": "number", "score_thresh": "number", "min_size": "number", "weights": "four", "means": "four",
        "stds": "four", "scale_clamp": "number", "clamp": "word", "center": "word", "center_clamp": "number",
        "center_offset": "number", "strict_size": "flag", "scores": "word", "convention": "word",
    }  # fmt: skip
    return Call(ops.generate_proposals, arguments, kinds)


def select_detections(g: torch.Generator, dtype: torch.dtype) -> Call:
    arguments = {
        "logits": _maps(g, dtype, 6), "deltas": [m * 0.2 for m in _maps(g, dtype, 8)], "cell_anchors": _CELLS,
        "strides": [(4, 4), (8, 8)], "image_sizes": torch.tensor([[36, 48], [30, 40]]), "score_thresh": 0.3,
        "pre_nms_top_n": 20, "nms_thresh": 0.5, "max_detections": 10, "coder": "deltas", "weights": (1.0,) * 4,
        "scale_clamp": 4.0,
    }  # fmt: skip
    kinds = {
        "cell_anchors": "list", "strides": "list", "score_thresh": "number", "pre_nms_top_n": "count",
        "nms_thresh": "number", "max_detections": "size", "coder": "word", "weights": "four", "scale_clamp": "number",
    }  # fmt: skip
    return Call(ops.select_detections, arguments, kinds)


def select_box_detections(g: torch.Generator, dtype: torch.dtype) -> Call:
    arguments = {
        "logits": _normal(g, dtype, 2, 12, 4), "deltas": _normal(g, dtype, 2, 12, 16), "boxes": _boxes(g, dtype, 2, 12),
        "counts": torch.tensor([12, 7]), "image_sizes": torch.tensor([[60, 60], [50, 40]]), "score_thresh": 0.2,
        "nms_thresh": 0.5, "max_detections": 10, "min_size": 0.1, "class_top_n": 5, "weights": (10.0, 10.0, 5.0, 5.0),
        "scale_clamp": 4.0,
    }  # fmt: skip
    kinds = {
        "score_thresh": "number", "nms_thresh": "number", "max_detections": "size", "min_size": "number",
        "class_top_n": "count", "weights": "four", "scale_clamp": "number",
    }  # fmt: skip
    return Call(ops.select_box_detections, arguments, kinds)


def segmented_nms(g: torch.Generator, dtype: torch.dtype) -> Call:
    arguments = {
        "boxes": _boxes(g, dtype, 2, 15), "scores": _normal(g, dtype, 2, 15),
        "groups": torch.randint(-2, 3, (2, 15), generator=g), "counts": torch.tensor([15, 9]), "iou_threshold": 0.5,
        "max_output": 10, "convention": "torchvision",
    }  # fmt: skip
    kinds = {"iou_threshold": "number", "max_output": "size", "convention": "word"}
    return Call(ops.segmented_nms, arguments, kinds)


def nms(g: torch.Generator, dtype: torch.dtype) -> Call:
    arguments = {"boxes": _boxes(g, dtype, 15), "scores": _normal(g, dtype, 15), "iou_threshold": 0.5}
    return Call(ops.nms, arguments, {"iou_threshold": "number"})


def batched_nms(g: torch.Generator, dtype: torch.dtype) -> Call:
    call = nms(g, dtype)
    call.arguments["idxs"] = torch.randint(-2, 3, (15,), generator=g)
    return Call(ops.batched_nms, call.arguments, call.kinds)


def match_anchors(g: torch.Generator, dtype: torch.dtype) -> Call:
    arguments = {
        "gt_boxes": _boxes(g, dtype, 2, 4), "gt_counts": torch.tensor([4, 2]), "anchors": _boxes(g, dtype, 30),
        "high_threshold": 0.5, "low_threshold": 0.3, "allow_low_quality_matches": True, "anchor_counts": None,
    }  # fmt: skip
    kinds = {"high_threshold": "number", "low_threshold": "number", "allow_low_quality_matches": "flag"}
    return Call(ops.match_anchors, arguments, kinds)


def paste_masks(g: torch.Generator, dtype: torch.dtype) -> Call:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {"masks": torch.rand(3, 1, 7, 7, generator=g, dtype=torch.float64).to(dtype),
                 "boxes": _boxes(g, wide, 3), "image_size": (20, 24), "padding": 1, "threshold": None}  # fmt: skip
    kinds = {"image_size": "list", "padding": "size", "threshold": "number"}
    return Call(ops.paste_masks, arguments, kinds, sums=64, finite=("masks",))


def heatmaps_to_keypoints(g: torch.Generator, dtype: torch.dtype) -> Call:
    arguments = {"heatmaps": _normal(g, dtype, 3, 2, 7, 6), "boxes": _boxes(g, dtype, 3)}
    return Call(ops.heatmaps_to_keypoints, arguments, {})


def sigmoid_focal_loss(g: torch.Generator, dtype: torch.dtype) -> Call:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {"logits": _normal(g, dtype, 30, 7), "labels": torch.randint(-1, 7, (30,), generator=g),
                 "weights": _normal(g, wide, 30).abs(), "alpha": 0.25}  # fmt: skip
    return Call(ops.sigmoid_focal_loss, arguments, {"alpha": "number"}, sums=210)


RECIPES = (top_down, upsample_add, multiscale_roi_align, roi_align, assign_levels, generate_proposals,
           select_detections, select_box_detections, segmented_nms, nms, batched_nms, match_anchors, paste_masks,
           heatmaps_to_keypoints, sigmoid_focal_loss)  # fmt: skip


def replaced(call: Call, name: str, generator: torch.Generator, data: st.DataObject) -> Any:
    """Another value for argument `name`."""
    value = call.arguments[name]
    if name in call.kinds:
        return data.draw(st.sampled_from(REPLACEMENTS[call.kinds[name]]), label=name)
    kinds = [kind for kind in KINDS if not (kind in ("not finite", "large") and name in call.finite)]
    if isinstance(value, list):
        if data.draw(st.booleans(), label=f"{name}: the list itself"):
            others = [[], value[:1], [*value, value[-1]], value[::-1], tuple(value), None, [None, *value[1:]]]
            return others[data.draw(st.integers(0, len(others) - 1), label=name)]
        at = data.draw(st.integers(0, len(value) - 1), label=f"{name} at")
        kind = data.draw(st.sampled_from(kinds), label=name)
        return [spoiled(each, kind, generator) if i == at else each for i, each in enumerate(value)]
    if value is None:
        return data.draw(st.sampled_from([1, "x"]), label=name)
    # More often than not what can be computed with.
    kind = data.draw(st.sampled_from([*kinds, *(kind for kind in VALUES if kind in kinds)]), label=name)
    return spoiled(value, kind, generator)


def outcome(backend: str, call: Call) -> list[Tensor] | type[Exception]:
    """What `backend` does: the results, or which documented error it gives; any other error is the caller's."""
    # A copy, so that what is written to shows.
    arguments = copy.deepcopy(call.arguments)
    try:
        with backends.use(backend):
            found = call.op(**arguments)
    except DOCUMENTED as error:
        return type(error)
    for name, value in call.arguments.items():
        for before, after in zip(tensors_of(value), tensors_of(arguments[name]), strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True, msg=f"wrote to {name}")
    return tensors_of(found)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in an argument or a result."""
    if isinstance(value, Tensor):
        return [value]
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, (list, tuple)) else []


def same(ours: list[Tensor], theirs: list[Tensor], sums: int | None) -> None:
    assert [(each.shape, each.dtype) for each in ours] == [(each.shape, each.dtype) for each in theirs]
    for one, other in zip(ours, theirs, strict=True):
        if not one.is_floating_point():
            assert torch.equal(one, other)
        elif sums is None:
            # float64's exponentials are rounded differently by different libraries.
            unit = 2.0**-51 if one.dtype == torch.float64 else 0.0
            torch.testing.assert_close(one, other, rtol=unit, atol=unit * 2**11, equal_nan=True)
        elif one.numel():
            # So many roundings of float32 (float64), of terms up to the largest number, and one to the type.
            finite = torch.where(other.isfinite(), other, 0).abs().max().item() + 8.0
            wide = torch.finfo(torch.promote_types(one.dtype, torch.float32)).eps
            atol = finite * (sums * wide + torch.finfo(one.dtype).eps)
            torch.testing.assert_close(one, other, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_documented_error_or_the_references_result(recipe):
    @settings(
        max_examples=EXAMPLES or 60,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data(), st.sampled_from(DTYPES), st.integers(0, 2**20))
    def run(data, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        call = recipe(generator, dtype)
        names = data.draw(st.lists(st.sampled_from(sorted(call.arguments)), max_size=3, unique=True), label="replaced")
        call.arguments |= {name: replaced(call, name, generator, data) for name in names}
        ours, theirs = (outcome(backend, call) for backend in ("cpp", "reference"))
        if isinstance(ours, list) and isinstance(theirs, list):
            same(ours, theirs, call.sums)
        else:
            assert ours == theirs
        if not names:
            assert isinstance(ours, list)

    run()


def test_every_op_is_fuzzed():
    assert {recipe.__name__ for recipe in RECIPES} == set(ops.__all__) - {"AnchorGrid", "pad_boxes"}


@pytest.mark.parametrize(
    ("recipe", "name", "value", "error"),
    [
        (assign_levels, "rois", None, TypeError),
        (assign_levels, "scales", [], ValueError),
        (generate_proposals, "image_sizes", torch.zeros(2, 2, dtype=torch.complex64), TypeError),
        (generate_proposals, "post_nms_top_n", 1.5, TypeError),
        (generate_proposals, "weights", (1.0, NAN, 1.0, 1.0), ValueError),
        (nms, "boxes", None, TypeError),
        (select_box_detections, "weights", (1.0, 1.0, 1.0, NAN), ValueError),
        (select_detections, "scale_clamp", NAN, ValueError),
        (segmented_nms, "boxes", None, TypeError),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_fuzzing_found(backend, recipe, name, value, error):
    """What was once another error than a documented one, or garbage; now an error that names the argument."""
    call = recipe(torch.Generator().manual_seed(0), torch.float32)
    with backends.use(backend), pytest.raises(error, match=name):
        call.op(**call.arguments | {name: value})
