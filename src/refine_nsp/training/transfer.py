"""Transfer teaches each layer's mixer what the teacher's attention gives for the same input (LoLCATs, arXiv 2410.10254; DESIGN, section 9).

    loss = (1/L) sum_i sum_b (n_b / n) |mixer_i(h_bi) - attention_i(h_bi)|^2 / |attention_i(h_bi)|^2

over L layers and the sequences of an optimizer step, of n_b of n tokens, with h_bi the teacher's input of layer i. Tokens inside the window
count too: learning from far ones alone disturbs the first window. Layers do not depend on each other, so no graph goes through the depth:
each is run again in the backward pass, and only the activations of one layer's mixer are in memory at a time, next to what the teacher's
layers were given and gave. The memory's parameters alone are trained (`memory_rate.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models import attends_only
from refine_nsp.models.attention_source import refuse_others
from refine_nsp.models.blocks import FastWeightBlock
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import Batch, Metrics
from refine_nsp.nsp.teacher import Teacher
from refine_nsp.ops.memory import part
from refine_nsp.training.data import ANSWER_COLUMN, Collated
from refine_nsp.training.phases import Counts, MicroBatch, Phase


class Transfer(Phase):
    """Learn what the teacher's attention gives, layer by layer. teacher: None where only settings are asked for."""

    def __init__(self, config: NSPConfig, teacher: Teacher | None = None) -> None:
        super().__init__(config)
        self.teacher = teacher

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    @property
    def reads_scores(self) -> bool:
        return False

    @property
    def rows_apart(self) -> bool:
        return True

    def count(self, batch: MicroBatch) -> Counts:
        return {"tokens": float(batch.num_tokens)}

    def count_by_sequence(self, batch: MicroBatch) -> dict[str, Tensor]:
        return {"tokens": batch.lengths.clamp(min=1).to(torch.float32)}

    def loss(self, model: CausalModel, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        assert self.teacher is not None
        errors = layer_errors(model, self.teacher, batch.sequences)
        weights = batch.lengths.to(errors) / batch.totals["tokens"]  # [B]
        loss = (errors.mean(0) * weights).sum()
        return loss, {"loss_transfer": loss.detach(), "worst_layer_error": errors.detach().mean(1).max()}

    @torch.no_grad()
    def validate(self, model: CausalModel, batches: Iterable[Collated]) -> Counts:
        """Sum the errors up too, weighed by tokens (`transfer` over `tokens`)."""
        assert self.teacher is not None
        kept = list(batches)
        sums = super().validate(model, kept) | {"transfer": 0.0, "tokens": 0.0}
        for inputs in kept:
            batch = Batch.of(inputs["input_ids"].to(model.device), inputs["lengths"], answer_starts=inputs.get(ANSWER_COLUMN))
            errors = layer_errors(model, self.teacher, batch).mean(0).double().cpu()
            sums["transfer"] += float((errors * batch.lengths).sum())
            sums["tokens"] += float(batch.lengths.sum())
        return sums

    def summarise(self, sums: Counts) -> dict[str, float]:
        """Add the mean error of a layer, in squared norms of what attention gives, to the figures of next-token prediction."""
        return {**super().summarise(sums), "transfer": sums["transfer"] / max(sums["tokens"], 1.0)}


def layer_errors(model: CausalModel, teacher: Teacher, batch: Batch) -> Tensor:
    """Compute |mixer(h) - attention(h)|^2 / |attention(h)|^2 of every layer and row over its real tokens, [L, B], float32 or better."""
    given, wanted = attention_of(teacher, batch.input_ids)
    lengths = None if bool((batch.lengths == batch.input_ids.shape[1]).all()) else batch.lengths
    errors = []
    for layer, h, a in zip(model.model.layers, given, wanted, strict=True):
        arguments = (cast(FastWeightBlock, layer), h, a, lengths, batch.real)
        learns = torch.is_grad_enabled()
        errors.append(checkpoint(layer_error, *arguments, use_reentrant=False) if learns else layer_error(*arguments))
    return torch.stack(errors)


def layer_error(layer: FastWeightBlock, h: Tensor, attended: Tensor, lengths: Tensor | None, real: Tensor) -> Tensor:
    """Compute one layer's errors [B]; h, attended: [B, T, D]; lengths: [B] on the host; real: [B, T] bool."""
    x = h.to(layer.attn_norm.weight.dtype)
    y, _ = layer(x, lengths, None, torch.zeros(len(x), dtype=torch.long), mixes_only=True)
    wide = torch.promote_types(y.dtype, torch.float32)
    attended = attended.to(wide)
    off, whole = (z.square().sum(-1).masked_fill(~real, 0.0).sum(1) for z in (y.to(wide) - attended, attended))
    return off / whole.clamp(min=torch.finfo(wide).tiny)


@part("teacher")
@torch.no_grad()
def attention_of(teacher: Teacher, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Run a teacher on right-padded ids [B, T]; return what each layer was given, and what its attention gave, [B, T, D] each."""
    trunk = teacher.model.model
    assert attends_only(trunk)
    given: list[Tensor] = []
    gave: list[Tensor] = []

    def takes(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        given.append(args[0] if args else kwargs["hidden_states"])

    def gives(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        gave.append(output[0])

    hooks = [layer.register_forward_pre_hook(takes, with_kwargs=True) for layer in trunk.layers]
    hooks += [cast(nn.Module, mixer).register_forward_hook(gives) for mixer in trunk.mixers]
    try:
        trunk.plain(ids, use_cache=False)  # attention sees nothing behind a token, so pads at the end change nothing
    finally:
        for hook in hooks:
            hook.remove()
    return given, gave


def check_transfer(name: str, teacher: Teacher, student: CausalModel) -> None:
    """Refuse a teacher whose layers are not those of the student.

    Raises:
        RefineError: the teacher is no attention model that could be converted to LaCT, or has another number of layers or another width.
    """
    config = teacher.model.config.get_text_config(decoder=True)
    refuse_others(name, config)
    for field in ("num_hidden_layers", "hidden_size"):
        theirs, own = config.to_dict()[field], student.config.to_dict()[field]
        if theirs != own:
            raise RefineError(
                f"objective='transfer' teaches layer by layer, and the teacher {name} has {field}={theirs} where the student has {own}; "
                "expected the model that the student was converted from"
            )
