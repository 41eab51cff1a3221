# SPDX-License-Identifier: Apache-2.0
"""Makes this process run fpn_fast's GPU kernels on the emulator, for tensors of the CPU.

The process must preload what :func:`code.runtime` compiles. After :func:`install` the ops in ``fpn_fast::`` are those
of the compiled CUDA library: its own host code checks, plans and launches, and each launch executes its machine
code for sm_90. The ops in ``fpn_fast_triton::`` are Triton's, compiled for sm_90 and launched by Triton itself.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tools import gpu_emulator
from tools.gpu_emulator.host import code

#: What memory holds before anything is written: a NaN, and no index.
POISON = 0xFF


@dataclass
class Region:
    """A storage that kernels may touch. written: for each byte, whether it was; None where the host wrote all of it."""

    address: int
    size: int
    writable: bool
    written: bytearray | None = None

    @property
    def content(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    @content.setter
    def content(self, value: bytes) -> None:
        ctypes.memmove(self.address, value, self.size)

    def note_what_torch_wrote(self) -> None:
        """By operators, of which this process does not hear."""
        if self.written is not None:
            written, content = (
                torch.frombuffer(each, dtype=torch.uint8) for each in (self.written, bytearray(self.content))
            )
            written |= content != POISON


class Fault(RuntimeError):
    """What no instruction did: a result that is not written, or that depends on the order of blocks."""


@dataclass
class Gpu:
    """What kernels see, and what they did. orders: the orders of blocks that each launch runs in, one after the
    other, with equal results; options: of the emulator."""

    regions: dict[int, Region] = field(default_factory=dict)
    inputs: set[int] = field(default_factory=set)
    launches: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    # Whose memory must not be given out again while it is watched.
    kept: list[torch.Tensor] = field(default_factory=list)
    fault: Exception | None = None
    orders: tuple[str, ...] = ("in_order",)
    options: dict[str, Any] = field(default_factory=dict)

    def watch(self, address: int, size: int, *, made: bool = False, writable: bool = False) -> None:
        """A storage that an op was given, or `made` and did not write yet."""
        known = self.regions.get(address)
        if size == 0 or (not made and known is not None and known.size == size):
            return
        for other in [r for r in self.regions.values() if r.address < address + size and address < r.address + r.size]:
            del self.regions[other.address]
        self.regions[address] = Region(address, size, writable or made, bytearray(size) if made else None)
        if made:
            ctypes.memset(address, POISON, size)

    def fill(self, address: int, value: int, size: int) -> bool:
        for region in self.regions.values():
            offset = address - region.address
            if region.written is not None and 0 <= offset <= region.size - size:
                ctypes.memset(address, value, size)
                region.written[offset : offset + size] = b"\1" * size
                return True
        self.fault = Fault(f"a fill of {size} bytes at {address:#x}, which are not an op's own")
        return False

    def launch(self, program: Any, grid: tuple, block: tuple, shared: int, parameters: bytes) -> bool:
        """Whether the kernel ran well."""
        own = [region for region in self.regions.values() if region.writable and len(self.orders) > 1]
        before = [(region.content, region.written and bytes(region.written)) for region in own]
        results = []
        try:
            for seed, order in enumerate(self.orders):
                for region, (content, written) in zip(own, before, strict=True):
                    region.content = content
                    if written:
                        region.written[:] = written
                allocations = [
                    (
                        each.address,
                        each.size,
                        True if each.written is None else each.written,
                        each.writable,
                        f"storage {i}",
                    )
                    for i, each in enumerate(self.regions.values())
                ]
                counters = gpu_emulator.launch(
                    program, program.kernel, grid, block, parameters, allocations, dynamic_shared=shared, order=order,
                    seed=seed, **self.options,
                )  # fmt: skip
                results.append([region.content for region in own])
            if any(each != results[0] for each in results):
                raise Fault(f"the results of {program.kernel} depend on the order of its blocks")
        except Exception as fault:
            self.fault = fault
            return False
        self.launches.append((program.kernel, counters))
        return True


gpu = Gpu()


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`function(*arguments)`, of which every tensor of the result must be written whole.

    Raises:
        EmulatorFault, Fault: a kernel did what it may not.
    """
    gpu.regions.clear(), gpu.launches.clear(), gpu.kept.clear()
    gpu.fault = None
    gpu.inputs = {each.untyped_storage().data_ptr() for each in _tensors((arguments, options))}
    try:
        found = function(*arguments, **options)
        if gpu.fault is not None:
            raise gpu.fault
        for i, tensor in enumerate(_tensors(found)):
            region = gpu.regions.get(tensor.untyped_storage().data_ptr())
            if region is None or region.written is None:
                continue
            region.note_what_torch_wrote()
            if missing := region.written.count(0):
                raise Fault(f"{missing} of {region.size} bytes of result {i} were not written")
        return found
    except Exception as error:
        raise gpu.fault or error from None
    finally:
        ctypes.CDLL(None).gpu_emulator_release()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# The compiled library.

_Three = ctypes.POINTER(ctypes.c_uint * 3)


class _Hooks(ctypes.Structure):
    """cuda_runtime.cpp: struct Hooks."""

    _fields_ = (
        ("launch", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, _Three, _Three, ctypes.c_size_t, ctypes.c_void_p)),
        ("fill", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)),
        ("storage", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)),
    )


def _launch(kernel: bytes, grid: Any, block: Any, shared: int, argument: int) -> int:
    try:
        program = code.program(code.LIBRARY, kernel.decode())
        parameters = ctypes.string_at(argument, program.parameter_bytes)
        return gpu.launch(program, tuple(grid[0]), tuple(block[0]), shared, parameters)
    except Exception as error:
        gpu.fault = error
        return 0


@functools.cache
def _hooks() -> _Hooks:
    launch, fill, storage = (kind for _, kind in _Hooks._fields_)
    return _Hooks(
        launch(_launch),
        fill(lambda address, value, size: gpu.fill(address, value, size)),
        storage(lambda address, size, made: gpu.watch(address or 0, size, made=bool(made))),
    )


# Triton.


class _Utils:
    """What Triton asks of a driver about a device, and of a compiled kernel."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple:
        path = code.CACHE / "triton" / f"{hashlib.sha256(kernel).hexdigest()[:24]}.cubin"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(kernel)
            partial.rename(path)
        return path, code.program(path, name), 0, 0, 1024

    @staticmethod
    def unload_module(module: Any) -> None:
        pass


#: As Triton's launcher hands on a number of that type.
_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B", "u16": "H", "u32": "I",
            "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d", "f64": "d"}  # fmt: skip


class _Launcher:
    """Of one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types, self.metadata = tuple(source.signature.values()), metadata

    def parameters(self, types: Any, values: Any, packed: bytearray) -> bytearray:
        for kind, value in zip(types, values, strict=True):
            if isinstance(kind, tuple):
                self.parameters(kind, value, packed)
                continue
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                storage = value.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                gpu.watch(address, size, writable=address not in gpu.inputs)
                gpu.kept.append(value)
                if address in gpu.regions:
                    gpu.regions[address].note_what_torch_wrote()
                kind, value = "u64", value.data_ptr()
            size = struct.calcsize(_FORMATS[kind])
            packed += bytes(-len(packed) % size) + struct.pack("<" + _FORMATS[kind], value)
        return packed

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *arguments) -> None:
        packed = self.parameters(self.types, arguments, bytearray())
        # Two pointers to memory that no kernel of ours asks for.
        packed += bytes(-len(packed) % 8 + 16)
        block = (32 * self.metadata.num_warps, 1, 1)
        if not gpu.launch(function, (x, y, z), block, self.metadata.shared, bytes(packed)):
            raise gpu.fault or Fault(function.kernel)


class _Driver:
    """An H100, as Triton sees it."""

    launcher_cls, utils = _Launcher, _Utils

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _watch_what_torch_makes() -> None:
    """Memory that an op in Python asks for without a value is unwritten until a kernel writes it."""

    def watched(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(function)
        def make(*arguments: Any, **options: Any) -> torch.Tensor:
            made = function(*arguments, **options)
            storage = made.untyped_storage()
            gpu.watch(storage.data_ptr(), storage.nbytes(), made=True)
            gpu.kept.append(made)
            return made

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, watched(getattr(owner, name)))


def install() -> None:
    """Before fpn_fast is imported."""
    ctypes.CDLL(None).gpu_emulator_hooks(ctypes.byref(_hooks()))
    try:
        import triton
        from triton.runtime import driver
    except ImportError:
        pass
    else:
        # fpn_fast registers Triton's ops for tensors of the CPU where they are interpreted; here they are compiled.
        triton.knobs.runtime.interpret = False
        os.environ["TRITON_INTERPRET"] = "1"
        driver.set_active(_Driver())
        _watch_what_torch_makes()
    import fpn_fast  # noqa: F401
