"""What a user's folder holds, read as it is meant: by split, by format and by column, in memory and streamed alike."""

import bz2
import gzip
import json
import lzma
import warnings

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from refine_nsp.errors import RefineError
from refine_nsp.text.reading import read_documents

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["in memory", "streamed"])


def rows(*texts, **more) -> str:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts)


def make(folder, files) -> str:
    """Files by name, of text or bytes; the folder's name."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def read(name, *, column="text", **options):
    """The texts, and what is said about them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = read_documents(str(name), (column,), **options)
        assert isinstance(data, IterableDataset if options.get("streaming") else Dataset)
        texts = [row[column] for row in data]
    return texts, [str(w.message) for w in said if issubclass(w.category, UserWarning)]


def texts_of(name, **options):
    return read(name, **options)[0]


def refused(name, *words, **options) -> str:
    with pytest.raises(RefineError) as error:
        read(name, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


# --- splits -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "shards": "{}-00000-of-00001.jsonl",
    "shards in data": "data/{}-00000-of-00001.jsonl",
    "files": "{}.jsonl",
    "prefixed files": "wiki_{}.v2.jsonl",
    "folders": "{}/part 0.jsonl",
    "prefixed folders": "en/wiki-{}/a/0.jsonl",
}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_split_that_is_asked_for_is_read(tmp_path, streaming, layout):
    folder = make(tmp_path, {layout.format(s): rows(f"{s} 0", f"{s} 1") for s in ("train", "test", "validation")})
    for split in ("train", "test", "validation"):
        texts, said = read(folder, split=split, streaming=streaming)
        assert texts == [f"{split} 0", f"{split} 1"]
        assert len(said) == 1 and said[0].startswith(f"{folder}: not read: ") and f"split {split})" not in said[0]
    assert texts_of(folder, split="train+test", streaming=streaming) == ["train 0", "train 1", "test 0", "test 1"]
    assert sorted({t.split()[0] for t in texts_of(folder, split="all", streaming=streaming)}) == ["test", "train", "validation"]


def test_other_words_for_a_split_are_understood(tmp_path):
    folder = make(tmp_path, {"training.jsonl": rows("a"), "dev.jsonl": rows("b"), "EVAL.jsonl": rows("c")})
    found = [texts_of(folder, split=s) for s in ("train", "validation", "dev", "val", "test", "eval")]
    assert found == [["a"], ["b"], ["b"], ["b"], ["c"], ["c"]]


@BOTH
def test_files_of_no_split_are_named(tmp_path, streaming):
    folder = make(tmp_path, {"train.jsonl": rows("a"), "test.jsonl": rows("b"), "more.jsonl": rows("c")})
    texts, said = read(folder, streaming=streaming)
    assert texts == ["a"]
    assert said == [f"{folder}: not read: more.jsonl (of no split); test.jsonl (split test)"]


def test_files_next_to_a_test_split_are_read_for_training(tmp_path):
    folder = make(tmp_path, {"books.jsonl": rows("a"), "test.jsonl": rows("b")})
    assert read(folder) == (["a"], [f"{folder}: not read: test.jsonl (split test)"])
    assert texts_of(folder, split="test") == ["b"]


def test_a_split_word_inside_another_word_names_no_split(tmp_path):
    folder = make(tmp_path, {"trained.txt": "a", "contest.txt": "b", "evaluate.txt": "c", "valley.txt": "d"})
    assert read(folder) == (["b", "c", "a", "d"], [])


def test_a_file_and_its_compressed_copy_are_read_once(tmp_path):
    folder = make(tmp_path, {"a.txt": "a", "a.txt.gz": gzip.compress(b"a"), "b.txt.gz": gzip.compress(b"b")})
    assert read(folder) == (["a", "b"], [f"{folder}: not read: a.txt.gz (the same as a.txt)"])


@BOTH
def test_a_missing_split_is_refused_or_replaced_by_the_only_one(tmp_path, streaming):
    one = make(tmp_path / "one", {"validation.jsonl": rows("a")})
    texts, said = read(one, streaming=streaming)
    assert texts == ["a"] and said == [f"{one}: no split train; the only one, validation, is read"]
    two = make(tmp_path / "two", {"train.jsonl": rows("a"), "validation.jsonl": rows("b")})
    refused(two, "has no split 'test'", "it has train, validation", split="test", streaming=streaming)
    plain = make(tmp_path / "plain", {"a.jsonl": rows("a")})
    assert read(plain, split="test", streaming=streaming) == (["a"], [])
    assert read(f"{two}/validation.jsonl", split="test", streaming=streaming) == (["b"], [])


def test_slices_of_splits_are_cut_as_load_dataset_cuts_them(tmp_path):
    folder = make(tmp_path, {"train.jsonl": rows(*"abcdefghij"), "test.jsonl": rows(*"klmno")})
    assert texts_of(folder, split="train[:20%]+test[-2:]") == ["a", "b", "n", "o"]
    assert texts_of(f"{folder}/train.jsonl", split="train[3:5]") == ["d", "e"]
    refused(folder, "a slice of a split", split="train[:2]", streaming=True)
    refused(folder, "is no slice", split="train[:x]")
    refused(folder, "expected a name", split="train[")


def test_the_first_split_that_is_there_is_read(tmp_path):
    folder = make(tmp_path, {"train.jsonl": rows("a"), "test.jsonl": rows("b")})
    assert texts_of(folder, split=("validation", "test", "train")) == ["b"]


def test_shards_name_splits_of_any_name(tmp_path):
    files = {f"data/{s}-00000-of-00001.jsonl": rows(s) for s in ("train_sft", "train_gen", "test_sft")}
    folder = make(tmp_path, files)
    assert texts_of(folder, split="train_sft") == ["train_sft"] == texts_of(f"{folder}/data", split="train_sft")
    refused(folder, "has no split 'train'", "train_gen, train_sft")
    parts = make(tmp_path / "parts", {f"part-0000{i}-of-00002.jsonl": rows(str(i)) for i in range(2)})
    assert read(parts) == (["0", "1"], [])


@BOTH
def test_folders_saved_by_datasets_are_read(tmp_path, streaming):
    of = {s: Dataset.from_dict({"text": [s], "other": [1]}) for s in ("train", "test")}
    DatasetDict(of).save_to_disk(tmp_path / "both")
    DatasetDict(validation=of["test"]).save_to_disk(tmp_path / "one")
    of["test"].save_to_disk(tmp_path / "plain")
    assert texts_of(tmp_path / "both", split="test", streaming=streaming, also=()) == ["test"]
    assert texts_of(tmp_path / "both", split="train+test", streaming=streaming) == ["train", "test"]
    texts, said = read(tmp_path / "one", streaming=streaming)
    assert texts == ["test"] and said == [f"{tmp_path / 'one'}: no split train; the only one, validation, is read"]
    assert texts_of(tmp_path / "plain", split="whatever", streaming=streaming) == ["test"]
    refused(tmp_path / "both", "has no split 'validation'", "it has train, test", split="validation", streaming=streaming)
    refused(tmp_path / "both", "no column 'txt' (did you mean 'text'?)", column="txt", streaming=streaming)
    if not streaming:
        assert texts_of(tmp_path / "both", split="train[:1]+test[:1]") == ["train", "test"]
        assert read_documents(str(tmp_path / "plain"), also=()).column_names == ["text"]


# --- folders as they are ----------------------------------------------------------------------------------------------


@BOTH
def test_hidden_names_are_left_out_at_any_depth(tmp_path, streaming):
    folder = make(
        tmp_path / ".cache" / "mine",  # one that is named is read
        {
            "a.txt": "new", ".ipynb_checkpoints/a-checkpoint.txt": "old", "deep/er/.ipynb_checkpoints/b.txt": "old",
            ".git/x/y.txt": "old", "__MACOSX/a.txt": "old", "._a.txt": "old", "deep/.hidden.txt": "old",
        },
    )  # fmt: skip
    texts, said = read(folder, streaming=streaming)
    assert texts == ["new"]
    assert said == [f"{folder}: not read: ._a.txt, .git/, .ipynb_checkpoints/, __MACOSX/ and 2 more (hidden)"]


@BOTH
def test_files_that_describe_the_data_are_not_read(tmp_path, streaming):
    beside = ("README.md", "LICENSE", "license.txt", "dataset_infos.json", "_SUCCESS", "meta.yaml", ".DS_Store", "picture.png")
    folder = make(tmp_path, {"a.jsonl": rows("a"), **dict.fromkeys(beside, "{}"), "b.jsonl": ""})
    texts, said = read(folder, streaming=streaming)
    assert texts == ["a"] and len(said) == 1
    for name in (*beside, "b.jsonl (empty)"):
        assert name in said[0] or "more (" in said[0]


def test_a_folder_of_markdown_is_read_with_its_readme(tmp_path):
    notes = make(tmp_path / "notes", {"README.md": "first", "b.md": "second"})
    assert read(notes) == (["first", "second"], [])
    card = make(tmp_path / "card", {"README.md": "no data"})
    refused(card, "holds no file to train on", "README.md (describes the data)")
    assert texts_of(f"{card}/README.md") == ["no data"]


def test_empty_files_are_left_out_or_refused(tmp_path):
    folder = make(tmp_path, {"a.txt": "", "b.txt": "b", "c.txt.gz": gzip.compress(b"")})
    assert read(folder) == (["b"], [f"{folder}: not read: a.txt, c.txt.gz (empty)"])
    refused(f"{folder}/a.txt", "a.txt is empty")
    refused(f"{folder}/c.txt.gz", "c.txt.gz is empty")
    (tmp_path / "b.txt").unlink()
    refused(folder, "holds no file to train on", "a.txt (empty)")


def test_links_are_followed_once(tmp_path):
    folder = tmp_path / "data"
    make(folder, {"a.txt": "a"})
    make(tmp_path / "elsewhere", {"b.txt": "b"})
    (folder / "in").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "again.txt").symlink_to(folder / "a.txt")
    (folder / "gone.txt").symlink_to(folder / "nothing")
    texts, said = read(folder)
    assert texts == ["a", "b"]
    assert "loop/ (a link to a folder above it)" in said[0] and "gone.txt (a link to nothing)" in said[0]
    assert "again.txt (the same as a.txt)" in said[0]


def test_a_folder_of_the_hubs_cache_is_read_at_its_snapshot(tmp_path):
    repository = tmp_path / "datasets--a--b"
    make(repository, {"blobs/1": rows("old"), "blobs/2": rows("new"), "refs/main": "2222"})
    for snapshot, blob in (("1111", "1"), ("2222", "2")):
        (repository / "snapshots" / snapshot / "data").mkdir(parents=True)
        (repository / "snapshots" / snapshot / "data" / "train-00000-of-00001.jsonl").symlink_to(repository / "blobs" / blob)
    assert texts_of(repository) == ["new"]
    assert texts_of(repository / "snapshots" / "1111") == ["old"]


CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/part-*
  - {split: test, path: [small/held/*.jsonl]}
- config_name: large
  data_files: "large/**"
---
# A card
"""


def test_configurations_that_a_card_lists_are_read(tmp_path):
    files = {"small/part-1.jsonl": rows("a"), "small/held/x.jsonl": rows("b"), "large/deep/y.jsonl": rows("c")}
    folder = make(tmp_path, {"README.md": CARD, **files})
    assert texts_of(folder, config="small") == ["a"]
    assert texts_of(folder, config="small", split="test") == ["b"]
    assert texts_of(folder, config="large") == ["c"]
    refused(folder, "several configurations (small, large)", "--dataset_config")
    refused(folder, "no configuration 'smal' (did you mean 'small'?)", config="smal")
    refused(folder + "/small", "dataset_config='small'", "has no configurations", config="small")


def test_globs_read_what_they_match(tmp_path):
    folder = make(tmp_path, {"train.jsonl": rows("a"), "test.jsonl": rows("b"), "x/c.jsonl": rows("c"), "README.md": "no"})
    assert texts_of(f"{folder}/*.jsonl") == ["b", "a"]
    assert texts_of(f"{folder}/**/*.jsonl") == ["b", "a", "c"]
    texts, said = read(f"{folder}/*")
    assert texts == ["b", "a"] and said == [f"{folder}/*: not read: README.md (describes the data); x (a folder)"]


@BOTH
@pytest.mark.parametrize("name", ["data[1]", "a b", "a::b", "100%20", "a#b?c", "it*s", "cafe\u0301", "zip:", "{x}"])
def test_names_mean_what_they_say(tmp_path, streaming, name):
    make(tmp_path / name, {f"{name}.jsonl": rows("a"), f"{name}.txt.gz": b""})
    make(tmp_path, {"data1/b.jsonl": rows("b"), "itzs/b.jsonl": rows("b")})
    assert texts_of(tmp_path / name, streaming=streaming) == ["a"]
    assert texts_of(tmp_path / name / f"{name}.jsonl", streaming=streaming) == ["a"]


# --- formats ----------------------------------------------------------------------------------------------------------

PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@BOTH
@pytest.mark.parametrize("packing", PACK)
def test_compressed_files_are_read(tmp_path, streaming, packing):
    pack = PACK[packing]
    two_members = pack(b"first\r\nline\n") + pack("é".encode())
    folder = make(tmp_path / "text", {"a.txt" + packing: two_members, "B.TXT" + packing.upper(): pack(b"\xef\xbb\xbfmark")})
    assert texts_of(folder, streaming=streaming) == ["mark", "first\nline\né"]
    folder = make(
        tmp_path / "rows", {"train.jsonl" + packing: pack(rows("a").encode()), "test.csv" + packing: pack(b"text\nb\n")}
    )
    assert texts_of(folder, streaming=streaming) == ["a"] and texts_of(folder, split="test", streaming=streaming) == ["b"]
    cut = pack(rows("ab" * 1000).encode())[:-12]
    make(tmp_path, {"cut.jsonl" + packing: cut, "no.jsonl" + packing: b"no archive", "bad.txt" + packing: pack(b"ab\xff")})
    refused(tmp_path / f"cut.jsonl{packing}", f"cut.jsonl{packing}", streaming=streaming)
    refused(tmp_path / f"no.jsonl{packing}", f"cannot read {tmp_path}/no.jsonl{packing}", streaming=streaming)
    refused(tmp_path / f"bad.txt{packing}", "not UTF-8: byte 0xff at offset 2", streaming=streaming)


def test_zstd_files_are_read_to_the_last_frame(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    make(tmp_path, {"a.jsonl.zst": pack(rows("a").encode()) + pack(rows("b").encode()), "cut.txt.zst": pack(b"ab" * 10_000)[:-5]})
    assert texts_of(tmp_path / "a.jsonl.zst") == ["a", "b"] == texts_of(tmp_path / "a.jsonl.zst", streaming=True)
    refused(tmp_path / "cut.txt.zst", "cannot read", "cut.txt.zst")


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr(sys, "version_info", (3, 11))
    make(tmp_path, {"a.jsonl.zst": b"(\xb5/\xfd"})
    refused(tmp_path / "a.jsonl.zst", "a.jsonl.zst", "pip install zstandard")


@BOTH
def test_endings_in_capitals_are_read(tmp_path, streaming):
    Dataset.from_dict({"text": ["d"]}).to_parquet(tmp_path / "d.Parquet")
    folder = make(tmp_path, {"a.JSONL": rows("a"), "b.ndjson": rows("b"), "c.JSON": rows("c")})
    assert texts_of(folder, streaming=streaming) == ["a", "b", "c", "d"]
    folder = make(tmp_path / "texts", {"A.TXT": "x", "b.Md": "y"})
    assert texts_of(folder, streaming=streaming) == ["x", "y"]


@BOTH
def test_csv_values_stay_as_they_are_written(tmp_path, streaming):
    lines = 'id,text\r\n1,"two\nlines, ""quoted"""\r\n2,007\r\n\r\n3,NA\r\n4,\r\n5,null\r\n6,"' + "long " * 40_000 + '"\r\n'
    make(
        tmp_path,
        {"a.csv": "\ufeff" + lines, "b.tsv": 'text\tid\na, "b"\t1\n', "c.csv": "id;text\n1;x, y\n", "d.csv": "text\n1\n2\n"},
    )
    texts = ['two\nlines, "quoted"', "007", "NA", "", "null", "long " * 40_000]
    assert texts_of(tmp_path / "a.csv", streaming=streaming) == texts
    assert texts_of(tmp_path / "b.tsv", streaming=streaming) == ['a, "b"']
    assert texts_of(tmp_path / "c.csv", streaming=streaming) == ["x, y"]
    assert texts_of(tmp_path / "d.csv", streaming=streaming) == ["1", "2"]
    make(tmp_path, {"e.csv": "id,text\n1,a\n2,b,c\n", "f.csv": 'id,text\n1,a\n2,"never closed\n'})
    refused(tmp_path / "e.csv", "e.csv, row 1 (line 3): 3 values, and the header names 2 (id, text)", streaming=streaming)
    refused(tmp_path / "f.csv", "cannot read", "f.csv, row 1", streaming=streaming)


JSON = {
    "list": '[{"text": "a"},\n {"text": "b"}]',
    "list of texts": '["a", "b"]',
    "data": '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}',
    "columns": '{"text": ["a", "b"], "id": [1, 2]}',
    "lines": '{"text": "a"}\n\n{"text": "b"}',
    "mark": '\ufeff{"text": "a"}\r\n{"text": "b"}\r\n',
    "spaced lines": ' {"text": "a"} \n {"text": "b"} \n',
    "spaced list": '\n\n [\n{"text": "a"}, {"text": "b"}]\n',
}


@BOTH
@pytest.mark.parametrize("form", JSON)
def test_every_form_of_json_is_read(tmp_path, streaming, form):
    make(tmp_path, {"a.json": JSON[form]})
    assert texts_of(tmp_path / "a.json", streaming=streaming) == ["a", "b"]


@BOTH
def test_one_object_is_one_row(tmp_path, streaming):
    make(
        tmp_path,
        {
            "a.json": '{\n  "text": "a",\n  "notes": [{"x": 1}]\n}\n',
            "b.json": '{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
        },
    )
    assert texts_of(tmp_path / "a.json", streaming=streaming) == ["a"]
    refused(tmp_path / "b.json", "b.json holds several tables (train, test)", streaming=streaming)
    make(tmp_path, {"c.jsonl": '{\n "text": "a"\n}\n'})
    refused(tmp_path / "c.jsonl", "c.jsonl, row 0 (line 1): not JSON", "an object in one line", streaming=streaming)


@BOTH
def test_utf8_is_read_and_other_encodings_are_refused(tmp_path, streaming):
    make(
        tmp_path,
        {
            "a.txt": "\ufeffé\r\n€\r",
            "b.txt": "é".encode("utf-16"),
            "c.txt": "abcdef".encode("utf-16-le"),
            "d.jsonl": rows("a").encode("utf-16"),
        },
    )
    assert texts_of(tmp_path / "a.txt", streaming=streaming) == ["é\n€\n"]
    for name in ("b.txt", "c.txt", "d.jsonl"):
        refused(tmp_path / name, f"{name} is not UTF-8 but UTF-16, or no text", "iconv", streaming=streaming)
    make(tmp_path, {"e.jsonl": rows("a").encode() + b'{"text": "caf\xe9"}\n'})
    refused(tmp_path / "e.jsonl", "e.jsonl is not UTF-8: byte 0xe9 at offset 27", streaming=streaming)


@BOTH
def test_files_of_several_formats_are_read_together(tmp_path, streaming):
    Dataset.from_dict({"text": ["c"], "score": [0.5]}).to_parquet(tmp_path / "c.parquet")
    folder = make(tmp_path, {"a.jsonl": rows("a", score="x"), "b.csv": "text,score\nb,1\n", "meta.tsv": "text\tid\nd\t1\n"})
    assert texts_of(folder, streaming=streaming, also=()) == ["a", "b", "c", "d"]
    novels = make(tmp_path / "novels", {"a.txt": "a", "b.txt": "b", "index.csv": "title,year\nx,1\n"})
    assert read(novels, streaming=streaming) == (["a", "b"], [f"{novels}: not read: index.csv (no column 'text')"])
    stats = make(tmp_path / "stats", {"a.jsonl": rows("a"), "stats.json": '{"rows": 1}'})
    assert read(stats, streaming=streaming) == (["a"], [f"{stats}: not read: stats.json (no column 'text')"])
    mixed = make(tmp_path / "mixed", {"a.jsonl": rows("a"), "requirements.txt": "torch", "load.py": "import x"})
    texts, said = read(mixed, streaming=streaming)
    assert texts == ["a"] and said == [
        f"{mixed}: not read: load.py, requirements.txt (text beside files of rows: name it by itself)"
    ]


# --- columns ----------------------------------------------------------------------------------------------------------

OTHERS = {
    "extra": ([{}], [{"url": "u"}]),
    "struct": ([{"meta": {"a": 1}}], [{"meta": {"b": "x"}}]),
    "null": ([{"score": None}], [{"score": 0.5}]),
    "types": ([{"score": 1}], [{"score": "high"}]),
    "late": ([{"score": None}] * 300 + [{"score": 0.5}], [{}]),
    "shapes": ([{"tags": []}] * 200 + [{"tags": ["x"]}], [{"tags": "x"}]),
    "big": ([{"id": 2**70}], [{"id": 1}]),
}


@BOTH
@pytest.mark.parametrize("also", [(), None], ids=["text alone", "all"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("case", OTHERS)
def test_columns_that_nobody_asked_for_may_differ(tmp_path, streaming, also, kind, case):
    texts = []
    for name, more in zip("ab", OTHERS[case], strict=True):
        made = [{"text": f"{name} {i}", **row} for i, row in enumerate(more)]
        texts += [row["text"] for row in made]
        if kind == "parquet":
            Dataset.from_list([r if case != "big" else {**r, "id": str(r["id"]) if r["id"] > 1 else 1} for r in made]).to_parquet(
                tmp_path / f"{name}.parquet"
            )
        else:
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    assert texts_of(tmp_path, streaming=streaming, also=also) == texts
    if also == ():
        assert next(iter(read_documents(str(tmp_path), streaming=streaming, also=()))).keys() == {"text"}


def test_other_columns_are_read_where_their_types_agree(tmp_path):
    make(
        tmp_path,
        {"a.jsonl": rows("a", score=1, meta={"x": 1}), "b.jsonl": rows("b", score=0.5, odd="s"), "c.jsonl": rows("c", odd=3)},
    )
    data = read_documents(str(tmp_path))
    assert data[:] == {"text": ["a", "b", "c"], "score": [1, 0.5, None], "meta": [{"x": 1}, None, None]}
    _, said = read(tmp_path)
    assert said == [
        f"{tmp_path}: not read: column 'odd' ({tmp_path}/c.jsonl, row 0 (line 1) holds '3', a int, and the rows before string)"
    ]


@BOTH
def test_a_value_that_is_no_text_is_named_with_its_row(tmp_path, streaming):
    make(tmp_path, {"a.jsonl": rows("a good text"), "b.jsonl": rows("a good text", 12345, "another good text")})
    for name in (tmp_path, tmp_path / "b.jsonl"):
        message = refused(name, "b.jsonl, row 1 (line 2): column 'text' holds '12345', a int", streaming=streaming)
        assert "good" not in message
    make(tmp_path / "first", {"c.jsonl": rows(0.5, "a good text")})
    refused(tmp_path / "first", "c.jsonl, row 0 (line 1): column 'text' holds '0.5', a float", streaming=streaming)
    make(tmp_path / "late", {"d.jsonl": rows(*["good"] * 2500, ["a", "b"], "good")})
    refused(tmp_path / "late", "d.jsonl, row 2500 (line 2501): column 'text' holds \"['a', 'b']\", a list", streaming=streaming)
    make(tmp_path / "half", {"e.jsonl": '{"text": "a"}\n{"text": "\\ud83d"}\n'})
    refused(tmp_path / "half", "e.jsonl, row 1 (line 2)", "half a surrogate pair", streaming=streaming)
    make(tmp_path / "broken", {"f.jsonl": rows("a") + '{"text": \n' + rows("b")})
    refused(tmp_path / "broken", "cannot read", "f.jsonl, row 1 (line 2): not JSON", streaming=streaming)
    make(tmp_path / "plain", {"g.jsonl": rows("a") + '"b"\n'})
    refused(tmp_path / "plain", "g.jsonl, row 1 (line 2): holds 'b', a str; expected an object", streaming=streaming)


@BOTH
def test_a_number_in_a_text_column_is_refused_by_row(tmp_path, streaming):
    Dataset.from_dict({"text": ["good"] * 3}).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"text": [None, 7]}).to_parquet(tmp_path / "b.parquet")
    refused(tmp_path, "b.parquet, row 1: column 'text' holds '7', a int", streaming=streaming)


@BOTH
def test_a_file_without_the_column_is_named(tmp_path, streaming):
    folder = make(tmp_path, {"a.jsonl": rows("a"), "b.jsonl": '{"txt": "b"}\n'})
    refused(folder, f"{folder}/b.jsonl has no column 'text' (did you mean 'txt'?); it has txt", streaming=streaming)
    refused(folder, f"{folder} has no column 'body'", "it has text", column="body", streaming=streaming)


@BOTH
def test_rows_without_text_are_counted(tmp_path, streaming):
    make(tmp_path, {"a.jsonl": rows("a", None) + '{"id": 1}\n'})
    texts, said = read(tmp_path / "a.jsonl", streaming=streaming)
    assert texts == ["a", None, None]
    assert said == [f"{tmp_path}/a.jsonl: 2 of 3 rows have no 'text', so nothing is read from them"]


@BOTH
def test_every_arrow_form_of_text_is_read_from_parquet(tmp_path, streaming):
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = pa.array(["a", "é"])
    forms = {
        "a": plain,
        "b": plain.dictionary_encode(),
        "c": plain.cast(pa.large_string()),
        "d": plain.cast(pa.binary()),
        "e": pa.nulls(2),
    }
    for name, column in forms.items():
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
    assert texts_of(tmp_path, streaming=streaming) == ["a", "é"] * 4 + [None, None]
    pq.write_table(pa.table({"text": pa.array([b"a", b"\xff"])}), tmp_path / "f.parquet")
    refused(tmp_path / "f.parquet", "f.parquet, row 1", streaming=streaming)
    (tmp_path / "g.parquet").write_bytes(b"PAR1 no")
    refused(tmp_path / "g.parquet", "cannot read", "g.parquet", streaming=streaming)


@BOTH
def test_arrow_streams_and_files_are_read(tmp_path, streaming):
    import pyarrow as pa

    table = pa.table({"text": ["a", "b"], "x": [1, 2]})
    for name, opener in (("a", pa.ipc.new_stream), ("b", pa.ipc.new_file)):
        with opener(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
    assert texts_of(tmp_path, streaming=streaming) == ["a", "b"] * 2


def test_rows_of_tokens_and_of_messages_are_read(tmp_path):
    make(tmp_path, {"a.jsonl": "".join(json.dumps({"input_ids": ids}) + "\n" for ids in ([], [1, 2], None, [0.5]))})
    refused(tmp_path / "a.jsonl", "row 3 (line 4)", "[0.5]", column="input_ids")
    turns = [
        [{"role": "user", "content": "q"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q", "name": "n"}],
    ]
    make(tmp_path, {"b.jsonl": "".join(json.dumps({"prompt": t, "answers": ["x"]}) + "\n" for t in turns)})
    data = read_documents(str(tmp_path / "b.jsonl"), ("prompt", "input"))
    assert [[m["content"] for m in prompt] for prompt in data["prompt"]] == [["q"], ["s", "q"]] and data["answers"][:] == [
        ["x"],
        ["x"],
    ]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    from refine_nsp.text import builder

    make(tmp_path, {"a.jsonl": rows("a")})
    first = read_documents(str(tmp_path / "a.jsonl"))
    with monkeypatch.context() as patched:
        patched.setattr(builder, "tables_of", None)  # would fail if called
        again = read_documents(str(tmp_path / "a.jsonl"))
    assert again["text"][:] == ["a"] and again._fingerprint == first._fingerprint
    make(tmp_path, {"a.jsonl": rows("b, longer")})
    assert texts_of(tmp_path / "a.jsonl") == ["b, longer"]


def test_a_streamed_file_is_a_shard_and_is_resumed_within(tmp_path):
    make(tmp_path, {"a.jsonl": rows("a0", "a1"), "b.jsonl": rows("b0", "b1", "b2"), "c.txt": ""})
    data = read_documents(str(tmp_path), streaming=True)
    assert data.num_shards == 2 and set(data.info.download_checksums) == {str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")}
    iterator = iter(data)
    read_so_far = [next(iterator)["text"] for _ in range(3)]
    state = data.state_dict()
    again = read_documents(str(tmp_path), streaming=True)
    again.load_state_dict(state)
    assert read_so_far + [row["text"] for row in again] == ["a0", "a1", "b0", "b1", "b2"]
