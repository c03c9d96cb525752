"""Run the sequences once, and continue their prefixes in one of two ways: states are handed over, or prefixes are run again.

Both give the same loss and the same gradients for the same positions and rollouts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.segments import read_by_segments
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import Batch, Prefixes, Replayed, Work, gather_positions
from refine_nsp.nsp.schedule import schedule_of
from refine_nsp.ops.linear_cross_entropy import TokenStats, entropy_of, log_softmax
from refine_nsp.ops.memory import part


@dataclass(frozen=True)
class Predictions:
    """Hold what a pass says of every token of the sequences, which is all that selection and rewards read."""

    work: Work  # what the pass was made for
    hidden: Tensor  # [B, T, D] after the final norm
    loss_ntp: Tensor  # L_ntp, scalar
    stats: TokenStats  # of every prediction, [B*T], without gradient

    @property
    def entropy(self) -> Tensor:
        """Give the entropy of every next-token distribution, [B, T], nats."""
        return self.stats.entropy.view(self.work.batch.input_ids.shape)


@dataclass(frozen=True)
class Forward(Predictions):
    """Continue the prefixes of a pass by the states at their last tokens, which are all that rollouts need."""

    take: Callable[[Tensor], FastWeightCache]  # gives the states at positions [B, P], differentiable where the pass is
    left: FastWeightCache | None = None  # the states that go on to the rows' next windows, detached; None where none do
    finished: float = field(default_factory=time.perf_counter)  # when the pass ended, in seconds, for timings

    @part("rollouts")
    def states(self, positions: Tensor) -> Prefixes:
        """Take the states that rollouts from positions [B, P] start from; differentiable where the pass is."""
        return Prefixes(positions, gather_positions(self.hidden, positions).flatten(0, 1), self.take(positions))

    @part("rollouts")
    def replay(self, prefixes: Prefixes, tokens: Tensor, need_hidden: bool = False) -> Replayed:
        """Run rollouts [B, P, N, K] from their prefixes, with gradient into these; with `need_hidden`, keep hidden states for rewards."""
        model, (B, P, N, K) = self.work.model, tokens.shape
        rows = tokens.reshape(-1, K)
        # The last token predicts nothing; only its hidden state can be asked for.
        consumed = rows if need_hidden else rows[:, : K - 1]
        # A prefix's own hidden state predicts the first token of its N rollouts, so the head sees it once.
        predicting, after = [prefixes.hidden], None
        where = torch.arange(len(rows), device=rows.device)[:, None] // N  # [R, K], which prediction is of a token
        if consumed.shape[1]:
            after = model.model(consumed, past_key_values=prefixes.cache, use_cache=False).last_hidden_state
            predicting.append(after[:, : K - 1].flatten(0, 1))
            later = torch.arange(len(rows) * (K - 1), device=rows.device).view(len(rows), K - 1)
            where = torch.cat([where, len(prefixes.hidden) + later], 1)
        log_probs, entropy = self.log_probs(torch.cat(predicting), rows, where)
        hidden = after.detach() if need_hidden and after is not None else None
        return Replayed(log_probs.view(B, P, N, K), None if entropy is None else entropy.view(B, P, N, K), hidden)

    def log_probs(self, hidden: Tensor, tokens: Tensor, where: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict by hidden states [S, D]; return the log-probability of every token [R, K] by the prediction `where` [R, K] says, and the
        entropy of that, None where the loss has no entropy bonus."""
        config = self.work.config
        log_p = log_softmax(self.work.model.lm_head(hidden), config.temperature)
        return log_p[where, tokens], entropy_of(log_p)[where] if config.entropy_coef else None


class Recomputed(Forward):
    """Run the prefixes of a pass again, for their states and with their rollouts, as published: the reference and the yardstick."""

    @part("rollouts")
    def replay(self, prefixes: Prefixes, tokens: Tensor, need_hidden: bool = False) -> Replayed:
        model, (P, N, K) = self.work.model, tokens.shape[1:]
        log_probs, entropies, hidden = [], [], []
        for p in range(P):  # one batch of B*N rows for each position
            lengths = prefixes.positions[:, p].clamp(min=0) + 1
            ids = F.pad(self.work.batch.input_ids[:, : int(lengths.max())], (0, K)).repeat_interleave(N, 0)
            at = lengths.repeat_interleave(N)[:, None] + torch.arange(K, device=ids.device)
            rows = tokens[:, p].reshape(-1, K)
            ids = ids.scatter(1, at, rows)
            past = self.work.batch.past  # B states, from each of which N neighbours continue
            h = model.model(ids, lengths=at[:, -1] + 1, past_key_values=past, use_cache=False).last_hidden_state
            index = torch.arange(len(ids), device=ids.device)[:, None]
            before = h[index, at - 1].flatten(0, 1)
            log_p, entropy = self.log_probs(before, rows, torch.arange(len(before), device=rows.device).view(-1, K))
            log_probs.append(log_p.view(-1, N, K))
            entropies += [] if entropy is None else [entropy.view(-1, N, K)]
            hidden.append(h[index, at].view(-1, N, K, h.shape[-1]))
        states = torch.stack(hidden, 1).flatten(0, 2).detach()
        return Replayed(torch.stack(log_probs, 1), torch.stack(entropies, 1) if entropies else None, states)


def states_again(work: Work, positions: Tensor) -> FastWeightCache:
    """Run every prefix again for the states after positions [B, P]."""
    caches = []
    for lengths in (positions + 1).unbind(1):
        past = work.batch.past
        caches.append(FastWeightCache() if past is None else past)
        ids = work.batch.input_ids[:, : max(1, int(lengths.max()))]
        work.model.model(ids, lengths=lengths, past_key_values=caches[-1], use_cache=True)
    return FastWeightCache.stack(caches)


def run(work: Work, positions: Tensor | None = None) -> Forward:
    """Run the sequences, with gradient where gradients are on.

    Args:
        positions: [B, P] where states are wanted, if that is known already; None: states can be taken anywhere afterwards.
    """
    recomputes = schedule_of(work.config).recomputes
    wanted = None if recomputes else positions
    anywhere = positions is None and not recomputes
    hidden, take, left = read(work.model, work.batch, work.config, wanted, anywhere)
    loss, stats = next_token_loss(work.model, hidden, work.batch, work.learning.ntp_normalizer)
    return (Recomputed if recomputes else Forward)(work, hidden, loss, stats, take or partial(states_again, work), left)


def run_and_leave(model: CausalModel, batch: Batch, config: NSPConfig) -> tuple[Tensor, FastWeightCache | None]:
    """Run the sequences where nobody asks for states inside them.

    Returns the final-norm output [B, T, D], and the states that go on to the rows' next windows, detached; None where none do.
    """
    hidden, _, left = read(model, batch, config)
    return hidden, left


def run_hidden(model: CausalModel, batch: Batch, config: NSPConfig) -> Tensor:
    """Run the sequences where nobody asks for states; return the final-norm output [B, T, D]."""
    return read(model, batch, config)[0]


@part("forward")
def read(
    model: CausalModel, batch: Batch, config: NSPConfig, positions: Tensor | None = None, anywhere: bool = False
) -> tuple[Tensor, Callable[[Tensor], FastWeightCache] | None, FastWeightCache | None]:
    """Run the sequences in one piece, or by segments where they are longer than one.

    Args:
        positions: [B, P] where states are kept. anywhere: states can be taken at any position afterwards.

    Returns:
        The final-norm output [B, T, D]; what gives the states at positions, None where none can be taken; and the states that go on to
        the rows' next windows, detached, None where none do.
    """
    asked = [where.cpu() for where in (positions, batch.hand_over) if where is not None]
    where = torch.cat(asked, 1) if asked else None
    take: Callable[[Tensor], FastWeightCache] | None
    if (size := config.segment_tokens) is not None and batch.input_ids.shape[1] > size:
        parts = read_by_segments(model.model, batch.input_ids, batch.lengths, size, where, batch.past)
        hidden, snapshots, take = parts.hidden, parts.snapshots, parts.at
    else:
        out = model.model(
            batch.input_ids,
            lengths=batch.lengths,
            past_key_values=batch.past,
            snapshot_positions=where,
            output_states=anywhere,
            use_cache=False,
        )
        hidden, snapshots, take = out.last_hidden_state, out.snapshots, None if out.states is None else out.states.at
    if snapshots is None:
        return hidden, take, None
    left, kept = None, snapshots
    if batch.hand_over is not None:  # the last state of each sequence is the one that goes on
        rows = torch.arange(snapshots.batch_size).view(len(batch.sizes), -1)
        left = snapshots.detach() if rows.shape[1] == 1 else snapshots.detach().index(rows[:, -1])
        kept = snapshots if positions is None else snapshots.index(rows[:, :-1].flatten())
    return hidden, take if positions is None else lambda _: kept, left
