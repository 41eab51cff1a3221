# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
import torch
from helpers.anchor_matching import CASES
from helpers.devices import on_triton, without_synchronising
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from fpn_fast import backends, ops, reference

NAN, INF = float("nan"), float("inf")
RULE = {"high_threshold": 0.7, "low_threshold": 0.3}
SIZES = ((25, 42), (13, 21), (7, 11), (4, 6), (2, 3))


def torchvisions(gts, anchors, high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True):
    """One image: (matches, best IoUs)."""
    if not len(gts):
        return torch.full((len(anchors),), -1), anchors.new_zeros(len(anchors))
    matrix = box_iou(gts, anchors)
    return Matcher(high_threshold, low_threshold, allow_low_quality_matches)(matrix), matrix.max(0).values


def pyramid(sizes=SIZES, image=(100, 168), scale=1 / 8):
    """torchvision's anchors for an image, and the same as numbers."""
    generator = AnchorGenerator(tuple((s * scale,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, *image), [image]), maps)
    strides = [(image[0] // h, image[1] // w) for h, w in sizes]
    return anchors, ops.AnchorGrid([c.tolist() for c in generator.cell_anchors], list(sizes), strides)


def ground_truths(count, height=100, width=168, seed=0, whole=False):
    """Boxes as in photographs: mostly small, a few large, clipped to the image; whole pixels make ties."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.exp(torch.randn(count, 2, generator=generator) * 0.8 + 2.8).clamp(2, 90)
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([float(width), float(height)])
    boxes = torch.cat((centre - extent / 2, centre + extent / 2), 1)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
    return boxes.round() if whole else boxes


def near(anchors, count, seed=0):
    """What a trained network proposes: boxes about the ground truths, that is here, about some anchors."""
    generator = torch.Generator().manual_seed(seed)
    chosen = anchors[torch.randint(len(anchors), (count,), generator=generator)]
    return chosen + torch.randn(count, 4, generator=generator)


def check(gts, anchors, description=None, **rule):
    """Every form of the call gives what torchvision gives for each image."""
    rule = {**RULE, **rule}
    boxes, counts = ops.pad_boxes(gts)
    for each in (anchors, anchors.expand(len(gts), -1, -1), *([] if description is None else [description])):
        matches, ious = ops.match_anchors(boxes, counts, each, **rule)
        assert (matches.shape, matches.dtype) == ((len(gts), len(anchors)), torch.int64)
        assert ious.dtype == anchors.dtype
        for i, gt in enumerate(gts):
            expected, best = torchvisions(gt, anchors, **rule)
            assert torch.equal(matches[i], expected)
            same(ious[i], best)


def same(*ious):
    torch.testing.assert_close(*ious, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("whole", [False, True], ids=["any", "whole_pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchvision_on_a_pyramid(backend, dtype, whole, low_quality):
    anchors, description = pyramid()
    gts = [ground_truths(n, seed=n, whole=whole) for n in (1, 7, 0, 40)]
    gts = [gt[(gt[:, 2:] > gt[:, :2]).all(1)].to(dtype) for gt in gts]
    check(gts, anchors.to(dtype), description, allow_low_quality_matches=low_quality)


def test_equals_torchvision_on_proposals(backend):
    gts = ground_truths(30)
    for seed in range(4):
        proposals = torch.cat((near(gts, 700, seed), ground_truths(300, seed=seed), gts))
        check([gts], proposals, high_threshold=0.5, low_threshold=0.5, allow_low_quality_matches=False)
        check([gts], proposals)


def test_grid_equals_torchvisions_anchors_bit_for_bit():
    # The image's sizes are no multiples: strides are 61 and 64 pixels where the pyramid's is 64.
    sizes = ((200, 334), (100, 167), (50, 84), (25, 42), (13, 21))
    anchors, description = pyramid(sizes, (800, 1344), 1)
    assert torch.equal(description.boxes(), anchors)
    assert len(description) == len(anchors)


def test_grid_with_an_offset(backend):
    grid = ops.AnchorGrid([[(-4.0, -4.0, 4.0, 4.0)], [(-9, -5, 9, 5), (-5, -9, 5, 9)]], [(5, 7), (2, 3)],
                          [(8, 8), (20, 18)], 0.5)  # fmt: skip
    anchors = grid.boxes()
    assert anchors[0].tolist() == [0, 0, 8, 8]
    assert anchors[-1].tolist() == [2.5 * 18 - 5, 30 - 9, 2.5 * 18 + 5, 30 + 9]
    check([ground_truths(6, 40, 56)], anchors, grid)


def test_ties_take_the_first_ground_truth_and_restore_every_anchor(backend):
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 10], [40, 40, 50, 50], [3, 0, 13, 10]])
    # Of two equal ones the first. Low as their IoU is, anchors keep what is nobody's better match.
    gts = torch.tensor([[1.0, 0, 11, 10], [1, 0, 11, 10], [18, 0, 22, 10], [38, 38, 42, 42], [48, 48, 52, 52]])
    matches, _ = ops.match_anchors(gts[None], None, anchors, **RULE)
    assert matches.tolist() == [[0, 2, 0, 3, -2]]
    check([gts], anchors)
    check([gts.flip(0)], anchors.flip(0))


def test_a_ground_truth_without_overlap_restores_all_that_have_none_with_it(backend):
    """torchvision's rule to the letter: its highest IoU is 0, and every anchor has that."""
    anchors, description = pyramid()
    gts = torch.tensor([[10.0, 10, 40, 40], [5000.0, 5000, 5010, 5010]])
    matches, _ = ops.match_anchors(gts[None], None, description, **RULE)
    assert (matches >= 0).all()
    check([gts], anchors, description)


def test_thresholds_hit_exactly(backend):
    """IoUs of exactly 1/4, 1/2 and 1, and their neighbours."""
    anchors = torch.tensor([[0.0, 0, 4, 1], [0, 0, 2, 1], [0, 0, 1, 1], [0, 0, 4.000001, 1], [0, 0, 1.999999, 1]])
    gts = torch.tensor([[0.0, 0, 1, 1]])
    quarter = {"high_threshold": 0.5, "low_threshold": 0.25, "allow_low_quality_matches": False}
    assert ops.match_anchors(gts[None], None, anchors, **quarter)[0].tolist() == [[-2, 0, 0, -1, 0]]
    for high, low in ((0.5, 0.25), (0.5, 0.5), (1.0, 0.25), (0.25, 0.0), (0.0, 0.0), (2.0, -1.0)):
        for low_quality in (True, False):
            rule = {"high_threshold": high, "low_threshold": low, "allow_low_quality_matches": low_quality}
            check([gts, ground_truths(3)], anchors, **rule)
    # 0.7 and 0.3 are no float32 numbers: torchvision compares with the nearest.
    tenths = torch.tensor([[0.0, 0, 10, 1]])
    check([tenths], torch.tensor([[0.0, 0, 7, 1], [0, 0, 3, 1], [0, 0, 8, 1]]), allow_low_quality_matches=False)


def test_counts_shorter_than_the_padding(backend):
    anchors, _ = pyramid()
    gts = torch.stack([ground_truths(9, seed=s) for s in range(3)])
    matches, ious = ops.match_anchors(gts, torch.tensor([9, 4, 0], dtype=torch.int32), anchors, **RULE)
    for i, count in enumerate((9, 4, 0)):
        expected, best = torchvisions(gts[i, :count], anchors)
        assert torch.equal(matches[i], expected)
        assert torch.equal(ious[i], best)
    per_image = torch.stack([near(gts[i], 300, seed=i) for i in range(3)])
    counts = torch.tensor([300, 17, 0])
    for anchors in (per_image, per_image[0]):
        matches, ious = ops.match_anchors(gts, None, anchors, anchor_counts=counts, **RULE)
        for i, count in enumerate(counts.tolist()):
            rows = (anchors if anchors.dim() == 2 else anchors[i])[:count]
            if count:
                expected, best = torchvisions(gts[i], rows)
                assert torch.equal(matches[i, :count], expected)
                assert torch.equal(ious[i, :count], best)
            assert (matches[i, count:] == -1).all()
            assert (ious[i, count:] == 0).all()


@pytest.mark.parametrize(("n", "g", "m"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0), (1, 1, 1), (1, 1, 257)])
def test_empty_and_tiny(backend, n, g, m):
    gts, anchors = torch.rand(n, g, 4).cumsum(-1), torch.rand(m, 4).cumsum(-1)
    matches, ious = ops.match_anchors(gts, None, anchors, **RULE)
    assert (matches.shape, ious.shape) == ((n, m), (n, m))
    if g == 0:
        assert (matches == -1).all()
        assert (ious == 0).all()
    empty = ops.AnchorGrid([[(0.0, 0, 1, 1)]], [(0, 7)], [(8, 8)])
    assert ops.match_anchors(gts, None, empty, **RULE)[0].shape == (n, 0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("corner", range(4))
def test_anchors_that_are_not_finite_take_no_part(backend, bad, corner):
    anchors, _ = pyramid()
    gts = ground_truths(6)
    anchors = anchors[:400].clone()
    anchors[[0, 77, 399], corner] = bad
    matches, ious = ops.match_anchors(gts[None], None, anchors, **RULE)
    good = anchors.isfinite().all(1)
    expected, best = torchvisions(gts, anchors[good])
    assert torch.equal(matches[0, good], expected)
    assert torch.equal(ious[0, good], best)
    assert (matches[0, ~good] == -1).all()
    assert (ious[0, ~good] == 0).all()


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("corner", range(4))
def test_a_ground_truth_with_a_nan_matches_all_anchors(backend, corner, low_quality):
    """torchvision's maximum counts a NaN as the highest IoU: the loss is one too."""
    anchors, description = pyramid()
    gts = [ground_truths(6, seed=seed) for seed in range(3)]
    gts[0][[2, 4], corner] = NAN
    gts[2] = gts[2][:1] * NAN
    check(gts, anchors, description, allow_low_quality_matches=low_quality)
    counts = torch.tensor([2, 6, 6])
    matches, _ = ops.match_anchors(ops.pad_boxes(gts)[0], counts, anchors, **RULE)
    assert torch.equal(matches[0], torchvisions(gts[0][:2], anchors)[0])


@pytest.mark.parametrize("bad", [INF, -INF])
@pytest.mark.parametrize("corner", range(4))
def test_an_infinite_ground_truth_is_no_better_than_a_nan(backend, bad, corner):
    """Its IoU is 0 or NaN in torchvision, where the loss may be finite for the wrong anchors."""
    anchors, _ = pyramid()
    gts = ground_truths(6)
    gts[[3, 5], corner] = bad
    anchors = torch.cat([anchors, gts])
    matches, ious = ops.match_anchors(gts[None], None, anchors, **RULE)
    good = anchors.isfinite().all(1)
    assert torch.equal(matches[0], torch.where(good, 3, -1))
    assert torch.equal(ious[0].isnan(), good)


def test_boxes_without_area_and_huge_ones(backend):
    """Where torchvision's 0 / 0 is NaN and so a match, there is no overlap; all else is torchvision's."""
    anchors = torch.tensor([[5.0, 5, 5, 5], [0, 0, 10, 10], [8, 8, 2, 2], [8, 2, 2, 8], [-3e38, -3e38, 3e38, 3e38]])
    point = torch.tensor([[5.0, 5, 5, 5]])
    matches, ious = ops.match_anchors(point[None], None, anchors, allow_low_quality_matches=False, **RULE)
    assert matches.tolist() == [[-1] * 5]
    assert ious.tolist() == [[0.0] * 5]
    check([torch.tensor([[1.0, 1, 9, 8], [0, 0, 10, 10]])], anchors[1:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_equals_the_reference_bit_for_bit(name, dtype):
    case = CASES[name]
    _, _, gts, counts, anchors, anchor_counts = case.tensors(dtype)
    rule = {"high_threshold": case.high, "low_threshold": case.low, "allow_low_quality_matches": case.low_quality}
    if case.anchor_counts is not None:
        rule["anchor_counts"] = anchor_counts
    given = anchors if torch.is_tensor(case.anchors) else case.anchors
    results = on_triton("match_anchors", gts, counts, given, **rule)
    for actual, expected in zip(results, case.expected(dtype), strict=True):
        same(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_gpu_equals_the_reference_bit_for_bit_without_synchronising(name, dtype, low_quality):
    sizes = ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))
    anchors, description = pyramid(sizes, (800, 1344), 1)
    gts, counts = ops.pad_boxes([ground_truths(n, 800, 1344, seed=n, whole=True).to(dtype) for n in (7, 300, 0)])
    rule = {**RULE, "allow_low_quality_matches": low_quality}
    numbers = (rule["high_threshold"], rule["low_threshold"], low_quality)
    expected = reference.match_anchors(gts, counts, anchors.to(dtype), None, *numbers)
    gts, counts, anchors = gts.cuda(), counts.cuda(), anchors.to("cuda", dtype)
    with backends.use(name):
        for each in (anchors, anchors.expand(3, -1, -1).contiguous(), description):
            for run in without_synchronising(lambda each=each: ops.match_anchors(gts, counts, each, **rule), 2):
                assert all(torch.equal(actual.cpu(), right) for actual, right in zip(run, expected, strict=True))


def test_pads_without_values():
    with FakeTensorMode():
        boxes, counts = ops.pad_boxes([torch.empty(n, 4, device="cuda") for n in (3, 0, 7)])
    assert (boxes.shape, counts.shape, boxes.device.type, counts.device.type) == ((3, 7, 4), (3,), "cuda", "cuda")


def test_pads_a_batched_tensor_and_keeps_every_dtype_and_device():
    batch = torch.rand(2, 3, 4)
    boxes, counts = ops.pad_boxes(batch)
    assert torch.equal(boxes, batch)
    assert counts.tolist() == [3, 3]
    # Padding takes the first one's dtype: a fraction, and digits of float64, would be lost.
    mixed = [torch.ones(1, 4, dtype=torch.int64), torch.full((2, 4), 0.1, dtype=torch.float64), torch.zeros(0)]
    for order in (mixed, mixed[::-1]):
        boxes, counts = ops.pad_boxes(order)
        assert boxes.dtype == torch.float64
        assert torch.equal(boxes[1], mixed[1])
    with pytest.raises(ValueError, match="the boxes at 1 must be on the device of those at 0, cpu, got meta"):
        ops.pad_boxes([batch[0], batch[0].to("meta")])


MEMORY = """
import resource
import torch
from fpn_fast import ops

torch.set_num_threads(2)
cells = [[(-s, -s, s, s), (-s, -s / 2, s, s / 2), (-s / 2, -s, s / 2, s)] for s in (16, 32, 64, 128, 256)]
sizes = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
grid = ops.AnchorGrid(cells, sizes, [(800 // h, 1344 // w) for h, w in sizes])
boxes = torch.rand(1, 300, 4) * 600
boxes[..., 2:] += boxes[..., :2]
rule = {"high_threshold": 0.7, "low_threshold": 0.3}
ops.match_anchors(boxes[:, :1], None, ops.AnchorGrid(cells, [(2, 2)] * 5, [(4, 4)] * 5), **rule)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
matches, ious = ops.match_anchors(boxes, None, grid, **rule)
assert matches.shape == (1, 268569)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_for_300_ground_truths_and_all_anchors_of_an_image():
    """Results are 12 bytes an anchor, 3.2 MB; a matrix would be 322 MB. Twice the results, and 4 MB for threads."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 2 * 12 * 268569 + 4 * 2**20


GTS = torch.zeros(2, 3, 4)
ANCHORS = torch.zeros(5, 4)
ERRORS = [
    ({"gt_boxes": [1]}, TypeError, "gt_boxes must be a tensor, got list"),
    ({"gt_boxes": GTS[0]}, ValueError, r"gt_boxes must be \[N, G, 4\].*got \(3, 4\)"),
    ({"gt_boxes": GTS.int()}, TypeError, "gt_boxes must be float64.*int32"),
    ({"anchors": "grid"}, TypeError, "anchors must be a tensor or an AnchorGrid, got str"),
    ({"anchors": torch.zeros(3, 5, 4)}, ValueError, r"anchors must be \[M, 4\].*N of gt_boxes, 2, got \(3, 5, 4\)"),
    ({"anchors": torch.zeros(5, 3)}, ValueError, r"anchors must be \[M, 4\].*got \(5, 3\)"),
    ({"anchors": ANCHORS.long()}, TypeError, "anchors must be float64.*int64"),
    ({"anchors": ANCHORS.to("meta")}, ValueError, "anchors must be on the device of gt_boxes, cpu, got meta"),
    ({"gt_counts": [3, 3]}, TypeError, "gt_counts must be a tensor, got list"),
    ({"gt_counts": torch.zeros(2)}, TypeError, "gt_counts must be of an integer type, got torch.float32"),
    ({"gt_counts": torch.tensor([1])}, ValueError, r"gt_counts must be \[N\], \(2,\), got \(1,\)"),
    ({"gt_counts": torch.tensor([1, 1], device="meta")}, ValueError, "gt_counts must be on the device"),
    ({"anchor_counts": torch.tensor([1])}, ValueError, r"anchor_counts must be \[N\]"),
    ({"low_threshold": 0.8}, ValueError, "low_threshold must be at most high_threshold, 0.7, got 0.8"),
    ({"low_threshold": NAN}, ValueError, "low_threshold must be at most"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(backend, change, error, message):
    arguments = {"gt_boxes": GTS, "gt_counts": None, "anchors": ANCHORS, **RULE, **change}
    with pytest.raises(error, match=message):
        ops.match_anchors(**arguments)


def test_errors_of_descriptions_and_lists():
    with pytest.raises(ValueError, match="must have one entry per level, got"):
        ops.AnchorGrid([[(0, 0, 1, 1)]], [(2, 2), (1, 1)], [(4, 4)])
    with pytest.raises(ValueError, match="at level 1"):
        ops.AnchorGrid([[(0, 0, 1, 1)], []], [(2, 2), (1, 1)], [(4, 4), (8, 8)])
    with pytest.raises(ValueError, match="got an empty sequence"):
        ops.pad_boxes([])
    with pytest.raises(ValueError, match=r"\(x1, y1, x2, y2\), got \(2, 5\) at 1"):
        ops.pad_boxes([torch.zeros(2, 4), torch.zeros(2, 5)])
