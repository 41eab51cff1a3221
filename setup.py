# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled library against the torch that is installed.

Environment: FPN_FAST_CUDA=1 demands the CUDA kernels, =0 leaves them out, auto (default) builds them where a toolkit is
found; FPN_FAST_DEBUG=1 builds with -O0 -g; TORCH_CUDA_ARCH_LIST and MAX_JOBS as everywhere in torch.

A wheel has the kernels of every supported GPU and no debug information; an editable install has those of one GPU, and
line numbers for profilers.
"""

import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
# The oldest torch whose stable ABI the library may use: it loads under this one and every later one.
TORCH_TARGET = "0x020b000000000000"
SOURCES = [
    "csrc/build_facts.cpp",
    "csrc/ops.cpp",
    "csrc/cpu/frozen_batch_norm.cpp",
    "csrc/cpu/fuse_maps.cpp",
    "csrc/cpu/fuse_maps_backward.cpp",
    "csrc/cpu/generate_proposals.cpp",
    "csrc/cpu/heatmaps_to_keypoints.cpp",
    "csrc/cpu/match_anchors.cpp",
    "csrc/cpu/multiscale_roi_align.cpp",
    "csrc/cpu/multiscale_roi_align_backward.cpp",
    "csrc/cpu/multiscale_roi_align_max.cpp",
    "csrc/cpu/nms.cpp",
    "csrc/cpu/paste_masks.cpp",
    "csrc/cpu/select_box_detections.cpp",
    "csrc/cpu/select_detections.cpp",
    "csrc/cpu/sigmoid_focal_loss.cpp",
    "csrc/cpu/top_down.cpp",
    "csrc/cpu/top_down_backward.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/frozen_batch_norm.cu",
    "csrc/cuda/generate_proposals.cu",
    "csrc/cuda/heatmaps_to_keypoints.cu",
    "csrc/cuda/kernel_table.cu",
    "csrc/cuda/match_anchors.cu",
    "csrc/cuda/multiscale_roi_align.cu",
    "csrc/cuda/multiscale_roi_align_max.cu",
    "csrc/cuda/paste_masks.cu",
    "csrc/cuda/segmented_nms.cu",
    "csrc/cuda/select_box_detections.cu",
    "csrc/cuda/select_detections.cu",
    "csrc/cuda/sigmoid_focal_loss.cu",
    "csrc/cuda/top_down.cu",
]
# A checkout builds for the H100 and H200; a wheel for every GPU from Turing on.
DEVELOPMENT_ARCHS = "9.0"
WHEEL_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
IS_WHEEL = "bdist_wheel" in sys.argv and "editable_wheel" not in sys.argv
# Seconds of one core for the C++ files, the CUDA files, and these for each GPU architecture; measured, release build.
CPP_SECONDS, CUDA_SECONDS, CUDA_ARCH_SECONDS = 125, 75, 40

try:
    import torch
except ImportError:
    sys.exit(
        "fpn_fast is built against the torch that you use, which a build in isolation cannot see.\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )


def find_cuda_home() -> Path | None:
    """The folder of a CUDA toolkit. nvcc on the PATH may be a wrapper script elsewhere, so ask for the headers."""
    version = torch.version.cuda or ""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parents[1]))
    candidates += [f"/usr/local/cuda-{version}", "/usr/local/cuda", "/opt/cuda"]
    candidates += [str(Path(p) / "nvidia" / f"cu{version.partition('.')[0]}") for p in (sysconfig.get_path("purelib"),)]
    for candidate in filter(None, candidates):
        home = Path(candidate)
        if (home / "include" / "cuda_runtime.h").exists() and (home / "bin" / "nvcc").exists():
            return home
    return None


def wants_cuda(home: Path | None) -> bool:
    """Whether to build the CUDA kernels; whether a GPU is visible has no part in it."""
    wish = os.environ.get("FPN_FAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FPN_FAST_CUDA must be auto, 0 or 1, got {wish!r}")
    reason = None
    if torch.version.cuda is None:
        reason = "this torch is built without CUDA"
    elif home is None:
        reason = "no CUDA toolkit (a folder with include/cuda_runtime.h and bin/nvcc) in CUDA_HOME or the usual places"
    if wish == "1" and reason is not None:
        sys.exit(f"FPN_FAST_CUDA=1, but {reason}")
    if wish == "auto" and reason is not None:
        print(f"fpn_fast: building the CPU library only: {reason}")
    return wish != "0" and reason is None


def compiler() -> str | None:
    """The C++ compiler that the build would use."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def extensions() -> tuple[list[Extension], dict[str, type]]:
    """The compiled parts, and the command that builds them."""
    if compiler() is None:
        print("fpn_fast: no C++ compiler, so no compiled library; the reference and triton backends work without one")
        return [], {}
    home = find_cuda_home()
    with_cuda = wants_cuda(home)
    if with_cuda:
        os.environ["CUDA_HOME"] = str(home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", WHEEL_ARCHS if IS_WHEEL else DEVELOPMENT_ARCHS)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    debug = os.environ.get("FPN_FAST_DEBUG") == "1"
    optimise = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    stable = ["-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-include", str(ROOT / "csrc/glibc_2_28.h")]
    # Without contraction a sum of products is the same on every instruction set. Nothing here looks at floating-point
    # flags; to keep them, GCC would not vectorise a loop with a choice in it.
    cxx = [*optimise, *stable, "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
    link = ["-Wl,--as-needed", *(["-s"] if IS_WHEEL and not debug else [])] if sys.platform == "linux" else []
    facts = {
        "TORCH": torch.__version__,
        "CUDA": torch.version.cuda if with_cuda else "none",
        "ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else "none",
        "PYTHON": platform.python_version(),
    }
    macros = [f'-DFPN_FAST_BUILD_{name}="{value}"' for name, value in facts.items()]
    parts = [
        CppExtension(
            "fpn_fast._C",
            SOURCES,
            extra_compile_args={"cxx": [*cxx, *macros]},
            extra_link_args=link,
            py_limited_api=True,
        )
    ]
    if with_cuda:
        nvcc = ["-O0" if debug else "-O3", *stable, "-DUSE_CUDA", "--expt-relaxed-constexpr"]
        # Line numbers are most of the library's size. The driver unpacks a kernel when it is first launched.
        nvcc += ["--compress-mode=size"] if IS_WHEEL else ["-lineinfo"]
        # Thresholds are made on the host, by the same rule.
        nvcc += ["-Xcompiler", "-ffp-contract=off"]
        parts.append(
            CUDAExtension(
                "fpn_fast._C_cuda",
                CUDA_SOURCES,
                extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc},
                extra_link_args=link,
                py_limited_api=True,
            )
        )
    kind = "debug" if debug else "release"
    jobs = min(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)), os.cpu_count() or 1)
    seconds = CPP_SECONDS
    if with_cuda:
        seconds += CUDA_SECONDS + CUDA_ARCH_SECONDS * len(facts["ARCHS"].replace(" ", ";").split(";"))

    class Build(BuildExtension.with_options(no_python_abi_suffix=False)):  # type: ignore[misc]
        """Keeps object files between builds, also editable ones, and says what it does."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / ("wheel" if IS_WHEEL else "develop"))
            self.force = True  # ninja knows what is out of date, by headers and flags too; setuptools does not

        def run(self) -> None:
            print(f"fpn_fast: torch {facts['TORCH']}, CUDA {facts['CUDA']} for {facts['ARCHS']}, {kind} build")
            print(f"fpn_fast: about {seconds / 60 / jobs:.0f} min from nothing (idle cores: {jobs})")
            super().run()

        def build_extension(self, extension: Extension) -> None:
            print(f"fpn_fast: {extension.name}, {len(extension.sources)} files", flush=True)
            super().build_extension(extension)

    return parts, {"build_ext": Build}


version: dict[str, str] = {}
exec((ROOT / "fpn_fast" / "_version.py").read_text(), version)
ext_modules, cmdclass = extensions()
setup(
    version=version["__version__"],
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    # The library needs nothing of Python: one wheel serves 3.10 and every later one.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
