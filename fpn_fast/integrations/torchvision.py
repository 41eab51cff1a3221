# SPDX-License-Identifier: Apache-2.0
"""The classes that accelerate() swaps in a torchvision model."""

from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, RoIAlign

from fpn_fast import nn

FUSED: dict[type, type] = {
    AnchorGenerator: nn.AnchorGenerator,
    FCOS: nn.FCOS,
    FeaturePyramidNetwork: nn.FeaturePyramidNetwork,
    GeneralizedRCNNTransform: nn.GeneralizedRCNNTransform,
    MultiScaleRoIAlign: nn.MultiScaleRoIAlign,
    RegionProposalNetwork: nn.RegionProposalNetwork,
    RetinaNet: nn.RetinaNet,
    RoIAlign: nn.RoIAlign,
    RoIHeads: nn.RoIHeads,
    SSD: nn.SSD,
}
