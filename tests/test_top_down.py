# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from helpers import battery
from helpers.battery import Battery, Case, Op

from fpn_fast import backends, ops, reference
from fpn_fast.ops.top_down import _BACKWARD, _FORWARD
from fpn_fast.reference.top_down import nearest_sources
from fpn_fast.testing import tolerances

BILINEAR = {"mode": "bilinear"}
CORNERS = {"mode": "bilinear", "align_corners": True}
AVERAGE = {"fuse": "avg"}
CASES = [
    Case("one_level", ((5, 7),)),
    Case("batch_of_0", ((8, 6), (4, 3)), batch=0),
    Case("levels_of_1x1", ((1, 1), (1, 1), (1, 1)), channels=3),
    Case("doubling", ((16, 24), (8, 12), (4, 6))),
    Case("doubling_average", ((16, 24), (8, 12), (4, 6)), AVERAGE),
    Case("one_channel", ((9, 7), (5, 4)), channels=1),
    Case("uneven_channels", ((6, 10), (3, 5)), channels=11),
    Case("equal_sizes", ((3, 4), (3, 4), (3, 4)), AVERAGE, batch=1),
    Case("downsampling", ((5, 7), (9, 11))),
    Case("ratios_of_float32_indices", ((44, 58), (26, 30), (1, 1)), batch=1, channels=3),
    Case("bilinear", ((25, 42), (13, 21), (7, 11)), BILINEAR),
    Case("bilinear_average", ((8, 16), (4, 8), (2, 4)), {**BILINEAR, **AVERAGE}),
    Case("bilinear_downsampling", ((5, 7), (9, 11)), BILINEAR),
    Case("bilinear_align_corners", ((13, 21), (7, 11), (1, 1)), CORNERS),
    Case("odd", ((25, 42), (13, 21), (7, 11), (4, 6))),
]
# Twice as many as one launch of the CUDA kernel holds.
DEEP = Case("deep", tuple((2 * (i // 2) + 1, i + 1) for i in range(17, 0, -1)), batch=1, channels=8)


def plain(laterals, mode="nearest", align_corners=False, fuse="sum"):
    return reference.top_down(laterals, mode, align_corners=align_corners, average=fuse == "avg")


def check_forward(outputs, laterals, case, strides=True):
    expected = plain(laterals, **case.options)
    assert len(outputs) == len(expected)
    assert outputs[-1] is laterals[-1]
    exact = plain([m.double() for m in laterals], **case.options)
    for output, same, truth in zip(outputs, expected, exact, strict=True):
        if case.options.get("mode", "nearest") == "nearest":
            if strides:
                tolerances.assert_exact(output, same)
            else:
                torch.testing.assert_close(output, same, rtol=0, atol=0)
        else:
            assert output.dtype == same.dtype
            tolerances.assert_not_worse(output, same, truth, size=max(map(max, case.sizes)))


def _grads(laterals, seeds, options):
    leaves = [m.detach().requires_grad_() for m in laterals]
    return torch.autograd.grad(plain(leaves, **options), leaves, seeds)


def check_backward(grads, laterals, seeds, case):
    doubles = [m.double() for m in laterals]
    exact = _grads(doubles, [s.double() for s in seeds], case.options)
    if case.options.get("mode", "nearest") != "nearest":
        for grad, same, truth in zip(grads, _grads(laterals, seeds, case.options), exact, strict=True):
            tolerances.assert_not_worse(grad, same, truth, size=max(map(max, case.sizes)))
        return
    magnitude = _grads(doubles, [s.double().abs() for s in seeds], case.options)
    for level, (grad, truth, size) in enumerate(zip(grads, exact, magnitude, strict=True)):
        # Every pixel below may reach this one; each level below rounds once, averaging once more, autograd's sum too.
        terms = sum(s.shape[2] * s.shape[3] for s in seeds[: level + 1])
        tolerances.assert_linear(grad, truth, size, terms=terms, roundings=2 * level + 2)


def raw(backend, laterals, case):
    return _FORWARD[backend], (laterals, 0, False)


class TestTopDown(Battery):
    op = Op(ops.top_down, plain, raw, check_forward, check_backward, registered=("cpp", "triton"))
    cases, emulated = CASES, True
    tiny = Case("tiny", ((4, 6), (2, 3), (1, 2)), batch=2, channels=2)

    def test_deep_pathway(self, target):
        for options in ({}, BILINEAR, AVERAGE):
            case = Case("deep", DEEP.sizes, options, batch=1, channels=8)
            self.test_forward(target, case, torch.float32, torch.channels_last)
            self.test_backward(target, case, torch.float32, torch.contiguous_format)

    def test_not_a_number_and_infinity_pass(self, target):
        laterals = [torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 2, 2)]
        laterals[1][0, 0, 0, 0], laterals[1][0, 1, 1, 1], laterals[0][0, 2, 3, 3] = float("nan"), -float("inf"), 7.0
        for dtype in battery.DTYPES:
            maps = [m.to(target[1], dtype) for m in laterals]
            tolerances.assert_exact(ops.top_down(maps)[0], plain(maps)[0])

    def test_half_covers_its_range(self, target):
        """Every finite half, subnormals and the largest among them, added to zero and to itself."""
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, 1, 256, 256)
        for dtype in (torch.float16, torch.bfloat16):
            lateral = patterns.view(dtype).to(target[1])
            for top in (torch.zeros_like(lateral), lateral):
                tolerances.assert_exact(ops.upsample_add(lateral, top), lateral + top)

    def test_backward_op_is_checked_too(self, target):
        backend, device = target
        if backend == "reference":
            pytest.skip("plain PyTorch registers no op")
        grads = self.tiny.inputs(torch.float32, device, torch.channels_last, grad=True)[:2]
        torch.library.opcheck(_BACKWARD[backend], (grads, 1, 2, 0, False))

    def test_backward_follows_the_forward_backend(self, target):
        lateral = torch.randn(1, 2, 4, 4, device=target[1], requires_grad=True)
        top = torch.randn(1, 2, 2, 2, device=target[1], requires_grad=True)
        merged = ops.upsample_add(lateral, top)
        with backends.use("reference"):
            grad = torch.autograd.grad(merged.sum(), top)[0]
        assert torch.equal(grad, torch.full_like(top, 4))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reference_equals_torchvisions_pathway(device):
    laterals = CASES[-1].inputs(torch.float32, device, torch.contiguous_format, grad=False)
    last = laterals[-1]
    expected = [last]
    for lateral in laterals[-2::-1]:
        last = lateral + F.interpolate(last, size=lateral.shape[-2:], mode="nearest")
        expected.insert(0, last)
    for a, b in zip(reference.top_down(laterals), expected, strict=True):
        tolerances.assert_exact(a, b)


def test_nearest_sources_are_interpolates():
    for size_in in range(1, 70):
        for size_out in {1, size_in, 2 * size_in - 1, 2 * size_in, 2 * size_in + 1, 44, 58, 87, 100}:
            row = torch.arange(size_in, dtype=torch.float32).view(1, 1, 1, -1)
            expected = F.interpolate(row, size=(1, size_out), mode="nearest").flatten()
            assert torch.equal(nearest_sources(size_in, size_out).float(), expected)


def test_autocast_promotes_to_the_widest():
    laterals = [torch.randn(1, 4, 4, 4, dtype=torch.bfloat16), torch.randn(1, 4, 2, 2)]
    with pytest.raises(TypeError, match="of one dtype outside autocast"):
        ops.top_down(laterals)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = ops.top_down(laterals)
        compiled = torch.compile(ops.top_down, fullgraph=True)(laterals)
    expected = laterals[0].float() + F.interpolate(laterals[1], size=(4, 4))
    assert torch.equal(merged[0], expected)
    assert torch.equal(compiled[0], expected)
    half = [m.bfloat16() for m in laterals]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.top_down(half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("grad", [False, True], ids=["evaluation", "training"])
def test_what_a_compiler_gets(grad):
    """Plain additions, which Inductor fuses, and with gradients the op, on maps as the convolutions leave them."""
    laterals = [torch.randn(1, 8, s, s, requires_grad=grad) for s in (8, 4)]
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    found = torch.compile(ops.top_down, fullgraph=True, backend=compiler)(laterals)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("top_down" in target for target in targets) is grad
    tolerances.assert_exact(found[0], ops.top_down(laterals)[0])


def test_inductor_copies_no_map_for_the_op():
    """Its convolutions on a CPU give channels_last maps, and the op takes any strides."""
    conv = torch.nn.Conv2d(16, 16, 3, padding=1)

    def merge(a, b):
        return conv(ops.top_down([conv(a), conv(b)])[0])

    maps = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)
    torch._dynamo.reset()
    without_cache = torch._inductor.config.patch(force_disable_caches=True)
    with backends.use("cpp"), torch.no_grad(), without_cache:
        found, (code,) = torch._inductor.utils.run_and_get_code(torch.compile(merge, fullgraph=True), *maps)
    # The checks of the op's outputs in the code name their strides.
    assert "(1024, 1, 128, 16), torch.float32, 'torch.ops.fpn_fast.top_down.default'" in code
    torch.testing.assert_close(found, merge(*maps))


def maps(*sizes, channels=2, dtype=torch.float32):
    return [torch.zeros(1, channels, *size, dtype=dtype) for size in sizes]


ERRORS = [
    ([], {}, ValueError, "at least one map, got an empty"),
    ([1, 2], {}, TypeError, "must be tensors, got int at 0"),
    ([torch.zeros(2, 4, 4)], {}, ValueError, r"\[N, C, H, W\], got \(2, 4, 4\) at 0"),
    ([*maps((4, 4)), *maps((2, 2), channels=3)], {}, ValueError, r"share N and C, \(1, 2\), got \(1, 3, 2, 2\) at 1"),
    ([*maps((4, 4)), *maps((2, 2), dtype=torch.float64)], {}, TypeError, "one dtype outside autocast"),
    (maps((4, 4), (2, 2), dtype=torch.int64), {}, TypeError, "got torch.int64 at 0"),
    (maps((0, 4), (0, 2), dtype=torch.int32), {}, TypeError, "got torch.int32 at 0"),
    (maps((4, 4), (0, 2)), {}, ValueError, r"at least 1 x 1 pixel, got \(1, 2, 0, 2\) at 1"),
    ([*maps((4, 4)), torch.zeros(1, 2, 2, 2, device="meta")], {}, ValueError, "on one device, cpu, got meta at 1"),
    (maps((4, 4), (2, 2)), {"mode": "cubic"}, ValueError, 'mode must be "nearest" or "bilinear", got \'cubic\''),
    (maps((4, 4), (2, 2)), {"fuse": "max"}, ValueError, 'fuse must be "sum" or "avg", got \'max\''),
    (maps((4, 4), (2, 2)), {"align_corners": True}, ValueError, "align_corners goes with"),
    (maps((4, 4), (2, 2)), {"scale_factor": 1.5}, ValueError, "positive integer, got 1.5"),
    (maps((5, 4), (2, 2)), {"scale_factor": 2}, ValueError, "lateral 0 must be 4 x 4 pixels.*got 5 x 4; pad"),
]


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(("laterals", "options", "error", "message"), ERRORS, ids=[e[3][:24] for e in ERRORS])
def test_errors(backend, laterals, options, error, message):
    with backends.use(backend), pytest.raises(error, match=message):
        ops.top_down(laterals, **options)


def test_scale_factor_of_two_is_the_doubling_merge():
    laterals = maps((8, 6), (4, 3))
    assert torch.equal(ops.top_down(laterals, scale_factor=2)[0], ops.top_down(laterals)[0])


def test_outputs_are_ordinary_tensors():
    """A large output can be resized, and returns to torch's allocator with its last reference."""
    merged = ops.upsample_add(torch.ones(1, 4, 256, 1024), torch.ones(1, 4, 1, 1))
    assert merged.untyped_storage().resizable()
    merged.resize_(2, 4, 256, 1024)
    assert (merged[0] == 2).all()


def test_a_tiny_merge_with_a_gradient_runs_our_kernel():
    laterals = [torch.randn(2, 3, *size, requires_grad=True) for size in ((5, 7), (2, 3), (2, 2))]
    assert [each.grad_fn.name() for each in ops.top_down(laterals)[:-1]] == ["_TopDownBackward"] * 2
    assert ops.upsample_add(*laterals[:2]).grad_fn.name() == "_TopDownBackward"


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", battery.FORMATS.values(), ids=battery.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("target", [t for t in battery.TARGETS if "triton" not in t.id or t.marks])
def test_coco_size(target, dtype, memory_format):
    """800 x 1333, P2 to P5, batch of 2; on a GPU 256 channels."""
    backend, device = target
    channels = 256 if device == "cuda" else 64
    case = Case("coco", ((200, 334), (100, 167), (50, 84), (25, 42)), batch=2, channels=channels)
    laterals = case.inputs(dtype, device, memory_format, grad=True)
    with backends.use(backend):
        outputs = ops.top_down(laterals)
        check_forward(outputs, laterals, case)
        seeds = [torch.randn_like(o) for o in outputs]
        check_backward(torch.autograd.grad(outputs, laterals, seeds), laterals, seeds, case)


@pytest.mark.large
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("memory_format", battery.FORMATS.values(), ids=battery.FORMATS)
def test_more_than_2_to_31_elements(device, memory_format):
    size = (2, 256, 2064, 2048)
    lateral = torch.empty(size, dtype=torch.bfloat16, device=device, memory_format=memory_format).fill_(1)
    top = torch.arange(256, device=device, dtype=torch.bfloat16).view(1, -1, 1, 1).expand(2, -1, 1032, 1024)
    top = top.contiguous(memory_format=memory_format)
    merged = ops.upsample_add(lateral, top)
    for y, x in ((0, 0), (-1, -1)):
        assert torch.equal(merged[-1, :, y, x], top[-1, :, y, x] + 1)
    grad = torch.ops.fpn_fast.top_down_backward([merged], 1032, 1024, 0, False)[0]
    assert torch.equal(grad[-1, :, -1, -1], merged[-1, :, -2:, -2:].float().sum((1, 2)).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_runs_on_the_current_stream_and_its_own_device(backend):
    device = f"cuda:{torch.cuda.device_count() - 1}"
    laterals = [
        m.to(device).requires_grad_() for m in CASES[-1].inputs(torch.float32, "cpu", torch.channels_last, False)
    ]
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with backends.use(backend), torch.cuda.device(device):
        ops.top_down([m.detach() for m in laterals])
        with torch.cuda.graph(graph, stream=stream):
            captured = ops.top_down([m.detach() for m in laterals])
        graph.replay()
        assert torch.equal(captured[0], ops.top_down(laterals)[0])
