# SPDX-License-Identifier: Apache-2.0
"""The classes that accelerate() swaps in a torchvision model."""

from fpn_fast import nn
from fpn_fast.integrations import replacing
from fpn_fast.nn import resnet

FUSED = replacing(
    nn.AnchorGenerator,
    nn.FCOS,
    nn.FeaturePyramidNetwork,
    nn.FrozenBatchNorm2d,
    nn.GeneralizedRCNNTransform,
    nn.MultiScaleRoIAlign,
    nn.RegionProposalNetwork,
    nn.RetinaNet,
    nn.RoIAlign,
    nn.RoIHeads,
    nn.SSD,
    resnet.BasicBlock,
    resnet.Bottleneck,
)
