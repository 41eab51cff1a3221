# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: ``python -m fpn_fast bench`` with NVIDIA's RoIAlign mapping as one more rival on a GPU."""

import importlib.util
import sys

from fpn_fast.__main__ import main
from fpn_fast.bench import machine, providers

if __name__ == "__main__":
    machine.keep_freed_memory()
    if importlib.util.find_spec("triton") is not None:
        from benchmarks import nvidia_mapping

        providers.RIVALS["multiscale_roi_align"] = nvidia_mapping.rivals
    sys.exit(main(["bench", *sys.argv[1:]]))
