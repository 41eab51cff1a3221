# SPDX-License-Identifier: Apache-2.0
"""Rounds and medians: the part of the protocol (see harness.py) that knows nothing of what is sampled."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

#: Fewer rounds give no quantiles; more than enough is as many as the longest case has time for.
MIN_ROUNDS, MAX_ROUNDS = 7, 200

Key = TypeVar("Key", bound=Hashable)
#: Takes one sample: seconds per call.
Sampler = Callable[[], float]


@dataclass
class Measurement:
    """How one metric of one provider is sampled: by what method, and over how many calls."""

    method: str
    calls: int
    sample: Sampler


def interleave(samplers: Mapping[Key, Sampler], seconds: float, max_rounds: int = MAX_ROUNDS) -> dict[Key, list[float]]:
    """Samples each of `samplers` once a round until `seconds` have passed, in an order that changes with the round."""
    keys = list(samplers)
    samples: dict[Key, list[float]] = {key: [] for key in keys}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(max_rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            first = turn % len(keys)
            order = keys[first:] + keys[:first]
            # Every other cycle backwards: else each would always follow the same one.
            for key in reversed(order) if (turn // len(keys)) % 2 else order:
                samples[key].append(samplers[key]())
    finally:
        gc.enable()
    return samples


def quantile(samples: Sequence[float], share: float) -> float:
    """The value that `share` of `samples` lie below, interpolated between the two nearest."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
