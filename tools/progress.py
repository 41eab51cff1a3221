# SPDX-License-Identifier: Apache-2.0
"""``python tools/progress.py LOG COMMAND...`` runs a build, keeps its output in LOG and shows how far it is.

A terminal shows one line that counts; elsewhere a line is printed every half minute. When the build fails, the end of
its output follows.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EVERY_S = 30.0


def run(log: Path, command: Sequence[str | Path]) -> int:
    """Runs `command` and returns its exit code; lines of setup.py ("fpn_fast: ...") and ninja's counts are shown."""
    terminal = sys.stdout.isatty()
    started = shown = time.monotonic()
    said: set[str] = set()
    lines: list[str] = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            lines = [*lines[-39:], line]
            now = time.monotonic()
            if line.lstrip().startswith("fpn_fast: "):
                if line not in said:  # pip runs setup.py more than once
                    print("\r\033[K" * terminal + line.strip(), flush=True)
                said.add(line)
            elif (count := re.match(r" *\[(\d+)/(\d+)\] ", line)) and (terminal or now - shown >= EVERY_S):
                text = f"  {count[1]} of {count[2]} files compiled, {_clock(now - started)}"
                print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)
                shown = now
    print("\r\033[K" * terminal, end="")
    if process.returncode != 0:
        print("".join(lines), f"failed after {_clock(now - started)}; the whole output is in {log}", sep="")
    return process.returncode


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
