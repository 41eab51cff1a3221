# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits on photographs: a small multi-scale detection set, generated from two installed packages.

scikit-learn has 1,797 digits of 8x8 pixels and two photographs; scikit-image has the others. A photograph belongs to
one split, and the digits are cut at one index. scikit-learn keeps the order in which its 13 people wrote, so the cut
keeps nearly all of the test handwriting out of training.

    python examples/digits_on_photographs.py DIRECTORY --train 200 --test 50     # writes the set in COCO format
"""

from __future__ import annotations

import argparse
import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import sklearn.datasets
import torch
from coco_data import encode_mask
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

FloatArray = NDArray[np.float32]

MIN_SIDE, MAX_SIDE = 12, 160
CLASS_NAMES = tuple("0123456789")
# scikit-image would download its other photographs, or they are drawings and scans.
PHOTOGRAPHS = {
    "train": ("flower.jpg", "astronaut.png", "brick.png", "camera.png", "gravel.png", "hubble_deep_field.jpg",
              "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    "test": ("china.jpg", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
}  # fmt: skip
# Digits before this index are for training, the others for testing.
FIRST_TEST_DIGIT = 1350
# Fainter pixels are cut; boxes are tight around the rest, the visible ink.
VISIBLE_ALPHA = 0.25
# A digit may hide at most this share of the smaller of two boxes.
MAX_OVERLAP = 0.15


@dataclass(frozen=True)
class Scene:
    """One generated image.

    image, background: uint8 ``[S, S, 3]``, with and without the ink.
    boxes: float32 ``[D, 4]``, (x1, y1, x2, y2) in pixels, tight around the visible ink.
    masks: bool ``[D, S, S]``, the visible ink of each digit, also where a later digit covers it.
    labels: int64 ``[D]``, 1 for the digit 0 up to 10 for the digit 9.
    digits: int64 ``[D]``, the index of each digit in scikit-learn's set.
    photograph, crop: the source of the background, with the crop as (x1, y1, x2, y2).
    """

    image: NDArray[np.uint8]
    background: NDArray[np.uint8]
    boxes: FloatArray
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    digits: NDArray[np.int64]
    photograph: str
    crop: tuple[int, int, int, int]


@cache
def _digit_images() -> tuple[FloatArray, NDArray[np.int64]]:
    """All digits as float32 ``[1797, 8, 8]`` in 0..1, and their values."""
    digits = sklearn.datasets.load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


def _photograph_path(name: str) -> Path | None:
    """The path of the photograph in an installed package. skimage.data's functions could start a download."""
    folders = (Path(sklearn.datasets.__file__).parent / "images", Path(skimage.__file__).parent / "data")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@cache
def _photograph(name: str) -> Image.Image:
    return Image.open(_photograph_path(name)).convert("RGB")


@cache
def photographs(split: str) -> tuple[str, ...]:
    """The names of the split's photographs that are installed: another version may have fewer."""
    return tuple(name for name in PHOTOGRAPHS[split] if _photograph_path(name) is not None)


def _background(name: str, side: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """A random square crop of a photograph, ``[side, side, 3]``, of varied brightness, perhaps mirrored."""
    photograph = _photograph(name)
    crop_side = int(min(photograph.size) * rng.uniform(0.5, 1.0))
    left = int(rng.integers(photograph.width - crop_side + 1))
    top = int(rng.integers(photograph.height - crop_side + 1))
    crop = (left, top, left + crop_side, top + crop_side)
    resized = photograph.resize((side, side), Image.Resampling.BICUBIC, box=crop)
    pixels = np.asarray(resized, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = pixels * rng.uniform(0.75, 1.1) + rng.uniform(-12, 12)
    return pixels.clip(0, 255).astype(np.uint8), crop


def _ink(digit: FloatArray, longer_side: int, rng: np.random.Generator) -> FloatArray:
    """Opacity of an enlarged, slightly slanted digit, ``[h, w]`` with ``max(h, w) == longer_side``, cut to its ink."""
    canvas = 160
    padded = Image.fromarray(np.pad(digit, 1))
    smooth = padded.resize((canvas, canvas), Image.Resampling.BICUBIC)
    slant, angle = rng.uniform(-0.2, 0.2), np.deg2rad(rng.uniform(-12, 12))
    # Each pixel of the result to its source, about the centre: a turn, then a slant.
    turn = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    linear = np.asarray([[1, slant], [0, 1]]) @ turn
    offset = canvas / 2 * (1 - linear.sum(axis=1))
    affine = (*linear[0], offset[0], *linear[1], offset[1])
    smooth = smooth.transform((canvas, canvas), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    # A smooth step turns the blur of the enlargement into a stroke with an edge; its position sets the pen's width.
    low = rng.uniform(0.12, 0.32)
    step = ((np.asarray(smooth) - low) / 0.25).clip(0, 1)
    stroke = step * step * (3 - 2 * step)
    x1, y1, x2, y2 = _ink_box(stroke, 0.5)
    scale = longer_side / max(x2 - x1, y2 - y1)
    size = (max(2, round((x2 - x1) * scale)), max(2, round((y2 - y1) * scale)))
    small = Image.fromarray(stroke).resize(size, Image.Resampling.LANCZOS, box=(x1, y1, x2, y2))
    alpha = np.asarray(small).clip(0, 1)
    alpha = np.where(alpha < VISIBLE_ALPHA, np.float32(0), alpha)
    x1, y1, x2, y2 = _ink_box(alpha, VISIBLE_ALPHA)
    return alpha[y1:y2, x1:x2]


def _ink_box(alpha: FloatArray, threshold: float) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) around the pixels of ``[h, w]`` at or above the threshold, with exclusive far edges."""
    ys, xs = np.nonzero(alpha >= threshold)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def _ink_colour(region: NDArray[np.uint8], rng: np.random.Generator) -> FloatArray:
    """A random colour, float32 ``[3]`` in 0..255, whose lightness differs from the region's by at least 0.3."""
    lightness = float(region.mean()) / 255
    contrast = rng.uniform(0.3, 0.6)
    darker, lighter = lightness - contrast, lightness + contrast
    target = darker if darker >= 0 and (lighter > 1 or rng.random() < 0.5) else lighter
    rgb = colorsys.hls_to_rgb(rng.random(), min(max(target, 0.02), 0.98), rng.uniform(0.1, 0.9))
    return np.asarray(rgb, dtype=np.float32) * 255


def _free_place(
    height: int, width: int, side: int, taken: Sequence[FloatArray], rng: np.random.Generator
) -> tuple[int, int] | None:
    """The top-left corner (x, y) of a box that overlaps no taken box by more than MAX_OVERLAP, or None."""
    near, far = np.split(np.asarray(taken, dtype=float).reshape(-1, 4), 2, axis=1)
    smaller = np.minimum((far - near).prod(axis=1), width * height)
    for _ in range(40):
        x, y = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
        shared = np.minimum(far, (x + width, y + height)) - np.maximum(near, (x, y))
        if (shared.clip(0).prod(axis=1) <= MAX_OVERLAP * smaller).all():
            return x, y
    return None


def make_scene(split: str, index: int, side: int, seed: int, smallest: int = MIN_SIDE) -> Scene:
    """Generate image ``index`` of a split. It depends on the arguments alone."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1, index])
    images, values = _digit_images()
    first, last = (0, FIRST_TEST_DIGIT) if split == "train" else (FIRST_TEST_DIGIT, len(values))
    name = str(rng.choice(photographs(split)))
    background, crop = _background(name, side, rng)
    pixels = background.astype(np.float32)
    longest = min(MAX_SIDE, int(side * 0.83))
    sides = np.exp(rng.uniform(np.log(smallest), np.log(longest + 1), size=rng.integers(3, 9))).astype(int)
    boxes: list[FloatArray] = []
    masks: list[NDArray[np.bool_]] = []
    chosen: list[int] = []
    # The largest first: small ones still find a place next to them.
    for longer_side in sorted(sides.tolist(), reverse=True):
        digit = int(rng.integers(first, last))
        alpha = _ink(images[digit], longer_side, rng)
        height, width = alpha.shape
        place = _free_place(height, width, side, boxes, rng)
        if place is None:
            continue
        x, y = place
        region = np.s_[y : y + height, x : x + width]
        opacity = (alpha * rng.uniform(0.75, 1.0))[..., None]
        pixels[region] += (_ink_colour(background[region], rng) - pixels[region]) * opacity
        boxes.append(np.asarray((x, y, x + width, y + height), dtype=np.float32))
        masks.append(np.zeros((side, side), dtype=bool))
        masks[-1][region] = alpha > 0
        chosen.append(digit)
    digits = np.asarray(chosen, dtype=np.int64)
    image = pixels.round().clip(0, 255).astype(np.uint8)
    return Scene(image, background, np.stack(boxes), np.stack(masks), values[digits] + 1, digits, name, crop)


class DigitsOnPhotographs(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """``length`` images of a split ("train" or "test"), each generated from its own seed when it is asked for.

    side, smallest: pixels of an image's side, and of the longer side of the smallest digit.

    An item is what torchvision's detectors take: an image, float32 ``[3, S, S]`` in 0..1, and a target with ``boxes``
    float32 ``[D, 4]`` as (x1, y1, x2, y2), ``labels`` int64 ``[D]``, ``image_id`` and, with masks, ``masks`` uint8
    ``[D, S, S]``.
    """

    class_names, category_ids = CLASS_NAMES, tuple(range(1, len(CLASS_NAMES) + 1))

    def __init__(
        self, split: str, length: int, side: int = 256, seed: int = 0, masks: bool = False, smallest: int = MIN_SIDE
    ) -> None:
        if split not in PHOTOGRAPHS:
            raise ValueError(f"split must be one of {sorted(PHOTOGRAPHS)}, got {split!r}")
        if side < 64:
            raise ValueError(f"side must be at least 64 pixels, got {side}")
        if not MIN_SIDE <= smallest <= side // 2:
            raise ValueError(f"smallest must be {MIN_SIDE} to {side // 2}, half of the side, got {smallest}")
        self.split, self.length, self.side, self.seed = split, length, side, seed
        self.masks, self.smallest = masks, smallest

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in 0..{self.length - 1}, got {index}")
        return make_scene(self.split, index, self.side, self.seed, self.smallest)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        scene = self.scene(index)
        image = F.to_dtype(torch.from_numpy(scene.image).permute(2, 0, 1), torch.float32, scale=True)
        target = {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.from_numpy(scene.labels),
            "image_id": torch.tensor(index + 1),
        }
        if self.masks:
            target["masks"] = torch.from_numpy(scene.masks).to(torch.uint8)
        return image, target

    def coco(self) -> dict[str, Any]:
        """The annotations as one COCO dict; image ids are index + 1, category ids are the labels."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(self.length):
            scene = self.scene(index)
            name, source = f"{self.split}_{index:05d}.png", {"photograph": scene.photograph, "crop": list(scene.crop)}
            images.append({"id": index + 1, "file_name": name, "width": self.side, "height": self.side, **source})
            found = (scene.boxes.tolist(), scene.masks, scene.labels.tolist(), scene.digits.tolist())
            for (x1, y1, x2, y2), mask, label, digit in zip(*found, strict=True):
                ids = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label}
                place = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                annotations.append({**ids, **place, "segmentation": encode_mask(mask), "digit_index": digit})
        return {
            "info": {"description": f"digits on photographs, {self.split} split", "seed": self.seed},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)],
        }

    def export(self, directory: Path) -> Path:
        """Write PNG images to ``directory/<split>``; return the path of the annotations, ``directory/<split>.json``."""
        folder = directory / self.split
        folder.mkdir(parents=True, exist_ok=True)
        coco = self.coco()
        for index, image in enumerate(coco["images"]):
            Image.fromarray(self.scene(index).image).save(folder / image["file_name"])
        annotations = directory / f"{self.split}.json"
        annotations.write_text(json.dumps(coco))
        return annotations


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write digits on photographs in COCO format.")
    default = "(default: %(default)s)"
    parser.add_argument("directory", type=Path, help="folder to write to: train.json, train/, test.json and test/")
    parser.add_argument("--train", type=int, default=200, help=f"images in the training split {default}")
    parser.add_argument("--test", type=int, default=50, help=f"images in the test split {default}")
    parser.add_argument("--image-size", type=int, default=256, help=f"side of an image, in pixels {default}")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of everything random {default}")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for split, length in (("train", args.train), ("test", args.test)):
        path = DigitsOnPhotographs(split, length, args.image_size, args.seed).export(args.directory)
        print(f"{length} images: {path} {path.with_suffix('')}")


if __name__ == "__main__":
    main()
