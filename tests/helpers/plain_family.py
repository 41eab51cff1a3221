# SPDX-License-Identifier: Apache-2.0
"""The members of the pyramid family stated plainly, with the layers of ours: each function is one original's forward.

They follow the originals step by step, in torch's operators alone: resize, multiply, pool, stack, add and concatenate.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fpn_fast.reference.top_down import resample

#: What effdet's configuration of BiFPN prints for levels 3 to 7: the level and the inputs of nodes 5 to 12.
BIFPN = [(3, (3, 4)), (2, (2, 5)), (1, (1, 6)), (0, (0, 7)), (1, (1, 7, 8)), (2, (2, 6, 9)), (3, (3, 5, 10)),
         (4, (4, 11))]  # fmt: skip
#: The same of PAN, and of QuadFPN.
PAN = [(4, (4,)), (3, (3, 5)), (2, (2, 6)), (1, (1, 7)), (0, (0, 8)), (0, (9,)), (1, (8, 10)), (2, (7, 11)),
       (3, (6, 12)), (4, (5, 13))]  # fmt: skip
QUAD = [(3, (3, 4)), (2, (2, 5)), (1, (1, 6)), (0, (0, 7)), (1, (1, 7, 8)), (2, (2, 6, 9)), (3, (3, 5, 10)),
        (4, (4, 11)), (1, (1, 0)), (2, (2, 13)), (3, (3, 14)), (4, (4, 15)), (3, (3, 15, 16)), (2, (2, 14, 17)),
        (1, (1, 13, 18)), (0, (0, 19)), (0, (8, 20)), (1, (9, 19)), (2, (10, 18)), (3, (11, 17)),
        (4, (12, 16))]  # fmt: skip


def size_of(x):
    return tuple(x.shape[2:])


def up(x, like):
    return resample(x, size_of(like))


def bilinear(x, size, corners=False):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=corners)


def pool_same(x, value):
    """3x3 with stride 2 in TensorFlow's SAME padding by `value`."""
    missing = [(math.ceil(n / 2) - 1) * 2 - n + 3 for n in (x.shape[3], x.shape[2])]
    return F.max_pool2d(F.pad(x, [each for n in missing for each in (n // 2, n - n // 2)], value=value), 3, 2)


def bifpn(module, x):
    """effdet's BiFpn."""
    same = module.config.pad_type == "same"
    pool = lambda x: pool_same(x, -math.inf) if same else F.max_pool2d(x, 3, 2, 1)  # noqa: E731
    name = module.config.fpn_name or "bifpn_fa"
    table = {"bifpn": BIFPN, "pan": PAN, "qufpn": QUAD}[name.partition("_")[0]]
    methods = [{"fa": "fastattn"}.get(name.partition("_")[2], name.partition("_")[2])] * len(table)
    if name.startswith("qufpn"):
        methods[-5:] = ["fastattn"] * 5
    levels = list(x)
    for layer in module.resample:
        levels.append(pool(layer(levels[-1])))
    for cell in module.cell:
        maps, at = list(levels), [*range(5), *(level for level, _ in table)]
        for node, (level, inputs), method in zip(cell.fnode, table, methods, strict=True):
            edges = []
            for i in inputs:
                edge = node.combine.resample[str(i)](maps[i])
                edges.append(pool(edge) if at[i] < level else up(edge, levels[level]) if at[i] > level else edge)
            weights = node.combine.edge_weights
            if method == "fastattn":
                positive = weights.to(edges[0].dtype).relu()
                edges = [edge * w / (positive.sum() + 1e-4) for edge, w in zip(edges, positive, strict=True)]
            elif method == "attn":
                shares = weights.to(edges[0].dtype).softmax(0)
                edges = [edge * w for edge, w in zip(edges, shares, strict=True)]
            maps.append(node.after_combine(torch.stack(edges, -1).sum(-1)))
        levels = maps[-5:]
    return levels


def efficientdet_bifpn(module, x):
    """The BiFPN of mmdetection's EfficientDet project: weights are normalised first, and zeros pad the pooling.

    Its Swish is ``x * sigmoid(x)``, which rounds twice where SiLU rounds once.
    """
    pool = lambda x: pool_same(x, 0.0)  # noqa: E731
    x = x[module.start_level :]
    for stage in module.bifpn:

        def node(name, conv, *maps, stage=stage):
            raw = getattr(stage, name).relu()
            shares = raw / (raw.sum(0) + stage.epsilon)
            total = shares[0] * maps[0]
            for share, each in zip(shares[1:], maps[1:], strict=True):
                total = total + share * each
            return getattr(stage, conv)(F.silu(total) if stage.activation else total)

        if stage is module.bifpn[0]:
            c3, c4, c5 = x
            p6 = pool(stage.p5_to_p6(c5))
            x = stage.p3_down_channel(c3), stage.p4_down_channel(c4), stage.p5_down_channel(c5), p6, pool(p6)
        p3, p4, p5, p6, p7 = x
        u6 = node("p6_w1", "conv6_up", p6, up(p7, p6))
        u5 = node("p5_w1", "conv5_up", p5, up(u6, p5))
        u4 = node("p4_w1", "conv4_up", p4, up(u5, p4))
        out3 = node("p3_w1", "conv3_up", p3, up(u4, p3))
        if stage is module.bifpn[0]:
            p4, p5 = stage.p4_level_connection(c4), stage.p5_level_connection(c5)
        out4 = node("p4_w2", "conv4_down", p4, u4, pool(out3))
        out5 = node("p5_w2", "conv5_down", p5, u5, pool(out4))
        out6 = node("p6_w2", "conv6_down", p6, u6, pool(out5))
        x = out3, out4, out5, out6, node("p7_w2", "conv7_down", p7, pool(out6))
    return x


def nas_fpn(module, inputs):
    """mmdetection's NASFPN, with mmcv's resizing: sizes compare as tuples, and zeros pad the pooling."""

    def resize(x, size):
        if size_of(x) == size:
            return x
        if size_of(x) < size:
            return resample(x, size)
        (h, w), (th, tw) = size_of(x), size
        if h % th or w % tw:
            ph, pw = math.ceil(h / th) * th - h, math.ceil(w / tw) * tw - w
            x = F.pad(x, (pw // 2, pw - pw // 2, ph // 2, ph - ph // 2))
        return F.max_pool2d(x, (x.shape[2] // th, x.shape[3] // tw))

    def gate(a, b, size):
        a, b = resize(a, size), resize(b, size)
        return b + F.adaptive_avg_pool2d(b, 1).sigmoid() * a

    def add(a, b, size):
        return resize(a, size) + resize(b, size)

    used = inputs[module.start_level : module.backbone_end_level]
    levels = [conv(x) for conv, x in zip(module.lateral_convs, used, strict=True)]
    for downsample in module.extra_downsamples:
        levels.append(downsample(levels[-1]))
    p3, p4, p5, p6, p7 = levels
    s3, s4, s5, s6, s7 = map(size_of, levels)
    for stage in module.fpn_stages:
        out = lambda name, x, stage=stage: stage[name].out_conv(x.relu())  # noqa: E731
        a4 = out("gp_64_4", gate(p6, p4, s4))
        b4 = out("sum_44_4", add(a4, p4, s4))
        p3 = out("sum_43_3", add(b4, p3, s3))
        p4 = out("sum_34_4", add(p3, b4, s4))
        p5 = out("sum_55_5", add(p5, gate(p4, p3, s5), s5))
        p7 = out("sum_77_7", add(p7, gate(p5, b4, s7), s7))
        p6 = out("gp_75_6", gate(p7, p5, s6))
    return p3, p4, p5, p6, p7


def panet(module, x):
    """PANet's pyramid: the bottom-up path runs on the convolved maps."""
    outs = [module.conv_top(x[-1])]
    for lateral, each in zip(module.topdown_lateral_modules, x[-2::-1], strict=True):
        convolved = lateral.conv_lateral(each)
        outs.append(convolved + up(outs[-1], convolved))
    levels = [conv(out) for conv, out in zip(module.posthoc_modules, outs, strict=True)][::-1]
    found = levels[:1]
    path = zip(levels[1:], module.panet_buttomup_conv1_modules, module.panet_buttomup_conv2_modules, strict=True)
    for level, down, conv in path:
        found.append(conv(down(found[-1]) + level))
    return [*found, F.max_pool2d(found[-1], 1, 2)] if module.extra_level else found


def fpn_carafe(module, inputs):
    """mmdetection's FPN_CARAFE, without CARAFE: extra levels take part, and an upsampled map is cropped."""
    used = list(inputs[module.start_level : module.backbone_end_level])
    laterals = []
    for i, conv in enumerate(module.lateral_convs):
        laterals.append(conv(used[i] if i < len(used) else used[-1] if i == len(used) else laterals[-1]))
    for i in range(len(laterals) - 1, 0, -1):
        layer = module.upsample_modules[i - 1]
        upsampled = layer(laterals[i])
        if hasattr(layer, "upsample_conv"):
            upsampled = F.pixel_shuffle(upsampled, 2)
        height, width = size_of(laterals[i - 1])
        laterals[i - 1] = laterals[i - 1] + upsampled[:, :, :height, :width]
    return [conv(x) for conv, x in zip(module.fpn_convs, laterals, strict=True)]


def yolox(module, inputs):
    """mmdetection's YOLOXPAFPN."""
    inner = [inputs[-1]]
    for i in range(len(inputs) - 1, 0, -1):
        at = len(inputs) - 1 - i
        inner[0] = module.reduce_layers[at](inner[0])
        inner.insert(0, module.top_down_blocks[at](torch.cat([up(inner[0], inputs[i - 1]), inputs[i - 1]], 1)))
    outs = [inner[0]]
    for i in range(len(inputs) - 1):
        outs.append(module.bottom_up_blocks[i](torch.cat([module.downsamples[i](outs[-1]), inner[i + 1]], 1)))
    return [conv(out) for conv, out in zip(module.out_convs, outs, strict=True)]


def bfp(module, inputs):
    """mmdetection's BFP."""
    at, size = module.refine_level, size_of(inputs[module.refine_level])
    gathered = [F.adaptive_max_pool2d(x, size) if i < at else resample(x, size) for i, x in enumerate(inputs)]
    mean = sum(gathered) / len(gathered)
    if module.refine_type is not None:
        mean = module.refine(mean)
    return [(up(mean, x) if i < at else F.adaptive_max_pool2d(mean, size_of(x))) + x for i, x in enumerate(inputs)]


def semantic_branch(module, features):
    """detectron2's SemSegFPNHead, up to its logits at the common stride: the sum rounds after each addition."""
    total = None
    for name, ladder in zip(module.in_features, module.scale_heads, strict=True):
        top = ladder(features[name])
        total = top if total is None else total + top
    return [module.predictor(total)]


def panoptic_fpn_head(module, x):
    """mmdetection's PanopticFPNHead: the sum of the stacked levels rounds once."""
    tops = []
    for level, layer in enumerate(module.conv_upsample_layers, start=module.start_level):
        top = x[level]
        for conv in layer.conv:
            top = conv(top)
            if level:
                top = F.interpolate(top, scale_factor=2, mode="bilinear", align_corners=False)
        tops.append(top)
    return [module.conv_logits(torch.stack(tops).sum(0))]


def simple_feature_pyramid(module, x):
    """detectron2's SimpleFeaturePyramid of one map."""
    outs = []
    for stage in module.stages:
        out = x
        for layer in stage:
            deconvolved = isinstance(layer, nn.ConvTranspose2d)
            out = F.conv_transpose2d(out, layer.weight, layer.bias, 2) if deconvolved else layer(out)
        outs.append(out)
    return outs


def channel_norm(layer, x):
    """detectron2's LayerNorm over channels."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return layer.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + layer.bias[:, None, None]


def upernet(module, maps):
    """transformers' UperNetHead."""
    x = maps[-1]
    pooled = [bilinear(pool(x), size_of(x)) for pool in module.psp_modules]
    laterals = [conv(each) for conv, each in zip(module.lateral_convs, maps[:-1], strict=True)]
    laterals.append(module.bottleneck(torch.cat([x, *pooled], 1)))
    for i in range(len(laterals) - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + bilinear(laterals[i], size_of(laterals[i - 1]))
    outs = [conv(lateral) for conv, lateral in zip(module.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
    resized = [outs[0], *(bilinear(out, size_of(outs[0])) for out in outs[1:])]
    return [module.classifier(module.fpn_bottleneck(torch.cat(resized, 1)))]


def maskformer(module, features):
    """transformers' MaskFormerFPNModel."""
    down, outs = module.stem(features[-1]), []
    for layer, left in zip(module.layers, features[-2::-1], strict=True):
        lateral = layer.proj(left)
        down = layer.block(up(down, lateral) + lateral)
        outs.append(down)
    return outs


def smp_fpn(module, features):
    """smp's FPNDecoder in evaluation."""
    c2, c3, c4, c5 = features[-4:]
    maps = [module.p5(c5)]
    for block, skip in ((module.p4, c4), (module.p3, c3), (module.p2, c2)):
        maps.append(F.interpolate(maps[-1], scale_factor=2.0, mode="nearest") + block.skip_conv(skip))
    tops = []
    for ladder, x in zip(module.seg_blocks, maps, strict=True):
        for step in ladder.block:
            x = step.block(x)
            if step.upsample:
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
        tops.append(x)
    return [torch.stack(tops).sum(0) if module.merge_policy == "add" else torch.cat(tops, 1)]


def smp_pan(module, features):
    """smp's PANDecoder."""
    maps = list(features[2:])
    x = maps[-1]
    h, w = size_of(x)
    fpa = module.fpa
    middle, glob = fpa.mid(x), bilinear(fpa.branch1(x), (h, w), True)
    x1 = fpa.down1(x)
    x2 = fpa.down2(x1)
    x3 = bilinear(fpa.down3(x2), (h // 4, w // 4), True)
    y = bilinear(fpa.conv2(x2) + x3, (h // 2, w // 2), True)
    y = bilinear(y + fpa.conv1(x1), (h, w), True)
    out = y * middle + glob
    for name, low in zip(("gau3", "gau2", "gau1")[-len(maps) + 1 :], maps[-2::-1], strict=True):
        gau = getattr(module, name)
        out = bilinear(out, size_of(low), True) + gau.conv2(low) * gau.conv1(out)
    return [out]


def smp_upernet(module, features):
    """smp's UPerNetDecoder."""
    normed = [norm(x) for norm, x in zip(module.feature_norms, features[-len(module.feature_norms) :], strict=True)]
    x = normed[-1]
    pooled = [bilinear(pool(x), size_of(x)) for pool in module.psp.blocks]
    states = [module.psp.out_conv(torch.cat([x, *pooled], 1))]
    for block, lateral in zip(module.fpn_lateral_blocks, normed[-2::-1], strict=True):
        convolved = block.conv_norm_relu(lateral)
        states.append(bilinear(states[-1], size_of(convolved)) + convolved)
    outs = [states[0], *(conv(x) for conv, x in zip(module.fpn_conv_blocks, states[1:], strict=True))][::-1]
    return [module.fusion_block(torch.cat([bilinear(out, size_of(outs[0])) for out in outs], 1))]
