"""What the parts of a step hand to each other: small frozen records of tensors, and nothing that acts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.state import FastWeightCache

Generators = torch.Generator | Sequence[torch.Generator] | None  # one for all sequences, or one each
Normalizer = float | Tensor | None  # of a sum over a batch, or [B] of each sequence's; None: what was summed over
Metrics = dict[str, Any]  # scalars, tensors until somebody logs them: reading one would make a device wait


@dataclass(frozen=True)
class Batch:
    """Sequences, real tokens on the left.

    Attributes:
        input_ids: [B, T] long. lengths: [B] long, on the host: what follows from lengths alone is known without asking a device.
        columns: other columns of the dataset, B values each, for rewards that ask for them.
        scores: [B, T] context scores known beforehand (`context_scores: cached`), or None.
    """

    input_ids: Tensor
    lengths: Tensor
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    scores: Tensor | None = None

    @classmethod
    def of(cls, input_ids: Tensor, lengths: Tensor | None = None, columns: Mapping[str, Any] | None = None,
           scores: Tensor | None = None) -> Batch:  # fmt: skip
        """Check [B, T] ids and [B] lengths (None: all T are real). RefineError for other shapes."""
        if input_ids.ndim != 2:
            raise RefineError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
        B, T = input_ids.shape
        if lengths is None:
            lengths = torch.full((B,), T)
        if lengths.shape != (B,):
            raise RefineError(f"lengths must be [B] = [{B}], got shape {tuple(lengths.shape)}")
        if scores is not None and scores.shape != (B, T):
            raise RefineError(f"scores must be [B, T] = [{B}, {T}], got shape {tuple(scores.shape)}")
        return cls(input_ids, lengths.cpu(), columns or {}, scores)

    def widened(self, T: int) -> Batch:
        """With pads up to T columns."""
        if (more := T - self.input_ids.shape[1]) == 0:
            return self
        scores = None if self.scores is None else F.pad(self.scores, (0, more))
        return replace(self, input_ids=F.pad(self.input_ids, (0, more)), scores=scores)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The lengths as numbers."""
        return tuple(self.lengths.tolist())

    @cached_property
    def real(self) -> Tensor:
        """[B, T] bool, on the device: real tokens."""
        return self.before(self.lengths)

    @cached_property
    def target_mask(self) -> Tensor:
        """[B, T] bool, on the device: t whose next token is real."""
        return self.before(self.lengths - 1)

    def before(self, ends: Tensor) -> Tensor:
        """[B, T] bool, on the device: tokens before `ends` [B], given on the host."""
        mask = torch.arange(self.input_ids.shape[1]) < ends[:, None]
        return mask.to(self.input_ids.device, non_blocking=True)

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted."""
        return sum(max(n - 1, 0) for n in self.sizes)


@dataclass(frozen=True)
class Prefixes:
    """B*P prefixes, row-major: what rollouts go on from.

    positions: [B, P] long, last token of each; -1: none. hidden: [B*P, D] final-norm output at that token. cache: states of B*P rows.
    """

    positions: Tensor
    hidden: Tensor
    cache: FastWeightCache


@dataclass(frozen=True)
class Replayed:
    """Given rollouts under the current policy: log_probs, entropy [B, P, N, K] with gradient; hidden [R, K, D] without, or None."""

    log_probs: Tensor
    entropy: Tensor
    hidden: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Sampled continuations. R = B*P*N, row-major. No gradients.

    Attributes:
        positions: [B, P] long, last token of each prefix; -1: none (the sequence was too short).
        tokens: [B, P, N, K] long.
        log_probs: [B, P, N, K], nats, of the distribution they were sampled from.
        hidden: [B, P, N, K, D] final-norm output after consuming token j of the rollout, or None when not kept.
        num_positions: how many of the B*P positions there are.
        metrics: scalars to log.
    """

    positions: Tensor
    tokens: Tensor
    log_probs: Tensor
    hidden: Tensor | None
    num_positions: int
    metrics: Metrics = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rollouts."""
        return self.num_positions * self.tokens.shape[2] * self.tokens.shape[3]


@dataclass(frozen=True, kw_only=True)
class Judged(Sampled):
    """rewards: [B, P, N] mean over the K tokens, weighted sum over rewards. entropy: [B, T] nats, of every next-token distribution."""

    rewards: Tensor
    entropy: Tensor


@dataclass(frozen=True, kw_only=True)
class Rollouts(Judged):
    """Everything known of sampled continuations. advantages: [B, P, N]."""

    advantages: Tensor

    def without_hidden(self) -> Rollouts:
        """The same without hidden states: only rewards need these, and they are large."""
        return replace(self, hidden=None)


@dataclass(frozen=True)
class StepResult:
    """Losses of a step, with gradient, and the record of what was chosen, sampled and judged, without.

    Attributes:
        loss: lambda_rl * loss_policy + lambda_ntp * loss_ntp, scalar.
        loss_ntp: cross-entropy per real target, nats.
        loss_policy: policy loss per rollout token (with KL and entropy terms where asked for); in closed form
            - sum_t token_weights[t] J_t.
        entropy: [B, T] nats.
        positions: [B, P] long, -1 for none; None where all tokens are weighed.
        rollouts: [B, P, N, K] long. log_probs: [B, P, N, K] under the current policy. rewards, advantages: [B, P, N]. None without
            rollouts.
        token_weights: [B, T], w_t of the closed form, 0 where none; None with rollouts.
        metrics: scalars to log; num_targets, num_rollout_tokens: what the two losses were means over (without rollouts: positions, or
            targets).
    """

    loss: Tensor
    loss_ntp: Tensor
    loss_policy: Tensor
    entropy: Tensor
    metrics: Metrics
    num_targets: int
    num_rollout_tokens: int
    positions: Tensor | None = None
    rollouts: Tensor | None = None
    log_probs: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    token_weights: Tensor | None = None


@dataclass(frozen=True)
class Learning:
    """What the losses are divided by (None: their own counts), the frozen model of the KL term, and the sum over processes that a
    global advantage scale needs (None: this process is alone)."""

    ntp_normalizer: Normalizer = None
    policy_normalizer: Normalizer = None
    reference: CausalModel | None = None
    sum_over: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Draws:
    """All randomness of a step: uniforms [B, P] for positions and [B, P, N, K] for tokens."""

    positions: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, batch: Batch, config: NSPConfig, generator: Generators) -> Draws:
        """Those of a batch; nothing is drawn for rollouts that are not made."""
        N = config.num_generations if config.samples_rollouts else 0
        return cls(*uniforms(len(batch.sizes), config.positions_per_sequence, N, config.rollout_length, generator))


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


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, T, ...] at positions [B, P] (-1 reads token 0) -> [B, P, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], positions.clamp(min=0)]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask, 0 where nothing is."""
    return (x * mask).sum() / mask.sum().clamp(min=1)
