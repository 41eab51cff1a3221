# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  # mmcv's stand-in comes before mmdetection
"""The pyramid family against the originals, which `make test-family` installs; no part of the default run.

effdet's, segmentation_models_pytorch's, transformers' and mmdetection's modules with random weights, copied by
state_dict in both directions. tests/test_family.py has plain statements of all members, also of those that no package
holds: detectron2's, PANet's and those of mmdetection's EfficientDet project.
"""

import copy
import logging

import pytest
import torch
from helpers import mmcv_stand_in
from helpers.modules import outputs_and_gradients
from torch import nn

mmcv_stand_in.install()

import effdet as effdets
import segmentation_models_pytorch.decoders.fpn.decoder as smp_fpn
import segmentation_models_pytorch.decoders.pan.decoder as smp_pan
import segmentation_models_pytorch.decoders.upernet.decoder as smp_upernet
from effdet.config.fpn_config import get_fpn_config
from effdet.efficientdet import BiFpn, EfficientDet
from mmdet import registry
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from test_family import CHANNELS, EVEN, FLOAT64, MEMBERS, ODD
from transformers import UperNetConfig
from transformers.models.maskformer.modeling_maskformer import MaskFormerFPNModel
from transformers.models.upernet.modeling_upernet import UperNetHead

from fpn_fast.nn import effdet, mmdet, smp, transformers

logging.disable(logging.WARNING)
init_default_scope("mmdet")


def drawn(module):
    """Weights that hide nothing; a norm's statistics too."""
    generator = torch.Generator().manual_seed(5)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            low = 0.2 if "var" in name or "edge" in name else -1
            value.copy_(torch.empty_like(value).uniform_(low, 1.5, generator=generator))
    return module


def inputs(maps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, c, *size, generator=generator).to(dtype).requires_grad_() for c, size in maps]


def flat(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return list(found.values()) if isinstance(found, dict) else list(found)


def compare(ours, theirs, maps, exact, unused=0):
    """Keys, outputs and gradients; `unused` maps come first in a list that a decoder does not read."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    drawn(theirs)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())

    def both(dtype):
        for module in (ours, theirs):
            x = inputs(maps, dtype)
            # A list of its own: effdet appends to it, and smp replaces its maps.
            yield module, x, flat(module.to(dtype)([None] * unused + list(x)))

    if exact:
        # In training, and in half precision, where the order of roundings shows.
        for dtype in (torch.float32, torch.bfloat16):
            (_, _, a), (_, _, b) = both(dtype)
            assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
            assert all(torch.equal(*pair) for pair in zip(ours.buffers(), theirs.buffers(), strict=True))
    ours.eval()
    theirs.eval()
    found, expected = (outputs_and_gradients(outs, [*x, *m.parameters()]) for m, x, outs in both(torch.float64))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64 * b.abs().max().item())


def feature_info():
    return [{"num_chs": c, "reduction": 8 << i} for i, c in enumerate(CHANNELS[:3])]


@pytest.mark.parametrize(
    ("name", "options"),
    [("efficientdet_d0", {}), ("efficientdet_q0", {}), ("tf_efficientdet_d0", {}), ("tf_efficientdet_d6", {}),
     ("tf_efficientdet_lite0", {}), ("resdet50", {}), ("cspresdext50pan", {}), ("efficientdet_q1", {}),
     ("efficientdet_d0", {"fpn_name": "bifpn_attn"}), ("efficientdet_d0", {"fpn_name": "pan_sum"}),
     ("efficientdet_d0", {"conv_bn_relu_pattern": True, "apply_resample_bn": False}),
     ("efficientdet_d0", {"image_size": (104, 176), "pad_type": "same"}),
     ("efficientdet_d0", {"image_size": (104, 176)})],
    ids=str,
)  # fmt: skip
def test_bifpn(name, options):
    config = effdets.get_efficientdet_config(name)
    config.update({"image_size": (128, 192), "fpn_channels": 8, "fpn_cell_repeats": 2} | options)
    # effdet's image size is fixed; ours is that of the maps.
    height, width = config.image_size
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32)]
    exact = "bilinear" not in (config.downsample_type, config.upsample_type)
    maps = list(zip(CHANNELS[:3], sizes, strict=True))
    compare(effdet.BiFpn(config, feature_info()), BiFpn(config, feature_info()), maps, exact)


@pytest.mark.parametrize("name", ["bifpn_fa", "bifpn_attn", "bifpn_sum", "pan_fa", "pan_sum", "qufpn_fa", "qufpn_sum"])
@pytest.mark.parametrize("levels", [3, 5, 6])
def test_graphs(name, levels):
    theirs = get_fpn_config(name, 3, 2 + levels)
    nodes = [(n["feat_level"] - 3, tuple(n["inputs_offsets"]), n["weight_method"]) for n in theirs.nodes]
    assert [tuple(node) for node in effdet.graph(name, levels)] == nodes


def test_bifpn_in_efficientdet_and_its_first_weights():
    config = effdets.get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (128, 128)
    model = EfficientDet(config, pretrained_backbone=False)
    info = [{"num_chs": c, "reduction": r} for c, r in ((40, 8), (112, 16), (320, 32))]
    ours = effdet.BiFpn(config, info)
    for (key, a), b in zip(ours.state_dict().items(), model.fpn.state_dict().values(), strict=True):
        if a.is_floating_point() and a.numel() > 4000:
            torch.testing.assert_close(a.std(), b.std(), rtol=0.05, atol=0, msg=key)
        elif a.is_floating_point() and a.dim() < 4:
            assert torch.equal(a, b), key
    ours.load_state_dict(model.fpn.state_dict())
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    # With gradients: without them fuse_maps has a SiLU of its own, which is torch's to rounding.
    expected = model.eval()(image)
    model.fpn = ours.eval()
    found = model(image)
    assert all(torch.equal(a, b) for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True))


@pytest.mark.parametrize(
    ("name", "cfg"),
    [("nas_fpn", {"type": "NASFPN", "in_channels": CHANNELS[:3], "num_outs": 5, "stack_times": 2}),
     ("nas_fpn_with_norms", {"type": "NASFPN", "in_channels": CHANNELS, "num_outs": 5, "stack_times": 1,
                             "start_level": 1, "norm_cfg": {"type": "BN"}}),
     ("yolox", {"type": "YOLOXPAFPN", "in_channels": CHANNELS[:3], "num_csp_blocks": 1}),
     ("yolox", {"type": "YOLOXPAFPN", "in_channels": CHANNELS[:3], "num_csp_blocks": 2, "use_depthwise": True}),
     ("bfp", {"type": "BFP", "num_levels": 4, "refine_type": "conv"}),
     ("bfp", {"type": "BFP", "num_levels": 4, "refine_type": "non_local"}),
     ("bfp", {"type": "BFP", "num_levels": 4, "refine_level": 1}),
     *[("deconv", {"type": "FPN_CARAFE", "in_channels": CHANNELS[:3], "num_outs": outs,
                   "upsample_cfg": {"type": kind, **more}})
       for kind, more, outs in (("deconv", {"upsample_kernel": 2}, 4), ("deconv", {"upsample_kernel": 3}, 3),
                                ("pixel_shuffle", {"upsample_kernel": 3}, 4), ("nearest", {}, 4),
                                ("bilinear", {}, 3))]],
    ids=str,
)  # fmt: skip
def test_mmdetections(name, cfg):
    cfg = {**cfg, **({"in_channels": 6} if cfg["type"] == "BFP" else {"out_channels": 8})}
    # Some of mmdetection's read their options as attributes.
    theirs, ours = registry.MODELS.build(ConfigDict(copy.deepcopy(cfg))), mmdet.build_neck(cfg)
    theirs.init_weights()
    # mmcv's Swish rounds twice, SiLU once; a GEMM sums in another order than a deconvolution.
    inexact = cfg["type"] == "YOLOXPAFPN" or cfg.get("upsample_cfg", {}).get("upsample_kernel") == 2
    compare(ours, theirs, MEMBERS[name][1], exact=not inexact and "bilinear" not in str(cfg))


def test_mmdetections_panoptic_head():
    cfg = {"num_things_classes": 2, "num_stuff_classes": 3, "in_channels": 6, "inner_channels": 32}
    theirs = registry.MODELS.build({"type": "PanopticFPNHead", **cfg})
    compare(mmdet.PanopticFPNHead(**cfg), theirs, MEMBERS["panoptic"][1], exact=False)


@pytest.mark.parametrize("sizes", [EVEN, [*ODD, (2, 3)]], ids=str)
def test_upernet(sizes):
    config = UperNetConfig(hidden_size=8, num_labels=3, pool_scales=[1, 2, 3, 6])
    maps = list(zip(CHANNELS, sizes, strict=True))
    compare(transformers.UperNetHead(config, CHANNELS), UperNetHead(config, CHANNELS), maps, exact=False)


def test_maskformer():
    arguments = 10, CHANNELS[:2], 32
    compare(transformers.MaskFormerFPNModel(*arguments), MaskFormerFPNModel(*arguments), MEMBERS["maskformer"][1], True)


@pytest.mark.parametrize("options", [{}, {"merge_policy": "cat"}, {"interpolation_mode": "bilinear"}], ids=str)
def test_smp_fpn(options):
    pair = (kind.FPNDecoder([3, 4, *CHANNELS], 5, 8, 32, dropout=0, **options) for kind in (smp, smp_fpn))
    compare(*pair, list(zip(CHANNELS, EVEN, strict=True)), exact=False)


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_smp_pan(depth):
    widths = [3, 4, *CHANNELS[: depth - 1]]
    pair = (kind.PANDecoder(widths, depth, 8) for kind in (smp, smp_pan))
    sizes = [(32, 48), (16, 24), (8, 12), (8, 12)][-depth + 1 :]
    compare(*pair, list(zip(widths[2:], sizes, strict=True)), exact=False, unused=2)


@pytest.mark.parametrize("norm", ["batchnorm", "identity"])
def test_smp_upernet(norm):
    pair = (kind.UPerNetDecoder([3, 4, *CHANNELS], 5, 8, norm) for kind in (smp, smp_upernet))
    compare(*pair, list(zip(CHANNELS, EVEN, strict=True)), exact=False, unused=2)


def test_dropout_of_smp_drops_whole_channels():
    decoder = smp.FPNDecoder([3, 4, *CHANNELS], 5, 8, 32, dropout=0.5).train()
    out = decoder(inputs(list(zip(CHANNELS, EVEN, strict=True))))
    assert isinstance(decoder.dropout, nn.Dropout2d)
    dropped = (out == 0).all(-1).all(-1)
    assert 0 < dropped.float().mean() < 1
