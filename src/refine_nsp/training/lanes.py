"""Documents become windows, and windows lanes: the next window of a document stands in the same row of the next optimizer step's batch.

A lane is a row of the global batch, counted over all processes and micro-batches. When a document ends, its lane takes the next one of a
list that the seed shuffles; the list is shuffled again and begun anew when it ends, so that no lane ever waits. Which window stands where
follows from the data, the seed and the number of lanes, and from nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeVar

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler

from refine_nsp.errors import RefineError
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.training.data import BEGINS_COLUMN, LENGTHS_COLUMN, TOKENS_COLUMN, Collated, cut_windows
from refine_nsp.training.stream import State, Stream

T = TypeVar("T")
Row = dict[str, object]
FIRST: State = {"epoch": 0, "state": None}  # where the text begins


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
        reading: list[Iterator[int]] = [iter(()) for _ in range(self.lanes)]
        rows = in_lanes(self._documents(), reading)
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


@dataclass
class Document(Iterator[Row]):
    """Give out the windows of a streamed document.

    Attributes:
        begin: where in the text it begins, None for a lane that has read nothing yet. rows: its windows. given: how many were given out.
    """

    begin: State | None
    rows: list[Row]
    given: int = 0

    def __next__(self) -> Row:
        if self.given == len(self.rows):
            raise StopIteration
        self.given += 1
        return self.rows[self.given - 1]


class LaneStream(Stream):
    """Iterate over streamed windows by lanes. A lane holds its document in memory.

    A checkpoint notes where in the text the document of each lane begins, and how many of its windows were given out: a resumed run reads
    these documents again and no others. Where a buffer shuffles, it reads the text from the beginning, and leaves out what was given out.
    """

    def __init__(self, data: IterableDataset, every: int, keep: int, lanes: int) -> None:
        super().__init__(data, every, keep)
        self.lanes = lanes
        self.reading: list[Iterator[Row]] = []  # the document of each lane
        self.ahead: State = FIRST  # where the first document begins that no lane has read

    def __iter__(self) -> Iterator[Row]:
        start, self.start = self.start, None
        place: State = {"ahead": FIRST, "lanes": [(None, 0)] * self.lanes} | ({} if start is None else start["state"])
        given_out = place.get("given_out", 0)
        self.places.clear()
        self.row = 0 if start is None or given_out else int(start["row"])
        self.reading = [self._document(begin, given) for begin, given in place["lanes"]]
        self.ahead = place["ahead"]
        for example in in_lanes(self._documents(place["ahead"]), self.reading, self.row):
            self.row += 1
            if self.row % self.every == 0:
                self.places.append((self.row, self.place()))
            if self.row > given_out:
                yield example

    def place(self) -> State:
        """Return where each lane reads and where the next document begins, or how many rows were given out."""
        if self.refills:
            return {"given_out": self.row}
        lanes = [(d.begin, d.given) for d in self.reading if isinstance(d, Document)]
        return {"ahead": self.ahead, "lanes": lanes}

    def _document(self, begin: State | None, given: int) -> Document:
        """Read the document again that begins at a place, without the windows that were given out."""
        return Document(begin, [] if begin is None else next(self._documents(begin)).rows, given)

    def _documents(self, begin: State) -> Iterator[Document]:
        """Yield one document after another from a place on, which must begin one, and note where the next begins."""
        rows: list[Row] = []
        for place, row in self._rows(begin):
            if row[BEGINS_COLUMN] and rows:
                self.ahead = place
                yield Document(begin, rows)
                begin, rows = place, []
            rows.append(row)

    def _rows(self, place: State) -> Iterator[tuple[State, Row]]:
        """Yield each window from a place on, epoch after epoch, and the place before it."""
        self.epoch = place["epoch"]
        self.data.load_state_dict(place["state"])  # it is of one epoch; `datasets` begins the following ones at their beginning
        while True:
            self.data.set_epoch(self.epoch)
            empty = place["state"] is None
            for row in self.data:
                empty = False
                yield place, row
                place = {"epoch": self.epoch, "state": None if self.refills else self.data.state_dict()}
            if empty:
                raise RefineError(
                    "the streamed text has no document that is long enough, which min_prefix, one position and K need"
                )
            self.check_files()
            self.epoch += 1
            place = {"epoch": self.epoch, "state": None}


def in_lanes(documents: Iterator[Iterator[T]], reading: list[Iterator[T]], row: int = 0) -> Iterator[T]:
    """Yield windows in turns of one for each lane from `row` on, from what each is `reading`, a list that is kept up to date.

    A lane whose document has ended takes the next of `documents`, which must not end.
    """
    for turn in count(row):
        lane = turn % len(reading)
        while not (window := list(islice(reading[lane], 1))):
            reading[lane] = next(documents)
        yield window[0]


def documents_of(begins: Sequence[bool]) -> list[range]:
    """Find the rows of each document. The first row begins one, whatever it says: the rows before it may have been kept back."""
    firsts = [i for i, begin in enumerate(begins) if begin or i == 0]
    return [range(first, last) for first, last in zip(firsts, [*firsts[1:], len(begins)], strict=True)]


def in_windows(data: Dataset | IterableDataset, max_length: int, min_length: int) -> Dataset | IterableDataset:
    """Cut rows of `input_ids`, each a document, into windows for carried states; rows that are windows already stay as they are.

    Raises:
        RefineError: packed rows, or no document that is long enough.
    """
    names = data.column_names or list(next(iter(data), {}))  # a stream that was mapped does not say its columns
    if BEGINS_COLUMN in names or TOKENS_COLUMN not in names:
        return data
    if LENGTHS_COLUMN in names:
        raise RefineError(
            "carry_states reads a document window by window, and packed rows hold several; give a row to each document"
        )

    def windows_of(batch: Mapping[str, list]) -> dict[str, list]:
        cut = [cut_windows(ids, max_length, min_length, shared=1) for ids in batch[TOKENS_COLUMN]]
        others = {
            name: [value for value, windows in zip(values, cut, strict=True) for _ in windows]
            for name, values in batch.items()
            if name != TOKENS_COLUMN
        }
        begins = [i == 0 for windows in cut for i in range(len(windows))]
        return {TOKENS_COLUMN: [w for windows in cut for w in windows], BEGINS_COLUMN: begins, **others}

    if isinstance(data, IterableDataset):
        return data.map(windows_of, batched=True, batch_size=16, remove_columns=names)
    result: Dataset = data.map(windows_of, batched=True, remove_columns=names, desc="windows")
    if len(result) == 0:
        raise RefineError(f"no document has {min_length} tokens, which a step needs; got {len(data)} documents, all shorter")
    return result


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
