"""Training rows of like lengths may go together, in an order that the seed and the epoch alone decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from refine_nsp.errors import RefineError

TOKENS = ("input_ids", "prompt_ids")  # the columns that hold the tokens of text, and of prompts


class ByLength(Sampler[int]):
    """Shuffle rows, then sort them by length within stretches of many steps, as transformers does; a resumed run has the same order.

    Args:
        lengths: tokens of each row. examples: how many make an optimizer step, which are to have like lengths.
    """

    def __init__(self, lengths: Sequence[int], examples: int, seed: int) -> None:
        self.lengths, self.examples, self.seed, self.epoch = lengths, examples, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(list(self.lengths), self.examples, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, each of which has another order."""
        self.epoch = epoch


def lengths_of(data: Dataset, column: str) -> list[int]:
    """Count the tokens of each row, or read them from a column that says it.

    Raises:
        RefineError: the column is missing, or rows have no tokens.
    """
    names = getattr(data, "column_names", None) or []
    if column in names:
        return [int(length) for length in data[column]]
    if column != "length":
        raise RefineError(f"length_column_name={column!r} is no column of the training data; it has {', '.join(names) or 'none'}")
    tokens = next((name for name in TOKENS if name in data[0]), None)
    if tokens is None:
        raise RefineError(f"train_sampling_strategy='group_by_length' needs a column {column!r} or tokens ({', '.join(TOKENS)})")
    return [len(data[i][tokens]) for i in range(len(data))]
