# SPDX-License-Identifier: Apache-2.0
import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import battery
from helpers.battery import Battery, Case, Op
from helpers.frozen_norms import CASES, EPS, NORMED, call, plain, two, vectors_of

from fpn_fast import backends, nn, ops
from fpn_fast.ops.frozen_batch_norm import _BACKWARD, _FORWARD, _SUMS
from fpn_fast.testing import tolerances

NAN, INF = math.nan, math.inf


# In scale and shift, with two units for a GPU's reciprocal root, and in two sums and products.
ROUNDINGS = 16


def check(found, plain, truth, size, case, strides=False):
    """Equal on a CPU. On a GPU, whose reciprocal roots differ by a unit, near float64.

    Triton's kernel does not contract, as F.batch_norm on a CPU does.
    """
    if not (found.is_cuda or (backends.requested() == "triton" and case.options.get("rule") == "batch_norm")):
        (tolerances.assert_exact if strides else tolerances.assert_equal)(found, plain)
    # detectron2 rounds scale and shift to the type of the map.
    roundings = 4 if case.options.get("rule") == "detectron2" else 2
    assert found.dtype == plain.dtype
    # Scale and shift of narrower vectors are rounded to float32, whose units are 2^29 of float64's.
    narrow = found.dtype == torch.float64 and case.options.get("vectors") not in (None, torch.float64)
    tolerances.assert_linear(found, truth, size, terms=ROUNDINGS << 29 * narrow, roundings=roundings)


def sizes_of(maps, normed=False, vectors=None, **_):
    """The magnitudes of the terms of the result, and |scale| for each map, in float64."""
    total, scales = 0.0, []
    for i, each in enumerate(maps):
        norm = vectors_of(maps[0], vectors, 0.5 * i) if i == 0 or normed else None
        if norm is None:
            scales.append(torch.ones_like(each, dtype=torch.float64))
            total = total + each.double().abs()
            continue
        weight, bias, mean, variance = (v.double().reshape(-1, 1, 1) for v in norm)
        scale = (weight * (variance + EPS).rsqrt()).abs()
        scales.append(scale)
        total = total + scale * (each.double().abs() + mean.abs()) + bias.abs()
    return total, scales


def check_forward(outputs, maps, case, strides=True):
    (output,), (expected,) = outputs, plain(maps, **case.options)
    (truth,) = plain([m.double() for m in maps], **exactly(maps, case))
    check(output, expected, truth, sizes_of(maps, **case.options)[0], case, strides)


def exactly(maps, case):
    """The options for float64 maps, of the same vectors."""
    return {**case.options, "vectors": case.options.get("vectors") or maps[0].dtype, "output_dtype": torch.float64}


def check_backward(grads, maps, seeds, case):
    leaves = [m.detach().requires_grad_() for m in maps]
    (y,) = plain(leaves, **case.options)
    relu = "activation" in case.options
    behind = seeds[0].double() * ~(y <= 0) if relu else seeds[0].double()
    expected = torch.autograd.grad(y, leaves, seeds)
    for i, (grad, same, scale) in enumerate(zip(grads, expected, sizes_of(maps, **case.options)[1], strict=True)):
        sign = vectors_of(maps[0], case.options.get("vectors"), 0.5 * i)[0].double().sign().reshape(-1, 1, 1)
        truth = behind * scale * (sign if i == 0 or case.options.get("normed") else 1)
        check(grad, same, truth, truth.abs(), case)


def raw(backend, maps, case):
    x, residual = (m.detach() for m in maps)
    norm, other = vectors_of(x, None), vectors_of(x, None, 0.5)
    return _FORWARD[backend], (x, norm, EPS, residual, other, True, 0, False)


class TestFrozenBatchNorm(Battery):
    op = Op(call, plain, raw, check_forward, check_backward, registered=("cpp", "triton"))
    cases = CASES
    tiny = Case("tiny", ((3, 4), (3, 4)), NORMED, channels=4)
    derivatives = (NORMED, {"activation": "relu"}, {"rule": "batch_norm"})

    def test_other_ops_are_checked_too(self, target):
        backend, device = target
        if backend == "reference":
            pytest.skip("plain PyTorch registers no op")
        for memory_format in battery.FORMATS.values():
            grad, y = self.tiny.inputs(torch.bfloat16, device, memory_format, grad=False)
            norm, other = vectors_of(grad, torch.float32), vectors_of(grad, torch.float32, 0.5)
            for residual in (-1, 1, 3):
                torch.library.opcheck(_BACKWARD[backend], (grad, y, norm, EPS, other, 0, 3, residual))
            torch.library.opcheck(_SUMS[backend], (grad, y, grad.float(), norm[2]))

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("narrow_output", [False, True])
    def test_residual_in_float32_beside_half_maps(self, target, half, narrow_output, memory_format):
        """As under autocast, where torchvision's blocks hand float32 on."""
        case = CASES[-1] if target != ("triton", "cpu") else self.tiny
        x, residual = case.inputs(half, target[1], memory_format, grad=True)
        residual = residual.detach().float().mul(1.1).requires_grad_()
        options = {**case.options, "vectors": torch.float32, "output_dtype": half if narrow_output else None}
        check_case = Case("wide", case.sizes, options)
        outputs = call([x, residual], **options)
        check_forward(outputs, [x, residual], check_case)
        seeds = [torch.randn_like(each) for each in outputs]
        grads = torch.autograd.grad(outputs, [x, residual], seeds)
        assert [each.dtype for each in grads] == [half, torch.float32]
        check_backward(grads, [x, residual], seeds, check_case)

    def test_gradients_of_weights_and_biases(self, target, dtype, memory_format):
        """Parts and a rest, with statistics that stay: sums in a fixed order, compared with float64."""
        size = (7, 5) if target == ("triton", "cpu") else (37, 29)
        case = Case("sums", (size, size), NORMED, batch=3, channels=5)
        x, residual = case.inputs(dtype, target[1], memory_format, grad=False)
        norms = [vectors_of(x, None), vectors_of(x, None, 0.5)]
        leaves = [v.requires_grad_() for norm in norms for v in norm[:2]]
        y = ops.frozen_batch_norm(x, *norms[0], EPS, residual=residual, residual_norm=norms[1], activation="relu")
        seed = torch.randn_like(y)
        grads = torch.autograd.grad(y, leaves, seed, retain_graph=True)
        again = torch.autograd.grad(y, leaves, seed)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        behind = seed.double() * ~(y <= 0)
        for i, (grad, source) in enumerate(zip(grads, (x, x, residual, residual), strict=True)):
            mean, variance = (v.double().reshape(-1, 1, 1) for v in norms[i // 2][2:])
            terms = behind if i % 2 else behind * (source.double() - mean) * (variance + EPS).rsqrt()
            sizes = behind if i % 2 else behind.abs() * (source.double().abs() + mean.abs()) * (variance + EPS).rsqrt()
            # A difference and a product for each term; the root is of a rounded sum, and rounded; one more product.
            tolerances.assert_linear(
                grad, terms.sum((0, 2, 3)), sizes.abs().sum((0, 2, 3)), terms=y[:, 0].numel() + 8, roundings=1
            )

    def test_numbers_that_are_none(self, target):
        """NaN, infinities, zero variance and eps 0 give what torchvision's operators give, and so do gradients."""
        values = torch.tensor([0.0, -0.0, 1.0, -2.0, NAN, INF, -INF, 3e38, 1e-40])
        x = values.repeat(8, 1).view(1, 8, 3, 3).to(target[1]).requires_grad_()
        residual = values.flip(0).repeat(8, 1).view(1, 8, 3, 3).to(target[1]).requires_grad_()
        norm = [
            torch.tensor(each, device=target[1])
            for each in (
                [1.0, 0.0, -1.0, NAN, 2.0, 1.0, INF, 1.0],
                [0.0, 1.0, INF, 0.0, -1.0, 0.0, 0.0, NAN],
                [0.0, 1.0, 0.0, 0.0, INF, 0.0, 1.0, 0.0],
                [1.0, 0.0, 0.0, 1.0, 1.0, -1.0, INF, 2e-38],
            )
        ]
        for eps in (0.0, 1e-5):
            found = ops.frozen_batch_norm(x, *norm, eps, residual=residual, activation="relu")
            expected = F.relu(torchvisions(x, norm, eps) + residual)
            tolerances.assert_equal(found, expected)
            seed = torch.ones_like(found)
            for a, b in zip(*(torch.autograd.grad(y, (x, residual), seed) for y in (found, expected)), strict=True):
                tolerances.assert_equal(a, b)

    def test_what_is_kept_for_the_gradient(self, target):
        """The result alone, with ReLU; nothing but the vectors without; x and residual only for weights and biases."""
        if target[0] == "reference":
            pytest.skip("autograd keeps what it needs")
        x, residual = self.tiny.inputs(torch.float32, target[1], torch.contiguous_format, grad=True)
        norm, other = vectors_of(x, None), vectors_of(x, None, 0.5)
        kept = []

        def keep(tensor):
            kept.append(tensor)
            return tensor

        def maps_kept(activation):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = ops.frozen_batch_norm(x, *norm, EPS, residual=residual, residual_norm=other, activation=activation)
            maps = [each for each in kept if each.dim() == 4]
            return ["y" if each.data_ptr() == y.data_ptr() else "x" if each is x else "residual" for each in maps]

        assert maps_kept("relu") == ["y"]
        assert maps_kept(None) == []
        norm[0].requires_grad_()
        assert maps_kept("relu") == ["y", "x"]
        other[1].requires_grad_()
        assert maps_kept("relu") == ["y", "x", "residual"]

    def test_second_derivatives_by_weights(self, target):
        x, residual = self.tiny.inputs(torch.float64, target[1], torch.contiguous_format, grad=True)
        norm, other = vectors_of(x, None), vectors_of(x, None, 0.5)
        leaves = [x, residual, *(v.requires_grad_() for v in (*norm[:2], *other[:2]))]

        def function(x, residual, weight, bias, other_weight, other_bias):
            own, its = (weight, bias, *norm[2:]), (other_weight, other_bias, *other[2:])
            return ops.frozen_batch_norm(x, *own, EPS, residual=residual, residual_norm=its, activation="relu")

        assert torch.autograd.gradcheck(function, leaves, fast_mode=target == ("triton", "cpu"))
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)

    def test_autocast_promotes_as_torchvision_does(self, target):
        x, residual = self.tiny.inputs(torch.bfloat16, target[1], torch.contiguous_format, grad=False)
        norm = vectors_of(x, torch.float32)
        with torch.autocast(target[1], dtype=torch.bfloat16):
            found = ops.frozen_batch_norm(x, *norm, EPS, residual=residual, activation="relu")
            kept = ops.frozen_batch_norm(x, *norm, EPS, residual=residual, activation="relu", output_dtype=x.dtype)
            expected = F.relu(torchvisions(x, norm, EPS) + residual)
        tolerances.assert_equal(found, expected)
        tolerances.assert_equal(kept, expected.bfloat16())


def torchvisions(x, norm, eps):
    weight, bias, mean, variance = (v.reshape(1, -1, 1, 1) for v in norm)
    scale = weight * (variance + eps).rsqrt()
    return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("memory_format", battery.FORMATS.values(), ids=battery.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_equals_torchvisions_modules_bit_for_bit(backend, dtype, memory_format):
    misc = pytest.importorskip("torchvision.ops.misc")
    x, residual = CASES[-1].inputs(dtype, "cpu", memory_format, grad=True)
    modules, norms = [misc.FrozenBatchNorm2d(24, eps=EPS) for _ in range(2)], []
    for module, shift in zip(modules, (0.0, 0.5), strict=True):
        norms.append([v.to(torch.float32) for v in vectors_of(x, None, shift)])
        module.load_state_dict(dict(zip(("weight", "bias", "running_mean", "running_var"), norms[-1], strict=True)))
    expected = F.relu(modules[0](x) + modules[1](residual))
    with backends.use(backend):
        found = ops.frozen_batch_norm(x, *norms[0], EPS, residual=residual, residual_norm=norms[1], activation="relu")
    tolerances.assert_exact(found, expected)
    seed = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, residual), seed) for y in (found, expected)), strict=True):
        tolerances.assert_exact(a, b)


@pytest.mark.parametrize("memory_format", battery.FORMATS.values(), ids=battery.FORMATS)
@pytest.mark.parametrize("dtype", battery.DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_equals_batch_norm_in_evaluation_bit_for_bit(backend, dtype, memory_format):
    """Vectors and a rest, and the residual of a block. Of narrow maps the norm alone: torch rounds before it adds."""
    x, residual = Case("bits", two(13, 9), channels=37).inputs(dtype, "cpu", memory_format, grad=True)
    wide = torch.promote_types(dtype, torch.float32)
    norms = [vectors_of(x, wide), vectors_of(x, wide, 0.5)]

    def theirs(x, norm):
        weight, bias, mean, variance = norm
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=EPS)

    maps, options = [x], {}
    expected = theirs(x, norms[0])
    if wide == dtype:
        maps, options = [x, residual], {"residual": residual, "residual_norm": norms[1], "activation": "relu"}
        expected = F.relu(expected + theirs(residual, norms[1]))
    with backends.use(backend):
        found = ops.frozen_batch_norm(x, *norms[0], EPS, rule="batch_norm", **options)
    tolerances.assert_exact(found, expected)
    seed = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, maps, seed) for y in (found, expected)), strict=True):
        tolerances.assert_exact(a, b)


def test_a_compiler_gets_the_plain_expression():
    """So that Inductor fuses it with what is around it."""
    x, residual = CASES[-1].inputs(torch.float32, "cpu", torch.contiguous_format, grad=False)
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    found = torch.compile(lambda m: call(m, **NORMED), fullgraph=True, backend=compiler)([x, residual])
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert "rsqrt" in targets
    assert not any("frozen_batch_norm" in target for target in targets)
    tolerances.assert_exact(found[0], call([x, residual], **NORMED)[0])


def test_transforms_of_functions():
    x, residual = Case("tiny", ((3, 4), (3, 4)), channels=4).inputs(
        torch.float64, "cpu", torch.contiguous_format, False
    )
    function = lambda m: call([m, residual], **NORMED)[0].sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.func.grad(function)(x), torch.autograd.grad(function(leaf), leaf)[0])


def test_float64_vectors_of_narrower_maps():
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    norm = vectors_of(x, torch.float64)
    found = ops.frozen_batch_norm(x, *norm, EPS)
    tolerances.assert_equal(found, torchvisions(x, norm, EPS))
    assert torch.autograd.grad(found.sum(), x)[0].dtype == torch.float32
    kept = ops.frozen_batch_norm(x, *norm, EPS, rule="batch_norm")
    weight, bias, mean, variance = norm
    tolerances.assert_equal(kept, F.batch_norm(x.double(), mean, variance, weight, bias, eps=EPS).float())


X, V = torch.zeros(1, 3, 2, 2), torch.ones(3)
ERRORS = [
    ({"x": [1]}, TypeError, "x must be a tensor, got list"),
    ({"x": X.int()}, TypeError, "x must be float64.*int32"),
    ({"x": X[0]}, ValueError, r"x must be \[N, C, H, W\], got \(3, 2, 2\)"),
    ({"weight": V[:2]}, ValueError, r"weight must be \[C\], \(3,\), got \(2,\)"),
    ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    ({"running_var": V.double()}, TypeError, "running_var must be of the dtype of weight, torch.float32"),
    ({"running_mean": V.to("meta")}, ValueError, "running_mean must be on the device of x, cpu, got meta"),
    ({"running_mean": V.clone().requires_grad_()}, ValueError, "running_mean is a constant and has no gradient"),
    ({"residual": X[:, :2]}, ValueError, r"residual must be of the shape of x, \(1, 3, 2, 2\), got \(1, 2, 2, 2\)"),
    ({"residual": 1}, TypeError, "residual must be a tensor, got int"),
    ({"residual_norm": (V, V, V, V)}, ValueError, "residual_norm goes with a residual"),
    ({"residual": X, "residual_norm": (V, V)}, ValueError, "residual_norm must be weight, .* got 2 items"),
    ({"residual": X, "residual_norm": (V, V, V, V[:1])}, ValueError, r"residual_norm's running_var must be \[C\]"),
    ({"residual": X, "residual_norm": (V.half(),) * 4}, TypeError, "both norms must be of one dtype"),
    ({"activation": "gelu"}, ValueError, "activation must be None or \"relu\", got 'gelu'"),
    ({"rule": "mmdet"}, ValueError, "rule must be torchvision, detectron2 or batch_norm, got 'mmdet'"),
    ({"output_dtype": torch.int32}, TypeError, "output_dtype must be float64.*int32"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(changed, kind, message):
    arguments = {"x": X, "weight": V, "bias": V, "running_mean": V, "running_var": V, "eps": EPS} | changed
    with pytest.raises(kind, match=message):
        ops.frozen_batch_norm(**arguments)


def modules(dtype=torch.float32):
    """torchvision's module and ours, from one checkpoint of a live norm."""
    misc = pytest.importorskip("torchvision.ops.misc")
    live = torch.nn.BatchNorm2d(6)
    for tensor in (live.weight.data, live.bias.data, live.running_mean):
        tensor.normal_()
    live.running_var.uniform_(0.5, 2)
    pair = misc.FrozenBatchNorm2d(6, eps=EPS), nn.FrozenBatchNorm2d(6, eps=EPS)
    for module in pair:
        module.load_state_dict(live.state_dict())
        module.to(dtype)
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())
    pair[0].load_state_dict(pair[1].state_dict())
    return pair


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_module_is_torchvisions(dtype):
    theirs, ours = modules(dtype)
    x = torch.randn(2, 6, 5, 7, dtype=dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(leaf) for module, leaf in zip((theirs, copy.deepcopy(ours)), leaves, strict=True)]
    grads = [torch.autograd.grad(y, leaf, torch.ones_like(y))[0] for y, leaf in zip(outputs, leaves, strict=True)]
    assert "_FrozenBatchNorm" in outputs[1].grad_fn.name()
    if dtype != torch.bfloat16:
        tolerances.assert_exact(outputs[1], outputs[0])
        tolerances.assert_exact(grads[1], grads[0])
    else:
        # torchvision rounds every step to bfloat16; ours are near float64.
        exact = copy.deepcopy(theirs).double()
        vectors = (exact.weight, exact.bias, exact.running_mean, exact.running_var)
        weight, bias, mean, variance = (v.reshape(-1, 1, 1) for v in vectors)
        size = (weight * (variance + EPS).rsqrt()).abs() * (x.double().abs() + mean.abs()) + bias.abs()
        tolerances.assert_linear(outputs[1], exact(x.double()), size, terms=ROUNDINGS, roundings=1)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))


@pytest.mark.parametrize("kind", ["three_dimensions", "integers", "statistics_with_gradient", "one_number", "compiled"])
def test_module_runs_torchvisions_code_for_what_the_op_does_not_know(kind):
    theirs, ours = modules()
    x = torch.randn(6, 5, 7)[None] if kind != "three_dimensions" else torch.randn(6, 5, 7)
    if kind == "integers":
        x = (10 * x).long()
    for module in (theirs, ours):
        if kind == "statistics_with_gradient":
            module.running_mean.requires_grad_()
        if kind == "one_number":
            module.bias = torch.tensor([0.5])
    torch._dynamo.reset()
    called = torch.compile(ours, backend="aot_eager", fullgraph=True) if kind == "compiled" else ours
    tolerances.assert_exact(called(x), theirs(x))


def test_module_reads_its_buffers_at_every_call():
    theirs, ours = modules()
    x = torch.randn(1, 6, 2, 2)
    ours(x)
    for module in (theirs, ours):
        module.running_var.mul_(3)
    tolerances.assert_exact(ours(x), theirs(x))


def test_the_import_asks_torch_for_no_eps_of_zero(monkeypatch):
    """Which torch 2.11 refuses."""
    module = sys.modules["fpn_fast.ops.frozen_batch_norm"]
    own, expected = F.batch_norm, module._contracts()

    def batch_norm(*arguments):
        assert arguments[-1] > 0
        return own(*arguments)

    monkeypatch.setattr(F, "batch_norm", batch_norm)
    assert module._contracts() == expected == (module._CODES["batch_norm"] == len(module.NORM_RULES))
