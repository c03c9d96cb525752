"""Generated documents as rows of token ids: what a family states, hidden in a haystack, and questions on it with their answers.

The parts of a document are encoded one by one; each begins with a line break or a space, so that together they are what the tokenizer
would make of the whole text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.prompts.ruler import NOISE
from refine_nsp.tiny.families import FAMILIES, Draft

SHORTEST_ROW = 128  # tokens; in less, half of the wordings have no room
ATTEMPTS = 200
ONE_ITEM_SHARE = 0.25  # of the documents with a haystack
SPARE = 8  # tokens that a first word may need more on a new line than behind a space
Pieces = list[tuple[list[int], bool]]  # token ids, and whether they are an answer that can be recalled


@dataclass(frozen=True)
class Parts:
    """What of a draft fits into a document. statements: in their order. asked: question and answer, one by one."""

    head: list[int]
    statements: list[list[int]]
    foot: list[int]
    asked: list[tuple[list[int], Pieces]]

    @property
    def length(self) -> int:
        asked = sum(len(question) + sum(len(ids) for ids, _ in answer) for question, answer in self.asked)
        return len(self.head) + sum(map(len, self.statements)) + len(self.foot) + asked

    def questions(self) -> Pieces:
        """Foot, questions and answers."""
        pieces: Pieces = [(self.foot, False)]
        for question, answer in self.asked:
            pieces += [(question, False), *answer]
        return pieces


@dataclass(frozen=True)
class Haystack:
    """Text to hide statements in. cuts: where they may stand, ascending; it begins at the first and ends at the last."""

    ids: list[int]
    cuts: list[int]


@dataclass(frozen=True)
class Writer:
    """Writes documents with one tokenizer, a byte-level one in whose pieces words begin with their space.

    Attributes:
        end: end of text. noise: a line of RULER's noise. prose: documentation strings, as running text.
        begins_line, ends_sentence, begins_word: for every token id.
    """

    tokenizer: PreTrainedTokenizerBase
    end: int
    noise: list[int]
    prose: list[int]
    begins_line: list[bool]
    ends_sentence: list[bool]
    begins_word: list[bool]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Writer:
        """A writer whose prose comes from the documentation strings of Python sources."""
        pieces = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
        prose = [" " + " ".join(doc.split()) for text in texts for doc in re.findall(r'"""(.+?)"""', text, re.DOTALL)]
        noise, *encoded = tokenizer(["\n" + " ".join(NOISE), *prose], add_special_tokens=False)["input_ids"]
        return cls(
            tokenizer, int(tokenizer.eos_token_id), list(noise), [i for ids in encoded for i in ids],
            [p.startswith("\n") for p in pieces], [p.endswith((".", "!", "?")) for p in pieces], [p.startswith(" ") for p in pieces],
        )  # fmt: skip

    def write(
        self, rng: random.Random, family: str, filler: Sequence[int], length: int, dense: float, held_out: bool = False
    ) -> tuple[list[int], list[bool]]:
        """A document of a family in a row of `length` tokens, and which of them are answers that can be recalled.

        Args:
            filler: `length` tokens of text, to hide statements in and to fill what is left.
            dense: share of the row for statements and questions rather than what they are hidden in, 0..1.
            held_out: in a wording that is only measured with.

        Raises:
            RefineError: rows too short for any document.
        """
        haystack, glue, parts = self._draw(rng, family, length - 1, dense, held_out)
        room = length - 1 - parts.length
        body = self._hide(rng, parts, haystack, glue, filler, room)
        pieces: Pieces = [(parts.head, False), (body, False), *parts.questions(), ([self.end], False)]
        left = length - sum(len(ids) for ids, _ in pieces)
        rest = list(filler[len(filler) - left :]) if left else []
        # Text before a document ends before it, text behind it goes on behind its end.
        pieces = [([*rest[1:], self.end], False), *pieces] if left and rng.random() < 0.5 else [*pieces, (rest, False)]
        return [i for ids, _ in pieces for i in ids], [recalled for ids, recalled in pieces for _ in ids]

    def probe(
        self, rng: random.Random, family: str, filler: Sequence[int], length: int, items: int, held_out: bool, depth: float | None = None
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """A prompt of exactly `length` tokens that states up to `items` things and asks for one; and the answer's tokens.

        depth: where in a haystack of text the statements stand, 0 (at its start) to 1; by default anywhere, in any haystack.

        Only questions with one answer: of values that stand apart, the words between would count too.
        """
        while True:
            haystack, glue, parts = self._draw(rng, family, length, 1.0, held_out, items, questions=1)
            question, answer = parts.asked[0]
            values = [ids for ids, recalled in answer if recalled]
            hidden = haystack != "none" or depth is None
            if hidden and values == [ids for ids, _ in answer[: len(values)]]:
                break
        parts = Parts(parts.head, parts.statements, parts.foot, [(question, [])])
        body = self._hide(rng, parts, haystack, glue, filler, length - parts.length, depth)
        ids = [*parts.head, *body, *parts.foot, *question]
        left = length - len(ids)
        before = [*filler[len(filler) - left + 1 :], self.end] if left else []
        return [*before, *ids], [i for ids in values for i in ids]

    # --- what is said -------------------------------------------------------------------------------------------------

    def _draw(
        self, rng: random.Random, family: str, length: int, dense: float, held_out: bool, items: int | None = None,
        questions: int | None = None,
    ) -> tuple[str, str, Parts]:  # fmt: skip
        """Haystack, glue, and parts of a draft that fit; at most so many items and questions."""
        f = FAMILIES[family]
        for _ in range(ATTEMPTS if length + 1 >= SHORTEST_ROW else 0):
            haystack = rng.choice(f.haystacks)
            budget = int(length * (1.0 if haystack == "none" else dense))
            draft = f.make(rng, f.choose(rng, held_out), max(2, budget // 24))
            glue = draft.glue if haystack == "none" else " " if haystack == "prose" else "\n"
            most = items
            if most is None and haystack != "none" and rng.random() < ONE_ITEM_SHARE:
                most = 1
            parts = self._select(rng, draft, glue, budget, length, most or len(draft.items), questions)
            if parts is not None:
                return haystack, glue, parts
        raise RefineError(f"no {family} document fits into rows of {length + 1} tokens; they need {SHORTEST_ROW}")

    def _select(
        self, rng: random.Random, draft: Draft, glue: str, budget: int, length: int, items: int, questions: int | None
    ) -> Parts | None:  # fmt: skip
        """As many items and questions on them as `budget` allows, at least one of each; None if these do not fit into `length`.

        A random share of the budget goes to the statements (all of it where the number of questions is given).
        """
        head, foot, said, asked = self._encode(draft, glue, length)
        share = 1.0 if questions is not None else rng.uniform(0.25, 0.75)
        free, used, kept = budget - len(head) - len(foot), 0, 0
        largest = max((_size(question) for question in asked[0]), default=0) if questions is not None else 0
        for statements in said[:items]:
            size = sum(map(len, statements))
            if kept and used + size + largest > share * free:
                break
            used, kept = used + size, kept + 1
        candidates = [question for of_item in asked[:kept] for question in of_item]
        rng.shuffle(candidates)
        chosen: list[tuple[list[int], Pieces]] = []
        for question in candidates[:questions]:
            size = _size(question)
            if chosen and used + size > free:
                break
            chosen.append(question)
            used += size
        if used + len(head) + len(foot) > length:
            head = []
        if used + len(head) + len(foot) > length:
            return None
        return Parts(head, _in_order(rng, said[:kept], draft.mixed), foot, chosen)

    def _encode(
        self, draft: Draft, glue: str, length: int
    ) -> tuple[list[int], list[int], list[list[list[int]]], list[list[tuple[list[int], Pieces]]]]:
        """Head and foot, and for every item its statements and its questions with their answers."""
        texts = [*draft.heads, draft.foot]
        for item in draft.items:
            texts += [glue + statement for statement in item.statements]
            texts += [text for q in item.questions for text in (q.text, *(piece for piece, _ in q.answer))]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        heads = [list(next(encoded)) for _ in draft.heads]
        head = next((ids for ids in heads if len(ids) <= length // 3), [])
        foot = list(next(encoded))
        said, asked = [], []
        for item in draft.items:
            said.append([list(next(encoded)) for _ in item.statements])
            asked.append([(list(next(encoded)), [(list(next(encoded)), r) for _, r in q.answer]) for q in item.questions])
        return head, foot, said, asked

    # --- where it is hidden -------------------------------------------------------------------------------------------

    def _hide(
        self, rng: random.Random, parts: Parts, haystack: str, glue: str, filler: Sequence[int], room: int, depth: float | None = None
    ) -> list[int]:  # fmt: skip
        """The statements in up to `room` tokens of a haystack, at random places or all at a depth."""
        if haystack == "none":
            return [i for statement in parts.statements for i in statement]
        hay = self._haystack(rng, haystack, filler, room)
        if depth is None:
            places = sorted(rng.choice(hay.cuts) for _ in parts.statements)
        else:
            places = [min(hay.cuts, key=lambda cut: abs(cut - depth * hay.cuts[-1]))] * len(parts.statements)
        ids: list[int] = []
        for statement, start, end in zip(parts.statements, [0, *places[:-1]], places, strict=True):
            ids += [*hay.ids[start:end], *statement]
        ids += hay.ids[places[-1] :]
        if parts.head and haystack == "prose":  # the only one that begins with a space
            on_a_new_line = self._on_a_new_line(ids)
            return on_a_new_line if len(on_a_new_line) <= room + sum(map(len, parts.statements)) else ids
        return ids

    def _on_a_new_line(self, ids: list[int]) -> list[int]:
        """The same with a line break for the space before its first word."""
        word = next((i for i in range(1, len(ids)) if self.begins_word[ids[i]]), len(ids))
        text = str(self.tokenizer.decode(ids[:word]))
        return [*self.tokenizer("\n" + text.removeprefix(" "), add_special_tokens=False)["input_ids"], *ids[word:]]

    def _haystack(self, rng: random.Random, kind: str, filler: Sequence[int], room: int) -> Haystack:
        """Up to `room` tokens of RULER's noise, of code (from `filler`) or of prose, from one cut to another."""
        if kind == "noise":
            ids = self.noise * (room // len(self.noise))
            return Haystack(ids, list(range(0, len(ids) + 1, len(self.noise))))
        if kind == "prose":
            room = max(0, room - SPARE)
            start = rng.randrange(max(1, len(self.prose) - 2 * room))
            source = self.prose[start : start + 2 * room]
            cuts = [i for i in range(1, len(source)) if self.ends_sentence[source[i - 1]] and self.begins_word[source[i]]]
        else:
            source = list(filler)
            cuts = [i for i, token in enumerate(source) if self.begins_line[token]]
        first = cuts[0] if cuts else 0
        cuts = [i - first for i in cuts if i - first <= room] or [0]
        return Haystack(source[first : first + cuts[-1]], cuts)


def _size(question: tuple[list[int], Pieces]) -> int:
    return len(question[0]) + sum(len(ids) for ids, _ in question[1])


def _in_order(rng: random.Random, said: Sequence[list[list[int]]], mixed: bool) -> list[list[int]]:
    """The statements of all items, each item's in its own order; those of different items `mixed` or one item after another."""
    if not mixed:
        return [statement for statements in said for statement in statements]
    timed = [
        (at, statement)
        for statements in said
        for at, statement in zip(sorted(rng.random() for _ in statements), statements, strict=True)
    ]
    return [statement for _, statement in sorted(timed, key=lambda pair: pair[0])]
