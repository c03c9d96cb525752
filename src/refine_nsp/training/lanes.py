"""Documents become windows, and windows lanes: the next window of a document stands in the same row of the next optimizer step's batch.

A lane is a row of the global batch, counted over all processes and micro-batches. When a document ends, its lane takes the next one of a
list that the seed shuffles; the list is shuffled again and begun anew when it ends, so that no lane ever waits. Which window stands where
follows from the data, the seed and the number of lanes, and from nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler

from refine_nsp.errors import RefineError
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.training.data import BEGINS_COLUMN, LENGTHS_COLUMN, TOKENS_COLUMN, Collated, cut_rows, some
from refine_nsp.training.stream import State, Stream

T = TypeVar("T")


class LaneOrder(Sampler[int]):
    """Order the windows of a dataset by lanes: its rows in turns of `lanes`, row l of each turn continuing what lane l read before.

    An epoch has as many windows as the dataset, rounded up to whole turns, and goes on where the one before stopped.

    Args:
        begins: which rows begin a document; the rows of one stand next to each other. lanes: rows of a turn.
        shuffled: documents are read in an order drawn by `seed`, or as they stand.
    """

    def __init__(self, begins: Sequence[bool], lanes: int, seed: int, shuffled: bool) -> None:
        self.documents = documents_of(begins)
        self.lanes, self.seed, self.shuffled, self.epoch = lanes, seed, shuffled, 0
        self.turns = -(-len(begins) // lanes)

    def __len__(self) -> int:
        return self.turns * self.lanes

    def __iter__(self) -> Iterator[int]:
        rows = in_lanes(self._documents(), self.lanes)
        for _ in range(self.epoch * len(self)):
            next(rows)
        for _ in range(len(self)):
            yield next(rows)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which says how many turns came before."""
        self.epoch = epoch

    def _documents(self) -> Iterator[Iterator[int]]:
        """Yield the documents again and again, in another order each time."""
        time = 0
        while True:
            generator = generator_of(self.seed, time)
            order = (
                torch.randperm(len(self.documents), generator=generator).tolist() if self.shuffled else range(len(self.documents))
            )
            yield from (iter(self.documents[i]) for i in order)
            time += 1


class LaneStream(Stream):
    """Iterate over streamed windows by lanes. A lane holds the rest of its document in memory.

    What lanes hold follows from all that was read before, so a resumed run reads the text again from its beginning, and leaves out what
    was given out.
    """

    def __init__(self, data: IterableDataset, every: int, keep: int, lanes: int) -> None:
        super().__init__(data, every, keep)
        self.lanes = lanes

    def rows_from(self, start: State | None) -> Iterator[dict[str, object]]:
        self.data.load_state_dict(None)
        self.row, self.epoch = 0 if start is None else start["row"], 0
        return islice(in_lanes(grouped(self.epochs()), self.lanes), self.row, None)

    def place(self) -> State:
        """Return how many rows were given out, from which it follows where the next stands."""
        return {"epoch": 0, "given_out": self.row}


def in_lanes(documents: Iterator[Iterator[T]], lanes: int) -> Iterator[T]:
    """Yield windows in turns of one for each lane; a lane whose document has ended takes the next of `documents`, which must not end."""
    reading: list[Iterator[T]] = [iter(()) for _ in range(lanes)]
    while True:
        for lane in range(lanes):
            while not (window := list(islice(reading[lane], 1))):
                reading[lane] = next(documents)
            yield window[0]


def grouped(rows: Iterable[dict[str, object]]) -> Iterator[Iterator[dict[str, object]]]:
    """Yield the windows of each document, read from the stream as a whole."""
    document: list[dict[str, object]] = []
    for row in rows:
        if row[BEGINS_COLUMN] and document:
            yield iter(document)
            document = []
        document.append(row)
    if document:
        yield iter(document)


def documents_of(begins: Sequence[bool]) -> list[range]:
    """Find the rows of each document. The first row begins one, whatever it says: the rows before it may have been kept back."""
    firsts = [i for i, begin in enumerate(begins) if begin or i == 0]
    return [range(first, last) for first, last in zip(firsts, [*firsts[1:], len(begins)], strict=True)]


def in_windows(data: Dataset | IterableDataset, max_length: int, min_length: int) -> Dataset | IterableDataset:
    """Cut rows of `input_ids`, each a document, into windows for carried states; rows that are windows already stay as they are.
    RefineError for packed rows, or where no document is long enough."""
    names = data.column_names or []
    if BEGINS_COLUMN in names or TOKENS_COLUMN not in names:
        return data
    if LENGTHS_COLUMN in names:
        raise RefineError(
            "carry_states reads a document window by window, and packed rows hold several; give a row to each document"
        )

    def windows_of(batch: Mapping[str, list]) -> dict[str, list]:
        others = [name for name in names if name != TOKENS_COLUMN]
        return cut_rows(batch, batch[TOKENS_COLUMN], max_length, min_length, others, carried=True)

    if isinstance(data, IterableDataset):
        return data.map(windows_of, batched=True, batch_size=16, remove_columns=names)
    return some(data.map(windows_of, batched=True, remove_columns=names, desc="windows"), data, min_length)


def documents_in_lanes(
    data: Dataset, collator: Callable[[list[dict[str, object]]], Collated], lanes: int, process: int, processes: int
) -> Iterator[Collated]:
    """Collate a process' share of the documents, so many side by side, window by window; `_lanes` says which lane each row is in.

    Every window is there once in all, with its index in the set in `_places`: figures are the same on any number of processes.
    """
    begins: Sequence[bool] = data[BEGINS_COLUMN] if BEGINS_COLUMN in data.column_names else [True] * len(data)
    waiting = deque(documents_of(begins)[process::processes])
    reading: dict[int, Iterator[int]] = {}
    while True:
        chosen: dict[int, int] = {}
        for lane in range(lanes):
            while (row := next(reading.get(lane, iter(())), None)) is None and waiting:
                reading[lane] = iter(waiting.popleft())
            if row is not None:
                chosen[lane] = row
        if not chosen:
            return
        rows = [{**data[i], BEGINS_COLUMN: begins[i] or i == 0} for i in chosen.values()]
        yield {**collator(rows), "_lanes": list(chosen), "_places": [(i, 0) for i in chosen.values()]}
