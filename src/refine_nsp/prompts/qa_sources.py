"""Read questions on documents: SQuAD and HotpotQA as published (json), as rows (jsonl, parquet), or from the hub."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine_nsp.errors import RefineError
from refine_nsp.files import expecting
from refine_nsp.prompts.examples import ANSWER_COLUMNS, answers_in, as_answers
from refine_nsp.text.reading import read_documents


@dataclass(frozen=True)
class Question:
    """Hold a question with its answers, and the indices of the documents that answer it.

    `same_article` are indices of other documents of the same article, which are the hardest to tell apart.
    """

    id: str
    text: str
    answers: list[str]
    documents: tuple[int, ...]
    same_article: tuple[int, ...] = ()


@dataclass(frozen=True)
class QASource:
    """Hold questions, and the documents they point to, each once."""

    questions: list[Question]
    documents: list[str]


FURTHER = (*ANSWER_COLUMNS, "is_impossible", "context", "paragraphs", "title", "id", "_id")  # columns next to `question`
Raw = tuple[str, str, list[str], list[str], str]  # id, question, answers (none where it has none), documents, article


def read_qa(name: str, split: str = "validation") -> QASource:
    """Read questions from a file (json as published; jsonl, parquet rows) or a hub dataset.

    Rows have question, answers (or answer), and `context` (a paragraph; with `title` as its article), `paragraphs` (title, text) or
    HotpotQA's `context` (titles and sentences). Questions without an answer (SQuAD 2.0) are left out, with a warning that counts them.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RefineError(f"{path} is not valid JSON: {error}") from error
    else:
        loaded = read_documents(name, ("question",), split=split, also=FURTHER, as_found=True)
    with expecting("SQuAD's or HotpotQA's own layout, or rows of question, answers and context", name):
        there = list(_squad(loaded["data"]) if isinstance(loaded, Mapping) and "data" in loaded else _rows(loaded, name))
        raw = [question for question in there if question is not None]
        for _, text, _, documents, _ in raw:
            if not all(isinstance(part, str) for part in (text, *documents)):
                raise TypeError(f"the question or a document of {text!r} is not text")
    if not raw:
        raise RefineError(f"{name} holds no question that can be answered")
    if len(raw) < len(there):
        warnings.warn(f"{name}: {len(there) - len(raw)} of {len(there)} questions have no answer and are left out", stacklevel=2)
    index: dict[str, int] = {}
    articles: dict[str, dict[int, None]] = {}
    for _, _, _, documents, article in raw:
        for d in documents:
            at = index.setdefault(d, len(index))
            if article:
                articles.setdefault(article, {})[at] = None
    questions = []
    for key, text, answers, documents, article in raw:
        own = tuple(dict.fromkeys(index[d] for d in documents))
        near = tuple(i for i in articles.get(article, {}) if i not in own)
        questions.append(Question(key, text, answers, own, near))
    return QASource(questions, list(index))


def _squad(articles: Iterable[Mapping[str, Any]]) -> Iterable[Raw | None]:
    """Yield the questions of SQuAD's own files, 1.1 and 2.0, and None for each question without an answer."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            for q in paragraph["qas"]:
                answers, title = _answers(q, f"question {q['id']}"), str(article.get("title") or "")
                yield (str(q["id"]), q["question"], answers, [paragraph["context"]], title) if answers else None


def _rows(rows: Iterable[Mapping[str, Any]], name: str) -> Iterable[Raw | None]:
    """Yield the questions of rows, and None for each question without an answer."""
    for i, row in enumerate(rows):
        where = f"{name}, row {i}"
        if "question" not in row:
            raise RefineError(f"{where}: no question; it has {', '.join(row)}")
        if answers := _answers(row, where):
            documents = _documents_of(row, where)
            # A question with one paragraph is SQuAD's: paragraphs with the same title are its neighbours.
            article = str(row.get("title") or "") if len(documents) == 1 else ""
            yield str(row.get("id", row.get("_id", i))), row["question"], answers, documents, article
        else:
            yield None


def _answers(row: Mapping[str, object], where: str) -> list[str]:
    """List a question's answers; none where the data say that it has none. Raises RefineError for blanks, or without any such column."""
    names = [name for name in ANSWER_COLUMNS if name in row]
    if row.get("is_impossible"):
        return []
    if not names:
        raise RefineError(f"{where}: no answer; expected a column answers or answer, got {', '.join(row)}")
    value = next((row[name] for name in names if row[name] is not None), None)
    given = value.get("text", value) if isinstance(value, Mapping) else value
    return as_answers(value, where) if given or isinstance(given, int | float) else answers_in(value, where)


def _documents_of(row: Mapping[str, Any], where: str) -> list[str]:
    if row.get("paragraphs"):
        return [f"{p['title']}\n{p['text']}" for p in row["paragraphs"]]
    context = row.get("context")
    if isinstance(context, str) and context.strip():
        return [context]
    if isinstance(context, Mapping):  # HotpotQA on the hub
        return [f"{t}\n{''.join(s)}" for t, s in zip(context["title"], context["sentences"], strict=True)]
    if isinstance(context, list) and context:  # HotpotQA as published
        return [f"{title}\n{''.join(sentences)}" for title, sentences in context]
    raise RefineError(f"{where}: no document; expected a column `context` or `paragraphs`, got {', '.join(row)}")
