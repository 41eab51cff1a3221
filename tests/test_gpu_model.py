# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu_model.py: its arithmetic, and what kernels execute against the committed counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import emulated_gpu

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_model  # noqa: E402

#: Sectors that launches ask for.
SECTORS = ("load_sectors", "store_sectors", "atomic_sectors")
#: Of a case's launches: with more it would take too long here.
MOST_INSTRUCTIONS = 4.5e6


def held(providers: tuple[str, ...]) -> dict[tuple[str, str], list[dict]]:
    """(case, provider) -> its committed rows: for each kernel its cheapest case."""
    every = [row for family in gpu_model.CASES for row in gpu_model.load(family)["rows"]]
    rows = [row for row in every if row["provider"] in providers and "refused" not in row]
    cases = gpu_model.by_provider(rows)
    cost = {key: sum(row["warp_instructions"] for row in each) for key, each in cases.items()}
    chosen = {}
    for kernel in dict.fromkeys((row["provider"], row["kernel"]) for row in rows):
        cheapest = min(
            (key for key in cases if kernel in {(r["provider"], r["kernel"]) for r in cases[key]}), key=cost.get
        )
        if cost[cheapest] <= MOST_INSTRUCTIONS:
            chosen[cheapest] = cases[cheapest]
    return chosen


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(case, provider) -> what one process counts here."""
    emulated_gpu.need("cpp")
    folder = tmp_path_factory.mktemp("rows")
    names = ",".join(f"{case} {provider}" for case, provider in held(tuple(gpu_model.PROVIDERS)))
    command = [sys.executable, "-m", "benchmarks.gpu_model", "--counts", "--only", names, "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return gpu_model.by_provider([row for path in folder.iterdir() for row in json.loads(path.read_text())["rows"]])


@pytest.mark.parametrize(("compiler", "providers"), [("nvcc", ("cpp",)), ("triton", ("triton", "inductor", "nvidia"))])
def test_kernels_execute_what_is_committed(compiler, providers, found):
    """Instructions and sectors, within 2 %."""
    emulated_gpu.need("cpp" if compiler == "nvcc" else "triton")
    committed, here = gpu_model.load("top_down")["versions"][compiler], gpu_model.versions()[compiler]
    if committed != here:
        pytest.skip(f"the committed counts are of {compiler} {committed}, and here is {here}")
    expected = held(providers)
    assert expected
    assert set(expected) == {(case, provider) for case, provider in found if provider in providers}
    for key, rows in expected.items():
        assert [row["kernel"] for row in found[key]] == [row["kernel"] for row in rows]
        for row, own in zip(found[key], rows, strict=True):
            for name in ("warp_instructions", *SECTORS):
                assert row[name] == pytest.approx(own[name], rel=0.02), (key, row["kernel"], name)


def test_floors_by_hand():
    counters = {"warp_instructions": 528, "distinct_read_bytes": 2170, "distinct_written_bytes": 2170,
                "load_sectors": 300, "store_sectors": 10, "atomic_sectors": 1, "l1_hit_sectors": 8,
                "shared_wavefronts": 132}  # fmt: skip
    cycles = {name: 1980 * each for name, each in gpu_model.floors(counters).items()}
    assert cycles == pytest.approx({"issue": 1, "dram": 2, "l2": 32 * 303 / 3030, "shared": 1})


def test_a_kernels_name_is_that_of_its_function():
    mangled = "_ZN8fpn_fast4cuda15top_down_kernelIfLb1ELb0EEEvNS_7PyramidE"
    assert gpu_model.short(mangled) == "top_down_kernel"
    assert gpu_model.short("top_down_kernel") == "top_down_kernel"


@pytest.mark.parametrize("family", gpu_model.CASES)
def test_cases_are_those_of_the_benchmark_and_the_page_names_what_is_missing(family):
    cases = {str(case) for case in gpu_model.cases_of(family)}
    assert cases
    modelled = {row["case"] for row in gpu_model.load(family)["rows"]}
    assert modelled <= cases
    text = gpu_model.table([family])
    for case in cases:
        line = "\n| " if case in modelled else "Not modelled yet: "
        assert line in text
        assert case.removeprefix(f"{family}-") in text


def test_a_large_launch_of_like_blocks_is_modelled_by_a_share():
    gpu = gpu_model.Gpu(limit=1000)
    counters = {"warp_instructions": 4000, "blocks": 100, "largest_block": 40}
    assert gpu.share(counters) == 33 / 132
    assert gpu.share(counters | {"warp_instructions": 1000, "largest_block": 10}) == 1
    assert gpu.share(counters | {"largest_block": 60}) == 1
