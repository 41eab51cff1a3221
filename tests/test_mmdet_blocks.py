# SPDX-License-Identifier: Apache-2.0
"""Swapped residual blocks of mmdetection against its own, as a stand-in states them; see also against_mmdet.py."""

import copy
import io
import sys

import pytest
import torch
from helpers import mmdet_stand_in
from torch import nn

import fpn_fast
from fpn_fast.bench import counting

OP = "fpn_fast::frozen_batch_norm"
#: One of each block: the calls of the op where all norms are fixed.
CALLS = 2 + 3 + 3 + 3 + 3


@pytest.fixture(autouse=True)
def integration(monkeypatch):
    mmdet_stand_in.install(monkeypatch)
    module = fpn_fast.integrations.mmdet
    yield module
    # Its classes are of the stand-in.
    del sys.modules[module.__name__], fpn_fast.integrations.mmdet


def downsample(before, after, stride, norm):
    """As a ResNet-D has it."""
    pool = [nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)] if stride > 1 else []
    return nn.Sequential(*pool, nn.Conv2d(before, after, 1, bias=False), norm(after))


def blocks(norm=nn.BatchNorm2d, **options):
    torch.manual_seed(0)
    make = mmdet_stand_in
    model = nn.Sequential(
        make.BasicBlock(8, 12, 2, downsample(8, 12, 2, norm), norm=norm, **options),
        make.Bottleneck(12, 4, 2, downsample(12, 16, 2, norm), "caffe", norm=norm, **options),
        make.Bottleneck(16, 4, norm=norm, **options),
        make.BottleneckOfResNeXt(16, 6, downsample=downsample(16, 24, 1, norm), norm=norm, **options),
        make.BottleneckOfResNeXt(24, 6, norm=norm, **options),
    )
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            for vector in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(vector, 0.5, 1.5)
            module.bias.data.sub_(1)
            module.running_mean.sub_(1)
    return model.double()


def norm_eval(model):
    """What mmdetection's ResNet does in training: the statistics stay, the weights learn."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def results(model, leaf_requires_grad=True):
    leaf = torch.rand(2, 8, 17, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf.requires_grad_(leaf_requires_grad)
    y = model(leaf)
    y.square().sum().backward()
    leaves = [each for each in (leaf, *model.parameters()) if each.requires_grad]
    found = [y.detach(), *(each.grad for each in leaves)]
    model.zero_grad()
    return found


def calls_of(model):
    x = torch.rand(1, 8, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        return counting.count(lambda: model(x)).operators[OP]


def check_same(fast, plain, calls, **options):
    found, expected = results(fast, **options), results(plain, **options)
    assert not torch.equal(*expected[0])
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11 * other.abs().max().item())
    assert calls_of(fast) == calls


@pytest.mark.parametrize("kind", ["BatchNorm2d", "SyncBatchNorm", "mmengine"])
def test_norms_with_fixed_statistics(kind):
    norms = sys.modules["mmengine.utils.dl_utils.parrots_wrapper"]
    plain = norm_eval(blocks(norms.SyncBatchNorm if kind == "mmengine" else getattr(nn, kind)))
    fast = copy.deepcopy(plain)
    report = fpn_fast.accelerate(fast)
    assert [(entry.name, entry.module, entry.note) for entry in report.swapped] == [
        ("0", "mmdet.BasicBlock", "now fpn_fast.BasicBlock"),
        *((name, "mmdet.Bottleneck", "now fpn_fast.Bottleneck") for name in "12"),
        *((name, "mmdet.Bottleneck", "now fpn_fast.ResNeXtBottleneck") for name in "34"),
    ]
    check_same(fast, plain, CALLS)
    check_same(fast.eval(), plain.eval(), CALLS)
    for model in (plain, fast):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
    check_same(fast, plain, CALLS)


def test_live_norms_run_mmdetections_code_at_each_call():
    plain = blocks()
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    for _ in range(2):
        own, theirs = results(fast.train()), results(plain.train())
        assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(fast.buffers(), plain.buffers(), strict=True))
        check_same(norm_eval(fast), norm_eval(plain), CALLS)


def changed(change, model):
    block = model[2]
    if change == "hook":
        block.bn2.register_forward_hook(lambda module, given, output: output * 2)
    elif change == "relu":
        block.relu.register_forward_pre_hook(lambda module, given: (given[0] - 1,))
    elif change == "activation":
        block.relu = nn.SiLU()
    elif change == "norm":
        block.bn2 = nn.GroupNorm(2, 4).double()
    elif change == "patched":
        block.bn3.forward = lambda x, own=block.bn3: nn.BatchNorm2d.forward(own, x) * 3
    else:
        # A deformable convolution is called like this, between fused norms.
        block.conv2.forward = lambda x, own=block.conv2: nn.Conv2d.forward(own, x) * 3


#: What the report names.
CHANGES = {
    "hook": "norm2 (hooks)", "relu": "relu (hooks)", "activation": "relu (SiLU)", "norm": "norm2 (GroupNorm)",
    "patched": "norm3 (forward)", "convolution": None,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True])
def test_a_changed_block_runs_mmdetections_code(change, late):
    plain = norm_eval(blocks())
    fast = copy.deepcopy(plain)
    if late:
        fpn_fast.accelerate(fast)
    changed(change, plain)
    changed(change, fast)
    if not late:
        named = CHANGES[change]
        expected = f"; its library's code runs where you changed {named}" if named else ""
        notes = {entry.name: entry.note for entry in fpn_fast.accelerate(fast).swapped}
        assert notes["2"] == f"now fpn_fast.Bottleneck{expected}"
        assert notes["1"] == "now fpn_fast.Bottleneck"
    check_same(fast, plain, CALLS - 3 if CHANGES[change] else CALLS)


@pytest.mark.parametrize(("kind", "calls"), [("Bottleneck", 2), ("BottleneckOfResNeXt", 2 + 3 + 3)])
def test_a_method_replaced_on_a_class(kind, calls, monkeypatch):
    """ResNeXt's block inherits that of ResNet."""
    plain = norm_eval(blocks())
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    kind = getattr(mmdet_stand_in, kind)
    monkeypatch.setattr(kind, "forward", lambda self, x: self.add(x).tanh())
    check_same(fast, plain, calls)


def test_plugins_are_left_and_run():
    plain = mmdet_stand_in.Bottleneck(8, 2, plugins=[nn.Softplus()]).double().eval()
    fast = copy.deepcopy(plain)
    report = fpn_fast.accelerate(fast)
    assert [entry.note for entry in report.left] == ["it has plugins, which have no fused implementation"]
    assert report.swapped == []
    built = fpn_fast.integrations.mmdet.Bottleneck(8, 2, plugins=[nn.Softplus()]).double().eval()
    built.load_state_dict(plain.state_dict())
    check_same(built, plain, 0)


def test_subclasses_are_left():
    mine = type("Mine", (mmdet_stand_in.Bottleneck,), {})(8, 2)
    note = "a subclass of mmdet.Bottleneck, which may compute something else"
    assert [entry.note for entry in fpn_fast.accelerate(mine).left] == [note]
    assert type(mine).__name__ == "Mine"


def test_copies_checkpoints_and_undoing():
    plain = norm_eval(blocks())
    fast, kinds = copy.deepcopy(plain), [type(module) for module in plain.modules()]
    fpn_fast.accelerate(fast)
    assert list(fast.state_dict()) == list(plain.state_dict())
    expected = results(fast)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert type(again[3]) is fpn_fast.integrations.mmdet.ResNeXtBottleneck
        assert all(torch.equal(a, b) for a, b in zip(results(again), expected, strict=True))
    for each in plain.parameters():
        each.data.mul_(1.5)
    fast.load_state_dict(plain.state_dict())
    check_same(fast, plain, CALLS)
    for each in fast.parameters():
        each.data.mul_(1.5)
    plain.load_state_dict(fast.state_dict())
    check_same(fast, plain, CALLS)
    fpn_fast.restore(fast)
    assert [type(module) for module in fast.modules()] == kinds
    check_same(fast, plain, 0)


def test_checkpointed_blocks_keep_their_inputs_alone():
    plain, fast = norm_eval(blocks(with_cp=True)), norm_eval(blocks(with_cp=True))
    fpn_fast.accelerate(fast)
    check_same(fast, plain, CALLS)
    check_same(fast, norm_eval(blocks()), CALLS)
    # Without a gradient of the image its first block is not checkpointed.
    check_same(fast, plain, CALLS, leaf_requires_grad=False)
    x = torch.rand(2, 8, 17, 14, dtype=torch.float64, requires_grad=True)
    kept, model = [], nn.Sequential(fast[0])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        model(x)
    assert kept == [x.shape]


def test_the_norms_of_a_downsampling_are_part_of_the_last_call():
    """Also behind an average pooling, as in ResNet-D; but for another eps."""
    fast = norm_eval(blocks())
    fpn_fast.accelerate(fast)
    found = counting.count(lambda: results(fast)).operators
    assert found[OP] == CALLS
    assert found["aten::native_batch_norm"] == 0
    fast[0].downsample[2].eps = 0.25
    assert counting.count(lambda: results(fast)).operators["aten::native_batch_norm"] == 1
