# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from helpers import fused_maps
from helpers.battery import Battery, Case, Op
from helpers.fused_maps import BIFPN, CASES

from fpn_fast import backends, ops, reference
from fpn_fast.ops.fuse_maps import _CODES, _FORWARD, FORMS
from fpn_fast.reference.fuse_maps import resized
from fpn_fast.testing import tolerances


def raw(backend, maps, case):
    codes = [_CODES[form] for form in case.options["resample"]]
    weights = torch.tensor(case.options["weights"], device=maps[0].device)
    return _FORWARD[backend], (maps, *maps[0].shape[2:], codes, weights, True, None, False, 1, 1)


class TestFuseMaps(Battery):
    op = Op(
        fused_maps.fused, fused_maps.plain, raw, fused_maps.check_forward, fused_maps.check_backward,
        registered=("cpp", "triton"),
    )  # fmt: skip
    cases, emulated = CASES, True
    tiny = Case("tiny", ((2, 3), (1, 2), (4, 6)), BIFPN, batch=2, channels=2)
    derivatives = (BIFPN, BIFPN | {"resample": ["identity", "bilinear", "adaptive_max"], "activation": "silu"})

    def test_not_a_number_and_infinity_pass(self, target):
        maps = [torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 8, 8)]
        maps[0][0, 0, 1, 1], maps[1][0, 1, 1, 1], maps[2][0, 2, 3, 3] = float("nan"), -float("inf"), float("nan")
        maps[2][0, 3, :3] = -float("inf")
        for dtype in (torch.float32, torch.float16):
            given = [m.to(target[1], dtype) for m in maps]
            for options in (BIFPN, BIFPN | {"activation": "relu6"}):
                tolerances.assert_exact(*fused_maps.fused(given, **options), *fused_maps.plain(given, **options))

    @pytest.mark.parametrize("rule", [None, "softmax", "fast"])
    def test_gradients_of_weights_and_gate(self, target, rule, memory_format):
        if target == ("triton", "cpu") and (rule != "fast" or memory_format == torch.channels_last):
            pytest.skip("the interpreter takes seconds for each")
        case = CASES[1]
        options = {**case.options, "weight_rule": rule, "activation": "relu", "divide": 3}
        results = []
        for dtype in (torch.float64, torch.float32, torch.float32):
            maps = case.inputs(dtype, target[1], memory_format, grad=True)
            weights = torch.tensor([0.3, 1.2, -0.7], device=target[1], dtype=dtype, requires_grad=True)
            gate = torch.sin(torch.arange(16.0, device=target[1], dtype=dtype)).view(2, 8, 1, 1).requires_grad_()
            with backends.use(target[0] if len(results) == 2 else "reference"):
                found = []
                for leaf, others in ((weights, {"weights": weights}), (gate, {"gate": gate, "weight_rule": None})):
                    given = {key: value for key, value in options.items() if key != "weights"} | others
                    out = ops.fuse_maps(maps, (8, 12), **given)
                    found.append(torch.autograd.grad(out, leaf, torch.cos(out.detach()))[0])
            results.append(found)
        # Each is a difference of sums of these terms, with factors below 1.
        doubles = [m.double() for m in case.inputs(torch.float64, target[1], memory_format, grad=False)]
        terms = [resized(m, (8, 12), form).abs().sum() for m, form in zip(doubles, options["resample"], strict=True)]
        for truth, same, mine in zip(*results, strict=True):
            assert mine.abs().max() > 0
            tolerances.assert_not_worse(mine, same, truth, size=24, magnitude=sum(terms))

    @pytest.mark.parametrize("form", FORMS[FORMS.index("max_pool") :])
    def test_the_first_of_equal_maxima_gets_the_gradient(self, target, form):
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(-2, 1, (1, 3, 8, 9), generator=generator).float().to(target[1])
        size = (4, 4 if form in ("max_pool_2x2", "adaptive_max") else 5)
        grads = []
        for function in (ops.fuse_maps, lambda m, size, resample: reference.fuse_maps(m, size, [resample])):
            leaf = x.clone().requires_grad_()
            out = function([leaf], size, resample=form)
            grads.append(
                torch.autograd.grad(out, leaf, torch.arange(1.0, out.numel() + 1, device=x.device).view_as(out))
            )
        assert torch.equal(*(g for (g,) in grads))


def nodes(maps, weights, rule):
    """effdet/efficientdet.py: FpnCombine.forward of resampled maps."""
    weights = weights.to(maps[0].dtype)
    if rule == "softmax":
        out = torch.stack(maps, dim=-1) * torch.softmax(weights, dim=0)
    else:
        edges = F.relu(weights)
        out = torch.stack([(maps[i] * edges[i]) / (torch.sum(edges) + 0.0001) for i in range(len(maps))], dim=-1)
    return torch.sum(out, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["softmax", "fast"])
def test_the_reference_equals_bifpns_node(dtype, rule):
    maps = [m.to(dtype) for m in torch.randn(3, 2, 4, 9, 8)]
    weights = torch.tensor([0.4, 1.7, 0.9])
    found = reference.fuse_maps(maps, (9, 8), ["identity"] * 3, weights, rule)
    assert torch.equal(found, nodes(maps, weights, rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_equals_both_sums(dtype):
    maps = list(torch.randn(4, 2, 4, 9, 8).to(dtype))
    forms = ["identity"] * 4
    assert torch.equal(reference.fuse_maps(maps, (9, 8), forms), torch.stack(maps).sum(0))
    one_by_one = ((maps[0] + maps[1]) + maps[2]) + maps[3]
    assert torch.equal(reference.fuse_maps(maps, (9, 8), forms, sequential=True), one_by_one)


def test_two_maps_are_the_merge():
    lateral, top = torch.randn(1, 4, 9, 8), torch.randn(1, 4, 5, 4)
    fused = ops.fuse_maps([lateral, top], (9, 8), resample=["identity", "nearest"])
    assert torch.equal(fused, ops.upsample_add(lateral, top))


def test_autocast_promotes_to_the_widest():
    maps = [torch.randn(1, 4, 4, 4, dtype=torch.bfloat16), torch.randn(1, 4, 4, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = ops.fuse_maps(maps, 4, resample="identity")
        assert ops.fuse_maps([maps[0]] * 2, 4, resample="identity").dtype == torch.bfloat16
    assert torch.equal(fused, maps[0] + maps[1])


def maps(*sizes, channels=2, dtype=torch.float32):
    return [torch.zeros(1, channels, *size, dtype=dtype) for size in sizes]


TWO = maps((4, 4), (2, 2))
NEAREST = {"resample": ["identity", "nearest"]}
ERRORS = [
    ([], {"resample": "nearest"}, ValueError, "at least one map, got an empty"),
    (TWO * 3, {"resample": "nearest"}, ValueError, "5 or fewer, got 6"),
    ([*maps((4, 4)), *maps((2, 2), channels=3)], NEAREST, ValueError, r"share N and C, \(1, 2\)"),
    ([*maps((4, 4)), *maps((2, 2), dtype=torch.float64)], NEAREST, TypeError, "one dtype outside autocast"),
    (TWO, {"resample": "cubic"}, ValueError, "resample must be identity, .*got 'cubic'"),
    (TWO, {"resample": ["nearest"]}, ValueError, "one form or one per map, 2, got 1"),
    (TWO, {"resample": "identity"}, ValueError, "'identity' gives map 1 2 x 2 pixels, which is not size, 4 x 4"),
    (TWO, {"resample": ["identity", "max_pool"]}, ValueError, "'max_pool' gives map 1 1 x 1 pixels"),
    (TWO, NEAREST | {"weights": torch.ones(3)}, ValueError, r"weights must be \[K\], \(2,\), got \(3,\)"),
    (TWO, NEAREST | {"weights": [1.0, 1.0]}, TypeError, "weights must be a tensor, got list"),
    (
        TWO,
        NEAREST | {"weights": torch.ones(2), "weight_rule": "slow"},
        ValueError,
        'weight_rule must be None, "softmax"',
    ),
    (TWO, NEAREST | {"weight_rule": "fast"}, ValueError, "goes with weights, got 'fast' without"),
    (TWO, NEAREST | {"gate": torch.ones(1, 3, 1, 1)}, ValueError, r"gate must be \[N, C, 1, 1\], \(1, 2, 1, 1\)"),
    (
        TWO,
        NEAREST | {"gate": torch.ones(1, 2, 1, 1), "weights": torch.ones(2)},
        ValueError,
        "without weights, got both",
    ),
    (TWO, NEAREST | {"rounding": "never"}, ValueError, 'rounding must be "once" or "sequential"'),
    (TWO, NEAREST | {"divide": 0}, ValueError, "divide must be 1 or more, got 0"),
    (TWO, NEAREST | {"divide": 1.5}, TypeError, "divide must be an integer"),
    (TWO, NEAREST | {"activation": "gelu"}, ValueError, "activation must be None"),
    (TWO, NEAREST | {"size": 0}, ValueError, "at least 1 x 1 pixel, got 0 x 0"),
]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("given", "options", "error", "message"), ERRORS, ids=[e[3][:24] for e in ERRORS])
def test_errors(backend, given, options, error, message):
    with backends.use(backend), pytest.raises(error, match=message):
        ops.fuse_maps(given, **({"size": (4, 4)} | options))
