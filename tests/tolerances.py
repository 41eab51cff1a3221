# SPDX-License-Identifier: Apache-2.0
from fpn_fast.testing.tolerances import assert_exact, assert_linear, assert_not_worse

__all__ = ["assert_exact", "assert_linear", "assert_not_worse"]
