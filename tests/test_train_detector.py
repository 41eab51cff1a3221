# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  # the examples are no package, and need more than the library does
import argparse
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.ops.misc import FrozenBatchNorm2d

for package in ("sklearn", "skimage", "pycocotools", "matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(package, reason="the examples' extra is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import ablation
import coco_data
import detector_models
import detector_report
import detector_training
import digits_on_photographs as digits
import train_detector
from processes import Processes, Progress

from fpn_fast import backends

# The smallest images and model, and one thread: two wait for each other on a busy machine.
SMALL = ("--image-size", "64", "--batch-size", "1", "--eval-images", "2", "--device", "cpu", "--threads", "1",
         "--channels", "32", "--backbone", "slim_resnet")  # fmt: skip


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # These tests read no times.
    monkeypatch.setattr(detector_report, "REPEATS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read the checkpoint alone."""
    monkeypatch.setattr(train_detector, "report", lambda *_: None)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    # pytest keeps the folders of three sessions.
    for checkpoint in tmp_path.rglob("checkpoint.pt*"):
        checkpoint.unlink()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations of four pictures on disk; the images are in the folder of the same name."""
    return digits.DigitsOnPhotographs("train", 4, side=64, seed=3).export(tmp_path_factory.mktemp("coco"))


def train(output: Path, *arguments: object) -> int:
    return train_detector.main([*SMALL, "--output", str(output), *map(str, arguments)])


def written(coco: dict[str, Any], folder: Path) -> Path:
    (folder / "annotations.json").write_text(json.dumps(coco))
    return folder / "annotations.json"


def figures_of(output: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    figures: dict[str, Any] = json.loads((output / "figures.json").read_text(), parse_constant=refuse)
    return figures


def saved_in(output: Path) -> list[dict[str, Any]]:
    """The tracks of a run's checkpoint."""
    tracks: list[dict[str, Any]] = torch.load(output / "checkpoint.pt", weights_only=True)["tracks"]
    return tracks


def settings_of(*arguments: str) -> detector_training.Settings:
    return train_detector.parse_arguments(arguments).complete(Processes(), digits.CLASS_NAMES)


# The data set.


def test_a_picture_depends_on_its_seed_split_and_index_alone() -> None:
    one, other = (digits.DigitsOnPhotographs("train", 4, side=128, seed=5) for _ in range(2))
    forward, backward = [one.scene(i) for i in range(4)], [other.scene(i) for i in (3, 2, 1, 0)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.boxes, b.boxes)
        assert np.array_equal(a.labels, b.labels)
    assert len({scene.image.tobytes() for scene in forward}) == 4
    assert not np.array_equal(forward[0].image, digits.DigitsOnPhotographs("train", 4, 128, seed=6).scene(0).image)
    assert not np.array_equal(forward[0].image, digits.DigitsOnPhotographs("test", 4, 128, seed=5).scene(0).image)


def test_the_splits_share_no_photograph_and_no_digit() -> None:
    scenes = {split: [digits.make_scene(split, i, 96, seed=0) for i in range(100)] for split in ("train", "test")}
    photographs = {split: {scene.photograph for scene in made} for split, made in scenes.items()}
    instances = {split: {int(d) for scene in made for d in scene.digits} for split, made in scenes.items()}
    assert photographs["train"] == set(digits.photographs("train"))
    assert photographs["test"] == set(digits.photographs("test"))
    assert not photographs["train"] & photographs["test"]
    assert not instances["train"] & instances["test"]
    # Every class is in both.
    for made in scenes.values():
        assert {int(label) for scene in made for label in scene.labels} == set(range(1, 11))


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for cached in (digits._digit_images, digits._photograph, digits.photographs):
        cached.cache_clear()
    names = {digits.make_scene(split, i, 96, seed=1).photograph for split in ("train", "test") for i in range(40)}
    assert {"china.jpg", "flower.jpg"} < names


def test_sizes_span_the_pyramid() -> None:
    scenes = [digits.make_scene("train", i, 256, seed=0) for i in range(120)]
    sides = np.concatenate([(scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1) for scene in scenes])
    assert 11 <= sides.min() <= 13
    assert 150 <= sides.max() <= 161
    # Log-uniform: an equal share to each of the octaves 12-24, 24-48, 48-96; 96-160 has less, and is crowded out more.
    shares = np.histogram(sides, bins=(0, 24, 48, 96, 200))[0] / len(sides)
    assert shares.min() > 0.1
    large = np.concatenate([digits.make_scene("train", i, 128, seed=0, smallest=24).boxes for i in range(40)])
    assert 23 <= (large[:, 2:] - large[:, :2]).max(axis=1).min() <= 26


def test_boxes_are_tight_around_the_ink() -> None:
    edges, lit = 0, 0
    for index in range(40):
        scene = digits.make_scene("test", index, 192, seed=2)
        changed = (scene.image != scene.background).any(axis=2)
        covered = np.zeros_like(changed)
        for x1, y1, x2, y2 in scene.boxes.astype(int):
            covered[y1:y2, x1:x2] = True
            ink = changed[y1:y2, x1:x2]
            edges += 4
            lit += sum(edge.any() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
        assert not (changed & ~covered).any()
    # One edge in a hundred may be drawn in just the colour that the photograph has there.
    assert edges > 500
    assert lit >= 0.99 * edges


def test_digits_hide_little_of_each_other() -> None:
    for index in range(60):
        boxes = torch.from_numpy(digits.make_scene("train", index, 192, seed=4).boxes)
        corner, far = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
        shared = (far - corner).clamp_min(0).prod(dim=2).fill_diagonal_(0)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        assert (shared <= digits.MAX_OVERLAP * torch.minimum(areas[:, None], areas)).all()
        assert (boxes >= 0).all()
        assert (boxes <= 192).all()


def test_the_coco_dict_is_one_that_pycocotools_scores() -> None:
    coco = digits.DigitsOnPhotographs("test", 6, side=256, seed=0).coco()
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"]) > 6
    assert all(a["iscrowd"] == 0 and a["area"] == a["bbox"][2] * a["bbox"][3] for a in coco["annotations"])
    keys = ("image_id", "category_id", "bbox")
    perfect = [{key: a[key] for key in keys} | {"score": 1.0} for a in coco["annotations"]]
    scores = coco_data.average_precision(copy.deepcopy(coco), perfect)
    assert scores["AP"] == pytest.approx(1)
    assert (scores["AP_small"], scores["AP_medium"], scores["AP_large"]) == pytest.approx((1, 1, 1))
    shifted = [{**a, "bbox": [a["bbox"][0] + 500, *a["bbox"][1:]]} for a in perfect]
    assert coco_data.average_precision(copy.deepcopy(coco), shifted)["AP"] == 0
    assert coco_data.average_precision(copy.deepcopy(coco), [])["AP"] == 0
    sizes = ("", "_small", "_medium", "_large")
    assert coco_data.average_recall(copy.deepcopy(coco), []) == {
        f"AR_{n}{size}": 0 for n in (10, 100) for size in sizes
    }
    # The right boxes come after ten wrong ones.
    proposals = []
    for image_id in {a["image_id"] for a in coco["annotations"]}:
        corners = [[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]
                   for a in coco["annotations"] if a["image_id"] == image_id]  # fmt: skip
        wrong = torch.tensor([[500.0, 500.0, 510.0, 510.0]]).expand(10, 4)
        proposals += coco_data.proposals_as_coco(image_id, torch.cat([wrong, torch.tensor(corners)]), (3, 1))
    recall = coco_data.average_recall(copy.deepcopy(coco), proposals)
    assert {recall[f"AR_10{size}"] for size in sizes} == {0}
    assert [recall[f"AR_100{size}"] for size in sizes] == pytest.approx([1] * 4)


def test_export_is_read_back_as_it_was_made(exported: Path) -> None:
    made = digits.DigitsOnPhotographs("train", 4, side=64, seed=3)
    read = coco_data.CocoImages(coco_data.read_annotations(exported), exported.with_suffix(""))
    assert read.class_names == digits.CLASS_NAMES
    for index in range(4):
        (image, target), (expected_image, expected) = read[index], made[index]
        assert torch.equal(image, expected_image)
        for key in ("boxes", "labels", "image_id"):
            assert torch.equal(target[key], expected[key])


def test_batches_depend_on_the_step_alone() -> None:
    whole = list(coco_data.StepBatches(7, 3, seed=1, first=0, last=9))
    assert whole[4:] == list(coco_data.StepBatches(7, 3, seed=1, first=4, last=9))
    assert whole != list(coco_data.StepBatches(7, 3, seed=2, first=0, last=9))
    seen = [index for batch in whole for index in batch]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))


# Training.


def test_a_resumed_run_equals_one_that_was_not_interrupted(output: Path) -> None:
    parts = output.with_name("parts")
    assert train(output, "--backend", "eager", "--steps", 4) == 0
    assert train(parts, "--backend", "eager", "--steps", 2) == 0
    assert train(parts, "--backend", "eager", "--steps", 4, "--resume") == 0
    whole, resumed = figures_of(output)["eager"], figures_of(parts)["eager"]
    assert len(set(whole["losses"])) == 4
    assert resumed["losses"] == whole["losses"]
    assert resumed["test"] == whole["test"]
    states = [saved_in(folder)[0] for folder in (output, parts)]
    for part in ("model", "average"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    assert not list(parts.glob("*.tmp"))


def test_compare_trains_both_models_alike_and_writes_every_artefact(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(output, "--compare", "--steps", 3) == 0
    figures = figures_of(output)
    eager, fused = figures["eager"], figures["fused"]
    assert eager["swapped"] is None
    assert [entry["name"] for entry in fused["swapped"]["swapped"]] == [
        *("transform", "backbone.fpn", "rpn", "rpn.anchor_generator", "roi_heads", "roi_heads.box_roi_pool")
    ]
    assert len(eager["losses"]) == len(fused["losses"]) == figures["steps"] == 3
    # Loss of a few units in float32, from some 10^3 terms: rounding alone.
    difference = figures["loss_difference"]
    assert difference["first_step"] == abs(eager["losses"][0] - fused["losses"][0]) <= 1e-5
    assert difference["largest"] == max(abs(a - b) for a, b in zip(eager["losses"], fused["losses"], strict=True))
    assert difference["largest"] <= 0.05
    assert difference["at_equal_weights"]["loss"] <= 1e-5
    assert difference["at_equal_weights"]["gradient_relative"] <= 1e-3
    assert list(figures["stages"]) == ["pyramid", "RPN", "RoI pooling"]
    for stage, channels in zip(figures["stages"].values(), ([32, 64, 96, 128], [32] * 5, [32] * 5), strict=True):
        assert set(stage["median_seconds"]) == {"eager", "fused"}
        assert min(stage["median_seconds"].values()) > 0
        assert [shape[1] for shape in stage["maps"]] == channels
    assert all(len(track["step_seconds"]) == 3 and min(track["step_seconds"]) > 0 for track in (eager, fused))
    assert eager["test"]["images"] == fused["test"]["images"] == 2
    assert 0 < fused["test"]["proposals"]["AR_100"] <= 1
    for picture in ("detections.png", "loss_curves.png", "pyramid.png"):
        with Image.open(output / picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").histogram()) - image.convert("L").histogram().count(0) > 20
        assert str(output / picture) in figures["pictures"]
    printed = capsys.readouterr().out
    rows = ("training step, median", "inference, per image", "pyramid,", "RPN,", "RoI pooling,", "AP / AP50")
    for wanted in (*rows, "slower with fpn_fast:", "largest loss difference", "pyramid.png", "figures.json"):
        assert wanted in printed
    # The report of accelerate() comes first.
    table = printed[printed.index("training step") :]
    assert max(map(len, table.replace(str(output), "runs/train_detector").splitlines())) <= 100


def test_without_roundings_both_models_stay_the_same(output: Path) -> None:
    """In a long run roundings of float32 grow, as they decide between proposals that are nearly equal. Those of float64
    do not: what the kernels did otherwise would show."""
    assert train(output, "--compare", "--steps", 25, "--float64") == 0
    figures = figures_of(output)
    # The losses are read in float32.
    np.testing.assert_allclose(figures["fused"]["losses"], figures["eager"]["losses"], rtol=2e-7)
    assert figures["loss_difference"]["at_equal_weights"]["gradient_relative"] <= 1e-12
    assert figures["fused"]["test"] == figures["eager"]["test"]


def test_the_table_says_what_was_slower() -> None:
    track = {"step_seconds_median": 0.2, "test_seconds_per_image": 0.05, "losses": [1.0], "test": {"images": 1}}
    track["test"] |= dict.fromkeys(("AP", "AP50", "AP_small", "AP_medium", "AP_large"))
    figures: dict[str, Any] = {"eager": track, "fused": track | {"step_seconds_median": 0.4}}
    figures["stages"] = {"RPN": {"median_seconds": {"eager": 0.02, "fused": 0.01}}}
    figures |= {"loss_difference": {"largest": 0}, "pictures": [], "steps": 1, "ended_by": "steps", "backend": "cpp"}
    figures |= {"device": "cpu", "threads": 1, "processes": 1}
    table = detector_report.table(figures, ["eager", "fused"], Path("run"))
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "training step, median 200.0 ms 400.0 ms 0.50x (slower)" in lines
    assert "RPN, forward and backward 20.0 ms 10.0 ms 2.00x faster" in lines
    assert "slower with fpn_fast: training step, median" in lines


def test_progress_names_phase_step_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", "step", 10, initial=4) as bar:
        for _ in range(6):
            bar.update()
    with Progress("testing", "image", 9, limit=3600) as bar:
        bar.update(1)
        bar.refresh()
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    # No terminal: a line at the start and one at the end, as nothing took LINE_SECONDS.
    assert lines[:2] == ["training: step 4 of 10, unknown time left", "training: step 10 of 10, 00:00 left"]
    assert lines[2] in ("testing: image 0 of 9, 59:59 left", "testing: image 0 of 9, 1:00:00 left")
    assert lines[3].startswith("testing: image 1 of 9, 0")


def test_a_time_budget_ends_a_run_that_amp_can_go_on_from(output: Path) -> None:
    assert train(output, "--amp", "--steps", 50, "--time-budget", 0.001) == 0
    figures = figures_of(output)
    assert figures["ended_by"] == "time budget"
    assert figures["steps"] == 1
    assert {figures["stages"][name]["dtype"] for name in ("RPN", "RoI pooling")} == {"torch.bfloat16"}
    # Another backend may go on: the weights are the same.
    assert train(output, "--amp", "--steps", 2, "--resume", "--backend", "eager") == 0
    resumed = figures_of(output)["eager"]["losses"]
    assert resumed[:1] == figures["fused"]["losses"]
    assert len(resumed) == 2


def test_an_interrupt_ends_the_step_and_leaves_a_checkpoint(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = detector_training.Track.step

    def interrupted(track: detector_training.Track, batch: Any, number: int, settings: Any) -> None:
        if number == 1 and track.name == "eager":
            os.kill(os.getpid(), signal.SIGINT)
        step(track, batch, number, settings)

    monkeypatch.setattr(detector_training.Track, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert train(output, "--compare", "--steps", 9) == 130
    assert signal.getsignal(signal.SIGINT) is before
    saved = saved_in(output)
    assert [len(track["losses"]) for track in saved] == [2, 2]
    assert "interrupted after 2 steps" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(output, "--backend", "eager", "--steps", 9, "--lr", "1e30") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: the eager model's loss is not finite at step")
    assert not (output / "checkpoint.pt").exists()


def test_a_run_that_was_killed_resumes_with_identical_losses(output: Path, unreported: None) -> None:
    """In the middle of an epoch, with random flips and sizes, and without a chance to say goodbye."""
    arguments = ["--backend", "eager", "--train-images", 5, "--flip", "--multi-scale", 64, 96, "--accumulate", 2]
    killed = output.with_name("killed")
    script = str(Path(train_detector.__file__))
    command = [sys.executable, script, *SMALL, "--output", killed, *arguments, "--checkpoint-every", 2, "--steps", 999]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 540
    try:
        while not (killed / "checkpoint.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    done = len(saved_in(killed)[0]["losses"])
    # What a kill in the middle of writing would leave.
    (killed / "checkpoint.pt.tmp").write_bytes(b"half of a checkpoint")
    assert train(killed, *arguments, "--steps", done + 2, "--resume") == 0
    assert train(output, *arguments, "--steps", done + 2) == 0
    assert saved_in(killed)[0]["losses"] == saved_in(output)[0]["losses"]
    assert not list(killed.glob("*.tmp"))


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_deterministic_runs_are_equal_bit_for_bit(backend: str, output: Path, unreported: None) -> None:
    runs = [output.with_name("one"), output.with_name("other")]
    try:
        for run in runs:
            arguments = ("--backend", backend, "--deterministic", "--batch-size", 2, "--steps", 2)
            assert train(run, *arguments) == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (saved_in(run)[0] for run in runs)
    assert one["losses"] == other["losses"]
    for part in ("model", "average"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
    for name, state in one["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], other["optimizer"]["state"][name]["exp_avg_sq"]), name


def test_a_loss_that_is_not_finite_loses_no_checkpoint(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses_of = detector_training.losses_of

    def spoilt(model: Any, batch: Any, step: int, settings: Any, place: int = 0) -> dict[str, torch.Tensor]:
        losses = losses_of(model, batch, step, settings, place)
        return losses | {"loss_objectness": losses["loss_objectness"] / (0 if (step, place) == (2, 1) else 1)}

    monkeypatch.setattr(detector_training, "losses_of", spoilt)
    arguments = ("--backend", "eager", "--steps", 9, "--checkpoint-every", 1, "--accumulate", 2)
    assert train(output, *arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    # The second batch of the third step is the sixth picture of the epoch.
    image = list(coco_data.StepBatches(4000, 1, 0, 0, 6))[5][0] + 1
    assert f"at step 3 (images {image}: loss_classifier " in message
    assert "loss_objectness inf" in message
    # The two steps before it are safe, and weights that were not spoilt.
    saved = saved_in(output)[0]
    assert len(saved["losses"]) == 2
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_tensorboard_that_is_not_installed_is_one_clear_line(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert_refused(train(output, "--tensorboard", "--steps", 1), "pip install tensorboard", capsys)


# Data of one's own.


def test_coco_trains_with_what_the_format_allows(
    exported: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = json.loads(exported.read_text())
    # Ids with gaps, an image without annotations, optional keys left out, a crowd, two boxes without area.
    for category in coco["categories"]:
        category["id"] = 7 * category["id"] + 3
    for annotation in coco["annotations"]:
        annotation["category_id"] = 7 * annotation["category_id"] + 3
        del annotation["iscrowd"], annotation["area"]
    first = coco["images"][0]["id"]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != first]
    like = coco["annotations"][0]
    coco["annotations"] += [{**like, "bbox": box} for box in ([5, 5, 0, 9], [900, 5, 4, 4])]
    coco["annotations"] += [{**like, "bbox": [0, 0, 30, 30], "iscrowd": 1}]
    annotations = written(coco, tmp_path)
    assert train(output, "--coco", annotations, exported.with_suffix(""), "--backend", "auto", "--steps", 3) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [f"warning: dropped 2 boxes of {annotations} that have no area inside their image"]
    figures = figures_of(output)
    assert len(figures["fused"]["losses"]) == 3
    # One image in five is held out, at least one.
    assert figures["fused"]["test"]["images"] == 1


def test_labels_follow_the_order_of_category_ids(exported: Path) -> None:
    coco = json.loads(exported.read_text())
    coco["categories"] = [{"id": 40, "name": "late"}, {"id": 9, "name": "early"}]
    coco["annotations"] = [{"image_id": 1, "category_id": 40, "bbox": [1, 2, 3, 4]}]
    coco["annotations"] += [{"image_id": 2, "category_id": 9, "bbox": [1, 2, 3, 4]}]
    checked = coco_data._complete(coco, exported, exported.with_suffix(""))
    data = coco_data.CocoImages(checked, exported.with_suffix(""))
    assert (data.class_names, data.category_ids) == (("early", "late"), (9, 40))
    assert [data[i][1]["labels"].tolist() for i in range(3)] == [[2], [1], []]
    assert data[0][1]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert data[2][1]["boxes"].shape == (0, 4)
    found = {"boxes": torch.tensor([[1.0, 2, 4, 6]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
    assert coco_data.detections_as_coco(1, found, data.category_ids) == [
        {"image_id": 1, "category_id": 40, "bbox": [1, 2, 3, 4], "score": 0.5}
    ]


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda coco: coco.pop(key)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no images": (without("images"), "has no list 'images'"),
    "no categories": (without("categories"), "has no list 'categories'"),
    "empty": (lambda coco: coco.update(images=[], annotations=[]), "has no images"),
    "one image": (lambda coco: coco.update(images=coco["images"][:1], annotations=[]), "at least 2 images"),
    "no boxes": (lambda coco: coco.update(annotations=[]), "no box to learn from"),
    "no file name": (lambda coco: coco["images"][1].pop("file_name"), "images[1] has no 'file_name'"),
    "no box": (lambda coco: coco["annotations"][2].pop("bbox"), "annotations[2] has no 'bbox'"),
    "short box": (lambda coco: coco["annotations"][0].update(bbox=[1, 2]), "bbox must be 4 finite numbers"),
    "infinite box": (lambda coco: coco["annotations"][0].update(bbox=[1, 2, 3, 1e999]), "4 finite numbers"),
    "other image": (lambda coco: coco["annotations"][0].update(image_id=99), "image_id 99 is not in the file"),
    "other class": (lambda coco: coco["annotations"][0].update(category_id=77), "category_id 77 is not in the file"),
    "same ids": (lambda coco: coco["images"][0].update(id=2), "images must have distinct ids"),
    "no such file": (lambda coco: coco["images"][0].update(file_name="gone.png"), "image gone.png of"),
    "not an entry": (lambda coco: coco["images"].append(3), "images[4] has no 'id'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_annotations_are_one_clear_line(
    case: str, exported: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = BROKEN[case]
    coco = json.loads(exported.read_text())
    spoil(coco)
    annotations = written(coco, tmp_path)
    assert_refused(train(output, "--coco", annotations, exported.with_suffix("")), expected, capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "No such file"), (b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[]", "must hold a JSON object")],
)
def test_a_file_that_is_no_json_object_is_one_clear_line(
    content: bytes | None, expected: str, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = tmp_path / "annotations.json"
    if content is not None:
        annotations.write_bytes(content)
    assert_refused(train(output, "--coco", annotations, tmp_path), expected, capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_while_training_is_one_clear_line(
    workers: int, exported: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in exported.with_suffix("").iterdir():
        # The header is whole, so that the size can be read.
        (tmp_path / image.name).write_bytes(image.read_bytes()[:300])
    code = train(output, "--coco", exported, tmp_path, "--backend", "eager", "--steps", 1, "--workers", workers)
    assert_refused(code, "cannot read image", capsys)


def test_resume_without_a_fitting_checkpoint_is_one_clear_line(
    output: Path, capsys: pytest.CaptureFixture[str], unreported: None
) -> None:
    eager = ("--backend", "eager", "--steps", 1)
    assert_refused(train(output, *eager, "--resume"), "there is no checkpoint", capsys)
    (output / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert_refused(train(output, *eager, "--resume"), "is not a checkpoint of this script", capsys)
    assert train(output, *eager) == 0
    capsys.readouterr()
    assert_refused(train(output, *eager, "--resume", "--seed", 1), "was trained with seed 0, this run has 1", capsys)
    assert_refused(train(output, "--compare", "--resume", "--steps", 2), "was written without --compare", capsys)


def test_a_backend_that_cannot_serve_is_one_clear_line(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # Earlier tests may have chosen Triton's interpreter.
    monkeypatch.setattr(backends, "_chosen", {})
    assert_refused(train(output, "--backend", "triton", "--steps", 1), "triton", capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--steps", "0"),
        ("--lr", "nan"),
        ("--compare", "--backend", "eager"),
        ("--float64", "--amp"),
        ("--image-size", "8"),
        ("--channels", "48", "--model", "fcos"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: tuple[str, ...], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(output, *arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", [train_detector, ablation, digits])
def test_help_says_what_each_option_does_and_its_default(script: Any) -> None:
    for action in script.build_parser()._actions:
        assert action.help, action.dest
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "(default: " in action.help, action.dest


def test_threads_that_wait_do_not_spin() -> None:
    # It has to be said before torch is imported, which fails here.
    code = ("import os, sys; sys.modules['torch'] = None\ntry: import train_detector\n"
            "except ImportError: print(os.environ['OMP_WAIT_POLICY'])")  # fmt: skip
    folder = Path(train_detector.__file__).parent
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
        command = [sys.executable, "-c", code]
        printed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        assert printed.stdout.strip() == expected


# Models.


@pytest.mark.parametrize(
    ("backbone", "two_stage", "channels"),
    [("resnet50", True, 4), ("efficientnet_b0", False, 3), ("convnext_tiny", True, 4), ("regnet_y_400mf", False, 3)],
)
def test_a_backbone_gives_the_levels_that_its_strides_say(backbone: str, two_stage: bool, channels: int) -> None:
    body = detector_models.build_backbone(backbone, two_stage, "group", 0, False, "fpn").eval()
    with torch.no_grad():
        maps = body(torch.zeros(1, 3, 128, 128))
    first = 4 if two_stage else 8
    assert [each.shape[1:] for each in maps.values()] == [(256, s, s) for s in (128 // first >> i for i in range(5))]
    assert len(body.fpn.inner_blocks) == channels


@pytest.mark.parametrize("backbone", ["alexnet", "vit_b_16", "nothing"])
def test_a_backbone_without_stages_is_one_clear_line(
    backbone: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(train(output, "--backbone", backbone, "--backend", "eager", "--steps", 1), backbone, capsys)


@pytest.mark.parametrize("pyramid", ["fpn", "no-top-down", "c4"])
def test_weights_have_torchvisions_names(pyramid: str) -> None:
    ours = detector_models.build_detector("faster_rcnn", "resnet18", 2, 64, norm="batch", pyramid=pyramid)
    theirs = torchvision.models.detection.FasterRCNN(
        torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d
        ),
        3,
    )
    names = {name.split(".layer_blocks")[0].split(".inner_blocks")[0] for name in ours.state_dict()}
    assert {name for name in names if not name.startswith("backbone.body.layer4")} <= {
        name.split(".layer_blocks")[0].split(".inner_blocks")[0] for name in theirs.state_dict()
    }
    if pyramid == "fpn":
        assert set(ours.state_dict()) == set(theirs.state_dict())


def test_the_pyramid_without_a_top_down_pathway_takes_nothing_from_above() -> None:
    pyramid = detector_models.NoTopDownPyramid([4, 4], 8).double()
    maps = {"0": torch.rand(1, 4, 8, 8).double(), "1": torch.rand(1, 4, 4, 4).double().requires_grad_()}
    finest = pyramid(maps)["0"]
    assert torch.equal(finest, pyramid.layer_blocks[0](pyramid.inner_blocks[0](maps["0"])))
    assert torch.autograd.grad(finest.sum(), maps["1"], allow_unused=True) == (None,)


@pytest.mark.parametrize(("norm", "kind"), [("group", torch.nn.GroupNorm), ("batch", torch.nn.BatchNorm2d)])
def test_frozen_stages_keep_their_weights_and_statistics(norm: str, kind: type) -> None:
    body = detector_models.build_backbone("resnet18", True, norm, 2, False, "fpn").body
    assert isinstance(body.layer2[0].bn1, kind)
    assert isinstance(body.layer1[0].bn1, torch.nn.GroupNorm if norm == "group" else FrozenBatchNorm2d)
    trained = {name for name, parameter in body.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}
    before = {name: value.clone() for name, value in body.state_dict().items()}
    body.train()(torch.rand(2, 3, 64, 64))
    changed = {name for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith(("layer2", "layer3", "layer4")) for name in changed)
    assert bool(changed) == (norm == "batch")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "retinanet", "--backbone", "mobilenet_v3_large", "--frozen-stages", 2, "--norm", "batch"),
        ("--model", "fcos", "--norm", "frozen", "--multi-scale", 64, 96, "--flip", "--accumulate", 2, "--channels", 64),
        ("--pyramid", "c4", "--channels-last", "--evaluate-every", 1),
    ],
)
def test_models_of_other_kinds_train(arguments: tuple[object, ...], output: Path) -> None:
    assert train(output, *arguments, "--steps", 2) == 0
    figures = figures_of(output)
    assert len(figures["fused"]["losses"]) == 2
    assert figures["fused"]["test"]["images"] == 2
    assert ("RoI pooling" in figures["stages"]) == ("c4" in arguments)
    assert [entry["step"] for entry in figures["test_history"]] == ([1] if "--evaluate-every" in arguments else [])
    frozen = "--frozen-stages" in arguments
    weights = saved_in(output)[0]
    # The average has moved off the initial weights wherever these were trained.
    stem = next(name for name in weights["model"] if name.startswith("backbone.body.") and name.endswith("weight"))
    assert torch.equal(weights["model"][stem], weights["average"][stem]) == frozen


def test_mask_rcnn_learns_the_masks_of_the_digits(output: Path) -> None:
    assert train(output, "--model", "mask_rcnn", "--static-sampling", "--steps", 1) == 0
    figures = figures_of(output)
    assert set(figures["fused"]["test"]["masks"]) >= {"AP", "AP50", "AP_small"}
    assert "roi_heads.mask_roi_pool" in [entry["name"] for entry in figures["fused"]["swapped"]["swapped"]]


# Augmentation.


def test_flipped_pictures_carry_their_boxes_and_masks() -> None:
    data = digits.DigitsOnPhotographs("train", 4, 96, masks=True)
    batch = coco_data.collate([data[i] for i in range(4)])
    settings = settings_of("--flip")
    once = detector_training.flipped(batch, 3, 0, settings)
    assert detector_training.flipped(batch, 3, 0, settings_of()) is batch
    mirrored = [not torch.equal(a, b) for a, b in zip(batch[0], once[0], strict=True)]
    assert 0 < sum(mirrored) < 4
    for image, target in zip(*once, strict=True):
        assert image.shape == (3, 96, 96)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            ys, xs = torch.where(mask > 0)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    back = detector_training.flipped(once, 3, 0, settings)
    for ours, theirs in zip(back[1], batch[1], strict=True):
        assert torch.equal(ours["boxes"], theirs["boxes"])
        assert torch.equal(ours["masks"], theirs["masks"])


def test_masks_of_a_coco_file_are_those_that_were_written(exported: Path) -> None:
    made = digits.DigitsOnPhotographs("train", 4, side=64, seed=3, masks=True)
    read = coco_data.load_coco(exported, exported.with_suffix(""), masks=True)
    for index in range(4):
        assert torch.equal(read[index][1]["masks"], made[index][1]["masks"])


@pytest.mark.parametrize(
    "segmentation", [None, [], [[1, 2]], {"size": [64, 64], "counts": 7}, {"size": [9, 9], "counts": [81]}]
)
def test_masks_that_cannot_be_drawn_are_one_clear_line(
    segmentation: object, exported: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = json.loads(exported.read_text())
    coco["annotations"][1]["segmentation"] = segmentation
    annotations = written(coco, tmp_path)
    arguments = ("--coco", annotations, exported.with_suffix(""), "--model", "mask_rcnn")
    assert_refused(train(output, *arguments), f"image {coco['annotations'][1]['image_id']}", capsys)


def test_polygons_are_drawn(exported: Path) -> None:
    square = coco_data._mask_of({"segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]}, (10, 12))
    expected = np.zeros((10, 12))
    expected[3:8, 2:6] = 1
    assert np.array_equal(square, expected)


def test_perfect_masks_score_one() -> None:
    data = digits.DigitsOnPhotographs("test", 4, side=192, seed=0)
    keys = ("image_id", "category_id", "bbox", "segmentation")
    perfect = [{key: a[key] for key in keys} | {"score": 1.0} for a in data.coco()["annotations"]]
    assert coco_data.average_precision(data.coco(), perfect, "segm")["AP"] == pytest.approx(1)
    boxes_alone = [{**a, "segmentation": coco_data.encode_mask(np.ones((192, 192), bool))} for a in perfect]
    assert coco_data.average_precision(data.coco(), boxes_alone)["AP"] == pytest.approx(1)
    assert coco_data.average_precision(data.coco(), boxes_alone, "segm")["AP"] < 0.1


def assert_refused(code: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line of error; a line of progress may come before it."""
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if line.strip() and not line.startswith("training: ")]
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert expected in errors[0]
    assert "Traceback" not in printed
