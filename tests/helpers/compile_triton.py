# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels ahead of time, with no GPU, and prints what came out as JSON. A program of its own,
because the tests around it run Triton's interpreter: `python compile_triton.py 80 90 100`."""

import json
import math
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver

from fpn_fast.bench import nvidia_mapping
from fpn_fast.triton import (
    _resample,
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

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}


def compile_kernel(kernel, dtype, arch, channels_last, mode):
    """A kernel for dense maps whose strides are multiples of 16 bytes, and no more."""
    import triton.language as tl

    constants = {
        "MODE": mode,
        "AVERAGE": False,
        "CHANNELS_LAST": channels_last,
        "ACC": tl.float64 if dtype == "float64" else tl.float32,
        "VEC": 16 // (8 if dtype == "float64" else 4 if dtype == "float32" else 2),
        "BLOCK_OUTER": 4,
        "BLOCK_INNER": 256,
    }
    if "HAS_GRAD" in kernel.arg_names:
        constants["HAS_GRAD"] = True
    inner_stride = "_c" if channels_last else "_w"
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("lateral", "top", "out", "fine", "grad"):
            signature[name] = "*" + TYPES[dtype]
            divisible[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith(inner_stride):
            # Triton makes a constant of an argument that is 1.
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constants, divisible)
    options = {"num_warps": top_down.NUM_WARPS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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


def launches_compiled(arch):
    """A list that gets (kernel, what it is compiled to) at every launch from now on."""
    compiled = []

    def launch(kernel, grid):
        return lambda *arguments, **options: compiled.append(
            (kernel, kernel.run(*arguments, grid=grid, warmup=True, **options))
        )

    JITFunction.__getitem__ = launch
    driver.set_active(Driver(arch))
    return compiled


def compile_match_anchors(dtype, arch, stored):
    """The kernels that the op launches with low-quality matches, for the anchors of a pyramid."""
    compiled = launches_compiled(arch)
    gts, counts = torch.zeros(2, 7, 4, dtype=getattr(torch, dtype)), torch.zeros(2, dtype=torch.int64)
    cells, sizes, strides = [-8.0, -8.0, 8.0, 8.0] * 6, [50, 84, 25, 42], [16, 16, 32, 32]
    grid = ([], [], [], []) if stored else (cells, [3, 3], sizes, strides)
    anchors = gts.new_zeros(2, 999, 4) if stored else None
    match_anchors.match_anchors(gts, counts, anchors, None, *grid, 0.0, 0.7, 0.3, True)
    return compiled


def compile_paste_masks(dtype, arch, threshold):
    compiled = launches_compiled(arch)
    masks = torch.zeros(3, 1, 28, 28, dtype=getattr(torch, dtype))
    boxes = torch.zeros(3, 4, dtype=torch.float64 if dtype == "float64" else torch.float32)
    paste_masks.paste_masks(masks, boxes, 45, 67, 1, threshold)
    return compiled


def compile_sigmoid_focal_loss(dtype, arch, with_gradient):
    compiled = launches_compiled(arch)
    logits = torch.zeros(200, 91, dtype=getattr(torch, dtype))
    weights = torch.zeros(200, dtype=torch.float64 if dtype == "float64" else torch.float32)
    labels = torch.zeros(200, dtype=torch.int64)
    sigmoid_focal_loss.sigmoid_focal_loss(logits, labels, weights, 0.25, with_gradient)
    return compiled


def compile_heatmaps_to_keypoints(dtype, arch):
    compiled = launches_compiled(arch)
    heatmaps = torch.zeros(3, 17, 56, 56, dtype=getattr(torch, dtype))
    boxes = torch.zeros(3, 4, dtype=torch.float64 if dtype == "float64" else torch.float32)
    heatmaps_to_keypoints.heatmaps_to_keypoints(heatmaps, boxes)
    return compiled


def head_maps(channels, dtype):
    return [torch.zeros(2, channels, 25, 42, dtype=getattr(torch, dtype))]


def compile_generate_proposals(dtype, arch, mmdet):
    """mmdetection's, or torchvision's of more boxes than one region of suppression has."""
    compiled = launches_compiled(arch)
    ones, sizes = [1.0] * 4, torch.ones(2, 2, dtype=torch.float64 if dtype == "float64" else torch.float32)
    generate_proposals.generate_proposals(
        head_maps(3, dtype), head_maps(12, dtype), [1.0] * 12, [16, 16], sizes, 1000 if mmdet else 2000, 1000, 0.7, 0.0,
        1e-3, ones, [0.0] * 4, ones, 4.0, mmdet, mmdet, 0.0, math.inf, mmdet, False, int(mmdet),
    )  # fmt: skip
    return one_of_each(compiled)


def compile_detections(arch):
    """FCOS's, of more boxes than one region of suppression has, and a second stage's."""
    compiled = launches_compiled(arch)
    sizes, weights = torch.ones(2, 2), [10.0, 10.0, 5.0, 5.0]
    select_detections.select_detections(
        head_maps(5, "float32"), head_maps(4, "float32"), head_maps(1, "float32"), [1.0] * 4, [16, 16], sizes, 0.05,
        2000, 0.5, 100, weights, 4.0, True,
    )  # fmt: skip
    tables = torch.zeros(2, 70, 6), torch.zeros(2, 70, 24), torch.zeros(2, 70, 4)
    select_box_detections.select_box_detections(*tables, None, sizes, 0.05, 0.0, None, 0.5, 100, weights, 4.0)
    return one_of_each(compiled)


def one_of_each(compiled):
    """The kernel that suppresses is launched for each region, and is the same one."""
    return list({found.hash: (kernel, found) for kernel, found in compiled}.values())


def compile_roi_align(dtype, arch, channels_last, sampling_ratio):
    """The kernels that the op and its gradient launch in both modes, for a pyramid of 256 channels."""
    compiled = launches_compiled(arch)
    dtype, form = getattr(torch, dtype), torch.channels_last if channels_last else torch.contiguous_format
    sizes, scales, thresholds = [(25, 40), (13, 20)], [1 / 16, 1 / 32], [448.0**2]
    maps = [torch.empty(1, 256, *size, dtype=dtype).contiguous(memory_format=form) for size in sizes]
    rois = torch.zeros(2, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    options = (scales, thresholds, sampling_ratio, False)
    out = multiscale_roi_align.multiscale_roi_align(maps, rois, None, 7, 7, *options)
    # One map: the kernel is the same for every one.
    multiscale_roi_align.multiscale_roi_align_backward(
        out, rois, None, 1, [*sizes[0]], scales[:1], [], *options[2:], channels_last
    )
    out, winners = multiscale_roi_align_max.multiscale_roi_align_max(maps, rois, None, 7, 7, *options)
    multiscale_roi_align_max.multiscale_roi_align_max_backward(
        out, winners, rois, None, 1, [*sizes[0]], scales[:1], [], *options[2:], channels_last
    )
    return compiled


def compile_nvidia_mapping(dtype, arch, sampling_ratio):
    """The rival of benchmarks, forward and backward."""
    compiled = launches_compiled(arch)
    maps = [
        torch.zeros(1, 256, size, size, dtype=getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)
        for size in (32, 16, 8, 4)
    ]
    leaves = [each.requires_grad_() for each in maps]
    sizes = torch.tensor([each.shape[-2:] for each in maps], dtype=torch.int32)
    rois = torch.tensor([[0.0, 1.0, 1.0, 9.0, 9.0]])
    pooled = nvidia_mapping.pool(leaves, rois, torch.tensor([1 / 4, 1 / 8, 1 / 16, 1 / 32]), sizes, 7, sampling_ratio)
    torch.autograd.grad(pooled, leaves, torch.zeros_like(pooled))
    return compiled


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
        # Accesses and addresses: LLVM also declares what it does not use.
        "local": len(re.findall(r"(?:ld|st|cvta)\S*\.local", ptx)),
    }


def main():
    rows = []
    modes = {"nearest": _resample.NEAREST.value, "bilinear": _resample.BILINEAR.value}
    for arch in map(int, sys.argv[1:]):
        for kernel in (top_down.top_down_kernel, top_down.top_down_backward_kernel):
            for dtype, channels_last, mode in [
                ("bfloat16", True, "nearest"),
                ("float32", False, "nearest"),
                ("float32", True, "bilinear"),
                ("float64", False, "bilinear"),
            ]:
                compiled = compile_kernel(kernel, dtype, arch, channels_last, modes[mode])
                rows.append(row(kernel, compiled, arch, dtype, channels_last, mode))
        for dtype, stored in [("float32", False), ("float64", True)]:
            for kernel, compiled in compile_match_anchors(dtype, arch, stored):
                rows.append(row(kernel, compiled, arch, dtype, True, "stored" if stored else "made"))
        for dtype, threshold in [("bfloat16", None), ("float32", 0.5), ("float64", 0.5)]:
            for kernel, compiled in compile_paste_masks(dtype, arch, threshold):
                rows.append(row(kernel, compiled, arch, dtype, True, f"threshold {threshold}"))
        for dtype, with_gradient in [("bfloat16", True), ("float32", True), ("float32", False), ("float64", True)]:
            for kernel, compiled in compile_sigmoid_focal_loss(dtype, arch, with_gradient):
                rows.append(row(kernel, compiled, arch, dtype, True, f"gradient {with_gradient}"))
        for dtype in ("bfloat16", "float64"):
            for kernel, compiled in compile_heatmaps_to_keypoints(dtype, arch):
                rows.append(row(kernel, compiled, arch, dtype, False, "keypoints"))
        for dtype, mmdet in [("bfloat16", False), ("float64", True)]:
            for kernel, compiled in compile_generate_proposals(dtype, arch, mmdet):
                rows.append(row(kernel, compiled, arch, dtype, False, "mmdet" if mmdet else "torchvision"))
        for kernel, compiled in compile_detections(arch):
            rows.append(row(kernel, compiled, arch, "float32", False, "detections"))
        for dtype, channels_last, sampling_ratio in [
            ("bfloat16", True, 2),
            ("float32", False, -1),
            ("float64", True, 3),
        ]:
            for kernel, compiled in compile_roi_align(dtype, arch, channels_last, sampling_ratio):
                rows.append(row(kernel, compiled, arch, dtype, channels_last, f"sampling_ratio {sampling_ratio}"))
        for dtype, sampling_ratio in [("float32", 2), ("bfloat16", 0)]:
            for kernel, compiled in compile_nvidia_mapping(dtype, arch, sampling_ratio):
                rows.append(row(kernel, compiled, arch, dtype, True, f"sampling_ratio {sampling_ratio}"))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
