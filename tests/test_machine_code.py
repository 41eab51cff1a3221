# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels: spills and the instructions that decide speed and determinism.

For sm_90 the compiled library is disassembled. For other architectures the kernels of a .cuh are instantiated in a
translation unit without torch.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import cuda_toolkit, emulated_gpu

from tools.gpu_emulator import locked
from tools.gpu_emulator.host import code as emulator_code

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "machine_code"
ARCHITECTURES = ["sm_75", "sm_80", "sm_100"]
# setup.py's, as far as they change the code.
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
# As C++ names them and as their names are mangled.
TYPES = {"double": "d", "float": "f", "Half": "NS_4HalfE", "BFloat16": "NS_8BFloat16E"}
# Of the keys and indices that selection kernels are templates over.
INTEGERS = {"uint64_t": "m", "unsigned __int128": "o", "int64_t": "l"}


WIDE = ("double", "float")


@dataclass(frozen=True)
class Kernel:
    """A kernel template `<name>_kernel` of `<header>.cuh` over a storage type and `switches`; its one argument is
    `argument<type>`."""

    header: str
    name: str
    argument: str
    switches: tuple[str, ...] = ()
    types: tuple[str, ...] = tuple(TYPES)
    # The switches that are on where it goes element by element on purpose; None: nowhere.
    scalar: frozenset[str] | None = frozenset()
    # Reads memory that it writes itself, so it may not read through the cache for constant data.
    reads_own_writes: bool = False
    # Reads and writes single elements on purpose, whatever is switched on.
    by_element: bool = False
    # Reads single elements on purpose; its stores alone are wide.
    gathers: bool = False
    # Its sums decide nothing, so they may be contracted to fused multiply-adds.
    contracts: bool = False
    # Counts, or takes maxima or unions of integers: the same in any order.
    integer_atomics: bool = False
    # How many of its maps are wide at once.
    most_wide: int = 2
    # How many levels of a pathway its last template argument may say; none: it has no such argument.
    levels: tuple[int, ...] = ()
    # It loads 16 bytes and stores the sums of neighbours, 8.
    halves: bool = False
    # Most KiB of shared memory a block may take: two blocks on a Turing multiprocessor, eight on an H100.
    shared: int = 28

    def instances(self, arch: str | None = None) -> list[Instance]:
        """Those of the library, or for an architecture those of one type, which takes turns: each kernel is compiled
        for each architecture, and with each type for one. What is wide beside half a type's maps is the type itself
        beside others; Half's differ from BFloat16's in conversions alone, and take fewer instructions for these."""
        found, types = [], self.types
        if arch is not None:
            types = [each for each in types if each != "Half"]
            types = types[(ARCHITECTURES.index(arch) + KERNELS.index(self)) % len(types) :][:1]
        switches = [(False, True)] * len(self.switches)
        for type_, levels, *on in itertools.product(types, self.levels or (None,), *switches):
            instance = Instance(self, type_, tuple(on), levels)
            wide = [name for name in instance.switched_on if name.startswith("wide_")]
            if not wide or (type_ not in WIDE and len(wide) <= self.most_wide):
                found.append(instance)
        return found


@dataclass(frozen=True)
class Instance:
    kernel: Kernel
    type: str
    on: tuple[bool, ...]
    levels: int | None = None

    @property
    def declaration(self) -> str:
        switches = "".join(f", {str(on).lower()}" for on in self.on) + (f", {self.levels}" if self.levels else "")
        argument = f"const __grid_constant__ {self.kernel.argument}<{self.type}>"
        return f"template __global__ void {self.kernel.name}_kernel<{self.type}{switches}>({argument});"

    @property
    def symbol(self) -> str:
        """How the mangled name begins."""
        name, switches = f"{self.kernel.name}_kernel", "".join(f"Lb{int(on)}E" for on in self.on)
        switches += f"Li{self.levels}E" if self.levels else ""
        return f"_ZN8fpn_fast{len(name)}{name}I{(TYPES | INTEGERS)[self.type]}{switches}E"

    @property
    def switched_on(self) -> list[str]:
        return [name for name, on in zip(self.kernel.switches, self.on, strict=True) if on]

    def __str__(self) -> str:
        levels = [f"{self.levels} levels"] if self.levels else []
        return f"{self.kernel.name}_kernel<{', '.join([self.type, *self.switched_on, *levels])}>"


KERNELS = [
    Kernel("top_down", "top_down", "Pathway", ("channels_last", "bilinear"), scalar=None, contracts=True),
    # Along W every pixel gathers from a range of its own.
    Kernel("top_down_backward", "top_down_backward", "GradientPathway", ("channels_last", "bilinear"),
           scalar=frozenset({"bilinear"}), reads_own_writes=True, contracts=True),
    # Turing halves bfloat16 in float32.
    Kernel("top_down_trees", "top_down_trees", "HalvingPathway", scalar=None, levels=(2, 3, 4), contracts=True),
    Kernel("top_down_trees", "top_down_trees_backward", "HalvingGradients", scalar=None, levels=(2, 3, 4)),
    Kernel("top_down_strips", "top_down_strips", "HalvingPathway", ("wide",), levels=(2, 3, 4), contracts=True),
    Kernel("top_down_strips", "top_down_strips_backward", "HalvingGradients", ("wide",), levels=(2, 3, 4), halves=True),
    Kernel("multiscale_roi_align", "multiscale_roi_align", "RoiAlignPooling", ("channels_last",), contracts=True),
    Kernel("multiscale_roi_align_backward", "multiscale_roi_align_backward", "RoiAlignGathering", scalar=None,
           contracts=True, shared=48),
    Kernel("multiscale_roi_align_backward", "roi_parts", "RoiAlignGathering", scalar=None),
    Kernel("multiscale_roi_align_backward_strided", "multiscale_roi_align_backward_strided",
           "RoiAlignStridedGathering", contracts=True),
    Kernel("multiscale_roi_align_max", "multiscale_roi_align_max", "RoiAlignMaxPooling"),
    Kernel("multiscale_roi_align_max", "multiscale_roi_align_max_backward", "RoiAlignMaxGathering", contracts=True),
    Kernel("roi_lists", "roi_lists", "RoiListing", types=WIDE, contracts=True),
    # Planes of an odd number of pixels are copied element by element.
    Kernel("transposed_maps", "transpose_maps", "MapTransposition", ("to_rows",), scalar=None, shared=34),
    Kernel("roi_tiles", "roi_tiles", "RoiTiles", types=WIDE),
    Kernel("roi_tiles", "roi_plan", "RoiTiles", types=WIDE),
    Kernel("match_anchors", "match_anchors", "AnchorMatching", types=WIDE, integer_atomics=True),
    Kernel("match_anchors", "match_anchors_low_quality", "AnchorMatching", types=WIDE, reads_own_writes=True),
    Kernel("paste_masks", "paste_masks", "MaskPasting", ("above",), scalar=None, gathers=True),
    # Without a gradient it stores one number for a block.
    Kernel("sigmoid_focal_loss", "sigmoid_focal_loss", "FocalLoss", ("gradient",), contracts=True),
    Kernel("frozen_batch_norm", "frozen_batch_norm", "NormForward",
           ("channels_last", "wide_residual", "wide_output"), scalar=None),
    Kernel("frozen_batch_norm", "frozen_batch_norm_backward", "NormBackward",
           ("channels_last", "wide_residual", "wide_grad"), scalar=None),
    # A warp reads single elements of 32 channels, or of a plane.
    Kernel("frozen_batch_norm", "frozen_batch_norm_sums", "NormSums", ("wide_grad", "wide_x"), by_element=True,
           contracts=True, most_wide=1),
    # A thread reads single elements of its columns, and one of a block writes a keypoint.
    Kernel("heatmaps_to_keypoints", "heatmaps_to_keypoints", "KeypointSearch", shared=10),
    Kernel("heatmaps_to_keypoints", "write_keypoints", "KeypointSearch"),
    Kernel("sorted_runs", "merge_runs", "RunMerge", types=("uint64_t", "unsigned __int128")),
    # Sorts 2048 keys in shared memory, of 16 bytes for float64 and for groups.
    Kernel("segmented_nms", "nms_scores", "NmsSorting", types=WIDE, shared=33),
    Kernel("segmented_nms", "nms_groups", "NmsSorting", types=WIDE, reads_own_writes=True, shared=33),
    Kernel("segmented_nms", "nms_order", "NmsSorting", types=WIDE),
    Kernel("segmented_nms", "nms_candidates", "NmsSorting", types=WIDE),
    Kernel("segmented_nms", "nms_output", "NmsOutput", types=("int64_t",)),
    Kernel("greedy_nms", "greedy_nms", "Candidates", types=WIDE, shared=7),
    Kernel("greedy_nms", "nms_pairs", "Candidates", types=WIDE, shared=4),
    # Blocks unite in a word what kept boxes of earlier regions overlap.
    Kernel("greedy_nms", "nms_suppress", "NmsRound", types=WIDE, integer_atomics=True, shared=4),
    Kernel("greedy_nms", "nms_decide", "NmsRound", types=WIDE, reads_own_writes=True, shared=1),
    # Counts of logits in shared memory, added up in global memory.
    Kernel("top_logits", "count_logits", "LogitSelection", integer_atomics=True, shared=17),
    # A count gives keys their places in shared memory, which are sorted afterwards. Keys of float64 are of 16 bytes.
    Kernel("top_logits", "select_logits", "LogitSelection", integer_atomics=True, shared=33),
    Kernel("generate_proposals", "decode_proposals", "ProposalDecoding"),
    Kernel("head_setup", "head_setup", "HeadSetup", types=WIDE),
    Kernel("generate_proposals", "merge_proposals", "ProposalOutput", types=WIDE),
    Kernel("select_detections", "count_scores", "CenteredSelection", integer_atomics=True, shared=17),
    Kernel("select_detections", "select_scores", "CenteredSelection", integer_atomics=True, shared=33),
    Kernel("select_detections", "decode_candidates", "CandidateDecoding"),
    Kernel("select_detections", "gather_detections", "DetectionGathering", types=WIDE),
    Kernel("select_box_detections", "box_probabilities", "BoxScoring", types=WIDE),
    # It writes NaN over what earlier kernels wrote, and reads none of it.
    Kernel("select_box_detections", "decode_boxes", "BoxCandidates", types=WIDE),
    Kernel("select_box_detections", "keep_boxes", "BoxCandidates", types=WIDE),
    Kernel("select_box_detections", "box_detections", "BoxOutput", types=WIDE),
]  # fmt: skip


@dataclass(frozen=True)
class Code:
    stack: int
    spills: int
    shared: int
    # Multiplications that a compiler has or may have contracted to fused multiply-adds.
    contractible: int
    instructions: collections.Counter[str]

    def count(self, *prefixes: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefixes))

    def atomics(self, *, integers_allowed: bool) -> int:
        """Those that are not allowed: of floats, or a compare-and-swap, which may be an operation on floats."""
        forbidden = re.compile(r"(ATOM|RED\.|REDG)" + (r".*\.(CAS|B?F\d)" if integers_allowed else ""))
        return sum(n for opcode, n in self.instructions.items() if forbidden.match(opcode))

    def faults(self, kernel: Kernel, switched_on: Iterable[str] = ()) -> list[str]:
        """What keeps this code of `kernel` from being fast, deterministic or right."""
        vectorised = frozenset(switched_on) != kernel.scalar and not kernel.by_element
        found = {
            f"{self.shared} bytes of shared memory, {kernel.shared} KiB allowed": self.shared > 1024 * kernel.shared,
            f"{self.stack} bytes of stack": self.stack > 0,
            f"{self.spills} bytes spilled": self.spills > 0,
            "local memory": self.count("LDL", "STL") > 0,
            "atomics": self.atomics(integers_allowed=kernel.integer_atomics) > 0,
            "no 16-byte loads": vectorised and not kernel.gathers and self.count("LDG.E.128") == 0,
            "no 16-byte stores": vectorised and not kernel.halves and self.count("STG.E.128") == 0,
            "contraction to fused multiply-adds": self.contractible > 0 and not kernel.contracts,
            "loads of single bytes": self.count("LDG.E.U8", "LDG.E.S8") > 0,
            "reads its own writes through the constant cache": kernel.reads_own_writes
            and any(opcode.startswith("LDG") and ".CONSTANT" in opcode for opcode in self.instructions),
        }
        return [fault for fault, is_so in found.items() if is_so]


_RESOURCES = re.compile(
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+ptxas info\s+: Used \d+ registers"
    r"(?:[^\n]* (?P<shared>\d+) bytes smem)?"
)
_USAGE = re.compile(r"STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def parse(ptxas: str, sass: str, ptx: str) -> dict[str, Code]:
    """Code by mangled name."""
    contractible = {}
    for function in re.split(r"\.entry ", ptx)[1:]:
        name, _, body = function.partition("(")
        # PTX keeps a product apart from a sum only where it says .rn; a division is one instruction of it.
        contractible[name.strip()] = len(re.findall(r"\b(?:fma\.rn|mul)\.f(?:32|64)", body))
    instructions = {}
    for function in re.split(r"Function : ", sass)[1:]:
        name, _, body = function.partition("\n")
        instructions[name.strip()] = collections.Counter(_INSTRUCTION.findall(body))
    return {
        match["name"]: Code(
            stack=int(match["stack"]),
            spills=int(match["stores"]) + int(match["loads"]),
            shared=int(match["shared"] or 0),
            contractible=contractible[match["name"]],
            instructions=instructions[match["name"]],
        )
        for match in _RESOURCES.finditer(ptxas)
    }


_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


def sources(file: Path) -> list[Path]:
    """`file` and all that it includes by a quoted path."""
    found: dict[Path, None] = {}
    pending = [file.resolve()]
    while pending:
        file = pending.pop()
        if file not in found:
            found[file] = None
            pending += [(file.parent / name).resolve() for name in _INCLUDE.findall(file.read_text())]
    return sorted(found)


def content_hash(files: list[Path], *more: str) -> str:
    digest = hashlib.sha256("\0".join(more).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def compile_unit(name: str, text: str, arch: str) -> dict[str, Code]:
    """The kernels in the translation unit `text`, compiled once for each content of it and of what it includes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    unit = BUILD / f"{name}-{arch}.cu"
    with locked(BUILD / f"{name}-{arch}.lock"):
        unit.write_text(text)
        key = content_hash(sources(unit), cuda_toolkit.nvcc_version(), *FLAGS)
        log, sass, ptx = (BUILD / f"{name}-{arch}-{key}.{kind}" for kind in ("ptxas", "sass", "ptx"))
        if not sass.exists():
            for stale in BUILD.glob(f"{name}-{arch}-*"):
                stale.unlink()
            cubin, kept = BUILD / f"{name}-{arch}.cubin", BUILD / f"{name}-{arch}.kept"
            kept.mkdir(exist_ok=True)
            keep = ["-keep", "-keep-dir", kept]
            command = [
                cuda_toolkit.nvcc(),
                "-cubin",
                f"-arch={arch}",
                *FLAGS,
                "-Xptxas",
                "-v",
                *keep,
                unit,
                "-o",
                cubin,
            ]
            try:
                compiled = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                # Of thousands, one could once not be started: nothing that a kernel could be blamed for.
                warnings.warn(f"nvcc starts at the second try only: {error!r}", stacklevel=2)
                compiled = subprocess.run(command, capture_output=True, text=True)
            if compiled.returncode != 0:
                raise RuntimeError(f"nvcc fails on {unit} for {arch}:\n{compiled.stderr}")
            listing = subprocess.run(
                [cuda_toolkit.cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True
            )
            log.write_text(compiled.stdout + compiled.stderr)
            (kept / f"{unit.stem}.ptx").rename(ptx)
            shutil.rmtree(kept)
            sass.write_text(listing.stdout)
    return parse(log.read_text(), sass.read_text(), ptx.read_text())


def unit_of_all(arch: str) -> str:
    """One for all headers: what they share is compiled once."""
    lines = [f'#include "{ROOT / "csrc" / "cuda" / header}.cuh"' for header in {kernel.header: 0 for kernel in KERNELS}]
    lines += ["namespace fpn_fast {", *(i.declaration for kernel in KERNELS for i in kernel.instances(arch)), "}", ""]
    return "\n".join(lines)


def faults_of(code: dict[str, Code], instances: list[Instance]) -> list[str]:
    found = []
    for instance in instances:
        (symbol,) = [name for name in code if name.startswith(instance.symbol)]
        found += [f"{instance}: {fault}" for fault in code[symbol].faults(instance.kernel, instance.switched_on)]
    return found


def test_the_librarys_kernels():
    """All of them, as they ship. What would be spilled shows as local memory, and contraction in PTX alone: below."""
    code = {}
    for name in emulated_gpu.kernels():
        text = emulator_code.texts(emulator_code.LIBRARY)[name].read_text()
        usage, instructions = _USAGE.search(text), collections.Counter(_INSTRUCTION.findall(text))
        # cuobjdump adds the KiB that sm_90 keeps of a block's shared memory for itself.
        shared = max(0, int(usage["shared"]) - 1024)
        code[name] = Code(int(usage["stack"]), 0, shared, 0, instructions)
    instances = [instance for kernel in KERNELS for instance in kernel.instances()]
    assert len(code) == len(instances)
    faults = faults_of(code, instances)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels(arch):
    cuda_toolkit.nvcc()
    cuda_toolkit.cuobjdump()
    if arch not in cuda_toolkit.architectures():
        pytest.skip(f"this nvcc does not compile for {arch}")
    instances = [instance for kernel in KERNELS for instance in kernel.instances(arch)]
    faults = faults_of(compile_unit("all", unit_of_all(arch), arch), instances)
    assert not faults, "\n".join(faults)


def test_every_kernel_is_here():
    """Each template that csrc/cuda/*.cuh defines, under its header."""
    defined = {
        (path.name, name)
        for path in (ROOT / "csrc" / "cuda").glob("*.cuh")
        for name in re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", path.read_text())
    }
    assert defined == {(f"{kernel.header}.cuh", f"{kernel.name}_kernel") for kernel in KERNELS}


def test_every_kernel_is_in_the_table():
    """That `python -m fpn_fast info` prints and a test on a GPU looks through."""
    entries = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    assert {f"{kernel.name}_kernel" for kernel in KERNELS} == set(re.findall(r'"(\w+_kernel)[<"]', entries))


FAULTY = """
__global__ void faulty_kernel(const float* __restrict__ in, float* out, int* count, const char* bytes) {
  __shared__ float part[64];
  float kept[64] = {};
  part[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[64] = part[63 - threadIdx.x];
  for (int i = 0; i < 1000; ++i) kept[count[i] & 63] += in[i] * in[i];
  for (int i = 0; i < 64; ++i) out[i] = kept[i];
  atomicAdd(count, bytes[0]);
}
"""


def test_the_gates_can_fail():
    cuda_toolkit.nvcc()
    cuda_toolkit.cuobjdump()
    (code,) = compile_unit("faulty", FAULTY, "sm_80").values()
    kernel = Kernel("faulty", "faulty", "", scalar=None, reads_own_writes=True, shared=0)
    assert code.faults(kernel) == [
        "256 bytes of shared memory, 0 KiB allowed",
        "256 bytes of stack",
        "local memory",
        "atomics",
        "no 16-byte loads",
        "no 16-byte stores",
        "contraction to fused multiply-adds",
        "loads of single bytes",
        "reads its own writes through the constant cache",
    ]


ATOMICS = """
__global__ void float_kernel(float* sum, double* total) { atomicAdd(sum, 1.0f), atomicAdd(total, 1.0); }
__global__ void swap_kernel(int* a) { atomicCAS(a, 1, 2); }
__global__ void integer_kernel(unsigned* a, unsigned long long* b) { atomicMax(a, 3u), atomicMax(b, 3ull); }
"""


def test_integer_atomics_are_told_from_others():
    cuda_toolkit.nvcc()
    cuda_toolkit.cuobjdump()
    code = compile_unit("atomics", ATOMICS, "sm_80")
    found = {name: code[name].atomics(integers_allowed=True) for name in code}
    assert {name: n > 0 for name, n in found.items()} == {
        "_Z12float_kernelPfPd": True,
        "_Z11swap_kernelPi": True,
        "_Z14integer_kernelPjPy": False,
    }
    assert all(each.atomics(integers_allowed=False) > 0 for each in code.values())
