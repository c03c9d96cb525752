"""LongBench (Bai et al., 2023, arXiv 2308.14508): English and code tasks, with the benchmark's prompts, budgets and metrics.

Rows come from local parquet or jsonl files whose prompts are ready, or with the benchmark's own columns (context, input, answers),
which the hub has. The score of LongBench is the mean over tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from refine_nsp.errors import RefineError, closest, first_line
from refine_nsp.evaluation.text_metrics import (
    TREC_CLASSES,
    Metric,
    best_similarity,
    classification,
    code_similarity,
    first_code_line,
    qa_f1,
    rouge_l,
    split_references,
)
from refine_nsp.prompts.examples import Example, as_answers, check_unique
from refine_nsp.text.reading import read_documents

_PASSAGES = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
_MULTI_DOCUMENT = f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
# "asconcisely" is the benchmark's.
_STORY = "as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the "
    'information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
    "Do not provide any explanation.\n\n"
)


@dataclass(frozen=True)
class LongBenchTask:
    """prompt: with {context} and {input}. budget: tokens. first_line: only the first line is scored (few-shot tasks go on)."""

    prompt: str
    budget: int
    metric: Metric
    metric_name: str
    first_line: bool = False


TASKS = {
    "narrativeqa": LongBenchTask(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely "
        f"{_STORY}Story: {{context}}\n\nNow, answer the question based on the story asconcisely {_STORY}Question: {{input}}\n\nAnswer:",
        128, qa_f1, "f1",
    ),
    "qasper": LongBenchTask(
        f"You are given a scientific article and a question. Answer the question {_ARTICLE}Article: {{context}}\n\n Answer the "
        f"question based on the above article {_ARTICLE}Question: {{input}}\n\nAnswer:",
        128, qa_f1, "f1",
    ),
    "multifieldqa_en": LongBenchTask(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above text, "
        "only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64, qa_f1, "f1",
    ),
    "hotpotqa": LongBenchTask(_MULTI_DOCUMENT, 32, qa_f1, "f1"),
    "2wikimqa": LongBenchTask(_MULTI_DOCUMENT, 32, qa_f1, "f1"),
    "musique": LongBenchTask(_MULTI_DOCUMENT, 32, qa_f1, "f1"),
    "gov_report": LongBenchTask(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\nNow, write "
        "a one-page summary of the report.\n\nSummary:",
        512, rouge_l, "rouge_l",
    ),
    "qmsum": LongBenchTask(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more "
        "sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more "
        "sentences.\n\nQuery: {input}\nAnswer:",
        512, rouge_l, "rouge_l",
    ),
    "multi_news": LongBenchTask(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write a one-page "
        "summary of all the news.\n\nSummary:",
        512, rouge_l, "rouge_l",
    ),
    "trec": LongBenchTask(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64, partial(classification, classes=TREC_CLASSES), "accuracy", first_line=True,
    ),
    "triviaqa": LongBenchTask(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following "
        "are some examples.\n\n{context}\n\n{input}",
        32, qa_f1, "f1", first_line=True,
    ),
    "samsum": LongBenchTask(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128, rouge_l, "rouge_l", first_line=True,
    ),
    "lcc": LongBenchTask("Please complete the code given below. \n{context}Next line of code:\n", 64, code_similarity, "similarity"),
    "repobench-p": LongBenchTask(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", 64, code_similarity, "similarity"
    ),
}  # fmt: skip
# The paper's table leaves out the two long summaries.
PAPER_TASKS = tuple(t for t in TASKS if t not in ("gov_report", "multi_news"))


def read_longbench(tasks: Sequence[str], source: str | None) -> dict[str, list[Example]]:
    """Examples by task, from a folder of `TASK*.parquet` or `TASK*.jsonl` files, or (source None) from the hub.

    Raises:
        RefineError: an unknown task, no file for it, missing columns, empty answers, or an unreachable hub.
    """
    examples = {}
    for name in tasks:
        if name not in TASKS:
            raise RefineError(f"no LongBench task {name!r}{closest(name, TASKS)}; there are {', '.join(TASKS)}")
        if source is None:
            rows = _from_hub(name)
        else:
            rows = read_documents(str(_file_of(name, Path(source))), ("prompt", "context"), split="test")
        examples[name] = [_example(name, i, row) for i, row in enumerate(rows)]
        check_unique(name, examples[name])
    return examples


def _from_hub(name: str) -> Dataset | IterableDataset:
    try:
        return load_dataset("THUDM/LongBench", name, split="test")
    except Exception as error:  # network, or a repository that has only a script, which is never run
        raise RefineError(
            f"the hub did not give LongBench's {name} ({first_line(error)}); name a folder of its files with --longbench"
        ) from error


def _file_of(name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise RefineError(f"--longbench must be a folder of TASK.parquet or TASK.jsonl files, got {folder}")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".parquet", ".jsonl", ".json") and p.stem.startswith(name))
    # "hotpotqa" must not take "hotpotqa_e", its even-length variant, when its own file is there.
    files = [p for p in files if not p.stem.startswith(f"{name}_e")] or files
    if not files:
        there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise RefineError(f"{folder} has no file for {name}; it holds {there}")
    return files[0]


def _example(name: str, index: int, row: Mapping[str, Any]) -> Example:
    task, where = TASKS[name], f"{name}, row {index}"
    prompt = row.get("prompt") or task.prompt.format(context=row["context"], input=row.get("input", ""))
    key = row.get("_id", row.get("id", index))
    return Example(
        f"{name}-{key}", prompt, as_answers(row.get("answers", row.get("answer")), where), task.budget, {"index": index}
    )


def score(name: str, output: str, references: Sequence[str]) -> float:
    """The benchmark's score of one output, 0..1."""
    task = TASKS[name]
    text = output.lstrip("\n").split("\n")[0] if task.first_line else output
    return task.metric(text, references)


def published_score(name: str, output: str, references: Sequence[str]) -> float:
    """Score as the paper's code does (its `reward_score/longbench.py`).

    References are joined and split on "|"; of QA answers only the first line counts, taken before stripping; where no line is code, the
    whole response is compared.
    """
    task = TASKS[name]
    references = split_references(references)
    if task.metric is code_similarity:
        code = first_code_line(output)
        return best_similarity(output if code is None else code, references)
    if task.first_line:
        output = output.lstrip("\n").split("\n")[0]
    elif task.metric is qa_f1:
        output = output.split("\n")[0]
    return task.metric(output.strip(), references)
