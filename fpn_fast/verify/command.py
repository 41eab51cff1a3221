# SPDX-License-Identifier: Apache-2.0
"""``python -m fpn_fast verify``: its arguments and exit code."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from fpn_fast import backends
from fpn_fast.verify import report
from fpn_fast.verify.checks import CHECKS
from fpn_fast.verify.run import Plan, devices, name_of, read_shapes, run

CASES, QUICK_CASES, SHAPE_CASES = 24, 6, 2

SUMMARY = "checks every op and module on this machine"
_DESCRIPTION = """\
Checks every op and module, forward and backward, on every backend and device of this machine. The cases are a seeded
random sample of shapes, dtypes, memory formats and edge cases. Values are compared with the reference in float64, by
the tolerances of fpn_fast's own tests. Decisions, such as which boxes are kept, have to equal the reference's.
The exit code is 0 if every case passed, 1 if one failed, and 2 for bad arguments."""
_EPILOG = """\
Of the cases of a row, the table shows:
  worst ulp  the largest error, in units in the last place of the type
  error      the error closest to its bound, or furthest over it; a row passes if this is at most its bound
  bound      how large that error may be
  decisions  how many differ from the reference's: what is kept, matched, or above a threshold

A file for --shapes lists sizes by op. Each entry is checked with --cases random contents and options:
  {"top_down": [{"batch": 2, "channels": 256, "sizes": [[200, 336], [100, 168], [50, 84], [25, 42]]}],
   "multiscale_roi_align": [{"sizes": [[200, 336], [100, 168]], "rois": 512, "output_size": 7}]}
Sizes that an entry leaves out are drawn at random. The sizes of each op:
"""
#: The options that name a file to write, and its content.
_FILES = {"json": "all results as JSON", "junit": "the results as JUnit XML", "markdown": "the table as Markdown"}


def _keys() -> str:
    rows: dict[tuple[str, ...], list[str]] = {}
    for check in CHECKS.values():
        if check.keys:
            rows.setdefault(check.keys, []).append(check.name)
    return "".join(f"  {', '.join(keys)}: {', '.join(names)}\n" for keys, names in rows.items())


def add_arguments(commands: Any) -> argparse.ArgumentParser:
    """Adds ``verify`` to the commands of ``python -m fpn_fast``."""
    parser = commands.add_parser(
        "verify",
        help=SUMMARY,
        description=_DESCRIPTION,
        epilog=_EPILOG + _keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ops",
        nargs="+",
        metavar="OP",
        choices=list(CHECKS),
        help="check only these ops and modules; by default all: %(choices)s",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=backends.BACKENDS,
        help="check only these backends; by default all that this machine has",
    )
    parser.add_argument("--quick", action="store_true", help=f"--cases {QUICK_CASES}: under a minute on two cores")
    parser.add_argument("--cases", type=int, metavar="N", help=f"cases per op, backend and dtype; {CASES} by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random sample; 0 by default")
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="check only the sizes in this JSON file; see below")
    parser.add_argument(
        "--case", metavar="OP/BACKEND/DEVICE/TYPE/NUMBER", help="run one case; a failure prints this name"
    )
    for option, content in _FILES.items():
        parser.add_argument(f"--{option}", type=Path, metavar="FILE", help=f"also write {content} to FILE")
    parser.set_defaults(run=verify, parser=parser)
    return parser


def verify(options: argparse.Namespace) -> int:
    try:
        plan = _plan(options)
        for path in (options.json, options.junit, options.markdown):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"there is no folder {path.parent} to write {path.name} to")
    except ValueError as error:
        # Exits with 2.
        options.parser.error(str(error))
    began = time.monotonic()
    rows = run(plan, report.Progress(sys.stderr))
    seconds = time.monotonic() - began
    also = "" if options.shapes is None else f" --shapes {shlex.quote(str(options.shapes))}"
    settings = {"seed": plan.seed, "cases": plan.cases, "ops": list(plan.ops), "backends": list(plan.backends)}
    found = report.as_json(rows, settings, seconds, also)
    texts = {
        options.json: json.dumps(found, indent=2, allow_nan=False) + "\n",
        options.junit: report.as_junit(rows, seconds, also),
        options.markdown: report.as_markdown(rows, seconds, also),
    }
    for path, text in texts.items():
        if path is not None:
            path.write_text(text)
    problems = report.failures(rows, also)
    print(report.table(rows), *([problems] if problems else []), report.summary(rows, seconds), sep="\n")
    return 0 if all(row.passed for row in rows) else 1


def _plan(options: argparse.Namespace) -> Plan:
    if options.quick and options.cases is not None:
        raise ValueError("--quick and --cases both set the number of cases; leave out one of them")
    if options.cases is not None and options.cases < 1:
        raise ValueError(f"--cases must be at least 1, got {options.cases}")
    if options.seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {options.seed}")
    wanted = options.backends or [b for b in backends.BACKENDS if any(_serves(b, device) for device in devices())]
    for name in wanted:
        if not any(_serves(name, device) for device in devices()):
            raise ValueError(f"backend {name} is not available here: {backends.problem(name, 'cpu')}")
    shapes = {} if options.shapes is None else read_shapes(options.shapes)
    default = SHAPE_CASES if shapes else QUICK_CASES if options.quick else CASES
    ops = options.ops or list(shapes or CHECKS)
    if missing := [op for op in ops if shapes and op not in shapes]:
        raise ValueError(f"{options.shapes} has no sizes for {', '.join(missing)}")
    only = None
    if options.case is not None:
        if options.ops or options.backends or options.quick or options.cases or options.seed:
            raise ValueError("--case names one case; leave out --ops, --backends, --quick, --cases and --seed")
        only = _parse_case(options.case)
        ops = [only[0]]
    return Plan(ops, wanted, options.seed, options.cases or default, shapes, only)


def _serves(backend: str, device: str) -> bool:
    return backends.problem(backend, device) is None


def _parse_case(text: str) -> tuple[str, str, str, str, int]:
    parts = text.split("/")
    if len(parts) != 5 or not parts[4].isdecimal():
        raise ValueError(f"--case must be OP/BACKEND/DEVICE/TYPE/NUMBER, got {text!r}")
    op, backend, device, dtype, number = parts
    if op not in CHECKS:
        raise ValueError(f"there is no op {op!r}; there are {', '.join(CHECKS)}")
    if backend not in backends.BACKENDS or device not in devices() or not _serves(backend, device):
        reason = backends.problem(backend, device) if backend in backends.BACKENDS else "there is no such backend"
        raise ValueError(f"backend {backend!r} does not serve {device} tensors here: {reason or 'there is no GPU'}")
    if dtype not in map(name_of, CHECKS[op].dtypes):
        raise ValueError(f"{op} is not checked in {dtype!r}")
    return op, backend, device, dtype, int(number)
