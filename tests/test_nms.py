# SPDX-License-Identifier: Apache-2.0
import math
import re

import pytest
import torch
from helpers.devices import check_on_a_gpu, not_interpreted
from torchvision.ops import boxes as theirs

from fpn_fast import backends, ops, reference
from fpn_fast.ops.nms import _FORWARD, CONVENTIONS

NAN, INF = float("nan"), float("inf")


def scene(count, groups=1, seed=0, side=300.0, dtype=torch.float32):
    """Boxes of 8 to 108 pixels, distinct scores and groups."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(count, 2, generator=generator, dtype=torch.float64) * side
    sides = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 100 + 8
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], 1).clamp(0, side)
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    return boxes.to(dtype), scores.to(dtype), torch.randint(0, groups, (count,), generator=generator)


def loop(boxes, scores, groups, threshold, product=False):
    """The rule, in numbers: what is kept, by score and then by index."""
    kept = []
    rows, numbers = boxes.tolist(), scores.tolist()
    for i in sorted(range(len(rows)), key=lambda i: (-numbers[i], i)):
        if all(groups[i] != groups[j] or not meets(rows[j], rows[i], threshold, product) for j in kept):
            kept.append(i)
    return kept


def meets(a, b, threshold, product):
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    if product:
        return shared > threshold * union
    return union != 0 and shared / union > threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 700])
def test_nms_equals_torchvisions(every_backend, count, threshold, dtype):
    boxes, scores, _ = scene(count, dtype=dtype)
    kept = ops.nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, theirs.nms(boxes, scores, threshold))


@not_interpreted
@pytest.mark.parametrize("groups", [1, 5, 80, 1203])
@pytest.mark.parametrize("count", [900, 3000])
def test_batched_nms_equals_torchvisions(every_backend, count, groups):
    """With groups told apart by comparing; by its other way the offset convention, bit for bit."""
    boxes, scores, idxs = scene(count, groups, seed=groups)
    assert torch.equal(ops.batched_nms(boxes, scores, idxs, 0.5), theirs._batched_nms_vanilla(boxes, scores, idxs, 0.5))
    moved = theirs._batched_nms_coordinate_trick(boxes - 50, scores, idxs, 0.5)
    keep, counts = ops.segmented_nms(
        (boxes - 50)[None], scores[None], idxs[None], None, 0.5, count, convention="torchvision_offset"
    )
    assert torch.equal(keep[0, : counts[0]], moved)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 80])
def test_thirty_thousand_boxes(groups):
    """A group that is divided among threads, and many that are not."""
    boxes, scores, idxs = scene(30000, groups, side=3000.0)
    threads = torch.get_num_threads()
    found = ops.batched_nms(boxes, scores, idxs, 0.5)
    torch.set_num_threads(1)
    alone = ops.batched_nms(boxes, scores, idxs, 0.5)
    torch.set_num_threads(threads)
    assert torch.equal(found, alone)
    assert torch.equal(found, theirs._batched_nms_vanilla(boxes, scores, idxs, 0.5))


@not_interpreted
def test_a_large_group_is_decided_in_blocks(every_backend):
    boxes, scores, _ = scene(9000, side=4000.0)
    assert torch.equal(ops.nms(boxes, scores, 0.3), theirs.nms(boxes, scores, 0.3))


def test_ties_go_to_the_lower_index(every_backend):
    boxes, _, groups = scene(400, 3)
    scores = (torch.arange(400) % 7).float()
    assert ops.batched_nms(boxes, scores, groups, 0.4).tolist() == loop(boxes.double(), scores, groups, 0.4)
    # Zero and minus zero are one score.
    apart = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [9, 9, 10, 10]])
    assert ops.nms(apart, torch.tensor([-0.0, 0.0, -0.0]), 0.5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_threshold_that_is_hit_exactly(every_backend, shift):
    """Overlaps of quotients that are numbers, and thresholds there and one number (of float64) beside."""
    for width, share in ((2.0, 0.5), (4.0, 0.25), (10.0, 0.1)):
        boxes = torch.tensor([[0.0, 0, width, 1], [0, 0, 1, 1]])
        threshold = share if shift == 0 else math.nextafter(share, shift * INF)
        expected = theirs.nms(boxes, torch.tensor([1.0, 0.5]), threshold)
        assert torch.equal(ops.nms(boxes, torch.tensor([1.0, 0.5]), threshold), expected)
        # A tenth is no number: its float32 lies above all three.
        assert len(expected) == (2 if shift >= 0 and share != 0.1 else 1)


@not_interpreted
def test_every_quotient_near_a_threshold_is_decided_as_by_division(every_backend):
    """Boxes [0, w] against [0, 1]: 1000 widths whose overlap is within 2**-21 of the threshold."""
    groups = torch.arange(1000).repeat(2)[None]
    scores = torch.tensor([1.0, 0.5]).repeat_interleave(1000)[None]
    for threshold in (0.3, 0.5, 0.7, 0.9):
        widths = (1 / threshold * (1 + torch.linspace(-1, 1, 1000, dtype=torch.float64) * 2**-21)).float()
        boxes = torch.zeros(1, 2000, 4)
        boxes[0, :, 3], boxes[0, :1000, 2], boxes[0, 1000:, 2] = 1, widths, 1
        # As it is summed: the areas less what they share.
        unions = widths + 1 - 1
        _, kept = ops.segmented_nms(boxes, scores, groups, None, threshold, 2000)
        removed = (1 / unions).double() > threshold
        assert 0 < removed.sum() < 1000
        assert kept == 2000 - removed.sum()
        _, kept = ops.segmented_nms(boxes, scores, groups, None, threshold, 2000, convention="mmcv")
        assert kept == 2000 - (torch.tensor(threshold) * unions < 1).sum()


@not_interpreted
def test_segmented_nms_of_a_batch(every_backend):
    images = [scene(300, 4, seed=i) for i in range(3)]
    boxes, scores, groups = (torch.stack(each) for each in zip(*images, strict=True))
    counts = torch.tensor([300, 0, 120])
    for limit in (0, 5, 400):
        keep, kept = ops.segmented_nms(boxes, scores, groups, counts, 0.5, limit)
        assert (keep.shape, keep.dtype, kept.dtype) == ((3, limit), torch.int64, torch.int64)
        for n, count in enumerate(counts.tolist()):
            rows = boxes[n, :count], scores[n, :count], groups[n, :count]
            expected = theirs._batched_nms_vanilla(*rows, 0.5)[:limit].tolist()
            assert keep[n].tolist() == expected + [-1] * (limit - len(expected))
            assert kept[n] == len(expected)
    # A count beyond the boxes counts them all; a negative one none.
    _, kept = ops.segmented_nms(boxes, scores, None, torch.tensor([999, -3, 1]), 1.0, 400)
    assert kept.tolist() == [300, 0, 1]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_are_what_they_say(every_backend, convention):
    boxes, scores, groups = scene(300, 3, dtype=torch.float64)
    keep, kept = ops.segmented_nms(boxes[None], scores[None], groups[None], None, 0.4, 300, convention=convention)
    rows, unit = boxes, groups
    if convention == "torchvision_offset":
        rows, unit = boxes + groups[:, None] * (boxes.max() + 1), torch.zeros_like(groups)
    assert keep[0, : kept[0]].tolist() == loop(rows, scores, unit.tolist(), 0.4, convention == "mmcv")


def test_bad_numbers_are_never_kept_and_remove_nothing(every_backend):
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 9)
    for i, value in enumerate((NAN, INF, -INF, NAN)):
        boxes[i, i] = value
    scores = torch.tensor([9.0, 8, 7, 6, NAN, INF, -INF, 0.5, 0.25])
    assert ops.nms(boxes, scores, 0.5).tolist() == [7]
    for convention in CONVENTIONS:
        keep, kept = ops.segmented_nms(
            boxes[None], scores[None], torch.arange(9)[None] % 2, None, 0.5, 9, convention=convention
        )
        assert (keep[0, :2].tolist(), kept.tolist()) == ([7, 8], [2])
    keep, kept = ops.segmented_nms(boxes[None, :5], scores[None, :5], None, None, 0.5, 3)
    assert (keep.tolist(), kept.tolist()) == ([[-1, -1, -1]], [0])


def test_odd_boxes_as_torchvision_decides_them(every_backend):
    """No area, inverted along one axis and both, huge with an infinite area, tiny with a subnormal one."""
    boxes = torch.tensor(
        [[0.0, 0, 0, 0], [0, 0, 0, 0], [5, 5, 1, 9], [5, 5, 1, 1], [5, 5, 1, 1], [-1e30, -1e30, 1e30, 1e30]] * 2
        + [[-1e30, -1e30, 1e30, 1e30], [0, 0, 1e-20, 1e-20], [0, 0, 1e-20, 1.5e-20], [0, 0, 1e-22, 1e-22]]
    )
    scores = torch.arange(len(boxes), 0, -1).float()
    for threshold in (0.0, 0.3, 0.5, 0.9):
        assert torch.equal(ops.nms(boxes, scores, threshold), theirs.nms(boxes, scores, threshold))


def test_groups_are_any_integers(every_backend):
    boxes, scores, groups = scene(200, 5)
    far = torch.tensor([-(2**62), -1, 0, 7, 2**62])[groups]
    expected = ops.batched_nms(boxes, scores, groups, 0.5)
    assert torch.equal(ops.batched_nms(boxes, scores, far, 0.5), expected)
    assert torch.equal(ops.batched_nms(boxes, scores, groups.to(torch.int16), 0.5), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_groups_are_bools_or_floats_too(every_backend, dtype):
    boxes, scores, groups = scene(200, 2)
    # 0 and -0 are one group, in torchvision too.
    groups = torch.where(groups == 0, 0.0, 0.5).masked_fill((groups == 0) & (scores > 0.5), -0.0).to(dtype)
    expected = ops.batched_nms(boxes, scores, (groups != 0).long(), 0.5)
    assert torch.equal(ops.batched_nms(boxes, scores, groups, 0.5), expected)
    # As it compares groups, for more boxes than these.
    assert torch.equal(theirs._batched_nms_vanilla(boxes, scores, groups, 0.5), expected)


@pytest.mark.parametrize("shape", [(0, 4), (0,), (0, 5)], ids=str)
def test_no_boxes_of_any_shape(every_backend, shape):
    for dtype, device in ((torch.float32, "cpu"), (torch.int64, "cpu"), (torch.float32, "meta")):
        none = torch.empty(shape, dtype=dtype, device=device)
        found, expected = (f(none, none.flatten(), none, 0.5) for f in (ops.batched_nms, theirs.batched_nms))
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)


@pytest.mark.parametrize(
    ("convention", "dtype"),
    [("torchvision", torch.float32), ("mmcv", torch.float64), ("torchvision_offset", torch.float32)],
    ids=str,
)
def test_triton_decides_as_the_reference(convention, dtype, monkeypatch):
    """Images with few coordinates and scores, so that these are often equal, with bad numbers, groups of any size, and
    segments of several regions; more images than one, with counts."""
    pytest.importorskip("triton")
    from fpn_fast.triton import _greedy_nms

    monkeypatch.setattr(_greedy_nms, "REGION", 32)
    monkeypatch.setattr(_greedy_nms, "CHUNK", 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(CONVENTIONS.index(convention))
    # Below zero, where boxes that are moved apart meet those of other groups.
    corners = torch.randint(-20, -10, (2, 80, 2), generator=generator)
    sides = torch.randint(0, 14, (2, 80, 2), generator=generator)
    boxes = torch.cat([corners, corners + sides], 2).to(dtype)
    scores = torch.randint(0, 40, (2, 80), generator=generator).to(dtype)
    boxes[0, ::37, 1], scores[0, 5::41], scores[1, 7::43] = NAN, INF, NAN
    skewed = torch.tensor([1, 1, 1, 1, 1, -(2**63), 2**63 - 1, 0])[torch.randint(0, 8, (2, 80), generator=generator)]
    counts = torch.tensor([78, 57])
    for groups, room in ((skewed, 80), (None, 9)):
        expected = reference.segmented_nms(boxes, scores, groups, counts, 0.4, room, convention)
        here = [None if each is None else each.to(device) for each in (boxes, scores, groups, counts)]
        with backends.use("triton"):
            found = ops.segmented_nms(*here, 0.4, room, convention=convention)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_the_compiled_library_has_it_on_every_device():
    assert set(_FORWARD) == {"cpp", "triton", "reference"}
    for device in ("cpu", "cuda"):
        served = backends.problem("cpp", device) is None
        second = "triton" if device == "cuda" else "reference"
        assert backends.choose(device, "segmented_nms") == ("cpp" if served else second)
        assert (backends.problem("cpp", device, "segmented_nms") is None) == served


def test_backends_without_a_kernel_leave_it_to_the_reference(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_missing", {("triton", "cuda"): {"segmented_nms"}})
    backends.declare_missing("segmented_nms", "cpp", "cuda")
    assert backends.choose("cuda", "segmented_nms") == "reference"
    assert "reference taken" in backends.explain("cuda", "segmented_nms")


@pytest.mark.parametrize(
    ("op", "by_torch"),
    [
        ("segmented_nms", "sorting"),
        ("generate_proposals", "top-k and sorting"),
        ("select_detections", "top-k and sorting"),
        ("select_box_detections", "softmax and sorting"),
    ],
)
def test_what_triton_leaves_to_torch_is_said(op, by_torch):
    with backends.use("triton"):
        assert backends.choose("cuda", op) == "triton"
        assert f"triton    taken; {by_torch} by torch's own operators" in backends.explain("cuda", op)
        assert re.search(rf"{by_torch} of [a-z_, ]*{op}\b[a-z_, ]* by torch's own operators", backends.explain("cuda"))
    assert "by torch" not in backends.explain("cuda", "match_anchors")


BOXES, SCORES, GROUPS = torch.zeros(2, 5, 4), torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64)
ERRORS = [
    ({"boxes": BOXES[0]}, ValueError, r"boxes must be \[N, B, 4\], got \(5, 4\)"),
    ({"boxes": BOXES.int()}, TypeError, r"boxes must be float64, float32, float16 or bfloat16, got torch.int32"),
    ({"scores": SCORES[:1]}, ValueError, r"scores must be one for each box, \(2, 5\), got \(1, 5\)"),
    ({"scores": SCORES.long()}, TypeError, r"scores must be float64.*got torch.int64"),
    ({"scores": SCORES.to("meta")}, ValueError, "scores must be on the device of boxes, cpu, got meta"),
    ({"scores": [0.5] * 5}, TypeError, "scores must be a tensor, got list"),
    ({"groups": SCORES}, TypeError, "groups must be of an integer type, got torch.float32"),
    ({"groups": GROUPS[0]}, ValueError, r"groups must be \[N, B\], \(2, 5\), got \(5,\)"),
    ({"groups": [1]}, TypeError, "groups must be a tensor, got list"),
    ({"counts": GROUPS}, ValueError, r"counts must be \[N\], \(2,\)"),
    ({"counts": GROUPS[:, 0].to("meta")}, ValueError, "counts must be on the device of boxes"),
    ({"iou_threshold": NAN}, ValueError, "iou_threshold must be a number, got nan"),
    ({"max_output": -1}, ValueError, "max_output must be 0 or more, got -1"),
    ({"convention": "soft"}, ValueError, "convention must be torchvision, mmcv or torchvision_offset, got 'soft'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change, error, message):
    arguments = {"boxes": BOXES, "scores": SCORES, "groups": GROUPS, "counts": None, "iou_threshold": 0.5}
    with pytest.raises(error, match=message):
        ops.segmented_nms(**{**arguments, "max_output": 5, **change})


def test_errors_of_torchvisions_forms():
    with pytest.raises(ValueError, match=r"boxes must be \[B, 4\], got \(2, 5, 4\)"):
        ops.nms(BOXES, SCORES, 0.5)
    with pytest.raises(TypeError, match="idxs must be a tensor, got int"):
        ops.batched_nms(BOXES[0], SCORES[0], 3, 0.5)
    with pytest.raises(ValueError, match=r"idxs must be \[B\], \(5,\)"):
        ops.batched_nms(BOXES[0], SCORES[0], GROUPS, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("groups", [None, 5, 80, 1203, 10**6])
@pytest.mark.parametrize("count", [1000, 1500, 30000])
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_gpu_decides_as_the_cpu_does(name, count, groups, convention):
    """One large segment, several of them, and many small ones; the same in every run, without synchronising."""
    images = [scene(count, groups or 1, seed=i, side=3000.0) for i in range(2)]
    boxes, scores, labels = (torch.stack(each) for each in zip(*images, strict=True))
    arguments = boxes, scores, labels if groups else None, torch.tensor([count, count - 300])
    check_on_a_gpu(name, lambda *given: ops.segmented_nms(*given, 0.5, count, convention=convention), *arguments)
