# SPDX-License-Identifier: Apache-2.0
"""`select_detections` and `select_box_detections`: against torchvision, and backend against backend."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.devices import check_on_a_gpu, not_interpreted
from torchvision.models.detection import _utils, fcos, retinanet, roi_heads, ssd

from fpn_fast import backends, ops
from fpn_fast.reference.generate_proposals import anchors_at

NAN, INF = math.nan, math.inf
FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES = [(100, 160), (90, 168)]
PYRAMID = ((25, 42), (13, 21), (7, 11))
STRIDES = [(4, 4), (7, 8), (14, 15)]
ANCHORS, CLASSES = 2, 5
CELLS = [[[-16.0 * s, -8.0 * s, 16.0 * s, 8.0 * s], [-9.0 * s, -15.0 * s, 9.0 * s, 15.0 * s]] for s in (1, 2, 4)]
OPTIONS = {"score_thresh": 0.05, "pre_nms_top_n": 200, "nms_thresh": 0.5, "max_detections": 60}


def head(dtype=torch.float32, form=torch.contiguous_format, batch=2, anchors=ANCHORS, pyramid=PYRAMID, seed=0):
    """Logits far enough apart for scores to differ, most of them low, as a trained head's are; deltas; centerness."""
    generator = torch.Generator().manual_seed(seed)
    counts = [batch * anchors * CLASSES * height * width for height, width in pyramid]
    places = (torch.randperm(sum(counts), generator=generator).double() + 0.5) / sum(counts)
    logits, deltas, centers = [], [], []
    for share, (height, width) in zip(places.split(counts), pyramid, strict=True):
        logits.append((share.logit() - 3).view(batch, anchors * CLASSES, height, width))
        deltas.append(torch.randn(batch, 4 * anchors, height, width, generator=generator, dtype=torch.float64) * 0.4)
        centers.append(torch.randn(batch, anchors, height, width, generator=generator, dtype=torch.float64))
    made = [[each.to(dtype).contiguous(memory_format=form) for each in maps] for maps in (logits, deltas, centers)]
    return SimpleNamespace(logits=made[0], deltas=made[1], centers=made[2])


def sizes_of(batch, like):
    return torch.tensor(SIZES[:batch]).reshape(-1, 2).to(like.device)


def select(maps, cells=CELLS, **options):
    return ops.select_detections(
        maps.logits, maps.deltas, cells, STRIDES[: len(maps.logits)], sizes_of(len(maps.logits[0]), maps.logits[0]),
        **{**OPTIONS, **options},
    )  # fmt: skip


def select_centered(maps, **options):
    """FCOS: one anchor at a place, distances that are not negative."""
    maps = SimpleNamespace(logits=maps.logits, deltas=[each.abs() for each in maps.deltas], centers=maps.centers)
    cells = [table[:1] for table in CELLS]
    options = {"score_thresh": 0.2, "centerness": maps.centers, "coder": "distances", **options}
    return select(maps, cells, **options)


def flat(maps, numbers):
    """[N, A * numbers, H, W] -> [N, H * W * A, numbers], as torchvision's heads put it."""
    return [m.view(len(m), -1, numbers, *m.shape[2:]).permute(0, 3, 4, 1, 2).reshape(len(m), -1, numbers) for m in maps]


def anchors_of(maps, cells):
    """For each image and level all anchors."""
    levels = []
    for m, table, stride in zip(maps, cells, STRIDES, strict=False):
        index = torch.arange(m[0, 0].numel() * len(table))
        levels.append(anchors_at(index, torch.tensor(table, dtype=m.dtype), m.shape[3], stride, 0.0, m.dtype))
    return [levels] * len(maps[0])


def settings_of(coder, options, **others):
    """What torchvision's steps read of their model."""
    return SimpleNamespace(
        score_thresh=options["score_thresh"], nms_thresh=options["nms_thresh"],
        detections_per_img=options["max_detections"], box_coder=coder, **others,
    )  # fmt: skip


def torchvisions_retinanet(maps, **options):
    options = {**OPTIONS, **options}
    model = settings_of(_utils.BoxCoder((1.0,) * 4), options, topk_candidates=options["pre_nms_top_n"])
    outputs = {"cls_logits": flat(maps.logits, CLASSES), "bbox_regression": flat(maps.deltas, 4)}
    sizes = SIZES[: len(maps.logits[0])]
    return retinanet.RetinaNet.postprocess_detections(model, outputs, anchors_of(maps.logits, CELLS), sizes)


def torchvisions_fcos(maps):
    coder, options = _utils.BoxLinearCoder(normalize_by_size=True), {**OPTIONS, "score_thresh": 0.2}
    model = settings_of(coder, options, topk_candidates=options["pre_nms_top_n"])
    outputs = {
        "cls_logits": flat(maps.logits, CLASSES),
        "bbox_regression": flat([each.abs() for each in maps.deltas], 4),
        "bbox_ctrness": flat(maps.centers, 1),
    }
    anchors = anchors_of(maps.logits, [table[:1] for table in CELLS])
    return fcos.FCOS.postprocess_detections(model, outputs, anchors, SIZES[: len(maps.logits[0])])


def check_equal(found, expected, unit):
    """The same boxes and classes in the same order, to the last bits of an exponential that is rounded differently."""
    boxes, scores, labels, counts = found
    assert len(counts) == len(expected)
    for n, each in enumerate(expected):
        count = int(counts[n])
        assert count == len(each["boxes"])
        assert torch.equal(labels[n, :count], each["labels"])
        # A corner is off by an ulp of the sides that it is summed of, at most 64 clamped times 4.
        torch.testing.assert_close(boxes[n, :count], each["boxes"], rtol=2 * unit, atol=unit * 256)
        # A sigmoid, a product and a root.
        torch.testing.assert_close(scores[n, :count], each["scores"], rtol=4 * unit, atol=0)
        assert not boxes[n, count:].any()
        assert not scores[n, count:].any()
        assert not labels[n, count:].any()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchvisions_retinanet(every_backend, dtype, form):
    maps = head(dtype, form)
    found = select(maps)
    assert [each.dtype for each in found] == [dtype, dtype, torch.int64, torch.int64]
    assert found[3].min() > 20
    check_equal(found, torchvisions_retinanet(maps), torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchvisions_fcos(every_backend, dtype, form):
    maps = head(dtype, form, anchors=1)
    found = select_centered(maps)
    assert found[3].min() > 20
    check_equal(found, torchvisions_fcos(maps), torch.finfo(dtype).eps)


@not_interpreted
@pytest.mark.parametrize(
    "options",
    [{"pre_nms_top_n": 7}, {"pre_nms_top_n": 100_000}, {"max_detections": 3}, {"max_detections": 5000},
     {"score_thresh": 0.9999}, {"score_thresh": 1.0}, {"score_thresh": 0.0, "pre_nms_top_n": 50},
     {"score_thresh": -1.0, "pre_nms_top_n": 50}, {"nms_thresh": 0.0}, {"nms_thresh": 1.0}],
    ids=str,
)  # fmt: skip
def test_other_numbers(every_backend, options):
    """Fewer pairs than are asked for, nothing or everything that is good enough, fewer wanted than are left."""
    maps = head()
    check_equal(select(maps, **options), torchvisions_retinanet(maps, **options), 2**-23)


@not_interpreted
@pytest.mark.parametrize("call", [select, select_centered], ids=["deltas", "distances"])
def test_nothing_wanted(every_backend, call):
    maps = head(anchors=2 if call is select else 1)
    assert not call(maps, pre_nms_top_n=0)[3].any()
    boxes, scores, labels, counts = call(maps, max_detections=0)
    assert (boxes.shape, scores.shape, labels.shape, counts.tolist()) == ((2, 0, 4), (2, 0), (2, 0), [0, 0])


@not_interpreted
def test_tables_of_torchvisions_heads_seen_as_maps(every_backend):
    maps, views = head(), []
    for each, numbers in ((maps.logits, CLASSES), (maps.deltas, 4)):
        table = torch.cat(flat(each, numbers), 1)
        levels = table.split([m[0, 0].numel() * ANCHORS for m in each], 1)
        views.append([t.reshape(2, *m.shape[2:], -1).permute(0, 3, 1, 2) for t, m in zip(levels, each, strict=True)])
        assert views[-1][0].data_ptr() == table.data_ptr()
    found = select(SimpleNamespace(logits=views[0], deltas=views[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, select(maps), strict=True))


def test_ties_go_in_the_order_of_place_anchor_and_class(every_backend):
    """All logits equal: the first pairs of (y, x, anchor, class), and of equal scores the finer level first."""
    maps = head(batch=1)
    maps.logits = [torch.full_like(m, 0.25) for m in maps.logits]
    maps.deltas = [torch.zeros_like(m) for m in maps.deltas]
    boxes, scores, labels, counts = select(maps, pre_nms_top_n=13, max_detections=39, nms_thresh=1.0)
    assert counts.item() == 39
    assert len(scores.unique()) == 1
    assert labels[0].tolist() == [i % CLASSES for i in range(13)] * 3
    anchors = [torch.tensor(CELLS[level])[[i // CLASSES % ANCHORS for i in range(13)]] for level in range(3)]
    shift = torch.tensor([[i // CLASSES // ANCHORS, 0] * 2 for i in range(13)])
    widths = torch.tensor([stride[1] for stride in STRIDES])
    expected = torch.cat([a + shift * w for a, w in zip(anchors, widths, strict=True)])
    limits = torch.tensor([SIZES[0][1], SIZES[0][0]] * 2)
    assert torch.equal(boxes[0], torch.minimum(expected.clamp(min=0), limits))


@not_interpreted
@pytest.mark.parametrize("call", [select, select_centered], ids=["deltas", "distances"])
def test_bad_numbers_are_never_selected(every_backend, call):
    """What is left is as if the logits had been low."""
    maps = head(anchors=2 if call is select else 1)
    many = {"pre_nms_top_n": 10**5, "max_detections": 3000}
    names = ("logits", "deltas") if call is select else ("logits", "deltas", "centers")
    for name in names:
        bad, low = head(anchors=2 if call is select else 1), head(anchors=2 if call is select else 1)
        for m, logits, value in zip(getattr(bad, name), low.logits, (NAN, INF, -INF), strict=True):
            if value == -INF and name == "deltas" and call is select:
                value = NAN  # minus infinity scales a side to nothing, which is a number
            m[:, :, ::2] = value
            logits[:, :, ::2] = -200
        found, expected = call(bad, **many), call(low, **many)
        assert found[0].isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    maps.logits = [torch.full_like(m, NAN) for m in maps.logits]
    assert not any(each.any() for each in call(maps))


def test_a_threshold_that_is_hit_exactly(every_backend):
    logits, deltas, centers = torch.zeros(1, 1, 1, 2), torch.zeros(1, 4, 1, 2), torch.zeros(1, 1, 1, 2)
    arguments = ([logits], [deltas], [[(0, 0, 8, 4)]], [(1, 20)], torch.tensor([[50, 50]]))
    numbers = {"pre_nms_top_n": 5, "nms_thresh": 0.5, "max_detections": 5}
    for centerness in ((), [centers]):
        for threshold, count in ((0.5, 0), (math.nextafter(0.5, 0) - 1e-7, 2)):
            found = ops.select_detections(*arguments, **numbers, score_thresh=threshold, centerness=centerness)
            assert found[3].item() == count


# ---- select_box_detections ----------------------------------------------------------------------------------------


def tables(dtype=torch.float32, batch=2, boxes=70, classes=6, shared=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, kind=torch.randn):
        return kind(shape, generator=generator, dtype=torch.float64)

    corners = random(batch, boxes, 2, kind=torch.rand) * 100
    sources = torch.cat([corners, corners + 8 + random(batch, boxes, 2, kind=torch.rand) * 60], 2)
    logits, deltas = random(batch, boxes, classes) * 2, random(batch, boxes, 4 * (1 if shared else classes))
    return SimpleNamespace(logits=logits.to(dtype), deltas=deltas.to(dtype), boxes=sources.to(dtype))


BOX_OPTIONS = {"score_thresh": 0.05, "nms_thresh": 0.5, "max_detections": 50, "min_size": 1e-2}


def select_boxes(these, counts=None, **options):
    sizes = sizes_of(len(these.boxes), these.boxes)
    return ops.select_box_detections(
        these.logits, these.deltas, these.boxes, counts, sizes, **{**BOX_OPTIONS, **options}
    )


SECOND_STAGE = _utils.BoxCoder((10.0, 10.0, 5.0, 5.0))


def torchvisions_roi_heads(these, counts, **options):
    model = settings_of(SECOND_STAGE, {**BOX_OPTIONS, **options})
    rows = [[table[n, :count] for n, count in enumerate(counts)] for table in vars(these).values()]
    found = roi_heads.RoIHeads.postprocess_detections(model, torch.cat(rows[0]), torch.cat(rows[1]), rows[2], SIZES)
    return [dict(zip(("boxes", "scores", "labels"), each, strict=True)) for each in zip(*found, strict=True)]


def torchvisions_ssd(these, class_top_n):
    model = settings_of(SECOND_STAGE, BOX_OPTIONS, topk_candidates=class_top_n)
    outputs = {"cls_logits": these.logits, "bbox_regression": these.deltas}
    return ssd.SSD.postprocess_detections(model, outputs, list(these.boxes), SIZES)


@pytest.mark.parametrize("counts", [[70, 70], [70, 33], [0, 12]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchvisions_roi_heads(every_backend, dtype, counts):
    these = tables(dtype)
    found = select_boxes(these, torch.tensor(counts))
    assert [each.dtype for each in found] == [dtype, dtype, torch.int64, torch.int64]
    # A softmax of 6 sums 6 exponentials.
    check_equal(found, torchvisions_roi_heads(these, counts), 4 * torch.finfo(dtype).eps)
    assert (found[2][0, : int(found[3][0])] > 0).all()


@pytest.mark.parametrize("class_top_n", [0, 1, 9, 1000])
def test_equals_torchvisions_ssd(every_backend, class_top_n):
    these = tables(shared=True)
    found = select_boxes(these, class_top_n=class_top_n, min_size=0.0)
    check_equal(found, torchvisions_ssd(these, class_top_n), 2**-21)


@not_interpreted
@pytest.mark.parametrize(
    "options",
    [{"max_detections": 3}, {"max_detections": 0}, {"score_thresh": 0.9}, {"score_thresh": 1.0}, {"nms_thresh": 0.0}],
    ids=str,
)
def test_other_numbers_of_boxes(every_backend, options):
    these = tables()
    check_equal(select_boxes(these, **options), torchvisions_roi_heads(these, [70, 70], **options), 2**-21)


@pytest.mark.parametrize("shape", [(0, 70, 6), (2, 0, 6), (1, 1, 1), (1, 200, 2)], ids=str)
def test_empty_and_tiny_tables(shape):
    these = tables(batch=shape[0], boxes=shape[1], classes=shape[2])
    results = []
    for name in ("cpp", "reference"):
        with backends.use(name):
            results.append(select_boxes(these))
    assert results[0][0].shape == (shape[0], 50, 4)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@not_interpreted
def test_bad_tables_are_never_selected(every_backend):
    """A NaN, an infinite logit, delta or corner; minus infinity is the logit of a class that cannot be."""
    these, counts = tables(batch=1, boxes=8), torch.tensor([8])
    good = select_boxes(these, counts, nms_thresh=1.0)
    assert good[3].item() > 10
    for name, value in (("logits", NAN), ("logits", INF), ("deltas", NAN), ("deltas", INF), ("boxes", NAN),
                        ("boxes", -INF)):  # fmt: skip
        bad = tables(batch=1, boxes=8)
        getattr(bad, name)[0, 1:] = value
        found, alone = select_boxes(bad, nms_thresh=1.0), select_boxes(these, torch.tensor([1]), nms_thresh=1.0)
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    these.logits[..., 3] = -INF
    found = select_boxes(these, counts, nms_thresh=1.0)
    assert found[3].item() > 5
    assert not (found[2] == 3).any()


def test_a_size_that_is_hit_exactly(every_backend):
    logits, deltas = torch.tensor([[[0.0, 3.0]]]), torch.zeros(1, 1, 4)
    arguments = (logits, deltas, torch.tensor([[[2.0, 2.0, 10.0, 6.0]]]), None, torch.tensor([[50, 50]]))
    for least, count in ((4, 1), (4.001, 0)):
        found = ops.select_box_detections(
            *arguments, score_thresh=0.05, nms_thresh=0.5, max_detections=3, min_size=least
        )
        assert found[3].item() == count


# ---- both ---------------------------------------------------------------------------------------------------------


def test_autocast_promotes():
    maps = head(torch.bfloat16)
    wide = SimpleNamespace(logits=maps.logits, deltas=[m.float() for m in maps.deltas])
    with pytest.raises(TypeError, match="deltas must be of the dtype of logits"):
        select(wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = select(wide)
    expected = select(SimpleNamespace(logits=[m.float() for m in maps.logits], deltas=wide.deltas))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


MAP_ERRORS = [
    ({"logits": []}, ValueError, "logits must hold at least one map"),
    ({"logits": [torch.zeros(2, 10, 3, 3)] * 9, "deltas": [torch.zeros(2, 8, 3, 3)] * 9}, ValueError, "1 to 8 maps"),
    ({"logits": [torch.zeros(2, 10, 25, 42, dtype=torch.int32)] * 3}, TypeError, "float64, float32"),
    ({"logits": [torch.zeros(2, 9, *size) for size in PYRAMID]}, ValueError, "A \\* classes, H, W\\] for 2 anchors"),
    ({"deltas": [torch.zeros(2, 8, 3, 3)]}, ValueError, "deltas must be one for each of the 3 maps"),
    ({"deltas": [torch.zeros(2, 4, *size) for size in PYRAMID]}, ValueError, r"deltas must be \[N, 4A, H, W\]"),
    ({"centerness": [torch.zeros(2, 1, *size) for size in PYRAMID]}, ValueError, r"centerness must be \[N, A, H, W\]"),
    ({"cell_anchors": CELLS[:2]}, ValueError, "a table for each of the 3 levels, got 2"),
    ({"cell_anchors": [CELLS[0], CELLS[1][:1], CELLS[2]]}, ValueError, "2 anchors .* at level 1"),
    ({"strides": STRIDES[:1]}, ValueError, "for each of the 3 levels"),
    ({"strides": [(4.0, 4.0)] * 3}, TypeError, "strides must be an integer"),
    ({"image_sizes": torch.zeros(3, 2)}, ValueError, r"image_sizes must be \[N, 2\]"),
    ({"image_sizes": SIZES}, TypeError, "image_sizes must be a tensor, got list"),
    ({"pre_nms_top_n": -1}, ValueError, "pre_nms_top_n must be 0 or more, got -1"),
    ({"max_detections": -1}, ValueError, "max_detections must be 0 or more, got -1"),
    ({"score_thresh": NAN}, ValueError, "score_thresh must be a number, got nan"),
    ({"weights": (1, 1)}, ValueError, "weights must be four"),
    ({"coder": "linear"}, ValueError, "coder must be deltas or distances, got 'linear'"),
]


BOX_ERRORS = [
    ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
    ({"deltas": torch.zeros(2, 70, 24, dtype=torch.int64)}, TypeError, "deltas must be float64"),
    ({"boxes": torch.zeros(2, 69, 4)}, ValueError, r"boxes must be \[N, R, \.\.\.\]"),
    ({"boxes": torch.zeros(2, 70, 5)}, ValueError, r"boxes must be \[N, R, 4\]"),
    ({"deltas": torch.zeros(2, 70, 8)}, ValueError, r"deltas must be \[N, R, 4\] or \[N, R, 24\]"),
    ({"logits": torch.zeros(2, 70, 0)}, ValueError, "at least the background"),
    ({"counts": torch.zeros(2)}, TypeError, "counts must be of an integer type"),
    ({"counts": torch.zeros(3, dtype=torch.int64)}, ValueError, "counts must be"),
    ({"class_top_n": -1}, ValueError, "class_top_n must be 0 or more, got -1"),
    ({"max_detections": -1}, ValueError, "max_detections must be 0 or more, got -1"),
    ({"min_size": NAN}, ValueError, "min_size must be a number, got nan"),
    ({"weights": (1, 1)}, ValueError, "weights must be four"),
]

RIGHT = {
    ops.select_detections: {
        "logits": head().logits, "deltas": head().deltas, "cell_anchors": CELLS, "strides": STRIDES, **OPTIONS
    },
    ops.select_box_detections: {**vars(tables()), "counts": None, **BOX_OPTIONS},
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [(op, *each) for op, errors in zip(RIGHT, (MAP_ERRORS, BOX_ERRORS), strict=True) for each in errors],
)
def test_errors(op, change, error, message):
    with pytest.raises(error, match=message):
        op(**{"image_sizes": torch.tensor(SIZES), **RIGHT[op], **change})


LARGE = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("options", [{}, {"score_thresh": 0.0, "pre_nms_top_n": 3000}], ids=str)
@pytest.mark.parametrize("centered", [False, True], ids=["logits", "centered"])
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_gpu_selects_what_the_cpu_does(name, dtype, form, options, centered):
    """At a detector's size; with as many candidates as many blocks suppress."""
    maps = head(dtype, form, anchors=1 if centered else 9, pyramid=LARGE)
    anchors = 1 if centered else 9
    cells = [[(-8.0 * (s + i), -9.0 * s, 8.0 * (s + i), 9.0 * s) for i in range(anchors)] for s in (1, 2, 4, 8, 16)]
    strides = [(8 * 2**i, 8 * 2**i) for i in range(5)]
    options = {
        **OPTIONS,
        "pre_nms_top_n": 1000,
        "max_detections": 2000,
        **options,
        "coder": "distances" if centered else "deltas",
    }
    call = lambda logits, deltas, centers, sizes: ops.select_detections(  # noqa: E731
        logits, deltas, cells, strides, sizes, centerness=centers, **options
    )
    check_on_a_gpu(name, call, maps.logits, maps.deltas, maps.centers if centered else (), torch.tensor(SIZES).float())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("boxes", "classes", "class_top_n"), [(1000, 91, None), (8732, 91, 400), (1500, 1203, None), (5000, 3, None)]
)
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_gpu_selects_of_boxes_what_the_cpu_does(name, boxes, classes, class_top_n):
    """A second stage's, SSD's, one of a large vocabulary, and classes that many blocks suppress."""
    these = tables(boxes=boxes, classes=classes, shared=classes > 1000)
    options = {**BOX_OPTIONS, "score_thresh": 0.01, "max_detections": 2000, "class_top_n": class_top_n}
    call = lambda logits, deltas, boxes, counts, sizes: ops.select_box_detections(  # noqa: E731
        logits, deltas, boxes, counts, sizes, **options
    )
    counts = torch.tensor([boxes, boxes // 2])
    check_on_a_gpu(name, call, these.logits, these.deltas, these.boxes, counts, torch.tensor(SIZES).float())
