# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of anchor matching, run on the CPU and compared with plain PyTorch."""

import math

import torch
from helpers.anchor_matching import CASES
from host_kernels import run
from host_kernels.battery import Call, HostBattery, runs


class TestMatchAnchors(HostBattery):
    program, cases, right = "match_anchors_main", CASES, runs(CASES, types=("float32", "float64"))
    addresses = ("grid", "of_each_image", "odd")
    races = ("one_beyond_a_block_is_not_finite", "more_than_a_block_without_low_quality")
    # Low-quality matches wait for the highest IoUs over all blocks.
    alone = ("grid_without_low_quality",)

    def calls(self, case, dtype, layouts):
        stored = isinstance(case.anchors, torch.Tensor)
        differ = stored and case.anchors.dim() == 3
        numbers = [run.DTYPES[dtype], case.low_quality, differ, stored, case.anchor_counts is not None]
        if not stored:
            _, cells, sizes, strides, _ = case.anchors._numbers()
            for i, count in enumerate(cells):
                numbers += [count, *sizes[2 * i : 2 * i + 2], *strides[2 * i : 2 * i + 2]]
        matches, ious = case.expected(dtype)
        highest = case.gts.new_zeros(case.gts.shape[:2], dtype=dtype)
        # No match is 99.
        outputs = [torch.full_like(matches, 99), torch.full_like(ious, math.nan)]
        inputs = case.tensors(dtype)

        def check(found):
            assert torch.equal(found[-2], matches)
            torch.testing.assert_close(found[-1], ious, rtol=0, atol=0, equal_nan=True)

        # The highest IoU of each ground truth is what the kernels hand on, where low-quality matches ask for it.
        inputs, outputs = (inputs, [highest, *outputs]) if case.low_quality else ([*inputs, highest], outputs)
        yield Call("match", [int(number) for number in numbers], inputs, outputs, check)
