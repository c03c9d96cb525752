"""How the states of a transformers model are kept: by reference, or as the tokens they come from.

A pass is cut where states are wanted, and goes on from what was taken: no token is run twice, and gradients flow from every snapshot
into the whole prefix. Real tokens stand on the left and nobody asks for a state behind a row's last, so pads need no masks: causality
keeps them from what stands before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint

from refine_nsp.errors import RefineError
from refine_nsp.models.by_reference import RECURRENT_KINDS, ReferenceCache, kinds_of, nothing_yet, prefix, trimmed
from refine_nsp.models.state import FastWeightCache, LayerState
from refine_nsp.processes import is_sharded

SEGMENT_TOKENS = 64  # states that are asked for after a pass are kept every so many tokens, or ...
SEGMENTS = 16  # ... so many times, whichever is rarer: segments repeat a layer's keys, and tails behind them are run again


class StatesOfPass(Protocol):
    """What is kept of a pass, to take states from when its outputs are known."""

    def at(self, tokens: Tensor) -> FastWeightCache:
        """States after `tokens` [B, P] long, on the host (-1: before the first), as B*P rows, row-major."""
        ...


class Keeping(Protocol):
    """How the states of a trunk are kept. x: ids [B, T] or embeddings [B, T, D]; past: states of B rows, or None."""

    def run(self, x: Tensor, past: FastWeightCache | None, wanted: Tensor | None) -> tuple[Tensor, FastWeightCache | None]:
        """Hidden states [B, T, D], and the states after tokens `wanted` [B, P] long, on the host (-1: before the first), B*P rows."""
        ...

    def run_keeping(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, StatesOfPass]:
        """Hidden states [B, T, D], and what states at any token can be taken from."""
        ...


class ByReference:
    """States are taken where the pass is cut, differentiable, and go on from there.

    Attributes:
        same_by_single_tokens: whether one token goes on from a state as several do; Nemotron-H limits its time steps only for several.
    """

    def __init__(self, trunk: Any) -> None:
        self.trunk = trunk
        kinds, self.windows = kinds_of(trunk.config)
        self.recurs = any(kind in RECURRENT_KINDS for kind in kinds)
        limits = [vars(m)["time_step_limit"] for m in trunk.modules() if vars(m).get("time_step_limit") is not None]
        self.same_by_single_tokens = all(tuple(limit) == (0.0, math.inf) for limit in limits)
        parameters = inspect.signature(trunk.forward).parameters
        self.cache_name = "past_key_values" if "past_key_values" in parameters else "cache_params"
        self.takes_positions = "position_ids" in parameters

    def run(self, x: Tensor, past: FastWeightCache | None, wanted: Tensor | None) -> tuple[Tensor, FastWeightCache | None]:
        if wanted is None and past is None:
            return self.trunk.plain(x, use_cache=False), None
        T = x.shape[1]
        if wanted is None and T == 1 and self.recurs:
            x = torch.cat([x, x], 1)  # see `segments`; what follows a token does not touch it
        tokens = [] if wanted is None else wanted.unique().tolist()
        cuts = self.cuts(tokens, T)
        if wanted is not None and self.recurs and is_sharded(self.trunk):
            cuts = filled(cuts, wanted.numel(), T)
        hidden, taken = [], Taken(self, past, wanted)
        for start, end, h, after in self.segments(x, past, [*cuts, x.shape[1]]):
            hidden.append(h)
            taken.take([t for t in tokens if start <= t < end], start, end, after)
        return joined(hidden)[:, :T], taken.all_rows() if wanted is not None else None

    def run_keeping(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, StatesOfPass]:
        T = x.shape[1]
        step = max(SEGMENT_TOKENS, math.ceil(T / SEGMENTS)) if self.recurs else T
        hidden, kept = [], [] if past is None else [past]
        for _, _, h, after in self.segments(x, past, [*range(step, T, step), T]):
            hidden.append(h)
            kept = kept or [before_any(after)]
            kept.append(after)
        states: StatesOfPass = Tails(self, x, kept[:-1], step) if self.recurs else Slices(self, kept[0], kept[-1], T)
        return joined(hidden), states

    def segments(
        self, x: Tensor, past: FastWeightCache | None, ends: Sequence[int]
    ) -> Iterator[tuple[int, int, Tensor, FastWeightCache]]:
        """A pass cut at `ends`: start and end of each segment, its hidden states, and the states it left.

        A segment of one token is run with the one before it once more: layers go on by a single token in code of its own, which in
        kernels has no gradients and in some models leaves something out.
        """
        last: list[tuple[int, FastWeightCache | None]] = [(0, past)]
        for start, end in pairwise([0, *ends]):
            begin, state = last[0] if self.recurs and end - start == 1 else last[-1]
            h, after = self.segment(x[:, begin:end], state)
            last = [last[-1], (end, after)]
            yield start, end, h[:, start - begin :], after

    def cuts(self, tokens: Sequence[int], n_tokens: int) -> list[int]:
        """Where a pass is cut for states after `tokens`: nowhere if keys and values are all there is, for a prefix' are a slice."""
        return [t + 1 for t in tokens if 0 <= t < n_tokens - 1] if self.recurs else []

    def segment(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, FastWeightCache]:
        """A pass on from `past`, uncut; its windows are whole, so that slices can be taken of them."""
        B, T = x.shape[:2]
        lengths = torch.zeros(B, dtype=torch.long) if past is None or past.lengths is None else past.lengths
        columns = int(lengths.max())
        layers = [] if past is None or columns == 0 else prefix(trimmed(past.layers, columns), self.windows, 0)
        arguments: dict[str, Any] = {"use_cache": True}
        if self.takes_positions:
            arguments["position_ids"] = (lengths[:, None] + torch.arange(T)).to(x.device, non_blocking=True)
        if columns > int(lengths.min()):
            real = torch.arange(columns + T) >= columns - lengths[:, None]
            arguments["attention_mask"] = real.long().to(x.device, non_blocking=True)
        names: list[list[str]] = []
        wrappers = [m for m in self.trunk.modules() if isinstance(m, CheckpointWrapper)]

        def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            view = ReferenceCache(self.trunk.config, [{name: next(given) for name in layer} for layer in layers], columns)
            with unwrapped(wrappers):
                h = self.trunk.plain(x, **arguments, **{self.cache_name: view})
            after = view.states()
            names[:] = [list(layer) for layer in after]
            return h, *(tensor for layer in after for tensor in layer.values())

        start = [tensor for layer in layers for tensor in layer.values()]
        out = checkpoint(forward, *start, use_reentrant=False) if wrappers else self.trunk.checkpointed(forward, start)
        hidden, *tensors = out
        given = iter(tensors)
        after = [{name: next(given) for name in layer} for layer in names]
        return hidden, FastWeightCache(after, lengths + T, columns + T)


@contextmanager
def unwrapped(wrappers: Sequence[CheckpointWrapper]) -> Iterator[None]:
    """Inside, layers that are wrapped to be run again in the backward pass (FSDP's activation checkpointing) run as they are: one that is
    run again alone would meet the states it left itself. Their segment is run again instead."""

    def run(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    before = [w.checkpoint_fn for w in wrappers]
    for w in wrappers:
        w.checkpoint_fn = run  # type: ignore[assignment]
    try:
        yield
    finally:
        for w, checkpoint_fn in zip(wrappers, before, strict=True):
            w.checkpoint_fn = checkpoint_fn


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Hidden states of consecutive segments as one pass' [B, T, D]."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def filled(cuts: Sequence[int], n: int, n_tokens: int) -> list[int]:
    """With cuts added in the middle of the longest segments, until a pass over `n_tokens` has `n` of them or one behind every token: how
    many segments there are then follows from shapes alone, as it must where processes hold shards of a model."""
    ends = [0, *cuts, n_tokens]
    while len(ends) - 2 < min(n, n_tokens - 1):
        longest = max(range(1, len(ends)), key=lambda i: ends[i] - ends[i - 1])
        ends.insert(longest, (ends[longest - 1] + ends[longest]) // 2)
    return ends[1:-1]


def in_order(parts: Sequence[FastWeightCache], slots: Sequence[Tensor]) -> FastWeightCache:
    """States in parts as one batch; slots: the rows that each part's are to be, on the host."""
    return parts[0] if len(parts) == 1 else FastWeightCache.concatenate(parts).index(torch.cat(list(slots)).argsort())


def before_any(states: FastWeightCache) -> FastWeightCache:
    """The states before any token, of the shapes of `states`."""
    return FastWeightCache(nothing_yet(states.layers), torch.zeros(states.batch_size, dtype=torch.long))


class Taken:
    """The states a pass takes on its way: parts by position, in the end one row for each that was wanted."""

    def __init__(self, keeping: ByReference, past: FastWeightCache | None, wanted: Tensor | None) -> None:
        self.keeping, self.past, self.wanted = keeping, past, wanted
        self.last = past  # where the pass is
        self.parts: list[FastWeightCache] = []
        self.slots: list[Tensor] = []

    def take(self, tokens: Sequence[int], start: int, end: int, after: FastWeightCache) -> None:
        """States after `tokens` of the segment start..end, which the pass left with the states `after`."""
        if self.last is None or not self.last.is_initialized:
            self.last = before_any(after)
        if start == 0 and self.wanted is not None and bool((self.wanted < 0).any()):
            self._add(-1, self.last)
        for t in tokens:
            layers = prefix(after.layers, self.keeping.windows, end - 1 - t)
            assert after.lengths is not None
            self._add(t, FastWeightCache(layers, after.lengths - (end - 1 - t), after.columns - (end - 1 - t)))
        self.last = after

    def _add(self, token: int, states: FastWeightCache) -> None:
        assert self.wanted is not None
        slots = (self.wanted == token).flatten().nonzero()[:, 0]
        rows = slots // self.wanted.shape[1]
        self.parts.append(states if torch.equal(rows, torch.arange(states.batch_size)) else states.index(rows))
        self.slots.append(slots)

    def all_rows(self) -> FastWeightCache:
        """B*P rows, row-major, without the columns of keys that none of them has."""
        states = in_order(self.parts, self.slots)
        assert states.lengths is not None
        columns = int(states.lengths.max()) if len(states.lengths) else 0
        return FastWeightCache(trimmed(states.layers, columns) if columns else states.layers, states.lengths, columns)


@dataclass(frozen=True)
class Slices:
    """Of a model that keeps keys and values only: a prefix' are the first of the pass'. before, after: the pass' states."""

    keeping: ByReference
    before: FastWeightCache
    after: FastWeightCache
    n_tokens: int

    def at(self, tokens: Tensor) -> FastWeightCache:
        taken = Taken(self.keeping, self.before, tokens)
        taken.take([t for t in tokens.unique().tolist() if t >= 0], 0, self.n_tokens, self.after)
        return taken.all_rows()


@dataclass(frozen=True)
class Tails:
    """States every `step` tokens (the first before any), from which the few tokens up to a position are run again.

    All B*P rows together and in order, although some end before others: rows may have adapters of their own, which go by their order.
    """

    keeping: ByReference
    x: Tensor
    kept: list[FastWeightCache]
    step: int

    def at(self, tokens: Tensor) -> FastWeightCache:
        counts = (tokens + 1).flatten()  # [B*P] tokens of each prefix
        row = torch.arange(len(self.x)).repeat_interleave(tokens.shape[1])
        kept = ((counts - 2).clamp(min=0) // self.step).clamp(max=len(self.kept) - 1)  # two tokens or more, see `segments`
        used = kept.unique().tolist()
        slots = [(kept == i).nonzero()[:, 0] for i in used]
        start = in_order([self.kept[i].index(row[slot]) for i, slot in zip(used, slots, strict=True)], slots)
        first, rest = kept * self.step, counts - kept * self.step
        width = int(rest.max()) if len(rest) else 0
        if is_sharded(self.keeping.trunk):
            width = self.step + 1  # whatever the positions: processes run together
        if width == 0:
            return start
        columns = (first[:, None] + torch.arange(width)).clamp(max=self.x.shape[1] - 1).to(self.x.device, non_blocking=True)
        _, states = self.keeping.run(self.x[row.to(self.x.device, non_blocking=True)[:, None], columns], start, rest[:, None] - 1)
        assert states is not None
        return states


class ByTokens:
    """The state of a prefix is its tokens, newest last: what follows is read together with them."""

    def __init__(self, trunk: Any) -> None:
        self.trunk = trunk

    def run(self, x: Tensor, past: FastWeightCache | None, wanted: Tensor | None) -> tuple[Tensor, FastWeightCache | None]:
        hidden, states = self.run_keeping(x, past)
        return hidden, states.at(wanted) if wanted is not None else None

    def run_keeping(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, Reread]:
        if x.ndim == 3:
            raise RefineError(
                f"inputs_embeds cannot be read again, which is how states of {self.trunk.label} are kept; pass input_ids"
            )
        B, T = x.shape
        lengths = torch.zeros(B, dtype=torch.long) if past is None or past.lengths is None else past.lengths
        columns = int(lengths.max())
        if past is None or columns == 0:
            return self.trunk.plain(x, use_cache=False), Reread(x, lengths, 0)
        whole = torch.cat([past.layers[0]["tokens"][:, -columns:], x], 1)
        # Behind their holes the rows begin at the left, where no mask is needed.
        shift = (torch.arange(columns + T) + (columns - lengths)[:, None]).clamp(max=columns + T - 1)
        hidden = self.trunk.plain(whole.gather(1, shift.to(x.device, non_blocking=True)), use_cache=False)
        new = (lengths[:, None] + torch.arange(T)).to(x.device, non_blocking=True)
        return hidden.gather(1, new[..., None].expand(-1, -1, hidden.shape[-1])), Reread(whole, lengths, columns)


@dataclass(frozen=True)
class Reread:
    """Tokens [B, columns + T] of the past and of a pass; lengths: [B] those of the past, whose hole is at the start."""

    tokens: Tensor
    lengths: Tensor
    columns: int

    def at(self, tokens: Tensor) -> FastWeightCache:
        lengths = (self.lengths[:, None] + tokens + 1).flatten()
        width = int(lengths.max()) if len(lengths) else 0
        ends = (self.columns + tokens + 1).flatten()
        columns = (ends[:, None] - width + torch.arange(width)).clamp(min=0).to(self.tokens.device, non_blocking=True)
        rows = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(tokens.shape[1])
        state: LayerState = {"tokens": self.tokens[rows[:, None], columns]}
        return FastWeightCache([state], lengths, width)
