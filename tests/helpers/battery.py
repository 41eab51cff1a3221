# SPDX-License-Identifier: Apache-2.0
"""The tests that every op passes on every backend. An op's test file subclasses `Battery` and gives its cases."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_fast import backends

gpu = pytest.mark.gpu
TARGETS = [
    pytest.param(("cpp", "cpu"), id="cpu-cpp"),
    pytest.param(("triton", "cpu"), id="cpu-triton"),
    pytest.param(("reference", "cpu"), id="cpu-reference"),
    pytest.param(("cpp", "cuda"), id="cuda-cpp", marks=gpu),
    pytest.param(("triton", "cuda"), id="cuda-triton", marks=gpu),
    pytest.param(("reference", "cuda"), id="cuda-reference", marks=gpu),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One call: the sizes of its maps, N, C and the op's options."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 2
    channels: int = 16

    def inputs(self, dtype: torch.dtype, device: str, memory_format: torch.memory_format, grad: bool) -> list[Tensor]:
        """Random maps; the same numbers for every device and format."""
        generator = torch.Generator().manual_seed(len(self.name))
        maps = [
            torch.randn(self.batch, self.channels, *size, generator=generator, dtype=torch.float64)
            for size in self.sizes
        ]
        maps = [m.to(device=device, dtype=dtype).contiguous(memory_format=memory_format) for m in maps]
        return [m.requires_grad_(grad) for m in maps]


@dataclass(frozen=True)
class Op:
    """What the battery needs of an op: `function(maps, **options)` gives maps, as does `reference`.

    raw(backend, maps, case): the registered op and its arguments, for opcheck.
    twice: whether it can be differentiated twice; if not it says so.
    registered: the backends that register an op of their own.
    """

    function: Callable[..., list[Tensor]]
    reference: Callable[..., list[Tensor]]
    raw: Callable[[str, list[Tensor], Case], tuple[Any, tuple[Any, ...]]]
    check_forward: Callable[..., None]
    check_backward: Callable[..., None]
    twice: bool = True
    registered: tuple[str, ...] = backends.BACKENDS


def poison(like: list[Tensor]) -> None:
    """Leaves NaN in memory that the allocator hands out next, so that an element nobody writes shows."""
    for _ in range(3):
        blocks = [torch.full_like(m, float("nan")) for m in like]
        del blocks


def is_left_out(item: pytest.Item) -> bool:
    """On the CPU not every case is of every type and memory format. The compiled library runs each case in each type,
    formats taking turns, and Triton's interpreter, which takes seconds for each, the last case so, where the emulator
    runs the others. Otherwise it, and plain PyTorch, run where there are many cases one type and format of each, by
    turns, and of few cases float32 in one format and another type in the other. A GPU runs all."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if not {"case", "dtype", "memory_format"} <= parameters.keys() or parameters["target"][1] != "cpu":
        return False
    backend, cases = parameters["target"][0], item.cls.cases
    turn = cases.index(parameters["case"])
    formats = list(FORMATS.values())
    every = list(itertools.product(DTYPES, formats))
    is_emulated = backend == "triton" and item.cls.emulated
    if backend == "cpp" or is_emulated:
        is_here = backend == "cpp" or turn == len(cases) - 1
        mine = [(dtype, formats[(turn + i) % 2]) for i, dtype in enumerate(DTYPES) if is_here]
    elif len(cases) > len(every):
        mine = [every[3 * turn % len(every)]]
    else:
        others = [dtype for dtype in DTYPES if dtype != torch.float32]
        mine = [(torch.float32, formats[turn % 2]), (others[turn % len(others)], formats[1 - turn % 2])]
    return (parameters["dtype"], parameters["memory_format"]) not in mine


def gradients(function: Callable[..., list[Tensor]], maps: list[Tensor], options: dict[str, Any], seeds: list[Tensor]):
    outputs = function(maps, **options)
    return outputs, torch.autograd.grad(outputs, maps, seeds, allow_unused=True)


@pytest.mark.parametrize("target", TARGETS)
class Battery:
    """Subclasses set `op`, `cases`, and `tiny`, a case small enough for numerical gradients.

    derivatives: options to check numerically; by default those of all cases. emulated: whether the emulator runs the
    cases on Triton's kernels, too, as a test_emulated_*.py says.
    """

    op: Op
    cases: list[Case]
    tiny: Case
    derivatives: tuple[dict[str, Any], ...] = ()
    emulated: bool = False

    @pytest.fixture(autouse=True)
    def _backend(self, target):
        backend, device = target
        if device == "cpu" and backend == "triton" and not backends.triton_interprets():
            pytest.skip("Triton runs on the GPU here")
        with backends.use(backend):
            yield

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=lambda case: case.name)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
        if "memory_format" in metafunc.fixturenames:
            metafunc.parametrize("memory_format", FORMATS.values(), ids=FORMATS)

    def quick(self, target) -> Case:
        """The last case; Triton's interpreter takes seconds for it."""
        return self.tiny if target == ("triton", "cpu") else self.cases[-1]

    def test_forward(self, target, case, dtype, memory_format):
        maps = case.inputs(dtype, target[1], memory_format, grad=False)
        poison(maps)
        self.op.check_forward(self.op.function(maps, **case.options), maps, case)

    def test_backward(self, target, case, dtype, memory_format):
        maps = case.inputs(dtype, target[1], memory_format, grad=True)
        outputs = self.op.function(maps, **case.options)
        seeds = [torch.randn_like(output) for output in outputs]
        poison(maps)
        grads = torch.autograd.grad(outputs, maps, seeds)
        assert [g.shape for g in grads] == [m.shape for m in maps]
        self.op.check_backward(grads, maps, seeds, case)

    def test_repeats_bit_for_bit(self, target, memory_format):
        case = self.cases[-1]
        maps = case.inputs(torch.float32, target[1], memory_format, grad=True)
        threads = torch.get_num_threads()
        runs = []
        for count in (threads, 1):
            torch.set_num_threads(count)
            outputs = self.op.function(maps, **case.options)
            runs.append([*outputs, *torch.autograd.grad(outputs, maps, [o.detach() for o in outputs])])
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_views_with_sentinel_borders(self, target, memory_format):
        """Maps inside larger ones of NaN, at an odd offset: what is read outside shows, and borders stay."""
        case = self.cases[-1]
        plain = case.inputs(torch.float32, target[1], memory_format, grad=False)
        frames, views = [], []
        for m in plain:
            n, c, h, w = m.shape
            frame = torch.full((n, c + 1, h + 2, w + 3), float("nan"), device=m.device)
            frame = frame.contiguous(memory_format=memory_format)
            view = frame[:, :c, 1:-1, 1:-2]
            view.copy_(m)
            frames.append(frame)
            views.append(view.detach().requires_grad_())
        before = [frame.clone() for frame in frames]
        outputs = self.op.function(views, **case.options)
        expected = self.op.function(plain, **case.options)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        grads = torch.autograd.grad(outputs, views, [torch.ones_like(o) for o in outputs])
        assert all(g.isfinite().all() for g in grads)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(frames, before, strict=True))

    def test_mixed_formats(self, target):
        case = self.cases[-1]
        maps = case.inputs(torch.float32, target[1], torch.contiguous_format, grad=False)
        mixed = [
            m.contiguous(memory_format=torch.channels_last) if i % 2 else m.transpose(2, 3).contiguous().transpose(2, 3)
            for i, m in enumerate(maps)
        ]
        self.op.check_forward(self.op.function(mixed, **case.options), mixed, case, strides=False)

    def test_awkward_output_gradients(self, target):
        """Expanded (stride 0), transposed, and on one output only."""
        case = self.quick(target)
        maps = case.inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
        for outputs in (self.op.function(maps, **case.options)[:1], self.op.function(maps, **case.options)):
            seeds = [torch.ones((), device=o.device).expand_as(o) for o in outputs]
            seeds[-1] = torch.randn(outputs[-1].mT.shape, device=outputs[-1].device).mT
            grads = torch.autograd.grad(outputs, maps, seeds, retain_graph=True, allow_unused=True)
            dense = torch.autograd.grad(outputs, maps, [s.contiguous() for s in seeds], allow_unused=True)
            for a, b in zip(grads, dense, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    def test_gradients_of_some_inputs(self, target):
        case = self.quick(target)
        for chosen in range(len(case.sizes)):
            maps = case.inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
            alone = [m if i == chosen else m.detach() for i, m in enumerate(maps)]
            both = [self.op.function(m, **case.options) for m in (maps, alone)]
            grads = [
                torch.autograd.grad(o, maps[chosen], [torch.ones_like(x) for x in o], allow_unused=True)[0]
                for o in ([x for x in outputs if x.requires_grad] for outputs in both)
            ]
            assert torch.equal(*grads)

    def test_no_grad_equals_grad(self, target):
        case = self.cases[-1]
        maps = case.inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
        with torch.no_grad():
            without = self.op.function(maps, **case.options)
        assert not any(o.requires_grad for o in without if not any(o is m for m in maps))
        assert all(torch.equal(a, b) for a, b in zip(without, self.op.function(maps, **case.options), strict=True))

    def test_gradcheck(self, target):
        maps = self.tiny.inputs(torch.float64, target[1], torch.contiguous_format, grad=True)
        # Elsewhere one random direction stands for the whole Jacobian, and in the interpreter, which takes a thousand
        # times longer, the first options for all: its gradients are compared with the reference's in test_backward.
        fast = target[0] != "cpp"
        chosen = list(self.derivatives or {str(c.options): c.options for c in self.cases}.values())
        if target == ("triton", "cpu"):
            del chosen[1:]
        for options in chosen:
            function = lambda *m, options=options: tuple(self.op.function(m, **options))  # noqa: E731
            assert torch.autograd.gradcheck(function, maps, fast_mode=fast)
            if self.op.twice:
                assert torch.autograd.gradgradcheck(function, maps, fast_mode=fast)

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_second_derivative_is_refused(self, target, compiled):
        if self.op.twice:
            pytest.skip("differentiable twice")
        torch._dynamo.reset()
        maps = self.tiny.inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
        function = lambda m: self.op.function(m, **self.tiny.options)  # noqa: E731
        outputs = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(maps)
        seeds = [torch.ones_like(o).requires_grad_() for o in outputs]

        def penalise():
            sum(g.sum() for g in torch.autograd.grad(outputs, maps, seeds, create_graph=True)).backward()

        with pytest.raises(RuntimeError, match=r"twice|double backward"):
            penalise()

    def test_opcheck(self, target):
        backend, device = target
        if backend not in self.op.registered:
            pytest.skip("plain PyTorch registers no op")
        formats = list(FORMATS.values())
        for memory_format in formats if target != ("triton", "cpu") else formats[:1]:
            op, arguments = self.op.raw(
                backend, self.tiny.inputs(torch.float32, device, memory_format, True), self.tiny
            )
            torch.library.opcheck(op, arguments)

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compile_in_one_graph(self, target, dynamic):
        torch._dynamo.reset()
        # Of plain PyTorch the graph is ours, the code made of it torch's; the interpreter runs no code of its own. Code
        # of static sizes is made as that of dynamic ones.
        inductor = dynamic and target[0] != "reference" and target != ("triton", "cpu")
        compiler = "inductor" if inductor else "aot_eager"
        function = lambda m: self.op.function(m, **self.tiny.options)  # noqa: E731
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
        grown = Case("grown", tuple((2 * h, 2 * w) for h, w in self.tiny.sizes), self.tiny.options, batch=3)
        for case in (self.tiny, grown):
            maps = case.inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
            outputs, expected = compiled(maps), self.op.function(maps, **case.options)
            seeds = [torch.randn_like(o) for o in expected]
            for a, b in zip(outputs, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            got = torch.autograd.grad(outputs, maps, seeds)
            for a, b in zip(got, torch.autograd.grad(expected, maps, seeds), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_export(self, target):
        function, options = self.op.function, self.tiny.options

        class Module(torch.nn.Module):
            def forward(self, maps: list[Tensor]) -> list[Tensor]:
                return function(maps, **options)

        maps = self.tiny.inputs(torch.float32, target[1], torch.contiguous_format, grad=False)
        exported = torch.export.export(Module(), (maps,)).module()
        assert all(torch.equal(a, b) for a, b in zip(exported(maps), function(maps, **options), strict=True))
