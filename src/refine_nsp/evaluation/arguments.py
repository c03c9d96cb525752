"""Declare the settings of an evaluation: the names of its tasks, and which tasks read which setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refine_nsp.config import Ranges, check_ranges
from refine_nsp.errors import RefineError, closest
from refine_nsp.evaluation import likelihood, longbench
from refine_nsp.evaluation.text_metrics import MATCHES
from refine_nsp.fields import Reader, check_read, setting
from refine_nsp.prompts import ruler

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
RANGES: Ranges = (
    (("samples", "prompts_budget", "bucket", "batch_tokens", "num_proc"), lambda x: x >= 1, "must be at least 1"),
    (("limit", "max_prompt_tokens", "document_tokens", "window"), lambda x: x >= 0, "must not be negative"),
    (("window",), lambda x: x != 1, "must be at least 2 (half of a window is only read), or 0 for whole documents"),
)


def resolved(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the names of tasks, each group replaced by its tasks."""
    return tuple(dict.fromkeys(name for task in tasks for name in GROUPS.get(task, (task,))))


def any_of(*names: str, words: str = "") -> Reader:
    """Make the condition that at least one of these tasks is asked for; `words` name them all."""
    return Reader(f"the task {words or ' or '.join(names)}", lambda a: not set(names).isdisjoint(resolved(a.tasks)))


RULER = any_of(*ruler.TASKS, words="ruler, or one of it")
NEEDLES = any_of(*ruler.NEEDLES, words="niah, or one of it")
ESSAYS = any_of(*(n for n, needles in ruler.NEEDLES.items() if needles.haystack == "essay"), words="niah, with needles in essays")
LONGBENCH = any_of(*longbench.TASKS, words="longbench, or one of it")
PROMPTS = any_of("prompts")
DOCUMENTS = any_of("ntp", "continuation")
TEXT = Reader("documents or essays", lambda a: DOCUMENTS(a) or (ESSAYS(a) and a.essays is not None))
ANSWERED_TASKS = (*ruler.TASKS, *longbench.TASKS, "prompts")
ANSWERED = any_of(*ANSWERED_TASKS, words="ruler, longbench or prompts")
AS_PAPER = any_of(*ruler.QA_TASKS, *longbench.TASKS, "prompts", words=f"{' or '.join(ruler.QA_TASKS)} or longbench or prompts")
STANDARD = Reader("protocol='standard'", lambda a: a.protocol == "standard")
DRAWN = Reader(
    "prompts that are generated (ruler), continuation, lm_eval's tasks, or protocol='published'",
    lambda a: RULER(a) or any_of("continuation")(a) or not STANDARD(a) or any(name.startswith("lm_eval:") for name in a.tasks),
)


@dataclass
class EvaluationArguments:
    """Say what a model is evaluated on, and how.

    Attributes:
        tasks: names or groups (`ruler`, `niah`, `longbench`, `longbench_14`, `short_context`, `documents`, `prompts`), or
            `lm_eval:NAME` for any task of lm-eval.
        protocol: `standard`: greedy answers with each task's own budget. `published`: as the paper's code (prompts without BOS, sampled at
            temperature 1 among the 50 likeliest, 32 new tokens, QA scored on the first line only) on QA prompts and LongBench.
        lengths: the lengths of RULER's tasks, prompt and answer together, in tokens.
        samples: RULER's examples for each task and length.
        depths: fixed depths (0..1) of the needle that RULER asks for, each with `samples` examples; default: random depths.
        essays: the text of RULER's haystack (file, folder, hub name); default: Python's reference documentation.
        squad, hotpotqa: questions on documents for RULER's qa_1 and qa_2 (json as published, jsonl, parquet, hub name).
        longbench: LongBench's rows, in a folder of its files or a data set of the hub.
        prompts: a file of ready-made prompts and answers.
        prompts_metric: the main figure of ready-made prompts: `any_match`, `fraction_match`, `f1` or `exact_match`.
        prompts_budget: tokens to generate where the file of prompts does not say.
        documents: text for `ntp` and `continuation` (file, folder, glob, hub name).
        text_column: the column of the text of documents and essays.
        document_tokens: tokens taken from each document (0: all).
        window: tokens of a window in which `ntp` reads documents, the first half only as context (0: whole documents, the state carried).
        bucket: tokens of a bucket of positions for which `ntp` gives figures.
        short_context: a folder with piqa.jsonl, arc_easy.jsonl, ...
        limit: at most so many examples for each task (0: all).
        max_prompt_tokens: longer prompts lose their middle, or by the published protocol their end (0: no limit).
        read_twice: give the context of every prompt twice before its question, which needs no training and takes about twice the tokens.
            `lengths` and `max_prompt_tokens` are those of the prompt read once, and test-time training adapts to it read once.
        batch_tokens: prompt tokens of a batch, which bound the memory.
        seed: the seed of generated prompts and of sampling.
        num_proc: processes that build RULER's prompts.
    """

    tasks: list[str] = setting(default_factory=list, common=True)
    protocol: str = setting("standard", read_by=AS_PAPER, common=True)
    lengths: list[int] = setting(default_factory=lambda: [4096], read_by=RULER, common=True)
    samples: int = setting(100, read_by=RULER, common=True)
    depths: list[float] | None = setting(None, read_by=NEEDLES, common=True)
    essays: str | None = setting(None, read_by=ESSAYS, common=True)
    squad: str | None = setting(None, read_by=any_of("qa_1"), common=True)
    hotpotqa: str | None = setting(None, read_by=any_of("qa_2"), common=True)
    longbench: str | None = setting(longbench.HUB_NAME, read_by=LONGBENCH, common=True)
    prompts: str | None = setting(None, read_by=PROMPTS, common=True)
    prompts_metric: str = setting("any_match", read_by=PROMPTS & STANDARD, common=True)
    prompts_budget: int = setting(32, read_by=PROMPTS & STANDARD)
    documents: str | None = setting(None, read_by=DOCUMENTS, common=True)
    text_column: str = setting("text", read_by=TEXT)
    document_tokens: int = setting(0, read_by=DOCUMENTS)
    window: int = setting(0, read_by=DOCUMENTS)
    bucket: int = setting(1024, read_by=any_of("ntp"))
    short_context: str | None = setting(None, read_by=any_of(*likelihood.TASKS, words="short_context"), common=True)
    limit: int = setting(0, common=True)
    max_prompt_tokens: int = setting(0, read_by=ANSWERED, common=True)
    read_twice: bool = setting(False, common=True)
    batch_tokens: int = setting(16384, common=True)
    seed: int = setting(42, read_by=DRAWN, common=True)
    num_proc: int = setting(1, read_by=RULER, common=True)

    def __post_init__(self) -> None:
        if self.tasks:
            self.names()
            check_read(self)

    def check(self) -> None:
        """Raise RefineError for a value that no task could use."""
        if not self.tasks:
            raise RefineError(f"no task: name some with --tasks ({', '.join(GROUPS)}, or {', '.join(NAMES[:4])}, ...)")
        if self.protocol not in PROTOCOLS:
            raise RefineError(f"protocol={self.protocol!r}: expected {' or '.join(PROTOCOLS)}{closest(self.protocol, PROTOCOLS)}")
        if self.prompts_metric not in MATCHES:
            raise RefineError(f"prompts_metric={self.prompts_metric!r} is not one of {', '.join(MATCHES)}")
        check_ranges(self, RANGES)
        if self.read_twice and (other := [name for name in self.names() if name not in ANSWERED_TASKS]):
            harness = " (lm-eval hands over whole prompts and does not say what their context is)" * ("lm_eval:" in other[0])
            raise RefineError(
                f"{other[0]} has no context that could be read twice{harness}; leave it out, or leave out read_twice, which is for ruler, "
                "longbench and prompts"
            )

    def names(self) -> list[str]:
        """List the names of the tasks, groups resolved. Raises RefineError for an unknown one, naming the nearest."""
        for name in self.tasks:
            if name not in GROUPS and name not in NAMES and not name.startswith("lm_eval:"):
                there = f"groups: {', '.join(GROUPS)}; tasks: {', '.join(NAMES)}"
                raise RefineError(f"no task {name!r}{closest(name, (*GROUPS, *NAMES))}; {there}")
        return list(resolved(self.tasks))
