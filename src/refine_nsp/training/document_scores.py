"""Documents are scored by what their context is worth: the mean over their tokens of how much far context changes predictions.

It is LongFilter's measure of a document for long-context training (ICLR 2026), by the scores that training weighs tokens by. A document
that is read as well by its last W tokens has a score near 0, however hard it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import nn
from transformers import PreTrainedTokenizerBase

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.files import made_whole, make_folder
from refine_nsp.processes import process_state
from refine_nsp.training.data import TEXT_COLUMN, TOKENS_COLUMN, tokenize
from refine_nsp.training.scores import with_context_scores
from refine_nsp.training.sources import COUNT_COLUMN, SCORE_COLUMN

NUMBER_COLUMN = "document_number"
ENDINGS = (".jsonl", ".parquet")


def score_documents(
    documents: Dataset,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: NSPConfig,
    max_length: int,
    column: str = TEXT_COLUMN,
    autocast: torch.dtype | None = None,
    quiet: bool = False,
) -> Dataset:
    """Return the documents with two more columns: `context_score`, the mean context score of a document's tokens in nats (none where it has
    no token), and `num_tokens`. Documents are read in windows of `max_length` tokens, as training reads them, and their tokens' scores
    are kept in the cache of `datasets`, so that an interrupted scoring continues.

    Args:
        config: `context_score`, `local_window` and `local_span` say which score. autocast: what products are computed in.

    Raises:
        RefineError: windows too short for any token to have a score, or documents with columns of these names.
    """
    check_length(max_length, config)
    if taken := [name for name in (SCORE_COLUMN, COUNT_COLUMN) if name in documents.column_names]:
        raise RefineError(f"the documents have a column {taken[0]!r} already; score the file they were made of, or rename it")
    column = TOKENS_COLUMN if column == TEXT_COLUMN and TEXT_COLUMN not in documents.column_names else column
    numbers: np.ndarray = np.arange(len(documents))
    only = documents.select_columns([column]).add_column(
        NUMBER_COLUMN, pa.array(numbers), new_fingerprint=Hasher.hash((documents._fingerprint, column, NUMBER_COLUMN))
    )
    state = process_state()
    with state.main_process_first():  # the others of a machine read what the first one leaves in the cache
        windows = tokenize(only, tokenizer, column, max_length, 1, packing=False, keep_columns=True)
    assert isinstance(windows, Dataset)
    scored = with_context_scores(windows, model, config, quiet, autocast, state.process_index, state.num_processes)
    totals, counts = totals_of(scored, len(documents))
    means = [total / count if count else None for total, count in zip(totals.tolist(), counts.tolist(), strict=True)]
    features = Features({SCORE_COLUMN: Value("float64"), COUNT_COLUMN: Value("int64")})
    more = Dataset.from_dict({SCORE_COLUMN: means, COUNT_COLUMN: counts.tolist()}, features)
    return concatenate_datasets([documents, more], axis=1)


def totals_of(windows: Dataset, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum the scores of each document's tokens, and count them, over its windows."""
    totals, counts = np.zeros(documents), np.zeros(documents, dtype=np.int64)
    for table in windows.select_columns([NUMBER_COLUMN, "context_scores"]).with_format("arrow").iter(1000):
        numbers = table[NUMBER_COLUMN].to_numpy()
        lengths = pyarrow.compute.list_value_length(table["context_scores"]).to_numpy()
        scores = pyarrow.compute.list_flatten(table["context_scores"]).to_numpy()
        np.add.at(totals, np.repeat(numbers, lengths), scores)
        np.add.at(counts, numbers, lengths)
    return totals, counts


def check_length(max_length: int, config: NSPConfig) -> None:
    """Refuse windows in which no token has a score (RefineError)."""
    if max_length <= 2 * config.local_window:
        raise RefineError(
            f"max_length={max_length} leaves no token to score, which needs more than twice local_window={config.local_window}"
        )


def check_output(path: Path, inputs: Sequence[str]) -> None:
    """Refuse a file that cannot be written, before anything is scored: another kind, a folder, or the data itself (RefineError)."""
    if path.suffix not in ENDINGS:
        raise RefineError(f"--output {path}: expected a file that ends with {' or '.join(ENDINGS)}")
    if path.is_dir():
        raise RefineError(f"{path} is a folder; name a file to write")
    if any(path.resolve() == Path(name).resolve() for name in inputs):
        raise RefineError(f"--output {path} is the data itself; name another file")


def write_rows(rows: Dataset, path: Path) -> Path:
    """Write rows as jsonl or parquet, by the file's ending, whole or not at all."""
    make_folder(path.parent)
    with made_whole(path.with_name(f"{path.name}.tmp"), path) as temporary:
        if path.suffix == ".parquet":
            rows.to_parquet(temporary)
        else:
            with temporary.open("w", encoding="utf-8") as file:  # the writer of `datasets` rounds numbers
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return path
