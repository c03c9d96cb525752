"""Read and score the English and code tasks of LongBench (Bai et al., 2023, arXiv 2308.14508), with its prompts, budgets and metrics.

Rows come from local parquet or jsonl files or from a data set of the hub. They hold ready prompts, the benchmark's own columns (context,
input, answers), or its prompts in pieces (context, question, answer_prefix, answers). The score of LongBench is the mean over tasks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import load_dataset

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

# The benchmark's own data set on the hub (THUDM/LongBench) is a script, which `datasets` has not run since version 4. This copy of its
# rows, in Parquet, is what lm-eval reads.
HUB_NAME = "Xnhyacinth/LongBench"
CONVERTED = "refs/convert/parquet"  # the branch in which the hub keeps the rows of a script
ENDINGS = (".parquet", ".jsonl", ".json")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")

_PASSAGES = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
_MULTI_DOCUMENT = f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
# The benchmark itself writes "asconcisely".
_STORY = "as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the "
    'information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
    "Do not provide any explanation.\n\n"
)


@dataclass(frozen=True)
class LongBenchTask:
    """Define a task: its template with {context} and {input}, the tokens of an answer, and its metric.

    Of some only the first line is scored, since models continue few-shot prompts with further examples.
    """

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
# The paper's table leaves out the two tasks of long summaries.
PAPER_TASKS = tuple(t for t in TASKS if t not in ("gov_report", "multi_news"))


def read_longbench(tasks: Sequence[str], source: str | None = None) -> dict[str, list[Example]]:
    """Read the examples of tasks from a folder of LongBench's files or from a data set of the hub.

    The folder has `TASK*.parquet` or `TASK*.jsonl` (in itself, or in `data/`, or in a folder for each task), the data set a configuration
    for each task (default: `HUB_NAME`). A RefineError names a task that is unknown, has no file or several, or lacks columns or answers.
    """
    examples = {}
    for name in tasks:
        if name not in TASKS:
            raise RefineError(f"no LongBench task {name!r}{closest(name, TASKS)}; there are {', '.join(TASKS)}")
        examples[name] = [_example(name, i, row) for i, row in enumerate(_rows(name, source or HUB_NAME))]
        check_unique(name, examples[name])
    return examples


def _rows(name: str, source: str) -> Iterable[Mapping[str, object]]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return [row for file in _files_of(name, folder) for row in read_documents(str(file), ("prompt", "context"), split="test")]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        expected = f"a folder of TASK.parquet or TASK.jsonl files, or a data set of the hub such as {HUB_NAME}"
        raise RefineError(f"--longbench must be {expected}, got {source}")
    try:
        try:
            return load_dataset(source, name, split="test")
        except RuntimeError as error:  # a script is never run; the hub keeps its rows in Parquet on a branch of their own
            if "script" not in str(error):
                raise
            return load_dataset(source, name, split="test", revision=CONVERTED)
    except Exception as error:  # the network, and a missing name, configuration or branch, each raise their own kind
        seen = f"the hub did not give LongBench's {name} from {source} ({first_line(error)})"
        raise RefineError(f"{seen}; name a folder of its files with --longbench") from error


def _files_of(name: str, folder: Path) -> list[Path]:
    """Find the file of a task, or all its shards."""
    inside = sorted(p for p in (folder / name).rglob("*") if p.suffix in ENDINGS)
    beside = sorted(p for place in (folder, folder / "data") for p in place.glob("*") if p.suffix in ENDINGS)
    mine = [p for p in beside if _belongs(p.stem, name)]
    found = inside or [p for p in mine if p.stem == name] or mine
    if not found and (found := [p for p in beside if _belongs(p.stem, f"{name}_e")]):
        warnings.warn(f"{name} is read from {found[0].name}, LongBench-E's rows, since {folder} has no others", stacklevel=2)
    if not found:
        there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise RefineError(f"{folder} has no file for {name}; it holds {there}")
    if len({(p.parent, SHARD.sub("", p.stem)) for p in found}) > 1:
        raise RefineError(f"{folder} has several files for {name} ({', '.join(p.name for p in found)}); leave one there")
    return found


def _belongs(stem: str, name: str) -> bool:
    """Tell whether a file is a task's: hotpotqa_16384 is hotpotqa's, but hotpotqa_e (its even-length variant) is not."""
    rest = stem.removeprefix(name)
    return stem.startswith(name) and not rest[:1].isalnum() and not re.match(r"_e(?![^\W_])", rest)


def _example(name: str, index: int, row: Mapping[str, object]) -> Example:
    where, key = f"{name}, row {index}", row.get("_id", row.get("id", index))
    answers = as_answers(row.get("answers", row.get("answer")), where)
    prompt, context = _prompt(name, row, where), row.get("context")
    known = _context_in(name, prompt) if context is None else str(context)
    return Example(f"{name}-{key}", prompt, answers, TASKS[name].budget, {"index": index}, context=known)


def _context_in(name: str, prompt: str) -> str:
    """Return the context of a prompt that is given whole, by the benchmark's wording around it; empty where that does not show it."""
    head, _, behind = TASKS[name].prompt.partition("{context}")
    between, rest = behind.partition("{input}")[0], prompt.removeprefix(head)
    words = between.strip()
    if not prompt.startswith(head) or not between or (not words and rest.count(between) != 1):
        return ""
    return rest.rpartition(words or between)[0]


def _prompt(name: str, row: Mapping[str, object], where: str) -> str:
    """Build the benchmark's prompt from whichever columns hold it or its parts."""
    if row.get("prompt"):
        return str(row["prompt"])
    template, context = TASKS[name].prompt, row.get("context")
    asked = next((row[column] for column in ("input", "question") if row.get(column) is not None), None)
    if context is None or (asked is None and "{input}" in template):
        raise RefineError(f"{where}: expected a column `prompt`, or `context` and `input` (or `question`), got {', '.join(row)}")
    if not str(context).startswith(template.partition("{context}")[0]):
        return template.format(context=context, input=asked)
    # The context brings the instructions. The answer's beginning stands in a column of its own, unless the question ends with it.
    text, begun = f"{context}{asked or ''}", str(row.get("answer_prefix") or "")
    return text if text.rstrip().endswith(begun.strip()) else text + begun


def score(name: str, output: str, references: Sequence[str]) -> float:
    """Score one output as the benchmark does, 0..1."""
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
