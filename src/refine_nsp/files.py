"""Files that an interruption cannot spoil: written whole or not at all, or line by line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> Path:
    """Write a file under a temporary name, then rename: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a jsonl file, none if there is no file; a last line that an interruption cut off is left out."""
    # By "\n" alone: text inside a record may hold Unicode's other line separators, which splitlines() takes too.
    return [json.loads(line) for line in _whole_lines(path).decode("utf-8").split("\n") if line]


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a jsonl file, behind its last whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
