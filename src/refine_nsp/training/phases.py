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
from refine_nsp.nsp.forward import run, run_and_leave
from refine_nsp.nsp.module import take_step
from refine_nsp.nsp.next_token import next_token_loss, next_tokens
from refine_nsp.nsp.records import NO_DRAWS, Batch, Draws, Generators, Learning, Metrics, Rollouts, StepResult, Work, uniforms
from refine_nsp.nsp.rollouts import greedy_match
from refine_nsp.nsp.schedule import schedule_of
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.nsp.selection import count_positions, select_positions
from refine_nsp.nsp.step import first_pass
from refine_nsp.training.data import ANSWER_COLUMN, BEGINS_COLUMN, Collated
from refine_nsp.training.lane_states import LaneStates

Counts = dict[str, float]
VALIDATION_SEED = 0


@dataclass
class MicroBatch:
    """Hold sequences that go through the model together; an optimizer step has one micro-batch or more.

    Attributes:
        sequences: ids, lengths, columns.
        generator: the source of all randomness: one for each sequence, whatever else is in the batch; or one for all.
        totals: what sums are divided by, so that 1 x 8 equals 8 x 1: `Phase.count` summed over the optimizer step and all processes,
            divided by the number of processes (as gradients are); 1 where nothing was counted. A tensor [B] divides each sequence's
            sum by its own.
    """

    sequences: Batch
    generator: Generators = None
    totals: Mapping[str, float | Tensor] = field(default_factory=dict)
    rollouts: Rollouts | None = None  # sampled beforehand
    result: StepResult | None = None  # of the latest step, for a table of completions
    lanes: tuple[int, ...] = ()  # of each row, where states are carried from window to window
    left: FastWeightCache | None = None  # the states that the latest step left for the next windows of these lanes

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
        carried_keys: the bound on keys that go from window to window in validation, or None. The trainer sets both.
        reads_once: whether a step reads every sequence in one pass; in several, noise on embeddings would differ from one to the next.
    """

    sum_over: Callable[[Tensor], Tensor] | None = None
    carried_keys: int | None = None
    reads_once: ClassVar[bool] = False

    def __init__(self, config: NSPConfig, reference: CausalModel | None = None) -> None:
        self.config, self.reference = config, reference

    # The properties say what it uses; whoever has settings and no run yet asks `PHASES[objective](config)`.
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
        return self.config.context_score is not None and not self.reads.isdisjoint(("selection", "token_weights"))

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
        if not c.selects:
            return (lengths - 1).clamp(min=0)
        return count_positions(lengths, c, before) * (c.num_generations * c.rollout_length if c.samples_rollouts else 1)

    def loss(self, model: CausalModel, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        result = take_step(self._work(model, batch), batch.rollouts)
        batch.result, batch.left = result, result.left
        losses = {"loss_ntp": result.loss_ntp.detach(), "loss_policy": result.loss_policy.detach()}
        return result.loss, {**losses, **result.metrics}


@torch.no_grad()
def validate(
    model: CausalModel, batches: Iterable[Collated], config: NSPConfig, device: torch.device, carried_keys: int | None = None
) -> dict[str, float]:
    """Measure the prediction of the next token, and how well K greedy tokens match the text, at fixed positions.

    Returns:
        Sums over all batches: nll, correct, sampled (expected) and entropy over `targets`; match and cosine of greedy tokens over
        `places`. Batches of documents in lanes (`documents_in_lanes`) continue from the states of their windows before.
    """
    sums = dict.fromkeys(("nll", "correct", "sampled", "entropy", "targets", "match", "cosine", "places"), 0.0)
    at_random = config.at_random()
    carried, rows = LaneStates(recent=0, keys=carried_keys), 0
    for inputs in batches:
        ids = inputs["input_ids"].to(device)
        lanes: list[int] = inputs.get("_lanes", [])
        carried.forget(lane for lane, begins in zip(lanes, inputs.get(BEGINS_COLUMN, []), strict=False) if begins)
        starts = carried.starts(lanes, device) if lanes else None
        batch = Batch.of(ids, inputs["lengths"], starts=starts, answer_starts=inputs.get(ANSWER_COLUMN))
        # Positions are the same at every validation, whatever else is in a batch; known beforehand, only their states are kept.
        where = inputs.get("_places", [(rows + i, 0) for i in range(len(batch.sizes))])
        rows += len(batch.sizes)
        generators = [generator_of(VALIDATION_SEED, *place) for place in where]
        u, _ = uniforms(len(batch.sizes), config.positions_per_sequence, 1, config.rollout_length, generators)
        positions = select_positions(torch.zeros(batch.input_ids.shape, device=device), batch, u, at_random)
        sequence_pass = run(Work(model, batch, at_random, learning=Learning(ntp_normalizer=1.0)), positions)
        if sequence_pass.left is not None:
            carried.keep(lanes, batch, sequence_pass.left)
        stats, mask, targets = sequence_pass.stats, batch.target_mask.flatten(), next_tokens(batch)
        sums["nll"] += float(stats.nll[mask].double().sum())
        sums["correct"] += float((stats.argmax == targets)[mask].sum())
        sums["sampled"] += float((-stats.nll[mask].double()).exp().sum())
        sums["entropy"] += float(stats.entropy[mask].double().sum())
        sums["targets"] += batch.num_targets
        prefixes = sequence_pass.states(positions)
        match, similarity, places = greedy_match(model, batch.input_ids, sequence_pass.hidden, prefixes, config.rollout_length)
        sums["match"] += match
        sums["cosine"] += similarity
        sums["places"] += places
    return sums


PHASES: dict[str, type[Phase]] = {"refine": NextSequence, "ntp": NextToken}
