"""Streamed text: gone on with at the exact document, without reading again what was read, and by several processes alike."""

import json

import pytest

import refine_nsp
from refine_nsp.training import DataArguments, prepare_data
from refine_nsp.training.checkpoints import Checkpoint
from refine_nsp.training.stream import STREAM_FILE, Stream
from tests.training.test_trainer import assert_close, trainer, weights

TEXTS = [f"document {i}: " + "alpha beta gamma delta " * (20 + 5 * (i % 7)) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return refine_nsp.load("refine-nsp/tiny-delta-net")[1]


class Counting:
    """A tokenizer that counts documents, and knows no token that a tiny model does not."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.documents = tokenizer, 0

    def __call__(self, texts, **options):
        self.documents += len(texts)
        return {"input_ids": [[token % 64 for token in ids] for ids in self.tokenizer(texts, **options)["input_ids"]]}


def streamed(folder, tokenizer, packing=False):
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    return prepare_data(DataArguments(dataset_name=str(path), streaming=True, packing=packing), tokenizer, 64, 26)[0]


def take(stream, count):
    rows = iter(stream)
    return [next(rows)["input_ids"] for _ in range(count)]


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_goes_on_at_every_place(tmp_path, tokenizer, packing):
    """Also in its second and third epoch."""
    once = [row["input_ids"] for row in streamed(tmp_path, tokenizer, packing)]
    whole = Stream(streamed(tmp_path, tokenizer, packing), every=7, keep=100)
    count = len(once) * 5 // 2
    rows = take(whole, count)
    assert rows == (once * 3)[:count]
    for row in range(7, count - 6, 35):
        whole.save(tmp_path, row)
        again = Stream(streamed(tmp_path, tokenizer, packing), every=7, keep=2)
        assert again.load(tmp_path)
        assert take(again, count - row) == rows[row:]
    assert take(again, 20) == rows[:20]  # without a place, from the beginning


@pytest.mark.parametrize("after", [False, True])
def test_a_shuffled_stream_goes_on_in_its_order(tmp_path, tokenizer, after):
    """Shuffled before or after something else is done to the rows, in every epoch another way."""

    def rows_of(**kept):
        data = streamed(tmp_path, tokenizer)
        data = data.shuffle(seed=3, buffer_size=9)
        return Stream(data.map(lambda row: {"sum": sum(row["input_ids"])}) if after else data, every=4, **kept)

    count = 2 * len(list(streamed(tmp_path, tokenizer))) + 9
    whole = rows_of(keep=1000)
    rows = take(whole, count)
    assert rows[: count // 2] != rows[count // 2 :][: count // 2]
    for row in range(4, count - 3, 28):
        whole.save(tmp_path, row)
        again = rows_of(keep=2)
        assert again.load(tmp_path)
        assert take(again, count - row) == rows[row:]


@pytest.mark.parametrize(
    ("settings", "stop", "reads_less"),
    [
        ({"objective": "ntp", "per_device_train_batch_size": 8, "max_steps": 24}, 21, 16),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 4}, 3, 0),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_and_reads_on(tmp_path, tokenizer, settings, stop, reads_less):
    straight_reads, resumed_reads = Counting(tokenizer), Counting(tokenizer)
    saves = {"save_strategy": "steps", "save_steps": stop}
    straight = trainer(tmp_path / "a", train_dataset=streamed(tmp_path, straight_reads), **saves, **settings)
    straight.train()
    again = trainer(tmp_path / "b", train_dataset=streamed(tmp_path, resumed_reads), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert_close(weights(again), weights(straight), atol=1e-12)
    assert again.state.global_step == settings["max_steps"] and not again.args.ignore_data_skip
    assert resumed_reads.documents <= straight_reads.documents - reads_less


def test_what_streaming_cannot_do_is_named(tmp_path, tokenizer):
    data = streamed(tmp_path, tokenizer)
    with pytest.raises(refine_nsp.RefineError, match="set max_steps"):
        trainer(tmp_path, train_dataset=data, max_steps=-1)
    with pytest.raises(refine_nsp.RefineError, match="dataloader_num_workers=2"):
        trainer(tmp_path, train_dataset=data, dataloader_num_workers=2)
    with pytest.raises(refine_nsp.RefineError, match="no document that is long enough"):
        take(Stream(data.filter(lambda row: False), every=1, keep=1), 1)


def test_a_checkpoint_without_a_place_is_skipped_to(tmp_path, tokenizer):
    run = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    straight = trainer(tmp_path / "a", train_dataset=streamed(tmp_path, Counting(tokenizer)), **run)
    straight.train()
    (tmp_path / "a" / "checkpoint-2" / STREAM_FILE).unlink()
    Checkpoint(tmp_path / "a" / "checkpoint-2").seal()  # of a run that kept no places, and not one that lost a file
    again = trainer(tmp_path / "b", train_dataset=streamed(tmp_path, Counting(tokenizer)), **run)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_close(weights(again), weights(straight), atol=1e-12)
