"""Metrics: hand-made cases, properties every one must have, and the third-party packages they stand on."""

import json
import sys

import pytest

from refine_nsp.evaluation import longbench
from refine_nsp.evaluation.text_metrics import (
    TREC_CLASSES,
    any_match,
    classification,
    code_similarity,
    exact_match,
    fraction_match,
    normalize_answer,
    published_any_match,
    qa_f1,
    rouge_l,
)


@pytest.mark.parametrize(
    ("output", "references", "any_", "fraction"),
    [
        ("It was PARIS, I think", ["paris"], 1, 1),
        ("Paris and Rome", ["paris", "rome", "oslo", "bern"], 1, 0.5),
        ("nothing", ["paris", "rome"], 0, 0),
        ("", ["paris"], 0, 0),
        ("12345678", ["2345"], 1, 1),
    ],
)
def test_matches_count_references_in_any_case(output, references, any_, fraction):
    assert any_match(output, references) == any_
    assert fraction_match(output, references) == fraction


def test_answers_are_normalised_before_they_are_compared():
    assert normalize_answer("  The  U.S.A., an 'Apple' a-day ") == "usa apple aday"
    assert exact_match("The Cat!", ["dog", "cat"]) == 1 and exact_match("cats", ["cat"]) == 0


@pytest.mark.parametrize(
    ("output", "references", "expected"),
    [
        ("the cat sat", ["cat"], 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # the article is dropped: precision 1/2, recall 1
        ("cat cat", ["cat"], 2 * 0.5 * 1 / 1.5),  # a bag of words: the second cat is not matched
        ("dog", ["cat", "dog"], 1.0),  # the best reference
        ("", ["cat"], 0.0),
        ("the", ["a"], 0.0),  # nothing is left of either
    ],
)
def test_f1_is_that_of_bags_of_words(output, references, expected):
    assert qa_f1(output, references) == pytest.approx(expected)


def test_classification_counts_every_class_named():
    assert classification("Food", ["Food"]) == 1
    assert classification("Food or Date", ["Date"]) == 0.5
    assert classification("Food", ["Date"]) == 0
    # "Other" classes: the name that is part of the reference's name does not count against it.
    assert classification("Abbreviation Expression abbreviated", ["Expression abbreviated"]) == 0.5
    assert classification("Description of something", ["Description of something"]) == 1
    assert (
        classification("Letter like a-z and Other location", ["Other location"], ["Other", "Other location", "Letter like a-z"])
        == 0.5
    )
    assert len(TREC_CLASSES) == 50 == len(set(TREC_CLASSES))


def test_classification_removes_as_upstream_does():
    """Upstream removes from the list it iterates over, so the name right after a removed one is never looked at."""
    classes = ["a", "b", "ab c"]
    assert classification("ab c", ["ab c"], classes) == 0.5  # "a" is removed, "b" skipped


def test_code_similarity_is_that_of_the_first_line_of_code():
    assert code_similarity("\n# comment\n`x`\n// y\nreturn a + b\nreturn c", ["return a + b"]) == 1
    assert code_similarity("# only a comment", ["x = 1"]) == 0
    assert code_similarity("", ["x = 1"]) == 0


@pytest.mark.parametrize(
    ("line", "reference", "expected"),
    [
        ("x = 12", "x = 1", 0.91),  # 2 * 5 of 11 characters
        ("abcd", "bcda", 0.75),  # the block bcd; an edit similarity by insertions and deletions gives the same
        ("return x", "xreturn", 0.8),  # difflib takes the block "return"
        ("sp = new JESpace(name)", "JESpace sp = new", 0.42),  # the block "sp = new": 2 * 8 of 38; as an edit similarity .58
        ("ab", "abcdefghijklmn", 0.25),  # 4 of 16
        ("a", "abcdefghijklmno", 0.12),  # 2 of 16 are 12.5 percent, which rounds to even
        ("", "x", 0.0),
        ("", "", 1.0),  # upstream asks whether both are equal before whether one is empty
        ("ﬁ", "fi", 0.0),  # a ligature is one character
        ("a" * 150 + "b" * 60, "b" * 60 + "a" * 150, 0.0),  # difflib leaves out characters that are frequent in 200 or more
    ],
)
def test_code_similarity_is_difflibs_in_whole_percent(line, reference, expected):
    assert code_similarity(line, [reference]) == expected


def test_rouge_l_is_the_package_s():
    from rouge import Rouge

    pairs = [("the quick brown fox", "a quick fox jumps"), ("one two. three four", "three four. one two")]
    for output, reference in pairs:
        assert rouge_l(output, [reference]) == Rouge().get_scores([output], [reference])[0]["rouge-l"]["f"]
    assert rouge_l("", ["text"]) == 0 and rouge_l("text", ["other words", "text"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", longbench.TASKS)
def test_a_reference_scores_1_and_nothing_0(name):
    references = ["Other location"] if name == "trec" else ["some words of an answer"]
    assert longbench.score(name, references[0], references) == pytest.approx(1, abs=1e-6)
    assert longbench.score(name, "", references) == 0


def test_few_shot_tasks_are_scored_on_their_first_line():
    assert longbench.score("triviaqa", "\n\nParis\nQuestion: next?", ["Paris"]) == 1
    assert longbench.score("hotpotqa", "Paris\nQuestion: next?", ["Paris"]) < 1


def test_rouge_l_does_not_depend_on_how_deep_it_is_called():
    """The package takes a call for each word: upstream's script, 1,000 calls deep at most, counts a longer sentence as 0."""

    def from_deep(calls, text):
        return from_deep(calls - 1, text) if calls else rouge_l(text, [text])

    limit = sys.getrecursionlimit()
    for words, expected in ((950, 1.0), (1050, 0.0)):
        text = " ".join(f"w{i}" for i in range(words))
        assert [from_deep(calls, text) for calls in (0, 300)] == pytest.approx([expected] * 2, abs=1e-6)
    assert sys.getrecursionlimit() == limit


# Worked by hand, and with the code they are named after.
ODD_TEXTS = [
    ("hotpotqa", "Par\u200bis", ["Paris"], 0.0),  # a zero-width space is no punctuation and no space
    ("hotpotqa", "New\u2028York", ["new york"], 1.0),  # a line separator is white space
    ("hotpotqa", "New\x85York", ["new york"], 1.0),
    ("hotpotqa", "ﬁnal", ["final"], 0.0),
    ("hotpotqa", "“Paris”", ["Paris"], 0.0),  # only ASCII punctuation goes
    ("hotpotqa", "a\u00a0b", ["b"], 1.0),  # a no-break space is white space, and the article goes
    ("hotpotqa", "the-end", ["end"], 0.0),  # punctuation goes before articles: "theend"
    ("triviaqa", "\n\nParis\u2028more", ["Paris"], 2 / 3),  # only "\n" ends the first line
    ("triviaqa", "\r\nParis", ["Paris"], 0.0),  # the first line is "\r"
    ("triviaqa", "Paris\r\nnext", ["Paris"], 1.0),
    ("samsum", "\n", ["They met."], 0.0),
    ("samsum", ".", ["They met."], 0.0),
    ("trec", "Type: Other location\nFood", ["Other location"], 1.0),
    ("trec", "", ["Food"], 0.0),
    ("lcc", "```python\nx = 1\n```", ["x = 1"], 1.0),
    ("lcc", "\n\n    x = 1", ["x = 1"], 0.71),  # spaces count: 2 * 5 of 14
    ("lcc", "x = 1\r\ny", ["x = 1"], 0.91),
    ("lcc", "x = 1\u2028y = 2", ["x = 1"], 0.62),  # 2 * 5 of 16, rounded to even; a line separator ends no line
    ("lcc", "# all\n// comments `here`", ["x = 1"], 0.0),
]


@pytest.mark.parametrize(("task", "output", "references", "expected"), ODD_TEXTS)
def test_odd_texts_score_as_upstream_s(task, output, references, expected):
    assert longbench.score(task, output, references) == pytest.approx(expected, abs=1e-9)


def test_scores_of_perturbed_answers_are_upstream_s(shared):
    rows = [json.loads(line) for line in (shared / "fixtures/longbench/metrics.jsonl").read_text("utf-8").split("\n") if line]
    off = [r for r in rows if abs(longbench.score(r["task"], r["prediction"], r["answers"]) - r["score"]) >= 1e-9]
    assert len(rows) == 696 and not off


@pytest.mark.parametrize(
    ("task", "output", "references", "published", "standard"),
    [
        ("hotpotqa", "\nParis", ["Paris"], 0.0, 1.0),  # the first line, before stripping, is empty
        ("hotpotqa", "Paris\nQuestion: next?", ["Paris"], 1.0, 0.5),
        ("qasper", "right", ["left|right"], 1.0, 0.0),  # references are split on "|"
        ("triviaqa", "\n Paris\nmore", ["Paris"], 1.0, 1.0),  # few-shot tasks: line ends are stripped first
        ("lcc", "# x = 1", ["x = 1"], 0.83, 0.0),  # no line is code: the whole response, 2 * 5 of 12
        ("lcc", "# a\n# b", ["# a\n# b"], 1.0, 0.0),
        ("repobench-p", "# a\nx = 1", ["x = 1"], 1.0, 1.0),
        ("repobench-p", "", ["x"], 0.0, 0.0),  # an empty line is code
        ("samsum", "", ["They met."], 0.0, 0.0),
    ],
)
def test_the_published_protocol_scores_as_its_code_does(task, output, references, published, standard):
    assert longbench.published_score(task, output, references) == pytest.approx(published, abs=1e-6)
    assert longbench.score(task, output, references) == pytest.approx(standard, abs=1e-6)


@pytest.mark.parametrize(
    ("output", "references", "expected"),
    [
        ("In Paris", ["paris"], 1),
        ("\nParis", ["Paris"], 0),
        ("Rome\nParis", ["Paris"], 0),
        ("right", ["left|right"], 1),  # split on "|"
        ("anything", ["left|"], 1),  # which can leave an empty reference, and that stands in every output
        ("New\tYork", ["new\nyork"], 1),  # control characters become line ends
        ("New\tYork", ["new\tyork"], 0),
    ],
)
def test_the_published_protocol_scores_the_first_line_of_an_answer(output, references, expected):
    assert published_any_match(output, references) == expected
