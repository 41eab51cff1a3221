# SPDX-License-Identifier: Apache-2.0
"""Running out of memory is an error like another: it is raised, nothing is kept, and the next call is right."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fpn_fast import ops

# Inputs of one element each, seen as large: what runs out is what the op itself asks for.
CALLS = {
    "top_down": "ops.top_down([zero.expand(1, 64, 4096, 4096), zero.expand(1, 64, 2048, 2048)])",
    "top_down_backward": "torch.ops.fpn_fast.top_down_backward([zero.expand(1, 64, 8192, 8192)], 4096, 4096, 0, False)",
    "multiscale_roi_align": "ops.multiscale_roi_align([zero.expand(1, 256, 8, 8)], boxes(50_000, 5), 14, [1.0])",
    "multiscale_roi_align_max": "ops.multiscale_roi_align([zero.expand(1, 256, 8, 8)], boxes(50_000, 5), 14, [1.0],"
    " sampling_ratio=2, pool_mode='max')",
    "multiscale_roi_align_backward": "torch.ops.fpn_fast.multiscale_roi_align_backward(zero.expand(1, 64, 2, 2),"
    " boxes(1, 5), None, 1, [8192, 8192], [1.0], [], 2, False, False)",
    "multiscale_roi_align_max_backward": "torch.ops.fpn_fast.multiscale_roi_align_max_backward("
    "zero.expand(1, 64, 2, 2), zero.int().expand(1, 64, 2, 2), boxes(1, 5), None, 1, [8192, 8192], [1.0], [], 2,"
    " False, False)",
    "generate_proposals": "ops.generate_proposals([zero.expand(1, 3, 8192, 8192)], [zero.expand(1, 12, 8192, 8192)],"
    " [[(-8.0, -8.0, 8.0, 8.0)] * 3], [(4, 4)], torch.tensor([[64, 64]]), pre_nms_top_n=1 << 28,"
    " post_nms_top_n=1 << 28, nms_thresh=0.7)",
    "select_detections": "ops.select_detections([zero.expand(1, 3, 8192, 8192)], [zero.expand(1, 4, 8192, 8192)],"
    " [[(-8.0, -8.0, 8.0, 8.0)]], [(4, 4)], torch.tensor([[64, 64]]), score_thresh=0.0, pre_nms_top_n=1 << 28,"
    " nms_thresh=0.7, max_detections=1 << 28)",
    "select_box_detections": "ops.select_box_detections(zero[0].expand(1, 1 << 26, 4), zero[0].expand(1, 1 << 26, 4),"
    " zero[0].expand(1, 1 << 26, 4), None, torch.tensor([[64, 64]]), score_thresh=0.0, nms_thresh=0.7,"
    " max_detections=1 << 28)",
    "nms": "ops.nms(boxes(1 << 28, 4), zero.view(1).expand(1 << 28), 0.5)",
    "batched_nms": "ops.batched_nms(boxes(1 << 28, 4), zero.view(1).expand(1 << 28),"
    " torch.zeros(1, dtype=torch.int64).expand(1 << 28), 0.5)",
    "segmented_nms": "ops.segmented_nms(zero[0].expand(2, 1 << 28, 4), zero[0, 0].expand(2, 1 << 28), None, None, 0.5,"
    " 1 << 28)",
    "match_anchors": "ops.match_anchors(boxes(4, 4)[None], None, boxes(1 << 28, 4), high_threshold=0.5,"
    " low_threshold=0.4)",
    "paste_masks": "ops.paste_masks(zero.expand(4000, 1, 28, 28), boxes(4000, 4), (2000, 2000))",
    "sigmoid_focal_loss": "ops.sigmoid_focal_loss(zero[0, 0].expand(1 << 22, 91).requires_grad_(),"
    " torch.zeros(1, dtype=torch.int64).expand(1 << 22))",
    "frozen_batch_norm": "ops.frozen_batch_norm(zero.expand(1, 1 << 28, 2, 2), *zero.view(1).expand(4, 1 << 28), 1e-5)",
    "heatmaps_to_keypoints": "ops.heatmaps_to_keypoints(zero.expand(1 << 26, 17, 4, 4), boxes(1 << 26, 4))",
}

SCRIPT = """
import json, resource, sys, torch
from fpn_fast import ops

torch.set_num_threads(2)
zero = torch.zeros(1, 1, 1, 1)

def boxes(count, columns):
    return torch.zeros(1, columns).expand(count, columns)

def pages(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

def problem(call):
    sizes = []
    for turn in range(40):
        try:
            call()
            return "there was memory enough"
        except (RuntimeError, MemoryError) as error:
            if "memory" not in repr(error).lower() and "bad_alloc" not in repr(error):
                return repr(error)
        # Once, after a few turns, what finds the names for a message takes 12 MiB.
        if turn >= 20:
            sizes.append((pages("VmSize"), pages("VmRSS")))
    # A quarter of what 1 MiB lost at each call, the smallest of the inputs' copies, would come to.
    if any(last - first >= 5 << 20 for first, last in zip(sizes[0], sizes[-1])):
        return f"address space and memory grow: {sizes}"
    merged, _ = ops.top_down([torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2)])
    return None if merged.eq(2).all() else "the next call is wrong"

# The threads' stacks and arenas are there before the limit, and before the first measurement.
ops.top_down([torch.ones(1, 64, 64, 64), torch.ones(1, 64, 32, 32)])
resource.setrlimit(resource.RLIMIT_AS, (pages("VmSize") + (300 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
json.dump({name: problem(eval("lambda: " + text)) for name, text in json.loads(sys.argv[1]).items()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def problems():
    """Of each op, in one process: None where all is well."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(CALLS)]
    # The allocator as it comes, which returns what is freed; but one arena, since the threads' own ones are mapped and
    # given back 64 MiB at a time, whenever they please, and would look like a leak.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["MALLOC_ARENA_MAX"] = "1"
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's here")
@pytest.mark.parametrize("op", CALLS)
def test_on_the_cpu(op, problems):
    assert problems[op] is None


@pytest.mark.gpu
def test_on_a_gpu():
    """A merged map twice as large as all of the device's memory, then one that fits."""
    zero, free = torch.zeros(1, 1, 1, 1, device="cuda"), torch.cuda.mem_get_info()[1]
    side = 4096
    channels = 2 * free // (4 * side * side)
    laterals = [zero.expand(1, channels, side, side), zero.expand(1, channels, side // 2, side // 2)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with pytest.raises((RuntimeError, torch.OutOfMemoryError), match="memory"):
            ops.top_down(laterals)
        assert torch.cuda.memory_allocated() == before
    merged, _ = ops.top_down([torch.ones(1, 2, 4, 4, device="cuda"), torch.ones(1, 2, 2, 2, device="cuda")])
    assert merged.eq(2).all()
