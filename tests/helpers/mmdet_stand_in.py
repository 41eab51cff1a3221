# SPDX-License-Identifier: Apache-2.0
"""mmdetection's residual blocks, stated plainly, and names for what else its integration imports.

tests/against_mmdet.py has mmdetection itself.
"""

import sys
from types import ModuleType

from torch import nn
from torch.utils.checkpoint import checkpoint


class _Block(nn.Module):
    """Convolutions, each with a norm and all but the last with ReLU behind it; then the residual and ReLU."""

    def __init__(self, widths, sizes, strides, norm, downsample, with_cp, groups=1):
        super().__init__()
        for i, (size, stride) in enumerate(zip(sizes, strides, strict=True), start=1):
            before, after = widths[i - 1 : i + 1]
            shared = groups if size == 3 else 1
            setattr(self, f"conv{i}", nn.Conv2d(before, after, size, stride, size // 2, groups=shared, bias=False))
            setattr(self, f"norm{i}_name", f"bn{i}")
            self.add_module(f"bn{i}", norm(after))
        self.relu = nn.ReLU(inplace=True)
        self.downsample, self.with_cp = downsample, with_cp

    norm1 = property(lambda self: getattr(self, self.norm1_name))
    norm2 = property(lambda self: getattr(self, self.norm2_name))
    norm3 = property(lambda self: getattr(self, self.norm3_name))

    def steps(self, x):
        raise NotImplementedError

    def add(self, x):
        out = self.steps(x)
        out += x if self.downsample is None else self.downsample(x)
        return out

    def forward(self, x):
        kept = not self.with_cp or not x.requires_grad
        return self.relu(self.add(x) if kept else checkpoint(self.add, x, use_reentrant=True))


class BasicBlock(_Block):
    def __init__(self, inplanes, planes, stride=1, downsample=None, with_cp=False, norm=nn.BatchNorm2d):
        super().__init__((inplanes, planes, planes), (3, 3), (stride, 1), norm, downsample, with_cp)

    def steps(self, x):
        return self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))


class Bottleneck(_Block):
    def __init__(
        self, inplanes, planes, stride=1, downsample=None, style="pytorch", with_cp=False, norm=nn.BatchNorm2d,
        plugins=None, groups=1,
    ):  # fmt: skip
        widths, strides = (inplanes, planes, planes, 4 * planes), (1, stride, 1)
        if style == "caffe":
            strides = (stride, 1, 1)
        super().__init__(widths, (1, 3, 1), strides, norm, downsample, with_cp, groups)
        self.with_plugins = plugins is not None
        self.after_conv2 = nn.Sequential(*(plugins or ()))

    def steps(self, x):
        out = self.relu(self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))))
        return self.norm3(self.conv3(self.after_conv2(out) if self.with_plugins else out))


class BottleneckOfResNeXt(Bottleneck):
    def __init__(self, inplanes, planes, groups=2, **options):
        super().__init__(inplanes, planes, groups=groups, **options)


BottleneckOfResNeXt.__name__ = "Bottleneck"


class Anything:
    """For the names that no block needs."""


#: Where each name is in mmdetection.
_PLACES = {
    "mmcv.ops": ["RoIAlign"],
    "mmengine.structures": ["InstanceData"],
    "mmengine.utils.dl_utils.parrots_wrapper": [],
    "mmdet.models.backbones.resnet": [],
    "mmdet.models.backbones.resnext": [],
    "mmdet.models.dense_heads.rpn_head": ["RPNHead"],
    "mmdet.models.necks.fpn": ["FPN"],
    "mmdet.models.necks.pafpn": ["PAFPN"],
    "mmdet.models.roi_heads.roi_extractors.generic_roi_extractor": ["GenericRoIExtractor"],
    "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor": ["SingleRoIExtractor"],
    "mmdet.models.task_modules.coders": ["DeltaXYWHBBoxCoder"],
    "mmdet.models.task_modules.prior_generators": ["AnchorGenerator"],
    "mmdet.registry": ["MODELS"],
}


def install(monkeypatch):
    """Makes `import mmdet` find all this until the test is over."""
    for place, names in _PLACES.items():
        parts = place.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules or not hasattr(sys.modules[path], "_stands_in"):
                module = ModuleType(path)
                module._stands_in = True
                monkeypatch.setitem(sys.modules, path, module)
                if i > 1:
                    setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
        for name in names:
            setattr(sys.modules[place], name, type(name, (Anything,), {"__module__": place}))
    norms = sys.modules["mmengine.utils.dl_utils.parrots_wrapper"]
    norms.SyncBatchNorm = type("SyncBatchNorm", (nn.SyncBatchNorm,), {})
    for place, kinds in (("resnet", (BasicBlock, Bottleneck)), ("resnext", (BottleneckOfResNeXt,))):
        place = f"mmdet.models.backbones.{place}"
        for kind in kinds:
            monkeypatch.setattr(kind, "__module__", place)
            setattr(sys.modules[place], kind.__name__, kind)
