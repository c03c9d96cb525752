"""One step of ReFINE: run the sequences, select positions, sample rollouts, judge and compare them, learn (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.advantage import compare
from refine_nsp.nsp.closed_form import refine_in_closed_form
from refine_nsp.nsp.objective import policy_loss
from refine_nsp.nsp.passes import Pass, run
from refine_nsp.nsp.records import (
    Batch,
    Draws,
    Generators,
    Judged,
    Learning,
    Normalizer,
    Prefixes,
    Rollouts,
    Sampled,
    StepResult,
)
from refine_nsp.nsp.rewards import judge, resolve_reward
from refine_nsp.nsp.rollout import sample
from refine_nsp.nsp.selection import select
from refine_nsp.ops.memory import part


def refine(model: CausalModel, batch: Batch, config: NSPConfig, draws: Draws, learning: Learning) -> StepResult:
    """The step on policy, all from one pass."""
    forward = run(model, batch, config, learning.ntp_normalizer)
    positions = select(forward, config, draws.positions)  # section 3.1
    with part("rollouts"):
        prefixes = forward.states(positions)
        sampled = sample(forward, prefixes, config, draws.tokens)  # section 3.2
        judged = judge(forward, sampled, config)  # section 3.3
    rollouts = compare([judged], config, learning.sum_over)[0]  # section 3.4
    return learn(forward, prefixes, rollouts, config, learning)


def learn(forward: Pass, prefixes: Prefixes, rollouts: Rollouts, config: NSPConfig, learning: Learning) -> StepResult:
    """The losses (section 3.4), with gradient through the prefixes' states into the whole sequence."""
    with part("rollouts"):
        policy = forward.continue_from(prefixes, rollouts.tokens, config.temperature)
    valid = rollouts.positions >= 0
    loss_policy = policy_loss(
        policy.log_probs,
        rollouts.log_probs,
        rollouts.advantages,
        valid,
        config,
        normalizer=learning.policy_normalizer if learning.policy_normalizer is not None else max(rollouts.num_tokens, 1),
        entropy=policy.entropy,
        reference_log_probs=reference_log_probs(forward.batch, rollouts, config, learning.reference),
    )
    return StepResult(
        loss=config.lambda_rl * loss_policy.loss + config.lambda_ntp * forward.loss_ntp,
        loss_ntp=forward.loss_ntp,
        loss_policy=loss_policy.loss,
        entropy=rollouts.entropy,
        metrics={**rollouts.metrics, **loss_policy.metrics},
        num_targets=forward.batch.num_targets,
        num_rollout_tokens=rollouts.num_tokens,
        positions=rollouts.positions,
        rollouts=rollouts.tokens,
        log_probs=policy.log_probs.detach(),
        rewards=rollouts.rewards,
        advantages=rollouts.advantages,
    )


@torch.no_grad()
def reference_log_probs(batch: Batch, rollouts: Rollouts, config: NSPConfig, reference: CausalModel | None) -> Tensor | None:
    """[B, P, N, K] under the frozen reference model, when there is a KL term."""
    if config.kl_coef == 0 or reference is None:
        return None
    forward = run(reference, batch, replace(config, schedule="snapshot"), positions=rollouts.positions)
    return forward.continue_from(forward.states(rollouts.positions), rollouts.tokens, config.temperature).log_probs


@torch.no_grad()
def roll_out(model: CausalModel, batch: Batch, config: NSPConfig, draws: Draws) -> Judged:
    """Judged rollouts, to be compared and learned from later: the same steps without gradients."""
    forward = run(model, batch, config)
    positions = select(forward, config, draws.positions)
    with part("rollouts"):
        sampled = sample(forward, forward.states(positions), config, draws.tokens)
        return judge(forward, sampled, config)


def learn_from(model: CausalModel, batch: Batch, rollouts: Rollouts, config: NSPConfig, learning: Learning) -> StepResult:
    """Learn from rollouts that were made before, by this policy or an earlier one."""
    forward = run(model, batch, config, learning.ntp_normalizer, rollouts.positions)
    return learn(forward, forward.states(rollouts.positions), rollouts, config, learning)


def one_step(
    model: CausalModel,
    batch: Batch,
    config: NSPConfig,
    draws: Draws,
    learning: Learning,
    rollouts: Rollouts | None = None,
) -> StepResult:
    """The step by the estimator of `config`: in closed form, on policy, or from `rollouts` made before."""
    if not config.rolls_out:
        return refine_in_closed_form(model, batch, config, draws, learning)
    if rollouts is None:
        return refine(model, batch, config, draws, learning)
    return learn_from(model, batch, rollouts, config, learning)


class ReFINEStep(nn.Module):
    """A ReFINE step on a batch, as the forward of one module (so DDP, FSDP and PEFT wrappers see one call).

    Args:
        model: a causal model of this package, wrapped or not.
        config: see `NSPConfig`.
        reference_model: frozen model for the KL term; needed when `config.kl_coef` > 0.

    Raises:
        RefineError: an unknown reward, or a KL term without a reference model.
    """

    def __init__(self, model: nn.Module, config: NSPConfig | None = None, reference_model: CausalModel | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = config if config is not None else NSPConfig()
        self.reference_model = reference_model
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
        columns: Mapping[str, Sequence[Any]] | None = None,
        scores: Tensor | None = None,
    ) -> StepResult:
        """Select, roll out, score, and return the losses; or, with `estimator="closed_form"`, the losses alone.

        Args:
            input_ids: [B, T] long, right-padded. lengths: [B] long, None: all T real.
            generator: CPU generator of all the randomness (one block of uniforms, row b for sequence b), or one a sequence.
            ntp_normalizer, policy_normalizer: what the sums over targets and rollout tokens are divided by; default: their counts
                in this batch. A trainer that accumulates gradients passes the counts of the whole accumulation; a tensor [B] divides
                each sequence's sum by its own.
            columns: other columns of the dataset, B values each, for rewards that ask for them.
            scores: [B, T] context scores d known beforehand, instead of a pass over local windows.
        """
        batch = self._batch(input_ids, lengths, columns, scores)
        learning = Learning(ntp_normalizer, policy_normalizer, self.reference_model)
        draws = Draws.of(batch, self.config, generator)
        rollouts = None
        if self.config.rolls_out_first:
            rollouts = compare([self.model(step=lambda m: roll_out(m, batch, self.config, draws))], self.config)[0]
        return self.model(step=lambda m: one_step(m, batch, self.config, draws, learning, rollouts))

    def rollout(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        generator: Generators = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        scores: Tensor | None = None,
    ) -> Rollouts:
        """Rollouts of the current policy, without gradients: what several optimizer steps can learn from (`learn`)."""
        return self.rollouts([self._batch(input_ids, lengths, columns, scores)], [generator])[0]

    def rollouts(
        self,
        batches: Sequence[Batch],
        generators: Sequence[Generators],
        sum_over: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Rollouts]:
        """Those of several batches, each by its generators, compared with each other together.

        sum_over: adds a tensor up over all processes, where several roll out for one step (`compute_advantages`).
        """
        if not self.config.rolls_out:
            raise RefineError(f"estimator={self.config.estimator!r} rolls nothing out; only estimator='sampled' does")
        judged = []
        for batch, generator in zip(batches, generators, strict=True):
            draws = Draws.of(batch, self.config, generator)
            judged.append(self.model(step=lambda m, b=batch, d=draws: roll_out(m, b, self.config, d)))
        return compare(judged, self.config, sum_over)

    def learn(
        self,
        input_ids: Tensor,
        rollouts: Rollouts,
        lengths: Tensor | None = None,
        ntp_normalizer: Normalizer = None,
        policy_normalizer: Normalizer = None,
    ) -> StepResult:
        """Losses on rollouts that `rollout` returned, ratio to the policy that sampled them clipped."""
        batch = self._batch(input_ids, lengths)
        learning = Learning(ntp_normalizer, policy_normalizer, self.reference_model)
        return self.model(step=lambda m: learn_from(m, batch, rollouts, self.config, learning))

    def score(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rollouts: Tensor,
        lengths: Tensor | None = None,
        old_log_probs: Tensor | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> StepResult:
        """The step with given positions [B, P] (-1: none) and rollouts [B, P, N, K], so that anyone can check it.

        Args:
            old_log_probs: [B, P, N, K] of the sampling policy; None: the current policy's own (ratio 1).
        """
        batch = self._batch(input_ids, lengths, columns)
        check_rollouts(positions, rollouts, batch)
        return self.model(step=lambda m: self._score(m, batch, positions, rollouts, old_log_probs))

    def _score(self, model: CausalModel, batch: Batch, positions: Tensor, tokens: Tensor, old: Tensor | None) -> StepResult:
        c, shape = self.config, tokens.shape
        forward = run(model, batch, c, positions=positions)
        prefixes = forward.states(positions)
        own = forward.continue_from(prefixes, tokens, c.temperature, need_hidden=True)
        assert own.hidden is not None
        given = Sampled(
            positions=positions,
            tokens=tokens,
            log_probs=own.log_probs.detach() if old is None else old,
            hidden=own.hidden.view(*shape, -1),
            num_positions=int((positions >= 0).sum()),
        )
        rollouts = compare([judge(forward, given, c)], c)[0]
        return learn(forward, prefixes, rollouts, c, Learning(reference=self.reference_model))

    def _batch(
        self,
        input_ids: Tensor,
        lengths: Tensor | None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        scores: Tensor | None = None,
    ) -> Batch:
        """RefineError also when no sequence could hold a rollout."""
        batch, c = Batch.of(input_ids, lengths, columns, scores), self.config
        if max(batch.sizes) < c.rollout_length + 1:
            raise RefineError(
                f"the longest sequence has {max(batch.sizes)} tokens; a rollout of K={c.rollout_length} needs at least K + 1 "
                f"= {c.rollout_length + 1} (and min_prefix={c.min_prefix} before a position)"
            )
        return batch


def check_rollouts(positions: Tensor, rollouts: Tensor, batch: Batch) -> None:
    """RefineError unless positions are [B, P], rollouts [B, P, N, K], and every continuation lies inside its sequence."""
    if rollouts.ndim != 4 or positions.shape != rollouts.shape[:2] or positions.shape[0] != len(batch.lengths):
        raise RefineError(
            f"expected positions [B, P] and rollouts [B, P, N, K] for B={len(batch.lengths)}, got {tuple(positions.shape)} and "
            f"{tuple(rollouts.shape)}"
        )
    K, positions = rollouts.shape[-1], positions.cpu()
    late = (positions + K > batch.lengths[:, None] - 1) & (positions >= 0)
    if bool(late.any()):
        raise RefineError(f"position {int(positions[late][0])} leaves no {K} true tokens after it: t + K <= length - 1")
