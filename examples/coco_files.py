# SPDX-License-Identifier: Apache-2.0
"""COCO files and their pictures, read and checked whole before training: a fault is a line that says what to do."""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from processes import Progress
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

MOST_LINES = 20
# At --image-size 64, the smallest, the longer side becomes at most 106 pixels: the shorter one keeps a pixel.
MAX_ASPECT = 100
# Resizing and mirroring round a corner a few times, each time by up to half of this share of the image's longer side.
SMALLEST_SIDE = 8 * torch.finfo(torch.float32).eps
# EXIF's orientations but the upright one, and what turns each upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIELDS = {
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


class DataError(Exception):
    """Annotations or images that cannot be used; each line of the message is one fault."""


def read_coco(path: Path, folder: Path, masks: bool, workers: int = 0, quiet: bool = False) -> dict[str, Any]:
    """The COCO dict of a file in which all is as training needs it, with sizes, areas, crowds and ids filled in.

    masks: whether every annotation must have a mask. workers: processes that read the pictures, as for a DataLoader.
    quiet: whether to print no progress and no warning. Boxes are clipped to their image, and left out with a warning
    where nothing remains.

    Raises:
        DataError: at most MOST_LINES lines, and the number of faults if there are several.
    """
    coco = _read_lists(path)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory of images; name the one that has them")
    faults, known = _Faults(path), {name: {_id_of(entry) for entry in coco[name]} for name in FIELDS}
    for name in ("images", "categories"):
        numbers = Counter(map(_id_of, coco[name]))
        for i, entry in enumerate(coco[name]):
            if numbers[_id_of(entry)] > 1 and _id_of(entry) is not None:
                faults.add(name, i, entry, "the same id is given more than once; ids must be distinct")
    for i, entry in enumerate(coco["categories"]):
        try:
            check_fields(entry, FIELDS["categories"])
        except DataError as error:
            faults.add("categories", i, entry, error)
    of_image: dict[int | None, list[tuple[int, Any]]] = defaultdict(list)
    for i, entry in enumerate(coco["annotations"]):
        try:
            check_fields(entry, FIELDS["annotations"])
            for key, name in (("image_id", "images"), ("category_id", "categories")):
                if entry[key] not in known[name]:
                    raise DataError(f"{key} {entry[key]} is not in the file; correct or remove it")
            of_image[entry["image_id"]].append((i, entry))
        except DataError as error:
            faults.add("annotations", i, entry, error)
    images, annotations, dropped = [], list[dict[str, Any]](), list[str]()
    checks = _ImageChecks(coco["images"], of_image, folder, masks)
    loader = DataLoader(checks, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    with Progress(f"checking {path.name}", "image", len(checks), disable=quiet) as bar:
        for image, kept, thin, found in loader:
            for fault in found:
                faults.add(*fault)
            images.append(image)
            annotations += kept
            dropped += thin
            bar.update()
    faults.end()
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    if dropped and not quiet:
        shown = ", ".join(dropped[:MOST_LINES]) + (", ..." if len(dropped) > MOST_LINES else "")
        text = f"warning: {path}: left out {len(dropped)} boxes that have no area inside their image"
        print(f"{text}, or less than float32 resolves: {shown}", file=sys.stderr)
    return {"info": {}, "images": images, "annotations": annotations, "categories": coco["categories"]}


def _read_lists(path: Path) -> dict[str, Any]:
    """The JSON object of a file, with its three lists."""
    try:
        # Some editors put a byte order mark at the start.
        coco = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a COCO file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {_line(error)}; write it anew") from error
    if not isinstance(coco, dict):
        raise DataError(f"{path} must hold a JSON object, got a {type(coco).__name__}; name a COCO file")
    for name in FIELDS:
        if not isinstance(coco.get(name), list):
            raise DataError(f"{path} has no list {name!r}; add it")
        if not coco[name] and name != "annotations":
            raise DataError(f"{path} has no {name}; add some")
    return coco


class _Faults:
    """The first faults of a file, a line each, and their number."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.number = path, list[str](), 0

    def add(self, name: str, place: int, entry: Any, what: object) -> None:
        self.number += 1
        if len(self.lines) < MOST_LINES:
            self.lines.append(f"{self.path}: {named(name, place, entry)}: {what}")

    def end(self) -> None:
        """Raise DataError if there is a fault."""
        if self.number > 1:
            shown = f", of which {MOST_LINES} are above" if self.number > MOST_LINES else ""
            self.lines.append(f"{self.path} has {self.number} faults{shown}")
        if self.number:
            raise DataError("\n".join(self.lines))


def named(name: str, place: int, entry: Any) -> str:
    """An entry by its place in its list, and by what it says of itself."""
    says = [(key, entry.get(key)) for key in ("id", "image_id", "file_name")] if isinstance(entry, dict) else []
    said = ", ".join(f"{key} {_short.repr(value)}" for key, value in says if isinstance(value, int | str))
    return f"{name}[{place}]" + (f" ({said})" if said else "")


def _line(error: BaseException) -> str:
    return _short.repr(" ".join(str(error).split()))[1:-1]


def _id_of(entry: Any) -> int | None:
    found = entry.get("id") if isinstance(entry, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _as_it_is(item: Any) -> Any:
    return item


class _ImageChecks(Dataset[tuple[dict[str, Any], list[dict[str, Any]], list[str], list[tuple[Any, ...]]]]):
    """For each image: its entry and annotations, filled in; the names of boxes without area; and the faults."""

    def __init__(
        self, images: list[Any], annotations: dict[int | None, list[tuple[int, Any]]], folder: Path, masks: bool
    ) -> None:
        self.images, self.annotations, self.folder, self.masks = images, annotations, folder, masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], list[dict[str, Any]], list[str], list[tuple[Any, ...]]]:
        kept, thin, faults = list[dict[str, Any]](), list[str](), list[tuple[Any, ...]]()
        image, size = self.images[index], None
        try:
            height, width = size = _check_image(image, self.folder)
            image = {**image, "height": height, "width": width}
        except DataError as error:
            faults.append(("images", index, image, str(error)))
        for place, annotation in self.annotations.get(_id_of(image), ()):
            try:
                filled = _check_annotation(annotation, size, self.masks)
            except DataError as error:
                faults.append(("annotations", place, annotation, str(error)))
                continue
            if filled is None:
                thin.append(named("annotations", place, annotation))
            else:
                kept.append(filled)
        return image, kept, thin, faults


def check_fields(entry: Any, kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(entry, dict) or key not in entry:
            raise DataError(f"has no {key!r}; add it")
        value = entry[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{key!r} must be {kind.__name__}, got {_short.repr(value)}; correct it")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise DataError(f"{key!r} must be an integer of 64 bits, got {_short.repr(value)}; correct it")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise DataError(f"{key!r} has half of a pair of characters, got {_short.repr(value)}; correct it")


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; an integer may be beyond float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _check_image(entry: Any, folder: Path) -> tuple[int, int]:
    """Read the picture; return its (height, width)."""
    check_fields(entry, FIELDS["images"])
    pixels, orientation = _read_pixels(folder / entry["file_name"])
    height, width = pixels.shape[1:]
    if not 0 < max(height, width) <= MAX_ASPECT * min(height, width):
        raise DataError(
            f"its file has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other, which would "
            "vanish when resized; cut or remove it"
        )
    turned = f" once turned as its EXIF orientation {orientation} says" if orientation in TURNS else ""
    if "width" not in entry and "height" not in entry:
        if turned:
            raise DataError(
                f"has EXIF orientation {orientation} and no 'width' and 'height' that say whether its boxes are of the "
                "turned picture; add them"
            )
    elif (entry.get("width"), entry.get("height")) != (width, height):
        said = " x ".join(_short.repr(entry.get(key)) for key in ("width", "height"))
        raise DataError(
            f"has 'width' and 'height' {said}, but its file has {width} x {height} pixels{turned}; correct the two, or "
            "the file"
        )
    return height, width


def read_picture(path: Path) -> Tensor:
    """A picture as float32 ``[3, H, W]`` in 0..1, turned as its EXIF orientation says."""
    return F.to_dtype(_read_pixels(path)[0], torch.float32, scale=True)


def _read_pixels(path: Path) -> tuple[Tensor, Any]:
    """A picture turned as its EXIF orientation says, uint8 or, of 16 bits, float32 ``[3, H, W]``; the orientation."""
    try:
        # By its path Pillow maps the file into memory, and garbles an uncompressed TIFF that it turns.
        with path.open("rb") as opened, Image.open(opened) as file:
            orientation = file.getexif().get(ExifTags.Base.Orientation)
            file.load()
            # Pillow turns some formats when it loads them.
            turn = TURNS.get(file.getexif().get(ExifTags.Base.Orientation))
            image = file if turn is None else file.transpose(turn)
            if image.mode.startswith("I;16"):
                grey = torch.from_numpy(np.asarray(image).astype(np.float32)) / 65535
                return grey.expand(3, -1, -1).contiguous(), orientation
            if image.mode not in ("I", "F"):
                return F.pil_to_tensor(image.convert("RGB")), orientation
    except Exception as error:  # Pillow's decoders raise many kinds
        raise DataError(
            f"cannot read image {_short.repr(str(path))}: {type(error).__name__}: {_line(error)}; replace or remove it"
        ) from error
    kind = "floating-point" if image.mode == "F" else "32-bit"
    raise DataError(
        f"image {_short.repr(str(path))} has {kind} pixels (Pillow's mode {image.mode}) whose white is unknown; "
        "save it with 8 or 16 bits"
    )


def _check_annotation(entry: Any, size: tuple[int, int] | None, masks: bool) -> dict[str, Any] | None:
    """An annotation with area and crowd filled in and its box clipped; None where no box remains.

    size: of its image, (height, width); None for one that cannot be read.
    """
    box, crowd, area = entry["bbox"], entry.get("iscrowd"), entry.get("area")
    if len(box) != 4 or not all(map(_is_number, box)):
        raise DataError(f"bbox must be 4 finite numbers, got {_short.repr(box)}; correct or remove it")
    if crowd not in (None, 0, 1):
        raise DataError(f"iscrowd must be 0 or 1, got {_short.repr(crowd)}; correct it")
    if area is not None and not (_is_number(area) and area >= 0):
        raise DataError(f"area must be a finite number from 0 on, got {_short.repr(area)}; correct or remove it")
    if size is None:
        return None
    x1, y1 = max(0.0, box[0]), max(0.0, box[1])
    width, height = min(float(size[1]), box[0] + box[2]) - x1, min(float(size[0]), box[1] + box[3]) - y1
    if min(width, height) <= SMALLEST_SIDE * max(size):
        return None
    if masks:
        try:
            mask_of(entry.get("segmentation"), size)
        except Exception as error:  # pycocotools raises no other kind
            raise DataError(f"has a segmentation that cannot be drawn, {_line(error)}; correct or remove it") from error
    box = [x1, y1, width, height]
    return {**entry, "bbox": box, "area": width * height if area is None else area, "iscrowd": int(crowd or 0)}


def mask_of(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """uint8 ``[H, W]`` of polygons, or of an RLE with counts as a list or as text; ValueError if it is neither.

    size: the image's (height, width).
    """
    if isinstance(segmentation, list):
        _check_polygons(segmentation, size)
        return rle.decode(rle.merge(rle.frPyObjects(segmentation, *size)))
    runs = _runs(segmentation, size)
    # Columns of the image follow one another.
    return np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs).reshape(size[::-1]).T


def _check_polygons(polygons: list[Any], size: tuple[int, int]) -> None:
    """pycocotools takes memory by the length of the edges, and four numbers for a box."""
    if not polygons:
        raise ValueError("it is an empty list")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(_is_number, polygon)):
            raise ValueError(
                f"a polygon must be x and y of 3 or more corners, finite numbers, got {_short.repr(polygon)}"
            )
        low, high, (height, width) = min(polygon), max(polygon), size
        if low < -max(size) or high > 2 * max(size):
            raise ValueError(f"a polygon goes from {low:g} to {high:g}, far outside of its {width} x {height} pixels")


def _runs(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """An RLE's runs of background and object by turns, int64; they fill the image."""
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), list | str):
        raise ValueError(f"it must be polygons, or an RLE with 'size' and 'counts', got {_short.repr(segmentation)}")
    if segmentation.get("size") != list(size):
        raise ValueError(
            f"its 'size' must be the image's [height, width], {list(size)}, got {_short.repr(segmentation.get('size'))}"
        )
    counts, pixels = segmentation["counts"], size[0] * size[1]
    if isinstance(counts, str):
        runs = _decompressed(counts)
    elif all(type(count) is int and 0 <= count <= pixels for count in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError(f"its 'counts' must be integers from 0 to the image's {pixels} pixels")
    if (runs < 0).any() or runs.sum() != pixels:
        raise ValueError(f"its runs cover {runs.sum()} pixels, the image has {pixels}")
    return runs


def _decompressed(text: str) -> np.ndarray:
    """The runs of COCO's compressed RLE, int64.

    A character from "0" on has five bits of a number, low ones first, and a sixth if more follow. From the fourth
    number on each is the difference from the one two before. pycocotools reads past the end of a text that is cut.
    """
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes < 32)
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] >= 32:
        raise ValueError("its 'counts' are not compressed as COCO's are")
    first = np.concatenate([[0], last[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if places.max() > 6:
        raise ValueError("its 'counts' have a number of more than 32 bits")
    runs = np.add.reduceat((codes & 31) << 5 * places, first)
    runs -= np.where(codes[last] & 16, 1 << 5 * (places[last] + 1), 0)
    for start in (1, 2):
        runs[start::2] = runs[start::2].cumsum()
    return runs
