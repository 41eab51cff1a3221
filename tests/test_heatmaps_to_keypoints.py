# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers.devices import DTYPES, on_triton, without_synchronising
from helpers.keypoint_heatmaps import BOXES, CASES, EMPTY, INF, NAN, TRITON_CASES, same
from torch.nn.functional import interpolate
from torchvision.models.detection import roi_heads

from fpn_fast import backends, ops


def heatmaps_of(boxes, keypoints=17, size=(56, 56), dtype=torch.float32, seed=0):
    """Logits with a few hills each, as a trained head gives, and a little noise, so that there are no ties."""
    generator = torch.Generator().manual_seed(seed)
    shape = (boxes, keypoints, *size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    hills = torch.nn.functional.avg_pool2d(noise, 5, 1, 2) * 25 if boxes and min(size) > 4 else noise
    return (hills + 0.1 * noise).to(dtype)


def check(found, heatmaps, boxes):
    """The score is the heatmap's highest, and the keypoint is a pixel with that score, both to rounding."""
    keypoints, scores = found
    assert (keypoints.shape, scores.shape) == ((*heatmaps.shape[:2], 3), heatmaps.shape[:2])
    assert keypoints.dtype == scores.dtype == torch.float32
    assert keypoints.is_contiguous()
    assert scores.is_contiguous()
    wide = heatmaps.to(torch.float64 if heatmaps.dtype == torch.float64 else torch.float32)
    for maps, box, points, heights in zip(wide, boxes, keypoints, scores, strict=True):
        # In pixels, to which torchvision resizes a heatmap.
        width, height = (box[2:] - box[:2]).clamp(min=1).ceil().long().tolist()
        resized = interpolate(maps[None], (height, width), mode="bicubic")[0]
        # Both have these errors: three roundings of a coordinate of up to the map's size, which a slope of less
        # than 1.5 hands on to a weight, ten of each weight and four of each sum, along both axes. Four weights sum
        # up to less than 1.5 in magnitude. The score is rounded to float32 once more.
        eps, size = torch.finfo(resized.dtype).eps, max(maps.shape[1:])
        roundings = 2 * (4 * 3 * 1.5 * size + 4 * 10 + 4)
        atol = 2 * roundings * 1.5 * eps * maps.abs().amax((1, 2)) + torch.finfo().eps * heights.abs()
        highest = resized.flatten(1).amax(1)
        assert ((heights - highest).abs() <= atol).all()
        # Where the keypoint is, in pixels of the resized map.
        step = (box[2:] - box[:2]).clamp(min=1) / torch.tensor([width, height])
        place = (points[:, :2].double() - box[:2]) / step - 0.5
        x, y = place.round().long().unbind(1)
        # Three roundings of numbers of up to the corners, in pixels that are half as long as a side of 1 at least.
        rounding = 3 * box.abs().max() * torch.finfo().eps / 0.5
        assert ((place - place.round()).abs() <= rounding).all()
        assert (points[:, 2] == 1).all()
        assert ((resized[torch.arange(len(x)), y, x] - highest).abs() <= atol).all()


@pytest.mark.parametrize("size", [(56, 56), (14, 9), (1, 1), (7, 80)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_finds_the_highest_position_of_the_resized_map(backend, dtype, size):
    # Not the ones so far away that the type of the coordinates has no fractions of a pixel there.
    boxes = torch.tensor((*BOXES[:7], (3.2, 4.9, 140.6, 70.0)))
    heatmaps = heatmaps_of(len(boxes), 5, size, dtype)
    check(ops.heatmaps_to_keypoints(heatmaps, boxes), heatmaps, boxes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchvision(backend, dtype):
    """The same keypoints to the last bit: the maps have no two positions that rounding could exchange."""
    boxes = torch.tensor((*BOXES, (3.2, 4.9, 140.6, 70.0)))
    heatmaps = heatmaps_of(len(boxes), dtype=dtype)
    keypoints, scores = ops.heatmaps_to_keypoints(heatmaps, boxes)
    expected, heights = roi_heads.heatmaps_to_keypoints(heatmaps, boxes)
    assert torch.equal(keypoints, expected)
    torch.testing.assert_close(scores, heights)


def test_boxes_in_double(backend):
    boxes = torch.tensor(BOXES, dtype=torch.float64)
    heatmaps = heatmaps_of(len(boxes), dtype=torch.float64)
    keypoints, _ = ops.heatmaps_to_keypoints(heatmaps, boxes)
    torch.testing.assert_close(keypoints, roi_heads.heatmaps_to_keypoints(heatmaps, boxes)[0])
    # A whole number in float32, and a little more than one in float64: one pixel more.
    box = torch.tensor([[0.0, 0.0, 8.0 + 1e-12, 1.0]], dtype=torch.float64)
    rising = torch.arange(4.0, dtype=torch.float64).expand(1, 1, 1, 4)
    assert ops.heatmaps_to_keypoints(rising, box)[0][0, 0, 0] == torch.tensor(8.5 * (8.0 + 1e-12) / 9).float()
    assert ops.heatmaps_to_keypoints(rising, box.float())[0][0, 0, 0] == 7.5


def test_the_first_of_equal_positions(backend):
    for value in (0.0, 3.0, -0.5):
        flat = torch.full((1, 2, 8, 8), value)
        keypoints, scores = ops.heatmaps_to_keypoints(flat, torch.tensor([[10.0, 20.0, 18.0, 28.0]]))
        assert keypoints.tolist() == [[[10.5, 20.5, 1.0]] * 2]
        assert scores.tolist() == [[value] * 2]
    # As large as the box: every weight is 0 or 1.
    maps = torch.zeros(1, 1, 4, 5)
    maps[0, 0, 1, 3] = maps[0, 0, 2, 0] = maps[0, 0, 1, 4] = 2.0
    keypoints, scores = ops.heatmaps_to_keypoints(maps, torch.tensor([[0.0, 0.0, 5.0, 4.0]]))
    assert keypoints.tolist() == [[[3.5, 1.5, 1.0]]]
    assert scores.item() == 2


def test_boxes_that_have_no_keypoints(backend):
    heatmaps = heatmaps_of(len(EMPTY) + 1, 4)
    for dtype in (torch.float32, torch.float64):
        boxes = torch.tensor((*EMPTY, BOXES[0]), dtype=dtype)
        keypoints, scores = ops.heatmaps_to_keypoints(heatmaps, boxes)
        assert torch.equal(keypoints[:-1], torch.zeros(len(EMPTY), 4, 3))
        assert torch.equal(scores[:-1], torch.zeros(len(EMPTY), 4))
        check((keypoints[-1:], scores[-1:]), heatmaps[-1:], boxes[-1:])


def test_the_longest_sides(backend):
    boxes = torch.tensor([[0.0, 0.0, 8192.0, 1.0], [5.0, -3.0, 5.5, 8189.0]])
    heatmaps = heatmaps_of(2, 2)
    check(ops.heatmaps_to_keypoints(heatmaps, boxes), heatmaps, boxes)


def test_a_nan_is_the_highest_as_in_torchvision(backend):
    boxes = torch.tensor(BOXES[:3])
    for number, size in ((NAN, (7, 6)), (INF, (7, 6)), (-INF, (7, 6)), (NAN, (2, 40))):
        heatmaps = heatmaps_of(3, 4, size)
        heatmaps[:, 1, 1, 3], heatmaps[1, 2, 0, 5] = number, -number
        keypoints, scores = ops.heatmaps_to_keypoints(heatmaps, boxes)
        expected, heights = roi_heads.heatmaps_to_keypoints(heatmaps, boxes)
        assert torch.equal(keypoints, expected)
        assert torch.equal(scores.isnan(), heights.isnan())
        assert scores[:, 1].isnan().all() or number == number
        torch.testing.assert_close(scores, heights, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cpp_equals_the_reference_bit_for_bit(name, dtype):
    with backends.use("cpp"):
        assert same(ops.heatmaps_to_keypoints(*CASES[name].inputs(dtype)), CASES[name].expected(dtype))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in TRITON_CASES), *(("no_numbers", name) for name in DTYPES if name != "float32")],
)
# Numbers that are none are part of the cases, and numpy, which interprets the kernel, warns of them.
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_triton_equals_the_reference_bit_for_bit(name, dtype):
    case = TRITON_CASES[name]
    found = on_triton("heatmaps_to_keypoints", *case.inputs(DTYPES[dtype]))
    assert same(found, case.expected(DTYPES[dtype]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend_name", ["cpp", "triton"])
def test_a_gpu_finds_the_same_without_synchronising(backend_name, dtype):
    boxes = torch.tensor((*BOXES, *EMPTY, (3.0, 4.0, 700.0, 650.5)))
    heatmaps = heatmaps_of(len(boxes), dtype=dtype)
    there = heatmaps.cuda(), boxes.cuda()
    with backends.use(backend_name):
        (found,) = without_synchronising(lambda: ops.heatmaps_to_keypoints(*there))
    with backends.use("reference"):
        assert same([each.cpu() for each in found], ops.heatmaps_to_keypoints(heatmaps, boxes))


@pytest.mark.parametrize("shape", [(0, 17, 56, 56), (3, 0, 56, 56), (0, 0, 1, 1)])
def test_nothing_to_find(backend, shape):
    keypoints, scores = ops.heatmaps_to_keypoints(torch.zeros(shape), torch.zeros(shape[0], 4))
    assert (keypoints.shape, scores.shape) == ((*shape[:2], 3), shape[:2])
    assert keypoints.dtype == scores.dtype == torch.float32


def test_autocast_changes_nothing(backend):
    boxes, heatmaps = torch.tensor(BOXES), heatmaps_of(len(BOXES), 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.heatmaps_to_keypoints(heatmaps, boxes)
    assert same(found, ops.heatmaps_to_keypoints(heatmaps, boxes))


MAPS, BOX = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4)
ERRORS = [
    ({"heatmaps": [1]}, TypeError, "heatmaps must be a tensor, got list"),
    ({"heatmaps": MAPS.bool()}, TypeError, "heatmaps must be float64.*bool"),
    ({"boxes": BOX.int()}, TypeError, "boxes must be float64.*int32"),
    ({"heatmaps": MAPS[:, 0]}, ValueError, r"heatmaps must be \[R, K, h, w\].*got \(2, 4, 5\)"),
    ({"heatmaps": MAPS[:, :, :0]}, ValueError, "h and w of 1 to 4096"),
    ({"heatmaps": torch.zeros(2, 1, 1, 4097)}, ValueError, r"1 to 4096, got \(2, 1, 1, 4097\)"),
    ({"boxes": BOX[:1]}, ValueError, r"boxes must be \[R, 4\], \(2, 4\), got \(1, 4\)"),
    ({"boxes": BOX.to("meta")}, ValueError, "boxes must be on the device of heatmaps, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(backend, change, error, message):
    with pytest.raises(error, match=message):
        ops.heatmaps_to_keypoints(**{"heatmaps": MAPS, "boxes": BOX, **change})
