# SPDX-License-Identifier: Apache-2.0
"""Parity for the tests of a project that swaps our modules in: :func:`assert_parity`, the pytest plugin's fixture too,
and the tolerances that it, ``verify`` and our own tests have in common."""

from fpn_fast.testing.parity import assert_parity

__all__ = ["assert_parity"]
