"""Read one file as rows: open and decode each known format, and name the file and the row where something is wrong."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from refine_nsp.errors import RefineError, first_line

TEXT_ENDINGS = (".txt", ".md", ".rst", ".text", ".py")
RECORD_ENDINGS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
FORMATS = {**dict.fromkeys(TEXT_ENDINGS, "text"), **RECORD_ENDINGS}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
KNOWN = f"{', '.join(FORMATS)}, text and json also with {', '.join(COMPRESSIONS)}"
BLOCK = 2**20  # bytes
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Row = tuple[int, int, dict[str, object]]  # number from 0, line from 1 (0: the format has no lines), values


def say(text: str) -> None:
    """Warn in one line of what is not read. Python shows the same line once."""
    warnings.warn(text, stacklevel=2)


def unpacked(file: Path) -> Path:
    """Return the name that a file has once it is decompressed."""
    return file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file


def ending_of(file: Path) -> str:
    """Return the ending that names the format, in small letters: `.jsonl` of `A.JSONL.gz`."""
    return unpacked(file).suffix.lower()


def format_of(file: Path) -> str | None:
    """Return text, json, csv, parquet or arrow by the file's ending; None for any other (parquet and arrow compress by themselves)."""
    found = FORMATS.get(ending_of(file))
    return None if found in ("parquet", "arrow") and file.suffix.lower() in COMPRESSIONS else found


@contextmanager
def opened(file: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file for its bytes, decompressed by its ending. Raises RefineError with the file's name where it cannot be read."""
    damaged: list[type[Exception]] = [OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException]
    openers: dict[str, Callable[[Path], io.BufferedIOBase]] = {".gz": gzip.GzipFile, ".xz": lzma.LZMAFile, ".bz2": bz2.BZ2File}
    try:
        if (suffix := file.suffix.lower()) == ".zst":
            stream, damaged_zstd = _zstd(file)
            damaged.append(damaged_zstd)
        else:
            stream = openers[suffix](file) if suffix in openers else file.open("rb")
        with stream:
            yield stream
    except tuple(damaged) as error:
        raise RefineError(f"cannot read {file}: {first_line(error)}; is it whole?") from error


def _zstd(file: Path) -> tuple[io.BufferedIOBase, type[Exception]]:
    """Open all frames of a .zst file, and name the exception that a damaged one raises."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.open(file, "rb"), zstd.ZstdError
    try:
        import zstandard
    except ImportError as error:
        raise RefineError(f"{file} is compressed by zstd, which needs a package: pip install zstandard") from error
    frames = _Frames(file, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj)
    return io.BufferedReader(frames, 2**17), zstandard.ZstdError


class _Frames(io.RawIOBase):
    """Read the bytes of all frames of a .zst file. Raises EOFError where the last is cut off, which zstandard alone lets pass."""

    def __init__(self, file: Path, new_frame: Callable[[], Any]) -> None:
        self.file, self.new_frame = file.open("rb"), new_frame
        self.frame: Any = None  # between two frames
        self.waiting = b""  # bytes that were read of the file and belong to the next frame
        self.text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.text:
            block = self.waiting or self.file.read(2**17)
            if not block:
                if self.frame is not None:
                    raise EOFError("the compressed text ends within a frame")
                return 0
            frame = self.frame or self.new_frame()
            self.text = memoryview(frame.decompress(block))
            self.waiting, self.frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        room = memoryview(buffer)
        count = min(len(room), len(self.text))
        room[:count], self.text = self.text[:count], self.text[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def is_empty(file: Path) -> bool:
    """Tell whether there is nothing in a file once it is decompressed."""
    if file.suffix.lower() not in COMPRESSIONS or file.stat().st_size == 0:
        return file.stat().st_size == 0
    with opened(file) as stream:
        return not stream.read(1)


def read_text(file: Path, most_bytes: int | None = None) -> str:
    """Read a UTF-8 file, at most `most_bytes` of it, without a byte order mark and with `\\n` as its line ends.

    It is decoded in blocks, so that a RefineError can name the place of a byte that is in another encoding.
    """
    decoder, at, pieces = codecs.getincrementaldecoder("utf-8")(), 0, []
    with opened(file) as stream:
        while most_bytes is None or at < most_bytes:
            block = stream.read(BLOCK if most_bytes is None else min(BLOCK, most_bytes - at))
            if at == 0:
                refuse_utf16(block, file)
            waiting = len(decoder.getstate()[0])  # bytes of a character that the end of the last block cut in two
            try:
                pieces.append(decoder.decode(block, final=not block))
            except UnicodeDecodeError as error:
                raise not_utf8(error, file, at - waiting) from error
            if not block:
                break
            at += len(block)
    return "".join(pieces).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def refuse_utf16(start: bytes, file: Path) -> None:
    """Raise RefineError where a file begins as UTF-16 does: with its mark, or with zeros in every second place."""
    if start.startswith(UTF16) or start[:1000].count(0) > len(start[:1000]) // 4:
        raise RefineError(f"{file} is not UTF-8 but UTF-16, or no text: convert it first, as `iconv -f UTF-16 -t UTF-8` does")


def not_utf8(error: UnicodeDecodeError, file: Path, offset: int) -> RefineError:
    """Make the error of a byte that is no UTF-8; `offset` is where the decoded bytes begin in the file."""
    byte = f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
    return RefineError(f"{file} is not UTF-8: {byte}; convert it first")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers from 1. Only `\\n` ends a line, since a record may hold Unicode's other separators."""
    at = 0
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if at == 0:
                refuse_utf16(line, file)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(error, file, at) from error
            yield number, text if at else text.removeprefix("\ufeff")
            at += len(line)


def rows_of(file: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a json or csv file; columns `wanted`, which may hold the document, tell a row from a table of rows.

    A RefineError names a row that cannot be read, when that row is reached.
    """
    return _csv_rows(file) if format_of(file) == "csv" else _json_rows(file, wanted)


def place(file: Path, number: int, line: int = 0) -> str:
    """Name a row as errors do, by its file, its number and its line."""
    return f"{file}, row {number}" + (f" (line {line})" if line else "")


def _json_rows(file: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """Yield an object a line; or read the whole file as a list of objects or of texts, one object, or an object that holds the rows."""
    lines = ((number, line) for number, line in _lines(file) if not line.isspace())
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    one_object = ending_of(file) == ".json" and (second is None or not _is_object(first[1]))
    if one_object or first[1].lstrip().startswith("["):
        yield from ((i, 0, row) for i, row in enumerate(_whole_json(file, wanted)))
        return
    for i, (number, line) in enumerate(chain([first], [second] if second else [], lines)):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            wrong = f"cannot read {place(file, i, number)}: not JSON ({first_line(error)})"
            raise RefineError(f"{wrong}; it begins {line[:60]!r}, expected an object in one line") from error
        yield i, number, _object(row, place(file, i, number))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _object(row: object, where: str) -> dict[str, object]:
    if isinstance(row, dict):
        return row
    raise RefineError(f"{where}: holds {str(row)[:60]!r}, a {type(row).__name__}; expected an object with a name for each column")


def _whole_json(file: Path, wanted: Sequence[str]) -> Iterable[dict[str, object]]:
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefineError(f"cannot read {file}: not JSON ({first_line(error)})") from error
    del text
    if isinstance(value, dict):
        tables = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)}
        columns = bool(value) and all(isinstance(v, list) for v in value.values()) and len({len(v) for v in value.values()}) == 1
        if not set(wanted) & set(value):
            if len(tables) > 1:
                raise RefineError(f"{file} holds several tables ({', '.join(tables)}); write one to a file of its own")
            value = next(iter(tables.values()), [value])
        elif columns and not tables and all(isinstance(v, str | list) for c in wanted for v in value.get(c, ())):
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
        else:
            value = [value]
    if isinstance(value, list) and value and all(isinstance(row, str) for row in value):
        value = [{"text": row} for row in value]
    rows = value if isinstance(value, list) else [value]
    return [_object(row, place(file, i)) for i, row in enumerate(rows)]


def _csv_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a csv file with all values as they are written: none is turned into a number, a date or a missing value."""
    csv.field_size_limit(2**31 - 1)  # documents are longer than the 131,072 characters that the module allows
    lines = _lines(file)
    first = next(lines, None)
    if first is None:
        return
    delimiter = "\t" if ending_of(file) == ".tsv" else max(",;\t", key=first[1].count)
    reader = csv.reader((line for _, line in chain([first], lines)), delimiter=delimiter, strict=True)
    i = 0
    try:
        header = next(reader)
        for values in filter(None, reader):  # the csv module gives an empty list for an empty line
            if len(values) != len(header):
                seen = f"{len(values)} values, and the header names {len(header)} ({', '.join(header)})"
                fix = "values that hold the separator or line ends belong in quotes"
                raise RefineError(f"{place(file, i, reader.line_num)}: {seen}; {fix}")
            yield i, reader.line_num, dict(zip(header, values, strict=True))
            i += 1
    except csv.Error as error:
        raise RefineError(f"cannot read {place(file, i, reader.line_num)}: {first_line(error)}") from error
