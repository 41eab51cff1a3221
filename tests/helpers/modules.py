# SPDX-License-Identifier: Apache-2.0
"""How a module is compared with another one: outputs, gradients and copies."""

import copy
import io
import pickle

import torch
from torch import nn

from fpn_fast.testing import tolerances


def outputs_and_gradients(outputs, leaves):
    """Outputs, and the gradients of `leaves`; those of the outputs are eighths, the same in every type."""
    outputs = list(outputs)
    generator = torch.Generator().manual_seed(4)
    seeds = [(torch.randint(-8, 9, out.shape, generator=generator) / 8).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)]


def assert_none_worse(ours, plain, exact, size):
    """Each of `ours` is no worse than in `plain`, which is computed in the same type; None where that has None."""
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            tolerances.assert_not_worse(a, b, c, size=size)


def with_drawn_biases(module):
    """Biases are drawn as zeros, which would hide that one is not used."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return module


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


#: Each makes an equal module of one.
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module)), "save": _saved}
