# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_emulator: what each opcode computes, and a planted fault for each check."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import gpu_emulator
from gpu_emulator import Allocation

pytestmark = pytest.mark.skipif(gpu_emulator.compiler() is None, reason="no g++ to build the emulator with")

EDGES = [
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    64,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0xFFFFFFFE,
    0x00800000,
    0x007FFFFF,
    0x3F800000,
]


def test_integer_addition_carries():
    a = np.array([(x, y) for x in EDGES for y in EDGES], dtype=np.uint32)
    out = np.zeros((len(a), 2), dtype=np.uint32)
    text = "\tFunction : add\n" + "".join(f"/*{16 * k:04x}*/ {line} ;\n" for k, line in enumerate([
        "S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", "IMAD.WIDE R2, R0, 0x8, R2", "LDG.E.64 R4, desc[UR4][R2.64]",
        "IADD3 R6, P0, R4, R5, RZ", "IADD3.X R7, RZ, RZ, RZ, P0, !PT", "LDC.64 R2, c[0x0][0x218]",
        "IMAD.WIDE R2, R0, 0x8, R2", "STG.E.64 desc[UR4][R2.64], R6", "EXIT",
    ]))  # fmt: skip
    parameters = np.array([a.ctypes.data, out.ctypes.data], dtype=np.uint64).tobytes()
    memory = [
        Allocation(a.ctypes.data, a.nbytes, name="a"),
        Allocation(out.ctypes.data, out.nbytes, False, True, "out"),
    ]
    counters = gpu_emulator.launch(text, "add", 1, len(a), parameters, memory)
    expected = a[:, 0].astype(np.uint64) + a[:, 1]
    assert (out.view(np.uint64)[:, 0] == expected).all()
    assert counters["unwritten_bytes"] == {"out": 0}
    assert counters["by_opcode"]["IADD3"] == 2 * -(-len(a) // 32)
