# SPDX-License-Identifier: Apache-2.0
"""Checks for the tests of your project: :func:`assert_parity`, which is also the fixture of the pytest plugin.

:mod:`fpn_fast.testing.tolerances` has the rules that it, ``verify`` and the tests of this package judge by.
"""

from fpn_fast.testing.parity import assert_parity

__all__ = ["assert_parity"]
