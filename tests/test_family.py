# SPDX-License-Identifier: Apache-2.0
"""The members of the pyramid family against plain statements of their originals; see also against_family.py."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from helpers import plain_family as plain
from helpers.modules import outputs_and_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

from fpn_fast import backends
from fpn_fast.nn import PANet, detectron2, effdet, mmdet, smp, transformers
from fpn_fast.nn._pyramid import ChannelNorm

#: Sizes that no image of a multiple of 32 pixels has, and sizes that double.
ODD, EVEN = [(13, 22), (7, 11), (4, 6)], [(16, 24), (8, 12), (4, 6), (2, 3)]
CHANNELS = [6, 8, 10, 12]
#: A share of the largest number: half a unit for each of 2^14 additions in each of 40 layers, more than any member has.
FLOAT64 = 40 * 2**14 * torch.finfo(torch.float64).eps / 2
GROUPS = {"type": "GN", "num_groups": 2}
UPERNET = SimpleNamespace(pool_scales=[1, 2, 3], hidden_size=8, num_labels=3, initializer_range=0.2)
SHAPES = {f"p{level}": detectron2.ShapeSpec(channels=6, stride=2**level) for level in (2, 3, 4, 5)}


class OneMap(nn.Module):
    """A backbone whose last map is the image."""

    def output_shape(self):
        return {"last": detectron2.ShapeSpec(channels=8, stride=16)}

    def forward(self, x):
        return {"last": x}


def bifpn(**options):
    config = effdet.BiFpnConfig(**{"fpn_channels": 8, "fpn_cell_repeats": 2} | options)
    return effdet.BiFpn(config, [{"num_chs": c, "reduction": 8 << i} for i, c in enumerate(CHANNELS[:3])])


def of_maps(sizes, channels=CHANNELS):
    return list(zip(channels, sizes, strict=False))


def named(maps):
    return dict(zip(SHAPES, maps, strict=True))


#: name: how to build it, the (channels, size) of its maps, the plain statement, and whether both are equal bit for bit.
#: A bilinear weight is rounded, so sums with one are compared with float64.
MEMBERS = {
    "bifpn": (bifpn, of_maps(ODD), plain.bifpn, True),
    "bifpn_of_tensorflow": (
        functools.partial(bifpn, fpn_name="bifpn_attn", pad_type="same", redundant_bias=True), of_maps(ODD),
        plain.bifpn, True,
    ),
    "bifpn_lite": (
        functools.partial(bifpn, fpn_name="bifpn_sum", act_type="relu6", conv_bn_relu_pattern=True), of_maps(ODD),
        plain.bifpn, True,
    ),
    "pan": (
        functools.partial(bifpn, fpn_name="pan_fa", act_type="leaky_relu", separable_conv=False), of_maps(ODD),
        plain.bifpn, True,
    ),
    "quad": (functools.partial(bifpn, fpn_name="qufpn_sum", apply_resample_bn=False), of_maps(EVEN[:3]), plain.bifpn,
             True),
    "efficientdet": (lambda: mmdet.BiFPN(2, CHANNELS[:3], 8), of_maps(ODD), plain.efficientdet_bifpn, True),
    "nas_fpn": (lambda: mmdet.NASFPN(CHANNELS[:3], 8, 5, 2), of_maps(ODD), plain.nas_fpn, True),
    "nas_fpn_with_norms": (
        lambda: mmdet.NASFPN(CHANNELS, 8, 5, 1, start_level=1, norm_cfg={"type": "BN"}),
        of_maps([(32, 48), (16, 24), (8, 12), (4, 6)]), plain.nas_fpn, True,
    ),
    "panet": (lambda: PANet(CHANNELS[:3], 8), of_maps(ODD), plain.panet, True),
    "panet_with_group_norm": (lambda: PANet(CHANNELS[:2], 32, group_norm=True, extra_level=False), of_maps(ODD[1:]),
                              plain.panet, True),
    "yolox": (lambda: mmdet.YOLOXPAFPN(CHANNELS[:3], 8, num_csp_blocks=1), of_maps(EVEN[:3]), plain.yolox, True),
    "yolox_depthwise": (lambda: mmdet.YOLOXPAFPN(CHANNELS[:2], 8, 2, use_depthwise=True), of_maps(ODD[:2]), plain.yolox,
                        True),
    "bfp": (lambda: mmdet.BFP(6, 4, refine_type="conv"), of_maps([*ODD, (2, 3)], [6] * 4), plain.bfp, True),
    "bfp_non_local": (lambda: mmdet.BFP(6, 3, 1, "non_local"), of_maps(ODD, [6] * 3), plain.bfp, True),
    # One GEMM and the deconvolution sum their products in different orders.
    "deconv": (
        lambda: mmdet.FPN_CARAFE(CHANNELS[:3], 8, 4, upsample_cfg={"type": "deconv", "upsample_kernel": 2}),
        of_maps(EVEN[:3]), plain.fpn_carafe, False,
    ),
    "deconv_of_three": (
        lambda: mmdet.FPN_CARAFE(CHANNELS[:3], 8, 3, upsample_cfg={"type": "deconv", "upsample_kernel": 3}),
        of_maps(ODD), plain.fpn_carafe, True,
    ),
    "pixel_shuffle": (
        lambda: mmdet.FPN_CARAFE(
            CHANNELS[:3], 8, 3, act_cfg={"type": "ReLU"}, order=("act", "conv", "norm"),
            upsample_cfg={"type": "pixel_shuffle", "upsample_kernel": 3},
        ),
        of_maps(EVEN[:3]), plain.fpn_carafe, True,
    ),
    "carafe_bilinear": (lambda: mmdet.FPN_CARAFE(CHANNELS[:3], 8, 3, upsample_cfg={"type": "bilinear"}), of_maps(ODD),
                        plain.fpn_carafe, False),
    "semantic": (
        lambda: detectron2.SemSegFPNHead(SHAPES, num_classes=3, conv_dims=32, common_stride=4, norm="GN"),
        of_maps(EVEN, [6] * 4), lambda module, x: plain.semantic_branch(module, named(x)), False,
    ),
    "panoptic": (lambda: mmdet.PanopticFPNHead(2, 3, 6, 32, norm_cfg=GROUPS), of_maps(EVEN, [6] * 4),
                 plain.panoptic_fpn_head, False),
    "vitdet": (lambda: detectron2.SimpleFeaturePyramid(OneMap(), "last", 6, [4.0, 2.0, 1.0, 0.5]), [(8, (6, 8))],
               lambda module, x: plain.simple_feature_pyramid(module, x[0]), False),
    "upernet": (lambda: transformers.UperNetHead(UPERNET, CHANNELS), of_maps([*ODD, (2, 3)]), plain.upernet, False),
    "maskformer": (lambda: transformers.MaskFormerFPNModel(10, CHANNELS[:2], 32), of_maps(ODD), plain.maskformer, True),
    "smp_fpn": (lambda: smp.FPNDecoder([3, 4, *CHANNELS], pyramid_channels=8, segmentation_channels=32).eval(),
                of_maps(EVEN), plain.smp_fpn, False),
    "smp_fpn_cat": (
        lambda: smp.FPNDecoder([3, 4, *CHANNELS], 5, 8, 32, merge_policy="cat").eval(), of_maps(EVEN), plain.smp_fpn,
        False,
    ),
    "smp_pan": (lambda: smp.PANDecoder([3, 4, *CHANNELS], 5, 8), of_maps([(32, 48), (16, 24), (8, 12), (8, 12)]),
                lambda module, x: plain.smp_pan(module, [None, None, *x]), False),
    "smp_upernet": (lambda: smp.UPerNetDecoder([3, 4, *CHANNELS], decoder_channels=8), of_maps(EVEN), plain.smp_upernet,
                    False),
}  # fmt: skip


def build(name):
    """The member with weights that hide nothing: no zero bias, edge weights apart and one of them negative."""
    torch.manual_seed(3)
    module = MEMBERS[name][0]()
    for key, parameter in module.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)
        elif parameter.dim() == 1 and len(parameter) <= 3:
            nn.init.uniform_(parameter, 0.2, 2)
            if len(parameter) == 3:
                parameter.data[1] = -0.5
    return module


def inputs(name, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, channels, *size, generator=generator).to(dtype).requires_grad_()
        for channels, size in MEMBERS[name][1]
    ]


def run(name, module, x):
    """Our forward, as a list."""
    if name == "semantic":
        return [module.layers(named(x))]
    if name == "panoptic":
        return [module(x)["seg_preds"]]
    if name == "vitdet":
        return list(module(x[0]).values())
    if name.startswith("smp"):
        return [module([None, None, *x])]
    found = module(x)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def results(outputs, module, x):
    return outputs_and_gradients(outputs, [*x, *module.parameters()])


@pytest.mark.parametrize("name", MEMBERS)
def test_outputs_and_gradients_are_the_plain_statements(name):
    *_, statement, exact = MEMBERS[name]
    # In evaluation: behind a live batch norm some gradients are sums that cancel, of which only noise is left.
    module = build(name).eval()
    if exact:
        for ours, theirs in zip(run(name, module, inputs(name)), statement(module, inputs(name)), strict=True):
            assert torch.equal(ours, theirs)
    module.double()
    x, y = inputs(name, torch.float64), inputs(name, torch.float64)
    ours, theirs = results(run(name, module, x), module, x), results(statement(module, y), module, y)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64 * b.abs().max().item())


@pytest.mark.parametrize("name", [name for name, (*_, exact) in MEMBERS.items() if exact])
def test_bfloat16_is_rounded_where_the_original_rounds(name):
    # With gradients: without them fuse_maps has a SiLU of its own, which is torch's to rounding.
    module, x = build(name).eval().bfloat16(), inputs(name, torch.bfloat16)
    for ours, theirs in zip(run(name, module, x), MEMBERS[name][2](module, x), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["semantic", "panoptic"])
def test_semantic_branches_round_their_sums_in_two_ways(name):
    """Weights of zero leave one value a channel, which bilinear upsampling keeps: the sum's rounding alone is left."""
    module = build(name).eval().bfloat16()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            nn.init.zeros_(layer.weight)
    if name == "semantic":
        module.predictor = nn.Identity()
        tops = [ladder[-2 if len(ladder) > 1 else 0].norm.bias.relu() for ladder in module.scale_heads]
    else:
        module.conv_logits = nn.Identity()
        tops = [layer.conv[-1].gn.bias.relu() for layer in module.conv_upsample_layers]
    found = run(name, module, inputs(name, torch.bfloat16))[0]
    sums = [((tops[0] + tops[1]) + tops[2]) + tops[3], torch.stack(tops).sum(0)]
    assert [torch.equal(found, each.view(1, -1, 1, 1).expand_as(found)) for each in sums] == [
        name == "semantic", name == "panoptic",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_gradient_checkpointing_changes_nothing(name):
    module = build(name)
    twin = copy.deepcopy(module)
    x, y = inputs(name), inputs(name)
    kept = results(run(name, module, x), module, x)
    recomputed = results(checkpoint(functools.partial(run, name, twin), y, use_reentrant=False), twin, y)
    for a, b in zip(kept, recomputed, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "table"), [("bifpn_fa", plain.BIFPN), ("pan_sum", plain.PAN), ("qufpn_fa", plain.QUAD)]
)
def test_graphs_are_effdets(name, table):
    assert [(node.level, node.inputs) for node in effdet.graph(name, 5)] == table
    assert effdet.graph("qufpn_sum", 5)[-1].method == "fastattn"
    assert effdet.graph("bifpn_attn", 5)[0].method == "attn"


KEYS = {
    "bifpn": (
        "resample.3.conv.conv.weight", "resample.3.conv.bn.running_mean", "cell.1.fnode.7.combine.edge_weights",
        "cell.0.fnode.0.after_combine.conv.conv_dw.weight", "cell.0.fnode.5.after_combine.conv.conv_pw.weight",
        "cell.0.fnode.1.combine.resample.2.conv.conv.weight", "cell.0.fnode.5.combine.resample.2.conv.bn.bias",
    ),
    "pan": ("cell.0.fnode.0.after_combine.conv.conv.weight", "cell.0.fnode.0.after_combine.conv.bn.weight"),
    "efficientdet": (
        "bifpn.0.p6_w1", "bifpn.1.p7_w2", "bifpn.0.p5_down_channel.down_conv.bias", "bifpn.0.p5_to_p6.0.bn.weight",
        "bifpn.1.conv6_up.depthwise_conv.weight", "bifpn.0.conv7_down.pointwise_conv.bias",
    ),
    "nas_fpn": (
        "lateral_convs.0.conv.weight", "extra_downsamples.1.0.conv.bias", "fpn_stages.1.gp_64_4.out_conv.conv.weight",
        "fpn_stages.0.sum_77_7.out_conv.conv.bias",
    ),
    "panet_with_group_norm": (
        "conv_top.0.weight", "topdown_lateral_modules.0.conv_lateral.1.weight", "posthoc_modules.1.0.weight",
        "panet_buttomup_conv1_modules.0.0.bias", "panet_buttomup_conv2_modules.0.1.weight",
    ),
    "yolox_depthwise": (
        "reduce_layers.0.bn.weight", "top_down_blocks.0.main_conv.conv.weight", "downsamples.0.depthwise_conv.bn.bias",
        "bottom_up_blocks.0.blocks.1.conv2.pointwise_conv.conv.weight", "out_convs.1.conv.weight",
    ),
    "bfp_non_local": ("refine.g.conv.weight", "refine.theta.conv.bias", "refine.conv_out.conv.weight"),
    "deconv": ("lateral_convs.3.conv.weight", "fpn_convs.3.conv.bias", "upsample_modules.2.weight"),
    "pixel_shuffle": ("upsample_modules.0.upsample_conv.weight",),
    "semantic": ("p2.0.weight", "p2.0.norm.weight", "p5.4.weight", "predictor.bias"),
    "panoptic": ("conv_upsample_layers.3.conv.2.gn.weight", "conv_logits.weight"),
    "vitdet": ("simfp_2.0.bias", "simfp_2.1.weight", "simfp_2.3.weight", "simfp_2.5.norm.bias", "simfp_3.1.weight",
               "simfp_4.0.weight", "simfp_5.1.norm.weight"),
    "upernet": ("psp_modules.0.1.conv.weight", "bottleneck.batch_norm.weight", "lateral_convs.2.conv.weight",
                "fpn_convs.0.batch_norm.bias", "fpn_bottleneck.conv.weight", "classifier.bias"),
    "maskformer": ("stem.0.weight", "stem.1.bias", "layers.1.proj.1.weight", "layers.0.block.0.weight"),
    "smp_fpn": ("p5.bias", "p4.skip_conv.weight", "seg_blocks.0.block.2.block.1.bias"),
    "smp_pan": ("fpa.branch1.1.conv.weight", "fpa.down3.2.bn.weight", "gau1.conv1.1.conv.bias", "gau3.conv2.bn.bias"),
    "smp_upernet": ("feature_norms.0.weight", "psp.blocks.3.1.0.weight", "psp.out_conv.1.bias",
                    "fpn_lateral_blocks.0.conv_norm_relu.0.weight", "fpn_conv_blocks.2.0.weight",
                    "fusion_block.1.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_checkpoint_keys(name):
    module = build(name)
    assert set(KEYS[name]) <= set(module.state_dict())
    again = MEMBERS[name][0]()
    again.load_state_dict(module.state_dict())
    for a, b in zip(run(name, module.eval(), inputs(name)), run(name, again.eval(), inputs(name)), strict=True):
        assert torch.equal(a, b)


def test_channel_norm():
    layer = ChannelNorm(8)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), plain.channel_norm(layer, x))


@pytest.mark.parametrize("backend", backends.available("cpu"))
def test_every_backend_serves_a_member(backend):
    module, x = build("bifpn_lite").eval(), inputs("bifpn_lite")
    with backends.use(backend), torch.no_grad():
        for ours, theirs in zip(module(x), plain.bifpn(module, x), strict=True):
            assert torch.equal(ours, theirs)


def test_compiles_in_one_graph_and_keeps_channels_last():
    name = "bfp"
    module = build(name).eval().to(memory_format=torch.channels_last)
    x = [each.detach().to(memory_format=torch.channels_last) for each in inputs(name)]
    compiled = torch.compile(lambda *x: run(name, module, list(x)), fullgraph=True, backend="aot_eager")
    for ours, traced in zip(run(name, module, x), compiled(*x), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(traced, ours, rtol=1e-4, atol=1e-4)


def test_the_callers_list_and_feature_info_stay():
    info, x = [{"num_chs": c, "reduction": 8 << i} for i, c in enumerate(CHANNELS[:3])], inputs("bifpn")
    module = effdet.BiFpn(effdet.BiFpnConfig(fpn_channels=8, fpn_cell_repeats=1), info)
    module(x)
    assert len(info) == len(x) == 3
    assert list(info[0]) == ["num_chs", "reduction"]


def test_losses_of_the_semantic_branches():
    head = build("semantic").train()
    maps, generator = named(inputs("semantic")), torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (2, 64, 96), generator=generator)
    labels[0, :5] = -1
    nothing, losses = head(maps, labels)
    assert nothing is None
    logits = head.eval()(maps)[0]
    expected = nn.functional.cross_entropy(logits, labels, ignore_index=-1)
    torch.testing.assert_close(losses["loss_sem_seg"], expected, rtol=1e-6, atol=0)
    head = build("panoptic")
    logits = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(2))
    # Two things, then three kinds of stuff, then a label that is left out.
    found = head.loss(logits, torch.tensor([[[0, 1, 2], [3, 4, -1]]]))
    expected = nn.functional.cross_entropy(logits, torch.tensor([[[3, 3, 0], [1, 2, -1]]]), ignore_index=-1)
    assert torch.equal(found["loss_seg"], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effdet.graph("bifpn_mean", 5), "fpn_name must be"),
        (lambda: bifpn(act_type="tanh"), "act_type must be one of"),
        (lambda: bifpn(downsample_type="avg"), "downsample_type must be one of max, bilinear, got 'avg'"),
        (lambda: build("bifpn")(inputs("bifpn")[:2]), "x must be 3 maps"),
        (lambda: mmdet.BiFPN(1, [4, 6], 8), "in_channels must be those of P3, P4 and P5"),
        (lambda: mmdet.NASFPN(CHANNELS[:3], 8, 4, 1), "num_outs must be 5"),
        (lambda: mmdet.BFP(4, 2, 2), "refine_level must be one of the 2 levels"),
        (lambda: mmdet.BFP(4, 3, 2, "mean"), "refine_type must be"),
        (lambda: mmdet.FPN_CARAFE([4], 8, 1, upsample_cfg={"type": "carafe"}), "upsample_cfg must be of type"),
        (lambda: mmdet.FPN_CARAFE([4], 8, 1, upsample_cfg={"type": "deconv"}), "must have a positive upsample_kernel"),
        (lambda: mmdet.YOLOXPAFPN([4, 8], 8, upsample_cfg={"scale_factor": 3, "mode": "nearest"}), "upsample_cfg must"),
        (lambda: mmdet.PanopticFPNHead(loss_seg={"type": "DiceLoss"}), "loss_seg must be of type"),
        (lambda: detectron2.SimpleFeaturePyramid(OneMap(), "last", 6, [8.0, 4.0]), "scale_factors must be"),
        (lambda: detectron2.SemSegFPNHead(SHAPES, num_classes=3, conv_dims=8, common_stride=8), "stride of p2 must be"),
        (lambda: build("semantic").train()(named(inputs("semantic"))), "targets must be labels"),
        (lambda: smp.FPNDecoder([3, 4, 6], 2), "encoder_depth must be"),
        (lambda: smp.FPNDecoder([3, 4, *CHANNELS], merge_policy="mean"), "merge_policy must be"),
    ],
)  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
