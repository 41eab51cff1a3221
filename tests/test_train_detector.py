# SPDX-License-Identifier: Apache-2.0
"""examples/train_detector.py and its parts, on images of 64 pixels."""

from helpers.examples import SMALL, figures_of, saved_in, tidied, train  # isort: skip

import argparse
import copy
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ablation
import coco_data
import coco_files
import detector_models
import detector_report
import detector_training
import digits_on_photographs as digits
import numpy as np
import pytest
import static_batches
import torch
import torchvision
import train_detector
from PIL import Image
from processes import Processes, Progress
from torchvision.ops.misc import FrozenBatchNorm2d

from fpn_fast import backends

EAGER = ("--backend", "eager", "--steps")


@pytest.fixture
def unreported(monkeypatch):
    """For tests that read the checkpoint alone."""
    monkeypatch.setattr(train_detector, "report", lambda *_: None)


@pytest.fixture
def output(tmp_path):
    with tidied(tmp_path):
        yield tmp_path / "run"


@pytest.fixture
def refused(output, capsys):
    """Train, and expect exit code 2 and a line of error per fault; lines of progress may come before."""

    def check(expected, *arguments, lines=1):
        capsys.readouterr()
        code = train(output, *arguments)
        printed = capsys.readouterr().err
        shown = [line for line in printed.splitlines() if line.strip()]
        errors = [line for line in shown if not line.startswith(("training: ", "checking "))]
        assert code == 2
        assert len(errors) == lines
        assert all(line.startswith("error: ") for line in errors)
        assert expected in errors[0]
        assert "Traceback" not in printed

    return check


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Annotations of four images on disk, with masks; the images are in the folder of the same name."""
    return digits.DigitsOnPhotographs("train", 4, side=64, seed=3).export(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def images(exported):
    return exported.with_suffix("")


@pytest.fixture
def coco(exported):
    return json.loads(exported.read_text())


@pytest.fixture
def annotations(tmp_path):
    """Where a test writes annotations of its own."""
    return tmp_path / "annotations.json"


def settings_of(*arguments):
    return train_detector.parse_arguments(arguments).complete(Processes(), digits.CLASS_NAMES)


def assert_same_weights(one, other):
    """Of two tracks' checkpoints, the trained ones and their average."""
    for part in ("model", "average"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name


def test_a_picture_depends_on_its_seed_split_and_index_alone():
    one, other = (digits.DigitsOnPhotographs("train", 4, side=128, seed=5) for _ in range(2))
    forward, backward = [one.scene(i) for i in range(4)], [other.scene(i) for i in (3, 2, 1, 0)][::-1]
    for a, b in zip(forward, backward, strict=True):
        for part in ("image", "boxes", "labels"):
            assert np.array_equal(getattr(a, part), getattr(b, part))
    assert len({scene.image.tobytes() for scene in forward}) == 4
    assert not np.array_equal(forward[0].image, digits.DigitsOnPhotographs("train", 4, 128, seed=6).scene(0).image)
    assert not np.array_equal(forward[0].image, digits.DigitsOnPhotographs("test", 4, 128, seed=5).scene(0).image)


def test_the_splits_share_no_photograph_and_no_digit():
    scenes = {split: [digits.make_scene(split, i, 96, seed=0) for i in range(100)] for split in ("train", "test")}
    photographs = {split: {scene.photograph for scene in made} for split, made in scenes.items()}
    instances = {split: {int(d) for scene in made for d in scene.digits} for split, made in scenes.items()}
    assert not photographs["train"] & photographs["test"]
    assert not instances["train"] & instances["test"]
    for split, made in scenes.items():
        assert photographs[split] == set(digits.photographs(split))
        assert {int(label) for scene in made for label in scene.labels} == set(range(1, 11))


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for cached in (digits._digit_images, digits._photograph, digits.photographs):
        cached.cache_clear()
    names = {digits.make_scene(split, i, 96, seed=1).photograph for split in ("train", "test") for i in range(40)}
    assert {"china.jpg", "flower.jpg"} < names


def test_sizes_span_the_pyramid():
    scenes = [digits.make_scene("train", i, 256, seed=0) for i in range(120)]
    sides = np.concatenate([(scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1) for scene in scenes])
    assert 11 <= sides.min() <= 13
    assert 150 <= sides.max() <= 161
    # Log-uniform: an equal share to each of the octaves 12-24, 24-48, 48-96; 96-160 has less, and is crowded out more.
    shares = np.histogram(sides, bins=(0, 24, 48, 96, 200))[0] / len(sides)
    assert shares.min() > 0.1
    large = np.concatenate([digits.make_scene("train", i, 128, seed=0, smallest=24).boxes for i in range(40)])
    assert 23 <= (large[:, 2:] - large[:, :2]).max(axis=1).min() <= 26


def test_boxes_are_tight_around_the_ink():
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


def test_digits_hide_little_of_each_other():
    for index in range(60):
        boxes = torch.from_numpy(digits.make_scene("train", index, 192, seed=4).boxes)
        corner, far = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
        shared = (far - corner).clamp_min(0).prod(dim=2).fill_diagonal_(0)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        assert (shared <= digits.MAX_OVERLAP * torch.minimum(areas[:, None], areas)).all()
        assert (boxes >= 0).all()
        assert (boxes <= 192).all()


def test_the_coco_dict_is_one_that_pycocotools_scores():
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
    nothing = {f"AR_{n}{size}": 0 for n in (10, 100) for size in sizes}
    assert coco_data.average_recall(copy.deepcopy(coco), []) == nothing
    # The right boxes come after ten wrong ones.
    proposals = []
    for image_id in {a["image_id"] for a in coco["annotations"]}:
        right = torch.tensor([a["bbox"] for a in coco["annotations"] if a["image_id"] == image_id])
        wrong = torch.tensor([[500.0, 500.0, 10.0, 10.0]]).expand(10, 4)
        boxes = torchvision.ops.box_convert(torch.cat([wrong, right]), "xywh", "xyxy")
        proposals += coco_data.proposals_as_coco(image_id, boxes, (3, 1))
    recall = coco_data.average_recall(copy.deepcopy(coco), proposals)
    assert {recall[f"AR_10{size}"] for size in sizes} == {0}
    assert [recall[f"AR_100{size}"] for size in sizes] == pytest.approx([1] * 4)


def test_export_is_read_back_as_it_was_made(exported, images):
    made = digits.DigitsOnPhotographs("train", 4, side=64, seed=3, masks=True)
    read = coco_data.load_coco(exported, images, masks=True)
    assert read.class_names == digits.CLASS_NAMES
    for index in range(4):
        (image, target), (expected_image, expected) = read[index], made[index]
        assert torch.equal(image, expected_image)
        for key in ("boxes", "labels", "image_id", "masks"):
            assert torch.equal(target[key], expected[key])


def test_batches_depend_on_the_step_alone():
    whole = list(coco_data.StepBatches(7, 3, 1, range(9)))
    assert whole[4:] == list(coco_data.StepBatches(7, 3, 1, range(4, 9)))
    assert whole != list(coco_data.StepBatches(7, 3, 2, range(9)))
    seen = [index for batch in whole for index in batch]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))


def test_batches_of_buckets_have_one_bucket_each_and_every_image():
    buckets = [0, 1, 0, 0, 1, 0, 0]
    whole = list(static_batches.BucketBatches(buckets, 2, 1, range(8)))
    assert whole[3:] == list(static_batches.BucketBatches(buckets, 2, 1, range(3, 8)))
    assert all(len({buckets[index] for index in batch}) == 1 for batch in whole)
    # Three batches of the first bucket, one of the second.
    for epoch in (whole[:4], whole[4:]):
        assert {index for batch in epoch for index in batch} == set(range(7))
    assert whole[:4] != whole[4:]


def test_a_canvas_holds_every_image_of_its_bucket():
    sizes = [(60, 100), (70, 70), (100, 90), (100, 20)]
    assert static_batches.canvases_of(sizes, 100, None) == [[(128, 192)], [(192, 128)]]
    several = static_batches.canvases_of(sizes[:2], 100, (64, 128))
    assert several == [[(64, 128), (96, 160), (128, 224)], []]


def test_a_static_run_repeats_resumes_and_draws_canvases(coco, images, annotations, output):
    """On images of both kinds: two are cut to half their width, and have no boxes."""
    folder = annotations.with_suffix("")
    folder.mkdir()
    for i, entry in enumerate(coco["images"]):
        entry["width"] //= 2 if i < 2 else 1
        with Image.open(images / entry["file_name"]) as picture:
            picture.crop((0, 0, entry["width"], entry["height"])).save(folder / entry["file_name"])
    cut = {entry["id"] for entry in coco["images"][:2]}
    coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] not in cut]
    annotations.write_text(json.dumps(coco))
    arguments = ("--coco", annotations, folder, "--static", "--multi-scale", 64, 96, "--batch-size", 2, "--flip")
    parts = output.with_name("parts")
    assert train(output, *arguments, "--steps", 3) == 0
    assert train(parts, *arguments, "--steps", 1) == 0
    assert train(parts, *arguments, "--steps", 3, "--resume") == 0
    assert figures_of(parts)["fused"]["losses"] == figures_of(output)["fused"]["losses"]
    assert_same_weights(saved_in(output)[0], saved_in(parts)[0])


def test_static_excludes_what_it_cannot_do():
    for wrong in (("--backend", "eager"), ("--compare",), ("--static-sampling",)):
        with pytest.raises(SystemExit):
            train_detector.parse_arguments(("--static", *wrong))
    with pytest.raises(SystemExit):
        train_detector.parse_arguments(("--compile",))


def test_a_resumed_run_equals_one_that_was_not_interrupted(output):
    parts = output.with_name("parts")
    assert train(output, *EAGER, 4) == 0
    assert train(parts, *EAGER, 2) == 0
    assert train(parts, *EAGER, 4, "--resume", "--workers", 1) == 0
    whole, resumed = figures_of(output)["eager"], figures_of(parts)["eager"]
    assert len(set(whole["losses"])) == 4
    assert resumed["losses"] == whole["losses"]
    assert resumed["test"] == whole["test"]
    assert_same_weights(saved_in(output)[0], saved_in(parts)[0])
    assert not list(parts.glob("*.tmp"))


def test_compare_trains_both_models_alike_and_writes_every_artefact(output, capsys):
    assert train(output, "--compare", "--steps", 3) == 0
    figures = figures_of(output)
    eager, fused = figures["eager"], figures["fused"]
    assert eager["swapped"] is None
    assert [entry["name"] for entry in fused["swapped"]["swapped"]] == [
        "transform",
        *(f"backbone.body.layer{stage}" for stage in range(1, 5)),
        *("backbone.fpn", "rpn", "rpn.anchor_generator", "roi_heads", "roi_heads.box_roi_pool"),
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
            assert 256 - image.convert("L").histogram().count(0) > 20
        assert str(output / picture) in figures["pictures"]
    printed, progress = capsys.readouterr()
    assert "timing: stage 3 of 3" in progress
    rows = ("training step, median", "inference, per image", "pyramid,", "RPN,", "RoI pooling,", "AP / AP50")
    for wanted in (*rows, "slower with fpn_fast:", "largest loss difference", "pyramid.png", "figures.json"):
        assert wanted in printed
    # The report of accelerate() comes first.
    table = printed[printed.index("training step") :]
    assert max(map(len, table.replace(str(output), "runs/train_detector").splitlines())) <= 100


def test_the_demo_is_a_comparison_that_the_script_takes():
    makefile = (Path(train_detector.__file__).parents[1] / "Makefile").read_text().replace("\\\n", " ")
    (arguments,) = re.findall(r"examples/train_detector\.py (.+)", makefile)
    settings = train_detector.parse_arguments(shlex.split(arguments))
    assert settings.compare
    # Each drop of the learning rate is within the run.
    assert max(settings.lr_steps) < settings.steps


def test_without_roundings_both_models_stay_the_same(output):
    """In a long run roundings of float32 grow, as they decide between proposals that are nearly equal. Those of float64
    do not: what the kernels did otherwise would show."""
    assert train(output, "--compare", "--steps", 25, "--float64") == 0
    figures = figures_of(output)
    # The losses are read in float32.
    np.testing.assert_allclose(figures["fused"]["losses"], figures["eager"]["losses"], rtol=2e-7)
    assert figures["loss_difference"]["at_equal_weights"]["gradient_relative"] <= 1e-12
    assert figures["fused"]["test"] == figures["eager"]["test"]


def test_the_table_says_what_was_slower():
    track = {"step_seconds_median": 0.2, "test_seconds_per_image": 0.05, "losses": [1.0], "test": {"images": 1}}
    track["test"] |= dict.fromkeys(("AP", "AP50", "AP_small", "AP_medium", "AP_large"))
    figures = {"eager": track, "fused": track | {"step_seconds_median": 0.4}}
    figures["stages"] = {"RPN": {"median_seconds": {"eager": 0.02, "fused": 0.01}}}
    figures |= {"loss_difference": {"largest": 0}, "pictures": [], "steps": 1, "ended_by": "steps", "backend": "cpp"}
    figures |= {"device": "cpu", "threads": 1, "processes": 1}
    table = detector_report.table(figures, ["eager", "fused"], Path("run"))
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "training step, median 200.0 ms 400.0 ms 0.50x (slower)" in lines
    assert "RPN, forward and backward 20.0 ms 10.0 ms 2.00x faster" in lines
    assert "slower with fpn_fast: training step, median" in lines


def test_progress_names_phase_step_and_time_left(capsys):
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


def test_a_time_budget_ends_a_run_that_amp_can_go_on_from(output):
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


def test_an_interrupt_ends_the_step_and_leaves_a_checkpoint(output, monkeypatch, capsys):
    step = detector_training.Track.step

    def interrupted(track, batch, number, settings):
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


def test_an_interrupt_leaves_the_processes_that_load_images_alone(output, unreported, monkeypatch):
    scene = digits.DigitsOnPhotographs.scene

    def interrupted(data, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGINT)
        return scene(data, index)

    monkeypatch.setattr(digits.DigitsOnPhotographs, "scene", interrupted)
    assert train(output, *EAGER, 1, "--workers", 1) == 0


def test_an_interrupt_while_the_data_is_read_is_one_line(output, exported, images, monkeypatch, capsys):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(coco_files, "_check_image", interrupt)
    assert train(output, "--coco", exported, images, *EAGER, 1) == 130
    assert [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("checking ")] == [
        "interrupted"
    ]


def test_a_run_that_was_killed_resumes_with_identical_losses(output, unreported):
    """In the middle of an epoch, with random flips and sizes, and without a chance to say goodbye."""
    arguments = ["--backend", "eager", "--train-images", 5, "--flip", "--multi-scale", 64, 96, "--accumulate", 2]
    killed = output.with_name("killed")
    script = str(Path(train_detector.__file__))
    command = [sys.executable, script, *SMALL, "--output", killed, *arguments, "--checkpoint-every", 2, "--steps", 999]
    until = time.monotonic() + 540
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not (killed / "checkpoint.pt").exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            process.kill()
    done = len(saved_in(killed)[0]["losses"])
    # What a kill in the middle of writing would leave.
    (killed / "checkpoint.pt.tmp").write_bytes(b"half of a checkpoint")
    assert train(killed, *arguments, "--steps", done + 2, "--resume") == 0
    assert train(output, *arguments, "--steps", done + 2) == 0
    assert saved_in(killed)[0]["losses"] == saved_in(output)[0]["losses"]
    assert not list(killed.glob("*.tmp"))


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_deterministic_runs_are_equal_bit_for_bit(backend, output, unreported):
    runs = [output.with_name("one"), output.with_name("other")]
    try:
        for run in runs:
            assert train(run, "--backend", backend, "--deterministic", "--batch-size", 2, "--steps", 2) == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (saved_in(run)[0] for run in runs)
    assert one["losses"] == other["losses"]
    assert_same_weights(one, other)
    for name, state in one["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], other["optimizer"]["state"][name]["exp_avg_sq"]), name


def test_a_loss_that_is_not_finite_loses_no_checkpoint(output, monkeypatch, capsys):
    losses_of = detector_training.losses_of

    def spoilt(model, batch, step, settings, place=0):
        losses = losses_of(model, batch, step, settings, place)
        return losses | {"loss_objectness": losses["loss_objectness"] / (0 if (step, place) == (2, 1) else 1)}

    monkeypatch.setattr(detector_training, "losses_of", spoilt)
    assert train(output, *EAGER, 9, "--checkpoint-every", 1, "--accumulate", 2) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    # The second batch of the third step is the sixth picture of the epoch.
    image = list(coco_data.StepBatches(4000, 1, 0, range(6)))[5][0] + 1
    assert message.startswith(
        f"error: the eager model's loss is not finite at step 3 (images {image}: loss_classifier "
    )
    assert "loss_objectness inf" in message
    # The two steps before it are safe, and weights that were not spoilt.
    saved = saved_in(output)[0]
    assert len(saved["losses"]) == 2
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_tensorboard_that_is_not_installed_is_one_clear_line(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused("pip install tensorboard", "--tensorboard", "--steps", 1)


def test_coco_trains_with_what_the_format_allows(coco, images, annotations, output, capsys):
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
    annotations.write_text(json.dumps(coco))
    assert train(output, "--coco", annotations, images, "--backend", "auto", "--steps", 3) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: {annotations}: left out 2 boxes that have no area inside their image")
    figures = figures_of(output)
    assert len(figures["fused"]["losses"]) == 3
    # One image in five is held out, at least one.
    assert figures["fused"]["test"]["images"] == 1


@pytest.mark.parametrize("model", ["mask_rcnn", "retinanet"])
def test_the_longest_pictures_that_are_accepted_train(model, annotations, tmp_path, output, unreported):
    sizes = [(6 * coco_files.MAX_ASPECT, 6), (6, 6 * coco_files.MAX_ASPECT), (1, 1)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (90, 60 * i, 120)).save(tmp_path / f"{i}.png")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [
            {"image_id": i, "category_id": 1, "bbox": [0, 0, w, h], "segmentation": [[0, 0, w, 0, w, h, 0, h]]}
            for i, (w, h) in enumerate(sizes)
        ],
        "categories": [{"id": 1, "name": "all"}],
    }
    annotations.write_text(json.dumps(coco))
    files = ("--coco", annotations, tmp_path, "--coco-test", annotations, tmp_path)
    assert train(output, *files, "--model", model, *EAGER, 3, "--flip", "--eval-images", 3) == 0
    assert len(set(saved_in(output)[0]["losses"])) == 3


def test_labels_follow_the_order_of_category_ids(coco, images, annotations):
    coco["categories"] = [{"id": 40, "name": "late"}, {"id": 9, "name": "early"}]
    coco["annotations"] = [{"image_id": 1, "category_id": 40, "bbox": [1, 2, 3, 4]}]
    coco["annotations"] += [{"image_id": 2, "category_id": 9, "bbox": [1, 2, 3, 4]}]
    annotations.write_text(json.dumps(coco))
    data = coco_data.load_coco(annotations, images)
    assert (data.class_names, data.category_ids) == (("early", "late"), (9, 40))
    assert [data[i][1]["labels"].tolist() for i in range(3)] == [[2], [1], []]
    assert data[0][1]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert data[2][1]["boxes"].shape == (0, 4)
    found = {"boxes": torch.tensor([[1.0, 2, 4, 6]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
    assert coco_data.detections_as_coco(1, found, data.category_ids) == [
        {"image_id": 1, "category_id": 40, "bbox": [1, 2, 3, 4], "score": 0.5}
    ]


UNUSABLE = {
    "one image": (lambda coco: coco.update(images=coco["images"][:1], annotations=[]), "at least 2 images", 1),
    "no boxes": (lambda coco: coco.update(annotations=[]), "no box to learn from", 1),
    "no file name": (lambda coco: coco["images"][1].pop("file_name"), "images[1] (id 2): has no 'file_name'", 1),
    "two files": (lambda coco: [each.update(file_name="?") for each in coco["images"][:2]], "images[0] (id 1", 3),
}


@pytest.mark.parametrize(("spoil", "expected", "lines"), UNUSABLE.values(), ids=UNUSABLE)
def test_annotations_that_cannot_be_used_are_a_clear_line_each(
    spoil, expected, lines, coco, images, annotations, refused
):
    spoil(coco)
    annotations.write_text(json.dumps(coco))
    refused(expected, "--coco", annotations, images, lines=lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_while_training_is_one_clear_line(
    workers, exported, images, refused, tmp_path, monkeypatch
):
    for image in images.iterdir():
        (tmp_path / image.name).write_bytes(image.read_bytes())
    load_data = train_detector.load_data

    def break_after(*arguments):
        checked = load_data(*arguments)
        for image in images.iterdir():
            (tmp_path / image.name).write_bytes(image.read_bytes()[:300])
        return checked

    monkeypatch.setattr(train_detector, "load_data", break_after)
    refused("cannot read image", "--coco", exported, tmp_path, *EAGER, 1, "--workers", workers)


def test_resume_without_a_fitting_checkpoint_is_one_clear_line(output, refused, unreported):
    refused("there is no checkpoint", *EAGER, 1, "--resume")
    (output / "checkpoint.pt").write_bytes(b"not a checkpoint")
    refused("is not a checkpoint of this script", *EAGER, 1, "--resume")
    assert train(output, *EAGER, 1) == 0
    refused("was trained with seed 0, this run has 1", *EAGER, 1, "--resume", "--seed", 1)
    refused("was written without --compare", "--compare", "--resume", "--steps", 2)


def test_a_backend_that_cannot_serve_is_one_clear_line(refused, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # Earlier tests may have chosen Triton's interpreter.
    monkeypatch.setattr(backends, "_chosen", {})
    refused("triton", "--backend", "triton", "--steps", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--steps", "0"),
        ("--lr", "nan"),
        ("--compare", "--backend", "eager"),
        ("--pyramid", "bifpn", "--compare"),
        ("--float64", "--amp"),
        ("--image-size", "8"),
        ("--channels", "48", "--model", "fcos"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, output, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(output, *arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", [train_detector, ablation, digits])
def test_help_says_what_each_option_does_and_its_default(script):
    for action in script.build_parser()._actions:
        assert action.help, action.dest
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "(default: " in action.help, action.dest


def test_threads_that_wait_do_not_spin():
    # It has to be set before torch is imported, which fails here.
    code = ("import os, sys; sys.modules['torch'] = None\ntry: import train_detector\n"
            "except ImportError: print(os.environ['OMP_WAIT_POLICY'])")  # fmt: skip
    folder = Path(train_detector.__file__).parent
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
        printed = subprocess.check_output([sys.executable, "-c", code], cwd=folder, env=environment, text=True)
        assert printed.strip() == expected


@pytest.mark.parametrize(
    ("backbone", "two_stage", "channels"),
    [
        ("resnet50", True, 4),
        ("efficientnet_b0", False, 3),
        ("convnext_tiny", True, 4),
        ("regnet_y_400mf", False, 3),
        ("swin_t", False, 3),
    ],
)
def test_a_backbone_gives_the_levels_that_its_strides_say(backbone, two_stage, channels):
    body = detector_models.build_backbone(backbone, two_stage, "group", 0, False, "fpn").eval()
    with torch.no_grad():
        maps = body(torch.zeros(1, 3, 128, 128))
    first = 4 if two_stage else 8
    assert [each.shape[1:] for each in maps.values()] == [(256, s, s) for s in (128 // first >> i for i in range(5))]
    assert len(body.fpn.inner_blocks) == channels


def test_a_plain_vision_transformer_takes_images_of_other_sizes():
    torch.manual_seed(1)
    network = torchvision.models.VisionTransformer(64, 16, 1, 2, 8, 16).eval().double()
    trunk, image = detector_models.PlainVisionTransformer(network), torch.rand(1, 3, 64, 64).double()
    tokens = network._process_input(image) + network.encoder.pos_embedding[:, 1:]
    expected = network.encoder.ln(network.encoder.layers(tokens)).transpose(1, 2).view(1, 8, 4, 4)
    torch.testing.assert_close(trunk(image), expected, rtol=1e-12, atol=1e-12)
    assert trunk(torch.rand(2, 3, 48, 96).double()).shape == (2, 8, 3, 6)


@pytest.mark.parametrize("backbone", ["alexnet", "vit_b_16", "nothing"])
def test_a_backbone_without_stages_is_one_clear_line(backbone, refused):
    refused(backbone, "--backbone", backbone, *EAGER, 1)


@pytest.mark.parametrize("pyramid", ["fpn", "no-top-down", "c4"])
def test_weights_have_torchvisions_names(pyramid):
    ours = detector_models.build_detector("faster_rcnn", "resnet18", 2, 64, norm="batch", pyramid=pyramid)
    resnet_fpn_backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d)
    theirs = torchvision.models.detection.FasterRCNN(backbone, 3)
    names, expected = (
        {name.split(".layer_blocks")[0].split(".inner_blocks")[0] for name in model.state_dict()}
        for model in (ours, theirs)
    )
    assert {name for name in names if not name.startswith("backbone.body.layer4")} <= expected
    if pyramid == "fpn":
        assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("two_stage", [True, False])
@pytest.mark.parametrize("pyramid", detector_models.FAMILY)
def test_every_member_of_the_family_makes_five_levels_that_train(pyramid, two_stage):
    body = detector_models.build_backbone("slim_resnet", two_stage, "group", 0, False, pyramid, 16)
    maps = body(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)))
    first = 4 if two_stage else 8
    assert [each.shape[1:] for each in maps.values()] == [(16, s, s) for s in (128 // first >> i for i in range(5))]
    sum(each.square().sum() for each in maps.values()).backward()
    assert all(parameter.grad is not None for parameter in body.fpn.parameters())


def test_the_pyramid_without_a_top_down_pathway_takes_nothing_from_above():
    pyramid = detector_models.NoTopDownPyramid([4, 4], 8).double()
    maps = {"0": torch.rand(1, 4, 8, 8).double(), "1": torch.rand(1, 4, 4, 4).double().requires_grad_()}
    finest = pyramid(maps)["0"]
    assert torch.equal(finest, pyramid.layer_blocks[0](pyramid.inner_blocks[0](maps["0"])))
    assert torch.autograd.grad(finest.sum(), maps["1"], allow_unused=True) == (None,)


@pytest.mark.parametrize(("norm", "kind"), [("group", torch.nn.GroupNorm), ("batch", torch.nn.BatchNorm2d)])
def test_frozen_stages_keep_their_weights_and_statistics(norm, kind):
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
def test_models_of_other_kinds_train(arguments, output):
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


def test_mask_rcnn_learns_the_masks_of_the_digits(output):
    assert train(output, "--model", "mask_rcnn", "--static-sampling", "--steps", 1) == 0
    figures = figures_of(output)
    assert set(figures["fused"]["test"]["masks"]) >= {"AP", "AP50", "AP_small"}
    assert "roi_heads.mask_roi_pool" in [entry["name"] for entry in figures["fused"]["swapped"]["swapped"]]


def test_flipped_pictures_carry_their_boxes_and_masks():
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


def test_perfect_masks_score_one():
    data = digits.DigitsOnPhotographs("test", 4, side=192, seed=0)
    keys = ("image_id", "category_id", "bbox", "segmentation")
    perfect = [{key: a[key] for key in keys} | {"score": 1.0} for a in data.coco()["annotations"]]
    assert coco_data.average_precision(data.coco(), perfect, "segm")["AP"] == pytest.approx(1)
    boxes_alone = [{**a, "segmentation": coco_data.encode_mask(np.ones((192, 192), bool))} for a in perfect]
    assert coco_data.average_precision(data.coco(), boxes_alone)["AP"] == pytest.approx(1)
    assert coco_data.average_precision(data.coco(), boxes_alone, "segm")["AP"] < 0.1
