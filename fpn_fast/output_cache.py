# SPDX-License-Identifier: Apache-2.0
"""The memory of large outputs on the CPU, kept for later ones.

An op's output of 1 MiB or more that nobody holds any longer gives its memory to the next output of about its size,
whose pages then need not be fetched from the system one at a time: in a merge of large maps that is most of the time.
At most 512 MiB of unused memory are kept, and none that the last few hundred outputs had no use for.
``FPN_FAST_OUTPUT_CACHE_MIB`` in the environment sets another limit when the package is imported, 0 keeps nothing.

A kept tensor is one like any other, but for one thing: its storage does not grow (``resize_`` to more elements raises).
The C++ kernels use it; without the compiled library there is nothing to keep. One cache for the process, and any thread
may use it.
"""

from __future__ import annotations

import os

import torch

from fpn_fast import _library

_VARIABLE = "FPN_FAST_OUTPUT_CACHE_MIB"


def held() -> int:
    """Bytes that are kept and that no tensor uses now."""
    return 0 if _library.problems["cpu"] else torch.ops.fpn_fast.output_cache_held()


def limit() -> int:
    """The most bytes that are kept unused."""
    return 0 if _library.problems["cpu"] else torch.ops.fpn_fast.output_cache_limit(None)


def set_limit(nbytes: int) -> None:
    """Keeps at most `nbytes` unused, and frees what is over it at once; 0 keeps nothing.

    Raises ValueError for a negative number.
    """
    if nbytes < 0:
        raise ValueError(f"the limit must be 0 bytes or more, got {nbytes}")
    if not _library.problems["cpu"]:
        torch.ops.fpn_fast.output_cache_limit(nbytes)


def clear() -> None:
    """Frees all that is kept unused."""
    before = limit()
    set_limit(0)
    set_limit(before)


def _set_limit_from_environment() -> None:
    value = os.environ.get(_VARIABLE)
    if value is None:
        return
    if not value.isdecimal():
        raise ValueError(f"{_VARIABLE} must be a whole number of MiB, 0 to keep nothing, got {value!r}")
    set_limit(int(value) << 20)


_set_limit_from_environment()
