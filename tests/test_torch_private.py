# SPDX-License-Identifier: Apache-2.0
"""The private names of torch: read in one file, and not needed."""

import re
import subprocess
import sys
from pathlib import Path

import torch

import fpn_fast
from fpn_fast import _torch_private
from fpn_fast.ops import _registration

NAMES = (
    "_AutoDispatchBelowAutograd",
    "_assert_async",
    "_are_functorch_transforms_active",
    "_dispatch_has_kernel_for_dispatch_key",
    "_is_tracing",
    "_set_deterministic_algorithms",
)
# torch itself reads them too: they are gone only while the one file that reads them is imported, before the package.
WITHOUT = f"""
import importlib.util, sys
import torch
owners = {{name: torch if name in vars(torch) else torch._C for name in {NAMES}}}
hidden = {{name: getattr(owner, name) for name, owner in owners.items()}}
for name, owner in owners.items():
    delattr(owner, name)
spec = importlib.util.spec_from_file_location("fpn_fast._torch_private", {_torch_private.__file__!r})
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
for name, value in hidden.items():
    setattr(owners[name], name, value)
from fpn_fast import _torch_private, backends, ops, reference
assert ops.top_down.__globals__["below_autograd"] is torch.no_grad
assert _torch_private.below_autograd is torch.no_grad
assert _torch_private.set_deterministic_algorithms is torch.use_deterministic_algorithms
assert backends.choose("cpu", "top_down") == WANTED
_torch_private.assert_async(torch.tensor(True), "passes")
try:
    _torch_private.assert_async(torch.tensor(False), "labels must be")
except RuntimeError as error:
    assert str(error) == "labels must be"
else:
    raise AssertionError("not raised")
for requires_grad in (False, True):
    laterals = [torch.randn(1, 2, *size, requires_grad=requires_grad) for size in ((6, 8), (3, 4))]
    pooled = ops.multiscale_roi_align(laterals, torch.tensor([[0.0, 1, 1, 20, 20]]), 2, [0.25, 0.125])
    merged, expected = ops.top_down(laterals)[0], reference.top_down(laterals)[0]
    assert torch.equal(merged, expected)
    assert merged.requires_grad is pooled.requires_grad is requires_grad
    if requires_grad:
        ours, theirs = (torch.autograd.grad(each.sum(), laterals) for each in (merged, expected))
        assert all(map(torch.equal, ours, theirs))
        torch.autograd.grad(pooled.sum(), laterals)
print("whole")
"""


def test_the_package_works_without_them():
    wanted = repr(fpn_fast.backends.choose("cpu", "top_down"))
    script = WITHOUT.replace("WANTED", wanted)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert found.stdout.split() == ["whole"], found.stderr


def test_public_lookup_of_kernels_agrees():
    ops = [f"fpn_fast::{name}" for name in _registration.SCHEMAS if hasattr(torch.ops.fpn_fast, name)]
    for op in [*ops, "aten::nonzero", "aten::_thnn_fused_gru_cell"]:
        for key in ("CPU", "CUDA"):
            assert _torch_private._kernel_by_lookup(op, key) == _torch_private.has_kernel(op, key), (op, key)
    assert not _torch_private._kernel_by_lookup("fpn_fast::no_such_op", "CPU")


def test_no_other_file_reads_one():
    package = Path(fpn_fast.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"\btorch\._[a-zA-Z]|from torch\._", path.read_text())
    }
    assert found == {"_torch_private.py"}
