# SPDX-License-Identifier: Apache-2.0
"""``python -m fpn_fast``, or ``fpn-fast``: the commands ``info``, ``verify`` and ``bench``."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from fpn_fast import _library, backends
from fpn_fast._version import __version__
from fpn_fast.bench import command as bench
from fpn_fast.bench.machine import keep_freed_memory
from fpn_fast.verify import command as verify


def gather() -> dict[str, Any]:
    """The facts that ``info`` prints, as plain data."""
    facts: dict[str, Any] = {
        "fpn_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {
            device: {name: backends.problem(name, device) for name in backends.BACKENDS} for device in ("cpu", "cuda")
        },
        "notes": {
            device: {name: backends.notes(name, device) for name in backends.BACKENDS} for device in ("cpu", "cuda")
        },
        "build": _library.build_facts() if _library.problems["cpu"] is None else None,
        "kernels": None,
    }
    if torch.cuda.is_available() and _library.problems["cuda"] is None:
        facts["kernels"] = _library.kernel_attributes()
    return facts


def render(facts: dict[str, Any]) -> str:
    """The table that ``info`` prints."""
    lines = [
        f"fpn_fast {facts['fpn_fast']}, Python {facts['python']}, torch {facts['torch']} "
        f"(CUDA {facts['torch_cuda'] or 'none'}), triton {facts['triton'] or 'none'}",
        f"GPU: {facts['device'] or 'none visible'}",
    ]
    if facts["build"] is None:
        lines.append("build: no compiled library")
    else:
        lines += ["build:", *(f"  {name:<9} {value}" for name, value in facts["build"].items())]
    for device, problems in facts["backends"].items():
        lines.append(f"backends for {device} tensors:")
        for name, p in problems.items():
            state = "; ".join(["available", *facts["notes"][device][name]]) if p is None else f"not available: {p}"
            lines.append(f"  {name:<9} {state}")
    if facts["kernels"] is not None:
        lines.append(f"{'kernel':<64} registers  shared B  local B  occupancy")
        for k in facts["kernels"]:
            lines.append(
                f"{k['name']:<64} {k['registers']:>9}  {k['shared_bytes']:>8}  {k['local_bytes']:>7}  "
                f"{k['occupancy']:>8.0%}"
            )
    return "\n".join(lines)


def ends_with_its_reader(main: Callable[..., int]) -> Callable[..., int]:
    """Make a command end quietly, with the shell's code, once what reads its output, such as head, has ended."""

    @functools.wraps(main)
    def run(*arguments: Any) -> int:
        try:
            try:
                code = main(*arguments)
            except SystemExit:
                # argparse's, after --help.
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes at its end what it still holds, and would report the same error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        return code

    return run


@ends_with_its_reader
def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    description = "Shows what this installation has (info), whether it is correct (verify) and how fast it is (bench)."
    parser = argparse.ArgumentParser(prog="python -m fpn_fast", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    summary = "prints versions, the build, and which backends can run, with what the others need"
    info = commands.add_parser("info", help=summary, description=summary.capitalize() + ".")
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")
    info.set_defaults(run=_info)
    verify.add_arguments(commands)
    bench.add_arguments(commands)
    options = parser.parse_args(arguments)
    if arguments is None and options.command == "bench":
        keep_freed_memory()
    return options.run(options)


def _info(options: argparse.Namespace) -> int:
    facts = gather()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
