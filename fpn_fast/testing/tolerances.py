# SPDX-License-Identifier: Apache-2.0
"""How far a result may be from the truth, in three classes. Every bound is derived; none was tuned until it passed.

1. exact: one rounding of an exactly rounded sum, copies.
2. linear: sums with non-negative weights that are exact (nearest, its gradient). Each of k additions errs by at most
   half a unit of the accumulation type, relative to the sum of the terms' magnitudes; each of r roundings to the
   storage type by half a unit of that.
3. not worse: where weights are rounded too (bilinear), at most twice the error of plain PyTorch in the same type, plus
   one unit of the storage type; both against float64. Of many small results of one computation, one may be lucky:
   errors of each are then shares of the sum of its terms' magnitudes, and plain PyTorch's largest share of all counts.

The one source for the tests of this package, for ``python -m fpn_fast verify`` and for :func:`assert_parity`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    """Every bit equal, NaN where NaN; shape, dtype and strides too."""
    assert actual.stride() == expected.stride() or actual.numel() == 0
    assert_equal(actual, expected)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Class 1: every bit equal, NaN where NaN; shape and dtype too, with any strides."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def _unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def assert_linear(actual: Tensor, exact: Tensor, magnitude: Tensor, *, terms: int, roundings: int) -> None:
    """Class 2. exact: float64 result; magnitude: the same of the absolute inputs; both of actual's shape."""
    accumulation = torch.float64 if actual.dtype == torch.float64 else torch.float32
    # The float64 truth has rounded as well: that matters only when float64 itself is tested.
    relative = (terms + 1) * (_unit(accumulation) + _unit(torch.float64)) + roundings * _unit(actual.dtype)
    # (1 + u)^n - 1 < 1.01 n u for the few roundings here; the smallest subnormal covers underflow.
    bound = 1.01 * relative * magnitude + roundings * torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - exact).abs()
    worst = (error - bound).max().item() if error.numel() else 0.0
    assert worst <= 0, f"error {error.max().item():.3e} passes its bound by {worst:.3e}"


def assert_not_worse(
    actual: Tensor, plain: Tensor, exact: Tensor, *, size: int, magnitude: Tensor | None = None
) -> None:
    """Class 3. plain: PyTorch's result in actual's dtype; exact: in float64; size: of the largest map.

    magnitude: float64 result of the absolute inputs, for sums in which terms cancel: these round in units of it.
    """
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    largest = exact if magnitude is None else magnitude
    allowed += unit_of_result(actual.dtype, size) * largest.abs().max().item()
    assert error <= allowed, f"error {error:.3e} is above {allowed:.3e}"


def unit_of_result(dtype: torch.dtype, size: int) -> float:
    """What :func:`assert_not_worse` allows beyond plain PyTorch's error, as a share of the largest number.

    The truth itself has rounded: a source coordinate below `size`, so a weight, by up to size units of float64, along
    two axes, here and there. That is all the room that float64 results have.
    """
    return torch.finfo(dtype).eps + 4 * size * torch.finfo(torch.float64).eps


def largest_share(plain: Sequence[Tensor], exact: Sequence[Tensor], magnitudes: Sequence[Tensor]) -> float:
    """The largest error of plain PyTorch's results, as a share of the sums of their terms' magnitudes."""
    errors = zip(plain, exact, magnitudes, strict=True)
    shares = [((p.double() - e).abs() / m.clamp(min=torch.finfo(p.dtype).tiny)).max().item() for p, e, m in errors]
    return max(shares, default=0.0)


def assert_share_not_worse(actual: Tensor, exact: Tensor, magnitude: Tensor, *, share: float) -> None:
    """Class 3 of one of several results; magnitude: the result of the absolute inputs; share: :func:`largest_share`."""
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    worst = (error - (2 * share + torch.finfo(actual.dtype).eps) * magnitude).max().item()
    assert worst <= 0, f"error {error.max().item():.3e} passes its bound by {worst:.3e}"
