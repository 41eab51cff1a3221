# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of mask pasting, run on the CPU and compared with plain PyTorch, bit for bit."""

import struct

import torch
from helpers.mask_pasting import CASES
from host_kernels import run
from host_kernels.battery import TYPES, Call, HostBattery, runs


class TestPasteMasks(HostBattery):
    program, cases, right = "paste_masks_main", CASES, runs(CASES, types=TYPES)
    addresses = ("inside_and_across", "bool", "empty_values", "narrow_images")
    races, alone = ("bool",), ("inside_and_across", "bool")

    def calls(self, case, dtype, layouts):
        (bits,) = struct.unpack("q", struct.pack("d", case.threshold or 0.0))
        numbers = [run.DTYPES[dtype], int(case.box_type == torch.float64), case.padding, bits]
        expected = case.expected(dtype)
        expected = expected.to(torch.uint8) if expected.dtype == torch.bool else expected
        # Every byte 0xFF.
        output = torch.full((expected.numel() * expected.itemsize,), 0xFF, dtype=torch.uint8)

        def check(found):
            assert torch.equal(found[0], expected)

        kernel = "values" if case.threshold is None else "above"
        yield Call(kernel, numbers, case.inputs(dtype), [output.view(expected.dtype).view(expected.shape)], check)
