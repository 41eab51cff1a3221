# SPDX-License-Identifier: Apache-2.0
"""What a long training does with an accelerated detector: averages, loss scaling, moves, processes and compilers.

Each is torchvision's: in float64, where another order of sums changes no decision.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.small_detectors import check_detections, training_batch
from test_accelerate import KINDS, detect, one_stage, two_stages
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import box_iou

import fpn_fast


def detector(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return kind(True).to(dtype)


def accelerated(model):
    fast = copy.deepcopy(model)
    assert len(fpn_fast.accelerate(fast).swapped) > 3
    return fast


def losses_of(model, batch, seed=5):
    torch.manual_seed(seed)
    return model(*copy.deepcopy(batch))


def trained(model, steps, after=lambda step: None):
    """`model` after so many steps of SGD; `after` is called with the number of each."""
    optimiser = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    for step in range(steps):
        optimiser.zero_grad()
        sum(losses_of(model.train(), training_batch(), step).values()).backward()
        optimiser.step()
        after(step)
    return model


def assert_same_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("way", ["AveragedModel", "deepcopy"])
@KINDS
def test_an_exponential_moving_average(kind, way):
    averages = []
    for model in (accelerated(detector(kind)), detector(kind)):
        if way == "AveragedModel":
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
            trained(model, 3, lambda step, own=average, model=model: own.update_parameters(model))
            average = average.module
        else:
            # After a call, which leaves scales and anchors in the model, too.
            losses_of(model.train(), training_batch())
            average = copy.deepcopy(model).requires_grad_(False)

            def update(step, own=average, model=model):
                with torch.no_grad():
                    for kept, new in zip(own.parameters(), model.parameters(), strict=True):
                        kept.lerp_(new, 0.1)

            trained(model, 3, update)
        assert [type(each) for each in average.modules()] == [type(each) for each in model.modules()]
        assert not any(torch.equal(a, b) for a, b in zip(average.parameters(), model.parameters(), strict=True))
        averages.append(average)
    assert_same_weights(*averages)
    for each in averages:
        # Of an untrained head all scores are too low.
        if kind is one_stage:
            each.score_thresh = 0.0
    check_detections(*(detect(each, torch.float64) for each in averages))


@KINDS
def test_steps_that_the_loss_scaler_skips(kind):
    """Of an infinite loss: the weights stay, the scale halves, and both go on alike."""
    found = []
    for model in (accelerated(detector(kind)), detector(kind)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        optimiser = torch.optim.SGD(model.parameters(), 1e-2)
        history = []
        for step in range(4):
            before = copy.deepcopy(model.state_dict())
            optimiser.zero_grad()
            loss = sum(losses_of(model.train(), training_batch(), step).values())
            scaler.scale(loss * torch.inf if step == 1 else loss).backward()
            scaler.unscale_(optimiser)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimiser)
            scaler.update()
            trainable = dict(model.named_parameters())
            moved = [not torch.equal(before[name], weight) for name, weight in trainable.items()]
            assert norm.isfinite() == (step != 1)
            history.append((scaler.get_scale(), any(moved)))
        assert history == [(2.0**16, True), (2.0**15, False), (2.0**15, True), (2.0**16, True)]
        found.append(model)
    assert_same_weights(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@KINDS
def test_accelerated_before_or_after_half_precision(kind, dtype):
    """Both the same, and torchvision's float32 losses of the rounded weights; on a CPU it has no half precision NMS."""
    plain = detector(kind, torch.float32).to(dtype)
    models = accelerated(detector(kind, torch.float32)).to(dtype), accelerated(plain)
    images, targets = training_batch(torch.float32)
    found = []
    for model in models:
        losses = losses_of(model.train(), ([each.to(dtype) for each in images], targets))
        sum(losses.values()).backward()
        grads = [each.grad for each in model.parameters()]
        assert {each.dtype for each in grads} == {dtype}
        found.append((losses, [*losses.values(), *grads]))
    assert all(torch.equal(a, b) for a, b in zip(*(each for _, each in found), strict=True))
    expected = losses_of(plain.float().train(), (images, targets))
    # Eight layers, and the losses themselves, round once each.
    unit = 9 * torch.finfo(dtype).eps
    for name, value in expected.items():
        torch.testing.assert_close(found[0][0][name].float(), value, rtol=unit, atol=unit / 2**4, msg=name)
    for a, b in zip(*(detect(model, dtype) for model in models), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
        assert a["boxes"].dtype == torch.float32


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}],
    ids=lambda options: "-".join(options) or "usual",
)
@KINDS
def test_distributed_data_parallel(kind, options, one_process):
    plain, found = detector(kind), []
    for when in ("never", "before", "after"):
        model = accelerated(plain) if when == "before" else copy.deepcopy(plain)
        copied = DistributedDataParallel(model, **options)
        if when == "after":
            assert all(entry.name.startswith("module") for entry in fpn_fast.accelerate(copied).swapped)
        # A static graph is recorded by the first step.
        for _ in range(2):
            model.zero_grad()
            losses = losses_of(copied, training_batch())
            sum(losses.values()).backward()
        found.append([*losses.values(), *(each.grad for each in model.parameters())])
        assert isinstance(model.backbone.fpn, fpn_fast.nn.FeaturePyramidNetwork) == (when != "never")
    for others in found[1:]:
        for ours, theirs in zip(others, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["wrapped", "in place"])
@pytest.mark.parametrize("when", ["before", "after", "after a call"])
def test_a_compiled_backbone(when, way):
    """A swap after a call is seen: the next call compiles the fused merge."""
    torch._dynamo.reset()
    plain = detector(one_stage)
    model = accelerated(plain) if when == "before" else copy.deepcopy(plain)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    if way == "wrapped":
        model.backbone = torch.compile(model.backbone, backend=backend)
    else:
        model.backbone.compile(backend=backend)
    if when == "after a call":
        losses_of(model, training_batch())
        assert graphs
        assert not any("fpn_fast" in each for each in graphs)
    if when != "before":
        assert len(fpn_fast.accelerate(model).swapped) > 3
    found = []
    for each in (model, plain):
        losses = losses_of(each, training_batch())
        sum(losses.values()).backward()
        found.append([*losses.values(), *(each.grad for each in each.parameters())])
    assert "fpn_fast" in graphs[-1]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_proposals_under_autocast_are_nearer_to_those_of_float32():
    """They are decoded from the head's bfloat16 maps in float32; torchvision rounds anchors and boxes to bfloat16."""
    plain = detector(two_stages, torch.float32)
    batch = training_batch(torch.float32)
    optimiser = torch.optim.AdamW(plain.parameters(), 2e-3)
    for step in range(20):
        optimiser.zero_grad()
        sum(losses_of(plain.train(), batch, step).values()).backward()
        optimiser.step()
    fast = accelerated(plain)

    def proposals(model, half):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            images, _ = model.eval().transform(batch[0])
            return [each.float() for each in model.rpn(images, model.backbone(images.tensors))[0]]

    first = [each[:100] for each in proposals(plain, False)]
    for right, ours, theirs in zip(first, proposals(fast, True), proposals(plain, True), strict=True):
        own, other = (box_iou(right, found).amax(1).mean().item() for found in (ours, theirs))
        # Measured: 0.998 and 0.989.
        assert 1 - own < (1 - other) / 2
