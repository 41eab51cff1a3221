# SPDX-License-Identifier: Apache-2.0
"""An RPN's steps after its head, one after the other, as detectron2 and mmdetection take them."""

import torch
from torch import Tensor

from fpn_fast import reference


def head(pyramid, anchors, dtype=torch.float32, batch=2, seed=0):
    """Maps of logits, all different and with scores units apart, and of deltas that make boxes overlap."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [batch * anchors * height * width for height, width in pyramid]
    shares = (torch.randperm(sum(numbers), generator=generator).double() + 0.5) / sum(numbers)
    logits = [
        share.logit().view(batch, anchors, *size).to(dtype)
        for share, size in zip(shares.split(numbers), pyramid, strict=True)
    ]
    deltas = [
        (torch.randn(batch, 4 * anchors, *size, generator=generator, dtype=torch.float64) * 0.4).to(dtype)
        for size in pyramid
    ]
    return logits, deltas


def grid(table: Tensor, size, stride, offset=0.0) -> Tensor:
    """[A, 4] about the origin -> [H * W * A, 4], by broadcasting; stride: (x, y)."""
    y = (torch.arange(size[0]) + offset) * stride[1]
    x = (torch.arange(size[1]) + offset) * stride[0]
    places = torch.stack([*torch.meshgrid(x, y, indexing="xy")] * 2, -1)
    return (places[:, :, None] + table).reshape(-1, 4)


def propose(logits, deltas, anchors, sizes, decode, *, pre, post, thresh, least, convention, score=lambda x: x):
    """Lists of boxes and of scores of each image. anchors: [H * W * A, 4] of each map; decode(anchors, deltas)."""
    found = []
    for n, (height, width) in enumerate(sizes):
        boxes, scores = [], []
        for map, codes, priors in zip(logits, deltas, anchors, strict=True):
            flat = map[n].permute(1, 2, 0).flatten()
            top = flat.argsort(descending=True)[:pre]
            rows = codes[n].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            decoded = decode(priors[top].to(flat.dtype), rows[top])
            edges = torch.tensor([width, height, width, height])
            decoded = torch.minimum(decoded.clamp(min=0), edges)
            large = ((decoded[:, 2:] - decoded[:, :2]) > least).all(1)
            decoded, kept = decoded[large], flat[top][large]
            keep = reference.nms(decoded, kept, None, thresh, convention)
            boxes.append(decoded[keep])
            scores.append(score(kept[keep]))
        best = torch.cat(scores).argsort(descending=True, stable=True)[:post]
        found.append((torch.cat(boxes)[best], torch.cat(scores)[best]))
    return found


def check(found, expected, unit):
    """Corners of sides of some hundred pixels, off by the last bits of an exponential."""
    assert len(found) == len(expected)
    for (boxes, scores), (plain, plain_scores) in zip(found, expected, strict=True):
        torch.testing.assert_close(boxes, plain, rtol=2 * unit, atol=512 * unit)
        torch.testing.assert_close(scores, plain_scores, rtol=2 * unit, atol=0)
