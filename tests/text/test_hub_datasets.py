"""Datasets of the hub: the split and the columns that are asked for; what the hub says of another split."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from refine_nsp.errors import RefineError
from refine_nsp.text import reading
from refine_nsp.text.reading import read_documents


@pytest.fixture
def hub(monkeypatch):
    """Names of datasets with their splits, in the place of the hub."""
    there = {}

    def load(name, config, split, streaming):
        if split.split("[")[0] not in there[name]:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(there[name])}.')
        data = there[name][split.split("[")[0]]
        if streaming:
            return IterableDataset.from_generator(lambda: iter(list(data)))  # says no columns before it is read
        return data.select(range(1)) if "[" in split else data

    monkeypatch.setattr(reading, "load_dataset", load)
    monkeypatch.setattr(reading, "get_dataset_split_names", lambda name, config: list(there[name]))
    return there


def rows(text):
    return Dataset.from_dict({"text": [text] * 2, "meta": [{"a": 1}] * 2, "score": [1, 2]})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_gives_the_split_and_columns_that_are_asked_for(hub, streaming):
    hub["a/b"] = DatasetDict(train=rows("train"), test=rows("test"))
    hub["a/c"] = DatasetDict(train_sft=rows("only"))

    def read(*name, **options):
        return list(read_documents(*name, streaming=streaming, **options))

    assert read("a/b", also=("score",)) == [{"text": "train", "score": 1}, {"text": "train", "score": 2}]
    assert read("a/b", split=("validation", "test", "train"), also=()) == [{"text": "test"}] * 2
    assert set(read("a/b")[0]) == {"text", "meta", "score"}
    with pytest.warns(UserWarning, match="a/c: no split train; the only one, train_sft, is read"):
        assert read("a/c", also=()) == [{"text": "only"}] * 2
    with pytest.raises(RefineError, match="a/b has no split 'validation'; it has train, test"):
        read("a/b", split="validation")
    with pytest.raises(RefineError, match="a/b has no column 'txt' \\(did you mean 'text'\\?\\)"):
        read("a/b", ("txt",))


def test_slices_of_a_hub_dataset_are_taken_by_the_hub(hub):
    hub["a/b"] = DatasetDict(train=rows("train"))
    assert len(read_documents("a/b", split="train[:50%]")) == 1
