"""Long documents of a collection on the hub as rows of token ids, tokenized once: a folder that `--dataset_name` takes.

    python recipes/long_documents.py MODEL data/long

A document keeps its whole windows of `--length` tokens; shorter documents are left out. Files (jsonl, also compressed; a path or an
address) are read only as far as is needed, each for the same share of `--tokens`. For .zst: pip install zstandard.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset

from refine_nsp.models.load import load_tokenizer

PAPERS = "hf://datasets/togethercomputer/Long-Data-Collections/pretrain/arxiv_doc_to_abs.jsonl.zst"
DOCUMENTS = 64  # tokenized at once, by as many threads as there are cores


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whose tokenizer it is: a folder or a hub name")
    parser.add_argument("output", type=Path, help="folder for tokens.parquet")
    parser.add_argument("--files", nargs="+", default=[PAPERS])
    parser.add_argument("--column", default="text")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of a window: the run's max_length")
    parser.add_argument(
        "--tokens", type=float, default=212e6, help="200 M, and the 5 %% of the documents that a run validates on"
    )
    return parser.parse_args(argv)


def long_documents(file: str, tokenizer, column: str, length: int, tokens: float) -> Iterator[list[list[int]]]:
    """Token ids of documents, some at a time, until there are so many tokens."""
    texts = load_dataset("json", data_files=file, split="train", streaming=True).select_columns(column)
    for batch in texts.iter(DOCUMENTS):
        whole = [ids[: len(ids) // length * length] for ids in tokenizer([text or "" for text in batch[column]])["input_ids"]]
        rows = [ids for ids in whole if ids]
        yield rows
        tokens -= sum(map(len, rows))
        if tokens <= 0:
            return


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    tokenizer = load_tokenizer(a.model)
    a.output.mkdir(parents=True, exist_ok=True)
    unfinished, schema, documents, tokens = a.output / "tokens.unfinished", pa.schema({"input_ids": pa.list_(pa.int32())}), 0, 0
    with pq.ParquetWriter(unfinished, schema) as writer:
        for file in a.files:
            for rows in long_documents(file, tokenizer, a.column, a.length, a.tokens / len(a.files)):
                writer.write_table(pa.table({"input_ids": rows}, schema=schema))
                documents, tokens = documents + len(rows), tokens + sum(map(len, rows))
                print(f"\r{documents:,} documents, {tokens:,} tokens", end="", flush=True)
    unfinished.rename(a.output / "tokens.parquet")
    print(f" in {a.output}")
    if tokens < a.tokens:
        print(f"the files have no more documents of {a.length:,} tokens: asked for {a.tokens:,.0f}")


if __name__ == "__main__":
    main()
