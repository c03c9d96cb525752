"""LongBench's rows: from the hub as it lays them out, from the files of a folder, and from whichever columns hold the prompt."""

import json

import datasets
import pytest
from datasets import Dataset

from refine_nsp.errors import RefineError
from refine_nsp.evaluation import longbench
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.longbench import HUB_NAME, TASKS, read_longbench
from refine_nsp.evaluation.tasks import build_tasks

ROWS = [
    {"_id": f"r{i}", "context": f"Rome is {i} years old.", "input": f"How old? ({i})", "answers": [f"{i} years"]}
    for i in range(3)
]
# A row as the default data set has it: the prompt in three pieces, of which the last may be there already.
PIECES = {
    "hotpotqa": ("Question: {input}\n", "Answer:"),
    "narrativeqa": ("Question: {input}\n\n", "Answer:"),
    "trec": ("{input}\n", "Type:"),
    "triviaqa": ("{input}\nAnswer:\n", "Answer:"),
    "samsum": ("{input}\nSummary: ", "Summary:"),
    "gov_report": ("Now, write a one-page summary of the report.\n\n", "Summary:"),
    "lcc": ("", "Next line of code:\n"),
    "repobench-p": ("{input}", "Next line of code:\n"),
}


def in_pieces(name, row):
    question, prefix = PIECES[name]
    asked = question.format(input=row["input"])
    before = TASKS[name].prompt.partition("{input}")[0].removesuffix("Question: ")
    if name == "gov_report":
        before = before.partition("Now, write")[0]
    before = before.removesuffix("Next line of code:\n")
    return {
        "_id": row["_id"], "context": before.format(context=row["context"]), "question": asked, "answer_prefix": prefix,
        "answers": row["answers"], "max_new_tokens": "52",
    }  # fmt: skip


def data_set_folder(folder, names, rows=ROWS, row_of=lambda name, row: row):
    """A data set in the hub's layout: a configuration for each task, its rows in Parquet, named in the card."""
    folder.mkdir(parents=True)
    configurations = []
    for name in names:
        (folder / name).mkdir()
        Dataset.from_list([row_of(name, r) for r in rows]).to_parquet(folder / name / "test-00000-of-00001.parquet")
        data_files = f"[{{split: test, path: {name}/test-*}}]"
        configurations.append(f"- config_name: {name}\n  data_files: {data_files}\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n")


def test_the_default_is_a_data_set_without_a_script(tmp_path, monkeypatch):
    """Read by `datasets` itself, from a stand-in in the hub's layout."""
    data_set_folder(tmp_path / HUB_NAME, list(PIECES), row_of=in_pieces)
    monkeypatch.setattr(longbench, "load_dataset", lambda name, *a, **k: datasets.load_dataset(str(tmp_path / name), *a, **k))
    found = read_longbench(list(PIECES))
    for name, examples in found.items():
        assert [e.id for e in examples] == [f"{name}-r{i}" for i in range(3)]
        for e, row in zip(examples, ROWS, strict=True):
            asked = {
                "trec": f"{row['input']}\nType:",
                "triviaqa": f"{row['input']}\nAnswer:\n",
                "samsum": f"{row['input']}\nSummary: ",
            }
            assert e.prompt == TASKS[name].prompt.format(context=row["context"], input=asked.get(name, row["input"]))
            assert e.budget == TASKS[name].budget and e.references == row["answers"]


def test_evaluate_takes_the_default(tmp_path, monkeypatch):
    data_set_folder(tmp_path / HUB_NAME, ["qasper"])
    monkeypatch.chdir(tmp_path)
    for settings in ({}, {"longbench": None}, {"longbench": str(tmp_path / HUB_NAME)}):
        task = build_tasks(EvaluationArguments(tasks=["qasper"], **settings), None)[0]
        assert len(task.questions()) == 3


def test_a_script_s_rows_are_taken_from_its_parquet_branch(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split, revision=None):
        asked.append((name, configuration, split, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found LongBench.py")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(longbench, "load_dataset", load_dataset)
    examples = read_longbench(["hotpotqa"], "THUDM/LongBench")["hotpotqa"]
    assert asked == [
        ("THUDM/LongBench", "hotpotqa", "test", None),
        ("THUDM/LongBench", "hotpotqa", "test", "refs/convert/parquet"),
    ]
    assert examples[0].prompt == TASKS["hotpotqa"].prompt.format(**ROWS[0])


def test_a_hub_that_gives_nothing_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(longbench, "load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(RefineError, match=rf"qasper from {HUB_NAME} \(offline\); name a folder of its files with --longbench"):
        read_longbench(["qasper"])


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize(
    "names",
    [
        ["hotpotqa.jsonl"],
        ["hotpotqa_16384.jsonl"],
        ["data/hotpotqa.jsonl", "data/hotpotqa_e.jsonl"],  # as upstream's archive unpacks
        ["hotpotqa/test.jsonl"],
        ["hotpotqa/test/0000.jsonl"],
        ["hotpotqa.jsonl", "hotpotqa_old.jsonl", "hotpotqa_e.jsonl", "hotpotqa-notes.txt"],
    ],
)
def test_folders_of_files_are_read_in_every_layout(tmp_path, names):
    for name in names:
        write(tmp_path / name, ROWS if name == names[0] else ROWS[:1])
    assert len(read_longbench(["hotpotqa"], str(tmp_path))["hotpotqa"]) == 3


def test_all_shards_are_read(tmp_path):
    for i in range(3):
        write(tmp_path / f"hotpotqa-{i:05}-of-00003.jsonl", ROWS[i : i + 1])
    assert [e.id for e in read_longbench(["hotpotqa"], str(tmp_path))["hotpotqa"]] == [f"hotpotqa-r{i}" for i in range(3)]


def test_several_files_for_one_task_are_refused(tmp_path):
    write(tmp_path / "hotpotqa_4096.jsonl", ROWS)
    write(tmp_path / "hotpotqa_8192.jsonl", ROWS)
    write(tmp_path / "qasper_e.jsonl", ROWS)
    with pytest.raises(RefineError, match=r"several files for hotpotqa \(hotpotqa_4096.jsonl, hotpotqa_8192.jsonl\)"):
        read_longbench(["hotpotqa"], str(tmp_path))
    with pytest.warns(UserWarning, match="LongBench-E's rows"):
        assert len(read_longbench(["qasper"], str(tmp_path))["qasper"]) == 3
    with pytest.raises(RefineError, match=r"has no file for trec; it holds hotpotqa_4096\.jsonl"):
        read_longbench(["trec"], str(tmp_path))


@pytest.mark.parametrize(("columns", "said"), [({"context": "x"}, "context, answers"), ({"prompt": ""}, "prompt, answers")])
def test_a_row_without_its_question_is_refused(tmp_path, columns, said):
    write(tmp_path / "hotpotqa.jsonl", [{**columns, "answers": ["a"]}])
    with pytest.raises(
        RefineError, match=rf"hotpotqa, row 0: expected a column `prompt`, or `context` and `input` .*, got {said}"
    ):
        read_longbench(["hotpotqa"], str(tmp_path))
    write(tmp_path / "gov_report.jsonl", [{"context": "x", "answers": ["a"]}])  # which asks nothing
    assert read_longbench(["gov_report"], str(tmp_path))["gov_report"][0].prompt.endswith("Summary:")
