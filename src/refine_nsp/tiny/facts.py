"""The family `facts` scatters lines `name = value value;` in text and mentions each again later.

A fact and its later mention look the same, so whoever predicts the value of the second mention recalls the first. A value is two words
that are drawn independently, so chance is 1 / len(VALUES)^2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from refine_nsp.prompts.encoding import encode_text

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
