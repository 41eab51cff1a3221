# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules: the constructors, checkpoint keys and results of the modules that they replace.

torchvision's are here; those of other libraries are in :mod:`fpn_fast.nn.detectron2` and :mod:`fpn_fast.nn.mmdet`.
"""

from fpn_fast.nn import detectron2, mmdet
from fpn_fast.nn.feature_pyramid import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from fpn_fast.nn.roi_align import MultiScaleRoIAlign, RoIAlign

try:
    from fpn_fast.nn.dense_detectors import FCOS as FCOS
    from fpn_fast.nn.dense_detectors import SSD as SSD
    from fpn_fast.nn.dense_detectors import RetinaNet as RetinaNet
    from fpn_fast.nn.region_proposal import AnchorGenerator as AnchorGenerator
    from fpn_fast.nn.region_proposal import RegionProposalNetwork as RegionProposalNetwork
    from fpn_fast.nn.roi_heads import GeneralizedRCNNTransform as GeneralizedRCNNTransform
    from fpn_fast.nn.roi_heads import RoIHeads as RoIHeads
    from fpn_fast.nn.static_detector import StaticDetector as StaticDetector
except ImportError:
    # No torchvision, and these have no form of their own without it.
    _OF_TORCHVISION: list[str] = []
else:
    _OF_TORCHVISION = [
        "FCOS",
        "SSD",
        "AnchorGenerator",
        "GeneralizedRCNNTransform",
        "RegionProposalNetwork",
        "RetinaNet",
        "RoIHeads",
        "StaticDetector",
    ]

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
__all__ += _OF_TORCHVISION
