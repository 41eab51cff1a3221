# SPDX-License-Identifier: Apache-2.0
"""How often a channels_last training step converts a large map, counted at the dispatcher."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

import fpn_fast

#: Values of a large map: of the image, the pyramid down to 4x5 pixels, and the pooled features.
LARGE = 5_000
COPIES = ("_to_copy", "clone", "contiguous", "copy_")
#: Operators that convert those of their inputs that do not fit, and how many of their arguments are maps or weights.
#: torchvision's roi_align makes its map channels_first, in csrc/ops.
MIXING = {"add": 2, "add_": 2, "convolution": 2, "convolution_backward": 3, "roi_align": 1}


def format_of(tensor):
    """None where both formats are the same."""
    first, last = (tensor.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
    return {(True, False): "first", (False, True): "last", (False, False): "strided"}.get((first, last))


class Conversions(TorchDispatchMode):
    """Counts operators that copy a large map to another format, or get large maps or weights of several formats."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        result = func(*args, **(kwargs or {}))
        tensors = []
        if name in COPIES:
            tensors = [args[0], args[1] if name == "copy_" else result]
        elif name in MIXING:
            tensors = [*args[: MIXING[name]], result if name == "roi_align" else args[0]]
        maps = [each for each in tensors if isinstance(each, torch.Tensor) and each.dim() == 4]
        formats = {format_of(each) for each in maps} - {None}
        if len(formats) > 1 and max(each.numel() for each in maps) >= LARGE:
            self.found["copy" if name in COPIES else name] += 1
        return result


def step(model):
    """The conversions of the forward and of the backward pass."""
    torch.manual_seed(1)
    boxes = torch.tensor([[10.0, 10, 100, 120], [50, 60, 120, 100]])
    with Conversions() as forward:
        losses = model([torch.rand(3, 128, 160)], [{"boxes": boxes, "labels": torch.tensor([1, 2])}])
    with Conversions() as backward:
        sum(losses.values()).backward()
    return forward.found, backward.found


def test_a_channels_last_step_converts_the_pooled_map_and_its_gradient():
    """The box head flattens the one, and the pooler takes the other in the format of its maps. The first convolution
    converts the image, of three channels."""
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    plain = FasterRCNN(
        body, min_size=128, max_size=160, box_head=TwoMLPHead(256 * 49, 16), box_predictor=FastRCNNPredictor(16, 3)
    )
    plain = plain.train().to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    assert step(fast) == (Counter(copy=1, convolution=1), Counter(copy=1))
    forward, backward = step(plain)
    # Of each level the pooler converts the map, its channels_first gradient meets that of the RPN's head, and the
    # convolution before it converts their sum.
    assert forward == Counter(roi_align=4, convolution=1)
    assert backward["add"] >= 4
    assert backward["convolution_backward"] == 4


@pytest.mark.parametrize(
    ("capability", "device", "memory_format", "advised"),
    [
        ((7, 0), "cuda", torch.contiguous_format, True),
        ((9, 0), "cuda", torch.channels_last, False),
        ((6, 1), "cuda", torch.contiguous_format, False),
        ((9, 0), "cpu", torch.contiguous_format, False),
    ],
)
def test_the_report_names_channels_last_for_tensor_cores(monkeypatch, capability, device, memory_format, advised):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # Stands for a GPU. Its modules cannot be moved.
    with FakeTensorMode():
        convs = [nn.Conv2d(8, 8, size, device=device) for size in (1, 3)]
        for conv in convs:
            conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=memory_format))
        report = fpn_fast.accelerate(nn.Sequential(*convs, FrozenBatchNorm2d(8)))
    assert len(report.advice) == advised
    assert report.as_dict()["advice"] == report.advice
    assert str(report).splitlines()[3:] == report.advice
