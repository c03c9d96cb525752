"""Distillation teaches a student what a frozen teacher predicts, most of all where that needs what lies beyond the student's window.

    loss = (1/n) sum_t (1 + lambda_context * d[t]) * KL(teacher || student)[t] + lambda_ntp * L_ntp

over the n real targets of an optimizer step on all processes, with d[t] the teacher's own score of a token (`nsp/teacher.py`). The 1 keeps
every token in: far tokens are few, and learning from them alone lets what the student knows of near ones decay.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.models.adapters import head_weight
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.forward import run_and_leave, run_hidden
from refine_nsp.nsp.next_token import by_sequence, next_tokens, target_weights
from refine_nsp.nsp.records import Batch, Metrics, masked_mean
from refine_nsp.nsp.teacher import Teacher, beyond_window, scores_beyond, token_weights
from refine_nsp.ops.linear_distillation import Divergence, Lesson, linear_distillation
from refine_nsp.ops.memory import part
from refine_nsp.training.data import ANSWER_COLUMN, Collated
from refine_nsp.training.phases import Counts, MicroBatch, Phase


class Distillation(Phase):
    """Learn a teacher's predictions of the next token, and with `lambda_ntp` the true ones too.

    Attributes:
        teacher: None where only settings are asked for. lambda_context: what a token's score adds to its weight of 1.
        window: W, the tokens that the student's attention sees.
    """

    reads_once = True

    def __init__(self, config: NSPConfig, teacher: Teacher | None = None, lambda_context: float = 0.0, window: int = 1) -> None:
        super().__init__(config)
        self.teacher, self.lambda_context, self.window = teacher, lambda_context, window

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"lambda_ntp", "segment_tokens"})

    @property
    def reads_scores(self) -> bool:
        return self.lambda_context > 0

    @property
    def scoring(self) -> NSPConfig:
        return scores_beyond(self.window)

    @property
    def rows_apart(self) -> bool:
        return True

    def loss(self, model: CausalModel, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        assert self.teacher is not None
        sequences = batch.sequences
        taught = self.teacher.read(sequences)
        scores = self._scores(sequences, taught)
        hidden, batch.left = run_and_leave(model, sequences, self.config)
        divisor = batch.totals["targets"]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = token_weights(sequences, scores, self.lambda_context, wide) / by_sequence(divisor)
        ntp_weights = None
        if self.config.lambda_ntp > 0:
            ntp_weights = self.config.lambda_ntp * target_weights(sequences, divisor, hidden.dtype)
        found = _compare(model, self.teacher, sequences, hidden, taught, weights, ntp_weights)
        return found.loss, self._metrics(sequences, found, scores, divisor)

    def _scores(self, batch: Batch, taught: Tensor) -> Tensor | None:
        """Return the teacher's score of every token [B, T], which the batch may bring; None where none is read."""
        assert self.teacher is not None
        if not self.reads_scores:
            return None
        if batch.scores is not None:
            return batch.scores.to(torch.promote_types(taught.dtype, torch.float32))  # they are kept wide
        return self.teacher.scores(batch, taught, self.scoring)

    def _metrics(self, batch: Batch, found: Divergence, scores: Tensor | None, divisor: float | Tensor) -> Metrics:
        """Return the losses, unweighted, and what the teacher's predictions beyond the window look like."""
        shape = batch.input_ids.shape
        kl, once = found.kl.view(shape), target_weights(batch, divisor, found.kl.dtype)
        metrics: Metrics = {"loss_kl": (once * found.kl).sum(), "kl_beyond": masked_mean(kl, beyond_window(batch, self.window))}
        if found.nll is not None:
            metrics["loss_ntp"] = (once * found.nll).sum()
        if scores is not None:
            metrics["context_score"] = masked_mean(scores, batch.target_mask)
        return metrics

    @torch.no_grad()
    def validate(self, model: CausalModel, batches: Iterable[Collated]) -> Counts:
        """Sum the divergence up too: over all targets (`kl`), and over those beyond the window (`kl_beyond` over `beyond`)."""
        assert self.teacher is not None
        kept = list(batches)
        sums = super().validate(model, kept) | {"kl": 0.0, "kl_beyond": 0.0, "beyond": 0.0}
        for inputs in kept:
            batch = Batch.of(inputs["input_ids"].to(model.device), inputs["lengths"], answer_starts=inputs.get(ANSWER_COLUMN))
            hidden, taught = run_hidden(model, batch, self.config), self.teacher.read(batch)
            mask, beyond = batch.target_mask.flatten(), beyond_window(batch, self.window).flatten()
            kl = _compare(model, self.teacher, batch, hidden, taught, batch.target_mask.to(torch.float32), None).kl.double()
            sums["kl"] += float(kl[mask].sum())
            sums["kl_beyond"] += float(kl[beyond].sum())
            sums["beyond"] += float(beyond.sum())
        return sums

    def summarise(self, sums: Counts) -> dict[str, float]:
        """Add the divergence from the teacher, per target in nats, to the figures of next-token prediction."""
        own = {"kl": sums["kl"] / max(sums["targets"], 1.0), "kl_beyond": sums["kl_beyond"] / max(sums["beyond"], 1.0)}
        return {**super().summarise(sums), **own}


@part("logits")
def _compare(
    model: CausalModel,
    teacher: Teacher,
    batch: Batch,
    hidden: Tensor,
    taught: Tensor,
    kl_weights: Tensor,
    ntp_weights: Tensor | None,
) -> Divergence:
    """Compare predictions by hidden states [B, T, D] of the student and [B, T, Dt] of the teacher, by blocks of tokens.

    Args:
        kl_weights: [B, T]. ntp_weights: [B*T], or None to leave the cross-entropy out.
    """
    lesson = Lesson(taught.flatten(0, 1), teacher.head, next_tokens(batch), kl_weights.flatten(), ntp_weights)
    return linear_distillation(hidden.flatten(0, 1), head_weight(model), lesson)
