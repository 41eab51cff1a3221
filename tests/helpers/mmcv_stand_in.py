# SPDX-License-Identifier: Apache-2.0
"""mmcv._ext for mmcv-lite, which has no compiled ops: RoIAlign by torchvision, NMS by its definition.

mmdetection imports some fifty names; those without a stand-in raise when they are called.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torchvision


def roi_align_forward(
    input, rois, output, argmax_y, argmax_x, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode,
    aligned,
):  # fmt: skip
    """Mean pooling, into `output`."""
    assert pool_mode == 1
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output, rois, argmax_y, argmax_x, grad_input, aligned_height, aligned_width, spatial_scale, sampling_ratio,
    pool_mode, aligned,
):  # fmt: skip
    """Its gradient, into `grad_input`."""
    assert pool_mode == 1
    shape = (aligned_height, aligned_width, *grad_input.shape)
    backward = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(backward(grad_output, rois, spatial_scale, *shape, sampling_ratio, aligned))


def nms(boxes, scores, iou_threshold, offset):
    """Indices of what is kept, best first: mmcv compares the intersection with a share of the union."""
    assert offset == 0
    order, kept = scores.argsort(descending=True, stable=True), []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = torch.maximum(boxes[best, :2], boxes[order, :2]), torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = order[shared <= iou_threshold * (areas[best] + areas[order] - shared)]
    return torch.stack(kept) if kept else order


def _absent(name):
    # What Python itself asks a module for.
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*arguments, **options):
        raise NotImplementedError(f"mmcv._ext.{name} has no stand-in")

    return call


def install() -> None:
    """Makes `import mmcv._ext` find this; before mmcv.ops is imported."""
    module = ModuleType("mmcv._ext")
    module.__spec__ = ModuleSpec("mmcv._ext", None)
    module.nms, module.roi_align_forward, module.roi_align_backward = nms, roi_align_forward, roi_align_backward
    module.__getattr__ = _absent
    sys.modules["mmcv._ext"] = module
