# SPDX-License-Identifier: Apache-2.0
import dataclasses
import os
import re
import signal
from pathlib import Path

import pytest
import torch

# A background job of a shell ignores interrupts, and so would what tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Of the processes that tests start, xdist's workers among them: threads that wait for each other by spinning take the
# cores from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Of them too: glibc keeps the memory of large tensors, which to return and to fetch again takes longer than most tests.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))
# And of them: torch.compile compiles what tests give it, which is little, in the process itself, and starts no others.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Without a GPU the Triton kernels run in Triton's interpreter; it must be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _round_to_bfloat16_in_the_interpreter() -> None:
    """Triton's interpreter cuts a float32 off where a GPU rounds it to nearest even; mend that, not kernels."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def rounded(values, from_type, to_type, rounding_mode):
        if from_type == tl.float32 and to_type == tl.bfloat16:
            source = torch.from_numpy(values.astype("float32", copy=True))
            return source.bfloat16().view(torch.uint16).numpy()
        if from_type == tl.bfloat16 and to_type == tl.float32:
            # Its own conversion gets subnormals wrong; this one is a shift.
            return values.astype("uint32") << 16
        return convert(values, from_type, to_type, rounding_mode)

    interpreter._convert_float = rounded


def _patch_once_in_the_interpreter() -> None:
    """Triton's interpreter replaces the functions of triton.language at every call of a function of a kernel, which
    takes longer than the call. Once is enough, where no kernel is compiled in this process."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, patched = interpreter._patch_lang, set()

    def once(function):
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if not patched.issuperset(map(id, seen)):
            patched.update(map(id, seen))
            patch(function)
        # Of nothing, for the interpreter to undo when the kernel ends.
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once
    # Its check of every sum of integers doubles their cost; tests of it have no tensor of 2^31 elements.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_to_bfloat16_in_the_interpreter()
    _patch_once_in_the_interpreter()
    import fpn_fast.triton._greedy_nms
    import fpn_fast.triton._head_decoding
    import fpn_fast.triton.match_anchors
    import fpn_fast.triton.multiscale_roi_align
    import fpn_fast.triton.top_down

    # The interpreter's time goes by programs, not elements: fewer, larger ones, still several for each launch.
    fpn_fast.triton.top_down.BLOCK_ELEMENTS = 4096
    fpn_fast.triton.match_anchors.BLOCK = 256
    fpn_fast.triton._greedy_nms.CHUNK = 256
    fpn_fast.triton._head_decoding.BLOCK_RANKS = 2048
    fpn_fast.triton._head_decoding.BLOCK_BOXES = 256
    fpn_fast.triton.multiscale_roi_align.BLOCK_BYTES = 32768
    fpn_fast.triton.multiscale_roi_align.BLOCK_SAMPLES = 16
    fpn_fast.triton.multiscale_roi_align.TILE_SIZE = 32
    fpn_fast.triton.multiscale_roi_align.BLOCK_GRAD_BYTES = 32768 * 4


# Not before the environment is set, which they read.
from helpers import devices  # noqa: E402
from helpers.devices import CPU_AND_GPU  # noqa: E402

from fpn_fast import backends  # noqa: E402

FOR_A_GPU, NO_TESTS = pytest.StashKey[int](), pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    # A GPU's arithmetic with infinities and NaN warns nobody.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    if hasattr(config, "workerinput"):
        # Workers share the cores: threads of each, that wait for each other, would take turns.
        threads = max(1, (os.cpu_count() or 1) // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _mark_gpu_first(config: pytest.Config, of_gpu: list[pytest.Item]) -> None:
    """Marks what gpu_first.txt has, where * stands for anything, and keeps its lines that are no test's of a file."""
    lines = Path(__file__).with_name("gpu_first.txt").read_text().splitlines()
    patterns = {line: re.compile(re.escape(line).replace(r"\*", ".*")) for line in lines if "::" in line}
    used = set()
    for item in of_gpu:
        if found := [line for line, pattern in patterns.items() if pattern.fullmatch(item.nodeid)]:
            item.add_marker("gpu_first")
            used.update(found)
    files = {item.nodeid.partition("::")[0] for item in of_gpu}
    config.stash[NO_TESTS] = [line for line in patterns if line not in used and line.partition("::")[0] in files]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from helpers.battery import is_left_out

    of_gpu = [item for item in items if item.get_closest_marker("gpu")]
    _mark_gpu_first(config, of_gpu)
    # A test that is skipped costs its way from worker to report; of thousands that is a minute.
    without = [] if torch.cuda.is_available() else of_gpu
    _count_for_a_gpu(config, len(without))
    left_out = dict.fromkeys([*without, *(item for item in items if is_left_out(item))])
    config.hook.pytest_deselected(items=list(left_out))
    # What compiles for minutes begins first, so that no worker waits for it in the end.
    first = [f"test_{name}.py" for name in ("machine_code", "mutations", "sanitized_library")]
    items[:] = sorted((item for item in items if item not in left_out), key=lambda item: item.path.name not in first)


def _count_for_a_gpu(config: pytest.Config, count: int) -> None:
    """Of a worker for the process that reports."""
    if hasattr(config, "workeroutput"):
        config.workeroutput["for_a_gpu"] = count
    else:
        config.stash[FOR_A_GPU] = count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    _count_for_a_gpu(node.config, getattr(node, "workeroutput", {}).get("for_a_gpu", 0))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if count := config.stash.get(FOR_A_GPU, 0):
        terminalreporter.write_line(f"{count} tests need a CUDA device and were left out: there is none here.")


def _gpu_is_lost() -> bool:
    """After an illegal address, say, every call to the GPU fails for as long as the process lives."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# Last: a worker has then told its failure.
@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes a failure as it happens: a run that is killed at its time limit has no summary.

    A worker that lost the GPU ends, so that another one takes over.
    """
    path, in_worker = os.environ.get("FPN_FAST_FAILURES"), "PYTEST_XDIST_WORKER" in os.environ
    if path and report.failed and not in_worker:
        with open(path, "a") as file:
            file.write(f"FAILED {report.nodeid}\n{report.longreprtext}\n\n")
    if report.failed and in_worker and _gpu_is_lost():
        os._exit(1)


@pytest.fixture(params=["cpp", "reference"])
def backend(request):
    """The backends that are quick on the CPU."""
    with backends.use(request.param):
        yield request.param


@pytest.fixture(params=[*CPU_AND_GPU[:2], "triton", *CPU_AND_GPU[2:]])
def every_backend(request, monkeypatch):
    """Those on the CPU, and those with kernels on a GPU, where `ops` of the test's file then runs."""
    *device, name = request.param.split("-")
    if request.param == "triton" and not backends.triton_interprets():
        pytest.skip("Triton runs on the GPU here")
    if device:
        monkeypatch.setattr(request.module, "ops", devices.OpsOn(*device))
    with backends.use(name):
        yield name


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
