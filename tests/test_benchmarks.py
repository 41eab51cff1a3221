# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own arithmetic and honesty: bytes, refusals, ratios, reports, and the GPU run without a GPU."""

import argparse
import ctypes
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from helpers import detectron2_stand_in, plain_proposals
from torch._subclasses.fake_tensor import FakeTensorMode

import fpn_fast
from fpn_fast import __main__ as command_line
from fpn_fast.bench import (
    cases,
    counting,
    harness,
    libraries,
    machine,
    op,
    providers,
    report,
    rois,
    rows,
    scenes,
    timing,
    torchvision_ops,
)
from fpn_fast.ops._schemas import SCHEMAS
from fpn_fast.verify.checks import CHECKS
from fpn_fast.verify.run import read_shapes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import ceilings, gpu_run, kernels  # noqa: E402
from benchmarks import report as checkout_report  # noqa: E402

CASE = next(case for case in cases.FAMILIES["top_down"]("cpu") if case.direction == "backward")
TINY = cases.tiny(CASE)


def _case(direction: str = "forward", **changes: object) -> cases.Case:
    return replace(CASE, direction=direction, **changes)


RPN = {"op": "generate_proposals", "levels": ((2, 3),), "anchors": 3, "pre_nms_top_n": 5}
RETINANET = {"op": "select_detections", "levels": ((2, 3),), "anchors": 9, "classes": 7}
#: One pixel at the coarsest level; two channels out, of 2, 4, 8 and 16.
NECK = {"op": "mmdet_neck", "levels": ((8, 8), (4, 4), (2, 2), (1, 1)), "channels": 2}
NECK_MAPS = 2 * 64 + 4 * 16 + 8 * 4 + 16
NECK_WEIGHTS = 2 * (2 + 4 + 8 + 16) + 4 * 2 + 4 * (9 * 2 * 2 + 2)
NECK_OUTPUTS = 2 * (64 + 16 + 4 + 1 + 1)


@pytest.mark.parametrize(
    ("changes", "elements"),
    [
        # Elements of one image at strides 4 to 32, C = 256: 17,203,200 + 4,300,800 + 1,075,200 + 268,800. Forward reads
        # all and writes the first three; backward reads all and writes the last three.
        ({"direction": "forward"}, 45_427_200),
        ({"direction": "backward"}, 28_492_800),
        ({"direction": "forward", "dtype": "bfloat16"}, 45_427_200),
        ({"direction": "backward", "dtype": "bfloat16", "batch": 2}, 2 * 28_492_800),
        ({"direction": "forward_backward", "batch": 2}, 2 * (45_427_200 + 28_492_800)),
        ({"op": "upsample_add", "levels": cases.TINY_2_MAPS, "channels": 8}, 2 * 128 + 32),
        ({"op": "upsample_add", "levels": cases.TINY_2_MAPS, "channels": 8, "direction": "backward"}, 128 + 32),
        (NECK, NECK_MAPS + NECK_WEIGHTS + NECK_OUTPUTS),
        ({**NECK, "direction": "backward"}, 2 * (NECK_MAPS + NECK_WEIGHTS) + NECK_OUTPUTS),
        # One level of 2 x 3 places and three anchors: 18 logits, 4 deltas of each of 5 candidates, 5 values of each of
        # 5 proposals.
        (RPN, 18 + 20 + 25),
        ({**RPN, "batch": 3}, 3 * (18 + 20 + 25)),
        # Of few anchors all are candidates.
        ({**RPN, "levels": ((1, 1),)}, 3 + 12 + 15),
        (RETINANET, 2 * 3 * 9 * 7),
        ({**RETINANET, "batch": 3}, 3 * 2 * 3 * 9 * 7),
        # 28 bytes of a box, score and group, and one index of 8 bytes for each of four groups.
        ({"op": "batched_nms", "boxes": 10, "classes": 4}, (10 * 28 + 4 * 8) // 4),
        ({"op": "match_anchors", "levels": ((2, 3),), "anchors": 3, "boxes": 5}, 5 * 4 + 18 * (4 + 2)),
        ({"op": "paste_masks", "levels": ((8, 9),), "boxes": 2, "output_size": 28}, 2 * (28 * 28 + 4 + 72)),
        # Maps, a keypoint of three values and a score of each of three in two boxes.
        ({"op": "heatmaps_to_keypoints", "boxes": 2, "classes": 3, "output_size": 56}, 2 * (4 + 3 * (56 * 56 + 4))),
    ],
)
def test_bytes(changes: dict, elements: int) -> None:
    case = _case(**changes)
    assert cases.bytes_moved(case) == elements * (2 if case.dtype == "bfloat16" else 4)


@pytest.mark.parametrize("op_name", [name for name in providers.OPS if name not in ("top_down", "upsample_add")])
def test_on_a_gpu_nothing_that_is_measured_synchronises(op_name: str) -> None:
    """Fake tensors have no values to look at, so what runs on them can be captured in a CUDA graph."""
    found = [c for family in cases.FAMILIES.values() for c in family("cuda") if c.op == op_name and not c.axis]
    case = cases.tiny([c for c in found if "forward" in c.direction][-1])
    of_case = providers.op_of(case)
    # Made outside, since scenes.py keeps them.
    here = of_case.inputs(torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in here]
        results = op.listed(of_case.fused(there))
    assert all(each.device.type == "cuda" for each in results)
    if of_case.tensors_of is op.unpadded:
        assert [each.shape[0] for each in results] == [case.batch] * len(results)


def test_bytes_of_pooling() -> None:
    """One RoI on an image of 8 x 8 pixels: what it reads of one map, and what comes out."""
    case = _case("forward", op="multiscale_roi_align", levels=((2, 2),), channels=3, rois=1, output_size=2,
                 sampling_ratio=2)  # fmt: skip
    read = rois.pixels_read(1, 1, ((2, 2),), (0.25,), 2, 2, False)
    assert 1 <= read <= 4
    assert cases.bytes_moved(case) == (read * 3 + 3 * 4) * 4
    assert cases.bytes_moved(replace(case, direction="backward")) == (2 * 2 * 3 + 3 * 4) * 4


def test_rois_are_inside_the_image_and_crowd_when_asked() -> None:
    spread, crowded = (rois.random_rois(2, 500, 800, 1344, clustered) for clustered in (False, True))
    for found in (spread, crowded):
        assert found[:, 0].unique().tolist() == [0, 1]
        assert (found[:, 1:3] >= 0).all()
        assert (found[:, 3:] > found[:, 1:3]).all()
        assert (found[:, 3] <= 1344).all() and (found[:, 4] <= 800).all()  # noqa: PT018
        shares = fpn_fast.ops.assign_levels(found, (1 / 4, 1 / 8, 1 / 16, 1 / 32)).bincount() / len(found)
        assert 0.5 < shares[0] < 0.75
        assert (shares > 0.02).all()
    levels = cases.RESNET50_FPN_800X1344
    arguments = (2, 500, levels, (1 / 4, 1 / 8, 1 / 16, 1 / 32), 7, 2)
    assert rois.pixels_read(*arguments, True) < 0.8 * rois.pixels_read(*arguments, False)


def _first_two_swapped(results: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat([each[[1, 0]], each[2:]]) for each in results]


def _one_missing(results: list[torch.Tensor]) -> list[torch.Tensor]:
    return [each[:-1] for each in results]


def _judged(case: cases.Case) -> tuple[op.Op, Callable, list[torch.Tensor]]:
    """The case's op, what it must give, and what the replaced code gives, which is right."""
    of_case = providers.op_of(case)
    inputs = of_case.inputs(torch.device("cpu"))
    expected = providers.expectation(case, inputs, [])
    right = op.listed(of_case.eager(inputs))
    assert expected(right) is None
    return of_case, expected, right


@pytest.mark.parametrize(("fault", "reason"), [(_first_two_swapped, "differs from"), (_one_missing, "reference's is")])
@pytest.mark.parametrize("family", ["generate_proposals", "select_detections", "batched_nms", "match_anchors"])
def test_a_wrong_decision_is_refused(family: str, fault, reason: str) -> None:
    _, expected, right = _judged(cases.tiny(cases.FAMILIES[family]("cpu")[0]))
    # An anchor's match is an index, and of the first two anchors it is the same.
    wrong = [1 - each for each in right] if family == "match_anchors" and fault is _first_two_swapped else fault(right)
    assert reason in expected(wrong if len(wrong) > 1 else wrong[0])


def test_a_padded_result_is_compared_without_its_padding() -> None:
    """What a GPU is asked for, in place of lists."""
    of_case, expected, _ = _judged(cases.tiny(cases.FAMILIES["select_detections"]("cpu")[1]))
    lists = of_case.fused(of_case.inputs(torch.device("cpu")))
    images = len(lists) // 3
    padded = [torch.nn.utils.rnn.pad_sequence(lists[i : i + images], True) for i in range(0, len(lists), images)]
    counts = torch.tensor([len(each) for each in lists[:images]])
    assert counts.unique().numel() > 1
    assert expected((*padded, counts)) is None
    assert "the reference's is" in expected((*padded, counts - 1))


def _of_library(op_name: str) -> cases.Case:
    """The op's last small case, which is of two images where there is one."""
    found = cases.FAMILIES[op_name.partition("_")[0]]("cpu")
    return cases.tiny([case for case in found if case.op == op_name and case.direction == "forward"][-1])


@pytest.mark.parametrize("op_name", libraries.OPS)
def test_a_library_stated_wrongly_is_refused(op_name: str) -> None:
    _, expected, right = _judged(_of_library(op_name))
    for i in range(len(right)):
        wrong = [each.clone() for each in right]
        wrong[i][(-1,) * wrong[i].dim()] += 1.0
        assert "differs from" in expected(wrong)


def test_detectron2_is_stated_as_its_stand_in_states_it() -> None:
    """Two statements by different hands; mmdetection's is held against mmdetection, in against_mmdet.py."""
    cpu = torch.device("cpu")
    case = _of_library("detectron2_fpn")
    of_case = providers.op_of(case)
    inputs = of_case.inputs(cpu)
    channels = [each.size(1) for each in inputs[:4]]
    backbone = libraries._Given(channels)
    names = list(backbone.output_shape())
    top = detectron2_stand_in.LastLevelMaxPool()
    fpn = detectron2_stand_in.FPN(backbone, names, case.channels, top_block=top)
    keys = [f"fpn_{kind}{i}.{key}" for kind in ("lateral", "output") for i in range(2, 6) for key in ("weight", "bias")]
    fpn.load_state_dict(dict(zip(keys, inputs[4:], strict=True)))
    for ours, theirs in zip(of_case.eager(inputs), fpn(inputs[:4]).values(), strict=True):
        assert torch.equal(ours, theirs)

    case = replace(_of_library("detectron2_pooler"), rois=40, batch=2)
    of_case = providers.op_of(case)
    maps = of_case.inputs(cpu)
    found = rois.random_rois(2, 40, *cases.image_size(case), False)
    boxes = [detectron2_stand_in.Boxes(found[found[:, 0] == i, 1:]) for i in range(2)]
    pooler = detectron2_stand_in.ROIPooler(7, cases.scales(case), 0, "ROIAlignV2")
    assert torch.equal(of_case.eager(maps), pooler(maps, boxes))

    case = _of_library("detectron2_proposals")
    of_case = providers.op_of(case)
    maps, size = of_case.inputs(cpu), cases.image_size(case)
    count = len(case.levels)
    ratios = (0.5, 1.0, 2.0)
    tables = [
        torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in ((8 * s / r**0.5, 8 * s * r**0.5) for r in ratios)])
        for s in (4 << i for i in range(count))
    ]
    anchors = [plain_proposals.grid(t, case.levels[i], (4 << i, 4 << i)) for i, t in enumerate(tables)]
    expected = plain_proposals.propose(
        maps[:count], maps[count:], anchors, [size] * case.batch,
        lambda priors, codes: detectron2_stand_in.Box2BoxTransform().apply_deltas(codes, priors),
        pre=case.pre_nms_top_n, post=case.pre_nms_top_n, thresh=torchvision_ops.PROPOSAL_IOU, least=0,
        convention="torchvision",
    )  # fmt: skip
    lists = of_case.eager(maps)
    found = list(zip(lists[: case.batch], lists[case.batch :], strict=True))
    assert all(len(boxes) > 5 for boxes, _ in found)
    plain_proposals.check(found, expected, 2**-23)


def test_scores_have_no_ties_after_a_sigmoid() -> None:
    head = scenes.rpn_head((400, 672), ((100, 168), (50, 84), (25, 42)))
    logits, _ = scenes.head_tables(head, 2, 1)
    for image in logits.sigmoid().flatten(1):
        assert len(image.unique()) == len(image)
    assert 0.0001 < (logits.sigmoid() > 0.5).double().mean() < 0.01


@pytest.mark.parametrize(("count", "classes"), [(1_000, 1203), (3_000, 5)])
def test_boxes_of_detections_overlap_within_their_classes(count: int, classes: int) -> None:
    boxes, scores, labels = scenes.detections(count, classes, 800, 1344)
    assert len(scores.unique()) == count
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    # Moved apart as torchvision does it for few boxes, they are the same boxes.
    assert torch.equal((boxes * 8).round() / 8, boxes)
    moved = boxes + (labels * (boxes.max() + 1))[:, None]
    assert torch.equal(moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2])
    kept = fpn_fast.ops.batched_nms(boxes, scores, labels, torchvision_ops.NMS_IOU)
    assert 0.1 * count < len(kept) < 0.7 * count


def test_peak_memory_sees_through_memory_that_was_kept() -> None:
    # As large as what an allocator keeps when it is freed.
    for _ in range(3):
        kept = [torch.ones(1 << 20) for _ in range(4)]
        del kept
    peak = timing.timer("cpu").peak_bytes(lambda: [torch.ones(1 << 20) for _ in range(4)])
    assert 0.9 * (16 << 20) < peak < 1.5 * (16 << 20)


def test_an_upload_is_known_from_a_number_that_stays() -> None:
    value = torch.ones(2)

    def call() -> None:
        torch.tensor(1.0).to(value)
        torch.tensor([1, 2]).view(1, 2).to(value.device, non_blocking=True)
        torch.tensor(1.0, device=value.device)
        torch.tensor([3]).tolist()
        value[value > 0].sum().item()

    assert counting.count(call).syncs == {"upload": 2, "mask as index": 1, "aten::_local_scalar_dense": 1}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_cases_have_names_of_their_own(device_type: str) -> None:
    names = [str(case) for family in cases.FAMILIES.values() for case in family(device_type)]
    assert len(names) == len(set(names))


EAGER = providers.op_of(CASE).eager


def _last_pixel_wrong(laterals: list[torch.Tensor]) -> list[torch.Tensor]:
    merged = EAGER(laterals)
    wrong = torch.zeros_like(merged[0])
    wrong[-1, -1, -1, -1] = 0.01
    return [merged[0] + wrong, *merged[1:]]


def _raises(laterals: list[torch.Tensor]) -> list[torch.Tensor]:
    raise RuntimeError("planted")


TORCH_RAN = "cpp was to compute this, and torch did"
OURS = fpn_fast.ops.top_down
#: (what runs, under whose name, direction, why it is refused)
REFUSED = [
    (_last_pixel_wrong, "faulty", "forward", "differs from the reference"),
    (lambda maps: [m * float("nan") for m in EAGER(maps)], "faulty", "forward", ": nan and not"),
    (lambda maps: EAGER(maps)[1:], "faulty", "forward", "3 results where the reference has 4"),
    (_raises, "faulty", "forward", "does not run: RuntimeError: planted"),
    (lambda maps: EAGER([*maps[:-1], maps[-1].detach() + 0 * maps[-1]]), "faulty", "backward", "result 3 ["),
    # What asking for no backend could do, which no result shows: equal values by torch's own operators.
    (EAGER, "cpp", "forward", TORCH_RAN),
    (EAGER, "cpp", "backward", TORCH_RAN),
    (providers.op_of(CASE).reference, "cpp", "forward", TORCH_RAN),
    (providers.op_of(CASE).reference, "cpp", "backward", TORCH_RAN),
    (lambda maps: [m + 0 for m in OURS(maps)], "cpp", "forward", "computed a part: aten::add"),
    (
        lambda maps: [m + (e - e.detach()) for m, e in zip(OURS([m.detach() for m in maps]), EAGER(maps), strict=True)],
        "cpp",
        "backward",
        TORCH_RAN,
    ),
    (OURS, "rival", "forward", "torch was to compute this, and cpp did"),
]


@pytest.mark.parametrize(("function", "name", "direction", "reason"), REFUSED)
def test_a_wrong_result_or_backend_is_refused(function, name: str, direction: str, reason: str) -> None:
    case = cases.tiny(_case(direction))
    planted = providers.Provider(name, function, "cpp" if name == "cpp" else None)
    found = harness.measure(case, "cpu", 0.0, [providers.Provider("eager", EAGER), planted], max_rounds=2)
    (refused,) = (row for row in found if row.provider == name)
    assert reason in refused.refused
    assert refused.p50 is None
    assert refused.speedup is None
    assert all(name not in (row.speedup or {}) for row in found)
    assert [row.provider for row in found if row.refused is None] == ["eager", harness.COPY]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_rows_carry_the_backend_that_the_dispatcher_saw(family: str) -> None:
    for (_, direction), case in {(c.op, c.direction): c for c in cases.FAMILIES[family]("cpu")}.items():
        small = cases.tiny(case)
        found = harness.measure(small, "cpu", 0.0, providers.providers(small, "cpu", ["eager", "cpp"]), max_rounds=1)
        assert [row.refused for row in found if row.refused is not None] == [], direction
        seen = {row.provider: rows.as_dict(row).get("backend") for row in found}
        assert {name: seen[name] for name in ("eager", "cpp")} == {"eager": "torch", "cpp": "cpp"}


def test_every_kernel_is_called_under_the_sanitizer() -> None:
    shapes = read_shapes(ROOT / "benchmarks" / "sanitizer_shapes.json")
    called = {kernel for op_name in shapes for kernel in CHECKS[op_name].ops}
    assert called == {name for name in SCHEMAS if not name.endswith("_backward")}


def test_a_process_starts_again_under_glibc_settings_once_and_the_users_own_win(tmp_path: Path) -> None:
    program = (
        "from fpn_fast.bench import machine; machine.keep_freed_memory(); print(sorted(machine.allocator().items()))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in machine.ALLOCATOR_VARIABLES}

    def settings(**variables: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, env={**clean, **variables}, capture_output=True, text=True, check=True
        ).stdout.strip()

    is_glibc = platform.libc_ver()[0] == "glibc"
    assert settings() == str(sorted(machine.KEEP_FREED_MEMORY.items()) if is_glibc else [])
    assert settings(MALLOC_TRIM_THRESHOLD_="1") == "[('MALLOC_TRIM_THRESHOLD_', '1')]"
    facts = {"device_type": "cpu", "device": "Abacus 9", "threads": 2, "allocator": dict(machine.KEEP_FREED_MEMORY)}
    assert machine.slug(facts) == "abacus-9-2-threads"
    facts["allocator"] = {"MALLOC_TRIM_THRESHOLD_": "1"}
    assert machine.slug(facts) == "abacus-9-2-threads-malloc-trim-threshold-1"


def test_a_refused_row_is_kept_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty = providers.Provider("cpp", _last_pixel_wrong)
    right = providers.Provider("eager", EAGER)
    monkeypatch.setattr(providers, "providers", lambda case, device_type, names, compiler: [right, faulty])
    only = "fpn_800x1344-n1-float32-channels_last-forw"
    arguments = ["bench", "--output", str(tmp_path), "--device", "cpu", "--tiny", "--only", only]
    assert command_line.main(arguments) == 1
    assert "differs from the reference" in capsys.readouterr().err
    (path,) = tmp_path.glob("*/top_down.json")
    results = report.load(path)
    assert [row["provider"] for row in results["rows"] if "refused" in row] == ["cpp"]
    assert "| refused |" in report.markdown(results)


def test_rounds_sample_everyone_once_in_changing_order() -> None:
    order: list[str] = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    samples = timing.interleave(samplers, 60.0, max_rounds=6)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert "".join(order) == "abc" + "bca" + "cab" + "cba" + "acb" + "bac"


def test_ratios_are_taken_within_rounds() -> None:
    # The machine is ten times slower in two rounds of five: every round still says two.
    slow = [2.0, 20.0, 2.0, 20.0, 2.0]
    fast = [1.0, 10.0, 1.0, 10.0, 1.0]
    assert timing.ratio(slow, fast) == 2.0
    assert timing.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert timing.quantile([1.0, 2.0, 3.0], 0.2) == pytest.approx(1.4)


class _CpuInPlaceOfGpu(timing.GpuTimer):
    on_stream, synchronize, elapsed = timing.Timer.on_stream, timing.Timer.synchronize, timing.Timer.elapsed

    def __init__(self, captures: bool) -> None:
        self.captures = captures

    def capture(self, run: timing.Step) -> timing.Step:
        if not self.captures:
            raise RuntimeError("cannot be captured")
        return run


@pytest.mark.parametrize("captures", [True, False])
def test_gpu_metrics_take_turns_over_all_sets(captures: bool) -> None:
    called = [0] * 5

    def step(i: int) -> None:
        called[i] += 1

    steps = [lambda i=i: step(i) for i in range(5)]
    found = _CpuInPlaceOfGpu(captures).measurements(steps, nullcontext)
    method = "graph" if captures else "events"
    assert {name: m.method for name, m in found.items()} == {"gpu_cold": method, "gpu_warm": method, "wall": "clock"}
    for name, measurement in found.items():
        before = list(called)
        assert measurement.sample() > 0
        turns = [now - then for now, then in zip(called, before, strict=True)]
        assert turns == ([measurement.calls, 0, 0, 0, 0] if name == "gpu_warm" else [measurement.calls // 5] * 5)


@pytest.mark.parametrize("synchronises", [True, False])
def test_what_synchronises_is_not_captured(synchronises: bool) -> None:
    numbers = torch.arange(3.0)

    def step() -> object:
        return numbers.nonzero() if synchronises else numbers + 1

    clock = _CpuInPlaceOfGpu(True)
    ready = harness.prepare(lambda: [step], lambda _: None, lambda _: None, clock, memory=False)
    assert not isinstance(ready, str), ready
    assert ready[0]["gpu_cold"].method == ("events" if synchronises else "graph")


def test_results_of_a_set_live_until_its_next_turn() -> None:
    made: list[int] = []
    steps = [lambda i=i: made.append(i) or object() for i in range(3)]
    timing.in_turn(steps, 7)()
    assert made == [0, 1, 2, 0, 1, 2, 0]


def _triton_device() -> torch.device:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and Triton was imported without its interpreter")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_nvidia_mapping_is_measured_on_a_gpu_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = pytest.importorskip("benchmarks.nvidia_mapping", exc_type=ImportError)
    monkeypatch.setitem(providers.RIVALS, "multiscale_roi_align", mapping.rivals)
    for case in cases.FAMILIES["multiscale_roi_align"]("cuda"):
        for device_type in ("cpu", "cuda"):
            names = [provider.name for provider in providers.providers(case, device_type)]
            assert names.count("nvidia") == (device_type == "cuda" and case.memory_format == "channels_last")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("sampling_ratio", "dtype"), [(2, "float32"), (2, "bfloat16"), (0, "float32")])
def test_nvidia_mapping_pools_what_the_reference_pools(
    sampling_ratio: int, dtype: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = pytest.importorskip("benchmarks.nvidia_mapping", exc_type=ImportError)
    device = _triton_device()
    case = next(
        case
        for case in cases.FAMILIES["multiscale_roi_align"]("cuda")
        if (case.sampling_ratio, case.dtype, case.direction) == (sampling_ratio, dtype, direction)
        and case.memory_format == "channels_last"
    )
    # One for each level, up to and over the edges of the image.
    chosen = torch.tensor([[0.0, 3, 2, 40, 30], [1, 5, 10, 120, 150], [0, 20, 20, 260, 300], [1, 0, 0, 470, 500]])
    for module in (torchvision_ops, mapping):
        monkeypatch.setattr(module, "random_rois", lambda *_: chosen)
    # Channels that are no power of two.
    case = replace(cases.tiny(case), batch=2, channels=12, rois=2, output_size=2)
    inputs = providers.op_of(case).inputs(device)
    pool = mapping.rivals(case)["nvidia"]
    grads = providers.output_grads(case, inputs)
    expected = providers.expectation(case, inputs, grads)
    with torch.set_grad_enabled(direction == "backward"):
        assert expected(providers.bind(case, pool, inputs, grads)()) is None
        # The check notices a RoI that is pooled from a wrong place.
        moved = providers.bind(case, lambda maps: pool(maps).roll(1, 0), inputs, grads)()
        assert "differs from the reference" in expected(moved)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "name", ["resnet50_fpn_800x1344-n1-bfloat16-channels_last", "800x1333-n1-float32-channels_first"]
)
def test_per_level_merge_merges_what_the_reference_merges(name: str, direction: str) -> None:
    """Of maps that halve, and of others."""
    merge = pytest.importorskip("benchmarks.per_level_merge", exc_type=ImportError)
    device = _triton_device()
    case = next(case for case in cases.FAMILIES["top_down"]("cuda") if f"{name}-{direction}" in str(case))
    case = replace(cases.tiny(case), batch=2, channels=5)
    inputs = providers.op_of(case).inputs(device)
    function = merge.rivals(case)["inductor"]
    grads = providers.output_grads(case, inputs)
    expected = providers.expectation(case, inputs, grads)
    with torch.set_grad_enabled(direction == "backward"):
        assert expected(providers.bind(case, function, inputs, grads)()) is None
        moved = providers.bind(case, lambda maps: [each.roll(1, 3) for each in function(maps)], inputs, grads)()
        assert "differs from the reference" in expected(moved)


def test_l2_kernel_reads_everything_every_turn() -> None:
    pytest.importorskip("triton")
    from benchmarks.ceiling_kernels import l2_read_kernel

    device = _triton_device()
    source = torch.randn(6 * 64, device=device)
    sums = torch.empty(4, device=device)
    l2_read_kernel[(4,)](source, sums, 6, 5, BLOCK=64)
    torch.testing.assert_close(sums.sum(), 5 * source.sum(), rtol=1e-4, atol=1e-3)


def test_conversions_are_done_one_after_another() -> None:
    pytest.importorskip("triton")
    from benchmarks.ceiling_kernels import convert_kernel

    device = _triton_device()
    values = torch.randn(64, device=device)
    expected = values.clone()
    convert_kernel[(2,)](values, 3, BLOCK=32, CONVERSIONS=2, STEP=1.5)
    for _ in range(6):
        expected = expected.bfloat16().float() + 1.5
    assert torch.equal(values, expected)


def _follow(place: torch.Tensor, turns: int, CHASE: str, num_warps: int) -> None:
    address = place.item()
    for _ in range(turns * CHASE.count("ld.global")):
        address = ctypes.c_int64.from_address(address).value
    place.fill_(address)


def test_every_limit_is_measured_and_settles_constants_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling_kernels = pytest.importorskip("benchmarks.ceiling_kernels", exc_type=ImportError)
    clock = timing.timer("cuda") if _triton_device().type == "cuda" else _CpuInPlaceOfGpu(True)
    if not isinstance(clock, _CpuInPlaceOfGpu):
        found = {part.__name__: part(clock) for part in ceilings.PARTS}
    else:
        small = {"DEVICE": "cpu", "COPY_BYTES": 1 << 20, "L2_READ_BYTES": 1 << 17, "L2_READ_TURNS": 2, "CHASE_TURNS": 5,
                 "CHASES": {"l1": (8, ""), "l2": (9, ".cg"), "dram": (11, ".cg")}, "CONVERSION_TURNS": 1,
                 "GRAPH_NODES": 3, "LAUNCHES": 2, "SAMPLES": 3}  # fmt: skip
        for name, value in small.items():
            monkeypatch.setattr(ceilings, name, value)
        # Triton's interpreter knows no PTX.
        monkeypatch.setattr(ceiling_kernels, "chase_kernel", {(1,): _follow})
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: time.sleep(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(multi_processor_count=1))
        found = {part.__name__: part(clock) for part in ceilings.PARTS}
    constants = ceilings.constants(found)
    assert set(constants) == {"clock_ghz", "dram_bytes_per_cycle", "l2_bytes_per_cycle", "port_bytes_per_cycle",
                              "l1_latency", "l2_latency", "dram_latency", "xu_cycles"}  # fmt: skip
    assert all(each["measured"] > 0 and each["assumed"] > 0 for each in constants.values())


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of a machine that never was: eager 4 ms, compile 3 ms, cpp 1.5 ms, one refused row, call overhead."""
    machine = {"device_type": "cpu", "device": "Abacus 9", "threads": 2, "torch": "2.11.0", "commit": "0123abc",
               "date": "2026-01-02", "allocator": {}}  # fmt: skip
    kept = rows.Results(tmp_path / "results", "top_down", machine)
    forward, backward = _case("forward"), _case("backward")
    bytes_ = cases.bytes_moved(forward)

    def row(case: cases.Case, name: str, time_us: float, **fields: object) -> rows.Row:
        return rows.Row(case, name, "wall", "clock", bytes_, time_us, time_us, time_us, 9, 1, **fields)

    tiny = next(case for case in cases.FAMILIES["top_down"]("cpu") if case.overhead)
    kept.add(
        [
            row(forward, "eager", 4000.0, speedup={"compile": 0.75, "cpp": 0.375}),
            row(forward, "compile", 3000.0, speedup={"eager": 1.333}),
            row(forward, "cpp", 1500.0, speedup={"eager": 2.667, "compile": 2.0}, copy_share=0.8, copy_gb_per_s=12.0),
            row(forward, "copy", 1200.0, copy_share=1.0, copy_gb_per_s=15.14),
            row(backward, "eager", 2000.0, speedup={}),
            rows.Row(backward, "cpp", "none", "none", bytes_, refused="result 1 differs"),
            row(tiny, "eager", 20.0, speedup={"cpp": 1.25}),
            row(tiny, "cpp", 25.0, speedup={"eager": 0.8}),
        ]
    )
    return kept.path


def test_table(results: Path) -> None:
    text = report.markdown(report.load(results))
    assert (
        "| top_down | resnet50_fpn_800x1344 | 1 | float32 | channels_first | forward | 4 ms | 3 ms | 1.5 ms "
        "| 2.67x | 2.00x | 80% |\n" in text
    )
    assert "| channels_first | backward | 2 ms |  | refused |  |  |  |\n" in text
    assert (
        "| top_down | tiny_3_levels | 1 | float32 | channels_first | forward | 20 us |  | 25 us | 0.80x |  |  |\n"
        in text
    )
    assert "Abacus 9, 2 threads, torch 2.11.0, commit 0123abc, 2026-01-02, default allocator: median wall time" in text
    assert "Not measured" not in text
    unmeasured = _case("forward", batch=7)
    assert f"Not measured: {unmeasured}.\n" in report.markdown(report.load(results), known=[CASE, unmeasured])
    assert f"Refused: {_case('backward')} cpp: result 1 differs." in text


def test_only_named_cases_are_shown(results: Path) -> None:
    text = report.markdown(report.load(results), ("800x1344", "forward"))
    assert text.count("| top_down |") == 1


def test_pages_and_plot_hold_the_committed_results() -> None:
    found = checkout_report.pages()
    names = {path.relative_to(ROOT).as_posix() for path in found}
    assert {"README.md", "docs/benchmarks.md", "docs/ablation.md", "docs/img/speedup.svg"} <= names
    assert {"docs/step-budget.md", "docs/img/step-budget.svg"} <= names
    for path, text in found.items():
        assert path.read_text() == text, f"{path} differs from the results; run python benchmarks/report.py"


@pytest.mark.parametrize("path", sorted(checkout_report.RESULTS.glob("*/*.json")), ids=lambda path: path.stem)
def test_a_committed_row_is_of_the_backend_that_it_names(path: Path) -> None:
    """All providers ran with one allocator's settings. A copy, a captured graph and what torch.compile makes call no op
    that the dispatcher sees."""
    found = report.load(path)
    if found["machine"]["device_type"] == "cpu":
        assert found["machine"]["allocator"] == machine.KEEP_FREED_MEMORY
    named = {"cpp": "cpp", "triton": "triton", "eager": "torch", "eager, channels_last": "torch"}
    for row in found["rows"]:
        if "refused" not in row and row["provider"] != "copy" and not re.search("compile|capture", row["provider"]):
            assert row["backend"] == named.get(row["provider"], "cpp"), row["provider"]


def test_figures_are_of_the_cpu_that_was_measured_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout_report, "RESULTS", tmp_path)
    for name, device_type, date in (("b", "cpu", "2026-01-03"), ("a", "cpu", "2026-01-04"), ("c", "cuda", "2026-01-05"),
                                    ("d", "cpu", "2025-12-31")):  # fmt: skip
        (tmp_path / name).mkdir()
        machine = {"device_type": device_type, "date": date}
        (tmp_path / name / "top_down.json").write_text(json.dumps({"machine": machine, "rows": []}))
    assert checkout_report.measured_last().name == "a"


def test_a_figure_that_differs_from_its_results_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "img").mkdir(parents=True)
    monkeypatch.setattr(checkout_report, "ROOT", tmp_path)
    for name in ("PLOT", "BUDGET_PLOT"):
        monkeypatch.setattr(checkout_report, name, tmp_path / "docs" / "img" / getattr(checkout_report, name).name)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: summary -->\n<!-- /table -->\nafter\n")
    assert checkout_report.main(["--check"]) == 1
    assert checkout_report.main([]) == 0
    written = page.read_text()
    assert written.startswith("before\n<!-- table: summary -->\n| stage |")
    assert written.endswith("<!-- /table -->\nafter\n")
    assert checkout_report.main(["--check"]) == 0
    ratio = re.search(r"forward (\d)", written)
    for path, old, new in (
        (page, ratio[0], f"forward {int(ratio[1]) + 1}"),
        (checkout_report.PLOT, "x</text>", "9x</text>"),
    ):
        right = path.read_text()
        path.write_text(right.replace(old, new, 1))
        assert checkout_report.main(["--check"]) == 1
        assert f"{path.name} differs" in capsys.readouterr().out
        path.write_text(right)


def test_memory_is_shown_where_it_counts(tmp_path: Path, results: Path) -> None:
    kept = rows.Results(tmp_path / "memory", "match_anchors", report.load(results)["machine"])
    case = cases.FAMILIES["match_anchors"]("cpu")[0]
    for name, peak in (("eager", 1_000_000_000), ("cpp", 3_200_000)):
        kept.add([rows.Row(case, name, "wall", "clock", 8, 10.0, 10.0, 10.0, 9, 1, peak_bytes=peak)])
    text = report.markdown(report.load(kept.path))
    assert "| peak memory, eager | peak memory, fpn_fast (cpp) |\n" in text
    assert "| 1000 MB | 3.2 MB |\n" in text


def _unpacked(folder: Path, call: str = "A") -> tuple[dict, dict[str, str]]:
    """The sections of a call, and the text of its files."""
    with tarfile.open(folder / f"gpu_run_{call}.tar.gz") as archive:
        files = {m.name.partition("/")[2]: archive.extractfile(m).read().decode() for m in archive if m.isfile()}
    return json.loads(files["gpu_run.json"])["sections"], files


def _dry_run(folder: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict[str, str]]:
    """The results of every section, and the text of the files."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # Collecting all tests, to run none without a GPU, would take most of the time.
    _small_tests(
        folder, "", "@pytest.mark.gpu\n@pytest.mark.skipif(True, reason='')\ndef test_skips(): pass\n", monkeypatch
    )
    (folder / "tests" / "gpu_first.txt").write_text("tests/test_one.py::test_skips\n")
    code = gpu_run.main([call, "--output", str(folder / "out"), "--dry-run"])
    sections, files = _unpacked(folder / "out", call)
    wanted = {section.name: "ok" for section in gpu_run.SECTIONS if call in section.calls}
    assert {name: each["status"] for name, each in sections.items()} == wanted, files
    assert code == 0
    assert sections["environment"]["results"]["device_type"] == "cpu"
    assert sections["environment"]["results"]["info"]["kernels"] is None
    assert {path.name for path in (folder / "out").iterdir()} == {f"gpu_run_{call}.tar.gz"}
    return {name: entry["results"] for name, entry in sections.items()}, files


def test_a_dry_first_call_walks_every_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, _ = _dry_run(tmp_path, "A", monkeypatch)
    limits = results["ceilings"]
    assert limits.pop("constants") == {}
    assert set(limits) == {part.__name__ for part in ceilings.PARTS}
    assert {*limits.values(), *results["tools"].values()} == {"skipped: no GPU"}
    # None of them is marked gpu_first by the conftest that they have.
    assert results["first_tests"] == {"failures": []}
    assert results["kernels"]["device_type"] == "cpu"
    found = results["kernels"]["rows"]
    assert {row["family"] for row in found} == set(cases.FAMILIES) - {"detectron2", "mmdet", "growth"}
    assert {row["backend"] for row in found} == {"cpp"}
    assert all(row["kernels"] and all(each["us"] >= 0 for each in row["kernels"]) for row in found)


def test_a_dry_second_call_walks_every_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, files = _dry_run(tmp_path, "B", monkeypatch)
    assert results["tests"] == {"skipped": 1, "failures": []}
    assert set(results["first_cases"]) == {"top_down", "match_anchors"}
    assert set(results["benchmarks"]) == {"top_down"}
    for section in ("first_cases", "benchmarks"):
        for found in results[section].values():
            measured = json.loads(files[found.pop("file")])
            count = len(report.by_case(measured))
            assert found == {"cases": count, "not_reached": [], "refused": []}
            assert count > 0
            assert measured["machine"]["tiny"]
            compiled = {"compile"} if section == "benchmarks" else set()
            assert {row["provider"] for row in measured["rows"]} == {"eager", "cpp", "copy", *compiled}
            assert {row["metric"] for row in measured["rows"]} == {"wall"}


def test_too_small_a_budget_skips_sections_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_run.main(["B", "--output", str(tmp_path), "--dry-run", "--budget", "4"]) == 0
    sections, _ = _unpacked(tmp_path, "B")
    wanted = [section.name for section in gpu_run.SECTIONS if "B" in section.calls]
    assert {name: each["status"] for name, each in sections.items()} == dict.fromkeys(wanted, "skipped")
    assert sections["tests"]["reason"] == "3 s of 4 s left, needs 20 s"
    assert "benchmarks   skipped" in capsys.readouterr().out


def test_a_section_that_hangs_or_fails_loses_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(run: gpu_run.Run) -> tuple[dict, str | None]:
        sleeps = "print('begun', flush=True); import time; time.sleep(60)"
        # Two at the same time, of which one ends by itself.
        found = run.commands({"long": (sys.executable, "-c", sleeps), "short": (sys.executable, "-c", "exit(3)")})
        return {"output": found["long"][1], "short": found["short"][0]}, found["long"][0]

    def breaks(run: gpu_run.Run) -> tuple[dict, str | None]:
        raise KeyError("planted")

    def works(run: gpu_run.Run) -> tuple[dict, str | None]:
        return {"left": run.section_left()}, None

    chosen = (
        gpu_run.Section("tests", "A", hangs, 0, 0.15),
        gpu_run.Section("tools", "A", breaks, 0, 1),
        gpu_run.Section("ceilings", "A", works, 0, 1),
        gpu_run.Section("benchmarks", "A", works, 1000, 1),
        gpu_run.Section("first_cases", "B", works, 0, 1),
    )
    monkeypatch.setattr(gpu_run, "SECTIONS", chosen)
    # Of a section that does not end, the file has the others; a file that is replaced meanwhile stops nothing.
    monkeypatch.setattr(gpu_run, "PACK_S", 0)
    pack, calls = gpu_run.Run.pack, []

    def fails_once(run: gpu_run.Run) -> None:
        calls.append(run)
        if len(calls) == 1:
            raise FileNotFoundError("replaced")
        pack(run)

    monkeypatch.setattr(gpu_run.Run, "pack", fails_once)
    start = time.monotonic()
    assert gpu_run.main(["A", "--output", str(tmp_path), "--dry-run", "--budget", "20"]) == 1
    assert time.monotonic() - start < 20
    sections, files = _unpacked(tmp_path)
    assert sections["tests"]["status"] == "failed"
    assert sections["tests"]["reason"] == "stopped at its time limit"
    assert sections["tests"]["results"]["short"] == "exit code 3"
    output = sections["tests"]["results"]["output"]
    assert output.splitlines()[1] == "begun"
    assert output.endswith("KeyboardInterrupt\n")
    assert files["long.log"] == output
    assert sections["tools"]["reason"] == "KeyError: 'planted'"
    assert sections["ceilings"]["status"] == "ok"
    assert sections["benchmarks"]["status"] == "skipped"
    assert "needs 1000 s" in sections["benchmarks"]["reason"]
    assert "first_cases" not in sections


def test_every_line_of_gpu_first_is_a_test(request: pytest.FixtureRequest) -> None:
    if any("::" in each for each in request.config.args):
        pytest.skip("the files of those tests were not collected whole")
    assert request.config.stash[conftest.NO_TESTS] == []


def _run(folder: Path, **options: object) -> gpu_run.Run:
    (folder / "files").mkdir()
    given = {"call": "A", "output": folder / "out", "budget": 100, "dry_run": True, **options}
    run = gpu_run.Run(argparse.Namespace(**given), folder / "files")
    run.section_end = time.monotonic() + 100
    return run


def _small_tests(folder: Path, conftest_text: str, tests: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in a folder that stands for the checkout."""
    (folder / "tests").mkdir()
    # The root of its tests, or pytest takes one that this checkout shares with it.
    (folder / "tests" / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    # What writes failures, without what skips tests marked gpu here.
    hooks = (conftest._gpu_is_lost, conftest.pytest_runtest_logreport)
    hook = "\n\n".join(map(inspect.getsource, hooks))
    (folder / "tests" / "conftest.py").write_text(f"import os\n\nimport pytest\n{conftest_text}\n{hook}")
    (folder / "tests" / "test_one.py").write_text(f"import os, pytest, signal\n\n{tests}")
    monkeypatch.setattr(gpu_run, "TESTS", folder / "tests")
    # The run's pytest would take itself for a worker of the pytest around it, whose failures another process writes.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


FAILS = "@pytest.mark.gpu\ndef test_fails():\n    assert 6 * 7 == 43\n"


def test_failures_are_kept_of_tests_that_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = "@pytest.mark.gpu\ndef test_dies():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    _small_tests(tmp_path, "", f"{FAILS}\n{dies}", monkeypatch)
    run = _run(tmp_path)
    results, problem = gpu_run.run_tests(run, "tests", "gpu", [str(gpu_run.TESTS)])
    assert problem == "exit code -9"
    assert results["failures"] == ["test_one.py::test_fails"]
    assert "assert (6 * 7) == 43" in (run.folder / "tests_failures.txt").read_text()


def test_a_worker_that_lost_the_gpu_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of torch, whose import takes seconds, and of a GPU: what every call says after an illegal address.
    gpu = "from types import SimpleNamespace\n\nlost = []\n\n\ndef call():\n    if lost:\n"
    gpu += "        raise RuntimeError('an illegal memory access')\n\n\n"
    gpu += "torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=call))\n"
    poisons = "def test_poisons():\n    conftest.lost.append(1)\n    conftest.call()\n"
    lives = "@pytest.mark.parametrize('i', range(4))\ndef test_lives(i):\n    conftest.call()\n"
    marked = "import conftest\n\npytestmark = pytest.mark.gpu\n"
    _small_tests(tmp_path, gpu, f"{marked}\n{FAILS}\n{poisons}\n{lives}", monkeypatch)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    run = _run(tmp_path)
    run.has_gpu = True
    results, problem = gpu_run.run_tests(run, "tests", "gpu", [str(gpu_run.TESTS)])
    assert problem == "exit code 1"
    # Of the one that poisons also that its worker ended.
    assert results["failures"] == ["test_one.py::test_fails"] + ["test_one.py::test_poisons"] * 2
    assert results["passed"] == 4
    assert "an illegal memory access" in (run.folder / "tests_failures.txt").read_text()


def test_without_a_gpu_nothing_is_run_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "SECTIONS", (gpu_run.Section("tests", "B", lambda run: ({}, None), 0, 1),))
    assert gpu_run.main(["B", "--output", str(tmp_path), "--only", "tests"]) == 1
    sections, _ = _unpacked(tmp_path, "B")
    assert sections == {"tests": {"status": "skipped", "reason": "no GPU; --dry-run tries the call without one"}}


def test_a_gpu_without_a_known_commit_or_a_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path)
    info = {"backends": {"cuda": {"cpp": "no library", "triton": None}}}
    said = {"device_type": "cuda", "commit": None, "info": info}
    monkeypatch.setattr(run, "json_of", lambda *_: (said, None))
    _, problem = gpu_run.environment(run)
    assert problem == "the commit is unknown; FPN_FAST_COMMIT in the environment says it; no library"
    assert run.has_gpu


#: As ncu prints it.
NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","void fpn_fast::<unnamed>::top_down_kernel<float, true>(Maps)","smsp__inst_executed.sum","inst","1,065"
"1","7","void cub::Sort<int>::DeviceRadixSortKernel<int>(int)","smsp__inst_executed.sum","inst","9"
"2","7","nms_kernel","smsp__inst_executed.sum","inst","30"
"""


def test_what_was_modelled_and_counted_stands_beside_times() -> None:
    names = (
        "void fpn_fast::(anonymous namespace)::top_down_kernel<float, true>(Maps)",
        "Memset (Device)",
        "nms_kernel",
    )
    launches = kernels.of_one_call([(name, us) for us in (3.0, 1.0, 2.0) for name in names], 3)
    assert [(each["kernel"], each["us"]) for each in launches] == [
        (n, 2.0) for n in ("top_down_kernel", "Memset", "nms_kernel")
    ]
    with pytest.raises(ValueError, match="2 calls launched 3 kernels, not the same in each"):
        kernels.of_one_call([(name, 1.0) for name in names], 2)
    modelled = [{"kernel": "top_down_kernel", "model_us": 24.1, "warp_instructions": 1065}]
    kernels.with_model(launches, [*modelled, {"kernel": "nms_kernel", "floor_us": 1.5}])
    found = {"rows": [{"case": "merge", "backend": "cpp", "kernels": launches}]}
    assert (
        kernels.with_counts(found, NCU.replace("nms_kernel", "other_kernel"))
        == "launch 1 is nms_kernel, and other_kernel to ncu"
    )
    assert kernels.with_counts(found, NCU.rpartition('"2"')[0]) == "ncu counted 1 of 2 launches"
    assert kernels.with_counts(found, NCU) is None
    assert kernels.lines(found) == [
        "merge cpp top_down_kernel: 2.0 us, model 24.1, instructions of the emulator 1065, of ncu 1065",
        "merge cpp Memset: 2.0 us",
        "merge cpp nms_kernel: 2.0 us, floor of the model 1.5, of ncu 30",
    ]


def test_sanitizers_and_counters_run_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of the tools: each ends once all four have begun.
    stand_in = f"""#!{sys.executable}
import pathlib, sys, time
name = sys.argv[2] if sys.argv[1] == "--tool" else "ncu"
folder = pathlib.Path(__file__).parent
(folder / f"{{name}}.begun").touch()
while len(list(folder.glob("*.begun"))) < 4:
    time.sleep(0.01)
if name == "ncu":
    pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1]).write_text({NCU!r})
else:
    print("========= ERROR SUMMARY: 1 error" if name == "racecheck" else "========= ERROR SUMMARY: 0 errors")
    sys.exit(9 if name == "racecheck" else 0)
"""
    (tmp_path / "bin").mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (tmp_path / "bin" / name).write_text(stand_in)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    run = _run(tmp_path)
    run.has_gpu = True
    launches = [{"kernel": name} for name in ("top_down_kernel", "nms_kernel")]
    run.found["sections"]["kernels"] = {"results": {"rows": [{"kernels": launches}]}}
    results, problem = gpu_run.tools(run)
    assert results == {
        "memcheck": "ERROR SUMMARY: 0 errors; exit code 0",
        "racecheck": "ERROR SUMMARY: 1 error; exit code 9",
        "initcheck": "ERROR SUMMARY: 0 errors; exit code 0",
        "ncu": "exit code 0",
    }
    assert problem == f"racecheck: {results['racecheck']}"
    assert [each["instructions"] for each in launches] == [1065, 30]
