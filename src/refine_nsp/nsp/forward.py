"""One run over the sequences, and the two ways to go on from its prefixes: their states are handed over, or they are run again.

Both give the same loss and the same gradients for the same positions and rollouts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.segments import read_by_segments
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import Batch, Normalizer, Prefixes, Replayed, gather_positions
from refine_nsp.ops.linear_cross_entropy import TokenStats, token_log_probs
from refine_nsp.ops.memory import part


@dataclass(frozen=True)
class Forward:
    """One run over the sequences, with gradient where gradients are on.

    hidden: [B, T, D] after the final norm. loss_ntp: scalar. stats: per token, [B*T], no gradient. take: positions [B, P] -> states.
    """

    model: CausalModel
    batch: Batch
    hidden: Tensor
    loss_ntp: Tensor
    stats: TokenStats
    take: Callable[[Tensor], FastWeightCache]
    finished: float = field(default_factory=time.perf_counter)  # when the pass was, for timings

    @property
    def entropy(self) -> Tensor:
        """[B, T] nats, of every next-token distribution."""
        return self.stats.entropy.view(self.batch.input_ids.shape)

    def states(self, positions: Tensor) -> Prefixes:
        """What rollouts from positions [B, P] go on from; differentiable where the pass is."""
        return Prefixes(positions, gather_positions(self.hidden, positions).flatten(0, 1), self.take(positions))

    def replay(self, prefixes: Prefixes, tokens: Tensor, temperature: float, need_hidden: bool = False) -> Replayed:
        """Log-probabilities of rollouts [B, P, N, K], with gradient into the prefixes. need_hidden: for rewards, the hidden states too."""
        raise TypeError(f"{type(self).__name__} does not say how prefixes go on")


class HandedOver(Forward):
    """The state at a prefix' last token is all its continuations need."""

    def replay(self, prefixes: Prefixes, tokens: Tensor, temperature: float, need_hidden: bool = False) -> Replayed:
        B, P, N, K = tokens.shape
        rows = tokens.reshape(-1, K)
        # The last token predicts nothing; only its hidden state can be asked for.
        consumed = rows if need_hidden else rows[:, : K - 1]
        first = prefixes.hidden.repeat_interleave(N, 0)[:, None]  # it predicts the first rollout token
        if consumed.shape[1]:
            after = self.model.model(consumed, past_key_values=prefixes.cache, use_cache=False).last_hidden_state
            predicting = torch.cat([first, after[:, : K - 1]], 1)
        else:
            after, predicting = None, first
        log_probs, entropy = token_log_probs(self.model.lm_head(predicting), rows, temperature)
        hidden = after.detach() if need_hidden and after is not None else None
        return Replayed(log_probs.view(B, P, N, K), entropy.view(B, P, N, K), hidden)


class Recomputed(Forward):
    """Every prefix is run again, for its state and with its rollouts, as published: the reference, and the yardstick."""

    def states(self, positions: Tensor) -> Prefixes:
        caches = []
        for p in range(positions.shape[1]):
            lengths = positions[:, p] + 1
            width = max(1, int(lengths.max()))
            caches.append(FastWeightCache())
            self.model.model(self.batch.input_ids[:, :width], lengths=lengths, past_key_values=caches[-1], use_cache=True)
        return Prefixes(positions, gather_positions(self.hidden, positions).flatten(0, 1), FastWeightCache.stack(caches))

    def replay(self, prefixes: Prefixes, tokens: Tensor, temperature: float, need_hidden: bool = False) -> Replayed:
        """One batch of B*N rows for each of the P positions."""
        N, K = tokens.shape[2:]
        log_probs, entropies, hidden = [], [], []
        for p in range(tokens.shape[1]):
            lengths = prefixes.positions[:, p].clamp(min=0) + 1
            ids = F.pad(self.batch.input_ids[:, : int(lengths.max())], (0, K)).repeat_interleave(N, 0)
            at = lengths.repeat_interleave(N)[:, None] + torch.arange(K, device=ids.device)
            rows = tokens[:, p].reshape(-1, K)
            ids = ids.scatter(1, at, rows)
            h = self.model.model(ids, lengths=at[:, -1] + 1, use_cache=False).last_hidden_state
            index = torch.arange(len(ids), device=ids.device)[:, None]
            log_p, entropy = token_log_probs(self.model.lm_head(h[index, at - 1]), rows, temperature)
            log_probs.append(log_p.view(-1, N, K))
            entropies.append(entropy.view(-1, N, K))
            hidden.append(h[index, at].view(-1, N, K, h.shape[-1]))
        states = torch.stack(hidden, 1).flatten(0, 2).detach()
        return Replayed(torch.stack(log_probs, 1), torch.stack(entropies, 1), states)


PASSES: dict[str, type[Forward]] = {"auto": HandedOver, "fused": HandedOver, "snapshot": HandedOver, "reprefill": Recomputed}


def run(
    model: CausalModel, batch: Batch, config: NSPConfig, normalizer: Normalizer = None, positions: Tensor | None = None
) -> Forward:
    """Run the sequences; keep what states need, for `positions` only when those are known already."""
    kind = PASSES[config.schedule]
    recompute = kind is Recomputed
    if (size := segment_size(batch, config)) is not None:
        with part("forward"):
            parts = read_by_segments(model.model, batch.input_ids, batch.lengths, size, positions)
        loss, stats = next_token_loss(model, parts.hidden, batch, normalizer)
        return kind(model, batch, parts.hidden, loss, stats, parts.at if positions is None else _always(parts.snapshots))
    with part("forward"):
        out = model.model(
            batch.input_ids,
            lengths=batch.lengths,
            snapshot_positions=None if recompute else positions,
            output_states=positions is None and not recompute,
            use_cache=False,
        )
    loss, stats = next_token_loss(model, out.last_hidden_state, batch, normalizer)
    take = _always(out.snapshots) if out.states is None else out.states.at
    return kind(model, batch, out.last_hidden_state, loss, stats, take)


def _always(snapshots: FastWeightCache | None) -> Callable[[Tensor], FastWeightCache]:
    """Make a function of positions that returns the snapshots taken of them on the way."""

    def take(_: Tensor) -> FastWeightCache:
        assert snapshots is not None
        return snapshots

    return take


@part("forward")
def run_hidden(model: CausalModel, batch: Batch, config: NSPConfig) -> Tensor:
    """Final-norm output [B, T, D] of the sequences, where no states are asked for."""
    if (size := segment_size(batch, config)) is not None:
        return read_by_segments(model.model, batch.input_ids, batch.lengths, size).hidden
    return model.model(batch.input_ids, lengths=batch.lengths, use_cache=False).last_hidden_state


def segment_size(batch: Batch, config: NSPConfig) -> int | None:
    """Tokens of a segment, where sequences are longer than one."""
    size = config.segment_tokens
    return size if size is not None and batch.input_ids.shape[1] > size else None
