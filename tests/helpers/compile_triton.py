# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels ahead of time, with no GPU, and prints what came out as JSON. A program of its own,
because the tests around it run Triton's interpreter: `python compile_triton.py 90 80 100`. Every variant is compiled
for the first architecture, and one variant of each kernel for the others."""

import itertools
import json
import math
import re
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import ceiling_kernels, ceilings, nvidia_mapping
from fpn_fast.ops._checks import DTYPES
from fpn_fast.triton import (
    _resample,
    frozen_batch_norm,
    generate_proposals,
    heatmaps_to_keypoints,
    match_anchors,
    multiscale_roi_align,
    multiscale_roi_align_max,
    paste_masks,
    select_box_detections,
    select_detections,
    sigmoid_focal_loss,
    top_down,
)
from tools import gpu_emulator


class Driver:
    """What a launch asks of a GPU before it compiles."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def launches_compiled(arch, once=False):
    """A list that gets (kernel, what it is compiled to, its constants) at every launch from now on.

    once: at the first launch of each kernel alone.
    """
    compiled, known = [], set()

    def launch(kernel, grid):
        def compile_it(*arguments, **options):
            if not once or kernel not in known:
                known.add(kernel)
                compiled.append((kernel, kernel.run(*arguments, grid=grid, warmup=True, **options), options))

        return compile_it

    JITFunction.__getitem__ = launch
    driver.set_active(Driver(arch))
    return compiled


def launches_keyed(arch):
    """A list that gets (kernel's name, its variant) at every launch from now on. Nothing is compiled."""
    keyed = []

    def launch(kernel, grid):
        def note(*arguments, **options):
            binder = kernel.device_caches[arch][-1]
            keyed.append((kernel.__name__, str(binder(*arguments, **options)[1:])))

        return note

    JITFunction.__getitem__ = launch
    driver.set_active(Driver(arch))
    return keyed


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def maps(dtype, channels_last, channels, *sizes, batch=1):
    """Not filled: what is launched does not run."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.empty((batch, channels, *size), dtype=dtype, memory_format=form) for size in sizes]


def launch_top_down(dtype, channels_last, mode, sizes=((16, 32), (8, 16), (4, 8)), channels=256, batch=1):
    merged = maps(dtype, channels_last, channels, *sizes, batch=batch)
    code = getattr(_resample, mode.upper()).value
    top_down.top_down(merged, code, False)
    top_down.top_down_backward(merged[:-1], *sizes[-1], code, False)


def launch_match_anchors(dtype, stored, sizes=((50, 84), (25, 42)), batch=2):
    """With low-quality matches, for the anchors of a pyramid."""
    gts, counts = torch.zeros(batch, 7, 4, dtype=dtype), torch.zeros(batch, dtype=torch.int64)
    cells, strides = [-8.0, -8.0, 8.0, 8.0] * 3 * len(sizes), [4 << i // 2 for i in range(2 * len(sizes))]
    grid = ([], [], [], []) if stored else (cells, [3] * len(sizes), list(itertools.chain(*sizes)), strides)
    anchors = gts.new_zeros(2, 999, 4) if stored else None
    match_anchors.match_anchors(gts, counts, anchors, None, *grid, 0.0, 0.7, 0.3, True)


def launch_paste_masks(dtype, threshold, image=(45, 67)):
    boxes = torch.zeros(3, 4, dtype=wide(dtype))
    paste_masks.paste_masks(torch.zeros(3, 1, 28, 28, dtype=dtype), boxes, *image, 1, threshold)


def launch_sigmoid_focal_loss(dtype, with_gradient, anchors=200, classes=91):
    labels, weights = torch.empty(anchors, dtype=torch.int64), torch.empty(anchors, dtype=wide(dtype))
    logits = torch.empty(anchors, classes, dtype=dtype)
    sigmoid_focal_loss.sigmoid_focal_loss(logits, labels, weights, 0.25, with_gradient)


def launch_frozen_batch_norm(dtype, channels_last, vectors, size=(32, 48), channels=256, batch=1):
    """The end of a block, forward and backward, with the sums for weight and bias; under autocast a wide one."""
    x, residual = maps(dtype, channels_last, channels, size, size, batch=batch)
    norm = [torch.zeros(channels, dtype=vectors) for _ in range(4)]
    y = frozen_batch_norm.frozen_batch_norm(x, norm, 1e-5, residual, norm, True, 0, vectors != dtype)
    code = DTYPES.index(dtype)
    frozen_batch_norm.frozen_batch_norm_backward(y, y, norm, 1e-5, norm, 0, code, code)
    frozen_batch_norm.frozen_batch_norm_sums(y, y, x, torch.zeros(channels, dtype=wide(dtype)))


def launch_heatmaps_to_keypoints(dtype):
    heatmaps = torch.zeros(3, 17, 56, 56, dtype=dtype)
    heatmaps_to_keypoints.heatmaps_to_keypoints(heatmaps, torch.zeros(3, 4, dtype=wide(dtype)))


def head(dtype, channels, sizes, batch):
    return maps(dtype, False, channels, *sizes, batch=batch)


def launch_generate_proposals(dtype, mmdet, sizes=((25, 42),), batch=2):
    """mmdetection's, or torchvision's of more boxes than one region of suppression has."""
    ones, images = [1.0] * 4, torch.ones(batch, 2, dtype=wide(dtype))
    generate_proposals.generate_proposals(
        head(dtype, 3, sizes, batch), head(dtype, 12, sizes, batch), [1.0] * 12 * len(sizes), [16, 16] * len(sizes),
        images, 1000 if mmdet else 2000, 1000, 0.7, 0.0, 1e-3, ones, [0.0] * 4, ones, 4.0, mmdet, mmdet, 0.0, math.inf,
        mmdet, False, int(mmdet),
    )  # fmt: skip


def launch_select_detections(dtype, sizes=((25, 42),), batch=2, classes=5):
    """FCOS's, of more boxes than one region of suppression has."""
    select_detections.select_detections(
        head(dtype, classes, sizes, batch), head(dtype, 4, sizes, batch), head(dtype, 1, sizes, batch),
        [1.0] * 4 * len(sizes), [16, 16] * len(sizes), torch.ones(batch, 2), 0.05, 2000, 0.5, 100,
        [10.0, 10.0, 5.0, 5.0], 4.0, True,
    )  # fmt: skip


def launch_detections(dtype):
    """A dense head's and a second stage's."""
    launch_select_detections(dtype)
    tables = torch.zeros(2, 70, 6), torch.zeros(2, 70, 24), torch.zeros(2, 70, 4)
    weights, sizes = [10.0, 10.0, 5.0, 5.0], torch.ones(2, 2)
    select_box_detections.select_box_detections(*tables, None, sizes, 0.05, 0.0, None, 0.5, 100, weights, 4.0)


def launch_roi_align(
    dtype, channels_last, sampling_ratio, sizes=((25, 40), (13, 20)), channels=256, batch=1, gradient_of=0
):
    """The op and the gradient of one map in both modes."""
    pyramid = maps(dtype, channels_last, channels, *sizes, batch=batch)
    scales, thresholds = [2.0**-i for i in range(len(sizes))], [448.0**2 * 4**i for i in range(len(sizes) - 1)]
    rois, options = torch.zeros(2, 5, dtype=wide(dtype)), (sampling_ratio, False)
    # Its kernel is the same for every map.
    one = (rois, None, batch, list(sizes[gradient_of]), scales[:1], [], *options, channels_last)
    out = multiscale_roi_align.multiscale_roi_align(pyramid, rois, None, 7, 7, scales, thresholds, *options)
    multiscale_roi_align.multiscale_roi_align_backward(out, *one)
    found = multiscale_roi_align_max.multiscale_roi_align_max(pyramid, rois, None, 7, 7, scales, thresholds, *options)
    multiscale_roi_align_max.multiscale_roi_align_max_backward(*found, *one)


def launch_nvidia_mapping(dtype, sampling_ratio):
    """The rival of benchmarks, forward and backward."""
    leaves = [each.requires_grad_() for each in maps(dtype, True, 256, *((size, size) for size in (32, 16, 8, 4)))]
    sizes = torch.tensor([each.shape[-2:] for each in leaves], dtype=torch.int32)
    rois = torch.tensor([[0.0, 1.0, 1.0, 9.0, 9.0]])
    pooled = nvidia_mapping.pool(leaves, rois, torch.tensor([1 / 4, 1 / 8, 1 / 16, 1 / 32]), sizes, 7, sampling_ratio)
    torch.autograd.grad(pooled, leaves, torch.zeros_like(pooled))


def launch_limits(dtype):
    """The kernels that measure a GPU's limits."""
    values, numbers = torch.zeros(4096), {"CONVERSIONS": ceiling_kernels.CONVERSIONS, "STEP": ceiling_kernels.STEP}
    ceiling_kernels.l2_read_kernel[(1,)](values, values, 7, 5, BLOCK=4096, num_warps=8)
    for _, cache in ceilings.CHASES.values():
        place, text = torch.zeros(1, dtype=torch.int64), ceiling_kernels.chase(cache)
        ceiling_kernels.chase_kernel[(1,)](place, 7, CHASE=text, num_warps=1)
    ceiling_kernels.convert_kernel[(1,)](values, 7, BLOCK=256, **numbers, num_warps=8)


def pyramid_of(image, *strides):
    return [tuple(-(-side // stride) for side in image) for stride in strides]


def launch_sums_of_losses(dtype, image, batch):
    """RetinaNet's losses, of its anchors."""
    anchors = 9 * batch * sum(height * width for height, width in pyramid_of(image, 8, 16, 32, 64, 128))
    launch_sigmoid_focal_loss(dtype, True, anchors, 4)


def launches_of_image(dtype, image, batch):
    """(whether channels_last, what launches kernels) of ops whose arguments depend on the size of an image."""
    maps_of_image, heads_of_image = pyramid_of(image, 4, 8, 16, 32), pyramid_of(image, 4, 8, 16, 32, 64)
    sized = {"channels": 16, "batch": batch}
    for last in (False, True):
        yield last, partial(launch_top_down, dtype, last, "nearest", maps_of_image, **sized)
        for i, size in enumerate(maps_of_image):
            yield last, partial(launch_frozen_batch_norm, dtype, last, F32, size, **sized)
            yield last, partial(launch_roi_align, dtype, last, 2, maps_of_image, gradient_of=i, **sized)
    yield False, partial(launch_match_anchors, F32, False, heads_of_image, batch)
    yield False, partial(launch_paste_masks, dtype, 0.5, image)
    yield False, partial(launch_sums_of_losses, dtype, image, batch)
    # PyTorch sorts for them, which takes its time.
    if dtype == F32 and image[0] == image[1]:
        yield False, partial(launch_generate_proposals, dtype, False, heads_of_image, batch)
        yield True, partial(launch_select_detections, dtype, heads_of_image, batch, 1)


F64, F32, B16 = torch.float64, torch.float32, torch.bfloat16
#: (type, whether channels_last, what is special, what launches the kernels)
LAUNCHES = [
    *((dtype, last, mode, partial(launch_top_down, dtype, last, mode)) for dtype, last, mode in (
        (B16, True, "nearest"), (F32, False, "nearest"), (F32, True, "bilinear"), (F64, False, "bilinear"))),
    *((dtype, True, "stored" if stored else "made", partial(launch_match_anchors, dtype, stored))
      for dtype, stored in ((F32, False), (F64, True))),
    *((dtype, True, f"threshold {threshold}", partial(launch_paste_masks, dtype, threshold))
      for dtype, threshold in ((B16, None), (F32, 0.5), (F64, 0.5))),
    *((dtype, True, f"gradient {gradient}", partial(launch_sigmoid_focal_loss, dtype, gradient))
      for dtype, gradient in ((B16, True), (F32, True), (F32, False), (F64, True))),
    *((dtype, last, f"vectors of {vectors}", partial(launch_frozen_batch_norm, dtype, last, vectors))
      for dtype, last, vectors in ((B16, True, F32), (B16, False, B16), (F32, True, F32), (F32, False, F32),
                                   (F64, True, F64))),
    *((dtype, False, "keypoints", partial(launch_heatmaps_to_keypoints, dtype)) for dtype in (B16, F64)),
    *((dtype, False, "mmdet" if mmdet else "torchvision", partial(launch_generate_proposals, dtype, mmdet))
      for dtype, mmdet in ((B16, False), (F64, True))),
    (F32, False, "detections", partial(launch_detections, F32)),
    *((dtype, last, f"sampling_ratio {ratio}", partial(launch_roi_align, dtype, last, ratio))
      for dtype, last, ratio in ((B16, True, 2), (F32, False, -1), (F64, True, 3))),
    *((dtype, True, f"sampling_ratio {ratio}", partial(launch_nvidia_mapping, dtype, ratio))
      for dtype, ratio in ((F32, 2), (B16, 0))),
    (F32, True, "limits", partial(launch_limits, F32)),
]  # fmt: skip


def undecoded(compiled):
    """What of its code the emulator does not know, or nothing."""
    if gpu_emulator.compiler() is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        try:
            gpu_emulator.program(file.name, compiled.metadata.name)
        except gpu_emulator.EmulatorFault as fault:
            return str(fault)
    return ""


def row(kernel, compiled, arch, dtype, channels_last, mode):
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "dtype": dtype,
        "channels_last": channels_last,
        "mode": mode,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "threads": 32 * compiled.metadata.num_warps,
        "wide_loads": ptx.count("ld.global.v4.b32") + ptx.count("ld.global.v2.b64"),
        "loads_of_four": len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b32", ptx)),
        "wide_stores": ptx.count("st.global.v4.b32") + ptx.count("st.global.v2.b64"),
        "atomics": ptx.count("atom.") + ptx.count("red.global"),
        # Of integers: the same in any order.
        "atomic_maxima": len(re.findall(r"atom\.\S+\.max\.s(?:32|64)", ptx)),
        "fused_multiply_adds": ptx.count("fma.rn"),
        "approximations": len(re.findall(r"\.approx|div\.full", ptx)),
        "flushes_subnormals": ptx.count(".ftz"),
        # Others are not disassembled.
        "conversions": compiled.asm["sass"].count("F2F.BF16.F32") if kernel is ceiling_kernels.convert_kernel else 0,
        # Accesses and addresses: LLVM also declares what it does not use.
        "local": len(re.findall(r"(?:ld|st|cvta)\S*\.local", ptx)),
        "undecoded": undecoded(compiled) if arch == 90 else None,
    }


def variants(arch):
    """[kernel, whether channels_last, type, number of variants, whether a call was repeated with others] for images of
    32 to 1344 pixels."""
    keyed, rows = launches_keyed(arch), []
    sides = range(32, 1345, 32)
    images = [(side, other) for side in sides for other in (side, 1376 - side)]
    for dtype in (F32, B16):
        found, changes = defaultdict(set), defaultdict(bool)
        # Batches take turns.
        for batch, image in zip(itertools.cycle((1, 1, 2, 2)), images):
            for last, launch in launches_of_image(dtype, image, batch):
                calls = []
                # A call into a CUDA graph repeats one that warmed up: it must compile nothing.
                for _ in range(1 + (image[0] == 416)):
                    keyed.clear()
                    launch()
                    calls.append(list(keyed))
                for name, key in calls[0]:
                    found[name, last].add(key)
                    changes[name, last] |= calls[0] != calls[-1]
        rows += [(*each, str(dtype), len(keys), changes[each]) for each, keys in found.items()]
    return rows


def main():
    first, *others = map(int, sys.argv[1:])
    of_sizes = variants(first)
    rows = []
    for arch in (*others, first):
        compiled = launches_compiled(arch, once=arch != first)
        for dtype, channels_last, mode, launch in LAUNCHES:
            compiled.clear()
            launch()
            # A kernel that is launched again, as for each region of suppression, is the same one.
            for kernel, found, constants in {each[1].hash: each for each in compiled}.values():
                rows.append(row(kernel, found, arch, str(dtype).removeprefix("torch."), channels_last, mode))
                # The gradient of the coarsest map, which has no gradient of its own to add.
                rows[-1]["gathers_only"] = constants.get("HAS_GRAD") is False
    compiled.clear()
    for mode in ("nearest", "bilinear", "bilinear_align_corners"):
        launch_top_down(F32, False, mode, ((3, 1), (1, 1)), 1)
    sides_of_1 = [each[0].__name__ for each in compiled]
    print(json.dumps({"kernels": rows, "variants": of_sizes, "sides_of_1": sides_of_1}))


if __name__ == "__main__":
    main()
