# SPDX-License-Identifier: Apache-2.0
"""Ground truths padded to one shape."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fpn_fast import _log
from fpn_fast.nn import StaticTargets, pack_targets

CANVAS = (8, 10)


def target(count, size=(6, 10)):
    """Boxes of growing area, and masks and keypoints that tell them apart."""
    numbers = torch.arange(1, count + 1)
    boxes = torch.stack([torch.zeros(count), torch.ones(count), numbers + 1.0, numbers + 2.0], 1)
    masks = numbers.to(torch.uint8)[:, None, None].expand(-1, *size)
    points = numbers.float()[:, None, None].expand(-1, 3, 3)
    return {"boxes": boxes, "labels": numbers, "masks": masks, "keypoints": points}


def test_everything_is_in_its_place_and_the_rest_is_zero():
    targets = [target(2), target(0), target(3, (8, 4))]
    # torchvision allows an empty tensor of any shape for an image without boxes.
    targets[1] |= {"boxes": torch.zeros(0), "masks": torch.zeros(0), "keypoints": torch.zeros(0)}
    found = pack_targets(targets, 4, canvas=CANVAS)
    assert found.counts.tolist() == [2, 0, 3]
    assert found.real().sum(1).tolist() == [2, 0, 3]
    kinds = {name: (tuple(each.shape), each.dtype) for name, each in found.named().items()}
    assert kinds == {
        "boxes": ((3, 4, 4), torch.float32),
        "labels": ((3, 4), torch.int64),
        "counts": ((3,), torch.int64),
        "masks": ((3, 4, *CANVAS), torch.uint8),
        "keypoints": ((3, 4, 3, 3), torch.float32),
    }
    for i, each in enumerate(targets):
        for name, table in each.items():
            own = getattr(found, name)[i]
            inside = own[tuple(slice(length) for length in table.shape)] if table.numel() else own[:0]
            assert torch.equal(inside, table.to(own.dtype)) or not table.numel()
            if name == "masks" and table.numel():
                # A row and a column more, see StaticTargets.
                table = torch.nn.functional.pad(table.float(), (0, 1, 0, 1), mode="replicate")[
                    :, : CANVAS[0], : CANVAS[1]
                ]
                assert torch.equal(own[tuple(slice(length) for length in table.shape)].float(), table)
            # Nothing lies outside.
            assert own.double().sum() == table.double().sum()


def test_only_what_is_given_is_there():
    found = pack_targets([{name: target(1)[name].double() if name == "boxes" else target(1)[name]
                           for name in ("boxes", "labels")}], 2)  # fmt: skip
    assert found.masks is None
    assert found.keypoints is None
    assert found.boxes.dtype == torch.float64


def test_too_many_are_an_error_or_the_largest_are_kept(caplog):
    targets = [target(2), target(5)]
    with pytest.raises(ValueError, match="image 1 of a batch has 5 ground truths for the 3 of max_targets"):
        pack_targets(targets, 3, canvas=CANVAS)
    _log._written.clear()
    with caplog.at_level(logging.WARNING, "fpn_fast"):
        for _ in range(2):
            found = pack_targets(targets, 3, canvas=CANVAS, too_many="largest")
    assert len(caplog.records) == 1
    assert found.labels.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert found.masks[1, :, 0, 0].tolist() == [3, 4, 5]
    assert found.counts.tolist() == [2, 3]


WRONG = [
    ({"boxes": torch.tensor([[0.0, 0, 4, 4], [3, 3, 3, 9]])}, ValueError, r"\[3.0, 3.0, 3.0, 9.0\] at 1 of image 1"),
    ({"boxes": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "floating type, got torch.int64 for image 1"),
    ({"boxes": torch.rand(2, 5)}, ValueError, r"boxes must be \[L, 4\]"),
    ({"labels": torch.tensor([1.0, 2.0])}, TypeError, "labels must be int64, got torch.float32 for image 1"),
    ({"labels": torch.tensor([1])}, ValueError, "as many labels as boxes, got 1 and 2 for image 1"),
    ({"masks": torch.zeros(2, 9, 10)}, ValueError, r"masks must fit into \(4, 8, 10\), got \(2, 9, 10\) for image 1"),
    ({"keypoints": torch.zeros(2, 4, 3)}, ValueError, "one K in all images"),
    ({"masks": None}, ValueError, "image 1 must have boxes, labels, masks, keypoints, they lack masks"),
]


@pytest.mark.parametrize(("change", "error", "match"), WRONG)
def test_errors_name_the_image(change, error, match):
    changed = {name: each for name, each in (target(2) | change).items() if each is not None}
    with pytest.raises(error, match=match):
        pack_targets([target(2), changed], 4, canvas=CANVAS)


def test_wrong_arguments():
    for arguments, options, match in (
        (([], 3), {}, "targets must have a dict for each image"),
        (([target(1)], 0), {}, "max_targets must be at least 1, got 0"),
        (([target(1)], 3), {}, "canvas must be"),
        (([target(1)], 3), {"too_many": "drop"}, "too_many must be raise or largest, got 'drop'"),
    ):
        with pytest.raises(ValueError, match=match):
            pack_targets(*arguments, **options)


def test_it_is_a_pytree_of_its_tensors():
    found = pack_targets([target(2)], 3, canvas=CANVAS)
    leaves, _ = pytree.tree_flatten(found)
    assert len(leaves) == 5
    doubled = pytree.tree_map(lambda each: each * 2, pack_targets([target(2)], 3, canvas=CANVAS))
    assert isinstance(doubled, StaticTargets)
    assert torch.equal(doubled.labels, found.labels * 2)
    with FakeTensorMode() as mode:
        fake = pytree.tree_map(mode.from_tensor, found).to("cuda")
    assert fake.masks.device.type == "cuda"
