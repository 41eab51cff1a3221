# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_emulator: what each opcode computes on edge values, and a planted fault for each check."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import cuda_toolkit, emulated_gpu

from tools import gpu_emulator
from tools.gpu_emulator import Allocation
from tools.gpu_emulator.host import code

pytestmark = pytest.mark.skipif(gpu_emulator.compiler() is None, reason="no g++ to build the emulator with")

U32, I32, U64, I64, F32, F64 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64
#: Integers, floats and pairs of halves at which something changes: zeros, ends, NaN, infinities, subnormals, ties.
EDGES = [
    *range(0, 5), *range(30, 35), 63, 64, 0x80, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF,
    0x7FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
    0x3F000000, 0x3FC00000, 0x40200000, 0xBF000000, 0xC0200000, 0x3EFFFFFF, 0x4B000000, 0x4B800001, 0x4EFFFFFF,
    0x4F000000, 0xCF000000, 0xCF000001, 0x4F800000, 0x5F000000, 0xDF000000, 0x3F801000, 0x3F803000, 0x477FEFFF,
    0x477FF000, 0x3F808000, 0x3F818000, 0x33800000, 0x3C003C00, 0x7BFF0001, 0x7C00FC00, 0x7E007F80, 0x3F803F81,
    0x40490FDB, 0x3FF00000, 0x43300000, 0x47EFFFFF, 0x36900000,
]  # fmt: skip


def canonical(x):
    """The bits of float32, with NVIDIA's NaN."""
    x = np.asarray(x, dtype=F32)
    return np.where(np.isnan(x), U32(0x7FFFFFFF), x.view(U32))


def rounded(value: Fraction, digits: int, least: int, mode: str = "RN") -> Fraction:
    """To `digits` binary digits, none of less weight than 2^least."""
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value.numerator)) - math.log2(value.denominator))
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    scaled = value / unit
    to_integer = {"RN": round, "RM": math.floor, "RP": math.ceil, "RZ": math.trunc}[mode]
    return to_integer(scaled) * unit


def exact_fma(a, b, c, digits=24, least=-149, mode="RN"):
    """a * b + c of float64 arrays, rounded once, in float64; what is not finite is the host's."""
    with np.errstate(all="ignore"):
        out = a * b + c
    largest = (
        float(Fraction(2) ** (2 - least - digits) * (2 - Fraction(1, 2 ** (digits - 1)))) if digits < 53 else math.inf
    )
    for k in range(len(out)):
        if not all(map(math.isfinite, (a[k], b[k], c[k]))):
            if math.isinf(c[k]) and math.isfinite(a[k]) and math.isfinite(b[k]):
                out[k] = c[k]
            continue
        exact = Fraction(a[k]) * Fraction(b[k]) + Fraction(c[k])
        if exact == 0:
            zeros_of_one_sign = a[k] * b[k] == 0 and math.copysign(1, c[k]) == math.copysign(1, a[k]) * math.copysign(
                1, b[k]
            )
            out[k] = math.copysign(0.0, c[k]) if zeros_of_one_sign else -0.0 if mode == "RM" else 0.0
            continue
        nearest = rounded(exact, digits, least, mode)
        if abs(nearest) > Fraction(largest if math.isfinite(largest) else sys.float_info.max):
            largest = min(largest, sys.float_info.max)
            inward = mode == "RZ" or (mode == "RM" and exact > 0) or (mode == "RP" and exact < 0)
            out[k] = (largest if inward else math.inf) * (1 if exact > 0 else -1)
        else:
            out[k] = math.copysign(float(nearest), exact)
    return out


def ffma(x, b=None, c=None, mode="RN"):
    b, c = x.fb if b is None else b, x.fc if c is None else c
    return canonical(exact_fma(x.fa.astype(F64), b.astype(F64), c.astype(F64), mode=mode))


def doubles(value):
    """NaN of any kind counts as one: NVIDIA does not say which."""
    return np.where(np.isnan(value), U64(0x7FF8000000000000), value.view(U64))


def half(bits, upper=False):
    return ((bits >> U32(16 if upper else 0)) & U32(0xFFFF)).astype(np.uint16).view(np.float16).astype(F64)


def bfloat16(bits, upper=False):
    return (bits & U32(0xFFFF0000) if upper else bits << U32(16)).view(F32).astype(F64)


def to_half(x):
    with np.errstate(all="ignore"):
        return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x, F32).astype(np.float16).view(np.uint16)).astype(
            U32
        )


def to_bfloat16(x):
    bits = np.asarray(x, F32).view(U32).astype(U64)
    return np.where(np.isnan(x), U64(0x7FFF), (bits + U64(0x7FFF) + (bits >> U64(16) & U64(1))) >> U64(16)).astype(U32)


def packed(function, read, write, *sources):
    return [write(function(*(read(s, upper) for s in sources))) for upper in (True, False)]


def join(halves):
    return halves[0] << U32(16) | halves[1]


def flush(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(F32(0), x), x)


def to_integer(x, bits, signed, nan=None):
    """Clamped, of integral float64 values."""
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    special = {True: nan if nan is not None else (0 if bits == 32 else 2 ** (bits - 1))}
    values = [
        special[True]
        if math.isnan(v)
        else max(least, min(most, int(v) if math.isfinite(v) else int(math.copysign(2**70, v))))
        for v in x
    ]
    return np.array([v % 2**bits for v in values], dtype=U32 if bits == 32 else U64)


def shifted(x, by, left, upper, signed, limit):
    out = []
    for low, high, amount in zip(x.a.tolist(), x.c.tolist(), by.tolist(), strict=True):
        value = high << 32 | low
        if signed and high >> 31:
            value -= 2**64
        amount = min(amount, limit)
        value = (value << amount if left else value >> amount) % 2**64
        out.append(value >> 32 if upper else value % 2**32)
    return np.array(out, dtype=U32)


def bytes_of(x, selector):
    out = np.zeros_like(x.a)
    source = x.c.astype(U64) << U64(32) | x.a
    for k in range(4):
        pick = (selector >> U32(4 * k)) & U32(15)
        byte = (source >> (U64(8) * (pick & U32(7)).astype(U64))).astype(U32) & U32(255)
        out |= np.where(pick & U32(8), np.where(byte & U32(128), U32(255), U32(0)), byte) << U32(8 * k)
    return out


def each(function, *arrays, dtype=U32):
    return np.array([function(*map(int, values)) for values in zip(*arrays, strict=True)], dtype=dtype)


def carry(x, *terms):
    """The sum of uint32 arrays and the predicate that it is over 2^32, and over 2 * 2^32."""
    total = sum(term.astype(U64) for term in terms)
    return total.astype(U32), total >> U64(32) >= 1, total >> U64(32) >= 2


def compare(name, a, b):
    ordered = {"EQ": a == b, "NE": (a != b), "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b}
    unordered = (a != a) | (b != b)
    if name in ("NAN", "NUM"):
        return unordered if name == "NAN" else ~unordered
    result = ordered[name[:2]]
    return result | unordered if name.endswith("U") else result & ~unordered


def less(a, b):
    """As minima have it: -0 is less than 0."""
    return (a < b) | ((a == b) & np.signbit(a) & ~np.signbit(b))


def minimum(x, least, propagate=False):
    first = np.where(less(x.fa, x.fb) == least, x.fa, x.fb)
    one = np.where(np.isnan(x.fa), x.fb, np.where(np.isnan(x.fb), x.fa, first))
    return canonical(np.where(np.isnan(x.fa) | np.isnan(x.fb), F32("nan"), one) if propagate else one)


def match(x, width):
    """Of each lane, those with the same value."""
    values = (x.a if width == 32 else x.la).reshape(-1, 32)
    return (
        ((values[:, :, None] == values[:, None, :]) * (U64(1) << np.arange(32, dtype=U64))).sum(2).astype(U32).ravel()
    )


def lanes(x):
    return x.a.reshape(-1, 32)


def every(values):
    return np.repeat(np.asarray(values, dtype=U32), 32)


def ballot(truth):
    return every((truth.reshape(-1, 32) * (U64(1) << np.arange(32, dtype=U64))).sum(1))


INTEGER = [
    ("MOV R12, R4", lambda x: x.a),
    ("IADD3 R12, R4, R6, -R8", lambda x: x.a + x.b - x.c),
    ("IADD3 R12, P1, P2, R4, R6, R8", lambda x: carry(x, x.a, x.b, x.c)),
    ("IADD3 R12, P1, RZ, -R4, RZ", lambda x: (-x.a, x.a == 0)),
    ("IADD3.X R12, P1, R4, ~R6, RZ, P0, !PT", lambda x: carry(x, x.a, ~x.b, x.p)[:2]),
    ("VIADD R12, R4, -0x2", lambda x: x.a - U32(2)),
    ("VIADD.16x2 R12, R4, R6", lambda x: (x.a.view(np.uint16) + x.b.view(np.uint16)).view(U32)),
    ("IABS R12, R4", lambda x: np.where(x.a >> 31, -x.a, x.a)),
    ("IMAD R12, R4, R6, R8", lambda x: x.a * x.b + x.c),
    ("IMAD.IADD R12, R4, 0x1, -R6", lambda x: x.a - x.b),
    ("IMAD.X R12, R4, 0x1, ~R6, P0", lambda x: x.a + ~x.b + x.p),
    ("IMAD.WIDE R12, R4, R6, R8", lambda x: (x.ia.astype(I64) * x.ib).view(U64) + x.lc),
    (
        "IMAD.WIDE.U32 R12, P1, R4, R6, R8",
        lambda x: (x.a.astype(U64) * x.b + x.lc, x.a.astype(U64) * x.b + x.lc < x.lc),
    ),
    ("IMAD.WIDE.U32.X R12, R4, R6, R8, P0", lambda x: x.a.astype(U64) * x.b + x.lc + x.p),
    ("IMAD.HI R12, R4, R6, RZ", lambda x: ((x.ia.astype(I64) * x.ib).view(U64) >> U64(32)).astype(U32)),
    ("IMAD.HI.U32 R12, R4, R6, R8", lambda x: ((x.a.astype(U64) * x.b + x.lc) >> U64(32)).astype(U32)),
    ("LEA R12, P1, R4, R6, 0x3", lambda x: carry(x, x.a << U32(3), x.b)[:2]),
    ("LEA R12, P1, R4, -R6, 0x3", lambda x: carry(x, x.a << U32(3), ~x.b, U32(1))[:2]),
    ("LEA.X R12, R4, R6, 0x14, P0", lambda x: (x.a << U32(20)) + x.b + x.p),
    ("LEA.HI R12, P1, R4, R6, RZ, 0x6", lambda x: carry(x, x.a >> U32(26), x.b)[:2]),
    ("LEA.HI.X R12, R4, R6, R8, 0x2, P0", lambda x: (x.c << U32(2) | x.a >> U32(30)) + x.b + x.p),
    ("LEA.HI.SX32 R12, R4, R6, 0x1e", lambda x: (x.ia >> I32(2)).view(U32) + x.b),
    ("LEA.HI.X.SX32 R12, R4, R6, 0x1, P0", lambda x: (x.ia >> I32(31)).view(U32) + x.b + x.p),
    ("LOP3.LUT R12, R4, R6, R8, 0x96, !PT", lambda x: x.a ^ x.b ^ x.c),
    ("LOP3.LUT R12, R4, R6, R8, 0xe2, !PT", lambda x: (x.a & x.b) | (x.c & ~x.b)),
    ("LOP3.LUT P1, R12, R4, R6, RZ, 0xc0, P0", lambda x: (x.a & x.b, (x.a & x.b != 0) | x.p)),
    ("LOP3.LUT P1, RZ, R4, R6, RZ, 0xfc, !PT", lambda x: x.a | x.b != 0),
    ("PLOP3.LUT P1, P2, P0, PT, PT, 0x8, 0x80", lambda x: (~x.p, x.p)),
    ("PRMT R12, R4, 0x5410, R8", lambda x: bytes_of(x, np.full_like(x.a, 0x5410))),
    ("PRMT R12, R4, R6, R8", lambda x: bytes_of(x, x.b)),
    ("SHF.L.U32 R12, R4, R6, RZ", lambda x: shifted(x, x.b, True, False, False, 32)),
    ("SHF.L.U64.HI R12, R4, R6, R8", lambda x: shifted(x, x.b, True, True, False, 64)),
    ("SHF.L.W.U32.HI R12, R4, R6, R8", lambda x: shifted(x, x.b % 32, True, True, False, 32)),
    ("SHF.R.U32.HI R12, RZ, R6, R8", lambda x: shifted(x, x.b, False, True, False, 32)),
    ("SHF.R.S32.HI R12, RZ, R6, R8", lambda x: shifted(x, x.b, False, True, True, 32)),
    ("SHF.R.U64 R12, R4, R6, R8", lambda x: shifted(x, x.b, False, False, False, 64)),
    ("SHF.R.S64 R12, R4, R6, R8", lambda x: shifted(x, x.b, False, False, True, 64)),
    ("SGXT.U32 R12, R4, 0x3", lambda x: x.a & U32(7)),
    ("SGXT R12, R4, 0x8", lambda x: x.a.astype(np.int8).astype(I32).view(U32)),
    ("POPC R12, R4", lambda x: each(int.bit_count, x.a)),
    ("BREV R12, R4", lambda x: each(lambda a: int(f"{a:032b}"[::-1], 2), x.a)),
    ("FLO.U32 R12, R4", lambda x: each(lambda a: (a.bit_length() - 1) % 2**32, x.a)),
    ("FLO.U32.SH R12, R4", lambda x: each(lambda a: 32 - a.bit_length() if a else 2**32 - 1, x.a)),
    ("SEL R12, R4, R6, !P0", lambda x: np.where(x.p, x.b, x.a)),
    ("VIMNMX R12, R4, R6, P0", lambda x: np.where(x.p, np.minimum(x.ia, x.ib), np.maximum(x.ia, x.ib)).view(U32)),
    ("VIMNMX.U32 R12, R4, R6, PT", lambda x: np.minimum(x.a, x.b)),
    ("VIMNMX3 R12, R4, R6, R8, !PT", lambda x: np.maximum(np.maximum(x.ia, x.ib), x.ic).view(U32)),
    ("VIADDMNMX R12, R4, R6, R8, PT", lambda x: np.minimum(x.ia + x.ib, x.ic).view(U32)),
    ("VIADDMNMX.U32 R12, R4, R6, R8, !PT", lambda x: np.maximum(x.a + x.b, x.c)),
    ("CS2R R12, SRZ", lambda x: np.zeros_like(x.la)),
    ("S2R R12, SR_LANEID", lambda x: np.arange(len(x.a), dtype=U32) % 32),
    ("S2R R12, SR_LTMASK", lambda x: (U32(1) << np.arange(len(x.a), dtype=U32) % 32) - U32(1)),
    ("P2R R12, PR, R4, 0x3", lambda x: (x.a & ~U32(3)) | x.p.astype(U32)),
    *(
        (
            f"ISETP.{name}.AND P1, P2, R4, R6, P0",
            lambda x, name=name: (compare(name, x.ia, x.ib) & x.p, ~compare(name, x.ia, x.ib) & x.p),
        )
        for name in ("EQ", "NE", "LT", "LE", "GT", "GE")
    ),
    ("ISETP.GT.U32.OR P1, PT, R4, R6, P0", lambda x: (x.a > x.b) | x.p),
    ("ISETP.LT.XOR P1, PT, R4, R6, P0", lambda x: (x.ia < x.ib) ^ x.p),
    *(
        (
            f"ISETP.{name}.U32.AND P1, PT, R4, R6, PT; ISETP.{name}{kind}.AND.EX P1, PT, R5, R7, PT, P1",
            lambda x, name=name, view=view: compare(name, x.la.view(view), x.lb.view(view)),
        )
        for name in ("EQ", "NE", "LT", "LE", "GT", "GE")
        for kind, view in (("", I64), (".U32", U64))
    ),
    ("R2UR UR4, R4; MOV R12, UR4", lambda x: every(lanes(x)[:, 0])),
    ("SHFL.IDX P1, R12, R4, 0x5, 0x1f", lambda x: (every(lanes(x)[:, 5]), x.a == x.a)),
    ("SHFL.BFLY PT, R12, R4, 0x3, 0x1f", lambda x: lanes(x)[:, np.arange(32) ^ 3].ravel()),
    (
        "SHFL.UP P1, R12, R4, 0x4, RZ",
        lambda x: (lanes(x)[:, [*range(4), *range(28)]].ravel(), np.arange(len(x.a)) % 32 >= 4),
    ),
    (
        "SHFL.DOWN P1, R12, R4, 0x4, 0x1f",
        lambda x: (lanes(x)[:, [*range(4, 32), *range(28, 32)]].ravel(), np.arange(len(x.a)) % 32 < 28),
    ),
    ("VOTE.ANY R12, P1, P0", lambda x: (ballot(x.p), ballot(x.p) != 0)),
    ("VOTE.ALL P1, !P0", lambda x: ballot(x.p) == 0),
    ("VOTEU.ANY UR4, UP1, P0; MOV R12, UR4", lambda x: ballot(x.p)),
    ("MATCH.ANY R12, R4", lambda x: match(x, 32)),
    ("MATCH.ANY.U64 R12, R4", lambda x: match(x, 64)),
    (
        "MATCH.ALL P1, R12, R4",
        lambda x: (np.where(match(x, 32) == 2**32 - 1, U32(2**32 - 1), U32(0)), match(x, 32) == 2**32 - 1),
    ),
    ("REDUX.SUM.S32 UR4, R4; MOV R12, UR4", lambda x: every(lanes(x).astype(U64).sum(1) % 2**32)),
    ("REDUX.MAX.S32 UR4, R4; MOV R12, UR4", lambda x: every(lanes(x).view(I32).max(1).view(U32))),
    ("REDUX.MIN UR4, R4; MOV R12, UR4", lambda x: every(lanes(x).min(1))),
    ("REDUX.OR UR4, R4; MOV R12, UR4", lambda x: every(np.bitwise_or.reduce(lanes(x), 1))),
    (
        "UIADD3 UR6, UP1, UR4, 0x7fffffff, URZ; UIADD3.X UR7, URZ, UR5, URZ, UP1, !UPT; MOV R12, UR6; MOV R13, UR7",
        lambda x: every_pair(x.lu + U64(0x7FFFFFFF)),
    ),
    (
        "USHF.L.U32 UR6, UR4, 0x4, URZ; UISETP.GT.AND UP1, UPT, UR6, UR5, UPT; USEL UR6, UR4, UR5, UP1; MOV R12, UR6",
        lambda x: every(
            np.where(
                (x.lu.astype(U32) << U32(4)).view(I32) > (x.lu >> U64(32)).astype(U32).view(I32),
                x.lu.astype(U32),
                (x.lu >> U64(32)).astype(U32),
            )
        ),
    ),
]


def every_pair(values):
    return np.repeat(values, 32)


def half_add(x, read, write, digits, least):
    return join(
        [write(exact_fma(read(x.a, up), np.ones(len(x.a)), read(x.b, up), digits, least)) for up in (True, False)]
    )


def half_fma(x, read, write, digits, least):
    return join([write(exact_fma(read(x.a, up), read(x.b, up), read(x.c, up), digits, least)) for up in (True, False)])


def bits_of_f64(x):
    return np.asarray(x, F64).view(U64)


COMPARISONS = ("EQ", "NE", "LT", "LE", "GT", "GE", "EQU", "NEU", "LTU", "LEU", "GTU", "GEU", "NAN", "NUM")
ROUND = {"": np.rint, ".FLOOR": np.floor, ".CEIL": np.ceil, ".TRUNC": np.trunc}


def last_place(y):
    return np.exp2(np.floor(np.log2(np.abs(y))) - 23)


#: MUFU's functions, and by how much each may be off, as the PTX ISA 9.1 has it of their .approx forms.
APPROXIMATIONS = {
    "RCP": (lambda v: 1 / v, lambda v, y: last_place(y)),
    "RSQ": (lambda v: 1 / np.sqrt(v), lambda v, y: 2.0**-22.9 * np.abs(y)),
    "SQRT": (np.sqrt, lambda v, y: 2.0**-23 * np.abs(y)),
    "EX2": (np.exp2, lambda v, y: 2 * last_place(y)),
    "LG2": (np.log2, lambda v, y: 2.0**-22 * np.where((v > 0.5) & (v < 2), 1, np.abs(y))),
    "SIN": (lambda v: np.sin(2 * np.pi * v), lambda v, y: np.full_like(y, 2.0**-20.5)),
    "COS": (lambda v: np.cos(2 * np.pi * v), lambda v, y: np.full_like(y, 2.0**-20.5)),
    "TANH": (np.tanh, lambda v, y: 2.0**-11 * np.abs(y)),
}


FLOATING = [
    ("FADD R12, R4, -R6", lambda x: ffma(x, np.ones_like(x.fa), -x.fb)),
    ("FADD.FTZ R12, |R4|, R6", lambda x: canonical(flush(flush(np.abs(x.fa)) + flush(x.fb)))),
    ("FADD R12, R4, 0.5", lambda x: ffma(x, np.ones_like(x.fa), np.full_like(x.fa, 0.5))),
    ("FADD R12, R4, -INF ", lambda x: canonical(x.fa - F32("inf"))),
    ("FMUL R12, R4, R6", lambda x: canonical(x.fa * x.fb)),
    *(
        (f"FFMA{mode} R12, R4, R6, R8", lambda x, mode=mode: ffma(x, mode=mode[1:] or "RN"))
        for mode in ("", ".RM", ".RP", ".RZ")
    ),
    ("FMNMX R12, R4, R6, PT", lambda x: minimum(x, True)),
    ("FMNMX R12, R4, R6, !PT", lambda x: minimum(x, False)),
    ("FMNMX.NAN R12, R4, R6, !PT", lambda x: minimum(x, False, True)),
    ("FSEL R12, R4, -R6, P0", lambda x: np.where(x.p, x.a, x.b ^ U32(2**31))),
    *(
        (
            f"FSETP.{name}.AND P1, P2, R4, |R6|, P0",
            lambda x, name=name: (compare(name, x.fa, np.abs(x.fb)) & x.p, ~compare(name, x.fa, np.abs(x.fb)) & x.p),
        )
        for name in COMPARISONS
    ),
    ("FSETP.NEU.FTZ.AND P1, PT, R4, RZ, PT", lambda x: flush(x.fa) != 0),
    ("FSET.BF.LTU.AND R12, R4, R6, P0", lambda x: (compare("LTU", x.fa, x.fb) & x.p).astype(F32).view(U32)),
    ("FSET.GE.FTZ.OR R12, R4, R6, !P0", lambda x: -(compare("GE", flush(x.fa), flush(x.fb)) | ~x.p).astype(U32)),
    *(
        (f"DSETP.{name}.OR P1, PT, R4, R6, P0", lambda x, name=name: compare(name, x.da, x.db) | x.p)
        for name in COMPARISONS
    ),
    (
        "DSETP.MAX.AND P1, P2, R4, R6, PT",
        lambda x: (~np.isnan(x.da) & (np.isnan(x.db) | less(x.db, x.da)), np.isnan(x.da) & np.isnan(x.db)),
    ),
    (
        "DSETP.MIN.AND P1, P2, R4, R6, PT",
        lambda x: (~np.isnan(x.da) & (np.isnan(x.db) | less(x.da, x.db)), np.isnan(x.da) & np.isnan(x.db)),
    ),
    ("DADD R12, R4, -R6", lambda x: doubles(x.da - x.db)),
    ("DADD R12, R4, 1.5", lambda x: doubles(x.da + 1.5)),
    ("DMUL R12, R4, R6", lambda x: doubles(x.da * x.db)),
    *(
        (
            f"DFMA{mode} R12, R4, R6, R8",
            lambda x, mode=mode: doubles(exact_fma(x.da, x.db, x.dc, 53, -1074, mode[1:] or "RN")),
        )
        for mode in ("", ".RM", ".RP")
    ),
    *(
        (
            f"F2I{kind}{mode}.NTZ R12, R4",
            lambda x, kind=kind, mode=mode: to_integer(
                ROUND[mode](flush(x.fa) if "FTZ" in kind else x.fa), 32, "U32" not in kind
            ),
        )
        for kind in ("", ".FTZ.U32", ".FTZ")
        for mode in ROUND
    ),
    ("F2I.S64.TRUNC R12, R4", lambda x: to_integer(np.trunc(x.fa), 64, True)),
    ("F2I.U64.TRUNC R12, R4", lambda x: to_integer(np.trunc(x.fa), 64, False)),
    ("F2I.F64.TRUNC R12, R4", lambda x: to_integer(np.trunc(x.da), 32, True, 2**31)),
    ("F2I.F64.CEIL R12, R4", lambda x: to_integer(np.ceil(x.da), 32, True, 2**31)),
    ("F2I.S64.F64.TRUNC R12, R4", lambda x: to_integer(np.trunc(x.da), 64, True)),
    ("I2F.U32.RP R12, R4", lambda x: each(lambda a: F32(float(rounded(Fraction(a), 24, -149, "RP"))).view(U32), x.a)),
    ("I2F.RP R12, R4", lambda x: each(lambda a: F32(float(rounded(Fraction(a), 24, -149, "RP"))).view(U32), x.ia)),
    ("I2F.S64 R12, R4", lambda x: each(lambda a: F32(float(rounded(Fraction(a), 24, -149))).view(U32), x.la.view(I64))),
    ("I2F.U64.RP R12, R4", lambda x: each(lambda a: F32(float(rounded(Fraction(a), 24, -149, "RP"))).view(U32), x.la)),
    ("I2F.U16 R12, R4.H1", lambda x: (x.a >> U32(16)).astype(F32).view(U32)),
    ("I2F.F64 R12, R4", lambda x: bits_of_f64(x.ia)),
    ("I2F.F64.S64 R12, R4", lambda x: bits_of_f64(x.la.view(I64))),
    ("I2F.F64.U32 R12, R4", lambda x: bits_of_f64(x.a)),
    ("I2FP.F32.S32 R12, R4", lambda x: x.ia.astype(F32).view(U32)),
    ("I2FP.F32.U32 R12, R4", lambda x: x.a.astype(F32).view(U32)),
    ("F2F.F32.F64 R12, R4", lambda x: canonical(x.da.astype(F32))),
    ("F2F.F64.F32 R12, -R4", lambda x: doubles(-x.fa.astype(F64))),
    ("F2F.BF16.F32 R12, R4", lambda x: to_bfloat16(x.fa)),
    ("F2FP.BF16.F32.PACK_AB R12, R4, R6", lambda x: to_bfloat16(x.fa) << U32(16) | to_bfloat16(x.fb)),
    ("F2FP.F16.F32.PACK_AB R12, R4, R6", lambda x: to_half(x.fa) << U32(16) | to_half(x.fb)),
    ("FRND.FLOOR R12, R4", lambda x: canonical(np.floor(x.fa))),
    ("FRND.FTZ.FLOOR R12, R4", lambda x: canonical(np.floor(flush(x.fa)))),
    ("FRND.F64.FLOOR R12, R4", lambda x: doubles(np.floor(x.da))),
    ("HADD2.F32 R12, -RZ, R4.H1_H1", lambda x: canonical(half(x.a, True).astype(F32))),
    ("HADD2.BF16_V2 R12, R4, R6", lambda x: half_add(x, bfloat16, to_bfloat16, 8, -133)),
    ("HFMA2.MMA R12, R4, R6, R8", lambda x: half_fma(x, half, to_half, 11, -24)),
    ("HFMA2.MMA.BF16_V2 R12, R4, R6, R8", lambda x: half_fma(x, bfloat16, to_bfloat16, 8, -133)),
    ("HFMA2.MMA.BF16_V2 R12, R4, 1, 1, R6", lambda x: half_add(x, bfloat16, to_bfloat16, 8, -133)),
    ("HFMA2.MMA R12, -RZ, RZ, 1.875, 2", lambda x: np.full_like(x.a, 0x3F804000)),
    ("HMUL2.BF16_V2 R12, R4, R6", lambda x: join(packed(lambda a, b: a * b, bfloat16, to_bfloat16, x.a, x.b))),
    *(
        (
            f"HSETP2.BF16_V2.{name}.AND P1, P2, R4, R6.H0_H0, P0",
            lambda x, name=name: tuple(compare(name, bfloat16(x.a, up), bfloat16(x.b)) & x.p for up in (False, True)),
        )
        for name in ("GTU", "LE", "NEU")
    ),
    *(
        (f"MUFU.{name} R12, R4", lambda x, f=f: canonical(flush(f(flush(x.fa).astype(F64)).astype(F32))))
        for name, (f, _) in APPROXIMATIONS.items()
    ),
]


def fragments(x):
    """The word `lane % 4` of row `lane / 4` of two matrices of which each lane stored a row."""
    lane, rows = np.arange(32), x.words[:, :4].reshape(-1, 32, 4)
    low, high = (rows[:, 8 * m + lane // 4, lane % 4].ravel().astype(U64) for m in range(2))
    return high << U64(32) | low


def gathered(x):
    """The first two words of row `lane` of four matrices of which each lane held such words."""
    lane, rows = np.arange(32), x.words[:, :4].reshape(-1, 32, 4)
    low, high = (rows[:, lane % 8 * 4 + word, lane // 8].ravel().astype(U64) for word in range(2))
    return high << U64(32) | low


def of_block(values):
    return np.repeat(values.reshape(-1, 256).sum(1), 256).astype(U32)


#: A thread's own 16 bytes of shared memory.
OWN = "S2R R1, SR_TID.X; IMAD.SHL.U32 R1, R1, 0x10, RZ"
# {n} is the address of instruction n of a line.
DATA_AND_CONTROL = [
    ("MOV R1, 0x8; STL.64 [R1], R4; STL [R1+-0x8], R6; LDL.64 R12, [R1]", lambda x: x.la),
    (f"{OWN}; STS.128 [R1+0x400], R4; NOP; LDSM.16.M88.2 R12, [R1+0x400]", fragments),
    (f"{OWN}; STSM.16.M88.4 [R1+0x400], R4; NOP; LDS.64 R12, [R1+0x400]", gathered),
    (
        "STG.E desc[UR4][R2.64], R8; ATOMG.E.CAS.STRONG.GPU PT, R12, desc[UR4][R2.64], R4, R6; "
        "LDG.E R13, desc[UR4][R2.64]",
        lambda x: np.where(x.c == x.a, x.b, x.c).astype(U64) << U64(32) | x.c,
    ),
    # Lanes that break out meet the others at a barrier that these reach only if they do not wait for them.
    (
        "BSSY B0, {6}; MOV R12, 0x1; @!P0 BRA {5}; BREAK B0; BRA {7}; BSYNC B0; MOV R12, 0x2; WARPSYNC 0xffffffff",
        lambda x: np.where(x.p, U32(1), U32(2)),
    ),
    (
        "ISETP.GE.AND P1, PT, R4, RZ, PT; MOV R12, 0x1; @P0 EXIT P1",
        lambda x: np.where(x.p & (x.ia >= 0), U32(0), U32(1)),
    ),
    ("BAR.RED.POPC.DEFER_BLOCKING 0x0, P0; B2R.RESULT R12", lambda x: of_block(x.p)),
    ("BAR.RED.OR.DEFER_BLOCKING 0x0, P0; B2R.RESULT RZ, P1", lambda x: of_block(x.p) > 0),
    ("BAR.RED.AND.DEFER_BLOCKING 0x0, P0; B2R.RESULT RZ, P1", lambda x: of_block(x.p) == 256),
    ("BAR.RED.OR.DEFER_BLOCKING 0x0, !PT; B2R.RESULT RZ, P1", lambda x: x.p & False),
    ("BAR.RED.AND.DEFER_BLOCKING 0x0, PT; B2R.RESULT RZ, P1", lambda x: x.p | True),
]
STATEMENTS = INTEGER + FLOATING + DATA_AND_CONTROL

#: They move data or control, which kernels show and statements do not.
ELSEWHERE = {
    "ATOMS", "BRA", "CALL", "CCTL", "CGAERRBAR",
    "ENDCOLLECTIVE", "ERRBAR", "EXIT", "FCHK", "LDC", "MEMBAR", "NOP", "RED",
    "REDG", "RET", "YIELD", "S2UR",
}  # fmt: skip


def text_of(lines, kernel="kernel"):
    return f"\tFunction : {kernel}\n" + "".join(f"/*{16 * k:04x}*/ {line} ;\n" for k, line in enumerate(lines))


def arguments(*arrays):
    return b"".join(array.ctypes.data.to_bytes(8, "little") for array in arrays)


def execute(instructions, words, **options):
    """The registers R12 to R15 and the predicates P1 and P2 after `instructions` on R4 to R11 (P0: of R10)."""
    out = np.zeros((len(words), 8), dtype=U32)
    uniform = ["R2UR UR4, R4", "R2UR UR5, R5"]
    before = [
        "S2R R0, SR_CTAID.X", "S2R R1, SR_TID.X", "IMAD R0, R0, c[0x0][0x0], R1", "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE R2, R0, 0x20, R2", "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x10]",
        "LDC.64 R2, c[0x0][0x218]", "IMAD.WIDE R2, R0, 0x20, R2", "CS2R R12, SRZ", "CS2R R14, SRZ",
        "LOP3.LUT P0, RZ, R10, 0x1, RZ, 0xc0, !PT", "LOP3.LUT P1, RZ, RZ, RZ, RZ, 0xc0, !PT",
        "LOP3.LUT P2, RZ, RZ, RZ, RZ, 0xc0, !PT", *uniform,
    ]  # fmt: skip
    targets = (f"0x{16 * k:04x}" for k in range(len(before), len(before) + 16))
    after = ["SEL R14, RZ, 0x1, !P1", "SEL R15, RZ, 0x1, !P2", "STG.E.128 desc[UR4][R2.64], R12", "EXIT"]
    usage = " Function kernel:\n  REG:24 STACK:16 SHARED:4096 LOCAL:0 CONSTANT[0]:544\n"
    text = usage + text_of([*before, *instructions.format(*targets).split("; "), *after])
    memory = [Allocation(words.ctypes.data, words.nbytes), Allocation(out.ctypes.data, out.nbytes, True, True)]
    gpu_emulator.launch(text, "kernel", len(words) // 256, 256, arguments(words, out), memory, **options)
    return out


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, (512, 8), dtype=U32)
    chosen = random.random(words.shape) < 0.75
    words[chosen] = random.choice(np.array(EDGES, dtype=U32), chosen.sum())
    x = SimpleNamespace(words=words, p=words[:, 6] & 1 == 1)
    for k, name in enumerate("abc"):
        narrow, wide = words[:, 2 * k].copy(), np.ascontiguousarray(words[:, 2 * k : 2 * k + 2]).view(U64)[:, 0].copy()
        for prefix, value, kind in (
            ("", narrow, U32),
            ("i", narrow, I32),
            ("f", narrow, F32),
            ("l", wide, U64),
            ("d", wide, F64),
        ):
            setattr(x, prefix + name, value.view(kind))
    x.lu = x.la[::32]
    return words, x


@pytest.mark.parametrize(("instructions", "statement"), STATEMENTS, ids=[each for each, _ in STATEMENTS])
@np.errstate(all="ignore")
def test_opcode_equals_its_statement(instructions, statement, inputs):
    words, x = inputs
    out = execute(instructions, words)
    expected = statement(x)
    predicates = iter((out[:, 2] != 0, out[:, 3] != 0))
    for value in expected if isinstance(expected, tuple) else (expected,):
        if value.dtype == bool:
            found = next(predicates)
        else:
            found = out[:, 0] if value.dtype == U32 else np.ascontiguousarray(out[:, :2]).view(U64)[:, 0]
            found = doubles(found.view(F64)) if instructions.startswith(("D", "FRND.F64", "F2F.F64")) else found
        wrong = np.flatnonzero(found != value)[:3]
        assert not len(wrong), [(words[k, :7].tolist(), hex(found[k]), hex(value[k])) for k in wrong]


@pytest.mark.parametrize("name", APPROXIMATIONS)
@np.errstate(all="ignore")
def test_adversarial_approximation_is_off_by_its_error_at_most(name, inputs):
    """And nearly by that somewhere."""
    words, x = inputs
    function, largest = APPROXIMATIONS[name]
    v = flush(x.fa).astype(F64)
    exact = function(v)
    moved = [execute(f"MUFU.{name} R12, R4", words, mufu="adversarial", seed=s)[:, 0].view(F32) for s in (1, 2)]
    normal = np.isfinite(exact) & (np.abs(exact) > 2.0**-126) & (np.abs(exact) < 2.0**127)
    shares = [(np.abs(each - exact) / largest(v, exact))[normal].max() for each in moved]
    assert 0.75 < max(shares) <= 1
    assert (moved[0] != moved[1])[normal].any()


def test_every_opcode_has_a_statement():
    text = "; ".join(instructions for instructions, _ in STATEMENTS)
    named = {word.split()[0].split(".")[0] for word in text.split("; ")}
    assert set(gpu_emulator.opcodes()) - ELSEWHERE - named == set()


def test_every_kernel_of_the_library_is_known():
    for kernel in emulated_gpu.kernels():
        code.program(code.LIBRARY, kernel)


FAULTS = Path(__file__).parent / "helpers" / "planted_device_faults.cu"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    cubin = tmp_path_factory.mktemp("planted") / "planted.cubin"
    command = [cuda_toolkit.nvcc(), "-arch=sm_90", "-std=c++20", "-cubin", "-lineinfo", str(FAULTS), "-o", str(cubin)]
    subprocess.run(command, check=True, capture_output=True)
    cuda_toolkit.cuobjdump()
    return cubin


def launch_planted(cubin, kernel, out, blocks=1, initialised=True, writable=True, **options):
    memory = [Allocation(out.ctypes.data, out.nbytes, initialised, writable, "out")]
    return gpu_emulator.launch(cubin, kernel, blocks, 64, arguments(out), memory, **options)


@pytest.mark.parametrize("order", gpu_emulator.ORDERS)
@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [*((name, 1) for name in (
        "out_of_bounds", "misaligned", "read_only", "unwritten_memory", "unwritten_shared", "shared_race",
        "shared_race_in_a_warp", "shared_race_of_reads", "barrier", "warp_mask_of_a_shuffle")),
     ("block_conflict", 2)],
)  # fmt: skip
def test_planted_fault_is_found(planted, kernel, blocks, order):
    out = np.zeros(64, dtype=I32)
    state = {"initialised": kernel != "unwritten_memory", "writable": kernel != "read_only", "order": order}
    with pytest.raises(gpu_emulator.EmulatorFault) as found:
        launch_planted(planted, kernel, out, blocks, seed=3, **state)
    fault = found.value
    assert (fault.kernel, kernel.startswith(fault.kind)) == (kernel, True)
    source = FAULTS.read_text().splitlines()
    first = next(k for k, line in enumerate(source) if f"void {kernel}(" in line)
    last = next(k for k in range(first, len(source)) if source[k] == "}")
    here = {f"{FAULTS}:{k + 1}" for k in range(first, last) if "// here" in source[k]}
    # The line of an intrinsic is in a header.
    assert fault.source in here or (fault.source and fault.instruction.startswith("SHFL"))
    assert fault.instruction in str(fault)
    if kernel == "out_of_bounds":
        assert (fault.block, fault.thread) == ((0, 0, 0), (63, 0, 0))


def test_lone_block_conflicts_with_nobody(planted):
    out = np.zeros(64, dtype=I32)
    assert launch_planted(planted, "block_conflict", out, 1)["blocks_run"] == 1


LONELY = {
    "wait for others": ["S2R R0, SR_LANEID", "ISETP.GE.AND P0, PT, R0, 0x10, PT", "@P0 BRA 0x0050",
                        "WARPSYNC 0xffffffff",
                        "EXIT", "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT"],
    "not one of": ["MOV R1, 0xffff", "WARPSYNC R1", "EXIT"],
}  # fmt: skip


@pytest.mark.parametrize("what", LONELY)
def test_lanes_that_cannot_meet_are_found(what):
    with pytest.raises(gpu_emulator.EmulatorFault, match=what) as found:
        gpu_emulator.launch(text_of(LONELY[what]), "kernel", 1, 32, b"")
    assert found.value.kind == "warp_mask"
    assert found.value.instruction.startswith("WARPSYNC")


UNWRITTEN = {
    "an address": ["STG.E desc[UR4][R2.64], RZ", "EXIT"],
    "what is stored": ["LDC.64 R2, c[0x0][0x210]", "IADD3 R5, R4, 0x1, RZ", "STG.E desc[UR4][R2.64], R5", "EXIT"],
    "the guard": ["ISETP.NE.AND P1, PT, R4, R5, PT", "@P2 MOV R1, RZ", "EXIT"],
    "a branch": ["BRA P1, 0x0010", "EXIT"],
}


@pytest.mark.parametrize("use", UNWRITTEN)
def test_use_of_an_unwritten_register_is_found(use):
    out = np.zeros(1, dtype=I32)
    memory = [Allocation(out.ctypes.data, out.nbytes, True, True)]
    with pytest.raises(gpu_emulator.EmulatorFault, match=use) as found:
        gpu_emulator.launch(text_of(UNWRITTEN[use]), "kernel", 1, 1, arguments(out), memory)
    assert found.value.kind == "unwritten_register"


def test_unwritten_bits_that_decide_nothing_are_no_fault():
    """A half beside another that was written, and a value that a selection leaves out."""
    out = np.zeros(2, dtype=I32)
    text = text_of([
        "LDC.64 R2, c[0x0][0x210]", "MOV R6, 0x7", "PRMT R5, R6, 0x7610, R5", "LOP3.LUT R5, R5, 0xffff, RZ, 0xc0, !PT",
        "SEL R7, R5, R8, PT", "STG.E desc[UR4][R2.64], R5", "STG.E.U16 desc[UR4][R2.64+0x4], R7", "EXIT"])  # fmt: skip
    memory = [Allocation(out.ctypes.data, out.nbytes, False, True, "out")]
    counters = gpu_emulator.launch(text, "kernel", 1, 1, arguments(out), memory)
    assert out.tolist() == [7, 7]
    assert counters["unwritten_bytes"] == {"out": 2}


@pytest.mark.parametrize(
    ("grid", "block", "dynamic_shared", "what"),
    [(1, 1025, 0, "threads"), ((1, 65536), 32, 0, "grid"), (0, 32, 0, "empty"), (1, 32, 233_000, "shared memory"),
     (1, 1024, 0, "registers")],
)  # fmt: skip
def test_launch_that_a_gpu_refuses_is_refused(grid, block, dynamic_shared, what):
    usage = " Function kernel:\n  REG:80 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528\n"
    with pytest.raises(gpu_emulator.EmulatorFault, match=what) as found:
        gpu_emulator.launch(usage + text_of(["EXIT"]), "kernel", grid, block, b"", dynamic_shared=dynamic_shared)
    assert found.value.kind == "launch"
    gpu_emulator.launch(usage + text_of(["EXIT"]), "kernel", 1, 736, b"")
    with pytest.raises(gpu_emulator.EmulatorFault, match="parameters"):
        gpu_emulator.launch(usage + text_of(["EXIT"]), "kernel", 1, 32, bytes(8))


@pytest.mark.parametrize("line", ["FROB R1, R2", "IADD3.FROB R1, R2, R3, RZ", "MOV R1, SR_FROB", "S2R R1, SR_FROB"])
def test_unknown_instruction_is_named(line):
    with pytest.raises(gpu_emulator.EmulatorFault, match="FROB") as found:
        gpu_emulator.launch(text_of([line, "EXIT"]), "kernel", 1, 32, b"")
    assert found.value.kind == "unknown_instruction"
    assert line in str(found.value)


MODES = [{"order": order} for order in gpu_emulator.ORDERS] + [{"mufu": "adversarial"}, {"model": True}]


@pytest.mark.parametrize("options", MODES, ids=str)
@np.errstate(all="ignore")
def test_arithmetic_of_a_compiler_is_the_hosts(planted, options, inputs):
    """Divisions and roots, with their slow ways, and remainders of 64 bits."""
    _, x = inputs
    a, b = x.fa.copy(), x.fb.copy()
    outputs = np.zeros((len(a), 3), F32), np.zeros((len(a), 2), F64), np.zeros((len(a), 2), I64)
    memory = [Allocation(each.ctypes.data, each.nbytes) for each in (a, b)]
    memory += [Allocation(each.ctypes.data, each.nbytes, False, True) for each in outputs]
    gpu_emulator.launch(planted, "arithmetic", len(a) // 128, 128, arguments(a, b, *outputs), memory, seed=5, **options)
    floats = np.stack([a / b, np.sqrt(np.abs(a)), np.floor(a) + np.rint(b)], 1)
    # A divisor whose digits are all ones needs a better reciprocal than the documented error promises.
    ulps = np.abs(canonical(outputs[0]).astype(I64) - canonical(floats).astype(I64))
    assert ulps.max() <= ("mufu" in options)
    wide = a.astype(F64), b.astype(F64)
    assert (doubles(outputs[1]) == doubles(np.stack([wide[0] / wide[1], np.sqrt(np.abs(wide[1]))], 1))).all()
    p, q = x.ia.astype(I64) * 1000003, (x.ib | 1).astype(I64)
    quotients = [
        [int(abs(m) // abs(n)) * (1 if (m < 0) == (n < 0) else -1) for m, n in zip(p.tolist(), q.tolist(), strict=True)]
    ]
    quotient = np.array(quotients[0], dtype=I64)
    assert (outputs[2] == np.stack([quotient, p - quotient * q], 1)).all()


@pytest.mark.parametrize(
    "options",
    [{"order": order, "seed": seed} for order, seed in itertools.product(gpu_emulator.ORDERS, (0, 1))]
    + [{"model": True}],
    ids=str,
)
def test_exchanges_and_atomics(planted, options):
    values = np.arange(1, 257, dtype=I32)
    out, total, most = np.zeros(256, I32), np.zeros(1, I32), np.zeros(1, np.uint64)
    memory = [Allocation(values.ctypes.data, values.nbytes),
              Allocation(out.ctypes.data, out.nbytes, False, True, "out"),
              *(Allocation(each.ctypes.data, each.nbytes, True, True) for each in (total, most))]  # fmt: skip
    counters = gpu_emulator.launch(planted, "exchange", 4, 64, arguments(values, out, total, most), memory, **options)
    steps = []
    for value in values.tolist():
        count = 0
        while value > 1:
            value, count = (3 * value + 1 if value & 1 else value // 2), count + 1
        steps.append(count)
    steps = np.array(steps)
    assert (total[0], most[0]) == (steps.sum(), steps.max())
    neighbours = steps.reshape(-1, 2)[:, ::-1].ravel()
    counts = np.concatenate(
        [np.bincount(block % 32, minlength=32)[np.arange(64) % 32] for block in steps.reshape(4, 64)]
    )
    even = np.repeat((steps.reshape(-1, 32) % 2 == 0).sum(1), 32)
    assert (out == neighbours + 1000 * counts + 1000000 * even).all()
    assert counters["unwritten_bytes"] == {"out": 0}
    assert counters["barriers"] == 8
    # At least a load's way from DRAM.
    assert (counters["model_cycles"] > 620) == ("model" in options)


def test_counters_are_those_of_a_known_kernel():
    """Each of 64 threads loads a word, 128 bytes from the next one's, exchanges it in shared memory, and stores it."""
    # From the beginning of a sector on.
    room = np.zeros(64 * 33 + 8, dtype=I32)
    room = room[-room.ctypes.data // 4 % 8 :]
    source, out = room[: 64 * 32], room[64 * 32 : 64 * 33]
    source[:] = np.arange(64 * 32)
    usage = " Function kernel:\n  REG:16 STACK:0 SHARED:8192 LOCAL:0 CONSTANT[0]:544\n"
    lines = [
        "S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", "IMAD.WIDE R2, R0, 0x80, R2", "LDG.E R4, desc[UR4][R2.64]",
        "LDG.E R4, desc[UR4][R2.64+0x4]", "IMAD.SHL.U32 R5, R0, 0x40, RZ", "STS [R5+0x400], R4", "NOP",
        "LDS R6, [R5+0x400]", "LDC.64 R2, c[0x0][0x218]", "IMAD.WIDE R2, R0, 0x4, R2",
        "STG.E desc[UR4][R2.64], R6", "EXIT",
    ]  # fmt: skip
    memory = [Allocation(source.ctypes.data, source.nbytes), Allocation(out.ctypes.data, out.nbytes, False, True)]
    run = gpu_emulator.launch(usage + text_of(lines), "kernel", 1, 64, arguments(source, out), memory)
    assert (out == 32 * np.arange(64) + 1).all()
    expected = {
        "warp_instructions": 26, "lane_instructions": 26 * 32, "global_loads": 4, "load_bytes": 512,
        "load_sectors": 128,
        "l1_hit_sectors": 64, "global_stores": 2, "store_sectors": 8, "distinct_read_bytes": 64 * 32,
        "distinct_written_bytes": 256, "shared_accesses": 4, "shared_wavefronts": 64, "shared_conflicts": 60,
        "warps_per_sm": 50, "occupancy_limit": "shared",
    }  # fmt: skip
    assert {name: run[name] for name in expected} == expected
    assert run["by_pipe"]["lsu"] == 2 * 8
    again = gpu_emulator.launch(usage + text_of(lines), "kernel", 1, 64, arguments(source, out), memory, model=True)
    assert {name: again[name] for name in expected} == expected
    assert again["model_cycles"] > 0


def modelled(blocks, **options):
    """Blocks of 256 threads, each of which copies 16 bytes."""
    source, out = (np.zeros(blocks * 1024, dtype=I32) for _ in range(2))
    lines = [
        "S2R R0, SR_CTAID.X", "S2R R1, SR_TID.X", "IMAD R0, R0, 0x100, R1", "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE R2, R0, 0x10, R2", "LDG.E.128 R4, desc[UR4][R2.64]", "LDC.64 R2, c[0x0][0x218]",
        "IMAD.WIDE R2, R0, 0x10, R2", "STG.E.128 desc[UR4][R2.64], R4", "EXIT",
    ]  # fmt: skip
    memory = [Allocation(source.ctypes.data, source.nbytes), Allocation(out.ctypes.data, out.nbytes, False, True)]
    return gpu_emulator.launch(
        text_of(lines), "kernel", blocks, 256, arguments(source, out), memory, model=True, **options
    )


def test_a_share_of_the_blocks_is_modelled_on_that_share_of_the_gpu():
    whole, part = modelled(1056), modelled(1056, share=33 / 132)
    assert (part["model_sms"], part["blocks_run"]) == (33, 264)
    assert part["model_us"] == pytest.approx(whole["model_us"], rel=0.02)


def test_each_constant_of_the_model_can_be_another():
    table = gpu_emulator.model_constants()
    assert len({each.name for each in table}) == len(table)
    assert all(each.least <= each.value <= each.largest and each.origin for each in table)
    values = {each.name: each.value for each in table}
    own = modelled(1056)["model_us"]
    # Where memory lies decides which lines share a set of the cache.
    assert modelled(1056, constants=values)["model_us"] == pytest.approx(own, rel=0.02)
    slower = {"dram_bytes_per_cycle": values["dram_bytes_per_cycle"] / 2}
    assert modelled(1056, constants=slower)["model_us"] > 1.2 * own
    with pytest.raises(gpu_emulator.EmulatorFault, match="no constant frob"):
        modelled(1, constants={"frob": 1})


def test_the_model_is_no_faster_than_its_memory():
    """What is stored last must arrive, too."""
    run, values = modelled(1056), {each.name: each.value for each in gpu_emulator.model_constants()}
    assert run["model_dram_bytes"] >= 2 * 1056 * 4096
    assert run["model_cycles"] >= run["model_dram_bytes"] / values["dram_bytes_per_cycle"]


def test_the_largest_block_is_counted():
    lines = ["S2R R0, SR_CTAID.X", "ISETP.NE.AND P0, PT, R0, 0x2, PT", "@P0 EXIT", "NOP", "NOP", "EXIT"]
    run = gpu_emulator.launch(text_of(lines), "kernel", 4, 32, b"")
    assert (run["warp_instructions"], run["largest_block"]) == (3 * 3 + 6, 6)
