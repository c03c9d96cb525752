"""Make a `datasets` dataset of files: cached by their names, sizes and times of change, or streamed from a place that can be resumed.

`datasets` patches `open`, `os` and `pathlib` in a builder's module so that names may be chained addresses. Nothing in this module opens a
file, so that a file's name means what it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
from datasets.fingerprint import Hasher

from refine_nsp.text.columns import Wanted, tables_of
from refine_nsp.text.folders import path_of
from refine_nsp.text.formats import say

if TYPE_CHECKING:
    import pyarrow

FORM = 1  # part of the cache's key: raise it when the same files come to be read differently


@dataclass
class RowsConfig(datasets.BuilderConfig):
    """Say which files are read, the schema of their columns (the document's first), and what the caller wanted."""

    files: Sequence[str] = ()
    schema: pyarrow.Schema | None = None
    wanted: Wanted | None = None


class Rows(datasets.ArrowBasedBuilder):
    """Build a dataset of the rows of files of any format; each file is a shard."""

    BUILDER_CONFIG_CLASS = RowsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(self.config.schema))

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs={"files": list(self.config.files)})]

    def _generate_shards(self, files: Sequence[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: Sequence[str]) -> Iterator[tuple[tuple[int, int], pyarrow.Table]]:
        wanted = self.config.wanted
        for i, file in enumerate(files):
            rows = missing = 0
            for j, table in enumerate(tables_of(path_of(file), self.config.schema, wanted)):
                rows, missing = rows + len(table), missing + table.column(0).null_count
                yield (i, j), table
            if wanted.streaming:  # `read_documents` counts the rows of a dataset in memory
                say_missing(file, missing, rows, self.config.schema.names[0])


def say_missing(name: str, missing: int, rows: int, column: str) -> None:
    """Warn of the rows that have no document."""
    if missing:
        say(f"{name}: {missing} of {rows} rows have no {column!r}, so nothing is read from them")


def build(
    files: Sequence[tuple[str, int, int]], schema: pyarrow.Schema, wanted: Wanted
) -> datasets.Dataset | datasets.IterableDataset:
    """Read files, given by name, bytes and time of change. Raises RefineError for a wrong row; a stream when it is reached."""
    key = Hasher.hash((FORM, list(files), str(schema), wanted.columns))
    names = [name for name, _, _ in files]
    rows = Rows(dataset_name="refine_nsp_text", config_id=f"files-{key}", files=names, schema=schema, wanted=wanted)
    if wanted.streaming:
        return rows.as_streaming_dataset(split="train")
    rows.download_and_prepare()
    return rows.as_dataset(split="train")
