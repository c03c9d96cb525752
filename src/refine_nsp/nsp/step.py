"""One step of ReFINE, top to bottom: run the sequences, select positions, roll out, score, and form the loss (paper, section 3).

`ReFINEStep` is the public face; the functions below it are the paper's page.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.nsp.advantage import compute_advantages
from refine_nsp.nsp.context import context_scores
from refine_nsp.nsp.objective import policy_loss
from refine_nsp.nsp.prefix import (
    Batch,
    Pass,
    Policy,
    continue_from_states,
    gather_positions,
    recompute_prefixes,
    recomputed_states,
    run_pass,
)
from refine_nsp.nsp.records import Generators, Normalizer, Rollouts, StepResult, uniforms
from refine_nsp.nsp.rewards import compute_rewards, resolve_reward
from refine_nsp.nsp.rollout import sample_rollouts
from refine_nsp.nsp.selection import select_positions, smooth_entropy


class ReFINEStep(nn.Module):
    """A ReFINE step on a batch, as the forward of one module (so DDP, FSDP and PEFT wrappers see one call).

    Args:
        model: a causal model of this package, wrapped or not.
        config: see `NSPConfig`.
        reference_model: frozen model for the KL term; needed when `config.kl_coef` > 0.

    Raises:
        RefineError: an unknown reward, or a KL term without a reference model.
    """

    def __init__(self, model: nn.Module, config: NSPConfig | None = None, reference_model: Any = None) -> None:
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
    ) -> StepResult:
        """Select, roll out, score, and return the losses.

        Args:
            input_ids: [B, T] long, right-padded. lengths: [B] long, None: all T real.
            generator: CPU generator of all the randomness (one block of uniforms, row b for sequence b), or one a sequence.
            ntp_normalizer, policy_normalizer: what the sums over targets and rollout tokens are divided by; default: their counts
                in this batch. A trainer that accumulates gradients passes the counts of the whole accumulation; a tensor [B] divides
                each sequence's sum by its own.
        """
        batch = make_batch(input_ids, lengths, self.config)
        step = _Step(self.config, batch, self.reference_model, ntp_normalizer, policy_normalizer)
        if self.config.schedule == "fused":
            return self.model(step=lambda m: step.fused(m, generator))
        rollouts = self.rollout(input_ids, lengths, generator)
        return self.model(step=lambda m: step.learn(m, rollouts))

    @torch.no_grad()
    def rollout(self, input_ids: Tensor, lengths: Tensor | None = None, generator: Generators = None) -> Rollouts:
        """Select, roll out and score with the current policy, without gradients: what several optimizer steps can learn from."""
        step = _Step(self.config, make_batch(input_ids, lengths, self.config), self.reference_model)
        return self.model(step=lambda m: step.observe(m, generator))

    def learn(
        self,
        input_ids: Tensor,
        rollouts: Rollouts,
        lengths: Tensor | None = None,
        ntp_normalizer: Normalizer = None,
        policy_normalizer: Normalizer = None,
    ) -> StepResult:
        """Losses on rollouts that `rollout` returned, ratio to the policy that sampled them clipped."""
        batch = make_batch(input_ids, lengths, self.config)
        step = _Step(self.config, batch, self.reference_model, ntp_normalizer, policy_normalizer)
        return self.model(step=lambda m: step.learn(m, rollouts))

    def score(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rollouts: Tensor,
        lengths: Tensor | None = None,
        old_log_probs: Tensor | None = None,
    ) -> StepResult:
        """The step with given positions [B, P] (-1: none) and rollouts [B, P, N, K], so that anyone can check it.

        Args:
            old_log_probs: [B, P, N, K] of the sampling policy; None: the current policy's own (ratio 1).
        """
        batch = make_batch(input_ids, lengths, self.config)
        check_positions(positions, rollouts, batch)
        step = _Step(self.config, batch, self.reference_model)
        return self.model(step=lambda m: step.score(m, positions, rollouts, old_log_probs))


def make_batch(input_ids: Tensor, lengths: Tensor | None, config: NSPConfig) -> Batch:
    """Check [B, T] ids and [B] lengths; RefineError when no sequence could hold a rollout."""
    if input_ids.ndim != 2:
        raise RefineError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
    if lengths is None:
        lengths = torch.full((input_ids.shape[0],), input_ids.shape[1], dtype=torch.long, device=input_ids.device)
    if int(lengths.max()) < config.rollout_length + 1:
        raise RefineError(
            f"the longest sequence has {int(lengths.max())} tokens; a rollout of K={config.rollout_length} needs at least K + 1 "
            f"= {config.rollout_length + 1} (and min_prefix={config.min_prefix} before a position)"
        )
    return Batch(input_ids, lengths)


def check_positions(positions: Tensor, rollouts: Tensor, batch: Batch) -> None:
    """RefineError unless positions are [B, P], rollouts [B, P, N, K], and every continuation lies inside its sequence."""
    if rollouts.ndim != 4 or positions.shape != rollouts.shape[:2] or positions.shape[0] != len(batch.lengths):
        raise RefineError(
            f"expected positions [B, P] and rollouts [B, P, N, K] for B={len(batch.lengths)}, got {tuple(positions.shape)} and "
            f"{tuple(rollouts.shape)}"
        )
    K = rollouts.shape[-1]
    late = (positions + K > batch.lengths[:, None] - 1) & (positions >= 0)
    if bool(late.any()):
        raise RefineError(f"position {int(positions[late][0])} leaves no {K} true tokens after it: t + K <= length - 1")


class _Step:
    """The sequence of calls. Holds only what every call needs; each method is given the unwrapped model."""

    def __init__(
        self,
        config: NSPConfig,
        batch: Batch,
        reference_model: Any = None,
        ntp_normalizer: Normalizer = None,
        policy_normalizer: Normalizer = None,
    ) -> None:
        self.config = config
        self.batch = batch
        self.reference_model = reference_model
        self.ntp_normalizer = ntp_normalizer if ntp_normalizer is not None else max(batch.num_targets, 1)
        self.policy_normalizer = policy_normalizer

    # --- the paper's page ---------------------------------------------------------------------------------------------
    def fused(self, model: Any, generator: Generators) -> StepResult:
        """Everything from one gradient pass."""
        whole = run_pass(model, self.batch, self.ntp_normalizer)
        rollouts, states = self.explore(model, whole, generator)
        policy = self.policy_from(model, whole, states, rollouts)
        return self.result(model, whole, policy, rollouts)

    def observe(self, model: Any, generator: Generators) -> Rollouts:
        """One pass without gradients, and the rollouts from it."""
        whole = run_pass(model, self.batch, self.ntp_normalizer)
        return self.explore(model, whole, generator)[0]

    def learn(self, model: Any, rollouts: Rollouts) -> StepResult:
        """One gradient pass, and the policy loss on rollouts made before it."""
        whole = run_pass(model, self.batch, self.ntp_normalizer, rollouts.positions)
        policy = self.policy_from(model, whole, None, rollouts)
        return self.result(model, whole, policy, rollouts)

    def score(self, model: Any, positions: Tensor, tokens: Tensor, old_log_probs: Tensor | None) -> StepResult:
        """One gradient pass, and rollouts from outside."""
        whole = run_pass(model, self.batch, self.ntp_normalizer, positions)
        if self.config.schedule == "reprefill":
            policy = recompute_prefixes(model, self.batch, positions, tokens, self.config.temperature)
        else:
            policy = self._continue(model, whole, whole.snapshots(positions), positions, tokens, need_hidden=True)
        assert policy.hidden is not None
        old = policy.log_probs.detach() if old_log_probs is None else old_log_probs
        rollouts = self.judge(whole, positions, tokens, old, policy.hidden)
        return self.result(model, whole, policy, rollouts)

    # --- its parts ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def explore(self, model: Any, whole: Pass, generator: Generators) -> tuple[Rollouts, Any]:
        """Select, snapshot, sample, score. Also returns the (differentiable) snapshots, for those who have a graph."""
        c = self.config
        u_positions, u_tokens = uniforms(
            len(self.batch.lengths), c.positions_per_sequence, c.num_generations, c.rollout_length, generator
        )
        clock = [time.perf_counter()]
        positions = self.select(model, whole, u_positions)
        clock.append(time.perf_counter())
        with torch.enable_grad() if whole.hidden.requires_grad else torch.no_grad():
            states = recomputed_states(model, self.batch, positions) if c.schedule == "reprefill" else whole.snapshots(positions)
        prefix_hidden = gather_positions(whole.hidden, positions).flatten(0, 1)
        tokens, log_probs, hidden = sample_rollouts(
            model,
            states.detach(),
            prefix_hidden,
            u_tokens.reshape(-1, c.rollout_length),
            c.temperature,
        )
        shape = u_tokens.shape
        rollouts = self.judge(whole, positions, tokens.view(shape), log_probs.view(shape), hidden)
        clock.append(time.perf_counter())
        rollouts.metrics.update(seconds_select=clock[1] - clock[0], seconds_rollout=clock[2] - clock[1])
        return rollouts, states

    def select(self, model: Any, whole: Pass, u: Tensor) -> Tensor:
        """Positions [B, P] by the scores the configuration asks for."""
        lengths, c = self.batch.lengths, self.config
        entropy = whole.stats.entropy.view(self.batch.input_ids.shape)
        if c.selection in ("context_kl", "context_gain"):
            scores = context_scores(model, self.batch.input_ids, whole.hidden, lengths, c)
        else:
            scores = smooth_entropy(entropy, lengths, c)
        return select_positions(scores, lengths, u, c)

    @torch.no_grad()
    def judge(self, whole: Pass, positions: Tensor, tokens: Tensor, log_probs: Tensor, hidden: Tensor) -> Rollouts:
        """Rewards and advantages of rollouts whose hidden states [R, K, D] are known."""
        B, P, N, K = tokens.shape
        c, device = self.config, positions.device
        ahead = (positions.clamp(min=0)[..., None] + torch.arange(1, K + 1, device=device)).flatten(1)  # [B, P*K]
        ahead = ahead.clamp(max=self.batch.input_ids.shape[1] - 1)
        truth = self.batch.input_ids.gather(1, ahead).view(B, P, 1, K).expand(B, P, N, K)
        true_hidden = gather_positions(whole.hidden, ahead).view(B, P, 1, K, -1).expand(B, P, N, K, -1).flatten(0, 2)
        rows, truth = tokens.reshape(-1, K), truth.reshape(-1, K)
        # While a rollout equals the truth its hidden states are the truth's: the same function of the same tokens. Taking them from
        # there keeps rounding (large in bfloat16) from costing a perfect rollout its perfect score.
        same = (rows == truth).long().cumprod(-1).bool()
        inputs = {
            "completion_ids": rows,
            "truth_ids": truth,
            "hidden": torch.where(same[..., None], true_hidden, hidden),
            "truth_hidden": true_hidden,
            "prompts_ids": [
                self.batch.input_ids[b, : int(t) + 1] for b, row in enumerate(positions) for t in row for _ in range(N)
            ],
        }
        total, by_name = compute_rewards(c.rewards, c.reward_weights, inputs)
        rewards, valid = total.view(B, P, N), positions >= 0
        advantages = compute_advantages(rewards, valid, c)
        entropy = whole.stats.entropy.view(self.batch.input_ids.shape)
        metrics = {
            **_reward_metrics(by_name, valid, (B, P, N)),
            "reward_group_std": advantages.group_std,
            "groups_without_spread": advantages.share_without_spread,
            "advantage_min": float(advantages.values.min()),
            "advantage_max": float(advantages.values.max()),
            "entropy": _masked_mean(entropy, self.batch.target_mask),
            "entropy_at_positions": _masked_mean(gather_positions(entropy, positions), valid),
        }
        return Rollouts(positions, tokens, log_probs, hidden.view(B, P, N, K, -1), rewards, advantages.values, entropy, metrics)

    def policy_from(self, model: Any, whole: Pass, states: Any, rollouts: Rollouts) -> Policy:
        """Log-probabilities of recorded rollouts under the current policy, with gradient into the prefixes."""
        if self.config.schedule == "reprefill":
            return recompute_prefixes(model, self.batch, rollouts.positions, rollouts.tokens, self.config.temperature)
        states = whole.snapshots(rollouts.positions) if states is None else states
        return self._continue(model, whole, states, rollouts.positions, rollouts.tokens, need_hidden=False)

    def _continue(self, model: Any, whole: Pass, states: Any, positions: Tensor, tokens: Tensor, need_hidden: bool) -> Policy:
        at_prefix = gather_positions(whole.hidden, positions).flatten(0, 1)
        return continue_from_states(model, at_prefix, states, tokens, self.config.temperature, need_hidden)

    def reference_log_probs(self, rollouts: Rollouts) -> Tensor | None:
        """[B, P, N, K] under the frozen reference model, when there is a KL term."""
        if self.config.kl_coef == 0:
            return None
        with torch.no_grad():
            reference = self.reference_model
            whole = run_pass(reference, self.batch, self.ntp_normalizer, rollouts.positions)
            states = whole.snapshots(rollouts.positions)
            return self._continue(reference, whole, states, rollouts.positions, rollouts.tokens, need_hidden=False).log_probs

    def result(self, model: Any, whole: Pass, policy: Policy, rollouts: Rollouts) -> StepResult:
        """Losses, and the record."""
        c, valid = self.config, rollouts.positions >= 0
        num_tokens = int(valid.sum()) * rollouts.tokens.shape[2] * rollouts.tokens.shape[3]
        loss_policy = policy_loss(
            policy.log_probs,
            rollouts.log_probs,
            rollouts.advantages,
            valid,
            c,
            normalizer=self.policy_normalizer if self.policy_normalizer is not None else max(num_tokens, 1),
            entropy=policy.entropy,
            reference_log_probs=self.reference_log_probs(rollouts),
        )
        return StepResult(
            loss=c.lambda_rl * loss_policy.loss + c.lambda_ntp * whole.loss_ntp,
            loss_ntp=whole.loss_ntp,
            loss_policy=loss_policy.loss,
            positions=rollouts.positions,
            rollouts=rollouts.tokens,
            log_probs=policy.log_probs.detach(),
            rewards=rollouts.rewards,
            advantages=rollouts.advantages,
            entropy=rollouts.entropy,
            metrics={**rollouts.metrics, **loss_policy.metrics},
            num_targets=self.batch.num_targets,
            num_rollout_tokens=num_tokens,
        )


def _reward_metrics(by_name: dict[str, Tensor], valid: Tensor, shape: tuple[int, int, int]) -> dict[str, float]:
    mask = valid[..., None].expand(shape)
    metrics = {}
    for name, value in by_name.items():
        real = value.view(shape)[mask]
        if real.numel():
            metrics[f"reward_{name}"] = float(real.mean())
            metrics[f"reward_{name}_std"] = float(real.std(unbiased=False))
    return metrics


def _masked_mean(x: Tensor, mask: Tensor) -> float:
    return float((x * mask).sum() / mask.sum().clamp(min=1))
