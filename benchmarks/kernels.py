# SPDX-License-Identifier: Apache-2.0
"""How long each kernel takes in the first cases of each op, beside what the model says: prints JSON.

    python -m benchmarks.kernels [--limit SECONDS] [--tiny]
    ncu --profile-from-start off ... python -m benchmarks.kernels --once

Times are medians of the profiler's over CALLS calls, which take turns over sets of inputs as ``gpu_cold`` does
(fpn_fast/bench/timing.py). What benchmarks/model/ says of the same launches is modelled, not measured. --once makes a
single call of each case between the CUDA profiler's start and stop. Without a GPU the operators of the CPU stand for
kernels, to try the code; device_type says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fpn_fast.bench import cases
from fpn_fast.bench.timing import Step, Timer, in_turn, timer

CALLS = 20
MODEL = Path(__file__).resolve().parent / "model"
#: Families whose kernels are those of others, or whose cases are.
OTHERS = ("detectron2", "mmdet", "growth")
#: What ncu counts: instructions executed by warps.
COUNTER = "smsp__inst_executed.sum"
#: Of a launch, what the model says of it, and what is printed beside its time.
MODELLED = {"model_us": "model", "floor_us": "floor of the model", "warp_instructions": "instructions of the emulator"}
FIGURES = {**MODELLED, "instructions": "of ncu"}
_NAME = re.compile(r"(?:void )?(?:(?:\w+|\(anonymous namespace\)|<unnamed>)::)*(\w+)")


def first_cases(device_type: str) -> list[tuple[str, cases.Case]]:
    """(family, case): the first of each direction, type, memory format and kind of RoIs."""
    found: dict[str, dict[Any, cases.Case]] = {family: {} for family in cases.FAMILIES if family not in OTHERS}
    for family, firsts in found.items():
        for case in cases.FAMILIES[family](device_type):
            if not case.overhead:
                firsts.setdefault((case.direction, case.dtype, case.memory_format, case.clustered), case)
    return cases.in_turn({family: list(firsts.values()) for family, firsts in found.items()})


def short(name: str) -> str:
    """A kernel's name without what it returns, where it is, and its arguments."""
    return found[1] if (found := _NAME.match(name)) else name


def launched(run: Step, clock: Timer, device_type: str) -> list[tuple[str, float]]:
    """(name, microseconds) of what `run` launches on the device, in its order."""
    clock.synchronize()
    on_gpu = device_type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        clock.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def of_one_call(found: Sequence[tuple[str, float]], calls: int) -> list[dict[str, Any]]:
    """Each launch of a call, with the median over `calls` equal calls."""
    each, rest = divmod(len(found), calls)
    names = [name for name, _ in found]
    if not each or rest or names != names[:each] * calls:
        raise ValueError(f"{calls} calls launched {len(found)} kernels, not the same in each")
    times = ([us for _, us in found[i::each]] for i in range(each))
    return [{"kernel": short(n), "name": n, "us": statistics.median(t)} for n, t in zip(names, times, strict=False)]


def model() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(case, provider) -> the model's launches, in their order; empty without benchmarks/model/."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(MODEL.glob("*.json")):
        for row in json.loads(path.read_text()).get("rows", []):
            found.setdefault((row["case"], row["provider"]), []).append(row)
    return found


def with_model(launches: list[dict[str, Any]], modelled: Iterable[dict[str, Any]]) -> None:
    """Adds the model's figures to `launches`, between which there are kernels of PyTorch that it does not have."""
    rows = iter(modelled)
    row = next(rows, None)
    for each in launches:
        if row is not None and row["kernel"] == each["kernel"]:
            each |= {name: row[name] for name in MODELLED if name in row}
            row = next(rows, None)


def measure(case: cases.Case, provider: Any, device_type: str, once: bool) -> list[dict[str, Any]]:
    """The launches of a call by a provider of fpn_fast/bench/providers.py, with times unless called `once`."""
    from fpn_fast.bench import harness, providers

    clock = timer(device_type)
    with clock.on_stream(), providers.running(case, provider):
        steps = [providers.bind(case, provider.function, *each) for each in harness.drawn(case, device_type, clock)]
        # Compiles, and loads what is loaded at its first launch.
        in_turn(steps, len(steps))()
        if not once:
            return of_one_call(launched(in_turn(steps, CALLS), clock, device_type), CALLS)
        clock.synchronize()
        torch.cuda.profiler.start()
        steps[0]()
        clock.synchronize()
        torch.cuda.profiler.stop()
        return []


def rows(options: argparse.Namespace, device_type: str) -> Iterator[dict[str, Any]]:
    # These need torchvision.
    from fpn_fast.bench import harness, providers

    begin, figures = time.monotonic(), model()
    for family, case in first_cases(device_type):
        case = cases.tiny(case) if options.tiny else case
        for provider in providers.providers(case, device_type, ("cpp", "triton")):
            if time.monotonic() - begin > options.limit:
                return
            row: dict[str, Any] = {"family": family, "case": str(case), "backend": provider.name}
            try:
                row["kernels"] = measure(case, provider, device_type, options.once)
            except Exception as error:
                row["problem"] = harness.does_not_run(error)
            with_model(row.get("kernels", []), figures.get((row["case"], provider.name), ()))
            yield row


def with_counts(found: dict[str, Any], text: str) -> str | None:
    """Adds to the kernels of `found` what ncu counted, as CSV, in a run with --once; what is wrong, if something is."""
    table = text[max(0, text.find('"ID"')) :].splitlines()
    counted = [row for row in csv.DictReader(table) if row["Metric Name"] == COUNTER]
    # Others' are named in other ways by the profiler and by ncu.
    counted = [row for row in counted if short(row["Kernel Name"]).endswith("_kernel")]
    timed = [each for row in found.get("rows", []) for each in row.get("kernels", []) if "_kernel" in each["kernel"]]
    for i, (each, row) in enumerate(zip(timed, counted, strict=False)):
        if each["kernel"] != short(row["Kernel Name"]):
            return f"launch {i} is {each['kernel']}, and {short(row['Kernel Name'])} to ncu"
        each["instructions"] = int(row["Metric Value"].replace(",", ""))
    return None if len(counted) >= len(timed) > 0 else f"ncu counted {len(counted)} of {len(timed)} launches"


def lines(found: dict[str, Any]) -> list[str]:
    """A line for each kernel, and for each case without any."""
    told = []
    for row in found.get("rows", []):
        case = f"{row['case']} {row['backend']}"
        told += [f"{case}: {row['problem']}"] if "problem" in row else []
        for each in row.get("kernels", []):
            more = [f"{text} {each[key]:g}" for key, text in FIGURES.items() if key in each]
            told.append(", ".join([f"{case} {each['kernel']}: {each['us']:.1f} us", *more]))
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", help="seconds after which no case begins", type=float, default=float("inf"))
    parser.add_argument("--tiny", help="tiny maps: a trial of the code", action="store_true")
    parser.add_argument("--once", help="one call of each, for ncu", action="store_true")
    options = parser.parse_args()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[dict[str, Any]] = []
    try:
        # One by one: those that there are before an interrupt are printed.
        for row in rows(options, device_type):
            found.append(row)
    finally:
        print(json.dumps({"device_type": device_type, "calls": CALLS, "rows": found}, indent=1))
    return int(any("problem" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
