"""Generated documents: rows of exact length whose answers, and nothing else, are marked; RULER's wording; wordings held out."""

import random
import re
from dataclasses import replace
from itertools import groupby

import pytest

from refine_nsp.errors import RefineError
from refine_nsp.models.load import load_tokenizer
from refine_nsp.prompts.qa_sources import QASource
from refine_nsp.prompts.qa_sources import Question as QAQuestion
from refine_nsp.prompts.ruler import Sources, build_ruler
from refine_nsp.prompts.ruler_words import distinct, word_lists
from refine_nsp.tiny import documents, families, words
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.documents import Writer
from refine_nsp.tiny.families import WORDED
from refine_nsp.tiny.measures import family_probes
from refine_nsp.tiny.rows import encode_texts

BOTH = pytest.mark.parametrize("held_out", [False, True])
EVERY = pytest.mark.parametrize("family", WORDED)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("refine-nsp/tiny-delta-net")


@pytest.fixture(scope="module")
def writer(tokenizer):
    return Writer.of(tokenizer, standard_library(held_out=True)[:3])


@pytest.fixture(scope="module")
def filler(tokenizer):
    return encode_texts(tokenizer, standard_library(held_out=True)[:2]).tolist()


@pytest.fixture
def drafts(monkeypatch):
    """The drafts that documents were made from, as (wording, draft)."""
    made = []

    def spy(family):
        def make(rng, wording, count):
            made.append((wording, family.make(rng, wording, count)))
            return made[-1][1]

        return replace(family, make=make)

    monkeypatch.setattr(documents, "WORDED", {name: spy(family) for name, family in WORDED.items()})
    return made


def written(writer, filler, family, held_out, seed, length=None):
    rng = random.Random(seed)
    length = length or rng.choice([128, 200, 333, 1024])
    start = rng.randrange(len(filler) - length)
    return writer.write(rng, family, filler[start : start + length], length, rng.random(), held_out), length


@BOTH
@EVERY
def test_rows_have_the_exact_length_and_mark_the_answers_and_only_them(writer, filler, tokenizer, drafts, family, held_out):
    wordings = set()
    for seed in range(60):
        (ids, mask), length = written(writer, filler, family, held_out, seed)
        assert len(ids) == len(mask) == length and any(mask)
        wording, draft = drafts[-1]
        wordings.add(wording)
        runs, at = [], 0
        for recalled, run in groupby(mask):
            size = len(list(run))
            if recalled:
                runs.append((tokenizer.decode(ids[:at]), tokenizer.decode(ids[at : at + size])))
            at += size
        asked = [q for item in draft.items for q in item.questions if any(before.endswith(q.text) for before, _ in runs)]
        expected = []
        for question in asked:
            before = question.text
            for recalled, group in groupby(question.answer, key=lambda piece: piece[1]):
                text = "".join(piece for piece, _ in group)
                expected += [(before, text)] * recalled
                before += text
        assert len(expected) == len(runs)
        for before, answer in runs:
            assert any(before.endswith(b) and answer == a for b, a in expected)
            stated = before[: max(before.rfind(q.text) for q in asked if q.text in before)]
            assert all(value in stated for value in answer.split())
    assert wordings == set(range(int(held_out), WORDED[family].wordings, 2))


@EVERY
def test_answers_are_in_their_own_items_statements_and_questions_are_not_repeated(family):
    for seed in range(60):
        rng = random.Random(seed)
        draft = WORDED[family].make(rng, seed % WORDED[family].wordings, 12)
        questions = [q.text for item in draft.items for q in item.questions]
        assert len(set(questions)) == len(questions)
        for item in draft.items:
            said = "\n".join(item.statements)
            assert all(value.strip(' "') in said for q in item.questions for value, recalled in q.answer if recalled)


def test_answers_come_in_the_order_in_which_they_can_be_given(writer, filler, tokenizer):
    """A key's values as they were said; a chain's variables from the first on."""
    rng = random.Random(0)
    for wording in range(0, len(families.NEEDLE_WORDINGS)):
        item = families.needle_item(wording, "numbers", [("nested-rows", ["111", "222", "333"])], rng)
        said = "\n".join(item.statements)
        assert [value.strip() for value, recalled in item.questions[0].answer if recalled] == re.findall(r"111|222|333", said)
    several = families.needle_item(0, "numbers", [("a-b", ["111"]), ("c-d", ["222"])], rng).questions[0]
    assert "for a-b, and c-d mentioned" in several.text
    assert "".join(piece for piece, _ in several.answer) == " 111, and 222."
    item = families.chain_item(0, ["AB", "CD", "EF"], "12345", rng)
    assert item.statements == ["VAR AB = 12345", "VAR CD = VAR AB", "VAR EF = VAR CD"]
    assert "".join(piece for piece, _ in item.questions[0].answer) == " AB CD EF"


def test_words_agree():
    assert families.with_article("easel") == "an easel" and families.with_article("drum") == "a drum"
    text = families.needle_item(4, "numbers", [("a-b", ["1", "2"])], random.Random(0)).questions[0].text
    assert text == "\na-b stands for"


@BOTH
@EVERY
def test_a_document_is_what_the_tokenizer_makes_of_its_text(writer, filler, tokenizer, family, held_out):
    for seed in range(40):
        (ids, mask), _ = written(writer, filler, family, held_out, seed)
        end = len(mask) - mask[::-1].index(True)
        end = ids.index(tokenizer.eos_token_id, end) if tokenizer.eos_token_id in ids[end:] else end
        start = max((i + 1 for i in range(mask.index(True)) if ids[i] == tokenizer.eos_token_id), default=0)
        document = ids[start:end]
        assert tokenizer(tokenizer.decode(document), add_special_tokens=False)["input_ids"] == document


@BOTH
@EVERY
def test_the_same_seed_gives_the_same_row(writer, filler, family, held_out):
    assert written(writer, filler, family, held_out, 5) == written(writer, filler, family, held_out, 5)


def test_rows_that_are_too_short_are_refused(writer, filler):
    with pytest.raises(RefineError, match="rows of 100 tokens"):
        writer.write(random.Random(0), "needles", filler[:100], 100, 1.0)


# --- wordings held out ------------------------------------------------------------------------------------------------


def fragments(wording):
    """The longest fixed stretch of text of each template in a wording."""
    flat = [text for part in wording for text in (part if isinstance(part, tuple) else [part])]
    return [longest for t in flat if len(longest := max(re.split(r"\{\w+\}", t), key=len).strip()) >= 8]


HELD_OUT = {
    "needles": families.NEEDLE_WORDINGS[1::2],
    "listing": families.LISTING_WORDINGS[1::2],
    "chains": families.CHAIN_WORDINGS[1::2],
    "paragraphs": (*families.PARAGRAPH_WORDINGS[1::2], (families.PLAIN_FORMATS[1].split("{")[0] + "____",)),
}


@EVERY
def test_held_out_wordings_are_in_no_training_document(tokenizer, family):
    writer = Writer.of(tokenizer, ['"""One two. Three four."""'] * 200)
    filler = tokenizer("x = 1\ny = 2\n" * 600)["input_ids"]
    trained, held = (
        "\n".join(tokenizer.decode(written(writer, filler, family, held_out, seed)[0][0]) for seed in range(80))
        for held_out in (False, True)
    )
    kept = [f for wording in HELD_OUT[family] for f in fragments(wording) if "____" not in f]
    assert kept and all(f in held for f in kept)
    assert not [f for f in kept if f in trained]
    assert "\nQ: " not in trained


@EVERY
def test_wordings_come_in_pairs(family):
    assert WORDED[family].wordings % 2 == 0 and WORDED[family].wordings >= 4


# --- RULER's wording --------------------------------------------------------------------------------------------------

ESSAYS = ("Some words. " * 400).split()


@pytest.mark.parametrize(
    "task", ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
             "niah_multivalue", "niah_multiquery"],
)  # fmt: skip
def test_needles_0_is_rulers_wording(tokenizer, task):
    prompt = build_ruler([task], [1024], 1, tokenizer, Sources(ESSAYS))[task][0].prompt
    stated = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", prompt)
    kind = stated[0][0]
    query = re.search(r"provided text\? The special magic \w+ for (.+) mentioned", prompt)[1]
    keys = re.split(r", and |, ", query)
    facts = [(key, [value for _, k, value in stated if k == key]) for key in keys]
    item = families.needle_item(0, kind, facts, random.Random(0))
    question = item.questions[0].text
    assert prompt.startswith(families.needle_head(0, kind, sum(len(values) for _, values in facts)) + "\n")
    assert prompt.endswith(question)
    assert all(statement in prompt for statement in item.statements)
    for part in (question, *("\n" + s for s in item.statements if "\n" + s in prompt)):
        assert contains(tokenizer(prompt)["input_ids"], tokenizer(part)["input_ids"])


def test_chains_0_is_rulers_wording(tokenizer):
    example = build_ruler(["vt"], [1024], 1, tokenizer, Sources(ESSAYS))["vt"][0]
    value = re.findall(r"assigned the value (\d+)", example.prompt)[-1]
    item = families.chain_item(0, example.references, value, random.Random(0))
    head = families.CHAIN_WORDINGS[0][0]
    assert example.prompt.startswith(head + "\n") and f"\n\n{head}\n" in example.prompt
    lines = [line.rstrip(" ") for line in example.prompt.split("\n")]  # but for the space that ends a hop in RULER's text
    assert all(statement in lines for statement in item.statements)
    question = item.questions[0]
    assert example.prompt.endswith(question.text) and question.text.endswith(" ")
    ids = tokenizer(question.text)["input_ids"]
    assert tokenizer(example.prompt)["input_ids"][-len(ids) :] == ids
    # The worked example is answered in the same way.
    assert re.search(r"they are: ( [A-Z]{3}){5}\n\n", example.prompt)
    assert question.answer[0][0] == f" {example.references[0]}"


def test_paragraphs_have_rulers_format(tokenizer):
    question = QAQuestion("1", "Where does Ada Berg live?", ["Arden"], (0,))
    source = QASource([question], ["Ada Berg lives in Arden.", "Bela Lund lives in Selby."])
    prompt = build_ruler(["qa_1"], [400], 1, tokenizer, Sources(ESSAYS, {"qa_1": source}))["qa_1"][0].prompt
    for seed in range(100):
        draft = WORDED["paragraphs"].make(random.Random(seed), 0, 8)
        if draft.foot:
            break
    asked = (
        draft.items[0].questions[0].text.replace(re.search(r"does (.+) live", draft.items[0].questions[0].text)[1], "Ada Berg")
    )
    order = sorted(range(2), key=lambda i: prompt.index(source.documents[i]))
    said = "".join(f"{draft.glue}Document {n}:\n{source.documents[i]}" for n, i in enumerate(order, 1))
    assert prompt == draft.heads[0] + said + draft.foot + asked
    assert [item.statements[0].split("\n")[0] for item in draft.items] == [
        f"Document {n}:" for n in range(1, len(draft.items) + 1)
    ]


def contains(ids, part):
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


# --- words ------------------------------------------------------------------------------------------------------------


def test_no_word_is_one_of_rulers():
    known = {part.lower() for several in word_lists() for word in several for part in re.split(r"[\s-]", word)}
    assert not known.intersection(words.ADJECTIVES + words.NOUNS)
    for endings in (words.ADJECTIVE_ENDINGS, words.NOUN_ENDINGS):
        made = {o + v + c + e for o in words.ONSETS for v in words.VOWELS for c in words.CODAS for e in endings}
        assert len(made) > 500_000 and len(known & made) < 1e-3 * len(made)


def test_values_are_like_rulers():
    rng = random.Random(0)
    for _ in range(50):
        assert re.fullmatch(r"[1-9]\d{6}", words.draw(rng, "numbers"))
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", words.draw(rng, "uuids"))
        assert re.fullmatch(r"[a-z]+-[a-z]+", words.draw(rng, "words"))
    assert len(set(distinct(lambda: words.draw(rng, "numbers"), 40))) == 40


# --- probes -----------------------------------------------------------------------------------------------------------


def test_probes_of_every_family_have_the_exact_length_and_hold_the_answer(writer, filler, tokenizer):
    sets = family_probes(writer, list(WORDED), filler, [200, 512], 12, seed=0)
    assert set(sets) == {f"{f}{h}_{n}" for f in WORDED for h in ("", "_held_out") for n in (200, 512)}
    for probes in sets.values():
        for prompt, answer in zip(probes.prompts, probes.answers, strict=True):
            assert len(prompt) == probes.length and answer
            assert all(value in tokenizer.decode(prompt) for value in tokenizer.decode(answer).split())
