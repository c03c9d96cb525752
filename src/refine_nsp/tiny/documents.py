"""Write generated documents as token ids: a family's statements, hidden in a haystack, then questions on them with their answers.

The parts of a document are encoded one by one. Each begins with a line break or a space, so that together they are what the tokenizer
would make of the whole text. Documents of `facts` are laid out by `fact_document` instead: lines `name = value value;` are scattered in
text, and each is mentioned again later. A fact and its later mention look the same, so whoever predicts the value of the second mention
recalls the first. A value is two words that are drawn independently, so chance is 1 / len(VALUES)^2.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.prompts.encoding import encode_text
from refine_nsp.prompts.ruler import NOISE
from refine_nsp.tiny.families import FACTS, WORDED, Draft

NAMES = (
    "anchor apple arrow badge basin beach berry blade bloom board bottle branch bridge brush bucket button cabin cable camel "
    "candle canvas canyon carpet castle cedar chain chair chalk cherry circle cliff clock cloud clover coast cobalt comet copper "
    "coral corner cotton crane crater creek crown crystal curtain daisy dawn desert diamond dragon drum eagle earth ember engine "
    "falcon feather fence field finger flame flute forest fossil fountain garden garlic ginger glacier globe grain granite grape "
    "guitar hammer harbor hazel helmet hill honey horizon island ivory jacket jasmine jewel jungle kettle kitchen ladder lagoon "
    "lantern lemon leopard lily lion lizard lotus magnet mango marble meadow melon mirror monkey morning mountain needle nest "
    "ocean olive onion orange orchid otter oyster paddle palace panda paper parrot pearl pebble pencil pepper piano pigeon pillow "
    "planet plum pocket pond poppy prism pyramid quartz rabbit rain raven reef ribbon ridge river robin rocket rose saddle salmon "
    "scarf shadow shell shield shore silver smoke spider spoon spring squirrel stone storm summit sunset swan table temple "
    "thistle thunder tiger timber tower trumpet tulip tunnel turtle valley velvet village violet walnut water whale wheat "
    "willow window winter zebra"
).split()
VALUES = (
    "amber azure beige black blue bronze brown crimson cyan ebony emerald golden gray green indigo khaki lavender lilac lime "
    "maroon mauve navy ochre peach pink purple red ruby russet rusty sand scarlet sepia slate tan teal turquoise umber vanilla "
    "vermilion white yellow bold brave calm clever eager fair gentle happy humble kind lively lucky merry noble proud quick quiet "
    "rapid sharp silent smooth"
).split()
SHORTEST_ROW = 128  # tokens; in less, half of the wordings have no room (`facts` have in any)
ATTEMPTS = 200
ONE_ITEM_SHARE = 0.25  # this share of the documents with a haystack states one item only
SPARE = 8  # a first word may need so many tokens more on a new line than behind a space
Pieces = list[tuple[list[int], bool]]  # token ids, and whether they are an answer that can be recalled


@dataclass(frozen=True)
class FactTokens:
    """Hold the token ids of a fact's parts, which follow from the tokenizer: all names and values, and what joins them."""

    names: list[list[int]]
    values: list[list[int]]
    equals: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> FactTokens:
        """Encode all names and values, each with the space before it."""
        encode = partial(encode_text, tokenizer)
        return cls([encode(f" {w}") for w in NAMES], [encode(f" {w}") for w in VALUES], encode(" ="), encode(";"))


Fact = tuple[list[int], list[int]]  # the tokens of ` name =` and of ` value value`


def draw_facts(rng: random.Random, tokens: FactTokens, count: int) -> list[Fact]:
    """Draw `count` facts with different names."""
    names = rng.sample(tokens.names, count)
    return [(name + tokens.equals, rng.choice(tokens.values) + rng.choice(tokens.values)) for name in names]


def take_filler(rng: random.Random, filler: Sequence[int], count: int) -> list[int]:
    """Take `count` consecutive tokens from a random place of the filler."""
    start = rng.randrange(max(1, len(filler) - count))
    return list(filler[start : start + count])


def scattered(rng: random.Random, parts: Sequence[list[int]], text: Sequence[int]) -> list[int]:
    """Set `parts` into the text, in their order, at random places."""
    return set_at(sorted(rng.randrange(len(text) + 1) for _ in parts), parts, text)


def set_at(places: Sequence[int], parts: Sequence[list[int]], text: Sequence[int]) -> list[int]:
    """Set each of at least one part into the text at its place; places ascend."""
    ids: list[int] = []
    for part, start, end in zip(parts, [0, *places[:-1]], places, strict=True):
        ids += [*text[start:end], *part]
    return [*ids, *text[places[-1] :]]


def fact_document(
    rng: random.Random, tokens: FactTokens, filler: Sequence[int], length: int, dense: float
) -> tuple[list[int], list[bool]]:
    """Write a document of `length` tokens, a share `dense` of it facts and questions; say of each token whether it can be recalled."""
    per_fact = 6
    budget = max(2, int(length * dense / per_fact))  # statements and questions together
    facts = draw_facts(rng, tokens, min(max(1, rng.randint(budget // 4, max(1, budget // 2))), len(NAMES) // 2))
    stated = [rng.random() * 0.7 for _ in facts]
    events = [(at, False, fact) for at, fact in zip(stated, facts, strict=True)]
    for _ in range(max(1, budget - len(facts))):
        i = rng.randrange(len(facts))
        events.append((stated[i] + (1 - stated[i]) * rng.random(), True, facts[i]))
    events.sort(key=lambda e: e[:2])
    gap = max(0, length - per_fact * len(events)) / max(1, len(events))
    ids: list[int] = []
    mask: list[bool] = []
    for _, asked, (question, answer) in events:
        pause = take_filler(rng, filler, int(rng.random() * 2 * gap))
        for part, recalled in ((pause, False), (question, False), (answer, asked), (tokens.end, False)):
            ids += part
            mask += [recalled] * len(part)
    if len(ids) < length:
        rest = take_filler(rng, filler, length - len(ids))
        ids, mask = ids + rest, mask + [False] * len(rest)
    return ids[:length], mask[:length]


def fact_probe(
    rng: random.Random, tokens: FactTokens, filler: Sequence[int], length: int, count: int
) -> tuple[list[int], list[int]]:
    """Write a prompt of `length` tokens that states `count` facts and asks for one; return it and the answer. ValueError: no room."""
    facts = draw_facts(rng, tokens, count)
    question, answer = rng.choice(facts)
    statements = [[*q, *a, *tokens.end] for q, a in facts]
    room = length - len(question) - sum(map(len, statements))
    if room < 0:
        raise ValueError(f"{count} facts do not fit into {length} tokens")
    return scattered(rng, statements, take_filler(rng, filler, room)) + question, answer


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

        A row too short for any document of the family is a RefineError.
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
