# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels: registers, spills and the instructions that decide speed and determinism.

The kernels of a .cuh are instantiated in a translation unit without torch, for every architecture, and disassembled.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
import subprocess
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from helpers import cuda_toolkit
from host_kernels import build

ROOT = build.ROOT
BUILD = ROOT / "build" / "machine_code"
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_100"]
# setup.py's, as far as they change the code.
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
# As C++ names them and as their names are mangled.
TYPES = {"double": "d", "float": "f", "Half": "NS_4HalfE", "BFloat16": "NS_8BFloat16E"}
# Of the keys and indices that selection kernels are templates over.
INTEGERS = {"uint64_t": "m", "unsigned __int128": "o", "int64_t": "l"}


@dataclass(frozen=True)
class Kernel:
    """A kernel template over a storage type and `switches`; its one argument is `argument<type>`."""

    header: str
    name: str
    argument: str
    switches: tuple[str, ...]
    # Most registers a thread may take, and how many with a type that takes more.
    registers: int
    more_registers: dict[str, int] = field(default_factory=dict, hash=False)
    # The switches that are on where it goes element by element on purpose.
    scalar: frozenset[str] | None = None
    types: tuple[str, ...] = tuple(TYPES)
    # Reads memory that it writes itself, so it may not read through the cache for constant data.
    reads_own_writes: bool = False
    # Reads single elements on purpose; its stores alone are wide.
    gathers: bool = False
    # Counts, or takes maxima or unions of integers: the same in any order.
    integer_atomics: bool = False
    # Most bytes of shared memory a block may take: two blocks on a Turing multiprocessor, eight on an H100.
    shared: int = 28 * 1024

    def instances(self) -> list[Instance]:
        values = itertools.product(self.types, *[(False, True)] * len(self.switches))
        return [Instance(self, type_, tuple(on)) for type_, *on in values]


@dataclass(frozen=True)
class Instance:
    kernel: Kernel
    type: str
    on: tuple[bool, ...]

    @property
    def declaration(self) -> str:
        switches = "".join(f", {str(on).lower()}" for on in self.on)
        argument = f"const __grid_constant__ {self.kernel.argument}<{self.type}>"
        return f"template __global__ void {self.kernel.name}<{self.type}{switches}>({argument});"

    @property
    def symbol(self) -> str:
        """How the mangled name begins."""
        switches = "".join(f"Lb{int(on)}E" for on in self.on)
        return f"_ZN8fpn_fast{len(self.kernel.name)}{self.kernel.name}I{(TYPES | INTEGERS)[self.type]}{switches}E"

    @property
    def is_vectorised(self) -> bool:
        on = frozenset(name for name, on in zip(self.kernel.switches, self.on, strict=True) if on)
        return on != self.kernel.scalar

    def __str__(self) -> str:
        on = [name for name, on in zip(self.kernel.switches, self.on, strict=True) if on]
        return f"{self.kernel.name}<{', '.join([self.type, *on])}>"


KERNELS = [
    # 80 registers: three blocks of 256 threads on a multiprocessor, 24 warps to hide the latency of memory.
    Kernel("top_down.cuh", "top_down_kernel", "Pathway", ("channels_last", "bilinear"), registers=80),
    Kernel(
        "top_down_backward.cuh",
        "top_down_backward_kernel",
        "GradientPathway",
        ("channels_last", "bilinear"),
        registers=80,
        # Along W every pixel gathers from a range of its own.
        scalar=frozenset({"bilinear"}),
        reads_own_writes=True,
    ),
    # 28 warps, and 14 for float64.
    Kernel(
        "multiscale_roi_align.cuh",
        "multiscale_roi_align_kernel",
        "RoiAlignPooling",
        ("channels_last",),
        registers=72,
        more_registers={"double": 96},
        scalar=frozenset(),
    ),
    # 24 warps.
    Kernel(
        "multiscale_roi_align_backward.cuh",
        "multiscale_roi_align_backward_kernel",
        "RoiAlignGathering",
        ("channels_last",),
        registers=80,
        scalar=frozenset(),
    ),
    # 24 warps, and 16 for float64.
    Kernel(
        "multiscale_roi_align_max.cuh",
        "multiscale_roi_align_max_kernel",
        "RoiAlignMaxPooling",
        (),
        registers=80,
        more_registers={"double": 96},
        scalar=frozenset(),
    ),
    Kernel(
        "multiscale_roi_align_max.cuh",
        "multiscale_roi_align_max_backward_kernel",
        "RoiAlignMaxGathering",
        (),
        registers=80,
        more_registers={"double": 96},
        scalar=frozenset(),
    ),
    Kernel(
        "roi_lists.cuh",
        "roi_lists_kernel",
        "RoiListing",
        (),
        registers=64,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    # 40 warps, and 24 for float64.
    Kernel(
        "match_anchors.cuh",
        "match_anchors_kernel",
        "AnchorMatching",
        (),
        registers=48,
        more_registers={"double": 72},
        scalar=frozenset(),
        types=("double", "float"),
        integer_atomics=True,
    ),
    Kernel(
        "match_anchors.cuh",
        "match_anchors_low_quality_kernel",
        "AnchorMatching",
        (),
        registers=48,
        more_registers={"double": 72},
        scalar=frozenset(),
        types=("double", "float"),
        reads_own_writes=True,
    ),
    # 40 warps, and 32 for float64.
    Kernel(
        "paste_masks.cuh",
        "paste_masks_kernel",
        "MaskPasting",
        ("above",),
        registers=48,
        more_registers={"double": 64},
        gathers=True,
    ),
    # 32 warps, and 20 for float64.
    Kernel(
        "sigmoid_focal_loss.cuh",
        "sigmoid_focal_loss_kernel",
        "FocalLoss",
        ("gradient",),
        registers=64,
        more_registers={"double": 96},
        # Without a gradient it stores one number for a block.
        scalar=frozenset(),
    ),
    # 32 warps. A thread reads single elements of its columns, and one of a block writes a keypoint.
    Kernel(
        "heatmaps_to_keypoints.cuh",
        "heatmaps_to_keypoints_kernel",
        "KeypointSearch",
        (),
        registers=64,
        scalar=frozenset(),
        shared=10 * 1024,
    ),
    # Eight bisections side by side: 32 warps.
    Kernel(
        "sorted_runs.cuh",
        "merge_runs_kernel",
        "RunMerge",
        (),
        registers=64,
        scalar=frozenset(),
        types=("uint64_t", "unsigned __int128"),
    ),
    # Sorts 2048 keys in shared memory, of 16 bytes for float64 and for groups: 24 warps.
    *(
        Kernel(
            "segmented_nms.cuh",
            name,
            "NmsSorting",
            (),
            registers=80,
            scalar=frozenset(),
            types=("double", "float"),
            reads_own_writes=name != "nms_scores_kernel",
            shared=33 * 1024,
        )
        for name in ("nms_scores_kernel", "nms_groups_kernel")
    ),
    # 24 warps, because boxes are moved by group too.
    Kernel(
        "segmented_nms.cuh",
        "nms_order_kernel",
        "NmsSorting",
        (),
        registers=80,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    Kernel(
        "segmented_nms.cuh",
        "nms_candidates_kernel",
        "NmsSorting",
        (),
        registers=64,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    Kernel(
        "segmented_nms.cuh",
        "nms_output_kernel",
        "NmsOutput",
        (),
        registers=40,
        scalar=frozenset(),
        types=("int64_t",),
    ),
    # 24 warps.
    Kernel(
        "greedy_nms.cuh",
        "greedy_nms_kernel",
        "Candidates",
        (),
        registers=80,
        scalar=frozenset(),
        types=("double", "float"),
        shared=4 * 1024,
    ),
    # Blocks unite in a word what kept boxes of earlier regions overlap. 40 warps, and 32 for float64.
    Kernel(
        "greedy_nms.cuh",
        "nms_pairs_kernel",
        "NmsRound",
        (),
        registers=48,
        more_registers={"double": 64},
        scalar=frozenset(),
        types=("double", "float"),
        integer_atomics=True,
        shared=4 * 1024,
    ),
    # One block has the multiprocessor to itself: words are read ahead into registers.
    Kernel(
        "greedy_nms.cuh",
        "nms_region_kernel",
        "NmsRound",
        (),
        registers=96,
        scalar=frozenset(),
        types=("double", "float"),
        shared=1024,
    ),
    # Counts of logits in shared memory, added up in global memory.
    Kernel(
        "top_logits.cuh",
        "count_logits_kernel",
        "LogitSelection",
        (),
        registers=40,
        scalar=frozenset(),
        integer_atomics=True,
        shared=17 * 1024,
    ),
    # A count gives keys their places in shared memory, which are sorted afterwards. Keys of float64 are of 16 bytes.
    Kernel(
        "top_logits.cuh",
        "select_logits_kernel",
        "LogitSelection",
        (),
        registers=64,
        more_registers={"double": 80},
        scalar=frozenset(),
        integer_atomics=True,
        shared=33 * 1024,
    ),
    # 24 warps: the exponential is made in float64.
    Kernel(
        "generate_proposals.cuh",
        "decode_proposals_kernel",
        "ProposalDecoding",
        (),
        registers=80,
        scalar=frozenset(),
    ),
    Kernel(
        "head_decoding.cuh",
        "head_setup_kernel",
        "HeadSetup",
        (),
        registers=32,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    Kernel(
        "generate_proposals.cuh",
        "merge_proposals_kernel",
        "ProposalOutput",
        (),
        registers=80,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    # As those of logits, with two exponentials in float64.
    Kernel(
        "select_detections.cuh",
        "count_scores_kernel",
        "CenteredSelection",
        (),
        registers=40,
        scalar=frozenset(),
        integer_atomics=True,
        shared=17 * 1024,
    ),
    Kernel(
        "select_detections.cuh",
        "select_scores_kernel",
        "CenteredSelection",
        (),
        registers=64,
        more_registers={"double": 80},
        scalar=frozenset(),
        integer_atomics=True,
        shared=33 * 1024,
    ),
    Kernel(
        "select_detections.cuh",
        "decode_candidates_kernel",
        "CandidateDecoding",
        (),
        registers=80,
        scalar=frozenset(),
    ),
    Kernel(
        "select_detections.cuh",
        "gather_detections_kernel",
        "DetectionGathering",
        (),
        registers=40,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    # 48 warps: exponentials wait for each other.
    Kernel(
        "select_box_detections.cuh",
        "box_probabilities_kernel",
        "BoxScoring",
        (),
        registers=40,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    # It writes NaN over what earlier kernels wrote, and reads none of it.
    Kernel(
        "select_box_detections.cuh",
        "decode_boxes_kernel",
        "BoxCandidates",
        (),
        registers=80,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    Kernel(
        "select_box_detections.cuh",
        "keep_boxes_kernel",
        "BoxCandidates",
        (),
        registers=40,
        scalar=frozenset(),
        types=("double", "float"),
    ),
    Kernel(
        "select_box_detections.cuh",
        "box_detections_kernel",
        "BoxOutput",
        (),
        registers=80,
        scalar=frozenset(),
        types=("double", "float"),
    ),
]


@dataclass(frozen=True)
class Code:
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: collections.Counter[str]

    def count(self, *prefixes: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefixes))

    def atomics(self, *, integers_allowed: bool) -> int:
        """Those that are not allowed: of floats, or a compare-and-swap, which may be an operation on floats."""
        forbidden = re.compile(r"(ATOM|RED\.|REDG)" + (r".*\.(CAS|B?F\d)" if integers_allowed else ""))
        return sum(n for opcode, n in self.instructions.items() if forbidden.match(opcode))

    def faults(
        self,
        *,
        vectorised: bool,
        reads_own_writes: bool,
        registers: int,
        shared: int,
        gathers: bool = False,
        integer_atomics: bool = False,
    ) -> list[str]:
        """What keeps this code from being fast, deterministic or right."""
        found = {
            f"{self.registers} registers, {registers} allowed": self.registers > registers,
            f"{self.shared} bytes of shared memory, {shared} allowed": self.shared > shared,
            f"{self.stack} bytes of stack": self.stack > 0,
            f"{self.spills} bytes spilled": self.spills > 0,
            "local memory": self.count("LDL", "STL") > 0,
            "atomics": self.atomics(integers_allowed=integer_atomics) > 0,
            "no 16-byte loads": vectorised and not gathers and self.count("LDG.E.128") == 0,
            "no 16-byte stores": vectorised and self.count("STG.E.128") == 0,
            "reads its own writes through the constant cache": reads_own_writes
            and any(opcode.startswith("LDG") and ".CONSTANT" in opcode for opcode in self.instructions),
        }
        return [fault for fault, is_so in found.items() if is_so]


_RESOURCES = re.compile(
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s+ptxas info\s+: Used (?P<registers>\d+) registers"
    r"(?:[^\n]* (?P<shared>\d+) bytes smem)?"
)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def parse(ptxas: str, sass: str) -> dict[str, Code]:
    """Code by mangled name."""
    instructions = {}
    for function in re.split(r"Function : ", sass)[1:]:
        name, _, body = function.partition("\n")
        instructions[name.strip()] = collections.Counter(_INSTRUCTION.findall(body))
    return {
        match["name"]: Code(
            registers=int(match["registers"]),
            stack=int(match["stack"]),
            spills=int(match["stores"]) + int(match["loads"]),
            shared=int(match["shared"] or 0),
            instructions=instructions[match["name"]],
        )
        for match in _RESOURCES.finditer(ptxas)
    }


def compile_unit(name: str, text: str, arch: str) -> dict[str, Code]:
    """The kernels in the translation unit `text`, compiled once for each content of it and of what it includes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    unit = BUILD / f"{name}-{arch}.cu"
    with build.locked(BUILD / f"{name}-{arch}.lock"):
        unit.write_text(text)
        key = build.content_hash(build.sources(unit), cuda_toolkit.nvcc_version(), *FLAGS)
        log, sass = (BUILD / f"{name}-{arch}-{key}.{kind}" for kind in ("ptxas", "sass"))
        if not sass.exists():
            for stale in BUILD.glob(f"{name}-{arch}-*"):
                stale.unlink()
            cubin = BUILD / f"{name}-{arch}.cubin"
            command = [cuda_toolkit.nvcc(), "-cubin", f"-arch={arch}", *FLAGS, "-Xptxas", "-v", unit, "-o", cubin]
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
            sass.write_text(listing.stdout)
    return parse(log.read_text(), sass.read_text())


def unit_of_all() -> str:
    """One for all headers: what they share is compiled once."""
    lines = [f'#include "{ROOT / "csrc" / "cuda" / header}"' for header in {kernel.header: 0 for kernel in KERNELS}]
    lines += ["namespace fpn_fast {", *(i.declaration for kernel in KERNELS for i in kernel.instances()), "}", ""]
    return "\n".join(lines)


@functools.cache
def _compilations() -> dict[str, Future]:
    """By architecture, two at a time, started when the first is asked for."""
    pool = ThreadPoolExecutor(max_workers=2)
    known = cuda_toolkit.architectures()
    return {arch: pool.submit(compile_unit, "all", unit_of_all(), arch) for arch in ARCHITECTURES if arch in known}


def compiled(kernel: Kernel, arch: str) -> dict[Instance, Code]:
    cuda_toolkit.nvcc()
    cuda_toolkit.cuobjdump()
    if arch not in cuda_toolkit.architectures():
        pytest.skip(f"this nvcc does not compile for {arch}")
    code = _compilations()[arch].result()
    by_instance = {}
    for instance in kernel.instances():
        (symbol,) = [name for name in code if name.startswith(instance.symbol)]
        by_instance[instance] = code[symbol]
    return by_instance


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels(kernel, arch):
    faults = []
    for instance, code in compiled(kernel, arch).items():
        found = code.faults(
            vectorised=instance.is_vectorised,
            reads_own_writes=kernel.reads_own_writes,
            registers=kernel.more_registers.get(instance.type, kernel.registers),
            shared=kernel.shared,
            gathers=kernel.gathers,
            integer_atomics=kernel.integer_atomics,
        )
        faults += [f"{instance}: {fault}" for fault in found]
    assert not faults, "\n".join(faults)


def test_every_kernel_is_here():
    """Each template that csrc/cuda/*.cuh defines, under its header."""
    defined = {
        (path.name, name)
        for path in (ROOT / "csrc" / "cuda").glob("*.cuh")
        for name in re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", path.read_text())
    }
    assert defined == {(kernel.header, kernel.name) for kernel in KERNELS}


def test_every_kernel_is_in_the_table():
    """That `python -m fpn_fast info` prints and a test on a GPU looks through."""
    entries = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    assert {kernel.name for kernel in KERNELS} == set(re.findall(r'"(\w+_kernel)[<"]', entries))


FAULTY = """
__global__ void faulty_kernel(const float* __restrict__ in, float* out, int* count) {
  __shared__ float part[64];
  float kept[64] = {};
  part[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[64] = part[63 - threadIdx.x];
  for (int i = 0; i < 1000; ++i) kept[count[i] & 63] += in[i];
  for (int i = 0; i < 64; ++i) out[i] = kept[i];
  atomicAdd(count, 1);
}
"""


def test_the_gates_can_fail():
    cuda_toolkit.nvcc()
    cuda_toolkit.cuobjdump()
    (code,) = compile_unit("faulty", FAULTY, "sm_80").values()
    assert code.faults(vectorised=True, reads_own_writes=True, registers=8, shared=255) == [
        f"{code.registers} registers, 8 allowed",
        "256 bytes of shared memory, 255 allowed",
        "256 bytes of stack",
        "local memory",
        "atomics",
        "no 16-byte loads",
        "no 16-byte stores",
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
