"""Prompts with answers among long text: only the answers are learned, by cross-entropy alone, and the text as it is without them."""

import json

import pytest
import torch
from datasets import Dataset

import refine_nsp
from refine_nsp.errors import RefineError
from refine_nsp.nsp.records import Batch
from refine_nsp.training import DataArguments, NextSequence, NextToken, ReFINEConfig, prepare_data
from refine_nsp.training.data import collate
from refine_nsp.training.micro_batches import set_totals, to_batch
from refine_nsp.training.phases import MicroBatch
from tests.models.families import build
from tests.training.test_trainer import assert_close, trainer, weights

CLOSED = {"preset": "expected", "local_window": 8, "reward_funcs": "prefix_match"}
SAMPLED = {"schedule": "snapshot", "num_generations": 2, "advantage_scale": "global", "baseline": "leave_one_out"}
METHODS = [{"objective": "ntp"}, CLOSED, SAMPLED, {"preset": "context", "local_window": 8}, {"steps_per_generation": 2}]
BASE = {"max_length": 64, "min_prefix": 5, "positions_per_sequence": 2, "rollout_length": 3, "reward_funcs": "hybrid"}


def rows_of(kinds: str, packed: bool = False) -> Dataset:
    """Rows of text (t) and of a prompt with an answer (a); with fewer columns where there are no answers."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i, kind in enumerate(kinds):
        n = 60 - 7 * (i % 3)
        row = {"input_ids": torch.randint(0, 64, (n,), generator=g).tolist(), "dataset_source": "text" if kind == "t" else "qa"}
        start = n - 4 if kind == "a" else None
        row |= {"lengths": [n], "dataset_source": [row["dataset_source"]]} if packed else {}
        rows.append(row | ({"answer_start": [start] if packed and start else start} if "a" in kinds else {}))
    return Dataset.from_list(rows)


def micro_batch(rows: Dataset, seed: int = 0) -> MicroBatch:
    inputs = collate(list(rows))
    generators = [torch.Generator().manual_seed(100 * seed + i) for i in range(len(rows))]
    return MicroBatch(to_batch(inputs, torch.device("cpu")), generators)


def test_a_batch_knows_what_is_learned():
    batch = micro_batch(rows_of("ta")).sequences
    assert batch.num_targets == 59 + 4 and batch.num_text_targets == 59
    assert batch.target_mask.sum(1).tolist() == [59, 4] and batch.target_mask[1].nonzero()[:, 0].tolist() == [48, 49, 50, 51]
    assert batch.text_lengths.tolist() == [60, 0]
    text = micro_batch(rows_of("tt")).sequences
    assert text.answer_starts is None and text.num_text_targets == text.num_targets == 59 + 52
    packed = micro_batch(rows_of("ta", packed=True)).sequences
    assert torch.equal(packed.target_mask, batch.target_mask) and packed.columns["dataset_source"] == ["text", "qa"]


@pytest.mark.parametrize("settings", METHODS)
def test_the_loss_is_that_of_the_text_and_of_the_answers_tokens(settings):
    """Summed: the text's own loss, and the cross-entropy of the answers' tokens computed by hand."""
    args = ReFINEConfig(output_dir="x", use_cpu=True, report_to="none", **{**BASE, **settings})
    model = build("delta_net", dtype=torch.float64)
    phase = (NextToken if args.objective == "ntp" else NextSequence)(args.nsp)
    losses = []
    for kinds in ("ttaa", "tt"):
        batch = micro_batch(rows_of(kinds))
        phase.prepare(lambda step: step(model), [batch])
        batch.totals = {"targets": 1.0, "policy": 1.0}
        loss, metrics = phase.loss(model, batch)
        losses.append((loss, metrics, phase.count(batch)))
    (mixed, mixed_metrics, mixed_count), (text, text_metrics, text_count) = losses
    answers = 0.0
    for row in [*rows_of("ttaa")][2:]:
        ids = torch.tensor([row["input_ids"]])
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        nll = -log_p.gather(-1, ids[0, 1:, None])[:, 0]
        answers = answers + nll[row["answer_start"] - 1 :].sum()
    assert float(mixed - text) == pytest.approx(float(args.nsp.lambda_ntp * answers), rel=1e-9)
    assert mixed_count["targets"] == text_count["targets"] + 8 and mixed_count.get("policy") == text_count.get("policy")
    if "loss_policy" in text_metrics:
        assert float(mixed_metrics["loss_policy"]) == pytest.approx(float(text_metrics["loss_policy"]), rel=1e-9)


@pytest.mark.parametrize("settings", [*METHODS[:2], *(pytest.param(s, marks=pytest.mark.slow) for s in METHODS[2:])])
def test_1_batch_of_8_equals_8_of_1_and_resumes(tmp_path, settings):
    """Some batches are of answers alone."""
    rows = rows_of("tatttaattatattat")
    big = trainer(tmp_path / "a", per_device_train_batch_size=8, train_dataset=rows, **settings)
    small = trainer(
        tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, train_dataset=rows, save_strategy="steps",
        save_steps=1, **settings,
    )  # fmt: skip
    big.train()
    small.train()
    assert_close(weights(big), weights(small))
    again = trainer(tmp_path / "c", per_device_train_batch_size=1, gradient_accumulation_steps=8, train_dataset=rows, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))
    assert_close(weights(again), weights(small), atol=1e-12)


def test_scores_made_beforehand_weigh_the_text_alone(tmp_path):
    rows = rows_of("tatttaat")
    online, cached = (
        trainer(tmp_path / name, context_scores=name, max_steps=1, train_dataset=rows, **CLOSED) for name in ("online", "cached")
    )
    online.train()
    cached.train()
    assert_close(weights(online), weights(cached), atol=1e-12)


@pytest.fixture(scope="module")
def tokenizer():
    return refine_nsp.load("refine-nsp/tiny-delta-net")[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [{"text": f"document {i}: " + " ".join(str(i * j) for j in range(40 + i))} for i in range(40)]
    answers = [{"prompt": f"What is {i} and {i}?" + " Say." * (i % 9), "answers": [str(2 * i), "no"]} for i in range(30)]
    for name, rows in (("texts", texts), ("qa", answers)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "texts.jsonl"), str(folder / "qa.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_answers_have_their_share_of_tokens(files, tokenizer, streaming, packing):
    texts, qa = files
    kept = {"streaming": True} if streaming else {"validation_fraction": 0.1}
    arguments = DataArguments(
        dataset_name=texts, answer_dataset=qa, answer_share=0.25, max_answer_tokens=8, dataset_stopping="all_exhausted",
        packing=packing, **kept,
    )  # fmt: skip
    train, held = prepare_data(arguments, tokenizer, 64, 16)
    rows = list(train)
    names = [row["dataset_source"][0] if packing else row["dataset_source"] for row in rows]
    tokens = {name: sum(len(r["input_ids"]) for r, n in zip(rows, names, strict=True) if n == name) for name in ("texts", "qa")}
    assert tokens["qa"] / sum(tokens.values()) == pytest.approx(0.25, abs=64 / sum(tokens.values()))
    for row, name in zip(rows, names, strict=True):
        starts = row["answer_start"] if packing else [row["answer_start"]]
        if name == "texts":
            assert starts is None or not any(starts)
        else:
            prompt, answer = (tokenizer.decode(row["input_ids"][a:b]) for a, b in ((0, starts[0]), (starts[0], None)))
            number = int(prompt.split()[2])
            assert answer.strip().removesuffix(tokenizer.eos_token) == str(2 * number)
    assert held is None if streaming else set(held) == {"texts", "qa"} and held["qa"][0]["answer_start"] > 0
    batch = to_batch(collate(rows[:8]), torch.device("cpu"))
    assert isinstance(batch, Batch) and sum(batch.text_lengths > 0) == sum(n == "texts" for n in batch.columns["dataset_source"])


def test_answers_stand_between_documents_in_lanes(tmp_path, files, tokenizer):
    """Each is a document of its own: it starts from nothing, and what it leaves is left out."""
    texts, qa = files
    arguments = DataArguments(
        dataset_name=texts, answer_dataset=qa, answer_share=0.25, max_answer_tokens=8, dataset_stopping="all_exhausted"
    )
    train, held = prepare_data(arguments, tokenizer, 32, 16, carried=True)
    answers = [row for row in train if row["dataset_source"] == "qa"]
    assert all(row["begins"] and row["answer_start"] for row in answers) and set(held) == {"texts", "qa"}
    tokens = [sum(len(row["input_ids"]) for row in rows) for rows in (answers, train)]
    assert tokens[0] / tokens[1] == pytest.approx(0.25, abs=0.05)
    rows = train.map(lambda row: {"input_ids": [token % 64 for token in row["input_ids"]]})
    t = trainer(tmp_path, train_dataset=rows, carry_states=True, max_length=32, max_steps=4, objective="ntp")
    seen, original = [], t.compute_loss
    t.compute_loss = lambda model, inputs, *a, **k: (seen.append(inputs["batch"].sequences), original(model, inputs, *a, **k))[1]
    t.train()
    places = [
        (s, int(n), int(m)) for b in seen for s, n, m in zip(b.columns["dataset_source"], b.consumed, b.text_lengths, strict=True)
    ]
    assert {n for s, n, _ in places if s == "qa"} == {0} and max(n for _, n, _ in places) > 30
    assert {m for s, _, m in places if s == "qa"} == {0} and 0 not in {m for s, _, m in places if s == "texts"}


def test_answers_are_validated_on_their_tokens(tmp_path):
    rows, tail = rows_of("aaaa"), 4
    t = trainer(tmp_path, eval_dataset={"qa": rows, "text": rows_of("tt")})
    figures = t.evaluate()
    nll = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        nll.append(-t.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-tail:])
    assert figures["eval_qa_loss"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-9)
    assert "eval_text_loss" in figures


def test_totals_count_every_answer_once():
    phase = NextToken(ReFINEConfig(output_dir="x", use_cpu=True, objective="ntp").nsp)
    batches = [micro_batch(rows_of("ta")), micro_batch(rows_of("tt"))]
    set_totals(phase, batches, None, 1, torch.device("cpu"))
    assert batches[0].totals == batches[1].totals == {"targets": 59 + 4 + 59 + 52}


def test_bad_input_is_named(files):
    texts, qa = files
    for settings, said in [
        ({"answer_dataset": qa}, "needs answer_share"),
        ({"answer_dataset": qa, "answer_share": 0.0}, "answer_share=0: expected a share of all tokens above 0 and below 1"),
        ({"answer_dataset": qa, "answer_share": 1.0}, "answer_share=1: expected"),
        ({"answer_share": 0.5}, "nothing reads answer_share=0.5 (it needs answer_dataset)"),
        ({"max_answer_tokens": 5}, "nothing reads max_answer_tokens=5 (it needs answer_dataset)"),
    ]:
        with pytest.raises(RefineError) as refused:
            DataArguments(dataset_name=texts, **settings)
        assert said in str(refused.value)


def test_an_answer_set_without_answers_is_named(files, tokenizer):
    with pytest.raises(RefineError, match=r"texts\.jsonl"):
        prepare_data(DataArguments(dataset_name=files[0], answer_dataset=files[0], answer_share=0.1), tokenizer, 128, 16)
