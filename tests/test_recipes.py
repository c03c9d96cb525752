"""The recipe for a real model, on a tiny stand-in: its rows hold what they say, a packed memory comes back, and its commands run."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from recipes.smollm2 import study, tables
from recipes.smollm2.memory import is_memory, pack, unpack
from recipes.smollm2.texts import Writer
from transformers import LlamaConfig

from refine_nsp.cli import main
from refine_nsp.models.convert import MemorySettings, convert
from refine_nsp.models.load import load_model, load_tokenizer
from refine_nsp.tiny.corpus import standard_library
from tests.models.test_convert import saved

TOWNS = ("Alba", "Brenn", "Corvo", "Delft", "Emden")
TEACHER = dict(hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny Llama with the tokenizer of the shipped bases."""
    tokenizer, folder = load_tokenizer("refine-nsp/tiny-delta-net"), tmp_path_factory.mktemp("recipe") / "teacher"
    config = LlamaConfig(**TEACHER, vocab_size=len(tokenizer), max_position_embeddings=8192, tie_word_embeddings=True)
    saved(folder, config, torch.float32)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writer():
    library = standard_library(held_out=True)[:12]
    return lambda seed, length=1024: Writer(
        random.Random(seed), load_tokenizer("refine-nsp/tiny-delta-net"), length, library, library
    )


def test_what_comes_back_comes_back_beyond_the_window(writer):
    for seed in range(6):
        row = writer(seed).row("echoes")
        ids = row["input_ids"]
        (a, b), (c, d) = row["first"][0], row["second"][0]
        assert len(ids) == 1024 and c - b >= 256 and d - c > 60
        assert ids[a : a + d - c] == ids[c:d]
    assert writer(0).row("echoes") == writer(0).row("echoes") != writer(1).row("echoes")
    assert len(writer(0, 4096).row("echoes")["second"]) > 2


def test_answers_were_told_beyond_the_window(writer):
    made = writer(3)
    for _ in range(4):
        row, decode = made.row("facts"), made.tokenizer.decode
        assert len(row["input_ids"]) == 1024 and len(row["answers"]) == 4
        for start, end in row["answers"]:
            answer = decode(row["input_ids"][start:end]).strip()
            assert answer and answer in decode(row["input_ids"][: start - 256])


def test_a_packed_memory_comes_back_within_its_steps(teacher, tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        convert(teacher, tmp_path / name, MemorySettings(window_size=16, lact_chunk_size=16, num_lact_heads=9, seed=seed))
    pack(tmp_path / "one", tmp_path / "memory.safetensors")
    unpack(tmp_path / "other", tmp_path / "memory.safetensors", tmp_path / "back")
    whole, back = (load_model(tmp_path / name).state_dict() for name in ("one", "back"))
    for name, weight in whole.items():
        if not is_memory(name):
            torch.testing.assert_close(back[name], weight, rtol=0, atol=0)
        elif weight.ndim == 3:
            assert ((back[name] - weight).abs() <= weight.abs().amax(-1, keepdim=True) / 253).all() and weight.any()
        else:
            torch.testing.assert_close(back[name], weight.bfloat16().float(), rtol=0, atol=0)
    assert sum(map(is_memory, whole)) == 2 * 12


def ran(job: study.Job, more: dict[str, object]) -> None:
    """Run a job's command in this process, with other settings for speed."""
    words = list(job.command[1:])
    if words[0] == "-m":
        flags = (
            [word for name, value in more.items() for word in (f"--{name}", str(value))]
            if words[2] in ("midtrain", "posttrain")
            else []
        )
        assert main([*words[2:], *flags]) == 0
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
    assert job.makes.exists(), job.makes


def questions(folder: Path) -> Path:
    """Write questions to train on, in the place of the short contexts, and others to answer."""
    towns = [(f"The town of {name} is known for its {thing}.", name, thing) for name in TOWNS for thing in ("bridge", "market")]
    rows = [
        {"id": str(i), "context": c, "question": f"What is {n} known for?", "answers": [t]} for i, (c, n, t) in enumerate(towns)
    ]
    paragraphs = [{"title": n, "text": c} for c, n, _ in towns[:3]]
    many = [row | {"paragraphs": paragraphs} for row in rows]
    (folder / "short").mkdir()
    for name, made in (("squad", rows), ("hotpotqa", many)):
        (folder / "short" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (folder / "asked").mkdir()
    asked = [{"prompt": f"{c} What is {n} known for?", "answer": [t]} for c, n, t in towns[:2]]
    pq.write_table(pa.Table.from_pylist(asked), folder / "asked" / "some.parquet")
    return folder / "short"


@pytest.mark.slow
def test_its_commands_run_one_after_the_other(teacher, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "teacher").symlink_to(teacher)
    write, small = study.texts, {"max_steps": 2, "save_steps": 1, "bf16": False, "gradient_accumulation_steps": 1}
    monkeypatch.setattr(study, "texts", lambda files, name, seed, rows, **more: write(files, name, seed, 20, **more))
    monkeypatch.setattr(study, "ARMS", {name: study.ARMS[name] for name in ("ntp", "likelihood", "distill", "carried")})
    monkeypatch.setattr(study, "best_arms", lambda files: ["distill"])
    monkeypatch.setattr(study, "POST_TRAINING", study.POST_TRAINING | {"ruler_length": 320, "ruler_samples": 8})
    files = study.Files(out, None, None, None, str(questions(tmp_path)), str(tmp_path / "asked"), 1)
    exams = ("needles", "short")  # which take minutes
    for jobs in (study.base(files), study.baselines(files), study.arms(files, [0]), study.after(files)):
        for job in jobs:
            if not job.makes.exists() and job.makes.relative_to(out).parts[0] not in exams:
                ran(job, small)
    curve = [json.loads((out / "figures" / "held_out" / f"taught-{step}.json").read_text()) for step in (1, 2)]
    assert curve[0].keys() == curve[1].keys() >= {"loss 512-1023", "kl 512-1023", "first", "second", "answers", "answers right"}
    assert (out / "figures" / "held_out" / "likelihood-0.json").exists()
    monkeypatch.setattr(sys, "argv", ["tables.py", "--out", str(out), "--record", str(tmp_path / "record.json")])
    tables.main()
    written = (tmp_path / "results.md").read_text()
    assert (
        "| full attention |  | 1.000 |" in written
        and "| likelihood |" in written
        and "| distill, nested |" in written
        and "| 8,192 |" in written
    )
