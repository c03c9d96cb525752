"""Distillation: what a teacher predicts is learned, exactly as a naive form says, whatever the batch is cut into."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models import read_in_window, with_states
from refine_nsp.models.convert import convert
from refine_nsp.models.load import load, load_model, load_tokenizer
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.teacher import scores_beyond
from refine_nsp.training import ReFINEConfig, ReFINETrainer, scores
from refine_nsp.training.distillation import Distillation
from refine_nsp.training.phases import MicroBatch
from refine_nsp.training.teacher import check_tokens, load_teacher, teacher_of
from tests.device_rules import DeviceRules
from tests.models.families import build
from tests.models.test_convert import MEMORY, SOURCES, WINDOW, awake, saved, source_of, with_our_tables, with_window
from tests.models.transformers_models import float64_throughout, plain, stateful
from tests.training.test_trainer import assert_close, data, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")
LENGTHS = torch.tensor([40, 23])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, and the student that it was converted to, in float64."""
    made = tmp_path_factory.mktemp("distill")
    convert(saved(made / "teacher"), made / "student", MEMORY)
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "refine_nsp_context_scores"


def trainer(made: Path, run: Path, student=None, **settings) -> ReFINETrainer:
    defaults = dict(
        output_dir=str(run), objective="distill", teacher=str(made / "teacher"), max_steps=3, per_device_train_batch_size=4,
        learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, max_length=64,
        min_prefix=5, positions_per_sequence=2, rollout_length=3,
    )  # fmt: skip
    extra = {k: settings.pop(k) for k in ("eval_dataset", "train_dataset", "peft_config") if k in settings}
    extra.setdefault("train_dataset", data())
    model = student if student is not None else load_model(made / "student")
    return ReFINETrainer(model=model, args=ReFINEConfig(**{**defaults, **settings}), **extra)


def ids_of(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(4, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of softmax(p) from softmax(q), over the last dimension."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# --- the teacher's scores ---------------------------------------------------------------------------------------------
@torch.no_grad()
def test_scores_are_of_each_token_read_again_with_its_last_tokens_alone():
    """With one layer, the window of a token is the last tokens and nothing else: it can be read without all that is before."""
    config = SOURCES["llama"]()
    config.num_hidden_layers, W = 1, 7
    with float64_throughout():
        model = with_our_tables(source_of(config))
        teacher = teacher_of(with_states(model, check_states=False))
        batch = Batch.of(ids_of(), LENGTHS)
        d = teacher.scores(batch, teacher.read(batch), scores_beyond(W))
        for row, length in enumerate(LENGTHS.tolist()):
            for t in range(40):
                whole = model(batch.input_ids[row, None, : t + 1]).logits[0, -1]
                last = model(batch.input_ids[row, None, max(0, t + 1 - W) : t + 1]).logits[0, -1]
                expected = kl(whole, last) if t < length else torch.zeros(())
                torch.testing.assert_close(d[row, t], expected.to(d.dtype), rtol=1e-9, atol=1e-13)
    assert (d[:, :W] == 0).all() and (d[0, W:] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", SOURCES)
def test_scores_are_those_of_transformers_own_window_prefix_by_prefix(kind):
    with float64_throughout():
        source = with_our_tables(source_of(SOURCES[kind]()))
        windowed, batch = with_window(source), Batch.of(ids_of(), LENGTHS)
        expected = torch.zeros(2, 40, dtype=torch.float64)
        for t in range(40):
            part = batch.input_ids[:, : t + 1]
            expected[:, t] = kl(source(part).logits[:, -1], windowed(part).logits[:, -1])
        teacher = teacher_of(with_states(source, check_states=False))
        assert teacher.masked
        d = teacher.scores(batch, teacher.read(batch), scores_beyond(WINDOW))
        torch.testing.assert_close(d, expected.masked_fill(~batch.real, 0.0), rtol=1e-8, atol=1e-12)
        gain = teacher.scores(batch, teacher.read(batch), scores_beyond(WINDOW), gain=True)
        p, q = (m(batch.input_ids).logits.log_softmax(-1)[:, :-1] for m in (source, windowed))
        at_target = (p - q).gather(-1, batch.input_ids[:, 1:, None])[..., 0].clamp(min=0)
        torch.testing.assert_close(gain[:, :-1], at_target.masked_fill(~batch.target_mask[:, :-1], 0.0), rtol=1e-7, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3"])
def test_a_teacher_with_windows_of_its_own_keeps_them(name):
    """Layers that see less than the window see no more for it; and no token sees farther than its layers together."""
    model, ids = stateful(name), ids_of()
    whole = model.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(read_in_window(model.model, ids, 40), whole, rtol=1e-6, atol=1e-6)
    near, layers, W = read_in_window(model.model, ids, 4), model.config.num_hidden_layers, 4
    assert not torch.allclose(near, whole, atol=1e-3)
    other, reach = ids.clone(), layers * (W - 1)
    other[:, 0] = 5
    moved = read_in_window(model.model, other, W)
    torch.testing.assert_close(moved[:, reach + 1 :], near[:, reach + 1 :], rtol=0, atol=0)
    assert not torch.allclose(moved[:, reach], near[:, reach], atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lact_swiglu", "delta_net", "qwen3_next"])
def test_a_teacher_with_states_is_read_in_local_windows(name):
    model = build(name) if name in ("lact_swiglu", "delta_net") else stateful(name)
    teacher, batch = teacher_of(model), Batch.of(ids_of(), LENGTHS)
    assert not teacher.masked
    config = NSPConfig(estimator="closed_form", token_weights="context", local_window=8, local_span=2)
    expected = context_divergence(model, batch, run_hidden(model, batch, config), config, False)
    d = teacher.scores(batch, teacher.read(batch), scores_beyond(8))
    torch.testing.assert_close(d, expected, rtol=0, atol=0)
    assert (d[:, :16] == 0).all() and d[0, 16:].max() > 1e-3


# --- the loss ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_converted_student_is_its_teacher_within_the_window_and_not_beyond(folder):
    student, teacher = (
        load_model(folder / "student"),
        load_teacher(str(folder / "teacher"), None, load_model(folder / "student"), "cpu"),
    )
    batch = Batch.of(ids_of())
    d = kl(teacher.model.lm_head(teacher.read(batch)), student(batch.input_ids).logits)
    assert d[:, :WINDOW].max() < 1e-10
    assert d[:, WINDOW:].min() > 1e-6
    # What it lost is what the teacher's scores say.
    torch.testing.assert_close(d, teacher.scores(batch, teacher.read(batch), scores_beyond(WINDOW)), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("lambda_ntp", [0.7, 0.0])
@pytest.mark.parametrize("lambda_context", [3.0, 0.0])
def test_the_gradient_is_that_of_the_naive_form(folder, lambda_ntp, lambda_context):
    student = awake(load_model(folder / "student"))
    teacher = load_teacher(str(folder / "teacher"), None, student, "cpu")
    sequences, config = Batch.of(ids_of(), LENGTHS), NSPConfig(lambda_ntp=lambda_ntp)
    phase = Distillation(config, teacher, lambda_context, WINDOW)
    batch = MicroBatch(sequences, totals={"targets": 50.0})
    loss, metrics = phase.loss(student, batch)
    got = torch.autograd.grad(loss, list(student.parameters()))

    logits = student(sequences.input_ids, lengths=LENGTHS).logits
    with torch.no_grad():
        whole = teacher.model.lm_head(teacher.read(sequences))
        d = teacher.scores(sequences, teacher.read(sequences), scores_beyond(WINDOW))
    mask, divergence = sequences.target_mask, kl(whole, logits)
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), sequences.input_ids[:, 1:], reduction="none")[mask[:, :-1]]
    expected = (((1 + lambda_context * d) * divergence)[mask].sum() + lambda_ntp * nll.sum()) / 50
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["loss_kl"], divergence[mask].sum().detach() / 50, rtol=1e-9, atol=0)
    assert ("loss_ntp" in metrics) == (lambda_ntp > 0) and ("context_score" in metrics) == (lambda_context > 0)
    for a, b in zip(got, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


def test_without_weights_the_teacher_is_read_once(folder, monkeypatch):
    student = load_model(folder / "student")
    teacher = load_teacher(str(folder / "teacher"), None, student, "cpu")
    monkeypatch.setattr("refine_nsp.nsp.teacher.read_in_window", lambda *args: pytest.fail("read again"))
    phase = Distillation(NSPConfig(), teacher, 0.0, WINDOW)
    phase.loss(student, MicroBatch(Batch.of(ids_of()), totals={"targets": 1.0}))


# --- whole runs -------------------------------------------------------------------------------------------------------
def packed_data() -> Dataset:
    g = torch.Generator().manual_seed(0)
    lengths = [[30, 25], [60], [21, 33], [14, 20, 18]] * 2
    return Dataset.from_list(
        [{"input_ids": torch.randint(0, 64, (sum(n),), generator=g).tolist(), "lengths": n} for n in lengths]
    )


@pytest.mark.parametrize("more", [
    {}, {"segment_tokens": 17}, {"context_scores": "teacher"}, {"lambda_context": 0.0, "lambda_ntp": 0.0},
    {"gradient_checkpointing": True}, {"packed": True, "context_scores": "teacher"},
], ids=str)  # fmt: skip
def test_one_batch_of_8_equals_8_batches_of_1(folder, tmp_path, more):
    """However it is computed: by segments, with blocks that are computed again, with scores beforehand, from packed documents."""
    packed = {"train_dataset": packed_data()} if more.get("packed") else {}
    more = {k: v for k, v in more.items() if k != "packed"}
    more["max_steps"] = 2
    same = {k: v for k, v in more.items() if k.startswith("lambda") or k == "max_steps"}
    big = trainer(folder, tmp_path / "a", per_device_train_batch_size=8, **same, **packed)
    small = trainer(folder, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **more, **packed)
    before = weights(big)
    big.train()
    small.train()
    assert_close(weights(big), weights(small))
    assert max(float((before[n] - w).abs().max()) for n, w in weights(big).items()) > 1e-3
    a, b = (t.state.log_history[0] for t in (big, small))
    for name in ("loss", "loss_kl"):
        assert a[name] == pytest.approx(b[name], rel=1e-6)


def test_a_resumed_run_equals_the_uninterrupted_one_and_another_teacher_is_refused(folder, tmp_path):
    straight = trainer(folder, tmp_path / "straight", max_steps=4)
    straight.train()
    trainer(folder, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    other = tmp_path / "other"
    shutil.copytree(folder / "teacher", other)
    with pytest.raises(RefineError, match=r"teacher was .*/teacher', now .*/other'"):
        trainer(folder, tmp_path / "run", max_steps=4, teacher=str(other)).train(resume_from_checkpoint=True)
    again = trainer(folder, tmp_path / "run", max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert_close(weights(again), weights(straight), atol=0)
    # The teacher is no part of what is saved, or counted.
    again.save_model(str(tmp_path / "run"))
    assert load_file(tmp_path / "run" / "model.safetensors").keys() == load_file(folder / "student" / "model.safetensors").keys()
    n = sum(p.numel() for p in again.model.parameters())
    assert f"{n:,} of {n:,}" in json.loads((tmp_path / "run" / "checkpoint-2" / "settings.json").read_text())["model"]
    assert again.teacher is not None
    assert not any(p.requires_grad for p in again.teacher.model.parameters()) and not again.teacher.model.training
    card = (tmp_path / "run" / "README.md").read_text()
    assert "distillation from `teacher`" in card and str(folder) not in card


def test_scores_kept_with_the_data_are_made_anew_for_another_teacher_or_window(folder, tmp_path, monkeypatch):
    rows, original = [], scores.scores_of
    monkeypatch.setattr(scores, "scores_of", lambda row, *args: rows.append(row) or original(row, *args))
    shown = {"train_dataset": data(4), "context_scores": "teacher"}
    first = trainer(folder, tmp_path / "a", **shown)
    trainer(folder, tmp_path / "b", **shown)
    assert len(rows) == 4
    trainer(folder, tmp_path / "c", teacher_window=9, **shown)
    assert len(rows) == 8
    changed = tmp_path / "teacher"
    model = load_model(folder / "teacher")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(changed)
    trainer(folder, tmp_path / "d", teacher=str(changed), **shown)
    assert len(rows) == 12
    # A model that scores as a base does is no teacher, whatever its weights: its windows are others.
    teacher = load_teacher(str(folder / "teacher"), None, first.model, "cpu")
    row = {"input_ids": data(1)[0]["input_ids"]}
    kept = original(row, teacher.model, scores_beyond(WINDOW), False, "cpu", None, True, teacher)
    assert first.train_dataset[0]["context_scores"] == kept
    assert kept != original(row, teacher.model, scores_beyond(WINDOW), False, "cpu")


@pytest.mark.parametrize("preset", ["likelihood", "expected"])
def test_the_closed_form_weighs_by_the_teacher(folder, tmp_path, preset):
    more = {"objective": "refine", "preset": preset, "local_window": WINDOW, "max_steps": 1, "lambda_ntp": 0.0}
    taught = trainer(folder, tmp_path / "a", context_scores="teacher", **more)
    assert taught.teacher is None  # its scores are all that is needed of it
    teacher = load_teacher(str(folder / "teacher"), None, taught.model, "cpu")
    batch = Batch.of(torch.tensor([data(1)[0]["input_ids"]]))
    d = teacher.scores(batch, teacher.read(batch), scores_beyond(WINDOW))[0]
    assert taught.train_dataset[0]["context_scores"] == d.tolist() and d.max() > 0
    taught.train()
    own = trainer(folder, tmp_path / "b", teacher=None, **more)
    own.train()
    assert max(float((a - weights(own)[n]).abs().max()) for n, a in weights(taught).items()) > 1e-3


def test_lora_learns_from_a_teacher_by_its_adapters_alone(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    t = trainer(folder, tmp_path, peft_config=config)
    before = weights(t)
    t.train()
    moved = {n for n, w in weights(t).items() if not torch.equal(w, before[n])}
    assert moved and all("lora_" in n for n in moved)


def test_half_precision_products_give_the_same_losses(folder, tmp_path):
    wide = trainer(folder, tmp_path / "a", load_model(folder / "student", dtype="float32"))
    half = trainer(folder, tmp_path / "b", load_model(folder / "student", dtype="float32"), bf16=True)
    wide.train()
    half.train()
    a, b = ([log["loss_kl"] for log in t.state.log_history if "loss_kl" in log] for t in (wide, half))
    assert a == pytest.approx(b, rel=0.1)
    assert all(p.dtype == torch.float64 for p in half.teacher.model.parameters())  # as its checkpoint has it


def test_a_step_waits_for_the_device_twice(folder, tmp_path):
    """For the gradient to be finite, and in transformers' own forward pass of the teacher, which looks for packed documents."""

    def waits(steps: int) -> int:
        t = trainer(folder, tmp_path / str(steps), max_steps=steps, logging_steps=100, train_dataset=data(24))
        with DeviceRules() as rules:
            t.train()
        assert not rules.mixed
        return len(rules.waits)

    assert waits(4) - waits(2) <= 2 * 2


def test_validation_says_how_far_the_student_is_from_its_teacher(folder, tmp_path):
    t = trainer(folder, tmp_path, eval_dataset=data(5), per_device_eval_batch_size=2)
    figures = t.evaluate()
    total = beyond = 0.0
    n_total = n_beyond = 0
    for row in data(5):
        ids = torch.tensor([row["input_ids"]])
        batch = Batch.of(ids)
        with torch.no_grad():
            d = kl(t.teacher.model.lm_head(t.teacher.read(batch)), t.model(ids).logits)[0, :-1]
        total, beyond = total + float(d.sum()), beyond + float(d[WINDOW:].sum())
        n_total, n_beyond = n_total + len(d), n_beyond + len(d) - WINDOW
    assert figures["eval_kl"] == pytest.approx(total / n_total, rel=1e-6)
    assert figures["eval_kl_beyond"] == pytest.approx(beyond / n_beyond, rel=1e-6)
    assert figures["eval_kl"] < figures["eval_kl_beyond"]


# --- refused ----------------------------------------------------------------------------------------------------------
def test_settings_that_do_not_go_together_are_named(folder, tmp_path):
    teacher = str(folder / "teacher")
    for settings, words in (
        ({"objective": "distill"}, "objective='distill' needs a teacher"),
        (
            {"objective": "refine", "teacher": teacher},
            "nothing reads teacher=.*objective='distill' or 'transfer', or context_scores='teacher'",
        ),
        ({"objective": "ntp", "teacher": teacher}, "nothing reads teacher="),
        ({"objective": "ntp", "lambda_context": 1.0}, "nothing reads lambda_context"),
        (
            {"objective": "refine", "preset": "likelihood", "context_scores": "teacher"},
            "context_scores='teacher' needs a teacher",
        ),
        ({"objective": "distill", "teacher": teacher, "context_scores": "cached"}, "distillation weighs by its teacher's"),
        ({"objective": "distill", "teacher": teacher, "carry_states": True}, "carry_states: .*teacher"),
        ({"objective": "distill", "teacher": teacher, "lambda_context": -1.0}, "lambda_context must be"),
    ):
        with pytest.raises(RefineError, match=words):
            ReFINEConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(RefineError, match="max_length=12 is not longer than the window of 12 tokens"):
        trainer(folder, tmp_path, max_length=WINDOW)
    with pytest.raises(RefineError, match=r"teacher_window: delta_net .*has no window"):
        trainer(folder, tmp_path, build("delta_net"))
    near = tmp_path / "near"
    plain("mistral").save_pretrained(near)
    with pytest.raises(RefineError, match="itself sees no more than 12 tokens"):
        trainer(folder, tmp_path, teacher=str(near))
    with pytest.raises(RefineError, match=r"vocabulary of 2,?048 tokens and .* one of 64"):
        trainer(folder, tmp_path, teacher="refine-nsp/tiny-lact")


def test_a_teacher_with_another_tokenizer_is_refused_and_other_files_are_not(tmp_path):
    student, tokenizer = load("refine-nsp/tiny-lact")
    same = tmp_path / "same"
    load_model("refine-nsp/tiny-delta-net").save_pretrained(same)
    load_tokenizer("refine-nsp/tiny-lact").save_pretrained(same)
    path = same / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))  # other bytes
    check_tokens(str(same), tokenizer, student)
    changed = json.loads(path.read_text())
    vocab = changed["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(changed))
    with pytest.raises(RefineError, match=r"the teacher .*same has another tokenizer .* than .*: .* is 301 there and 300 here"):
        check_tokens(str(same), tokenizer, student)
