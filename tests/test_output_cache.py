# SPDX-License-Identifier: Apache-2.0
"""Kept memory: outputs get it again, never two at once, within the limit, and from any thread and process."""

import copy
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fpn_fast import _library, backends, ops, output_cache

MIB = 1 << 20

pytestmark = pytest.mark.skipif(_library.problems["cpu"] is not None, reason=str(_library.problems["cpu"]))


@pytest.fixture(autouse=True)
def empty_cache():
    """Every test begins and ends with nothing kept, at the usual limit."""
    before = output_cache.limit()
    output_cache.set_limit(512 * MIB)
    output_cache.clear()
    with backends.use("cpp"):
        yield
    output_cache.set_limit(before)
    output_cache.clear()


def merged(megabytes: int = 4, value: float = 0.0) -> torch.Tensor:
    """The finest map of a merge, which has `megabytes` MiB, all 1 + `value`; the others are too small to be kept."""
    return ops.upsample_add(torch.ones(1, 4, 256, 256 * megabytes), torch.full((1, 4, 1, 1), value))


def test_an_output_gets_the_memory_of_one_that_is_gone():
    first = merged(value=1.0)
    address = first.data_ptr()
    assert output_cache.held() == 0
    del first
    assert output_cache.held() == 4 * MIB
    second = merged(value=2.0)
    assert second.data_ptr() == address
    assert output_cache.held() == 0
    assert (second == 3).all()


def test_two_outputs_never_share_memory():
    del_first = [merged() for _ in range(3)]
    del del_first
    outputs = [merged(value=float(i)) for i in range(5)]
    assert len({output.data_ptr() for output in outputs}) == 5
    for i, output in enumerate(outputs):
        assert (output == 1 + i).all()


def test_a_view_keeps_its_memory():
    output = merged()
    view = output[0, 1]
    numbers = output[0, 2].numpy()
    del output
    assert output_cache.held() == 0
    merged(value=7.0)
    assert (view == 1).all()
    assert (numbers == 1).all()
    del view
    assert output_cache.held() == 4 * MIB, "the other output's; this one is still seen by numpy"
    del numbers
    assert output_cache.held() == 8 * MIB


@pytest.mark.parametrize(("first", "second", "shared"), [(5, 4, True), (6, 4, False), (4, 5, False)])
def test_a_block_serves_outputs_of_about_its_size(first, second, shared):
    """A quarter larger than asked for at most, or little outputs would hold large blocks."""
    address = merged(first).data_ptr()
    assert (merged(second).data_ptr() == address) is shared


def test_of_several_blocks_the_one_that_fits_best():
    outputs = {size: merged(size) for size in (5, 4)}
    addresses = {size: output.data_ptr() for size, output in outputs.items()}
    del outputs
    four = merged(4)
    five = merged(5)
    assert {4: four.data_ptr(), 5: five.data_ptr()} == addresses


def test_small_outputs_are_the_c_librarys():
    small = ops.upsample_add(torch.ones(1, 4, 16, 16), torch.ones(1, 4, 1, 1))
    del small
    assert output_cache.held() == 0


def test_the_limit():
    output_cache.set_limit(10 * MIB)
    assert output_cache.limit() == 10 * MIB
    outputs = [merged() for _ in range(4)]
    last_two = {output.data_ptr() for output in outputs[2:]}
    while outputs:
        outputs.pop(0)
    assert output_cache.held() == 8 * MIB, "two of four"
    assert {merged().data_ptr(), merged().data_ptr()} <= last_two, "the oldest went first"
    too_large = merged(12)
    del too_large
    assert output_cache.held() == 8 * MIB, "what is over the limit alone does not push out the others"
    output_cache.set_limit(5 * MIB)
    assert output_cache.held() == 4 * MIB
    output_cache.set_limit(0)
    assert output_cache.held() == 0
    merged()
    assert output_cache.held() == 0
    with pytest.raises(ValueError, match=r"0 bytes or more, got -1"):
        output_cache.set_limit(-1)
    with pytest.raises(RuntimeError, match=r"0 bytes or more, got -1"):
        torch.ops.fpn_fast.output_cache_set_limit(-1)
    with pytest.raises(TypeError):
        output_cache.set_limit(64e6)
    assert output_cache.limit() == 0


def test_a_fixed_number_of_blocks():
    """However many outputs end at once: what gives them back may not allocate."""
    outputs = [merged(1) for _ in range(300)]
    del outputs
    assert output_cache.held() == 256 * MIB


def test_clear():
    merged()
    assert output_cache.held() == 4 * MIB
    output_cache.clear()
    assert output_cache.held() == 0
    assert output_cache.limit() == 512 * MIB


def test_memory_that_nothing_asks_for_any_longer_goes_back():
    merged(32)
    assert output_cache.held() == 32 * MIB
    for _ in range(300):
        merged(1)
    assert output_cache.held() == 1 * MIB


def test_an_output_is_a_tensor_like_any_other():
    output = merged()
    assert output.device == torch.device("cpu")
    assert output.is_contiguous()
    assert output.untyped_storage().nbytes() == 4 * MIB
    stored = io.BytesIO()
    torch.save(output, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored), output)
    assert torch.equal(copy.deepcopy(output), output)
    assert output.mul_(3).eq(3).all()
    assert output.resize_(1, 4, 16, 16).shape == (1, 4, 16, 16)
    with pytest.raises(RuntimeError, match="not resizable"):
        output.resize_(2, 4, 256, 1024)
    with pytest.raises(RuntimeError, match="not resizable"):
        output.untyped_storage().resize_(0)
    shared = merged().share_memory_()
    assert shared.is_shared()
    assert shared.eq(1).all()


def test_channels_last_and_every_type():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            lateral = torch.ones(2, 8, 256, 256, dtype=dtype).contiguous(memory_format=memory_format)
            output = ops.upsample_add(
                lateral, torch.ones(2, 8, 2, 2, dtype=dtype).contiguous(memory_format=memory_format)
            )
            assert output.is_contiguous(memory_format=memory_format)
            assert (output == 2).all()
            nbytes = output.untyped_storage().nbytes()
            assert nbytes == output.numel() * output.element_size()
            del output
            assert output_cache.held() == nbytes
            output_cache.clear()


def _boxes(count: int) -> torch.Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(0)).sort().values


CALLS = {
    "top_down_backward": lambda: torch.ops.fpn_fast.top_down_backward(
        [torch.ones(1, 4, 1024, 1024)], 512, 512, 0, False
    ),
    "multiscale_roi_align": lambda: ops.multiscale_roi_align(
        [torch.ones(1, 64, 8, 8)], torch.zeros(400, 5), 7, [1.0], sampling_ratio=2
    ),
    "multiscale_roi_align_backward": lambda: torch.ops.fpn_fast.multiscale_roi_align_backward(
        torch.ones(1, 4, 2, 2), torch.zeros(1, 5), None, 1, [512, 512], [1.0], [], 2, False, False
    ),
    "multiscale_roi_align_max": lambda: torch.ops.fpn_fast.multiscale_roi_align_max(
        [torch.ones(1, 64, 8, 8)], torch.zeros(400, 5), None, 7, 7, [1.0], [], 2, False
    ),
    "multiscale_roi_align_max_backward": lambda: torch.ops.fpn_fast.multiscale_roi_align_max_backward(
        torch.ones(1, 4, 2, 2),
        torch.zeros(1, 4, 2, 2, dtype=torch.int32),
        torch.zeros(1, 5),
        None,
        1,
        [512, 512],
        [1.0],
        [],
        2,
        False,
        False,
    ),
    "paste_masks": lambda: ops.paste_masks(torch.ones(2, 1, 28, 28), 9 * _boxes(2), (900, 900)),
    "sigmoid_focal_loss": lambda: torch.ops.fpn_fast.sigmoid_focal_loss(
        torch.zeros(4000, 91), torch.zeros(4000, dtype=torch.int64), torch.ones(4000), 0.25, True
    ),
    "match_anchors": lambda: ops.match_anchors(
        _boxes(3)[None], None, _boxes(200_000), high_threshold=0.5, low_threshold=0.4
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_ops_with_large_outputs(name):
    """Their numbers are tested elsewhere; here that memory with other numbers in it changes none, and that all of their
    large outputs have such memory."""

    def tensors(found):
        return [found] if isinstance(found, torch.Tensor) else list(found)

    found = tensors(CALLS[name]())
    fresh = [each.detach().clone() for each in found]
    for each in found:
        each.detach().fill_(float("nan") if each.is_floating_point() else 77)
    large = sum(each.nbytes for each in fresh if each.nbytes >= MIB)
    del found, each
    assert output_cache.held() == large > 0
    again = tensors(CALLS[name]())
    assert output_cache.held() == 0
    for ours, theirs in zip(again, fresh, strict=True):
        assert torch.equal(ours, theirs)


def test_threads():
    """Outputs are made, read and dropped by threads at once, and dropped by others than made them."""

    def work(seed: int) -> bool:
        kept, right = [], True
        for turn in range(60):
            value = float(seed * 100 + turn)
            kept.append((value, merged(1 + (seed + turn) % 3, value)))
            if len(kept) > 2:
                expected, output = kept.pop(0)
                right &= bool((output == 1 + expected).all())
        right &= all(bool((output == 1 + expected).all()) for expected, output in kept)
        return right

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4
        made = list(pool.map(lambda seed: merged(2, float(seed)), range(4)))
    while made:
        seed = len(made) - 1
        assert (made.pop() == 1 + seed).all()
    assert 0 < output_cache.held() <= output_cache.limit()


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Without a developer's settings, and without those of other tests, of a C library that keeps everything."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FPN_FAST_", "MALLOC_"))}
    environment = {**kept, **variables}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)


def test_the_limit_of_a_processs_environment(monkeypatch):
    found = run("from fpn_fast import output_cache; print(output_cache.limit())", FPN_FAST_OUTPUT_CACHE_MIB="3")
    assert found.stdout.split() == [str(3 * MIB)]
    monkeypatch.setenv("FPN_FAST_OUTPUT_CACHE_MIB", "9" * 30)
    output_cache._set_limit_from_environment()
    assert output_cache.limit() >= 1 << 60
    for wrong in ("-1", "64M", ""):
        monkeypatch.setenv("FPN_FAST_OUTPUT_CACHE_MIB", wrong)
        with pytest.raises(ValueError, match="must be a whole number of MiB, 0 to keep nothing, got " + repr(wrong)):
            output_cache._set_limit_from_environment()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_a_processs_memory_follows_what_is_held():
    script = """
import os, torch
from fpn_fast import ops, output_cache
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
lateral, top = torch.ones(1, 4, 256, 256 * 160), torch.ones(1, 4, 1, 1)
before = resident()
ops.upsample_add(lateral, top)
kept = resident()
output_cache.clear()
print(kept - before, resident() - before)
"""
    kept, cleared = map(int, run(script).stdout.split())
    assert 150 < kept < 200
    assert cleared < 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_in_a_process_short_of_memory_what_is_kept_makes_room():
    script = """
import resource, torch
from fpn_fast import ops, output_cache
torch.set_num_threads(1)
zero = torch.zeros(1, 1, 1, 1)
def merged(megabytes):
    return ops.upsample_add(zero.expand(1, 4, 256, 256 * megabytes), zero.expand(1, 4, 2, 2))
merged(1)
with open("/proc/self/statm") as statm:
    size = int(statm.read().split()[0]) * resource.getpagesize()
merged(256)
assert output_cache.held() >= 256 << 20
resource.setrlimit(resource.RLIMIT_AS, (size + (512 << 20),) * 2)
assert merged(400).eq(0).all()
print(output_cache.held() >> 20)
"""
    found = run(script)
    assert found.stdout.split() == ["400"], found.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_and_the_end_of_one():
    """A child has what was kept as its own; an output that outlives everything ends with the process."""
    script = """
import os, sys, torch
from fpn_fast import ops, output_cache
torch.set_num_threads(1)
def merged(value):
    return ops.upsample_add(torch.ones(1, 4, 256, 1024), torch.full((1, 4, 1, 1), value))
merged(1.0)
assert output_cache.held() == 4 << 20
child = os.fork()
mine = merged(2.0 if child else 3.0)
assert (mine == (3 if child else 4)).all() and output_cache.held() == 0
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (mine == 3).all()
sys.modules["kept to the end"] = mine
"""
    found = run(script)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_forked_while_another_thread_uses_the_cache():
    script = """
import os, threading, torch
from fpn_fast import ops, output_cache
torch.set_num_threads(1)
def merged():
    return ops.upsample_add(torch.ones(1, 4, 256, 1024), torch.ones(1, 4, 1, 1))
def work():
    while not done:
        output_cache.clear()
        merged()
done = False
thread = threading.Thread(target=work)
thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        output_cache.set_limit(8 << 20)
        right = merged().eq(2).all() and output_cache.held() >= 4 << 20
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
done = True
thread.join()
print("done")
"""
    found = run(script)
    assert found.stdout.split() == ["done"], found.stderr


def test_without_the_compiled_library(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(_library.problems, "cpu", "no compiler")
        assert output_cache.held() == output_cache.limit() == 0
        output_cache.set_limit(5)
        output_cache.clear()
    assert output_cache.limit() == 512 * MIB


def test_a_compiled_graph_uses_it_too():
    compiled = torch.compile(
        lambda lateral, top: ops.upsample_add(lateral, top) * 2, backend="aot_eager", fullgraph=True
    )
    lateral, top = torch.ones(1, 4, 256, 1024), torch.ones(1, 4, 1, 1)
    assert (compiled(lateral, top) == 4).all()
    assert output_cache.held() == 4 * MIB
