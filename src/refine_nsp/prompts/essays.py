"""Read the haystack of RULER's needles: the user's essays, or English prose that every machine has."""

from __future__ import annotations

from pathlib import Path

from refine_nsp.errors import RefineError
from refine_nsp.text.reading import read_documents


def essay_words(name: str | None, text_column: str = "text") -> list[str]:
    """Read the words of the user's essays (a text, jsonl or parquet file, folder or hub name), or of Python's reference documentation.

    The default is the language reference that `help()` shows: every machine has it, it is English prose, and no shipped base was trained
    on it.
    """
    if name is None:
        from pydoc_data.topics import topics

        return " ".join(topics[k] for k in sorted(topics)).split()
    words = " ".join(text or "" for text in read_documents(name, (text_column,), also=())[text_column]).split()
    if not words:
        raise RefineError(f"{Path(name)} holds no words")
    return words
