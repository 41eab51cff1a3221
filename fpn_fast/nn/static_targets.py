# SPDX-License-Identifier: Apache-2.0
"""Ground truths of a batch in tensors of fixed shapes, for training steps that are compiled or captured once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fpn_fast import _log, _torch_private
from fpn_fast.ops._checks import as_integer, as_pair

__all__ = ["StaticTargets", "pack_targets"]

_TOO_MANY = ("raise", "largest")


@dataclasses.dataclass(frozen=True)
class StaticTargets:
    """The ground truths of N images, padded with zeros to G each; :func:`pack_targets` makes it.

    It is a pytree of its tensors.

    Args:
        boxes: [N, G, 4] float32 or float64, (x1, y1, x2, y2) in pixels of the canvas.
        labels: [N, G] int64.
        counts: [N] int64, how many are real.
        masks: [N, G, H, W] uint8 on the canvas, or None. Below and right of an image smaller than the canvas its last
            row and column are repeated once: RoIAlign then samples the edge as it does in the image alone.
        keypoints: [N, G, K, 3] float32, (x, y, visibility), or None.
    """

    boxes: Tensor
    labels: Tensor
    counts: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StaticTargets:
        """A copy of all tensors on `device`; see :meth:`torch.Tensor.to`."""
        return self._map(lambda each: each.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StaticTargets:
        """A copy of all tensors in pinned memory, from where a copy to a GPU does not wait; DataLoader calls it."""
        return self._map(Tensor.pin_memory)

    def real(self) -> Tensor:
        """[N, G] bool: whether an entry is a ground truth, and not padding."""
        return torch.arange(self.labels.size(1), device=self.counts.device) < self.counts[:, None]

    def named(self) -> dict[str, Tensor]:
        """Its tensors by name, without those that are None."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: each for name, each in found.items() if each is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> StaticTargets:
        return StaticTargets(**{name: change(each) for name, each in self.named().items()})


_torch_private.register_pytree(
    StaticTargets,
    lambda targets: (list(targets.named().values()), tuple(targets.named())),
    lambda tensors, names: StaticTargets(**dict(zip(names, tensors, strict=True))),
)


def pack_targets(
    targets: Sequence[Mapping[str, Tensor]],
    max_targets: int,
    *,
    canvas: tuple[int, int] | None = None,
    too_many: str = "raise",
    pin: bool = False,
) -> StaticTargets:
    """Pads and counts the ground truths of a batch. Meant for the host, such as for a DataLoader's collate_fn.

    Args:
        targets: torchvision's dict for each image: "boxes" [L, 4] in pixels of the canvas and "labels" [L]; also
            "masks" [L, h, w] and "keypoints" [L, K, 3] if all images have them.
        max_targets: G, at least 1.
        canvas: (height, width), the size of the padded masks. Only masks need it.
        too_many: for an image of more than G ground truths: "raise" (default), or "largest", which keeps the G boxes of
            largest area in their order, and warns in the log the first time.
        pin: whether the tensors are in pinned memory. It needs a GPU. DataLoader's pin_memory does the same.

    Raises:
        TypeError: labels are not int64, or boxes are of no floating type.
        ValueError: there are no images; an image has too many ground truths, a box without an area, another number of
            boxes than of labels, masks or keypoints, a mask larger than the canvas, or lacks what others have. The
            message names the image by its place in the batch.

    >>> found = pack_targets([{"boxes": torch.tensor([[0.0, 0, 8, 6]]), "labels": torch.tensor([3])}], max_targets=2)
    >>> found.boxes.tolist(), found.labels.tolist(), found.counts.tolist()
    ([[[0.0, 0.0, 8.0, 6.0], [0.0, 0.0, 0.0, 0.0]]], [[3, 0]], [1])
    """
    room = as_integer("max_targets", max_targets)
    if room < 1:
        raise ValueError(f"max_targets must be at least 1, got {room}")
    if too_many not in _TOO_MANY:
        raise ValueError(f"too_many must be raise or largest, got {too_many!r}")
    if len(targets) == 0:
        raise ValueError("targets must have a dict for each image, got an empty sequence")
    names = [name for name in ("boxes", "labels", "masks", "keypoints") if any(name in each for each in targets)]
    rows = [_checked(each, i, ["boxes", "labels", *names[2:]]) for i, each in enumerate(targets)]
    rows = [_at_most(each, i, room, too_many) for i, each in enumerate(rows)]
    counts = [len(each["labels"]) for each in rows]
    wide = any(each["boxes"].dtype == torch.float64 for each in rows)
    tables = {
        "boxes": _padded(rows, "boxes", (room, 4), torch.float64 if wide else torch.float32),
        "labels": _padded(rows, "labels", (room,), torch.int64),
    }
    if "masks" in names:
        if canvas is None:
            raise ValueError("canvas must be (height, width), the size of the padded masks, got None")
        tables["masks"] = _padded(rows, "masks", (room, *as_pair("canvas", canvas)), torch.uint8)
        for own, each in zip(tables["masks"], rows, strict=True):
            _repeat_edges(own, each["masks"].shape)
    if "keypoints" in names:
        shapes = {tuple(each["keypoints"].shape[1:]) for each in rows if each["keypoints"].dim() == 3}
        if len(shapes) != 1 or next(iter(shapes))[1] != 3:
            raise ValueError(f"keypoints must be [L, K, 3] with one K in all images, got [L, ...] of {sorted(shapes)}")
        tables["keypoints"] = _padded(rows, "keypoints", (room, *shapes.pop()), torch.float32)
    found = StaticTargets(counts=torch.tensor(counts, dtype=torch.int64, device=rows[0]["labels"].device), **tables)
    return found.pin_memory() if pin else found


def _checked(target: Mapping[str, Tensor], i: int, names: list[str]) -> dict[str, Tensor]:
    """The tables of image `i` of these names, with a row for each box."""
    if missing := [name for name in names if name not in target]:
        raise ValueError(f"the targets of image {i} must have {', '.join(names)}, they lack {', '.join(missing)}")
    boxes, labels = target["boxes"], target["labels"]
    if not boxes.is_floating_point():
        raise TypeError(f"boxes must be of a floating type, got {boxes.dtype} for image {i}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype} for image {i}")
    # torchvision allows an empty tensor of any shape for an image without boxes.
    if boxes.numel() and (boxes.dim() != 2 or boxes.size(1) != 4):
        raise ValueError(f"boxes must be [L, 4], (x1, y1, x2, y2), got {tuple(boxes.shape)} for image {i}")
    boxes = boxes.reshape(-1, 4)
    for name in names:
        found = target[name]
        count = len(found) if found.numel() else 0
        if count != len(boxes):
            raise ValueError(f"targets must have as many {name} as boxes, got {count} and {len(boxes)} for image {i}")
    degenerate = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if degenerate.any():
        place = int(degenerate.nonzero()[0])
        raise ValueError(
            f"boxes must have a positive width and height, got {boxes[place].tolist()} at {place} of image {i}"
        )
    return {name: target[name] for name in names} | {"boxes": boxes}


def _at_most(target: dict[str, Tensor], i: int, room: int, too_many: str) -> dict[str, Tensor]:
    boxes = target["boxes"]
    if len(boxes) <= room:
        return target
    text = f"image {i} of a batch has {len(boxes)} ground truths for the {room} of max_targets"
    if too_many == "raise":
        raise ValueError(f'{text}; raise max_targets, or take too_many="largest"')
    _log.once(logging.WARNING, ("max_targets",), "%s: the largest are kept, now and later", text)
    kept = (boxes[:, 2:] - boxes[:, :2]).prod(1).topk(room).indices.sort().values
    return {name: each[kept] for name, each in target.items()}


def _padded(rows: list[dict[str, Tensor]], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[N, *shape]: the tables `name` of all images, padded at their ends with zeros."""
    found = torch.zeros(len(rows), *shape, dtype=dtype, device=rows[0]["labels"].device)
    for i, (own, each) in enumerate(zip(found, rows, strict=True)):
        table = each[name]
        if table.numel() == 0:
            continue
        if table.dim() != own.dim() or any(a > b for a, b in zip(table.shape, own.shape, strict=True)):
            raise ValueError(f"{name} must fit into {shape}, got {tuple(table.shape)} for image {i}")
        own[tuple(slice(length) for length in table.shape)] = table
    return found


def _repeat_edges(padded: Tensor, shape: tuple[int, ...]) -> None:
    """Repeats the last row and column of masks of `shape` [L, h, w] in the padded ones, where there is room."""
    if len(shape) == 3 and 0 not in shape:
        count, height, width = shape
        padded[:count, height : height + 1] = padded[:count, height - 1 : height]
        padded[:count, :, width : width + 1] = padded[:count, :, width - 1 : width]
