# SPDX-License-Identifier: Apache-2.0
"""What test_distributed_training.py runs in each of two processes: ``python -m helpers.two_processes FOLDER``."""

from helpers.examples import train  # isort: skip

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detector_models import build_detector
from digits_on_photographs import DigitsOnPhotographs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fpn_fast
from helpers import small_detectors


class FirstOnes:
    """Takes the first of each kind, so that what is sampled for an image does not depend on the other images."""

    def __init__(self, size, fraction):
        self.size, self.positives = size, int(size * fraction)

    def __call__(self, labels):
        positive = [(each >= 1) & ((each >= 1).cumsum(0) <= self.positives) for each in labels]
        negative = []
        for each, taken in zip(labels, positive, strict=True):
            rest = self.size - int(taken.sum())
            negative.append((each == 0) & ((each == 0).cumsum(0) <= rest))
            # What the losses are divided by is then the same for every image.
            assert int(taken.sum() + negative[-1].sum()) == self.size
        return [each.to(torch.uint8) for each in positive], [each.to(torch.uint8) for each in negative]


def detector():
    """Faster R-CNN in float64, where other orders of sums change nothing that a selection could turn on."""
    torch.manual_seed(0)
    model = build_detector("faster_rcnn", "resnet18", 10, 64, channels=32).double()
    fpn_fast.accelerate(model)
    model.rpn.fg_bg_sampler = FirstOnes(64, 0.5)
    model.roi_heads.fg_bg_sampler = FirstOnes(32, 0.25)
    return model


def batch_of(indices, classes=10):
    data = DigitsOnPhotographs("train", 8, 64)
    images, targets = zip(*(data[index] for index in indices), strict=True)
    changed = [{"boxes": t["boxes"].double(), "labels": (t["labels"] - 1) % classes + 1} for t in targets]
    return [image.double() for image in images], [t | new for t, new in zip(targets, changed, strict=True)]


def largest_difference(ours, joined):
    """Of gradients, relative to the norm of each."""
    return max(
        ((a.grad - b.grad).norm() / b.grad.norm()).item()
        for a, b in zip(ours.parameters(), joined.parameters(), strict=True)
    )


def detector_gradients(rank):
    model = detector()
    joined = copy.deepcopy(model)
    # Kept until after the backward, in which it exchanges gradients.
    copied = DistributedDataParallel(model)
    sum(copied(*batch_of([rank])).values()).backward()
    sum(joined(*batch_of([0, 1])).values()).backward()
    return {"difference": largest_difference(model, joined), "parameters": len(list(model.parameters()))}


class PyramidAndPooler(nn.Module):
    """Nothing but what the RoIs reach: a level that has none gets a gradient by no other way."""

    def __init__(self):
        super().__init__()
        self.fpn = fpn_fast.nn.FeaturePyramidNetwork([4, 4, 4], 8)
        self.pool = fpn_fast.nn.MultiScaleRoIAlign(["0", "1", "2"], 3, 2, canonical_scale=30, canonical_level=3)

    def forward(self, maps, boxes):
        return self.pool(self.fpn(maps), boxes, [(64, 64)] * len(boxes))


def empty_level_gradients(rank):
    torch.manual_seed(1)
    model = PyramidAndPooler().double()
    joined = copy.deepcopy(model)
    maps = {str(level): torch.rand(2, 4, 16 >> level, 16 >> level, dtype=torch.float64) for level in range(3)}
    # The finest level alone, and the coarsest alone.
    boxes = [torch.tensor([[1.0, 2, 9, 8]] * 2).double(), torch.tensor([[0.0, 0, 60, 62]] * 2).double()]
    weights = torch.rand(2, 2, 8, 3, 3, dtype=torch.float64)
    copied = DistributedDataParallel(model)
    own = copied({k: m[rank : rank + 1] for k, m in maps.items()}, [boxes[rank]])
    (own * weights[rank]).sum().backward()
    (joined(maps, boxes) * weights.flatten(0, 1)).sum().div(2).backward()
    unused = [name for name, each in joined.named_parameters() if not each.grad.any()]
    return {"difference": largest_difference(model, joined), "unused": unused}


def static_gradients(rank):
    """A compiled StaticTraining inside, beside the mean of both images' gradients."""
    everything = {"rpn_batch_size_per_image": 4096, "box_batch_size_per_image": 512, "box_positive_fraction": 0.5}
    model = small_detectors.detector("faster", **everything).train()
    fpn_fast.accelerate(model)
    training = fpn_fast.StaticTraining(model, (64, 64), 1, max_targets=8)
    alone = copy.deepcopy(training)
    copied = DistributedDataParallel(training.compile(backend="aot_eager"))
    batches = [training.pack(*batch_of([index], classes=2)) for index in range(2)]
    sum(copied(*batches[rank]).values()).backward()
    (sum(sum(alone(*batch).values()) for batch in batches) / 2).backward()
    return {"difference": largest_difference(training, alone), "parameters": len(list(training.parameters()))}


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    found = {"detector": detector_gradients(rank), "level": empty_level_gradients(rank)}
    found["static"] = static_gradients(rank)
    runs = {"copied": "--steps 2 --tensorboard", "sharded": "--steps 2 --fsdp", "not_finite": "--steps 9 --lr 1e30"}
    for name, arguments in runs.items():
        found[name] = {"code": train(folder / name, "--eval-images", 3, *arguments.split())}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
