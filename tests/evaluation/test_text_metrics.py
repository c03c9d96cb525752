"""Metrics: hand-made cases, properties every one must have, and the third-party packages they stand on."""

import difflib

import numpy as np
import pytest

from refine_nsp.evaluation import longbench
from refine_nsp.evaluation.statistics import compare_pairs, estimate
from refine_nsp.evaluation.text_metrics import (
    TREC_CLASSES,
    any_match,
    classification,
    code_similarity,
    exact_match,
    fraction_match,
    normalize_answer,
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
def test_matches(output, references, any_, fraction):
    assert any_match(output, references) == any_
    assert fraction_match(output, references) == fraction


def test_normalised_answers():
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
def test_f1(output, references, expected):
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
    # rapidfuzz's ratio is an indel similarity, close to difflib's on short lines and equal where one string holds the other.
    assert code_similarity("x = 12", ["x = 1"]) == pytest.approx(
        difflib.SequenceMatcher(None, "x = 12", "x = 1").ratio(), abs=0.006
    )


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


def test_the_published_protocol_keeps_its_faults():
    """First line before stripping; references joined and split on "|"."""
    assert longbench.published_score("hotpotqa", "\nParis", ["Paris"]) == 0
    assert longbench.published_score("hotpotqa", "Paris\nmore", ["Paris"]) == 1
    assert (
        longbench.published_score("qasper", "right", ["left|right"]) == 1
        and longbench.score("qasper", "right", ["left|right"]) < 1
    )


# --- statistics -------------------------------------------------------------------------------------------------------


def test_estimate_is_the_textbook_s():
    x = np.random.default_rng(0).normal(2.0, 3.0, 400)
    e = estimate(x.tolist())
    assert e.mean == pytest.approx(x.mean()) and e.stderr == pytest.approx(x.std(ddof=1) / 20)
    assert e.low == pytest.approx(e.mean - 1.96 * e.stderr, abs=0.06) and e.high == pytest.approx(
        e.mean + 1.96 * e.stderr, abs=0.06
    )
    weighted = estimate([1.0, 4.0], [3, 1])
    assert weighted.mean == 1.75
    assert estimate([0.5]).stderr == 0


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = sum(e.low <= 0.3 <= e.high for e in (estimate((rng.random(80) < 0.3).astype(float).tolist()) for _ in range(200)))
    assert 180 <= hits <= 199


def test_sign_flip_test_against_all_assignments():
    a, b = [0.0, 0.0, 1.0, 0.0, 0.2], [1.0, 0.5, 0.6, 0.9, 0.4]
    d = np.array(b) - np.array(a)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    exact = (np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    found = compare_pairs(a, b, flips=40_000)
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert (found.won, found.lost, found.n) == (4, 1, 5) and found.difference == pytest.approx(d.mean())
    assert compare_pairs([1, 0, 1], [1, 0, 1]).p_value == 1


def test_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(2)
    p = [compare_pairs(rng.normal(size=20).tolist(), rng.normal(size=20).tolist(), flips=500).p_value for _ in range(200)]
    assert 2 <= sum(x < 0.05 for x in p) <= 22
