# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for mmdetection's modules, with its constructors, keys and outputs. mmdetection is not needed."""

from fpn_fast.nn.mmdet.bfp import BFP
from fpn_fast.nn.mmdet.bifpn import BiFPN
from fpn_fast.nn.mmdet.config import build_neck, build_roi_extractor
from fpn_fast.nn.mmdet.fpn_carafe import FPN_CARAFE
from fpn_fast.nn.mmdet.nas_fpn import NASFPN
from fpn_fast.nn.mmdet.necks import FPN, PAFPN
from fpn_fast.nn.mmdet.panoptic_fpn_head import PanopticFPNHead
from fpn_fast.nn.mmdet.proposals import AnchorGenerator, DeltaXYWHBBoxCoder, predict_proposals, proposals_of_images
from fpn_fast.nn.mmdet.roi_extractors import GenericRoIExtractor, SingleRoIExtractor
from fpn_fast.nn.mmdet.yolox_pafpn import YOLOXPAFPN

__all__ = [
    "BFP",
    "FPN",
    "FPN_CARAFE",
    "NASFPN",
    "PAFPN",
    "YOLOXPAFPN",
    "AnchorGenerator",
    "BiFPN",
    "DeltaXYWHBBoxCoder",
    "GenericRoIExtractor",
    "PanopticFPNHead",
    "SingleRoIExtractor",
    "build_neck",
    "build_roi_extractor",
    "predict_proposals",
    "proposals_of_images",
]
