# SPDX-License-Identifier: Apache-2.0
"""The memory of large outputs on the CPU, kept for later ones.

An op's output of 1 MiB or more that nobody holds any longer gives its memory to the next output of about its size (80
to 100 percent of it), whose pages then need not be fetched from the system one at a time: in a merge of large maps that
is most of the time. At most 512 MiB are kept unused, until :func:`clear`; a block that 256 further outputs had no use
for is freed. ``FPN_FAST_OUTPUT_CACHE_MIB`` in the environment sets another limit when the package is imported, 0 keeps
nothing.

torch does not know of it: neither its profiler nor a failing allocation of its own does, and the storage of such an
output cannot be resized (``resize_`` to more elements raises). What is freed goes to the C library, which returns
blocks of 32 MiB and more to the system at once, smaller ones when it sees fit.

The C++ kernels use it; without the compiled library there is nothing to keep. There is one cache for the process, which
any thread may use; a forked child goes on with its own copy.
"""

from __future__ import annotations

import operator
import os

import torch

from fpn_fast import _library

_VARIABLE = "FPN_FAST_OUTPUT_CACHE_MIB"
_MOST = 2**62


def held() -> int:
    """Bytes that are kept and that no tensor uses now."""
    return 0 if _library.problems["cpu"] else torch.ops.fpn_fast.output_cache_held()


def limit() -> int:
    """The most bytes that are kept unused."""
    return 0 if _library.problems["cpu"] else torch.ops.fpn_fast.output_cache_limit()


def set_limit(nbytes: int) -> None:
    """Keeps at most `nbytes` unused, and frees what is over it at once; 0 keeps nothing.

    Raises ValueError for a negative number, TypeError for what is no integer.
    """
    nbytes = operator.index(nbytes)
    if nbytes < 0:
        raise ValueError(f"the limit must be 0 bytes or more, got {nbytes}")
    if not _library.problems["cpu"]:
        torch.ops.fpn_fast.output_cache_set_limit(min(nbytes, _MOST))


def clear() -> None:
    """Frees all that is kept unused."""
    if not _library.problems["cpu"]:
        torch.ops.fpn_fast.output_cache_clear()


def _set_limit_from_environment() -> None:
    value = os.environ.get(_VARIABLE)
    if value is None:
        return
    if not value.isdecimal():
        raise ValueError(f"{_VARIABLE} must be a whole number of MiB, 0 to keep nothing, got {value!r}")
    set_limit(int(value) << 20)


_set_limit_from_environment()
