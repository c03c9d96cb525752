"""One step of ReFINE: run the sequences, select positions, sample rollouts, judge and compare them, learn (paper, section 3)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.advantage import compare
from refine_nsp.nsp.closed_form import refine_in_closed_form
from refine_nsp.nsp.forward import Forward, run
from refine_nsp.nsp.objective import policy_loss
from refine_nsp.nsp.records import Batch, Draws, Judged, Learning, Prefixes, Rollouts, StepResult
from refine_nsp.nsp.rewards import judge
from refine_nsp.nsp.rollouts import sample
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


def learn(forward: Forward, prefixes: Prefixes, rollouts: Rollouts, config: NSPConfig, learning: Learning) -> StepResult:
    """The losses (section 3.4), with gradient through the prefixes' states into the whole sequence."""
    with part("rollouts"):
        policy = forward.replay(prefixes, rollouts.tokens, config.temperature)
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
    return forward.replay(forward.states(rollouts.positions), rollouts.tokens, config.temperature).log_probs


@torch.no_grad()
def first_pass(model: CausalModel, batch: Batch, config: NSPConfig, draws: Draws) -> Judged:
    """Judged rollouts, to be compared and learned from later: the same steps without gradients."""
    forward = run(model, batch, config)
    positions = select(forward, config, draws.positions)
    with part("rollouts"):
        sampled = sample(forward, forward.states(positions), config, draws.tokens)
        return judge(forward, sampled, config)


def second_pass(model: CausalModel, batch: Batch, rollouts: Rollouts, config: NSPConfig, learning: Learning) -> StepResult:
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
    if not config.samples_rollouts:
        return refine_in_closed_form(model, batch, config, draws, learning)
    if rollouts is None:
        return refine(model, batch, config, draws, learning)
    return second_pass(model, batch, rollouts, config, learning)
