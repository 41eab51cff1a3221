# SPDX-License-Identifier: Apache-2.0
"""The logger ``fpn_fast``: which backend serves a call, and where no kernel does.

- DEBUG: one line for each op, device, dtype and memory format, the first time, with the backend and the reason. Set the
  level before the first call: later calls of an op look nothing up.
- WARNING: one line where an op runs by the reference although nobody asked for it, or where a swapped module runs its
  original library's code.

``FPN_FAST_LOG=debug`` in the environment prints both on stderr. Calls under ``torch.compile`` write no line.
"""

from __future__ import annotations

import logging
import os

import torch

LOGGER = logging.getLogger("fpn_fast")
_LEVELS = ("debug", "info", "warning", "error")
_written: set[tuple[object, ...]] = set()


def _set_up(level: str) -> None:
    if level not in _LEVELS:
        raise ValueError(f"FPN_FAST_LOG must be {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}, got {level!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False


if "FPN_FAST_LOG" in os.environ:
    _set_up(os.environ["FPN_FAST_LOG"])


def debugs() -> bool:
    """Whether DEBUG lines are written for this call."""
    return not torch.compiler.is_compiling() and LOGGER.isEnabledFor(logging.DEBUG)


def once(level: int, key: tuple[object, ...], text: str, *arguments: object) -> None:
    """Writes a line, but for the second time with the same key and under a compiler."""
    if not torch.compiler.is_compiling() and key not in _written:
        _written.add(key)
        LOGGER.log(level, text, *arguments)
