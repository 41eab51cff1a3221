# SPDX-License-Identifier: Apache-2.0
"""The logger ``fpn_fast``: which backend serves a call, and where no kernel does."""

import logging
import os

import pytest
import torch
from helpers import forked_python
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead

from fpn_fast import _library, _log, backends, nn, ops

MAPS = [torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2)]


@pytest.fixture
def lines(caplog, monkeypatch):
    """Lines that were written since the last call; nothing was chosen or written before."""
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(_log, "_written", set())

    def written():
        found = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "fpn_fast"]
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING, "fpn_fast"):
        yield written


def test_debug_says_once_which_backend_serves_each_kind_of_tensor(lines, caplog):
    caplog.set_level(logging.DEBUG, "fpn_fast")
    why = "cpp (the first that has a kernel)"
    ops.top_down(MAPS)
    assert lines() == [("DEBUG", f"top_down on cpu float32 contiguous: {why}")]
    ops.top_down(MAPS)
    assert lines() == []
    last = [m.to(memory_format=torch.channels_last) for m in MAPS]
    ops.top_down(last)
    ops.top_down([m.bfloat16() for m in last])
    ops.top_down([m.transpose(2, 3)[:, :, :, ::2] for m in MAPS])
    assert lines() == [
        ("DEBUG", f"top_down on cpu float32 channels_last: {why}"),
        ("DEBUG", f"top_down on cpu bfloat16 channels_last: {why}"),
        ("DEBUG", f"top_down on cpu float32 strided: {why}"),
    ]
    with backends.use("reference"):
        ops.roi_align(MAPS[0], torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]]), 2)
    assert lines() == [("DEBUG", "multiscale_roi_align on cpu float32 contiguous: reference (asked for by name)")]


def test_nothing_is_looked_up_again_without_debug(lines, monkeypatch):
    ops.top_down(MAPS)
    monkeypatch.setattr(backends, "_serve", None)
    ops.top_down(MAPS)
    assert lines() == []


def test_a_warning_where_nobody_asked_for_the_reference(lines, monkeypatch):
    monkeypatch.setitem(_library.problems, "cpu", "it is broken")
    with backends.use("reference"):
        ops.top_down(MAPS)
    assert lines() == []
    with torch.no_grad():
        for _ in range(2):
            nn.FeaturePyramidNetwork([2, 2], 2)(dict(zip("01", MAPS, strict=True)))
    ((level, text),) = lines()
    assert level == "WARNING"
    assert text.startswith(
        "top_down runs by the reference on cpu tensors, in plain PyTorch: not cpp: it is broken; not "
    )


class OwnCoder(BoxCoder):
    pass


def propose(network):
    maps = {"0": torch.ones(1, 2, 4, 4)}
    network(ImageList(torch.ones(1, 3, 16, 16), [(16, 16)]), maps)


def network():
    counts = {"training": 9, "testing": 9}
    generator = nn.AnchorGenerator(((8,),), ((1.0,),))
    return nn.RegionProposalNetwork(generator, RPNHead(2, 1), 0.7, 0.3, 4, 0.5, counts, counts, 0.7).eval()


def test_a_warning_where_a_module_runs_its_original_librarys_code(lines, monkeypatch):
    with torch.no_grad():
        propose(network())
        assert lines() == []
        other = network()
        other.box_coder = OwnCoder((1.0, 1.0, 1.0, 1.0))
        propose(other)
        propose(other)
        start = "RegionProposalNetwork runs its original library's code on cpu tensors: "
        settings = f"{start}generate_proposals does not know its settings or dtypes"
        assert lines() == [("WARNING", settings)]
        monkeypatch.setattr(backends, "_chosen", {})
        monkeypatch.setattr(backends, "_missing", {(b, "cpu"): {"generate_proposals"} for b in ("cpp", "triton")})
        propose(network())
        assert lines() == [("WARNING", f"{start}no backend here has a kernel of generate_proposals")]


def test_compiling_writes_no_line_and_breaks_no_graph(lines, caplog):
    caplog.set_level(logging.DEBUG, "fpn_fast")
    compiled = torch.compile(lambda *maps: ops.top_down(maps)[0], fullgraph=True, backend="eager")
    assert compiled(*MAPS).eq(2).all()
    assert lines() == []


@pytest.mark.parametrize(
    ("level", "printed"),
    [
        ("debug", "fpn_fast DEBUG: top_down on cpu float32 contiguous: cpp (the first that has a kernel)\n"),
        ("warning", ""),
        (None, ""),
        ("all", "ValueError: FPN_FAST_LOG must be debug, info, warning or error, got 'all'\n"),
    ],
)
def test_the_environment_turns_it_on(level, printed):
    code = "import torch, fpn_fast; fpn_fast.ops.top_down([torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2)])"
    environment = {name: value for name, value in os.environ.items() if name != "FPN_FAST_LOG"}
    environment |= {} if level is None else {"FPN_FAST_LOG": level}
    done = forked_python.run(code, environment)
    assert done.stderr.endswith(printed)
    assert (done.stderr == "") == (printed == "")
