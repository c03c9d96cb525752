"""Write generated documents as token ids: a family's statements, hidden in a haystack, then questions on them with their answers.

The parts of a document are encoded one by one. Each begins with a line break or a space, so that together they are what the tokenizer
would make of the whole text. Documents of `facts` are laid out by `tiny/facts.py` instead: their questions stand among the statements.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.prompts.encoding import encode_text
from refine_nsp.prompts.ruler import NOISE
from refine_nsp.tiny.facts import FactTokens, fact_document, fact_probe, set_at
from refine_nsp.tiny.families import FACTS, WORDED, Draft

SHORTEST_ROW = 128  # tokens; in less, half of the wordings have no room (`facts` have in any)
ATTEMPTS = 200
ONE_ITEM_SHARE = 0.25  # this share of the documents with a haystack states one item only
SPARE = 8  # a first word may need so many tokens more on a new line than behind a space
Pieces = list[tuple[list[int], bool]]  # token ids, and whether they are an answer that can be recalled


@dataclass(frozen=True)
class Parts:
    """Keep the parts of a draft that fit into a document: `statements` in their order, and in `asked` each question with its answer."""

    head: list[int]
    statements: list[list[int]]
    foot: list[int]
    asked: list[tuple[list[int], Pieces]]

    @property
    def length(self) -> int:
        """Count the tokens of all parts."""
        return sum(map(len, (self.head, *self.statements, self.foot))) + sum(map(_size, self.asked))


@dataclass(frozen=True)
class Writer:
    """A writer makes documents for one tokenizer, which must be a byte-level one whose words begin with their space.

    Attributes:
        end: the id of the end of text. noise: the tokens of a line of RULER's noise. prose: documentation strings as running text.
        facts: the tokens of the family `facts`. begins_line, ends_sentence, begins_word: say of every token id whether it does.
    """

    tokenizer: PreTrainedTokenizerBase
    end: int
    noise: list[int]
    prose: list[int]
    facts: FactTokens
    begins_line: list[bool]
    ends_sentence: list[bool]
    begins_word: list[bool]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Writer:
        """Prepare a writer whose prose comes from the documentation strings of Python sources."""
        pieces = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
        prose = [" " + " ".join(doc.split()) for text in texts for doc in re.findall(r'"""(.+?)"""', text, re.DOTALL)]
        noise, *encoded = tokenizer(["\n" + " ".join(NOISE), *prose], add_special_tokens=False)["input_ids"]
        return cls(
            tokenizer, int(tokenizer.eos_token_id), list(noise), [i for ids in encoded for i in ids], FactTokens.of(tokenizer),
            [p.startswith("\n") for p in pieces], [p.endswith((".", "!", "?")) for p in pieces], [p.startswith(" ") for p in pieces],
        )  # fmt: skip

    def write(
        self, rng: random.Random, family: str, filler: Sequence[int], length: int, dense: float, held_out: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Write a document of a family in a row of `length` tokens, and say of each token whether it is an answer to recall.

        Args:
            filler: at least `length` tokens of text, to hide statements in and to fill the rest of the row; `facts` use all of it, the
                other families the first `length`.
            dense: share of the row for statements and questions rather than for what hides them, 0..1.
            held_out: use a wording that is never trained on; `facts` have none.

        Raises:
            RefineError: the row is too short for any document of the family.
        """
        if family == FACTS:
            return fact_document(rng, self.facts, filler, length, dense)
        filler = filler[:length]
        haystack, glue, parts = self._draw(rng, family, length - 1, dense, held_out)
        room = length - 1 - parts.length
        body = self._hide(rng, parts, haystack, glue, filler, room)
        pieces: Pieces = [(parts.head, False), (body, False), (parts.foot, False)]
        for question, answer in parts.asked:
            pieces += [(question, False), *answer]
        pieces.append(([self.end], False))
        left = length - sum(len(ids) for ids, _ in pieces)
        rest = list(filler[len(filler) - left :]) if left else []
        # Text that stands before the document ends before it; text after the document follows the document's end.
        pieces = [([*rest[1:], self.end], False), *pieces] if left and rng.random() < 0.5 else [*pieces, (rest, False)]
        return [i for ids, _ in pieces for i in ids], [recalled for ids, recalled in pieces for _ in ids]

    def probe(
        self, rng: random.Random, family: str, filler: Sequence[int], length: int, items: int, held_out: bool, depth: float | None = None
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """Write a prompt of exactly `length` tokens that states up to `items` things and asks for one; return it and the answer.

        Questions for several values that stand apart are not used, since the words between the values would be scored too.

        Args:
            depth: where the statements stand in a haystack of text, 0 (at its start) to 1; None: anywhere, in any haystack. `facts`
                always stand anywhere.
        """
        if family == FACTS:
            return fact_probe(rng, self.facts, filler, length, items)
        while True:
            haystack, glue, parts = self._draw(rng, family, length, 1.0, held_out, items, questions=1)
            question, answer = parts.asked[0]
            values = [ids for ids, recalled in answer if recalled]
            if (haystack != "none" or depth is None) and values == [ids for ids, _ in answer[: len(values)]]:
                break
        parts = Parts(parts.head, parts.statements, parts.foot, [(question, [])])
        body = self._hide(rng, parts, haystack, glue, filler, length - parts.length, depth)
        ids = [*parts.head, *body, *parts.foot, *question]
        left = length - len(ids)
        before = [*filler[len(filler) - left + 1 :], self.end] if left else []
        return [*before, *ids], [i for ids in values for i in ids]

    def _draw(
        self, rng: random.Random, family: str, length: int, dense: float, held_out: bool, items: int | None = None,
        questions: int | None = None,
    ) -> tuple[str, str, Parts]:  # fmt: skip
        """Draw a haystack's kind, the glue between statements, and the parts of a draft, at most `items`, that fit into `length` tokens."""
        f = WORDED[family]
        for _ in range(ATTEMPTS if length + 1 >= SHORTEST_ROW else 0):
            haystack = rng.choice(f.haystacks)
            budget = int(length * (1.0 if haystack == "none" else dense))
            draft = f.make(rng, f.choose(rng, held_out), max(2, budget // 24))
            glue = draft.glue if haystack == "none" else " " if haystack == "prose" else "\n"
            most = items or len(draft.items)
            if items is None and haystack != "none" and rng.random() < ONE_ITEM_SHARE:
                most = 1
            parts = self._select(rng, draft, glue, budget, length, most, questions)
            if parts is not None:
                return haystack, glue, parts
        raise RefineError(f"no {family} document fits into rows of {length + 1} tokens; they need {SHORTEST_ROW}")

    def _select(
        self, rng: random.Random, draft: Draft, glue: str, budget: int, length: int, items: int, questions: int | None
    ) -> Parts | None:  # fmt: skip
        """Select as many items and questions on them as `budget` allows, at least one of each.

        A random share of the budget goes to the statements, or all of it where the number of questions is given. None is returned where
        one item and one question do not fit into `length` tokens.
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
        if used + len(foot) > length:
            return None
        head = head if used + len(head) + len(foot) <= length else []
        return Parts(head, _in_order(rng, said[:kept], draft.mixed), foot, chosen)

    def _encode(
        self, draft: Draft, glue: str, length: int
    ) -> tuple[list[int], list[int], list[list[list[int]]], list[list[tuple[list[int], Pieces]]]]:
        """Encode a draft: its head and foot, and for every item the statements and the questions with their answers."""
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

    def _hide(
        self, rng: random.Random, parts: Parts, haystack: str, glue: str, filler: Sequence[int], room: int, depth: float | None = None
    ) -> list[int]:  # fmt: skip
        """Hide the statements in up to `room` tokens of a haystack, at random places, or all at one depth."""
        if haystack == "none":
            return [i for statement in parts.statements for i in statement]
        hay, cuts = self._haystack(rng, haystack, filler, room)
        if depth is None:
            places = sorted(rng.choice(cuts) for _ in parts.statements)
        else:
            places = [min(cuts, key=lambda cut: abs(cut - depth * cuts[-1]))] * len(parts.statements)
        ids = set_at(places, parts.statements, hay)
        if parts.head and haystack == "prose":  # prose alone begins with a space, and a head is a line of its own
            word = next((i for i in range(1, len(ids)) if self.begins_word[ids[i]]), len(ids))
            first = str(self.tokenizer.decode(ids[:word])).removeprefix(" ")
            on_a_new_line = [*encode_text(self.tokenizer, f"\n{first}"), *ids[word:]]
            return on_a_new_line if len(on_a_new_line) <= room + sum(map(len, parts.statements)) else ids
        return ids

    def _haystack(self, rng: random.Random, kind: str, filler: Sequence[int], room: int) -> tuple[list[int], list[int]]:
        """Make a haystack of up to `room` tokens: RULER's noise, code (from `filler`) or prose, cut where lines or sentences end.

        Return its ids, and the ascending places where statements may stand, from its start to its end.
        """
        if kind == "noise":
            ids = self.noise * (room // len(self.noise))
            return ids, list(range(0, len(ids) + 1, len(self.noise)))
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
        return source[first : first + cuts[-1]], cuts


def _size(question: tuple[list[int], Pieces]) -> int:
    """Count the tokens of a question with its answer."""
    return len(question[0]) + sum(len(ids) for ids, _ in question[1])


def _in_order(rng: random.Random, said: Sequence[list[list[int]]], mixed: bool) -> list[list[int]]:
    """List the statements of all items, each item's in its own order: one item after another, or with `mixed` in between."""
    times = [at for statements in said for at in sorted(rng.random() for _ in statements)] if mixed else []
    statements = [statement for of_item in said for statement in of_item]
    return [statements[i] for i in sorted(range(len(times)), key=times.__getitem__)] if mixed else statements
