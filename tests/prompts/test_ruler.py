"""RULER: every task fills its length, holds its answer, is seeded, and is built alike by any number of processes."""

import json

import pytest

from refine_nsp.errors import RefineError
from refine_nsp.evaluation.text_metrics import fraction_match
from refine_nsp.models.load import load_tokenizer
from refine_nsp.prompts import ruler
from refine_nsp.prompts.qa_sources import QASource, Question, read_qa
from refine_nsp.prompts.ruler import NEEDLES, TASKS, Sources, build_ruler, essay_words, fit

LENGTHS = {"cwe": 5120, "qa_1": 1024, "qa_2": 1024}
# Tokens a whole unit of haystack may take, so what may be left unfilled.
LARGEST_UNIT = {"niah_multikey_3": 140, "qa_1": 60, "qa_2": 60, "cwe": 120}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("refine-nsp/tiny-delta-net")


@pytest.fixture(scope="module")
def sources():
    documents = [f"Document about thing {i}. " + "It has some words. " * (i % 4 + 1) for i in range(200)]
    questions = [Question(f"q{i}", f"What is thing {i}?", [f"thing {i}"], (i,), (i + 1, i + 2)) for i in range(20)]
    qa = QASource(questions, documents)
    return Sources(essay_words(None), {"qa_1": qa, "qa_2": qa})


@pytest.mark.parametrize("task", TASKS)
def test_every_task_fills_its_length_and_holds_its_answers(task, tokenizer, sources):
    length = LENGTHS.get(task, 1024)
    examples = build_ruler([task], [length], 4, tokenizer, sources)[task]
    assert len({e.id for e in examples}) == 4 and len({e.prompt for e in examples}) == 4
    for e in examples:
        used = len(tokenizer(e.prompt)["input_ids"]) + e.budget
        assert length - LARGEST_UNIT.get(task, 64) <= used <= length, (e.id, used)
        assert all(r in e.prompt for r in e.references)
        assert e.meta["length"] == length
        assert fraction_match(" ".join(e.references), e.references) == 1 and fraction_match("", e.references) == 0


def test_counts_of_needles_are_those_of_the_benchmark(tokenizer, sources):
    built = build_ruler(list(NEEDLES), [1024], 2, tokenizer, sources)
    answers = {"niah_multivalue": 4, "niah_multiquery": 4}
    needles = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    for task, examples in built.items():
        for e in examples:
            assert len(e.references) == answers.get(task, 1)
            if NEEDLES[task].haystack != "needle":
                assert e.prompt.count("One of the special magic") == needles.get(task, 1)
            assert e.prompt.endswith((" is", " are")) and e.prompt.rstrip("isare ").endswith("provided text")


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_is_where_the_needle_is_put(task, depth, tokenizer, sources):
    for e in build_ruler([task], [1024], 3, tokenizer, sources, depths=[depth])[task]:
        assert e.meta["depth"] == pytest.approx(depth, abs=0.15)
        assert f"-{depth:g}" in e.id


def test_examples_depend_on_their_seed_alone(tokenizer, sources):
    asked = (["niah_single_2", "vt", "qa_1"], [1024, 1536], 2, tokenizer, sources)
    one, two = build_ruler(*asked), build_ruler(*asked, num_proc=2)
    assert one == two
    fewer = build_ruler(["vt"], [1024], 1, tokenizer, sources)["vt"][0]
    assert fewer in one["vt"]
    assert build_ruler(*asked, seed=7)["vt"][0].prompt != one["vt"][0].prompt


def test_fit_takes_the_most_that_fits():
    for limit in (10, 11, 99, 100, 1000):
        draft = fit(lambda n: ("x" * (3 * n + 1), [], {}), lambda d: len(d[0]), limit, 1, None, "x")
        assert len(draft[0]) == (limit - 1) // 3 * 3 + 1
    assert len(fit(lambda n: ("x" * n, [], {}), lambda d: len(d[0]), 100, 1, 7, "x")[0]) == 7


def test_frequent_words_follow_their_ranks(tokenizer, sources):
    for e in build_ruler(["fwe"], [2048], 2, tokenizer, sources)["fwe"]:
        text = e.prompt.split("\nQuestion:")[0].split()
        counts = [text.count(w) for w in e.references]
        assert counts == sorted(counts, reverse=True) and counts[0] > counts[1] > counts[2] > 1
        assert text.count("...") > counts[0]


def test_common_words_are_the_most_common(tokenizer, sources):
    e = build_ruler(["cwe"], [5120], 1, tokenizer, sources)["cwe"][0]
    listed = e.prompt.rsplit("Below is", 1)[1].split("Question")[0].split()
    common = min(listed.count(w) for w in e.references)
    assert common == 30 and max(listed.count(w) for w in set(listed) - set(e.references)) == 3


def test_variables_chain_to_one_value(tokenizer, sources):
    e = build_ruler(["vt"], [1024], 1, tokenizer, sources)["vt"][0]
    text = e.prompt.rsplit("Memorize", 1)[1]
    lines = [line.removeprefix("VAR ").split(" = ") for line in text.splitlines() if line.startswith("VAR ")]
    assert [a for a, _ in lines] == e.references
    # The benchmark ends every hop, but not the first statement, in a space.
    assert [b for _, b in lines][1:] == [f"VAR {name} " for name in e.references[:-1]]
    assert lines[0][1] == e.prompt.rsplit("assigned the value ", 1)[1].split(",")[0]


@pytest.mark.parametrize("length", [1024, 4096])
def test_the_worked_chain_takes_at_most_500_tokens_and_no_line_more_fits(length, tokenizer, sources):
    for e in build_ruler(["vt"], [length], 3, tokenizer, sources)["vt"]:
        example = e.prompt.split("\n\nMemorize")[0]
        question, answer = example[: example.rindex("they are: ") + 10], example[example.rindex("they are: ") + 10 :]
        used, noise = len(tokenizer(question)["input_ids"]), len(tokenizer("\n" + " ".join(ruler.NOISE))["input_ids"])
        assert len(answer.split()) == 5 and example.count("VAR") == 9
        assert used <= 500 and (length < 2048 or used + noise > 500)
        assert example.count("The grass") >= 5


def test_a_task_that_a_length_cannot_hold_leaves_the_others(tokenizer, sources):
    """cwe's smallest prompt takes more than 1,024 tokens: vt goes on there, and cwe where it fits."""
    for num_proc in (1, 2):
        said = {}
        with pytest.warns(UserWarning, match=r"cwe at 1024 tokens: its smallest prompt takes \d+ tokens, 904 are left"):
            built = build_ruler(["cwe", "vt"], [1024, 2048], 2, tokenizer, sources, num_proc=num_proc, left_out=said)
        assert [e.meta["length"] for e in built["cwe"]] == [2048, 2048]
        assert [e.meta["length"] for e in built["vt"]] == [1024, 1024, 2048, 2048]
        assert list(said) == ["cwe"] and len(said["cwe"]) == 1 and "at 1024 tokens" in said["cwe"][0]
    with pytest.warns(UserWarning, match="cwe at 1024"):
        assert build_ruler(["cwe", "vt"], [1024], 1, tokenizer, sources)["cwe"] == []


def test_a_question_whose_documents_are_too_long_is_left_out_alone(tokenizer):
    documents = ["Rome is old.", "Oslo is cold. " * 400, "Bern is small."]
    questions = [Question(f"q{i}", f"What is {i}?", ["Rome"], (i,), ()) for i in range(3)]
    sources = Sources([], {"qa_1": QASource(questions, documents)})
    with pytest.warns(UserWarning, match=r"qa_1 at 512 tokens: its smallest prompt takes .* 1 of 3 prompts are left out"):
        built = build_ruler(["qa_1"], [512], 3, tokenizer, sources)["qa_1"]
    assert [e.id for e in built] == ["qa_1-512-0-seed42", "qa_1-512-2-seed42"]


def test_ids_name_the_seed(tokenizer, sources):
    ids = [{e.id for e in build_ruler(["niah_single_1"], [512], 2, tokenizer, sources, seed=s)["niah_single_1"]} for s in (42, 7)]
    assert not ids[0] & ids[1]


def test_impossible_requests_are_refused_by_name(tokenizer, sources):
    with pytest.raises(RefineError, match=r"no RULER task 'niah_singel_1'.*did you mean 'niah_single_\d'"):
        build_ruler(["niah_singel_1"], [1024], 1, tokenizer, sources)
    with pytest.raises(RefineError, match="qa_1 needs squad questions"):
        build_ruler(["qa_1"], [1024], 1, tokenizer, Sources(["word"]))
    with pytest.raises(RefineError, match=r"fwe at 128 tokens: its smallest prompt takes \d+ tokens"):
        build_ruler(["fwe"], [128], 1, tokenizer, sources)
    with pytest.raises(RefineError, match="20 questions, so no sample 20"):
        build_ruler(["qa_1"], [1024], 21, tokenizer, sources)
    with pytest.raises(RefineError, match="depths must be between 0 and 1"):
        build_ruler(["niah_single_1"], [1024], 1, tokenizer, sources, depths=[50.0])


# --- questions --------------------------------------------------------------------------------------------------------

PARAGRAPHS = ["Rome is old.", "Oslo is cold.", "Bern is small."]
SQUAD = {
    "data": [
        {
            "title": "Cities",
            "paragraphs": [
                {
                    "context": PARAGRAPHS[0],
                    "qas": [{"id": "a", "question": "What is old?", "answers": [{"text": "Rome"}, {"text": "Rome"}]}],
                },
                {"context": PARAGRAPHS[1], "qas": [{"id": "b", "question": "?", "answers": [], "is_impossible": True}]},
            ],
        },
        {
            "title": "More",
            "paragraphs": [{"context": PARAGRAPHS[2], "qas": [{"id": "c", "question": "Small?", "answers": [{"text": "Bern"}]}]}],
        },
    ]
}
HOTPOT = [{"_id": "h", "question": "Which?", "answer": "Rome", "context": [["Rome", ["Old. ", "City."]], ["Oslo", ["Cold."]]]}]


def test_squad_and_hotpotqa_are_read_as_published(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    squad = read_qa(str(tmp_path / "squad.json"))
    assert [(q.text, q.answers) for q in squad.questions] == [("What is old?", ["Rome"]), ("Small?", ["Bern"])]
    assert [squad.documents[d] for q in squad.questions for d in q.documents] == [PARAGRAPHS[0], PARAGRAPHS[2]]
    untitled = [article | {"title": title} for article, title in zip(SQUAD["data"], (["Cities"], None), strict=True)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": untitled}))
    assert read_qa(str(tmp_path / "squad.json")) == squad
    (tmp_path / "hotpot.json").write_text(json.dumps(HOTPOT))
    hotpot = read_qa(str(tmp_path / "hotpot.json"))
    assert hotpot.documents == ["Rome\nOld. City.", "Oslo\nCold."] and hotpot.questions[0].documents == (0, 1)


def test_rows_of_questions_are_read(tmp_path):
    rows = [
        {"question": "a?", "answers": ["x"], "context": "One.", "title": "T"},
        {"question": "b?", "answers": "y", "context": "Two.", "title": "T"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**r, "answers": r["answers"]}) for r in rows[:1]))
    one = read_qa(str(tmp_path / "rows.jsonl"))
    assert one.questions[0].answers == ["x"] and one.documents == ["One."]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    many = read_qa(str(tmp_path / "many.json"))
    assert [q.same_article for q in many.questions] == [(1,), (0,)]
    (tmp_path / "none.json").write_text(json.dumps([{"question": "a?", "answers": [" "], "context": "One."}]))
    with pytest.raises(RefineError, match="row 0: no answer"):
        read_qa(str(tmp_path / "none.json"))
    (tmp_path / "bare.json").write_text(json.dumps([{"question": "a?", "answers": ["x"]}]))
    with pytest.raises(RefineError, match="no document; expected a column `context` or `paragraphs`"):
        read_qa(str(tmp_path / "bare.json"))


def test_real_samples_make_prompts(shared, tokenizer):
    squad = read_qa(str(shared / "data/short_context/squad.jsonl"))
    hotpot = read_qa(str(shared / "data/short_context/hotpotqa.jsonl"))
    assert len(squad.questions) == 300 and len(squad.documents) == 117 and len(hotpot.questions) == 70
    sources = Sources(essay_words(str(shared / "data/niah/emerson_essays.jsonl")), {"qa_1": squad, "qa_2": hotpot})
    for task, examples in build_ruler(["qa_1", "qa_2", "niah_single_2"], [8192], 2, tokenizer, sources).items():
        for e in examples:
            assert len(tokenizer(e.prompt)["input_ids"]) + e.budget <= 8192, task
            assert any(r in e.prompt for r in e.references)
