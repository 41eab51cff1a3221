# SPDX-License-Identifier: Apache-2.0
"""Norms folded into their convolutions: the same outputs, or a norm left with a reason."""

import logging

import pytest
import torch
import torchvision
from helpers import small_detectors
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

import fpn_fast
from fpn_fast.nn import fold_frozen_batch_norm
from fpn_fast.nn.mmdet.conv_module import ConvModule

CONV = {"kernel_size": 3, "padding": 1}


class MmcvConvModule(nn.Module):
    """mmcv's: the norm is a property, the order a setting, and steps are options of the call."""

    def __init__(self, order=("conv", "norm", "act")):
        super().__init__()
        self.conv, self.bn, self.activate = nn.Conv2d(4, 4, **CONV, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.order, self.norm_name = order, "bn"

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate:
                x = self.activate(x)
        return x


class Detectron2Conv(nn.Conv2d):
    """detectron2's: the norm is a part of the convolution."""

    def __init__(self):
        super().__init__(4, 4, **CONV, bias=False)
        self.norm = type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), {"__module__": "detectron2.layers.batch_norm"})(4)

    def forward(self, x):
        if x.numel() == 0:  # torch.fx cannot trace this
            return x
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


Detectron2Conv = type("Conv2d", (Detectron2Conv,), {"__module__": "detectron2.layers.wrappers"})


class Block(nn.Module):
    """Calls its convolution and its norm as `forward` says."""

    def __init__(self, run, conv=None, norm=None):
        super().__init__()
        self.conv, self.norm, self.run = conv or nn.Conv2d(4, 4, **CONV), norm or nn.BatchNorm2d(4), run

    def forward(self, x):
        return self.run(self, x)


class Subclass(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x


def with_downsample(kind, norm):
    projection = nn.Sequential(nn.Conv2d(4, 4 * kind.expansion, 1, bias=False), norm(4 * kind.expansion))
    return kind(4, 4, downsample=projection, norm_layer=norm)


FOLDED = {
    "sequential": lambda: nn.Sequential(nn.Conv2d(4, 4, **CONV), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)
    ),
    "conv_norm_activation": lambda: Conv2dNormActivation(4, 4, norm_layer=FrozenBatchNorm2d),
    "basic_block": lambda: with_downsample(BasicBlock, FrozenBatchNorm2d),
    "bottleneck": lambda: with_downsample(Bottleneck, nn.BatchNorm2d),
    "ours": lambda: with_downsample(Bottleneck, fpn_fast.nn.FrozenBatchNorm2d),
    "our_conv_module": lambda: ConvModule(4, 4, 3, norm_cfg={"type": "SyncBN"}, act_cfg={"type": "ReLU"}),
    "mmcv_conv_module": MmcvConvModule,
    "shared_block": lambda: nn.Sequential(*[MmcvConvModule()] * 2),
    "detectron2": lambda: nn.Sequential(Detectron2Conv(), nn.ReLU()),
}
SHARED = nn.Conv2d(4, 4, **CONV)
NOT_AFTER = "not directly after a Conv2d"
LEFT = {
    "norm_first": (lambda: MmcvConvModule(("norm", "act", "conv")), NOT_AFTER),
    "activation_between": (lambda: MmcvConvModule(("conv", "act", "norm")), NOT_AFTER),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)), NOT_AFTER),
    "output_used": (lambda: Block(lambda b, x: (y := b.conv(x)) + b.norm(y)), "something else uses"),
    "convolution_called_twice": (lambda: Block(lambda b, x: b.norm(b.conv(x)) + b.conv(x)), "something else uses"),
    "norm_called_twice": (lambda: Block(lambda b, x: b.norm(b.norm(b.conv(x)))), "calls it 2 times"),
    "shared_convolution": (
        lambda: nn.Sequential(*(Block(lambda b, x: b.norm(b.conv(x)), SHARED) for _ in range(2))), "2 modules have"
    ),
    "branch_on_values": (lambda: Block(lambda b, x: b.norm(b.conv(x)) if x.sum() > 0 else x), "cannot trace"),
    "subclass": (lambda: Block(lambda b, x: b.norm(b.conv(x)), Subclass(4, 4, **CONV)), "is a Subclass"),
    "no_statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"
    ),
}  # fmt: skip


def filled(make, dtype=torch.float64):
    torch.manual_seed(0)
    model = make().eval().to(dtype)
    for name, each in model.state_dict().items():
        if each.is_floating_point():
            each.uniform_(0.5 if "var" in name else -1, 1.5)
    return model


def norms(model):
    return [part for part in model.modules() if "BatchNorm" in type(part).__name__]


@pytest.mark.parametrize("name", FOLDED)
def test_is_the_same_without_norms(name, caplog):
    model, x = filled(FOLDED[name]), torch.randn(2, 4, 5, 7, dtype=torch.float64)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        folded = fold_frozen_batch_norm(model)
        torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    assert norms(model)
    assert not norms(folded)
    assert not any("running" in key for key in folded.state_dict())
    assert not folded.training
    assert not caplog.records
    # The model itself is unchanged.
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


@pytest.mark.parametrize("name", LEFT)
def test_a_norm_that_cannot_be_folded_is_left(name, caplog):
    make, reason = LEFT[name]
    model, x = filled(make), torch.randn(2, 4, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        folded = fold_frozen_batch_norm(model)
        assert torch.equal(folded(x), expected)
    assert len(norms(folded)) == len(norms(model)) == len(caplog.records)
    assert all(reason in record.getMessage() for record in caplog.records)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def add_hook(model):
    model[0].register_forward_hook(lambda *_: None)


def patch(model):
    model[1].forward = lambda x: x


def patch_owner(model):
    model.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_hook, "hooks"), (patch, "patched"), (patch_owner, "patched"),
        (lambda model: model[1].train(), "training mode"),
        (lambda model: model[0].half(), "dtype"),
        (lambda model: model[1].running_var.fill_(-1), "finite"),
        (lambda model: nn.utils.parametrizations.weight_norm(model[0]), "a ParametrizedConv2d"),
    ],
)  # fmt: skip
def test_what_the_user_changed_is_left(change, reason, caplog):
    model = filled(FOLDED["sequential"])
    change(model)
    assert len(norms(fold_frozen_batch_norm(model))) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("fold_frozen_batch_norm left 1: ")
    assert reason in record.getMessage()


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_a_whole_backbone_has_no_norm_left(norm, caplog):
    """The stem too, whose parts torchvision's IntermediateLayerGetter calls."""
    model = filled(lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm))
    for each in norms(model):
        each.weight.data.mul_(0.3)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, folded = model(x), fold_frozen_batch_norm(model).to(memory_format=torch.channels_last)
        found = [folded(x)]
        # The blocks that accelerate() swaps run without norms, and are folded.
        fpn_fast.accelerate(folded)
        fpn_fast.accelerate(model)
        found += [folded(x), fold_frozen_batch_norm(model)(x)]
    assert not caplog.records
    for name, each in expected.items():
        for own in found:
            torch.testing.assert_close(own[name], each, rtol=1e-10, atol=1e-10 * each.abs().max().item())


def test_folds_before_and_after_accelerate(monkeypatch, caplog):
    widths, kind = (3, 8, 8, 8, 8), Conv2dNormActivation
    layers = nn.Sequential(*(kind(widths[i], 8, 3, 4 if i == 0 else 2, norm_layer=FrozenBatchNorm2d) for i in range(4)))
    names = dict(zip(small_detectors.NAMES, small_detectors.NAMES, strict=True))
    backbone = torchvision.models.detection.backbone_utils.BackboneWithFPN(layers, names, [8] * 4, 16)
    monkeypatch.setattr(small_detectors, "backbone", lambda: backbone)
    model = small_detectors.detector("faster").eval()
    images = [torch.rand(3, *size, dtype=torch.float64) for size in ((60, 90), (64, 70))]
    with torch.no_grad():
        expected = model(images)
        after = fold_frozen_batch_norm(model)
        fpn_fast.accelerate(after)
        fpn_fast.accelerate(model)
        for folded in (after, fold_frozen_batch_norm(model)):
            assert not norms(folded)
            for own, other in zip(folded(images), expected, strict=True):
                assert len(other["boxes"]) > 3
                torch.testing.assert_close(own, other, rtol=0, atol=1e-8)
    assert not caplog.records


def test_errors():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        fold_frozen_batch_norm(filled)
    with pytest.raises(ValueError, match="the model must be in evaluation mode"):
        fold_frozen_batch_norm(nn.BatchNorm2d(3))
