# SPDX-License-Identifier: Apache-2.0
"""A check that a fused module or function computes the same as the one that it replaces."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from fpn_fast.testing import tolerances


def assert_parity(
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    *inputs: Any,
    gradients: bool = True,
    autocast: torch.dtype | None = None,
    compile: bool | str = False,
    exact: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    **keywords: Any,
) -> None:
    """Checks that `fast` gives the same outputs and gradients as `reference` for the same inputs and weights.

    Args:
        fast, reference: modules or functions. Modules are copied, and the copy of `fast` loads the ``state_dict`` of
            `reference`. So the two need not share weights, and neither changes.
        inputs, keywords: the arguments of both: tensors, and lists, tuples and dicts of them.
        gradients: whether to compare the gradients of all parameters, and of the inputs that require a gradient, for
            the same random gradients of the outputs. A missing gradient counts as zero. True by default.
        autocast: a dtype to run both with under autocast. None by default.
        compile: whether `fast` goes through :func:`torch.compile`; a string names the compiler's backend. False by
            default.
        exact: whether every value has to be equal. False by default.
        rtol, atol: bounds on ``|fast - reference|`` instead of the derived one, as in
            :func:`torch.testing.assert_close`. If you give one of them, the other is 0.
        seed: of random numbers that the two draw, and of the gradients of the outputs. 0 by default.

    Raises:
        AssertionError: which tensor differs, where, by how much, and how much is allowed. ``python -O`` keeps it.
        ValueError: exact with rtol or atol, or a reference that gives no bound.

    Note:
        Shapes, dtypes, the structure of the outputs, integers and booleans have to be equal. Floating-point values are
        compared with the reference in float64. The error of `fast` may be twice the error of the reference in the
        inputs' dtype, plus one unit of that dtype, as in this package's own tests. Both errors are shares of the
        largest value of a tensor. The reference's largest error of all outputs bounds each output, and its largest
        error of all gradients bounds each gradient. A reference that cannot run in float64, or decides otherwise
        there, has no such bound; then give rtol and atol.

    >>> from fpn_fast import nn
    >>> import torch
    >>> pyramid = nn.FeaturePyramidNetwork([3, 5], 4)
    >>> maps = {"0": torch.rand(1, 3, 8, 8, requires_grad=True), "1": torch.rand(1, 5, 4, 4)}
    >>> assert_parity(pyramid, copy.deepcopy(pyramid), maps)
    """
    if exact and (rtol is not None or atol is not None):
        raise ValueError("exact=True allows no rtol and no atol; leave one or the other out")
    fast, reference = _same_weights(fast, reference)
    run = functools.partial(_run, inputs=inputs, keywords=keywords, gradients=gradients, seed=seed)
    ours, seeds = run(fast, autocast=autocast, compile=compile)
    theirs, _ = run(reference, autocast=autocast, seeds=seeds)
    _check_structure(ours, theirs)
    if exact or rtol is not None or atol is not None:
        for name, actual in ours.items():
            _check(name, tolerances.close(actual, theirs[name], rtol or 0.0, atol or 0.0))
        return
    floats = {name: t for name, t in theirs.items() if t.dtype.is_floating_point and t.numel()}
    truth: dict[str, Tensor] = {}
    if floats:
        wide = copy.deepcopy(reference).double() if isinstance(reference, nn.Module) else reference
        try:
            truth, _ = run(wide, widen=True, seeds=seeds)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"the reference cannot run in float64 ({error}); give rtol and atol, or exact=True"
            ) from error
    shares = _own_errors(floats, truth, autocast)
    for name, actual in ours.items():
        if name in floats:
            _check(name, _compare_with_truth(actual, truth[name], shares[_kind(name)], autocast))
        else:
            _check(name, tolerances.equal(actual, theirs[name]))


def _check(name: str, error: tolerances.Error) -> None:
    if not error.within:
        raise AssertionError(f"{name} {error.text}")


def _same_weights(fast: Callable[..., Any], reference: Callable[..., Any]) -> tuple[Any, Any]:
    fast, reference = (copy.deepcopy(f) if isinstance(f, nn.Module) else f for f in (fast, reference))
    if isinstance(fast, nn.Module) and isinstance(reference, nn.Module):
        try:
            fast.load_state_dict(reference.state_dict())
        except RuntimeError as error:
            raise AssertionError(f"fast does not load the reference's state_dict: {error}") from error
    return fast, reference


def _tensors(tree: Any, prefix: str) -> dict[str, Tensor]:
    found = {prefix + keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}
    return {name: leaf for name, leaf in found.items() if isinstance(leaf, Tensor)}


def _run(
    owner: Any,
    *,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    gradients: bool,
    seed: int,
    autocast: torch.dtype | None = None,
    compile: bool | str = False,
    widen: bool = False,
    seeds: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs a module or function on fresh leaves. widen: whether these are float64; seeds: gradients of the outputs.

    Returns:
        Outputs and gradients by name, detached, and the gradients of the outputs that were used.
    """

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copied = leaf.detach().clone()
        return (copied.double() if widen and leaf.is_floating_point() else copied).requires_grad_(leaf.requires_grad)

    inputs, keywords = tree_map(fresh, inputs), tree_map(fresh, keywords)
    given = {**_tensors(inputs, "gradient of input "), **_tensors(keywords, "gradient of keyword ")}
    device = next((leaf.device.type for leaf in given.values()), "cpu")
    call = torch.compile(owner, backend=compile if isinstance(compile, str) else "inductor") if compile else owner
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        torch.manual_seed(seed)
        with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            named = _tensors(call(*inputs, **keywords), "output")
    results = {name: leaf.detach() for name, leaf in named.items()}
    if not gradients:
        return results, {}
    if isinstance(owner, nn.Module):
        given |= {f"gradient of {name}": parameter for name, parameter in owner.named_parameters()}
    leaves = {name: leaf for name, leaf in given.items() if leaf.requires_grad}
    if seeds is None:
        generator = torch.Generator().manual_seed(seed)
        seeds = {n: torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for n, leaf in named.items()}
    # Another shape is reported as such, not as another gradient.
    differentiable = {
        n: leaf for n, leaf in named.items() if leaf.requires_grad and n in seeds and seeds[n].shape == leaf.shape
    }
    if differentiable and leaves:
        grads = torch.autograd.grad(
            list(differentiable.values()),
            list(leaves.values()),
            [seeds[name].to(leaf.device, leaf.dtype) for name, leaf in differentiable.items()],
            materialize_grads=True,
        )
        results |= {name: grad.detach() for name, grad in zip(leaves, grads, strict=True)}
    return results, seeds


def _check_structure(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if list(ours) != list(theirs):
        missing, more = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        if not missing and not more:
            raise AssertionError(f"fast gives {list(ours)}, the reference the same in another order: {list(theirs)}")
        raise AssertionError(
            f"fast lacks {missing or 'none'} of the reference's outputs, and gives {more or 'none'} more"
        )
    for name, actual in ours.items():
        _check(name, tolerances.alike(actual, theirs[name]))


#: The largest map side that the errors of float64 weights are allowed for.
_SIZE = 2048


def _kind(name: str) -> str:
    return "gradient" if name.startswith("gradient of ") else "output"


def _own_errors(plain: dict[str, Tensor], truth: dict[str, Tensor], autocast: torch.dtype | None) -> dict[str, float]:
    """The largest error of the reference's outputs, and of its gradients, as a share of the largest value."""
    shares: dict[str, float] = {}
    for name, expected in plain.items():
        wide = truth.get(name)
        if wide is None or wide.shape != expected.shape:
            raise ValueError(f"{name}: the reference has another shape in float64; give rtol and atol, or exact=True")
        dtype = autocast or expected.dtype
        error, largest = tolerances.difference(expected, wide).max().item(), _largest(wide)
        share = error / largest if largest else error / torch.finfo(dtype).smallest_normal
        # Roundings stay far below this; a different decision, such as another order of boxes, does not.
        if not share <= math.sqrt(torch.finfo(dtype).eps):
            raise ValueError(
                f"{name}: the reference is off from itself in float64 by {error:.3e} at a largest value of "
                f"{largest:.3e}, which is too much for a bound; give rtol and atol, or exact=True"
            )
        shares[_kind(name)] = max(shares.get(_kind(name), 0.0), share)
    return shares


def _compare_with_truth(actual: Tensor, truth: Tensor, share: float, autocast: torch.dtype | None) -> tolerances.Error:
    unit = tolerances.unit_of_result(autocast or actual.dtype, _SIZE)
    rule = f"twice the reference's own error, {share:.3e} of the largest value, and a unit"
    return tolerances.compare(actual, truth, (2 * share + unit) * _largest(truth), rule)


def _largest(values: Tensor) -> float:
    return torch.where(values.isfinite(), values.abs(), 0).max().item()
