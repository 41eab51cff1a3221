# SPDX-License-Identifier: Apache-2.0
"""What the members of the pyramid family cost on ResNet-50's maps of an 800x1344 image.

    python -m benchmarks.family --json benchmarks/results/family.json     parameters, FLOPs and kept bytes, counted
    python -m benchmarks.family --time --json benchmarks/results/family.json    and times, on an idle machine
    .venv-family/bin/python -m benchmarks.family --originals --json benchmarks/results/family_originals.json

Counts come from a run on tensors without data, and are the same on every machine. "Kept" are the bytes per image that a
training step of two keeps for its backward pass, without parameters and the given maps. Times are of one process,
member after member, float32. With --originals our module, a package's and torch.compile of the package's take turns in
one process, with equal weights; `make test-family` makes the environment, and checks that their results are equal.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fpn_fast.bench import report
from fpn_fast.bench.machine import commit, cpu_name, keep_freed_memory
from fpn_fast.bench.rows import write_rows
from fpn_fast.nn import FeaturePyramidNetwork, LastLevelMaxPool, PANet, detectron2, effdet, mmdet, smp, transformers

SIZE = (800, 1344)
#: Images of a training step: batch norm of pooled maps needs two.
TRAINED = 2
#: Channels of C2 to C5 of ResNet-50.
WIDTHS = (256, 512, 1024, 2048)


class _Named(nn.Module):
    """A member that takes its maps by name."""

    def __init__(self, member: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.member, self.names = member, names

    def forward(self, maps: list[Tensor]) -> Any:
        return self.member(dict(zip(self.names, maps, strict=True)))


class _OneMap(nn.Module):
    """ViTDet's pyramid of C4."""

    def __init__(self) -> None:
        super().__init__()
        self.member = detectron2.SimpleFeaturePyramid(self._Last(), "c4", 256, [4.0, 2.0, 1.0, 0.5])

    class _Last(nn.Module):
        def output_shape(self) -> dict[str, Any]:
            return {"c4": detectron2.ShapeSpec(channels=WIDTHS[2], stride=16)}

        def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
            return {"c4": maps[0]}

    def forward(self, maps: list[Tensor]) -> Any:
        return self.member(maps)


class _Decoder(nn.Module):
    """A decoder of smp, which is given the encoder's first two maps too and does not read them."""

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.member = member

    def forward(self, maps: list[Tensor]) -> Any:
        return self.member([None, None, *maps])


def _bifpn(name: str) -> nn.Module:
    return effdet.BiFpn(effdet.BiFpnConfig(fpn_name=name), [{"num_chs": width} for width in WIDTHS[1:]])


def _semantic() -> nn.Module:
    shapes = {f"p{level}": detectron2.ShapeSpec(channels=256, stride=2**level) for level in (2, 3, 4, 5)}
    options: dict[str, Any] = {"num_classes": 54, "conv_dims": 128, "common_stride": 4, "norm": "GN"}
    return _Named(detectron2.SemSegFPNHead(shapes, **options).eval(), tuple(shapes))


def _upernet() -> nn.Module:
    config = SimpleNamespace(pool_scales=[1, 2, 3, 6], hidden_size=256, num_labels=150, initializer_range=0.02)
    return transformers.UperNetHead(config, WIDTHS)


_CS, _PS = ("C2", "C3", "C4", "C5"), ("P2", "P3", "P4", "P5")
#: Title, settings, the maps that it takes, and how to build it. All outputs have 256 channels unless settings say so.
MEMBERS: dict[str, tuple[str, str, tuple[str, ...], Callable[[], nn.Module]]] = {
    "fpn": ("FPN", "P2 to P6", _CS,
            lambda: _Named(FeaturePyramidNetwork(list(WIDTHS), 256, LastLevelMaxPool()), ("0", "1", "2", "3"))),
    "pafpn": ("PAFPN, mmdetection's", "P2 to P6", _CS, lambda: mmdet.PAFPN(WIDTHS, 256, 5)),
    "panet": ("PANet, the paper's", "P2 to P6", _CS, lambda: PANet(WIDTHS, 256)),
    "carafe": ("FPN with learned upsampling", "deconvolution, P2 to P6", _CS,
               lambda: mmdet.FPN_CARAFE(WIDTHS, 256, 5, upsample_cfg={"type": "deconv", "upsample_kernel": 2})),
    "yolox": ("YOLOX's PAFPN", "P3 to P5, 3 blocks", _CS[1:], lambda: mmdet.YOLOXPAFPN(WIDTHS[1:], 256)),
    "bifpn": ("BiFPN", "D0: 64 channels, 3 cells, P3 to P7", _CS[1:], lambda: _bifpn("bifpn_fa")),
    "pan": ("PAN, effdet's", "64 channels, 3 cells, P3 to P7", _CS[1:], lambda: _bifpn("pan_fa")),
    "qufpn": ("QuadFPN", "64 channels, 3 cells, P3 to P7", _CS[1:], lambda: _bifpn("qufpn_fa")),
    "nas-fpn": ("NAS-FPN", "7 stages, P3 to P7", _CS[1:], lambda: mmdet.NASFPN(WIDTHS[1:], 256, 5, 7)),
    "vitdet": ("ViTDet's pyramid", "of C4, P2 to P5", ("C4",), _OneMap),
    "bfp": ("BFP", "behind an FPN, non-local", _PS, lambda: mmdet.BFP(256, 4, 2, "non_local")),
    "semantic": ("Semantic branch", "behind an FPN, 128 channels", _PS, _semantic),
    "upernet": ("UPerNet, transformers'", "256 channels", _CS, _upernet),
    "smp-upernet": ("UPerNet, smp's", "256 channels", _CS, lambda: _Decoder(smp.UPerNetDecoder([3, 64, *WIDTHS]))),
    "smp-fpn": ("FPN decoder, smp's", "256 and 128 channels", _CS,
                lambda: _Decoder(smp.FPNDecoder([3, 64, *WIDTHS], dropout=0.0))),
    "smp-pan": ("PAN decoder, smp's", "32 channels", _CS, lambda: _Decoder(smp.PANDecoder([3, 64, *WIDTHS], 5, 32))),
    "maskformer": ("MaskFormer's FPN", "256 channels", _CS,
                   lambda: transformers.MaskFormerFPNModel(WIDTHS[-1], WIDTHS[:-1])),
}  # fmt: skip


def maps_of(names: tuple[str, ...], images: int) -> list[Tensor]:
    """Random maps: a backbone's C2 to C5, or a pyramid's P2 to P5 of 256 channels."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for name in names:
        level = int(name[1])
        shape = (images, WIDTHS[level - 2] if name[0] == "C" else 256, *(-(-side // 2**level) for side in SIZE))
        found.append(torch.randn(shape, generator=generator).requires_grad_())
    return found


def tensors_in(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from (each for value in found.values() for each in tensors_in(value))
    elif isinstance(found, (list, tuple)):
        yield from (each for value in found for each in tensors_in(value))


def flops_of(module: nn.Module, maps: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        module(maps)
    return counter.get_total_flops()


def kept_by(module: nn.Module, maps: list[Tensor]) -> int:
    """Bytes of the storages that autograd keeps, without those of parameters and maps."""
    given = {each.untyped_storage()._cdata for each in [*module.parameters(), *module.buffers(), *maps]}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = module(maps)
    del outputs
    return sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in given)


def count(name: str) -> dict[str, Any]:
    """Parameters, multiply-adds and kept bytes of a member, without data."""
    title, settings, names, build = MEMBERS[name]
    with FakeTensorMode():
        module = build()
        macs = flops_of(module.eval(), maps_of(names, 1)) // 2
        kept = kept_by(module.train(name != "semantic"), maps_of(names, TRAINED)) // TRAINED
    parameters = sum(each.numel() for each in module.parameters())
    return {"member": name, "title": title, "settings": settings, "maps": f"{names[0]} to {names[-1]}",
            "parameters": parameters, "macs": macs, "kept_bytes": kept}  # fmt: skip


def count_backbone() -> dict[str, Any]:
    """ResNet-50 up to C5, by the same counter."""
    with FakeTensorMode():
        layers = list(torchvision.models.resnet50(weights=None).children())
        model = nn.Sequential(*layers[:-2]).eval()
        macs = flops_of(model, torch.empty(1, 3, *SIZE)) // 2
    return {"member": "backbone", "title": "ResNet-50", "parameters": sum(p.numel() for p in model.parameters()),
            "macs": macs}  # fmt: skip


def step(module: nn.Module, maps: Any, training: bool) -> None:
    with torch.set_grad_enabled(training):
        outputs = list(tensors_in(module(maps)))
        if training:
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])


def seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def timed(name: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of an inference and of a training step, after one that warms up."""
    *_, names, build = MEMBERS[name]
    found = {}
    for mode, images in (("evaluation", 1), ("training", TRAINED)):
        maps = maps_of(names, images)
        # The semantic branch has a loss in training: its forward pass in evaluation is timed with a gradient.
        module = build().train(mode == "training" and name != "semantic")
        step(module, maps, mode == "training")
        times = [seconds(lambda: step(module, maps, mode == "training")) for _ in range(rounds)]  # noqa: B023
        found[f"{mode}_ms"] = 1e3 * statistics.median(times)
    return found


def originals() -> Iterator[tuple[str, nn.Module, nn.Module, Callable[[int], Any]]]:
    """(case, ours, the package's, its inputs for so many images)."""
    import effdet as effdets
    from effdet.efficientdet import BiFpn, EfficientDet
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead

    def random(channels: tuple[int, ...], side: int, first: int) -> Callable[[int], list[Tensor]]:
        def make(images: int) -> list[Tensor]:
            sides = [side >> first + i for i in range(len(channels))]
            return [torch.randn(images, c, n, n).requires_grad_() for c, n in zip(channels, sides, strict=True)]

        return make

    for name in ("efficientdet_d0", "tf_efficientdet_d0"):
        config = effdets.get_efficientdet_config(name)
        channels = (40, 112, 320)
        info = [{"num_chs": c, "reduction": 8 << i} for i, c in enumerate(channels)]
        ours = effdet.BiFpn(config, info)
        yield f"BiFPN of {name}, 512", ours, BiFpn(config, info), random(channels, 512, 3)
    config = effdets.get_efficientdet_config("efficientdet_d0")
    theirs = EfficientDet(config, pretrained_backbone=False)
    ours = copy.deepcopy(theirs)
    ours.fpn = effdet.BiFpn(config, [{"num_chs": c, "reduction": 8 << i} for i, c in enumerate((40, 112, 320))])
    yield "EfficientDet D0, 512", ours, theirs, lambda images: torch.rand(images, 3, 512, 512)
    widths = (96, 192, 384, 768)
    upernet = UperNetConfig(hidden_size=512, num_labels=150, pool_scales=[1, 2, 3, 6])
    yield ("UPerNet of transformers, Swin-T's widths, 256", transformers.UperNetHead(upernet, widths),
           UperNetHead(upernet, widths), random(widths, 256, 2))  # fmt: skip
    encoder = (3, 64, *WIDTHS)
    yield ("FPN decoder of smp, ResNet-50's widths, 512", smp.FPNDecoder(encoder, dropout=0.0),
           FPNDecoder(list(encoder), dropout=0.0), random(WIDTHS, 512, 2))  # fmt: skip
    pair = (_Decoder(kind(list(encoder))) for kind in (smp.UPerNetDecoder, UPerNetDecoder))
    yield ("UPerNet decoder of smp, ResNet-50's widths, 256", *pair, random(WIDTHS, 256, 2))


def beside(rounds: int) -> Iterator[dict[str, Any]]:
    """Median times of ours, the package's and the compiled package's, which take turns; and the medians of ratios."""
    for case, ours, theirs, make in originals():
        ours.load_state_dict(theirs.state_dict())
        for mode in ("evaluation", "training"):
            training = mode == "training"
            ours.train(training)
            theirs.train(training)
            runs = {"fpn_fast": ours, "package": theirs, "compiled": torch.compile(theirs)}
            maps = make(TRAINED if training else 1)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for i in range(rounds + 2):
                for name, module in runs.items():
                    # A list of its own: effdet appends to it.
                    given = list(maps) if isinstance(maps, list) else maps
                    spent = seconds(lambda: step(module, given, training))  # noqa: B023
                    if i >= 2:
                        times[name].append(spent)
            row = {"case": case, "mode": mode, **{f"{k}_ms": 1e3 * statistics.median(v) for k, v in times.items()}}
            for name in ("package", "compiled"):
                ratios = [a / b for a, b in zip(times[name], times["fpn_fast"], strict=True)]
                row[f"over_{name}"] = statistics.median(ratios)
            yield row


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for each member; times where they were measured."""
    backbone, *rows = found["rows"]
    timed = all("evaluation_ms" in row for row in rows)
    lines = [["member", "settings", "takes", "parameters (M)", "GMAC", "of ResNet-50's", "kept (MB)",
              *(["inference (ms)", "training step of two images (ms)"] if timed else [])]]  # fmt: skip
    for row in rows:
        share = f"{100 * row['macs'] / backbone['macs']:.0f} %"
        cells = [f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.1f}", share, f"{row['kept_bytes'] / 1e6:.0f}"]
        if timed:
            cells += [f"{row[f'{mode}_ms']:.0f}" for mode in ("evaluation", "training")]
        lines.append([row["title"], row["settings"], row["maps"], *cells])
    note = (
        f"On ResNet-50's maps of one {SIZE[0]}x{SIZE[1]} image, float32. ResNet-50 itself has "
        f"{backbone['macs'] / 1e9:.1f} GMAC and {backbone['parameters'] / 1e6:.1f} M parameters by the same counter. "
        "Kept: bytes per image that a training step keeps for the backward pass, without parameters and the given "
        f"maps. Counted with torch {found['torch']}"
        + (f"; times of {found['threads']} threads of {found['cpu']}." if timed else ".")
    )
    return f"{report.table(lines, left=3)}\n\n{note}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--member", nargs="+", choices=MEMBERS, default=list(MEMBERS))
    parser.add_argument("--time", action="store_true", help="measure times too")
    parser.add_argument("--originals", action="store_true", help="measure ratios to the packages' modules alone")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    head: dict[str, Any] = {"torch": importlib.metadata.version("torch"), "commit": commit()}
    if options.time or options.originals:
        keep_freed_memory()
        head |= {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []
    if options.originals:
        for row in beside(options.rounds):
            rows.append(row)
            print(json.dumps(row), flush=True)
    else:
        rows.append(count_backbone())
        for name in options.member:
            rows.append(count(name) | (timed(name, options.rounds) if options.time else {}))
            print(json.dumps(rows[-1]), flush=True)
    if options.json is not None:
        write_rows(options.json, head, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
