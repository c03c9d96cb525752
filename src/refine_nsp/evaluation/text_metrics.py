"""Scores of an answer against its references, each in 0..1, as RULER and LongBench define them.

RULER: a reference counts when it stands in the output, in any case; over several references the mean (`fraction_match`) or the best
(`any_match`). LongBench: bag-of-words F1, ROUGE-L, class names, and edit similarity of a line of code; the best over references.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from refine_nsp.errors import RefineError

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


# --- RULER ------------------------------------------------------------------------------------------------------------


def fraction_match(output: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the output."""
    return sum(r.lower() in output.lower() for r in references) / len(references)


def any_match(output: str, references: Sequence[str]) -> float:
    """1 when any reference stands in the output."""
    return float(any(r.lower() in output.lower() for r in references))


# --- LongBench --------------------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def qa_f1(output: str, references: Sequence[str]) -> float:
    """Best F1 between the words of the output and those of a reference."""
    return max((_f1(normalize_answer(output).split(), normalize_answer(r).split()) for r in references), default=0.0)


def _f1(output: list[str], reference: list[str]) -> float:
    same = sum((Counter(output) & Counter(reference)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(output), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def exact_match(output: str, references: Sequence[str]) -> float:
    """1 when the normalised output is a normalised reference."""
    return float(any(normalize_answer(output) == normalize_answer(r) for r in references))


def rouge_l(output: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F of the `rouge` package; 0 where it finds nothing to compare (empty output)."""
    scorer = _rouge()
    return max((_rouge_pair(scorer, output, r) for r in references), default=0.0)


def _rouge_pair(scorer: Any, output: str, reference: str) -> float:
    try:
        return float(scorer.get_scores([output], [reference])[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # "Hypothesis is empty.", and texts too long for its recursion: upstream counts both 0
        return 0.0


@lru_cache(maxsize=1)
def _rouge() -> Any:
    try:
        from rouge import Rouge
    except ImportError as error:
        raise RefineError("ROUGE-L needs the `rouge` package: pip install 'refine-nsp[eval]'") from error
    return Rouge(metrics=["rouge-l"])


def classification(output: str, references: Sequence[str], classes: Sequence[str] = TREC_CLASSES) -> float:
    """Best 1 / (class names in the output) over references that are among them."""
    return max((_classification_pair(output, r, classes) for r in references), default=0.0)


def _classification_pair(output: str, reference: str, classes: Sequence[str]) -> float:
    named = [c for c in classes if c in output]
    # Names that are part of the reference's name do not count against it. Upstream removes while it iterates, which skips the name
    # after each removed one; scores are comparable only if that is kept.
    i = 0
    while i < len(named):
        if named[i] in reference and named[i] != reference:
            named.remove(named[i])
        i += 1
    return 1.0 / len(named) if reference in named else 0.0


def code_similarity(output: str, references: Sequence[str]) -> float:
    """Best edit similarity (rapidfuzz ratio) between a reference and the output's first line that is code, not comment or markup."""
    try:
        from rapidfuzz.fuzz import ratio
    except ImportError as error:
        raise RefineError("edit similarity needs `rapidfuzz`: pip install 'refine-nsp[eval]'") from error
    lines = output.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    # fuzzywuzzy, which upstream calls, rounds to a whole percent and gives 0 for an empty string.
    return max((round(ratio(line, r)) / 100 if line and r else 0.0 for r in references), default=0.0)


MATCHES: dict[str, Metric] = {"any_match": any_match, "fraction_match": fraction_match, "f1": qa_f1, "exact_match": exact_match}
