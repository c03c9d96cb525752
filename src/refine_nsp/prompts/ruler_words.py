"""Draw RULER's keys and values: numbers, uuids, and pairs of words from the lists of the `wonderwords` package."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from functools import lru_cache
from importlib import resources


def draw_word(rng: random.Random, kind: str) -> str:
    """Draw a key or a value: one of `numbers` (seven digits), `uuids`, or `words` (an adjective and a noun)."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    nouns, adjectives, _ = word_lists()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Call `draw` until it has given `count` different texts, and list them in the order in which they came."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


@lru_cache(maxsize=1)
def word_lists() -> tuple[list[str], list[str], list[str]]:
    """Read the nouns, adjectives and verbs of the `wonderwords` package, from which the benchmark draws its keys."""
    folder = resources.files("wonderwords.assets")
    files = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")
    nouns, adjectives, verbs = (
        sorted({w.strip() for w in (folder / f).read_text("utf-8").splitlines() if w.strip()}) for f in files
    )
    return nouns, adjectives, verbs
