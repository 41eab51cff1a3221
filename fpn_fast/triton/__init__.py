# SPDX-License-Identifier: Apache-2.0
"""The ops in Triton, under ``fpn_fast_triton::`` with the schemas of ``fpn_fast::``. Imported when they can serve."""

from __future__ import annotations

import torch

from fpn_fast import backends

library = torch.library.Library("fpn_fast_triton", "DEF")

# In the interpreter the kernels also run on CPU tensors.
DEVICES = ("CUDA", "CPU") if backends.triton_interprets() else ("CUDA",)

from fpn_fast.triton import top_down  # noqa: E402, F401  registers its ops in `library`
