"""Read prompts with answers from a user's files, and hold them in one record that RULER and LongBench share."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from refine_nsp.errors import RefineError
from refine_nsp.files import expecting
from refine_nsp.prompts.encoding import Message, Prompt, as_messages
from refine_nsp.text.reading import read_documents

PROMPT_COLUMNS = ("prompt", "input", "messages", "conversations", "question")
ANSWER_COLUMNS = ("answers", "answer", "outputs", "output", "completion")
CONVERSATIONS = ("messages", "conversations")  # columns whose last turn may be the answer
PARTS = ("input", "question")  # columns that hold a prompt, or only a part of one where a column of OTHER_PARTS is there too
OTHER_PARTS = ("instruction", "context", "passage", "choices", "options")
FURTHER = (*ANSWER_COLUMNS, *OTHER_PARTS, "chat_template_kwargs", "tools")  # other columns that are read of a file of prompts
NAMING = ("id", "_id", "index", "task", "max_gen_tokens", "max_seq_length", "prompt_length")


@dataclass(frozen=True)
class Example:
    """Hold a prompt with its references; the task's metric decides whether any is right or all are asked for.

    Attributes:
        id: a name by which results are resumed and compared. budget: how many tokens may be generated.
        meta: what a table or a plot may group by (length, depth, ...).
        template: what a chat template is given in addition to messages. where: the file and the row, for errors.
        context: the part of the prompt that may be read twice; empty where it is not known.
    """

    id: str
    prompt: Prompt
    references: list[str]
    budget: int
    meta: dict[str, object] = field(default_factory=dict)
    template: dict[str, object] = field(default_factory=dict)
    where: str = ""
    context: str = ""


@dataclass(frozen=True)
class PromptRow:
    """Hold one row of a file of prompts: `answers` of which any is right, and what a chat template is given in addition to messages.

    `verbatim` tells whether the answer follows the prompt just as it is, without a space put between them.
    """

    prompt: Prompt
    answers: list[str | Message]
    verbatim: bool
    template: dict[str, object]

    @property
    def references(self) -> list[str]:
        """Return the text of each answer."""
        return [a if isinstance(a, str) else str(a["content"]) for a in self.answers]


@contextmanager
def in_row(where: str) -> Iterator[None]:
    """Add the file and the row to a RefineError that is raised inside."""
    try:
        yield
    except RefineError as error:
        raise RefineError(f"{where}: {error}" if where and not str(error).startswith(where) else str(error)) from error


def read_prompts(name: str, default_budget: int, split: str = "test") -> dict[str, list[Example]]:
    """Read ready-made prompts from a file, by task: the `task` column, or the file's name.

    The columns are those of `read_row`; id or index, task, max_gen_tokens, max_seq_length, and `context` beside a whole prompt (the part of
    it that `read_twice` gives twice) may be there too.
    """
    data = read_documents(name, PROMPT_COLUMNS, split=split, also=(*PROMPT_COLUMNS, *FURTHER, *NAMING), as_found=True)
    check_columns(name, data.column_names)
    examples: dict[str, list[Example]] = {}
    for i, row in enumerate(data):
        where = f"{name}, row {i}"
        asked = read_row(row, where)
        task = str(row.get("task") or Path(name).stem)
        kept = {"prompt_length": "prompt_length", "max_seq_length": "length"}
        meta = {ours: row[k] for k, ours in kept.items() if row.get(k) is not None}
        name_of_row = next((row[k] for k in NAMING[:3] if row.get(k) is not None), i)
        with expecting("a whole number in max_gen_tokens", where):
            budget = int(row.get("max_gen_tokens") or default_budget)
        context = row["context"] if isinstance(row.get("context"), str) else ""
        example = Example(f"{task}/{name_of_row}", asked.prompt, asked.references, budget, meta, asked.template, where, context)
        examples.setdefault(task, []).append(example)
    for task, of_task in examples.items():
        check_unique(task, of_task)
    return examples


def check_columns(name: str, there: Sequence[str]) -> None:
    """Raise RefineError unless a file's columns can hold prompts and answers."""
    whole = any(c in there for c in PROMPT_COLUMNS if c not in PARTS)
    if not whole and (other := [c for c in OTHER_PARTS if c in there]):
        part = next(c for c in PARTS if c in there)
        raise RefineError(
            f"{name} has the columns {', '.join(other)} and {part}, which are parts of a prompt; join them in a column prompt (or, for "
            "the tasks whose files are laid out so, evaluate with --longbench, or --squad and --hotpotqa)"
        )
    if not any(c in there for c in (*ANSWER_COLUMNS, *CONVERSATIONS)):
        raise RefineError(f"{name} has no answers: expected a column {', '.join(ANSWER_COLUMNS)}, got {list(there)}")


def read_row(row: Mapping[str, object], where: str) -> PromptRow:
    """Read the prompt and the answers of a row.

    The prompt is in `prompt`, `input` or `question`, as a text or messages; or in `messages` or `conversations`, whose last turn is the
    answer if it is the assistant's. The answers are in `answers`, `answer`, `outputs` or `output`, one or a list of which any is right; or
    in `completion`, as TRL has it: a text that follows as it is, or the assistant's message. `tools` and `chat_template_kwargs` are given
    to the chat template.

    Raises:
        RefineError: there is no prompt or an empty one, no answer, or something that is neither text nor messages; it names `where`.
    """
    with in_row(where):
        template = _template(row)
        named = next((c for c in ANSWER_COLUMNS if not _missing(row.get(c))), None)
        column = _prompt_column(row, named is not None)
        turns: list[Message] = []
        if column in CONVERSATIONS:
            prompt, turns = _conversation(column, row[column], named)
        else:
            prompt = read_prompt(None if column is None else row[column])
        if not (prompt if isinstance(prompt, str) else "".join(str(m.get("content", "")) for m in prompt)).strip():
            raise RefineError("the prompt is empty")
        if turns or named == "completion":
            return PromptRow(prompt, [*turns] or [_completion(row["completion"], prompt)], True, template)
        return PromptRow(prompt, [*as_answers(None if named is None else row[named], where)], False, template)


def _conversation(column: str, value: object, named: str | None) -> tuple[Prompt, list[Message]]:
    """Part a conversation from the assistant's turn at its end where that turn is the answer."""
    messages = as_messages(list(value) if isinstance(value, np.ndarray) else value)
    role, wanted = messages[-1]["role"], ", ".join(ANSWER_COLUMNS)
    if role == "assistant" and named is not None:
        raise RefineError(f"{column} ends with the assistant's turn, and {named} holds an answer too; leave out one of them")
    if role != "assistant" and named is None:
        raise RefineError(f"no answer: {column} ends with a turn of {role}; expected the assistant's, or a column {wanted}")
    return (messages, []) if named is not None else (messages[:-1], [_answered(messages[-1])])


def _prompt_column(row: Mapping[str, object], answered: bool) -> str | None:
    """Find the column of the prompt. A conversation counts first where no column answers the prompt."""
    given = [c for c in PROMPT_COLUMNS if not _missing(row.get(c))]
    first = [] if answered else [c for c in given if c in CONVERSATIONS]
    return next(iter(first + given), None)


def read_prompt(value: object) -> Prompt:
    """Return a prompt that is text as it is, and any other as messages. Raises RefineError for another type."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | tuple | np.ndarray):
        raise RefineError(f"the prompt is {value!r:.60}, a {type(value).__name__}; expected text, or a list of messages")
    return as_messages(list(value)) if len(value) else ""


def _answered(message: Message) -> Message:
    if message["role"] != "assistant":
        raise RefineError(f"the answer is a turn of {message['role']}; expected the assistant's")
    if not str(message.get("content", "")).strip():
        raise RefineError("no answer: the assistant's turn has no text")
    return message


def _completion(value: object, prompt: Prompt) -> str | Message:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(prompt, str) or not isinstance(value, list | tuple | np.ndarray):
        raise RefineError(f"the completion is {value!r:.60}; expected text, or behind messages the assistant's message in a list")
    messages = as_messages(list(value))
    if len(messages) != 1:
        raise RefineError(f"the completion has {len(messages)} messages; expected the assistant's turn alone")
    return _answered(messages[0])


def _template(row: Mapping[str, object]) -> dict[str, object]:
    options = row.get("chat_template_kwargs")
    if options is not None and not isinstance(options, Mapping):
        raise RefineError(f"chat_template_kwargs is {options!r:.60}; expected a mapping")
    given = {**(options or {}), **({} if _missing(row.get("tools")) else {"tools": row["tools"]})}
    return {k: v for k, v in given.items() if v is not None}


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | Mapping | np.ndarray) and len(value) == 0)


def as_answers(value: object, where: str) -> list[str]:
    """List a text, a number, several of them, or SQuAD's {"text": [...]}, without repeats. Raises RefineError where nothing is in it."""
    if not (kept := answers_in(value, where)):
        raise RefineError(f"{where}: no answer; every example needs at least one that is not empty")
    return kept


def answers_in(value: object, where: str) -> list[str]:
    """List answers as `as_answers` does, but return an empty list where there are none: None, an empty list, SQuAD's {"text": []}.

    Raises:
        RefineError: an answer is neither text nor a number; it names `where`.
    """
    if isinstance(value, Mapping):
        if "text" in value:
            value = value["text"]
        elif "value" in value:  # TriviaQA
            value = [value["value"], *(value.get("aliases") or [])]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    given = value if isinstance(value, list | tuple) else [value]
    found = [a["text"] if isinstance(a, Mapping) and "text" in a else a for a in given]
    try:
        texts = [as_text(a) for a in found if a is not None]
    except RefineError:
        expected = "expected text or a number, or a list of them of which any is right"
        raise RefineError(f"{where}: the answer is {str(value)[:60]!r}; {expected}") from None
    return list(dict.fromkeys(t for t in texts if t.strip()))


def as_text(value: object) -> str:
    """Return a text as it is, or a number as text: 2.0 as 2, since one fraction in a column turns all its numbers into fractions."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Number):
        raise RefineError(f"got {value!r:.60}, a {type(value).__name__}; expected text or a number")
    if isinstance(value, float):
        if math.isnan(value):  # some libraries write a missing value like this
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return str(value)


def check_unique(task: str, examples: Sequence[Example]) -> None:
    """Raise RefineError when two examples share an id, by which results are resumed and compared."""
    if again := [name for name, times in Counter(e.id for e in examples).items() if times > 1]:
        raise RefineError(f"{task}: two examples are called {again[0]!r}; ids must differ")
