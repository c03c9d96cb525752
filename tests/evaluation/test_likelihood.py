"""Short-context tasks: the hub's layouts are ours, and one bad row is named with its file."""

import json

import pytest

import refine_nsp
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.likelihood import ChoiceExample, choice_scores, read_choices
from tests.prompts.tokenizer_kinds import tokenizer_of

OURS = {
    "arc_easy": {"question": "Which is hot?", "choices": ["ice", "fire", "snow"], "label": 1},
    "piqa": {"question": "to boil water", "choices": ["heat it", "cool it"], "label": 0},
    "winogrande": {"sentence": "The cup fits, for the _ is small.", "choices": ["cup", "box"], "label": 0},
    "lambada_openai": {"context": "She called her dog, and there came the", "target": " dog"},
}
HUB = {
    "arc_easy": {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "piqa": {"goal": "to boil water", "sol1": "heat it", "sol2": "cool it", "label": 0},
    "winogrande": {"sentence": "The cup fits, for the _ is small.", "option1": "cup", "option2": "box", "answer": "1"},
    "lambada_openai": {"text": "She called her dog, and there came the dog"},
}


def read(tmp_path, name, *rows):
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_choices(name, str(tmp_path))


@pytest.mark.parametrize("name", list(OURS))
def test_the_hub_s_layouts_are_read_as_ours(tmp_path, name):
    (ours,), (theirs,) = read(tmp_path, name, OURS[name]), read(tmp_path, name, HUB[name])
    assert (ours.pairs, ours.choices, ours.label) == (theirs.pairs, theirs.choices, theirs.label)


def test_numbers_may_label_and_be_choices(tmp_path):
    numbered = {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"}
    assert read(tmp_path, "arc_easy", numbered)[0].label == 1
    (example,) = read(tmp_path, "arc_easy", {"question": "2 + 2?", "choices": [3, 4], "label": "1"})
    assert example.choices == ["3", "4"] and example.label == 1


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("arc_easy", {**OURS["arc_easy"], "label": 3}, "label 3 is not one of 3 choices"),
        ("piqa", {**HUB["piqa"], "label": -1}, "label -1 is not one of 2 choices"),
        ("arc_easy", {**OURS["arc_easy"], "label": "B"}, "label is 'B'; expected the number of a choice"),
        ("arc_easy", {**HUB["arc_easy"], "answerKey": "D"}, "answerKey 'D' is not one of the labels"),
        ("arc_easy", {**OURS["arc_easy"], "choices": ["ice", "", "snow"]}, "choice 1 is empty"),
        ("arc_easy", {**OURS["arc_easy"], "choices": ["ice"]}, "expected a list of two or more texts"),
        ("arc_easy", {**OURS["arc_easy"], "choices": ["ice", None]}, "got None, a NoneType; expected text"),
        ("arc_easy", {**OURS["arc_easy"], "question": None}, "no question; arc_easy needs question, choices, label"),
        ("winogrande", {**OURS["winogrande"], "sentence": "The cup fits."}, "no blank `_` in the sentence"),
        ("winogrande", {**HUB["winogrande"], "answer": ""}, "answer is ''; expected 1 or 2"),
        ("lambada_openai", {**OURS["lambada_openai"], "target": " "}, "target is ' '; expected text"),
    ],
)
def test_one_bad_row_is_named_with_its_file(tmp_path, name, row, said):
    good = {**(HUB if row.keys() == HUB[name].keys() else OURS)[name], "id": "first"}
    if isinstance(row.get("label"), str):
        good["label"] = str(good["label"])
    with pytest.raises(RefineError, match=rf"{name}.jsonl, row 1: .*{said}"):
        read(tmp_path, name, good, row)
    with pytest.raises(RefineError, match=r"row 1: two examples are called 'same'"):
        read(tmp_path, name, {**OURS[name], "id": "same"}, {**OURS[name], "id": "same"})


def test_choices_do_not_tie_where_the_tokenizer_appends_eos():
    model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
    model.resize_token_embeddings(len(tokenizer) + 4, mean_resizing=False)
    example = ChoiceExample("x", [("import os\nimport", " sys"), ("import os\nimport", " that")], ["sys", "that"], 0)
    ((_, plain, own),) = choice_scores(model, tokenizer_of("gpt2"), [example], 256, lambda n: None)
    ((_, _, t5),) = choice_scores(model, tokenizer_of("t5"), [example], 256, lambda n: None)
    assert t5 == own and own[0][0] != own[1][0] and plain["acc"] == 1


def test_a_choice_without_a_token_is_named():
    model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
    example = ChoiceExample("x", [("a", ""), ("a", " b")], ["", "b"], 0, "f.jsonl, row 4")
    with pytest.raises(RefineError, match=r"f.jsonl, row 4: the continuation '' has no token"):
        list(choice_scores(model, tokenizer, [example], 256, lambda n: None))
