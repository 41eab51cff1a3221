# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules: the constructors, checkpoint keys and results of the modules that they replace.

torchvision's are here; those of other libraries are in :mod:`fpn_fast.nn.detectron2` and :mod:`fpn_fast.nn.mmdet`.
"""

from fpn_fast.nn import detectron2, mmdet
from fpn_fast.nn.feature_pyramid import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from fpn_fast.nn.roi_align import MultiScaleRoIAlign, RoIAlign

__all__ = [
    "ExtraFPNBlock",
    "FeaturePyramidNetwork",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "detectron2",
    "mmdet",
]
