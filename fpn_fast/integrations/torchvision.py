# SPDX-License-Identifier: Apache-2.0
"""What accelerate() swaps in a torchvision model, and what it knows and leaves."""

from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from fpn_fast import nn

FUSED: dict[type, type] = {FeaturePyramidNetwork: nn.FeaturePyramidNetwork}

_NO_FORM = "no fused form in this version"
LEFT: dict[type, str] = {
    MultiScaleRoIAlign: _NO_FORM,
    RegionProposalNetwork: _NO_FORM,
    AnchorGenerator: _NO_FORM,
}
