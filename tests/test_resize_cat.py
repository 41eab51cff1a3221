# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from helpers.battery import Battery, Case, Op

from fpn_fast import backends, ops, reference
from fpn_fast.ops.fuse_maps import FORMS
from fpn_fast.ops.resize_cat import _FORWARD
from fpn_fast.testing import tolerances

CASES = [
    Case("nearest", ((8, 12), (4, 6), (2, 3)), {"mode": "nearest"}),
    Case("bilinear", ((13, 21), (7, 11), (4, 6), (13, 21)), channels=5),
    Case("align_corners", ((8, 6), (3, 5), (1, 1)), {"mode": "bilinear_align_corners"}, channels=9),
    Case("downsampling", ((3, 5), (7, 4)), batch=1, channels=3),
    Case("one_map", ((3, 5),), channels=2),
    Case("batch_of_0", ((8, 6), (4, 3)), batch=0),
    Case("odd", ((7, 9), (4, 5), (14, 17)), {"mode": "nearest"}, batch=1, channels=8),
]


def narrowed(maps):
    """Maps of other widths: the second lacks a channel where it has more than one."""
    return [m[:, 1:] if i == 1 and m.size(1) > 1 else m for i, m in enumerate(maps)]


def joined(maps, mode="bilinear"):
    return [ops.resize_cat(narrowed(maps), maps[0].shape[2:], mode=mode)]


def plain(maps, mode="bilinear"):
    return [reference.resize_cat(narrowed(maps), maps[0].shape[2:], mode)]


def check_forward(outputs, maps, case, strides=True):
    (output,), (same,) = outputs, plain(maps, **case.options)
    if case.options.get("mode") == "nearest":
        (tolerances.assert_exact if strides else tolerances.assert_equal)(output, same)
        return
    (truth,) = plain([m.double() for m in maps], **case.options)
    tolerances.assert_not_worse(output, same, truth, size=max(map(max, case.sizes)))


def gradients(maps, seeds, options):
    leaves = [m.detach().requires_grad_() for m in maps]
    return torch.autograd.grad(plain(leaves, **options), leaves, seeds)


def check_backward(grads, maps, seeds, case):
    expected = gradients(maps, seeds, case.options)
    doubles = [m.double() for m in maps]
    truths = gradients(doubles, [s.double() for s in seeds], case.options)
    magnitudes = gradients(doubles, [s.double().abs() for s in seeds], case.options)
    for grad, same, truth, magnitude in zip(grads, expected, truths, magnitudes, strict=True):
        tolerances.assert_not_worse(grad, same, truth, size=max(map(max, case.sizes)), magnitude=magnitude)


def raw(backend, maps, case):
    code = FORMS.index(case.options["mode"])
    return _FORWARD[backend], (maps, *maps[0].shape[2:], [0, *[code] * (len(maps) - 1)])


class TestResizeCat(Battery):
    op = Op(joined, plain, raw, check_forward, check_backward, registered=("cpp", "triton"))
    cases, emulated = CASES, True
    tiny = Case("tiny", ((4, 6), (2, 3)), {"mode": "nearest"}, batch=2, channels=2)


def test_the_reference_equals_upernets_tail():
    """transformers/models/upernet: UperNetHead.forward, which resizes all but the finest."""
    given = [torch.randn(2, 4, *size) for size in ((8, 12), (4, 6), (2, 3))]
    size = given[0].shape[2:]
    found = reference.resize_cat(given, size, "bilinear")
    again = torch.cat([given[0], *(F.interpolate(g, size=size, mode="bilinear") for g in given[1:])], 1)
    assert torch.equal(found, again)


def maps(*sizes, dtype=torch.float32):
    return [torch.zeros(1, 2, *size, dtype=dtype) for size in sizes]


ERRORS = [
    ([], {}, ValueError, "at least one map, got an empty"),
    (maps(*[(2, 2)] * 9), {}, ValueError, "8 or fewer, got 9"),
    ([*maps((4, 4)), *maps((2, 2), dtype=torch.float64)], {}, TypeError, "one dtype outside autocast"),
    ([*maps((4, 4)), torch.zeros(2, 2, 2, 2)], {}, ValueError, "must share N, 1, got"),
    (maps((4, 4)), {"mode": "cubic"}, ValueError, "mode must be .*got 'cubic'"),
    (maps((4, 4)), {"size": (0, 2)}, ValueError, "at least 1 x 1 pixel, got 0 x 2"),
    (maps((4, 4)), {"size": (1, 2, 3)}, ValueError, "one integer or two"),
]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("given", "options", "error", "message"), ERRORS, ids=[e[3][:24] for e in ERRORS])
def test_errors(backend, given, options, error, message):
    with backends.use(backend), pytest.raises(error, match=message):
        ops.resize_cat(given, **({"size": (4, 4)} | options))
