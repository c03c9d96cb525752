"""What can be evaluated, by name, from which sources; each task yields one row per example."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError, closest
from refine_nsp.evaluation import likelihood, longbench
from refine_nsp.evaluation.documents import continuation_match, score_document
from refine_nsp.evaluation.text_metrics import MATCHES, any_match, fraction_match, published_any_match
from refine_nsp.models.generation import Decoding, Request, answer_all, decode, end_tokens, prefill
from refine_nsp.models.protocols import CausalModel
from refine_nsp.prompts import ruler
from refine_nsp.prompts.encoding import encode_prompt, encode_text, render, truncate_middle
from refine_nsp.prompts.examples import Example, in_row, read_prompts
from refine_nsp.prompts.qa_sources import read_qa
from refine_nsp.text.reading import read_documents

GROUPS = {
    "ruler": ruler.TASKS,
    "niah": tuple(ruler.NEEDLES),
    "longbench": longbench.PAPER_TASKS,
    "longbench_14": tuple(longbench.TASKS),
    "short_context": tuple(likelihood.TASKS),
    "documents": ("ntp", "continuation"),
}
NAMES = (*ruler.TASKS, *longbench.TASKS, *likelihood.TASKS, *GROUPS["documents"], "prompts")
PROTOCOLS = ("standard", "published")
PUBLISHED_BUDGET = 32
PUBLISHED_DECODING = Decoding(greedy=False, temperature=1.0, top_k=50)
Scores = dict[str, float]


class AdaptationCost(Protocol):
    """Of prompts adapted to together, in all."""

    seconds: float
    extra_bytes: int


class Adapter(Protocol):
    """Test-time training: a context in which the model is adapted to prompts (each a list of tokens); `last` is what that cost."""

    @property
    def last(self) -> AdaptationCost | None: ...

    def adapt(self, prompt: Sequence[Sequence[int]]) -> AbstractContextManager[object]: ...


@dataclass
class EvaluationArguments:
    """What to evaluate on, and how.

    Attributes:
        tasks: names or groups (`ruler`, `niah`, `longbench`, `longbench_14`, `short_context`, `documents`, `prompts`), or
            `lm_eval:NAME` for any task of lm-eval.
        protocol: `standard`: greedy, each task's own budget. `published`: as the paper's code does (prompts without BOS, sampled at
            temperature 1 among the 50 likeliest, 32 new tokens, QA scored on the first line only) on QA prompts and LongBench.
        lengths: RULER: prompt and answer together, in tokens.
        samples: RULER: examples per task and length.
        depths: RULER: fixed depths (0..1) of the needle asked for, each with `samples` examples; default: random.
        essays: RULER: haystack text (file, folder, hub name); default: Python's reference documentation.
        squad, hotpotqa: RULER qa_1 and qa_2: questions on documents (json as published, jsonl, parquet, hub name).
        longbench: LongBench's rows: a folder of its files, or a data set of the hub.
        prompts: a file of ready-made prompts and answers.
        prompts_metric: `any_match`, `fraction_match`, `f1` or `exact_match`, the main figure of ready-made prompts.
        prompts_budget: tokens to generate where the file does not say.
        documents: text for `ntp` and `continuation` (file, folder, glob, hub name).
        text_column: its column.
        document_tokens: tokens taken from each document (0: all).
        window: `ntp`: windows of so many tokens, half of each only read (0: the whole document, state carried on).
        bucket: `ntp`: figures by position, in so many tokens.
        short_context: folder with piqa.jsonl, arc_easy.jsonl, ...
        limit: at most so many examples per task (0: all).
        max_prompt_tokens: longer prompts lose their middle, by the published protocol their end (0: no limit).
        batch_tokens: prompt tokens per batch: bounds the memory.
        seed: of generated prompts and of sampling.
        num_proc: processes that build RULER prompts.
    """

    tasks: list[str] = field(default_factory=list)
    protocol: str = "standard"
    lengths: list[int] = field(default_factory=lambda: [4096])
    samples: int = 100
    depths: list[float] | None = None
    essays: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    longbench: str | None = longbench.HUB_NAME
    prompts: str | None = None
    prompts_metric: str = "any_match"
    prompts_budget: int = 32
    documents: str | None = None
    text_column: str = "text"
    document_tokens: int = 0
    window: int = 0
    bucket: int = 1024
    short_context: str | None = None
    limit: int = 0
    max_prompt_tokens: int = 0
    batch_tokens: int = 16384
    seed: int = 42
    num_proc: int = 1

    def check(self) -> None:
        """RefineError for a value that cannot be meant."""
        if not self.tasks:
            raise RefineError(f"no task: name some with --tasks ({', '.join(GROUPS)}, or {', '.join(NAMES[:4])}, ...)")
        if self.protocol not in PROTOCOLS:
            raise RefineError(
                f"protocol={self.protocol!r} is not one of {', '.join(PROTOCOLS)}{closest(self.protocol, PROTOCOLS)}"
            )
        if self.prompts_metric not in MATCHES:
            raise RefineError(f"prompts_metric={self.prompts_metric!r} is not one of {', '.join(MATCHES)}")
        for name in ("samples", "prompts_budget", "bucket", "batch_tokens", "num_proc"):
            if getattr(self, name) < 1:
                raise RefineError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("limit", "max_prompt_tokens", "document_tokens", "window"):
            if getattr(self, name) < 0:
                raise RefineError(f"{name} must not be negative, got {getattr(self, name)}")

        if self.window == 1:
            raise RefineError("window must be at least 2 (half of a window is only read), or 0 for whole documents, got 1")

    def names(self) -> list[str]:
        """Task names, groups resolved; RefineError for an unknown one, naming the nearest."""
        names: dict[str, None] = {}
        for name in self.tasks:
            if name not in GROUPS and name not in NAMES and not name.startswith("lm_eval:"):
                raise RefineError(
                    f"no task {name!r}{closest(name, (*GROUPS, *NAMES))}; groups: {', '.join(GROUPS)}; tasks: {', '.join(NAMES)}"
                )
            names |= dict.fromkeys(GROUPS.get(name, (name,)))
        return list(names)


@dataclass(frozen=True)
class Row:
    """One example's outcome.

    scores: main figure first. weight: what it counts in a mean (targets of a document). question: the digest of what was asked, by
    which two runs are compared; empty in folders of earlier releases.
    """

    id: str
    output: str
    references: list[str]
    scores: Scores
    weight: float = 1.0
    meta: dict[str, Any] = field(default_factory=dict)
    question: str = ""


def digest(*asked: object) -> str:
    """Short hash of what is asked (a prompt with its references, a text with how much of it): equal for equal questions."""
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, default=str).encode(errors="surrogatepass")).hexdigest()[:16]


@dataclass
class Context:
    """What a task works with. adapter: test-time training before each answer, `adapt_together` prompts at a time; on_tokens: progress;
    cost: what the latest prompt's adaptation cost (seconds, bytes), per prompt.
    """

    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    batch_tokens: int
    adapter: Adapter | None = None
    adapt_together: int = 1
    on_tokens: Callable[[int], None] = lambda n: None
    cost: dict[str, float] = field(default_factory=dict)


class Task(Protocol):
    """A name, what is to be said of the task, the ids of all its examples with what they ask, and rows for some of the ids."""

    name: str
    notes: list[str]

    def questions(self) -> dict[str, str]: ...

    def ids(self) -> list[str]: ...

    def rows(self, wanted: Sequence[str], context: Context) -> Iterator[Row]: ...


# --- tasks whose answers are generated --------------------------------------------------------------------------------


@dataclass
class GenerationTask:
    """Prompts to be answered; `score` gives the figures of one answer.

    add_bos, cut: how prompts become tokens; the paper's code gives them without special tokens and cuts long ones on the right.
    """

    name: str
    examples: list[Example]
    score: Callable[[str, Sequence[str]], Scores]
    decoding: Decoding = field(default_factory=Decoding)
    max_prompt_tokens: int = 0
    add_bos: bool = True
    cut: Callable[[Sequence[int], int], list[int]] = truncate_middle
    notes: list[str] = field(default_factory=list)

    def questions(self) -> dict[str, str]:
        """The digest of each prompt with its references, by id."""
        return {e.id: digest(e.prompt, e.template, e.references) for e in self.examples}

    def ids(self) -> list[str]:
        return [e.id for e in self.examples]

    def rows(self, wanted: Sequence[str], context: Context) -> Iterator[Row]:
        """Answer and score; with `context.adapter` each prompt from the weights adapted to it."""
        place = {e.id: i for i, e in enumerate(self.examples)}
        requests = [self._request(place[i], context.tokenizer) for i in wanted]
        eos = end_tokens(context.model, context.tokenizer)
        if context.adapter is None:
            batches = answer_all(context.model, requests, eos, self.decoding, context.batch_tokens, context.on_tokens)
        else:
            batches = self._answer_adapted(requests, eos, context)
        for batch in batches:
            for request, tokens in batch:
                yield self._row(request, tokens, context)

    def _answer_adapted(
        self, requests: Sequence[Request], eos: set[int], context: Context
    ) -> Iterator[list[tuple[Request, list[int]]]]:
        assert context.adapter is not None
        size = context.adapt_together
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            rows = [r.ids for r in batch]
            shortest = min(batch, key=lambda r: len(r.ids))  # that one, if any, has no position to adapt at
            with in_row(self._where(shortest.key)), context.adapter.adapt(rows):
                clock = time.perf_counter()
                hidden, cache = prefill(context.model, rows)
                tokens = decode(context.model, hidden, cache, batch, eos, self.decoding, keep_rows=True)
                seconds = time.perf_counter() - clock
            last = context.adapter.last
            assert last is not None
            context.cost = {
                "adapt_seconds": last.seconds / len(batch),
                "answer_seconds": seconds / len(batch),
                "extra_bytes": last.extra_bytes / len(batch),
            }
            context.on_tokens(sum(map(len, rows)))
            yield list(zip(batch, tokens, strict=True))

    def _where(self, key: int) -> str:
        """What an error calls an example."""
        e = self.examples[key]
        return e.where or f"{self.name}, example {e.id}"

    def _request(self, key: int, tokenizer: PreTrainedTokenizerBase) -> Request:
        e = self.examples[key]
        with in_row(self._where(key)):
            if self.add_bos:
                ids = encode_prompt(tokenizer, e.prompt, **e.template)
            else:
                ids = encode_text(tokenizer, e.prompt if isinstance(e.prompt, str) else render(tokenizer, e.prompt, **e.template))
            if not ids:
                raise RefineError("the prompt has no token that the tokenizer knows")
            if self.max_prompt_tokens:
                ids = self.cut(ids, self.max_prompt_tokens)
        return Request(key, ids, e.budget)

    def _row(self, request: Request, tokens: list[int], context: Context) -> Row:
        e = self.examples[request.key]
        output = str(context.tokenizer.decode(tokens, skip_special_tokens=True))
        meta = {**e.meta, "prompt_tokens": len(request.ids), "new_tokens": len(tokens), **context.cost}
        return Row(e.id, output, e.references, self.score(output, e.references), 1.0, meta)


def _ruler_scores(output: str, references: Sequence[str]) -> Scores:
    return {"fraction_match": fraction_match(output, references), "any_match": any_match(output, references)}


def _qa_scores(output: str, references: Sequence[str]) -> Scores:
    return {"any_match": any_match(output, references), "fraction_match": fraction_match(output, references)}


def _published_qa(output: str, references: Sequence[str]) -> Scores:
    return {"any_match": published_any_match(output, references)}


def truncate_right(ids: Sequence[int], limit: int) -> list[int]:
    """At most `limit` tokens, the first ones: how the paper's code cuts a prompt, its question with it."""
    return list(ids[:limit])


def _prompt_scores(main: str) -> Callable[[str, Sequence[str]], Scores]:
    order = [main, *(m for m in ("any_match", "fraction_match") if m != main)]
    return lambda output, references: {m: MATCHES[m](output, references) for m in order}


def _longbench_scores(name: str, published: bool) -> Callable[[str, Sequence[str]], Scores]:
    metric, function = longbench.TASKS[name].metric_name, longbench.published_score if published else longbench.score
    return lambda output, references: {metric: function(name, output, references)}


# --- the others -------------------------------------------------------------------------------------------------------


@dataclass
class ChoiceTask:
    """Short contexts, scored by the likelihood of each choice."""

    name: str
    examples: list[likelihood.ChoiceExample]
    notes: list[str] = field(default_factory=list)

    def questions(self) -> dict[str, str]:
        """The digest of each example's texts and its right choice, by id."""
        return {e.id: digest(e.pairs, e.label) for e in self.examples}

    def ids(self) -> list[str]:
        return [e.id for e in self.examples]

    def rows(self, wanted: Sequence[str], context: Context) -> Iterator[Row]:
        chosen = [e for e in self.examples if e.id in set(wanted)]
        scored = likelihood.choice_scores(context.model, context.tokenizer, chosen, context.batch_tokens, context.on_tokens)
        for e, scores, likelihoods in scored:
            shown = " | ".join(f"{log_p:.3f}" for log_p, _ in likelihoods)
            yield Row(e.id, shown, [e.choices[e.label]], scores)


@dataclass
class DocumentTask:
    """`ntp` or `continuation` on documents."""

    name: str
    texts: list[str]
    arguments: EvaluationArguments
    notes: list[str] = field(default_factory=list)

    def questions(self) -> dict[str, str]:
        """The digest of each text and of what is taken of it, by id."""
        a = self.arguments
        taken = (a.document_tokens,) if self.name == "ntp" else (a.document_tokens, a.window, a.seed)
        return {key: digest(text, *taken) for key, text in zip(self.ids(), self.texts, strict=True)}

    def ids(self) -> list[str]:
        return [f"{self.name}-{i}" for i in range(len(self.texts))]

    def rows(self, wanted: Sequence[str], context: Context) -> Iterator[Row]:
        a = self.arguments
        for key in wanted:
            index = int(key.rsplit("-", 1)[1])
            where = f"{a.documents}, row {index}: document {index}"
            ids = context.tokenizer(self.texts[index])["input_ids"]
            ids = ids[: a.document_tokens] if a.document_tokens else ids
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


# --- by name ----------------------------------------------------------------------------------------------------------


def build_tasks(arguments: EvaluationArguments, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """The tasks asked for, with their examples. RefineError for anything missing or malformed, before any model runs."""
    arguments.check()
    names = arguments.names()
    a, published = arguments, arguments.protocol == "published"
    tasks: dict[str, Task] = {}

    def generation(name: str, examples: list[Example], score: Callable[[str, Sequence[str]], Scores], as_paper: bool) -> None:
        examples = examples[: a.limit or None]
        for e in examples:
            if not isinstance(e.prompt, str):
                with in_row(e.where):  # a conversation that the template does not take is found before any is answered
                    render(tokenizer, e.prompt, **e.template)
        tasks[name] = GenerationTask(name, examples, score, max_prompt_tokens=a.max_prompt_tokens)
        if as_paper:
            examples = [replace(e, budget=PUBLISHED_BUDGET) for e in examples]
            decoding = Decoding(False, 1.0, 50, seed=a.seed)
            tasks[name] = GenerationTask(name, examples, score, decoding, a.max_prompt_tokens, False, truncate_right)

    wanted = [n for n in names if n in ruler.TASKS]
    if wanted:
        qa = {t: read_qa(source) for t, source in (("qa_1", a.squad), ("qa_2", a.hotpotqa)) if t in wanted and source is not None}
        sources = ruler.Sources(ruler.essay_words(a.essays, a.text_column), qa)
        left_out: dict[str, list[str]] = {}
        built = ruler.build_ruler(wanted, a.lengths, a.samples, tokenizer, sources, a.seed, a.depths, a.num_proc, left_out)
        for name, examples in built.items():
            as_paper = published and name in ruler.QA_TASKS  # the paper's code has no needle tasks
            qa_score = _published_qa if as_paper else _qa_scores
            generation(name, examples, qa_score if name in ruler.QA_TASKS else _ruler_scores, as_paper)
            tasks[name].notes.extend(left_out.get(name, []))
    wanted = [n for n in names if n in longbench.TASKS]
    if wanted:
        for name, examples in longbench.read_longbench(wanted, a.longbench).items():
            generation(name, examples, _longbench_scores(name, published), published)
    if "prompts" in names:
        if a.prompts is None:
            raise RefineError("the task `prompts` needs a file: --prompts")
        for name, examples in read_prompts(a.prompts, a.prompts_budget).items():
            generation(name, examples, _published_qa if published else _prompt_scores(a.prompts_metric), published)
    for name in (n for n in names if n in likelihood.TASKS):
        if a.short_context is None:
            raise RefineError(f"{name} needs a folder with {name}.jsonl: --short_context (or `lm_eval:{name}` with the hub)")
        choices = likelihood.read_choices(name, a.short_context)
        tasks[name] = ChoiceTask(name, choices[: a.limit] if a.limit else choices)
    documents = [n for n in names if n in GROUPS["documents"]]
    if documents:
        if a.documents is None:
            raise RefineError(f"{documents[0]} needs text: --documents")
        rows = read_documents(a.documents, (a.text_column,), split="test", also=(), as_found=True)
        texts = list(rows[a.text_column])[: a.limit or None]
        if (odd := next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)) is not None:
            raise RefineError(
                f"{a.documents}, row {odd}: {a.text_column} is {str(texts[odd])[:60]!r}; expected text in every row"
            )
        for name in documents:
            tasks[name] = DocumentTask(name, texts, a)
    return list(tasks.values())
