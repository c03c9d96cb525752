"""Where automatic mixed precision must not reach: states and cumulative products are kept in float32 or better."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """Run `function` with autocast off on the device of its first tensor argument.

    Its arguments stay as autocast left them, perhaps in bfloat16: what must be wider, `function` widens itself.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # None: a backward pass none of whose outputs has a gradient.
        device = next((a.device.type for a in args if isinstance(a, Tensor)), None)
        # Entering the context costs as much as a small op, so only where it changes something.
        if device is None or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of x run in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
