"""Read and write files so that an interruption cannot spoil them: whole or not at all, or line by line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from refine_nsp.errors import RefineError, first_line


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file in UTF-8 as `write_bytes_atomically` does."""
    return write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all: under a temporary name, then rename it. Raises RefineError where the path is a folder."""
    if not path.name or path.is_dir():
        raise RefineError(f"{path} is a folder; name a file to write")
    make_folder(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:  # where the disk is full, half a file must not stay and take up room
        temporary.unlink(missing_ok=True)
        raise
    return path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises RefineError where one of them is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), folder)
        raise RefineError(f"{file} is a file, so nothing can be written in a folder of that name; name another") from error


@contextmanager
def expecting(what: str, where: object) -> Iterator[None]:
    """Raise RefineError where a file that is read inside does not hold `what`, because it is damaged, edited or of another program."""
    try:
        yield
    except RefineError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise RefineError(f"{where} is damaged or something else; expected {what} ({said})") from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises RefineError, which says `what` was expected, for any other file."""
    with expecting(what, path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}")
        return found


@contextmanager
def made_whole(temporary: Path, final: Path) -> Iterator[Path]:
    """Give a temporary name for a file or folder and rename it at the end; where something fails, nothing is left of it.

    Raises RefineError where it cannot be written, as on a full disk.
    """
    try:
        yield temporary
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors raises its own kind for a full disk
            raise RefineError(f"could not write {final}: {first_line(error)}") from error
        raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a jsonl file, none if there is no file. A last line that an interruption cut off is left out.

    Raises RefineError where any other line is not a record.
    """
    with expecting("a JSON object on every line", path):
        # Lines are split by "\n" alone: text in a record may hold Unicode's other line separators, at which splitlines() would split too.
        records = [json.loads(line) for line in _whole_lines(path).decode("utf-8").split("\n") if line]
        if (other := next((r for r in records if not isinstance(r, dict)), None)) is not None:
            raise TypeError(f"a {type(other).__name__}")
    return records


def append_json_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Append records to a jsonl file behind its last whole line."""
    make_folder(path.parent)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if size and file.read() != b"\n":
            file.truncate(len(_whole_lines(path)))
        file.write(lines.encode("utf-8"))


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]
