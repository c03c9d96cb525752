"""Each source's documents are read, kept back for validation in part, and cut into windows, which are mixed where there are several."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.text.folders import is_local
from refine_nsp.text.formats import say
from refine_nsp.text.reading import place_of, read_documents
from refine_nsp.training.answers import AnswerArguments, prepare_answers
from refine_nsp.training.data import (
    ANSWER_COLUMN,
    BEGINS_COLUMN,
    KEPT_BACK,
    LENGTHS_COLUMN,
    NO_OTHER_VALIDATION,
    TEXT_COLUMN,
    TOKENS_COLUMN,
    WHOLE,
    DataArguments,
    check_fraction,
    first_rows,
    split_documents,
    tokenize,
    validation_splits,
)
from refine_nsp.training.mixture import as_list, labels_of, mix, mix_streams, one_each, tokens_of_windows
from refine_nsp.training.row_order import documents_of

SCORE_COLUMN, COUNT_COLUMN = "context_score", "num_tokens"  # of a document, as `refine-nsp score` writes them
Windows: TypeAlias = Dataset | IterableDataset
Held: TypeAlias = Dataset | dict[str, Dataset] | None  # rows for validation, or several sets of them by name


@dataclass(frozen=True)
class Source:
    """Name the documents of one source, and what they are read by."""

    name: str
    label: str  # what logs call it
    column: str
    config: str | None
    split: str | tuple[str, ...]

    @property
    def read_by(self) -> tuple[str, tuple[str, ...], str | None, str | tuple[str, ...]]:
        """Return the first arguments of `read_documents`."""
        columns = (self.column, TOKENS_COLUMN) if self.column == TEXT_COLUMN else (self.column,)
        return self.name, columns, self.config, self.split


def sources_of(arguments: DataArguments) -> list[Source]:
    """List the sources to train on."""
    a, count = arguments, len(arguments.names)
    columns, splits = (one_each(name, getattr(a, name), count) for name in ("text_column", "dataset_split"))
    configs: list[str | None] = [None] * count
    if a.dataset_config is not None:
        configs = [*one_each("dataset_config", a.dataset_config, count)]
        if count > 1 and len(as_list(a.dataset_config)) == 1:
            configs = [None if is_local(name) else config for name, config in zip(a.names, configs, strict=True)]
    labels = labels_of(a.all_names)[:count]
    return [Source(*given) for given in zip(a.names, labels, columns, configs, splits, strict=True)]


def validation_sources(arguments: DataArguments, sources: Sequence[Source]) -> list[Source]:
    """List the sources of `validation_dataset`. One that is trained on too is read by its column and configuration."""
    known, names = {source.name: source for source in sources}, as_list(arguments.validation_dataset)
    found = []
    for i, (name, label) in enumerate(zip(names, labels_of(names) if names else [], strict=True)):
        like = known.get(name, sources[i] if len(names) == len(sources) else sources[0])
        config = like.config if like.name == name or not is_local(name) else None
        found.append(Source(name, label, like.column, config, validation_splits(str(like.split))))
    return found


def check_data(arguments: DataArguments, max_length: int, min_length: int, carried: bool) -> None:
    """Refuse settings that do not fit together, before anything is read (RefineError)."""
    if not arguments.names:
        raise RefineError("no data: name a file, folder, glob or hub dataset with --dataset_name")
    if arguments.dataset_num_proc is not None and arguments.dataset_num_proc < 1:
        raise RefineError(f"dataset_num_proc={arguments.dataset_num_proc}: expected 1 or more processes")
    check_fraction(arguments.validation_fraction)
    if max_length < min_length:
        raise RefineError(
            f"max_length={max_length} is below {min_length}, what a position needs (min_prefix + 1 + rollout_length)"
        )
    if carried and arguments.packing:
        raise RefineError("carry_states reads documents window by window, and packing puts several in one row; leave packing out")
    if carried and arguments.streaming and len(arguments.all_names) > 1:
        raise RefineError(
            "carry_states reads documents window by window, and a streamed mixture deals out single windows of "
            f"{', '.join(arguments.all_names)}; leave streaming out, or name one"
        )


def prepare_data(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    min_length: int,
    keep_columns: bool = False,
    carried: bool = False,
) -> tuple[Windows, Held]:
    """Make windows for training and validation as `DataArguments` says; of several sources a mixture, with a column `dataset_source`.

    Args:
        keep_columns: whether training windows keep their document's other columns, for rewards that ask for them.
        carried: whether windows continue from the states of those before them (see `tokenize`).

    Raises:
        RefineError: settings that do not fit together, or bad input, by the name of its source.
    """
    a = arguments
    check_data(a, max_length, min_length, carried)
    sources = sources_of(a)
    cut: Callable[..., Windows] = partial(
        tokenize, tokenizer=tokenizer, max_length=max_length, min_length=min_length, num_proc=a.dataset_num_proc, carried=carried
    )
    # All are opened before the first is tokenized, so that a name or a column that is not there is said at once.
    documents = {source: read_source(source, a, keep_columns) for source in sources}
    for source, rows in documents.items():
        check_scored(source, rows, a)
    held = {source: read_source(source, a) for source in validation_sources(a, sources)}
    answers = None if a.answer_dataset is None else answers_of(a, tokenizer, max_length)
    windows: dict[str, Windows] = {}
    kept_back: dict[str, Dataset] = {}
    for source, rows in documents.items():
        windows[source.label], other = windows_of(source, rows, a, cut, keep_columns)
        if other is not None:
            kept_back[source.label] = other
    if answers is not None:
        label = labels_of(a.all_names)[-1]
        windows[label] = one_window_each(answers[0]) if carried else answers[0]
        kept_back |= {} if answers[1] is None else {label: answers[1]}
    for source, rows in held.items():
        kept_back[source.label] = first_rows(cut_source(source, rows, cut), a.validation_windows)
    several = len(held) > 1 or (len(windows) > 1 and not held)
    return mixed_windows(windows, a), (kept_back or None) if several else next(iter(kept_back.values()), None)


def read_source(source: Source, arguments: DataArguments, keep_columns: bool = False) -> Windows:
    """Read a source's documents; packed rows of tokens are known by their column of lengths."""
    also = None if keep_columns else (LENGTHS_COLUMN, SCORE_COLUMN, COUNT_COLUMN)
    return read_documents(*source.read_by, streaming=arguments.streaming, also=also)


def cut_source(source: Source, rows: Windows, cut: Callable[..., Windows], packing: bool = False, keep: bool = False) -> Windows:
    """Make windows of a source's documents by `tokenize` with most of its arguments given. RefineError names the source."""
    try:
        return cut(rows, column=source.column, packing=packing, keep_columns=keep, place_of=partial(place_of, *source.read_by))
    except RefineError as error:
        raise error if source.name in str(error) else RefineError(f"{source.name}: {error}") from error


def windows_of(
    source: Source, documents: Windows, arguments: DataArguments, cut: Callable[..., Windows], keep_columns: bool
) -> tuple[Windows, Dataset | None]:
    """Make windows of a source for training, and of the share that is kept back of it for validation, if any is."""
    a, held = arguments, None
    if a.validation_dataset is None and isinstance(documents, Dataset):
        documents, held = split_documents(documents, a.validation_fraction, a.split_seed)
    documents = worth_reading(source, documents, a)
    windows = cut_source(source, documents, cut, a.packing, keep_columns)
    if held is not None:
        return windows, first_rows(cut_source(source, held, cut), a.validation_windows)
    if a.validation_dataset is None and isinstance(windows, Dataset) and a.validation_fraction > 0 and len(windows) > 1:
        # There is one document, whose end is kept back.
        end = len(windows) - max(1, round(len(windows) * a.validation_fraction))
        return windows.select(range(end)), first_rows(windows.select(range(end, len(windows))), a.validation_windows)
    return windows, None


def check_scored(source: Source, documents: Windows, arguments: DataArguments) -> None:
    """Refuse documents without the scores that they are to be chosen by (RefineError)."""
    by_share = arguments.context_score_share is not None
    if not by_share and arguments.min_context_score is None:
        return
    asked, wanted = ("context_score_share", [SCORE_COLUMN, COUNT_COLUMN]) if by_share else ("min_context_score", [SCORE_COLUMN])
    if missing := [name for name in wanted if name not in (documents.column_names or [])]:
        raise RefineError(
            f"{source.name} has no column {' and no '.join(map(repr, missing))}, which {asked} reads; "
            f"`refine-nsp score {source.name} MODEL --output FILE` writes a file that has"
        )


def worth_reading(source: Source, documents: Windows, arguments: DataArguments) -> Windows:
    """Choose documents by the score of their context, where that is asked for, and say how many they are; RefineError for none."""
    least, share = arguments.min_context_score, arguments.context_score_share
    if least is None and share is None:
        return documents
    bound = float("-inf") if least is None else least
    if isinstance(documents, IterableDataset):
        return documents.filter(lambda score: number_of(source, score) >= bound, input_columns=[SCORE_COLUMN])
    scores = [number_of(source, score) for score in documents[SCORE_COLUMN]]
    kept = [i for i, score in enumerate(scores) if score >= bound]
    if share is not None:
        tokens = [max(0.0, number_of(source, count)) for count in documents[COUNT_COLUMN]]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])
        before = np.cumsum([0, *(tokens[i] for i in best)])
        kept = sorted(i for i, above in zip(best, before, strict=False) if above < share * before[-1])
    if not kept:
        raise RefineError(
            f"{source.name}: no document is left by min_context_score={least}; the highest context_score is {max(scores, default=0):g}"
        )
    least = min(scores[i] for i in kept)
    say(f"{source.name}: {len(kept)} of {len(scores)} documents are trained on, of context_score {least:g} or more")
    return documents.select(kept)


def number_of(source: Source, value: object) -> float:
    """Return a score or a count, which files of text hold as text; the lowest of all where there is none. RefineError for anything else."""
    try:
        number = float("nan") if value is None else float(str(value))
    except ValueError as error:
        wrong = str(value)[:40]
        raise RefineError(f"{source.name} has {wrong!r} where a document's score or its tokens should be, a number") from error
    return float("-inf") if math.isnan(number) else number


def answers_of(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Windows, Dataset | None]:
    """Make rows of a prompt with its first answer and `answer_start`, for training and for validation, if a share is kept back."""
    a = arguments
    kept_back: dict[str, Any] = {"validation_fraction": 0.0}
    if WHOLE(a) and NO_OTHER_VALIDATION(a) and KEPT_BACK(a):
        kept_back = {name: getattr(a, name) for name in ("validation_fraction", "split_seed")}
        kept_back["validation_examples"] = a.validation_windows
    shared = {name: getattr(a, name) for name in ("max_answer_tokens", "apply_chat_template")}
    given = AnswerArguments(a.answer_dataset, **shared, **kept_back)
    train, held = prepare_answers(given, tokenizer, max_length)
    rows = answer_rows(train, a.packing)
    return rows.to_iterable_dataset() if a.streaming else rows, None if held is None else answer_rows(held, False)


def answer_rows(rows: Dataset, packing: bool) -> Dataset:
    """Join each prompt and its first answer to a row of tokens; packed rows have a list with a value for each of their documents."""

    def joined(row: Mapping[str, Any]) -> dict[str, object]:
        ids, start = [*row["prompt_ids"], *row["answers_ids"][0]], len(row["prompt_ids"])
        own = {LENGTHS_COLUMN: [len(ids)], ANSWER_COLUMN: [start]} if packing else {ANSWER_COLUMN: start}
        return {TOKENS_COLUMN: ids, **own}

    number = Value("int64")
    own = {LENGTHS_COLUMN: [number], ANSWER_COLUMN: [number]} if packing else {ANSWER_COLUMN: number}
    features = Features({TOKENS_COLUMN: [Value("int32")], **own})
    return rows.map(joined, remove_columns=rows.column_names, features=features, desc="prompts with answers")


def one_window_each(rows: Windows) -> Windows:
    """Say of rows that each is a document of one window, for carried states."""
    return rows.map(lambda row: {BEGINS_COLUMN: True})


def weights_of(windows: Mapping[str, Windows], arguments: DataArguments) -> list[float] | None:
    """Return the share of tokens of each source: answers have theirs, and the text shares the rest by its weights, or by what it holds.
    None: all windows of all sources are read once."""
    a = arguments
    if a.answer_share is None:
        return a.dataset_weights
    text = a.dataset_weights or [1.0]
    if len(text) < len(a.names):
        counts = [sum(tokens_of_windows(rows)) for rows in list(windows.values())[:-1] if isinstance(rows, Dataset)]
        text = [count / sum(counts) for count in counts]
    return [*(w * (1 - a.answer_share) for w in text), a.answer_share]


def mixed_windows(windows: Mapping[str, Windows], arguments: DataArguments) -> Windows:
    """Mix the windows of several sources, saying in one line what was taken; return those of a single one as they are."""
    a = arguments
    if len(windows) == 1:
        return next(iter(windows.values()))
    weights = weights_of(windows, a)
    if a.streaming:
        mixed, said = mix_streams(cast(dict[str, IterableDataset], windows), weights or [], a.dataset_stopping)
    else:
        rows = cast(dict[str, Dataset], windows)
        carried = all(BEGINS_COLUMN in own.column_names for own in rows.values())
        documents = [documents_of(own[BEGINS_COLUMN][:]) for own in rows.values()] if carried else None
        mixed, said = mix(rows, weights, a.dataset_stopping, a.mixture_seed, documents)
    say(said)
    return mixed
