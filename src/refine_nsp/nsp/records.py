"""What the parts of a step hand to each other: small frozen records of tensors, and nothing that acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None  # one for all sequences, or one each
Normalizer = float | Tensor | None  # of a sum over a batch, or [B] of each sequence's; None: what was summed over


@dataclass(frozen=True)
class Rollouts:
    """Sampled continuations and everything known of them. R = B*P*N, row-major. No gradients.

    Attributes:
        positions: [B, P] long, last token of each prefix; -1: none (the sequence was too short).
        tokens: [B, P, N, K] long.
        log_probs: [B, P, N, K], nats, of the distribution they were sampled from.
        hidden: [B, P, N, K, D] final-norm output after consuming token j of the rollout, or None when not kept.
        rewards: [B, P, N] mean over the K tokens, weighted sum over rewards.
        advantages: [B, P, N]. entropy: [B, T] nats, of every next-token distribution.
        metrics: scalars to log.
    """

    positions: Tensor
    tokens: Tensor
    log_probs: Tensor
    hidden: Tensor | None
    rewards: Tensor
    advantages: Tensor
    entropy: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    def rows(self, index: slice | Tensor) -> Rollouts:
        """The same for some of the sequences (hidden states are dropped)."""
        return Rollouts(
            self.positions[index],
            self.tokens[index],
            self.log_probs[index],
            None,
            self.rewards[index],
            self.advantages[index],
            self.entropy[index],
            self.metrics,
        )


@dataclass(frozen=True)
class StepResult:
    """Losses of a step, with gradient, and the record of what was chosen, rolled out and scored, without.

    Attributes:
        loss: lambda_rl * loss_policy + lambda_ntp * loss_ntp, scalar.
        loss_ntp: cross-entropy per real target, nats.
        loss_policy: policy loss per rollout token (with KL and entropy terms where asked for).
        positions: [B, P] long, -1 for none. rollouts: [B, P, N, K] long. log_probs: [B, P, N, K] under the current policy.
        rewards, advantages: [B, P, N]. entropy: [B, T] nats.
        metrics: scalars to log; num_targets, num_rollout_tokens: what the two losses were means over.
    """

    loss: Tensor
    loss_ntp: Tensor
    loss_policy: Tensor
    positions: Tensor
    rollouts: Tensor
    log_probs: Tensor
    rewards: Tensor
    advantages: Tensor
    entropy: Tensor
    metrics: dict[str, float]
    num_targets: int
    num_rollout_tokens: int


def uniforms(B: int, P: int, N: int, K: int, generator: Generators) -> tuple[Tensor, Tensor]:
    """All randomness of a step: one block, row b for sequence b, so that a batch equals its sequences one by one.

    Returns [B, P] for the positions and [B, P, N, K] for the tokens, float64 in [0, 1), on the CPU.
    """
    width = P + P * N * K
    if isinstance(generator, Sequence):
        block = torch.cat([torch.rand(1, width, dtype=torch.float64, generator=g) for g in generator])
    else:
        block = torch.rand(B, width, dtype=torch.float64, generator=generator)
    return block[:, :P], block[:, P:].reshape(B, P, N, K)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Index drawn with probability weights / sum(weights) by the uniform u: weights [..., n] >= 0, u [...] -> long [...]."""
    cdf = weights.double().cumsum(-1)
    target = u.to(cdf)[..., None] * cdf[..., -1:]
    drawn = torch.searchsorted(cdf, target, right=True)[..., 0]
    # Rounding can put the target at the very end; the last index with any weight is where that belongs.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(-1)
    return torch.minimum(drawn, last)
