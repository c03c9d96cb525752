"""Guard precision: in code that automatic mixed precision must not change, and for steps that a dtype is too coarse for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """Run `function` with autocast off on the device of its first tensor argument; it widens itself what must be wider."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> object:
        # A backward pass none of whose outputs has a gradient gets no tensor, and so no device.
        device = next((a.device.type for a in args if isinstance(a, Tensor)), None)
        # Entering the context costs as much as a small op, so only where it changes something.
        if device is None or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return cast(F, wrapped)


@torch.no_grad()
def share_unmoved(weights: Iterable[Tensor], step: float, at_most: int = 4096) -> float:
    """Estimate the share of weights that a step of this size leaves as they are, up or down.

    There the step is less than half of what the weights' dtype can tell apart. About `at_most` weights of each tensor are looked at.
    """
    unmoved, total = 0.0, 0
    for x in weights:
        some = x.detach().flatten()[:: max(1, x.numel() // at_most)]
        unmoved += x.numel() * float(((some + step == some) & (some - step == some)).double().mean())
        total += x.numel()
    return unmoved / max(1, total)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Find the dtype that matrix products of x run in: autocast's where it is on, else x's own. Autocast leaves float64 alone."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype
