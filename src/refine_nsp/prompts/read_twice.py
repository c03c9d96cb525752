"""Give a prompt's context twice before its question ("Just read twice", Arora et al., 2024, arXiv 2407.05483), without any training.

A state of fixed size must choose what to keep before it knows the question; on the second reading it knows at least the text. The second
reading begins on a new line and has the first one's tokens; what stands around the context is there once. Cutting comes first: what a
limit leaves of the prompt is what is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.prompts.encoding import PROBE, encode_prompt, encode_text

Encode = Callable[[str], list[int]]  # a text's tokens, with what stands before a prompt or without


@dataclass(frozen=True)
class MarkedPrompt:
    """Hold a prompt's tokens, of which those from `start` on and before `end` are its context (none where it is not known)."""

    ids: list[int]
    start: int
    end: int

    def cut(self, how: Callable[[Sequence[int], int], list[int]], limit: int) -> MarkedPrompt:
        """Cut the prompt to `limit` tokens as `how` does. Raises RefineError where no token of the context is left."""
        kept = how(range(len(self.ids)), limit)
        start, end = (sum(place < bound for place in kept) for bound in (self.start, self.end))
        if start == end and self.start < self.end:
            cut = f"cut to {limit} tokens, the prompt ({len(self.ids)} tokens)"
            raise RefineError(f"{cut} has none of its context left to read twice; raise max_prompt_tokens")
        return MarkedPrompt([self.ids[place] for place in kept], start, end)

    def twice(self, between: Sequence[int]) -> list[int]:
        """Return the tokens with the context a second time, behind the first reading and the tokens `between`."""
        return [*self.ids[: self.end], *between, *self.ids[self.start :]]


def find_context(text: str, context: str) -> tuple[int, int]:
    """Return where a context, without white space around it, begins and ends in a prompt. RefineError: not there exactly once."""
    words = context.strip()
    if not words:
        raise RefineError(
            "the prompt has no context to read twice: a prompt that is given whole needs a column `context` with the part of it that "
            "is read twice; or leave out read_twice"
        )
    if (count := text.count(words)) != 1:
        raise RefineError(f"the context {words[:40]!r} stands {count} times in the prompt; to be read twice it must stand once")
    start = text.index(words)
    return start, start + len(words)


def mark_context(encode: Encode, text: str, span: tuple[int, int]) -> MarkedPrompt:
    """Encode a prompt whose characters from span[0] on and before span[1] are its context; (0, 0) for none.

    A token that holds the end of one part and the beginning of the next counts to the next, so the prompt keeps the tokens that it has
    when it is read once.
    """
    ids = encode(text)
    start, end = (_tokens_before(encode, ids, text, place) if span[1] else 0 for place in span)
    return MarkedPrompt(ids, start, end)


def _tokens_before(encode: Encode, ids: Sequence[int], text: str, place: int) -> int:
    """Count the tokens of a text before one of its characters."""
    before, leading, behind = encode(text[:place]), encode(""), encode(text[place:])
    behind = behind[len(leading) :] if behind[: len(leading)] == leading else behind
    if behind and len(behind) < len(ids) and list(ids[-len(behind) :]) == behind:
        return len(ids) - len(behind)
    # Tokenizers that mark the beginning of a text have other tokens behind the place; so the tokens before it say where it is.
    return next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before)))


def new_line(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a line's end behind a text; none where the tokenizer has no token for it."""
    text, line = encode_text(tokenizer, PROBE), encode_text(tokenizer, f"{PROBE}\n")
    return line[len(text) :] if line[: len(text)] == text else encode_text(tokenizer, "\n")


def encode_question(
    tokenizer: PreTrainedTokenizerBase, prompt: str, question: str | None, read_twice: bool
) -> tuple[list[int], list[int]]:
    """Encode a prompt, and on a line behind it a question. Return the tokens of one reading, and those that are to be answered.

    With `read_twice` the second has the prompt twice and the question once; without a question the whole prompt is read twice.
    """
    text = prompt if question is None else f"{prompt.rstrip()}\n{question}"
    once = encode_prompt(tokenizer, text)
    if not read_twice or not prompt.strip():
        return once, once
    end = len(prompt) if question is None else len(prompt.rstrip())
    return once, mark_context(partial(encode_prompt, tokenizer), text, (0, end)).twice(new_line(tokenizer))
