"""What would go wrong with a model and its settings: in words for a warning or an error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from refine_nsp.errors import RefineError, closest
from refine_nsp.ops.precision import share_unmoved
from refine_nsp.training.phases import Phase

HALF = (torch.bfloat16, torch.float16)
UNMOVED = 0.1  # share of weights that a step may leave as they are, before that is said


def rounding_problem(model: nn.Module, learning_rate: float) -> str | None:
    """Which trained weights are too coarse for the learning rate, or None."""
    coarse = [p for p in model.parameters() if p.requires_grad and not p.is_meta and p.dtype in HALF]
    share = share_unmoved(coarse, learning_rate)
    if share <= UNMOVED:
        return None
    return (
        f"{sum(p.numel() for p in coarse):,} trained weights are in {str(coarse[0].dtype).removeprefix('torch.')}, in which a step "
        f"of learning_rate={learning_rate:g} rounds away for {100 * share:.0f} % of them: they would stay as they are. Load "
        "them in float32 (dtype), which bf16 (autocast) still multiplies in bfloat16, or raise learning_rate"
    )


def check_best_figure(wanted: str | None, phase: Phase, eval_dataset: Any) -> None:
    """RefineError where the figure that is to decide which checkpoint is best (`metric_for_best_model`) is none of validation's."""
    if not wanted:
        return
    try:
        figures = list(phase.summarise(defaultdict(float)))
    except Exception:  # a phase of one's own, which needs real sums
        return
    sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    known = [f"{name}{figure}" for name in sets for figure in figures]
    if (name := wanted.removeprefix("eval_")) not in known:
        raise RefineError(
            f"metric_for_best_model={wanted!r} is no figure of validation{closest(name, known)}; it has {', '.join(known)}"
        )
