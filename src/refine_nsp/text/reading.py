"""Documents from text, jsonl, parquet or arrow files, folders, globs, folders saved by `datasets`, or the hub."""

from __future__ import annotations

import glob
from codecs import getincrementaldecoder
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk

from refine_nsp.errors import RefineError, closest, first_line

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
TEXT_ENDINGS = (".txt", ".md", ".rst", ".text", ".py")
BLOCK = 2**20  # bytes
READ_AHEAD = BLOCK  # of a file that is streamed, to see what it is


def read_documents(
    name: str, columns: Sequence[str] = ("text",), config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Rows of a file, folder, glob, folder saved by `datasets`, or hub dataset that has at least one of `columns`.

    Args:
        config, split: of a hub dataset (split also of a saved folder). streaming: read as rows are asked for.

    Raises:
        RefineError: nothing there, an empty or undecodable file, an unknown format, no such column, or an unreachable hub.
    """
    path = Path(name).expanduser()
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = load_from_disk(str(path))
        data = loaded[split] if isinstance(loaded, DatasetDict) else loaded
    elif files := _files(name, path, READ_AHEAD if streaming else None):
        data = _load_files(files, streaming)
    else:
        data = _load_hub(name, config, split, streaming)
    there = data.column_names or []
    if not set(columns) & set(there):
        wanted = " or ".join(repr(c) for c in columns)
        raise RefineError(
            f"{name} has no column {wanted}{closest(columns[0], there)}; it has {', '.join(there) or 'none'}. "
            "Name one with --text_column, or rename it"
        )
    return data


def _files(name: str, path: Path, checked_bytes: int | None) -> list[Path]:
    """The files meant by a path, folder or glob, checked; empty when it can only be a hub name."""
    known = (*FORMATS, *TEXT_ENDINGS)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in known and not p.name.startswith("."))
        if not files:
            raise RefineError(f"{path} holds no file to train on; expected {', '.join(known)}")
    elif glob.has_magic(name):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise RefineError(f"no file matches {name!r}")
    else:
        if path.suffix in known or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise RefineError(f"no file or folder {name!r}")
        return []
    for file in files:
        _check_file(file, checked_bytes)
    return files


def _check_file(file: Path, checked_bytes: int | None) -> None:
    """checked_bytes: of its text are read to see that it is UTF-8; None: all."""
    if file.stat().st_size == 0:
        raise RefineError(f"{file} is empty")
    if file.suffix not in FORMATS and file.suffix not in TEXT_ENDINGS:
        raise RefineError(
            f"{file}: unknown format {file.suffix or '(no ending)'}; expected {', '.join((*FORMATS, *TEXT_ENDINGS))}"
        )
    if file.suffix in TEXT_ENDINGS or FORMATS[file.suffix] == "json":
        _check_utf8(file, checked_bytes)


def _check_utf8(file: Path, checked_bytes: int | None) -> None:
    """In blocks: a file may be larger than memory."""
    size = file.stat().st_size
    decoder, at, end = getincrementaldecoder("utf-8")(), 0, size if checked_bytes is None else min(size, checked_bytes)
    with file.open("rb") as stream:
        while at < end:
            block = stream.read(min(BLOCK, end - at))
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                decoder.decode(block, final=at + len(block) >= size)
            except UnicodeDecodeError as error:
                raise RefineError(
                    f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at - waiting + error.start}; convert it first"
                ) from error
            at += len(block)


def _load_files(files: Sequence[Path], streaming: bool) -> Dataset | IterableDataset:
    kinds = {FORMATS.get(f.suffix, "text") for f in files}
    if len(kinds) > 1:
        raise RefineError(f"files of several formats together ({', '.join(sorted(kinds))}); name one kind, for example by a glob")
    kind = kinds.pop()
    options: dict[str, Any] = {}
    if kind == "text":  # its columns named, since streamed it does not say them by itself
        options = {"sample_by": "document", "features": Features({"text": Value("string")})}
    try:
        data = load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=streaming, **options)
    except Exception as error:  # datasets wraps every parser's own errors
        cause = error.__cause__ or error
        raise RefineError(f"cannot read {files[0]} as {kind}: {first_line(cause)}") from error
    if streaming:  # these are read again and again: whoever reads can see that they are still what they were
        data.info.download_checksums = {str(f.resolve()): {"num_bytes": f.stat().st_size} for f in files}
    return data


def _load_hub(name: str, config: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # many kinds: network, missing name, configuration
        raise RefineError(f"{name!r} is neither a file nor a dataset the hub gave: {first_line(error)}") from error
