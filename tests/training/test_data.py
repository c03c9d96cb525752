"""From files to windows: every format, the cutting rule, packing without leaks, a fixed split; and every kind of bad input by name."""

import json

import pytest
import torch
from datasets import Dataset

import refine_nsp
from refine_nsp.text import formats
from refine_nsp.text.reading import read_documents
from refine_nsp.training import data
from refine_nsp.training.data import DataArguments, collate, cut_windows, pack, split_documents
from refine_nsp.training.sources import prepare_data
from tests.models.families import FAMILY_NAMES, build

TEXTS = [f"document {i}: " + "alpha beta gamma delta " * (20 + 5 * i) for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return refine_nsp.load("refine-nsp/tiny-delta-net")[1]


def write(folder, kind: str):
    path = folder / f"texts.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    elif kind == "parquet":
        Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    elif kind == "arrow":
        Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        for i, t in enumerate(TEXTS):
            (path / f"{i:02d}.txt").write_text(t)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "folder"])
def test_every_format_gives_the_same_documents(tmp_path, kind):
    assert read_documents(str(write(tmp_path, kind)))["text"][:] == TEXTS


def test_globs_and_another_column(tmp_path):
    write(tmp_path, "folder")
    assert len(read_documents(str(tmp_path / "texts.folder" / "0*.txt"))) == 10
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "hello"}))
    assert read_documents(str(tmp_path / "a.jsonl"), ("body",))["body"][:] == ["hello"]


def test_windows():
    ids = list(range(25))
    assert cut_windows(ids, 10, 4) == [ids[:10], ids[10:20], ids[20:]]
    assert cut_windows(ids, 10, 6) == [ids[:10], ids[10:20]]
    assert cut_windows(ids[:3], 10, 4) == []


def test_prepared_data_is_cut_split_and_cached(tmp_path, tokenizer):
    arguments = DataArguments(dataset_name=str(write(tmp_path, "jsonl")), validation_fraction=0.25)
    train, validation = prepare_data(arguments, tokenizer, 64, 26)
    assert all(26 <= len(x) <= 64 for x in [*train["input_ids"], *validation["input_ids"]])
    again, validation_again = prepare_data(arguments, tokenizer, 64, 26)
    assert again["input_ids"] == train["input_ids"] and validation_again["input_ids"] == validation["input_ids"]
    a, b = split_documents(read_documents(arguments.dataset_name), 0.25, 0)
    assert len(b) == 3 and not set(a["text"]) & set(b["text"])
    tokens = sum(len(tokenizer(t)["input_ids"]) for t in a["text"])
    assert sum(map(len, train["input_ids"])) > 0.8 * tokens


def test_streaming_gives_the_same_windows(tmp_path, tokenizer):
    arguments = DataArguments(dataset_name=str(write(tmp_path, "jsonl")), validation_fraction=0.0)
    plain, _ = prepare_data(arguments, tokenizer, 64, 26)
    arguments.streaming = True
    streamed, _ = prepare_data(arguments, tokenizer, 64, 26)
    assert [row["input_ids"] for row in streamed] == plain["input_ids"][:]


def test_streamed_text_can_be_validated_on_another(tmp_path, tokenizer):
    name = str(write(tmp_path, "jsonl"))
    arguments = DataArguments(dataset_name=name, validation_dataset=name, streaming=True, validation_windows=3)
    _, validation = prepare_data(arguments, tokenizer, 64, 26)
    assert len(validation) == 3 and all(26 <= len(ids) <= 64 for ids in validation["input_ids"])


def test_packed_windows_keep_their_documents_columns(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "source": i}) for i, t in enumerate(TEXTS)))
    arguments = DataArguments(dataset_name=str(tmp_path / "a.jsonl"), validation_fraction=0.0, packing=True)
    train, _ = prepare_data(arguments, tokenizer, 64, 26, keep_columns=True)
    alone = [tokenizer(t)["input_ids"] for t in TEXTS]
    assert set(train.column_names) == {"input_ids", "lengths", "source"}
    for row in train:
        assert sum(row["lengths"]) == len(row["input_ids"]) <= 64 and len(row["source"]) == len(row["lengths"])
        for window, source in zip(torch.tensor(row["input_ids"]).split(row["lengths"]), row["source"], strict=True):
            starts = range(0, len(alone[source]), 64)
            assert window.tolist() in [alone[source][at : at + 64] for at in starts]


def nothing_kept_back(streaming: bool) -> dict:
    """Make all text train; nothing is kept back of streamed text in any case."""
    return {"streaming": True} if streaming else {"validation_fraction": 0.0}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_tokens_give_the_windows_of_their_text(tmp_path, tokenizer, streaming, packing):
    """In a column `input_ids` or one that is named; an empty and a missing row are nothing."""
    settings = {**nothing_kept_back(streaming), "packing": packing}
    text, _ = prepare_data(DataArguments(dataset_name=str(write(tmp_path, "jsonl")), **settings), tokenizer, 64, 26)
    ids = [*tokenizer(TEXTS)["input_ids"], [], None]
    Dataset.from_dict({"input_ids": ids, "attention_mask": ids}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": "none of it", "ids": i}) for i in ids))
    for name, more in (("a.parquet", {}), ("a.parquet", {"text_column": "input_ids"}), ("b.jsonl", {"text_column": "ids"})):
        tokens, _ = prepare_data(DataArguments(dataset_name=str(tmp_path / name), **settings, **more), tokenizer, 64, 26)
        assert [dict(row) for row in tokens] == [dict(row) for row in text]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "row", "words"),
    [
        ("input_ids", [5, 2048] * 20, "holds the token 2048, and the tokenizer has the tokens 0 to 2047"),
        ("input_ids", [5, -1] * 20, "holds the token -1"),
        ("input_ids", [0.5] * 40, "a list; expected text in every row, or token ids in every row"),
        ("input_ids", [[1], [2, 3]], "a list; expected text"),
        ("text", 7, "a int; expected text"),
    ],
)
def test_rows_that_are_no_tokens_are_named(tmp_path, tokenizer, streaming, column, row, words):
    Dataset.from_dict({column: [row]}).to_parquet(tmp_path / "a.parquet")
    arguments = DataArguments(dataset_name=str(tmp_path / "a.parquet"), streaming=streaming)
    with pytest.raises(refine_nsp.RefineError, match=words):
        list(prepare_data(arguments, tokenizer, 64, 26)[0])


def test_packed_rows_of_tokens_and_no_processes_are_refused(tmp_path, tokenizer):
    Dataset.from_dict({"input_ids": [[1] * 60], "lengths": [[30, 30]]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(refine_nsp.RefineError, match="packed already"):
        prepare_data(DataArguments(dataset_name=str(tmp_path / "a.parquet")), tokenizer, 64, 26)
    with pytest.raises(refine_nsp.RefineError, match="dataset_num_proc=0: expected 1 or more"):
        prepare_data(DataArguments(dataset_name=str(tmp_path / "a.parquet"), dataset_num_proc=0), tokenizer, 64, 26)


def test_several_processes_give_the_same_windows_and_one_of_them_the_cache(tmp_path, tokenizer, monkeypatch):
    arguments = DataArguments(dataset_name=str(write(tmp_path, "jsonl")), validation_fraction=0.0, dataset_num_proc=2)
    windows = prepare_data(arguments, tokenizer, 64, 26)[0]["input_ids"][:]
    monkeypatch.setattr(data, "tokens_of", None)  # would fail if called
    arguments.dataset_num_proc = None
    assert prepare_data(arguments, tokenizer, 64, 26)[0]["input_ids"][:] == windows


def packed_examples(windows, max_length):
    return [
        {"input_ids": [token for w in members for token in windows[w]], "lengths": [len(windows[w]) for w in members]}
        for members in pack(windows, max_length)
    ]


def test_packed_documents_stay_rows_of_their_own():
    windows = [[1] * 7, [2] * 5, [3] * 4, [4] * 3, [5] * 10]
    packed = packed_examples(windows, 10)
    assert sorted(len(example["input_ids"]) for example in packed) == [9, 10, 10]
    batch = collate(packed)
    assert sorted(batch["lengths"].tolist()) == [3, 4, 5, 7, 10]
    for row, n in zip(batch["input_ids"], batch["lengths"], strict=True):
        assert len(set(row[:n].tolist())) == 1


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_packing_does_not_change_the_loss(family):
    from refine_nsp.config import NSPConfig
    from refine_nsp.nsp.forward import run
    from refine_nsp.nsp.records import Batch, Learning, Work

    model = build(family)
    g = torch.Generator().manual_seed(0)
    windows = [torch.randint(1, 64, (n,), generator=g).tolist() for n in (30, 12, 45, 8)]
    batch = collate(packed_examples(windows, 60))
    with torch.no_grad():

        def loss(sequences):
            return run(Work(model, sequences, NSPConfig(), learning=Learning(ntp_normalizer=1.0))).loss_ntp

        together = loss(Batch.of(batch["input_ids"], batch["lengths"]))
        alone = sum(loss(Batch.of(torch.tensor([w]))) for w in windows)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [3, 4, 2**20])
def test_files_are_checked_block_by_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(formats, "BLOCK", block)
    (tmp_path / "good.txt").write_text("ünïcödé € 😀")
    assert read_documents(str(tmp_path / "good.txt"))["text"][:] == ["ünïcödé € 😀"]
    for name, content, at in (("bad.txt", "aé€".encode() + b"\xff" + b"b", 6), ("cut.txt", "aé€".encode()[:-1], 3)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(refine_nsp.RefineError, match=f"not UTF-8: byte .* at offset {at}"):
            read_documents(str(tmp_path / name))


def test_bad_files_are_named(tmp_path, tokenizer):
    def refused(name: str, words: str, **arguments) -> None:
        with pytest.raises(refine_nsp.RefineError, match=words):
            prepare_data(DataArguments(dataset_name=name, **arguments), tokenizer, 64, 26)

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "odd.docx").write_text("x")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "nothing").mkdir()
    jsonl = str(write(tmp_path, "jsonl"))
    refused(str(tmp_path / "missing.txt"), "no file or folder")
    refused(str(tmp_path / "empty.txt"), "is empty")
    refused(str(tmp_path / "latin.txt"), "not UTF-8: byte 0xe9 at offset 3")
    refused(str(tmp_path / "odd.docx"), "unknown format .docx")
    refused(str(tmp_path / "short.txt"), "no document has 26 tokens")
    refused(str(tmp_path / "broken.jsonl"), "cannot read")
    refused(str(tmp_path / "nothing"), "holds no file")
    refused(str(tmp_path / "*.nope"), "no file matches")
    refused(jsonl, "no column 'txt' \\(did you mean 'text'\\?\\)", text_column="txt")
    with pytest.raises(refine_nsp.RefineError, match="max_length=20 is below 26"):
        prepare_data(DataArguments(dataset_name=jsonl), tokenizer, 20, 26)
    with pytest.raises(refine_nsp.RefineError, match="no data"):
        prepare_data(DataArguments(), tokenizer, 64, 26)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_columns_for_rewards_may_be_without_values_at_first(tmp_path, tokenizer, streaming, packing):
    rows = [
        {"text": "alpha beta gamma " * 12, "score": None if i < 1200 else 0.5, "meta": {"a": 1} if i < 1200 else {"b": "x"}}
        for i in range(1210)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = DataArguments(dataset_name=str(tmp_path / "a.jsonl"), **nothing_kept_back(streaming), packing=packing)
    windows = list(prepare_data(arguments, tokenizer, 512, 26, keep_columns=True)[0])
    scores = [value for row in windows for value in (row["score"] if packing else [row["score"]])]
    assert scores.count(None) == 1200 and scores.count(0.5) == 10


def windows_of(tokenizer, text):
    return cut_windows(tokenizer(text)["input_ids"], 64, 26)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_are_not_read_unless_a_reward_may_ask(tmp_path, tokenizer, streaming):
    for name, more in (("a", {"meta": {"a": 1}, "score": None}), ("b", {"meta": "x", "score": 0.5, "url": "u"})):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t, **more}) for t in TEXTS))
    arguments = DataArguments(dataset_name=str(tmp_path), **nothing_kept_back(streaming))
    rows = list(prepare_data(arguments, tokenizer, 64, 26)[0])
    assert {key for row in rows for key in row} == {"input_ids"} and len(rows) == 2 * len(
        [w for t in TEXTS for w in windows_of(tokenizer, t)]
    )
    with pytest.warns(UserWarning, match=r"column 'meta' .*b.jsonl, row 0 \(line 1\) holds 'x', a str"):
        rows = list(prepare_data(arguments, tokenizer, 64, 26, keep_columns=True)[0])
    assert {key for row in rows for key in row} == {"input_ids", "score", "url"}


def test_a_folder_is_trained_and_validated_on_by_its_splits(tmp_path, tokenizer):
    def words(rows):
        return {tokenizer.decode(row["input_ids"]).split("document ")[-1].split(":")[0].strip() for row in rows}

    for split, count in (("train", "11"), ("validation", "22"), ("test", "33")):
        (tmp_path / f"{split}.jsonl").write_text(
            "\n".join(json.dumps({"text": f"document {count}: alpha beta " * 9}) for _ in range(4))
        )
    arguments = DataArguments(dataset_name=str(tmp_path), validation_dataset=str(tmp_path))
    train, validation = prepare_data(arguments, tokenizer, 256, 26)
    assert words(train) == {"11"} and words(validation) == {"22"}
    arguments.dataset_split = "test"
    assert words(prepare_data(arguments, tokenizer, 256, 26)[0]) == {"33"}
    arguments.dataset_split, arguments.validation_dataset = "train", None  # a share of what is trained on
    train, validation = prepare_data(arguments, tokenizer, 256, 26)
    assert words(train) == words(validation) == {"11"} and (len(train), len(validation)) == (3, 1)
    arguments.dataset_split = "train[:2]"
    assert len(prepare_data(arguments, tokenizer, 256, 26)[0]) == 1
    arguments.dataset_split = "dev"
    assert words(prepare_data(arguments, tokenizer, 256, 26)[0]) == {"22"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_token_is_named_with_its_file_and_row(tmp_path, tokenizer, streaming):
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": [5] * 40}))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"input_ids": ids}) for ids in ([5] * 40, [5] * 39 + [2048])))
    arguments = DataArguments(dataset_name=str(tmp_path), streaming=streaming)
    with pytest.raises(refine_nsp.RefineError, match=r"b.jsonl, row 1 \(line 2\): column 'input_ids' holds the token 2048"):
        list(prepare_data(arguments, tokenizer, 64, 26)[0])


def test_a_configuration_is_of_the_data_it_names(tmp_path, tokenizer):
    path = str(write(tmp_path, "jsonl"))
    with pytest.raises(refine_nsp.RefineError, match=r"dataset_config='en': .* has no configurations"):
        prepare_data(DataArguments(dataset_name=path, dataset_config="en"), tokenizer, 64, 26)
