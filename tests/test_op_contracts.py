# SPDX-License-Identifier: Apache-2.0
"""What every op promises alike: shapes without data, torch.compile, any strides and threads, CUDA graphs.

The ops' own files test their values; merges and RoI pooling also pass helpers/battery.py.
"""

import sys
from itertools import chain

import numpy as np
import pytest
import torch
from helpers import calls, devices
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fpn_fast import backends, ops, reference

EVERYTHING = (*calls.RECIPES, *calls.VARIANTS)
# Those with results whose number the values decide, and those that the battery tests as much.
OF_ANY_LENGTH = (calls.nms, calls.batched_nms)
IN_THE_BATTERY = (calls.top_down, calls.upsample_add, calls.fuse_maps, calls.resize_cat, calls.multiscale_roi_align,
                  calls.roi_align, calls.assign_levels, calls.frozen_batch_norm)  # fmt: skip
PADDED = [recipe for recipe in EVERYTHING if recipe not in OF_ANY_LENGTH]
OTHERS = [recipe for recipe in PADDED if recipe not in IN_THE_BATTERY]
# Whose values are differentiable: torch's operators make them again from what was selected.
WITH_GRADIENT = (
    *(calls.select_detections, calls.select_detections_by_distances, calls.select_box_detections),
    *(calls.paste_masks, calls.heatmaps_to_keypoints),
)


def recorded(recipe):
    """The call with a gradient recorded for every tensor of real numbers."""

    def with_gradient(*arguments):
        call = recipe(*arguments)
        leaves = [each for each in tree_leaves(call.arguments) if isinstance(each, Tensor) and each.is_floating_point()]
        for each in leaves:
            each.requires_grad_()
        return call

    with_gradient.__name__ = f"{recipe.__name__}_with_gradient"
    return with_gradient


RECORDED = [recorded(recipe) for recipe in WITH_GRADIENT]
SELECTIONS = (calls.generate_proposals, calls.select_detections, calls.select_box_detections, calls.segmented_nms)


def of(recipes):
    return pytest.mark.parametrize("recipe", recipes, ids=lambda recipe: recipe.__name__)


# Triton's interpreter takes seconds for a call: those that most is built on.
of_others = pytest.mark.parametrize(
    ("backend", "recipe"),
    [(name, recipe) for recipe in OTHERS for name in ("cpp", "reference")] + [("triton", each) for each in SELECTIONS],
    ids=lambda value: getattr(value, "__name__", value),
    indirect=["backend"],
)


def call_of(recipe, size=1, dtype=torch.float32, seed=0):
    call = recipe(torch.Generator().manual_seed(seed), dtype, size)
    if recipe is calls.sigmoid_focal_loss:
        call.arguments["logits"].requires_grad_()
    return call


def results(call) -> list[Tensor]:
    """Outputs, and the gradient where there is one."""
    found = tree_leaves(call.op(**call.arguments))
    leaves = [each for each in tree_leaves(call.arguments) if isinstance(each, Tensor) and each.requires_grad]
    values = [each for each in found if each.requires_grad]
    ones = [torch.ones_like(each) for each in values]
    grads = torch.autograd.grad(values, leaves, ones, materialize_grads=True) if values else ()
    return [*(each.detach() for each in found), *grads]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@of([*PADDED, *RECORDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_follow_real_ones(recipe, dtype):
    """Shapes and types follow from shapes and types: no value is looked at, which a GPU would have to be asked for."""
    call = call_of(recipe, dtype=dtype)
    real = tree_leaves(call.op(**call.arguments))
    with FakeTensorMode():
        empty = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda", requires_grad=t.requires_grad)  # noqa: E731
        fake = tree_leaves(call.op(**tree_map_only(Tensor, empty, call.arguments)))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device.type, a.requires_grad) == (b.shape, b.dtype, "cuda", b.requires_grad)


class Recorded(TorchDispatchMode):
    """The calls of registered ops of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace.startswith("fpn_fast"):
            self.calls.append((function, arguments, options or {}))
        return function(*arguments, **(options or {}))


@of_others
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(backend, recipe, device):
    """Schema, fake tensors, autograd and compilation of the registered ops that a call runs."""
    if (backend, device) == ("triton", "cpu") and not backends.triton_interprets():
        pytest.skip("Triton runs on the GPU here")
    call = call_of(recipe)
    arguments = tree_map_only(Tensor, lambda t: devices.moved(t, device), call.arguments)
    with Recorded() as recorded:
        call.op(**arguments)
    assert recorded.calls
    for function, given, options in recorded.calls:
        torch.library.opcheck(function, given, options)


@pytest.mark.parametrize(
    ("backend", "recipe", "dynamic"),
    [
        *(
            (name, recipe, on)
            for recipe in OTHERS
            for name, on in (("cpp", False), ("cpp", True), ("reference", False))
        ),
        # Of dense heads, with their many shapes, one dynamic graph takes torch five times as long as two static ones.
        *(("cpp", recipe, not recipe.__name__.startswith("select_detections")) for recipe in RECORDED),
        *(("triton", recipe, False) for recipe in SELECTIONS),
    ],
    ids=lambda value: {False: "static", True: "dynamic"}.get(value, getattr(value, "__name__", value)),
    indirect=["backend"],
)
def test_compiles_in_one_graph(backend, recipe, dynamic):
    torch._dynamo.reset()
    # Inductor, which takes seconds, calls every op alike: one of lists, and one with a gradient. It would fuse products
    # and sums of torch's operators.
    inductor = backend == "cpp" and dynamic and recipe in (calls.generate_proposals, calls.sigmoid_focal_loss)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    call = call_of(recipe)
    compiled = torch.compile(call.op, fullgraph=True, dynamic=dynamic, backend="inductor" if inductor else "aot_eager")
    for size in (1, 2) if backend != "triton" else (1,):
        call = call_of(recipe, size)
        call.arguments = tree_map_only(Tensor, lambda t: t.to(device), call.arguments)
        expected = results(call)
        call.op = compiled
        assert same(results(call), expected)


def registered() -> dict[str, dict[str, OpOverload]]:
    """The registered ops of each module, by backend."""
    modules = [(name, module) for name, module in sys.modules.items() if name.startswith("fpn_fast.ops.")]
    return {
        f"{name}.{field}": value
        for name, module in modules
        for field, value in vars(module).items()
        if isinstance(value, dict) and value and all(isinstance(each, OpOverload) for each in value.values())
    }


def test_schemas_of_all_backends_are_equal():
    pytest.importorskip("triton")
    assert len(registered()) > 10
    for name, forms in registered().items():
        # These are plain PyTorch where it is the reference that serves them.
        plain = {"top_down", "frozen_batch_norm", "fuse_maps", "resize_cat"}
        missing = {"reference"} if plain & set(name.split(".")) else set()
        assert set(forms) == {"cpp", "triton", "reference"} - missing, name
        assert len({str(op._schema).partition("::")[2] for op in forms.values()}) == 1, name


def strided(tensor: Tensor, last: bool) -> Tensor:
    """The same values with NaN, or -1, between them and around them; maps also in channels_last."""
    if tensor.dim() == 0:
        return tensor
    filler = float("nan") if tensor.is_floating_point() else -1
    frame = tensor.new_full([2 + size for size in tensor.shape[:-1]] + [2 * tensor.shape[-1] + 1], filler)
    if last and tensor.dim() == 4:
        frame = frame.contiguous(memory_format=torch.channels_last)
    return frame[(*[slice(1, -1)] * (tensor.dim() - 1), slice(1, None, 2))].copy_(tensor.detach())


@devices.not_interpreted
@of([*OTHERS, *OF_ANY_LENGTH])
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_any_strides(every_backend, recipe, last):
    """And what is selected is the same where a gradient is recorded; decisions have none, whatever inputs have."""
    call = call_of(recipe)
    op = getattr(ops, call.op.__name__)
    expected = op(**call.arguments)
    arguments = tree_map_only(Tensor, lambda t: strided(t, last), call.arguments)
    if call.sums is None:
        leaves = [each for each in tree_leaves(arguments) if isinstance(each, Tensor) and each.is_floating_point()]
        for each in leaves:
            each.requires_grad_()
    found = op(**arguments)
    assert same(tree_leaves(found), tree_leaves(expected))
    values = recipe in WITH_GRADIENT
    assert all(each.requires_grad == (values and each.is_floating_point()) for each in tree_leaves(found))


# Keypoints are float32 whatever the heatmaps are; a whole detector's are compared with torchvision's.
@of([each for each in RECORDED if "keypoints" not in each.__name__])
def test_gradients_are_those_of_finite_differences(recipe):
    call = call_of(recipe, dtype=torch.float64)

    def values(*leaves):
        following = iter(leaves)
        given = tree_map_only(Tensor, lambda t: next(following) if t.requires_grad else t, call.arguments)
        return tuple(each for each in tree_leaves(call.op(**given)) if each.is_floating_point())

    leaves = [each for each in tree_leaves(call.arguments) if isinstance(each, Tensor) and each.requires_grad]
    assert any(each.count_nonzero() for each in values(*leaves))
    torch.autograd.gradcheck(values, leaves)


@of([calls.select_detections, calls.select_detections_by_distances])
def test_equal_logits_have_an_order_where_a_gradient_is_recorded_too(recipe):
    """Of the lowest that a level takes there are more than it takes; the highest come in between."""
    call = call_of(recipe, 12)
    call.arguments |= {"nms_thresh": 1.0, "max_detections": 600, "pre_nms_top_n": 300}
    for name in ("logits", "centerness"):
        call.arguments[name] = [each.where(each > 2.5, each.clamp(max=0)) for each in call.arguments.get(name, ())]
    expected = results(call)
    for each in call.arguments["logits"]:
        each.requires_grad_()
    found = tree_leaves(call.op(**call.arguments))
    assert found[3].tolist() == [600, 600]
    assert same(found, expected)


@of(RECORDED)
def test_what_is_not_selected_keeps_its_nan_out_of_gradients(recipe):
    """Also where padding would read it."""
    call = call_of(recipe, 12)
    if "max_detections" in call.arguments:
        call.arguments["max_detections"] = 200
    leaves = [each for each in tree_leaves(call.arguments) if isinstance(each, Tensor) and each.requires_grad]
    with torch.no_grad():
        for each in leaves:
            each.view(-1)[0] = float("nan")
    grads = results(call)[-len(leaves) :]
    assert all(each.isfinite().all() for each in grads)
    assert any(each.any() for each in grads)


# The loss is a number, and shared anchors, the vectors of a norm and the weights of maps have no images.
WITHOUT_IMAGES = (calls.sigmoid_focal_loss, calls.match_anchors, calls.frozen_batch_norm, calls.fuse_maps,
                  *calls.VARIANTS[:1])  # fmt: skip


@devices.not_interpreted
@of([each for each in [*PADDED, *RECORDED] if each not in WITHOUT_IMAGES])
def test_no_images_or_boxes(every_backend, recipe):
    call = call_of(recipe)
    op = getattr(ops, call.op.__name__)
    usual = tree_leaves(op(**call.arguments))
    found = tree_leaves(op(**tree_map_only(Tensor, lambda t: t[:0], call.arguments)))
    for empty, each in zip(found, usual, strict=True):
        assert (empty.shape, empty.dtype) == ((0, *each.shape[1:]), each.dtype)


def numbers_as(value, integer, number):
    """`value` with its numbers as those of other types; lists of them, such as tables of anchors, too."""
    if isinstance(value, ops.AnchorGrid):
        return ops.AnchorGrid(**numbers_as(vars(value), integer, number))
    if isinstance(value, dict):
        return {key: numbers_as(each, integer, number) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(numbers_as(each, integer, number) for each in value)
    if isinstance(value, (bool, str, Tensor)) or value is None:
        return value
    return integer(value) if isinstance(value, int) else number(value)


@pytest.mark.parametrize("integer", [np.int8, np.int16, np.int64], ids=lambda kind: kind.__name__)
@of(EVERYTHING)
def test_numbers_of_numpy_are_numbers(recipe, integer):
    """Sizes, counts, scales and thresholds, of small types whose products overflow, too."""
    call = call_of(recipe, size=3)
    if "canonical_scale" in call.arguments:
        call.arguments |= {"canonical_scale": 100, "canonical_level": 1}
    usual, of_numpy = (
        numbers_as(call.arguments, *kinds) for kinds in ((int, lambda x: float(np.float32(x))), (integer, np.float32))
    )
    expected, found = (tree_leaves(call.op(**arguments)) for arguments in (usual, of_numpy))
    assert same(found, expected)


@of([*OTHERS, *OF_ANY_LENGTH, *RECORDED])
def test_repeats_bit_for_bit_on_any_number_of_threads(backend, recipe):
    """Also in memory that holds NaN when the op is given it: every element is written."""
    call, threads, runs = call_of(recipe, 12), torch.get_num_threads(), []
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            runs.append(results(call))
            blocks = [torch.full_like(each, float("nan")) for each in runs[0] if each.is_floating_point()]
            del blocks
    finally:
        torch.set_num_threads(threads)
    assert same(runs[1], runs[0])
    assert same(runs[2], runs[0])


@pytest.mark.gpu
@of(PADDED)
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_can_be_captured_in_a_graph(name, recipe):
    """And replayed on other values than when it was captured."""
    call, other = (call_of(recipe, 14, seed=seed).arguments for seed in (0, 5))
    call, other = (tree_map_only(Tensor, lambda t: t.detach().cuda(), each) for each in (call, other))
    op = call_of(recipe).op
    with backends.use(name):
        op(**call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(**call)
        for mine, new in zip(tree_leaves(call), tree_leaves(other), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        graph.replay()
        assert same(tree_leaves(captured), tree_leaves(op(**call)))


@pytest.mark.gpu
@of(PADDED)
def test_autocast_on_a_gpu_gives_the_types_of_the_cpu(recipe):
    call = call_of(recipe)
    with torch.autocast("cpu", torch.bfloat16):
        expected = tree_leaves(call.op(**call.arguments))
    there = tree_map_only(Tensor, lambda t: t.detach().cuda(), call.arguments)
    with torch.autocast("cuda", torch.bfloat16):
        found = tree_leaves(call.op(**there))
    assert [(each.dtype, each.device.type) for each in found] == [(each.dtype, "cuda") for each in expected]


def test_the_reference_makes_numbers_of_the_host_there():
    """Whatever the default device is. What an op runs does not see that device."""
    maps = [torch.rand(1, 2, *size, dtype=torch.float64) for size in ((26, 44), (14, 30))]
    boxes = torch.rand(20, 4).cumsum(1) * 8
    rois = torch.cat([torch.zeros(20, 1), boxes], 1)

    def run():
        levels = reference.assign_levels(rois, 2, 3)
        pooled = reference.multiscale_roi_align(maps, rois.double(), levels, (2, 3), (0.5, 0.25))
        return [*reference.top_down(maps), pooled, reference.nms(boxes, boxes[:, 0], None, 0.5)]

    expected = run()
    with torch.device("meta"):
        assert same(run(), expected)


def test_every_op_is_here():
    names = {recipe.__name__ for recipe in chain(PADDED, OF_ANY_LENGTH)}
    assert names >= set(ops.__all__) - {"AnchorGrid", "pad_boxes"}


# Of a call of the compiled library: what takes an argument's place, and what the library says then.
FENCES = {
    calls.generate_proposals: [
        (1, lambda deltas: deltas[:1], "as many of deltas"),
        (1, lambda deltas: [m[:, 1:] for m in deltas], r"takes deltas of \d+ channels"),
        (2, lambda cells: cells[1:], "takes A cell anchors"),
        (3, lambda strides: [1, 1], "takes strides along y and x"),
        (4, lambda sizes: sizes.double(), "takes contiguous image_sizes"),
        (5, lambda top_n: -1, "of 0 or more"),
        (10, lambda weights: [1.0], "four weights, means and stds"),
        (17, lambda clamp: -1.0, "a center_clamp of 0 or more"),
        (20, lambda convention: 2, "does not know convention 2"),
    ],
    calls.select_detections_by_distances: [
        (1, lambda deltas: deltas[:1], "as many of deltas"),
        (1, lambda deltas: [m[:, 1:] for m in deltas], "takes deltas of 8 channels"),
        (2, lambda centerness: [m[:, 1:] for m in centerness], "takes centerness of 2 channels"),
        (3, lambda cells: cells[1:], "A cell anchors for each level"),
        (4, lambda strides: [1, 1], "takes strides along y and x"),
        (5, lambda sizes: sizes.double(), "takes contiguous image_sizes"),
        (7, lambda top_n: -1, "of 0 or more"),
        (10, lambda weights: [1.0], "takes four weights"),
    ],
    calls.select_box_detections: [
        (0, lambda logits: logits[:, 1:], "takes contiguous logits"),
        (1, lambda deltas: deltas[..., :8].contiguous(), "takes contiguous deltas"),
        (2, lambda boxes: boxes.half(), "takes float32 or float64 boxes"),
        (3, lambda counts: counts.int(), "takes contiguous int64 counts"),
        (4, lambda sizes: sizes[:1], "takes contiguous image_sizes"),
        (7, lambda top_n: -1, "of 0 or more"),
        (10, lambda weights: [1.0], "takes four weights"),
    ],
    calls.segmented_nms: [
        (0, lambda boxes: boxes[0], "takes contiguous boxes"),
        (1, lambda scores: scores.double(), "takes contiguous scores"),
        (3, lambda counts: torch.cat([counts, counts]), "takes contiguous int64 counts"),
        (6, lambda convention: 3, "does not know convention 3"),
    ],
    calls.match_anchors: [
        (0, lambda boxes: boxes.half(), "float32 or float64"),
        (0, lambda boxes: boxes[0], r"gt_boxes \[N, G, 4\]"),
        (1, lambda counts: counts.int(), "int64 gt_counts"),
        (2, lambda anchors: anchors.double(), "the boxes' type"),
        (4, lambda cells: [1.0], "four numbers for each cell anchor"),
        (6, lambda sizes: [1], "H and W and two strides"),
    ],
    calls.heatmaps_to_keypoints: [
        (0, lambda maps: maps[:, 0], r"heatmaps \[R, K, h, w\]"),
        (0, lambda maps: maps.mT, "contiguous heatmaps"),
        (0, lambda maps: maps.int(), "takes float64, float32, float16 or bfloat16"),
        (1, lambda boxes: boxes.half(), r"boxes \[R, 4\] of float32 or float64"),
        (1, lambda boxes: boxes[:1], r"boxes \[R, 4\] of float32 or float64"),
    ],
    calls.frozen_batch_norm: [
        (0, lambda x: x[0], r"takes maps \[N, C, H, W\]"),
        (0, lambda x: x[:, :1].expand_as(x), "takes dense maps"),
        (1, lambda norm: norm[:3], "takes weight, bias, mean and variance of a norm, got 3"),
        (1, lambda norm: [], "takes weight, bias, mean and variance of a norm, got none"),
        (1, lambda norm: [v[1:] for v in norm], r"takes contiguous vectors \[C\]"),
        (1, lambda norm: [v.double() for v in norm], "float64 ones for float64 maps only"),
        (3, lambda residual: residual[:, 1:], "takes dense maps of one shape"),
        (3, lambda residual: residual.double(), "takes maps of one type"),
        (4, lambda norm: [v.int() for v in norm], "takes floating-point vectors"),
    ],
    calls.paste_masks: [
        (0, lambda masks: masks[:, 0], r"masks \[K, 1, M, M\]"),
        (0, lambda masks: masks.int(), "takes float64, float32, float16 or bfloat16"),
        (1, lambda boxes: boxes.half(), r"boxes \[K, 4\] of float32 or float64"),
        (2, lambda height: -1, "an image's size"),
        (4, lambda padding: 9999, "a padding of 0 to 4096"),
    ],
}


@pytest.mark.parametrize(
    ("recipe", "place", "change", "message"),
    [(recipe, *fence) for recipe, fences in FENCES.items() for fence in fences],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_second_fence_holds_behind_the_python_checks(recipe, place, change, message):
    call = call_of(recipe)
    with backends.use("cpp"), Recorded() as recorded:
        call.op(**call.arguments)
    op, arguments, _ = recorded.calls[-1]
    with pytest.raises(RuntimeError, match=message):
        op(*arguments[:place], change(arguments[place]), *arguments[place + 1 :])
