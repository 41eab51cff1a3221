# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter; it must be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _round_to_bfloat16_in_the_interpreter() -> None:
    """Triton's interpreter cuts a float32 off where a GPU rounds it to nearest even; mend that, not kernels."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def rounded(values, from_type, to_type, rounding_mode):
        if from_type == tl.float32 and to_type == tl.bfloat16:
            source = torch.from_numpy(values.astype("float32", copy=True))
            return source.bfloat16().view(torch.uint16).numpy()
        if from_type == tl.bfloat16 and to_type == tl.float32:
            # Its own conversion gets subnormals wrong; this one is a shift.
            return values.astype("uint32") << 16
        return convert(values, from_type, to_type, rounding_mode)

    interpreter._convert_float = rounded


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_to_bfloat16_in_the_interpreter()
    import fpn_fast.triton.top_down

    # The interpreter's time goes by programs, not elements: fewer, larger ones, still several for each launch.
    fpn_fast.triton.top_down.BLOCK_ELEMENTS = 4096


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
