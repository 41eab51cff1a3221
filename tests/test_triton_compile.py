# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_emulator

pytest.importorskip("triton")
from benchmarks.ceiling_kernels import CONVERSIONS, READ_FLOATS

#: Every variant is compiled for the first, one of each kernel for the others.
ARCHS = [90, 80, 100]
#: Kernels of decisions and of masks, whose numbers are the reference's bit for bit.
EXACT = {
    "match_anchors_kernel",
    "match_anchors_low_quality_kernel",
    "heatmaps_to_keypoints_kernel",
    "paste_masks_kernel",
    "rank_kernel",
    "decode_head_kernel",
    "decode_boxes_kernel",
    "greedy_nms_kernel",
    "nms_removal_kernel",
}


#: A rival of benchmarks, and what measures limits: none of ours.
RIVALS = {"nvidia_mapping_kernel"}
LIMITS = {"l2_read_kernel", "chase_kernel", "convert_kernel"}


@pytest.fixture(scope="module")
def compiled(everything):
    """Architecture -> a row for each of our kernels and variants."""
    rows = [row for row in everything["kernels"] if row["kernel"] not in RIVALS | LIMITS]
    return {arch: [row for row in rows if row["arch"] == arch] for arch in ARCHS}


@pytest.fixture(scope="module")
def everything():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("helpers") / "compile_triton.py"
    done = subprocess.run(
        [sys.executable, str(script), *map(str, ARCHS)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_images_of_every_size_share_few_variants(everything):
    """And a call like the one before, as a CUDA graph captures it, compiles nothing."""
    found = everything["variants"]
    assert len({kernel for kernel, *_ in found}) == 17
    assert [row for row in found if row[3] > 8 or row[4]] == []


@pytest.mark.skipif(gpu_emulator.compiler() is None, reason="no g++ to build the emulator with")
def test_the_emulator_knows_all_code(everything):
    found = [row["undecoded"] for row in everything["kernels"] if row["arch"] == 90]
    assert found == [""] * len(found)


def test_sides_of_1_compile(everything):
    assert everything["sides_of_1"] == ["top_down_kernel", "top_down_backward_kernel"] * 3


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_without_atomics_on_floats_or_local_memory(compiled, arch):
    rows = compiled[arch]
    kernels = {row["kernel"] for row in compiled[90]}
    assert {row["kernel"] for row in rows} == kernels
    assert len(rows) == (64 if arch == 90 else len(kernels))
    assert all(row["cubin_bytes"] > 0 for row in rows)
    assert all(row["atomics"] == row["atomic_maxima"] and row["local"] == 0 for row in rows)
    assert {row["kernel"] for row in rows if row["atomics"]} == {"match_anchors_kernel"}


@pytest.mark.parametrize("arch", ARCHS)
def test_what_decides_is_neither_contracted_nor_approximated(compiled, arch):
    rows = [row for row in compiled[arch] if row["kernel"] in EXACT]
    assert {row["kernel"] for row in rows} == EXACT
    assert all(row["fused_multiply_adds"] == row["approximations"] == 0 for row in rows)
    # RoIAlign adds with fused multiply-adds; its levels and samples are decided.
    rows += [row for row in compiled[arch] if "roi_align" in row["kernel"]]
    assert all(row["flushes_subnormals"] == 0 for row in rows)


@pytest.mark.parametrize("arch", ARCHS)
def test_dense_maps_are_accessed_16_bytes_at_a_time(compiled, arch):
    for row in compiled[arch]:
        if "roi_align_max" in row["kernel"]:
            # Element by element: a rare mode.
            continue
        if row["kernel"] in EXACT:
            # Boxes are no maps, logits are gathered in the order of their indices, a mask into images whose sizes are
            # no multiples of anything, and a heatmap's columns by their taps.
            continue
        if "roi_align" in row["kernel"] and not row["channels_last"]:
            # Bins read single columns, and a RoI's row of 7 bins is not a multiple of 16 bytes.
            continue
        if row["kernel"] == "frozen_batch_norm_sums_kernel":
            # It stores two numbers for a channel, and a warp reads single elements of 32 channels, or of a plane.
            continue
        # Without a gradient the focal loss stores one number for a program.
        assert row["wide_stores"] > 0 or row["mode"] == "gradient False", row
        # channels_first gathers single columns of the other map; its own side, where there is one, is wide.
        assert row["wide_loads"] > 0 or (row["gathers_only"] and not row["channels_last"]), row


def test_nvidia_mapping_is_a_thread_for_four_channels(everything):
    rows = [row for row in everything["kernels"] if row["kernel"] in RIVALS and row["arch"] == 90]
    # Two forward and two backward.
    assert sorted(row["atomics"] > 0 for row in rows) == [False, False, True, True]
    for row in rows:
        # Of 256 channels.
        assert row["threads"] == 64, row
        # The four channels of a thread in one load: 16 bytes of float32, 8 of bfloat16.
        assert row["loads_of_four"] > 0, row
        assert row["local"] == 0, row


def test_limits_are_those_of_the_instructions_that_they_are_named_after(everything):
    rows = [row for row in everything["kernels"] if row["kernel"] in LIMITS and row["arch"] == 90]
    assert sorted(row["kernel"] for row in rows) == ["chase_kernel", "chase_kernel", "convert_kernel", "l2_read_kernel"]
    found = {row["kernel"]: row for row in rows}
    # One by one, as many as the rate is computed of: a packed conversion of two would be another instruction.
    assert found["convert_kernel"]["conversions"] == CONVERSIONS
    assert found["l2_read_kernel"]["loads_of_four"] == READ_FLOATS // 4
    assert found["convert_kernel"]["threads"] == found["l2_read_kernel"]["threads"] == 256
