# SPDX-License-Identifier: Apache-2.0
"""Swapped residual blocks of torchvision's ResNets against torchvision's own, and when they run its code."""

import copy
import functools
import io

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

import fpn_fast
from fpn_fast.bench import counting
from fpn_fast.nn.resnet import BasicBlock

OP, BACKWARD = "fpn_fast::frozen_batch_norm", "fpn_fast::frozen_batch_norm_backward"
MODELS = {
    "basic": functools.partial(resnet.ResNet, resnet.BasicBlock, [2, 1, 1, 1]),
    "bottleneck": functools.partial(resnet.ResNet, resnet.Bottleneck, [2, 1, 1, 1], width_per_group=8),
    "resnext": functools.partial(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=2),
    "dilated": functools.partial(
        resnet.ResNet, resnet.Bottleneck, [1, 1, 2, 1], width_per_group=8,
        replace_stride_with_dilation=[False, False, True],
    ),
}  # fmt: skip
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
NORMS = pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])


def build(name="bottleneck", norm=FrozenBatchNorm2d, **changes):
    torch.manual_seed(0)
    model = MODELS[name](norm_layer=norm, num_classes=4, **changes)
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            for vector in (module.weight, module.bias, module.running_mean, module.running_var):
                vector.data.uniform_(0.5, 1.5)
            module.bias.data.sub_(1)
            module.running_mean.sub_(1)
    return model


def pair(*arguments, **options):
    plain = build(*arguments, **options).eval()
    fast = copy.deepcopy(plain)
    fpn_fast.accelerate(fast)
    return plain, fast


def image(**options):
    return torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(1)).to(**options)


def gradients(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.arange(y.numel(), dtype=y.dtype).view_as(y) - 1)
    return [y.detach(), x.grad, *(each.grad for each in model.parameters())]


def operators(call):
    return counting.count(call).operators


def count_of(model, x):
    with torch.no_grad():
        return operators(lambda: model(x))


def check_same(fast, plain, x=None):
    """Bit for bit; but the gradients of a norm's weight and bias are sums, in another order than torch's."""
    x = image() if x is None else x
    found, expected = gradients(fast, x), gradients(plain, x)
    # The images differ in every activation that counts.
    assert not torch.equal(*expected[0])
    for own, other in zip(found, expected, strict=True):
        if own is None or own.dim() > 1:
            assert (own is None and other is None) or torch.equal(own, other)
        else:
            assert own.dtype == other.dtype
            assert (own - other).norm() <= 1e-5 * other.norm()


@FORMATS
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_with_frozen_norms(name, memory_format):
    plain, fast = pair(name)
    check_same(fast, plain, image(memory_format=memory_format))
    check_same(fast.train(), plain.train(), image(memory_format=memory_format))
    blocks = sum(MODELS[name].args[1])
    found, before = count_of(fast, image()), count_of(plain, image())
    # One for each norm of the blocks but those of downsampling, and the stem's.
    assert found[OP] == blocks * (2 if name == "basic" else 3) + 1
    assert before[OP] == 0
    assert found["aten::relu_"] == 1
    assert found["aten::add_"] == 0 < before["aten::add_"]


@FORMATS
@pytest.mark.parametrize("name", MODELS)
def test_batch_norm_in_evaluation(name, memory_format):
    plain, fast = pair(name, nn.BatchNorm2d)
    x = image(memory_format=memory_format)
    check_same(fast, plain, x)
    assert count_of(fast, x)[OP] > 0
    assert count_of(fast, x)["aten::native_batch_norm"] == 1  # the stem's


def test_live_batch_norm_runs_torchvisions_code_at_each_call():
    plain, fast = pair("bottleneck", nn.BatchNorm2d)
    for _ in range(2):
        fast.train(), plain.train()
        check_same(fast, plain)
        assert count_of(fast, image())[OP] == 0
        for own, other in zip(fast.buffers(), plain.buffers(), strict=True):
            own.copy_(other)
        fast.eval(), plain.eval()
        assert count_of(fast, image())[OP] == 15
        check_same(fast, plain)
    # Partly frozen: the first two stages, as in fine-tuning.
    fast.train(), plain.train()
    for model in (fast, plain):
        model.layer1.eval(), model.layer2.eval()
    assert count_of(fast, image())[OP] == 9
    check_same(fast, plain)
    # Of a block whose first norm is live, none is fused.
    fast.layer1[0].bn1.train()
    assert count_of(fast, image())[OP] == 6


def test_frozen_and_live_norms_in_one_block():
    plain, fast = pair()
    for model in (plain, fast):
        torch.manual_seed(3)
        block = model.layer2[0]
        block.bn2, block.downsample[1] = nn.BatchNorm2d(block.bn2.weight.numel()), nn.BatchNorm2d(512)
        model.train()
    check_same(fast, plain)
    for model in (plain, fast):
        model.eval()
    check_same(fast, plain)


def changed_block(change, block):
    norm = block.bn2
    if change == "forward hook":
        norm.register_forward_hook(lambda module, given, output: output * 2)
    elif change == "pre-hook":
        block.relu.register_forward_pre_hook(lambda module, given: (given[0] - 1,))
    elif change == "backward hook":
        norm.register_full_backward_hook(lambda module, grad, _: (grad[0] * 2,))
        block.relu.inplace = False
    elif change == "patched norm":
        norm.forward = lambda x: x * 2
    elif change == "patched activation":
        block.relu.forward = torch.sigmoid
    elif change == "activation":
        block.relu = nn.SiLU()
    elif change == "norm":
        block.bn2 = nn.GroupNorm(2, norm.weight.numel())
    elif change == "subclass":
        block.bn2 = type("Mine", (FrozenBatchNorm2d,), {"forward": lambda self, x: x * 3})(norm.weight.numel())
    elif change == "own forward":
        block.forward = lambda x: block.downsample(x) * 2
    return block


#: What the report names, and how often the op is called: 16 times in an unchanged model, where a block's four norms
#: are three calls.
CHANGES = {
    "forward hook": ("bn2 (hooks)", 17), "pre-hook": ("relu (hooks)", 17), "backward hook": ("bn2 (hooks)", 17),
    "patched norm": ("bn2 (forward)", 16), "patched activation": ("relu (forward)", 17),
    "activation": ("relu (SiLU)", 17), "norm": ("bn2 (GroupNorm)", 16), "subclass": ("bn2 (Mine)", 16),
    "own forward": (None, 14),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True])
def test_a_changed_part_is_called_as_torchvision_does(change, late):
    plain = build().eval()
    fast, (named, calls) = copy.deepcopy(plain), CHANGES[change]
    if late:
        fpn_fast.accelerate(fast)
    for model in (fast, plain):
        changed_block(change, model.layer1[0])
    if not late:
        notes = {entry.name: entry.note for entry in fpn_fast.accelerate(fast).swapped}
        expected = f"; its library's code runs where you changed {named}" if named else ""
        assert notes["layer1.0"] == f"now fpn_fast.Bottleneck{expected}"
        assert notes["layer1.1"] == "now fpn_fast.Bottleneck"
    check_same(fast, plain)
    assert count_of(fast, image())[OP] == calls


@pytest.mark.parametrize("change", ["hook", "patched", "more", "eps", "rule"])
def test_another_downsample(change):
    """It is called as a whole, or its norm is."""
    plain, fast = pair()
    for model in (plain, fast):
        torch.manual_seed(5)
        down = model.layer1[0].downsample
        if change == "hook":
            down.register_forward_hook(lambda module, given, output: output * 2)
        elif change == "patched":
            down[1].forward = lambda x: x * 3
        elif change == "more":
            down.append(nn.Tanh())
        elif change == "eps":
            down[1].eps = 0.25
        else:
            down[1] = nn.BatchNorm2d(256).eval()
    check_same(fast, plain)


@pytest.mark.parametrize("owner", [FrozenBatchNorm2d, resnet.Bottleneck, nn.ReLU])
def test_a_method_replaced_on_a_class(owner, monkeypatch):
    plain, fast = pair()
    calls, own = [], owner.forward
    monkeypatch.setattr(owner, "forward", lambda self, *given: calls.append(1) or own(self, *given))
    plain(image())
    expected = len(calls)
    fast(image())
    assert len(calls) == 2 * expected > 0


def test_hooks_for_every_module():
    _, fast = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        fast(image())
    finally:
        handle.remove()
    assert seen.count(nn.ReLU) == 16
    assert seen.count(fpn_fast.nn.FrozenBatchNorm2d) == 20


@NORMS
def test_autocast_promotes_as_torchvision_does(norm):
    plain, fast = pair("bottleneck", norm)
    wide = copy.deepcopy(plain).double()
    right = wide(image(dtype=torch.float64))
    dtypes = {}
    for model in (plain, fast):
        dtypes[model] = []
        for block in (model.layer1[0], model.layer2[0], model.layer4[0]):
            block.register_forward_hook(lambda module, given, output, m=model: dtypes[m].append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        own, theirs = (gradients(model, image()) for model in (fast, plain))
    assert dtypes[fast] == dtypes[plain]
    assert dtypes[fast][0] == (torch.float32 if norm is FrozenBatchNorm2d else torch.bfloat16)
    if norm is FrozenBatchNorm2d:
        assert torch.equal(own[0], theirs[0])
    assert (own[0] - right).norm() <= 2 * (theirs[0] - right).norm()
    assert [each.dtype for each in own] == [each.dtype for each in theirs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    plain, fast = pair()
    plain, fast = plain.to(dtype), fast.to(dtype)
    own, theirs = fast(image(dtype=dtype)), plain(image(dtype=dtype))
    assert own.dtype == dtype
    if dtype == torch.float64:
        assert torch.equal(own, theirs)
    else:
        right = copy.deepcopy(plain).double()(image(dtype=dtype).double())
        assert (own - right).norm() <= 2 * (theirs - right).norm()


@NORMS
def test_copies_checkpoints_and_undoing(norm):
    plain, fast = pair("basic", norm)
    assert list(fast.state_dict()) == list(plain.state_dict())
    expected = fast(image())
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert type(again.layer1[0]) is BasicBlock
        assert torch.equal(again(image()), expected)
    other = build("basic", norm).eval()
    for each in other.parameters():
        each.data.mul_(1.5)
    fast.load_state_dict(other.state_dict())
    check_same(fast, other)
    plain.load_state_dict(fast.state_dict())
    assert torch.equal(plain(image()), other(image()))
    kinds = [type(module) for module in plain.modules()]
    assert [type(module) for module in fast.modules()] != kinds
    fpn_fast.restore(fast)
    assert [type(module) for module in fast.modules()] == kinds
    assert torch.equal(fast(image()), plain(image()))


def test_gradient_checkpointing():
    plain, fast = pair()
    for model in (plain, fast):
        blocks = model.layer1
        blocks.forward = lambda x, blocks=blocks: checkpoint(
            lambda x: functools.reduce(lambda y, block: block(y), blocks, x), x, use_reentrant=False
        )
    check_same(fast, plain)
    check_same(fast, pair()[0])


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@NORMS
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_training_on_several_processes(norm, wrapper, process_group):
    _, fast = pair("basic", norm)
    expected = gradients(fast, image())
    wrapped = fast
    if wrapper == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(fast)
    else:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for block in (fast.layer1[0], fast.layer2[0]):
            fully_shard(block, mesh=mesh)
        fully_shard(fast, mesh=mesh)
    own = gradients(wrapped, image())
    own = [each.full_tensor() if isinstance(each, distributed.tensor.DTensor) else each for each in own]
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    assert count_of(wrapped, image())[OP] == count_of(pair("basic", norm)[1], image())[OP]


def test_a_compiler_gets_torchvisions_code():
    plain, fast = pair()
    graphs = {}

    def backend(graph, inputs, of):
        graphs.setdefault(of, []).append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    for name, model in (("plain", plain), ("fast", fast)):
        block = model.layer1[0]
        x = torch.rand(1, 64, 6, 5)
        compiled = torch.compile(block, backend=functools.partial(backend, of=name), fullgraph=True)
        assert torch.equal(compiled(x), block(x))
        torch._dynamo.reset()
    assert graphs["fast"] == graphs["plain"]


def test_operators_of_a_training_step():
    """One launch for each norm and what follows it, one for its gradient, and none for residuals but their sums."""
    plain, fast = pair()
    x = image()
    before, after = (operators(lambda model=model: gradients(model, x)) for model in (plain, fast))
    assert after[OP] == 16
    assert after[BACKWARD] == 16
    assert after["aten::threshold_backward"] == 1
    assert after["aten::mul"] == after["aten::rsqrt"] == 0 < before["aten::mul"]
    assert sum(after.values()) < 0.5 * sum(before.values())


def saved_bytes(model, x):
    """Of what the backward pass keeps and the model does not have anyway."""
    own = {each.untyped_storage().data_ptr() for each in model.state_dict().values()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(each.nbytes() for each in storages.values())


@NORMS
def test_a_step_keeps_no_more_memory(norm):
    plain, fast = pair("bottleneck", norm)
    if norm is nn.BatchNorm2d:
        for model in (plain, fast):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
    x = image().requires_grad_()
    own, theirs = (saved_bytes(model, x) for model in (fast, plain))
    assert 0 < own <= theirs


def test_inputs_that_the_op_does_not_know():
    """Convolutions without a batch, and numbers of another kind between the parts."""
    plain, fast = pair()
    x = torch.rand(64, 6, 5)
    assert torch.equal(fast.layer1[0](x), plain.layer1[0](x))
    for model in (plain, fast):
        model.layer1[1].bn3.to(torch.float64)
    own, theirs = (model.layer1[1](torch.ones(1, 256, 6, 5)) for model in (fast, plain))
    assert own.dtype == torch.float64
    assert torch.equal(own, theirs)


@pytest.mark.parametrize("kind", [resnet.BasicBlock, resnet.Bottleneck])
def test_subclasses_are_left(kind):
    mine = type("Mine", (kind,), {})(8, 8 // kind.expansion, norm_layer=FrozenBatchNorm2d)
    report = fpn_fast.accelerate(mine)
    assert type(mine).__name__ == "Mine"
    assert [entry.note for entry in report.left] == [
        f"a subclass of torchvision.{kind.__name__}, which may compute something else"
    ]


def test_the_report_counts_the_blocks():
    report = fpn_fast.accelerate(build())
    assert len(report.swapped) == len(report.as_dict()["swapped"]) == 25
    lines = str(report).splitlines()
    assert lines[0] == "fpn_fast: 25 swapped, 0 left"
    shown = "swapped  bn1 and 19 more      torchvision.FrozenBatchNorm2d  now fpn_fast.FrozenBatchNorm2d"
    assert lines[1] == shown
    assert "layer1.0 and 4 more" in lines[2]
