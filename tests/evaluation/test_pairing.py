"""Two evaluations are compared where they answer the same questions, and what differs is said."""

import json
from dataclasses import replace

import pytest

from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.pairing import differing_settings, pair_up
from refine_nsp.evaluation.run import summarise
from refine_nsp.evaluation.tasks import DocumentTask, Row, build_tasks
from refine_nsp.report.evaluation import compare_all, comparison_table, comparison_tables

PROMPTS = [
    Row(f"say/{i}", "x", [str(i)], {"any_match": float(i % 2)}, meta={"prompt_tokens": 9}, question=f"q{i}") for i in range(6)
]
TEXTS = [Row(f"ntp-{i}", "", [], {"loss": 2.0}, n, {"tokens": n + 1}, f"t{i}") for i, n in enumerate((10, 1000))]


def with_losses(*losses):
    return [summarise("ntp", [replace(row, scores={"loss": x}) for row, x in zip(TEXTS, losses, strict=True)])]


def changed(row, **fields):
    return [summarise("say", [*PROMPTS[:-1], replace(PROMPTS[-1], **fields)])]


def test_differences_are_those_of_the_weighted_means():
    a, b = with_losses(3.0, 2.0), with_losses(2.0, 2.1)
    (task, figure, c), *others = compare_all(pair_up(a, b)[0])
    assert (task, figure, others) == ("ntp", "loss", [])
    assert (
        c.difference
        == pytest.approx(b[0].estimates["loss"].mean - a[0].estimates["loss"].mean)
        == pytest.approx(0.0891, abs=1e-4)
    )
    assert "+0.0891" in comparison_table([(task, figure, c)], ("a", "b")).markdown()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "another"}, "say: the two evaluations cannot be paired: their prompts, references or texts differ .say/5."),
        ({"references": ["other"]}, "their references differ"),
        ({"question": "", "references": ["other"]}, "their references differ"),  # of an earlier release
        ({"weight": 2.0}, "documents are of different tokens"),
        ({"meta": {"tokens": 3}}, "documents are of different tokens"),
    ],
)
def test_answers_to_different_questions_are_not_paired(fields, message):
    with pytest.raises(RefineError, match=message):
        pair_up([summarise("say", PROMPTS)], changed(PROMPTS[-1], **fields), {}, {})


def test_a_refusal_names_the_settings_that_differ():
    with pytest.raises(RefineError, match=r"their settings differ: seed 42 and 7; lengths \[4096\] and \[512\]"):
        pair_up([summarise("say", PROMPTS)], changed(PROMPTS[-1], question="other"), {}, {"seed": 7, "lengths": [512]})
    elsewhere = [summarise("say", [replace(row, id=f"{row.id}-seed7") for row in PROMPTS])]
    with pytest.raises(
        RefineError, match=r"share no example \(one has 'say/0', the other 'say/0-seed7'\); their .* seed 42 and 7"
    ):
        pair_up([summarise("say", PROMPTS)], elsewhere, {}, {"seed": 7})


def test_prompts_cut_to_different_lengths_are_not_paired():
    cut = changed(PROMPTS[-1], meta={"prompt_tokens": 5})
    with pytest.raises(
        RefineError, match=r"cut to different lengths \(say/5\); their settings differ: max_prompt_tokens 0 and 5"
    ):
        pair_up([summarise("say", PROMPTS)], cut, {}, {"max_prompt_tokens": 5})
    # Without that setting, other counts of tokens are another tokenizer's, or the published protocol's lack of BOS.
    assert pair_up([summarise("say", PROMPTS)], cut, {}, {"protocol": "published"})[1] == [
        "their settings differ: protocol 'standard' and 'published'"
    ]
    # And a limit that cut nothing changes nothing.
    assert len(pair_up([summarise("say", PROMPTS)], [summarise("say", PROMPTS)], {}, {"max_prompt_tokens": 50})[0]) == 1


def test_what_differs_without_changing_the_question_is_said_in_one_line():
    known = {"weights": 1.0, "window": 512, "model_name_or_path": "a"}
    assert differing_settings(known, {"weights": 2.0, "model_name_or_path": "a", "ttt": "ntp"}) == [
        "window 512 and 0",
        "ttt its default and 'ntp'",
    ]
    assert differing_settings({"seed": 42}, {}) == []  # the default, given or not
    tables = comparison_tables([with_losses(3, 2), with_losses(2, 2.1)], ("a", "b"), [known, {"model_name_or_path": "a"}])
    assert "their settings differ: window 512 and 0" in tables[0].notes
    text = pair_up([summarise("say", PROMPTS)], [summarise("say", PROMPTS[:4])], None, {})[1]
    assert text == [
        "an evaluation keeps no settings, so that they are the same was not checked",
        "say: 4 examples are in both, of 6 and 4",
    ]


def test_folders_of_earlier_releases_are_compared_and_that_is_said():
    old = [summarise("say", [replace(row, question="") for row in PROMPTS])]
    paired, said = pair_up(old, [summarise("say", PROMPTS)], {}, {})
    assert len(paired[0].rows) == 6 and len(said) == 1 and "by an earlier release keeps no prompts" in said[0]


def test_digests_of_documents_depend_on_what_is_asked(tmp_path):
    asked = [
        DocumentTask(name, [text], EvaluationArguments(tasks=[name], **changes)).questions()[f"{name}-0"]
        for name, text, changes in (
            ("ntp", "a text", {}), ("ntp", "a text", {"window": 64}), ("ntp", "a text", {"bucket": 7}),  # of the same targets
            ("ntp", "another", {}), ("ntp", "a text", {"document_tokens": 5}),
            ("continuation", "a text", {}), ("continuation", "a text", {"seed": 7}), ("continuation", "a text", {"window": 64}),
        )
    ]  # fmt: skip
    assert asked[0] == asked[1] == asked[2] and len(set(asked[2:])) == 6


def test_digests_of_prompts_depend_on_prompt_and_references(tmp_path):
    def asked(**row):
        (tmp_path / "p.jsonl").write_text(json.dumps({"id": 1, "prompt": "Say 1.", "answer": ["1"], "task": "say"} | row))
        return build_tasks(EvaluationArguments(tasks=["prompts"], prompts=str(tmp_path / "p.jsonl")), None)[0].questions()[
            "say/1"
        ]

    assert asked() == asked(max_gen_tokens=5) and len({asked(), asked(prompt="Say 1!"), asked(answer=["1", "2"])}) == 3


def test_evaluations_of_two_seeds_are_refused_on_the_command_line(tmp_path, capsys):
    flags = ["evaluate", "refine-nsp/tiny-delta-net", "--tasks", "niah_single_1", "--lengths", "512", "--samples", "2"]
    for name, seed in (("a", "42"), ("b", "7")):
        assert main([*flags, "--seed", seed, "--output_dir", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().err
    assert "seed 42 and 7" in said and "share no example" in said and said.count("\n") == 1
