# SPDX-License-Identifier: Apache-2.0
import copy
from collections import OrderedDict

import pytest
import torch
import torchvision
from helpers.modules import COPIES
from torch import nn
from torchvision.ops import feature_pyramid_network as torchvisions

from fpn_fast import backends
from fpn_fast.nn import FeaturePyramidNetwork, _standalone

CHANNELS = [8, 12, 16]
SIZES = [(25, 42), (13, 21), (7, 11)]
EXTRAS = {
    "none": lambda module: None,
    "pool": lambda module: module.LastLevelMaxPool(),
    "p6p7_from_p5": lambda module: module.LastLevelP6P7(6, 6),
    "p6p7_from_c5": lambda module: module.LastLevelP6P7(16, 6),
}
NORMS = {"no_norm": None, "batch_norm": nn.BatchNorm2d}


def features(names=("0", "1", "2"), dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return OrderedDict(
        (name, torch.randn(2, c, *size, generator=generator).to(dtype))
        for name, c, size in zip(names, CHANNELS, SIZES, strict=True)
    )


class StandaloneNetwork(_standalone.FeaturePyramidNetwork):
    """As fpn_fast.nn's on a machine without torchvision."""

    forward = FeaturePyramidNetwork.forward


def build(kind, extra, norm, seed=3):
    torch.manual_seed(seed)
    module = _standalone if kind is StandaloneNetwork else torchvisions
    return kind(CHANNELS, 6, extra_blocks=EXTRAS[extra](module), norm_layer=NORMS[norm])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_same_keys_initialisation_and_results_as_torchvision(extra, norm):
    for kind in (FeaturePyramidNetwork, StandaloneNetwork):
        ours, theirs = build(kind, extra, norm), build(torchvisions.FeaturePyramidNetwork, extra, norm)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert ours.state_dict()._metadata[""] == theirs.state_dict()._metadata[""] == {"version": 2}
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        out, expected = ours(features()), theirs(features())
        assert isinstance(out, OrderedDict)
        assert list(out) == list(expected)
        assert all(torch.equal(a, b) for a, b in zip(out.values(), expected.values(), strict=True))
        sum(o.square().sum() for o in out.values()).backward()
        sum(o.square().sum() for o in expected.values()).backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3, msg=name)


def test_is_accepted_where_torchvisions_is():
    assert issubclass(FeaturePyramidNetwork, torchvision.ops.FeaturePyramidNetwork)
    assert isinstance(build(FeaturePyramidNetwork, "pool", "no_norm").extra_blocks, torchvisions.ExtraFPNBlock)


@pytest.mark.parametrize("kind", [FeaturePyramidNetwork, StandaloneNetwork])
def test_old_checkpoints_load(kind):
    module = _standalone if kind is StandaloneNetwork else torchvisions
    ours = kind(CHANNELS, 6, module.LastLevelMaxPool())
    old = OrderedDict((name.replace(".0.", "."), tensor + 1) for name, tensor in ours.state_dict().items())
    assert "inner_blocks.0.weight" in old
    ours.load_state_dict(copy.copy(old))
    assert torch.equal(ours.inner_blocks[1][0].weight, old["inner_blocks.1.weight"])


@pytest.mark.parametrize("kind", [FeaturePyramidNetwork, StandaloneNetwork])
def test_constructor_errors(kind):
    with pytest.raises(ValueError, match="in_channels=0 is currently not supported"):
        kind([8, 0], 6)
    with pytest.raises(TypeError, match="ExtraFPNBlock"):
        kind([8], 6, extra_blocks=nn.Identity())


def test_fewer_maps_than_blocks_take_the_last_block_for_the_coarsest():
    torch.manual_seed(3)
    theirs = torchvision.ops.FeaturePyramidNetwork([8, 12, 12], 6)
    torch.manual_seed(3)
    ours = FeaturePyramidNetwork([8, 12, 12], 6)
    two = OrderedDict(list(features().items())[:2])
    for a, b in zip(ours(two).values(), theirs(two).values(), strict=True):
        assert torch.equal(a, b)


def test_names_order_and_plain_dicts():
    ours = build(FeaturePyramidNetwork, "pool", "no_norm")
    assert list(ours(dict(features(("res3", "res4", "res5"))))) == ["res3", "res4", "res5", "pool"]


def test_autocast_compile_and_channels_last():
    ours = build(FeaturePyramidNetwork, "pool", "no_norm")
    theirs = build(torchvisions.FeaturePyramidNetwork, "pool", "no_norm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(ours(features()).values(), theirs(features()).values(), strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            assert torch.equal(a, b)
    # The graph is ours, the code that Inductor makes of it torch's.
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(features()).values(), ours(features()).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    last = ours.to(memory_format=torch.channels_last)
    inputs = {k: v.to(memory_format=torch.channels_last) for k, v in features().items()}
    assert all(o.is_contiguous(memory_format=torch.channels_last) for o in last(inputs).values())


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_every_backend_serves_the_module(backend):
    if backends.problem(backend, "cpu"):
        pytest.skip(backends.problem(backend, "cpu"))
    ours, theirs = (build(k, "none", "no_norm") for k in (FeaturePyramidNetwork, torchvisions.FeaturePyramidNetwork))
    with backends.use(backend):
        out = ours(features())
    for a, b in zip(out.values(), theirs(features()).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(copied):
    ours = build(FeaturePyramidNetwork, "p6p7_from_p5", "batch_norm").eval()
    again = copied(ours)
    assert type(again) is FeaturePyramidNetwork
    for a, b in zip(again(features()).values(), ours(features()).values(), strict=True):
        assert torch.equal(a, b)
