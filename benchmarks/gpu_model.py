# SPDX-License-Identifier: Apache-2.0
"""What each GPU kernel costs on an H200 by a model. It needs no GPU, and measures nothing.

    python -m benchmarks.gpu_model                      every case, into benchmarks/model/
    python -m benchmarks.gpu_model --family top_down --only bfloat16 --providers cpp,triton
    python -m benchmarks.gpu_model --sensitivity        what each constant of the model moves

The cases are fpn-fast bench's, with its inputs. Results are compared with the reference as there, except for --counts
and --sensitivity. Each launch executes its machine code for sm_90 on tools/gpu_emulator, once to count what it does and
once by the cycle model. A large launch whose blocks are alike is modelled by a share of the blocks on that share of the
GPU. Floors are the least times of an
H200 for what was counted: to issue the instructions, to move sectors from DRAM, and from L2 those that the block's
first-level cache does not have, and to pass through the banks of shared memory. Each launch begins with cold caches.
What is reported is the largest of the floors and the cycle model.

Rivals: per_level_merge.py for a merge as Inductor compiles it, nvidia_mapping.py for NVIDIA's RoIAlign. PyTorch's own
kernels between ours are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools import gpu_emulator
from tools.gpu_emulator.host import code, stand_in


def preloaded() -> bool:
    """Whether this process runs GPU kernels on the emulator."""
    return hasattr(ctypes.CDLL(None), "gpu_emulator_hooks")


if __name__ == "__main__" and preloaded():
    # Before fpn_fast is imported.
    stand_in.install()

from fpn_fast.__main__ import ends_with_its_reader  # noqa: E402
from fpn_fast.bench import machine, providers, report  # noqa: E402
from fpn_fast.bench.cases import FAMILIES, Case  # noqa: E402
from fpn_fast.bench.op import listed  # noqa: E402
from fpn_fast.bench.rows import four_digits, write_rows  # noqa: E402
from fpn_fast.bench.torchvision_ops import memory_format  # noqa: E402

FOLDER = Path(__file__).resolve().parent / "model"
#: Family -> what the names of its cases hold, one image each.
CASES = {
    "top_down": ("-resnet50_fpn_800x1344-n1-",),
    "multiscale_roi_align": ("-box_1000_7x7_ratio_2_spread-n1-", "-box_1000_7x7_ratio_2_clustered-n1-"),
    "generate_proposals": ("-n1-",),
    "select_detections": ("-n1-",),
    "match_anchors": ("-20_gts", "-300_gts"),
    "sigmoid_focal_loss": ("-n1-",),
    "paste_masks": ("",),
    "heatmaps_to_keypoints": ("-20_people",),
    "frozen_batch_norm": ("-block_end_2048x",),
}
PROVIDERS = {"cpp": "CUDA", "triton": "Triton", "inductor": "as Inductor", "nvidia": "NVIDIA's mapping"}
#: A launch of more warp instructions is modelled by a share of its blocks: some seconds of a CPU.
LIMIT = 5e6
#: The largest block's instructions over the mean's above which blocks are not alike: the last ones would be missed.
UNEVEN = 1.25
#: What --sensitivity models, by the CUDA kernels and a share of so many warp instructions.
SENSITIVE = (
    "top_down-resnet50_fpn_800x1344-n1-bfloat16-channels_last-forward",
    "multiscale_roi_align-box_1000_7x7_ratio_2_spread-n1-bfloat16-channels_last-forward",
    "multiscale_roi_align-box_1000_7x7_ratio_2_clustered-n1-bfloat16-channels_last-backward",
)
SENSITIVE_LIMIT = 1e6
LABEL = "model, not measured"


@functools.cache
def constants() -> dict[str, float]:
    return {each.name: each.value for each in gpu_emulator.model_constants()}


def versions() -> dict[str, str | None]:
    """Of the compilers, on which the counts depend."""
    nvcc = machine.output("nvcc", "--version") or machine.output("/usr/local/cuda/bin/nvcc", "--version") or ""
    found = re.search(r" V([\d.]+)", nvcc)
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    return {"nvcc": found.group(1) if found else None, "triton": triton}


@dataclass
class Gpu(stand_in.Gpu):
    """Counts what launches do, and models them. It checks no memory: an op's first kernel may have run in part.

    idle: launches do nothing. model: whether they are modelled. others: also with these constants.
    """

    idle: bool = False
    model: bool = True
    limit: float = LIMIT
    others: list[dict[str, float]] = field(default_factory=list)

    def watch(self, address: int, size: int, *, made: bool = False, writable: bool = False) -> None:
        super().watch(address, size, made=made, writable=writable)
        if address in self.regions:
            self.regions[address].written = None

    def fill(self, address: int, value: int, size: int) -> bool:
        ctypes.memset(address, value, size)
        return True

    def share(self, counters: dict[str, Any]) -> float:
        instructions, sms = counters["warp_instructions"], constants()["sms"]
        uneven = counters["largest_block"] * counters["blocks"] > UNEVEN * instructions
        if instructions <= self.limit or (uneven and not self.others):
            return 1.0
        return max(1, int(sms * self.limit / instructions)) / sms

    def launch(self, program: Any, grid: tuple, block: tuple, shared: int, parameters: bytes) -> bool:
        if self.idle:
            return True
        own = [region for region in self.regions.values() if region.writable]
        memory = [(each.address, each.size, True, each.writable) for each in self.regions.values()]

        def run(**options: Any) -> dict[str, Any]:
            return gpu_emulator.launch(
                program, program.kernel, grid, block, parameters, memory, dynamic_shared=shared, **options
            )

        def restore(contents: Sequence[bytes]) -> None:
            for region, content in zip(own, contents, strict=True):
                region.content = content

        try:
            before = [region.content for region in own] if self.model else []
            counters = run()
            if self.model:
                after, share = [region.content for region in own], self.share(counters)
                for name, others in [("model", {}), *enumerate(self.others)]:
                    restore(before)
                    counters[name] = run(model=True, share=share, constants=others)
                restore(after)
        except Exception as fault:
            self.fault = fault
            return False
        self.launches.append((program.kernel, counters))
        return True


def short(kernel: str) -> str:
    """The name of a kernel's function, of a mangled name or of Triton's."""
    for number in re.finditer(r"\d+", kernel):
        name = kernel[number.end() :][: int(number[0])]
        if name.endswith("_kernel"):
            return name
    return kernel


def floors(counters: dict[str, Any]) -> dict[str, float]:
    """The least time for each thing that was counted, microseconds."""
    k = constants()
    sectors = sum(counters[f"{kind}_sectors"] for kind in ("load", "store", "atomic")) - counters["l1_hit_sectors"]
    cycles = {
        "issue": counters["warp_instructions"] / (k["sms"] * k["schedulers"]),
        "dram": (counters["distinct_read_bytes"] + counters["distinct_written_bytes"]) / k["dram_bytes_per_cycle"],
        "l2": 32 * sectors / k["l2_bytes_per_cycle"],
        "shared": counters["shared_wavefronts"] / k["sms"],
    }
    return {name: each / (k["clock_ghz"] * 1e3) for name, each in cycles.items()}


#: Of what was counted, what a row keeps.
COUNTED = ("blocks", "warps_per_sm", "warp_instructions", "largest_block", "load_sectors", "store_sectors",
           "atomic_sectors", "l1_hit_sectors", "distinct_read_bytes", "distinct_written_bytes", "shared_wavefronts",
           "shared_conflicts")  # fmt: skip


def row_of(kernel: str, counters: dict[str, Any]) -> dict[str, Any]:
    row = {"kernel": short(kernel)} | {name: counters[name] for name in COUNTED}
    of_each = floors(counters)
    row |= {"floors_us": of_each, "floor_us": max(of_each.values()), "bound": max(of_each, key=of_each.__getitem__)}
    if "model" in counters:
        cycles = counters["model"]["model_us"]
        row |= {"cycle_model_us": cycles, "model_us": max(cycles, row["floor_us"])}
        row |= {"model_sms": counters["model"]["model_sms"], "in_flight": counters["model"]["loads_in_flight_bytes"]}
    return row


def candidates(case: Case) -> Iterator[providers.Provider]:
    """Whose kernels run a case here."""
    fused = providers.op_of(case).fused
    yield providers.Provider("cpp", fused, "cpp")
    if importlib.util.find_spec("triton") is None:
        return
    yield providers.Provider("triton", fused, "triton")
    from benchmarks import nvidia_mapping, per_level_merge

    rivals = {"top_down": per_level_merge.rivals, "multiscale_roi_align": nvidia_mapping.rivals}
    if case.op in rivals:
        yield from (providers.Provider(name, function) for name, function in rivals[case.op](case).items())


@dataclass
class Prepared:
    """A case's inputs, the gradients of its outputs, what is wrong with a result, and eager's outputs."""

    case: Case
    inputs: list[Tensor]
    grads: list[Tensor]
    problem: Callable[[Any], str | None]
    outputs: list[Tensor]

    @classmethod
    def of(cls, case: Case, checks: bool) -> Prepared:
        torch.manual_seed(0)
        op = providers.op_of(case)
        inputs = op.inputs(torch.device("cpu"))
        with torch.no_grad():
            outputs = listed(op.eager(inputs)) if case.direction == "backward" else []
        grads = [torch.randn_like(each).contiguous(memory_format=memory_format(case)) for each in outputs]
        if not outputs:
            grads = providers.output_grads(case, inputs)
        problem = providers.expectation(case, inputs, grads) if checks else lambda _: None
        return cls(case, inputs, grads, problem, outputs)

    def step(self, provider: providers.Provider, gpu: Gpu) -> Callable[..., Any]:
        """What launches the kernels of the case's direction alone."""
        if self.case.direction != "backward":
            bound = providers.bind(self.case, provider.function, self.inputs, self.grads)
            return lambda *_: bound()
        leaves = [each.detach().requires_grad_() for each in self.inputs]
        gpu.idle = True
        outputs = listed(provider.function(leaves))
        gpu.idle = False
        for output, value in zip(outputs, self.outputs, strict=True):
            # A merge's coarsest map is its lateral itself.
            if output.data_ptr() != value.data_ptr():
                output.data.copy_(value)
        return lambda *_: torch.autograd.grad(outputs, leaves, self.grads, retain_graph=True)

    def launches(self, provider: providers.Provider, gpu: Gpu) -> list[tuple[str, dict[str, Any]]]:
        """Raises ValueError where the result is wrong."""
        with providers.running(self.case, provider):
            found = stand_in.call(self.step(provider, gpu), self.inputs, self.grads)
        if problem := self.problem(found):
            raise ValueError(f"{self.case} by {provider.name}: {problem}")
        return gpu.launches


def cases_of(family: str) -> list[Case]:
    return [case for case in FAMILIES[family]("cuda") if any(each in str(case) for each in CASES[family])]


def chosen(
    families: Sequence[str], words: Sequence[str], names: Sequence[str]
) -> list[tuple[str, Case, providers.Provider]]:
    """Those of which "CASE PROVIDER" holds one of `words`."""
    return [
        (family, case, provider)
        for family in families
        for case in cases_of(family)
        for provider in candidates(case)
        if provider.name in names and any(word in f"{case} {provider.name}" for word in words)
    ]


def head() -> dict[str, Any]:
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"label": LABEL, "gpu": "H200 SXM", "versions": versions(), "commit": machine.commit(), "date": date}


def run(options: argparse.Namespace) -> None:
    gpu = stand_in.gpu = Gpu(model=not options.counts, limit=options.limit)
    work = chosen(options.family, options.only.split(","), options.providers.split(","))
    found: dict[str, list[dict[str, Any]]] = {}
    prepared: Prepared | None = None
    for k, (family, case, provider) in enumerate(work, 1):
        begin = time.monotonic()
        if prepared is None or prepared.case != case:
            prepared = Prepared.of(case, not options.counts)
        place = {"family": family, "case": str(case), "provider": provider.name}
        rows = found.setdefault(family, [])
        try:
            launches = [row_of(*each) for each in prepared.launches(provider, gpu)]
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            rows.append(place | {"kernel": None, "refused": said})
        else:
            said = text(launches)
            rows.extend(place | {"launch": i} | four_digits(row) for i, row in enumerate(launches))
        print(f"[{k}/{len(work)}] {case} {provider.name}: {said}; {time.monotonic() - begin:.1f} s here", flush=True)
        write_rows(options.output / f"{family}.json", head() | {"constants": constants()}, rows)


def text(rows: Sequence[dict[str, Any]]) -> str:
    """A line of a case's launches."""
    sums = total(rows)
    instructions = sums["warp_instructions"] / 1e6
    line = f"{len(rows)} launches, {instructions:.2f} M instructions, floor {sums['floor_us']:.1f} us"
    return line + (f", model {sums['model_us']:.1f} us" if "model_us" in sums else "")


def total(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sums over launches."""
    names = ("warp_instructions", "floor_us", "model_us")
    sums = {name: sum(row[name] for row in rows) for name in names if all(name in row for row in rows)}
    return sums | {bound: sum(row["floors_us"][bound] for row in rows) for bound in rows[0]["floors_us"]}


def sensitivity(options: argparse.Namespace) -> None:
    """Each constant at the least and the largest that it may be, and what that makes of the model's times."""
    table = gpu_emulator.model_constants()
    others = [(each.name, end) for each in table for end in (each.least, each.largest) if end != each.value]
    gpu = stand_in.gpu = Gpu(limit=SENSITIVE_LIMIT, others=[dict([each]) for each in others])
    changes: dict[tuple[str, float], dict[str, float]] = {each: {} for each in others}
    for _, case, provider in chosen(list(CASES), SENSITIVE, ["cpp"]):
        launches = [counters for _, counters in Prepared.of(case, False).launches(provider, gpu)]
        own = sum(each["model"]["model_us"] for each in launches)
        for k, each in enumerate(others):
            changes[each][str(case)] = sum(counters[k]["model_us"] for counters in launches) / own - 1
        print(case, flush=True)
    rows = []
    for each in table:
        ends = [end for end in dict.fromkeys((each.least, each.largest)) if end != each.value]
        moved = {str(end): four_digits(changes[each.name, end]) for end in ends}
        rows.append(each._asdict() | {"changes": moved})
    write_rows(options.output / "constants.json", head(), rows, "constants")


@ends_with_its_reader
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=list(CASES), default=list(CASES), metavar="FAMILY",
                        help="families of cases, of %(choices)s (default: all)")  # fmt: skip
    parser.add_argument("--only", default="", metavar="TEXTS",
                        help="only if 'CASE PROVIDER' holds one of these texts, separated by commas")  # fmt: skip
    parser.add_argument("--providers", default=",".join(PROVIDERS), metavar="NAMES",
                        help="whose kernels, separated by commas (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the rows (default: benchmarks/model)")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="INSTRUCTIONS",
                        help="model a larger launch by a share of its blocks (default: %(default).0f)")  # fmt: skip
    parser.add_argument("--counts", action="store_true", help="counts and floors alone: no model, and no comparison")
    parser.add_argument("--sensitivity", action="store_true", help="write what each constant moves instead")
    options = parser.parse_args(arguments)
    if not preloaded():
        # The emulator's stand-in for the CUDA runtime can only be loaded when a process starts.
        environment = {**os.environ, "LD_PRELOAD": str(code.runtime()), "PYTHONPATH": str(code.ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "benchmarks.gpu_model", *(arguments or sys.argv[1:])]
        os.execve(sys.executable, command, environment)
    torch.set_num_threads(1)
    (sensitivity if options.sensitivity else run)(options)
    return 0


# Tables of the committed rows.


def load(family: str) -> dict[str, Any]:
    """What is committed of a family, or of the constants; no rows where nothing is."""
    path = FOLDER / f"{family}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    return found


def caption(found: dict[str, Any]) -> str:
    compilers = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    refused = [
        f"{row['case']} {row['provider']}: {row['refused']}" for row in found.get("rows", []) if "refused" in row
    ]
    note = f" Refused: {'; '.join(refused)}." if refused else ""
    place = f"{found['gpu']}; {compilers}; commit {found['commit'] or 'unknown'}, {found['date']}"
    return f"*{LABEL.capitalize()}*: {place}.{note}"


def table(words: Sequence[str]) -> str:
    """Markdown: of a family's name its cases, of "constants" these, of nothing what is furthest from its floor."""
    if not words:
        return furthest()
    return constants_table() if words[0] == "constants" else family_table(words[0])


def us(value: float) -> str:
    return f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def by_provider(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(case, provider) -> its launches, of those that were not refused."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "refused" not in row:
            found.setdefault((row["case"], row["provider"]), []).append(row)
    return found


def family_table(family: str) -> str:
    found = load(family)
    of_each = (f"{name} floor, us" for name in ("issue", "DRAM", "L2", "shared"))
    lines = [["case", "kernels", "launches", "M instructions", *of_each, f"{LABEL}, us", "model / largest floor"]]
    for (case, provider), rows in by_provider(found["rows"]).items():
        sums = total(rows)
        instructions, ratio = sums["warp_instructions"] / 1e6, sums["model_us"] / sums["floor_us"]
        lines.append([
            case.removeprefix(f"{family}-"), PROVIDERS[provider], str(len(rows)), f"{instructions:.2f}",
            *(us(sums[name]) for name in ("issue", "dram", "l2", "shared")), us(sums["model_us"]), f"{ratio:.2f}",
        ])  # fmt: skip
    parts = [report.table(lines, left=2), caption(found)] if len(lines) > 1 else []
    modelled = {row["case"] for row in found["rows"]}
    missing = ", ".join(str(case).removeprefix(f"{family}-") for case in cases_of(family) if str(case) not in modelled)
    return "\n\n".join([*parts, *([f"Not modelled yet: {missing}."] if missing else [])]) + "\n"


FURTHEST = 16


def furthest() -> str:
    """The launches of ours that lose most over their largest floor, each kernel's worst of each kind of case."""
    every = [row for family in CASES for row in load(family)["rows"] if row["provider"] == "cpp" and "model_us" in row]
    every.sort(key=lambda row: row["floor_us"] - row["model_us"])
    heads = ("largest floor, us", f"{LABEL}, us", "model / floor", "loads in flight on a multiprocessor, KB")
    lines = [["kernel", "case", "largest floor is of", *heads]]
    seen: dict[str, int] = {}
    for row in every:
        seen[row["kernel"]] = seen.get(row["kernel"], 0) + 1
        if seen[row["kernel"]] <= 2 and len(lines) <= FURTHEST:
            name, ratio = row["kernel"].removesuffix("_kernel"), row["model_us"] / row["floor_us"]
            figures = [us(each) for each in (row["floor_us"], row["model_us"], ratio, row["in_flight"] / 1e3)]
            lines.append([name, row["case"], row["bound"], *figures])
    return f"{report.table(lines, left=3)}\n\n{caption(load('top_down'))}\n"


def constants_table() -> str:
    found = load("constants")
    moves = [each for row in found["constants"] for each in row["changes"].values()]
    cases = list(dict.fromkeys(case for each in moves for case in each))
    lines = [["constant", "value", "may be", "from", *(f"moves {k}" for k in range(1, len(cases) + 1))]]
    for row in found["constants"]:
        ends = [end for end in dict.fromkeys((row["least"], row["largest"])) if end != row["value"]]
        moved = [[f"{100 * each[case]:+.0f} %" for each in row["changes"].values()] for case in cases]
        lines.append([f"`{row['name']}`", f"{row['value']:g}", " or ".join(f"{end:g}" for end in ends), row["origin"],
                      *map(", ".join, moved)])  # fmt: skip
    notes = "".join(f"{k}: {case}. " for k, case in enumerate(cases, 1))
    return f"{report.table(lines, left=4)}\n\n{notes}{caption(found)}\n"


if __name__ == "__main__":
    sys.exit(main())
