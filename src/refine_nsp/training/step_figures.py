"""Figures of training steps are collected until the next log, and averaged over steps and processes there."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor


class StepFigures:
    """Collect figures by name until the next log, and count the real tokens that this process trained on since training began."""

    def __init__(self) -> None:
        self.values: dict[str, list[float | Tensor]] = defaultdict(list)
        self.tokens = 0
        self._by_source: dict[str, int] = defaultdict(int)
        self._last_log = (time.monotonic(), 0)  # when, and the tokens until then

    def add(self, name: str, value: float | Tensor) -> None:
        """Keep one more value; a tensor is not read before the next log, since reading it would make a device wait."""
        self.values[name].append(value)

    def count_sources(self, sources: Sequence[str], tokens: Sequence[int]) -> None:
        """Count the tokens of sequences by the sources that these come from; nothing where there are none."""
        for source, count in zip(sources, tokens, strict=bool(sources)):
            self._by_source[source] += count

    def restart_clock(self) -> None:
        """Count time and tokens from now on."""
        self._last_log = (time.monotonic(), self.tokens)

    def means(self, prepares_steps: bool, processes: int) -> dict[str, float]:
        """Return the means since the last log, over all processes, and begin anew; every process must ask for them. With `prepares_steps`
        rollouts were sampled outside the steps, whose time has then no part of them."""
        means = {name: mean_of(values) for name, values in self.values.items() if values}
        self.values.clear()
        now, (then, tokens) = time.monotonic(), self._last_log
        if self.tokens > tokens:
            means["tokens_per_second"] = (self.tokens - tokens) / max(now - then, 1e-9)
        self._last_log = (now, self.tokens)
        if "seconds_step" in means:
            sampling = 0.0 if prepares_steps else means.get("seconds_select", 0.0) + means.get("seconds_rollout", 0.0)
            means["seconds_backward_and_forward"] = means.pop("seconds_step") - sampling
        means = mean_over_processes(means) | shares_over_processes(self._by_source)
        self._by_source.clear()
        if "tokens_per_second" in means:
            means["tokens_per_second"] *= processes
        return means


def mean_over_processes(figures: Mapping[str, float]) -> dict[str, float]:
    """Average each figure over the processes that have it; every process must ask for it."""
    everywhere = gather_object([figures])
    names = dict.fromkeys(name for own in everywhere for name in own)
    return {name: mean_of([own[name] for own in everywhere if name in own]) for name in names}


def shares_over_processes(tokens: Mapping[str, int]) -> dict[str, float]:
    """Return each source's share of the tokens of all processes, as `source_share_NAME`; every process must ask for it."""
    everywhere = gather_object([dict(tokens)])
    whole = sum(sum(own.values()) for own in everywhere)
    names = sorted({name for own in everywhere for name in own})
    return {f"source_share_{name}": sum(own.get(name, 0) for own in everywhere) / whole for name in names}


def mean_of(values: Sequence[float | Tensor]) -> float:
    """Average numbers and 0-dimensional tensors; the tensors of a log interval are read here, once."""
    tensors = [v.detach().double() for v in values if isinstance(v, Tensor)]
    numbers = [float(v) for v in values if not isinstance(v, Tensor)]
    return (sum(torch.stack(tensors).tolist() if tensors else []) + sum(numbers)) / len(values)
