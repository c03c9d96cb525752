"""Score an answer against its references, each score in 0..1, as RULER and LongBench define them.

RULER counts a reference that stands in the output, in upper or lower case, and takes the mean over references (`fraction_match`) or the
best (`any_match`). LongBench takes the best over references of bag-of-words F1, ROUGE-L, class names, or the similarity of a line of code.
"""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from rouge import Rouge

Metric = Callable[[str, Sequence[str]], float]

# The classes of TREC's fine-grained questions as LongBench spells them ("somethin" included).
TREC_CLASSES = (
    "Food;Date;Order, rank;Speed;Disease and medicine;Word with a special property;Abbreviation;Language;Letter like a-z;"
    "Other entity;Animal;Expression abbreviated;Price;Techniques and method;Musical instrument;Mountain;Currency name;Event;Product;"
    "State;Individual;Organ of body;Reason;Manner of an action;City;Religion;Invention, book and other creative piece;"
    "Distance, linear measure;Temperature;Postcode or other code;Size, area and volume;Sport;Country;Other location;"
    "Lasting time of somethin;Equivalent term;Description of something;Weight;Vehicle;Color;Other number;Definition of something;"
    "Element and substance;Description of a person;Symbols and sign;Number of something;Plant;Percent, fraction;"
    "Group or organization of person;Title of a person"
).split(";")


# With Python's limit of 1,000 nested calls upstream's script scores sentences of up to 990 words, and so does this module.
ROUGE_CALLS = 999
ROUGE = Rouge(metrics=["rouge-l"])


def fraction_match(output: str, references: Sequence[str]) -> float:
    """Return the share of the references that stand in the output."""
    return sum(r.lower() in output.lower() for r in references) / len(references)


def any_match(output: str, references: Sequence[str]) -> float:
    """Return 1 when any reference stands in the output, else 0."""
    return float(any(r.lower() in output.lower() for r in references))


def published_any_match(output: str, references: Sequence[str]) -> float:
    """Score a QA answer as the paper's code does (its `reward_score/ruler.py`): 1 when a reference stands in its first line.

    The line is taken before stripping, control characters in it become line ends, and references are joined and split on "|".
    """
    line = re.sub(r"[\x00-\x1f]", "\n", output.split("\n")[0].strip()).strip()
    return any_match(line, split_references(references))


def split_references(references: Sequence[str]) -> list[str]:
    """Join references by "|" and split them there again, as the paper's code does, which cuts those that hold one."""
    return "|".join(references).split("|")


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and surplus white space."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def qa_f1(output: str, references: Sequence[str]) -> float:
    """Return the best F1 between the words of the output and those of a reference."""
    return max((_f1(normalize_answer(output).split(), normalize_answer(r).split()) for r in references), default=0.0)


def _f1(output: list[str], reference: list[str]) -> float:
    same = sum((Counter(output) & Counter(reference)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(output), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def exact_match(output: str, references: Sequence[str]) -> float:
    """Return 1 when the normalised output equals a normalised reference, else 0."""
    return float(any(normalize_answer(output) == normalize_answer(r) for r in references))


def rouge_l(output: str, references: Sequence[str]) -> float:
    """Return the best ROUGE-L F of the `rouge` package; 0 where it finds nothing to compare, as with an empty output."""
    return max((_rouge_pair(output, r) for r in references), default=0.0)


def _rouge_pair(output: str, reference: str) -> float:
    limit = sys.getrecursionlimit()
    # The package nests a call for each word, and upstream scores a pair that is too long for that as 0. Whether a pair is too long must
    # not depend on how deep in other calls it is scored, so the limit is counted from here.
    sys.setrecursionlimit(_depth() + ROUGE_CALLS)
    try:
        return float(ROUGE.get_scores([output], [reference])[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # ValueError: "Hypothesis is empty."
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


def _depth() -> int:
    """Count the calls that the caller's caller is in."""
    frame, depth = sys._getframe(2), 1
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def classification(output: str, references: Sequence[str], classes: Sequence[str] = TREC_CLASSES) -> float:
    """Return the best 1 / (class names in the output) over references that are among them."""
    return max((_classification_pair(output, r, classes) for r in references), default=0.0)


def _classification_pair(output: str, reference: str, classes: Sequence[str]) -> float:
    named = [c for c in classes if c in output]
    # Names that are part of the reference's name do not count against it. Upstream removes them while it iterates, which skips the name
    # after each removed one. That is kept, so that scores can be compared.
    i = 0
    while i < len(named):
        if named[i] in reference and named[i] != reference:
            named.remove(named[i])
        i += 1
    return 1.0 / len(named) if reference in named else 0.0


def code_similarity(output: str, references: Sequence[str]) -> float:
    """Return the best similarity between a reference and the output's first line that is code, not a comment or markup."""
    return best_similarity(first_code_line(output) or "", references)


def first_code_line(output: str) -> str | None:
    """Return the first line that is neither markup nor a comment; None where every line is."""
    lines = output.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), None)


def best_similarity(text: str, references: Sequence[str]) -> float:
    """Return the best similarity of a text to a reference, in whole percent, as fuzzywuzzy's `ratio` gives it without python-Levenshtein.

    It is difflib's ratio of matching characters, no edit distance, which leaves out frequent ones of references of 200 characters or more.
    """
    if text in references:
        return 1.0
    return max((round(100 * SequenceMatcher(None, text, r).ratio()) / 100 for r in references), default=0.0)


MATCHES: dict[str, Metric] = {"any_match": any_match, "fraction_match": fraction_match, "f1": qa_f1, "exact_match": exact_match}
