"""Evaluations end to end: oracles, resuming, comparing, documents, likelihoods, lm-eval's interface, and bad input."""

import json
from dataclasses import asdict

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import refine_nsp
from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.evaluation import documents, likelihood, longbench, tasks
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.documents import score_document, spans
from refine_nsp.evaluation.likelihood import ChoiceExample, log_likelihoods, score_choices
from refine_nsp.evaluation.pairing import pair_up
from refine_nsp.evaluation.run import evaluate, read_results, read_rows, rows_path, summarise
from refine_nsp.evaluation.tasks import Context, GenerationTask, Row, build_tasks
from refine_nsp.fields import SettingError
from refine_nsp.files import append_json_lines
from refine_nsp.prompts import ruler
from refine_nsp.prompts.encoding import encode_pair, start_token
from refine_nsp.report.evaluation import bucket_plots, bucket_targets, compare_all, needle_map, results_table
from tests.children import run_side_by_side
from tests.models.families import build


@pytest.fixture(scope="module")
def loaded():
    return refine_nsp.load("refine-nsp/tiny-delta-net")


ROWS = {
    "piqa": {"id": "p", "question": "to boil water", "choices": ["heat it", "cool it"], "label": 0},
    "arc_easy": {"id": "e", "question": "Which is hot?", "choices": ["ice", "fire", "snow"], "label": 1},
    "arc_challenge": {"id": "c", "question": "Which is cold?", "choices": ["ice", "fire", "sun"], "label": 0},
    "winogrande": {"id": "w", "sentence": "The box did not fit as the _ was small.", "choices": ["bag", "box"], "label": 0},
    "lambada_openai": {"id": "l", "context": "The def keyword begins a", "target": " function"},
}


@pytest.fixture
def files(tmp_path):
    """A folder of small files of every kind."""
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({**row, "id": f"{row['id']}{i}"}) for i in range(3)))
    lb = tmp_path / "longbench"
    lb.mkdir()
    for name in longbench.TASKS:
        answer = "Other location" if name == "trec" else "the answer is forty two"
        rows = [{"context": f"Some context {i}.", "input": "What?", "answers": [answer]} for i in range(2)]
        (lb / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    qa = [
        {"question": f"Who is {i}?", "answers": [f"name{i}", f"alias{i}"], "context": f"The {i} is name{i}."} for i in range(40)
    ]
    (tmp_path / "qa.json").write_text(json.dumps(qa))
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"Say {i}. Answer:", "answer": [f"{i}"], "task": "say"}) for i in range(6))
    )
    (tmp_path / "books").mkdir()
    for i in range(3):
        (tmp_path / "books" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n\n" * 60)
    return tmp_path


def arguments(files, **settings):
    """Settings with the sources that the tasks read; a source that none of them reads is refused, so it is left out."""
    defaults = {
        "lengths": [5120], "samples": 2, "squad": str(files / "qa.json"), "hotpotqa": str(files / "qa.json"),
        "longbench": str(files / "longbench"), "short_context": str(files), "prompts": str(files / "prompts.jsonl"),
        "documents": str(files / "books"), "batch_tokens": 4096,
    }  # fmt: skip
    try:
        return EvaluationArguments(**{**defaults, **settings})
    except SettingError as error:
        read = {name: value for name, value in defaults.items() if name not in error.names}
        return EvaluationArguments(**{**read, **settings})


# --- oracles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["standard", "published"])
def test_an_oracle_gets_100_and_silence_0_on_every_generation_task(files, loaded, protocol):
    found = build_tasks(arguments(files, tasks=["ruler", "longbench_14", "prompts"], protocol=protocol), loaded[1])
    assert {t.name for t in found} == {*ruler.TASKS, *longbench.TASKS, "say"}
    for task in found:
        assert isinstance(task, GenerationTask)
        for e in task.examples:
            asks_for_all = task.name in ruler.TASKS or task.name == "say"
            told = " ".join(e.references) if asks_for_all else e.references[0]
            assert all(s == pytest.approx(1, abs=1e-6) for s in task.score(told, e.references).values()), task.name
            assert all(s == 0 for s in task.score("", e.references).values()), task.name


def test_an_oracle_is_right_on_every_choice(files):
    for name in likelihood.TASKS:
        for e in likelihood.read_choices(name, str(files)):
            sure = [(0.0 if i == e.label else -1e3, i == e.label) for i in range(len(e.pairs))]
            wrong = [(-1e3 if i == e.label else 0.0, i != e.label) for i in range(len(e.pairs))]
            assert score_choices(e, sure)["acc"] == 1 and score_choices(e, wrong)["acc"] == 0


def test_the_real_prompts_have_oracles_too(shared, loaded):
    folder = shared / "data"
    a = EvaluationArguments(tasks=["longbench_14", "prompts"], longbench=str(folder / "longbench"), limit=8,
                            prompts=str(folder / "ruler_qa/ruler_squadqa_lact_4096_first100_test.parquet"))  # fmt: skip
    for task in build_tasks(a, loaded[1]):
        assert isinstance(task, GenerationTask)
        for e in task.examples:
            best = max(next(iter(task.score(r, e.references).values())) for r in e.references)
            # A reference that names several classes, or is no word at all, cannot score 1 by the benchmark's own metric.
            assert best == pytest.approx(1, abs=1e-6) or task.name in ("trec", "lcc", "repobench-p"), (task.name, e.id)
            assert next(iter(task.score("", e.references).values())) == 0


# --- runs -------------------------------------------------------------------------------------------------------------


def run(files, loaded, out, names, **settings):
    a = arguments(files, tasks=names, **settings)
    context = Context(*loaded, a.batch_tokens)
    return evaluate(build_tasks(a, loaded[1]), context, out, {"seed": a.seed}, quiet=True)


def test_a_whole_run_leaves_rows_and_results(files, loaded, tmp_path):
    names = ["niah_single_1", "prompts", "piqa", "lambada_openai", "ntp", "continuation"]
    results = run(files, loaded, tmp_path / "out", names, lengths=[512], document_tokens=300)
    assert [r.name for r in results] == ["niah_single_1", "say", "piqa", "lambada_openai", "ntp", "continuation"]
    assert [len(r.rows) for r in results] == [2, 6, 3, 3, 3, 3]
    plot = needle_map(results)
    assert "perplexity" in results_table(results).markdown() and plot is not None and "<svg" in plot.drawing
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [t["n"] for t in kept["tasks"]] == [2, 6, 3, 3, 3, 3]


def test_an_interrupted_run_is_resumed_and_counts_no_example_twice(files, loaded, tmp_path, monkeypatch):
    whole = run(files, loaded, tmp_path / "whole", ["prompts", "piqa"])
    rows, answered = GenerationTask.rows, []

    def interrupted(self, wanted, context):
        for i, row in enumerate(rows(self, wanted, context)):
            if i == 2:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(GenerationTask, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(files, loaded, tmp_path / "out", ["prompts", "piqa"])
    path = rows_path(tmp_path / "out", "say", None)
    with path.open("a") as file:
        file.write('{"id": "say/3", "outp')  # a line that was being written
    assert len(read_rows(tmp_path / "out", "say")) == 2

    def counted(self, wanted, context):
        answered.extend(wanted)
        return rows(self, wanted, context)

    monkeypatch.setattr(GenerationTask, "rows", counted)
    resumed = run(files, loaded, tmp_path / "out", ["prompts", "piqa"])
    assert len(answered) == 4 and len(path.read_text().splitlines()) == 6
    assert resumed == whole


def test_an_output_may_hold_any_character(tmp_path):
    path = rows_path(tmp_path, "say", None)
    row = Row("1", "one\u2028two\x85three\r\n\x0c", ["\u2029"], {"f1": 1.0})
    append_json_lines(path, [asdict(row)])
    with path.open("ab") as file:
        file.write('{"id": "2", "output": "ö'.encode()[:-1])  # cut off inside a character
    assert read_rows(tmp_path, "say") == {"1": row}
    append_json_lines(path, [asdict(row) | {"id": "2"}])
    assert list(read_rows(tmp_path, "say")) == ["1", "2"]


def test_other_settings_do_not_mix_with_a_run(files, loaded, tmp_path):
    run(files, loaded, tmp_path / "out", ["niah_single_1"], lengths=[512])
    with pytest.raises(RefineError, match=r"other settings \(seed was 42, now 7\)"):
        run(files, loaded, tmp_path / "out", ["niah_single_1"], lengths=[512], seed=7)


def test_the_published_protocol_samples_32_tokens(files, loaded):
    task = build_tasks(arguments(files, tasks=["gov_report"], protocol="published"), loaded[1])[0]
    assert isinstance(task, GenerationTask)
    assert not task.decoding.greedy and task.decoding.top_k == 50 and {e.budget for e in task.examples} == {32}
    settings = {"tasks": ["niah_single_1", "gov_report"], "lengths": [512], "protocol": "published"}
    needles = build_tasks(arguments(files, **settings), loaded[1])[0]
    assert isinstance(needles, GenerationTask) and needles.decoding.greedy and needles.examples[0].budget == 128


def test_the_published_protocol_gives_prompts_without_bos_and_cuts_them_on_the_right(files, loaded):
    """With a tokenizer that writes BOS, as LLaMA's does: its 16 tokens are the first, the question is lost."""
    tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")[1]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 7)])
    found = {}
    for protocol in ("standard", "published"):
        a = arguments(files, tasks=["gov_report"], protocol=protocol, max_prompt_tokens=16, limit=1)
        task = build_tasks(a, tokenizer)[0]
        assert isinstance(task, GenerationTask)
        found[protocol] = task._request(0, tokenizer).ids
    ids = tokenizer(task.examples[0].prompt, add_special_tokens=False)["input_ids"]
    assert found["published"] == ids[:16]
    assert found["standard"] == [7, *ids[:7], *ids[-8:]]
    settings = {"tasks": ["niah_single_1", "gov_report"], "lengths": [512], "protocol": "published"}
    needles = build_tasks(arguments(files, **settings), tokenizer)[0]
    assert isinstance(needles, GenerationTask) and needles._request(0, tokenizer).ids[0] == 7  # the paper's code has no needles


def test_a_length_that_cannot_hold_a_task_is_said_under_the_table(files, loaded, tmp_path):
    with pytest.warns(UserWarning, match="cwe at 512 tokens"):
        results = run(files, loaded, tmp_path / "out", ["cwe", "niah_single_1"], lengths=[512])
    shown = results_table(results).markdown()
    assert "cwe at 512 tokens: its smallest prompt takes" in shown and "| niah_single_1 | fraction_match |" in shown
    assert [len(r.rows) for r in results] == [0, 2]
    again = read_results(tmp_path / "out")
    assert results_table(again).markdown() == shown
    assert [task for task, _, _ in compare_all(pair_up(results, again)[0])] == ["niah_single_1"] * 2
    with pytest.raises(RefineError, match="cwe at 512 tokens"):
        build_tasks(arguments(files, tasks=["cwe"], lengths=[512]), loaded[1])


def test_a_run_whose_prompts_were_changed_is_not_resumed(files, loaded, tmp_path):
    run(files, loaded, tmp_path / "out", ["prompts"])
    path = files / "prompts.jsonl"
    path.write_text(path.read_text().replace("Say 3.", "Say three."))
    with pytest.raises(RefineError, match="an answer called 'say/3' to a question that is not asked any more"):
        run(files, loaded, tmp_path / "out", ["prompts"])


def test_buckets_of_documents_count_by_their_targets():
    """A document of 30 targets and one of 4, in buckets of 10: the last of the first holds 1, the second's one bucket 4."""
    long = Row("ntp-0", "", [], {"loss": 0.0}, 30, {"buckets": {str(at): {"loss": float(at)} for at in (0, 10, 20, 30)}})
    short = Row("ntp-1", "", [], {"loss": 0.0}, 4, {"buckets": {"0": {"loss": 1.3}}})
    assert [(at, n) for at, n, _ in bucket_targets(long)] == [(0, 9), (10, 10), (20, 10), (30, 1)]
    plot = bucket_plots([summarise("ntp", [long, short])])[0]
    assert [(at, n) for at, n, _ in bucket_targets(short)] == [(0, 4)] and "0.4" in plot.drawing  # 4 * 1.3 / 13


def test_test_time_training_in_an_evaluation_restores_and_side_by_side_is_alone(files, loaded):
    model, tokenizer = loaded
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = refine_nsp.TestTimeConfig(objective="ntp", parameters="lora", learning_rate=1e-3)
    task = build_tasks(arguments(files, tasks=["prompts"], prompts_budget=6), tokenizer)[0]
    found = []
    for together in (1, 3):
        context = Context(model, tokenizer, 4096, refine_nsp.TestTimeTrainer(model, config), together)
        found.append({r.id: r.output for r in task.rows(list(task.questions()), context)})
    plain = {r.id: r.output for r in task.rows(list(task.questions()), Context(model, tokenizer, 4096))}
    assert found[0] == found[1] and found[0].keys() == plain.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_comparison_pairs_runs_by_example(files, loaded, tmp_path):
    results = run(files, loaded, tmp_path / "out", ["piqa", "prompts"])
    same = compare_all(pair_up(results, list(reversed(results)))[0])
    assert all(c.difference == 0 and c.p_value == 1 for _, _, c in same)
    with pytest.raises(RefineError, match="no task in common"):
        pair_up(results[:1], results[1:])


# --- documents and likelihoods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 50, 64, 101])
@pytest.mark.parametrize("window", [None, 16, 17, 200])
def test_every_target_is_scored_once(length, window):
    covered = [t for first, last, skip in spans(length, window) for t in range(first + 1 + skip, last)]
    assert covered == list(range(1, length))


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet", "lact_swiglu"])
def test_figures_of_a_document_are_those_of_one_pass(family, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 13)
    model, ids = build(family).eval(), torch.randint(0, 64, (100,)).tolist()
    found = score_document(model, ids, None, 30)
    log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    truth = torch.tensor(ids[1:])[:, None]
    assert found.figures["loss"] == pytest.approx(-float(log_p.gather(1, truth).mean()))
    assert found.figures["sampled_accuracy"] == pytest.approx(float(log_p.gather(1, truth).exp().mean()))
    assert found.figures["accuracy"] == pytest.approx(float((log_p.argmax(-1) == truth[:, 0]).double().mean()))
    assert found.figures["entropy"] == pytest.approx(-float((log_p.exp() * log_p).sum(-1).mean()))
    assert list(found.buckets) == [0, 30, 60, 90] and found.targets == 99
    second = score_document(model, ids, 20, 1000)
    lengths = [20, *[20] * 8]
    by_hand = []
    for (first, last, skip), n in zip(spans(100, 20), lengths, strict=True):
        window = model(torch.tensor([ids[first:last]])).logits[0, :-1].log_softmax(-1)
        by_hand += (-window.gather(1, torch.tensor(ids[first + 1 : last])[:, None]))[skip:, 0].tolist()
        assert last - first == n
    assert second.figures["loss"] == pytest.approx(sum(by_hand) / 99)


@pytest.mark.parametrize("family", ["delta_net", "lact_swiglu"])
def test_likelihoods_do_not_depend_on_the_batch(family):
    model = build(family).eval()
    pairs = [
        (torch.randint(0, 64, (n,)).tolist(), torch.randint(0, 64, (k,)).tolist()) for n, k in ((3, 2), (50, 1), (20, 7), (1, 4))
    ]
    together, alone = log_likelihoods(model, pairs, 100), [log_likelihoods(model, [p], 100)[0] for p in pairs]
    for (a, greedy), (b, other), (context, rest) in zip(together, alone, pairs, strict=True):
        logits = model(torch.tensor([context + rest])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        assert a == pytest.approx(b) == pytest.approx(float(logits.gather(1, torch.tensor(rest)[:, None]).sum()))
        assert greedy == other
    with pytest.raises(RefineError, match="pair 0 has 0 context"):
        log_likelihoods(model, [([], [1])], 100)


def test_choices_are_scored_as_lm_eval_does():
    e = ChoiceExample("x", [("q", " a"), ("q", " long answer")], ["a", "long answer"], 1)
    assert score_choices(e, [(-2.0, True), (-4.0, False)]) == {"acc": 0.0, "acc_norm": 1.0}
    last = ChoiceExample("y", [("q", " word")], [" word"], 0)
    assert score_choices(last, [(-1.5, True)]) == {"acc": 1.0, "log_p": -1.5}


def test_pairs_join_to_the_whole_text(loaded):
    tokenizer = loaded[1]
    for context, rest in (("Question: a?\nAnswer:", " b c"), ("ends with space ", "word")):
        before, after = encode_pair(tokenizer, context, rest)
        assert tokenizer.decode(before + after) == context + rest
    assert encode_pair(tokenizer, "", "word")[0] == [start_token(tokenizer)]


# --- lm-eval ----------------------------------------------------------------------------------------------------------


def test_lm_eval_s_requests_are_answered_like_ours(loaded):
    harness = pytest.importorskip("refine_nsp.evaluation.harness", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    model, tokenizer = loaded
    assert get_model("refine-nsp") is harness.HarnessModel
    wrapped = harness.HarnessModel(model=model, tokenizer=tokenizer, batch_tokens=256)

    def instances(kind, found):
        return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(found)]

    texts = [("Question: what?\nAnswer:", " this"), ("def f(x):", " return x"), ("", "import os")]
    ours = log_likelihoods(model, [encode_pair(tokenizer, *t) for t in texts], 256)
    theirs = wrapped.loglikelihood(instances("loglikelihood", texts), disable_tqdm=True)
    assert [g for _, g in theirs] == [g for _, g in ours]
    assert [x for x, _ in theirs] == pytest.approx([x for x, _ in ours], abs=1e-4)
    text = "import os\nimport sys\n" * 20
    ids = [wrapped.prefix_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    rolling = wrapped.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert rolling[0] == pytest.approx(log_likelihoods(model, [(ids[:1], ids[1:])], 10_000)[0][0], rel=1e-4)
    asked = [("import os\nimport", {"until": ["\n"], "max_gen_toks": 8}), ("def f(", {"until": [], "max_gen_toks": 3})]
    out = wrapped.generate_until(instances("generate_until", asked))
    assert "\n" not in out[0] and len(tokenizer(out[1])["input_ids"]) <= 4


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["niah_singel_1"]}, "no task 'niah_singel_1'.*did you mean"),
        ({"tasks": []}, "no task: name some"),
        ({"tasks": ["piqa"], "short_context": None}, "piqa needs a folder"),
        ({"tasks": ["piqa"], "short_context": "/nowhere"}, "has no file piqa.jsonl"),
        ({"tasks": ["ntp"], "documents": None}, "ntp needs text"),
        ({"tasks": ["prompts"], "prompts": None}, "needs a file"),
        ({"tasks": ["qasper"], "longbench": "/nowhere"}, "must be a folder"),
        ({"tasks": ["prompts"], "protocol": "publised"}, "did you mean 'published'"),
        ({"tasks": ["cwe"], "samples": 0}, "samples must be at least 1"),
        ({"tasks": ["prompts"], "prompts_metric": "bleu"}, "prompts_metric='bleu' is not one of"),
    ],
)
def test_bad_arguments_are_refused_by_name(files, loaded, settings, message):
    with pytest.raises(RefineError, match=message):
        build_tasks(arguments(files, **settings), loaded[1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "answer": []}, "no answer; every example needs"),
        ({"prompt": "x", "answer": ["  "]}, "no answer; every example needs"),
        ({"prompt": " ", "answer": ["a"]}, "the prompt is empty"),
        ({"prompt": "x", "reply": "a"}, "has no answers: expected a column"),
        ({"promt": "x", "answer": "a"}, r"no column 'prompt' or 'input'.*did you mean 'promt'"),
    ],
)
def test_bad_prompt_files_are_refused_by_name(tmp_path, loaded, row, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(RefineError, match=message):
        build_tasks(EvaluationArguments(tasks=["prompts"], prompts=str(tmp_path / "p.jsonl")), loaded[1])


def test_the_same_id_twice_is_refused(tmp_path, loaded):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"id": 1, "prompt": "x", "answer": "a"}) for _ in range(2)))
    with pytest.raises(RefineError, match="two examples are called"):
        build_tasks(EvaluationArguments(tasks=["prompts"], prompts=str(tmp_path / "p.jsonl")), loaded[1])


def test_a_prompt_longer_than_allowed_loses_its_middle(tmp_path, loaded):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "begin " + "word " * 500 + "end", "answer": "a"}))
    a = EvaluationArguments(tasks=["prompts"], prompts=str(tmp_path / "p.jsonl"), max_prompt_tokens=40, prompts_budget=2)
    row = next(iter(build_tasks(a, loaded[1])[0].rows(["p/0"], Context(*loaded, 1000))))
    assert row.meta["prompt_tokens"] == 40


def test_generation_ends_without_an_end_token(loaded):
    model, tokenizer = loaded
    assert tasks.end_tokens(model, tokenizer)
    task = GenerationTask("t", [tasks.Example("t/0", "import", ["os"], 5)], lambda o, r: {"any_match": 0.0})
    assert next(iter(task.rows(["t/0"], Context(model, tokenizer, 100)))).meta["new_tokens"] <= 5


# --- the commands -----------------------------------------------------------------------------------------------------


def test_evaluate_and_compare_write_their_pages(files, tmp_path, capsys):
    flags = ["--lengths", "512", "--samples", "2", "--limit", "3"]
    several = [
        "--tasks",
        "prompts",
        "piqa",
        "niah_single_1",
        "--short_context",
        str(files),
        "--prompts",
        str(files / "prompts.jsonl"),
    ]
    adapted = ["--tasks", "niah_single_1", "--ttt", "refine", "--ttt_learning_rate", "1e-4", "--ttt_positions_per_sequence", "2"]
    for name, further in (("a", several), ("b", adapted)):
        assert main(["evaluate", "refine-nsp/tiny-delta-net", *flags, *further, "--output_dir", str(tmp_path / name)]) == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert "niah_single_1" in page and "<svg" in page and " src=" not in page and "<link" not in page
    assert "| piqa | acc |" in (tmp_path / "a" / "results.md").read_text()
    cost = "test-time training, per prompt:"
    assert cost in (tmp_path / "b" / "results.md").read_text() and cost not in (tmp_path / "a" / "results.md").read_text()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c.html")]) == 0
    assert "niah_single_1" in capsys.readouterr().out and (tmp_path / "c.html").exists()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "nothing")]) == 1
    assert "holds no finished evaluation" in capsys.readouterr().err
    assert main(["evaluate", "--tasks", "rular"]) == 1
    assert "did you mean 'ruler'" in capsys.readouterr().err


def test_the_ttt_command_says_what_adapting_cost(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("import os\nimport sys\n" * 12)
    flags = [
        "--prompt_file",
        str(tmp_path / "p.txt"),
        "--max_new_tokens",
        "4",
        "--ttt_learning_rate",
        "1e-4",
        "--ttt_positions_per_sequence",
        "2",
    ]
    assert main(["ttt", *flags]) == 0
    out = capsys.readouterr().out
    assert "adapted (refine)" in out and "extra MiB" in out
    assert main(["ttt", "--prompt", "short"]) == 1
    assert "cannot be adapted to" in capsys.readouterr().err


def test_two_processes_answer_what_one_does(files, tmp_path):
    flags = ["evaluate", "refine-nsp/tiny-delta-net", "--tasks", "prompts", "piqa", "--prompts", str(files / "prompts.jsonl")]
    flags += ["--short_context", str(files)]
    assert main([*flags, "--output_dir", str(tmp_path / "one")]) == 0
    run_side_by_side(lambda: main([*flags, "--output_dir", str(tmp_path / "two")]), tmp_path / "logs")
    assert len(list((tmp_path / "two" / "examples").glob("*.rank1.jsonl"))) == 2
    for task in ("say", "piqa"):
        one, two = (read_rows(tmp_path / name, task) for name in ("one", "two"))
        assert one.keys() == two.keys() and all(one[k].output == two[k].output for k in one)
    assert (tmp_path / "two" / "report.html").exists()
