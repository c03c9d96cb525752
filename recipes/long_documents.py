"""Long documents as rows of token ids, tokenized once: a folder that `--dataset_name` takes.

    python recipes/long_documents.py MODEL data/long

A document keeps its whole windows of `--length` tokens; shorter documents are left out. A source is read only as far as is needed, each
for the same share of `--tokens`: a dataset of the hub (by default SlimPajama-6B), files or folders of yours (text, json, csv, parquet,
also compressed), the address of one file, or `long-data-collections`, the paper's own collection, for where it can still be had. For
.zst: pip install zstandard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, load_dataset

from refine_nsp.errors import RefineError, first_line
from refine_nsp.models.load import load_tokenizer
from refine_nsp.text.reading import read_documents

# The authors of the method trained on Long-Data-Collections, which was withdrawn, and name this one in its place.
SLIMPAJAMA = "DKYoon/SlimPajama-6B"
NAMED = {
    "slimpajama": SLIMPAJAMA,
    "long-data-collections": "hf://datasets/togethercomputer/Long-Data-Collections/pretrain/arxiv_doc_to_abs.jsonl.zst",
}
DOCUMENTS = 64  # tokenized at once, by as many threads as there are cores


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whose tokenizer it is: a folder or a hub name")
    parser.add_argument("output", type=Path, help="folder for tokens.parquet")
    parser.add_argument(
        "--files",
        nargs="+",
        default=[SLIMPAJAMA],
        help=f"the sources: {', '.join(NAMED)}, names on the hub, files, folders, globs, or addresses of json files",
    )
    parser.add_argument("--column", default="text")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of a window: the run's max_length")
    parser.add_argument(
        "--tokens", type=float, default=212e6, help="200 M, and the 5 %% of the documents that a run validates on"
    )
    return parser.parse_args(argv)


def read_texts(source: str, column: str) -> Iterator[str]:
    """The texts of a source, read as they are asked for. RefineError where it cannot be had."""
    name = NAMED.get(source, source)
    try:
        if "://" in name:
            rows = load_dataset("json", data_files=name, split="train", streaming=True)
        else:
            rows = read_documents(name, (column,), streaming=True, also=())
        assert isinstance(rows, IterableDataset)
        for row in rows:
            yield row.get(column) or ""
    except RefineError:
        raise
    except Exception as error:  # many kinds: network, a withdrawn dataset, a format
        raise RefineError(f"{source} cannot be read: {first_line(error)}; name another source with --files") from error


def long_documents(source: str, tokenizer, column: str, length: int, tokens: float) -> Iterator[list[list[int]]]:
    """Token ids of documents, some at a time, until there are so many tokens."""
    # A text of fewer bytes has fewer tokens: most documents of a collection are so short that they need not be tokenized.
    texts = (text for text in read_texts(source, column) if len(text.encode("utf-8", "replace")) >= length - 8)
    while tokens > 0 and (batch := list(islice(texts, DOCUMENTS))):
        whole = [ids[: len(ids) // length * length] for ids in tokenizer(batch)["input_ids"]]
        rows = [ids for ids in whole if ids]
        yield rows
        tokens -= sum(map(len, rows))


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    tokenizer = load_tokenizer(a.model)
    parts = chain.from_iterable(
        long_documents(source, tokenizer, a.column, a.length, a.tokens / len(a.files)) for source in a.files
    )
    a.output.mkdir(parents=True, exist_ok=True)
    unfinished, schema, documents, tokens = a.output / "tokens.unfinished", pa.schema({"input_ids": pa.list_(pa.int32())}), 0, 0
    with pq.ParquetWriter(unfinished, schema) as writer:
        for rows in parts:
            writer.write_table(pa.table({"input_ids": rows}, schema=schema))
            documents, tokens = documents + len(rows), tokens + sum(map(len, rows))
            print(f"\r{documents:,} documents, {tokens:,} tokens", end="", flush=True)
    if not documents:
        unfinished.unlink()
        raise RefineError(f"{' '.join(a.files)}: no document has {a.length:,} tokens; a smaller --length keeps shorter ones")
    unfinished.rename(a.output / "tokens.parquet")
    print(f" in {a.output}")
    if tokens < a.tokens:
        print(f"the sources have no more documents of {a.length:,} tokens: asked for {a.tokens:,.0f}")


if __name__ == "__main__":
    try:
        main()
    except RefineError as error:
        sys.exit(f"long_documents: {error}")
