"""A pass in segments (`segment_tokens`) holds the activations of one segment at a time, and has the gradient of the whole sequence.

A segment starts from the states that the one before left; it gives its hidden states, the snapshots inside it, and the states it leaves.
Autograd keeps these alone and runs each segment again in the backward pass, the last one first, so nothing is truncated.

What still grows with T are the hidden states [B, T, D] and the states between segments; keys and values of attention are there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from refine_nsp.errors import RefineError
from refine_nsp.models.padding import by_rows
from refine_nsp.models.protocols import Trunk
from refine_nsp.models.state import NEWEST_LAST, FastWeightCache
from refine_nsp.processes import is_sharded


@dataclass(frozen=True)
class HandedStates:
    """Holds the states of B rows between two segments, in the parts that segments wrote; see `FastWeightCache`."""

    # Each state by its name, in one tensor, or in several where every segment adds its own (keys and values of all tokens): a whole state
    # after each segment would hold all those before it again.
    layers: list[dict[str, tuple[Tensor, ...]]]
    lengths: Tensor
    columns: int
    added: list[set[str]]  # for each layer the names of the states that the last segment added to
    earlier: Tensor

    def cache(self) -> FastWeightCache:
        """Join the parts to the states that the next segment starts from."""
        layers = [
            {name: torch.cat(parts, 2) if len(parts) > 1 else parts[0] for name, parts in layer.items()} for layer in self.layers
        ]
        return FastWeightCache(layers, self.lengths, self.columns, self.earlier)

    def behind(self, before: HandedStates | None) -> HandedStates:
        """Put the parts before in front, where a segment returned only its own."""
        if before is None:
            return self
        layers = [
            {name: (*old[name], *parts) if name in added else parts for name, parts in new.items()}
            for old, new, added in zip(before.layers, self.layers, self.added, strict=True)
        ]
        return HandedStates(layers, self.lengths, self.columns, self.added, self.earlier)


@dataclass(frozen=True)
class Segments:
    """Runs segments of sequences [B, T] long with real tokens on the left; lengths: [B] long, on the host."""

    trunk: Trunk
    input_ids: Tensor
    lengths: Tensor

    def run(
        self, start: int, end: int, before: HandedStates | None, slots: Sequence[int], positions: Tensor, hands_over: bool = True
    ) -> tuple[Tensor, FastWeightCache | None, HandedStates | None]:
        """Run tokens start..end-1; return hidden states, states at the positions [B, P] numbered `slots`, and those at the end."""
        ids = self.input_ids[:, start:end]
        # Nobody asks for a state behind a row's last token, so a trunk that would cut its pass at each row's length may read pads.
        lengths = None if self.trunk.cuts_at_positions else (self.lengths - start).clamp(0, end - start)
        relative = rows = None
        if slots:
            inside = (positions.flatten()[slots] - start).clamp(min=-1)
            relative, rows = by_rows([slot // positions.shape[1] for slot in slots], inside, len(positions))

        def forward(ids: Tensor) -> tuple[Tensor, FastWeightCache | None, HandedStates | None]:
            past = None if before is None else before.cache()
            out = self.trunk(ids, lengths=lengths, past_key_values=past, use_cache=hands_over, snapshot_positions=relative)
            left = _written(out.past_key_values, before) if hands_over and out.past_key_values is not None else None
            return out.last_hidden_state, None if rows is None or out.snapshots is None else out.snapshots.index(rows), left

        # The segment's activations are computed again in the backward pass.
        hidden, snapshots, left = checkpoint(forward, ids, use_reentrant=False) if torch.is_grad_enabled() else forward(ids)
        return hidden, snapshots, None if left is None else left.behind(before)


@dataclass(frozen=True)
class PassBySegments:
    """Holds the results of a pass in segments."""

    segments: Segments
    hidden: Tensor  # [B, T, D]
    snapshots: FastWeightCache | None  # states at the positions the pass was given
    starts: list[int]  # where each segment begins
    before: list[HandedStates | None]  # states before each segment

    def at(self, positions: Tensor) -> FastWeightCache:
        """Take the states after the tokens at `positions`; the segments that hold them run once more. See `PrefixStates.at`."""
        positions = positions.cpu()
        flat = positions.flatten()
        # Two tokens or more: a single one is code of its own in some models (see `ByReference.pieces`).
        which = (torch.searchsorted(torch.tensor(self.starts), flat) - 1).clamp(min=0)
        parts = []
        used = which.unique().tolist()
        if is_sharded(self.segments.trunk):  # processes run together: as many segments whatever the positions
            unused = (i for i in range(len(self.starts)) if i not in used)
            for i in islice(unused, max(0, min(len(flat), len(self.starts)) - len(used))):
                self.segments.run(self.starts[i], self.starts[i] + 1, self.before[i], [], positions, hands_over=False)
        for i in used:
            slots = (which == i).nonzero()[:, 0]
            end = int(flat[slots].max().clamp(min=0)) + 1
            _, taken, _ = self.segments.run(self.starts[i], end, self.before[i], slots.tolist(), positions, hands_over=False)
            assert taken is not None
            parts.append((taken, slots))
        return FastWeightCache.in_order(parts)


def read_by_segments(
    trunk: Trunk,
    input_ids: Tensor,
    lengths: Tensor,
    size: int,
    positions: Tensor | None = None,
    past: FastWeightCache | None = None,
) -> PassBySegments:
    """Run a trunk over [B, T] ids in segments of about `size` tokens (two or more).

    Args:
        trunk: a model below its head.
        lengths: [B] long, on the host; rows are padded on the right.
        positions: [B, P] long, input columns of the last tokens of prefixes (-1: before the first), when known beforehand.
        past: states that the rows start from, only read; None: they start from nothing.

    Raises:
        RefineError: a model whose states are tokens; it would read everything before a segment with the segment.
    """
    if trunk.rereads_prefixes:
        raise RefineError(
            f"segment_tokens={size}: {trunk.label} cannot go on from a state, which segments do; leave segment_tokens out (to save memory: "
            "gradient_checkpointing)"
        )
    positions = torch.zeros(len(input_ids), 0, dtype=torch.long) if positions is None else positions.cpu()
    segments, flat = Segments(trunk, input_ids, lengths), positions.flatten()
    ends = segment_ends(input_ids.shape[1], size, set(flat.tolist()))
    hidden: list[Tensor] = []
    before: list[HandedStates | None] = [None if past is None else _written(past, None)]
    parts: list[tuple[FastWeightCache, Tensor]] = []
    for start, end in pairwise([0, *ends]):
        inside = ((flat < end) & (flat >= start)) | ((flat < 0) & (start == 0))
        slots = inside.nonzero()[:, 0]
        h, taken, after = segments.run(start, end, before[-1], slots.tolist(), positions, hands_over=end < ends[-1])
        hidden.append(h)
        before.append(after)
        if taken is not None:
            parts.append((taken, slots))
    snapshots = FastWeightCache.in_order(parts) if parts else None
    return PassBySegments(segments, torch.cat(hidden, 1), snapshots, [0, *ends[:-1]], before[:-1])


def segment_ends(n_tokens: int, size: int, positions: set[int]) -> list[int]:
    """Choose where segments of about `size` tokens end: none has a single token, nor, where that can be, a position at its first token.

    How many there are follows from `n_tokens` alone, since processes that hold shards of a model run together.
    """
    ends: list[int] = []
    for end in range(size, n_tokens - 1, size):
        free = (e for e in range(end, max(end - size, ends[-1] if ends else 0) + 1, -1) if e not in positions)
        ends.append(next(free, end))
    return [*ends, n_tokens]


def _written(after: FastWeightCache, before: HandedStates | None) -> HandedStates:
    """Keep the states after a segment; of keys and values that it added to, only what it added."""
    assert after.lengths is not None
    columns = 0 if before is None else before.columns
    new = after.columns - columns
    layers: list[dict[str, tuple[Tensor, ...]]] = []
    added = []
    for layer in after.layers:
        grew = {name for name, x in layer.items() if name in NEWEST_LAST and columns and x.shape[2] == after.columns}
        # A copy: a slice would keep all of what it was cut from.
        layers.append({name: (x[:, :, -new:].clone() if name in grew else x,) for name, x in layer.items()})
        added.append(grew)
    return HandedStates(layers, after.lengths, after.columns, added, after.earlier)
