# SPDX-License-Identifier: Apache-2.0
"""The compiled library, what `info` says of it, and the choice of a backend."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import forked_python
from test_machine_code import KERNELS

import fpn_fast
from fpn_fast import __main__ as command
from fpn_fast import _library, backends, ops
from fpn_fast.ops import _registration

ROOT = Path(__file__).parents[1]
LIBRARIES = [name for name in ("_C", "_C_cuda") if _library.path(name).exists()]


def python(code, **environment):
    return forked_python.run(code, {**os.environ, **environment})


@pytest.mark.parametrize("name", LIBRARIES)
def test_needs_no_unstable_symbol_of_torch(name):
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", _library.path(name)], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    # c10, at and torch as C++ namespaces; the stable interface is C. Python's own symbols differ between its versions.
    unstable = [s for s in symbols if re.match(r"_Z.*(2at|3c10|5torch)|_?Py", s)]
    assert any(s.startswith("aoti_torch_") for s in symbols)
    assert unstable == []


def test_has_the_cpu_kernels():
    assert "_C" in LIBRARIES
    assert _library.problems["cpu"] is None


def test_second_fence_holds_behind_the_python_checks():
    maps = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 2, 2)]
    with pytest.raises(RuntimeError, match="one batch and channel count"):
        torch.ops.fpn_fast.top_down(maps, 0, False)
    with pytest.raises(RuntimeError, match="unknown mode 7"):
        torch.ops.fpn_fast.top_down(maps[:1] * 2, 7, False)
    with pytest.raises(RuntimeError, match="at least 1 x 1 pixel"):
        torch.ops.fpn_fast.top_down_backward(maps[:1], 0, 2, 0, False)


def test_info_prints_backends_and_build(capsys):
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"fpn_fast {fpn_fast.__version__}, Python ")
    assert "backends for cpu tensors:\n  cpp       available" in text
    assert command.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # The library serves other versions than the one that it was built with.
    assert tuple(map(int, facts["build"]["torch"].split(".")[:2])) >= (2, 11)
    assert facts["build"].keys() == {"compiler", "torch", "cuda", "archs", "python"}
    assert facts["torch"] == torch.__version__
    assert facts["backends"]["cpu"]["reference"] is None
    assert (facts["kernels"] is not None) == (torch.cuda.is_available() and "_C_cuda" in LIBRARIES)


@pytest.mark.gpu
def test_kernels_have_no_local_memory_and_full_blocks_fit():
    kernels = command.gather()["kernels"]
    assert {k["name"].split("<")[0] for k in kernels} == {kernel.name for kernel in KERNELS}
    assert all(k["local_bytes"] == 0 and k["occupancy"] > 0 for k in kernels)


@pytest.mark.parametrize(
    "arguments",
    [
        "info",
        "verify --help",
        "verify --ops nms --backends cpp --cases 1 --json it",
        "bench --tiny --quick --ops paste_masks --providers eager --device cpu --output it",
    ],
)
def test_commands_end_quietly_where_nobody_reads_them(arguments, tmp_path, monkeypatch, capfd):
    """As with `| head -1`, after what it has read."""
    monkeypatch.chdir(tmp_path)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert command.main(arguments.split()) == 128 + signal.SIGPIPE
    assert capfd.readouterr() == ("", "")
    # What a command writes is written before what it prints about it.
    assert Path("it").exists() == ("it" in arguments.split())


def test_a_command_of_another_program_is_read_to_its_first_line():
    done = subprocess.run(
        f"{sys.executable} -m fpn_fast info | head -1; echo ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash",
        capture_output=True, text=True,
    )  # fmt: skip
    first, code = done.stdout.splitlines()
    assert first.startswith(f"fpn_fast {fpn_fast.__version__}, Python ")
    # All that it prints may fit into the pipe before head ends.
    assert int(code) in (0, 128 + signal.SIGPIPE)
    assert done.stderr == ""


def test_info_says_what_a_missing_library_needs(monkeypatch):
    monkeypatch.setitem(_library.problems, "cpu", _library._load("_absent", "install g++"))
    assert backends.problem("cpp", "cpu") == "install g++"
    assert "cpp       not available: install g++" in command.render(command.gather())


def test_an_older_torch_is_refused_with_what_to_do():
    code = "import torch; torch.__version__ = '{}'; import fpn_fast; print('imported')"
    done = python(code.format("2.10.1+cu128"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fpn_fast needs torch 2.11 or newer, and this is torch 2.10.1+cu128; "
        "run `pip install 'torch>=2.11'`"
    )
    for version in ("2.11.0a0+git1234", "3.0.0"):
        assert python(code.format(version)).stdout == "imported\n"


@pytest.mark.skipif("_C_cuda" not in LIBRARIES, reason="built without CUDA kernels")
def test_a_library_for_another_cuda_says_what_to_do_and_the_rest_works():
    code = "import torch, torchvision; torch.version.cuda = '9.2'; import fpn_fast; print(fpn_fast.backends.{})"
    # torchvision checks the same of its own library, and so comes first here.
    done = python(code.format("problem('cpp', 'cuda')"))
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(
        r"fpn_fast's CUDA kernels are built for CUDA \d+, and torch \S+ for CUDA 9\.2; install a torch for CUDA \d+, "
        r"or build fpn_fast for this torch with `pip install .*` in a checkout",
        line,
    )
    assert done.stdout == line + "\n"
    assert python(code.format("choose('cpu')")).stdout == "cpp\n"


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torchvision.models.detection.fcos", "nn"),
        ("fpn_fast.nn.roi_heads", "nn"),
        ("torchvision.ops.poolers", "nn"),
        ("fpn_fast.verify.checks.torchvision_modules", "verify.checks"),
    ],
)
def test_an_import_that_fails_is_not_taken_for_torchvisions_absence(name, package):
    done = python(f"import sys; sys.modules['{name}'] = None; import fpn_fast.{package}")
    assert done.returncode == 1
    assert f"import of {name} halted" in done.stderr.splitlines()[-1]


def test_torch_compile_may_be_what_asks_for_a_backend_first(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", {})
    compiled = torch.compile(lambda maps: fpn_fast.ops.top_down(maps)[0], fullgraph=True, backend="eager")
    assert compiled([torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)]).eq(2).all()


def test_use_and_explain():
    assert backends.requested() == "auto"
    assert "cpp       taken" in backends.explain("cpu")
    with backends.use("reference"):
        assert backends.choose("cpu") == "reference"
        assert "reference taken" in backends.explain("cpu")
        with backends.use("auto"):
            assert backends.choose("cpu") == "cpp"
        assert backends.choose("cpu") == "reference"
    message = "backend must be auto, cpp, triton or reference, got 'cuda'"
    with pytest.raises(ValueError, match=message), backends.use("cuda"):
        pass
    assert backends.requested() == "auto"


def test_a_backend_asked_for_by_name_is_not_replaced(monkeypatch):
    monkeypatch.setitem(_library.problems, "cpu", "it is broken")
    monkeypatch.setattr(backends, "_chosen", {})
    maps = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
    with backends.use("cpp"), pytest.raises(backends.BackendUnavailableError, match="it is broken"):
        ops.top_down(maps)
    # Automatic choice goes on to the next.
    assert backends.choose("cpu") == "reference"
    assert "cpp       not available: it is broken" in backends.explain("cpu")
    assert len(ops.top_down(maps)) == 2


def test_other_devices_get_the_reference():
    assert backends.choose("meta") == "reference"
    maps = [torch.zeros(1, 2, 4, 4, device="meta"), torch.zeros(1, 2, 2, 2, device="meta")]
    assert ops.top_down(maps)[0].shape == (1, 2, 4, 4)


def test_environment_chooses():
    code = "import fpn_fast; print(fpn_fast.backends.requested(), fpn_fast.backends.choose('cpu'))"
    assert python(code, FPN_FAST_BACKEND="reference").stdout.split() == ["reference", "reference"]
    wrong = python(code, FPN_FAST_BACKEND="gpu")
    assert "FPN_FAST_BACKEND must be auto, cpp, triton or reference, got 'gpu'" in wrong.stderr


def test_triton_on_cpu_tensors_needs_its_interpreter():
    code = (
        "import torch, fpn_fast\n"
        "with fpn_fast.backends.use('triton'):\n"
        "    fpn_fast.ops.top_down([torch.zeros(1, 1, 2, 2)] * 2)\n"
    )
    done = python(code, TRITON_INTERPRET="0")
    assert done.returncode == 1
    message = "BackendUnavailableError: backend 'triton' cannot serve cpu tensors: triton serves cpu tensors only"
    assert message in done.stderr


def test_readmes_lines_run_and_print_what_it_shows(capsys):
    text = (ROOT / "README.md").read_text()
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, scope)
    assert scope["found"]["boxes"].shape == (1, 100, 4)
    # The report that the README shows, abridged, is the one that is printed.
    printed = capsys.readouterr().out
    shown = re.search(r"^fpn_fast: .*?(?=^\.\.\.$)", text, re.DOTALL | re.MULTILINE).group()
    assert shown.startswith("fpn_fast: 22 swapped, 0 left\n")
    assert printed.startswith(shown)


def test_an_op_that_the_library_was_built_without_runs_by_the_reference(monkeypatch):
    """As after `git pull` without another build."""
    assert _registration._is_defined("cpp", "fpn_fast::top_down")
    assert not _registration._is_defined("cpp", "fpn_fast::no_such_op")
    monkeypatch.setattr(backends, "_missing", {})
    _registration._declare_missing("no_such_op", set())
    assert backends.problem("cpp", "cpu", "no_such_op") == "it has no kernel of no_such_op for cpu tensors"
    assert backends.choose("cpu", "no_such_op") == "reference"
