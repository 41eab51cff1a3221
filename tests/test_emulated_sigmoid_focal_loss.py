# SPDX-License-Identifier: Apache-2.0
"""The GPU kernel of the focal loss, executed by the emulator and compared with float64."""

import torch
from helpers.emulated_battery import TYPES, Call, EmulatedBattery, runs
from helpers.focal_losses import ALPHA, CASES, check
from helpers.layouts import Layout, place


class TestSigmoidFocalLoss(EmulatedBattery):
    cases, kernels = CASES, ("sigmoid_focal_loss_kernel",)
    cpp = (*runs(CASES, types=TYPES), "odd/channels_first-misaligned")
    # Not in float32: Triton's exponential is approximate, and its error grows with the logit.
    triton = ("tiles_and_a_rest/channels_first/bfloat16", "odd/channels_first/bfloat16")
    every_kernel = runs(["odd"], types=TYPES)

    def calls(self, case, dtype, layouts):
        inputs, sums = case.inputs(dtype), []
        if layouts[0].offset:
            # The kernel goes element by element.
            inputs[0] = place(inputs[0][None, None], Layout("nchw", offset=1))[0, 0]

        def check_both(found):
            check(*found, inputs)
            sums.append(found[0])

        def check_sums(found):
            assert torch.equal(found[0], sums.pop())

        yield Call("sigmoid_focal_loss", [*inputs, ALPHA, True], check_both)
        # Sums alone are the same.
        yield Call("sigmoid_focal_loss", [*inputs, ALPHA, False], check_sums)
