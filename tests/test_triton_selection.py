# SPDX-License-Identifier: Apache-2.0
"""Triton's proposals, detections and suppression: on ties and bad numbers, without host synchronisation. And its
samples of a bin."""

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import devices
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fpn_fast import backends, ops
from fpn_fast.ops.generate_proposals import DETECTRON2, MMDET, TORCHVISION

pytest.importorskip("triton")
import triton
import triton.language as tl

import fpn_fast.triton
from fpn_fast.triton import _greedy_nms, _head_decoding
from fpn_fast.triton._roi_align import adaptive_samples

NAN, INF = math.nan, math.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PYRAMID = ((6, 5), (3, 4), (1, 2))
STRIDES = [(4, 5), (8, 9), (16, 16)]
CELLS = [[(-9.0 * s, -7.0 * s, 9.0 * s, 7.0 * s), (0.0, 0.0, 5.0, 6.0)] for s in (1, 2, 4)]
SIZES = torch.tensor([[24, 25], [23, 19]])


def few(shape, dtype, seed, kinds=10):
    """Of these numbers the first `kinds`: 0 and -0 are one, and of half precision all are exact."""
    values = torch.tensor([0.0, -0.0, 0.25, -0.5, 1.5, -3.0, 5.0, INF, NAN, -INF])
    index = torch.randint(0, kinds, shape, generator=torch.Generator().manual_seed(seed))
    return values[index].to(dtype)


def maps(channels, dtype, seed, kinds=10):
    """In both memory formats, inside larger ones of NaN."""
    made = []
    for i, size in enumerate(PYRAMID):
        m = few((2, channels, *size), dtype, seed + i, kinds)
        frame = torch.full((2, channels + 1, size[0] + 1, size[1] + 2), NAN, dtype=dtype)
        frame = frame.contiguous(memory_format=FORMATS[i % 2])
        frame[:, 1:, 1:, 1:-1] = m
        made.append(frame[:, 1:, 1:, 1:-1])
    return made


def check(call, *tensors, oracle="reference"):
    """`call` gives the same numbers on Triton as on the CPU."""
    with backends.use(oracle):
        expected = call(*tensors)
    here = tree_map_only(torch.Tensor, lambda t: devices.moved(t, DEVICE), tensors)
    with backends.use("triton"):
        found = call(*here)
    assert all(a.dtype == b.dtype and torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    return expected


def oracle_of(dtype):
    """float64 has no exponential of more digits to round: there the compiled library has the same one, and PyTorch's
    may be a unit off."""
    return "cpp" if dtype == torch.float64 else "reference"


PROPOSALS = [
    {**vars(TORCHVISION), "pre_nms_top_n": 40, "score_thresh": 0.05},
    {**vars(DETECTRON2), "pre_nms_top_n": 12, "center_offset": 0.5, "weights": (2.0, 2.0, 4.0, 4.0)},
    {**vars(MMDET), "pre_nms_top_n": 1000, "means": (0.1, -0.1, 0.05, 0.0), "stds": (0.5, 0.5, 2.0, 2.0)},
    {**vars(TORCHVISION), "pre_nms_top_n": 25, "center_clamp": 5.0, "min_size": 4.0},
]


@pytest.mark.parametrize(("dtype", "options"), [*zip(DTYPES, PROPOSALS, strict=True), (torch.float32, PROPOSALS[2])])
def test_proposals(dtype, options):
    def propose(objectness, deltas, sizes):
        return ops.generate_proposals(
            objectness, deltas, CELLS, STRIDES, sizes, **{"post_nms_top_n": 50, "nms_thresh": 0.5, **options}
        )

    found = check(propose, maps(2, dtype, 0), maps(8, dtype, 9, 8), SIZES, oracle=oracle_of(dtype))
    assert found[2].min() > 5


@pytest.mark.parametrize("coder", ["deltas", "distances"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_detections(dtype, coder):
    centerness = maps(2, dtype, 5) if coder == "distances" else []

    def select(logits, deltas, centers, sizes):
        return ops.select_detections(
            logits, deltas, CELLS, STRIDES, sizes, score_thresh=0.5 if coder == "deltas" else 0.3, pre_nms_top_n=30,
            nms_thresh=0.4, max_detections=40, centerness=centers, coder=coder,
        )  # fmt: skip

    deltas = maps(8, dtype, 9, 8)
    found = check(select, maps(6, dtype, 0), deltas, centerness, SIZES, oracle=oracle_of(dtype))
    assert found[3].min() > 3


@pytest.mark.parametrize("class_top_n", [None, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_detections_of_boxes(shared, class_top_n):
    generator = torch.Generator().manual_seed(3)
    boxes = torch.rand(2, 30, 4, generator=generator).cumsum(2) * 10
    boxes[0, 4, 1] = NAN
    logits, deltas = few((2, 30, 4), torch.float32, 1), few((2, 30, 4 if shared else 16), torch.float32, 2, 8)

    def select(logits, deltas, boxes, counts, sizes):
        return ops.select_box_detections(
            logits, deltas, boxes, counts, sizes, score_thresh=0.05, nms_thresh=0.4, max_detections=25, min_size=0.5,
            class_top_n=class_top_n,
        )  # fmt: skip

    found = check(select, logits, deltas, boxes, torch.tensor([30, 25]), SIZES)
    assert found[3].min() > 0


def test_nothing_there_and_nothing_wanted():
    objectness, deltas = maps(2, torch.float32, 0), maps(8, torch.float32, 1, 7)
    for batch, top_n, limit in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        heads = [m[:batch] for m in objectness], [m[:batch] for m in deltas]
        numbers = {"pre_nms_top_n": top_n, "nms_thresh": 0.5}
        check(
            lambda *heads, limit=limit, numbers=numbers: ops.generate_proposals(
                *heads[:2], CELLS, STRIDES, heads[2], post_nms_top_n=limit, **numbers
            ),
            *heads, SIZES[:batch],
        )  # fmt: skip
        check(
            lambda *heads, limit=limit, numbers=numbers: ops.select_detections(
                *heads[:2], CELLS, STRIDES, heads[2], score_thresh=0.1, max_detections=limit, **numbers
            ),
            *heads, SIZES[:batch],
        )  # fmt: skip
    for shape in ((0, 9, 3), (2, 0, 3), (2, 9, 1)):
        check(
            lambda logits, deltas, boxes, sizes: ops.select_box_detections(
                logits, deltas, boxes, None, sizes, score_thresh=0.1, nms_thresh=0.5, max_detections=4
            ),
            torch.zeros(shape), torch.zeros(*shape[:2], 4), torch.ones(*shape[:2], 4), SIZES[: shape[0]],
        )  # fmt: skip


class NothingIsCopied(TorchDispatchMode):
    """Raises where tensors of a CPU and of a GPU meet, as in a copy from one to the other, which is waited for."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        tensors = [each for each in tree_leaves((arguments, options, found)) if isinstance(each, torch.Tensor)]
        assert len({each.device.type for each in tensors}) <= 1, function
        return found


class Launched:
    """A kernel that is only counted."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        self.count += 1


@pytest.fixture
def launches(monkeypatch):
    """Kernels by name, none of which runs, so that fake tensors can be their arguments."""
    kernels = {}
    for module, names in (
        (_greedy_nms, ("greedy_nms_kernel", "nms_removal_kernel")),
        (_head_decoding, ("rank_kernel", "decode_head_kernel", "decode_boxes_kernel")),
    ):
        for name in names:
            kernels[name] = Launched()
            monkeypatch.setattr(module, name, kernels[name])
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    return kernels


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nothing_between_the_kernels_waits(launches, dtype):
    """Fake tensors have no values, so that what looks at one raises; and what is launched follows from sizes alone."""
    with FakeTensorMode(), NothingIsCopied():
        made = lambda channels: [torch.empty(2, channels, 40, 30, device="cuda", dtype=dtype)]  # noqa: E731
        sizes, ones = torch.empty(2, 2, device="cuda", dtype=dtype), [1.0] * 4
        found = fpn_fast.triton.generate_proposals.generate_proposals(
            made(3), made(12), [1.0] * 12, [4, 4], sizes, 2500, 90, 0.7, 0.1, 0.0, ones, ones, ones, 4.0, False, False,
            0.0, INF, False, False, 0,
        )  # fmt: skip
        assert [each.shape for each in found] == [(2, 90, 4), (2, 90), (2,)]
        # 2500 boxes are 3 regions.
        assert [launches[name].count for name in ("greedy_nms_kernel", "nms_removal_kernel")] == [3, 2]
        found = fpn_fast.triton.select_detections.select_detections(
            made(6), made(12), made(3), [1.0] * 12, [4, 4], sizes, 0.1, 500, 0.5, 90, ones, 4.0, False
        )
        assert [each.shape for each in found] == [(2, 90, 4), (2, 90), (2, 90), (2,)]
        tables = [torch.empty(2, 700, n, device="cuda", dtype=dtype) for n in (5, 20, 4)]
        counts = torch.empty(2, device="cuda", dtype=torch.int64)
        found = fpn_fast.triton.select_box_detections.select_box_detections(
            *tables, counts, sizes, 0.1, 0.0, 300, 0.5, 90, ones, 4.0
        )
        assert [each.shape for each in found] == [(2, 90, 4), (2, 90), (2, 90), (2,)]
        # Of the 2800 pairs no class has more than 300.
        assert launches["greedy_nms_kernel"].count == 5
        groups = torch.empty(2, 700, device="cuda", dtype=torch.int64)
        for convention in range(3):
            found = fpn_fast.triton.segmented_nms.segmented_nms(
                tables[2], tables[0][..., 0], groups, counts, 0.5, 90, convention
            )
            assert [each.shape for each in found] == [(2, 90), (2,)]
    assert all(kernel.count > 0 for kernel in launches.values())


@triton.jit
def samples_kernel(bins, samples, ACC: tl.constexpr):
    tl.store(samples + tl.program_id(0), adaptive_samples(tl.load(bins + tl.program_id(0)), ACC))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_a_bin_are_its_size_rounded_up(dtype):
    most, least = 2.0**20, torch.finfo(dtype).smallest_normal
    sizes = [least * torch.finfo(dtype).eps, least / 2, least, 0.5, 1.0, 1.0 + torch.finfo(dtype).eps, 2.0, 6.5, most]
    bins = torch.tensor([*sizes, most + 1, INF, -INF, NAN, 0.0, -1.5], dtype=dtype, device=DEVICE)
    samples = torch.full_like(bins, -1, dtype=torch.int32)
    samples_kernel[bins.numel(),](bins, samples, tl.float64 if dtype == torch.float64 else tl.float32)
    assert samples.tolist() == [1, 1, 1, 1, 1, 2, 2, 7, 2**20, 0, 0, 0, 0, 0, 0]
