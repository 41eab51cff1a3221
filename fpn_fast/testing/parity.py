# SPDX-License-Identifier: Apache-2.0
"""A check that a fused module or function computes the same as the one that it replaces."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

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
        inputs, keywords: the arguments of both: tensors, and lists, tuples, dicts and dataclasses of them.
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
        AssertionError: which tensor differs, where, by how much, and how much is allowed; or no tensor was compared.
            ``python -O`` keeps it.
        ValueError: exact with rtol or atol, a reference that gives no bound, or an object that cannot be compared.

    Note:
        Shapes, dtypes, the structure of the outputs, integers, booleans, text and None have to be equal, and so have
        Python's floats, unless you give rtol or atol. numpy's arrays count as tensors. The tensors of the inputs, and
        the buffers that both modules have, are compared afterwards: one that the reference leaves as it is, `fast`
        must leave too, and one that it changes counts as an output.

        Floating-point values are compared with the reference in float64. The error of `fast` may be twice the error of
        the reference in the inputs' dtype, plus one unit of that dtype, as in this package's own tests. Both errors are
        shares of the largest value of a tensor. The reference's largest error of all outputs bounds each output, and
        its largest error of all gradients bounds each gradient. Where these are fewer than 16 values, as for a loss,
        the reference runs again on inputs and parameters that differ by a few units, until it has 16 errors. A
        reference that cannot run in float64, or decides otherwise there, has no such bound; then give rtol and atol.

    >>> from fpn_fast import nn
    >>> import torch
    >>> pyramid = nn.FeaturePyramidNetwork([3, 5], 4)
    >>> maps = {"0": torch.rand(1, 3, 8, 8, requires_grad=True), "1": torch.rand(1, 5, 4, 4)}
    >>> assert_parity(pyramid, copy.deepcopy(pyramid), maps)
    """
    if exact and (rtol is not None or atol is not None):
        raise ValueError("exact=True allows no rtol and no atol; leave one or the other out")
    fast = _same_weights(fast, reference)
    _refuse_unknown({**_leaves(inputs, "input "), **_leaves(keywords, "keyword ")}, outputs=False)
    run = functools.partial(_run, inputs=inputs, keywords=keywords, gradients=gradients, seed=seed)
    before = _state(reference, inputs, keywords)
    ours, seeds = run(fast, autocast=autocast, compile=compile)
    theirs, _ = run(reference, autocast=autocast, seeds=seeds)
    _refuse_unknown(ours | theirs, outputs=True)
    # A buffer outside of the state_dict, of one module alone, is its own affair.
    for name in [name for name in ours.keys() ^ theirs.keys() if name.startswith("buffer ")]:
        (ours if name in ours else theirs).pop(name)
    _check_structure(ours, theirs)
    kept = {name for name, tensor in before.items() if name in theirs and tolerances.equal(theirs[name], tensor).within}
    if not any(isinstance(value, Tensor) for name, value in theirs.items() if name not in kept):
        raise AssertionError(
            "no tensor was compared: the reference returns none and changes none; let both return what they compute"
        )
    rtol, atol, derived = rtol or 0.0, atol or 0.0, not exact and rtol is None and atol is None
    floats = {n: t for n, t in theirs.items() if n not in kept and isinstance(t, Tensor) and t.dtype.is_floating_point}
    floats = {n: t for n, t in floats.items() if t.numel() and derived}
    truth, shares = _truth(run, reference, floats, autocast, seeds) if floats else ({}, {})
    for name, actual in ours.items():
        if name in floats:
            _check(name, _compare_with_truth(actual, truth[name], shares[_kind(name)], autocast))
        elif name in kept:
            _check(name, tolerances.equal(actual, theirs[name]))
        else:
            _check(name, _compare(actual, theirs[name], rtol, atol))


def _check(name: str, error: tolerances.Error) -> None:
    if not error.within:
        raise AssertionError(f"{name} {error.text}")


def _same_weights(fast: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `fast` with the reference's weights, where both are modules."""
    if isinstance(fast, nn.Module) and isinstance(reference, nn.Module):
        fast = copy.deepcopy(fast)
        try:
            fast.load_state_dict(reference.state_dict())
        except RuntimeError as error:
            raise AssertionError(f"fast does not load the reference's state_dict: {error}") from error
    return fast


#: What is no tensor, and compared by equality.
_PLAIN: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, range, slice, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


def _is_dataclass(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _array_as_tensor(leaf: Any) -> Any:
    """A tensor with the values of numpy's array or scalar of numbers; anything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(leaf, numpy.ndarray | numpy.generic):
        return leaf
    try:
        return torch.from_numpy(numpy.array(leaf))
    except TypeError:
        return leaf


def _leaves(tree: Any, prefix: str) -> dict[str, Any]:
    """The leaves of lists, tuples, dicts and dataclasses by name, numpy's arrays as tensors."""
    found: dict[str, Any] = {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        name = prefix + keystr(path)
        if _is_dataclass(leaf):
            for field in dataclasses.fields(leaf):
                found |= _leaves(getattr(leaf, field.name), f"{name}.{field.name}")
        else:
            found[name] = _array_as_tensor(leaf)
    return found


def _copied(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tree with what `change` makes of its tensors, and of copies of numpy's arrays."""

    def fresh(leaf: Any) -> Any:
        if _is_dataclass(leaf):
            copied = copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                # A frozen one refuses setattr.
                object.__setattr__(copied, field.name, _copied(getattr(leaf, field.name), change))
            return copied
        tensor = _array_as_tensor(leaf)
        if not isinstance(tensor, Tensor):
            return leaf
        return change(tensor) if tensor is leaf else change(tensor).numpy()[()]

    return tree_map(fresh, tree)


def _state(owner: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that a call may change in place, by name: of its inputs, and a module's buffers."""
    found = {**_leaves(inputs, "input "), **_leaves(keywords, "keyword ")}
    tensors = {f"{name} afterwards": leaf.detach() for name, leaf in found.items() if isinstance(leaf, Tensor)}
    buffers = owner.named_buffers() if isinstance(owner, nn.Module) else ()
    return tensors | {f"buffer {name} afterwards": buffer.detach() for name, buffer in sorted(buffers)}


def _refuse_unknown(leaves: dict[str, Any], *, outputs: bool) -> None:
    """Raise ValueError for outputs of unknown classes, and for inputs of such that hold tensors."""
    for name, leaf in leaves.items():
        if isinstance(leaf, (Tensor, *_PLAIN)):
            continue
        if outputs or any(isinstance(each, Tensor) for each in tree_leaves(getattr(leaf, "__dict__", None))):
            raise ValueError(
                f"{name} is a {type(leaf).__module__}.{type(leaf).__qualname__}, whose tensors assert_parity does not "
                "know; give both a module around them that takes and returns tensors, or lists, tuples, dicts and "
                "dataclasses of tensors, numbers and text"
            )


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
    nudge: int = 0,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Runs a copy of a module, or a function, on fresh leaves.

    widen: whether these are float64; seeds: gradients of the outputs; nudge: if not 0, the leaves are some units off,
    in one way for each number, units of `autocast` or of their own dtype.

    Returns:
        Outputs, gradients and what the call may change by name, detached, and the gradients of the outputs.
    """
    generator = torch.Generator().manual_seed(seed + nudge)

    def nudged(tensor: Tensor) -> Tensor:
        if not nudge or not tensor.is_floating_point():
            return tensor
        eps = max(torch.finfo(dtype).eps for dtype in (tensor.dtype, autocast) if dtype is not None)
        units = torch.randint(-4, 5, tensor.shape, generator=generator).to(tensor)
        return tensor + tensor * units * eps

    def fresh(leaf: Tensor) -> Tensor:
        copied = nudged(leaf.detach().clone())
        return (copied.double() if widen and leaf.is_floating_point() else copied).requires_grad_(leaf.requires_grad)

    inputs, keywords = _copied(inputs, fresh), _copied(keywords, fresh)
    given = {**_leaves(inputs, "gradient of input "), **_leaves(keywords, "gradient of keyword ")}
    if isinstance(owner, nn.Module):
        owner = copy.deepcopy(owner)
        for parameter in owner.parameters():
            parameter.data = nudged(parameter.data)
        owner = owner.double() if widen else owner
        given |= {f"gradient of {name}": parameter for name, parameter in owner.named_parameters()}
    tensors = {name: leaf for name, leaf in given.items() if isinstance(leaf, Tensor)}
    device = next((leaf.device.type for leaf in tensors.values()), "cpu")
    call = torch.compile(owner, backend=compile if isinstance(compile, str) else "inductor") if compile else owner
    reduced = None if widen else autocast
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        torch.manual_seed(seed)
        with torch.autocast(device, dtype=reduced or torch.bfloat16, enabled=reduced is not None):
            named = _leaves(call(*inputs, **keywords), "output")
    results = {name: leaf.detach() if isinstance(leaf, Tensor) else leaf for name, leaf in named.items()}
    outputs = {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor)}
    leaves = {name: leaf for name, leaf in tensors.items() if leaf.requires_grad}
    if seeds is None:
        seeding = torch.Generator().manual_seed(seed)
        seeds = {n: torch.randn(leaf.shape, generator=seeding, dtype=torch.float64) for n, leaf in outputs.items()}
    # Another shape is reported as such, not as another gradient.
    differentiable = {
        n: leaf for n, leaf in outputs.items() if leaf.requires_grad and n in seeds and seeds[n].shape == leaf.shape
    }
    if gradients and differentiable and leaves:
        grads = torch.autograd.grad(
            list(differentiable.values()),
            list(leaves.values()),
            [seeds[name].to(leaf.device, leaf.dtype) for name, leaf in differentiable.items()],
            materialize_grads=True,
        )
        results |= {name: grad.detach() for name, grad in zip(leaves, grads, strict=True)}
    return results | _state(owner, inputs, keywords), seeds


def _check_structure(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if list(ours) != list(theirs):
        missing, more = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        if not missing and not more:
            raise AssertionError(f"fast gives {list(ours)}, the reference the same in another order: {list(theirs)}")
        raise AssertionError(
            f"fast lacks {missing or 'none'} of the reference's outputs, and gives {more or 'none'} more"
        )
    for name, actual in ours.items():
        expected = theirs[name]
        if isinstance(actual, Tensor) and isinstance(expected, Tensor):
            _check(name, tolerances.alike(actual, expected))
        elif type(actual) is not type(expected):
            kinds = type(actual).__name__, type(expected).__name__
            raise AssertionError(f"{name} is {actual!r}, a {kinds[0]}; the reference's is {expected!r}, a {kinds[1]}")


def _compare(actual: Any, expected: Any, rtol: float, atol: float) -> tolerances.Error:
    """Compares two leaves of one type that have no derived bound."""
    if isinstance(actual, float) and (rtol or atol):
        actual, expected = (torch.tensor(value, dtype=torch.float64) for value in (actual, expected))
    if isinstance(actual, Tensor):
        return tolerances.close(actual, expected, rtol, atol)
    # NaN is not equal to itself.
    if actual == expected or (actual != actual and expected != expected):
        return tolerances.Error()
    return tolerances.failure(f"is {actual!r}, the reference's is {expected!r}; they have to be equal")


#: How many errors of the reference bound another one: with one alone, a lucky reference would allow nothing.
_VALUES = 16


def _truth(
    run: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]],
    reference: Callable[..., Any],
    plain: dict[str, Tensor],
    autocast: torch.dtype | None,
    seeds: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The reference's results in float64, and its own largest errors as :func:`_own_errors` gives them."""
    try:
        truth, _ = run(reference, autocast=autocast, widen=True, seeds=seeds)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the reference cannot run in float64 ({error}); give rtol and atol, or exact=True") from error
    shares = _own_errors(plain, truth, autocast)
    # In float64 the reference is its own truth.
    numbers = Counter({_kind(name): 0 for name in plain})
    for name, tensor in plain.items():
        numbers[_kind(name)] += _VALUES if tensor.dtype == torch.float64 and autocast is None else tensor.numel()
    few = {kind: number for kind, number in numbers.items() if number < _VALUES}
    again = functools.partial(run, reference, autocast=autocast, seeds=seeds, gradients="gradient" in few)
    for nudge in range(1, math.ceil(_VALUES / min(few.values(), default=_VALUES))):
        other, wide = again(nudge=nudge)[0], again(nudge=nudge, widen=True)[0]
        # A decision that turns bounds nothing.
        with contextlib.suppress(KeyError, ValueError):
            found = _own_errors({name: other[name] for name in plain if _kind(name) in few}, wide, autocast)
            shares |= {kind: max(share, shares[kind]) for kind, share in found.items()}
    return truth, shares


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
