# SPDX-License-Identifier: Apache-2.0
"""The ops: each file holds one op's contract, and whichever backend is chosen computes it."""

from fpn_fast.ops.top_down import top_down, upsample_add

__all__ = ["top_down", "upsample_add"]
