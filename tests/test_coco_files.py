# SPDX-License-Identifier: Apache-2.0
"""examples/coco_files.py: the COCO files and pictures that training accepts, and the line that refuses others."""

import helpers.examples  # noqa: F401  # isort: skip

import json
import struct
import weakref
import zlib

import coco_data
import coco_files
import numpy as np
import pytest
import torch
from coco_files import DataError
from PIL import Image, ImageOps, PngImagePlugin
from pycocotools import mask as rle

WIDTH, HEIGHT = 96, 80
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
HALF = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH // 2] * 2}


class Files:
    """A COCO file of three pictures, one annotation each, that a test spoils before it is read."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "mine.json"
        names = [f"{name}.png" for name in "abc"]
        for name in names:
            Image.fromarray(PIXELS).save(folder / name)
        size = {"width": WIDTH, "height": HEIGHT}
        self.images = [{"id": i, "file_name": name, **size} for i, name in enumerate(names, start=1)]
        self.categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]
        place = {"bbox": [10, 20, 30, 40], "segmentation": [[10, 20, 40, 20, 40, 60]]}
        self.annotations = [{"id": 70 + i, "image_id": i, "category_id": 3, **place} for i in (1, 2, 3)]

    def lists(self):
        return {name: getattr(self, name) for name in ("images", "categories", "annotations")}

    def read(self, masks=True, **options):
        self.path.write_text(json.dumps(self.lists()))
        return coco_data.load_coco(self.path, self.folder, masks, **options)

    def refusal(self, **options):
        with pytest.raises(DataError) as refused:
            self.read(**options)
        return str(refused.value)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def image(**values):
    return lambda files: files.images[1].update(values)


def annotation(**values):
    return lambda files: files.annotations[1].update(values)


def lacks(name, key):
    return lambda files: getattr(files, name)[1].pop(key)


def picture(write, **values):
    """Write another file in the place of the second picture; values: of its entry."""

    def spoil(files):
        path = files.folder / "b.png"
        path.unlink()
        files.images[1].update(values)
        write(path)

    return spoil


def without_sizes(spoil):
    def more(files):
        spoil(files)
        del files.images[1]["width"], files.images[1]["height"]

    return more


def saved(mode, size=(WIDTH, HEIGHT), kind="PNG", **options):
    return lambda path: Image.new(mode, size).save(path, kind, **options)


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return lambda path: Image.fromarray(PIXELS).save(path, "PNG", exif=exif)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header(width, height):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def cut(kind):
    def write(path):
        Image.fromarray(PIXELS).save(path, kind)
        path.write_bytes(path.read_bytes()[:-2000])

    return write


def broken_chunk(path):
    Image.fromarray(PIXELS).save(path)
    whole = path.read_bytes()
    at = whole.index(b"IDAT")
    # A chunk whose checksum is wrong follows the header.
    path.write_bytes(whole[: at - 4] + chunk(b"gAMA", b"\0\0\0\1")[:-1] + b"\0" + whole[at - 4 :])


def chunk_without_name(path):
    Image.fromarray(PIXELS).save(path)
    whole = path.read_bytes()
    at = whole.index(b"IEND") - 4
    half = whole.index(b"IDAT") + 400
    path.write_bytes(whole[:half] + b"\0" * (at - half) + whole[at:])


def large_text(path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.fromarray(PIXELS).save(path, pnginfo=text)


def text_run(*numbers):
    return {"size": [HEIGHT, WIDTH], "counts": "".join(chr(48 + number) for number in numbers)}


SPOILT = {
    # What each does to the files, where the line says that the fault is, and what it is.
    "image is a number": (lambda f: f.images.append(3), "images[3]", "has no 'id'"),
    "image without name": (lacks("images", "file_name"), "images[1] (id 2)", "has no 'file_name'"),
    "image name is a number": (image(file_name=5), "images[1] (id 2", "'file_name' must be str, got 5"),
    "image id is text": (lambda f: f.images.append({**f.images[0], "id": "4"}), "images[3]", "'id' must be int"),
    "image id is true": (lambda f: f.images.append({**f.images[0], "id": True}), "images[3]", "'id' must be int"),
    "image id of 65 bits": (lambda f: f.images.append({**f.images[0], "id": 2**63}), "images[3]", "of 64 bits"),
    "image id of 1000 bits": (lambda f: f.images.append({**f.images[0], "id": -(10**300)}), "images[3]", "of 64 bits"),
    "category is a list": (lambda f: f.categories.append([1]), "categories[2]", "has no 'id'"),
    "category without name": (lacks("categories", "name"), "categories[1] (id 9)", "has no 'name'"),
    "category of half a character": (
        lambda f: f.categories[1].update(name="d\ud800"), "categories[1] (id 9)", "half of a pair of characters"
    ),
    "category id of 65 bits": (lambda f: f.categories.append({"id": 2**64, "name": "x"}), "categories[2]", "64 bits"),
    "sizes swapped": (image(width=HEIGHT, height=WIDTH), "b.png", "'width' and 'height' 80 x 96, but its file has 96"),
    "height off by one": (image(height=HEIGHT + 1), "images[1] (id 2", "correct the two"),
    "width is text": (image(width="96"), "images[1] (id 2", "'96' x 80"),
    "width is beyond float": (image(width=10**400), "images[1] (id 2", "1000"),
    "height is missing": (lacks("images", "height"), "images[1] (id 2", "96 x None"),
    "annotation is null": (lambda f: f.annotations.append(None), "annotations[3]", "has no 'image_id'"),
    "no box": (lacks("annotations", "bbox"), "annotations[1] (id 72, image_id 2)", "has no 'bbox'"),
    "box is text": (annotation(bbox="1 2 3 4"), "(id 72, image_id 2)", "'bbox' must be list"),
    "other image": (annotation(image_id=99), "annotations[1]", "image_id 99 is not in the file"),
    "image of 90 bits": (annotation(image_id=2**90), "annotations[1]", "'image_id' must be an integer of 64 bits"),
    "image is a fraction": (annotation(image_id=2.5), "annotations[1]", "'image_id' must be int, got 2.5"),
    "other class": (annotation(category_id=77), "annotations[1]", "category_id 77 is not in the file"),
    "short box": (annotation(bbox=[1, 2]), "id 72", "4 finite numbers, got [1, 2]"),
    "box of texts": (annotation(bbox=["1", 2, 3, 4]), "id 72", "4 finite numbers, got ['1', 2, 3, 4]"),
    "box of null": (annotation(bbox=[None, 2, 3, 4]), "id 72", "4 finite numbers"),
    "box of true": (annotation(bbox=[True, 2, 3, 4]), "id 72", "4 finite numbers"),
    "infinite box": (annotation(bbox=[1, 2, 3, float("inf")]), "id 72", "4 finite numbers"),
    "box of NaN": (annotation(bbox=[float("nan"), 2, 3, 4]), "id 72", "4 finite numbers"),
    "box beyond float": (annotation(bbox=[1, 2, 10**400, 4]), "id 72", "4 finite numbers"),
    "crowd is '0'": (annotation(iscrowd="0"), "id 72", "iscrowd must be 0 or 1, got '0'"),
    "crowd is 'false'": (annotation(iscrowd="false"), "id 72", "iscrowd must be 0 or 1"),
    "crowd is 2": (annotation(iscrowd=2), "id 72", "iscrowd must be 0 or 1"),
    "crowd is NaN": (annotation(iscrowd=float("nan")), "id 72", "iscrowd must be 0 or 1"),
    "area is NaN": (annotation(area=float("nan")), "id 72", "area must be a finite number"),
    "area beyond float": (annotation(area=10**400), "id 72", "area must be a finite number"),
    "area is text": (annotation(area="12"), "id 72", "area must be a finite number"),
    "area below 0": (annotation(area=-1), "id 72", "area must be a finite number"),
    "no segmentation": (lacks("annotations", "segmentation"), "id 72", "must be polygons, or an RLE"),
    "no polygon": (annotation(segmentation=[]), "id 72", "empty list"),
    "polygon of a box": (annotation(segmentation=[[1, 2, 30, 40]]), "id 72", "3 or more corners"),
    "polygon with half a corner": (annotation(segmentation=[[1, 2, 30, 40, 5, 6, 7]]), "id 72", "3 or more corners"),
    "polygon without list": (annotation(segmentation=[1, 2, 30, 40, 5, 6]), "id 72", "3 or more corners"),
    "polygon of texts": (annotation(segmentation=[[*"123456"]]), "id 72", "3 or more corners"),
    "second polygon": (annotation(segmentation=[[1, 2, 30, 40, 5, 6], [1, 2, 3, 4]]), "id 72", "3 or more corners"),
    "corner is NaN": (annotation(segmentation=[[1, 2, 30, float("nan"), 5, 6]]), "id 72", "3 or more corners, finite"),
    "corner is infinite": (annotation(segmentation=[[1, 2, 30, 1e999, 5, 6]]), "id 72", "3 or more corners, finite"),
    "corner beyond float": (annotation(segmentation=[[1, 2, 30, 10**400, 5, 6]]), "id 72", "3 or more corners, finite"),
    "corner at 2e9": (annotation(segmentation=[[1, 2, 2e9, 3, 5, 6]]), "id 72", "from 1 to 2e+09, far outside"),
    "corner at -1e300": (annotation(segmentation=[[1, 2, -1e300, 3, 5, 6]]), "id 72", "far outside"),
    "RLE without counts": (annotation(segmentation={"size": [HEIGHT, WIDTH]}), "id 72", "must be polygons, or an RLE"),
    "RLE of a number": (annotation(segmentation={**HALF, "counts": 7}), "id 72", "must be polygons, or an RLE"),
    "RLE without size": (annotation(segmentation={"counts": [1, 2]}), "id 72", "must be the image's [height, width]"),
    "RLE of another size": (annotation(segmentation={**HALF, "size": [WIDTH, HEIGHT]}), "id 72", "got [96, 80]"),
    "RLE too short": (annotation(segmentation={**HALF, "counts": [10, 20]}), "id 72", "runs cover 30 pixels, the"),
    "RLE too long": (annotation(segmentation={**HALF, "counts": [7000, 7000]}), "id 72", "cover 14000 pixels"),
    "RLE of no run": (annotation(segmentation={**HALF, "counts": []}), "id 72", "cover 0 pixels"),
    "RLE below 0": (annotation(segmentation={**HALF, "counts": [7681, -1]}), "id 72", "integers from 0 to"),
    "RLE of fractions": (annotation(segmentation={**HALF, "counts": [0.5, 7679.5]}), "id 72", "integers from 0 to"),
    "RLE beyond 64 bits": (annotation(segmentation={**HALF, "counts": [10**30, 1]}), "id 72", "integers from 0 to"),
    "RLE text too short": (annotation(segmentation=text_run(10, 20 - 32 + 64)), "id 72", "not compressed as COCO's"),
    "RLE text of few pixels": (annotation(segmentation=text_run(10, 12)), "id 72", "cover 22 pixels"),
    "RLE text of no run": (annotation(segmentation=text_run()), "id 72", "not compressed as COCO's"),
    "RLE text that is cut": (annotation(segmentation=text_run(10, 32 + 7)), "id 72", "not compressed as COCO's"),
    "RLE text of other letters": (annotation(segmentation={**HALF, "counts": "1é"}), "id 72", "not compressed"),
    "RLE text with a long number": (annotation(segmentation=text_run(*[63] * 9, 1)), "id 72", "more than 32 bits"),
    "RLE text below 0": (annotation(segmentation=text_run(16 + 8, 8)), "id 72", "its runs"),
    "no file": (image(file_name="gone.png"), "images[1] (id 2, file_name 'gone.png')", "FileNotFoundError"),
    "file name is empty": (image(file_name=""), "images[1]", "IsADirectoryError"),
    "file name with a null byte": (image(file_name="b\0.png"), "images[1]", "null"),
    "file name of two lines": (image(file_name="b\n.png"), r"file_name 'b\n.png'", "FileNotFoundError"),
    "file name of half a character": (image(file_name="\ud800.png"), "images[1]", "half of a pair of characters"),
    "empty file": (picture(lambda path: path.write_bytes(b"")), "b.png", "UnidentifiedImageError"),
    "file of text": (picture(lambda path: path.write_text("picture")), "b.png", "UnidentifiedImageError"),
    "PNG that is cut": (picture(cut("PNG")), "b.png", "truncated"),
    "JPEG that is cut": (picture(cut("JPEG")), "b.png", "truncated"),
    "PNG with a wrong checksum": (picture(broken_chunk), "b.png", "UnidentifiedImageError"),
    "PNG with a broken chunk": (picture(chunk_without_name), "b.png", "cannot read image"),
    "PNG with a large text": (picture(large_text), "b.png", "ValueError"),
    "PNG of 200 Mpixel": (
        picture(lambda path: path.write_bytes(header(15000, 15000) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))),
        *("b.png", "DecompressionBombError"),
    ),
    "wide picture": (picture(saved("RGB", (3000, 2)), width=3000, height=2), "b.png", "3000 x 2 pixels, one side"),
    "high picture": (picture(saved("L", (1, 101)), width=1, height=101), "b.png", "1 x 101 pixels, one side"),
    "32-bit picture": (picture(saved("I", kind="TIFF")), "b.png", "32-bit pixels (Pillow's mode I)"),
    "picture of floats": (picture(saved("F", kind="TIFF")), "b.png", "floating-point pixels (Pillow's mode F)"),
    "no sizes and EXIF": (without_sizes(picture(rotated(3))), "b.png", "orientation 3 and no 'width' and 'height'"),
    "sizes before turning": (picture(rotated(6)), "b.png", "80 x 96 pixels once turned as its EXIF orientation 6 says"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "where", "what"), SPOILT.values(), ids=SPOILT)
def test_a_fault_is_one_line_that_says_where_it_is_and_what_to_do(spoil, where, what, files):
    spoil(files)
    message = files.refusal()
    assert len(message.splitlines()) == 1, message
    assert message.startswith(f"{files.path}: ")
    assert where in message
    assert what in message
    assert message.isprintable()
    assert len(message) < 1200
    # Every line ends with what to do.
    assert message.rpartition("; ")[2].split()[0] in ("add", "correct", "replace", "cut", "save")


def test_at_most_twenty_faults_are_shown_and_all_are_counted(files):
    for place, entry in enumerate(files.annotations * 9):
        files.annotations.append({**entry, "id": 100 + place, "category_id": 5})
    files.images.append({"id": 3, "file_name": "a.png"})
    files.images[0]["file_name"] = "gone.png"
    files.categories += [{"id": 3, "name": "cow"}, {"id": 4}]
    lines = files.refusal().splitlines()
    assert len(lines) == coco_files.MOST_LINES + 1 == 21
    # Two images and two categories share an id; a category has no name; 27 classes are unknown; a picture is gone.
    assert lines[-1] == f"{files.path} has 33 faults, of which 20 are above"
    assert sum("the same id" in line for line in lines) == 4
    assert all(line.startswith(f"{files.path}: ") for line in lines[:-1])


def test_several_faults_of_any_kind_are_found_in_one_pass(files):
    files.annotations[2]["segmentation"] = []
    files.annotations.append({**files.annotations[0], "id": 99, "iscrowd": "0"})
    (files.folder / "b.png").write_bytes(b"")
    lines = files.refusal().splitlines()
    assert [line.partition(" (")[0] for line in lines[:-1]] == [
        f"{files.path}: {each}" for each in ("annotations[3]", "images[1]", "annotations[2]")
    ]
    assert lines[-1] == f"{files.path} has 3 faults"
    # Whatever number of processes reads the pictures.
    assert files.refusal(workers=2).splitlines() == lines


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "No such file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        pytest.param(b"[" * 10**5, "is not JSON", id="nested"),
        pytest.param(b'{"images": 1' + b"0" * 5000 + b"}", "is not JSON", id="a long number"),
        (b"[]", "must hold a JSON object"),
        (b"{}", "has no list 'images'"),
        (b'{"images": [], "categories": [], "annotations": []}', "has no images"),
        (b'{"images": [1], "categories": {}, "annotations": []}', "has no list 'categories'"),
    ],
)
def test_a_file_that_is_no_coco_file_is_one_line(content, what, files):
    if content is not None:
        files.path.write_bytes(content)
    with pytest.raises(DataError, match=what) as refused:
        coco_data.load_coco(files.path, files.folder)
    assert len(str(refused.value).splitlines()) == 1
    assert str(files.path) in str(refused.value)


def test_a_folder_that_is_none_is_one_line(files):
    files.folder = files.path
    assert "is not a directory of images" in files.refusal()


def test_what_training_needs_no_mask_of_is_not_asked_for(files):
    files.annotations[0]["segmentation"] = [[float("nan")] * 6]
    del files.annotations[1]["segmentation"]
    assert len(files.read(masks=False)) == 3


def test_optional_fields_may_be_left_out(files):
    files.annotations[0] |= {"iscrowd": None, "area": None}
    files.annotations[1] |= {"iscrowd": False, "area": 7}
    files.annotations[2] |= {"iscrowd": True}
    del files.images[1]["width"], files.images[1]["height"]
    files.path.write_bytes(b"\xef\xbb\xbf" + json.dumps(files.lists()).encode())
    found = coco_data.load_coco(files.path, files.folder).coco()
    assert [(a["iscrowd"], a["area"], a["id"]) for a in found["annotations"]] == [(0, 1200, 1), (0, 7, 2), (1, 1200, 3)]
    assert all((entry["width"], entry["height"]) == (WIDTH, HEIGHT) for entry in found["images"])


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_picture_is_turned_as_its_exif_orientation_says(kind, orientation, files):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = files.folder / "b.png"
    Image.fromarray(PIXELS).save(path, kind, exif=exif)
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    files.images[1] |= {"width": expected.width, "height": expected.height}
    assert (expected.size == (HEIGHT, WIDTH)) == (orientation in (5, 6, 7, 8))
    pixels, target = files.read()[1]
    assert np.array_equal((pixels * 255).round().byte().permute(1, 2, 0), np.asarray(expected))
    assert target["boxes"].tolist() == [[10, 20, 40, 60]]
    assert target["masks"].shape[1:] == pixels.shape[1:]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_pictures_of_16_bits_keep_their_greys(mode, kind, orientation, files):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = (np.arange(HEIGHT * WIDTH, dtype=np.uint16) * 8).reshape(HEIGHT, WIDTH)
    data = grey.astype(">u2" if mode.endswith("B") else "<u2").tobytes()
    Image.frombytes(mode, (WIDTH, HEIGHT), data).save(files.folder / "b.png", kind, exif=exif)
    expected = grey if orientation == 1 else np.rot90(grey, -1)
    files.images[1] |= {"width": expected.shape[1], "height": expected.shape[0]}
    pixels, _ = files.read()[1]
    assert pixels.dtype == torch.float32
    for channel in pixels:
        np.testing.assert_array_equal(channel, expected.astype(np.float32) / 65535)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_8_bits_look_as_pillow_shows_them(mode, files):
    Image.fromarray(PIXELS).convert(mode).save(files.folder / "b.png", "TIFF")
    with Image.open(files.folder / "b.png") as stored:
        assert stored.mode == mode
        expected = np.asarray(stored.convert("RGB"))
    assert np.array_equal((files.read()[1][0] * 255).round().byte().permute(1, 2, 0), expected)


THIN = {
    "no width": [10, 20, 0, 5],
    "negative height": [10, 20, 5, -5],
    "outside": [900, 5, 4, 4],
    "far outside": [1e308, 5, 1e308, 4],
    "below float32 here": [90, 20, 1e-6, 5],
    "below float32 once mirrored": [0, 20, 1e-6, 5],
    "below every float32": [0, 20, 5, 1e-300],
}


def test_boxes_without_area_are_left_out_and_named(files, capsys):
    like = files.annotations[1]
    files.annotations += [{**like, "id": 80 + i, "bbox": box} for i, box in enumerate(THIN.values())]
    thinnest = 10 * coco_files.SMALLEST_SIDE * WIDTH
    files.annotations.append({**like, "bbox": [WIDTH - 1, 20, thinnest, 5]})
    boxes = files.read()[1][1]["boxes"]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    names = ", ".join(f"annotations[{3 + i}] (id {80 + i}, image_id 2)" for i in range(len(THIN)))
    assert warnings == [
        f"warning: {files.path}: left out {len(THIN)} boxes that have no area inside their image, or less than float32 "
        f"resolves: {names}"
    ]
    assert len(boxes) == 2
    # A box stays one when it is mirrored and resized, whatever the size.
    mirrored = boxes.clone()
    mirrored[:, [0, 2]] = WIDTH - boxes[:, [2, 0]]
    for scale in np.random.default_rng(0).uniform(0.01, 20, 100):
        for each in (boxes, mirrored):
            resized = each * torch.tensor(scale, dtype=torch.float32)
            assert (resized[:, 2:] > resized[:, :2]).all()
    files.read(quiet=True)
    assert capsys.readouterr().err == ""


def test_every_form_of_a_mask_draws_the_same():
    generator = np.random.default_rng(0)
    for _ in range(60):
        height, width = generator.integers(1, 40, 2).tolist()
        mask = (generator.random((height, width)) < generator.choice([0, 0.02, 0.5, 1])).astype(np.uint8)
        packed = rle.encode(np.asfortranarray(mask))
        ends = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=2))
        size = {"size": [height, width]}
        for counts in (packed["counts"].decode(), np.diff(ends, prepend=0).tolist()):
            drawn = coco_files.mask_of({**size, "counts": counts}, (height, width))
            assert drawn.dtype == np.uint8
            assert np.array_equal(drawn, mask)
    # Runs of more than 2^15 pixels, whose differences are long numbers, and a negative one.
    runs = [40000, 3, 50000, 2, 9, 123456]
    packed = rle.frPyObjects({"size": [500, 427], "counts": [*runs, 500 * 427 - sum(runs)]}, 500, 427)
    found = coco_files.mask_of({"size": [500, 427], "counts": packed["counts"].decode()}, (500, 427))
    assert np.array_equal(found, rle.decode(packed))


def test_polygons_are_drawn():
    square = coco_files.mask_of([[2, 3, 6, 3, 6, 8, 2, 8], [10, 0, 99, 0, 99, 1, 10, 1]], (100, 12))
    expected = np.zeros((100, 12))
    expected[3:8, 2:6] = 1
    # A corner may lie outside, as far as the image is long.
    expected[0, 10:] = 1
    assert np.array_equal(square, expected)


def test_one_picture_and_one_mask_at_a_time_are_in_memory(files, monkeypatch):
    files.annotations += files.annotations
    alive, most = [], []

    def watched(function):
        def call(*arguments):
            most.append(sum(each() is not None for each in alive))
            found = function(*arguments)
            alive.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
            return found

        return call

    for name in ("_read_pixels", "mask_of"):
        monkeypatch.setattr(coco_files, name, watched(getattr(coco_files, name)))
    files.read()
    assert len(most) == 9
    assert max(most) == 0


def test_the_pass_shows_its_progress(files, capsys):
    files.read()
    assert capsys.readouterr().err.splitlines() == [
        "checking mine.json: image 0 of 3, unknown time left",
        "checking mine.json: image 3 of 3, 00:00 left",
        "",
    ]
