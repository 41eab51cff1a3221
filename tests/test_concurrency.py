# SPDX-License-Identifier: Apache-2.0
"""Calls from several threads at once, and from the workers of a data loader, forked and spawned."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fpn_fast import backends, ops

THREADS, TURNS = 4, 6


def results(seed: int) -> list[torch.Tensor]:
    """One call of each kind on data of `seed`: a merge and a pooler with their gradients, proposals, NMS, matching."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 8, size, size + 3, generator=generator).requires_grad_() for size in (16, 8)]
    merged = ops.top_down(maps)
    corners = (torch.rand(2, 20, 2, 2, generator=generator) * 60).sort(2).values.flatten(2)
    rois = torch.cat([torch.arange(2.0).repeat_interleave(20)[:, None], corners.view(-1, 4)], 1)
    pooled = ops.multiscale_roi_align(merged, rois, 3, [1 / 4, 1 / 8], sampling_ratio=2)
    gradients = torch.autograd.grad(pooled.square().sum(), maps)
    logits = [torch.randn(2, 3, 9, 9, generator=generator)]
    deltas = [torch.randn(2, 12, 9, 9, generator=generator) * 0.2]
    cells = [[(-8.0, -4.0, 8.0, 4.0), (-6.0, -6.0, 6.0, 6.0), (-4.0, -8.0, 4.0, 8.0)]]
    proposals = ops.generate_proposals(
        logits, deltas, cells, [(8, 8)], torch.tensor([[64, 72]] * 2), pre_nms_top_n=60, post_nms_top_n=30,
        nms_thresh=0.7,
    )  # fmt: skip
    kept = ops.nms(corners[0], torch.rand(20, generator=generator), 0.5)
    matches = ops.match_anchors(corners[:, :5], None, corners[0], high_threshold=0.5, low_threshold=0.3)
    return [pooled.detach(), *gradients, *proposals, kept, *matches]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_threads_do_not_disturb_each_other(backend):
    """Every thread gets what one alone gets, bit for bit; all start together, and switch often."""
    with backends.use(backend):
        alone = [results(seed) for seed in range(THREADS)]
        barrier = threading.Barrier(THREADS)

        def work(seed: int) -> bool:
            barrier.wait()
            return all(same(results(seed), alone[seed]) for _ in range(TURNS))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                assert list(pool.map(work, range(THREADS))) == [True] * THREADS
        finally:
            sys.setswitchinterval(interval)


class Samples(Dataset):
    """Data that a worker makes with our ops."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return [each.clone() for each in results(index)]


# A spawned worker imports torch anew, which takes seconds.
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader(method, workers):
    """After the parent has called the ops itself, as in training: a fork inherits what its threads left behind."""
    alone = [results(index) for index in range(len(Samples()))]
    loader = DataLoader(Samples(), batch_size=None, num_workers=workers, multiprocessing_context=method, timeout=120)
    found = list(loader)
    assert len(found) == len(alone)
    for ours, theirs in zip(found, alone, strict=True):
        assert same(ours, theirs)
