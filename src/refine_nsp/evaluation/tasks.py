"""Build the tasks of an evaluation by name from their sources. Each task yields one row for each example."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.evaluation import likelihood, longbench
from refine_nsp.evaluation.arguments import GROUPS, EvaluationArguments
from refine_nsp.evaluation.documents import continuation_match, score_document
from refine_nsp.evaluation.text_metrics import MATCHES, published_any_match
from refine_nsp.models.generation import Decoding, Request, answer_all, decode, end_tokens, prefill
from refine_nsp.models.protocols import CausalModel
from refine_nsp.prompts import ruler
from refine_nsp.prompts.encoding import encode_prompt, encode_text, render, truncate_middle
from refine_nsp.prompts.examples import Example, in_row, read_prompts
from refine_nsp.prompts.qa_sources import read_qa
from refine_nsp.prompts.read_twice import MarkedPrompt, find_context, mark_context, new_line
from refine_nsp.text.reading import read_documents

PUBLISHED_BUDGET = 32
Scores = dict[str, float]
Score = Callable[[str, Sequence[str]], Scores]  # the figures of an answer, given its references


class AdaptationCost(Protocol):
    """Say what it cost to adapt to a batch of prompts, all of them together."""

    seconds: float
    extra_bytes: int


class Adapter(Protocol):
    """Adapt a model to prompts (each a list of tokens) inside a context, by test-time training; `last` is what that cost."""

    @property
    def last(self) -> AdaptationCost | None: ...

    def adapt(self, prompt: Sequence[Sequence[int]]) -> AbstractContextManager[object]: ...


@dataclass(frozen=True)
class Row:
    """Hold the outcome of one example: figures by name, the main one first, and how much it counts in a mean (a document's targets).

    `question` is the digest of what was asked, by which two runs are compared; empty in folders of earlier releases.
    """

    id: str
    output: str
    references: list[str]
    scores: Scores
    weight: float = 1.0
    meta: dict[str, Any] = field(default_factory=dict)
    question: str = ""


def digest(*asked: object) -> str:
    """Hash what is asked, such as a prompt with its references, or a text with how much of it counts. Equal questions have equal hashes."""
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, default=str).encode(errors="surrogatepass")).hexdigest()[:16]


@dataclass
class Context:
    """Hold what a task works with.

    Attributes:
        batch_tokens: tokens of a batch, which bound the memory.
        adapter: test-time training before each answer, `adapt_together` prompts at a time; None: no adaptation.
        on_tokens: called with the number of tokens that were run, to show progress.
        cost: what adapting to each prompt of the latest batch cost, in seconds and bytes.
    """

    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    batch_tokens: int
    adapter: Adapter | None = None
    adapt_together: int = 1
    on_tokens: Callable[[int], None] = lambda n: None
    cost: dict[str, float] = field(default_factory=dict)


class Task(Protocol):
    """Know what each example asks, by id, and yield rows for some of the ids; `notes` belong under the task's table."""

    name: str
    notes: list[str]

    def questions(self) -> dict[str, str]: ...

    def rows(self, wanted: Sequence[str], context: Context) -> Iterator[Row]: ...


@dataclass
class GenerationTask:
    """Let the model answer prompts, and score each answer.

    Attributes:
        add_bos, cut: how prompts become tokens; the paper's code gives them no special tokens and cuts long ones on the right.
        read_twice: whether a prompt's context is given twice before its question. What `max_prompt_tokens` limits, and what test-time
            training adapts to, is the prompt as it is read once.
    """

    name: str
    examples: list[Example]
    score: Score
    decoding: Decoding = field(default_factory=Decoding)
    max_prompt_tokens: int = 0
    add_bos: bool = True
    cut: Callable[[Sequence[int], int], list[int]] = truncate_middle
    read_twice: bool = False
    notes: list[str] = field(default_factory=list)

    def questions(self) -> dict[str, str]:
        """Return the digest of each prompt with its references, by id."""
        return {e.id: digest(e.prompt, e.template, e.references) for e in self.examples}

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find, before any prompt is answered, a conversation that the template refuses and a context that cannot be read twice."""
        for key, e in enumerate(self.examples):
            with in_row(self._where(key)):
                text = self._text(e, tokenizer)
                if self.read_twice:
                    find_context(text, e.context)

    def rows(self, wanted: Sequence[str], context: Context) -> Iterator[Row]:
        """Answer prompts and score the answers. With `context.adapter` each prompt is answered by the weights adapted to it."""
        place = {e.id: i for i, e in enumerate(self.examples)}
        read_once = {place[i]: self._read_once(place[i], context.tokenizer) for i in wanted}
        requests = [self._request(key, context.tokenizer, marked) for key, marked in read_once.items()]
        once = {key: marked.ids for key, marked in read_once.items()}
        eos = end_tokens(context.model, context.tokenizer)
        if context.adapter is None:
            batches = answer_all(context.model, requests, eos, self.decoding, context.batch_tokens, context.on_tokens)
        else:
            batches = self._answer_adapted(requests, once, eos, context)
        for batch in batches:
            for request, tokens in batch:
                yield self._row(request, tokens, len(once[request.key]), context)

    def _answer_adapted(
        self, requests: Sequence[Request], once: Mapping[int, list[int]], eos: set[int], context: Context
    ) -> Iterator[list[tuple[Request, list[int]]]]:
        """Answer each prompt by weights adapted to what it says once: a second copy would teach copying, at twice the time."""
        assert context.adapter is not None
        size = context.adapt_together
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            rows = [r.ids for r in batch]
            shortest = min(batch, key=lambda r: len(once[r.key]))  # an error about a prompt that is too short is about this one
            with in_row(self._where(shortest.key)), context.adapter.adapt([once[r.key] for r in batch]):
                clock = time.perf_counter()
                hidden, cache = prefill(context.model, rows)
                tokens = decode(context.model, hidden, cache, batch, eos, self.decoding, keep_rows=True)
                seconds = time.perf_counter() - clock
            last = context.adapter.last
            assert last is not None
            cost = {"adapt_seconds": last.seconds, "answer_seconds": seconds, "extra_bytes": last.extra_bytes}
            context.cost = {name: total / len(batch) for name, total in cost.items()}
            context.on_tokens(sum(map(len, rows)))
            yield list(zip(batch, tokens, strict=True))

    def _where(self, key: int) -> str:
        """Name an example as errors do."""
        e = self.examples[key]
        return e.where or f"{self.name}, example {e.id}"

    def _text(self, e: Example, tokenizer: PreTrainedTokenizerBase) -> str:
        return e.prompt if isinstance(e.prompt, str) else render(tokenizer, e.prompt, **e.template)

    def _read_once(self, key: int, tokenizer: PreTrainedTokenizerBase) -> MarkedPrompt:
        """Encode a prompt as it is read once, cut to its limit. Its context is marked where it will be read twice."""
        e = self.examples[key]
        encode = partial(encode_prompt if self.add_bos else encode_text, tokenizer)
        with in_row(self._where(key)):
            text = self._text(e, tokenizer)
            marked = mark_context(encode, text, find_context(text, e.context) if self.read_twice else (0, 0))
            if not marked.ids:
                raise RefineError("the prompt has no token that the tokenizer knows")
            return marked.cut(self.cut, self.max_prompt_tokens) if self.max_prompt_tokens else marked

    def _request(self, key: int, tokenizer: PreTrainedTokenizerBase, marked: MarkedPrompt | None = None) -> Request:
        marked = marked or self._read_once(key, tokenizer)
        ids = marked.twice(new_line(tokenizer)) if self.read_twice else marked.ids
        return Request(key, ids, self.examples[key].budget)

    def _row(self, request: Request, tokens: list[int], once_tokens: int, context: Context) -> Row:
        e = self.examples[request.key]
        output = str(context.tokenizer.decode(tokens, skip_special_tokens=True))
        lengths = {"once_tokens": once_tokens} if self.read_twice else {}
        meta = {**e.meta, "prompt_tokens": len(request.ids), **lengths, "new_tokens": len(tokens), **context.cost}
        return Row(e.id, output, e.references, self.score(output, e.references), 1.0, meta)


def _published_qa(output: str, references: Sequence[str]) -> Scores:
    return {"any_match": published_any_match(output, references)}


def truncate_right(ids: Sequence[int], limit: int) -> list[int]:
    """Keep the first `limit` tokens, as the paper's code does, which cuts off a long prompt's question."""
    return list(ids[:limit])


def _match_scores(main: str) -> Score:
    """Make a function that scores an answer by the metric `main` first, then by any and by fraction of its references."""
    order = [main, *(m for m in ("any_match", "fraction_match") if m != main)]
    return lambda output, references: {m: MATCHES[m](output, references) for m in order}


def _longbench_scores(name: str, published: bool) -> Score:
    metric, function = longbench.TASKS[name].metric_name, longbench.published_score if published else longbench.score
    return lambda output, references: {metric: function(name, output, references)}


@dataclass
class ChoiceTask:
    """Score short contexts by the likelihood of each choice."""

    name: str
    examples: list[likelihood.ChoiceExample]
    notes: list[str] = field(default_factory=list)

    def questions(self) -> dict[str, str]:
        """Return the digest of each example's texts and its right choice, by id."""
        return {e.id: digest(e.pairs, e.label) for e in self.examples}

    def rows(self, wanted: Sequence[str], context: Context) -> Iterator[Row]:
        chosen = [e for e in self.examples if e.id in set(wanted)]
        scored = likelihood.choice_scores(context.model, context.tokenizer, chosen, context.batch_tokens, context.on_tokens)
        for e, scores, likelihoods in scored:
            shown = " | ".join(f"{log_p:.3f}" for log_p, _ in likelihoods)
            yield Row(e.id, shown, [e.choices[e.label]], scores)


@dataclass
class DocumentTask:
    """Measure documents: next-token figures (`ntp`), or K greedy tokens against the text (`continuation`)."""

    name: str
    texts: list[str]
    arguments: EvaluationArguments
    notes: list[str] = field(default_factory=list)

    def questions(self) -> dict[str, str]:
        """Return the digest of each text and of how much of it counts, by id."""
        a = self.arguments
        taken = (a.document_tokens,) if self.name == "ntp" else (a.document_tokens, a.window, a.seed)
        return {f"{self.name}-{i}": digest(text, *taken) for i, text in enumerate(self.texts)}

    def rows(self, wanted: Sequence[str], context: Context) -> Iterator[Row]:
        a = self.arguments
        for key in wanted:
            index = int(key.rsplit("-", 1)[1])
            where = f"{a.documents}, row {index}: document {index}"
            ids = context.tokenizer(self.texts[index])["input_ids"][: a.document_tokens or None]
            if self.name == "ntp":
                if len(ids) < 2:
                    raise RefineError(f"{where} has {len(ids)} tokens; next-token figures need 2")
                score = score_document(context.model, ids, a.window or None, a.bucket, context.on_tokens)
                yield Row(key, "", [], score.figures, score.targets, {"tokens": len(ids), "buckets": score.buckets})
            else:
                config = NSPConfig(positions_per_sequence=16)
                ids = ids[: a.window or 4096]
                if len(ids) < config.shortest:
                    raise RefineError(f"{where} has {len(ids)} tokens; a continuation needs {config.shortest}")
                scores = continuation_match(context.model, ids, config, a.seed + index)
                context.on_tokens(len(ids))
                yield Row(key, "", [], scores, 1.0, {"tokens": len(ids)})


def build_tasks(arguments: EvaluationArguments, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """Build the tasks that are asked for, with their examples. What is missing or malformed is a RefineError, before a model runs."""
    arguments.check()
    names = arguments.names()
    a, published = arguments, arguments.protocol == "published"
    tasks: dict[str, Task] = {}

    def generation(name: str, examples: list[Example], score: Score, as_paper: bool) -> None:
        examples = examples[: a.limit or None]
        task = GenerationTask(name, examples, score, max_prompt_tokens=a.max_prompt_tokens, read_twice=a.read_twice)
        if as_paper:
            task.examples = [replace(e, budget=PUBLISHED_BUDGET) for e in examples]
            task.decoding, task.add_bos, task.cut = Decoding(False, 1.0, 50, seed=a.seed), False, truncate_right
        task.check(tokenizer)
        tasks[name] = task

    if wanted := [n for n in names if n in ruler.TASKS]:
        qa = {t: read_qa(source) for t, source in (("qa_1", a.squad), ("qa_2", a.hotpotqa)) if t in wanted and source is not None}
        sources = ruler.Sources(ruler.essay_words(a.essays, a.text_column), qa)
        left_out: dict[str, list[str]] = {}
        built = ruler.build_ruler(wanted, a.lengths, a.samples, tokenizer, sources, a.seed, a.depths, a.num_proc, left_out)
        for name, examples in built.items():
            as_paper = published and name in ruler.QA_TASKS  # the paper's code has no rules for needle tasks
            score = _published_qa if as_paper else _match_scores("any_match" if name in ruler.QA_TASKS else "fraction_match")
            generation(name, examples, score, as_paper)
            tasks[name].notes.extend(left_out.get(name, []))
    for name, examples in longbench.read_longbench([n for n in names if n in longbench.TASKS], a.longbench).items():
        generation(name, examples, _longbench_scores(name, published), published)
    if "prompts" in names:
        if a.prompts is None:
            raise RefineError("the task `prompts` needs a file: --prompts")
        for name, examples in read_prompts(a.prompts, a.prompts_budget).items():
            generation(name, examples, _published_qa if published else _match_scores(a.prompts_metric), published)
    for name in (n for n in names if n in likelihood.TASKS):
        if a.short_context is None:
            raise RefineError(f"{name} needs a folder with {name}.jsonl: --short_context (or `lm_eval:{name}` with the hub)")
        choices = likelihood.read_choices(name, a.short_context)
        tasks[name] = ChoiceTask(name, choices[: a.limit or None])
    if documents := [n for n in names if n in GROUPS["documents"]]:
        if a.documents is None:
            raise RefineError(f"{documents[0]} needs text: --documents")
        texts = _read_texts(a.documents, a.text_column, a.limit)
        tasks |= {name: DocumentTask(name, texts, a) for name in documents}
    return list(tasks.values())


def _read_texts(documents: str, column: str, limit: int) -> list[str]:
    """Read the text of each document, of at most `limit` where that is not 0."""
    texts = list(read_documents(documents, (column,), split="test", also=(), as_found=True)[column])[: limit or None]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise RefineError(f"{documents}, row {i}: {column} is {str(text)[:60]!r}; expected text in every row")
    return texts
