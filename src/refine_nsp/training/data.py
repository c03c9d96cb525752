"""Files (or a hub name) become windows of tokens, each of one document only, so that no state ever crosses a document boundary."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.fields import Reader, check_read, setting
from refine_nsp.prompts.encoding import content_key
from refine_nsp.training.mixture import Stopping, as_list, check_weights, one_each

TEXT_COLUMN, TOKENS_COLUMN, LENGTHS_COLUMN = "text", "input_ids", "lengths"
ANSWER_COLUMN = "answer_start"  # the first token of the answer in a row of a prompt and its answer; 0 or none: a row of text
BEGINS_COLUMN = "begins"  # where states are carried: whether a window is the first of its document
Collated = dict[str, Any]  # a batch as a collator makes it: tensors, and lists of whatever the columns of a dataset hold

# Who reads settings of the data.
WHOLE = Reader("streaming=False", lambda a: not a.streaming)
NO_OTHER_VALIDATION = Reader("no validation_dataset", lambda a: a.validation_dataset is None)
KEPT_BACK = Reader("a validation_fraction above 0", lambda a: a.validation_fraction > 0)
VALIDATION = Reader(
    "validation, by validation_dataset or (without streaming) validation_fraction",
    lambda a: not NO_OTHER_VALIDATION(a) or (WHOLE & KEPT_BACK)(a),
)
SEVERAL = Reader("several names in dataset_name", lambda a: len(as_list(a.dataset_name)) > 1)
ANSWERS = Reader("answer_dataset", lambda a: a.answer_dataset is not None)
WEIGHED = Reader("dataset_weights or answer_dataset", lambda a: a.dataset_weights is not None or ANSWERS(a))
NO_LEAST_SCORE = Reader("no min_context_score", lambda a: a.min_context_score is None)


@dataclass
class DataArguments:
    """Say which text to train on.

    Attributes:
        dataset_name: a file (text, json, jsonl, csv, tsv, parquet, arrow; also compressed), a folder of them, a glob, a folder saved by
            `datasets`, or a hub name. Several are mixed.
        dataset_weights: the share of tokens of each of several names, summing to 1; default: all windows of each, once.
        dataset_stopping: a mixture ends where a source runs out (first_exhausted), or sources that run out begin again until each has
            been read once (all_exhausted).
        mixture_seed: seeds which windows of each source a mixture takes first.
        dataset_config: configuration of a hub dataset, or of a folder whose README lists several; of several names one for all that are
            not files, or one each.
        dataset_split: the split of a hub dataset or a folder, as `load_dataset` takes it (train, train[:10%], train+test); one for all, or
            one each.
        text_column: column that holds the text, or each row's token ids, which are used as they are; one for all, or one each. Where
            there is no `text` and no other is named, `input_ids` is taken.
        min_context_score: train on the documents alone whose column `context_score`, which `refine-nsp score` writes, is at least this.
        context_score_share: train on the documents alone that have the highest scores, until they hold this share of each source's tokens.
        answer_dataset: rows of prompts and answers, as `posttrain` takes them, among the text. Only the answers' tokens are learned, by
            their cross-entropy alone; of several answers the first.
        answer_share: their share of all tokens, prompts included.
        max_answer_tokens: longer answers are cut (and get no EOS).
        apply_chat_template: make prompts that are text a user's turn in the tokenizer's chat template. Messages always go through it.
        validation_dataset: the same for validation, with figures of its own for each of several; of several splits, validation is read,
            or test. None: a fixed, seeded share of the documents is kept back, of each source.
        validation_fraction: that share (of the windows, when there is one document only). 0: no validation.
        validation_windows: at most so many windows are validated on, of each source.
        packing: put several short documents in one example; in a batch each stays a row of its own, so nothing leaks.
        streaming: do not load or cache everything first (needs max_steps).
        split_seed: seeds the choice of the share that is kept back.
        dataset_num_proc: processes that tokenize text which is not streamed.
    """

    dataset_name: str | list[str] | None = setting(None, common=True)
    dataset_weights: list[float] | None = setting(None, read_by=SEVERAL, common=True)
    dataset_stopping: Stopping = setting("first_exhausted", read_by=WEIGHED, common=True)
    mixture_seed: int = setting(0, read_by=WEIGHED & WHOLE)
    min_context_score: float | None = setting(None, common=True)
    context_score_share: float | None = setting(None, read_by=NO_LEAST_SCORE & WHOLE, common=True)
    answer_dataset: str | None = setting(None, common=True)
    answer_share: float | None = setting(None, read_by=ANSWERS, common=True)
    max_answer_tokens: int = setting(64, read_by=ANSWERS)
    apply_chat_template: bool = setting(False, read_by=ANSWERS)
    dataset_config: str | list[str] | None = setting(None)
    dataset_split: str | list[str] = setting("train")
    text_column: str | list[str] = setting(TEXT_COLUMN, common=True)
    validation_dataset: str | list[str] | None = setting(None, common=True)
    validation_fraction: float = setting(0.05, read_by=NO_OTHER_VALIDATION & WHOLE)
    validation_windows: int = setting(64, read_by=VALIDATION)
    packing: bool = setting(False, common=True)
    streaming: bool = setting(False, common=True)
    split_seed: int = setting(0, read_by=NO_OTHER_VALIDATION & WHOLE & KEPT_BACK)
    dataset_num_proc: int | None = setting(None, read_by=WHOLE, common=True)

    def __post_init__(self) -> None:
        check_read(self)
        check_weights(self.names, self.dataset_weights)
        check_shares(self)
        if len(self.names) > 1 and self.streaming and self.dataset_weights is None:
            raise RefineError("streamed sources do not say how much they hold: give the share of each with dataset_weights")
        given = {name: getattr(self, name) for name in ("text_column", "dataset_config", "dataset_split")}
        each = {name: one_each(name, x, len(self.names)) for name, x in given.items() if x is not None and self.names}
        told = (each[name] for name in ("dataset_config", "dataset_split") if name in each)
        sources = list(zip(self.names, *told, strict=True))
        if twice := next((source[0] for source in sources if sources.count(source) > 1), None):
            raise RefineError(f"dataset_name has {twice} twice; name it once, and give it the sum of its weights")

    @property
    def names(self) -> list[str]:
        """List the names of the text to train on."""
        return as_list(self.dataset_name)

    @property
    def all_names(self) -> list[str]:
        """List the names of all that is trained on, answers too."""
        return [*self.names, *as_list(self.answer_dataset)]


def check_shares(arguments: DataArguments) -> None:
    """Refuse shares that leave nothing on one side (RefineError)."""
    a = arguments
    if a.answer_dataset is not None and a.answer_share is None:
        raise RefineError(f"answer_dataset={a.answer_dataset} needs answer_share, its share of all tokens, for example 0.1")
    if a.answer_share is not None and not 0 < a.answer_share < 1:
        raise RefineError(f"answer_share={a.answer_share:g}: expected a share of all tokens above 0 and below 1")
    if a.context_score_share is not None and not 0 < a.context_score_share <= 1:
        raise RefineError(f"context_score_share={a.context_score_share:g}: expected a share of tokens above 0, at most 1")


def cut_windows(ids: Sequence[int], max_length: int, min_length: int, shared: int = 0) -> list[list[int]]:
    """Cut tokens into consecutive windows of `max_length`, each beginning with the last `shared` tokens of the one before; a shorter last
    one is kept if it has at least `min_length`."""
    windows = [list(ids[s : s + max_length]) for s in range(0, len(ids), max_length - shared)]
    return [w for w in windows if len(w) >= min_length]


def cut_rows(
    rows: Mapping[str, list],
    documents: Sequence[Sequence[int]],
    max_length: int,
    min_length: int,
    others: Sequence[str],
    carried: bool,
) -> dict[str, list]:
    """Cut the tokens of each row's document into windows, which keep the row's values of the columns `others`. With `carried` they share a
    token, and the column `begins` says which are the first of a document."""
    cut = [cut_windows(ids, max_length, min_length, shared=int(carried)) for ids in documents]
    from_row = [i for i, own in enumerate(cut) for _ in own]
    begins = {BEGINS_COLUMN: [at == 0 for own in cut for at in range(len(own))]} if carried else {}
    return {
        TOKENS_COLUMN: [w for own in cut for w in own],
        **{name: [rows[name][i] for i in from_row] for name in others},
        **begins,
    }


def not_empty(windows: Dataset, documents: Dataset, min_length: int) -> Dataset:
    """Return the windows of documents. RefineError where there are none."""
    if len(windows) == 0:
        raise RefineError(
            f"no document has {min_length} tokens, which min_prefix, one position and rollout_length need; all {len(documents)} are shorter"
        )
    return windows


def tokenize(
    data: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    max_length: int,
    min_length: int,
    packing: bool,
    keep_columns: bool = False,
    num_proc: int | None = None,
    place_of: Callable[..., str | None] | None = None,
    carried: bool = False,
) -> Dataset | IterableDataset:
    """Make windows of tokens: rows of `input_ids`, and `lengths` of the documents in them when packed. They are cached by content.

    Args:
        column: holds texts, or the tokens of each document. keep_columns: every window keeps its document's other columns (packed: a
            list with a value per document). num_proc: processes for text that is not streamed. place_of: finds the file and row of a
            value, for errors. carried: windows are to follow each other; see `cut_rows`.

    Raises:
        RefineError: no document is long enough, or a row holds neither text nor tokens of the vocabulary.
    """
    names = data.column_names or []
    column = TOKENS_COLUMN if column == TEXT_COLUMN and TEXT_COLUMN not in names and TOKENS_COLUMN in names else column
    if column == TOKENS_COLUMN and LENGTHS_COLUMN in names:
        raise RefineError(
            "rows of input_ids with lengths are packed already, and cutting them would let a state leak from one document to the next; "
            "give a row to each document, and --packing to pack them again"
        )
    others = [name for name in names if name != column] if keep_columns else []

    def windows_of(batch: Mapping[str, list]) -> dict[str, list]:
        try:
            documents = tokens_of(batch[column], column, tokenizer)
        except RefineError as error:
            where = place_of(is_wrong=lambda value: not has_tokens(value, column, tokenizer)) if place_of else None
            raise RefineError(f"{where}: {error}") if where else error from None
        rows = cut_rows(batch, documents, max_length, min_length, others, carried)
        return packed(rows, max_length) if packing else rows

    features = None
    if others and data.features is not None:  # a first batch without values would not tell the types
        kept = {name: [data.features[name]] if packing else data.features[name] for name in others}
        lengths = {LENGTHS_COLUMN: [Value("int64")]} if packing else {}
        begins = {BEGINS_COLUMN: Value("bool")} if carried else {}
        features = Features({TOKENS_COLUMN: [Value("int32")], **lengths, **kept, **begins})
    cut = partial(data.map, windows_of, batched=True, batch_size=1000 if packing else 16)
    cut = partial(cut, remove_columns=data.column_names, features=features)
    if isinstance(data, IterableDataset):
        return cut()
    # The rows are named by content, since a pickled tokenizer has another fingerprint once it has been used.
    key = (data._fingerprint, content_key(tokenizer), column, max_length, min_length, packing, tuple(others))
    processes = num_proc and min(num_proc, len(data))
    fingerprint = Hasher.hash((*key, "carried") if carried else key)
    return not_empty(cut(desc="tokenize", new_fingerprint=fingerprint, num_proc=processes), data, min_length)


def in_windows(data: Dataset | IterableDataset, max_length: int, min_length: int) -> Dataset | IterableDataset:
    """Cut rows of `input_ids`, each a document, into windows for carried states; rows that are windows already stay as they are.
    RefineError for packed rows, or where no document is long enough."""
    names = data.column_names or list(next(iter(data), {}))  # a stream that was mapped does not say its columns
    if BEGINS_COLUMN in names or TOKENS_COLUMN not in names:
        return data
    if LENGTHS_COLUMN in names:
        raise RefineError("carry_states reads documents window by window, and packed rows hold several; give each a row")

    def windows_of(batch: Mapping[str, list]) -> dict[str, list]:
        others = [name for name in names if name != TOKENS_COLUMN]
        return cut_rows(batch, batch[TOKENS_COLUMN], max_length, min_length, others, carried=True)

    if isinstance(data, IterableDataset):
        return data.map(windows_of, batched=True, batch_size=16, remove_columns=names)
    return not_empty(data.map(windows_of, batched=True, remove_columns=names, desc="windows"), data, min_length)


def tokens_of(values: Sequence[object], column: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each document of a column: the tokenizer's for texts, rows of token ids as they are; missing ones are empty.
    RefineError for a value that is neither text nor tokens, or tokens that the tokenizer does not have."""
    texts = [value or "" for value in values if value is None or isinstance(value, str)]
    if len(texts) == len(values):
        return tokenizer(texts, add_special_tokens=True)["input_ids"]
    return [[] if value is None else checked_ids(value, column, len(tokenizer)) for value in values]


def has_tokens(value: object, column: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether one value of a column is text, or tokens that the tokenizer has."""
    try:
        tokens_of([None if isinstance(value, str) else value], column, tokenizer)
    except RefineError:
        return False
    return True


def checked_ids(value: object, column: str, vocabulary: int) -> list[int]:
    """Return a row's token ids. RefineError unless all are whole numbers of the vocabulary."""
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of lists
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise RefineError(
            f"column {column!r} holds {str(value)[:60]!r}, a {type(value).__name__}; expected text in every row, or token ids in every row"
        )
    if ids.size and not 0 <= (wrong := int(ids.min() if ids.min() < 0 else ids.max())) < vocabulary:
        raise RefineError(
            f"column {column!r} holds the token {wrong}, and the tokenizer has the tokens 0 to {vocabulary - 1}; was another one used?"
        )
    return ids.tolist()


def packed(rows: Mapping[str, list], max_length: int) -> dict[str, list]:
    """Put windows together in examples: their tokens one after the other, `lengths`, and lists of their other columns' values."""
    windows = rows["input_ids"]
    bins = pack(windows, max_length)
    return {
        "input_ids": [[token for w in members for token in windows[w]] for members in bins],
        "lengths": [[len(windows[w]) for w in members] for members in bins],
        **{name: [[values[w] for w in members] for members in bins] for name, values in rows.items() if name != "input_ids"},
    }


def pack(windows: Sequence[Sequence[int]], max_length: int) -> list[list[int]]:
    """Choose which windows go into each example of at most `max_length` tokens: first fit, longest first."""
    bins: list[tuple[int, list[int]]] = []  # tokens, windows
    for w in sorted(range(len(windows)), key=lambda w: len(windows[w]), reverse=True):
        for i, (tokens, members) in enumerate(bins):
            if tokens + len(windows[w]) <= max_length:
                bins[i] = (tokens + len(windows[w]), [*members, w])
                break
        else:
            bins.append((len(windows[w]), [w]))
    return [members for _, members in bins]


def collate(examples: Iterable[Mapping[str, Any]]) -> Collated:
    """Make a batch of rows: input_ids [B, T] right-padded with 0 and lengths [B]; context_scores [B, T] and answer_start [B] where rows
    have them; other columns as lists of B values; and in _places the (example, document) of each row in the batch, by which its
    randomness is seeded. A packed example, whose other columns are lists, becomes a row per document, so that no state is shared."""
    rows: list[Tensor] = []
    places: list[tuple[int, int]] = []
    scores: list[Tensor] = []
    columns: dict[str, list[Any]] = {}
    for i, example in enumerate(examples):
        if "input_ids" not in example:
            raise RefineError(
                f"rows of training need a column input_ids, there are {', '.join(example)}; rows of a dataset with a column text are "
                "tokenized by the trainer, those of files by prepare_data, prompts with answers by prepare_answers (PostTrainer)"
            )
        packed = "lengths" in example
        cuts = list(example["lengths"]) if packed else [len(example["input_ids"])]
        rows += torch.as_tensor(example["input_ids"]).split(cuts)
        places += [(i, document) for document in range(len(cuts))]
        for name, value in example.items():
            if name == "context_scores":
                # Scores are read as they are kept: those of a float64 model are in float64.
                scores += torch.as_tensor(value, dtype=torch.float64).split(cuts)
            elif name not in ("input_ids", "lengths"):
                columns.setdefault(name, []).extend([value] * len(cuts) if value is None or not packed else value)
    padded = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(r) for r in rows])
    batch: Collated = {"input_ids": padded(rows, batch_first=True), "lengths": lengths, "_places": places}
    if scores:
        batch["context_scores"] = padded(scores, batch_first=True)
    if (starts := columns.pop(ANSWER_COLUMN, None)) is not None:
        batch[ANSWER_COLUMN] = torch.tensor([start or 0 for start in starts])
    return {**batch, **columns}


def check_fraction(fraction: float) -> None:
    """Refuse a share for validation that leaves nothing to train on (RefineError)."""
    if not 0 <= fraction < 1:
        raise RefineError(f"validation_fraction={fraction}: expected a share of the data, 0 or more and below 1")


def split_documents(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Split documents for training and validation, the same for the same data and seed; None for the latter if there is one document."""
    check_fraction(fraction)
    if fraction == 0 or len(data) < 2:
        return data, None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    kept_back = min(max(1, round(len(data) * fraction)), len(data) - 1)
    return data.select(sorted(order[kept_back:])), data.select(sorted(order[:kept_back]))


def validation_splits(dataset_split: str) -> tuple[str, ...]:
    """Name the splits that a data set for validation is read from, in that order: the one for it, or else what training reads."""
    return "validation", "test", re.split(r"[\[+]", dataset_split)[0]


def first_rows(data: Dataset | IterableDataset, count: int) -> Dataset:
    """Take at most `count` rows, into memory where they were streamed."""
    return data.select(range(min(len(data), count))) if isinstance(data, Dataset) else Dataset.from_list(list(data.take(count)))
