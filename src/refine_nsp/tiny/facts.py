"""The family `facts` scatters lines `name = value value;` in text and mentions each again later.

A fact and its later mention look the same, so whoever predicts the value of the second mention recalls the first. A value is two words
that are drawn independently, so chance is 1 / len(VALUES)^2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class FactTokens:
    """Hold the token ids of a fact's parts, which follow from the tokenizer: names and values by their index, and what joins them."""

    names: list[list[int]]
    values: list[list[int]]
    equals: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> FactTokens:
        """Encode all names and values, each with the space before it."""

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        return cls([encode(f" {w}") for w in NAMES], [encode(f" {w}") for w in VALUES], encode(" ="), encode(";"))


@dataclass(frozen=True)
class Fact:
    """A fact gives a name two values; all are indices into `NAMES` and `VALUES`."""

    name: int
    values: tuple[int, int]


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Draw `count` facts with different names."""
    names = rng.sample(range(len(NAMES)), count)
    return [Fact(n, (rng.randrange(len(VALUES)), rng.randrange(len(VALUES)))) for n in names]


def question(tokens: FactTokens, fact: Fact) -> list[int]:
    """Return the tokens of ` name =`."""
    return tokens.names[fact.name] + tokens.equals


def answer(tokens: FactTokens, fact: Fact) -> list[int]:
    """Return the tokens of ` value value`."""
    return tokens.values[fact.values[0]] + tokens.values[fact.values[1]]


def statement(tokens: FactTokens, fact: Fact) -> list[int]:
    """Return the tokens of ` name = value value;`."""
    return question(tokens, fact) + answer(tokens, fact) + tokens.end


def take_filler(rng: random.Random, filler: Sequence[int], count: int) -> list[int]:
    """Take `count` consecutive tokens from a random place of the filler."""
    start = rng.randrange(max(1, len(filler) - count))
    return list(filler[start : start + count])


def scattered(rng: random.Random, parts: Sequence[list[int]], text: Sequence[int]) -> list[int]:
    """Set `parts` into the text, in their order, at random places."""
    cuts = sorted(rng.randrange(len(text) + 1) for _ in parts)
    ids: list[int] = []
    for part, start, end in zip(parts, [0, *cuts[:-1]], cuts, strict=True):
        ids += [*text[start:end], *part]
    return [*ids, *text[cuts[-1] if cuts else 0 :]]


def fact_document(
    rng: random.Random, tokens: FactTokens, filler: Sequence[int], length: int, dense: float
) -> tuple[list[int], list[bool]]:
    """Write a document of `length` tokens, and say of each token whether it is an answer that can be recalled.

    Args:
        dense: share of the document that is facts and questions rather than filler, 0..1.
    """
    per_fact = 6
    budget = max(2, int(length * dense / per_fact))  # statements and questions together
    facts = draw_facts(rng, min(max(1, rng.randint(budget // 4, max(1, budget // 2))), len(NAMES) // 2))
    events = [(rng.random() * 0.7, fact, False) for fact in facts]
    first = {fact.name: at for at, fact, _ in events}
    for _ in range(max(1, budget - len(facts))):
        fact = rng.choice(facts)
        events.append((first[fact.name] + (1 - first[fact.name]) * rng.random(), fact, True))
    events.sort(key=lambda e: (e[0], e[2]))
    gap = max(0, length - per_fact * len(events)) / max(1, len(events))
    ids: list[int] = []
    mask: list[bool] = []
    for _, fact, asked in events:
        pause = take_filler(rng, filler, int(rng.random() * 2 * gap))
        parts = [(pause, False), (question(tokens, fact), False), (answer(tokens, fact), asked), (tokens.end, False)]
        for part, recalled in parts:
            ids += part
            mask += [recalled] * len(part)
    if len(ids) < length:
        rest = take_filler(rng, filler, length - len(ids))
        ids, mask = ids + rest, mask + [False] * len(rest)
    return ids[:length], mask[:length]


def fact_probe(
    rng: random.Random, tokens: FactTokens, filler: Sequence[int], length: int, count: int
) -> tuple[list[int], list[int]]:
    """Write a prompt of exactly `length` tokens that states `count` facts in filler and asks for one; return it and the answer.

    Raises:
        ValueError: more facts than fit into the prompt.
    """
    facts = draw_facts(rng, count)
    asked = rng.choice(facts)
    statements = [statement(tokens, fact) for fact in facts]
    tail = question(tokens, asked)
    room = length - len(tail) - sum(map(len, statements))
    if room < 0:
        raise ValueError(f"{count} facts do not fit into {length} tokens")
    hay = take_filler(rng, filler, room)
    return scattered(rng, statements, hay) + tail, answer(tokens, asked)
