# SPDX-License-Identifier: Apache-2.0
"""A whole training step as one call; what a GPU captures is the same function."""

import copy

import pytest
import torch
from helpers import small_detectors
from torch import nn

import fpn_fast
from fpn_fast import StaticTraining
from fpn_fast.nn.training_step import check_optimizer, tensor_rates

CANVAS = (64, 96)


@pytest.fixture(scope="module")
def base():
    """Its samples hold everything, so that no random number matters."""
    everything = {"rpn_batch_size_per_image": 4096, "box_batch_size_per_image": 512, "box_positive_fraction": 0.5}
    model = small_detectors.detector("faster", **everything).float().train()
    fpn_fast.accelerate(model)
    return model


def training_of(base):
    return StaticTraining(copy.deepcopy(base), CANVAS, 1, max_targets=3)


def batch_of(training, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, generator=generator) * 20
    target = {"boxes": torch.cat([corner, corner + 30])[None], "labels": torch.tensor([1])}
    return training.pack([torch.rand(3, 64, 96, generator=generator)], [target])


def sgd(training, **options):
    return torch.optim.SGD(training.parameters(), lr=0.02, momentum=0.9, fused=True, **options)


def same(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_call_is_forward_backward_clipping_and_optimizer(base):
    ours, theirs = training_of(base), training_of(base)
    optimizer = sgd(theirs)
    step = ours.step(sgd(ours), max_gradient_norm=0.5)
    for seed in range(2):
        batch = batch_of(ours, seed)
        # Samples of everything come in random orders, in which they are summed.
        torch.manual_seed(0)
        found = step(*batch)
        torch.manual_seed(0)
        optimizer.zero_grad()
        losses = theirs(*batch)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert list(found) == list(losses)
        for name, loss in losses.items():
            assert torch.equal(found[name], loss.detach())
            assert not found[name].requires_grad
    same(ours, theirs)
    step.check(wait=True)


def test_accumulated_gradients_are_averaged(base):
    ours, theirs = training_of(base), training_of(base)
    optimizer = sgd(theirs)
    step = ours.step(sgd(ours), accumulate=2)
    for seed in (0, 1):
        before = copy.deepcopy(ours)
        step(*batch_of(ours, seed))
        if seed == 0:
            same(ours, before)
        (sum(theirs(*batch_of(ours, seed)).values()) / 2).backward()
    optimizer.step()
    same(ours, theirs)


def test_a_scaler_skips_what_overflows_and_an_average_follows(base):
    training = training_of(base)
    average = copy.deepcopy(training.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    step = training.step(sgd(training), scaler=scaler, average=average, decay=0.75)
    before = [each.detach().clone() for each in training.parameters()]
    step(*batch_of(training, 0))
    for each, old in zip(training.parameters(), before, strict=True):
        assert torch.equal(each, old)
    scaler.update(1024.0)
    step(*batch_of(training, 0))
    for own, new, old in zip(average.parameters(), training.parameters(), before, strict=True):
        torch.testing.assert_close(own, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(training.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_is_seen_at_the_next_call(base):
    training = training_of(base)
    step = training.step(sgd(training))
    step(*batch_of(training, 0))
    images, targets, sizes = batch_of(training, 1)
    step(images * torch.inf, targets, sizes)
    with pytest.raises(FloatingPointError, match="a loss was not finite in call 2 of 2"):
        step(images, targets, sizes)
    with pytest.raises(FloatingPointError, match="call 2"):
        step.check(wait=True)


def test_it_refuses_what_a_graph_cannot_hold(base):
    training = training_of(base)
    parameters = list(training.parameters())
    unfit = {
        "make SGD with fused=True": torch.optim.SGD(parameters, lr=0.1),
        "take 0": torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.1, fused=True),
        "make AdamW with capturable=True": torch.optim.AdamW(parameters, fused=True),
        "make Adagrad with capturable=True": torch.optim.Adagrad(parameters),
    }
    for advice, optimizer in unfit.items():
        with pytest.raises(ValueError, match=advice):
            training.capture(optimizer)
    capturable = torch.optim.AdamW(parameters, capturable=True)
    check_optimizer(capturable, scaled=False)
    with pytest.raises(ValueError, match="make AdamW with fused=True"):
        training.capture(capturable, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="captured on a GPU; the model is on cpu"):
        training.capture(sgd(training))
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        training.step(sgd(training), accumulate=0)


def test_a_schedule_changes_the_tensor_that_a_graph_reads(base):
    training = training_of(base)
    optimizer = sgd(training)
    (rate,) = tensor_rates(optimizer, torch.device("cpu"))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.5)
    step = training.step(optimizer)
    step(*batch_of(training, 0))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.01)
    step._rates = [rate]
    optimizer.param_groups[0]["lr"] = 0.5
    step._fill_rates()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5
