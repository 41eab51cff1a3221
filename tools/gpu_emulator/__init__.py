# SPDX-License-Identifier: Apache-2.0
"""Executes sm_90 machine code on the CPU, under a checker and with counters; see README.md beside this file.

The C++ behind it is built on first use, once for each content of its sources, into build/gpu_emulator.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "gpu_emulator"
FLAGS = (
    "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-march=native",
    # The 32 lanes of a warp are loops, of which vectors are to come.
    "-ftree-vectorize", "-fvect-cost-model=dynamic",
    # Roundings are those of the instruction, and of no compiler.
    "-ffp-contract=off", "-frounding-math",
)  # fmt: skip
ORDERS = ("in_order", "shuffled", "interleaved")


class Allocation(NamedTuple):
    """Memory that a kernel may touch: `bytes` from `address`, as the host has it. One that is not `initialised` may be
    read only where the kernel wrote; one that is not `writable` may not be written. A bytearray says of each byte
    whether it is initialised, and a launch marks those that it writes."""

    address: int
    bytes: int
    initialised: bool | bytearray = True
    writable: bool = False
    name: str = ""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path` as a lock between processes: the workers of a parallel test run build a thing once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def compiler() -> str | None:
    """The host's C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _includes() -> list[str]:
    # pybind11 comes with torch.
    torch: Any = importlib.util.find_spec("torch")
    return [str(Path(torch.origin).parent / "include"), sysconfig.get_paths()["include"]]


@functools.cache
def _module() -> Any:
    path = compiler()
    if path is None:
        raise RuntimeError("no g++ to build the emulator with")
    flags = [*FLAGS, *(f"-I{each}" for each in _includes())]
    machine = platform.machine()
    with contextlib.suppress(OSError):
        # -march=native means another thing on another machine.
        machine += next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    headers = [part for each in sorted(HERE.glob("*.h")) for part in (each.name, each.read_text())]
    common = "\0".join([*flags, machine, version, str(sysconfig.get_config_var("SOABI")), *headers])

    def named(stem: str, suffix: str, *texts: str) -> Path:
        return BUILD / f"{stem}-{hashlib.sha256(chr(0).join([common, *texts]).encode()).hexdigest()[:16]}{suffix}"

    sources = sorted(HERE.glob("*.cpp"))
    objects = [named(each.stem, ".o", each.read_text()) for each in sources]
    library = named("_emulator", ".so", *(each.name for each in objects))
    with locked(BUILD / "_emulator.lock"):
        if not library.exists():
            for stale in {*BUILD.glob("*.o"), *BUILD.glob("*.so")} - {*objects}:
                stale.unlink()
            # Built under another name, so that an interrupted build leaves nothing that looks finished.
            partial = BUILD / "partial"
            for source, output in zip(sources, objects, strict=True):
                if not output.exists():
                    _compile([path, *flags, "-c", str(source), "-o", str(partial)])
                    partial.rename(output)
            _compile([path, "-shared", *map(str, objects), "-o", str(partial)])
            partial.rename(library)
    spec: Any = importlib.util.spec_from_file_location("_emulator", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator does not compile:\n{done.stderr}")


def __getattr__(name: str) -> Any:
    if name == "EmulatorFault":
        return _module().EmulatorFault
    raise AttributeError(name)


@functools.cache
def cuobjdump() -> str:
    """The disassembler of the CUDA toolkit or of Triton's wheel. Raises FileNotFoundError where there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump") or next(
        (str(folder / "cuobjdump") for folder in folders if os.access(folder / "cuobjdump", os.X_OK)), None
    )
    if found is None:
        raise FileNotFoundError("no cuobjdump to disassemble machine code with")
    return found


class ModelConstant(NamedTuple):
    """Of the cycle model: `least` and `largest` are what it may well be, `origin` says where it comes from."""

    name: str
    value: float
    least: float
    largest: float
    origin: str


def model_constants() -> list[ModelConstant]:
    """All of them, for an H200: cycle_model.h."""
    return [ModelConstant(*each) for each in _module().model_constants()]


def opcodes() -> list[str]:
    """The instructions that the emulator knows."""
    return _module().opcodes()


@functools.lru_cache(maxsize=256)
def _load(path: str, kernel: str, _stamp: tuple[int, int]) -> Any:
    return _module().Program.load(path, kernel, "" if path.endswith((".sass", ".txt")) else cuobjdump())


def program(code: str | os.PathLike[str], kernel: str) -> Any:
    """The decoded kernel of a library, object, cubin or disassembly (.sass), with `registers`, `static_shared`,
    `parameter_bytes` (-1: unknown) and `text`. Text of several lines is the disassembly itself."""
    if isinstance(code, str) and "\n" in code:
        return _module().Program.parse(code, kernel)
    status = os.stat(code)
    return _load(os.fspath(code), kernel, (status.st_mtime_ns, status.st_size))


def launch(
    code: Any,
    kernel: str,
    grid: Sequence[int] | int,
    block: Sequence[int] | int,
    parameters: bytes,
    allocations: Sequence[Allocation | tuple[Any, ...]] = (),
    *,
    dynamic_shared: int = 0,
    seed: int = 0,
    order: str = "in_order",
    mufu: str = "exact",
    model: bool = False,
    share: float = 1.0,
    constants: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Runs a kernel on the host's memory and returns its counters (Counters in emulator.h).

    code: what `program` takes, or its result. parameters: the kernel's, laid out as C does, from the first one on.
    order: "in_order", "shuffled" or "interleaved" blocks. mufu: "exact", or "adversarial" within the documented errors.
    share: of the blocks, evenly spread; the model is then of that share of the GPU. constants: of the cycle model, by
    name, in place of its own. Raises EmulatorFault (kind, kernel, block, thread, pc, instruction, source).
    """
    if mufu not in ("exact", "adversarial"):
        raise ValueError(f'mufu must be "exact" or "adversarial", got {mufu!r}')
    decoded = code if hasattr(code, "static_shared") else program(code, kernel)
    return _module().run(
        decoded,
        [grid] if isinstance(grid, int) else list(grid),
        [block] if isinstance(block, int) else list(block),
        dynamic_shared,
        parameters,
        [tuple(Allocation(*each)) for each in allocations],
        seed,
        ORDERS.index(order),
        mufu == "adversarial",
        model,
        share,
        dict(constants or {}),
    )
