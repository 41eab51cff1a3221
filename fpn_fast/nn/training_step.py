# SPDX-License-Identifier: Apache-2.0
"""A whole training step as one call, and as one CUDA graph a canvas. Needs torchvision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fpn_fast.nn.static_targets import StaticTargets

if TYPE_CHECKING:
    from fpn_fast.nn.static_training import Size, StaticTraining

#: Calls before a capture: they choose cuDNN's algorithms, and allocate workspaces and the optimiser's state.
_WARM_UP = 3


class TrainingStep:
    """Forward, backward, gradient clipping and the optimiser's step, without host synchronisation.

    :meth:`StaticTraining.step` and :meth:`StaticTraining.capture` make it, and say what its arguments are.
    """

    def __init__(
        self,
        training: StaticTraining,
        optimizer: torch.optim.Optimizer,
        *,
        max_gradient_norm: float | None = None,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        average: nn.Module | None = None,
        decay: float | Tensor = 0.999,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        self.training, self.optimizer, self.average = training, optimizer, average
        self.max_gradient_norm, self.autocast, self.accumulate = max_gradient_norm, autocast, accumulate
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.device = next(training.parameters()).device
        if self.scaler is not None and isinstance(optimizer, torch.optim.SGD):
            _make_momentum(optimizer)
        #: Of the average: a tensor of one element, which you may fill with another share at any time.
        self.decay = torch.as_tensor(decay, dtype=torch.float32, device=self.device)
        self._calls = 0
        self._graphs: dict[Size, _Graph] = {}
        self._update_graph: _Graph | None = None
        self._rates: list[Tensor] = []
        # The number of calls, and the number of the first whose losses were not finite. The device writes the latter
        # into pinned memory, which the host reads without waiting for it.
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)
        self._bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._bad_on_host = torch.full((), -1, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def __call__(self, images: Tensor, targets: StaticTargets, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """One batch, as :meth:`StaticTraining.forward` takes it, on the model's device or in pinned memory.

        Returns:
            The losses by name, detached. After a capture the next call overwrites them.

        Raises:
            FloatingPointError: a loss of an earlier call was not finite. It is seen once the device has computed that
                call, one call late at the earliest.
            ValueError: see :meth:`StaticTraining.forward`.
        """
        self.check()
        last = (self._calls + 1) % self.accumulate == 0
        if self._graphs:
            self._fill_rates()
            size = self.training.check_batch(images, targets, sizes, anywhere=True)
            sizes = self.training.whole_sizes(size) if sizes is None else sizes
            losses = self._graphs[size].replay(images, targets, sizes)
            if last and self._update_graph is not None:
                self._update_graph.replay()
        else:
            if self._calls % self.accumulate == 0:
                self.optimizer.zero_grad(set_to_none=True)
            images = images.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            sizes = None if sizes is None else sizes.to(self.device, non_blocking=True)
            losses = self._gradients(images, targets, sizes)
            if last:
                self._update()
        self._calls += 1
        return losses

    def check(self, *, wait: bool = False) -> None:
        """Raises FloatingPointError if a loss of an earlier call was not finite.

        Args:
            wait: whether to synchronise with the device first, as is right after the last call.
        """
        found = int(self._bad if wait else self._bad_on_host)
        if found >= 0:
            raise FloatingPointError(f"a loss was not finite in call {found + 1} of {self._calls}")

    def _gradients(self, images: Tensor, targets: StaticTargets, sizes: Tensor | None) -> dict[str, Tensor]:
        chosen: Any = contextlib.nullcontext()
        if self.autocast is not None:
            # Inside, so that weights cast in one call do not serve the next.
            chosen = torch.autocast(self.device.type, self.autocast)
        with chosen:
            losses = self.training(images, targets, sizes)
        values = torch.stack([each.float() for each in losses.values()])
        loss = values.sum() / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        with torch.no_grad():
            fresh_bad = (self._bad < 0) & ~values.isfinite().all()
            self._bad.copy_(torch.where(fresh_bad, self._count, self._bad))
            self._count += 1
            self._bad_on_host.copy_(self._bad, non_blocking=True)
        return dict(zip(losses, values.detach().unbind(), strict=True))

    def _update(self) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_gradient_norm is not None:
            trained = [each for group in self.optimizer.param_groups for each in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.max_gradient_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.average is not None:
            with torch.no_grad():
                for own, new in zip(_state(self.average), _state(self.training.model), strict=True):
                    if own.is_floating_point():
                        own.lerp_(new.to(own.dtype), (1 - self.decay).to(own.dtype))
                    else:
                        own.copy_(new)

    def capture(self) -> TrainingStep:
        """Captures one CUDA graph a canvas, and with ``accumulate`` one more of the update. Returns self."""
        if self.device.type != "cuda":
            raise RuntimeError(f"a CUDA graph is captured on a GPU; the model is on {self.device}")
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("capture() must be outside of autocast: give it autocast=torch.bfloat16")
        self._rates = tensor_rates(self.optimizer, self.device)
        with self._unchanged():
            for size in self.training.canvases:
                self._warm_up(size)
            self._capture_all()
        return self

    def _warm_up(self, size: Size) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.optimizer.zero_grad(set_to_none=True)
                self._gradients(*self.training.empty_batch(size))
                self._update()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _capture_all(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        separate = self.accumulate > 1
        if separate:
            # Gradients that all graphs add to.
            for group in self.optimizer.param_groups:
                for each in group["params"]:
                    each.grad = torch.zeros_like(each)
        for size in self.training.canvases:
            batch = self.training.empty_batch(size)
            if not separate:
                # Each graph makes its own, in memory that all graphs share: they run one after another.
                self.optimizer.zero_grad(set_to_none=True)

            def whole(batch: Any = batch) -> dict[str, Tensor]:
                losses = self._gradients(*batch)
                if not separate:
                    self._update()
                return losses

            self._graphs[size] = _Graph(whole, pool, batch)
        if separate:

            def update() -> dict[str, Tensor]:
                self._update()
                self.optimizer.zero_grad(set_to_none=False)
                return {}

            self._update_graph = _Graph(update, pool, None)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Weights, statistics, optimiser, scaler, average and random numbers are afterwards as they were before."""
        known = [each for module in (self.training, self.average) if module is not None for each in _state(module)]
        known += [self._count, self._bad, self._bad_on_host, *_tensors_of(self.optimizer)]
        copies = [each.detach().clone() for each in known]
        scale = None if self.scaler is None else self.scaler.state_dict()
        random = torch.cuda.get_rng_state(self.device)
        try:
            yield
        finally:
            torch.cuda.synchronize(self.device)
            with torch.no_grad():
                for each, copied in zip(known, copies, strict=True):
                    each.copy_(copied)
                # Of an optimiser that has made no step, all states begin with zeros.
                seen = {id(each) for each in known}
                for each in _tensors_of(self.optimizer):
                    if id(each) not in seen:
                        each.zero_()
            if self.scaler is not None and scale is not None:
                self.scaler.load_state_dict(scale)
            torch.cuda.set_rng_state(random, self.device)

    def _fill_rates(self) -> None:
        """A learning rate that was set as a number goes into the tensor that the graphs read."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(float(group["lr"]))
                group["lr"] = rate


class _Graph:
    """The captured graph of a function, and the batch that it reads, if any."""

    def __init__(self, function: Any, pool: Any, batch: tuple[Tensor, StaticTargets, Tensor] | None) -> None:
        self.batch = batch
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.losses: dict[str, Tensor] = function()

    def replay(self, *batch: Any) -> dict[str, Tensor]:
        """batch: images, targets and sizes, if the graph reads a batch."""
        for own, given in zip(_tensors_of_batch(self.batch), _tensors_of_batch(batch or None), strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.losses


def check_optimizer(optimizer: torch.optim.Optimizer, *, scaled: bool) -> None:
    """Raises ValueError unless a CUDA graph can hold the optimiser's step.

    scaled: whether a GradScaler scales its gradients.
    """
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        fused, capturable = bool(group.get("fused")), bool(group.get("capturable"))
        if isinstance(optimizer, torch.optim.SGD):
            wanted = [] if fused else ["fused=True"]
            if group.get("dampening"):
                raise ValueError("SGD's first step leaves dampening out, so that it cannot be captured: take 0")
        else:
            wanted = [] if capturable else ["capturable=True"]
            wanted += [] if fused or not scaled else ["fused=True"]
        if wanted:
            raise ValueError(
                f"a captured step needs SGD(fused=True), or an optimiser that has capturable=True, and fused=True too "
                f"with a GradScaler: make {kind} with {' and '.join(wanted)}"
            )


def _make_momentum(optimizer: torch.optim.SGD) -> None:
    """Makes momentum of zeros. torch's fused SGD leaves it uninitialised where a GradScaler skips the first step."""
    for group in optimizer.param_groups:
        for each in group["params"] if group["momentum"] and not group["dampening"] else ():
            optimizer.state[each].setdefault("momentum_buffer", torch.zeros_like(each))


def tensor_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """Makes the learning rate of each group a tensor on `device`, if it is not, and returns them."""
    for group in optimizer.param_groups:
        rate = group["lr"]
        if not isinstance(rate, Tensor) or rate.device != device:
            group["lr"] = torch.tensor(float(rate), dtype=torch.float32, device=device)
    return [group["lr"] for group in optimizer.param_groups]


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Its state's, without the learning rates."""
    return [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]


def _tensors_of_batch(batch: Any) -> list[Tensor]:
    if batch is None:
        return []
    images, targets, sizes = batch
    return [images, *targets.named().values(), sizes]
