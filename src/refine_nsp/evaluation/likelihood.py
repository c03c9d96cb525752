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
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.prompts.encoding import Pair, encode_pair
from refine_nsp.text.reading import read_documents


@torch.no_grad()
def log_likelihoods(
    model: FastWeightForCausalLM, pairs: Sequence[Pair], batch_tokens: int, on_batch: Callable[[int], None] | None = None
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
    """pairs: (context, continuation) for each choice, the right one at `label`; choices: their text, for acc_norm."""

    id: str
    pairs: list[tuple[str, str]]
    choices: list[str]
    label: int


def _question(row: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str], int]:
    choices = list(row["choices"])
    return [(f"Question: {row['question']}\nAnswer:", f" {c}") for c in choices], choices, int(row["label"])


def _blank(row: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str], int]:
    before, _, after = row["sentence"].partition("_")
    choices = list(row["choices"])
    return [(before + c, f" {after.strip()}") for c in choices], choices, int(row["label"])


def _last_word(row: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str], int]:
    return [(row["context"], row["target"])], [row["target"]], 0


TASKS: dict[str, tuple[Callable[[Mapping[str, Any]], tuple[list[tuple[str, str]], list[str], int]], tuple[str, ...]]] = {
    "piqa": (_question, ("question", "choices", "label")),
    "arc_easy": (_question, ("question", "choices", "label")),
    "arc_challenge": (_question, ("question", "choices", "label")),
    "winogrande": (_blank, ("sentence", "choices", "label")),
    "lambada_openai": (_last_word, ("context", "target")),
}


def read_choices(name: str, folder: str) -> list[ChoiceExample]:
    """Rows of `folder/NAME.jsonl` (or .parquet, or a file named outright). RefineError for a missing file, column or blank."""
    make, columns = TASKS[name]
    path = Path(folder)
    files = [path] if path.is_file() else sorted(p for p in path.glob(f"{name}.*") if p.suffix in (".jsonl", ".json", ".parquet"))
    if not files:
        raise RefineError(f"{folder} has no file {name}.jsonl or {name}.parquet")
    rows = read_documents(str(files[0]), columns[:1], split="test")
    if missing := [c for c in columns if c not in rows.column_names]:
        raise RefineError(f"{files[0]} has no column {', '.join(missing)}; {name} needs {', '.join(columns)}")
    examples = []
    for i, row in enumerate(rows):
        if "sentence" in columns and "_" not in row["sentence"]:
            raise RefineError(f"{files[0]}, row {i}: no blank `_` in the sentence")
        pairs, choices, label = make(row)
        if not 0 <= label < len(choices):
            raise RefineError(f"{files[0]}, row {i}: label {label} is not one of {len(choices)} choices (counted from 0)")
        examples.append(ChoiceExample(str(row.get("id", f"{name}-{i}")), pairs, choices, label))
    return examples


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
    model: FastWeightForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ChoiceExample],
    batch_tokens: int,
    on_tokens: Callable[[int], None],
) -> Iterator[tuple[ChoiceExample, dict[str, float], list[tuple[float, bool]]]]:
    """Scores of examples, some at a time."""
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        pairs = [encode_pair(tokenizer, *pair) for e in part for pair in e.pairs]
        likelihoods = log_likelihoods(model, pairs, batch_tokens, on_tokens)
        at = 0
        for e in part:
            own = likelihoods[at : at + len(e.pairs)]
            at += len(e.pairs)
            yield e, score_choices(e, own), own
