# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for mmdetection's modules, with its constructors, keys and outputs. mmdetection is not needed."""

from fpn_fast.nn.mmdet.config import build_neck, build_roi_extractor
from fpn_fast.nn.mmdet.necks import FPN, PAFPN
from fpn_fast.nn.mmdet.proposals import AnchorGenerator, DeltaXYWHBBoxCoder, predict_proposals, proposals_of_images
from fpn_fast.nn.mmdet.roi_extractors import GenericRoIExtractor, SingleRoIExtractor

__all__ = [
    "FPN",
    "PAFPN",
    "AnchorGenerator",
    "DeltaXYWHBBoxCoder",
    "GenericRoIExtractor",
    "SingleRoIExtractor",
    "build_neck",
    "build_roi_extractor",
    "predict_proposals",
    "proposals_of_images",
]
