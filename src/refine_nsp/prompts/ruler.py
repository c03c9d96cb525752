"""Generate the 13 tasks of RULER (Hsieh et al., 2024, arXiv 2404.06654) for any tokenizer and length.

Prompts, answer prefixes, budgets and metrics are the benchmark's (NVIDIA/RULER, `synthetic.yaml`). Each example is filled by itself with as
many whole units of its haystack (words of essays, sentences, ...) as fit with its budget into the length; the benchmark searches one size
for all examples. Every example has its own seed, so any number of processes builds the same set.
"""

from __future__ import annotations

import json
import math
import random
import re
import string
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any

from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError, closest
from refine_nsp.prompts.encoding import encode_prompt
from refine_nsp.prompts.examples import Example
from refine_nsp.prompts.qa_sources import QASource, Question
from refine_nsp.prompts.ruler_words import distinct, draw_word, word_lists
from refine_nsp.text.reading import read_documents

Draft = tuple[str, list[str], dict[str, object], str]  # prompt, references, meta, context (what `read_twice` gives twice)
Build = Callable[[int], Draft]  # makes a draft with so many units of haystack, from the same draws for every size


@dataclass(frozen=True)
class Needles:
    """Define a needle task: what its haystack, keys and values are, and how many needles there are."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}
BUDGETS = {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
TASKS = tuple(BUDGETS)
QA_TASKS = {"qa_1": "squad", "qa_2": "hotpotqa"}
SHORT_LENGTH = 4096  # tokens below which cwe repeats its words less often, as the benchmark does
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


@dataclass(frozen=True)
class Job:
    """Name one example to build; `depth` is where the needle that is asked for stands, None at random."""

    task: str
    length: int
    index: int
    depth: float | None


@dataclass(frozen=True)
class Sources:
    """Hold the texts that tasks draw from: `essays`, the words of the haystack, and `qa`, the questions of qa_1 and qa_2 by task."""

    essays: Sequence[str]
    qa: dict[str, QASource] = field(default_factory=dict)


def essay_words(name: str | None, text_column: str = "text") -> list[str]:
    """Read the words of the user's essays (a text, jsonl or parquet file, folder or hub name), or of Python's reference documentation.

    The default is what `help()` shows: every machine has it, it is English prose, and no shipped base was trained on it.
    """
    if name is None:
        from pydoc_data.topics import topics

        return " ".join(topics[k] for k in sorted(topics)).split()
    if words := " ".join(text or "" for text in read_documents(name, (text_column,), also=())[text_column]).split():
        return words
    raise RefineError(f"{name} holds no words")


def build_ruler(
    tasks: Sequence[str], lengths: Sequence[int], samples: int, tokenizer: PreTrainedTokenizerBase, sources: Sources,
    seed: int = 42, depths: Sequence[float] | None = None, num_proc: int | None = None, left_out: dict[str, list[str]] | None = None,
) -> dict[str, list[Example]]:  # fmt: skip
    """Build `samples` examples of every task and length, and of every depth (shares 0..1) of needle tasks where `depths` are given.

    A length that a task or some of its examples do not fit into is left out with a warning.

    Args:
        lengths: prompt and generation budget together, in tokens of `tokenizer` (with BOS, where it has one).
        num_proc: processes that build them; the result does not depend on it.
        left_out: a dict that is filled with sentences on what is left out, by task.

    Raises:
        RefineError: a task is unknown or has no questions, no task fits into the lengths, or a depth lies outside 0..1.
    """
    jobs: list[Job] = []
    for task in tasks:
        if task not in BUDGETS:
            raise RefineError(f"no RULER task {task!r}{closest(task, TASKS)}; there are {', '.join(TASKS)}")
        if task in QA_TASKS and task not in sources.qa:
            raise RefineError(f"{task} needs {QA_TASKS[task]} questions: name a file or hub dataset with --{QA_TASKS[task]}")
        where = depths if depths and task in NEEDLES else [None]
        jobs += [Job(task, n, i, d) for n in lengths for d in where for i in range(samples)]
    if depths and not all(0 <= d <= 1 for d in depths):
        raise RefineError(f"depths must be between 0 and 1, got {list(depths)}")
    one = partial(_build_one, tokenizer=tokenizer, sources=sources, seed=seed)
    if num_proc is None or num_proc <= 1 or len(jobs) < 2:
        rows = [one(*astuple(job)) for job in track(jobs, "RULER prompts", transient=True)]
    else:
        table = Dataset.from_list([asdict(job) for job in jobs])
        rows = list(table.map(one, input_columns=table.column_names, num_proc=min(num_proc, len(jobs)), desc="RULER prompts"))
    examples: dict[str, list[Example]] = {task: [] for task in tasks}
    for row in rows:
        if not row["problem"]:
            meta = json.loads(row["meta"])
            examples[row["task"]].append(
                Example(row["id"], row["prompt"], list(row["references"]), row["budget"], meta, context=row["context"])
            )
    problems = _problems(jobs, rows)
    if jobs and not any(examples.values()):
        raise RefineError(next(iter(problems.values()))[0])
    for sentence in chain.from_iterable(problems.values()):
        warnings.warn(sentence, stacklevel=2)
    if left_out is not None:
        left_out |= problems
    return examples


def _problems(jobs: Sequence[Job], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Say by task, in a sentence for each length, what does not fit."""
    by_length: dict[tuple[str, int], list[str]] = {}
    for job, row in zip(jobs, rows, strict=True):
        by_length.setdefault((job.task, job.length), []).append(row["problem"])
    said: dict[str, list[str]] = {}
    for (task, _), found in by_length.items():
        if there := [p for p in found if p]:
            some = "" if len(there) == len(found) else f"; {len(there)} of {len(found)} prompts are left out"
            said.setdefault(task, []).append(there[0] + some)
    return said


def _build_one(
    task: str, length: int, index: int, depth: float | None, tokenizer: PreTrainedTokenizerBase, sources: Sources, seed: int
) -> dict[str, Any]:
    """Build one example as a row. Where it does not fit, `problem` says so and the prompt is empty."""
    name = f"{task}-{length}-{index}" + (f"-{depth:g}" if depth is not None else "")
    row = {"task": task, "id": f"{name}-seed{seed}", "budget": BUDGETS[task], "problem": ""}

    def tokens(draft: Draft) -> int:
        return len(encode_prompt(tokenizer, draft[0]))

    build, smallest, largest = _builder(Job(task, length, index, depth), sources, f"{seed}-{name}", tokens)
    try:
        prompt, references, meta, context = fit(build, tokens, length - BUDGETS[task], smallest, largest, f"{task} at {length}")
    except DoesNotFitError as error:
        return {**row, "prompt": "", "references": [], "meta": "{}", "context": "", "problem": str(error)}
    told = json.dumps({"length": length, "index": index, **meta})
    return {**row, "prompt": prompt, "references": references, "meta": told, "context": context}


def _builder(job: Job, sources: Sources, seed: str, tokens: Callable[[Draft], int]) -> tuple[Build, int, int | None]:
    """Choose what builds an example, and the least and the most units (None: any number) that it can have."""
    task, length, index = job.task, job.length, job.index
    if task in NEEDLES:
        needles = NEEDLES[task]
        smallest = 1 if needles.haystack == "essay" else needles.num_keys * needles.num_values
        return partial(_needles, needles, sources.essays, job.depth, seed), smallest, None
    if task == "vt":
        return partial(_variables, seed, _worked_chain(seed, length, tokens)), VARIABLE_HOPS + 1, None
    if task == "cwe":
        return partial(_common_words, seed, length), COMMON_WORDS + 1, None
    if task == "fwe":
        return partial(_frequent_words, seed, length - BUDGETS[task]), 32, None
    source = sources.qa[task]
    if index >= len(source.questions):
        raise RefineError(f"{task} has {len(source.questions)} questions, so no sample {index}; lower --samples")
    question = source.questions[index]
    return partial(_documents, source, question, seed), len(question.documents), len(source.documents)


class DoesNotFitError(RefineError):
    """A length that cannot hold even the smallest prompt of a task."""


def fit(build: Build, tokens: Callable[[Draft], int], limit: int, smallest: int, largest: int | None, what: str) -> Draft:
    """Find the draft with the most units whose tokens stay within `limit`. DoesNotFitError: not even `smallest` units fit."""
    draft = build(smallest)
    used = tokens(draft)
    if used > limit:
        raise DoesNotFitError(f"{what} tokens: its smallest prompt takes {used} tokens, {limit} are left for it; raise --lengths")
    low, low_tokens, best = smallest, used, draft
    high = math.inf if largest is None else largest + 1
    step = max(1, smallest)
    while high - low > 1:
        guess = int(min(low + step, high - 1))
        draft = build(guess)
        used = tokens(draft)
        if used > limit:
            high = guess
            step = max(1, int(high - low) // 2)
        else:
            # Haystacks are nearly linear in tokens, so the next guess is where the rate of the last stretch reaches the limit.
            rate = max((used - low_tokens) / (guess - low), 1e-3)
            low, low_tokens, best = guess, used, draft
            step = max(1, int((limit - used) / rate))
    return best


NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NEEDLE_QUESTION = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
    "afterwards.\n{context}\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text {are}"
)


def _needles(task: Needles, essays: Sequence[str], depth: float | None, seed: str, units: int) -> Draft:
    rng = random.Random(seed)
    keys = distinct(partial(draw_word, rng, task.keys), task.num_keys)
    values = [[draw_word(rng, task.values) for _ in range(task.num_values)] for _ in keys]
    asked = rng.sample(range(len(keys)), task.num_queries)
    single = task.num_queries * task.num_values == 1
    kind = task.values
    sentences = [(i in asked, NEEDLE.format(kind=kind, key=keys[i], value=v)) for i, row in enumerate(values) for v in row]
    rng.shuffle(sentences)
    # All needles stand at random depths, except that those asked for stand at `depth` where one is given.
    placed = [(depth if depth is not None and wanted else rng.random(), text) for wanted, text in sentences]
    context = _haystack(task, essays, sorted(placed, key=lambda needle: needle[0]), rng, units)
    query = ", ".join(keys[i] for i in asked[:-1]) + (", and " if len(asked) > 1 else "") + keys[asked[-1]]
    singular = {"some": "A", "are": "is", "are_all": "is", "kind": kind[:-1]}
    plural = {"some": "Some", "are": "are", "are_all": "are all", "kind": kind}
    prompt = NEEDLE_QUESTION.format(context=context, query=query, **(singular if single else plural))
    references = [v for i in asked for v in values[i]]
    return prompt, references, {"depth": round(context.find(references[0]) / max(1, len(context)), 4)}, context


def _haystack(task: Needles, essays: Sequence[str], placed: list[tuple[float, str]], rng: random.Random, units: int) -> str:
    """Write `units` words of essays, sentences of noise or other needles, with the needles of `placed` at their depths."""
    if task.haystack == "essay":
        words = [essays[i % len(essays)] for i in range(units)]
        pieces, glue = re.split(r"(?<=[.!?]) ", " ".join(words)), " "
    elif task.haystack == "noise":
        pieces, glue = [NOISE[i % len(NOISE)] for i in range(units)], " "
    else:
        drawn = ((draw_word(rng, task.keys), draw_word(rng, task.values)) for _ in range(units))
        pieces, glue = [NEEDLE.format(kind=task.values, key=key, value=value) for key, value in drawn], "\n"
    slots: dict[int, list[str]] = {}
    for depth, needle in placed:
        slots.setdefault(round(depth * len(pieces)), []).append(needle)
    if task.haystack == "noise":
        return _noise_lines(pieces, slots)
    parts: list[str] = []
    for i in range(len(pieces) + 1):
        parts += slots.get(i, [])
        parts += pieces[i : i + 1]
    return glue.join(parts)


def _noise_lines(sentences: list[str], slots: dict[int, list[str]]) -> str:
    """Join noise to lines of its five sentences, and put each needle on a line of its own between them."""
    lines: list[str] = []
    for start in range(0, len(sentences) + 1, len(NOISE)):
        for i in range(start, start + len(NOISE)):
            lines += slots.get(i, [])
        if line := " ".join(sentences[start : start + len(NOISE)]):
            lines.append(line)
    return "\n".join(lines)


VARIABLE_HOPS = 4
VARIABLE_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables "
    "that are assigned the value {value} in the text above. Answer: According to the chain(s) of variable assignment in the text "
    "above, {count} variables are assigned the value {value}, they are: "
)
EXAMPLE_TOKENS = 500  # the worked example takes at most so many, as in the benchmark


def _variables(seed: str, example: str, lines: int) -> Draft:
    prompt, variables, context = variable_text(random.Random(seed), lines, 5)
    return f"{example}\n\n{prompt}", variables, {}, context


def _worked_chain(seed: str, length: int, tokens: Callable[[Draft], int]) -> str:
    """Write the worked example, with as much noise as 500 tokens hold, and its answer, which is not counted.

    In prompts of fewer than 2,000 tokens, which the benchmark does not make, the example is cut to keep its share.
    """

    def build(lines: int) -> Draft:
        text, names, context = variable_text(random.Random(f"{seed}-example"), lines, 3)
        return text, names, {}, context

    smallest = VARIABLE_HOPS + 1
    try:
        prompt, answer, *_ = fit(build, tokens, min(EXAMPLE_TOKENS, length // 4), smallest, None, "vt's example")
    except DoesNotFitError:
        prompt, answer, *_ = build(smallest)
    return f"{prompt} {' '.join(answer)}"


def variable_text(rng: random.Random, lines: int, name_length: int, hop_end: str = " ") -> tuple[str, list[str], str]:
    """Write a chain of variables into `lines` lines of noise and ask for it. Return the text, the variables, and the lines.

    `hop_end` ends every statement but the first; the space is the benchmark's.
    """
    chain = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=name_length)), VARIABLE_HOPS + 1)
    value = str(rng.randint(10000, 99999))
    statements = [f"VAR {chain[0]} = {value}"] + [f"VAR {b} = VAR {a}{hop_end}" for a, b in pairwise(chain)]
    text = [" ".join(NOISE)] * lines
    where = sorted(rng.sample(range(lines), len(statements)))
    for shift, (at, statement) in enumerate(zip(where, statements, strict=True)):
        text.insert(at + shift, statement)
    context = "\n".join(text)
    return VARIABLE_PROMPT.format(context=context, value=value, count=len(chain)), chain, context


COMMON_WORDS = 10
COMMON_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
    "{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the "
    "list are:"
)


def _common_words(seed: str, length: int, words: int) -> Draft:
    rng = random.Random(seed)
    short = length < SHORT_LENGTH
    example, answer = _word_list(random.Random(f"{seed}-example"), *((20, 3, 1) if short else (40, 10, 3)))
    context, common = _word_list(rng, words, *((6, 1) if short else (30, 3)))
    shown = " ".join(f"{i}. {w}" for i, w in enumerate(answer, 1))
    return f"{COMMON_PROMPT.format(context=example)} {shown}\n{COMMON_PROMPT.format(context=context)}", common, {}, context


def _word_list(rng: random.Random, words: int, repeats: int, other_repeats: int) -> tuple[str, list[str]]:
    """Write a numbered list in which ten words stand `repeats` times and the others `other_repeats` times. Return it and the ten words."""
    nouns, adjectives, verbs = word_lists()
    known = sorted({*nouns, *adjectives, *verbs})
    # Beyond the word list (some 100 k tokens) adjective-noun pairs are added; the benchmark has a second list there.
    chosen = rng.sample(known, min(words, len(known)))
    chosen += distinct(partial(draw_word, rng, "words"), words - len(chosen))
    listed = chosen[:COMMON_WORDS] * repeats + chosen[COMMON_WORDS:] * other_repeats
    rng.shuffle(listed)
    return " ".join(f"{i}. {w}" for i, w in enumerate(listed, 1)), chosen[:COMMON_WORDS]


FREQUENT_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
    "{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
    "words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
)
ZETA_2 = math.pi**2 / 6


def _frequent_words(seed: str, max_tokens: int, count: int) -> Draft:
    """Write a text in which the word of rank k stands count * k^-2 / zeta(2) times; the most frequent one is noise."""
    rng = random.Random(seed)
    vocabulary = distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), max(5, max_tokens // 50))
    words = ["...", *vocabulary[1:]]
    text = [w for k, w in enumerate(words, 1) for _ in range(int(count / k**2 / ZETA_2))]
    rng.shuffle(text)
    context = " ".join(text)
    return FREQUENT_PROMPT.format(context=context), words[1:4], {}, context


QA_PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following are "
    "given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer and do not output any "
    "other words.\n\nQuestion: {question} Answer:"
)


def _documents(source: QASource, question: Question, seed: str, count: int) -> Draft:
    """Choose the question's own documents first, then others of the same article, then any; and ask the question behind them, shuffled."""
    rng = random.Random(seed)
    own, near = list(question.documents), list(question.same_article)
    rng.shuffle(near)
    taken = set(own) | set(near)
    far = [i for i in range(len(source.documents)) if i not in taken]
    rng.shuffle(far)
    chosen = (own + near + far)[:count]
    random.Random(f"{seed}-order").shuffle(chosen)
    context = "\n\n".join(f"Document {i}:\n{source.documents[d]}" for i, d in enumerate(chosen, 1))
    return QA_PROMPT.format(context=context, question=question.text), question.answers, {"documents": count}, context
