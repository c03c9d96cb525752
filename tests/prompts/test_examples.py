"""Rows of prompts and answers as TRL, lm-eval and the hub lay them out: what is read of them, and what is refused, by file and row."""

import datetime
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import refine_nsp
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.tasks import Context, build_tasks
from refine_nsp.prompts.encoding import encode_prompt
from refine_nsp.prompts.examples import as_answers, read_prompts, read_row
from refine_nsp.prompts.qa_sources import read_qa
from refine_nsp.training.answers import AnswerArguments, prepare_answers
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer
from tests.prompts.tokenizer_kinds import TEMPLATES, tokenizer_of

ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
USER, REPLY = {"role": "user", "content": "Capital?"}, {"role": "assistant", "content": "Klow"}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def chatty():
    tokenizer = tokenizer_of("both")
    tokenizer.chat_template = TEMPLATES["writes_bos"]
    return tokenizer


READ = [
    ({"prompt": "Capital?", "answer": "Klow"}, "Capital?", ["Klow"]),
    ({"prompt": "Capital?", "answers": ["Klow", None, "Klow", "K."]}, "Capital?", ["Klow", "K."]),
    ({"prompt": "Capital?", "answers": {"text": ["Klow"], "answer_start": [3]}}, "Capital?", ["Klow"]),
    ({"prompt": "Capital?", "answer": {"value": "Klow", "aliases": ["K."]}}, "Capital?", ["Klow", "K."]),
    ({"prompt": "6 x 7?", "answer": 42}, "6 x 7?", ["42"]),
    ({"prompt": "6 x 7?", "answer": [42.0, 0.5, np.int64(7)]}, "6 x 7?", ["42", "0.5", "7"]),
    ({"input": "Capital?", "outputs": ["Klow"]}, "Capital?", ["Klow"]),
    ({"question": "6 x 7?", "answer": "#### 42"}, "6 x 7?", ["#### 42"]),
    ({"prompt": "Capital?", "completion": " Klow"}, "Capital?", [" Klow"]),
    ({"prompt": [USER], "answer": "Klow"}, [USER], ["Klow"]),
    ({"prompt": [{**USER, "name": None}], "completion": [REPLY]}, [USER], ["Klow"]),
    ({"messages": [USER, REPLY]}, [USER], ["Klow"]),
    ({"messages": [USER], "answer": 3}, [USER], ["3"]),
    ({"conversations": [{"from": "human", "value": "Capital?"}, {"from": "gpt", "value": "Klow"}]}, [USER], ["Klow"]),
    ({"prompt": "only a title", "messages": [USER, REPLY]}, [USER], ["Klow"]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Capital?"}]}, REPLY]}, [USER], ["Klow"]),
]


@pytest.mark.parametrize(("row", "prompt", "references"), READ)
def test_rows_are_read_as_they_are_laid_out(row, prompt, references):
    found = read_row(row, "f, row 0")
    assert found.prompt == prompt and found.references == references


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 5, "answer": "x"}, "the prompt is 5, a int; expected text, or a list of messages"),
        ({"prompt": {"a": 1}, "answer": "x"}, "a dict; expected text, or a list of messages"),
        ({"prompt": ["Capital?"], "answer": "x"}, "message 0 is 'Capital?'"),
        ({"prompt": [{**USER, "content": [{"type": "image"}]}], "answer": "x"}, "a part that is image; expected text only"),
        ({"prompt": [{**USER, "content": " "}], "answer": "x"}, "the prompt is empty"),
        ({"prompt": "Capital?", "answer": True}, "the answer is 'True'; expected text or a number"),
        ({"prompt": "Capital?", "answer": {"span": [1]}}, "expected text or a number"),
        ({"prompt": "Capital?", "answer": [["Klow"]]}, "expected text or a number"),
        ({"prompt": "When?", "answer": datetime.date(2024, 1, 2)}, "the answer is '2024-01-02'; expected text or a number"),
        ({"prompt": "Capital?", "answers": []}, "no answer; every example needs"),
        ({"prompt": "Capital?", "answer": float("nan")}, "no answer; every example needs"),
        ({"prompt": "Capital?", "completion": [REPLY]}, "expected text, or behind messages"),
        ({"prompt": [USER], "completion": [REPLY, USER]}, "the completion has 2 messages; expected the assistant's turn"),
        ({"prompt": [USER], "completion": [USER]}, "the answer is a turn of user"),
        ({"messages": [USER]}, "no answer: messages ends with a turn of user"),
        ({"messages": [USER, REPLY], "answer": "Klow"}, "answer holds an answer too; leave out one"),
        ({"messages": [REPLY]}, "the prompt is empty"),
        ({"messages": "Capital?"}, "expected a list of messages"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "the assistant's turn has no text"),
        ({"prompt": [USER], "answer": "x", "chat_template_kwargs": "loud"}, "chat_template_kwargs is 'loud'"),
    ],
)
def test_rows_of_other_types_are_refused_by_row(row, said):
    with pytest.raises(RefineError, match=f"^f, row 7: .*{re.escape(said)}"):
        read_row(row, "f, row 7")


def test_numbers_are_written_as_they_were_meant():
    assert as_answers([18.0, 2.5, 1e300, 0, -3], "x") == ["18", "2.5", "1e+300", "0", "-3"]


def test_training_and_evaluation_feed_the_same_conversation(tmp_path, chatty):
    rows = [
        {"prompt": [USER], "answer": "Klow"},
        {"prompt": [USER, REPLY, {"role": "user", "content": "Sure?", "name": "x"}], "answer": "Yes"},
    ]
    name = write(tmp_path / "chat.jsonl", rows)
    train, _ = prepare_answers(AnswerArguments(dataset_name=name, validation_fraction=0), chatty, 256)
    (task,) = build_tasks(EvaluationArguments(tasks=["prompts"], prompts=name), chatty)
    for i, row in enumerate(train):
        assert row["prompt_ids"] == task._request(i, chatty).ids == encode_prompt(chatty, rows[i]["prompt"])
        assert row["prompt_ids"].count(chatty.bos_token_id) == 1
        assert chatty.decode(row["answers_ids"][0]) == f"{rows[i]['answer']}</s>"


def test_rows_of_several_layouts_stand_in_one_file(tmp_path, chatty):
    """As they do where people write them: columns whose values have no type in common."""
    parts = {"role": "user", "content": [{"type": "text", "text": "Capi"}, {"type": "text", "text": "tal?"}]}
    mixed = [
        {"prompt": "Capital?", "answer": "Klow"}, {"prompt": [USER], "answer": 42}, {"prompt": [parts], "answer": ["Klow", 7]},
    ]  # fmt: skip
    name = write(tmp_path / "mixed.jsonl", mixed)
    found = read_prompts(name, 8)["mixed"]
    assert [e.prompt for e in found] == ["Capital?", [USER], [USER]]
    assert [e.references for e in found] == [["Klow"], ["42"], ["Klow", "7"]]
    trained, _ = prepare_answers(AnswerArguments(dataset_name=name, validation_fraction=0), chatty, 128)
    assert trained["prompt_ids"] == [encode_prompt(chatty, e.prompt) for e in found]
    talk = [{"messages": [parts, REPLY]}, {"messages": [USER, REPLY]}]
    trained, _ = prepare_answers(
        AnswerArguments(dataset_name=write(tmp_path / "talk.jsonl", talk), validation_fraction=0), chatty, 128
    )
    assert trained["prompt_ids"] == [encode_prompt(chatty, [USER])] * 2
    wrong = [{"prompt": "Capital?", "answer": "Klow"}, {"prompt": {"a": 1}, "answer": True}]
    with pytest.raises(RefineError, match=r"wrong\.jsonl, row 1: the prompt is .*, a dict; expected text, or a list of messages"):
        read_prompts(write(tmp_path / "wrong.jsonl", wrong), 8)


def test_text_becomes_a_user_s_turn_where_a_template_is_asked_for(tmp_path, chatty):
    name = write(tmp_path / "a.jsonl", [{"prompt": "Capital?", "answers": ["Klow"], "chat_template_kwargs": {"loud": None}}])
    settings = {"dataset_name": name, "validation_fraction": 0, "apply_chat_template": True, "question_column": "prompt"}
    row = prepare_answers(AnswerArguments(**settings), chatty, 256)[0][0]
    assert chatty.decode(row["prompt_ids"]) == "<s><user>Capital?<assistant>"
    assert chatty.decode(row["answers_ids"][0]) == "Klow</s>" and row["references"] == ["Klow"]


def test_errors_name_the_row_of_the_file_whatever_is_kept_back(tmp_path, chatty):
    rows = [{"prompt": f"Capital {i}?", "answers": ["Klow"]} for i in range(8)]
    good = write(tmp_path / "good.jsonl", rows)
    for bad in range(8):
        rows[bad] = {"prompt": f"Capital {bad}?", "answers": []}
        name = write(tmp_path / "bad.jsonl", rows)
        with pytest.raises(RefineError, match=rf"bad.jsonl, row {bad}: no answer"):
            prepare_answers(AnswerArguments(dataset_name=name, validation_fraction=0.5), chatty, 256)
        rows[bad] = {"prompt": f"Capital {bad}?", "answers": ["Klow"]}
    with pytest.raises(RefineError, match=r"bad.jsonl, row 7: no answer"):
        prepare_answers(AnswerArguments(dataset_name=good, validation_dataset=name), chatty, 256)


def test_conversations_need_a_template_and_one_that_takes_them(tmp_path, chatty):
    name = write(tmp_path / "chat.jsonl", [{"prompt": [USER], "answer": "Klow"}, {"prompt": [USER, USER], "answer": "Klow"}])
    picky = tokenizer_of("both")
    for template, said in (
        (None, "row 0: these are messages, and the tokenizer has no chat template"),
        (ALTERNATE, "row 1: the tokenizer's chat template does not take these messages: alternate"),
    ):
        picky.chat_template = template
        with pytest.raises(RefineError, match=f"chat.jsonl, {said}"):
            prepare_answers(AnswerArguments(dataset_name=name, validation_fraction=0), picky, 256)
        with pytest.raises(RefineError, match=f"chat.jsonl, {said}"):
            build_tasks(EvaluationArguments(tasks=["prompts"], prompts=name), picky)


@pytest.mark.parametrize("parts", [{"instruction": "Sort.", "input": "b a"}, {"context": "Long.", "input": "Who?"}])
def test_parts_of_a_prompt_are_not_taken_for_the_whole(tmp_path, chatty, parts):
    name = write(tmp_path / "parts.jsonl", [{**parts, "output": "a b"}])
    said = f"has the columns {next(iter(parts))} and input, which are parts of a prompt; join them"
    with pytest.raises(RefineError, match=said):
        prepare_answers(AnswerArguments(dataset_name=name, validation_fraction=0), chatty, 256)
    with pytest.raises(RefineError, match=said):
        read_prompts(name, 8)


def test_a_prompt_too_short_to_adapt_to_is_named(tmp_path):
    model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
    name = write(tmp_path / "p.jsonl", [{"prompt": "a " * 90, "answer": "b"}, {"prompt": "a", "answer": "b"}])
    (task,) = build_tasks(EvaluationArguments(tasks=["prompts"], prompts=name, prompts_budget=1), tokenizer)
    context = Context(model, tokenizer, 1000, TestTimeTrainer(model, TestTimeConfig()))
    rows = task.rows(list(task.questions()), context)
    next(rows)
    with pytest.raises(RefineError, match=r"p.jsonl, row 1: a prompt of \d+ tokens cannot be adapted to"):
        next(rows)


def test_questions_without_an_answer_are_left_out_with_a_warning(tmp_path):
    paragraphs = ["Syldavia has a king. Its capital is Klow.", "Borduria is a country."]
    rows, published = [], []
    for i, (text, answers) in enumerate(zip(paragraphs, ([{"text": "Klow", "answer_start": 9}], []), strict=True)):
        asked = {"id": str(i), "question": "Capital?", "answers": answers, "is_impossible": not answers}
        published.append({"title": f"T{i}", "paragraphs": [{"context": text, "qas": [asked]}]})
        columns = {"text": [a["text"] for a in answers], "answer_start": [a["answer_start"] for a in answers]}
        rows.append({"id": str(i), "title": f"T{i}", "context": text, "question": "Capital?", "answers": columns})
    (tmp_path / "squad.json").write_text(json.dumps({"data": published}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "squad.parquet")
    bare = [{**row, "answers": row["answers"]["text"] or None} for row in rows]
    write(tmp_path / "bare.jsonl", bare)
    sources = []
    for name in ("squad.json", "squad.parquet", "bare.jsonl"):
        with pytest.warns(UserWarning, match=f"{name}: 1 of 2 questions have no answer and are left out"):
            sources.append(read_qa(str(tmp_path / name)))
    assert sources[0] == sources[1] == sources[2]
    assert [(q.text, q.answers) for q in sources[0].questions] == [("Capital?", ["Klow"])]
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "none.parquet")
    with pytest.raises(RefineError, match=r"none.parquet holds no question that can be answered"):
        read_qa(str(tmp_path / "none.parquet"))
    write(tmp_path / "silent.jsonl", [{"question": "Capital?", "context": "x"}])
    with pytest.raises(RefineError, match="row 0: no answer; expected a column answers or answer, got"):
        read_qa(str(tmp_path / "silent.jsonl"))
