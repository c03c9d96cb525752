"""A transformers model gives states by reference: a pass is cut where they are wanted, and continues from what was taken.

Gradients flow from every snapshot into the whole prefix. Real tokens stand on the left and nobody asks for a state behind a row's last, so
pads need no masks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint

from refine_nsp.models.borrowed.layer_cache import ATTENDING_KINDS, RECURRENT_KINDS, ReferenceCache, kinds_of, prefix, trimmed
from refine_nsp.models.borrowed.trunk import StatefulTrunk
from refine_nsp.models.state import FastWeightCache, TakeStates, consumed_tokens
from refine_nsp.processes import is_sharded

# States that are asked for after a pass are kept every so many tokens, or so many times, whichever is rarer: each piece of a pass repeats
# a layer's keys, and the tokens between a kept state and a position are run again.
KEPT_EVERY_TOKENS = 64
MOST_KEPT = 16


class ByReference:
    """Takes states where the pass is cut, differentiable, and continues passes from there.

    x: ids [B, T] or embeddings [B, T, D]; past: states of B rows, or None.
    """

    rereads_prefixes = False

    def __init__(self, trunk: StatefulTrunk) -> None:
        self.trunk = trunk
        kinds, self.windows = kinds_of(trunk.config)
        self.recurs = any(kind in RECURRENT_KINDS for kind in kinds)
        self.keeps_all_tokens = any(
            kind in ATTENDING_KINDS and window is None for kind, window in zip(kinds, self.windows, strict=True)
        )
        limits = [vars(m)["time_step_limit"] for m in trunk.modules() if vars(m).get("time_step_limit") is not None]
        # Whether one token continues from a state as several do; Nemotron-H limits its time steps only for several.
        self.same_by_single_tokens = all(tuple(limit) == (0.0, math.inf) for limit in limits)
        parameters = inspect.signature(trunk.forward).parameters
        self.cache_name = "past_key_values" if "past_key_values" in parameters else "cache_params"
        self.takes_positions = "position_ids" in parameters

    def run(self, x: Tensor, past: FastWeightCache | None) -> Tensor:
        """Return hidden states [B, T, D]."""
        if past is None:
            return self.trunk.plain(x, use_cache=False)
        T = x.shape[1]
        if T == 1 and self.recurs:
            x = torch.cat([x, x], 1)  # see `pieces`; what follows a token does not touch it
        return self.piece(x, past)[0][:, :T]

    def run_and_take(self, x: Tensor, past: FastWeightCache | None, wanted: Tensor) -> tuple[Tensor, FastWeightCache]:
        """Return hidden states, and the states after tokens `wanted` [B, P] long on the host (-1: before the first) as B*P rows."""
        T = x.shape[1]
        tokens = wanted.unique().tolist()
        # Where layers keep keys and values only, nothing is cut: a prefix' are a slice of the pass'.
        cuts = [t + 1 for t in tokens if 0 <= t < T - 1] if self.recurs else []
        if self.recurs and is_sharded(self.trunk):
            cuts = filled(cuts, wanted.numel(), T)  # processes run together, so shapes alone decide how many pieces there are
        hidden, taken = [], Taken(self, past, wanted)
        for start, end, h, after in self.pieces(x, past, [*cuts, T]):
            hidden.append(h)
            taken.take([t for t in tokens if start <= t < end], start, end, after)
        return joined(hidden), taken.all_rows()

    def run_and_keep(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, TakeStates]:
        """Return hidden states, and a function that takes the states at any tokens afterwards."""
        T = x.shape[1]
        step = max(KEPT_EVERY_TOKENS, math.ceil(T / MOST_KEPT)) if self.recurs else T
        hidden, kept = [], [] if past is None else [past]
        for _, _, h, after in self.pieces(x, past, [*range(step, T, step), T]):
            hidden.append(h)
            kept = kept or [after.before_any()]
            kept.append(after)
        take = partial(self.tails, x, kept[:-1], step) if self.recurs else partial(self.slices, kept[0], kept[-1], T)
        return joined(hidden), take

    def pieces(
        self, x: Tensor, past: FastWeightCache | None, ends: Sequence[int]
    ) -> Iterator[tuple[int, int, Tensor, FastWeightCache]]:
        """Run a pass cut at `ends`; yield start and end of each piece, its hidden states, and the states it left.

        A piece of one token is run with the one before it once more: layers continue by a single token in code of its own, which in
        kernels has no gradients and in some models leaves something out.
        """
        last: list[tuple[int, FastWeightCache | None]] = [(0, past)]
        for start, end in pairwise([0, *ends]):
            begin, state = last[0] if self.recurs and end - start == 1 else last[-1]
            h, after = self.piece(x[:, begin:end], state)
            last = [last[-1], (end, after)]
            yield start, end, h[:, start - begin :], after

    def slices(self, before: FastWeightCache, after: FastWeightCache, n_tokens: int, positions: Tensor) -> FastWeightCache:
        """Take the states of a pass whose layers keep keys and values only: a prefix' are the first of those `after` the pass."""
        taken = Taken(self, before, positions)
        taken.take([t for t in positions.unique().tolist() if t >= 0], 0, n_tokens, after)
        return taken.all_rows()

    def tails(self, x: Tensor, kept: Sequence[FastWeightCache], step: int, positions: Tensor) -> FastWeightCache:
        """Run the tokens up to a position again from states that were kept every `step` tokens, the first before any.

        All B*P rows run together, although some end before others, and in order: rows may have adapters of their own, which go by it.
        """
        counts = (positions + 1).flatten()  # [B*P] tokens of each prefix
        row = torch.arange(len(x)).repeat_interleave(positions.shape[1])
        nearest = ((counts - 2).clamp(min=0) // step).clamp(max=len(kept) - 1)  # two tokens or more, see `pieces`
        slots = {i: (nearest == i).nonzero()[:, 0] for i in nearest.unique().tolist()}
        start = FastWeightCache.in_order([(kept[i].index(row[slot]), slot) for i, slot in slots.items()])
        first, rest = nearest * step, counts - nearest * step
        width = int(rest.max()) if len(rest) else 0
        if is_sharded(self.trunk):
            width = step + 1  # whatever the positions: processes run together
        if width == 0:
            return start
        columns = (first[:, None] + torch.arange(width)).clamp(max=x.shape[1] - 1).to(x.device, non_blocking=True)
        tail = x[row.to(x.device, non_blocking=True)[:, None], columns]
        return self.run_and_take(tail, start, rest[:, None] - 1)[1]

    def piece(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, FastWeightCache]:
        """Run a pass from `past`, uncut. The windows of its states are whole, so that slices can be taken of them."""
        B, T = x.shape[:2]
        lengths = consumed_tokens(past, B)
        columns = int(lengths.max())
        layers = [] if past is None or columns == 0 else prefix(trimmed(past.layers, columns), self.windows, 0)
        arguments: dict[str, Tensor | bool] = {"use_cache": True}
        if self.takes_positions:
            consumed = lengths if past is None else past.consumed
            arguments["position_ids"] = (consumed[:, None] + torch.arange(T)).to(x.device, non_blocking=True)
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
        return hidden, FastWeightCache(after, lengths + T, columns + T, None if past is None else past.earlier)


@contextmanager
def unwrapped(wrappers: Sequence[CheckpointWrapper]) -> Iterator[None]:
    """Run layers without FSDP's activation checkpointing: run again alone, they would meet the states that they left themselves."""

    def run(module: nn.Module, *args: object, **kwargs: object) -> object:
        return module(*args, **kwargs)

    before = [w.checkpoint_fn for w in wrappers]
    for w in wrappers:
        vars(w)["checkpoint_fn"] = run
    try:
        yield
    finally:
        for w, checkpoint_fn in zip(wrappers, before, strict=True):
            vars(w)["checkpoint_fn"] = checkpoint_fn


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join the hidden states of consecutive pieces into a pass' [B, T, D]."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def filled(cuts: Sequence[int], n: int, n_tokens: int) -> list[int]:
    """Add cuts in the middle of the longest pieces until a pass over `n_tokens` has `n` of them, or one behind every token."""
    ends = [0, *cuts, n_tokens]
    while len(ends) - 2 < min(n, n_tokens - 1):
        longest = max(range(1, len(ends)), key=lambda i: ends[i] - ends[i - 1])
        ends.insert(longest, (ends[longest - 1] + ends[longest]) // 2)
    return ends[1:-1]


class Taken:
    """Collects the states that a pass takes on its way: parts by position, and in the end a row for each that was wanted."""

    def __init__(self, method: ByReference, past: FastWeightCache | None, wanted: Tensor) -> None:
        self.method, self.past, self.wanted = method, past, wanted
        self.last = past  # where the pass is
        self.parts: list[tuple[FastWeightCache, Tensor]] = []

    def take(self, tokens: Sequence[int], start: int, end: int, after: FastWeightCache) -> None:
        """Take the states after `tokens` of the piece start..end, which left the states `after`."""
        if self.last is None or not self.last.is_initialized:
            self.last = after.before_any()
        if start == 0 and bool((self.wanted < 0).any()):
            self._add(-1, self.last)
        for t in tokens:
            layers = prefix(after.layers, self.method.windows, end - 1 - t)
            lengths = consumed_tokens(after, after.batch_size) - (end - 1 - t)
            self._add(t, FastWeightCache(layers, lengths, after.columns - (end - 1 - t), after.earlier))
        self.last = after

    def _add(self, token: int, states: FastWeightCache) -> None:
        slots = (self.wanted == token).flatten().nonzero()[:, 0]
        rows = slots // self.wanted.shape[1]
        self.parts.append((states if torch.equal(rows, torch.arange(states.batch_size)) else states.index(rows), slots))

    def all_rows(self) -> FastWeightCache:
        """Return B*P rows, row-major, without the columns of keys that none of them has."""
        states = FastWeightCache.in_order(self.parts)
        assert states.lengths is not None
        columns = int(states.lengths.max()) if len(states.lengths) else 0
        layers = trimmed(states.layers, columns) if columns else states.layers
        return FastWeightCache(layers, states.lengths, columns, states.earlier)
