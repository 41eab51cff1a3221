# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from helpers.devices import check_on_a_gpu, not_interpreted
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import boxes as box_ops

from fpn_fast import ops
from fpn_fast.ops.generate_proposals import DETECTRON2, MMDET, TORCHVISION
from fpn_fast.reference.generate_proposals import anchors_at, exponential, logistic

NAN, INF = float("nan"), float("inf")
# Padded to 100 x 168, which the strides of the coarsest map do not divide.
PADDED, SIZES = (100, 168), [(100, 160), (90, 168)]
PYRAMID = ((25, 42), (13, 21), (7, 11), (4, 6))
GENERATOR = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
CELLS = [table.tolist() for table in GENERATOR.cell_anchors]
FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


def head(dtype=torch.float32, form=torch.contiguous_format, batch=2, pyramid=PYRAMID, trained=False, seed=0):
    """Return logits whose scores are distinct, also across levels, and deltas. A trained head has mostly low logits and
    a few whose scores are 1."""
    generator = torch.Generator().manual_seed(seed)
    objectness, deltas = [], []
    total = batch * 3 * sum(height * width for height, width in pyramid)
    shares = ((torch.randperm(total, generator=generator).double() + 0.5) / total).split(
        [batch * 3 * height * width for height, width in pyramid]
    )
    for share, (height, width) in zip(shares, pyramid, strict=True):
        logits = (share.logit() * (4 if trained else 1) - (5 if trained else 0)).view(batch, 3, height, width)
        codes = torch.randn(batch, 12, height, width, generator=generator, dtype=torch.float64) * 0.3
        objectness.append(logits.to(dtype).contiguous(memory_format=form))
        deltas.append(codes.to(dtype).contiguous(memory_format=form))
    return objectness, deltas


def strides_of(maps, padded=PADDED):
    return [(padded[0] // m.shape[2], padded[1] // m.shape[3]) for m in maps]


def propose(objectness, deltas, cells=CELLS, sizes=SIZES, **options):
    options = {"pre_nms_top_n": 200, "post_nms_top_n": 150, "nms_thresh": 0.7, **options}
    image_sizes = torch.tensor(sizes[: objectness[0].shape[0]]).reshape(-1, 2)
    return ops.generate_proposals(
        objectness, deltas, cells[: len(objectness)], strides_of(objectness), image_sizes, **options
    )


def as_torchvision(objectness, deltas, pre=200, post=150, thresh=0.7, score_thresh=0.0, generator=GENERATOR):
    """Select proposals with torchvision's own code."""
    counts = {"training": pre, "testing": pre}, {"training": post, "testing": post}
    rpn = RegionProposalNetwork(generator, None, 0.7, 0.3, 256, 0.5, *counts, thresh, score_thresh)
    images = ImageList(torch.empty(len(objectness[0]), 3, *PADDED), SIZES[: len(objectness[0])])
    anchors = generator(images, objectness)
    numbers = [m[0].numel() for m in objectness]
    logits, codes = concat_box_prediction_layers(objectness, deltas)
    boxes = rpn.box_coder.decode(codes, anchors).view(len(anchors), -1, 4)
    return rpn.filter_proposals(boxes, logits, images.image_sizes, numbers)


def check_equal(found, expected, unit):
    """Compare boxes and order; torchvision rounds the exponential differently, so the last bits may differ."""
    boxes, scores, counts = found
    for n, (a, b) in enumerate(zip(*expected, strict=True)):
        count = int(counts[n])
        assert count == len(a)
        # A corner is off by an ulp of the sides that it is summed of, at most 16 clamped times 256.
        torch.testing.assert_close(boxes[n, :count], a, rtol=2 * unit, atol=unit * 256)
        torch.testing.assert_close(scores[n, :count], b, rtol=2 * unit, atol=0)
        assert not boxes[n, count:].any()
        assert not scores[n, count:].any()


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchvisions_rpn(every_backend, dtype, form, trained):
    objectness, deltas = head(dtype, form, trained=trained)
    found = propose(objectness, deltas, **vars(TORCHVISION))
    assert (found[0].dtype, found[1].dtype, found[2].dtype) == (dtype, dtype, torch.int64)
    check_equal(found, as_torchvision(objectness, deltas), torch.finfo(dtype).eps)


@not_interpreted
@pytest.mark.parametrize(
    "numbers",
    [(10, 1000, 0.7, 0.0), (5000, 5000, 0.5, 0.0), (200, 7, 0.9, 0.0), (200, 150, 0.7, 0.52), (0, 5, 0.7, 0.0),
     (50, 0, 0.7, 0.0), (200, 150, 0.7, 2.0)],
    ids=str,
)  # fmt: skip
def test_other_numbers(every_backend, numbers):
    """More boxes wanted than anchors, fewer than candidates, none above the threshold, none wanted."""
    pre, post, thresh, score_thresh = numbers
    objectness, deltas = head()
    options = {"pre_nms_top_n": pre, "post_nms_top_n": post, "nms_thresh": thresh, "score_thresh": score_thresh}
    found = propose(objectness, deltas, **options)
    assert found[0].shape == (2, post, 4)
    check_equal(found, as_torchvision(objectness, deltas, pre, post, thresh, score_thresh), 2**-23)


@not_interpreted
def test_half_precision_is_read_exactly(every_backend):
    """The result equals that of the maps in float32: anchors, decoding and overlap use no half precision."""
    for dtype in (torch.float16, torch.bfloat16):
        objectness, deltas = head(dtype)
        found = propose(objectness, deltas)
        wide = propose([m.float() for m in objectness], [m.float() for m in deltas])
        assert all(torch.equal(a, b) for a, b in zip(found, wide, strict=True))


def test_ties_go_in_torchvisions_order_of_anchors(every_backend):
    """Equal logits rank in the order (y, x, anchor), equal scores in that of levels."""
    objectness, deltas = head(batch=1)
    objectness = [torch.full_like(m, 0.25) for m in objectness]
    deltas = [torch.zeros_like(m) for m in deltas]
    options = {"pre_nms_top_n": 40, "post_nms_top_n": 160, "nms_thresh": 1.0, "min_size": 0.0}
    boxes, scores, counts = propose(objectness, deltas, **options)
    expected = []
    for m, cells, stride in zip(objectness, CELLS, strides_of(objectness), strict=True):
        index = torch.arange(min(40, m[0].numel()))
        expected.append(anchors_at(index, torch.tensor(cells), m.shape[3], stride, 0.0, torch.float32))
    expected = box_ops.clip_boxes_to_image(torch.cat(expected), SIZES[0])
    assert counts.item() == 160
    assert torch.equal(boxes[0], expected)
    assert len(scores.unique()) == 1


@not_interpreted
def test_bad_numbers_are_never_proposed(every_backend):
    """The result is as if these logits had been low; torchvision ranks NaN first."""
    objectness, deltas = head()
    bad = [m.clone() for m in objectness]
    low = [m.clone() for m in objectness]
    for m, value in zip(bad, (NAN, INF, -INF, NAN), strict=True):
        m[:, 1, ::2] = value
    for m in low:
        m[:, 1, ::2] = -200
    found = propose(bad, deltas, pre_nms_top_n=10000, score_thresh=1e-30)
    expected = propose(low, deltas, pre_nms_top_n=10000, score_thresh=1e-30)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    codes = [m.clone() for m in deltas]
    for i, value in enumerate((NAN, INF, -INF, 3e38)):
        codes[i][:, i::4, 1::2] = value
    found = propose(objectness, codes, pre_nms_top_n=10000)
    assert found[0].isfinite().all()
    low = [m.clone() for m in objectness]
    for i, m in enumerate(low):
        # 3e38 times a side is infinite where it moves a box; what it scales is clamped.
        if i < 3:
            m[:, :, 1::2] = -200
    expected = propose(low, [codes[i] if i == 3 else deltas[i] for i in range(4)], pre_nms_top_n=10000,
                       score_thresh=1e-30)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    nothing = propose([torch.full_like(m, NAN) for m in objectness], deltas)
    assert not any(each.any() for each in nothing)


def test_sizes_and_scores_that_are_hit_exactly(every_backend):
    """A box of exactly min_size and a score of exactly the threshold, with >= and with >."""
    objectness, deltas = torch.zeros(1, 1, 1, 2), torch.zeros(1, 4, 1, 2)
    arguments = ([objectness], [deltas], [[(0, 0, 8, 4)]], [(1, 20)], torch.tensor([[50, 50]]))
    numbers = {"pre_nms_top_n": 5, "post_nms_top_n": 5, "nms_thresh": 0.5}
    for least, strict, count in ((4, False, 2), (4, True, 0), (math.nextafter(4, 9), False, 2), (4.001, False, 0)):
        assert ops.generate_proposals(*arguments, **numbers, min_size=least, strict_size=strict)[2] == count
    for least, count in ((0.5, 2), (0.5001, 0)):
        assert ops.generate_proposals(*arguments, **numbers, score_thresh=least)[2] == count


def test_the_exponential_is_the_nearest_float():
    """The compiled op too: the sides of these boxes are exp(dw) times a power of two."""
    x = torch.linspace(-20, 4.1, 3000)
    assert torch.equal(exponential(x), torch.tensor([math.exp(v) for v in x.tolist()], dtype=torch.float64).float())
    assert (logistic(x) - torch.sigmoid(x)).abs().max() <= 2**-23
    maps = torch.zeros(1, 1, 1, 3000), torch.zeros(1, 4, 1, 3000)
    maps[0][:] = torch.arange(3000, 0, -1) / 3000
    maps[1][0, 2, 0] = x
    numbers = {"pre_nms_top_n": 3000, "post_nms_top_n": 3000, "nms_thresh": 2.0, "min_size": 0.0}
    cells, sizes = [[(0, 0, 2, 2)]], torch.tensor([[9, 999]])
    boxes, _, counts = ops.generate_proposals([maps[0]], [maps[1]], cells, [(1, 0)], sizes, **numbers)
    assert counts == 3000
    # About a centre at 1, clipped at 0: the right corner is 1 + exp(dw), rounded once.
    assert torch.equal(boxes[0, :, 2], 1 + exponential(x))


def test_autocast_promotes():
    objectness, deltas = head(torch.bfloat16)
    wide = [m.float() for m in deltas]
    with pytest.raises(TypeError, match="deltas must be of the dtype of objectness"):
        propose(objectness, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = propose(objectness, wide)
    assert all(torch.equal(a, b) for a, b in zip(found, propose([m.float() for m in objectness], wide), strict=True))


MAPS = head(pyramid=PYRAMID[2:])
ERRORS = [
    ({"objectness": []}, ValueError, "objectness must hold at least one map"),
    ({"objectness": MAPS[0] * 5, "deltas": MAPS[1] * 5}, ValueError, "objectness must be 1 to 8 maps, got 10"),
    ({"objectness": [m.int() for m in MAPS[0]]}, TypeError, "objectness must be float64.*int32 at 0"),
    ({"deltas": MAPS[1][:1]}, ValueError, "deltas must be one for each of the 2 maps of objectness, got 1"),
    ({"deltas": MAPS[0]}, ValueError, r"deltas must be \[N, 4A, H, W\], \(2, 12, 7, 11\) at 0, got \(2, 3, 7, 11\)"),
    ({"deltas": [m.to("meta") for m in MAPS[1]]}, ValueError, "deltas must be on the device of objectness, cpu"),
    ({"cell_anchors": CELLS[:1]}, ValueError, "cell_anchors must be a table for each of the 2 levels, got 1"),
    ({"cell_anchors": [CELLS[0], CELLS[1][:2]]}, ValueError, "cell_anchors must be 3 anchors .* at level 1"),
    ({"strides": [(4, 4)]}, ValueError, "strides must be .* for each of the 2 levels"),
    ({"strides": [(4.0, 4), (8, 8)]}, TypeError, "strides must be an integer"),
    ({"image_sizes": SIZES}, TypeError, "image_sizes must be a tensor, got list"),
    ({"image_sizes": torch.tensor(SIZES[:1])}, ValueError, r"image_sizes must be \[N, 2\], \(2, 2\), got \(1, 2\)"),
    ({"image_sizes": torch.tensor(SIZES).to("meta")}, ValueError, "image_sizes must be on the device of the maps"),
    ({"pre_nms_top_n": -1}, ValueError, "pre_nms_top_n must be 0 or more, got -1"),
    ({"post_nms_top_n": -1}, ValueError, "post_nms_top_n must be 0 or more, got -1"),
    ({"weights": (1, 1)}, ValueError, "weights must be four"),
    ({"nms_thresh": NAN}, ValueError, "nms_thresh must be a number, got nan"),
    ({"center_clamp": -1.0}, ValueError, "center_clamp must be 0 or more pixels, got -1.0"),
    ({"center_clamp": NAN}, ValueError, "center_clamp must be 0 or more pixels, got nan"),
    ({"clamp": "min"}, ValueError, "clamp must be max or symmetric, got 'min'"),
    ({"center": "x"}, ValueError, "center must be corner or mean"),
    ({"scores": "sigmoid"}, ValueError, "scores must be probability or logit"),
    ({"convention": "torchvision_offset"}, ValueError, "convention must be torchvision or mmcv"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change, error, message):
    arguments = {
        "objectness": MAPS[0], "deltas": MAPS[1], "cell_anchors": CELLS[:2], "strides": [(4, 4), (8, 8)],
        "image_sizes": torch.tensor(SIZES), "pre_nms_top_n": 5, "post_nms_top_n": 5, "nms_thresh": 0.7,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.generate_proposals(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("numbers", [(1000, 1000), (2000, 2000)], ids=str)
@pytest.mark.parametrize("library", [TORCHVISION, DETECTRON2, MMDET], ids=["torchvision", "detectron2", "mmdet"])
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_gpu_proposes_what_the_cpu_does(name, library, dtype, form, numbers):
    """At a detector's size results are equal bit for bit, also between runs, without host synchronisation."""
    pyramid = ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))
    objectness, deltas = head(dtype, form, pyramid=pyramid, trained=True)
    cells = [*CELLS, (torch.tensor(CELLS[-1]) * 2).tolist()]
    options = {**vars(library), "pre_nms_top_n": numbers[0], "post_nms_top_n": numbers[1], "nms_thresh": 0.7}
    strides, sizes = strides_of(objectness, (800, 1344)), torch.tensor([[800, 1333], [780, 1344]])
    call = lambda objectness, deltas, sizes: ops.generate_proposals(  # noqa: E731
        objectness, deltas, cells, strides, sizes, **options
    )
    check_on_a_gpu(name, call, objectness, deltas, sizes)
