"""Where a command runs: its device, and its place among other processes."""

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
    """Of this process: a CUDA device of its own where there is one, else the CPU; alone, or one of several under `accelerate launch`."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_sharded(model: HasParameters) -> bool:
    """Whether its weights lie in parts with several processes (FSDP2; DeepSpeed ZeRO-3, which marks them): these must then make the same
    passes, since each gathers the weights."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def to_device(model: M, device: torch.device | str | None = None) -> M:
    """The model moved to `device`, by default this process' own.

    `PreTrainedModel.to` is wrapped so that type checkers lose its first argument; called on an `nn.Module` it is as it should be.
    """
    with part("loading"):
        cast(nn.Module, model).to(process_state().device if device is None else device)
    return model
