# SPDX-License-Identifier: Apache-2.0
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import small_detectors
from torch import Tensor, nn
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

import fpn_fast
from fpn_fast.bench.counting import count
from fpn_fast.nn.static_sampling import FixedSizeSampler, StaticRoIHeads, use_static_sampling

DRAWS = 20_000
# A statistic of a fair sampler is above it once in 10^6 seeds; the seed is fixed.
DEVIATIONS = 4.9


def labels_with(positives: int, negatives: int, ignored: int) -> Tensor:
    """In an order that tells nothing."""
    labels = torch.tensor([3.0] * positives + [0.0] * negatives + [-1.0] * ignored)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(positives + negatives))]


# (positives, negatives, ignored): plenty, too few of either, none, and fewer than the sample has places.
KINDS = [(30, 100, 20), (3, 100, 5), (30, 6, 0), (0, 40, 3), (40, 0, 3), (0, 0, 9), (2, 3, 1)]


@pytest.mark.parametrize(("positives", "negatives", "ignored"), KINDS)
def test_a_sample_has_torchvisions_counts(positives: int, negatives: int, ignored: int) -> None:
    labels = labels_with(positives, negatives, ignored)
    theirs = BalancedPositiveNegativeSampler(16, 0.25)([labels])
    ours = FixedSizeSampler(16, 0.25)
    masks = ours([labels])
    for mask, expected, wanted in zip(masks, theirs, (labels > 0, labels == 0), strict=True):
        assert mask[0].dtype == expected[0].dtype
        assert mask[0].sum() == expected[0].sum()
        assert not (mask[0].bool() & ~wanted).any()
    places, kinds = ours.sample(torch.stack([labels, labels]))
    assert places.shape == kinds.shape == (2, 16)
    for of_places, of_kinds in zip(places, kinds, strict=True):
        taken = of_places[of_kinds >= 0]
        assert len(taken.unique()) == len(taken)
        assert torch.equal((labels[taken] > 0).long(), of_kinds[of_kinds >= 0])
        assert of_kinds.tolist() == sorted(of_kinds.tolist(), reverse=True)
        assert (of_kinds == 1).sum() == theirs[0][0].sum()
        assert (of_kinds == 0).sum() == theirs[1][0].sum()


@pytest.mark.parametrize("kind", [1, 0])
def test_every_subset_is_as_likely_as_any_other(kind: int) -> None:
    """Inclusion of each candidate and of each pair, beside what drawing without replacement gives them."""
    torch.manual_seed(0)
    labels = labels_with(12, 30, 8)
    places, kinds = FixedSizeSampler(16, 0.25).sample(labels.expand(DRAWS, -1))
    taken = torch.zeros(DRAWS, len(labels) + 1).scatter(1, torch.where(kinds == kind, places, len(labels)), 1)
    candidates = labels > 0 if kind else labels == 0
    included = taken[:, :-1][:, candidates]
    total, size = int(candidates.sum()), 4 if kind else 12
    assert (included.sum(1) == size).all()
    together = included.T @ included
    share, pair_share = size / total, size * (size - 1) / (total * (total - 1))
    pairs = together[tuple(torch.triu_indices(total, total, 1))]
    for counts, expected in ((together.diag(), share), (pairs, pair_share)):
        deviation = math.sqrt(DRAWS * expected * (1 - expected))
        assert (counts - DRAWS * expected).abs().max() < DEVIATIONS * deviation
        # As even as chance, and not more even: rows are drawn anew.
        assert 0.5 < ((counts - DRAWS * expected) / deviation).square().mean() < 2
    # Successive images share nothing.
    assert ((included[1:] * included[:-1]).sum(1).mean() - size * share).abs() < DEVIATIONS / math.sqrt(DRAWS) * size


KEYPOINTS = 4


def detector(kind: str, boxes_per_image: int = 512) -> Any:
    # Everything there is, so that nothing is left to chance.
    everything = {"rpn_batch_size_per_image": 4096, "box_batch_size_per_image": boxes_per_image}
    shares = {"box_positive_fraction": 0.5, "rpn_post_nms_top_n_train": 200}
    return small_detectors.detector(kind, **everything, **shares).float().train()


def batch_of(counts: list[int]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, 64, 80, generator=generator) for _ in counts]
    targets = []
    for boxes in counts:
        corners = torch.rand(boxes, 2, generator=generator) * 30
        sizes = 10 + torch.rand(boxes, 2, generator=generator) * 24
        masks = (torch.rand(boxes, 64, 80, generator=generator) < 0.5).to(torch.uint8)
        labels = torch.randint(1, 3, (boxes,), generator=generator)
        inside = torch.rand(boxes, KEYPOINTS, 2, generator=generator)
        points = torch.cat([corners[:, None] + inside * sizes[:, None], torch.ones(boxes, KEYPOINTS, 1)], 2)
        target = {"boxes": torch.cat([corners, corners + sizes], 1), "labels": labels}
        targets.append({**target, "masks": masks, "keypoints": points})
    return images, targets


@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
@pytest.mark.parametrize("counts", [[3, 1], [2, 0], [0, 0]])
def test_losses_and_gradients_are_torchvisions_where_everything_is_sampled(kind: str, counts: list[int]) -> None:
    eager = detector(kind)
    static = copy.deepcopy(eager)
    use_static_sampling(static)
    gradients, found = [], []
    for model in (eager, static):
        losses = model(*batch_of(counts))
        found.append({name: loss.item() for name, loss in losses.items()})
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(sum(losses.values()), parameters, materialize_grads=True))
    assert list(found[0]) == list(found[1])
    for name, value in found[0].items():
        # Means of some 10^3 terms of size one in float32, in another order.
        assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for theirs, ours in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6


@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
def test_neither_stage_waits(kind: str) -> None:
    model = detector(kind, boxes_per_image=64)
    fpn_fast.accelerate(model)
    use_static_sampling(model)
    images, targets = batch_of([3, 1])
    with torch.no_grad():
        batch, on_device = model.transform(images, targets)
        features = model.backbone(batch.tensors)

    def step() -> None:
        with torch.enable_grad():
            leaves = {name: each.requires_grad_() for name, each in features.items()}
            proposals, losses = model.rpn(batch, leaves, on_device)
            _, head_losses = model.roi_heads(leaves, proposals, batch.image_sizes, on_device)
            sum((losses | head_losses).values()).backward()

    assert not count(step).syncs


def test_a_whole_step_waits_for_what_torchvision_checks_alone() -> None:
    """Uploads of means and sizes, and a check of each image's boxes, are before the sampling."""

    def waits_of(prepare: Callable[[nn.Module], object]) -> int:
        model = detector("faster")
        prepare(model)
        batch = batch_of([3])

        def step() -> None:
            with torch.enable_grad():
                sum(model(*batch).values()).backward()

        return count(step).syncs.total()

    def both(model: nn.Module) -> None:
        fpn_fast.accelerate(model)
        use_static_sampling(model)

    eager, accelerated, static = map(waits_of, (lambda model: None, fpn_fast.accelerate, both))
    assert static < accelerated < eager
    assert static <= 7


def test_evaluation_and_weights_stay_as_they_are() -> None:
    model = detector("mask").eval()
    keys, images = list(model.state_dict()), batch_of([1, 1])[0]
    before = model(images)
    use_static_sampling(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model.roi_heads, StaticRoIHeads)
    for ours, theirs in zip(model(images), before, strict=True):
        assert len(ours["boxes"]) == len(theirs["boxes"])
        assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-5)


def test_it_says_what_it_cannot_serve() -> None:
    with pytest.raises(TypeError, match="must have an rpn and roi_heads"):
        use_static_sampling(fcos_resnet50_fpn(weights=None, weights_backbone=None))
    model = detector("faster")

    class Own(BalancedPositiveNegativeSampler):
        pass

    model.rpn.fg_bg_sampler = Own(8, 0.5)
    with pytest.raises(TypeError, match="BalancedPositiveNegativeSampler must be torchvision's, got Own"):
        use_static_sampling(model)
    model.rpn.fg_bg_sampler = BalancedPositiveNegativeSampler(8, 0.5)
    use_static_sampling(model)
    with pytest.raises(ValueError, match="targets must have the boxes"):
        model.rpn(None, None)
