# SPDX-License-Identifier: Apache-2.0
"""Runs cases on every backend and device and gathers the results."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpn_fast import _torch_private, backends
from fpn_fast.testing import tolerances
from fpn_fast.verify.checks import CHECKS, Check
from fpn_fast.verify.draw import Draw
from fpn_fast.verify.trial import Measure, Rule, Trial

#: Triton's interpreter takes a thousand times a kernel's time, so few cases have to do.
INTERPRETED_CASES = 3
#: Cases of one seed. The next seed begins where these end.
_PER_SEED = 1_000_000


@dataclass(frozen=True)
class Failure:
    """A case that broke a rule or raised. case: its name for ``--case``; text: the case in words."""

    case: str
    text: str
    message: str


@dataclass
class Row:
    """All cases of one op, backend, device and dtype. note: why there are fewer cases than asked for, or none."""

    op: str
    backend: str
    device: str
    dtype: str
    cases: int = 0
    measure: Measure = field(default_factory=Measure)
    failures: list[Failure] = field(default_factory=list)
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.measure.error.within


@dataclass(frozen=True)
class Plan:
    """What to run. cases: number of cases per row; only: one case, (op, backend, device, dtype, number)."""

    ops: Sequence[str]
    backends: Sequence[str]
    seed: int
    cases: int
    shapes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    only: tuple[str, str, str, str, int] | None = None


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def targets(check: Check, wanted: Sequence[str], device: str) -> list[str]:
    """The backends that have a kernel for `check` on `device`."""
    found = [name for name in wanted if check.backends is None or name in check.backends]
    return [name for name in found if any(backends.problem(name, device, op) is None for op in check.ops)]


def _rows(plan: Plan) -> Iterator[tuple[Check, torch.dtype, str, list[Row]]]:
    """The rows of the table, grouped by those that share their cases."""
    for op, device in itertools.product(plan.ops, devices()):
        check = CHECKS[op]
        names = targets(check, plan.backends, device)
        interpreted = [name for name in names if name == "triton" and device == "cpu"]
        compiled = [name for name in names if name not in interpreted]
        for dtype, group in itertools.product(check.dtypes, (compiled, interpreted)):
            rows = [Row(op, name, device, name_of(dtype)) for name in group]
            if plan.only is not None:
                rows = [row for row in rows if (row.op, row.backend, row.device, row.dtype) == plan.only[:4]]
            if rows:
                yield check, dtype, device, rows


def _numbers(plan: Plan, check: Check, rows: list[Row]) -> list[int]:
    if plan.only is not None:
        return [plan.only[4]]
    count = plan.cases * max(1, len(plan.shapes.get(check.name, ())))
    row = rows[0]
    if row.backend == "triton" and row.device == "cpu":
        if row.dtype == "bfloat16":
            row.note = "Triton's interpreter does not round to bfloat16 as a GPU does"
            return []
        few = min(max(1, count // 8), INTERPRETED_CASES)
        row.note, count = f"interpreted: {few} small cases", few
    return [plan.seed * _PER_SEED + i for i in range(count)]


def run(plan: Plan, progress: Callable[[int, int, str], None] = lambda done, total, text: None) -> list[Row]:
    """Runs `plan`. progress: called before each case with the number of cases done, the total, and the op."""
    work = [(*group, _numbers(plan, group[0], group[3])) for group in _rows(plan)]
    total = sum(len(rows) * len(numbers) for *_, rows, numbers in work)
    done = 0
    for check, dtype, device, rows, numbers in work:
        given = plan.shapes.get(check.name, [])
        for number in numbers:
            progress(done, total, f"{check.name} {device} {name_of(dtype)}")
            shape = given[number % len(given)] if given else None
            small = rows[0].backend == "triton" and device == "cpu"
            _run_case(check, dtype, device, number, rows, small, shape)
            done += len(rows)
    progress(total, total, "")
    return [row for _, _, _, rows, _ in work for row in rows]


def _run_case(
    check: Check, dtype: torch.dtype, device: str, number: int, rows: list[Row], small: bool, given: Any
) -> None:
    expected: _Expected | None = None
    for row in rows:
        row.cases += 1
        case = f"{row.op}/{row.backend}/{row.device}/{row.dtype}/{number}"
        text = "drawing it"
        try:
            with _exact_arithmetic():
                if expected is None:
                    draws = (Draw(check.name, number, dtype, on, small=small, given=given) for on in ("cpu", device))
                    expected = _Expected(*map(check.draw, draws))
                text = expected.trial.text
                measure = expected.measure(row.backend)
        except Exception as error:
            measure = Measure(tolerances.failure(f"raised {type(error).__name__}: {error}".strip()))
        row.measure = row.measure.worst(measure)
        if not measure.error.within:
            row.failures.append(Failure(case, text, measure.error.text.replace("\n", " ")))


@contextlib.contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Turns off TF32 in convolutions, and warnings about arithmetic with infinities and NaN."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


@contextlib.contextmanager
def _unwritten_shows() -> Iterator[None]:
    """Fills new tensors with NaN or the largest integer by PyTorch's deterministic mode: unwritten elements show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # The public function imports the compiler, which takes seconds.
    _torch_private.set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        _torch_private.set_deterministic_algorithms(before[0], warn_only=before[1])


class _Expected:
    """The right results of one case for all backends: in float64 on the CPU, and by plain PyTorch on the device."""

    def __init__(self, on_cpu: Trial, trial: Trial) -> None:
        self.trial = trial
        self.plain = _detached((on_cpu if trial.decisions else trial).plain(trial.inputs))
        doubles = [i.detach().double() for i in on_cpu.inputs]
        self.exact = self.plain if trial.decisions else _detached(on_cpu.plain(doubles))
        if trial.gradient_rules is None:
            return
        self.seeds = trial.output_seeds([p.to(i.device) for p, i in zip(self.plain, itertools.cycle(trial.inputs))])
        self.plain_grads = _detached(_gradients(trial, trial.inputs, self.seeds))
        self.exact_grads = _detached(_gradients(on_cpu, doubles, [s.double().cpu() for s in self.seeds]))
        self.gradient_rules = trial.gradient_rules(self.seeds, self.plain_grads, self.exact_grads)

    def measure(self, backend: str) -> Measure:
        trial, differentiate = self.trial, self.trial.gradient_rules is not None
        inputs = [i.detach().requires_grad_(differentiate) for i in trial.inputs]
        with backends.use(backend), _unwritten_shows():
            outputs = list(trial.call(inputs))
            if wrong := _wrong_form(outputs, self.plain, trial.form):
                return Measure(tolerances.failure(wrong))
            if differentiate:
                grads = torch.autograd.grad(outputs, inputs, self.seeds, materialize_grads=True)
        rules = [trial.rules(i) for i in range(len(outputs))]
        found = _judged("output", rules, _detached(outputs), self.plain, self.exact)
        if differentiate:
            found += _judged("gradient", self.gradient_rules, _detached(grads), self.plain_grads, self.exact_grads)
        return functools.reduce(Measure.worst, found, Measure())


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().cpu() for t in tensors]


def _judged(name: str, rules: list[Rule], *results: list[Tensor]) -> list[Measure]:
    measures = [rule(*each) for rule, *each in zip(rules, *results, strict=True)]
    texts = [f"{name} {i}: {measure.error.text}" for i, measure in enumerate(measures)]
    return [replace(m, error=replace(m.error, text=text)) for m, text in zip(measures, texts, strict=True)]


def _gradients(trial: Trial, inputs: list[Tensor], seeds: list[Tensor]) -> Sequence[Tensor]:
    if trial.plain_gradients is not None:
        return trial.plain_gradients(inputs, seeds)
    leaves = [i.detach().requires_grad_() for i in inputs]
    return torch.autograd.grad(list(trial.plain(leaves)), leaves, seeds, materialize_grads=True)


def _wrong_form(outputs: list[Tensor], plain: list[Tensor], form: torch.memory_format | None) -> str | None:
    """What is wrong with the number of outputs, their shapes, dtypes or memory format; None if nothing is."""
    got, wanted = ([(tuple(o.shape), name_of(o.dtype)) for o in each] for each in (outputs, plain))
    if got != wanted:
        return f"outputs are {got}, not {wanted}"
    for i, output in enumerate(outputs):
        if form is not None and output.dim() == 4 and not output.is_contiguous(memory_format=form):
            return f"output {i} is not {form}: its strides are {output.stride()}"
    return None


_SIDE = r"[1-9]\d*"
_PAIR = rf"\[{_SIDE}, {_SIDE}\]"
#: The JSON of a size in a user's file, by its key; others are positive integers.
_SIZES = {
    "sizes": rf"\[{_PAIR}(, {_PAIR})*\]",
    "image": _PAIR,
    "heatmap_size": _PAIR,
    "size": _PAIR,
    "output_size": f"{_PAIR}|{_SIDE}",
    **dict.fromkeys(("rois", "boxes", "ground_truths", "masks", "batch"), r"\d+"),
}


def read_shapes(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads a user's sizes: ``{"top_down": [{"batch": 2, "channels": 256, "sizes": [[200, 336], [100, 168]]}]}``.

    Raises:
        ValueError: there is no such file, or it is not such JSON; an op, a key or a size is not valid.
    """
    try:
        shapes = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(shapes, dict) or not shapes:
        raise ValueError(f"{path} must hold an object that maps names of ops to lists of sizes")
    for op, entries in shapes.items():
        if op not in CHECKS:
            raise ValueError(f"{path}: there is no op {op!r}; there are {', '.join(CHECKS)}")
        if not isinstance(entries, list) or not entries or not all(isinstance(each, dict) for each in entries):
            raise ValueError(f"{path}: {op} must be a list of objects, at least one")
        for key, value in ((k, v) for each in entries for k, v in each.items()):
            if key not in CHECKS[op].keys:
                known = ", ".join(CHECKS[op].keys) or "none"
                raise ValueError(f"{path}: {op} has no size {key!r}; it has: {known}")
            if not re.fullmatch(_SIZES.get(key, _SIDE), json.dumps(value)):
                raise ValueError(f"{path}: {op} has {key} {json.dumps(value)}; see `fpn-fast verify --help`")
    return shapes
