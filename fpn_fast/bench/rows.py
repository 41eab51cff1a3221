# SPDX-License-Identifier: Apache-2.0
"""One measurement is one row; a results file is a machine and its rows, one a line, so that a diff shows what moved."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fpn_fast.bench.cases import Case
from fpn_fast.bench.machine import slug


@dataclass
class Row:
    """A provider's time for a case by one metric; no figures where it was refused.

    Times are microseconds per call. `speedup` holds, by provider, the median over all rounds of that provider's time
    over this one's in the same round.
    """

    case: Case
    provider: str
    #: wall: as a caller waits; gpu_cold and gpu_warm: on the GPU alone, see gpu_timing.py.
    metric: str
    #: clock, graph (replay) or events.
    method: str
    bytes: int
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    calls: int = 0
    speedup: dict[str, float] | None = None
    #: The bandwidth of the copy measured in the same rounds, and the share of it that `bytes` in `p50` make.
    copy_gb_per_s: float | None = None
    copy_share: float | None = None
    #: Memory that one call takes at its peak, outputs included.
    peak_bytes: int | None = None
    #: Of one call, counted, not timed (see counting.py): operations handed to the device, and host waits.
    operations: int | None = None
    waits: int | None = None
    refused: str | None = None


def _short(value: Any) -> Any:
    """Floats to four digits: more is noise, and makes the file hard to read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return value


def as_dict(row: Row) -> dict[str, Any]:
    """`row` as JSON holds it: the case's fields beside the row's, and nothing that is None."""
    fields = asdict(row)
    fields = {**fields.pop("case"), **fields}
    return {key: _short(value) for key, value in fields.items() if value is not None}


def write_text(path: Path, text: str) -> None:
    """Writes all of `text` or, if the process ends before, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(text)
    os.replace(unfinished, path)


class Results:
    """The rows of one family on one machine, in a file that is complete after every case."""

    def __init__(self, folder: Path, family: str, machine: dict[str, Any]) -> None:
        self.path = folder / slug(machine) / f"{family}.json"
        self.machine = dict(machine)
        self.rows: list[Row] = []

    def add(self, rows: list[Row]) -> None:
        """Adds a case's rows and writes the file."""
        self.rows += rows
        self.save()

    def save(self) -> None:
        """Writes the file."""
        lines = ",\n".join(json.dumps(as_dict(row)) for row in self.rows)
        write_text(self.path, f'{{"machine": {json.dumps(self.machine, indent=1)},\n"rows": [\n{lines}\n]}}\n')
