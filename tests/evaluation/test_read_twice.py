"""Evaluations that read contexts twice: what is answered, adapted to, counted, refused and compared."""

import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import refine_nsp
from refine_nsp.cli import main
from refine_nsp.commands import ttt
from refine_nsp.errors import RefineError
from refine_nsp.evaluation import longbench
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.tasks import Context, build_tasks
from refine_nsp.models.generation import Decoding, Request, decode, prefill
from refine_nsp.prompts.encoding import encode_prompt
from refine_nsp.training.test_time import TestTimeTrainer
from tests.test_cli import fails

MODEL = "refine-nsp/tiny-delta-net"
CONTEXTS = [f"The code of door {i} is {i}{i}{i}. It is locked at night." for i in range(4)]
ROWS = [
    {"prompt": f"Remember.\n{text}\nThe code of door {i} is", "answer": f"{i}{i}{i}", "context": text, "task": "doors"}
    for i, text in enumerate(CONTEXTS)
]


@pytest.fixture(scope="module")
def loaded():
    return refine_nsp.load(MODEL)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def task_of(prompts, tokenizer, **settings):
    return build_tasks(EvaluationArguments(tasks=["prompts"], prompts=prompts, prompts_budget=5, **settings), tokenizer)[0]


def test_answers_are_those_to_the_doubled_prompt_and_lengths_are_told(prompts, loaded):
    model, tokenizer = loaded
    task = task_of(prompts, tokenizer, read_twice=True)
    assert task.questions() == task_of(prompts, tokenizer).questions()
    rows = list(task.rows(list(task.questions()), Context(model, tokenizer, 1000)))
    for row in rows:
        i = int(row.id[-1])
        ids = encode_prompt(tokenizer, f"Remember.\n{CONTEXTS[i]}\n{CONTEXTS[i]}\nThe code of door {i} is")
        hidden, cache = prefill(model, [ids])
        tokens = decode(model, hidden, cache, [Request(0, ids, 5)], set(), Decoding())[0]
        assert row.output == tokenizer.decode(tokens, skip_special_tokens=True)
        assert row.meta["prompt_tokens"] == len(ids) and row.meta["once_tokens"] == len(
            encode_prompt(tokenizer, ROWS[i]["prompt"])
        )
        assert row.meta["new_tokens"] == len(tokens) <= 5


def test_test_time_training_adapts_to_one_reading(prompts, loaded):
    model, tokenizer = loaded
    seen = []

    class Adapter:
        last = SimpleNamespace(seconds=0.0, extra_bytes=0)

        @contextmanager
        def adapt(self, rows):
            seen.extend(rows)
            yield

    task = task_of(prompts, tokenizer, read_twice=True)
    plain, adapted = (
        {row.id: row for row in task.rows(list(task.questions()), Context(model, tokenizer, 1000, adapter))}
        for adapter in (None, Adapter())
    )
    assert seen == [encode_prompt(tokenizer, row["prompt"]) for row in ROWS]
    assert {i: r.output for i, r in plain.items()} == {i: r.output for i, r in adapted.items()}


def test_a_limit_is_that_of_one_reading(prompts, loaded):
    tokenizer = loaded[1]
    once, twice = (task_of(prompts, tokenizer, max_prompt_tokens=16, read_twice=t) for t in (False, True))
    for key in range(len(ROWS)):
        short, doubled = once._request(key, tokenizer).ids, twice._request(key, tokenizer).ids
        assert len(short) == 16 < len(doubled) < 32
        end = next(i for i, (a, b) in enumerate(zip(short, doubled, strict=False)) if a != b)
        assert doubled[: end - 1] == short[: end - 1] and doubled[-8:] == short[-8:]


def test_longbench_s_contexts_are_known(tmp_path, loaded):
    for name in longbench.TASKS:
        row = {"context": "Some long context.", "input": "What?", "answers": ["Other location"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    a = EvaluationArguments(tasks=["longbench_14"], longbench=str(tmp_path), read_twice=True)
    for task in build_tasks(a, loaded[1]):
        text = loaded[1].decode(task._request(0, loaded[1]).ids)
        assert len(re.findall(r"Some long context\.\n ?Some long context\.", text)) == 1
    # Whole prompts have it where the benchmark's wording shows it.
    for name in ("narrativeqa", "samsum", "lcc"):
        whole = longbench.TASKS[name].prompt.format(context="Some long context.\nIt ends.", input="What?").rstrip()
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": whole, "answers": ["a"]}))
    a = EvaluationArguments(tasks=["narrativeqa", "samsum", "lcc"], longbench=str(tmp_path), read_twice=True)
    for task in build_tasks(a, loaded[1]):
        assert task.examples[0].context.strip() == "Some long context.\nIt ends."
    (tmp_path / "qasper.jsonl").write_text(json.dumps({"prompt": "Whole prompt", "answers": ["a"]}))
    with pytest.raises(RefineError, match="qasper, example qasper-0: the prompt has no context to read twice"):
        build_tasks(EvaluationArguments(tasks=["qasper"], longbench=str(tmp_path), read_twice=True), loaded[1])


def test_the_published_protocol_reads_twice_without_bos(prompts, loaded):
    a = EvaluationArguments(tasks=["prompts"], prompts=prompts, protocol="published", read_twice=True)
    task = build_tasks(a, loaded[1])[0]
    text = f"Remember.\n{CONTEXTS[1]}\n{CONTEXTS[1]}\nThe code of door 1 is"
    assert task._request(1, loaded[1]).ids == loaded[1](text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["ruler", "piqa"], "piqa has no context that could be read twice; leave it out, or leave out read_twice"),
        (["ruler", "lm_eval:swde"], r"lm_eval:swde has no context that could be read twice \(lm-eval hands over whole prompts"),
        (["niah", "ntp"], "ntp has no context that could be read twice"),
        (["continuation"], "continuation has no context that could be read twice"),
    ],
)
def test_tasks_without_a_context_are_refused_by_name(tasks, message):
    with pytest.raises(RefineError, match=message):
        EvaluationArguments(tasks=tasks, read_twice=True).check()


@pytest.mark.parametrize("row", [{"prompt": "What?", "answer": "a"}, {"prompt": "What?", "answer": "a", "context": "Elsewhere."}])
def test_a_prompt_without_its_context_is_refused_by_its_row(tmp_path, loaded, row):
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [ROWS[0], row])))
    with pytest.raises(RefineError, match=r"p.jsonl, row 1: .*(no context to read twice|'Elsewhere.' stands 0 times)"):
        task_of(str(tmp_path / "p.jsonl"), loaded[1], read_twice=True)


def test_one_reading_and_two_are_compared_and_the_difference_is_named(tmp_path, prompts, capsys):
    asked = ["evaluate", MODEL, "--tasks", "prompts", "--prompts", prompts, "--prompts_budget", "3", "--output_dir"]
    assert main([*asked, str(tmp_path / "once")]) == 0
    assert main([*asked, str(tmp_path / "twice"), "--read_twice"]) == 0
    page, table = ((tmp_path / "twice" / name).read_text() for name in ("report.html", "results.md"))
    for written in (page, table):
        assert "contexts were read twice: " in written and "lengths and limits are those of one reading" in written
    assert "read_twice: true" in page and "read twice" not in (tmp_path / "once" / "results.md").read_text()
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "once"), str(tmp_path / "twice")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "their settings differ: read_twice False and True" in said and re.search(r"│ *4\b", said)
    fails(capsys, [*asked, str(tmp_path / "once"), "--read_twice"], "holds an evaluation with other settings (read_twice was")
    # Cut to the same limit they are the same prompts; cut to another, not.
    assert main([*asked, str(tmp_path / "cut"), "--read_twice", "--max_prompt_tokens", "16"]) == 0
    fails(capsys, ["compare", str(tmp_path / "once"), str(tmp_path / "cut")], "cut to different lengths")


def test_generate_reads_a_prompt_twice_before_its_question(capsys):
    def said(*flags):
        assert main(["generate", MODEL, "--greedy", "--max_new_tokens", "4", *flags]) == 0
        return capsys.readouterr().out

    assert said("--prompt", "x = 1", "--question", "x is", "--read_twice") == said("--prompt", "x = 1\nx = 1\nx is")
    assert said("--prompt", "x = 1", "--question", "x is") == said("--prompt", "x = 1\nx is")
    assert said("--prompt", "x =", "--read_twice") == said("--prompt", "x =\nx =")
    asked = ["generate", MODEL, "--prompt"]
    fails(capsys, [*asked, "x", "--question", " "], "the question is empty")
    fails(capsys, [*asked, " ", "--question", "x?"], "the prompt is empty")


def test_ttt_adapts_to_one_reading_and_answers_two(monkeypatch, capsys):
    adapted, answered = [], []
    adapt, prefill = TestTimeTrainer.adapt, ttt.prefill
    monkeypatch.setattr(TestTimeTrainer, "adapt", lambda self, ids: (adapted.append(ids), adapt(self, ids))[1])
    monkeypatch.setattr(ttt, "prefill", lambda model, rows: (answered.append(rows[0]), prefill(model, rows))[1])
    context, question = " ".join(CONTEXTS), "The code of door 1 is"
    flags = ["--question", question, "--read_twice", "--max_new_tokens", "2", "--ttt", "ntp"]
    assert main(["ttt", MODEL, "--prompt", context, *flags]) == 0
    tokenizer = refine_nsp.load(MODEL)[1]
    once, twice = (encode_prompt(tokenizer, text) for text in (f"{context}\n{question}", f"{context}\n{context}\n{question}"))
    assert (adapted, answered) == ([once], [twice, twice])
    assert f"{len(once):,} prompt tokens ({len(twice):,} as read twice, to answer)" in " ".join(capsys.readouterr().out.split())
