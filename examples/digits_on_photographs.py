# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits on photographs: a small multi-scale detection set, made on the fly from what two wheels carry.

The digits are scikit-learn's 1,797 handwritten ones (8x8 pixels, enlarged smoothly), the photographs are
scikit-learn's two and those inside the scikit-image wheel. Nothing is downloaded. The longer side of a digit is drawn
log-uniformly between 12 and 160 pixels, so that every level of a feature pyramid has work.

The two splits share nothing: a photograph belongs to one split as a whole (so no crop can be shared), and the digits
are cut at one index. scikit-learn keeps the order in which its 13 people wrote, so the cut also keeps nearly all of
the test split's handwriting out of training.

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
# Whole photographs per split. scikit-image files other than these would be downloaded, or are drawings and scans.
PHOTOGRAPHS = {
    "train": (
        "flower.jpg",
        "astronaut.png",
        "brick.png",
        "camera.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "test": ("china.jpg", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
}
# Digits before this index are training's, the others the test split's.
FIRST_TEST_DIGIT = 1350
# Fainter pixels are cut: what is left is the visible ink that boxes are tight around.
VISIBLE_ALPHA = 0.25
# A digit may hide at most this share of the smaller of two boxes.
MAX_OVERLAP = 0.15


@dataclass(frozen=True)
class Scene:
    """One generated picture.

    image, background: uint8 ``[S, S, 3]``, with and without the ink.
    boxes: float32 ``[D, 4]``, (x1, y1, x2, y2) in pixels, tight around the visible ink.
    masks: bool ``[D, S, S]``, the visible ink of each, also where a later digit lies over it.
    labels: int64 ``[D]``, 1 for the digit 0 up to 10 for the digit 9.
    digits: int64 ``[D]``, each one's index in scikit-learn's set.
    photograph, crop: where the background is from, crop as (x1, y1, x2, y2) in the photograph.
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
    """Where an installed wheel carries the photograph. By path: skimage.data's functions may start a download."""
    folders = (Path(sklearn.datasets.__file__).parent / "images", Path(skimage.__file__).parent / "data")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@cache
def _photograph(name: str) -> Image.Image:
    path = _photograph_path(name)
    if path is None:
        raise FileNotFoundError(f"no installed package carries the photograph {name}")
    return Image.open(path).convert("RGB")


@cache
def photographs(split: str) -> tuple[str, ...]:
    """Names of the split's photographs that the installed wheels carry: another version may carry fewer."""
    return tuple(name for name in PHOTOGRAPHS[split] if _photograph_path(name) is not None)


def _background(name: str, side: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """A random square crop of a photograph at ``[side, side, 3]``, sometimes mirrored, of varied brightness."""
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
    # From a pixel of the result to its source, about the centre: turned, then slanted.
    turn = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    linear = np.asarray([[1, slant], [0, 1]]) @ turn
    offset = canvas / 2 * (1 - linear.sum(axis=1))
    affine = (*linear[0], offset[0], *linear[1], offset[1])
    smooth = smooth.transform((canvas, canvas), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    # A smooth step turns the blur of the enlargement into a stroke with an edge; its place is the pen's width.
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
    """(x1, y1, x2, y2) around the pixels of ``[h, w]`` at or over the threshold, the far edges exclusive."""
    ys, xs = np.nonzero(alpha >= threshold)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def _ink_colour(region: NDArray[np.uint8], rng: np.random.Generator) -> FloatArray:
    """A random colour, float32 ``[3]`` in 0..255, whose lightness differs from the region's by at least 0.3."""
    lightness = float(region.mean()) / 255
    contrast = rng.uniform(0.3, 0.6)
    darker = lightness - contrast >= 0
    lighter = lightness + contrast <= 1
    go_darker = darker and (not lighter or rng.random() < 0.5)
    target = lightness - contrast if go_darker else lightness + contrast
    rgb = colorsys.hls_to_rgb(rng.random(), min(max(target, 0.02), 0.98), rng.uniform(0.1, 0.9))
    return np.asarray(rgb, dtype=np.float32) * 255


def _free_place(
    height: int, width: int, side: int, taken: Sequence[FloatArray], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Top-left corner (x, y) for a box that overlaps no taken one by more than MAX_OVERLAP, or None."""
    for _ in range(40):
        x, y = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
        for x1, y1, x2, y2 in taken:
            shared = max(0.0, min(x + width, x2) - max(x, x1)) * max(0.0, min(y + height, y2) - max(y, y1))
            if shared > MAX_OVERLAP * min(width * height, (x2 - x1) * (y2 - y1)):
                break
        else:
            return x, y
    return None


def make_scene(split: str, index: int, side: int, seed: int) -> Scene:
    """The picture ``index`` of a split: the same arguments give the same picture, whatever was made before."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1, index])
    images, values = _digit_images()
    first, last = (0, FIRST_TEST_DIGIT) if split == "train" else (FIRST_TEST_DIGIT, len(values))
    name = str(rng.choice(photographs(split)))
    background, crop = _background(name, side, rng)
    pixels = background.astype(np.float32)
    longest = min(MAX_SIDE, int(side * 0.83))
    sides = np.exp(rng.uniform(np.log(MIN_SIDE), np.log(longest + 1), size=rng.integers(3, 9))).astype(int)
    boxes: list[FloatArray] = []
    masks: list[NDArray[np.bool_]] = []
    chosen: list[int] = []
    # The largest first: small ones still find a place beside them.
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
    return Scene(
        pixels.round().clip(0, 255).astype(np.uint8),
        background,
        np.stack(boxes),
        np.stack(masks),
        values[digits] + 1,
        digits,
        name,
        crop,
    )


class DigitsOnPhotographs(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """``length`` pictures of a split ("train" or "test"), each made when it is asked for, from its own seed.

    An item is what torchvision's detectors take: an image, float32 ``[3, S, S]`` in 0..1, and a target with ``boxes``
    float32 ``[D, 4]`` as (x1, y1, x2, y2), ``labels`` int64 ``[D]``, ``image_id`` and, if asked for, ``masks`` uint8
    ``[D, S, S]``.
    """

    def __init__(self, split: str, length: int, side: int = 256, seed: int = 0, masks: bool = False) -> None:
        if split not in PHOTOGRAPHS:
            raise ValueError(f"split must be one of {sorted(PHOTOGRAPHS)}, got {split!r}")
        if side < 64:
            raise ValueError(f"side must be at least 64 pixels, got {side}")
        self.split, self.length, self.side, self.seed, self.masks = split, length, side, seed, masks
        self.class_names, self.category_ids = CLASS_NAMES, tuple(range(1, len(CLASS_NAMES) + 1))

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in 0..{self.length - 1}, got {index}")
        return make_scene(self.split, index, self.side, self.seed)

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

    def first(self, count: int) -> DigitsOnPhotographs:
        """The set of the first ``count`` pictures."""
        return DigitsOnPhotographs(self.split, min(count, self.length), self.side, self.seed, self.masks)

    def coco(self) -> dict[str, Any]:
        """The split's annotations as one COCO dict; image ids are index + 1, category ids are the labels."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(self.length):
            scene = self.scene(index)
            images.append(
                {
                    "id": index + 1,
                    "file_name": f"{self.split}_{index:05d}.png",
                    "width": self.side,
                    "height": self.side,
                    "photograph": scene.photograph,
                    "crop": list(scene.crop),
                }
            )
            for box, mask, label, digit in zip(
                scene.boxes.tolist(), scene.masks, scene.labels.tolist(), scene.digits.tolist(), strict=True
            ):
                width, height = box[2] - box[0], box[3] - box[1]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label,
                        "bbox": [box[0], box[1], width, height],
                        "area": width * height,
                        "segmentation": encode_mask(mask),
                        "iscrowd": 0,
                        "digit_index": digit,
                    }
                )
        return {
            "info": {"description": f"digits on photographs, {self.split} split", "seed": self.seed},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)],
        }

    def export(self, directory: Path) -> Path:
        """Writes PNG images to ``directory/<split>`` and returns the path of ``directory/<split>.json``."""
        folder = directory / self.split
        folder.mkdir(parents=True, exist_ok=True)
        coco = self.coco()
        for index, image in enumerate(coco["images"]):
            Image.fromarray(self.scene(index).image).save(folder / image["file_name"])
        annotations = directory / f"{self.split}.json"
        annotations.write_text(json.dumps(coco))
        return annotations


def main(argv: Sequence[str] | None = None) -> None:
    """Writes both splits to disk in COCO format."""
    parser = argparse.ArgumentParser(description="Write digits on photographs in COCO format.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=200, help="pictures in the train split")
    parser.add_argument("--test", type=int, default=50, help="pictures in the test split")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for split, length in (("train", args.train), ("test", args.test)):
        path = DigitsOnPhotographs(split, length, args.image_size, args.seed).export(args.directory)
        print(f"{length} pictures: {path} {path.with_suffix('')}")


if __name__ == "__main__":
    main()
