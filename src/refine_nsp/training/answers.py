"""Prompts with answers, for post-training: from rows to tokens, with truncation that never cuts the question."""

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
from refine_nsp.prompts.encoding import encode_pair, truncate_middle
from refine_nsp.prompts.examples import ANSWER_COLUMNS, PROMPT_COLUMNS, as_answers
from refine_nsp.prompts.qa_sources import read_qa
from refine_nsp.prompts.ruler import BUDGETS, Sources, build_ruler
from refine_nsp.text.reading import read_documents
from refine_nsp.training.data import split_documents

TOKENIZED = ("prompt_ids", "answers_ids", "references")  # columns of a row that is ready to train on


@dataclass
class AnswerArguments:
    """Which prompts and answers to train on.

    Attributes:
        dataset_name: a file (jsonl, parquet, arrow), a folder or glob of them, or a hub name, with a column `prompt` and a column
            `answers` (or `answer`, `outputs`): a string or a list of strings of which any is right.
        dataset_split: split of a hub dataset.
        question_column: column with the question; its tokens at the prompt's end are kept whatever is cut. Default: the last half of
            what fits is kept.
        validation_dataset: the same for validation; None: a fixed, seeded share is kept back.
        validation_fraction: that share; 0: no validation.
        validation_examples: at most so many are generated for.
        split_seed: of the validation split.
        max_answer_tokens: longer answers are cut (and get no EOS).
        apply_chat_template: wrap prompts by the tokenizer's chat template.
        squad, hotpotqa: instead of dataset_name, build RULER's qa_1 and qa_2 prompts from these questions (json as published, jsonl,
            parquet, hub name): the paper's SQuADQA and HotpotQA training sets.
        ruler_length: of a prompt built so, its answer included, in tokens.
        ruler_samples: prompts built from each of the two.
        ruler_seed: of the documents they are given.
    """

    dataset_name: str | None = None
    dataset_split: str = "train"
    question_column: str | None = None
    validation_dataset: str | None = None
    validation_fraction: float = 0.05
    validation_examples: int = 64
    split_seed: int = 0
    max_answer_tokens: int = 64
    apply_chat_template: bool = False
    squad: str | None = None
    hotpotqa: str | None = None
    ruler_length: int = 4096
    ruler_samples: int = 1000
    ruler_seed: int = 0

    @property
    def source(self) -> str:
        """What errors call the data."""
        return self.dataset_name or " and ".join(x for x in (self.squad, self.hotpotqa) if x is not None)


def prepare_answers(
    arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Dataset | None]:
    """Training and validation rows of `prompt_ids`, `answers_ids` (one list a reference, ending with EOS) and `references`.

    Raises:
        RefineError: no data (or two kinds of it), no such column, an empty prompt or answer, a tokenizer without EOS, a question
            longer than what fits.
    """
    check_arguments(arguments, tokenizer, max_length)
    if arguments.dataset_name is not None:
        rows = read_documents(arguments.dataset_name, PROMPT_COLUMNS, split=arguments.dataset_split)
    else:
        rows = ruler_prompts(arguments, tokenizer, max_length)
    if arguments.validation_dataset is not None:
        validation = read_documents(arguments.validation_dataset, PROMPT_COLUMNS, split=arguments.dataset_split)
    else:
        rows, validation = split_documents(rows, arguments.validation_fraction, arguments.split_seed)
    if validation is not None:
        validation = validation.select(range(min(len(validation), arguments.validation_examples)))
        validation = encode_rows(validation, arguments, tokenizer, max_length)
    return encode_rows(rows, arguments, tokenizer, max_length), validation


def check_arguments(arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """RefineError for what does not fit together, before anything is read."""
    if (arguments.dataset_name is None) == (arguments.squad is None and arguments.hotpotqa is None):
        raise RefineError(
            "name the prompts and answers to train on with --dataset_name, or questions to build them from with --squad and --hotpotqa"
        )
    if tokenizer.eos_token_id is None:
        raise RefineError(
            "the tokenizer has no EOS token, so a model could not learn where an answer ends; set tokenizer.eos_token"
        )
    if arguments.apply_chat_template and not tokenizer.chat_template:
        raise RefineError("apply_chat_template: the tokenizer has no chat template")
    if arguments.max_answer_tokens < 1 or max_length <= arguments.max_answer_tokens:
        raise RefineError(
            f"max_length={max_length} must leave room for a prompt beside max_answer_tokens={arguments.max_answer_tokens}"
        )


def ruler_prompts(arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows of prompt and answers: RULER's qa_1 from `squad`, qa_2 from `hotpotqa`, mixed."""
    a = arguments
    if a.ruler_length - BUDGETS["qa_1"] > max_length - a.max_answer_tokens or a.ruler_samples < 1:
        raise RefineError(
            f"ruler_length={a.ruler_length} must fit into max_length={max_length} beside max_answer_tokens={a.max_answer_tokens}, and "
            f"ruler_samples={a.ruler_samples} be at least 1"
        )
    named = {"qa_1": a.squad, "qa_2": a.hotpotqa}
    qa = {task: read_qa(name, a.dataset_split) for task, name in named.items() if name is not None}
    built = build_ruler(list(qa), [a.ruler_length], a.ruler_samples, tokenizer, Sources([], qa), a.ruler_seed)
    rows = [{"prompt": e.prompt, "answers": e.references} for examples in built.values() for e in examples]
    return Dataset.from_list(rows).shuffle(a.ruler_seed)


def encode_rows(rows: Dataset, arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows of tokens, cached by content where the given ones are files. See `prepare_answers`."""

    def tokens_of(row: Mapping[str, Any], i: int) -> dict[str, Any]:
        return encode_row(row, arguments, tokenizer, max_length, f"{arguments.source}, row {i}")

    # As in data.tokenize: pickling a tokenizer gives another fingerprint once it has been used.
    content = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.chat_template
    key = (
        rows._fingerprint,
        content,
        max_length,
        arguments.question_column,
        arguments.max_answer_tokens,
        arguments.apply_chat_template,
    )
    options: dict[str, Any] = {"with_indices": True, "remove_columns": rows.column_names, "new_fingerprint": Hasher.hash(key)}
    return rows.map(tokens_of, desc="tokenize", **options)


def encode_row(
    row: Mapping[str, Any], arguments: AnswerArguments, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str
) -> dict[str, Any]:
    """prompt_ids, cut in the middle to leave max_answer_tokens free, answers_ids, each with EOS, and references, the answers' text."""
    prompt = next((str(row[c]) for c in PROMPT_COLUMNS if row.get(c)), "")
    if not prompt.strip():
        raise RefineError(f"{where}: the prompt is empty")
    answers = as_answers(next((row[c] for c in ANSWER_COLUMNS if row.get(c) is not None), None), where)
    if arguments.apply_chat_template:
        turn = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    glue = "" if prompt[-1:].isspace() or arguments.apply_chat_template else " "
    prompt_ids: list[int] = []
    answers_ids: list[list[int]] = []
    for answer in answers:
        prompt_ids, ids = encode_pair(tokenizer, prompt, f"{glue}{answer.strip()}")
        answers_ids.append([*ids, tokenizer.eos_token_id][: arguments.max_answer_tokens])
    tail = tail_tokens(tokenizer, prompt, row, arguments.question_column, where)
    try:
        kept = truncate_middle(prompt_ids, max_length - arguments.max_answer_tokens, tail)
    except RefineError as error:
        raise RefineError(f"{where}: {error}; raise --max_length") from error
    return {"prompt_ids": kept, "answers_ids": answers_ids, "references": answers}


def tail_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, row: Mapping[str, Any], question_column: str | None, where: str
) -> int:
    """Tokens from the question's last mention to the prompt's end; 0 without a column that holds it."""
    if question_column is None:
        return 0
    if question_column not in row:
        raise RefineError(f"{where}: no column {question_column!r}; it has {', '.join(row)}")
    question = str(row[question_column])
    at = prompt.rfind(question)
    if at < 0 or not question:
        raise RefineError(f"{where}: the question {question!r} does not stand in the prompt")
    return len(tokenizer(prompt[at:], add_special_tokens=False)["input_ids"]) + 1  # its first token may be merged with a space


def collate_answers(examples: Iterable[Mapping[str, Any]], unlearned: int | None = None) -> dict[str, Any]:
    """prompts: list of [T] long; answers: for each, a list of [A] long; references: strings; columns: all else, by name, for rewards.

    Padded when a reference is chosen. RefineError for rows that were not tokenized. unlearned: a token that is left out where an answer
    ends with it: the published code learns answers without EOS.
    """
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
    """[B, T] right-padded with 0, on the device, and lengths [B] on the host."""
    lengths = torch.tensor([len(r) for r in rows])
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device, non_blocking=True), lengths
