"""Documents by what their context is worth: scores that are training's own, written whole, continued, and chosen by."""

import json

import datasets
import pytest
from datasets import Dataset

import refine_nsp
from refine_nsp.cli import main
from refine_nsp.commands import score as command
from refine_nsp.errors import RefineError
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.records import Batch
from refine_nsp.training import DataArguments, prepare_data, scores
from refine_nsp.training.data import cut_windows

MODEL = "refine-nsp/tiny-delta-net"
TEXTS = [
    "import os\n" * 5,
    *(f"{i}: " + "".join(f"name_{i * j} = {j * 77 + i};\n" for j in range(3 + 4 * i)) for i in range(4)),
    "",
]
FLAGS = ["--max_length", "48", "--local_window", "8"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(scores, "PART_ROWS", 4)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)))
    return path


def read(path) -> Dataset:
    return Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else Dataset.from_json(str(path))


def test_a_documents_score_is_the_mean_of_its_tokens(tmp_path, texts):
    model, tokenizer = refine_nsp.load(MODEL)
    config = command.ScoreArguments(data=str(texts), max_length=48, local_window=8).method
    expected = []
    for text in TEXTS:
        total, ids = 0.0, tokenizer(text)["input_ids"]
        for window in cut_windows(ids, 48, 1):
            batch = Batch.of(datasets.Dataset.from_dict({"x": [window]}).with_format("torch")["x"][:])
            total += float(context_divergence(model, batch, run_hidden(model, batch, config), config, False).sum())
        expected.append(total / len(ids) if ids else None)
    for name in ("scored.parquet", "scored.jsonl"):
        assert main(["score", str(texts), MODEL, "--output", str(tmp_path / name), *FLAGS]) == 0
        found = read(tmp_path / name)
        assert found.column_names == ["text", "id", "context_score", "num_tokens"] and found["text"][:] == TEXTS
        assert found["context_score"][:-1] == pytest.approx(expected[:-1], rel=1e-5) and found["context_score"][-1] is None
        assert found["num_tokens"][:] == [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_scoring_goes_on(tmp_path, texts, monkeypatch):
    rows, original = [], scores.scores_of

    def counted(row, *args):
        if len(rows) == counted.stop_at:
            raise RuntimeError("stopped")
        rows.append(row)
        return original(row, *args)

    counted.stop_at = 6
    monkeypatch.setattr(scores, "scores_of", counted)
    out = tmp_path / "scored.jsonl"
    with pytest.raises(RuntimeError):
        main(["score", str(texts), MODEL, "--output", str(out), *FLAGS, "--debug"])
    assert not out.exists()
    counted.stop_at = None
    assert main(["score", str(texts), MODEL, "--output", str(out), *FLAGS]) == 0
    windows = {json.dumps(row["input_ids"]) for row in rows}
    assert len(rows) == len(windows) + 2  # the part of four rows that was stopped in its third began again, and nothing else
    first = out.read_text()
    assert main(["score", str(texts), MODEL, "--output", str(out), *FLAGS]) == 0
    assert len(rows) == len(windows) + 2 and out.read_text() == first


@pytest.fixture
def scored(tmp_path):
    """Ten documents of 60 to 150 tokens, the later ones with the higher scores."""
    rows = [{"text": f"{i}: " + f"name_{i} " * 30, "context_score": i / 10, "num_tokens": 100 - 10 * i} for i in range(10)]
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def documents_of(rows, tokenizer) -> set[str]:
    return {text[0] for row in rows if ":" in (text := tokenizer.decode(row["input_ids"]))[:3]}


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_chosen_by_their_scores(scored, streaming):
    tokenizer = refine_nsp.load(MODEL)[1]
    kept = {"streaming": True} if streaming else {"validation_fraction": 0.0}
    train, _ = prepare_data(DataArguments(dataset_name=scored, min_context_score=0.65, **kept), tokenizer, 64, 16)
    assert documents_of(train, tokenizer) == {"7", "8", "9"} and train.column_names in (["input_ids"], None)
    if not streaming:
        # The best documents hold 10, 30, 60, ... of 550 tokens.
        with pytest.warns(UserWarning, match="3 of 10 documents are trained on, of context_score 0.7 or more"):
            train, _ = prepare_data(DataArguments(dataset_name=scored, context_score_share=0.1, **kept), tokenizer, 64, 16)
        assert documents_of(train, tokenizer) == {"7", "8", "9"}
        chosen = {"context_score_share": 0.1, "validation_fraction": 0.3, "split_seed": 1}
        _, held = prepare_data(DataArguments(dataset_name=scored, **chosen), tokenizer, 64, 16)
        _, whole = prepare_data(DataArguments(dataset_name=scored, validation_fraction=0.3, split_seed=1), tokenizer, 64, 16)
        assert held["input_ids"][:] == whole["input_ids"][:]  # validation is on the same documents, whatever is trained on


def test_bad_input_is_named(tmp_path, texts, scored, capsys):
    tokenizer = refine_nsp.load(MODEL)[1]

    def refused(said, name, **settings):
        with pytest.raises(RefineError) as error:
            prepare_data(DataArguments(dataset_name=name, **settings), tokenizer, 64, 16)
        assert said in str(error.value) and "\n" not in str(error.value)

    refused(
        f"{texts} has no column 'context_score', which min_context_score reads; `refine-nsp score",
        str(texts),
        min_context_score=0.1,
    )
    refused("no column 'context_score' and no 'num_tokens', which context_score_share", str(texts), context_score_share=0.5)
    refused("no document is left by min_context_score=2", scored, min_context_score=2.0)
    wrong = tmp_path / "wrong.csv"
    wrong.write_text('text,context_score,num_tokens\n"a text",high,3\n')
    refused("has 'high' where a document's score", str(wrong), min_context_score=0.1)
    refused("context_score_share=1.5: expected a share", scored, context_score_share=1.5)
    refused(
        "nothing reads context_score_share=0.5 (it needs no min_context_score)",
        scored,
        context_score_share=0.5,
        min_context_score=0.1,
    )
    refused("nothing reads context_score_share=0.5 (it needs streaming=False)", scored, context_score_share=0.5, streaming=True)
    for words, said in [
        ([str(texts), MODEL, "--output", str(texts)], "is the data itself"),
        ([str(texts), MODEL, "--output", "x.txt"], "expected a file that ends with .jsonl or .parquet"),
        ([str(texts), MODEL, "--max_length", "128"], "leaves no token to score"),
        ([scored, MODEL, "--output", str(tmp_path / "x.jsonl"), *FLAGS], "have a column 'context_score' already"),
        ([str(texts), MODEL, "--output", str(tmp_path / "x.jsonl"), "--text_column", "body", *FLAGS], "has no column 'body'"),
    ]:
        capsys.readouterr()
        assert main(["score", *words]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refine-nsp")]
        assert len(lines) == 1 and said in lines[0]
