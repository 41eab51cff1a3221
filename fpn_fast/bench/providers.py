# SPDX-License-Identifier: Apache-2.0
"""Who computes a case, and the check that it is the right thing that is computed.

- eager: the sequence of PyTorch calls that the op replaces, as torchvision writes it; in libraries.py as another
  library does.
- compile: ``torch.compile`` of ``fpn_fast.reference``, fullgraph, for the case's own shapes. Where the reference is a
  loop that nobody would compile, it is of torchvision's code, graph breaks and all.
- nvidia: RoIAlign mapped to a GPU as NVIDIA's MLPerf submission maps it, see nvidia_mapping.py; channels_last only.
- cpp and triton: the op, by that backend where it has kernels of it (triton on a GPU only).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from fpn_fast import backends, ops, reference
from fpn_fast.bench import libraries, selection
from fpn_fast.bench.cases import Case, scales
from fpn_fast.bench.op import Expectation, Function, Op, largest, listed
from fpn_fast.bench.rois import random_rois


@dataclass(frozen=True)
class Provider:
    """A way to compute a case; `backend` is asked for while it runs."""

    name: str
    function: Function
    backend: str | None = None


def _maps(case: Case, device: torch.device) -> list[Tensor]:
    memory_format = torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format
    return [
        torch.randn(case.batch, case.channels, height, width, device=device)
        .to(getattr(torch, case.dtype))
        .contiguous(memory_format=memory_format)
        for height, width in case.levels
    ]


def _eager_top_down(laterals: Sequence[Tensor]) -> list[Tensor]:
    """The loop in torchvision's FeaturePyramidNetwork.forward, without its convolutions."""
    merged = [laterals[-1]]
    for lateral in reversed(laterals[:-1]):
        merged.insert(0, lateral + F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest"))
    return merged


def _eager_upsample_add(maps: Sequence[Tensor]) -> Tensor:
    lateral, top = maps
    return lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest")


def _reference_upsample_add(maps: Sequence[Tensor]) -> Tensor:
    return reference.upsample_add(maps[0], maps[1])


OPS: dict[str, Op] = {
    "top_down": Op(_maps, reference.top_down, _eager_top_down, ops.top_down, compiled=reference.top_down),
    "upsample_add": Op(
        _maps,
        _reference_upsample_add,
        _eager_upsample_add,
        lambda maps: ops.upsample_add(maps[0], maps[1]),
        compiled=_reference_upsample_add,
    ),
}


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _pooler(case: Case) -> Op:
    """Pooling of the case's RoIs, which are made once for each device, as a detector has them already."""
    height, width = (4 * size for size in case.levels[0])
    rois = random_rois(case.batch, case.rois, height, width, case.clustered)
    module = MultiScaleRoIAlign([str(i) for i in range(len(case.levels))], case.output_size, case.sampling_ratio)
    boxes_on: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}
    tables_on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def boxes(device: torch.device) -> tuple[Tensor, list[Tensor]]:
        if device not in boxes_on:
            here = rois.to(device)
            boxes_on[device] = here, [here[here[:, 0] == i, 1:].contiguous() for i in range(case.batch)]
        return boxes_on[device]

    def eager(maps: Sequence[Tensor]) -> Tensor:
        # torchvision has no bfloat16 kernel; under autocast, which its users have then, it widens every map.
        with torch.autocast(maps[0].device.type, torch.bfloat16, enabled=maps[0].dtype == torch.bfloat16):
            named = {str(i): each for i, each in enumerate(maps)}
            return module(named, boxes(maps[0].device)[1], [(height, width)] * case.batch)

    def fused(maps: Sequence[Tensor]) -> Tensor:
        return ops.multiscale_roi_align(
            maps,
            boxes(maps[0].device)[0],
            case.output_size,
            scales(case),
            sampling_ratio=case.sampling_ratio,
        )

    sizes = torch.tensor(case.levels, dtype=torch.int32)

    def nvidia(maps: Sequence[Tensor]) -> Tensor:
        from fpn_fast.bench import nvidia_mapping

        device = maps[0].device
        if device not in tables_on:
            tables_on[device] = torch.tensor(scales(case), device=device), sizes.to(device)
        options = *tables_on[device], case.output_size, case.sampling_ratio
        return nvidia_mapping.pool(maps, boxes(device)[0], *options)

    on_gpu = {"nvidia": nvidia} if case.memory_format == "channels_last" and _has_triton() else {}
    by_reference = selection.by_reference(fused)
    return Op(_maps, by_reference, eager, fused, compiled=eager, fullgraph=False, on_gpu=on_gpu)


#: Op -> how its cases are called, of those that a case shapes.
_OF_CASE: dict[str, Callable[[Case], Op]] = {"multiscale_roi_align": _pooler, **selection.OPS, **libraries.OPS}


def op_of(case: Case) -> Op:
    """How `case` is called."""
    return _OF_CASE[case.op](case) if case.op in _OF_CASE else OPS[case.op]


def providers(
    case: Case, device_type: str, names: Sequence[str] | None = None, *, compiler: str = "inductor"
) -> list[Provider]:
    """The providers that can serve `case` on this machine, eager first; only `names` where given.

    compiler: torch.compile's backend.
    """
    op = op_of(case)
    found = [Provider("eager", op.eager)]
    # Of a series every case would be compiled anew, to say no more than the case that it starts from.
    if op.compiled is not None and not case.axis:
        # Where the lengths of what is selected are data, static shapes would be compiled anew for each.
        dynamic = False if op.fullgraph else None
        function = torch.compile(op.compiled, fullgraph=op.fullgraph, dynamic=dynamic, backend=compiler)
        found.append(Provider("compile", function))
    if device_type == "cuda":
        found += [Provider(name, function) for name, function in op.on_gpu.items()]
    for backend in ("cpp", "triton"):
        has_kernel = backends.problem(backend, device_type, op.kernel or case.op) is None
        # On a CPU Triton kernels run in an interpreter, which is for tests.
        if has_kernel and (backend != "triton" or device_type == "cuda"):
            found.append(Provider(backend, op.fused, backend))
    return [provider for provider in found if names is None or provider.name in names]


@contextmanager
def running(case: Case, provider: Provider) -> Iterator[None]:
    """The state in which a step of `provider` runs: its backend, and no gradients where the case has none.

    Of call overhead the compiled library's is what a call has that asks for no backend.
    """
    name = "auto" if case.overhead and provider.backend == "cpp" else provider.backend
    backend = nullcontext() if name is None else backends.use(name)
    with backend, torch.set_grad_enabled(case.direction != "forward"):
        yield


def output_grads(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient for each output, in the output's memory format; none where the case needs none."""
    if "backward" not in case.direction:
        return []
    with torch.no_grad():
        return [torch.randn_like(output) for output in listed(op_of(case).reference(inputs))]


def bind(
    case: Case, function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Callable[[], Tensor | Sequence[Tensor]]:
    """`case`'s direction as a call without arguments, to be run inside :func:`running`."""
    if case.direction == "forward":
        return lambda: function(inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    if case.direction == "forward_grad":
        return lambda: function(leaves)
    if case.direction == "forward_backward":
        return lambda: torch.autograd.grad(listed(function(leaves)), leaves, grads)
    outputs = listed(function(leaves))
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def expectation(case: Case, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Expectation:
    """What `case` must give: as its op says, or within twice the reference's own error plus one rounding."""
    op = op_of(case)
    if op.expected is not None:
        with torch.no_grad():
            return op.expected(inputs)
    with torch.set_grad_enabled(case.direction != "forward"):
        exact = listed(bind(case, op.reference, [t.double() for t in inputs], [g.double() for g in grads])())
        own = listed(bind(case, op.reference, inputs, grads)())
    exact = [result.detach() for result in exact]
    bounds = [
        2 * largest(same.detach().double() - right) + torch.finfo(same.dtype).eps * largest(right)
        for same, right in zip(own, exact, strict=True)
    ]
    return Expectation(exact, bounds, [inputs[0].dtype] * len(exact))
