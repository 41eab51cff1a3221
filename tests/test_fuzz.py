# SPDX-License-Identifier: Apache-2.0
"""Every op with arguments that nobody should give it: a documented error, or a result that is the reference's.

Each example is a call that is right, in which up to three arguments are then replaced: numbers out of range or none at
all, tensors of another type, shape or memory layout or with numbers that are none. The compiled library and the
reference must do alike: both refuse, with a TypeError or a ValueError, or both give the same. Decisions are the same
where a gradient is recorded. ``make fuzz`` runs FPN_FAST_FUZZ_EXAMPLES of them, of new random numbers each time.
"""

import copy
import math
import os
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from helpers import calls
from helpers.calls import RECIPES, VARIANTS, Call
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


def _with_bad_numbers(tensor: Tensor, generator: torch.Generator) -> Tensor:
    bad = torch.tensor([NAN, INF, -INF, 1e30], dtype=torch.float64)
    chosen = bad[torch.randint(4, tensor.shape, generator=generator)].to(tensor.dtype)
    return torch.where(torch.rand(tensor.shape, generator=generator) < 0.2, chosen, tensor)


#: A tensor with something about it that is not as it should be, or is but seldom so.
SPOILED: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "a number": lambda t: 1.0,
    "integers": lambda t: t.nan_to_num().long(),
    "bools": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0] if t.dim() and len(t) else t.sum(),
    "shorter": lambda t: t[..., :-1],
    "no rows": lambda t: t[:0],
    "twice": lambda t: torch.cat([t, t]) if t.dim() else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "not finite": lambda t: t,
    # Many are equal.
    "whole numbers": lambda t: t.round() if t.is_floating_point() else t,
    "large": lambda t: t * 1e4 if t.is_floating_point() else t + 2**40,
    "negative": lambda t: -t - 1,
}


def spoiled(tensor: Tensor, kind: str, generator: torch.Generator) -> Any:
    if kind == "not finite" and tensor.is_floating_point():
        return _with_bad_numbers(tensor, generator)
    return SPOILED[kind](tensor)


#: Those that leave a tensor one that an op takes.
VALUES = ("transposed", "every second", "not finite", "whole numbers", "large", "negative", "no rows")


def replaced(call: Call, name: str, generator: torch.Generator, data: st.DataObject) -> Any:
    """Another value for argument `name`."""
    value = call.arguments[name]
    if name in call.kinds:
        return data.draw(st.sampled_from(REPLACEMENTS[call.kinds[name]]), label=name)
    kinds = [kind for kind in SPOILED if not (kind in ("not finite", "large") and name in call.finite)]
    if isinstance(value, list):
        if data.draw(st.booleans(), label=f"{name}: the list itself"):
            others = [[], value[:1], [*value, value[-1]], value[::-1], tuple(value), None, [None, *value[1:]]]
            return others[data.draw(st.integers(0, len(others) - 1), label=name)]
        at = data.draw(st.integers(0, len(value) - 1), label=f"{name} at")
        kind = data.draw(st.sampled_from(kinds), label=name)
        return [spoiled(each, kind, generator) if i == at else each for i, each in enumerate(value)]
    if not isinstance(value, Tensor):
        return data.draw(st.sampled_from([1, "x"]), label=name)
    # More often than not what can be computed with.
    kind = data.draw(st.sampled_from([*kinds, *(kind for kind in VALUES if kind in kinds)]), label=name)
    return spoiled(value, kind, generator)


def outcome(backend: str, call: Call, recorded: bool = False) -> list[Tensor] | type[Exception]:
    """What `backend` does: the results, or which documented error it gives; any other error is the caller's.

    recorded: with a gradient recorded for every tensor of real numbers.
    """
    # A copy, so that what is written to shows.
    arguments = copy.deepcopy(call.arguments)
    for each in chain(*(tensors_of(value) for value in arguments.values())) if recorded else ():
        each.requires_grad_(each.is_floating_point())
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


@pytest.mark.parametrize("recipe", [*RECIPES, *VARIANTS], ids=lambda recipe: recipe.__name__)
def test_a_documented_error_or_the_references_result(recipe):
    @settings(
        max_examples=EXAMPLES or 80,
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
            if call.sums is None:
                same([each.detach() for each in outcome("cpp", call, recorded=True)], ours, None)
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
        (calls.assign_levels, "rois", None, TypeError),
        (calls.assign_levels, "scales", [], ValueError),
        (calls.generate_proposals, "image_sizes", torch.zeros(2, 2, dtype=torch.complex64), TypeError),
        (calls.generate_proposals, "post_nms_top_n", 1.5, TypeError),
        (calls.generate_proposals, "weights", (1.0, NAN, 1.0, 1.0), ValueError),
        (calls.nms, "boxes", None, TypeError),
        (calls.select_box_detections, "weights", (1.0, 1.0, 1.0, NAN), ValueError),
        (calls.select_detections, "scale_clamp", NAN, ValueError),
        (calls.segmented_nms, "boxes", None, TypeError),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_fuzzing_found(backend, recipe, name, value, error):
    """What was once another error than a documented one, or garbage; now an error that names the argument."""
    call = recipe(torch.Generator().manual_seed(0), torch.float32)
    with backends.use(backend), pytest.raises(error, match=name):
        call.op(**call.arguments | {name: value})
