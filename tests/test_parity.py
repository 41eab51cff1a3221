# SPDX-License-Identifier: Apache-2.0
"""assert_parity, and the pytest plugin that gives it."""

import argparse
import copy
import dataclasses
import enum
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import fpn_fast
from fpn_fast.testing import assert_parity, tolerances
from fpn_fast.verify import command

ROOT = Path(__file__).parents[1]


def maps(dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(0)
    sizes = {"0": (2, 6, 25, 21), "1": (2, 9, 13, 11)}
    return {name: torch.randn(size, generator=generator).to(dtype).requires_grad_(grad) for name, size in sizes.items()}


class Scaled(nn.Module):
    """Wrong by a factor, or in one element."""

    def __init__(self, factor=1.0, at=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.factor, self.at = factor, at

    def forward(self, x):
        y = x * self.weight * self.factor
        if self.at is not None:
            y = y.index_put((torch.tensor(self.at[0]), torch.tensor(self.at[1])), y.detach()[self.at] + 1)
        return {"y": y, "count": torch.tensor(x.shape[0])}


def test_our_pyramid_is_torchvisions_in_every_way():
    for options in ({}, {"autocast": torch.bfloat16}, {"compile": "aot_eager"}, {"gradients": False}):
        assert_parity(
            fpn_fast.nn.FeaturePyramidNetwork([6, 9], 8),
            torchvision.ops.FeaturePyramidNetwork([6, 9], 8),
            maps(),
            **options,
        )
    both = [
        kind([6, 9], 8).double() for kind in (fpn_fast.nn.FeaturePyramidNetwork, torchvision.ops.FeaturePyramidNetwork)
    ]
    assert_parity(*both, maps(torch.float64))


def test_our_pooler_is_torchvisions():
    boxes = [torch.tensor([[3.3, 5.1, 60.7, 61.9], [0.0, 0, 80, 90]]), torch.empty(0, 4)]
    kinds = fpn_fast.nn.MultiScaleRoIAlign, torchvision.ops.MultiScaleRoIAlign
    features = {name: m[:, :6].detach().requires_grad_() for name, m in maps().items()}
    assert_parity(*(kind(["0", "1"], 5, 2) for kind in kinds), features, boxes, [(100, 84)] * 2)


def test_neither_module_changes():
    fast, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    before = copy.deepcopy((fast.state_dict(), plain.state_dict()))
    x = torch.randn(4, 3, requires_grad=True)
    assert_parity(fast, plain, x)
    assert all(
        torch.equal(a[k], b[k]) for a, b in zip(before, (fast.state_dict(), plain.state_dict()), strict=True) for k in a
    )
    assert x.grad is None
    assert fast.weight.grad is None


def test_functions_and_keywords_and_random_numbers():
    x = torch.randn(5, 3, requires_grad=True)
    assert_parity(
        lambda a, *, p: torch.dropout(a, p, True), lambda a, *, p: nn.functional.dropout(a, p), x, p=0.5, exact=True
    )


COUNT = torch.tensor(4)
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize(
    ("fast", "options", "message"),
    [
        (Scaled(1 + 1e-4), {}, r"output\['y'\] \[4, 3\] float32 differs from the reference in 12 of 12 elements"),
        (Scaled(at=(2, 1)), {}, r"in 1 of 12 elements, most at \(2, 1\): .* and not .*, 1\.0\d*e\+00 apart"),
        (Scaled(at=(2, 1)), {"exact": True}, r"most at \(2, 1\).*have to be equal"),
        (Scaled(1.1), {"rtol": 0.05}, r"rtol 0\.05, atol 0\.0"),
        (Scaled(1.1), {"compile": "aot_eager"}, "differs"),
        (nn.Linear(3, 3), {}, "fast does not load the reference's state_dict"),
        (lambda x: {"y": x}, {}, r"fast lacks \[.*\"output\['count'\]\".*\] of the reference's outputs"),
        (lambda x: {"y": x[:2], "count": COUNT}, {"gradients": False}, r"\['y'\] is \[2, 3\] .*'s is \[4, 3\]"),
        (lambda x: {"y": x.double(), "count": COUNT}, {"gradients": False}, "float64, the reference's"),
        (lambda x: {"y": x * 1, "count": COUNT + 1}, {"gradients": False}, "'count'.*: 5 and not 4.*have to be equal"),
    ],
)  # fmt: skip
def test_what_differs_is_said(fast, options, message):
    with pytest.raises(AssertionError, match=message):
        assert_parity(fast, Scaled(), X, **options)


class Half(torch.autograd.Function):
    """The identity with half its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def test_a_wrong_gradient_is_found_where_asked_for():
    assert_parity(Half.apply, torch.clone, X, gradients=False)
    with pytest.raises(AssertionError, match=r"gradient of input \[0\] \[4, 3\] float32 differs"):
        assert_parity(Half.apply, torch.clone, X)


def test_not_a_number_is_not_a_number():
    bad = torch.tensor([float("nan"), float("inf"), 1.0])
    assert_parity(lambda x: x + 0, lambda x: x * 1, bad)
    with pytest.raises(AssertionError, match=r"in 1 of 3 elements, most at \(0,\): 0\.0 and not nan"):
        assert_parity(lambda x: x.nan_to_num(0, float("inf")), lambda x: x * 1, bad)


def test_a_reference_that_bounds_nothing():
    rounded = lambda x: x.round() if x.dtype == torch.float64 else (x + 0.4).round()  # noqa: E731
    with pytest.raises(ValueError, match=r"off from itself in float64 by .* give rtol and atol"):
        assert_parity(rounded, rounded, torch.rand(9))
    assert_parity(rounded, rounded, torch.rand(9), atol=0)
    with pytest.raises(ValueError, match="cannot run in float64"):
        assert_parity(torch.clone, lambda x: x @ torch.eye(3), torch.rand(3, 3))
    with pytest.raises(ValueError, match="allows no rtol"):
        assert_parity(torch.clone, torch.clone, torch.rand(3), exact=True, atol=1.0)


@dataclasses.dataclass(frozen=True)
class Found:
    boxes: object
    score: object = 0.5


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor


NAN = float("nan")
OTHER_LEAVES = {
    # What both return beside a tensor, and what a wrong one returns in its place.
    "dataclass": (lambda x: Found(x * 2), lambda x: Found(x * 3), r"output\[1\]\.boxes .* differs"),
    "its number": (lambda x: Found(x, 0.5), lambda x: Found(x, 0.25), r"\.score is 0\.25, the reference's is 0\.5"),
    "nested": (lambda x: [Found([x])], lambda x: [Found([x + 1])], r"output\[1\]\[0\]\.boxes\[0\] .* differs"),
    "integer": (lambda x: len(x), lambda x: len(x) + 1, "is 5, the reference's is 4; they have to be equal"),
    "float": (lambda x: 1.0, lambda x: 1.0 + 1e-12, r"is 1\.000000000001, the reference's is 1\.0"),
    "not a number": (lambda x: NAN, lambda x: 0.0, r"is 0\.0, the reference's is nan"),
    "truth": (lambda x: True, lambda x: 1, "is 1, a int; the reference's is True, a bool"),
    "text": (lambda x: "cat", lambda x: "dog", "is 'dog', the reference's is 'cat'"),
    "none": (lambda x: None, lambda x: x, "Tensor; the reference's is None, a NoneType"),
    "dtype": (lambda x: x.dtype, lambda x: torch.float16, "is torch.float16, the reference's is torch.float32"),
    "choice": (lambda x: Colour.RED, lambda x: Colour.BLUE, "BLUE.* the reference's is .*RED"),
    "array": (lambda x: x.detach().numpy() * 2, lambda x: x.detach().numpy(), r"output\[1\] \[4, 3\] float32 differs"),
    "flipped array": (lambda x: np.arange(3)[::-1], lambda x: np.arange(3), r"output\[1\] \[3\] int64 differs"),
    "array's number": (lambda x: np.float32(3), lambda x: np.float32(4), r"output\[1\] \[\] float32 differs"),
}  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "message"), OTHER_LEAVES.values(), ids=OTHER_LEAVES)
def test_outputs_that_are_no_tensor_are_compared(right, wrong, message):
    assert_parity(lambda x: (x * 1, right(x)), lambda x: (x + 0, right(x)), X)
    with pytest.raises(AssertionError, match=message):
        assert_parity(lambda x: (x * 1, wrong(x)), lambda x: (x + 0, right(x)), X)


def test_bounds_of_floats_are_those_that_are_given():
    assert_parity(lambda x: (x, 1.01), lambda x: (x, 1.0), X, rtol=0.02)
    with pytest.raises(AssertionError, match=r"output\[1\] \[\] float64 differs .*rtol 0\.005"):
        assert_parity(lambda x: (x, 1.01), lambda x: (x, 1.0), X, rtol=0.005)


@pytest.mark.parametrize(
    "value", [Boxes(X), {1, 2}, np.array(["a"]), np.array([{}])], ids=["object", "set", "text", "array"]
)
def test_unknown_objects_are_refused_with_advice(value):
    function = lambda x: (x * 1, value)  # noqa: E731
    with pytest.raises(
        ValueError, match=rf"output\[1\] is a .*{type(value).__name__}, .*; give both a module around them"
    ):
        assert_parity(function, function, X)
    if isinstance(value, Boxes):
        with pytest.raises(ValueError, match=r"keyword \['boxes'\] is a .*Boxes, "):
            assert_parity(lambda boxes: boxes.tensor, lambda boxes: boxes.tensor, boxes=value)


def test_inputs_may_be_arrays_dataclasses_and_what_holds_no_tensor():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_parity(
        lambda found, array, act: act(found.boxes * torch.from_numpy(array).sum()),
        lambda found, array, act: act(torch.from_numpy(array * 1).sum() * found.boxes),
        *(Found(X), array, torch.tanh),
    )
    with pytest.raises(AssertionError, match=r"gradient of input \[0\]\.boxes .* differs"):
        assert_parity(lambda found: Half.apply(found.boxes), lambda found: found.boxes.clone(), Found(X))


@pytest.mark.parametrize("nothing", [lambda x: None, lambda x: (), lambda x: {"loss": 3.0}, lambda x: Found("a")])
def test_a_check_that_compares_no_tensor_fails(nothing):
    for options in ({}, {"exact": True}, {"gradients": False}):
        with pytest.raises(AssertionError, match="no tensor was compared"):
            assert_parity(nothing, nothing, X, **options)


class Counted(nn.BatchNorm2d):
    """Sees a part of the batch alone in its running statistics."""

    def __init__(self, seen):
        super().__init__(3)
        self.seen = seen
        self.register_buffer(f"of {seen}", torch.ones(1), persistent=False)

    def forward(self, x):
        with torch.no_grad():
            statistics = super().forward(x[: self.seen])
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True) + 0 * statistics.sum()


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"rtol": 1e-5}], ids=str)
def test_running_statistics_are_compared(options):
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    reference = Counted(4)
    assert_parity(Counted(4), reference, x, **options)
    assert reference.num_batches_tracked == 0
    with pytest.raises(AssertionError, match=r"buffer running_mean afterwards \[3\] float32 differs"):
        assert_parity(Counted(2), reference, x, **options)


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"atol": 9.0}, {"gradients": False}], ids=str)
def test_an_input_that_the_reference_leaves_alone_must_be_left_alone(options):
    x, array = torch.ones(4), np.ones(2)
    with pytest.raises(
        AssertionError, match=r"input \[0\] afterwards \[4\] float32 differs from the reference in 1 of 4"
    ):
        assert_parity(lambda x, y: (y * 1, x[:1].mul_(1 + 1e-6))[0], lambda x, y: y + 0, x, X, **options)
    with pytest.raises(AssertionError, match=r"keyword \['array'\] afterwards \[2\] float64"):
        assert_parity(lambda x, array: (x * 1, array.fill(2))[0], lambda x, array: x + 0, X, array=array, **options)
    assert torch.equal(x, torch.ones(4))
    assert array.tolist() == [1, 1]


def test_functions_that_return_nothing_are_compared_by_what_they_change():
    assert_parity(lambda x: (x.mul_(3), None)[1], lambda x: (x.copy_(x + x + x), None)[1], torch.rand(9))
    with pytest.raises(AssertionError, match=r"input \[0\] afterwards .* differs"):
        assert_parity(lambda x: (x.mul_(2), None)[1], lambda x: (x.mul_(3), None)[1], torch.rand(9))


def total(values):
    """A sum, one addition after the other in the values' own dtype."""
    return functools.reduce(torch.add, values.unbind())


def test_the_bound_of_a_scalar_does_not_hang_on_the_luck_of_the_reference():
    """Sums in two orders: either is off by a few units or, with luck, by none. One in seven was said to differ."""
    for seed in range(12):
        x = torch.rand(256, generator=torch.Generator().manual_seed(seed))
        assert_parity(lambda x: total(x.flip(0)), total, x, gradients=False)
        with pytest.raises(AssertionError, match=r"output .* differs from the reference in 1 of 1"):
            assert_parity(lambda x: total(x) * (1 + 2e-5), total, x, gradients=False)


class Loss(nn.Module):
    """A scalar that depends on weights and integers alone."""

    def __init__(self, backwards):
        super().__init__()
        self.weight, self.backwards = nn.Parameter(torch.linspace(0.1, 1, 256)), backwards

    def forward(self, indices):
        return total(self.weight[indices.flip(0) if self.backwards else indices])


def test_the_bound_of_a_scalar_needs_no_input_of_floats():
    for seed in range(10):
        indices = torch.randperm(256, generator=torch.Generator().manual_seed(seed))
        assert_parity(Loss(True), Loss(False), indices, gradients=False)


PROJECT = """
import pytest, sys, torch
assert "torch" not in EARLY and "fpn_fast" not in EARLY, "the plugin imports them before conftest.py"

@pytest.mark.fpn_fast_parity(gradients=False)
class TestSwap:
    def test_equal(self, assert_parity):
        assert_parity(torch.relu, lambda x: x.clamp(min=0), torch.randn(5))

    @pytest.mark.fpn_fast_parity(exact=True)
    def test_off(self, assert_parity):
        assert assert_parity.keywords == {"gradients": False, "exact": True}
        assert_parity(lambda x: x * (1 + 1e-7), torch.clone, torch.randn(5))

def test_other():
    pass
"""


def run_project(folder, *arguments, project=PROJECT, optimise=()):
    (folder / "conftest.py").write_text("import builtins, sys\nbuiltins.EARLY = list(sys.modules)\n")
    (folder / "test_project.py").write_text(project)
    command = [sys.executable, *optimise, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", *arguments]
    # Named here, for a checkout that was installed before there was a plugin; an entry point names it as well.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "-p", "pytest_fpn_fast"], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stdout


def test_plugin(tmp_path):
    text = run_project(tmp_path, "-m", "fpn_fast_parity")
    assert re.search("1 failed, 1 passed, 1 deselected", text), text
    assert "they have to be equal" in text
    assert "@pytest.mark.fpn_fast_parity(**options): checks parity" in run_project(tmp_path, "--markers")


FAULTY_PROJECT = """
import torch
from fpn_fast import ops, testing

def faulty(x, rois):
    return ops.roi_align(x, rois, 3) * 1.5 + 0.25

def test_fault(assert_parity):
    maps, rois = torch.randn(1, 2, 8, 8), torch.tensor([[0.0, 1.0, 1.0, 6.0, 5.0]])
    assert_parity(faulty, lambda x, rois: ops.roi_align(x, rois, 3), maps, rois, rtol=1e-5)

def test_function():
    testing.assert_parity(torch.clone, torch.neg, torch.ones(3))
"""


def test_a_fault_is_found_without_assert_statements(tmp_path):
    """By the fixture, where pytest rewrites no assertion, and by the function that it hands out. -O leaves less out."""
    text = run_project(tmp_path, project=FAULTY_PROJECT, optimise=["-OO"])
    assert "2 failed" in text, text
    assert "differs from the reference in 18 of 18 elements" in text
    assert "AssertionError: output [3] float32 differs from the reference in 3 of 3 elements" in text


RULES = {
    "equal": lambda x: tolerances.equal(x, torch.ones(4)),
    "exact": lambda x: tolerances.exact(x, torch.ones(4)),
    "close": lambda x: tolerances.close(x, torch.ones(4), 1e-6, 0.0),
    "linear": lambda x: tolerances.linear(x, torch.ones(4).double(), torch.ones(4).double(), terms=1, roundings=1),
    "not_worse": lambda x: tolerances.not_worse(x, torch.ones(4), torch.ones(4).double(), size=4),
    "share_not_worse": lambda x: tolerances.share_not_worse(x, torch.ones(4).double(), torch.ones(4), share=1e-7),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_judges_by_its_figure_and_bound(rule):
    assert rule(torch.ones(4)).within
    for bad in (float("nan"), float("inf"), 1.01, 0.0):
        error = rule(torch.tensor([1.0, 1.0, bad, 1.0]))
        assert not error.within
        assert not error.worst <= error.bound
        assert error.count == 1
        assert "most at (2,)" in error.text
    # Another shape is an error, not something to broadcast.
    assert "is [1] float32, the reference's is [4]" in rule(torch.ones(1)).text
    assert rule(torch.ones(1)).worst == float("inf")


def test_an_error_is_within_a_bound_or_not():
    nan, inf = float("nan"), float("inf")
    errors = {(1.0, 2.0): True, (2.0, 2.0): True, (3.0, 2.0): False, (nan, 2.0): False, (1.0, nan): False,
              (1.0, inf): False, (0.0, 0.0): True}  # fmt: skip
    for (worst, bound), within in errors.items():
        error = tolerances.Error(worst, bound, int(not within), "text")
        assert error.within is within
        # What failed is never hidden by what did not.
        for other in (tolerances.Error(1.9, 2.0), tolerances.Error()):
            assert error.worse(other).within is other.worse(error).within is within


def test_integers_that_one_float64_stands_for_differ():
    large = torch.tensor([2**60, 7])
    assert tolerances.equal(large, large).within
    assert not tolerances.equal(large + torch.tensor([1, 0]), large).within
    assert tolerances.equal(large, large.int()).text == "is [2] int64, the reference's is [2] int32"
    columns = torch.ones(2, 3).t()
    with pytest.raises(AssertionError, match=r"has strides \(1, 3\), the reference's has \(2, 1\)"):
        tolerances.assert_exact(columns, columns.contiguous())
    assert tolerances.equal(columns, columns.contiguous()).within


def test_the_documented_test_passes_and_the_documented_commands_parse(tmp_path):
    text = (ROOT / "docs" / "parity-in-your-ci.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed = run_project(tmp_path, "-m", "fpn_fast_parity", project=code)
    assert "1 passed" in printed, printed
    parser = command.add_arguments(argparse.ArgumentParser().add_subparsers())
    lines = re.findall(r"(?:fpn-fast|python -m fpn_fast) verify (-.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        parser.parse_args(shlex.split(line.partition(";")[0]))
