# SPDX-License-Identifier: Apache-2.0
"""One checked call, the rules by which its results are judged, and what judging finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpn_fast.testing import tolerances

#: An element smaller than this share of the largest one of its tensor has the unit of that share: what cancels has no
#: unit of its own.
SMALLEST_SHARE = 2.0**-3


@dataclass(frozen=True)
class Measure:
    """How far one result, or all results of many cases, were off.

    ulp: the largest error in units in the last place of the truth, in the result's type; relative: the largest error
    as a share of the largest number of its tensor; decisions: how many differ; problem: what rule was broken.
    """

    ulp: float = 0.0
    relative: float = 0.0
    decisions: int = 0
    problem: str | None = None

    def worst(self, other: Measure) -> Measure:
        """The worse of both in each respect; decisions add up."""
        return Measure(
            max(self.ulp, other.ulp),
            max(self.relative, other.relative),
            self.decisions + other.decisions,
            self.problem or other.problem,
        )


#: Judges a result by plain PyTorch's in its type, and the truth: float64.
Rule = Callable[[Tensor, Tensor, Tensor], Measure]


def _errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest error in ulp and relative; infinite where a number is none and should be one, or the other way round."""
    if actual.numel() == 0:
        return 0.0, 0.0
    ours, truth = actual.detach().double(), truth.detach().double()
    same = (ours == truth) | (ours.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (ours - truth).abs())
    if not bool(error.isfinite().all()):
        return float("inf"), float("inf")
    sizes = torch.where(truth.isfinite(), truth.abs(), 0.0)
    largest = sizes.max().item()
    if largest == 0:
        worst = error.max().item()
        return (0.0, 0.0) if worst == 0 else (float("inf"), float("inf"))
    info = torch.finfo(actual.dtype)
    # Subnormals are as far apart as the smallest normal numbers.
    exponents = torch.frexp(sizes.clamp(min=max(largest * SMALLEST_SHARE, info.smallest_normal)))[1]
    unit = torch.ldexp(torch.full_like(sizes, info.eps), exponents - 1)
    return (error / unit).max().item(), error.max().item() / largest


def _judge(actual: Tensor, truth: Tensor, assertion: Callable[[], None]) -> Measure:
    ulp, relative = _errors(actual, truth)
    try:
        assertion()
    except AssertionError as error:
        return Measure(ulp, relative, problem=str(error).strip().replace("\n", " "))
    return Measure(ulp, relative)


def exactly(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
    """Every bit is plain PyTorch's."""
    return _judge(actual, exact, lambda: tolerances.assert_equal(actual, plain))


def chosen(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
    """:func:`exactly` where a number is one of several, and float64 may choose another one."""
    return exactly(actual, plain, plain)


def not_worse(size: int, magnitude: Tensor | None = None) -> Rule:
    """At most twice plain PyTorch's own error, and a unit; size: of the largest map; magnitude: of the terms' sums."""

    def rule(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
        assertion = lambda: tolerances.assert_not_worse(actual, plain, exact, size=size, magnitude=magnitude)  # noqa: E731
        return _judge(actual, exact, assertion)

    return rule


def linear(magnitude: Tensor, *, terms: int, roundings: int) -> Rule:
    """A sum of `terms` exact products whose magnitudes sum up to `magnitude`, rounded `roundings` times."""

    def rule(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
        assertion = lambda: tolerances.assert_linear(actual, exact, magnitude, terms=terms, roundings=roundings)  # noqa: E731
        return _judge(actual, exact, assertion)

    return rule


def share_not_worse(magnitude: Tensor, share: float) -> Rule:
    """One of several results, whose terms' magnitudes sum up to `magnitude`; share: plain PyTorch's largest error."""

    def rule(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
        return _judge(actual, exact, lambda: tolerances.assert_share_not_worse(actual, exact, magnitude, share=share))

    return rule


def decided(rtol: float = 0.0, atol: float = 0.0) -> Rule:
    """Integers and booleans are the reference's, floating-point numbers within a tolerance; each that is not counts."""

    def rule(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
        if not actual.dtype.is_floating_point:
            count = int((actual != plain).sum())
            return Measure(decisions=count, problem=_first_of(actual, plain, actual != plain) if count else None)
        ours, theirs = actual.double(), plain.double()
        same = torch.isclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
        count = int((~same).sum())
        # Once a decision differs, rows are not the same rows, and how far they are apart says nothing.
        ulp, relative = _errors(actual, plain) if count == 0 else (0.0, 0.0)
        return Measure(ulp, relative, count, _first_of(actual, plain, ~same) if count else None)

    return rule


def _first_of(actual: Tensor, plain: Tensor, differs: Tensor) -> str:
    at = tuple(differs.nonzero()[0].tolist())
    return (
        f"{int(differs.sum())} of {actual.numel()} differ, first at {at}: {actual[at].item()}, not {plain[at].item()}"
    )


@dataclass
class Trial:
    """One case of an op or module: a call and the truth that it is measured by.

    inputs: the tensors that `call` and `plain` take as a list: with a gradient rule, those to differentiate by.
    call: what is checked; plain: the same by the reference, of inputs of any floating-point type and on any device.
    rules: for each output. They compare with plain in the inputs' type, and with plain in float64.
    gradient_rules: a rule for each input, given the gradients of the outputs, and those of the inputs that plain gives
        in its type and in float64; None: there is no gradient.
    plain_gradients: given inputs and the gradients of the outputs, those of the inputs; by default autograd's.
    decisions: whether the outputs are decisions, which plain is asked for on the CPU, not on the outputs' device.
    form: the memory format that [N, C, H, W] outputs have to have.
    """

    text: str
    inputs: list[Tensor]
    call: Callable[[list[Tensor]], Sequence[Tensor]]
    plain: Callable[[list[Tensor]], Sequence[Tensor]]
    rules: Callable[[int], Rule]
    gradient_rules: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Rule]] | None = None
    plain_gradients: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]] | None = None
    decisions: bool = False
    form: torch.memory_format | None = None
    output_seeds: Callable[[Sequence[Tensor]], list[Tensor]] = field(default=lambda outputs: [])
