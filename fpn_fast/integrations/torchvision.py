# SPDX-License-Identifier: Apache-2.0
"""What accelerate() swaps in a torchvision model."""

from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, RoIAlign

from fpn_fast import nn

FUSED: dict[type, type] = {
    AnchorGenerator: nn.AnchorGenerator,
    FeaturePyramidNetwork: nn.FeaturePyramidNetwork,
    GeneralizedRCNNTransform: nn.GeneralizedRCNNTransform,
    MultiScaleRoIAlign: nn.MultiScaleRoIAlign,
    RegionProposalNetwork: nn.RegionProposalNetwork,
    RoIAlign: nn.RoIAlign,
    RoIHeads: nn.RoIHeads,
}
