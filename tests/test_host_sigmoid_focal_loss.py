# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the focal loss, run on the CPU and compared with float64."""

import struct
from dataclasses import replace

import torch
from helpers.focal_losses import ALPHA, CASES, accumulated, check
from host_kernels import run
from host_kernels.battery import TYPES, Call, HostBattery, runs

from fpn_fast.ops._schemas import FOCAL_TILE

UNALIGNED = replace(CASES["tiles_and_a_rest"])


class TestSigmoidFocalLoss(HostBattery):
    program, cases = "sigmoid_focal_loss_main", {**CASES, "element_by_element": UNALIGNED}
    right = (*runs(CASES, types=TYPES), "element_by_element")
    # A thread of the host for each of the kernel's: the smaller cases.
    addresses = ("one_tile", "two_classes", "odd", "large_logits")
    races, alone = ("one_tile",), ("tiles_and_a_rest",)

    def calls(self, case, dtype, layouts):
        (bits,) = struct.unpack("q", struct.pack("d", ALPHA))
        numbers = [run.DTYPES[dtype], bits, int(case is not UNALIGNED)]
        inputs = case.inputs(dtype)
        logits = inputs[0]
        parts = torch.full((-(-logits.numel() // FOCAL_TILE),), float("nan"), dtype=accumulated(dtype))
        gradient = torch.full_like(logits, float("nan"))
        sums = []

        def check_both(found):
            check(found[1], found[0], inputs)
            sums.append(found[1])

        def check_sums(found):
            assert torch.equal(found[0], sums.pop())

        yield Call("gradient", numbers, inputs, [gradient, parts], check_both)
        # Sums alone are the same, and no gradient is written.
        yield Call("sums", numbers, [*inputs, gradient], [parts], check_sums)
