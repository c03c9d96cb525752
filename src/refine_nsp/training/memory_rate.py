"""Give the memory of a model a learning rate of its own: new fast weights need steps a hundred times those that pretrained weights bear."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import Trainer

from refine_nsp.errors import RefineError
from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.protocols import CausalModel
from refine_nsp.training.arguments import ReFINEConfig


class TwoRates(Trainer):
    """Train the memory's parameters at `fast_weight_learning_rate`, where that is given, and log both rates."""

    args: ReFINEConfig
    model: nn.Module

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer, with the memory's parameters in groups of their own where they have a rate of their own."""
        rate = self.args.fast_weight_learning_rate if self.optimizer is None else None
        optimizer = super().create_optimizer(model)
        if rate is not None:
            split_groups(optimizer, self.model if model is None else model, rate)
        return optimizer

    def _get_learning_rate(self) -> float:
        """Look the rates of a step up, which Trainer does before the schedule moves on; the memory's is kept for the log."""
        if self.args.fast_weight_learning_rate is None:
            return super()._get_learning_rate()
        assert self.optimizer is not None
        self._memory_rate = float(self.optimizer.param_groups[-1]["lr"])
        return super()._get_learning_rate() if self.args.learning_rate else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, the memory's rate next to the other."""
        if "learning_rate" in logs and self.args.fast_weight_learning_rate is not None:
            logs = {**logs, "fast_weight_learning_rate": self._memory_rate}
        super().log(logs, start_time)


def memory_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that are the memory's alone, as each mixer names them (`StateMixer.memory_names`); none in most families."""
    found = []
    for mixer in cast(CausalModel, without_adapters(model)).model.mixers:
        assert isinstance(mixer, nn.Module)
        found += [p for name, p in mixer.named_parameters() if name.split(".")[0] in mixer.memory_names]
    return found


def by_rate(model: nn.Module, args: ReFINEConfig) -> list[tuple[float, list[nn.Parameter]]]:
    """List the learning rates of a run, each with the parameters that are trained at it; the memory's are the last."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if args.fast_weight_learning_rate is None:
        return [(args.learning_rate, trained)]
    memory = set(map(id, memory_parameters(model)))
    rest, own = ([p for p in trained if (id(p) in memory) == inside] for inside in (False, True))
    return [(args.learning_rate, rest), (args.fast_weight_learning_rate, own)]


def check_memory(model: nn.Module, args: ReFINEConfig, own_optimizer: bool) -> None:
    """Refuse to train the memory at a rate of its own, or alone, where nothing would be; freeze the rest of the model where it is trained
    alone: at learning_rate 0, or by transfer.

    Args:
        own_optimizer: whether the caller has made the optimizer.

    Raises:
        RefineError: a model without parameters that are its memory's alone, or with adapters, or an optimizer with rates of its own.
    """
    rate, transfers = args.fast_weight_learning_rate, args.objective == "transfer"
    if rate is None and not transfers:
        return
    given = f"fast_weight_learning_rate={rate:g}" if rate is not None else "objective='transfer'"
    if own_optimizer and rate is not None:
        raise RefineError(
            f"{given} is for the optimizer that the trainer makes, and it was given one: set its groups' rates there"
        )
    if hasattr(model, "peft_config"):
        raise RefineError(
            f"{given} trains the memory's own weights, and with adapters (use_peft) only those are trained; leave one of the two out, or "
            "train the memory first (learning_rate=0), and adapters on what that gives"
        )
    memory = memory_parameters(model)
    if not memory:
        raise RefineError(
            f"{given}: in {cast(CausalModel, model).model.label} no parameter is the memory's alone, since the projections that write and "
            "read it are all that mixes tokens there; LaCT models have such parameters"
        )
    if not any(p.requires_grad for p in memory):
        raise RefineError(
            f"{given}: none of the memory's {len(memory)} parameters requires a gradient, so nothing would be trained"
        )
    if transfers or args.learning_rate == 0:
        own = set(map(id, memory))
        for parameter in model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Move the memory's parameters into groups of their own at the optimizer's end, with this rate; weight decay and all else stays."""
    memory = set(map(id, memory_parameters(model)))
    moved = []
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if id(p) in memory]
        group["params"] = [p for p in group["params"] if id(p) not in memory]
        moved.append({**group, "params": own, "lr": rate})
    kept = [group for group in optimizer.param_groups if group["params"]]
    if not kept:  # a schedule that ends at a rate of its own takes the optimizer's for the one it begins with
        optimizer.defaults["lr"] = rate
    optimizer.param_groups[:] = kept
    for group in moved:
        if group["params"]:
            optimizer.add_param_group(group)
