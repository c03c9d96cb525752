"""A state holds everything that a model's layers need to continue after a position; a fast-weight model's does not grow with it.

It is a plain dictionary of tensors whose first axis is the row, so that every hand-over is one `index_select`. Tensors are replaced, never
written in place: a state taken from a forward pass with gradients stays part of its graph, and so the policy loss reaches the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from refine_nsp.models.padding import tokens_in

LayerState = dict[str, Tensor]  # every tensor [R, ...]
NEWEST_LAST = ("keys", "values", "tokens")  # as wide as the longest row has tokens: shorter rows have a hole at the start


class LayerTrace(Protocol):
    """Holds what one layer keeps of a pass over T tokens to rebuild its state at any position."""

    def at(self, positions: Tensor) -> LayerState:
        """Rebuild the state after the tokens at `positions` [B, P] long, on the host (-1: the pass's first state), as B*P rows."""
        ...


class FastWeightCache(Cache):
    """Holds the states of all layers for R rows; it is these models' `past_key_values`.

    Attributes:
        layers: one `LayerState` per layer, empty before the first forward pass.
        lengths: [R] long, on the host: real tokens consumed by each row; None before the first forward pass.
        columns: input columns seen, pads included, which `generate` calls the sequence length.
        earlier: [R] long, on the host: tokens consumed before those of `lengths`, whose keys were let go. Positions count them.
    """

    layers: list[LayerState]  # type: ignore[assignment]  # a list of other things in transformers

    def __init__(
        self,
        layers: list[LayerState] | None = None,
        lengths: Tensor | None = None,
        columns: int = 0,
        earlier: Tensor | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.layers = layers if layers is not None else []
        self.lengths = None if lengths is None else lengths.cpu()
        self.columns = columns
        self.earlier = torch.zeros(0 if lengths is None else len(lengths), dtype=torch.long) if earlier is None else earlier

    def index(self, rows: Tensor) -> FastWeightCache:
        """Take the given rows [R'] long, in that order and as often as named. Differentiable."""
        layers = [
            {name: x.index_select(0, rows.to(x.device, non_blocking=True)) for name, x in layer.items()} for layer in self.layers
        ]
        on_host = rows.cpu()
        return FastWeightCache(layers, self._lengths()[on_host], self.columns, self.earlier[on_host])

    def expand(self, repeats: int) -> FastWeightCache:
        """Repeat every row, copies next to each other: B*P rows become R = B*P*N in row-major order. Differentiable."""
        if repeats == 1:
            return self.copy()
        return self.index(torch.arange(self.batch_size).repeat_interleave(repeats))

    def detach(self) -> FastWeightCache:
        """Return the same states outside any graph, without copying them."""
        layers = [{name: x.detach() for name, x in layer.items()} for layer in self.layers]
        return FastWeightCache(layers, self.lengths, self.columns, self.earlier)

    def copy(self) -> FastWeightCache:
        """Make a cache that can be continued without changing this one; tensors are shared, since none is written in place."""
        return FastWeightCache([dict(layer) for layer in self.layers], self.lengths, self.columns, self.earlier)

    @classmethod
    def stack(cls, caches: Sequence[FastWeightCache]) -> FastWeightCache:
        """Join P caches of B rows each to B*P rows, row b*P + p, zero-padded to the longest fill. Differentiable."""
        rows = torch.arange(caches[0].batch_size * len(caches)).view(len(caches), -1).T.flatten()
        return cls.concatenate(caches).index(rows)

    @classmethod
    def concatenate(cls, caches: Sequence[FastWeightCache]) -> FastWeightCache:
        """Join the rows of all caches, one cache's behind the other's, zero-padded to the longest fill. Differentiable."""
        layers = [
            {name: _all_rows([c.layers[i][name] for c in caches], name in NEWEST_LAST) for name in layer}
            for i, layer in enumerate(caches[0].layers)
        ]
        lengths, earlier = torch.cat([c._lengths() for c in caches]), torch.cat([c.earlier for c in caches])
        return cls(layers, lengths, max(c.columns for c in caches), earlier)

    @classmethod
    def in_order(cls, taken: Sequence[tuple[FastWeightCache, Tensor]]) -> FastWeightCache:
        """Join states that were taken in parts, each with the rows that its states become, long, on the host."""
        parts, slots = zip(*taken, strict=True)
        return parts[0] if len(parts) == 1 else cls.concatenate(parts).index(torch.cat(slots).argsort())

    @classmethod
    def joined(cls, rows: Sequence[FastWeightCache | None]) -> FastWeightCache | None:
        """Join states of one row each; None is a row that starts from nothing. The result is None where all rows do."""
        known = next((row for row in rows if row is not None), None)
        return None if known is None else cls.concatenate([known.before_any() if row is None else row for row in rows])

    def before_any(self) -> FastWeightCache:
        """Make the states before any token, of the shapes of these."""
        layers = [
            {name: x[:, :, :0] if name in NEWEST_LAST else torch.zeros_like(x) for name, x in layer.items()}
            for layer in self.layers
        ]
        return FastWeightCache(layers, torch.zeros_like(self._lengths()))

    def apart(self, keys: int | None = None) -> list[FastWeightCache]:
        """Part the rows, each detached, in memory of its own and without the columns of keys that only others have.

        keys: of so many of the newest tokens alone are keys and values kept; None: of all that are there.
        """
        attends = any(name in NEWEST_LAST for layer in self.layers for name in layer)
        parts = []
        for i, length in enumerate(self._lengths().tolist()):
            row, kept = self.index(torch.tensor([i])).detach(), min(length, keys) if keys is not None and attends else length
            layers = [
                {name: x[:, :, max(0, x.shape[2] - kept) :].clone() if name in NEWEST_LAST else x for name, x in layer.items()}
                for layer in row.layers
            ]
            parts.append(FastWeightCache(layers, torch.tensor([kept]), kept, row.consumed - kept))
        return parts

    @property
    def consumed(self) -> Tensor:
        """Count the tokens that each row has consumed, [R] long on the host, those whose keys were let go among them."""
        return self._lengths() + self.earlier

    @property
    def nbytes(self) -> int:
        """Count the bytes of all states of all rows."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.values())

    def _lengths(self) -> Tensor:
        if self.lengths is None:
            raise ValueError("the cache is empty: run a forward pass with it first")
        return self.lengths

    def advance(self, layers: list[LayerState], lengths: Tensor | None, n_columns: int) -> None:
        """Replace the states by those after another `n_columns` input columns."""
        self._become(FastWeightCache(layers, lengths, self.columns + n_columns, self.earlier if self.is_initialized else None))

    def _become(self, other: FastWeightCache) -> None:
        self.layers, self.lengths, self.columns, self.earlier = other.layers, other.lengths, other.columns, other.earlier

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return -1 if self.lengths is None else int(self.lengths.shape[0])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.lengths is not None:
            self._become(self.index(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.lengths is not None:
            self._become(self.expand(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.lengths is not None:
            self._become(self.index(torch.arange(self.batch_size)[indices.cpu()]))

    def reset(self) -> None:
        self._become(FastWeightCache())

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                "a fast-weight state cannot be cropped: it holds no past tokens. Keep a `copy()` of the cache, or take a "
                "snapshot with `model(input_ids, snapshot_positions=...)`, and continue from that"
            )

    def __len__(self) -> int:
        return len(self.layers)

    def __deepcopy__(self, memo: dict) -> FastWeightCache:
        # Tensors are never written in place, so sharing them is a deep copy; and non-leaf tensors could not be deep-copied.
        return self.copy()

    def __repr__(self) -> str:
        return f"FastWeightCache(layers={len(self.layers)}, rows={self.batch_size}, columns={self.columns})"

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False


def _all_rows(parts: Sequence[Tensor], at_start: bool) -> Tensor:
    """Join the rows of tensors [S, ...], every other axis zero-padded (at its end, or start) to the longest."""
    shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in parts), strict=True)]

    def padded(x: Tensor) -> Tensor:
        missing = [n - m for n, m in zip(reversed(shape), reversed(x.shape[1:]), strict=True)]
        return F.pad(x, [pad for n in missing for pad in ((n, 0) if at_start else (0, n))]) if any(missing) else x

    return torch.cat([padded(x) for x in parts])


def tensors_of(layer: object) -> LayerState:
    """Read what a layer of a cache of transformers keeps: `keys`, `values`, `conv_0`, `recurrent_0` and so on."""
    found: LayerState = {}
    if isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
        found |= {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for what, kept in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
            found |= {f"{what}_{i}": x for i, x in kept.items() if x is not None}
    return found


def consumed_tokens(past: FastWeightCache | None, n_rows: int) -> Tensor:
    """Count the tokens that each of `n_rows` rows has consumed before a pass, [B] long; several rows may continue from one of `past`."""
    if past is None or past.lengths is None:
        return torch.zeros(n_rows, dtype=torch.long)
    return past.lengths.repeat_interleave(n_rows // past.batch_size)


def rows_of_their_own(state: LayerState, offsets: Tensor, branches: int) -> tuple[LayerState, Tensor]:
    """Repeat each of the S rows of a state, and its offset, `branches` times, copies next to each other."""
    if branches == 1:
        return state, offsets
    return {name: x.repeat_interleave(branches, 0) for name, x in state.items()}, offsets.repeat_interleave(branches)


def last_inputs(x: Tensor, history: Tensor | None, count: int, positions: Tensor) -> Tensor:
    """Take the `count` tokens of x [B, T, ...] up to and including `positions` [B, P], on the host -> [B, P, count, ...].

    `history` [B, count, ...], or zeros, stand before the first token.
    """
    if positions.shape[1] == 1 and bool((positions == positions[0]).all()):
        return _last_of_all(x, history, count, int(positions[0, 0]))[:, None]
    index = (positions[..., None] + torch.arange(1 - count, 1)).to(x.device, non_blocking=True)  # [B, P, count]
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    taken = x[rows, index.clamp(min=0)]
    before = (index < 0).view(*index.shape, *[1] * (x.ndim - 2))
    if history is None:
        return taken.masked_fill(before, 0.0)
    return torch.where(before, history[rows, (index + count).clamp(0, count - 1)], taken)


def _last_of_all(x: Tensor, history: Tensor | None, count: int, position: int) -> Tensor:
    """Compute `last_inputs` [B, count, ...] at one position of all rows, with few operations: generation does so after every token."""
    own = x[:, max(0, position + 1 - count) : position + 1]
    missing = count - own.shape[1]
    if missing == 0:
        return own.clone()  # a slice would keep all of x
    before = x.new_zeros(x.shape[0], missing, *x.shape[2:]) if history is None else history[:, count - missing :]
    return torch.cat([before, own], 1)


# [B, P] long on the host, real tokens of each row (-1: before the first) -> the states after them, B*P rows, row b*P + p.
TakeStates = Callable[[Tensor], FastWeightCache]


@dataclass(frozen=True)
class PrefixStates:
    """Gives the states of a pass at positions that are chosen after its outputs are known.

    It holds intermediate results until it is dropped, so take the snapshots and let go of it.
    """

    take: TakeStates
    columns_to_tokens: Tensor | None = None  # see `padding.columns_to_tokens`

    def at(self, positions: Tensor) -> FastWeightCache:
        """Take the states after the tokens in input columns `positions` [B, P] long (-1: before the first) as B*P rows, row b*P + p.

        They are differentiable with respect to everything the pass computed.
        """
        # Where a device chose the positions, they are the one thing a step asks it for.
        return self.take(tokens_in(positions.cpu(), self.columns_to_tokens))


def states_after(layers: list[LayerState], offsets: Tensor, positions: Tensor) -> FastWeightCache:
    """Hold the states of B*P rows after the tokens at `positions` [B, P] of a pass; offsets [B]: tokens consumed before it."""
    lengths = (offsets[:, None] + positions + 1).flatten()
    return FastWeightCache(layers, lengths, int(lengths.max()) if len(lengths) else 0)
