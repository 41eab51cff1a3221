# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings."""

import doctest
import importlib

import pytest

MODULES = {
    "nn.feature_pyramid": 4, "nn.roi_align": 3, "nn.detectron2.fpn": 1, "nn.detectron2.poolers": 3,
    "nn.detectron2.proposals": 1, "nn.mmdet.config": 1, "nn.mmdet.necks": 1, "nn.mmdet.proposals": 1,
    "nn.mmdet.roi_extractors": 3, "nn.mmdet.bfp": 2, "nn.mmdet.bifpn": 2, "nn.mmdet.fpn_carafe": 2,
    "nn.mmdet.nas_fpn": 2, "nn.mmdet.panoptic_fpn_head": 2, "nn.mmdet.yolox_pafpn": 2, "nn.effdet": 3, "nn.panet": 2,
    "nn.detectron2.semantic_seg": 4, "nn.detectron2.simple_feature_pyramid": 3, "nn.smp": 6, "nn.transformers": 5,
    "ops.generate_proposals": 1, "ops.levels": 1, "ops.match_anchors": 2,
    "ops.nms": 1, "ops.top_down": 2, "ops.sigmoid_focal_loss": 1,
    "ops.frozen_batch_norm": 1, "nn.frozen_batch_norm": 2, "nn.folding": 2,
}  # fmt: skip


@pytest.mark.parametrize(("name", "least"), MODULES.items())
def test_examples(name, least):
    result = doctest.testmod(importlib.import_module(f"fpn_fast.{name}"))
    assert result.failed == 0
    assert result.attempted >= least
