# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for detectron2's modules, with its constructors, checkpoint keys and outputs. detectron2 is not needed."""

from fpn_fast.nn.detectron2.fpn import FPN, LastLevelMaxPool, LastLevelP6P7, ShapeSpec
from fpn_fast.nn.detectron2.poolers import ROIPooler
from fpn_fast.nn.detectron2.proposals import (
    Boxes,
    DefaultAnchorGenerator,
    find_top_rpn_proposals,
    proposals_of_images,
)
from fpn_fast.nn.detectron2.semantic_seg import SemSegFPNHead
from fpn_fast.nn.detectron2.simple_feature_pyramid import SimpleFeaturePyramid

__all__ = [
    "FPN",
    "Boxes",
    "DefaultAnchorGenerator",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "ROIPooler",
    "SemSegFPNHead",
    "ShapeSpec",
    "SimpleFeaturePyramid",
    "find_top_rpn_proposals",
    "proposals_of_images",
]
