"""Log-likelihoods of continuations, and the short-context tasks scored by them, with lm-eval's prompts and rules.

ARC and PIQA: `Question: ...\\nAnswer:` and each choice; `acc` takes the likeliest, `acc_norm` the likeliest per character. WinoGrande:
each choice is put into the blank and the rest of the sentence is scored. LAMBADA: the last word must be the greedy continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
    """(log p of the continuation, whether it is the greedy one) of each pair. Right-padded with lengths, so exact; logits only where
    they count.

    Raises:
        RefineError: a pair without context or continuation.
    """
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise RefineError(f"pair {i} has {len(context)} context and {len(continuation)} continuation tokens; both need one")
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    likelihoods: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    start = 0
    while start < len(order):
        width = sum(map(len, pairs[order[start]]))
        batch = order[start : start + max(1, batch_tokens // width)]
        start += len(batch)
        rows = [torch.tensor([*pairs[i][0], *pairs[i][1]]) for i in batch]
        lengths = torch.tensor([len(r) for r in rows], device=model.device)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        hidden = model.model(ids, lengths=lengths, use_cache=False).last_hidden_state
        for row, i in enumerate(batch):
            n, k = len(rows[row]), len(pairs[i][1])
            logits = model.lm_head(hidden[row, n - k - 1 : n - 1])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            truth = ids[row, n - k : n]
            log_p = logits.log_softmax(-1).gather(-1, truth[:, None]).sum()
            likelihoods[i] = (float(log_p), bool((logits.argmax(-1) == truth).all()))
        if on_batch is not None:
            on_batch(int(lengths.sum()))
    return likelihoods


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceExample:
    """pairs: (context, continuation) for each choice, the right one at `label`; choices: their text, for acc_norm; where: file and row."""

    id: str
    pairs: list[tuple[str, str]]
    choices: list[str]
    label: int
    where: str = ""


Parts = tuple[list[tuple[str, str]], list[str], int]  # pairs, choices, label


def _question(row: Mapping[str, Any]) -> Parts:
    question, choices = _text(row, "question"), _choices(row)
    return [(f"Question: {question}\nAnswer:", f" {c}") for c in choices], choices, _label(row, choices)


def _blank(row: Mapping[str, Any]) -> Parts:
    before, blank, after = _text(row, "sentence").partition("_")
    if not blank:
        raise RefineError("no blank `_` in the sentence")
    choices = _choices(row)
    return [(before + c, f" {after.strip()}") for c in choices], choices, _label(row, choices)


def _last_word(row: Mapping[str, Any]) -> Parts:
    return [(_text(row, "context"), _text(row, "target"))], [_text(row, "target")], 0


TASKS: dict[str, tuple[Callable[[Mapping[str, Any]], Parts], tuple[str, ...]]] = {
    "piqa": (_question, ("question", "choices", "label")),
    "arc_easy": (_question, ("question", "choices", "label")),
    "arc_challenge": (_question, ("question", "choices", "label")),
    "winogrande": (_blank, ("sentence", "choices", "label")),
    "lambada_openai": (_last_word, ("context", "target")),
}
HUB_COLUMNS = ("goal", "text")  # what the hub's PIQA and LAMBADA call a question and a whole text
BESIDE = ("id", "label", "answerKey", "sol1", "sol2", "option1", "option2", "answer")


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise RefineError(f"{name} is {row[name]!r:.60}; expected text")
    return row[name]


def _choices(row: Mapping[str, Any]) -> list[str]:
    if not isinstance(row["choices"], list | tuple) or len(row["choices"]) < 2:
        raise RefineError(f"choices is {row['choices']!r:.60}; expected a list of two or more texts")
    choices = [as_text(c) for c in row["choices"]]
    if not all(c.strip() for c in choices):
        raise RefineError(f"choice {next(i for i, c in enumerate(choices) if not c.strip())} is empty; expected text")
    return choices


def _label(row: Mapping[str, Any], choices: Sequence[str]) -> int:
    if isinstance(row["label"], bool) or not str(row["label"]).lstrip("-").isdecimal():
        raise RefineError(f"label is {row['label']!r:.60}; expected the number of a choice, counted from 0")
    if not 0 <= (label := int(row["label"])) < len(choices):
        raise RefineError(f"label {label} is not one of {len(choices)} choices (counted from 0)")
    return label


def as_ours(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in the layout of `TASKS`, from the one that the hub's ARC, PIQA, WinoGrande and LAMBADA have."""
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
        row = {"choices": [row["option1"], row["option2"]], "label": int(row["answer"]) - 1, **row}
    if isinstance(text := row.get("text"), str) and not {"context", "target", "sentence", "question"} & row.keys():
        before, _, last = text.rpartition(" ")
        row |= {"context": before, "target": f" {last}"}
    return row


def read_choices(name: str, folder: str) -> list[ChoiceExample]:
    """Rows of `folder/NAME.jsonl` (or .parquet, or a file named outright), in our layout or the hub's.

    Raises:
        RefineError: a missing file or column, or a row that is not what it should be, by its number.
    """
    make, columns = TASKS[name]
    path = Path(folder)
    files = [path] if path.is_file() else sorted(p for p in path.glob(f"{name}.*") if p.suffix in (".jsonl", ".json", ".parquet"))
    if not files:
        raise RefineError(f"{folder} has no file {name}.jsonl or {name}.parquet")
    examples: dict[str, ChoiceExample] = {}
    rows = read_documents(
        str(files[0]), (columns[0], *HUB_COLUMNS), split="test", also=(*columns, *HUB_COLUMNS, *BESIDE), as_found=True
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
    """lm-eval's figures of one example, 0..1 (for a single continuation: log p and whether it is greedy)."""
    if len(likelihoods) == 1:
        return {"acc": float(likelihoods[0][1]), "log_p": likelihoods[0][0]}
    log_p = [x for x, _ in likelihoods]
    per_character = [x / len(c) for x, c in zip(log_p, example.choices, strict=True)]
    return {
        "acc": float(max(range(len(log_p)), key=log_p.__getitem__) == example.label),
        "acc_norm": float(max(range(len(log_p)), key=per_character.__getitem__) == example.label),
    }


def choice_scores(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ChoiceExample],
    batch_tokens: int,
    on_tokens: Callable[[int], None],
) -> Iterator[tuple[ChoiceExample, dict[str, float], list[tuple[float, bool]]]]:
    """Scores of examples, some at a time."""
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        pairs = []
        for e in part:
            with in_row(e.where or e.id):
                pairs += [encode_pair(tokenizer, *pair) for pair in e.pairs]
        likelihoods = log_likelihoods(model, pairs, batch_tokens, on_tokens)
        at = 0
        for e in part:
            own = likelihoods[at : at + len(e.pairs)]
            at += len(e.pairs)
            yield e, score_choices(e, own), own
