# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules with the constructors, checkpoint keys and outputs of the modules that they replace.

torchvision's and PANet are here; those of other libraries are in :mod:`fpn_fast.nn.detectron2`,
:mod:`fpn_fast.nn.effdet`, :mod:`fpn_fast.nn.mmdet`, :mod:`fpn_fast.nn.smp` and :mod:`fpn_fast.nn.transformers`.
"""

import importlib.util

from fpn_fast.nn import detectron2, effdet, mmdet, smp, transformers
from fpn_fast.nn.feature_pyramid import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
from fpn_fast.nn.folding import fold_frozen_batch_norm
from fpn_fast.nn.panet import PANet
from fpn_fast.nn.roi_align import MultiScaleRoIAlign, RoIAlign
from fpn_fast.nn.static_targets import StaticTargets, pack_targets

__all__ = [
    "ExtraFPNBlock",
    "FeaturePyramidNetwork",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "MultiScaleRoIAlign",
    "PANet",
    "RoIAlign",
    "StaticTargets",
    "detectron2",
    "effdet",
    "fold_frozen_batch_norm",
    "mmdet",
    "pack_targets",
    "smp",
    "transformers",
]

# These subclass torchvision's classes. An ImportError of another cause must reach the user.
if importlib.util.find_spec("torchvision") is not None:
    from fpn_fast.nn.dense_detectors import FCOS, SSD, RetinaNet
    from fpn_fast.nn.frozen_batch_norm import FrozenBatchNorm2d
    from fpn_fast.nn.region_proposal import AnchorGenerator, RegionProposalNetwork
    from fpn_fast.nn.roi_heads import GeneralizedRCNNTransform, RoIHeads
    from fpn_fast.nn.static_detector import StaticDetector
    from fpn_fast.nn.static_training import StaticTraining

    __all__ += ["FCOS", "SSD", "AnchorGenerator", "GeneralizedRCNNTransform", "RegionProposalNetwork"]
    __all__ += ["FrozenBatchNorm2d", "RetinaNet", "RoIHeads", "StaticDetector", "StaticTraining"]
