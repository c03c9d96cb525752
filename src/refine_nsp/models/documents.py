"""Documents packed in one row get rows of their own, padded on the right, and their outputs go back to the caller's layout.

Every document starts from a fresh state, and nothing below this edge knows of packing. Documents of very different lengths run apart, since
the rows would otherwise be mostly pads (one of 7,000 tokens with a hundred of 12: 86 times the tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from refine_nsp.models.outputs import FastWeightModelOutput
from refine_nsp.models.padding import by_rows
from refine_nsp.models.state import FastWeightCache, PrefixStates

PADS_PER_TOKEN = 0.25  # at most, among documents that run together

# x [N, T'] ids or [N, T', D], lengths [N] long on the host, tokens [N, P] of snapshots or None -> the outputs of N rows
RunRows = Callable[[Tensor, Tensor, "Tensor | None"], FastWeightModelOutput]


@dataclass(frozen=True)
class Documents:
    """Lists N documents in B rows of T columns, in their order. All tensors are on the host.

    A row without a real token has a document without tokens; these come last.
    """

    n_rows: int
    n_tokens: int
    columns: Tensor  # [n] long, the real tokens in the flattened input
    first: Tensor  # [N] long, each document's first token among these
    lengths: Tensor  # [N] long, its tokens
    rows: Tensor  # [N] long, the row it stands in

    @classmethod
    def of(cls, real: Tensor, begins: Tensor) -> Documents:
        """Find the documents of real tokens [B, T] bool, given which of these (flattened, [n] bool) begin one."""
        n_rows, n_tokens = real.shape
        columns = real.flatten().nonzero()[:, 0]
        first = begins.nonzero()[:, 0]
        lengths = torch.cat([first, torch.tensor([len(columns)])]).diff()
        empty = (~real.any(1)).nonzero()[:, 0]
        none = torch.zeros_like(empty)
        rows = torch.cat([columns[first] // n_tokens, empty])
        return cls(n_rows, n_tokens, columns, torch.cat([first, none]), torch.cat([lengths, none]), rows)

    @property
    def starts(self) -> Tensor:
        """Mark the columns where a document begins, [B, T] bool."""
        starts = torch.zeros(self.n_rows * self.n_tokens, dtype=torch.bool)
        starts[self.columns[self.first[self.lengths > 0]]] = True
        return starts.view(self.n_rows, self.n_tokens)

    def groups(self, together: bool) -> list[Tensor]:
        """Group the documents that run together, longest first: all, or as many as keep pads few."""
        order = self.lengths.argsort(descending=True, stable=True)
        if together:
            return [order]
        groups: list[list[int]] = []
        longest = tokens = 0
        for document in order.tolist():
            length = int(self.lengths[document])
            pads = (len(groups[-1]) + 1) * longest - tokens - length if groups else 1
            if not groups or pads > PADS_PER_TOKEN * (tokens + length):
                groups.append([])
                longest, tokens = length, 0
            groups[-1].append(document)
            tokens += length
        return [torch.tensor(group) for group in groups]

    def columns_of(self, group: Tensor) -> Tensor:
        """Find the columns [N', T'] of the flattened input that a group's rows hold; pads repeat a token."""
        width = max(1, int(self.lengths[group].max()))
        tokens = self.first[group][:, None] + torch.arange(width).minimum((self.lengths[group][:, None] - 1).clamp(min=0))
        return self.columns[tokens.clamp(max=len(self.columns) - 1)] if len(self.columns) else torch.zeros_like(tokens)

    def slots(self, groups: Sequence[Tensor]) -> Tensor:
        """Find each input column among the groups' rows, flattened one behind the other, [B*T] long; a pad's is the first."""
        slots = torch.zeros(self.n_rows * self.n_tokens, dtype=torch.long)
        base = 0
        for group in groups:
            columns = self.columns_of(group)
            real = torch.arange(columns.shape[1]) < self.lengths[group][:, None]
            slots[columns[real]] = base + real.flatten().nonzero()[:, 0]
            base += columns.numel()
        return slots

    def tokens_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn input columns [B, P] (-1: before the first) into documents [B*P] and tokens in them; a pad is the token before it."""
        upto = torch.zeros(self.n_rows * self.n_tokens, dtype=torch.long)
        upto[self.columns] = 1
        upto = upto.cumsum(0) - 1
        rows = torch.arange(self.n_rows)[:, None].expand_as(positions)
        index = upto[(rows * self.n_tokens + positions.clamp(min=0)).flatten()].clamp(min=0)
        rows = rows.flatten()
        if not len(self.columns):
            return self._ends(rows, first=True), torch.full_like(rows, -1)
        inside = (positions.flatten() >= 0) & (self.columns[index] // self.n_tokens == rows)
        # Empty documents come last, so that the others' first tokens are sorted.
        found = torch.searchsorted(self.first[self.lengths > 0], index, right=True) - 1
        documents = torch.where(inside, found, self._ends(rows, first=True))
        return documents, torch.where(inside, index - self.first[documents], -1)

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """Find the last document of each row [B] and its last token."""
        documents = self._ends(torch.arange(self.n_rows), first=False)
        return documents, self.lengths[documents] - 1

    def _ends(self, rows: Tensor, first: bool) -> Tensor:
        """Find the first or last document of each of `rows`."""
        order = list(enumerate(self.rows.tolist()))
        by_row = {row: document for document, row in (reversed(order) if first else order)}
        return torch.tensor([by_row[row] for row in rows.tolist()], dtype=torch.long)


@dataclass(frozen=True)
class _Wanted:
    """Plans the states wanted of a group's documents: after `tokens` [N', P'] of its rows, of which `rows` go to `slots`."""

    tokens: Tensor
    rows: Tensor
    slots: Tensor


def _wanted(groups: Sequence[Tensor], documents: Tensor, tokens: Tensor) -> list[_Wanted | None]:
    """Plan by group which states are taken after `tokens` [M] of `documents` [M]; None for a group without any."""
    plans: list[_Wanted | None] = []
    for group in groups:
        row_of = {document: row for row, document in enumerate(group.tolist())}
        slots = [slot for slot, document in enumerate(documents.tolist()) if document in row_of]
        table, rows = by_rows([row_of[int(documents[slot])] for slot in slots], tokens[slots], len(group))
        plans.append(_Wanted(table, rows, torch.tensor(slots)) if slots else None)
    return plans


def _packed_states(
    documents: Documents, groups: Sequence[Tensor], states: Sequence[PrefixStates], positions: Tensor
) -> FastWeightCache:
    """Take the states of a pass over packed rows by input columns, each that of the document which stands there."""
    plans = _wanted(groups, *documents.tokens_at(positions))
    return _joined([(s.at(p.tokens).index(p.rows), p.slots) for p, s in zip(plans, states, strict=True) if p is not None])


def _joined(taken: Sequence[tuple[FastWeightCache, Tensor]], start: int = 0, end: int | None = None) -> FastWeightCache:
    """Join rows start..end-1 of the states that groups gave, as wide as these rows need."""
    states = FastWeightCache.in_order(taken)
    rows = states.index(torch.arange(states.batch_size)[start:end])
    assert rows.lengths is not None
    return FastWeightCache(rows.layers, rows.lengths, int(rows.lengths.max()))


def run_documents(
    run: RunRows, x: Tensor, documents: Documents, positions: Tensor | None, ends: bool, together: bool
) -> tuple[FastWeightModelOutput, FastWeightCache | None]:
    """Run each document as a row of its own and put the outputs back where its tokens stand.

    Args:
        run: the model on rows that are padded on the right. x: ids [B, T] or embeddings [B, T, D].
        positions: [B, P] long on the host, input columns of snapshots, or None.
        ends: whether to return, as the second value, the state after each row's last document.
        together: whether all documents must run in one pass.
    """
    groups = documents.groups(together)
    asked = [documents.tokens_at(positions)] if positions is not None else []
    asked += [documents.last_tokens()] if ends else []
    wanted = [torch.cat(parts) for parts in zip(*asked, strict=True)]
    plans = _wanted(groups, *wanted) if asked else [None] * len(groups)
    flat, taken = x.flatten(0, 1), []
    outs: list[FastWeightModelOutput] = []
    for group, plan in zip(groups, plans, strict=True):
        rows = flat[documents.columns_of(group).to(x.device, non_blocking=True)]
        out = run(rows, documents.lengths[group], None if plan is None else plan.tokens)
        outs.append(out)
        if plan is not None and out.snapshots is not None:
            taken.append((out.snapshots.index(plan.rows), plan.slots))
    where = documents.slots(groups).to(x.device, non_blocking=True)
    B, T = documents.n_rows, documents.n_tokens

    def restored(pieces: Sequence[Tensor]) -> Tensor:  # [N', T', D] of each group -> [B, T, D]
        return torch.cat([piece.flatten(0, 1) for piece in pieces]).index_select(0, where).view(B, T, -1)

    n = 0 if positions is None else positions.numel()
    layers = [out.hidden_states for out in outs if out.hidden_states is not None]
    states = [out.states for out in outs if out.states is not None]
    out = FastWeightModelOutput(
        last_hidden_state=restored([out.last_hidden_state for out in outs]),
        hidden_states=tuple(restored(pieces) for pieces in zip(*layers, strict=True)) if layers else None,
        snapshots=_joined(taken, end=n) if n else None,
        states=PrefixStates(partial(_packed_states, documents, groups, states)) if states else None,
        document_starts=documents.starts,
    )
    return out, _joined(taken, start=n) if ends else None
