# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules: the constructors, checkpoint keys and results of the modules that they replace."""

from fpn_fast.nn.feature_pyramid import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

__all__ = ["ExtraFPNBlock", "FeaturePyramidNetwork", "LastLevelMaxPool", "LastLevelP6P7"]
