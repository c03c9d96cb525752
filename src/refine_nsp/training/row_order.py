"""Training rows are read by length or by lanes, in an order that the data, the seed and the epoch alone decide.

A lane is a row of the global batch, counted over all processes and micro-batches: the next window of a document stands in the same row of
the next optimizer step's batch. When a document ends, its lane takes the next one of a list that the seed shuffles; the list is shuffled
again and begun anew when it ends, so that no lane ever waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import TypeVar

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from refine_nsp.errors import RefineError
from refine_nsp.nsp.seeds import generator_of

T = TypeVar("T")
TOKENS = ("input_ids", "prompt_ids")  # the columns that hold the tokens of text, and of prompts


class ByLength(LengthGroupedSampler):
    """Shuffle rows, then sort them by length within stretches of many steps of `examples` each, as transformers does; a resumed run has
    the same order."""

    def __init__(self, lengths: list[int], examples: int, seed: int) -> None:
        super().__init__(examples, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, each of which has another order."""
        self.epoch = epoch


def lengths_of(data: Dataset, column: str) -> list[int]:
    """Count the tokens of each row, or read them from a column that says it. RefineError where there are neither."""
    names = getattr(data, "column_names", None) or []
    if column in names:
        return [int(length) for length in data[column]]
    if column != "length":
        raise RefineError(f"length_column_name={column!r} is no column of the training data; it has {', '.join(names) or 'none'}")
    tokens = next((name for name in TOKENS if name in data[0]), None)
    if tokens is None:
        raise RefineError(f"train_sampling_strategy='group_by_length' needs a column {column!r} or tokens ({', '.join(TOKENS)})")
    return [len(data[i][tokens]) for i in range(len(data))]


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
        before = self.epoch * len(self)
        reading: list[Iterator[int]] = [iter(()) for _ in range(self.lanes)]
        return islice(in_lanes(self._documents(), reading), before, before + len(self))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which says how many turns came before."""
        self.epoch = epoch

    def _documents(self) -> Iterator[Iterator[int]]:
        """Yield the documents again and again, in another order each time."""
        n = len(self.documents)
        for time in count():
            order = torch.randperm(n, generator=generator_of(self.seed, time)).tolist() if self.shuffled else range(n)
            yield from (iter(self.documents[i]) for i in order)


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
