"""Windows of several sources are mixed by shares of tokens, in an order that the seed alone decides.

The next window is always one of the source that is furthest behind its share of the tokens so far. So no source is ever ahead of its share
by more than a window, and nothing has to be known of lengths beforehand: the same rule serves files and streams.
`datasets.interleave_datasets` draws by examples, and would need probabilities corrected by mean lengths, which a stream does not say.

Where states are carried, whole documents take the place of windows, since the windows of a document are to follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from datasets.iterable_dataset import _BaseExamplesIterable

from refine_nsp.errors import RefineError

SOURCE_COLUMN = "dataset_source"  # no name that a user's own columns are likely to have, since logs tell all its values
Stopping: TypeAlias = Literal["first_exhausted", "all_exhausted"]
SUM_ERROR = 1e-4  # by so much the sum of weights may differ from 1: .333 three times is refused, .3333 is not


@dataclass(frozen=True)
class Mixed:
    """Hold a mixture of windows that are all in memory or in files, and how it came about."""

    order: list[int]  # the windows in their order, by index in all sources one after the other
    given: list[int]  # for each source, how many windows were taken, repeats included
    tokens: list[int]  # for each source, how many tokens were taken
    last: int  # the index of the source that ended the mixture


def as_list(given: str | Sequence[str] | None) -> list[str]:
    """List one name or several; None is none."""
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def one_each(setting: str, given: str | Sequence[str], count: int) -> list[str]:
    """Return a value for each of `count` sources: one for all, or one each. RefineError for another number of values."""
    values = as_list(given)
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise RefineError(f"{setting} has {len(values)} values for {count} names; expected one for all, or one each")
    return values


def check_weights(names: Sequence[str], weights: Sequence[float] | None) -> None:
    """Refuse weights that are no shares of the names (RefineError)."""
    if weights is None:
        return
    shown = " ".join(f"{w:g}" for w in weights)
    if len(weights) != len(names):
        raise RefineError(
            f"dataset_weights has {len(weights)} weights ({shown}) for {len(names)} names of dataset_name; expected one each"
        )
    if not all(0 < w <= 1 for w in weights):
        raise RefineError(
            f"dataset_weights {shown}: expected shares above 0 that sum to 1; leave out a source that gives nothing"
        )
    if abs(sum(weights) - 1) > SUM_ERROR:
        scaled = " ".join(f"{w / sum(weights):.4g}" for w in weights)
        raise RefineError(f"dataset_weights {shown} sum to {sum(weights):g}; expected 1, for example {scaled}")


def labels_of(names: Sequence[str]) -> list[str]:
    """Name each source as logs do, no two alike: its file without endings, or the last part of its name, with as much before it as needed.
    Other characters than letters, digits, `-` and `_` become `_`."""

    def label(name: str, parts: int) -> str:
        pieces = [piece for piece in Path(name).parts if piece not in ("/", "..")] or [name]
        stem = pieces[-1].split(".")[0] or pieces[-1]
        text = "_".join([*pieces[:-1], stem][-parts:])
        return "".join(c if c.isalnum() or c in "-_" else "_" for c in text).strip("_") or "data"

    for parts in range(1, 1 + max(len(Path(name).parts) for name in names)):
        labels = [label(name, parts) for name in names]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label(name, 1)}_{i + 1}" for i, name in enumerate(names)]


def behind(tokens: Sequence[int], weights: Sequence[float]) -> int:
    """Find the source that is furthest behind its share of the tokens given so far; the first of several."""
    whole = sum(tokens)
    return max(range(len(weights)), key=lambda i: weights[i] * whole - tokens[i])


def mix_order(lengths: Sequence[Sequence[int]], weights: Sequence[float], stopping: Stopping, seed: int) -> Mixed:
    """Choose the windows of a mixture, given the tokens of each source's windows, which the seed shuffles.

    The mixture ends where a window is due of a source that has none left (`first_exhausted`), or has begun again every source that ran
    out until each has been read once (`all_exhausted`).
    """
    count = len(weights)
    shuffled = [np.random.default_rng((seed, i)).permutation(len(own)) for i, own in enumerate(lengths)]
    starts = np.cumsum([0, *map(len, lengths)])
    given, tokens, read = [0] * count, [0] * count, [False] * count
    order: list[int] = []
    while True:
        i = behind(tokens, weights)
        size = len(lengths[i])
        if given[i] >= size and given[i] % size == 0:
            read[i] = True
            if stopping == "first_exhausted" or all(read):
                return Mixed(order, given, tokens, i)
        window = int(shuffled[i][given[i] % size])
        order.append(int(starts[i]) + window)
        given[i] += 1
        tokens[i] += lengths[i][window]


def named(windows: Dataset | IterableDataset, label: str) -> Dataset | IterableDataset:
    """Add the column `dataset_source` to windows; a packed row has a list with a value for each of its documents. RefineError where the
    windows keep a column of this name already."""
    columns = windows.column_names or []
    if SOURCE_COLUMN in columns:
        raise RefineError(f"{label} has a column {SOURCE_COLUMN!r} already, which a mixture needs for itself; rename it")
    packing = "lengths" in columns
    if isinstance(windows, IterableDataset):
        kind = [Value("string")] if packing else Value("string")
        features = windows.features and Features({**windows.features, SOURCE_COLUMN: kind})
        return windows.map(
            lambda row: {SOURCE_COLUMN: [label] * len(row["lengths"]) if "lengths" in row else label}, features=features
        )
    values = [[label] * len(n) for n in windows["lengths"]] if packing else [label] * len(windows)
    column: Any = pa.array(values, type=pa.list_(pa.string()) if packing else pa.string())
    return windows.add_column(SOURCE_COLUMN, column, new_fingerprint=Hasher.hash((windows._fingerprint, label)))


def tokens_of_windows(windows: Dataset) -> list[int]:
    """Count the tokens of each window, without making Python numbers of all of them."""
    counts: list[int] = []
    for table in windows.select_columns(["input_ids"]).with_format("arrow").iter(10_000):
        counts += pyarrow.compute.list_value_length(table["input_ids"]).to_pylist()
    return counts


def mix_documents(
    lengths: Sequence[Sequence[int]], documents: Sequence[Sequence[range]], weights: Sequence[float], stopping: Stopping, seed: int
) -> Mixed:  # fmt: skip
    """Choose the windows of a mixture document by document, by the rule of `mix_order`; those of a document stay next to each other."""
    sizes = [[sum(own[row] for row in rows) for rows in apart] for own, apart in zip(lengths, documents, strict=True)]
    chosen = mix_order(sizes, weights, stopping, seed)
    firsts = np.cumsum([0, *map(len, lengths)]).tolist()
    places = [(i, firsts[i] + rows.start, firsts[i] + rows.stop) for i, apart in enumerate(documents) for rows in apart]
    order: list[int] = []
    given = [0] * len(lengths)
    for document in chosen.order:
        i, first, last = places[document]
        order += range(first, last)
        given[i] += last - first
    return Mixed(order, given, chosen.tokens, chosen.last)


def mix(
    sources: dict[str, Dataset], weights: Sequence[float] | None, stopping: Stopping, seed: int,
    documents: Sequence[Sequence[range]] | None = None,
) -> tuple[Dataset, str]:  # fmt: skip
    """Mix windows that are all there, by the names of their sources, by shares of tokens, with a column `dataset_source`; without `weights`
    every window is taken once; `documents`, the rows of each document of each source, are taken as a whole. Return the windows, and a line
    that says what was taken."""
    lengths = [tokens_of_windows(windows) for windows in sources.values()]
    whole = concatenate_datasets([named(windows, label) for label, windows in sources.items()])
    sizes = {label: len(own) for label, own in zip(sources, lengths, strict=True)}
    if weights is None:
        shares = _shares(sizes, list(sizes.values()), [sum(own) for own in lengths])
        return whole, f"mixture: {shares}; every window once, since dataset_weights are not given"
    if documents is None:
        mixed = mix_order(lengths, weights, stopping, seed)
    else:
        mixed = mix_documents(lengths, documents, weights, stopping, seed)
    last = list(sources)[mixed.last]
    ends = f"{last} runs out" if stopping == "first_exhausted" else f"all have been read once, {last} as the last"
    said = f"mixture: {_shares(sizes, mixed.given, mixed.tokens)}; it ends where {ends} (dataset_stopping={stopping})"
    key = Hasher.hash((whole._fingerprint, list(weights), stopping, seed))
    return whole.select(mixed.order, new_fingerprint=key), said


def _shares(sizes: Mapping[str, int], given: Sequence[int], tokens: Sequence[int]) -> str:
    """Say each source's share of tokens, and how many times its windows are read."""
    whole = max(1, sum(tokens))
    return ", ".join(
        f"{label} {100 * tokens[i] / whole:.2f} % of tokens ({given[i]} windows of {size}, {given[i] / max(1, size):.2f} times)"
        for i, (label, size) in enumerate(sizes.items())
    )


class ByTokens(_BaseExamplesIterable):
    """Yield rows of several streams by the rule of the mixture; `datasets` saves and loads its place as that of any of its own parts.
    RefineError where a source has no window, or a place is of a mixture with other weights.

    Args:
        parts: the streams' iterables. labels: their names. weights: their shares of tokens.
        columns: all columns of all sources; a row is None where it has none of them.
    """

    def __init__(
        self,
        parts: list[_BaseExamplesIterable],
        labels: list[str],
        weights: Sequence[float],
        stopping: Stopping,
        columns: list[str],
    ) -> None:
        super().__init__()
        self.ex_iterables, self.labels, self.weights, self.stopping, self.columns = parts, labels, weights, stopping, columns
        # A place in the mixture means nothing without these.
        self.made_with = ", ".join([*(f"{label} {w:g}" for label, w in zip(labels, weights, strict=True)), stopping])

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict = {
            "sources": [part._init_state_dict() for part in self.ex_iterables],
            "tokens": [0] * len(self.labels),
            "read": [False] * len(self.labels),
            "made_with": self.made_with,
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[object, dict[str, Any]]]:
        # `datasets` makes the state before it iterates; tools that do not want one leave it out.
        state = cast(dict[str, Any], self._state_dict if self._state_dict is not None else self._init_state_dict())
        if state["made_with"] != self.made_with:
            raise RefineError(
                f"the checkpoint's place is in a mixture of {state['made_with']}, and this one is of {self.made_with}: resume with the "
                "weights that it was made with, or begin a new run from its weights"
            )
        parts = [iter(part) for part in self.ex_iterables]
        while True:
            i = behind(state["tokens"], self.weights)
            found = next(parts[i], None)
            if found is None:
                if state["tokens"][i] == 0:
                    raise RefineError(f"{self.labels[i]}: the streamed text has no document that is long enough; leave it out")
                state["read"][i] = True
                if self.stopping == "first_exhausted" or all(state["read"]):
                    return
                state["sources"][i] = self.ex_iterables[i]._init_state_dict()
                parts[i] = iter(self.ex_iterables[i])
                found = next(parts[i])
            key, row = found
            state["tokens"][i] += len(row["input_ids"])
            yield f"{i}_{key}", {**dict.fromkeys(self.columns), **row}

    def shuffle_data_sources(self, generator: np.random.Generator) -> ByTokens:
        return self._of([part.shuffle_data_sources(generator) for part in self.ex_iterables])

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> ByTokens:
        return self._of([part.shard_data_sources(num_shards, index, contiguous) for part in self.ex_iterables])

    def reshard_data_sources(self) -> ByTokens:
        return self._of([part.reshard_data_sources() for part in self.ex_iterables])

    @property
    def num_shards(self) -> int:
        """Say that a mixture is one shard: processes share out its rows, so that results do not depend on their number."""
        return 1

    def _of(self, parts: list[_BaseExamplesIterable]) -> ByTokens:
        return ByTokens(parts, self.labels, self.weights, self.stopping, self.columns)


def mix_streams(sources: dict[str, IterableDataset], weights: Sequence[float], stopping: Stopping) -> tuple[IterableDataset, str]:
    """Mix streamed windows as `mix` does, each source in its order; return them, and one line that says how the mixture ends."""
    streams = [named(windows, label) for label, windows in sources.items()]
    sizes = {name: size for stream in streams for name, size in (stream.info.download_checksums or {}).items()}
    parts = [stream._ex_iterable for stream in streams]
    columns = [*dict.fromkeys(name for stream in streams for name in stream.column_names or [])]
    rows = ByTokens(parts, list(sources), weights, stopping, columns)
    mixed = IterableDataset(rows, DatasetInfo(download_checksums=sizes or None))
    shares = ", ".join(f"{label} {100 * w:g} %" for label, w in zip(sources, weights, strict=True))
    ends = "an epoch ends with the first source that runs out"
    if stopping == "all_exhausted":
        ends = "a source that runs out begins again until all have been read once"
    return mixed, f"mixture: {shares} of tokens; {ends} (dataset_stopping={stopping})"
