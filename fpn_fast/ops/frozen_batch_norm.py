# SPDX-License-Identifier: Apache-2.0
"""Batch norm with fixed statistics, the addition of a residual and ReLU, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast._memory_format import memory_format
from fpn_fast.ops._checks import DTYPES, check_device, check_shape, check_tensor
from fpn_fast.ops._registration import call_kernel, records_gradient, register_op
from fpn_fast.ops._schemas import NORM_PART, NORM_RULES

_VECTORS = ("weight", "bias", "running_mean", "running_var")


def frozen_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    residual_norm: Sequence[Tensor] | None = None,
    activation: str | None = None,
    rule: str = "torchvision",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise with fixed statistics, add a residual and apply ReLU: the end of a residual block in one pass.

    Args:
        x: [N, C, H, W], float64, float32, float16 or bfloat16, with any strides.
        weight, bias, running_mean, running_var: [C], of one dtype.
        eps: added to the variances.
        residual: [N, C, H, W], added to the normalised map. A dtype that is neither that of x nor float32 is converted.
        residual_norm: weight, bias, running_mean and running_var [C] that normalise the residual with the same `eps`
            before it is added.
        activation: None (default) or ``"relu"``.
        rule: whose module is followed. ``"torchvision"`` (default) returns the wider of the dtypes of x and of the
            vectors: float32 for bfloat16 maps under autocast. ``"detectron2"`` rounds scale and shift to the dtype of x
            and returns it. ``"batch_norm"`` returns it too, and rounds as ``F.batch_norm`` in evaluation.
        output_dtype: the dtype of the result, None for that of the rule. Keeping bfloat16 maps moves half the bytes,
            and every later addition of a residual then rounds to bfloat16.

    Returns:
        [N, C, H, W] in the memory format of x: ``relu(x * scale + shift + residual)``, where
        ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``. Every product and sum
        is rounded to float32 (float64 for float64), and the result once to its dtype. On a CPU, float32 and float64
        equal torchvision's ``FrozenBatchNorm2d``, or by rule ``"batch_norm"`` ``F.batch_norm`` of a dense map, and the
        operators after it bit for bit; so do the gradients of the maps.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype, or the vectors differ in dtype.
        ValueError: shapes or devices do not fit; the statistics require a gradient; residual_norm comes without a
            residual; activation or rule is unknown.
        BackendUnavailableError: the requested backend cannot serve x's device.

    Note:
        x, residual, weight and bias are differentiable, twice. With ReLU the gradient reads the result alone; x and
        residual are kept only where weights or biases require a gradient. Two runs are equal bit for bit. The call does
        not synchronise with the host. A compiler gets the plain expression, which Inductor fuses.

    >>> one, zero = torch.ones(2), torch.zeros(2)
    >>> frozen_batch_norm(torch.full((1, 2, 1, 1), -3.0), one, one, zero, one, 0.0, activation="relu").flatten()
    tensor([0., 0.])

    Source: torchvision/ops/misc.py; detectron2/layers/batch_norm.py.
    """
    norm = _checked_vectors(x, (weight, bias, running_mean, running_var), "")
    if rule not in NORM_RULES:
        raise ValueError(f"rule must be {', '.join(NORM_RULES[:-1])} or {NORM_RULES[-1]}, got {rule!r}")
    if activation is not None and activation != "relu":
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
    other: list[Tensor] = []
    if residual is not None:
        check_tensor(residual, "residual")
        if not backends.jit_traced():
            check_shape(residual, "residual", "of the shape of x", tuple(x.shape))
        check_device(residual, "residual", x, "x")
        if residual_norm is not None:
            other = _checked_vectors(x, tuple(residual_norm), "residual_norm's ")
    elif residual_norm is not None:
        raise ValueError("residual_norm goes with a residual, got None")
    dtype = norm[0].dtype
    if other and other[0].dtype != dtype:
        raise TypeError(f"both norms must be of one dtype, got {dtype} and {other[0].dtype}")
    if output_dtype is None:
        output_dtype = torch.promote_types(x.dtype, dtype) if rule == "torchvision" else x.dtype
    elif output_dtype not in DTYPES:
        raise TypeError(f"output_dtype must be float64, float32, float16 or bfloat16, got {output_dtype}")
    return normalise(x, norm, float(eps), residual, other, activation == "relu", rule, output_dtype)


def normalise(
    x: Tensor,
    norm: list[Tensor],
    eps: float,
    residual: Tensor | None,
    other: list[Tensor],
    relu: bool,
    rule: str,
    output_dtype: torch.dtype,
) -> Tensor:
    """Run the op on checked arguments. other: the norm of the residual, empty without; the rest: see the reference."""
    dtype = norm[0].dtype
    plain = torch.compiler.is_compiling() or backends.plain_only()
    backend = "reference" if plain else backends.choose_for(x, "frozen_batch_norm")
    if backend == "reference":
        return reference.frozen_batch_norm(x, norm, eps, residual, other, relu, rule, output_dtype)
    if dtype == torch.float64 != x.dtype:
        x = x.double()
    if rule == "batch_norm" and x.dtype == torch.float64:
        norm, other = [v.double() for v in norm], [v.double() for v in other]
    wide = torch.promote_types(x.dtype, torch.float32)
    widen = output_dtype != x.dtype
    form = memory_format(x)
    x = x.contiguous(memory_format=form)
    if residual is not None:
        residual = residual if residual.dtype == x.dtype else residual.to(wide)
        residual = residual.contiguous(memory_format=form)
    norm, other = [v.contiguous() for v in norm], [v.contiguous() for v in other]
    tensors = (x, *norm, *other) if residual is None else (x, residual, *norm, *other)
    if records_gradient(tensors):
        y: Tensor = _FrozenBatchNorm.apply(backend, (eps, relu, rule, widen), x, residual, *norm, *other)
    else:
        y = call_kernel(_FORWARD[backend], x, norm, eps, residual, other, relu, _code(rule), widen)
    return y if y.dtype == output_dtype else y.to(output_dtype)


def _checked_vectors(x: Tensor, vectors: Sequence[Tensor], of: str) -> list[Tensor]:
    """Return the four vectors [C] of a norm of x; of: the argument that they are in."""
    check_tensor(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {tuple(x.shape)}")
    if len(vectors) != 4:
        raise ValueError(f"residual_norm must be {', '.join(_VECTORS)}, got {len(vectors)} items")
    # Almost every call is right; the checks that say what is wrong take several times as long.
    if not backends.jit_traced() and vectors_fit(x, vectors):
        return list(vectors)
    for name, vector in zip(_VECTORS, vectors, strict=True):
        check_tensor(vector, of + name)
        # For torch.jit.trace sizes are tensors, which a check would turn into constants.
        if not backends.jit_traced():
            check_shape(vector, of + name, "[C]", (x.size(1),))
        check_device(vector, of + name, x, "x")
        if vector.dtype != vectors[0].dtype:
            raise TypeError(f"{of}{name} must be of the dtype of weight, {vectors[0].dtype}, got {vector.dtype}")
        if vector.requires_grad and name.startswith("running"):
            raise ValueError(f"{of}{name} is a constant and has no gradient, but requires one; detach it")
    return list(vectors)


def vectors_fit(x: Tensor, vectors: Sequence[Tensor]) -> bool:
    """Whether the op takes these as the vectors of a norm of x [N, C, H, W]."""
    channels, device = x.size(1), x.device
    for i, vector in enumerate(vectors):
        if not isinstance(vector, Tensor) or vector.dim() != 1 or vector.size(0) != channels:
            return False
        if vector.dtype != vectors[0].dtype or vector.device != device or (i > 1 and vector.requires_grad):
            return False
    return vectors[0].dtype in DTYPES


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        options: tuple[float, bool, str, bool],
        x: Tensor,
        residual: Tensor | None,
        *vectors: Tensor,
    ) -> Tensor:
        norm, residual_norm = list(vectors[:4]), list(vectors[4:])
        eps, relu, rule, widen = options
        y: Tensor = call_kernel(_FORWARD[backend], x, norm, eps, residual, residual_norm, relu, _code(rule), widen)
        needs = ctx.needs_input_grad
        # The next convolution keeps y anyway.
        kept = (y if relu else None, x if any(needs[4:6]) else None, residual if any(needs[8:10]) else None)
        ctx.save_for_backward(*kept, *vectors)
        ctx.options = backend, eps, rule, x.dtype, None if residual is None else residual.dtype
        ctx.form = memory_format(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, x, residual, *vectors = ctx.saved_tensors
        backend, eps, rule, dtype, residual_dtype = ctx.options
        norm, residual_norm, needs = vectors[:4], vectors[4:], ctx.needs_input_grad
        grad_x = grad_residual = behind = None
        if torch.is_grad_enabled():
            # A second derivative is asked for: the same in operators that autograd knows.
            behind, grad_x, grad_residual = reference.frozen_batch_norm_backward(
                grad, y, norm, eps, residual_norm, rule, dtype
            )
            grad_x = grad_x.to(dtype)
            grad_residual = None if residual_dtype is None else grad_residual.to(residual_dtype)
        elif needs[2] or needs[3]:
            grad = grad.contiguous(memory_format=ctx.form)
            # Without ReLU and norm the residual's gradient is that of y.
            copies = y is None and not residual_norm
            code = DTYPES.index(residual_dtype) if needs[3] and not copies else -1
            grad_x, grad_residual = call_kernel(
                _BACKWARD[backend], grad, y, norm, eps, residual_norm, _code(rule), DTYPES.index(dtype), code
            )
            if copies and needs[3]:
                grad_residual = grad.to(residual_dtype)
        grads = [grad_x if needs[2] else None, grad_residual if needs[3] else None]
        for source, four in ((x, norm), (residual, residual_norm)):
            if source is not None:
                sums = _sums(
                    backend,
                    grad if behind is None else behind,
                    y if behind is None else None,
                    source,
                    four[2],
                    ctx.form,
                )
                scale = (four[3].to(sums[1].dtype) + eps).rsqrt()
                grads += [(sums[1] * scale).to(four[0].dtype), sums[0].to(four[1].dtype), None, None]
            else:
                grads += [None] * len(four)
        return None, None, *grads


def _contracts() -> bool:
    """Whether torch's batch norm on this CPU rounds a product and a sum together, as FMA instructions do."""
    with torch.inference_mode():
        zero, one, near = torch.tensor([0.0, 1.0, 1 + 2**-12], dtype=torch.float32, device="cpu").split(1)
        # near * near - (1 + 2^-11) is 2^-24, which a product in float32 does not have.
        # torch 2.11 takes no eps of zero; a variance of one stays one with this.
        y = F.batch_norm(near.view(1, 1, 1, 1), zero, one, near, -(one + 2**-11), False, 0.0, 2**-60)
    return bool(y)


_CODES = {rule: code for code, rule in enumerate(NORM_RULES)}
if _contracts():
    _CODES["batch_norm"] = len(NORM_RULES)


def _code(rule: str) -> int:
    """The number of a rule for the kernels: NormRule."""
    return _CODES[rule]


def _sums(
    backend: str, grad: Tensor, y: Tensor | None, x: Tensor, mean: Tensor, form: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Return the sums [C] of the gradient behind ReLU, and of its product with x - mean."""
    if torch.is_grad_enabled():
        return reference.frozen_batch_norm_sums(grad, x, mean)
    mean = mean.to(torch.promote_types(x.dtype, torch.float32))
    parts: Tensor = call_kernel(_SUMS[backend], grad.contiguous(memory_format=form), y, x, mean)
    sums = parts.sum(0)
    return sums[0], sums[1]


def _fake(
    x: Tensor,
    norm: list[Tensor],
    eps: float,
    residual: Tensor | None,
    residual_norm: list[Tensor],
    relu: bool,
    rule: int,
    widen: bool,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32) if widen else x.dtype
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


def _fake_backward(
    grad: Tensor,
    y: Tensor | None,
    norm: list[Tensor],
    eps: float,
    residual_norm: list[Tensor],
    rule: int,
    x_type: int,
    residual_type: int,
) -> tuple[Tensor, Tensor]:
    form = memory_format(grad)
    grad_x = torch.empty_like(grad, dtype=DTYPES[x_type], memory_format=form)
    if residual_type < 0:
        return grad_x, grad.new_empty(0, dtype=DTYPES[x_type])
    return grad_x, torch.empty_like(grad, dtype=DTYPES[residual_type], memory_format=form)


def _fake_sums(grad: Tensor, y: Tensor | None, x: Tensor, mean: Tensor) -> Tensor:
    positions = x.size(0) * x.size(2) * x.size(3)
    return mean.new_empty(((positions + NORM_PART - 1) // NORM_PART, 2, x.size(1)))


_FORWARD = register_op("frozen_batch_norm", fake=_fake)
_BACKWARD = register_op("frozen_batch_norm_backward", fake=_fake_backward)
_SUMS = register_op("frozen_batch_norm_sums", fake=_fake_sums)
