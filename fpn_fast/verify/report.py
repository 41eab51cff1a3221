# SPDX-License-Identifier: Apache-2.0
"""The output of ``verify``: a progress bar, a table, JSON, JUnit XML and Markdown."""

from __future__ import annotations

import platform
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any, TextIO

import torch

from fpn_fast import _library
from fpn_fast._version import __version__
from fpn_fast.verify.run import Failure, Row

_HEADER = ("op", "backend", "device", "type", "cases", "worst ulp", "error", "bound", "decisions", "result")
_LEFT = 4
_WIDTH = 24
#: Failed cases that are printed per row; JSON has them all.
_PRINTED_FAILURES = 3


class Progress:
    """A bar on a terminal, redrawn at most ten times a second. Elsewhere it prints nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._shown = stream, 0.0
        self._wanted = stream.isatty()
        self._began = time.monotonic()

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if not self._wanted or (now - self._shown < 0.1 and done < total):
            return
        self._shown = now
        share = done / total if total else 1.0
        bar = ("#" * round(_WIDTH * share)).ljust(_WIDTH, ".")
        left = f"{(now - self._began) * (1 - share) / share:4.0f} s left" if 0 < share < 1 else ""
        self._stream.write(f"\r[{bar}] {share:4.0%} {left} {text}"[:110].ljust(110))
        self._stream.flush()
        if done >= total:
            self.clear()

    def clear(self) -> None:
        if self._wanted:
            self._stream.write("\r" + " " * 110 + "\r")
            self._stream.flush()


def environment() -> dict[str, Any]:
    """The versions and the machine that the figures belong to."""
    return {
        "fpn_fast": __version__,
        "library": str(_library.path("_C")) if _library.problems["cpu"] is None else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cells(row: Row) -> tuple[str, ...]:
    error, measure = row.measure.error, row.measure
    figures = (f"{measure.ulp:.3g}", f"{error.worst:.1e}", f"{error.bound:.1e}", str(measure.decisions))
    result = "left out" if not row.cases else "pass" if row.passed else f"FAIL ({len(row.failures)})"
    return (row.op, row.backend, row.device, row.dtype, str(row.cases), *(figures if row.cases else [""] * 4), result)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, and the notes below them."""
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    last = len(_HEADER) - 1
    text = [
        "  ".join(
            c.ljust(w) if i < _LEFT or i == last else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([line.rstrip() for line in text] + _notes(rows))


def _notes(rows: Sequence[Row]) -> list[str]:
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(f"{row.op} {row.dtype}")
    return [f"{note}: {len(of)} rows of triton on cpu" for note, of in notes.items()]


def failures(rows: Sequence[Row], options: str) -> str:
    """Each failed case with the command that runs it alone. options: more arguments of that command."""
    text = []
    for row in rows:
        for failure in row.failures[:_PRINTED_FAILURES]:
            text += [f"{failure.case}: {failure.text}", f"    {failure.message}", f"    {command(failure, options)}"]
        if len(row.failures) > _PRINTED_FAILURES:
            more = len(row.failures) - _PRINTED_FAILURES
            text.append(f"... and {more} more of {row.op}/{row.backend}/{row.device}/{row.dtype}; --json has them all")
    return "\n".join(text)


def command(failure: Failure, options: str) -> str:
    return f"python -m fpn_fast verify --case '{failure.case}'{options}"


def summary(rows: Sequence[Row], seconds: float) -> str:
    cases, failed = sum(row.cases for row in rows), sum(len(row.failures) for row in rows)
    where = environment()
    return (
        f"{cases} cases in {seconds:.0f} s, {failed} failed; fpn_fast {where['fpn_fast']}, torch {where['torch']}, "
        f"{where['gpu'] or 'no GPU'}"
    )


def as_json(rows: Sequence[Row], settings: dict[str, Any], seconds: float, options: str) -> dict[str, Any]:
    """All results as plain data. Infinite errors become null."""
    finite = lambda value: value if value < float("inf") else None  # noqa: E731
    return {
        "environment": environment(),
        "settings": settings,
        "seconds": round(seconds, 1),
        "passed": all(row.passed for row in rows),
        "rows": [
            {
                **{name: getattr(row, name) for name in ("op", "backend", "device", "dtype", "cases")},
                "ulp": finite(row.measure.ulp),
                "error": finite(row.measure.error.worst),
                "bound": finite(row.measure.error.bound),
                "decisions": row.measure.decisions,
                "passed": row.passed,
                "note": row.note,
                "failures": [{**vars(failure), "command": command(failure, options)} for failure in row.failures],
            }
            for row in rows
        ],
    }


def as_junit(rows: Sequence[Row], seconds: float, options: str) -> str:
    suite = ET.Element(
        "testsuite",
        name="fpn_fast verify",
        tests=str(len(rows)),
        failures=str(sum(not row.passed for row in rows)),
        skipped=str(sum(row.cases == 0 for row in rows)),
        errors="0",
        time=f"{seconds:.1f}",
    )
    for row in rows:
        name = f"{row.backend}-{row.device}-{row.dtype}"
        test = ET.SubElement(suite, "testcase", classname=f"fpn_fast.verify.{row.op}", name=name)
        if row.cases == 0:
            ET.SubElement(test, "skipped", message=row.note)
        if row.failures:
            first = row.failures[0]
            body = "\n".join(f"{f.text}\n{f.message}\n{command(f, options)}" for f in row.failures)
            # XML allows no control characters, which an exception's message may have.
            ET.SubElement(test, "failure", message=_printable(first.message)).text = _printable(body)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def as_markdown(rows: Sequence[Row], seconds: float, options: str) -> str:
    """A table for the summary of a pull request."""
    align = ["---" if i < _LEFT else "---:" for i in range(len(_HEADER) - 1)] + ["---"]
    lines = [_HEADER, align, *(_cells(row) for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    problems = failures(rows, options)
    return "\n".join([*text, "", summary(rows, seconds), *(["", "```", problems, "```"] if problems else []), ""])
