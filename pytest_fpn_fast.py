# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: the fixture ``assert_parity`` and the marker ``fpn_fast_parity``, which takes its options.

It is a module outside the package: pytest imports a plugin before a project's conftest.py, and must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

_MARKER = "fpn_fast_parity"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{_MARKER}(**options): checks parity with fpn_fast; the options go to fpn_fast.testing.assert_parity",
    )


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., None]:
    """:func:`fpn_fast.testing.assert_parity`, with the options of the test's marker ``fpn_fast_parity``."""
    from fpn_fast import testing

    options: dict[str, Any] = {}
    # The outermost marker first, so that a test's own marker wins.
    for marker in reversed(list(request.node.iter_markers(_MARKER))):
        if marker.args:
            raise pytest.UsageError(f"{_MARKER} takes options by name, got {marker.args}")
        options.update(marker.kwargs)
    return partial(testing.assert_parity, **options)
