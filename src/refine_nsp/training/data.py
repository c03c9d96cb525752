"""From files (or a hub name) to token windows, each of one document only, so that no state ever crosses a document boundary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from torch import Tensor

from refine_nsp.errors import RefineError
from refine_nsp.text.reading import read_documents


@dataclass
class DataArguments:
    """Which text to train on.

    Attributes:
        dataset_name: a file (text, jsonl, parquet, arrow), a folder of them, a glob, a folder saved by `datasets`, or a hub name.
        dataset_config: configuration of a hub dataset.
        dataset_split: split of a hub dataset.
        text_column: column that holds the text.
        validation_dataset: the same for validation; None: a fixed, seeded share of the documents is kept back.
        validation_fraction: that share (of the windows, when there is one document only). 0: no validation.
        validation_windows: at most so many windows are validated on.
        packing: put several short documents in one example; in a batch each stays a row of its own, so nothing leaks.
        streaming: do not load or cache everything first (needs max_steps).
        split_seed: of the validation split.
    """

    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    validation_dataset: str | None = None
    validation_fraction: float = 0.05
    validation_windows: int = 64
    packing: bool = False
    streaming: bool = False
    split_seed: int = 0


# --- tokens and windows -----------------------------------------------------------------------------------------------


def cut_windows(ids: Sequence[int], max_length: int, min_length: int) -> list[list[int]]:
    """Consecutive windows of `max_length` tokens; a last one of at least `min_length` is kept shorter, below that dropped."""
    windows = [list(ids[s : s + max_length]) for s in range(0, len(ids), max_length)]
    return [w for w in windows if len(w) >= min_length]


def tokenize(
    data: Dataset | IterableDataset, tokenizer: Any, column: str, max_length: int, min_length: int, packing: bool
) -> Dataset | IterableDataset:
    """Windows of tokens: rows of `input_ids`, and `lengths` of the documents in them when packed. Cached by content.

    Raises:
        RefineError: no document is long enough.
    """

    def windows_of(batch: Mapping[str, list]) -> dict[str, list]:
        windows: list[list[int]] = []
        for ids in tokenizer([t or "" for t in batch[column]], add_special_tokens=True)["input_ids"]:
            windows += cut_windows(ids, max_length, min_length)
        return pack(windows, max_length) if packing else {"input_ids": windows}

    options: dict[str, Any] = {"batched": True, "remove_columns": data.column_names, "batch_size": 1000 if packing else 16}
    if isinstance(data, IterableDataset):
        return data.map(windows_of, **options)
    # Named by content: pickling a tokenizer gives another fingerprint once it has been used.
    key = (data._fingerprint, tokenizer.backend_tokenizer.to_str(), column, max_length, min_length, packing)
    result = data.map(windows_of, desc="tokenize", new_fingerprint=Hasher.hash(key), **options)
    if len(result) == 0:
        raise RefineError(
            f"no document has {min_length} tokens, which min_prefix, one position and rollout_length need; got {len(data)} "
            "documents, all shorter"
        )
    return result


def pack(windows: list[list[int]], max_length: int) -> dict[str, list]:
    """First-fit, longest first: examples of at most `max_length` tokens with the `lengths` of the documents in them."""
    bins: list[tuple[list[int], list[int]]] = []
    for window in sorted(windows, key=len, reverse=True):
        for ids, lengths in bins:
            if len(ids) + len(window) <= max_length:
                ids += window
                lengths.append(len(window))
                break
        else:
            bins.append((list(window), [len(window)]))
    return {"input_ids": [ids for ids, _ in bins], "lengths": [lengths for _, lengths in bins]}


def collate(examples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """input_ids [B, T] right-padded with 0, lengths [B]. A packed example becomes a row per document: no state is shared."""
    rows: list[Tensor] = []
    for example in examples:
        ids = torch.as_tensor(example["input_ids"])
        rows += ids.split(list(example["lengths"])) if "lengths" in example else [ids]
    lengths = torch.tensor([len(r) for r in rows])
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), "lengths": lengths}


def split_documents(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Train and validation documents, disjoint, the same for the same data and seed; None when there is only one document."""
    held = round(len(data) * fraction)
    if fraction <= 0 or len(data) < 2:
        return data, None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(max(1, held), len(data) - 1)
    return data.select(sorted(order[held:])), data.select(sorted(order[:held]))


def prepare_data(
    arguments: DataArguments, tokenizer: Any, max_length: int, min_length: int
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Training and validation windows. See `DataArguments` for what decides them; raises RefineError for bad input."""
    if arguments.dataset_name is None:
        raise RefineError("no data: name a file, folder, glob or hub dataset with --dataset_name")
    if max_length < min_length:
        raise RefineError(
            f"max_length={max_length} is below {min_length}, the tokens a position needs (min_prefix + 1 + rollout_length)"
        )
    a = arguments
    source: dict[str, Any] = {
        "columns": (a.text_column,), "config": a.dataset_config, "split": a.dataset_split, "streaming": a.streaming,
    }  # fmt: skip
    data = read_documents(arguments.dataset_name, **source)
    held: Dataset | IterableDataset | None = None
    if arguments.validation_dataset is not None:
        held = read_documents(arguments.validation_dataset, **source)
    elif isinstance(data, Dataset):
        data, held = split_documents(data, arguments.validation_fraction, arguments.split_seed)
    cut: dict[str, Any] = {"column": arguments.text_column, "max_length": max_length, "min_length": min_length}
    train = tokenize(data, tokenizer, packing=arguments.packing, **cut)
    if held is not None:
        held = tokenize(held, tokenizer, packing=False, **cut)
    elif isinstance(train, Dataset) and arguments.validation_fraction > 0 and len(train) > 1:
        count = max(1, round(len(train) * arguments.validation_fraction))  # one document: its end
        train, held = train.select(range(len(train) - count)), train.select(range(len(train) - count, len(train)))
    if isinstance(held, Dataset):
        held = held.select(range(min(len(held), arguments.validation_windows)))
    return train, held if isinstance(held, Dataset) else None
