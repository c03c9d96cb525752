"""Rows of prompts and answers become tokens for post-training, with truncation that never cuts the question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.fields import Reader, check_read, setting
from refine_nsp.prompts.encoding import Pair, Prompt, content_key, encode_answer, encode_text, render, truncate_middle
from refine_nsp.prompts.examples import FURTHER, PROMPT_COLUMNS, PromptRow, check_columns, in_row, read_row
from refine_nsp.prompts.qa_sources import read_qa
from refine_nsp.prompts.ruler import BUDGETS, Sources, build_ruler
from refine_nsp.text.reading import read_documents
from refine_nsp.training.data import (
    KEPT_BACK,
    NO_OTHER_VALIDATION,
    Collated,
    check_fraction,
    first_rows,
    split_documents,
    validation_splits,
)

TOKENIZED = ("prompt_ids", "answers_ids", "references")  # the columns of rows that are ready to train on

# Who reads settings of prompts and answers.
BUILT_PROMPTS = Reader("prompts built from squad or hotpotqa", lambda a: a.squad is not None or a.hotpotqa is not None)
GIVEN_PROMPTS = Reader(
    "prompts that are given, by dataset_name or validation_dataset", lambda a: a.dataset_name or a.validation_dataset
)
VALIDATED = Reader(
    "validation, by validation_dataset or validation_fraction", lambda a: a.validation_dataset is not None or KEPT_BACK(a)
)


@dataclass
class AnswerArguments:
    """Say which prompts and answers to train on.

    Attributes:
        dataset_name: a file (jsonl, parquet, arrow), a folder or glob of them, or a hub name, with a column `prompt` (or `question`;
            text, or messages) and a column `answers` (or `answer`, `outputs`): text, a number or a list of them of which any is right;
            or `prompt` and `completion`, or `messages` whose last turn is the answer, as TRL has them.
        dataset_split: the split of a hub dataset, or of a folder that has several.
        question_column: column with the question, whose tokens at the prompt's end are kept whatever is cut. Default: the last half of
            what fits is kept.
        validation_dataset: the same for validation; None: a fixed, seeded share is kept back.
        validation_fraction: that share; 0: no validation.
        validation_examples: at most so many are generated for.
        split_seed: seeds the choice of the share that is kept back.
        max_answer_tokens: longer answers are cut (and get no EOS).
        apply_chat_template: make prompts that are text a user's turn in the tokenizer's chat template. Messages always go through it.
        squad, hotpotqa: instead of dataset_name, build RULER's qa_1 and qa_2 prompts from these questions (json as published, jsonl,
            parquet, hub name): the paper's SQuADQA and HotpotQA training sets.
        ruler_length: tokens of a prompt that is built so, its answer included.
        ruler_samples: prompts built from each of the two.
        ruler_seed: seeds the choice of their documents.
    """

    dataset_name: str | None = setting(None, common=True)
    dataset_split: str = setting("train")
    question_column: str | None = setting(None, read_by=GIVEN_PROMPTS, common=True)
    validation_dataset: str | None = setting(None, common=True)
    validation_fraction: float = setting(0.05, read_by=NO_OTHER_VALIDATION)
    validation_examples: int = setting(64, read_by=VALIDATED)
    split_seed: int = setting(0, read_by=NO_OTHER_VALIDATION & KEPT_BACK)
    max_answer_tokens: int = setting(64, common=True)
    apply_chat_template: bool = setting(False, common=True)
    squad: str | None = setting(None, common=True)
    hotpotqa: str | None = setting(None, common=True)
    ruler_length: int = setting(4096, read_by=BUILT_PROMPTS, common=True)
    ruler_samples: int = setting(1000, read_by=BUILT_PROMPTS, common=True)
    ruler_seed: int = setting(0, read_by=BUILT_PROMPTS)

    def __post_init__(self) -> None:
        check_read(self)


def prepare_answers(
    arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Dataset | None]:
    """Make rows for training and validation of `prompt_ids`, `answers_ids` (one list a reference, ending with EOS) and `references`.

    Raises:
        RefineError: no data is named (or two kinds of it), a column is missing, a prompt or an answer is empty, the tokenizer has no EOS,
            or a question is longer than what fits.
    """
    check_arguments(arguments, tokenizer, max_length)
    a = arguments
    if a.dataset_name is None:
        rows = ruler_prompts(a, tokenizer, max_length)
    else:
        rows = read_rows(a.dataset_name, a.dataset_split, a.question_column)
    name = a.dataset_name or " and ".join(x for x in (a.squad, a.hotpotqa) if x is not None)
    train = encode_rows(rows, name, a, tokenizer, max_length)
    if a.validation_dataset is not None:
        held = read_rows(a.validation_dataset, validation_splits(a.dataset_split), a.question_column)
        return train, encode_rows(first_rows(held, a.validation_examples), a.validation_dataset, a, tokenizer, max_length)
    train, validation = split_documents(train, a.validation_fraction, a.split_seed)
    return train, None if validation is None else first_rows(validation, a.validation_examples)


def read_rows(name: str, split: str | Sequence[str], question_column: str | None) -> Dataset:
    """Read rows of prompts and answers. RefineError for columns that cannot hold them."""
    also = (*PROMPT_COLUMNS, *FURTHER, *([question_column] if question_column is not None else []))
    rows = read_documents(name, PROMPT_COLUMNS, split=split, also=also, as_found=True)
    assert isinstance(rows, Dataset)
    check_columns(name, rows.column_names)
    return rows


def check_arguments(arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuse settings that do not fit together, before anything is read (RefineError)."""
    if (arguments.dataset_name is None) == (arguments.squad is None and arguments.hotpotqa is None):
        raise RefineError(
            "name prompts and answers with --dataset_name, or questions to build them from with --squad and --hotpotqa"
        )
    check_fraction(arguments.validation_fraction)
    if arguments.apply_chat_template and not tokenizer.chat_template:
        raise RefineError("apply_chat_template: the tokenizer has no chat template")
    if arguments.max_answer_tokens < 1 or max_length <= arguments.max_answer_tokens:
        most = arguments.max_answer_tokens
        raise RefineError(f"max_length={max_length} must leave room for a prompt next to max_answer_tokens={most}")


def ruler_prompts(arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Build rows of prompt and answers, RULER's qa_1 from `squad` and qa_2 from `hotpotqa`, mixed."""
    a = arguments
    if a.ruler_length - BUDGETS["qa_1"] > max_length - a.max_answer_tokens or a.ruler_samples < 1:
        raise RefineError(
            f"ruler_length={a.ruler_length} must fit into max_length={max_length} next to max_answer_tokens={a.max_answer_tokens}, and "
            f"ruler_samples={a.ruler_samples} be at least 1"
        )
    named = {"qa_1": a.squad, "qa_2": a.hotpotqa}
    qa = {task: read_qa(name, a.dataset_split) for task, name in named.items() if name is not None}
    built = build_ruler(list(qa), [a.ruler_length], a.ruler_samples, tokenizer, Sources([], qa), a.ruler_seed)
    rows = [{"prompt": e.prompt, "answers": e.references} for examples in built.values() for e in examples]
    return Dataset.from_list(rows).shuffle(a.ruler_seed)


def encode_rows(
    rows: Dataset, name: str, arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Make rows of tokens, cached by content where the given rows are files; errors call them `name`. See `prepare_answers`."""
    a = arguments
    key = rows._fingerprint, content_key(tokenizer), max_length, a.question_column, a.max_answer_tokens, a.apply_chat_template
    return rows.map(
        lambda row, i: encode_row(row, a, tokenizer, max_length, f"{name}, row {i}"),
        with_indices=True, remove_columns=rows.column_names, new_fingerprint=Hasher.hash(key), desc="tokenize",
    )  # fmt: skip


def encode_row(
    row: Mapping[str, object], arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str
) -> dict[str, object]:
    """Encode one row: prompt_ids, cut in the middle to leave max_answer_tokens free; answers_ids, each with EOS; and references, the
    text of the answers."""
    asked = read_row(row, where)
    with in_row(where):
        prompt: Prompt = asked.prompt
        if arguments.apply_chat_template and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompt_ids, answers_ids = encode_answers(tokenizer, prompt, asked)
        tail = tail_tokens(tokenizer, prompt, asked.template, row, arguments.question_column)
    try:
        kept = truncate_middle(prompt_ids, max_length - arguments.max_answer_tokens, tail)
    except RefineError as error:
        raise RefineError(f"{where}: {error}; raise --max_length") from error
    answers_ids = [ids[: arguments.max_answer_tokens] for ids in answers_ids]
    references = [text.removesuffix(str(tokenizer.eos_token)) for text in asked.references]
    return {"prompt_ids": kept, "answers_ids": answers_ids, "references": references}


def encode_answers(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, asked: PromptRow) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of the prompt, and of each answer behind it. Where the tokenizer merges the prompt's end with one answer, every
    answer takes that end."""
    begun = prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt[-1]["role"] == "assistant" else ""
    glue = " " if begun and not begun[-1:].isspace() else ""
    pairs: list[Pair] = []
    for answer in asked.answers:
        if isinstance(answer, str) and not asked.verbatim:
            answer = f"{glue}{answer.strip()}"
        pairs.append(encode_answer(tokenizer, prompt, answer, **asked.template))
    prompt_ids = min((ids for ids, _ in pairs), key=len)
    return prompt_ids, [[*before[len(prompt_ids) :], *ids] for before, ids in pairs]


def tail_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Mapping[str, Any], row: Mapping[str, object], column: str | None
) -> int:
    """Count the tokens from the question's last mention to the prompt's end; 0 without a column that holds it."""
    if column is None:
        return 0
    if column not in row:
        raise RefineError(f"no column {column!r}; it has {', '.join(row)}")
    text = prompt if isinstance(prompt, str) else render(tokenizer, prompt, **template)
    question = str(row[column])
    at = text.rfind(question)
    if at < 0 or not question:
        raise RefineError(f"the question {question!r} does not stand in the prompt")
    return len(encode_text(tokenizer, text[at:])) + 1  # its first token may be merged with a space


def collate_answers(examples: Iterable[Mapping[str, Any]], unlearned: int | None = None) -> Collated:
    """Make a batch of rows: prompts, a list of [T] long; answers, for each a list of [A] long; references, strings; and columns, all else
    by name, for rewards. They are padded when a reference is chosen. A token `unlearned` is left out at an answer's end, as the published
    code learns answers without EOS. RefineError for rows that were not tokenized."""
    rows = list(examples)
    if rows and (missing := [name for name in TOKENIZED if name not in rows[0]]):
        raise RefineError(
            f"rows of post-training need the columns {', '.join(TOKENIZED)} (the answers' text); {', '.join(missing)} missing, there are "
            f"{', '.join(rows[0])}; prepare_answers makes them of prompts and answers"
        )
    others = [name for name in rows[0] if name not in TOKENIZED] if rows else []
    return {
        "columns": {name: [r[name] for r in rows] for name in others},
        "prompts": [torch.as_tensor(r["prompt_ids"]) for r in rows],
        "answers": [[torch.as_tensor(without_end(a, unlearned)) for a in r["answers_ids"]] for r in rows],
        "references": [list(r["references"]) for r in rows],
    }


def without_end(answer: Sequence[int], end: int | None) -> Sequence[int]:
    """Return an answer's tokens without `end` where it is the last; one that is nothing else stays."""
    return answer[:-1] if end is not None and len(answer) > 1 and answer[-1] == end else answer


def pad(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows as [B, T], right-padded with 0, on the device, and their lengths [B] on the host."""
    lengths = torch.tensor([len(r) for r in rows])
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device, non_blocking=True), lengths
