"""Compute the losses (paper, section 3.4): PPO with clip and dual clip over rollout tokens, and the cross-entropy; KL, entropy optional."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.nsp.forward import Forward, run
from refine_nsp.nsp.records import Metrics, Prefixes, Rollouts, StepResult, Work, masked_mean

MAX_LOG_RATIO = 20.0


def learn(forward: Forward, prefixes: Prefixes, rollouts: Rollouts) -> StepResult:
    """Compute the losses of rollouts, with gradient through the states of their prefixes into the whole sequence."""
    work, divisor = forward.work, forward.work.learning.policy_normalizer
    policy = forward.replay(prefixes, rollouts.tokens)
    loss, metrics = policy_loss(
        policy.log_probs,
        rollouts.log_probs,
        rollouts.advantages,
        rollouts.positions >= 0,
        work.config,
        normalizer=divisor if divisor is not None else max(rollouts.num_tokens, 1),
        entropy=policy.entropy,
        reference_log_probs=reference_log_probs(work, rollouts),
    )
    return StepResult(
        loss=work.config.lambda_rl * loss + work.config.lambda_ntp * forward.loss_ntp,
        loss_ntp=forward.loss_ntp,
        loss_policy=loss,
        entropy=rollouts.entropy,
        metrics={**rollouts.metrics, **metrics},
        num_targets=work.batch.num_targets,
        num_rollout_tokens=rollouts.num_tokens,
        positions=rollouts.positions,
        rollouts=rollouts.tokens,
        log_probs=policy.log_probs.detach(),
        rewards=rollouts.rewards,
        advantages=rollouts.advantages,
        left=forward.left,
    )


@torch.no_grad()
def reference_log_probs(work: Work, rollouts: Rollouts) -> Tensor | None:
    """Compute the log-probabilities [B, P, N, K] of rollouts under the frozen reference model; None without a KL term."""
    reference, config = work.learning.reference, work.config
    if config.kl_coef == 0:
        return None
    if reference is None:
        raise RefineError(f"kl_coef={config.kl_coef} needs a reference_model")
    # The figures are the same under every schedule, so the reference model takes the cheap one.
    forward = run(replace(work, model=reference, config=replace(config, schedule="snapshot")), rollouts.positions)
    return forward.replay(forward.states(rollouts.positions), rollouts.tokens).log_probs


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    valid: Tensor,
    config: NSPConfig,
    normalizer: float | Tensor,
    entropy: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Sum the clipped surrogate over tokens, and divide it by `normalizer`; return this loss, a scalar, and scalars to log.

    Args:
        log_probs: [B, P, N, K] under the current policy, with gradient. old_log_probs: the same when sampled.
        advantages: [B, P, N]. valid: [B, P] bool.
        normalizer: number of tokens the sum is divided by, or [B] for each sequence's sum.
        entropy: [B, P, N, K] of the policy, needed with `entropy_coef`.
        reference_log_probs: [B, P, N, K] under the reference model, needed with `kl_coef` (estimator k3: r - 1 - log r).
    """
    mask, A = valid[:, :, None, None].expand_as(log_probs), advantages[..., None]
    log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = torch.maximum(-A * ratio, -A * clipped_ratio)
    per_token = torch.where(A < 0, torch.minimum(per_token, -A * config.dual_clip), per_token)
    kl = None
    if reference_log_probs is not None:
        difference = (reference_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = difference.exp() - 1 - difference
        per_token = per_token + config.kl_coef * kl
    if entropy is not None and config.entropy_coef:
        per_token = per_token - config.entropy_coef * entropy
    loss = (per_token.masked_fill(~mask, 0.0).sum((1, 2, 3)) / normalizer).sum()

    with torch.no_grad():
        clipped = -A * clipped_ratio > -A * ratio
        figures = {"clip_fraction": clipped.to(ratio.dtype), "approx_kl": ratio - 1 - log_ratio, "reference_kl": kl}
        return loss, {name: masked_mean(x, mask) for name, x in figures.items() if x is not None}
