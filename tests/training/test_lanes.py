"""Lanes: which window stands where follows from the seed alone, and what lanes keep makes training see whole documents."""

import json
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import Batch
from refine_nsp.training import ReFINEConfig, scores
from refine_nsp.training.data import in_windows
from refine_nsp.training.lane_states import LANES_FILE
from refine_nsp.training.phases import NextToken
from refine_nsp.training.row_order import LaneOrder, documents_of
from refine_nsp.training.stream import LaneStream
from tests.models.families import build
from tests.models.transformers_models import float64_throughout
from tests.training.test_trainer import assert_close, trainer, weights

LENGTHS = [90, 33, 61, 120, 47, 75, 20, 101, 64, 88]  # tokens of documents; windows are of 25
CARRIED = {"carry_states": True, "max_length": 25}
KINDS = {
    "ntp": {"objective": "ntp"},
    "rollouts": {"num_generations": 2, "lambda_rl": 1.0, "carry_between_documents": 0.5},
    "several steps": {"steps_per_generation": 2, "schedule": "snapshot", "lambda_rl": 1.0},
    "closed form": {"preset": "expected", "rollout_length": 2, "local_window": 8, "reward_funcs": "prefix_match"},
}


def books(lengths=LENGTHS) -> Dataset:
    g = torch.Generator().manual_seed(5)
    return Dataset.from_list([{"input_ids": torch.randint(0, 64, (n,), generator=g).tolist()} for n in lengths])


def carrying(folder: Path, lengths=LENGTHS, **settings):
    settings = {"train_dataset": books(lengths), "per_device_train_batch_size": 4, "max_steps": 6, **CARRIED, **settings}
    return trainer(folder, **settings)


# --- which window stands where ----------------------------------------------------------------------------------------
def test_each_lane_reads_documents_window_by_window():
    windows = in_windows(books(), 25, 9)
    begins = windows["begins"][:]
    documents = documents_of(begins)
    order = LaneOrder(begins, 4, seed=3, shuffled=True)
    rows = []
    for epoch in range(6):
        order.set_epoch(epoch)
        rows += list(order)
        assert len(order) == len(list(order)) and len(order) % 4 == 0 and 0 <= len(order) - len(begins) < 4
    first = {d[0]: d for d in documents}
    read = []
    for lane in range(4):
        own = rows[lane::4]
        while own:
            document = list(first[own[0]])
            assert own[: len(document)] == document[: len(own)]
            read.append(own[0])
            own = own[len(document) :]
    assert set(read) == set(first)
    times = [read.count(d) for d in first]
    assert max(times) - min(times) <= 2  # every document is read before any is again, but for what lanes are at
    again = LaneOrder(begins, 4, seed=3, shuffled=True)
    again.set_epoch(2)
    assert list(again) == rows[2 * len(order) : 3 * len(order)]
    assert list(LaneOrder(begins, 4, seed=4, shuffled=True)) != rows[: len(order)]


def test_windows_share_a_token_and_short_documents_are_left_out():
    windows = in_windows(books([60, 8, 49]), 25, 9)
    assert [len(w) for w in windows["input_ids"]] == [25, 25, 12, 25, 25]
    assert windows["begins"][:] == [True, False, False, True, False]
    assert windows[0]["input_ids"][-1] == windows[1]["input_ids"][0]
    with pytest.raises(RefineError, match="packed rows hold several"):
        in_windows(Dataset.from_list([{"input_ids": [1, 2], "lengths": [1, 1]}]), 25, 2)


# --- training ---------------------------------------------------------------------------------------------------------
def document_loss(ids: list[int]) -> float:
    """The summed cross-entropy of a document in one pass by the model as it is."""
    batch, model = Batch.of(torch.tensor([ids])), build("delta_net").train()
    return float(next_token_loss(model, run_hidden(model, batch, NSPConfig()), batch, 1.0)[0].detach())


def test_a_lane_reads_its_document_as_one(tmp_path):
    settings = {"objective": "ntp", "learning_rate": 0.0, "weight_decay": 0.0, "train_sampling_strategy": "sequential"}
    t = carrying(tmp_path, [97, 73], per_device_train_batch_size=1, max_steps=7, gradient_accumulation_steps=1, **settings)
    t.train()
    losses = [24 * entry["loss_ntp"] for entry in t.state.log_history if "loss_ntp" in entry]
    first, second = books([97, 73])["input_ids"]
    assert sum(losses[:4]) == pytest.approx(document_loss(first), rel=1e-6)
    assert sum(losses[4:]) == pytest.approx(document_loss(second), rel=1e-6)
    passed = carrying(
        tmp_path / "b", [97, 73], per_device_train_batch_size=1, max_steps=7, carry_between_documents=1.0, **settings
    )
    passed.train()
    losses = [24 * entry["loss_ntp"] for entry in passed.state.log_history if "loss_ntp" in entry]
    both = document_loss(first[:-1] + second) - document_loss(first[:-1] + second[:1])
    assert sum(losses[4:]) == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k != "closed form" else k for k in KINDS])
def test_one_batch_of_4_equals_4_batches_of_1(tmp_path, kind):
    big = carrying(tmp_path / "a", **KINDS[kind])
    small = carrying(
        tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, segment_tokens=10, **KINDS[kind]
    )
    big.train()
    small.train()
    assert_close(weights(big), weights(small))


@pytest.mark.parametrize(("kind", "streamed"), [
    ("several steps", False),
    ("closed form", True),
    pytest.param("several steps", True, marks=pytest.mark.slow),
    pytest.param("closed form", False, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, streamed):
    def data() -> Dataset:
        windows = in_windows(books(), 25, 9)
        return windows.to_iterable_dataset() if streamed else windows

    straight = carrying(tmp_path / "a", train_dataset=data(), **KINDS[kind])
    straight.train()
    carrying(tmp_path / "b", train_dataset=data(), save_strategy="steps", save_steps=1, **KINDS[kind]).train()
    for step in (4, 5, 6):
        (tmp_path / "b" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert load_file(tmp_path / "b" / "checkpoint-3" / LANES_FILE.format(0))
    again = carrying(tmp_path / "b", train_dataset=data(), **KINDS[kind])
    with pytest.warns(UserWarning, match="not complete"):
        again.train(resume_from_checkpoint=True)
    assert all(torch.equal(x, weights(straight)[name]) for name, x in weights(again).items())


def test_documents_go_on_from_epoch_to_epoch_and_when_resumed(tmp_path):
    windows = in_windows(books([90, 61, 120]), 25, 9)  # 12 windows: 6 turns of two lanes, which end in the middle of documents
    settings = dict(train_dataset=windows, objective="ntp", per_device_train_batch_size=2, max_steps=16, num_train_epochs=3)

    def read(folder: str, resume: bool = False, **more):
        t, seen = carrying(tmp_path / folder, **settings, **more), []
        original = t.compute_loss
        t.compute_loss = lambda model, inputs, *a, **k: (seen.append(inputs["batch"]), original(model, inputs, *a, **k))[1]
        t.train(resume_from_checkpoint=resume)
        return t, seen

    straight, seen = read("a", save_strategy="steps", save_steps=9)
    order, expected = LaneOrder(windows["begins"][:], 2, 42, shuffled=True), []
    for epoch in range(3):
        order.set_epoch(epoch)
        expected += [windows[i] for i in order]
    assert [ids for batch in seen for ids in batch.input_ids.tolist()] == [
        row["input_ids"] + [0] * (max(len(expected[i // 2 * 2 + j]["input_ids"]) for j in (0, 1)) - len(row["input_ids"]))
        for i, row in enumerate(expected[:32])
    ]
    for i, row in enumerate(expected[2:32]):  # every window but the first of a document goes on from what its lane read before
        consumed = int(seen[(i + 2) // 2].sequences.consumed[i % 2])
        assert (consumed == 0) == row["begins"]
    (tmp_path / "a" / "checkpoint-16").rename(tmp_path / "last")
    again, late = read("a", resume=True)
    assert len(late) == 7 and all(torch.equal(x, weights(straight)[name]) for name, x in weights(again).items())


def test_streamed_text_is_read_as_a_dataset_in_order(tmp_path):
    windows = in_windows(books(), 25, 9)
    whole = carrying(tmp_path / "a", train_dataset=windows, train_sampling_strategy="sequential")
    streamed = carrying(tmp_path / "b", train_dataset=windows.to_iterable_dataset())
    order = LaneOrder(windows["begins"][:], 4, 0, shuffled=False)
    assert [row["input_ids"] for row in islice(iter(streamed.train_dataset), 24)] == [
        windows[i]["input_ids"] for i in islice(order, 24)
    ]
    whole.train()
    streamed.train()
    assert_close(weights(whole), weights(streamed), 0.0)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_stream_goes_on_in_its_lanes_at_every_place(tmp_path, shuffled):
    """Also in later epochs; only the documents that lanes were in the middle of are read again."""
    path, read, many = tmp_path / "books.jsonl", [], books(LENGTHS * 20)
    path.write_text("\n".join(map(json.dumps, many)))

    def stream(keep: int) -> LaneStream:
        data = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True, cache_dir=str(tmp_path))
        data = data.map(lambda row: (read.append(1), row)[1])
        return LaneStream(
            in_windows(data.shuffle(seed=3, buffer_size=3) if shuffled else data, 25, 9), 8, keep, 5
        )  # a step may end within a turn

    def take(rows: LaneStream, count: int) -> list:
        return [(row["input_ids"], row["begins"]) for row in islice(iter(rows), count)]

    whole = stream(1000)
    rows = take(whole, 840)  # an epoch has 620
    for row in (8, 320, 616, 744):
        whole.save(tmp_path, row)
        again = stream(2)
        read.clear()
        assert again.load(tmp_path)
        assert take(again, 48) == rows[row : row + 48]
        assert (
            shuffled or len(read) <= 6 * 2 * 16
        )  # a lane reads the batches of 16 that its document and the next one's beginning are in
        again.save(tmp_path, row + 40)
        last = stream(2)
        last.load(tmp_path)
        assert take(last, 40) == rows[row + 40 : row + 80]


def test_validation_sees_documents(tmp_path):
    figures = []
    for rows in (1, 3):
        t = carrying(tmp_path / str(rows), eval_dataset=books([60, 97, 20, 49]), per_device_eval_batch_size=rows)
        figures.append({k: v for k, v in t.evaluate().items() if "runtime" not in k})
    assert figures[0] == pytest.approx(figures[1], rel=1e-9)
    texts = books([60, 97, 20, 49])["input_ids"]
    expected = sum(map(document_loss, texts)) / sum(len(x) - 1 for x in texts)
    assert figures[0]["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_lane_that_is_not_finite_begins_anew(tmp_path):
    t = carrying(tmp_path, objective="ntp", max_steps=2)
    t.train()
    t.lanes.lanes[1].cache.layers[0]["recurrent"].fill_(float("nan"))
    broken = t.lanes.lanes[1]
    t.lanes.lanes[1] = type(broken)(broken.cache, broken.recent, torch.tensor(False))
    starts = t.lanes.starts((0, 1), torch.device("cpu"))
    assert starts.cache.lengths.tolist()[1] == 0 and starts.cache.lengths.tolist()[0] > 0
    assert all(x.isfinite().all() for layer in starts.cache.layers for x in layer.values())


def test_cached_scores_see_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(scores, "PART_ROWS", 2)
    data = books()
    t = carrying(tmp_path / "a", train_dataset=data, context_scores="cached", **KINDS["closed form"])
    rows, model = t.train_dataset, build("delta_net")
    documents = documents_of(rows["begins"][:])
    assert len(documents) == len(data)
    for document, ids in zip(documents, data["input_ids"], strict=True):
        batch = Batch.of(torch.tensor([ids]))
        with torch.no_grad():
            whole = context_divergence(model, batch, run_hidden(model, batch, t.nsp), t.nsp, gain=False)[0]
        for i, row in enumerate(document):
            d = torch.tensor(rows[row]["context_scores"], dtype=torch.float64)
            torch.testing.assert_close(d, whole[24 * i : 24 * i + len(d)], rtol=1e-9, atol=1e-12)
    assert scores.part_ends(9, [True, True, False, False, False, True, True, False, True]) == [5, 8, 9]
    t.train()


def test_fewer_documents_than_lanes_are_said(tmp_path):
    with pytest.warns(UserWarning, match="3 documents for 4 lanes"):
        carrying(tmp_path, [60, 60, 60], objective="ntp", max_steps=1).train()


# --- refused ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("settings", "words"), [
    ({"kl_coef": 0.1}, "leave kl_coef out"),
    ({"train_sampling_strategy": "group_by_length"}, "leave it out"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True would put"),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(tmp_path, settings, words):
    with pytest.raises(RefineError, match=words):
        ReFINEConfig(output_dir=str(tmp_path), carry_states=True, **settings)


def test_a_chance_without_carried_states_is_refused(tmp_path):
    with pytest.raises(RefineError, match=r"carry_between_documents=0.5"):
        ReFINEConfig(output_dir=str(tmp_path), carry_between_documents=0.5)


def test_attention_over_everything_is_refused(tmp_path):
    with pytest.raises(RefineError, match=r"llama .* attends over everything.*carried_keys"):
        trainer(tmp_path, "llama", train_dataset=books(), **CARRIED)


@pytest.mark.slow
def test_attention_over_everything_carries_a_bound_of_keys(tmp_path):
    def run(folder: str, **settings):
        more = {"train_dataset": books(), "carried_keys": 10, "objective": "ntp", "max_steps": 4, **CARRIED, **settings}
        return trainer(tmp_path / folder, "bamba", **more)

    with float64_throughout():
        straight = run("a")
        straight.train()
        run("b", save_strategy="steps", save_steps=2).train()
        (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").unlink()
        again = run("b")
        with pytest.warns(UserWarning, match="not complete"):
            again.train(resume_from_checkpoint=True)
        parts = run("c", per_device_train_batch_size=1, gradient_accumulation_steps=4, segment_tokens=10)
        parts.train()
    assert all(torch.equal(x, weights(straight)[name]) for name, x in weights(again).items())
    assert_close(weights(straight), weights(parts))
    held = [lane.cache for lane in straight.lanes.lanes.values()]
    assert all(cache.layers[1]["keys"].shape[2] <= 10 for cache in held) and max(int(cache.consumed) for cache in held) > 24


def test_a_phase_that_leaves_no_states_is_refused(tmp_path):
    class Own(NextToken):
        def loss(self, model, batch):
            loss = model(batch.input_ids, lengths=batch.lengths).logits.mean()
            return loss, {"loss_mean": loss.detach()}

    t = carrying(tmp_path, phase=Own(NSPConfig()))
    with pytest.raises(RefineError, match=r"Own.loss leaves no states"):
        t.train()


def test_lanes_of_a_checkpoint_that_are_missing_are_named(tmp_path):
    carrying(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    seal = json.loads((checkpoint / "sealed.json").read_text())
    del seal["crc32"][LANES_FILE.format(0)]
    (checkpoint / LANES_FILE.format(0)).unlink()
    (checkpoint / "sealed.json").write_text(json.dumps(seal))
    with pytest.raises(RefineError, match=r"has no lanes.process0.safetensors"):
        carrying(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
