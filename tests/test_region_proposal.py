# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

import fpn_fast
from fpn_fast import backends

SIZES = (((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
PADDED = (100, 168)
IMAGES = [(100, 160), (90, 168)]


def rpn(generator=None, score_thresh=0.0, nms_thresh=0.7):
    """With a head whose scores and boxes differ more from place to place than an untrained one's."""
    torch.manual_seed(0)
    generator = generator or AnchorGenerator(*SIZES)
    numbers = {"training": 300, "testing": 200}, {"training": 150, "testing": 100}
    module = RegionProposalNetwork(generator, RPNHead(8, 3), 0.7, 0.3, 64, 0.5, *numbers, nms_thresh, score_thresh)
    nn.init.normal_(module.head.conv[0][0].weight, std=0.2)
    nn.init.normal_(module.head.cls_logits.weight, std=0.5)
    nn.init.normal_(module.head.bbox_pred.weight, std=0.1)
    return module


def batch(dtype=torch.float32, count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = {
        str(i): torch.randn(count, 8, *size, generator=generator, dtype=torch.float64).to(dtype)
        for i, size in enumerate(((25, 42), (13, 21), (7, 11)))
    }
    boxes = torch.tensor([[5.0, 5, 40, 45], [60, 20, 140, 90]], dtype=dtype)
    targets = [{"boxes": boxes}, {"boxes": boxes[:0]}][:count]
    return ImageList(torch.zeros(count, 3, *PADDED, dtype=dtype), IMAGES[:count]), features, targets


def pair(dtype=torch.float32, **options):
    plain = rpn(**options).to(dtype)
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    assert type(fast) is fpn_fast.nn.RegionProposalNetwork
    return plain, fast


def check_lists(ours, theirs, unit):
    """Corners of at most 168 pixels, summed of sides of at most twice that: off by the last bits of an exponential."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2 * unit, atol=256 * unit)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_same_proposals(backend, dtype, count):
    plain, fast = pair(dtype)
    images, features, _ = batch(dtype, count)
    with torch.no_grad(), backends.use(backend):
        boxes, losses = fast.eval()(images, features)
        expected, _ = plain.eval()(images, features)
    assert losses == {}
    assert all(0 < len(each) <= 100 for each in boxes)
    check_lists(boxes, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_training(dtype):
    """Losses, gradients, proposals and the stream of random numbers; an image without ground truth among them."""
    results = []
    for module in pair(dtype):
        images, features, targets = batch(dtype)
        torch.manual_seed(7)
        boxes, losses = module.train()(images, features, targets)
        sum(losses.values()).backward()
        grads = [p.grad for p in module.parameters()]
        results.append((boxes, losses, grads, torch.rand(3)))
        assert not any(each.requires_grad for each in boxes)
    (boxes, losses, grads, after), (fast_boxes, fast_losses, fast_grads, fast_after) = results
    check_lists(fast_boxes, boxes, torch.finfo(dtype).eps)
    assert list(fast_losses) == list(losses)
    assert torch.equal(after, fast_after)
    # The same steps on the same numbers; threads alone may add up a gradient in another order.
    for a, b in zip([*fast_losses.values(), *fast_grads], [*losses.values(), *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_score_threshold_and_channels_last():
    plain, fast = pair(score_thresh=0.55, nms_thresh=0.5)
    images, features, _ = batch()
    features = {name: m.contiguous(memory_format=torch.channels_last) for name, m in features.items()}
    with torch.no_grad():
        check_lists(fast.eval()(images, features)[0], plain.eval()(images, features)[0], 2**-23)


def test_padded_form_is_the_lists():
    _, fast = pair()
    images, features, _ = batch()
    with torch.no_grad():
        boxes, scores, counts = fast.eval().proposals(images, features)
        lists, _ = fast(images, features)
    assert (boxes.shape, scores.shape) == ((2, 100, 4), (2, 100))
    for n, each in enumerate(lists):
        assert torch.equal(boxes[n, : counts[n]], each)
        assert not boxes[n, counts[n] :].any()


def test_autocast_keeps_boxes_in_float32():
    """Of a half-precision head: the proposals of its maps in float32, where torchvision's anchors are rounded."""
    _, fast = pair()
    images, features, _ = batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        boxes, _ = fast.eval()(images, features)
        objectness, deltas = fast.head(list(features.values()))
    assert objectness[0].dtype == torch.bfloat16
    with torch.no_grad():
        padded, _, counts = fast.proposals_of_head(images, [m.float() for m in objectness], [m.float() for m in deltas])
    for n, each in enumerate(boxes):
        assert each.dtype == torch.float32
        assert torch.equal(each, padded[n, : counts[n]])


class Given(nn.Module):
    """A head that is done already."""

    def __init__(self, *found):
        super().__init__()
        self.found = found

    def forward(self, maps):
        return self.found


class Shapes(TorchDispatchMode):
    """The elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.detach.default:
            made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            self.elements = max([self.elements, *(each.numel() for each in made)])
        return result


def test_no_anchors_in_inference():
    plain, fast = pair()
    images, features, _ = batch()
    censuses = []
    for module in (plain, fast):
        with torch.no_grad():
            objectness, deltas = module.eval().head(list(features.values()))
            module.head = Given(objectness, deltas)
            with Shapes() as census:
                module.proposals(images, features) if module is fast else module(images, features)
        censuses.append(census)
    anchors = sum(m.numel() for m in objectness)
    assert censuses[0].elements >= 4 * anchors
    # The padded boxes.
    assert censuses[1].elements == 2 * 100 * 4


def test_padded_form_needs_no_device():
    _, fast = pair()
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = ImageList(torch.empty(2, 3, *PADDED, device="cuda"), IMAGES)
        objectness = [torch.empty(2, 3, *size, device="cuda") for size in ((25, 42), (13, 21), (7, 11))]
        deltas = [torch.empty(2, 12, *m.shape[2:], device="cuda") for m in objectness]
        found = fast.eval().proposals_of_head(images, objectness, deltas)
    assert [tuple(each.shape) for each in found] == [(2, 100, 4), (2, 100), (2,)]
    assert found[0].device.type == "cuda"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_padded_form_compiles_in_one_graph(dynamic):
    torch._dynamo.reset()
    _, fast = pair()
    fast.eval()
    images, features, _ = batch()
    compiled = torch.compile(
        lambda x, f: fast.proposals(ImageList(x, IMAGES), f), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    with torch.no_grad():
        expected = fast.proposals(images, features)
        for a, b in zip(compiled(images.tensors, features), expected, strict=True):
            assert torch.equal(a, b)


def test_modules_of_your_own_are_served_by_torchvisions_steps():
    class Mine(AnchorGenerator):
        def grid_anchors(self, grid_sizes, strides):
            return [anchors + 3 for anchors in super().grid_anchors(grid_sizes, strides)]

    plain, fast = pair(generator=Mine(*SIZES))
    assert type(fast.anchor_generator) is Mine
    images, features, _ = batch()
    with torch.no_grad():
        for a, b in zip(fast.eval()(images, features)[0], plain.eval()(images, features)[0], strict=True):
            assert torch.equal(a, b)
    with pytest.raises(TypeError, match="needs an AnchorGenerator and a BoxCoder of torchvision or fpn_fast, got Mine"):
        fast.proposals(images, features)


def test_built_by_itself_with_either_generator():
    arguments = (RPNHead(8, 3), 0.7, 0.3, 64, 0.5, {"training": 9, "testing": 9}, {"training": 9, "testing": 9}, 0.7)
    images, features, _ = batch()
    found = []
    for generator in (AnchorGenerator(*SIZES), fpn_fast.nn.AnchorGenerator(*SIZES)):
        module = fpn_fast.nn.RegionProposalNetwork(generator, *arguments).eval()
        assert list(module.state_dict()) == list(rpn().state_dict())
        with torch.no_grad():
            found.append(module(images, features)[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_old_checkpoints_migrate():
    plain, fast = pair()
    old = {name.replace("conv.0.0.", "conv."): value for name, value in plain.state_dict().items()}
    fast.load_state_dict(old)
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True))


def test_training_without_targets():
    _, fast = pair()
    images, features, _ = batch()
    with pytest.raises(ValueError, match="targets must have the boxes of each image in training, got None"):
        fast.train()(images, features)


def test_no_images():
    _, fast = pair()
    images, features, _ = batch(count=0)
    found = fast.eval().proposals_of_head(
        images, [m.new_zeros(0, 3, *m.shape[2:]) for m in features.values()],
        [m.new_zeros(0, 12, *m.shape[2:]) for m in features.values()],
    )  # fmt: skip
    assert [tuple(each.shape) for each in found] == [(0, 100, 4), (0, 100), (0,)]


def test_anchors_are_torchvisions():
    plain, fast = AnchorGenerator(*SIZES), fpn_fast.nn.AnchorGenerator(*SIZES)
    for dtype in (torch.float32, torch.float16, torch.float64):
        images, features, _ = batch(dtype)
        for a, b in zip(fast(images, list(features.values())), plain(images, list(features.values())), strict=True):
            assert torch.equal(a, b)
    assert plain.num_anchors_per_location() == fast.num_anchors_per_location()


def test_cell_numbers_follow_what_is_set_not_what_is_rounded():
    generator = fpn_fast.nn.AnchorGenerator(((3000,),), ((0.4,),))
    numbers = generator.cell_numbers()
    assert numbers == [AnchorGenerator(((3000,),), ((0.4,),)).cell_anchors[0].tolist()]
    generator.set_cell_anchors(torch.bfloat16, torch.device("cpu"))
    assert generator.cell_anchors[0].float().tolist() != numbers[0]
    assert generator.cell_numbers() == numbers
    assert copy.deepcopy(generator).cell_numbers() == numbers
    generator.cell_anchors = [torch.tensor([[-1.0, -2, 1, 2]])]
    assert generator.cell_numbers() == [[[-1, -2, 1, 2]]]
    # One that torchvision's class has moved and rounded before it was swapped.
    swapped = AnchorGenerator(((3000,),), ((0.4,),))
    fpn_fast.accelerate(swapped)
    assert swapped.cell_numbers() == numbers
    fpn_fast.restore(swapped)
    assert type(swapped) is AnchorGenerator
