# SPDX-License-Identifier: Apache-2.0
"""The GPU kernel of heatmaps_to_keypoints, executed by the emulator and compared with plain PyTorch, bit for bit."""

from helpers.emulated_battery import TYPES, Call, EmulatedBattery, runs
from helpers.keypoint_heatmaps import CASES, same


class TestHeatmapsToKeypoints(EmulatedBattery):
    cases, kernels = CASES, ("heatmaps_to_keypoints_kernel", "write_keypoints_kernel")
    cpp = runs(CASES, types=("float64", "float32"))
    triton = runs(CASES)
    every_kernel = runs(["no_numbers"], types=TYPES)

    def calls(self, case, dtype, layouts):
        def check(found):
            assert same(tuple(found), case.expected(dtype))

        yield Call("heatmaps_to_keypoints", case.inputs(dtype), check)
