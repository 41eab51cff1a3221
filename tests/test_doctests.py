# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings."""

import doctest
import importlib

import pytest

MODULES = {
    "feature_pyramid": 4, "roi_align": 3, "detectron2.fpn": 1, "detectron2.poolers": 3, "detectron2.proposals": 1,
    "mmdet.config": 1, "mmdet.necks": 1, "mmdet.proposals": 1, "mmdet.roi_extractors": 3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "least"), MODULES.items())
def test_examples(name, least):
    result = doctest.testmod(importlib.import_module(f"fpn_fast.nn.{name}"))
    assert result.failed == 0
    assert result.attempted >= least
