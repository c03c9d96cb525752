"""Training rows of like lengths may go together, in an order that the seed and the epoch alone decide."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from refine_nsp.errors import RefineError

TOKENS = ("input_ids", "prompt_ids")  # the columns that hold the tokens of text, and of prompts


class ByLength(LengthGroupedSampler):
    """Shuffle rows, then sort them by length within stretches of many steps, as transformers does; a resumed run has the same order.

    Args:
        lengths: tokens of each row. examples: how many make an optimizer step, which are to have like lengths.
    """

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
