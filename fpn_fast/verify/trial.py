# SPDX-License-Identifier: Apache-2.0
"""One case, the rules for its results, and the measure of a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpn_fast import backends
from fpn_fast.testing import tolerances
from fpn_fast.testing.tolerances import Error
from fpn_fast.verify.draw import Draw

#: Elements below this share of their tensor's largest are measured in the ulp of that share: where terms cancel, an
#: element's own ulp says nothing.
SMALLEST_SHARE = 2.0**-3


@dataclass(frozen=True)
class Measure:
    """The worst of one result, or of all results of many cases.

    error: the error closest to its bound, which decides; ulp: the largest error in units in the last place of the
    truth, in the result's dtype; decisions: how many decisions differ.
    """

    error: Error = field(default_factory=Error)
    ulp: float = 0.0
    decisions: int = 0

    def worst(self, other: Measure) -> Measure:
        """The worse of both in each respect; decisions add up."""
        error = self.error.worse(other.error)
        return Measure(error, max(self.ulp, other.ulp), self.decisions + other.decisions)


#: Judges a result by plain PyTorch's result in its dtype and the truth in float64.
Rule = Callable[[Tensor, Tensor, Tensor], Measure]


def _ulp(actual: Tensor, truth: Tensor) -> float:
    """The largest error in ulp; infinite where a value is NaN or infinite and should not be, or the other way round."""
    if actual.numel() == 0 or actual.shape != truth.shape:
        return 0.0
    error = tolerances.difference(actual, truth)
    if not error.any():
        return 0.0
    sizes = torch.where(truth.isfinite(), truth.abs(), 0.0).double()
    largest = sizes.max().item()
    if largest == 0 or not error.isfinite().all():
        return math.inf
    info = torch.finfo(actual.dtype)
    # Subnormals are as far apart as the smallest normal numbers.
    exponents = torch.frexp(sizes.clamp(min=max(largest * SMALLEST_SHARE, info.smallest_normal)))[1]
    return (error / torch.ldexp(torch.full_like(sizes, info.eps), exponents - 1)).max().item()


def exactly(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
    """Equal to plain PyTorch bit for bit."""
    return Measure(tolerances.equal(actual, plain), _ulp(actual, exact))


def chosen(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
    """:func:`exactly` for values that are chosen among several, where float64 may choose others."""
    return exactly(actual, plain, plain)


def not_worse(size: int, magnitude: Tensor | None = None) -> Rule:
    """At most twice plain PyTorch's error and a unit. size: of the largest map; magnitude: the sum of the terms'."""
    return lambda actual, plain, exact: Measure(
        tolerances.not_worse(actual, plain, exact, size=size, magnitude=magnitude), _ulp(actual, exact)
    )


def linear(magnitude: Tensor, *, terms: int, roundings: int) -> Rule:
    """A sum of `terms` exact products whose magnitudes sum up to `magnitude`, rounded `roundings` times."""
    return lambda actual, plain, exact: Measure(
        tolerances.linear(actual, exact, magnitude, terms=terms, roundings=roundings), _ulp(actual, exact)
    )


def share_not_worse(magnitude: Tensor, share: float) -> Rule:
    """One of several results, whose terms' magnitudes sum up to `magnitude`; share: plain PyTorch's largest error."""
    return lambda actual, plain, exact: Measure(
        tolerances.share_not_worse(actual, exact, magnitude, share=share), _ulp(actual, exact)
    )


def decided(rtol: float = 0.0, atol: float = 0.0) -> Rule:
    """Integers and booleans equal the reference's; other values are within a tolerance. Violations are counted."""

    def rule(actual: Tensor, plain: Tensor, exact: Tensor) -> Measure:
        error = tolerances.close(actual, plain, rtol, atol)
        # After a different decision the rows no longer correspond, so their distance says nothing.
        ulp = _ulp(actual, plain) if error.within and actual.dtype.is_floating_point else 0.0
        return Measure(error, ulp, error.count)

    return rule


def boxes_rule(dtype: torch.dtype) -> Rule:
    """Equal; in float64, whose exponential no wider type rounds, within a unit. Corners are at most 2,048 pixels."""
    unit = 2.0**-51 if dtype == torch.float64 else 0.0
    return decided(rtol=unit, atol=2**11 * unit)


@dataclass
class Trial:
    """One case of an op or module.

    inputs: the tensors that `call` and `plain` take as a list. With gradient rules, they are differentiated.
    call: the checked call; plain: the same by the reference, for inputs of any floating-point dtype on any device.
    rules: a rule per output. It compares with plain in the inputs' dtype and in float64.
    gradient_rules: a rule per input, from the gradients of the outputs, and those of the inputs by plain in the inputs'
        dtype and in float64. None where there is no gradient.
    plain_gradients: the gradients of the inputs, from inputs and the gradients of the outputs; by default autograd's.
    decisions: whether the outputs are decisions. Then plain runs on the CPU.
    form: the memory format that [N, C, H, W] outputs must have.
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


def decision(
    text: str, call: Callable[[], Sequence[Tensor]], plain: Callable[[], Sequence[Tensor]], rule: Rule | None = None
) -> Trial:
    """A case whose outputs are decisions and have no gradient. rule: for each output; equality by default."""
    return Trial(text, [], lambda _: call(), lambda _: plain(), lambda i: rule or decided(), decisions=True)


def against_reference(draw: Draw, text: str, run: Callable[[str], Sequence[Tensor]]) -> Trial:
    """Decisions and boxes by `run` on the case's device, which must equal the reference's on the CPU."""

    def plain() -> Sequence[Tensor]:
        with backends.use("reference"):
            return run("cpu")

    return decision(text, lambda: run(draw.device), plain, boxes_rule(draw.dtype))
