"""Mixtures: shares of tokens that are the weights at every place, in files and streams, resumed exactly; and every kind of bad input."""

import json
import random
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

import refine_nsp
from refine_nsp.cli import main
from refine_nsp.commands import midtrain
from refine_nsp.errors import RefineError
from refine_nsp.report.card import curves, figures
from refine_nsp.report.runs import read_run, summary_table
from refine_nsp.training import DataArguments, prepare_data
from refine_nsp.training.mixture import labels_of, mix_order
from refine_nsp.training.row_order import documents_of
from refine_nsp.training.sources import sources_of
from refine_nsp.training.stream import Stream
from tests.training.test_stream import take
from tests.training.test_trainer import assert_close, trainer, weights

WEIGHTS = [0.6, 0.3, 0.1]
WORDS = {"code": (4, 6), "web": (8, 30), "books": (300, 500)}  # the words of a document, from and to: very different lengths
DOCUMENTS = {"code": 300, "web": 80, "books": 6}


@pytest.fixture(scope="module")
def tokenizer():
    return refine_nsp.load("refine-nsp/tiny-delta-net")[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Three files of documents of very different lengths; the last has its text in a column of its own."""
    folder, draw = tmp_path_factory.mktemp("sources"), random.Random(0)
    made = []
    for name, (low, high) in WORDS.items():
        rows = [
            {
                "body" if name == "books" else "text": f"{name} {i}: "
                + " ".join(f"alpha {draw.randint(0, 9999)}" for _ in range(draw.randint(low, high)))
            }
            for i in range(DOCUMENTS[name])
        ]
        made.append(folder / f"{name}.jsonl")
        made[-1].write_text("\n".join(map(json.dumps, rows)))
    return [str(path) for path in made]


def mixed(names, tokenizer, held=0.0, **settings):
    usual = {"dataset_weights": WEIGHTS, "text_column": ["text", "text", "body"]}
    if not settings.get("streaming"):
        usual["validation_fraction"] = held
    return prepare_data(DataArguments(dataset_name=names, **{**usual, **settings}), tokenizer, 64, 16)


def shares(rows):
    counts = dict.fromkeys(WORDS, 0)
    for row in rows:
        lengths = row["lengths"] if "lengths" in row else [len(row["input_ids"])]
        for source, n in zip(row["dataset_source"] if "lengths" in row else [row["dataset_source"]], lengths, strict=True):
            counts[source] += n
    return [counts[name] / sum(counts.values()) for name in WORDS]


def test_shares_are_the_weights_to_within_a_window_at_every_place():
    draw = random.Random(1)
    lengths = [[draw.randint(2, 9) for _ in range(900)], [draw.randint(50, 64) for _ in range(40)], [64] * 9]
    made = mix_order(lengths, WEIGHTS, "all_exhausted", seed=0)
    flat = [(i, n) for i, own in enumerate(lengths) for n in own]
    given = [0, 0, 0]
    for index in made.order:
        source, n = flat[index]
        given[source] += n
        assert all(-128 <= own - w * sum(given) <= 64 for own, w in zip(given, WEIGHTS, strict=True))
    assert given == made.tokens and set(made.order) == set(range(len(flat)))  # each window of each source, at least once
    first = mix_order(lengths, WEIGHTS, "first_exhausted", seed=0)
    assert len(set(first.order)) == len(first.order) and first.order == made.order[: len(first.order)]
    assert first.given[first.last] == len(lengths[first.last])
    assert mix_order(lengths, WEIGHTS, "first_exhausted", seed=1).order != first.order


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
def test_sources_of_very_different_lengths_are_mixed_by_tokens(names, tokenizer, packing, streaming, stopping):
    with pytest.warns(UserWarning, match=f"mixture: code .*of tokens.*dataset_stopping={stopping}"):
        train, _ = mixed(names, tokenizer, packing=packing, streaming=streaming, dataset_stopping=stopping)
    rows = list(train)
    assert shares(rows) == pytest.approx(WEIGHTS, abs=128 / sum(len(row["input_ids"]) for row in rows))
    again = list(mixed(names, tokenizer, packing=packing, streaming=streaming, dataset_stopping=stopping)[0])
    assert again == rows
    documents = {tuple(row["input_ids"]) for row in rows}
    assert (len(documents) == len(rows)) == (stopping == "first_exhausted")


def test_one_name_is_what_it_was_and_names_without_weights_are_all_read(names, tokenizer):
    arguments = {"validation_fraction": 0.1}
    one, other = (prepare_data(DataArguments(dataset_name=n, **arguments), tokenizer, 64, 16) for n in (names[0], [names[0]]))
    assert one[0]["input_ids"][:] == other[0]["input_ids"][:] and isinstance(other[1], Dataset)
    assert one[0].column_names == ["input_ids"]
    with pytest.warns(UserWarning, match="every window once"):
        train, held = mixed(names, tokenizer, held=0.1, dataset_weights=None)
    assert set(held) == set(WORDS) and set(train["dataset_source"]) == set(WORDS)
    assert len({tuple(x) for x in train["input_ids"]}) == len(train)


def test_names_in_logs_differ():
    assert labels_of(["a/web.jsonl.gz", "org/web-edu", "texts/*.txt"]) == ["web", "web-edu", "data"]
    assert labels_of(["/x/a/train.jsonl", "/x/b/train.jsonl"]) == ["a_train", "b_train"]
    assert labels_of(["a.txt", "a.json"]) == ["a_1", "a_2"]


@pytest.mark.parametrize("stopping", ["first_exhausted", pytest.param("all_exhausted", marks=pytest.mark.slow)])
def test_a_streamed_mixture_goes_on_at_every_place(tmp_path, names, tokenizer, stopping):
    """Also in its second epoch, and behind sources that began again."""

    def stream(keep):
        return Stream(mixed(names, tokenizer, streaming=True, dataset_stopping=stopping)[0], every=7, keep=keep)

    once = len(list(mixed(names, tokenizer, streaming=True, dataset_stopping=stopping)[0]))
    whole = stream(10_000)
    count = once * 3 // 2
    rows = take(whole, count)
    assert rows[once:] == rows[: count - once]
    for row in range(7, count - 6, 7 * (count // 60)):
        whole.save(tmp_path, row)
        again = stream(2)
        assert again.load(tmp_path)
        assert take(again, min(40, count - row)) == rows[row : row + 40]
    other = Stream(mixed(names, tokenizer, streaming=True, dataset_weights=[0.5, 0.4, 0.1], dataset_stopping=stopping)[0], 7, 2)
    other.load(tmp_path)
    with pytest.raises(RefineError, match=r"place is in a mixture of code 0.6, web 0.3, books 0.1.*this one is of code 0.5"):
        take(other, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one_and_logs_its_sources(tmp_path, names, tokenizer, streaming):
    more = {"validation_dataset": names[:2]} if streaming else {"held": 0.1}
    more["text_column"] = ["text", "text", "body"]
    settings = {"max_steps": 6, "objective": "ntp", "per_device_train_batch_size": 8}

    def run(folder, **kept):
        train, held = mixed(names, tokenizer, streaming=streaming, validation_windows=2, **more)
        return trainer(folder, train_dataset=small(train), eval_dataset=small(held), **settings, **kept)

    straight = run(tmp_path / "a", save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=3)
    straight.train()
    again = run(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert_close(weights(again), weights(straight), atol=1e-12)
    logged = [m for m in straight.state.log_history if "source_share_code" in m]
    assert len(logged) == 6 and all(
        sum(v for k, v in m.items() if k.startswith("source_share_")) == pytest.approx(1) for m in logged
    )
    run = read_run(tmp_path / "a")
    table = summary_table([run]).html()
    assert "loss (validation, web)" in figures(run).markdown() and "loss (validation, code)" in str(curves(run))
    assert "loss (validation, code)" in table and "loss (validation, web)" in table and "share of tokens: code" in table
    assert ("loss (validation, books)" in table) != streaming


def small(rows):
    """Rows with the few tokens that tiny models have."""
    if rows is None or isinstance(rows, dict):
        return rows and {name: small(own) for name, own in rows.items()}
    return rows.map(lambda row: {"input_ids": [token % 64 for token in row["input_ids"]]})


BAD = [
    ({"dataset_weights": [0.5, 0.5]}, "dataset_weights has 2 weights (0.5 0.5) for 3 names"),
    ({"dataset_weights": [0.5, 0.5, 0.5]}, "sum to 1.5; expected 1, for example 0.3333 0.3333 0.3333"),
    ({"dataset_weights": [0.5, 0.7, -0.2]}, "expected shares above 0"),
    ({"dataset_weights": [0.5, 0.5, 0.0]}, "expected shares above 0"),
    ({"text_column": ["text", "body"]}, "text_column has 2 values for 3 names"),
    ({"dataset_weights": None, "streaming": True}, "give the share of each with dataset_weights"),
    ({"text_column": "text"}, "has no column 'text'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), BAD)
def test_bad_input_is_named_in_one_line(names, tokenizer, settings, said):
    with pytest.raises(RefineError) as refused:
        mixed(names, tokenizer, **settings)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_without_a_window_is_named(tmp_path, names, tokenizer, streaming):
    empty = tmp_path / "short.jsonl"
    empty.write_text(json.dumps({"text": "a"}))
    with pytest.raises(RefineError, match="short"):
        list(mixed([names[0], str(empty)], tokenizer, streaming=streaming, dataset_weights=[0.5, 0.5], text_column="text")[0])
    with pytest.raises(RefineError, match="twice"):
        DataArguments(dataset_name=[names[0], names[0]])
    two = DataArguments(dataset_name=["org/web", "org/web"], dataset_config=["en", "fr"], dataset_weights=[0.5, 0.5])
    assert [source.label for source in sources_of(two)] == ["web_1", "web_2"]
    with pytest.raises(RefineError, match=r"dataset_weights=\[1.0\] \(it needs several names"):
        DataArguments(dataset_name=names[0], dataset_weights=[1.0])


def test_the_command_line_takes_names_and_weights(names):
    _, (_, data, _) = midtrain.COMMAND.call(["--dataset_name", *names, "--dataset_weights", ".6", ".3", ".1", "--use_cpu"])
    assert data.dataset_name == names and data.dataset_weights == WEIGHTS
    _, (_, data, _) = midtrain.COMMAND.call(["--dataset_name", names[0], "--use_cpu"])
    assert data.names == names[:1]


def test_states_are_carried_through_a_mixture_of_documents(tmp_path, names, tokenizer):
    def data(**settings):
        return prepare_data(
            DataArguments(dataset_name=names, text_column=["text", "text", "body"], **settings), tokenizer, 64, 16, carried=True
        )

    train, held = data(dataset_weights=WEIGHTS)
    parts = documents_of(train["begins"][:])
    assert all(len({train[i]["dataset_source"] for i in rows}) == 1 for rows in parts) and max(map(len, parts)) > 20
    longest = max(sum(len(train[i]["input_ids"]) for i in rows) for rows in parts)
    tokens = sum(map(len, train["input_ids"]))
    assert shares(train) == pytest.approx(WEIGHTS, abs=longest / tokens) and set(held) == set(WORDS)
    apart = {len(documents_of(rows["begins"][:])) for rows in held.values()}
    assert apart == {15, 4, 1}  # a twentieth of each source's documents, with all of their windows, but for the cut at 64
    everything, _ = data(dataset_weights=None)
    assert [sum(s == name for s in everything["dataset_source"]) > 0 for name in WORDS] == [True] * 3
    t = trainer(tmp_path, train_dataset=small(train), carry_states=True, max_length=64, objective="ntp", max_steps=3)
    t.train()
    assert sum(v for k, v in t.state.log_history[0].items() if k.startswith("source_share_")) == pytest.approx(1)
    with pytest.raises(RefineError, match="a streamed mixture deals out single windows"):
        data(dataset_weights=WEIGHTS, streaming=True)


def test_a_stream_stays_one(names, tokenizer):
    assert isinstance(mixed(names, tokenizer, streaming=True)[0], IterableDataset)


@pytest.mark.slow
def test_the_recipe_of_a_mixture_runs(tmp_path, monkeypatch, names):
    """From documents to the report, only smaller."""
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "mixture.yaml"
    monkeypatch.chdir(tmp_path)
    columns = {"code": "text", "web": "text", "books": "body"}
    for path in map(Path, names):
        rows = Dataset.from_json(str(path)).rename_columns({columns[path.stem]: "text"} if path.stem == "books" else {})
        rows.select(range(min(len(rows), 4 if path.stem == "books" else 40))).to_json(f"{path.stem}.jsonl")
        words = ["--output", f"my_{path.stem}.parquet", "--max_length", "256", "--local_window", "16"]
        assert main(["score", f"{path.stem}.jsonl", "refine-nsp/tiny-delta-net", *words]) == 0
    answers = [{"prompt": f"What is {i} and {i}?", "answers": [str(2 * i)]} for i in range(40)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, answers)))
    small = "--max_steps 2 --max_length 128 --local_window 8 --eval_steps 1 --logging_steps 1 --validation_windows 2 --use_cpu".split()
    assert main(["midtrain", "--config", str(recipe), "--output_dir", "run", "--save_strategy", "no", *small]) == 0
    page = Path("run/report.html").read_text()
    assert all(f"loss (validation, {name})" in page for name in ("my_code", "my_web", "my_books", "prompts"))
