"""Post-training: the inner update and the SFT step are what they say, and everything of the trainer goes on working."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from datasets import Dataset

from refine_nsp.cli import main
from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.load import load_tokenizer
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.training import AnswerArguments, PostTrainer, PostTrainingConfig, answers, prepare_answers
from refine_nsp.training.micro_batches import deal
from refine_nsp.training.nested import answer_loss
from tests.models.families import build

NSP = {"min_prefix": 5, "positions_per_sequence": 2, "rollout_length": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("refine-nsp/tiny-delta-net")


def data(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(0, 64, (k,), generator=g).tolist()  # noqa: E731
    return Dataset.from_list(
        [{"prompt_ids": draw(30 + 3 * i), "answers_ids": [draw(4), draw(6)], "references": ["a", "b"]} for i in range(n)]
    )


def trainer(tmp_path, model=None, rows=None, **settings):
    defaults = {
        "output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_length": 96,
        "train_sampling_strategy": "sequential", **NSP,
    }  # fmt: skip
    args = PostTrainingConfig(**{**defaults, **settings})
    return PostTrainer(model=model if model is not None else build("delta_net"), args=args, train_dataset=rows or data())


def weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def batch_of(rows, which=0):
    full = [torch.tensor(r["prompt_ids"] + r["answers_ids"][which]) for r in rows]
    return torch.nn.utils.rnn.pad_sequence(full, batch_first=True), torch.tensor([len(f) for f in full])


@pytest.mark.parametrize("family", ["delta_net", "lact_swiglu"])
def test_the_answer_loss_is_the_mean_over_answer_tokens(family):
    model, rows = build(family), list(data(3))
    ids, lengths = batch_of(rows)
    got = answer_loss(model, Batch.of(ids, lengths), torch.full((3,), 4), 12.0, NSPConfig())
    by_hand = []
    for r in rows:
        logits = (
            model(torch.tensor([r["prompt_ids"] + r["answers_ids"][0]])).logits[0, len(r["prompt_ids"]) - 1 : -1].log_softmax(-1)
        )
        by_hand += (-logits.gather(1, torch.tensor(r["answers_ids"][0])[:, None]))[:, 0].tolist()
    assert float(got.detach()) == pytest.approx(sum(by_hand) / 12, rel=1e-9)


@pytest.mark.parametrize("inner", ["none", "ntp", "refine"])
def test_one_step_is_an_inner_update_then_sft(tmp_path, inner):
    """The trainer's step against the same two optimizer steps by hand."""
    t = trainer(tmp_path, max_steps=1, objective=inner, weight_decay=0.0)
    t.train()
    model, rows = build("delta_net"), list(data())[:2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)

    def update(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if inner != "none":
        prompts = [torch.tensor(r["prompt_ids"]) for r in rows]
        ids, lengths = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True), torch.tensor([len(p) for p in prompts])
        result = ReFINEStep(model, t.nsp)(ids, lengths, t.dealing.generators(t.args.seed, 0, 0, 0, [(0, 0), (1, 0)]))
        update(result.loss if inner == "refine" else result.loss_ntp)
    ids, lengths = batch_of(rows)
    update(answer_loss(model, Batch.of(ids, lengths), torch.full((2,), 4), 8.0, NSPConfig()))
    for name, value in weights(model).items():
        torch.testing.assert_close(t.model.state_dict()[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


GROUPS = {"num_generations": 2, "advantage_scale": "global", "baseline": "leave_one_out"}


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "none"},
        {"objective": "ntp"},
        {"objective": "refine"},
        {"objective": "refine", "schedule": "snapshot", **GROUPS},
        {"objective": "refine", "preset": "expected", "local_window": 8},
        {"objective": "refine", "inner_steps": 2},
        {"objective": "refine", "inner_steps": 2, "schedule": "snapshot", **GROUPS},
    ],
    ids=["none", "ntp", "refine", "snapshot", "closed form", "inner_steps", "inner_steps snapshot"],
)
def test_one_batch_of_8_is_8_of_1(tmp_path, settings):
    """Rollouts too: a sequence has draws of its own, however the sequences are dealt out."""
    least = settings.get("inner_steps", 1)  # an inner step needs a micro-batch of its own
    big, small = (
        trainer(tmp_path, per_device_train_batch_size=8 // n, gradient_accumulation_steps=n, **settings) for n in (least, 8)
    )
    big.train()
    small.train()
    for name, value in weights(big.model).items():
        torch.testing.assert_close(value, weights(small.model)[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    a, b = (t.state.log_history[0] for t in (big, small))
    losses = [name for name in a if "loss" in name]
    assert ("inner_loss_ntp" in losses) == (settings["objective"] != "none")
    assert [a[name] for name in losses] == pytest.approx([b[name] for name in losses], rel=1e-6)


@pytest.mark.parametrize("settings", [{"objective": "refine"}, {"objective": "ntp", "reference": "random"}])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, settings):
    straight = trainer(tmp_path / "a", max_steps=4, save_strategy="steps", save_steps=2, **settings)
    straight.train()
    resumed = trainer(tmp_path / "b", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-2"))
    for name, value in weights(straight.model).items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("accumulation", "inner_steps", "sizes"), [(4, 2, [2, 2]), (5, 4, [2, 1, 1, 1]), (7, 3, [3, 2, 2]), (3, 3, [1, 1, 1])]
)
def test_inner_steps_deal_the_batch_out(tmp_path, accumulation, inner_steps, sizes):
    t = trainer(
        tmp_path, gradient_accumulation_steps=accumulation, per_device_train_batch_size=1, objective="ntp",
        inner_steps=inner_steps, max_steps=1,
    )  # fmt: skip
    updates, update = [], t.update

    def count(phase, batches, prefix):
        updates.append(len(batches))
        update(phase, batches, prefix)

    t.update = count
    t.train()
    assert updates == sizes and t.state.global_step == 1
    steps = {float(state["step"]) for state in t.optimizer.state.values()}
    assert steps == {inner_steps + 1.0}  # the inner ones, and SFT


def test_fewer_micro_batches_than_inner_steps_are_a_step_each():
    assert deal([1, 2], 4) == [[1], [2]] and deal([], 2) == []


def test_validation_without_a_tokenizer_says_what_it_needs(tmp_path):
    with pytest.raises(RefineError, match="give the trainer its tokenizer"):
        trainer(tmp_path).evaluate(data(2))


def test_a_random_reference_is_seeded_and_the_first_is_the_first(tmp_path):
    t = trainer(tmp_path, reference="random")
    rows = list(data())
    batch = t.data_collator(rows)

    def answer_lengths(seed):
        generators = [generator_of(seed, i) for i in range(len(rows))]
        return t.micro_batch(batch, generators, torch.device("cpu")).answer_lengths

    drawn = {answer_lengths(s) for s in range(20)}
    assert len(drawn) > 5 and all(set(d) <= {4, 6} for d in drawn)
    t.args.reference = "first"
    assert set(answer_lengths(0)) == {4}


def write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return str(path)


def question(i):
    text = "".join(f"Document {j}: the colour of thing {j} is number {j * 7 % 10}.\n" for j in range(8))
    return {
        "prompt": f"{text}Question: which number is thing {i}?\nAnswer:",
        "answers": [str(i * 7 % 10)],
        "q": f"which number is thing {i}?",
    }


def test_rows_become_tokens_that_end(tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", [question(i) for i in range(8)])
    train, validation = prepare_answers(AnswerArguments(dataset_name=name, validation_fraction=0.25), tokenizer, 512)
    assert len(train) == 6 and len(validation) == 2
    row = train[0]
    assert row["answers_ids"][0][-1] == tokenizer.eos_token_id
    text = tokenizer.decode(row["prompt_ids"] + row["answers_ids"][0][:-1])
    assert text.endswith(f"Answer: {row['references'][0]}")


def test_rows_of_files_are_tokenized_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = AnswerArguments(
        dataset_name=write(tmp_path / "a.jsonl", [question(i) for i in range(8)]), validation_fraction=0.25
    )
    first = prepare_answers(arguments, tokenizer, 512)
    other = prepare_answers(replace(arguments, max_answer_tokens=1), tokenizer, 512)
    assert other[0]["answers_ids"] != first[0]["answers_ids"]
    monkeypatch.setattr(answers, "encode_row", None)  # would fail if called
    again = prepare_answers(arguments, tokenizer, 512)
    assert [list(rows) for rows in again] == [list(rows) for rows in first]


def test_truncation_never_cuts_the_question(tmp_path, tokenizer):
    name = write(tmp_path / "a.jsonl", [question(i) for i in range(8)])
    arguments = AnswerArguments(dataset_name=name, question_column="q", max_answer_tokens=8, validation_fraction=0)
    train, _ = prepare_answers(arguments, tokenizer, 60)
    for i, row in enumerate(train):
        text = tokenizer.decode(row["prompt_ids"])
        assert len(row["prompt_ids"]) == 52 and question(i)["q"] in text and text.endswith("Answer:")
    with pytest.raises(RefineError, match=r"row 0: .*its end alone, which is kept, has \d+; raise --max_length"):
        prepare_answers(arguments, tokenizer, 16)


def test_ruler_prompts_are_built_from_question_files(tmp_path, tokenizer):
    rows = [{"question": f"Who made the thing number {i}?", "answers": [f"Person {i}"], "context": f"Thing {i} was made by Person {i}."}
            for i in range(12)]  # fmt: skip
    name = write(tmp_path / "squad.jsonl", rows)
    settings = {"squad": name, "ruler_length": 400, "ruler_samples": 6, "max_answer_tokens": 32, "validation_fraction": 0}
    train, _ = prepare_answers(AnswerArguments(**settings), tokenizer, 400)
    assert len(train) == 6
    for row in train:
        text = tokenizer.decode(row["prompt_ids"])
        assert len(row["prompt_ids"]) <= 400 - 32 and row["references"][0] in text and "Who made the thing" in text
        assert tokenizer.decode(row["answers_ids"][0][:-1]).strip() == row["references"][0]
    with pytest.raises(RefineError, match="ruler_length=400 must fit into max_length=300"):
        prepare_answers(AnswerArguments(**settings), tokenizer, 300)
    with pytest.raises(RefineError, match="--dataset_name, or questions to build them from"):
        prepare_answers(AnswerArguments(dataset_name=name, **settings), tokenizer, 400)


def test_chat_templates_are_used_when_asked_for(tmp_path, tokenizer):
    import copy

    name = write(tmp_path / "a.jsonl", [question(0), question(1)])
    arguments = AnswerArguments(dataset_name=name, apply_chat_template=True, validation_fraction=0)
    with pytest.raises(RefineError, match="has no chat template"):
        prepare_answers(arguments, tokenizer, 512)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    row = prepare_answers(arguments, chatty, 512)[0][0]
    text = tokenizer.decode(row["prompt_ids"])
    assert text.startswith("<user>") and text.endswith("<bot>")


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "x", "answers": []}], {}, "row 0: no answer"),
        ([{"prompt": " ", "answers": ["a"]}], {}, "row 0: the prompt is empty"),
        ([{"text": "x"}], {}, "no column 'prompt' or 'input'"),
        ([{"prompt": "x", "answers": ["a"]}], {"question_column": "q"}, "no column 'q'"),
        ([{"prompt": "x", "answers": ["a"], "q": "y"}], {"question_column": "q"}, "does not stand in the prompt"),
        ([{"prompt": "x", "answers": ["a"]}], {"max_answer_tokens": 600}, "must leave room for a prompt"),
    ],
)
def test_bad_rows_are_refused_by_name(tmp_path, tokenizer, rows, settings, message):
    name = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(RefineError, match=message):
        prepare_answers(AnswerArguments(dataset_name=name, validation_fraction=0, **settings), tokenizer, 512)


def test_a_tokenizer_without_eos_is_refused(tmp_path, tokenizer):
    import copy

    name = write(tmp_path / "a.jsonl", [question(0)])
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(RefineError, match="no EOS token"):
        prepare_answers(AnswerArguments(dataset_name=name), endless, 512)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "refin"}, "did you mean 'refine'"),
        ({"reference": "last"}, "reference='last' is not one of"),
        ({"answer_metric": "bleu"}, "answer_metric='bleu' is not one of"),
        ({"inner_steps": 2}, "inner_steps=2 deals 1 micro-batches out"),
        ({"steps_per_generation": 2, "schedule": "snapshot"}, "belongs to mid-training"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(RefineError, match=message):
        PostTrainingConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_the_command_learns_to_answer(tmp_path, capsys):
    name = write(tmp_path / "a.jsonl", [question(i % 8) for i in range(64)])
    flags = ["--dataset_name", name, "--output_dir", str(tmp_path / "run"), "--max_length", "256", "--max_steps", "12",
             "--learning_rate", "3e-3", "--per_device_train_batch_size", "4", "--logging_steps", "2", "--max_new_tokens", "4",
             "--objective", "refine", "--positions_per_sequence", "2", "--disable_tqdm", "true"]  # fmt: skip
    assert main(["posttrain", *flags, "--dry_run"]) == 0
    assert "training prompts" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert main(["posttrain", *flags]) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [x["loss_answer"] for x in lines if "loss_answer" in x]
    assert losses[-1] < 0.5 * losses[0]
    assert any("inner_reward_cosine" in x or "inner_loss_ntp" in x for x in lines)
    assert [x["eval_any_match"] for x in lines if "eval_any_match" in x]
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "report.html").exists()
