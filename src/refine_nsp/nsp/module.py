"""Choose a step by the settings, and make it one module, so that DDP, FSDP and PEFT wrappers see one forward call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.advantage import compare
from refine_nsp.nsp.closed_form import refine_in_closed_form
from refine_nsp.nsp.forward import run
from refine_nsp.nsp.objective import learn
from refine_nsp.nsp.records import (
    Batch,
    Columns,
    Draws,
    Generators,
    Learning,
    Normalizer,
    Rollouts,
    Sampled,
    Starts,
    StepResult,
    Work,
)
from refine_nsp.nsp.rewards import judge, resolve_reward
from refine_nsp.nsp.schedule import schedule_of
from refine_nsp.nsp.step import first_pass, refine, second_pass


def take_step(work: Work, rollouts: Rollouts | None = None) -> StepResult:
    """Take the step that the settings name: in closed form, on policy, or from `rollouts` of a first pass."""
    if not work.config.samples_rollouts:
        return refine_in_closed_form(work)
    return refine(work) if rollouts is None else second_pass(work, rollouts)


class ReFINEStep(nn.Module):
    """Take a ReFINE step on a batch, as the forward of one module.

    Args:
        model: a causal model of this package, wrapped or not.
        reference_model: frozen model for the KL term; a RefineError where `config.kl_coef` > 0 has none.
    """

    def __init__(self, model: nn.Module, config: NSPConfig | None = None, reference_model: CausalModel | None = None) -> None:
        super().__init__()
        self.model, self.reference_model = model, reference_model
        self.config = config if config is not None else NSPConfig()
        if self.config.kl_coef > 0 and reference_model is None:
            raise RefineError(f"kl_coef={self.config.kl_coef} needs a reference_model")
        for reward in self.config.rewards:
            resolve_reward(reward)

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        generator: Generators = None,
        ntp_normalizer: Normalizer = None,
        policy_normalizer: Normalizer = None,
        columns: Columns | None = None,
        scores: Tensor | None = None,
        starts: Starts | None = None,
    ) -> StepResult:
        """Select, sample, judge, and return the losses; or, with `estimator="closed_form"`, the losses alone.

        Args:
            input_ids: [B, T] long, right-padded. lengths: [B] long, None: all T real.
            generator: CPU generator of all the randomness (one block of uniforms, row b for sequence b), or one for each sequence.
            ntp_normalizer, policy_normalizer: divisors of the sums over targets and rollout tokens; default: their counts in this batch.
                A trainer that accumulates gradients passes the counts of the whole accumulation; a tensor [B] divides each sequence's
                sum by its own.
            columns: other columns of the dataset, B values each, for rewards that ask for them.
            scores: [B, T] context scores d known beforehand, instead of a pass over local windows.
            starts: states that the rows continue from, as windows of documents; the result then holds those that go on (`left`).
        """
        batch = self._batch(input_ids, lengths, columns, scores, starts)
        draws = Draws.of(batch, self.config, generator)
        learning = Learning(ntp_normalizer, policy_normalizer, self.reference_model)
        rollouts = self._first_pass(batch, draws) if schedule_of(self.config).two_passes else None
        result: StepResult = self.model(step=lambda m: take_step(Work(m, batch, self.config, draws, learning), rollouts))
        return result

    def sample(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        generator: Generators = None,
        columns: Columns | None = None,
        scores: Tensor | None = None,
        starts: Starts | None = None,
    ) -> Rollouts:
        """Sample rollouts by the current policy, without gradients, for several optimizer steps to learn from (`learn`)."""
        if not self.config.samples_rollouts:
            raise RefineError(f"estimator={self.config.estimator!r} samples no rollouts; only estimator='sampled' does")
        batch = self._batch(input_ids, lengths, columns, scores, starts)
        return self._first_pass(batch, Draws.of(batch, self.config, generator))

    @torch.no_grad()
    def _first_pass(self, batch: Batch, draws: Draws) -> Rollouts:
        """Sample rollouts in a pass of their own."""
        made: list[Rollouts] = self.model(step=lambda m: first_pass([Work(m, batch, self.config, draws)]))
        return made[0]

    def learn(
        self,
        input_ids: Tensor,
        rollouts: Rollouts,
        lengths: Tensor | None = None,
        ntp_normalizer: Normalizer = None,
        policy_normalizer: Normalizer = None,
        starts: Starts | None = None,
    ) -> StepResult:
        """Compute the losses of rollouts that `sample` returned; the ratio to the policy that sampled them is clipped."""
        batch = self._batch(input_ids, lengths, starts=starts)
        learning = Learning(ntp_normalizer, policy_normalizer, self.reference_model)
        result: StepResult = self.model(step=lambda m: second_pass(Work(m, batch, self.config, learning=learning), rollouts))
        return result

    def score(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rollouts: Tensor,
        lengths: Tensor | None = None,
        old_log_probs: Tensor | None = None,
        columns: Columns | None = None,
        starts: Starts | None = None,
    ) -> StepResult:
        """Take the step with given positions [B, P] (-1: none) and rollouts [B, P, N, K], so that anyone can check it.

        Args:
            old_log_probs: [B, P, N, K] of the sampling policy; None: the current policy's own (ratio 1).
        """
        batch = self._batch(input_ids, lengths, columns, starts=starts)
        check_rollouts(positions, rollouts, batch)
        learning = Learning(reference=self.reference_model)
        result: StepResult = self.model(
            step=lambda m: score(Work(m, batch, self.config, learning=learning), positions, rollouts, old_log_probs)
        )
        return result

    def _batch(
        self,
        input_ids: Tensor,
        lengths: Tensor | None,
        columns: Columns | None = None,
        scores: Tensor | None = None,
        starts: Starts | None = None,
    ) -> Batch:
        """Make a batch. Raises RefineError where no sequence can hold a rollout, and for other shapes."""
        batch, c = Batch.of(input_ids, lengths, columns, scores, starts), self.config
        if max(batch.sizes) < c.rollout_length + 1:
            raise RefineError(
                f"the longest sequence has {max(batch.sizes)} tokens; a rollout of K={c.rollout_length} needs at least K + 1 "
                f"= {c.rollout_length + 1} (and min_prefix={c.min_prefix} before a position)"
            )
        return batch


def score(work: Work, positions: Tensor, tokens: Tensor, old_log_probs: Tensor | None) -> StepResult:
    """Judge given rollouts [B, P, N, K] at given positions [B, P], and learn from them."""
    forward = run(work, positions)
    prefixes = forward.states(positions)
    own = forward.replay(prefixes, tokens, need_hidden=True)
    assert own.hidden is not None
    given = Sampled(
        positions=positions,
        tokens=tokens,
        log_probs=own.log_probs.detach() if old_log_probs is None else old_log_probs,
        hidden=own.hidden.view(*tokens.shape, -1),
        num_positions=int((positions >= 0).sum()),
    )
    return learn(forward, prefixes, compare([judge(forward, given)], work)[0])


def check_rollouts(positions: Tensor, rollouts: Tensor, batch: Batch) -> None:
    """Refuse positions that are not [B, P], rollouts that are not [B, P, N, K], and continuations that leave their sequence."""
    if rollouts.ndim != 4 or positions.shape != rollouts.shape[:2] or positions.shape[0] != len(batch.lengths):
        raise RefineError(
            f"expected positions [B, P] and rollouts [B, P, N, K] for B={len(batch.lengths)}, got {tuple(positions.shape)} and "
            f"{tuple(rollouts.shape)}"
        )
    K, positions = rollouts.shape[-1], positions.cpu()
    late = (positions + K > batch.lengths[:, None] - 1) & (positions >= 0)
    if bool(late.any()):
        raise RefineError(f"position {int(positions[late][0])} leaves no {K} true tokens after it: t + K <= length - 1")
