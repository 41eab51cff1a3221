# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of anchor matching, executed by the emulator and compared with plain PyTorch."""

import torch
from helpers.anchor_matching import CASES
from helpers.emulated_battery import Call, EmulatedBattery, runs


class TestMatchAnchors(EmulatedBattery):
    cases, kernels = CASES, ("match_anchors_kernel", "match_anchors_low_quality_kernel")
    cpp = runs(CASES)
    triton = ("grid", "of_each_image", "odd", "one_is_not_finite_without_low_quality/channels_first/float64")
    every_kernel = runs(["grid", "of_each_image"], types=("float32", "float64"))

    def calls(self, case, dtype, layouts):
        _, _, gts, gt_counts, anchors, anchor_counts = case.tensors(dtype)
        stored = isinstance(case.anchors, torch.Tensor)
        numbers = ([], [], [], [], 0.0) if stored else case.anchors._numbers()
        counts = None if case.anchor_counts is None else anchor_counts
        matches, ious = case.expected(dtype)

        def check(found):
            assert torch.equal(found[0], matches)
            torch.testing.assert_close(found[1], ious, rtol=0, atol=0, equal_nan=True)

        limits = (case.high, case.low, case.low_quality)
        given = [gts, gt_counts, anchors if stored else None, counts]
        yield Call("match_anchors", [*given, *numbers, *limits], check)
