# SPDX-License-Identifier: Apache-2.0
"""One measurement is one row; a results file is a machine and its rows, one a line, so that a diff shows what moved."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fpn_fast.bench.machine import slug


@dataclass
class Row:
    """A provider's figures for a case by one metric; none where it was refused.

    case: a frozen dataclass, whose fields become the row's.
    metric, method: see timing.py; the method is ``clock``, ``graph`` (replay) or ``events``.
    bytes: the least that the case can move; None where nobody counted.
    p50, p20, p80: microseconds per call over `rounds` samples of `calls` calls.
    speedup: by provider, the median over all rounds of its time over this one's in the same round.
    copy_gb_per_s, copy_share: a copy's bandwidth in the same rounds, and the share of it that `bytes` in `p50` make.
    backend: who computed the result, as the dispatcher saw it: ``cpp``, ``triton`` or ``torch``.
    peak_bytes: the peak memory of one call, outputs included.
    operations, syncs: per call, counted and not timed, see counting.py.
    stages: milliseconds per stage of a whole detector.
    refused: why there are no figures.
    """

    case: Any
    provider: str
    metric: str
    method: str
    bytes: int | None = None
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    calls: int = 0
    speedup: dict[str, float] | None = None
    copy_gb_per_s: float | None = None
    copy_share: float | None = None
    backend: str | None = None
    peak_bytes: int | None = None
    operations: int | None = None
    syncs: int | None = None
    stages: dict[str, float] | None = None
    refused: str | None = None


def four_digits(value: Any) -> Any:
    """Floats to four digits: more is noise, and makes the file hard to read."""
    if isinstance(value, dict):
        return {key: four_digits(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def as_dict(row: Row) -> dict[str, Any]:
    """`row` as JSON holds it: the case's fields, then the row's, without those that are None."""
    fields = asdict(row)
    return {key: four_digits(value) for key, value in (fields.pop("case") | fields).items() if value is not None}


def write_text(path: Path, text: str) -> None:
    """Writes all of `text`, or nothing if the process ends before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write_rows(path: Path, head: dict[str, Any], rows: list[dict[str, Any]], name: str = "rows") -> None:
    """Writes a JSON object: the fields of `head`, then `rows`, one a line."""
    lines = ",\n".join(map(json.dumps, rows))
    write_text(path, f'{json.dumps(head, indent=1)[:-2]},\n"{name}": [\n{lines}\n]}}\n')


class Results:
    """The rows of one family on one machine, in a file that is complete after every case.

    keep: earlier rows that stay in a file of the same commit; by default none do.
    """

    def __init__(
        self,
        folder: Path,
        family: str,
        machine: dict[str, Any],
        keep: Callable[[dict[str, Any]], bool] = lambda row: False,
    ) -> None:
        self.path = folder / slug(machine) / f"{family}.json"
        self.machine = dict(machine)
        earlier = json.loads(self.path.read_text()) if self.path.exists() else {"machine": {}, "rows": []}
        same = earlier["machine"].get("commit") == machine["commit"]
        self.rows: list[dict[str, Any]] = [row for row in earlier["rows"] if same and keep(row)]

    def add(self, rows: list[Row]) -> None:
        """Adds a case's rows and writes the file."""
        self.rows += map(as_dict, rows)
        self.save()

    def save(self) -> None:
        """Writes the file."""
        write_rows(self.path, {"machine": self.machine}, self.rows)
