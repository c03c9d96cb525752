"""Compute log-likelihoods of continuations, and score the short-context tasks by them, with lm-eval's prompts and rules.

ARC and PIQA score each choice behind `Question: ...\\nAnswer:`; `acc` takes the likeliest choice, `acc_norm` the likeliest per character.
WinoGrande puts each choice into the blank and scores the rest of the sentence. In LAMBADA the last word must be the greedy continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.models.protocols import CausalModel
from refine_nsp.prompts.encoding import Pair, encode_pair
from refine_nsp.prompts.examples import as_text, in_row
from refine_nsp.text.reading import read_documents


@torch.no_grad()
def log_likelihoods(
    model: CausalModel, pairs: Sequence[Pair], batch_tokens: int, on_batch: Callable[[int], None] | None = None
) -> list[tuple[float, bool]]:
    """Return the log-probability of each pair's continuation, and whether it is the greedy one.

    Rows are padded on the right and have lengths, so that batching changes nothing. Logits are computed only where they count. A pair
    without a context or a continuation is a RefineError.
    """
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise RefineError(f"pair {i} has {len(context)} context and {len(continuation)} continuation tokens; both need one")
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    likelihoods: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    while order:
        size = max(1, batch_tokens // sum(map(len, pairs[order[0]])))
        batch, order = order[:size], order[size:]
        for i, (logits, truth) in zip(batch, continuation_logits(model, [pairs[i] for i in batch]), strict=True):
            log_p = logits.log_softmax(-1).gather(-1, truth[:, None]).sum()
            likelihoods[i] = (float(log_p), bool((logits.argmax(-1) == truth).all()))
        if on_batch is not None:
            on_batch(sum(len(context) + len(continuation) for context, continuation in (pairs[i] for i in batch)))
    return likelihoods


@torch.no_grad()
def continuation_logits(model: CausalModel, pairs: Sequence[Pair]) -> Iterator[tuple[Tensor, Tensor]]:
    """Run pairs in one batch. Yield for each the logits [K, V], at least float32, of its continuation, and the continuation [K]."""
    rows = [torch.tensor([*context, *continuation]) for context, continuation in pairs]
    lengths = torch.tensor([len(r) for r in rows], device=model.device)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    hidden = model.model(ids, lengths=lengths, use_cache=False).last_hidden_state
    for row, h, (context, continuation) in zip(ids, hidden, pairs, strict=True):
        first, end = len(context), len(context) + len(continuation)
        logits = model.lm_head(h[first - 1 : end - 1])
        yield logits.to(torch.promote_types(logits.dtype, torch.float32)), row[first:end]


@dataclass(frozen=True)
class ChoiceExample:
    """Hold one example of a short-context task: a context and a continuation for each choice, and the index of the right one.

    `acc_norm` divides by the length of the choices' text; `where` names the file and the row in errors.
    """

    id: str
    pairs: list[tuple[str, str]]
    choices: list[str]
    label: int
    where: str = ""


Parts = tuple[list[tuple[str, str]], list[str], int]  # pairs, choices, label


def _question(row: Mapping[str, object]) -> Parts:
    question, (choices, label) = _text(row, "question"), _choices(row)
    return [(f"Question: {question}\nAnswer:", f" {c}") for c in choices], choices, label


def _blank(row: Mapping[str, object]) -> Parts:
    before, blank, after = _text(row, "sentence").partition("_")
    if not blank:
        raise RefineError("no blank `_` in the sentence")
    choices, label = _choices(row)
    return [(before + c, f" {after.strip()}") for c in choices], choices, label


def _last_word(row: Mapping[str, object]) -> Parts:
    return [(_text(row, "context"), _text(row, "target"))], [_text(row, "target")], 0


TASKS: dict[str, tuple[Callable[[Mapping[str, object]], Parts], tuple[str, ...]]] = {
    **dict.fromkeys(("piqa", "arc_easy", "arc_challenge"), (_question, ("question", "choices", "label"))),
    "winogrande": (_blank, ("sentence", "choices", "label")),
    "lambada_openai": (_last_word, ("context", "target")),
}
HUB_COLUMNS = ("goal", "text")  # the hub's PIQA and LAMBADA call a question and a whole text so
FURTHER = ("id", "label", "answerKey", "sol1", "sol2", "option1", "option2", "answer")  # other columns that are read


def _text(row: Mapping[str, object], name: str) -> str:
    if not isinstance(value := row[name], str) or not value.strip():
        raise RefineError(f"{name} is {value!r:.60}; expected text")
    return value


def _choices(row: Mapping[str, object]) -> tuple[list[str], int]:
    """Return a row's choices and the number of the right one."""
    if not isinstance(row["choices"], list | tuple) or len(row["choices"]) < 2:
        raise RefineError(f"choices is {row['choices']!r:.60}; expected a list of two or more texts")
    choices = [as_text(c) for c in row["choices"]]
    if empty := [i for i, c in enumerate(choices) if not c.strip()]:
        raise RefineError(f"choice {empty[0]} is empty; expected text")
    if isinstance(row["label"], bool) or not str(row["label"]).lstrip("-").isdecimal():
        raise RefineError(f"label is {row['label']!r:.60}; expected the number of a choice, counted from 0")
    if not 0 <= (label := int(str(row["label"]))) < len(choices):
        raise RefineError(f"label {label} is not one of {len(choices)} choices (counted from 0)")
    return choices, label


def as_ours(row: Mapping[str, object]) -> dict[str, object]:
    """Convert a row of the hub's ARC, PIQA, WinoGrande or LAMBADA to the layout of `TASKS`."""
    row = {name: value for name, value in row.items() if value is not None}
    if isinstance(choices := row.get("choices"), Mapping):  # ARC
        row["choices"] = choices.get("text")
        if "answerKey" in row and "label" not in row:
            labels = list(choices.get("label") or [])
            if row["answerKey"] not in labels:
                raise RefineError(f"answerKey {row['answerKey']!r} is not one of the labels {labels}")
            row["label"] = labels.index(row["answerKey"])
    if {"goal", "sol1", "sol2"} <= row.keys():
        row = {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], **row}
    if {"option1", "option2", "answer"} <= row.keys():
        if str(row["answer"]) not in ("1", "2"):
            raise RefineError(f"answer is {row['answer']!r}; expected 1 or 2")
        row = {"choices": [row["option1"], row["option2"]], "label": int(str(row["answer"])) - 1, **row}
    if isinstance(text := row.get("text"), str) and not {"context", "target", "sentence", "question"} & row.keys():
        before, _, last = text.rpartition(" ")
        row |= {"context": before, "target": f" {last}"}
    return row


def read_choices(name: str, folder: str) -> list[ChoiceExample]:
    """Read the rows of `folder/NAME.jsonl` (or .parquet, or of a file that is named itself), in our layout or the hub's."""
    make, columns = TASKS[name]
    path = Path(folder)
    files = [path] if path.is_file() else sorted(p for p in path.glob(f"{name}.*") if p.suffix in (".jsonl", ".json", ".parquet"))
    if not files:
        raise RefineError(f"{folder} has no file {name}.jsonl or {name}.parquet")
    examples: dict[str, ChoiceExample] = {}
    rows = read_documents(
        str(files[0]), (columns[0], *HUB_COLUMNS), split="test", also=(*columns, *HUB_COLUMNS, *FURTHER), as_found=True
    )
    for i, given in enumerate(rows):
        where = f"{files[0]}, row {i}"
        with in_row(where):
            row = as_ours(given)
            if missing := [c for c in columns if c not in row]:
                raise RefineError(f"no {', '.join(missing)}; {name} needs {', '.join(columns)}, there are {', '.join(row)}")
            key = str(row.get("id", f"{name}-{i}"))
            if key in examples:
                raise RefineError(f"two examples are called {key!r}; ids must differ")
            examples[key] = ChoiceExample(key, *make(row), where)
    return list(examples.values())


def score_choices(example: ChoiceExample, likelihoods: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Compute lm-eval's figures of one example, 0..1. A single continuation has its log-probability and whether it is greedy."""
    if len(likelihoods) == 1:
        return {"acc": float(likelihoods[0][1]), "log_p": likelihoods[0][0]}
    log_p = [x for x, _ in likelihoods]
    per_character = [x / len(c) for x, c in zip(log_p, example.choices, strict=True)]
    figures = {"acc": log_p, "acc_norm": per_character}
    return {figure: float(scores.index(max(scores)) == example.label) for figure, scores in figures.items()}


def choice_scores(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ChoiceExample],
    batch_tokens: int,
    on_tokens: Callable[[int], None],
) -> Iterator[tuple[ChoiceExample, dict[str, float], list[tuple[float, bool]]]]:
    """Yield each example with its scores and the likelihoods of its choices, 64 examples at a time."""
    for start in range(0, len(examples), 64):
        part, pairs = examples[start : start + 64], []
        for e in part:
            with in_row(e.where or e.id):
                pairs += [encode_pair(tokenizer, *pair) for pair in e.pairs]
        likelihoods = iter(log_likelihoods(model, pairs, batch_tokens, on_tokens))
        for e in part:
            own = list(islice(likelihoods, len(e.pairs)))
            yield e, score_choices(e, own), own
