"""A phase says what a step of training does with a batch, and what it uses; the trainer counts, normalises and logs for it.

An objective of your own is a subclass that overrides `loss` (and `count`, when it divides by something else):

    from refine_nsp.training.phases import NextToken

    class EntropyWeighted(NextToken):
        # Cross-entropy, a token weighing its prediction's entropy: what the model is unsure of counts more.
        def loss(self, model, batch):
            log_p = model(batch.input_ids, lengths=batch.lengths).logits[:, :-1].log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).detach()
            nll = -log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            real = batch.target_mask[:, :-1]
            loss = (entropy * nll)[real].sum() / batch.totals["targets"]
            return loss, {"loss_weighted": loss.detach(), "share_unsure": (entropy[real] > 1).double().mean()}

    ReFINETrainer(model, args, phase=EntropyWeighted(args.nsp), train_dataset=rows).train()

It may read any setting of its `config`: a resumed run is compared by those that are live there, or by the fewer that `reads` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from refine_nsp.config import NSPConfig
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.forward import run_and_leave
from refine_nsp.nsp.module import take_step
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import NO_DRAWS, Batch, Draws, Generators, Learning, Metrics, Rollouts, StepResult, Work
from refine_nsp.nsp.schedule import schedule_of
from refine_nsp.nsp.selection import count_positions
from refine_nsp.nsp.step import first_pass
from refine_nsp.training.data import Collated
from refine_nsp.training.validation import validate

Counts = dict[str, float]


@dataclass
class MicroBatch:
    """Hold sequences that go through the model together; an optimizer step has one micro-batch or more.

    Attributes:
        sequences: ids, lengths, columns.
        generator: the source of all randomness: one for each sequence, seeded by what it is and not by what else is in the batch; or
            one for all.
        totals: what sums are divided by, so that 1 x 8 equals 8 x 1: `Phase.count` summed over the optimizer step and all processes,
            divided by the number of processes (as gradients are); 1 where nothing was counted. A tensor [B] divides each sequence's
            sum by its own.
        rollouts: rollouts that were sampled beforehand, or None.
        result: the record of the latest step, for a table of completions.
        lanes: the lane of each row, where states are carried from window to window; else empty.
        left: the states that the latest step left for the next windows of these lanes.
    """

    sequences: Batch
    generator: Generators = None
    totals: Mapping[str, float | Tensor] = field(default_factory=dict)
    rollouts: Rollouts | None = None
    result: StepResult | None = None
    lanes: tuple[int, ...] = ()
    left: FastWeightCache | None = None

    @property
    def input_ids(self) -> Tensor:  # [B, T] long
        return self.sequences.input_ids

    @property
    def lengths(self) -> Tensor:  # [B] long, on the host
        return self.sequences.lengths

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the columns of what goes through the model, pads included."""
        return (self.input_ids.shape[1],)

    def widened(self, widths: Sequence[int]) -> MicroBatch:
        """Return the micro-batch right-padded to these widths."""
        return replace(self, sequences=self.sequences.widened(widths[0]))

    @property
    def target_mask(self) -> Tensor:  # [B, T] bool: t whose next token is real
        return self.sequences.target_mask

    @property
    def num_tokens(self) -> int:
        """Count the real tokens."""
        return sum(self.sequences.sizes)


class Phase:
    """Say what the trainer is to do: for an optimizer step it calls `prepare`, then `count` and `loss` for each micro-batch.

    Attributes:
        config: settings of the method. reference: frozen model of a KL term, or None.
        sum_over: adds a tensor up over all processes that learn from a step, which must all call it; None where there is one process.
            The trainer sets it.
        carried_keys: the bound on keys that go from window to window in validation, or None. The trainer sets it too.
        reads_once: whether a step reads every sequence in one pass; in several, noise on embeddings would differ from one to the next.
    """

    sum_over: Callable[[Tensor], Tensor] | None = None
    carried_keys: int | None = None
    reads_once: ClassVar[bool] = False

    def __init__(self, config: NSPConfig, reference: CausalModel | None = None) -> None:
        self.config, self.reference = config, reference

    # --- what it uses; whoever has settings and no run yet asks `PHASES[objective](config)` ---
    @property
    def reads(self) -> frozenset[str]:
        """Name the fields of `NSPConfig` that the weights after a step depend on, by which a resumed run is compared and which model
        cards tell. A phase of your own may read all that its configuration holds; one that reads fewer says so here."""
        return self.config.live

    @property
    def settings(self) -> dict[str, object]:
        """Return the values of the fields that are read, by name, as plain values."""
        return {name: value for name, value in self.config.as_dict().items() if name in self.reads}

    @property
    def shortest(self) -> int:
        """Count the tokens that a sequence needs for a step to learn from it."""
        return 2

    @property
    def samples(self) -> bool:
        """Tell whether rollouts are sampled."""
        return False

    @property
    def reads_scores(self) -> bool:
        """Tell whether context scores are read, which `context_scores: cached` can compute beforehand."""
        return self.config.context_score is not None

    @property
    def scoring(self) -> NSPConfig:
        """Return the settings that context scores are computed by."""
        return self.config

    @property
    def rows_apart(self) -> bool:
        """Tell whether the loss of a sequence depends on that sequence alone, whatever else is in the batch."""
        return False

    @property
    def prepares_steps(self) -> bool:
        """Tell whether `prepare` wants the micro-batches of `steps_per_generation` optimizer steps at once."""
        return False

    def prepare(self, model: nn.Module, batches: Sequence[MicroBatch]) -> None:
        """Do what comes before the steps on `batches`; no gradients are kept, and the model is in eval mode. It may be wrapped: run it by
        `model(step=lambda m: ...)`."""

    def count(self, batch: MicroBatch) -> Counts:
        """Count what the losses of a micro-batch are sums over; see `MicroBatch.totals`."""
        return {"targets": batch.sequences.num_targets}

    def count_by_sequence(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Count the same for each sequence [B], where every one has weights, and so a loss, of its own."""
        return {"targets": (batch.sequences.lengths - 1).clamp(min=1).to(torch.float32)}

    def loss(self, model: CausalModel, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Compute this micro-batch's share of the optimizer step's loss, with gradient, and figures to log: `loss_*` are shares too, which
        are summed over the micro-batches; others are averaged."""
        raise TypeError(f"{type(self).__name__} does not define loss(model, batch)")

    def validate(self, model: CausalModel, batches: Iterable[Collated]) -> Counts:
        """Sum up over validation batches, as collated; `summarise` makes figures of the sums once those of all processes are added."""
        return validate(model, batches, self.config, model.device, self.carried_keys)

    def summarise(self, sums: Counts) -> dict[str, float]:
        """Make figures of the sums, by name and without `eval_`."""
        targets, places = max(sums["targets"], 1.0), max(sums["places"], 1.0)
        return {
            "loss": sums["nll"] / targets,
            "accuracy": sums["correct"] / targets,
            "sampled_accuracy": sums["sampled"] / targets,
            "entropy": sums["entropy"] / targets,
            "greedy_match": sums["match"] / places,
            "cosine": sums["cosine"] / places,
        }


class NextToken(Phase):
    """Learn by next-token prediction: the cross-entropy alone."""

    reads_once = True

    @property
    def reads(self) -> frozenset[str]:
        own = frozenset({"lambda_ntp", "segment_tokens"})
        return own if type(self) is NextToken else super().reads  # a subclass may read anything

    @property
    def reads_scores(self) -> bool:
        return type(self) is not NextToken and super().reads_scores

    @property
    def rows_apart(self) -> bool:
        return True

    def loss(self, model: CausalModel, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        hidden, batch.left = run_and_leave(model, batch.sequences, self.config)
        loss, _ = next_token_loss(model, hidden, batch.sequences, batch.totals["targets"])
        return self.config.lambda_ntp * loss, {"loss_ntp": loss.detach()}


class NextSequence(Phase):
    """Learn by ReFINE: the policy loss and the cross-entropy together."""

    @property
    def shortest(self) -> int:
        return self.config.shortest

    @property
    def samples(self) -> bool:
        return self.config.samples_rollouts

    @property
    def rows_apart(self) -> bool:
        c = self.config  # local windows, which context scores need, are not the batch's own rows
        return c.context_score is None and (c.advantage_scale != "global" or not c.samples_rollouts)

    @property
    def prepares_steps(self) -> bool:
        return schedule_of(self.config).two_passes

    def prepare(self, model: nn.Module, batches: Sequence[MicroBatch]) -> None:
        """Sample rollouts for all batches by the current policy, unless each step samples its own."""
        if not self.prepares_steps or not batches:
            return
        with torch.no_grad():
            made: list[Rollouts] = model(step=lambda m: first_pass([self._work(m, batch) for batch in batches]))
        for batch, rollouts in zip(batches, made, strict=True):
            batch.rollouts = replace(rollouts, hidden=None)  # only rewards needed these, and they are large

    def _work(self, model: CausalModel, batch: MicroBatch) -> Work:
        """Gather what a step on a micro-batch works with; a first pass comes before `totals` are known, and needs none."""
        # Rollouts that were sampled before have used their draws up.
        draws = Draws.of(batch.sequences, self.config, batch.generator) if batch.rollouts is None else NO_DRAWS
        learning = Learning(batch.totals.get("targets"), batch.totals.get("policy"), self.reference, self.sum_over)
        return Work(model, batch.sequences, self.config, draws, learning)

    def count(self, batch: MicroBatch) -> Counts:
        return {**super().count(batch), "policy": float(self._policy_counts(batch).sum())}

    def count_by_sequence(self, batch: MicroBatch) -> dict[str, Tensor]:
        return {**super().count_by_sequence(batch), "policy": self._policy_counts(batch).clamp(min=1).to(torch.float32)}

    def _policy_counts(self, batch: MicroBatch) -> Tensor:
        """Count the rollout tokens, selected positions, or weighed targets of each sequence, [B]."""
        c, lengths, before = self.config, batch.sequences.text_lengths, batch.sequences.consumed
        if not c.samples_rollouts and c.token_weights != "selected":
            return (lengths - 1).clamp(min=0)
        return count_positions(lengths, c, before) * (c.num_generations * c.rollout_length if c.samples_rollouts else 1)

    def loss(self, model: CausalModel, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        result = take_step(self._work(model, batch), batch.rollouts)
        batch.result, batch.left = result, result.left
        losses = {"loss_ntp": result.loss_ntp.detach(), "loss_policy": result.loss_policy.detach()}
        return result.loss, {**losses, **result.metrics}


PHASES: dict[str, type[Phase]] = {"refine": NextSequence, "ntp": NextToken}
