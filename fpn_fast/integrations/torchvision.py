# SPDX-License-Identifier: Apache-2.0
"""What accelerate() swaps in a torchvision model, and what it knows and leaves."""

from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, RoIAlign

from fpn_fast import nn

FUSED: dict[type, type] = {
    FeaturePyramidNetwork: nn.FeaturePyramidNetwork,
    MultiScaleRoIAlign: nn.MultiScaleRoIAlign,
    RoIAlign: nn.RoIAlign,
}

_NO_FORM = "no fused form in this version"
LEFT: dict[type, str] = {
    RegionProposalNetwork: _NO_FORM,
    AnchorGenerator: _NO_FORM,
}
