# SPDX-License-Identifier: Apache-2.0
"""Whether a fused module or function computes what the one computes that it replaces."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """Passes if `fast` gives what `reference` gives, for the same inputs and weights; else says where it does not.

    Args:
        fast, reference: modules or functions. Modules are copied, and fast's copy loads reference's ``state_dict``: the
            two need not share weights, and neither changes.
        inputs, keywords: what both are called with: tensors, and lists, tuples and dicts of them.
        gradients: whether to compare gradients too: of all parameters, and of the inputs that require a gradient, for
            the same random gradients of the outputs. One that is missing counts as zero.
        autocast: a type to run both under autocast with.
        compile: whether `fast` goes through :func:`torch.compile`; a text names the compiler's backend.
        exact: every bit has to be equal.
        rtol, atol: bounds on ``|fast - reference|``, as in :func:`torch.testing.assert_close`, instead of the derived
            one; one of them alone leaves the other 0.
        seed: of random numbers that the two draw, and of the gradients of the outputs.

    Integers and booleans have to be equal; so have shapes, types and the structure of the outputs. Floating-point
    numbers are compared with the reference in float64: fast may be off from it by twice the error that the reference
    itself makes in the inputs' type, and one unit of that type: the rule of this package's own tests. Errors count as
    shares of the largest number of a tensor, and the reference's largest one of all outputs bounds each output, that of
    all gradients each gradient. A reference that cannot run in float64, or decides otherwise there, has no such bound:
    then give rtol and atol.

    Raises:
        AssertionError: which tensor differs, where, by how much and how much it may.
        ValueError: exact with rtol or atol, or a reference that gives no bound.

    >>> from fpn_fast import nn
    >>> import torch
    >>> pyramid = nn.FeaturePyramidNetwork([3, 5], 4)
    >>> maps = {"0": torch.rand(1, 3, 8, 8, requires_grad=True), "1": torch.rand(1, 5, 4, 4)}
    >>> assert_parity(pyramid, copy.deepcopy(pyramid), maps)
    """
    if exact and (rtol is not None or atol is not None):
        raise ValueError("exact leaves no room for rtol and atol")
    fast, reference = _same_weights(fast, reference)
    call = fast
    if compile:
        call = torch.compile(fast, backend=compile if isinstance(compile, str) else "inductor")
    device = _device_of(inputs, keywords)
    ours = _run(call, fast, inputs, keywords, gradients, autocast, seed, device)
    theirs = _run(reference, reference, inputs, keywords, gradients, autocast, seed, device, seeds=ours.seeds)
    _check_structure(ours.tensors, theirs.tensors)
    if exact or rtol is not None or atol is not None:
        for name, actual in ours.tensors.items():
            _check(name, tolerances.close(actual, theirs.tensors[name], rtol or 0.0, atol or 0.0))
        return
    floats = {name: t for name, t in theirs.tensors.items() if t.dtype.is_floating_point and t.numel()}
    truth = _in_float64(reference, inputs, keywords, gradients, seed, device, ours.seeds) if floats else {}
    shares = _own_errors(floats, truth, autocast)
    for name, actual in ours.tensors.items():
        if name in floats:
            _check(name, _compare_with_truth(actual, truth[name], shares[_kind(name)], autocast))
        else:
            _check(name, tolerances.equal(actual, theirs.tensors[name]))


def _check(name: str, error: tolerances.Error) -> None:
    if not error.within:
        raise AssertionError(f"{name} {error.text}")


@dataclass
class _Results:
    """Outputs and gradients by name, detached, and the gradients of the outputs that were used."""

    tensors: dict[str, Tensor]
    seeds: dict[str, Tensor]


def _same_weights(fast: Callable[..., Any], reference: Callable[..., Any]) -> tuple[Any, Any]:
    fast, reference = (copy.deepcopy(f) if isinstance(f, nn.Module) else f for f in (fast, reference))
    if isinstance(fast, nn.Module) and isinstance(reference, nn.Module):
        try:
            fast.load_state_dict(reference.state_dict())
        except RuntimeError as error:
            raise AssertionError(f"fast does not load the reference's state_dict: {error}") from error
    return fast, reference


def _device_of(*trees: Any) -> str:
    tensors = [leaf for leaf in _leaves(trees, "").values() if isinstance(leaf, Tensor)]
    return tensors[0].device.type if tensors else "cpu"


def _leaves(tree: Any, prefix: str) -> dict[str, Any]:
    return {prefix + keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def _run(
    call: Callable[..., Any],
    owner: Any,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    gradients: bool,
    autocast: torch.dtype | None,
    seed: int,
    device: str,
    seeds: dict[str, Tensor] | None = None,
) -> _Results:
    """`call` of fresh leaves; owner: has the parameters, if it is a module."""
    fresh = lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad) if _is_tensor(leaf) else leaf  # noqa: E731
    inputs, keywords = tree_map(fresh, inputs), tree_map(fresh, dict(keywords))
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        torch.manual_seed(seed)
        with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            outputs = call(*inputs, **keywords)
    named = {name: leaf for name, leaf in _leaves(outputs, "output").items() if _is_tensor(leaf)}
    results = {name: leaf.detach() for name, leaf in named.items()}
    if not gradients:
        return _Results(results, {})
    differentiable = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
    leaves = {**_leaves(inputs, "gradient of input "), **_leaves(keywords, "gradient of keyword ")}
    leaves = {name: leaf for name, leaf in leaves.items() if _is_tensor(leaf) and leaf.requires_grad}
    if isinstance(owner, nn.Module):
        leaves |= {f"gradient of {name}": p for name, p in owner.named_parameters() if p.requires_grad}
    if seeds is None:
        generator = torch.Generator().manual_seed(seed)
        seeds = {
            name: torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for name, leaf in named.items()
        }
    # What has another shape is reported as that.
    differentiable = {n: leaf for n, leaf in differentiable.items() if n in seeds and seeds[n].shape == leaf.shape}
    if differentiable and leaves:
        grads = torch.autograd.grad(
            list(differentiable.values()),
            list(leaves.values()),
            [seeds[name].to(leaf.device, leaf.dtype) for name, leaf in differentiable.items()],
            materialize_grads=True,
        )
        results |= {name: grad.detach() for name, grad in zip(leaves, grads, strict=True)}
    return _Results(results, seeds)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _check_structure(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if list(ours) != list(theirs):
        missing, more = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        if not missing and not more:
            raise AssertionError(f"fast gives {list(ours)}, the reference the same in another order: {list(theirs)}")
        raise AssertionError(f"fast lacks {missing or 'nothing'} of the reference, and {more or 'nothing'} beside it")
    for name, actual in ours.items():
        expected = theirs[name]
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise AssertionError(
                f"{name} is {list(actual.shape)} {actual.dtype}, the reference's is {list(expected.shape)} "
                f"{expected.dtype}"
            )


def _in_float64(
    reference: Any,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    gradients: bool,
    seed: int,
    device: str,
    seeds: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The reference's results in float64; ValueError where it has none."""
    widen = lambda leaf: (  # noqa: E731
        leaf.detach().double().requires_grad_(leaf.requires_grad)
        if _is_tensor(leaf) and leaf.dtype.is_floating_point
        else leaf
    )
    wide = copy.deepcopy(reference).double() if isinstance(reference, nn.Module) else reference
    try:
        return _run(
            wide, wide, tree_map(widen, inputs), tree_map(widen, dict(keywords)), gradients, None, seed, device, seeds
        ).tensors
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the reference cannot run in float64 ({error}): give rtol and atol, or exact=True") from error


#: Sizes of maps up to which weights in float64 have errors of their own, far below any but float64's.
_SIZE = 2048


def _kind(name: str) -> str:
    return "gradient" if name.startswith("gradient of ") else "output"


def _own_errors(plain: dict[str, Tensor], truth: dict[str, Tensor], autocast: torch.dtype | None) -> dict[str, float]:
    """The largest error of the reference's outputs, and of its gradients, as a share of the largest number."""
    shares: dict[str, float] = {}
    for name, expected in plain.items():
        wide = truth.get(name)
        if wide is None or wide.shape != expected.shape:
            raise ValueError(
                f"{name}: the reference gives something else in float64: give rtol and atol, or exact=True"
            )
        dtype = autocast or expected.dtype
        error, largest = tolerances.difference(expected, wide).max().item(), _largest(wide)
        share = error / largest if largest else error / torch.finfo(dtype).smallest_normal
        # A rounding of every step stays far below, a decision that differs does not.
        if not share <= math.sqrt(torch.finfo(dtype).eps):
            raise ValueError(
                f"{name}: the reference is off from itself in float64 by {error:.3e}, where the largest number is "
                f"{largest:.3e}, too much to bound anything by: give rtol and atol, or exact=True"
            )
        shares[_kind(name)] = max(shares.get(_kind(name), 0.0), share)
    return shares


def _compare_with_truth(actual: Tensor, truth: Tensor, share: float, autocast: torch.dtype | None) -> tolerances.Error:
    unit = tolerances.unit_of_result(autocast or actual.dtype, _SIZE)
    rule = f"twice the reference's own error, {share:.3e} of the largest value, and a unit"
    return tolerances.compare(actual, truth, (2 * share + unit) * _largest(truth), rule)


def _largest(values: Tensor) -> float:
    return torch.where(values.isfinite(), values.abs(), 0).max().item()
