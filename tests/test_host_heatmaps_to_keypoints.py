# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of heatmaps_to_keypoints, run on the CPU and compared with plain PyTorch, bit for bit."""

import torch
from helpers.keypoint_heatmaps import CASES, same
from host_kernels import run
from host_kernels.battery import Call, HostBattery, runs


class TestHeatmapsToKeypoints(HostBattery):
    program, cases = "heatmaps_to_keypoints_main", CASES
    right = runs(CASES, types=("float64", "float32")) + runs(["no_numbers"], types=("float16", "bfloat16"))
    addresses = ("any", "no_box", "large_maps", "wide", "tall")
    races, alone = ("tall",), ("any", "no_box")

    def calls(self, case, dtype, layouts):
        # Full of a number that no case gives; a NaN may be a score.
        outputs = [torch.full((len(case.boxes), case.keypoints, *size), -7.0) for size in ((3,), ())]
        numbers = [run.DTYPES[dtype], int(case.box_type == torch.float64)]

        def check(found):
            assert same(found, case.expected(dtype))

        yield Call("search", numbers, case.inputs(dtype), outputs, check)
