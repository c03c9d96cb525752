"""Where a command runs: its device, and its place among other processes."""

from __future__ import annotations

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Of this process: a CUDA device of its own where there is one, else the CPU; alone, or one of several under `accelerate launch`."""
    return PartialState(cpu=not torch.cuda.is_available())
