# SPDX-License-Identifier: Apache-2.0
"""StaticTraining beside torchvision's own training."""

import copy
import math

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import small_detectors
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import fpn_fast
from fpn_fast import StaticTraining
from fpn_fast.bench.counting import count
from fpn_fast.nn import StaticTargets

# The latter has masks and keypoints.
TWO_STAGES = ("faster", "both")
ONE_STAGE = ("retinanet", "fcos", "ssd")
KINDS = (*TWO_STAGES, *ONE_STAGE)
CANVAS = (96, 96)
# With a shorter side of 64 pixels torchvision's transform leaves them as they are, and pads the batch to the canvas.
SIZES = [(64, 90), (80, 64)]
ROOM = 5


def detector(kind, **options):
    """Of torchvision; "both" has a mask head and a keypoint head."""
    model = small_detectors.detector("keypoint" if kind == "both" else kind, **options)
    if kind == "both":
        of_masks = small_detectors.detector("mask").roi_heads
        for part in ("mask_roi_pool", "mask_head", "mask_predictor"):
            setattr(model.roi_heads, part, getattr(of_masks, part))
    return model.train()


def everything_sampled(kind):
    """Nothing is left to chance."""
    sizes = {"rpn_batch_size_per_image": 4096, "box_batch_size_per_image": 512}
    shares = {"box_positive_fraction": 0.5, "rpn_post_nms_top_n_train": 200}
    return detector(kind, **(sizes | shares if kind in TWO_STAGES else {}))


def static(model, **options):
    fpn_fast.accelerate(model)
    return StaticTraining(model, CANVAS, len(SIZES), max_targets=ROOM, **options)


def raw_batch(counts=(3, 1), dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES]
    targets = []
    for boxes, size in zip(counts, SIZES, strict=True):
        corners = torch.rand(boxes, 2, generator=generator) * 30
        sides = 10 + torch.rand(boxes, 2, generator=generator) * 24
        masks = (torch.rand(boxes, *size, generator=generator) < 0.5).to(torch.uint8)
        labels = torch.randint(1, 3, (boxes,), generator=generator)
        share = torch.rand(boxes, 4, 2, generator=generator) * 1.2 - 0.1
        points = torch.cat([corners[:, None] + share * sides[:, None], torch.ones(boxes, 4, 1)], 2)
        if boxes:
            # One on the right edge of its box, which is inside; one that is not visible.
            points[0, 0, 0], points[0, 1, 2] = (corners + sides)[0, 0], 0
        boxes = torch.cat([corners, corners + sides], 1).to(dtype)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks, "keypoints": points})
    return images, targets


def loss_and_gradients(model, *batch):
    model.zero_grad()
    losses = model(*batch)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)], ids=str)
def test_losses_and_gradients_are_torchvisions_where_everything_is_sampled(kind, counts):
    eager = everything_sampled(kind)
    training = static(copy.deepcopy(eager))
    images, targets = raw_batch(counts)
    expected, expected_gradients = loss_and_gradients(eager, images, copy.deepcopy(targets))
    found, gradients = loss_and_gradients(training, *training.pack(images, targets))
    assert list(found) == list(expected)
    for name, loss in expected.items():
        # torchvision's loss of objectness is float32, also for a float64 model.
        close = 1e-10 if loss.dtype == torch.float64 else torch.finfo(torch.float32).eps
        torch.testing.assert_close(found[name], loss.double(), rtol=close, atol=1e-12)
    scale = max(each.abs().max().item() for each in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        own = gradients[f"model.{name}"]
        # A sum over all padded pixels and anchors in another order, see small_detectors.check_same.
        torch.testing.assert_close(own, gradient, rtol=0, atol=1e-10 * scale, msg=name)


def test_what_lies_around_an_image_does_not_count():
    training = static(everything_sampled("both"))
    images, targets, sizes = training.pack(*raw_batch())
    expected = training(images, targets, sizes)
    framed = images.clone()
    framed[0, :, 64:], framed[1, :, :, 64:] = torch.nan, 7.0
    for name, loss in training(framed, targets, sizes).items():
        # Samples of everything come in random orders.
        torch.testing.assert_close(loss, expected[name], rtol=1e-12, atol=0)


def test_sampled_losses_have_torchvisions_distribution():
    """Means over many seeds, and deviations. Positives are drawn too: there are more than 2."""
    seeds, sizes = 100, {"rpn_batch_size_per_image": 24, "box_batch_size_per_image": 12, "box_positive_fraction": 0.17}
    eager = detector("both", **sizes).float()
    training = static(copy.deepcopy(eager))
    images, targets = raw_batch((3, 2), torch.float32)
    packed = training.pack(images, targets)
    rows = [[], []]
    with torch.no_grad():
        for seed in range(seeds):
            for row, call in zip(rows, (lambda: eager(images, copy.deepcopy(targets)), lambda: training(*packed)),
                                 strict=True):  # fmt: skip
                torch.manual_seed(seed)
                row.append(list(call().values()))
    theirs, ours = (torch.tensor(row) for row in rows)
    deviations = [each.std(0) for each in (theirs, ours)]
    # Without sampling they would be none.
    assert (deviations[0] > 1e-5).all()
    error = ((deviations[0] ** 2 + deviations[1] ** 2) / seeds).sqrt()
    # A fair sampler is beyond it once in 10^4 seeds for each of the losses; the seeds are fixed.
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 3.9 * error).all()
    ratio = deviations[1] / deviations[0]
    # A deviation of n draws has a relative error of about 1 / sqrt(2 n), somewhat more with heavy tails.
    assert ((ratio.log().abs()) < 3.9 * 1.5 / math.sqrt(seeds)).all()


def fake(tensors, device):
    return {name: torch.empty(each.shape, dtype=each.dtype, device=device) for name, each in tensors.items()}


def fake_batch(batch, device):
    images, targets, sizes = batch
    found = fake({"images": images, "sizes": sizes}, device)
    return found["images"], StaticTargets(**fake(targets.named(), device)), found["sizes"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_never_waits(kind):
    """On fake CUDA tensors, of which no value can be asked."""
    training = static(detector(kind).float())
    batch = training.empty_batch(CANVAS)
    with FakeTensorMode(), torch.no_grad():
        tensors = fake({**dict(training.named_parameters()), **dict(training.named_buffers())}, "cuda")
        found = torch.func.functional_call(training, tensors, fake_batch(batch, "cuda"))
    assert {(each.device.type, each.dim()) for each in found.values()} == {("cuda", 0)}


def test_a_whole_step_never_reads_a_value():
    """Backward and the optimiser on fake CPU tensors, because autograd refuses a CUDA device that is not there."""
    training = static(detector("both").float())
    batch = training.empty_batch(CANVAS)
    with FakeTensorMode():
        buffers = fake(dict(training.named_buffers()), "cpu")
        weights = fake(dict(training.named_parameters()), "cpu")
        weights = {name: each.requires_grad_() for name, each in weights.items()}
        optimizer = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9, fused=True)
        for _ in range(2):
            optimizer.zero_grad()
            losses = torch.func.functional_call(training, buffers | weights, fake_batch(batch, "cpu"))
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(weights.values(), 10.0)
            optimizer.step()
    assert all(each.grad is not None for each in weights.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_no_uploads_and_no_reads(kind):
    training = static(detector(kind).float())
    batch = training.pack(*raw_batch(dtype=torch.float32))

    def step():
        with torch.enable_grad():
            sum(training(*batch).values()).backward()

    found = count(step)
    assert not found.syncs
    assert not found.uploads


def test_one_graph_each_way_for_all_targets():
    torch._dynamo.reset()
    graphs = {"forward": 0, "backward": 0}

    def counted(way):
        def compiler(module, _):
            graphs[way] += 1
            return make_boxed_func(module)

        return compiler

    eager, compiled = (static(everything_sampled("both")) for _ in range(2))
    compiled.compile(backend=aot_autograd(fw_compiler=counted("forward"), bw_compiler=counted("backward")))
    for step in range(20):
        counts = (step % (ROOM + 1), (3 * step) % (ROOM + 1))
        batch = compiled.pack(*raw_batch(counts, seed=step))
        losses, gradients = loss_and_gradients(compiled, *batch)
        if step not in (0, 19):
            continue
        expected, expected_gradients = loss_and_gradients(eager, *batch)
        for name, loss in expected.items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-10, atol=1e-12)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-10)
    assert graphs == {"forward": 1, "backward": 1}
