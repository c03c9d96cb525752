"""Run LaCT's fast weights over a sequence, and give their state at any position.

Queries read the weights of their chunk; a chunk of C tokens is learned from when it is complete *and another token arrives*. So after n
tokens the weights have had (n - 1) // C updates, and the 1..C tokens since the last one are *open*: the state keeps them, because
the next tokens may complete their chunk. That makes every hand-over exact; the original learns from whole sequences only.

A state is a dictionary of tensors, row first: `w02` (w0 above w2) and `w1`, what queries read; `main_*` (pre-norm) and `momentum_*`
where the rule has them; `open_k`, `open_v`, `open_lr`, `open_momentum`, zeros behind a row's open tokens. How many are open follows from
how many tokens a row has seen. These counts, and positions, are on the host: they decide shapes, for which it would wait for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refine_nsp.ops.lact_update import (
    FastState,
    Pair,
    Triple,
    UpdateRule,
    initial_state,
    naive_read,
    naive_update,
    read,
    row_norms,
    update,
)

State = dict[str, Tensor]


class Tokens(NamedTuple):
    """Holds the inputs of learning, per token: k, v [B, H, T, Dk], lr [B, H, T, 3 * width] and momentum [B, H, T, 1] (or None)."""

    k: Tensor
    v: Tensor
    lr: Tensor  # the rates of w0, w1 and w2 side by side; width 1, or that of the weights' last axis
    momentum: Tensor | None

    def each(self, f: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply f to every tensor."""
        return Tokens(f(self.k), f(self.v), f(self.lr), None if self.momentum is None else f(self.momentum))

    def cut(self, tokens: slice, rows: slice = slice(None)) -> Tokens:
        """Take some of the tokens, of some rows."""
        return self.each(lambda x: x[rows, :, tokens])

    def split(self, size: int) -> list[Tokens]:
        """Split into stretches of `size` tokens; the last may be shorter."""
        parts = {name: x.split(size, 2) for name, x in self.named().items()}
        return [Tokens.of(dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]

    def named(self) -> State:
        """Return the tensors by their names in a state."""
        return {f"open_{name}": x for name, x in self._asdict().items() if x is not None}

    @classmethod
    def of(cls, state: State) -> Tokens:
        """Take the open tokens of a state."""
        return cls(state["open_k"], state["open_v"], state["open_lr"], state.get("open_momentum"))


@dataclass(frozen=True)
class LaCTStates:
    """Rebuilds the states of a pass of `lact` after any token."""

    chunks: list[FastState]  # the weights that each chunk's queries read, [B, H, ..]
    tokens: Tokens  # from the start of the first chunk: the open ones of before, then the pass's own
    opened: Tensor  # [B] long, on the host: how many were open before the pass
    chunk: int  # C

    def at(self, positions: Tensor) -> State:
        """Rebuild the state [B, P, ...] after the tokens at `positions` [B, P] long (-1: before the pass); differentiable."""
        C, device = self.chunk, self.tokens.k.device
        seen = self.opened[:, None] + positions.cpu() + 1  # tokens since the start of the first chunk
        chunk = torch.div(seen - 1, C, rounding_mode="floor").clamp(min=0)
        # Only the chunks that are asked for are copied together: a state is as large as thousands of tokens.
        needed, which = chunk.unique(return_inverse=True)
        weights = [_named(self.chunks[c]) for c in needed.tolist()]
        if chunk.shape[1] == len(weights) == 1:  # as in decoding, where each token would pay for a copy
            state = {name: x[:, None] for name, x in weights[0].items()}
        else:
            rows, which = torch.arange(len(seen), device=device)[:, None], which.to(device, non_blocking=True)
            state = {name: torch.stack([w[name] for w in weights])[which, rows] for name in weights[0]}
        return state | self._open_tokens(chunk * C, seen - chunk * C)

    def _open_tokens(self, first: Tensor, count: Tensor) -> State:
        """Take `count` [B, P] tokens from `first` [B, P] on, with zeros behind the shorter ones."""
        x = self.tokens.k
        slots = torch.arange(int(count.max()) if count.numel() else 0)
        index = (first[..., None] + slots).clamp(max=x.shape[2] - 1).to(x.device, non_blocking=True)
        behind = (slots >= count[..., None]).to(x.device, non_blocking=True)
        rows = torch.arange(len(first), device=x.device)[:, None, None]
        taken = {name: z.transpose(1, 2)[rows, index] for name, z in self.tokens.named().items()}  # [B, P, slots, H, ..]
        return {name: z.masked_fill(behind[..., None, None], 0.0).transpose(2, 3) for name, z in taken.items()}


def lact(
    q: Tensor,
    tokens: Tokens,
    initial: Triple,
    rule: UpdateRule,
    chunk: int,
    state: State | None = None,
    seen: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, LaCTStates]:
    """Read and learn over a sequence, chunk by chunk.

    Args:
        q: [B, H, T, Dk], the queries that read. tokens: [B, H, T, ...], the tokens that are learned from.
        initial: fast weights before any update, [1, H, ...] or [B, H, ...]; updates keep the norms of their rows.
        rule: see `UpdateRule`. chunk: C.
        state: from `LaCTStates.at`, [B, ...], or None before any token. seen: [B] long on the host, tokens it has seen; rows that have seen
            none begin with `initial`, whatever their state holds.
        lengths: [B] long on the host, real tokens of each row, or None: all T. Outputs at pads mean nothing.

    Returns:
        o [B, H, T, Dk], and the states.
    """
    (B, _, T, _), C = q.shape, chunk
    opened = torch.zeros(B, dtype=torch.long) if seen is None else open_count(seen, C)
    joined = tokens if state is None else _behind_open(Tokens.of(state), tokens, opened)
    beginning = Pair.of(initial)
    if state is None:
        # Copied: states are read after the pass, and where a model is in shards a block's own parameters are gone by then.
        fast = initial_state(Pair(beginning.w02, beginning.w1.clone()).of_rows(B), rule)
    else:
        fast = _fast_state_of_rows(state, seen, beginning, rule)
    total = opened + (T if lengths is None else lengths.cpu())
    n_chunks = max(1, -(-(int(opened.max()) + T) // C))
    norms, chunks, outputs = row_norms(beginning), [fast], []
    together = bool((opened == opened[0]).all())  # chunks of all rows begin at the same queries, so they are plain slices
    bounds = (torch.arange(n_chunks + 1)[:, None] * C - opened).clamp(0, T)  # [n + 1, B], of each chunk's queries
    # Split once: the gradient of a slice is as large as what it was cut from, that of all parts is put together once.
    queries = q.split(bounds[:, 0].diff().tolist(), 2) if together else ()
    learned_from = joined.split(C)
    for i in range(n_chunks):
        reads = fast.weights
        outputs.append(read(reads, queries[i]) if together else _read_span(reads, q, bounds[i], bounds[i + 1]))
        goes_on = total > (i + 1) * C
        if i + 1 < n_chunks:
            if bool(goes_on.any()):
                learned = update(fast, norms, *learned_from[i], rule)
                fast = learned if bool(goes_on.all()) else _where(goes_on.to(q.device, non_blocking=True), learned, fast)
            chunks.append(fast)
    o = torch.cat(outputs, 2) if together else torch.stack(outputs).sum(0)
    if all(later is fast for later in chunks):
        o = _with_a_part_in(o, tokens, beginning if state is not None else None)
    return o, LaCTStates(chunks, joined, opened, C)


def naive_lact(
    q: Tensor,
    tokens: Tokens,
    initial: Triple,
    rule: UpdateRule,
    chunk: int,
    state: State | None = None,
    seen: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, list[State]]:
    """Compute `lact` token by token, by its definition; return o with zeros at pads, and each row's last state."""
    rows = Pair.of(initial).of_rows(len(q))
    fresh = _named(initial_state(rows, rule))
    norms = row_norms(rows)
    outputs, states = [], []
    for b in range(len(q)):
        own = slice(b, b + 1)
        start = fresh if state is None or (seen is not None and int(seen[b]) == 0) else state
        fast, norm = _fast_state({name: x[own] for name, x in start.items()}), Pair(*(x[own] for x in norms))
        kept = 0 if state is None or seen is None else int(open_count(seen, chunk)[b])
        opened = (tokens if state is None else Tokens.of(state)).cut(slice(kept), own)
        o = []
        for t in range(q.shape[2] if lengths is None else int(lengths[b])):
            if opened.k.shape[2] == chunk:
                fast = naive_update(fast, norm, *opened, rule)
                opened = opened.cut(slice(0))
            opened = _join(opened, tokens.cut(slice(t, t + 1), own))
            o.append(naive_read(fast.weights, q[own, :, t : t + 1]))
        outputs.append(torch.cat([*o, torch.zeros_like(q[own, :, len(o) :])], 2))
        states.append(_named(fast) | opened.named())
    return torch.cat(outputs), states


def lact_branches(q: Tensor, tokens: Tokens, initial: Triple, rule: UpdateRule, chunk: int, state: State, seen: Tensor) -> Tensor:
    """Compute the outputs of `lact` for queries [S*n, H, T, Dk], T at most a chunk, of which n neighbours share each of S states.

    Neighbours read the same fast weights in one product. Only rows that continue beyond their chunk learn from it, and need weights of
    their own. seen: [S] long on the host.
    """
    S, (R, H, T, D) = len(seen), q.shape
    n = R // S
    folded = q.view(S, n, H, T, D).transpose(1, 2).flatten(2, 3)  # [S, H, n*T, Dk]
    fast = _fast_state_of_rows(state, seen, Pair.of(initial), rule)
    o = read(fast.weights, folded).view(S, H, n, T, D).transpose(1, 2).flatten(0, 1)
    beyond = open_count(seen, chunk) + T > chunk
    if not bool(beyond.any()):
        return _with_a_part_in(o, tokens)
    owners = beyond.nonzero()[:, 0].repeat_interleave(n)
    rows, from_state = (x.to(q.device, non_blocking=True) for x in (beyond.repeat_interleave(n).nonzero()[:, 0], owners))
    own = {name: x.index_select(0, from_state) for name, x in state.items()}
    learned, _ = lact(
        q.index_select(0, rows), tokens.each(lambda x: x.index_select(0, rows)), initial, rule, chunk, own, seen[owners]
    )
    return o.index_copy(0, rows, learned)


def open_count(seen: Tensor, chunk: int) -> Tensor:
    """Count how many of the tokens seen [B] are open; those of a complete chunk are until the next token arrives."""
    return torch.where(seen > 0, (seen - 1) % chunk + 1, 0)


def _join(before: Tokens, after: Tokens) -> Tokens:
    """Put tokens one behind the other, along time."""
    later = after.named()
    return Tokens.of({name: torch.cat([x, later[name]], 2) for name, x in before.named().items()})


def _behind_open(before: Tokens, tokens: Tokens, opened: Tensor) -> Tokens:
    """Put each row's tokens behind its open ones without a gap, so that chunk boundaries coincide across rows."""
    width, T = before.k.shape[2], tokens.k.shape[2]
    slot = torch.arange(int(opened.max()) + T)
    source = torch.where(slot < opened[:, None], slot, width + slot - opened[:, None]).clamp(max=width + T - 1)
    source = source.to(tokens.k.device, non_blocking=True)[:, None, :, None]
    return _join(before, tokens).each(lambda x: x.gather(2, source.expand(-1, x.shape[1], -1, x.shape[3])))


def _with_a_part_in(o: Tensor, tokens: Tokens, initial: Pair | None = None) -> Tensor:
    """Make o depend on learning rates and momentum, and on the `initial` weights, with a weight of zero.

    Where nothing was learned their projections would get no gradient, nor the initial weights where all rows continue from a state, and
    distributed training, which waits for the gradient of every parameter, would stop at the first batch of short rows.
    """
    for x in (tokens.lr, tokens.momentum, *(initial if initial is not None else ())):
        if x is not None and x.requires_grad:
            o = o + 0.0 * x[:, :, :1].sum().to(o.dtype)
    return o


def _read_span(weights: Pair, q: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Read queries start[b] .. end[b] - 1 of q [B, H, T, Dk] into the same shape, with zeros elsewhere, so that spans can be summed."""
    width = int((end - start).max())
    index = (start[:, None] + torch.arange(width))[:, None, :, None]  # [B, 1, width, 1]
    outside = (index >= end[:, None, None, None]).to(q.device, non_blocking=True)
    where = index.clamp(max=q.shape[2] - 1).to(q.device, non_blocking=True).expand(-1, q.shape[1], -1, q.shape[3])
    read_there = read(weights, q.gather(2, where)).masked_fill(outside, 0.0)
    return read_there.new_zeros(q.shape).scatter_add(2, where, read_there)


def _named(fast: FastState) -> State:
    parts = zip(("", "main_", "momentum_"), fast, strict=True)
    return {f"{prefix}{name}": w for prefix, pair in parts if pair is not None for name, w in pair._asdict().items()}


def _fast_state(state: State) -> FastState:
    main, momentum = (Pair(state[p + "w02"], state[p + "w1"]) if p + "w1" in state else None for p in ("main_", "momentum_"))
    return FastState(Pair(state["w02"], state["w1"]), main, momentum)


def _fast_state_of_rows(state: State, seen: Tensor | None, initial: Pair, rule: UpdateRule) -> FastState:
    """Take the fast weights of rows, with the initial ones where a row has seen no token; a gradient then reaches these."""
    fast = _fast_state(state)
    if seen is None or bool((seen > 0).all()):
        return fast
    continues = (seen > 0).to(fast.weights.w1.device, non_blocking=True)
    return _where(continues, fast, initial_state(initial.of_rows(len(seen)), rule))


def _where(rows: Tensor, learned: FastState, before: FastState) -> FastState:
    """Choose `learned` for the rows [B] bool that continue, and `before` for the others."""
    old = _named(before)
    return _fast_state({name: torch.where(rows[:, None, None, None], x, old[name]) for name, x in _named(learned).items()})
