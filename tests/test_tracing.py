# SPDX-License-Identifier: Apache-2.0
"""Swapped modules under torch.jit.trace, what is built on it (ONNX export, counters of FLOPs), and torch.fx."""

import collections
import copy
import io
import pickle

import pytest
import torch
from helpers.small_detectors import KINDS, calibrate, detector, training_batch
from test_accelerate import pyramid
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import MultiScaleRoIAlign, RoIAlign

import fpn_fast

# They record the same for torchvision's modules, and say the same of them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning", "ignore:.*legacy:DeprecationWarning"
)
ONNX = {"dynamo": False, "opset_version": 17}


def pair(module):
    """The module, and a copy that is accelerated, both in evaluation."""
    fast = copy.deepcopy(module)
    assert fpn_fast.accelerate(fast).swapped
    return module.eval(), fast.eval()


def backbones():
    torch.manual_seed(0)
    return pair(pyramid())


def kinds(graph):
    """How often each operator stands in a graph."""
    return collections.Counter(node.kind() for node in graph.nodes() if not node.kind().startswith("prim::"))


def check(found, expected):
    """Tensors by name."""
    assert list(found) == list(expected)
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
def test_trace_of_a_backbone(recorded):
    plain, fast = backbones()
    x, other = torch.rand(1, 3, 64, 96), torch.rand(2, 3, 96, 80)
    with torch.set_grad_enabled(recorded):
        traced, theirs = (torch.jit.trace(module, x, strict=False) for module in (fast, plain))
    assert kinds(traced.inlined_graph) == kinds(theirs.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    check(torch.jit.load(buffer)(other), plain(other))


def test_counters_of_flops_see_what_they_see_of_torchvision():
    """fvcore and its kind read this graph."""
    x = torch.rand(1, 3, 64, 96)
    ours, theirs = (torch.jit._get_trace_graph(module, (x,), strict=False)[0] for module in reversed(backbones()))
    assert kinds(ours) == kinds(theirs)
    assert kinds(ours)["aten::_convolution"] + kinds(ours)["aten::convolution"] >= 10


def run_onnx(file, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file.getvalue())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return {output.name: torch.from_numpy(each) for output, each in zip(session.get_outputs(), found, strict=True)}


def test_onnx_of_a_backbone():
    plain, fast = backbones()
    pytest.importorskip("onnx")
    outputs = ["p3", "p4", "p5", "p6"]
    axes = {name: {0: "n", 2: "h", 3: "w"} for name in ("x", *outputs)}
    file = io.BytesIO()
    options = {"input_names": ["x"], "output_names": outputs, "dynamic_axes": axes, **ONNX}
    torch.onnx.export(fast, (torch.rand(1, 3, 64, 96),), file, **options)
    other = torch.rand(2, 3, 96, 80)
    check(
        run_onnx(file, other), {name: each.detach() for name, each in zip(outputs, plain(other).values(), strict=True)}
    )


def test_fx_of_a_backbone():
    plain, fast = backbones()
    recorded = fx.symbolic_trace(fast)
    again = fx.symbolic_trace(recorded)
    for x in (torch.rand(1, 3, 64, 96), torch.rand(2, 3, 96, 80)):
        for module in (recorded, again, pickle.loads(pickle.dumps(recorded))):
            check(module(x), plain(x))
    check(recorded.double()(x.double()), plain.double()(x.double()))
    found, expected = (
        torch.autograd.grad(module(x.double())["0"].sum(), list(module.parameters()), allow_unused=True)
        for module in (recorded, plain)
    )
    check(dict(enumerate(found)), dict(enumerate(expected)))


def test_feature_extraction_from_a_backbone():
    plain, fast = backbones()
    x, layers = torch.rand(1, 3, 64, 96), {"body.coarse.2": "c5", "fpn": "maps"}
    found, expected = (create_feature_extractor(module, layers)(x) for module in (fast, plain))
    check({"c5": found["c5"], **found["maps"]}, {"c5": expected["c5"], **expected["maps"]})


class Pooled(nn.Module):
    """A pooler that gets its maps and boxes from a caller."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, fine, coarse, boxes):
        if isinstance(self.pool, RoIAlign):
            return self.pool(fine, [boxes])
        return self.pool({"0": fine, "1": coarse}, [boxes], [(64, 96)])


@pytest.mark.parametrize("pool", [RoIAlign(3, 0.25, 2), MultiScaleRoIAlign(["0", "1"], 3, 2)], ids=["one", "levels"])
@pytest.mark.parametrize("tracer", [fx.symbolic_trace, torch.jit.trace])
def test_poolers(pool, tracer):
    plain, fast = pair(Pooled(pool))
    maps = torch.rand(1, 4, 16, 24), torch.rand(1, 4, 8, 12)
    boxes = torch.tensor([[4.0, 4, 40, 60], [10, 20, 90, 60]])
    recorded = tracer(fast) if tracer is fx.symbolic_trace else tracer(fast, (*maps, boxes))
    torch.testing.assert_close(recorded(*maps, boxes * 0.5), plain(*maps, boxes * 0.5))


def whole(kind):
    model = detector(kind).float()
    calibrate(model)
    return model


class Flat(nn.Module):
    """The detections of one image as a tuple, which torch.jit.trace asks for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return tuple(self.model([image])[0].values())


@pytest.mark.parametrize("kind", KINDS)
def test_trace_of_a_whole_detector(kind):
    """torchvision's own code runs under the tracer, so that its graph comes out, and no operator of ours."""
    plain, fast = pair(whole(kind))
    image = training_batch(torch.float32)[0][0]
    with torch.no_grad():
        ours, theirs = (torch.jit.trace(Flat(model), image, check_trace=False) for model in (fast, plain))
        for name in ("torchvision::nms", "torchvision::roi_align", "aten::topk", "aten::upsample_nearest2d"):
            assert kinds(ours.inlined_graph)[name] == kinds(theirs.inlined_graph)[name]
        assert not any(kind.startswith(("fpn_fast", "^")) for kind in kinds(ours.inlined_graph))
        found, expected = ours(image), Flat(plain)(image)
    assert len(expected[0]) > 0
    check(dict(enumerate(found)), dict(enumerate(expected)))
    with torch.no_grad():
        # What ran under the tracer left nothing behind.
        check(dict(enumerate(Flat(fast)(image))), dict(enumerate(expected)))


def test_onnx_of_a_whole_detector():
    plain, fast = pair(whole("mask"))
    pytest.importorskip("onnx")
    images = training_batch(torch.float32)[0][:1]
    file = io.BytesIO()
    torch.onnx.export(fast, (images,), file, **ONNX)
    with torch.no_grad():
        expected = plain(images)[0]
    found = run_onnx(file, images[0])
    assert len(expected["boxes"]) > 0
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_static_detector_says_that_it_is_not_traced():
    _, fast = pair(whole("faster"))
    static = fpn_fast.StaticDetector(fast, (64, 96), 1)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a StaticDetector"):
        torch.jit.trace(static, torch.rand(1, 3, 64, 96), strict=False)
