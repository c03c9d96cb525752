"""A trainer checks, before it trains, whether the model and the data go with the run's settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import cast

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from torch import nn

from refine_nsp.errors import RefineError, closest
from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.protocols import CausalModel
from refine_nsp.ops.precision import share_unmoved
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.memory_rate import by_rate
from refine_nsp.training.phases import Phase

HALF = (torch.bfloat16, torch.float16)
UNMOVED = 0.1  # a step may leave this share of weights as they are before that is said


def weights_problems(model: nn.Module, args: ReFINEConfig, sharded: bool) -> list[str]:
    """Say what does not go well with a run's weights: shards that were asked for and are not, or steps that round away."""
    problems = []
    if (args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")) and not sharded:
        problems.append(
            "FSDP was asked for, but accelerate shards models only over several processes that have an accelerator each: every process "
            "holds the whole model"
        )
    widened = sharded and args.mixed_precision != "no"  # FSDP widens weights where products are narrower
    for rate, trained in [] if widened else by_rate(model, args):
        coarse = [p for p in trained if not p.is_meta and p.dtype in HALF]
        if (share := share_unmoved(coarse, rate)) > UNMOVED:
            problems.append(
                f"{sum(p.numel() for p in coarse):,} trained weights are in {str(coarse[0].dtype).removeprefix('torch.')}, in which a step "
                f"of learning_rate={rate:g} rounds away for {100 * share:.0f} % of them: they would stay as they are. Load "
                "them in float32 (dtype), which bf16 (autocast) still multiplies in bfloat16, or raise learning_rate"
            )
    return problems


def check_carrying(model: nn.Module, carried_keys: int | None) -> None:
    """Refuse to carry states that cannot be continued, or grow with the document (RefineError)."""
    trunk = cast(CausalModel, without_adapters(model)).model
    if trunk.rereads_prefixes:
        raise RefineError(f"carry_states: {trunk.label} cannot go on from a state, which windows do; leave carry_states out")
    if trunk.keeps_all_tokens and carried_keys is None:
        raise RefineError(
            f"carry_states: {trunk.label} attends over everything, so its states would grow with the document; bound them by carried_keys "
            "(keys of so many tokens before a window), or leave carry_states out"
        )


def check_reference(args: ReFINEConfig, reference_model: object) -> None:
    """Refuse a KL term without the frozen model that it is measured against (RefineError)."""
    if args.nsp.kl_coef > 0 and "kl_coef" in args.phase.reads and reference_model is None:
        raise RefineError(f"kl_coef={args.nsp.kl_coef} needs a reference_model, usually a frozen copy of the starting model")


def check_best_figure(wanted: str | None, phase: Phase, eval_dataset: Dataset | Mapping[str, Dataset] | None) -> None:
    """Refuse a figure that is to decide which checkpoint is best and that validation does not compute (RefineError)."""
    if not wanted:
        return
    try:
        figures = list(phase.summarise(defaultdict(float)))
    except Exception:  # a phase of the user's own may need real sums
        return
    sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    known = [f"{name}{figure}" for name in sets for figure in figures]
    if (name := wanted.removeprefix("eval_")) not in known:
        raise RefineError(
            f"metric_for_best_model={wanted!r} is no figure of validation{closest(name, known)}; it has {', '.join(known)}"
        )
