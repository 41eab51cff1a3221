# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from helpers.devices import DTYPES, on_triton, without_synchronising
from helpers.mask_pasting import CASES
from torchvision.models.detection.roi_heads import paste_masks_in_image

from fpn_fast import backends, ops
from fpn_fast.testing import tolerances

NAN, INF = float("nan"), float("inf")
SIZE = (61, 83)
# Inside, of fractions; across each edge; the whole image; one pixel; thin; far larger than the image.
BOXES = (
    (10.3, 8.7, 40.9, 31.2),
    (5.0, 5.0, 33.0, 33.0),
    (-9.5, 12.1, 20.4, 40.6),
    (60.2, 12.1, 95.4, 40.6),
    (20.0, -14.3, 50.0, 9.9),
    (20.0, 44.4, 50.0, 77.7),
    (0.0, 0.0, 83.0, 61.0),
    (30.2, 20.1, 30.4, 20.3),
    (10.0, 30.0, 70.0, 30.5),
    (-200.0, -100.0, 300.0, 200.0),
    (82.9, 60.9, 83.0, 61.0),
)
# torchvision raises for some of these, and gives zeros for the others.
EMPTY = (
    (90.5, 10.0, 110.0, 30.0),
    (-50.0, 10.0, -10.0, 30.0),
    (10.0, 70.0, 30.0, 90.0),
    (10.0, -40.0, 30.0, -9.0),
    (40.0, 10.0, 20.0, 30.0),
    (10.0, 40.0, 30.0, 20.0),
    (40.0, 40.0, 20.0, 20.0),
    (NAN, 10.0, 30.0, 30.0),
    (10.0, 10.0, 30.0, NAN),
    (10.0, 10.0, INF, 30.0),
    (-INF, -INF, INF, INF),
    (-1e30, -1e30, 1e30, 1e30),
    (10.0, 10.0, 30.0, 1e18),
)


def masks_of(count, size=28, dtype=torch.float32, seed=0):
    """Probabilities, most of them near 0 or 1, as a trained head gives."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, size, size, generator=generator, dtype=torch.float64).mul(4).sigmoid().to(dtype)


def check(pasted, masks, boxes, size, padding=1):
    """No worse than torchvision in the same type, both against torchvision in float64 on the same pixels."""
    plain = paste_masks_in_image(masks, boxes, size, padding)
    exact = paste_masks_in_image(masks.double(), boxes, size, padding)
    assert (pasted.shape, pasted.dtype) == (plain.shape, plain.dtype)
    assert pasted.is_contiguous()
    extent = int((boxes[:, 2:] - boxes[:, :2]).max()) + 2 if len(boxes) else 1
    tolerances.assert_not_worse(pasted, plain, exact, size=max(*size, extent))


@pytest.mark.parametrize("padding", [1, 0, 3])
@pytest.mark.parametrize("size", [28, 14, 1, 57])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_equals_torchvision(backend, dtype, size, padding):
    masks, boxes = masks_of(len(BOXES), size, dtype), torch.tensor(BOXES)
    check(ops.paste_masks(masks, boxes, SIZE, padding=padding), masks, boxes, SIZE, padding)


def test_equal_boxes_to_the_pixel_in_both_types_of_boxes(backend):
    """Corners are decided in the boxes' type: which pixels are covered is torchvision's, exactly."""
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(300, 2, generator=generator, dtype=torch.float64) * torch.tensor([70.0, 50.0])
    boxes = torch.cat((low, low + torch.rand(300, 2, generator=generator) * 30), 1)
    # Corners that grow to integers, or next to them.
    boxes[:100] = torch.cat((low[:100].round(), low[:100].round() + 28), 1)
    masks = torch.ones(300, 1, 28, 28)
    for each in (boxes, boxes.float()):
        covered = ops.paste_masks(masks, each, SIZE, padding=0) > 0
        assert torch.equal(covered, paste_masks_in_image(masks, each, SIZE, 0) > 0)


def test_boxes_that_give_empty_masks(backend):
    masks = masks_of(len(EMPTY))
    for each in (torch.float32, torch.float64):
        pasted = ops.paste_masks(masks, torch.tensor(EMPTY, dtype=each), SIZE)
        assert torch.equal(pasted, torch.zeros_like(pasted))
        below = ops.paste_masks(masks, torch.tensor(EMPTY, dtype=each), SIZE, threshold=-1.0)
        assert not below.any()


def test_threshold(backend):
    masks, boxes = masks_of(len(BOXES)), torch.tensor(BOXES)
    values = ops.paste_masks(masks, boxes, SIZE)
    for threshold in (0.5, 0.0, 1.0):
        above = ops.paste_masks(masks, boxes, SIZE, threshold=threshold)
        assert above.dtype == torch.bool
        assert torch.equal(above, values > threshold)
    # Exactly on it is not above.
    flat = ops.paste_masks(torch.full((1, 1, 4, 4), 0.5), boxes[:1], SIZE, padding=0, threshold=0.5)
    assert not flat.any()


@pytest.mark.parametrize(("count", "size"), [(0, SIZE), (2, (0, 5)), (2, (5, 0)), (0, (0, 0)), (3, (1, 1))])
def test_empty_and_tiny(backend, count, size):
    masks, boxes = masks_of(count), torch.tensor(BOXES[:count]).reshape(-1, 4)
    pasted = ops.paste_masks(masks, boxes, size)
    assert (pasted.shape, pasted.dtype) == ((count, 1, *size), torch.float32)
    assert ops.paste_masks(masks, boxes, size, threshold=0.5).dtype == torch.bool


def test_one_number_for_both_sides(backend):
    masks, boxes = torch.rand(2, 1, 7, 7), torch.tensor([[1.0, 2, 9, 12], [3, 0, 14, 9]])
    expected = ops.paste_masks(masks, boxes, (15, 15))
    for size in (15, np.int16(15), np.array([15, 15])):
        assert torch.equal(ops.paste_masks(masks, boxes, size, padding=np.int8(1)), expected)


def test_nan_in_a_mask_stays_in_it(backend):
    masks, boxes = masks_of(3), torch.tensor(BOXES[:3])
    expected = ops.paste_masks(masks, boxes, SIZE)
    masks[1, 0, 5, 5] = NAN
    pasted = ops.paste_masks(masks, boxes, SIZE)
    assert torch.equal(pasted[[0, 2]], expected[[0, 2]])
    assert pasted[1].isnan().any()
    assert not ops.paste_masks(masks, boxes, SIZE, threshold=0.5)[1][pasted[1].isnan()].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_triton_equals_the_reference_bit_for_bit(name, dtype):
    case = CASES[name]
    options = {"padding": case.padding, "threshold": case.threshold}
    assert torch.equal(on_triton("paste_masks", *case.inputs(dtype), case.image, **options), case.expected(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_gpu_equals_torchvision_without_synchronising(name, dtype):
    masks, boxes = masks_of(len(BOXES), dtype=dtype), torch.tensor(BOXES)
    on_gpu, their_boxes = masks.cuda(), boxes.cuda()
    with backends.use(name):
        (pasted,) = without_synchronising(lambda: ops.paste_masks(on_gpu, their_boxes, SIZE))
        (above,) = without_synchronising(lambda: ops.paste_masks(on_gpu, their_boxes, SIZE, threshold=0.5))
        empty = ops.paste_masks(masks_of(len(EMPTY)).cuda(), torch.tensor(EMPTY).cuda(), SIZE)
    check(pasted.cpu(), masks, boxes, SIZE)
    assert not empty.any()
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(above, pasted > 0.5)


MASKS, BOX = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4)
ERRORS = [
    ({"masks": [1]}, TypeError, "masks must be a tensor, got list"),
    ({"masks": MASKS.bool()}, TypeError, "masks must be float64.*bool"),
    ({"boxes": BOX.int()}, TypeError, "boxes must be float64.*int32"),
    ({"masks": MASKS[:, 0]}, ValueError, r"masks must be \[K, 1, M, M\].*got \(2, 4, 4\)"),
    ({"masks": torch.zeros(2, 1, 4, 5)}, ValueError, r"masks must be \[K, 1, M, M\].*got \(2, 1, 4, 5\)"),
    ({"masks": torch.zeros(2, 1, 0, 0)}, ValueError, "M of 1 to 4096"),
    ({"boxes": BOX[:1]}, ValueError, r"boxes must be \[K, 4\], \(2, 4\), got \(1, 4\)"),
    ({"boxes": BOX.to("meta")}, ValueError, "boxes must be on the device of masks, cpu, got meta"),
    ({"image_size": (-1, 5)}, ValueError, r"image_size must be \(H, W\).*got \(-1, 5\)"),
    ({"padding": -1}, ValueError, "padding must be 0 to 4096 mask pixels, got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(backend, change, error, message):
    arguments = {"masks": MASKS, "boxes": BOX, "image_size": SIZE, **change}
    with pytest.raises(error, match=message):
        ops.paste_masks(**arguments)


@pytest.mark.slow
def test_coco_size():
    """An image of 800 x 1344."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(16, 2, generator=generator) * torch.tensor([1300.0, 780.0])
    boxes = torch.cat((low, low + torch.exp(2 + 4 * torch.rand(16, 2, generator=generator))), 1)
    boxes = torch.minimum(boxes, torch.tensor([1344.0, 800, 1344, 800]))
    check(ops.paste_masks(masks_of(16), boxes, (800, 1344)), masks_of(16), boxes, (800, 1344))
