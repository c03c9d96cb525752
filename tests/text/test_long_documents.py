"""The recipe for long documents, with a folder of this machine in the place of the hub."""

import gzip
import importlib.util
import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

import refine_nsp
from refine_nsp.errors import RefineError
from refine_nsp.text import reading

MODEL = "refine-nsp/tiny-delta-net"
LONG, SHORT = "alpha beta gamma delta " * 200, "short"


@pytest.fixture(scope="module")
def recipe():
    path = Path(__file__).resolve().parents[2] / "recipes" / "long_documents.py"
    spec = importlib.util.spec_from_file_location("long_documents", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokens_in(folder) -> list[list[int]]:
    return Dataset.from_parquet(str(folder / "tokens.parquet"))["input_ids"][:]


def windows(text: str, length: int) -> list[int]:
    ids = refine_nsp.load(MODEL)[1](text)["input_ids"]
    return ids[: len(ids) // length * length]


def test_the_recipe_reads_a_dataset_that_exists_by_default(tmp_path, monkeypatch, recipe):
    """Laid out as on the hub: shards of three splits in `data`, with a column `meta` of another shape in each."""
    for split, text in (("train", LONG), ("validation", "not this " * 900), ("test", "nor this " * 900)):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        for shard in range(2):
            rows = Dataset.from_dict(
                {"text": [SHORT, f"{shard} {text}"], "meta": [{"set": "books"}] * 2, "__index_level_0__": [0, 1]}
            )
            rows.to_parquet(tmp_path / "hub" / "data" / f"{split}-0000{shard}-of-00002-abcdef0123456789.parquet")
    (tmp_path / "hub" / "README.md").write_text("---\nlanguage: [en]\n---\n# A card")
    asked = []

    def of_the_hub(name, config, **options):
        asked.append(name)
        return datasets.load_dataset(str(tmp_path / "hub"), config, **options)

    monkeypatch.setattr(reading, "load_dataset", of_the_hub)
    recipe.main([MODEL, str(tmp_path / "out"), "--length", "64", "--tokens", "1e9"])
    assert asked == ["DKYoon/SlimPajama-6B"]
    assert tokens_in(tmp_path / "out") == [windows(f"{shard} {LONG}", 64) for shard in range(2)]


def test_the_recipe_reads_own_files_only_as_far_as_it_needs(tmp_path, recipe, capsys):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "meta": i}) + "\n" for i, text in enumerate([SHORT, None, LONG] * 100))
    (tmp_path / "b.txt").write_text(LONG)
    of_one = len(windows(LONG, 64))
    recipe.main(
        [
            MODEL,
            str(tmp_path / "out"),
            "--files",
            str(tmp_path / "a.jsonl.gz"),
            str(tmp_path / "b.txt"),
            "--length",
            "64",
            "--tokens",
            "100",
        ]
    )
    rows = tokens_in(tmp_path / "out")
    assert len(rows) == 64 + 1 and all(ids == windows(LONG, 64) for ids in rows)
    recipe.main([MODEL, str(tmp_path / "all"), "--files", str(tmp_path / "*.txt"), "--length", "64", "--tokens", "1e6"])
    assert len(tokens_in(tmp_path / "all")[0]) == of_one and "have no more documents of 64 tokens" in capsys.readouterr().out


def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch, recipe):
    (tmp_path / "b.txt").write_text(SHORT)
    with pytest.raises(RefineError, match="no document has 64 tokens"):
        recipe.main([MODEL, str(tmp_path / "out"), "--files", str(tmp_path / "b.txt"), "--length", "64"])
    assert not list((tmp_path / "out").iterdir())
    addresses = []

    def gone(kind, data_files, **options):
        addresses.append(data_files)
        raise FileNotFoundError("withdrawn")

    monkeypatch.setattr(recipe, "load_dataset", gone)
    with pytest.raises(RefineError, match="long-data-collections cannot be read: withdrawn; name another source"):
        recipe.main([MODEL, str(tmp_path / "out"), "--files", "long-data-collections"])
    assert addresses[0].endswith("Long-Data-Collections/pretrain/arxiv_doc_to_abs.jsonl.zst")
