# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of mask pasting, executed by the emulator and compared with plain PyTorch, bit for bit."""

import torch
from helpers.emulated_battery import TYPES, Call, EmulatedBattery, runs
from helpers.mask_pasting import CASES


class TestPasteMasks(EmulatedBattery):
    cases, kernels = CASES, ("paste_masks_kernel",)
    cpp = runs(CASES, types=TYPES)
    triton = (
        *runs(("inside_and_across", "bool", "empty", "boxes_in_double", "one_pixel_masks", "one_pixel_images")),
        "bool/channels_first/bfloat16",
    )
    every_kernel = runs(("one_pixel_masks", "narrow_images"), types=TYPES)

    def calls(self, case, dtype, layouts):
        def check(found):
            assert torch.equal(found[0], case.expected(dtype))

        yield Call("paste_masks", [*case.inputs(dtype), *case.image, case.padding, case.threshold], check)
