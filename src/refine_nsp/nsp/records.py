"""The parts of a step hand small frozen records to each other; they are all here, and nothing here acts on a model."""

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

Generators = torch.Generator | Sequence[torch.Generator] | None  # one for all sequences, or one for each
Normalizer = (
    float | Tensor | None
)  # divides the sum over a batch, or as [B] each sequence's sum; None: what was summed over is counted
Columns = Mapping[str, Sequence[Any]]  # other columns of the dataset by name, B values each of whatever it holds
Metrics = dict[str, float | Tensor]  # scalars, tensors until somebody logs them: reading one would make a device wait


@dataclass(frozen=True)
class Starts:
    """Hold what B windows of documents continue from: the windows before them, whose gradient has ended.

    Consecutive windows of a document share a token, the last of one and the first of the next, so that every token is predicted once. The
    states that go on are therefore those before a window's last token.
    """

    cache: FastWeightCache | None  # states of B rows, detached; rows that have consumed no token start from nothing. None: all do
    recent: (
        Tensor  # [B, H] long, the tokens consumed before each row, newest last, 0 where there are fewer; context scores read them
    )


@dataclass(frozen=True)
class Batch:
    """Hold B sequences, the real tokens of each on the left.

    `answer_starts` [B] long, on the host, are the first tokens of rows' answers, whose cross-entropy is all that is learned of these rows;
    0 in a row of text. None: all rows are text.
    """

    input_ids: Tensor  # [B, T] long
    lengths: Tensor  # [B] long, on the host, so that what follows from lengths alone is known without asking a device
    columns: Columns = field(default_factory=dict)
    scores: Tensor | None = None  # [B, T] context scores known beforehand (`context_scores: cached`)
    starts: Starts | None = None  # what rows continue from where states are carried; None: every row is a document of its own
    answer_starts: Tensor | None = None

    @classmethod
    def of(cls, input_ids: Tensor, lengths: Tensor | None = None, columns: Columns | None = None,
           scores: Tensor | None = None, starts: Starts | None = None, answer_starts: Tensor | None = None) -> Batch:  # fmt: skip
        """Make a batch of [B, T] ids and [B] lengths (None: all T are real). Raises RefineError for other shapes."""
        if input_ids.ndim != 2:
            raise RefineError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
        B, T = input_ids.shape
        lengths = torch.full((B,), T) if lengths is None else lengths
        if lengths.shape != (B,):
            raise RefineError(f"lengths must be [B] = [{B}], got shape {tuple(lengths.shape)}")
        if scores is not None and scores.shape != (B, T):
            raise RefineError(f"scores must be [B, T] = [{B}, {T}], got shape {tuple(scores.shape)}")
        if starts is not None and starts.cache is not None and starts.cache.batch_size != B:
            raise RefineError(f"starts must hold states of B = {B} rows, got {starts.cache.batch_size}")
        answer_starts = None if answer_starts is None else answer_starts.cpu()
        return cls(input_ids, lengths.cpu(), columns or {}, scores, starts, answer_starts)

    def widened(self, T: int) -> Batch:
        """Return the batch right-padded to T columns."""
        if (more := T - self.input_ids.shape[1]) == 0:
            return self
        scores = None if self.scores is None else F.pad(self.scores, (0, more))
        return replace(self, input_ids=F.pad(self.input_ids, (0, more)), scores=scores)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.lengths.tolist())

    @cached_property
    def real(self) -> Tensor:
        """Mark the real tokens, [B, T] bool on the device."""
        return self.before(self.lengths)

    @cached_property
    def target_mask(self) -> Tensor:
        """Mark the tokens t whose next token is real, and in a row with an answer the answer's; [B, T] bool on the device."""
        mask = self.before(self.lengths - 1)
        return mask if self.answer_starts is None else mask & ~self.before(self.answer_starts - 1)

    @cached_property
    def text_lengths(self) -> Tensor:
        """Give the lengths of rows of text, and 0 for rows with an answer, which hold no positions; [B] long, on the host."""
        return self.lengths if self.answer_starts is None else self.lengths.masked_fill(self.answer_starts > 0, 0)

    @property
    def past(self) -> FastWeightCache | None:
        """Give the states that the rows continue from, to be read or to be continued; None: all start from nothing."""
        return None if self.starts is None or self.starts.cache is None else self.starts.cache.copy()

    @property
    def consumed(self) -> Tensor:
        """Count the tokens that each row's model has read before it, [B] long on the host."""
        return torch.zeros_like(self.lengths) if (past := self.past) is None else past.consumed

    @property
    def hand_over(self) -> Tensor | None:
        """Give the token after which each row's states go on to the next window, [B, 1] long on the host (-1: those it started from);
        None where none go on."""
        return None if self.starts is None else (self.lengths - 2).clamp(min=-1)[:, None]

    def before(self, ends: Tensor) -> Tensor:
        """Mark the tokens before `ends` [B], which are on the host; [B, T] bool on the device."""
        mask = torch.arange(self.input_ids.shape[1]) < ends[:, None]
        return mask.to(self.input_ids.device, non_blocking=True)

    @property
    def num_targets(self) -> int:
        """Count the tokens that are predicted."""
        if self.answer_starts is None:
            return sum(max(n - 1, 0) for n in self.sizes)
        return int((self.lengths - self.answer_starts.clamp(min=1)).clamp(min=0).sum())

    @property
    def num_text_targets(self) -> int:
        """Count the tokens of text that are predicted, those of answers left out."""
        return int((self.text_lengths - 1).clamp(min=0).sum())


@dataclass(frozen=True)
class Draws:
    """Hold all randomness of a step, as uniforms in [0, 1): positions [B, P] and tokens [B, P, N, K], float64 on the host."""

    positions: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, batch: Batch, config: NSPConfig, generator: Generators) -> Draws:
        """Draw all uniforms of a step. Without rollouts `tokens` is empty."""
        N = config.num_generations if config.samples_rollouts else 0
        return cls(*uniforms(len(batch.sizes), config.positions_per_sequence, N, config.rollout_length, generator))


NO_DRAWS = Draws(torch.empty(0), torch.empty(0))  # where positions and rollouts are known already


@dataclass(frozen=True)
class Learning:
    """Say what the losses need beyond the sequences."""

    ntp_normalizer: Normalizer = None  # divides the sum over targets
    policy_normalizer: Normalizer = None  # divides the sum over rollout tokens
    reference: CausalModel | None = None  # the frozen model of the KL term
    sum_over: Callable[[Tensor], Tensor] | None = None  # adds a tensor up over all processes; None: this process is alone


@dataclass(frozen=True)
class Work:
    """Carry what a step works with through all of its parts; `model` is the model itself, out of any wrapper around it."""

    model: CausalModel
    batch: Batch
    config: NSPConfig
    draws: Draws = NO_DRAWS
    learning: Learning = Learning()


@dataclass(frozen=True)
class Prefixes:
    """Hold B*P prefixes, row-major, with the states that rollouts start from."""

    positions: Tensor  # [B, P] long, the last token of each prefix; -1: none
    hidden: Tensor  # [B*P, D], the final-norm output at that token
    cache: FastWeightCache  # of B*P rows


@dataclass(frozen=True)
class Replayed:
    """Hold what the current policy says of given rollouts, which were run again for it."""

    log_probs: Tensor  # [B, P, N, K], nats, with gradient
    entropy: Tensor | None  # likewise; None where the loss has no entropy bonus
    hidden: (
        Tensor | None
    )  # [R, K, D], the final-norm output after consuming each token, no gradient; None unless it was asked for


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Hold sampled rollouts, R = B*P*N of them, row-major; no gradients."""

    positions: Tensor  # [B, P] long, the last token of each prefix; -1: none (the sequence was too short)
    tokens: Tensor  # [B, P, N, K] long
    log_probs: Tensor  # [B, P, N, K], nats, of the distribution they were sampled from
    hidden: Tensor | None  # [B, P, N, K, D], the final-norm output after consuming token j of the rollout; None when not kept
    num_positions: int  # how many of the B*P positions there are
    metrics: Metrics = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all rollouts."""
        return self.num_positions * self.tokens.shape[2] * self.tokens.shape[3]


@dataclass(frozen=True, kw_only=True)
class Judged(Sampled):
    """Add rewards to sampled rollouts."""

    rewards: Tensor  # [B, P, N], the mean over the K tokens, the weighted sum over rewards
    entropy: Tensor  # [B, T], nats, of every next-token distribution


@dataclass(frozen=True, kw_only=True)
class Rollouts(Judged):
    """Add advantages [B, P, N] to judged rollouts, which makes them everything that a step learns from."""

    advantages: Tensor


@dataclass(frozen=True)
class StepResult:
    """Hold the losses of a step, with gradient, and a record of what was chosen, sampled and judged, without."""

    loss: Tensor  # lambda_rl * loss_policy + lambda_ntp * loss_ntp, scalar
    loss_ntp: Tensor  # cross-entropy per real target, nats
    loss_policy: Tensor  # per rollout token, with KL and entropy terms where asked for; in closed form -sum_t w_t J_t
    entropy: Tensor  # [B, T], nats
    metrics: Metrics
    num_targets: int  # how many terms L_ntp is a mean over
    num_rollout_tokens: int  # how many the policy loss is; without rollouts these are positions, or targets
    positions: Tensor | None = None  # [B, P] long, -1 for none; None where all tokens are weighed
    rollouts: Tensor | None = None  # [B, P, N, K] long; None without rollouts, as are the next three
    log_probs: Tensor | None = None  # [B, P, N, K] under the current policy
    rewards: Tensor | None = None  # [B, P, N]
    advantages: Tensor | None = None  # [B, P, N]
    token_weights: Tensor | None = None  # [B, T], w_t of the closed form, 0 where none; None with rollouts
    left: FastWeightCache | None = (
        None  # the states that go on to the next windows, detached; None where the batch has no `starts`
    )


def uniforms(B: int, P: int, N: int, K: int, generator: Generators) -> tuple[Tensor, Tensor]:
    """Draw all randomness of a step as one block, row b for sequence b, so that a batch equals its sequences one by one.

    Returns [B, P] for the positions and [B, P, N, K] for the tokens, float64 in [0, 1), on the CPU.
    """
    width = P + P * N * K
    if isinstance(generator, Sequence):
        block = torch.cat([torch.rand(1, width, dtype=torch.float64, generator=g) for g in generator])
    else:
        block = torch.rand(B, width, dtype=torch.float64, generator=generator)
    return block[:, :P], block[:, P:].reshape(B, P, N, K)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Draw m indices with probability weights / sum(weights) by uniforms: weights [..., n] >= 0, u [..., m] -> long [..., m]."""
    cdf = weights.double().cumsum(-1)
    drawn = torch.searchsorted(cdf, u.to(cdf) * cdf[..., -1:], right=True)
    # Rounding can put the target at the very end; the index that reaches the sum, the last with any weight, is where that belongs.
    last = torch.searchsorted(cdf, cdf[..., -1:].contiguous())
    return torch.minimum(drawn, last).clamp(max=weights.shape[-1] - 1)  # weights that are NaN have no place in order


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """Read x [B, T, ...] at positions [B, P] (-1 reads token 0) -> [B, P, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], positions.clamp(min=0)]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average x where mask is set; 0 where nothing is."""
    return (x * mask).sum() / mask.sum().clamp(min=1)
