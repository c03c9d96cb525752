"""The three schedules: where a step's hidden states, prefix states and policy log-probabilities come from.

All give the same loss and the same gradients for the same positions and rollouts; they differ in what they recompute (DESIGN,
"prefix states instead of prefixes"). Each is a `Pass`: what one run over the whole sequences knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.models.state import FastWeightCache
from refine_nsp.ops.linear_cross_entropy import TokenStats, linear_cross_entropy, token_log_probs


@dataclass(frozen=True)
class Batch:
    """input_ids [B, T] long, real tokens on the left; lengths [B] long."""

    input_ids: Tensor
    lengths: Tensor

    @property
    def target_mask(self) -> Tensor:
        """[B, T] bool: t whose next token is real."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device) < self.lengths[:, None] - 1

    @property
    def num_targets(self) -> int:
        return int((self.lengths - 1).clamp(min=0).sum())


@dataclass(frozen=True)
class Pass:
    """One run over the sequences. With gradient or not, as its caller chose.

    hidden: [B, T, D] after the final norm. loss_ntp: scalar. stats: per token, [B*T], no gradient.
    snapshots: positions [B, P] -> states of B*P rows.
    """

    hidden: Tensor
    loss_ntp: Tensor
    stats: TokenStats
    snapshots: Callable[[Tensor], FastWeightCache]


def run_pass(model: Any, batch: Batch, normalizer: float | Tensor, positions: Tensor | None = None) -> Pass:
    """Run the sequences; keep what snapshots need, for `positions` only when those are known already."""
    out = model.model(
        batch.input_ids,
        lengths=batch.lengths,
        snapshot_positions=positions,
        output_states=positions is None,
        use_cache=False,
    )
    loss, stats = next_token_loss(model, out.last_hidden_state, batch, normalizer)
    take = out.states.at if positions is None else (lambda _: out.snapshots)
    return Pass(out.last_hidden_state, loss, stats, take)


def next_token_loss(model: Any, hidden: Tensor, batch: Batch, normalizer: float | Tensor) -> tuple[Tensor, TokenStats]:
    """Sum of cross-entropies over real targets / normalizer (one for all, or [B]), and per-token statistics at every token."""
    targets = F.pad(batch.input_ids[:, 1:], (0, 1)).flatten()
    divisor = normalizer[:, None] if isinstance(normalizer, Tensor) else normalizer
    weights = (batch.target_mask.to(torch.promote_types(hidden.dtype, torch.float32)) / divisor).flatten()
    return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets, weights)


@dataclass(frozen=True)
class Policy:
    """log_probs, entropy: [B, P, N, K] with gradient. hidden: [R, K, D] without, or None."""

    log_probs: Tensor
    entropy: Tensor
    hidden: Tensor | None


def continue_from_states(
    model: Any, at_prefix: Tensor, states: FastWeightCache, tokens: Tensor, temperature: float, need_hidden: bool
) -> Policy:
    """Log-probabilities of given rollouts, from differentiable prefix states.

    Args:
        at_prefix: [B*P, D] hidden state at each prefix's last token, which predicts the first rollout token.
        states: B*P rows, each read by N rollouts.
        tokens: [B, P, N, K] long.
        need_hidden: also consume the last token, whose hidden state only a reward asks for.
    """
    B, P, N, K = tokens.shape
    rows = tokens.reshape(-1, K)
    consumed = rows if need_hidden else rows[:, : K - 1]
    first = at_prefix.repeat_interleave(N, 0)[:, None]
    if consumed.shape[1]:
        after = model.model(consumed, past_key_values=states, use_cache=False).last_hidden_state
        predicting = torch.cat([first, after[:, : K - 1]], 1)
    else:
        after, predicting = None, first
    log_probs, entropy = token_log_probs(model.lm_head(predicting), rows, temperature)
    hidden = after.detach() if need_hidden and after is not None else None
    return Policy(log_probs.view(B, P, N, K), entropy.view(B, P, N, K), hidden)


def recompute_prefixes(model: Any, batch: Batch, positions: Tensor, tokens: Tensor, temperature: float) -> Policy:
    """The same by running every prefix again, as published: one batch of B*N rows for each of the P positions."""
    N, K = tokens.shape[2:]
    log_probs, entropies, hidden = [], [], []
    for p in range(tokens.shape[1]):
        lengths = positions[:, p].clamp(min=0) + 1
        ids = F.pad(batch.input_ids[:, : int(lengths.max())], (0, K)).repeat_interleave(N, 0)
        at = lengths.repeat_interleave(N)[:, None] + torch.arange(K, device=ids.device)
        rows = tokens[:, p].reshape(-1, K)
        ids = ids.scatter(1, at, rows)
        h = model.model(ids, lengths=at[:, -1] + 1, use_cache=False).last_hidden_state
        index = torch.arange(len(ids), device=ids.device)[:, None]
        log_p, entropy = token_log_probs(model.lm_head(h[index, at - 1]), rows, temperature)
        log_probs.append(log_p.view(-1, N, K))
        entropies.append(entropy.view(-1, N, K))
        hidden.append(h[index, at].detach().view(len(tokens), N, K, -1))
    return Policy(torch.stack(log_probs, 1), torch.stack(entropies, 1), torch.stack(hidden, 1).flatten(0, 2))


def recomputed_states(model: Any, batch: Batch, positions: Tensor) -> FastWeightCache:
    """States of B*P rows by prefilling every prefix, one position of each sequence at a time."""
    caches = []
    for p in range(positions.shape[1]):
        lengths = positions[:, p] + 1
        width = max(1, int(lengths.max()))
        caches.append(model.model(batch.input_ids[:, :width], lengths=lengths, use_cache=True).past_key_values)
    layers = [
        {name: _stack_rows([c.layers[i][name] for c in caches]) for name in caches[0].layers[i]}
        for i in range(len(caches[0].layers))
    ]
    return FastWeightCache(layers, _stack_rows([c.lengths for c in caches]), max(c.columns for c in caches))


def _stack_rows(parts: list[Tensor]) -> Tensor:
    """P tensors [B, ...] -> [B*P, ...], row b*P + p; open chunks of different fill are zero-padded to the longest."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in parts), strict=True)]
    padding = [[pad for n, m in zip(reversed(shape), reversed(x.shape), strict=True) for pad in (0, n - m)] for x in parts]
    return torch.stack([F.pad(x, p) for x, p in zip(parts, padding, strict=True)], 1).flatten(0, 1)


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, T, ...] at positions [B, P] (-1 reads token 0) -> [B, P, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], positions.clamp(min=0)]
