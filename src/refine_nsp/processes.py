"""Find the device of this process and its place among other processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar, cast

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from refine_nsp.ops.memory import part


class HasParameters(Protocol):
    """A module, or what answers for one."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


M = TypeVar("M", bound=HasParameters)


def process_state() -> PartialState:
    """Return accelerate's state: the CUDA device of this process or the CPU, and its rank under `accelerate launch`."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_sharded(model: HasParameters) -> bool:
    """Tell whether processes hold a model's weights in parts (FSDP2, ZeRO-3), so that they must make the same passes to gather them."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def to_device(model: M, device: torch.device | str | None = None) -> M:
    """Move a model to `device`, by default this process' own."""
    with part("loading"):  # `PreTrainedModel.to` hides its arguments from type checkers
        cast(nn.Module, model).to(process_state().device if device is None else device)
    return model
