"""Files that an interruption cannot spoil: written whole or not at all, or line by line."""

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
    """Write a text file under a temporary name, then rename: whole or not at all. RefineError where the path is a folder's."""
    return write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name, then rename: whole or not at all. RefineError where the path is a folder's."""
    if not path.name or path.is_dir():
        raise RefineError(f"{path} is a folder; name a file to write")
    make_folder(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:  # no room, say: half a file is in nobody's way
        temporary.unlink(missing_ok=True)
        raise
    return path


def make_folder(folder: Path) -> None:
    """With those above it; RefineError where one of them is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), folder)
        raise RefineError(f"{file} is a file, so nothing can be written in a folder of that name; name another") from error


@contextmanager
def expecting(what: str, where: object) -> Iterator[None]:
    """RefineError where what is read inside is not `what`: damaged, of another program, or edited."""
    try:
        yield
    except RefineError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise RefineError(
            f"{where} is damaged or something else; expected {what} ({type(error).__name__}: {first_line(error)})"
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds an object. RefineError, with `what` it should be, for another."""
    with expecting(what, path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}")
        return found


@contextmanager
def made_whole(temporary: Path, final: Path) -> Iterator[Path]:
    """A file or folder under a temporary name, renamed when it is done; RefineError, and nothing left, where there is no room for it."""
    try:
        yield temporary
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors' own kind for a full disk
            raise RefineError(f"could not write {final}: {first_line(error)}") from error
        raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a jsonl file, none if there is no file; a last line that an interruption cut off is left out.

    Raises:
        RefineError: another line is not a record.
    """
    records = []
    with expecting("a JSON object on every line", path):
        # By "\n" alone: text inside a record may hold Unicode's other line separators, which splitlines() takes too.
        for line in _whole_lines(path).decode("utf-8").split("\n"):
            if line:
                records.append(json.loads(line))
                if not isinstance(records[-1], dict):
                    raise TypeError(f"a {type(records[-1]).__name__}")
    return records


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a jsonl file, behind its last whole line."""
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
