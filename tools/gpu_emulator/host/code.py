# SPDX-License-Identifier: Apache-2.0
"""Machine code for sm_90, disassembled once for each content of a library or cubin, and the stand-in of the runtime."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

from tools import gpu_emulator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LIBRARY = ROOT / "fpn_fast" / "_C_cuda.abi3.so"
CACHE = gpu_emulator.BUILD


@functools.cache
def texts(binary: Path) -> dict[str, Path]:
    """What cuobjdump prints of each kernel's resources and instructions, by the kernel's mangled name."""
    folder = CACHE / "code" / hashlib.sha256(binary.read_bytes()).hexdigest()[:24]
    with gpu_emulator.locked(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            usage, listing = (
                subprocess.run(
                    [gpu_emulator.cuobjdump(), *options, binary], capture_output=True, text=True, check=True
                ).stdout
                for options in (["-res-usage"], ["-arch", "sm_90", "-sass"])
            )
            resources = {name: text for text, name in re.findall(r"( Function (\S+):\n.*\n)", usage)}
            for function in listing.split("Function : ")[1:]:
                name = function.partition("\n")[0].strip()
                (folder / f"{name}.sass").write_text(f"{resources[name]}Function : {function}")
            (folder / "done").touch()
    return {path.stem: path for path in folder.glob("*.sass")}


@functools.cache
def program(binary: Path, kernel: str) -> Any:
    return gpu_emulator.program(texts(binary)[kernel], kernel)


@functools.cache
def runtime() -> Path:
    """The compiled cuda_runtime.cpp."""
    source = HERE / "cuda_runtime.cpp"
    library = CACHE / f"cuda_runtime-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    with gpu_emulator.locked(CACHE / "cuda_runtime.lock"):
        if not library.exists():
            partial = library.with_suffix(".partial")
            command = [str(gpu_emulator.compiler()), "-std=c++20", "-O1", "-fPIC", "-shared", str(source)]
            gpu_emulator._compile([*command, "-o", str(partial)])
            partial.rename(library)
    return library
