# SPDX-License-Identifier: Apache-2.0
"""Python processes that have imported torch and nothing else: a fork of one that has, where an import takes seconds."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, environment, *outputs = json.loads(line)
    child = os.fork()
    if not child:
        status = 0
        for number, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(environment)
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with its standard input, which this process holds."""
    return subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As `python -c code` with `environment` in place of this one; of sys.exit() no code is returned but 1."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder) / name) for name in ("out", "err")]
        server.stdin.write(
            json.dumps([code, dict(os.environ) if environment is None else environment, *outputs]) + "\n"
        )
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(Path(path).read_text() for path in outputs))
