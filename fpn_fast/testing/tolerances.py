# SPDX-License-Identifier: Apache-2.0
"""How far a result may be from the truth. Each rule gives the worst error and its bound, and every bound is derived.

1. exact: one rounding of an exactly rounded sum, and copies. The bound is 0.
2. linear: sums with non-negative weights that are exact (nearest, its gradient). Each of k additions errs by at most
   half a unit of the accumulation type, relative to the sum of the terms' magnitudes. Each of r roundings to the
   storage type errs by half a unit of that type.
3. not worse: sums whose weights are rounded too (bilinear). The bound is twice the error of plain PyTorch in the same
   type plus one unit of that type, both against float64. Among many small results of one computation one may be lucky:
   then errors are shares of the sum of the terms' magnitudes, and plain PyTorch's largest share of all bounds each.

``python -m fpn_fast verify``, :func:`assert_parity` and the tests of this package judge by these rules alone. None of
them uses ``assert``, which ``python -O`` removes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


@dataclass(frozen=True)
class Error:
    """The error of the element that is furthest over its bound, or closest to it.

    worst, bound: of that element; count: how many elements are over their bounds; text: what differs, and where.
    """

    worst: float = 0.0
    bound: float = 0.0
    count: int = 0
    text: str = ""

    @property
    def within(self) -> bool:
        """The one comparison that decides. It is False for NaN, and for a bound that bounds nothing."""
        return self.worst <= self.bound < math.inf

    def worse(self, other: Error) -> Error:
        """The one of the two that is further over its bound, with the count of both."""
        found = other if other._rank > self._rank else self
        return Error(found.worst, found.bound, self.count + other.count, found.text)

    @property
    def _rank(self) -> tuple[bool, float]:
        return not self.within, 0.0 if self.worst == 0 else self.worst / self.bound if self.bound else math.inf


def failure(text: str) -> Error:
    """The error of a result that has no number: another shape, or an exception."""
    return Error(math.inf, 0.0, 1, text)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| in float64: 0 where both are NaN or the same infinity, infinite where only one is, positive elsewhere."""
    wide_a, wide_b = a.double(), b.double()
    same = (a == b) | (wide_a.isnan() & wide_b.isnan())
    # Two large integers that differ may be the same float64.
    apart = (wide_a - wide_b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(same, 0.0, apart.clamp(min=torch.finfo(torch.float64).tiny))


def compare(actual: Tensor, expected: Tensor, bound: Tensor | float, rule: str) -> Error:
    """Compares two tensors of one shape, element by element.

    bound: how far each element may be off, float64; rule: where the bound comes from, for the message.
    """
    if actual.shape != expected.shape:
        return failure(f"is {_kind(actual)}, the reference's is {_kind(expected)}")
    if actual.numel() == 0:
        return Error()
    error = difference(actual, expected)
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device).expand(error.shape)
    # NaN stands for infinite here, so the largest share is over its bound wherever any element is.
    share = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    at = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
    worst, allowed = error[at].item(), bound[at].item()
    found = Error(worst, allowed, int((~(error <= bound)).sum()))
    if found.within:
        return found
    apart = f", {worst:.3e} apart" if actual.dtype.is_floating_point else ""
    text = (
        f"{_kind(actual)} differs from the reference in {found.count} of {actual.numel()} elements, most at {at}: "
        f"{actual[at].item()} and not {expected[at].item()}{apart} where {allowed:.3e} is allowed ({rule})"
    )
    return Error(worst, allowed, found.count, text)


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def alike(actual: Tensor, expected: Tensor) -> Error:
    """The same shape and dtype."""
    if (actual.shape, actual.dtype) == (expected.shape, expected.dtype):
        return Error()
    return failure(f"is {_kind(actual)}, the reference's is {_kind(expected)}")


def equal(actual: Tensor, expected: Tensor) -> Error:
    """Class 1: all elements equal, NaN where NaN, with the same shape and dtype and any strides."""
    same_kind = alike(actual, expected)
    return compare(actual, expected, 0.0, "they have to be equal") if same_kind.within else same_kind


def close(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> Error:
    """|actual - expected| <= atol + rtol |expected|; equal for integers and booleans, and without tolerances."""
    if (rtol == 0 and atol == 0) or not actual.dtype.is_floating_point:
        return equal(actual, expected)
    sizes = torch.where(expected.isfinite(), expected.abs(), 0).double()
    return compare(actual, expected, atol + rtol * sizes, f"rtol {rtol}, atol {atol}")


def exact(actual: Tensor, expected: Tensor) -> Error:
    """:func:`equal`, with the same strides."""
    if actual.stride() != expected.stride() and actual.numel() > 0:
        return failure(f"has strides {actual.stride()}, the reference's has {expected.stride()}")
    return equal(actual, expected)


def _unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def linear(actual: Tensor, truth: Tensor, magnitude: Tensor, *, terms: int, roundings: int) -> Error:
    """Class 2. truth: float64 result; magnitude: the same of the absolute inputs; both of actual's shape."""
    accumulation = torch.float64 if actual.dtype == torch.float64 else torch.float32
    # The float64 truth has rounded as well: that matters only when float64 itself is tested.
    relative = (terms + 1) * (_unit(accumulation) + _unit(torch.float64)) + roundings * _unit(actual.dtype)
    # (1 + u)^n - 1 < 1.01 n u for the few roundings here; the smallest normal number covers underflow.
    bound = 1.01 * relative * magnitude.double() + roundings * torch.finfo(actual.dtype).smallest_normal
    return compare(actual, truth, bound, f"{terms} additions and {roundings} roundings")


def not_worse(actual: Tensor, plain: Tensor, truth: Tensor, *, size: int, magnitude: Tensor | None = None) -> Error:
    """Class 3. plain: PyTorch's result in actual's dtype; truth: in float64; size: of the largest map.

    magnitude: float64 result of the absolute inputs, for sums in which terms cancel: these round in units of it.
    """
    if actual.numel() == 0:
        return compare(actual, truth, 0.0, "")
    own = difference(plain, truth).max().item()
    largest = (truth if magnitude is None else magnitude).abs().max().item()
    bound = 2 * own + unit_of_result(actual.dtype, size) * largest
    return compare(actual, truth, bound, f"twice plain PyTorch's own error, {own:.3e}, and a unit")


def unit_of_result(dtype: torch.dtype, size: int) -> float:
    """What :func:`not_worse` allows beyond plain PyTorch's error, as a share of the largest number.

    The float64 truth has rounded too: a source coordinate below `size`, and so its weight, by up to `size` units along
    each axis, in either result.
    """
    return torch.finfo(dtype).eps + 4 * size * torch.finfo(torch.float64).eps


def largest_share(plain: Sequence[Tensor], truths: Sequence[Tensor], magnitudes: Sequence[Tensor]) -> float:
    """The largest error of plain PyTorch's results, as a share of the sums of their terms' magnitudes."""
    errors = zip(plain, truths, magnitudes, strict=True)
    shares = [(difference(p, t) / m.clamp(min=torch.finfo(p.dtype).tiny)).max().item() for p, t, m in errors]
    return max(shares, default=0.0)


def share_not_worse(actual: Tensor, truth: Tensor, magnitude: Tensor, *, share: float) -> Error:
    """Class 3 of one of several results; magnitude: the result of the absolute inputs; share: :func:`largest_share`."""
    bound = (2 * share + torch.finfo(actual.dtype).eps) * magnitude.double()
    return compare(actual, truth, bound, f"twice plain PyTorch's largest share, {share:.3e}, and a unit")


def _asserting(rule: Callable[P, Error]) -> Callable[P, None]:
    """`rule` as a check: raises AssertionError where its error is over its bound."""

    @functools.wraps(rule)
    def check(*arguments: P.args, **options: P.kwargs) -> None:
        error = rule(*arguments, **options)
        if not error.within:
            raise AssertionError(error.text)

    return check


assert_equal, assert_exact = _asserting(equal), _asserting(exact)
assert_linear, assert_not_worse = _asserting(linear), _asserting(not_worse)
