"""Each family of generated documents states things and asks for them, in several wordings.

The wordings with an even index are trained on. The odd ones are held out and only measured with, so that a format learned by heart does
not count as recall. `needles` 0 and `chains` 0 are RULER's own wording (arXiv 2404.06654), and `paragraphs` uses RULER's format for
questions on documents. The family `facts` has one form, token by token, and lives in `tiny/documents.py`.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from refine_nsp.prompts.ruler import NEEDLE, NEEDLE_QUESTION, QA_PROMPT, VARIABLE_HOPS, VARIABLE_PROMPT, variable_text
from refine_nsp.prompts.ruler_words import distinct
from refine_nsp.tiny.words import draw, made_word

Piece = tuple[str, bool]  # a piece of an answer, and whether it can only be known from what was stated


@dataclass(frozen=True)
class Question:
    """A question holds its `text` with line breaks, up to the answer, and the pieces of the `answer`."""

    text: str
    answer: list[Piece]


@dataclass(frozen=True)
class Item:
    """An item holds statements that belong together, in the order in which they are said, and the questions on them."""

    statements: list[str]
    questions: list[Question]


@dataclass(frozen=True)
class Draft:
    """A draft holds a document's parts as text. Where not all items fit, the last are left out.

    Attributes:
        heads: texts that may open the document, the fullest first; the first that leaves room for the rest is used, or none.
        glue: stands between statements that no haystack hides.
        foot: stands between the statements and the questions.
        mixed: whether statements of different items may come in any order.
    """

    items: list[Item]
    heads: list[str] = field(default_factory=list)
    glue: str = "\n"
    foot: str = ""
    mixed: bool = True


Make = Callable[[random.Random, int, int], Draft]  # (rng, wording, how many statements) -> draft


@dataclass(frozen=True)
class Family:
    """A family makes drafts in any of its `wordings`, and names the kinds of text that hide their statements, drawn evenly."""

    make: Make
    wordings: int
    haystacks: tuple[str, ...]

    def choose(self, rng: random.Random, held_out: bool) -> int:
        """Draw a wording that is trained on, or with `held_out` one that is only measured with."""
        return rng.randrange(int(held_out), self.wordings, 2)


def listed(values: Sequence[str]) -> str:
    """Join values as RULER lists them: `a`, `a, and b`, `a, b, and c`."""
    return ", ".join(values[:-1]) + (", and " if len(values) > 1 else "") + values[-1]


def listed_answer(values: Sequence[str]) -> list[Piece]:
    """Join values as `listed` does, as an answer whose values alone are recalled."""
    pieces: list[Piece] = []
    for value in values[:-1]:
        pieces += [(f" {value}", True), (",", False)]
    and_last: list[Piece] = [*pieces[:-1], (", and", False)] if pieces else []
    return [*and_last, (f" {values[-1]}", True), (".", False)]


def with_article(noun: str) -> str:
    """Put the article before a noun: `a drum`, `an easel`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


RULER_HEAD, _, RULER_TAIL = NEEDLE_QUESTION.partition("\n{context}\n")
# Each wording has a head, a statement and a question. {kinds} is always the plural, {stand} agrees with the number of keys, and the
# other words with the number of values that are asked for.
NEEDLE_WORDINGS = (
    (RULER_HEAD, NEEDLE.replace("{kind}", "{kinds}"), RULER_TAIL),
    ("", "Remember that the {one} of {key} is {value}.", "Which {kind} {go} with {query}? The {kind} of {query} {are}"),
    ("Some {kinds} were kept.", "The {one} kept for {key} is {value}.",
     "Question: what {are_all} the {kind} kept for {query}? Answer: the {kind} kept for {query} {are}"),
    ("Keep what follows in mind.", "Note: {key} was given the {one} {value}.", "Recall the {kind} given to {query}:"),
    ("", "{key} stands for {value}.", "{query} {stand} for"),
    ("", "Whoever asks for {key} is told {value}.", "We ask for {query} and are told"),
    ("", "From now on {value} is the {one} of {key}.", "Say the {kind} of {query}. The {kind} of {query} {are}"),
    ("", "Let us file {value} under {key}.", "Under {query} we filed"),
)  # fmt: skip
SINGULAR = {"some": "A", "are": "is", "are_all": "is", "go": "goes"}
PLURAL = {"some": "Some", "are": "are", "are_all": "are all", "go": "go"}
VALUE_KINDS = ("numbers", "numbers", "words", "uuids")
KEY_KINDS = ("words", "words", "words", "words", "numbers", "uuids")


def needles(rng: random.Random, wording: int, count: int) -> Draft:
    """Draw keys with a value each, keys with several values, or keys that are asked for several at once."""
    key_kind, kind = rng.choice(KEY_KINDS), rng.choice(VALUE_KINDS)
    values_each, keys_asked = rng.choice(((1, 1), (1, 1), (1, 1), (2, 1), (4, 1), (1, 2), (1, 4)))
    items = []
    keys = distinct(partial(draw, rng, key_kind), max(1, count // (values_each * keys_asked)) * keys_asked)
    for start in range(0, len(keys), keys_asked):
        facts = [(key, distinct(partial(draw, rng, kind), values_each)) for key in keys[start : start + keys_asked]]
        items.append(needle_item(wording, kind, facts, rng))
    return Draft(items, [needle_head(wording, kind, values_each * keys_asked)])


def needle_words(kind: str, asked: int) -> dict[str, str]:
    """Choose the words of a wording that agree with the number of values that are asked for."""
    one = kind.removesuffix("s")
    return {**(PLURAL if asked > 1 else SINGULAR), "kinds": kind, "one": one, "kind": kind if asked > 1 else one}


def needle_head(wording: int, kind: str, asked: int) -> str:
    """Write the head of a document whose questions ask for `asked` values at a time."""
    return NEEDLE_WORDINGS[wording][0].format(**needle_words(kind, asked))


def needle_item(wording: int, kind: str, facts: Sequence[tuple[str, Sequence[str]]], rng: random.Random) -> Item:
    """State the values of keys that are asked for at once.

    The answer lists one key's values in the order of its statements, and several keys' values in the order of the question.
    """
    _, statement, question = NEEDLE_WORDINGS[wording]
    values = [value for _, of_key in facts for value in of_key]
    words = needle_words(kind, len(values))
    said = [statement.format(key=key, value=value, **words) for key, of_key in facts for value in of_key]
    if len(facts) > 1:
        rng.shuffle(said)
    stand = "stand" if len(facts) > 1 else "stands"
    asked = question.format(query=listed([key for key, _ in facts]), stand=stand, **words)
    return Item(said, [Question(f"\n{asked}", listed_answer(values))])


# Each wording has a line, a question and the end of the answer. An answer begins with a space unless the question ends with a quotation
# mark.
LISTING_WORDINGS = (
    ("{key}: {value}", "value of {key}:", ""),
    ("{key} | {value} |", "look up {key} |", " |"),
    ("{key} = {value}", "{key} =", ""),
    ("set {key} to {value}", "{key} was set to", ""),
    ('"{key}": "{value}",', 'print(data["{key}"])  # "', '"'),
    ("<{key}>{value}</{key}>", "the text of <{key}> is", ""),
    ("{key} -> {value}", "follow {key} ->", ""),
    ("({key} {value})", "for {key} it says", ""),
)


def listing(rng: random.Random, wording: int, count: int) -> Draft:
    """Draw lines of keys and values, whose keys are asked for in another order."""
    line, question, end = LISTING_WORDINGS[wording]
    kind, digits = rng.choice(("numbers", "word", "words")), rng.randint(1, 9)
    space = "" if question.endswith('"') else " "
    items = []
    for key in distinct(partial(draw, rng, "words"), count):
        value = str(rng.randrange(10**digits)) if kind == "numbers" else draw(rng, "words")
        if kind == "word":
            value = value.partition("-")[0]
        name = key.replace("-", "_")
        ending: list[Piece] = [(end, False)] if end else []
        asked = Question(f"\n{question.format(key=name)}", [(f"{space}{value}", True), *ending])
        items.append(Item([line.format(key=name, value=value)], [asked]))
    return Draft(items)


CHAIN_HEAD, _, CHAIN_TAIL = VARIABLE_PROMPT.partition("\n{context}")
# Each wording has a head, a statement, the prefix of a variable that another is set to, a question and the end of the answer. Questions
# with {value} ask for a chain's variables, the others for a variable's value.
CHAIN_WORDINGS = (
    (CHAIN_HEAD, "VAR {name} = {what}", "VAR ", CHAIN_TAIL, ""),
    ("", "let {name} be {what}", "", "\nIn this order {value} went to", "."),
    ("", "{name} = {what};", "", "\nthe value of {name} is", "."),
    ("", "{name} takes {what}.", "", "\nSo {name} has", "."),
    ("", "{name} := {what}", "", "\nNames for {value}:", ""),
    ("", "copy {what} into {name}", "", "\nin the end {name} holds", ""),
)


def chains(rng: random.Random, wording: int, count: int) -> Draft:
    """Draw chains of up to five variables with their assignments mixed; questions name a value, or a variable of a chain."""
    longest = VARIABLE_HOPS + 1
    lengths = [longest if rng.random() < 0.5 else rng.randint(2, longest) for _ in range(rng.randint(1, max(1, count // 3)))]
    letters = longest if wording == 0 else rng.randint(3, 5)
    names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), sum(lengths))
    items = []
    for length in lengths:
        chain, names = names[:length], names[length:]
        items.append(chain_item(wording, chain, str(rng.randint(10000, 99999)), rng))
    head = CHAIN_WORDINGS[wording][0]
    if wording == 0 and rng.random() < 0.5:
        # The benchmark ends a hop with a space. The shipped bases were trained on chains without it, so it is left out here too.
        example, answer, _ = variable_text(rng, longest, 3, hop_end="")
        return Draft(items, [f"{example} {' '.join(answer)}\n\n{head}", head])
    return Draft(items, [head])


def chain_item(wording: int, chain: Sequence[str], value: str, rng: random.Random) -> Item:
    """State a chain's assignments in their order, and ask one question on it."""
    _, statement, prefix, question, end = CHAIN_WORDINGS[wording]
    said = [statement.format(name=chain[0], what=value)]
    said += [statement.format(name=name, what=f"{prefix}{before}") for before, name in pairwise(chain)]
    name = chain[rng.randrange(len(chain))]
    answer: list[Piece] = [(f" {n}", True) for n in chain] if "{value}" in question else [(f" {value}", True)]
    ending: list[Piece] = [(end, False)] if end else []
    return Item(said, [Question(question.format(name=name, value=value, count=len(chain)), [*answer, *ending])])


FIRST_NAMES = (
    "Ada Anton Bela Bruno Carla Cyrus Dora Edgar Elena Farid Greta Hanna Ivan Jonas Karin Leo Marta Nadia Olga Pavel Quinn Rosa Simon "
    "Tilda Umar Vera Walter Xenia Yusuf Zora"
).split()
FAMILY_ENDINGS = ("berg", "er", "ley", "man", "sen", "ski", "son")
PLACE_ENDINGS = ("burg", "by", "dale", "ford", "ham", "stad", "ton", "wick")
TRADES = (
    "actor baker carpenter doctor engraver farmer gardener innkeeper jeweller lawyer miller nurse optician painter roofer sailor tailor "
    "usher weaver"
).split()
THINGS = (
    "anvil basket compass drum easel fiddle globe hammock icon jar kettle lantern mirror organ parrot quilt rocket saddle telescope "
    "umbrella violin"
).split()
# Each saying of a wording has a sentence on a person, a question on that sentence, and the word that answers it.
PARAGRAPH_WORDINGS = (
    (("{who} lives in {place}.", "Where does {who} live?", "place"),
     ("{who} works as {a_trade}.", "What does {who} work as?", "trade"),
     ("{who} keeps {a_thing} at home.", "Who keeps {a_thing} at home?", "who"),
     ("{who} was born in {year}.", "When was {who} born?", "year")),
    (("The home of {who} is {place}.", "Which town is the home of {who}?", "place"),
     ("By trade {who} is {a_trade}.", "What is the trade of {who}?", "trade"),
     ("The {thing} belongs to {who}.", "Whom does the {thing} belong to?", "who"),
     ("The story of {who} begins in {year}.", "In which year does the story of {who} begin?", "year")),
    (("In {place} people know {who} well.", "In which place do people know {who} well?", "place"),
     ("{who} earned a living as {a_trade}.", "How did {who} earn a living? As what?", "trade"),
     ("Somebody gave {a_thing} to {who}.", "To whom did somebody give {a_thing}?", "who"),
     ("It was in {year} that {who} arrived.", "In what year did {who} arrive?", "year")),
    (("{who} comes from {place}.", "From which town does {who} come?", "place"),
     ("{who} learned to be {a_trade}.", "What did {who} learn to be?", "trade"),
     ("{who} bought {a_thing} at the fair.", "Who bought {a_thing} at the fair?", "who"),
     ("Since {year} {who} has been famous.", "Since which year has {who} been famous?", "year")),
)  # fmt: skip
QA_HEAD, _, QA_REST = QA_PROMPT.partition("\n\n{context}")
QA_FOOT, _, QA_QUESTION = QA_REST.partition("\n\nQuestion:")
QA_FORMAT = "\n\nQuestion:" + QA_QUESTION
PLAIN_FORMATS = ("\nQuestion: {question}\nAnswer:", "\nQ: {question}\nA:")  # trained on, held out


def paragraphs(rng: random.Random, wording: int, count: int) -> Draft:
    """Draw people and what is said of them, as the documents of RULER's questions or as plain paragraphs."""
    sayings = PARAGRAPH_WORDINGS[wording]
    people = max(1, min(count // len(sayings), len(THINGS)))
    as_documents = rng.random() < 0.5
    question = QA_FORMAT if as_documents else PLAIN_FORMATS[wording % 2]
    drawn = zip(rng.sample(FIRST_NAMES, people), rng.sample(THINGS, people), strict=True)
    titles = [f"Document {number}:\n" if as_documents else "" for number in range(1, people + 1)]
    items = [paragraph(rng, sayings, *names, title, question) for names, title in zip(drawn, titles, strict=True)]
    if as_documents:
        return Draft(items, [QA_HEAD], glue="\n\n", foot=QA_FOOT, mixed=False)
    return Draft(items, mixed=False)


def paragraph(rng: random.Random, sayings: Sequence[tuple[str, str, str]], first: str, thing: str, title: str, form: str) -> Item:
    """Write one person's paragraph, and a question on every sentence in it."""
    trade = rng.choice(TRADES)
    card = {
        "who": f"{first} {made_word(rng, FAMILY_ENDINGS).capitalize()}", "place": made_word(rng, PLACE_ENDINGS).capitalize(),
        "trade": trade, "a_trade": with_article(trade), "thing": thing, "a_thing": with_article(thing),
        "year": str(rng.randint(1500, 2029)),
    }  # fmt: skip
    said = [saying.format(**card) for saying, _, _ in rng.sample(sayings, len(sayings))]
    questions = [
        Question(form.format(question=question.format(**card)), [(f" {card[word]}", True)]) for _, question, word in sayings
    ]
    return Item([title + " ".join(said)], questions)


FACTS = "facts"
WORDED = {
    "needles": Family(needles, len(NEEDLE_WORDINGS), ("prose", "prose", "noise", "code", "none")),
    "listing": Family(listing, len(LISTING_WORDINGS), ("none", "none", "code")),
    "chains": Family(chains, len(CHAIN_WORDINGS), ("noise", "noise", "prose", "none")),
    "paragraphs": Family(paragraphs, len(PARAGRAPH_WORDINGS), ("none", "prose")),
}
FAMILIES = (FACTS, *WORDED)  # the order in which the families' shares of the rows lie side by side
