"""Broken input by the thousand, through the command line itself: configurations, flags, data, models, and the folders that runs leave.

    python -m tests.fuzz --cases 10000 [--seed 0] [--kinds KIND ..]        (or `make fuzz`)

Half of the kinds do real work: a step of training on a tiny model, a few answers, a page. Every case ends with exit code 0, or with 1
(2: flags that cannot be read) and one line that is our own: never another library's error, a hang, or a half-written file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import yaml
from datasets import Dataset, disable_progress_bars
from huggingface_hub import constants as hub
from safetensors.torch import load_file

from refine_nsp.cli import main
from refine_nsp.commands import NAMES
from refine_nsp.commands.command_line import commands
from refine_nsp.progress import step_progress
from tests.models.families import build

ENDS: Counter[str] = Counter()  # how cases ended: kinds of which none works, or all do, show little
COMMON = [flag.name for flag in commands()["midtrain"].flags.values() if flag.common]
SECONDS = 60  # after which a case hangs
LONGEST_USAGE_ERROR = 800  # characters
CODE = "def add(a, b):\n    return a + b\n"
# Beside the one line that says what is wrong, on stderr: progress, where results are, warnings with the line they come from.
HARMLESS = re.compile(
    r"^(\w[\w :]*: \d+/\d+|model: |page: |tables: |report: |/|interrupted; |[^ ]*:\d+: \w*Warning: |warning: |  )"
)
WORDS = [
    "",
    " ",
    "0",
    "-1",
    "1e999",
    "nan",
    "None",
    "true",
    "[]",
    "{}",
    "../x",
    "/",
    "\0",
    "é",
    "a" * 5000,
    "--",
    "-",
    "*",
    "$(x)",
    "\n",
    "1,5",
    "cosine",
    "closed_form",
    "ntp",
    "steps",
    "3",
    "0.5",
    "no",
    "os.getcwd",
    "refine-nsp/tiny-delta-net",
    "refine-nsp/none",
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10**30,
    0.5,
    -0.1,
    1e-300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "cosine",
    "closed_form",
    "none",
    [],
    ["cosine"],
    [1, [2]],
    {},
    {"a": 1},
    {"a": {"b": []}},
    "2020-01-01",
    b"\x00\xff",
    "../..",
    "~",
    "a\0b",
    "é" * 300,
]
BYTES = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\xed\xa0\x80",
    b"[" * 2000,
    b"a" * 100_000,
    b"\n" * 50,
    b'{"text": 1}\n',
    b'{"text": null}\n',
    b'{"text": "a", "text": "b"}\n',
    b'{"other": "a"}\n',
    b'"text"\n',
    b"NaN\n",
    b"\x1f\x8b\x08",
    b"PAR1",
]


class Case:
    """A folder of its own, with one good text, and a random source."""

    def __init__(self, rng: random.Random, folder: Path, models: Path) -> None:
        self.rng, self.folder, self.models = rng, folder, models
        self.text = folder / "good.txt"
        self.text.write_text(CODE * 60)

    def midtrain(self, *words: str) -> list[str]:
        out = str(self.folder / "run")
        return [
            "midtrain",
            "--dataset_name",
            str(self.text),
            "--output_dir",
            out,
            "--max_length",
            "128",
            "--use_cpu",
            "--dry_run",
            *words,
        ]

    def mutated(self, content: bytes) -> bytes:
        """With some bytes changed, left out, doubled or put in."""
        data = bytearray(content)
        for _ in range(self.rng.choice([1, 1, 2, 5, 50])):
            at = self.rng.randrange(len(data) + 1)
            kind = self.rng.randrange(5)
            if kind == 0 and data:
                data[at % len(data)] = self.rng.randrange(256)
            elif kind == 1:
                del data[at : at + self.rng.choice([1, 10, 1000])]
            elif kind == 2:
                data[at:at] = self.rng.choice(BYTES)
            elif kind == 3:
                data[at:at] = data[at : at + 200]
            else:
                data = data[:at]
        return bytes(data)

    def real(self, command: str, *words: str) -> list[str]:
        """A run of one step with a tiny model."""
        given = (
            "--max_steps 1 --max_length 128 --per_device_train_batch_size 2 --positions_per_sequence 2 --report_to none --use_cpu"
        )
        model = ["--model_name_or_path", str(self.models / "delta_net")]
        return [command, "--output_dir", str(self.folder / "run"), *given.split(), *model, *words]

    def changed(self, content: Any) -> Any:
        """JSON with some values, keys or items changed, left out or put in; its bytes are mutated by `written`."""
        content, rng = copy.deepcopy(content), self.rng
        for _ in range(rng.choice([1, 1, 1, 3])):
            at, parents = content, []
            while isinstance(at, dict | list) and at and (not parents or rng.random() < 0.7):
                key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
                parents.append((at, key))
                at = at[key]
            if not parents:
                return rng.choice([*VALUES[:-1], content])
            parent, key = parents[-1]
            kind = rng.randrange(4)
            if kind == 0:
                del parent[key]
            elif kind == 1 and isinstance(parent, list):
                parent.append(parent[key])
            else:
                value = rng.choice(VALUES)
                parent[key] = value.decode("latin-1") if isinstance(value, bytes) else value
        return content

    def written(self, path: Path, content: Any, lines: bool = False) -> Path:
        """A JSON file (one value a line with `lines`), most often with something wrong in it."""
        kind = self.rng.random()
        if kind < 0.6:
            content = self.changed(content)
        rows = content if lines and isinstance(content, list) else [content]
        data = "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.mutated(data) if kind > 0.8 else data)
        return path

    def settings(self, choices: dict[str, list[Any]]) -> list[str]:
        """Flags with values that may or may not be meant."""
        names = self.rng.sample(sorted(choices), min(len(choices), self.rng.choice([0, 1, 1, 2, 3])))
        return [w for n in names for w in (f"--{n}", str(self.rng.choice(choices[n])))]


NUMBERS = [-1, 0, 1, 2, 3, 0.5, 7, 10**6, "1e30", "nan", "inf", "none", "x", ""]
COUNTS = [-1, 0, 1, 2, 0.5, "x"]
SIZES = [-1, 0, 1, 2, 3, 200, 64]
TOKENS = [-1, 0, 1, 2, 50, 10**9, "x"]


def configuration(case: Case) -> list[str]:
    """A YAML file of known and unknown keys with any values, or one that is hardly YAML."""
    path, rng = case.folder / "config.yaml", case.rng
    keys = [
        *COMMON,
        "max_lenght",
        "",
        "1",
        "min_prefix",
        "local_window",
        "optim",
        "lr_scheduler_type",
        "fsdp",
        "deepspeed",
        "accelerator_config",
    ]
    settings = {rng.choice(keys): rng.choice(VALUES) for _ in range(rng.choice([1, 1, 2, 4]))}
    settings = {
        k: v
        for k, v in settings.items()
        if k not in ("output_dir", "dataset_name", "model_name_or_path", "resume_from_checkpoint")
    }
    text = yaml.safe_dump(settings, allow_unicode=True).encode()
    if rng.random() < 0.4:
        text = case.mutated(text)
    if rng.random() < 0.05:
        text = b"a: &a [1]\nb: " + b"[*a," * 20 + b"1" + b"]" * 20
    path.write_bytes(text)
    return case.midtrain("--config", str(path))


def flags(case: Case) -> list[str]:
    """Flags of any command with any words behind them."""
    rng = case.rng
    command = rng.choice([*NAMES, "midtrian", "", "--x"])
    keys = rng.choices([k for k in COMMON if k not in ("output_dir", "dataset_name")], k=rng.choice([1, 2, 3]))
    words = [
        w
        for key in keys
        for w in (rng.choice(["--", "-", "--no-", "---"]) * (rng.random() < 0.1) or "--" + key, rng.choice(WORDS))
    ]
    if command == "midtrain" or rng.random() < 0.6:
        return case.midtrain(*words)
    # Others only as far as they can come without doing their work: that is for the kinds below.
    return [command, *words, "--no_such_flag", rng.choice(WORDS)]


def data_file(case: Case) -> list[str]:
    """Text, jsonl or parquet, mutated; or something that is no file."""
    rng = case.rng
    ending = rng.choice([".txt", ".jsonl", ".parquet", ".json", ".md", ".bin", ""])
    path = case.folder / f"data{ending}"
    if ending in (".jsonl", ".json"):
        good = "".join(json.dumps({"text": "a b c d " * rng.choice([1, 50, 200]), "n": i}) + "\n" for i in range(5)).encode()
    elif ending == ".parquet":
        Dataset.from_dict({"text": ["a b c d " * 50] * 3}).to_parquet(str(path))
        good = path.read_bytes()
    else:
        good = b"def f(x):\n    return x\n" * rng.choice([1, 30, 200])
    path.unlink(missing_ok=True)
    special = rng.random()
    if special < 0.04:
        os.mkfifo(path)
    elif special < 0.08:
        path.symlink_to(path)
    elif special < 0.12:
        path.mkdir()
        (path / "deeper").symlink_to(path)
        (path / "a.txt").symlink_to("/nowhere")
    elif special < 0.16:
        path.write_bytes(good)
        path.chmod(0)
    else:
        path.write_bytes(case.mutated(good) if rng.random() < 0.9 else good)
    more = rng.choice(
        [[], ["--streaming", "--max_steps", "2"], ["--packing"], ["--text_column", rng.choice(["text", "n", "x", ""])]]
    )
    return [*case.midtrain(*more)[:1], "--dataset_name", str(path), *case.midtrain(*more)[3:]]


def model_folder(case: Case) -> list[str]:
    """A saved model with one file mutated, emptied, removed, or put in another's place."""
    rng = case.rng
    folder = case.folder / "model"
    shutil.copytree(case.models / rng.choice(sorted(p.name for p in case.models.iterdir())), folder)
    files = sorted(p for p in folder.iterdir() if p.is_file())
    file, kind = rng.choice(files), rng.randrange(6)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(b"")
    elif kind == 2:
        file.write_bytes(rng.choice(files).read_bytes())
    elif file.suffix == ".json" and kind == 3:
        content = json.loads(file.read_text())
        key = rng.choice(sorted(content)) if isinstance(content, dict) and content else "x"
        if isinstance(content, dict):
            value = rng.choice(VALUES)
            content[key] = value.decode("latin-1") if isinstance(value, bytes) else value
        file.write_text(json.dumps(content))
    else:
        file.write_bytes(case.mutated(file.read_bytes()))
    return case.midtrain("--model_name_or_path", str(folder))


# --- real work ----------------------------------------------------------------------------------------------------------
TRAINING = {
    **dict.fromkeys("learning_rate weight_decay warmup_steps max_grad_norm adam_beta1 adam_beta2 adam_epsilon seed".split(), NUMBERS),
    **dict.fromkeys("num_train_epochs save_steps eval_steps logging_steps gradient_accumulation_steps".split(), COUNTS),
    **dict.fromkeys("tau temperature lambda_rl lambda_ntp clip_low clip_high kl_coef entropy_coef dual_clip".split(), NUMBERS),
    **dict.fromkeys("rollout_length num_generations min_prefix local_window local_span segment_tokens".split(), SIZES),
    "max_steps": [-1, 0, 1, 2], "max_length": [0, 1, 2, 30, 64, 128], "positions_per_sequence": [0, 1, 4, 64],
    "optim": ["sgd", "adafactor", "adamw_torch", "adamw_bnb_8bit", "galore_adamw", "x"], "lr_scheduler_type": ["cosine", "x", "polynomial"],
    "save_strategy": ["no", "steps", "epoch", "best", "x"], "eval_strategy": ["no", "steps", "epoch"],
    "dtype": ["bfloat16", "float3", "int8", ""],
    "report_to": ["none", "tensorboard", "wandb", "x"], "objective": ["ntp", "refine", "x"],
    "preset": ["expected", "context", "likelihood"], "order": [1, 4, "inf", 0],
    "selection": ["entropy", "context_kl", "argmin"], "schedule": ["fused", "snapshot", "reprefill"], "use_peft": [True], "packing": [True],
    "streaming": [True], "bf16": [True, False], "fp16": [True], "gradient_checkpointing": [True, "x"], "log_completions": [True],
    "dataloader_num_workers": [-1, "x"], "validation_fraction": [-1, 0, 0.5, 1, 2, "nan"], "validation_windows": [-1, 0, 1],
    "lora_r": [-1, 0, 4], "lora_target_modules": ["x", "q_proj"], "load_best_model_at_end": [True], "push_to_hub": [False],
    "deepspeed": ["x"],
    "fsdp": ["full_shard", "x"], "resume_from_checkpoint": ["last", "x", "."], "torch_compile": ["x"], "neftune_noise_alpha": [5, "x"],
    "metric_for_best_model": ["x", "eval_loss"], "save_total_limit": [0, 1, -1], "reward_funcs": ["cosine", "hybrid", "x", "os.getcwd"],
    "steps_per_generation": [0, 1, 2], "context_scores": ["cached", "online"], "data_seed": [-1, 3], "label_smoothing_factor": [0.1, -1],
    "tokenizer_name": ["./x", "refine-nsp/tiny-delta-net"], "group_by_length": [True], "auto_find_batch_size": [True],
}  # fmt: skip


def training(case: Case) -> list[str]:
    """A step of mid-training with settings that may not go together."""
    return case.real("midtrain", "--dataset_name", str(case.text), *case.settings(TRAINING))


def training_data(case: Case) -> list[str]:
    """A step of mid-training on files with something wrong in them."""
    words = data_file(case)
    more = words[words.index("--dry_run") + 1 :]
    return case.real("midtrain", "--dataset_name", words[2], *more)


QUESTIONS = [
    {
        "id": str(i),
        "question": f"Who has key {i}?",
        "answers": [f"Ann {i}"],
        "context": f"Ann {i} has key {i}. " * 3,
        "title": "keys",
    }
    for i in range(6)
]
SQUAD = {"data": [{"title": "keys", "paragraphs": [
    {"context": q["context"], "qas": [{"id": q["id"], "question": q["question"], "answers": [{"text": "Ann", "answer_start": 0}]}]}
    for q in QUESTIONS]}]}  # fmt: skip
HOTPOT = [
    {"_id": q["id"], "question": q["question"], "answer": "Ann", "context": [["keys", ["Ann has it. ", "Bob not."]]]}
    for q in QUESTIONS
]
PROMPTS = [{"prompt": f"The key of door {i} is {i}{i}. " * 6, "answers": [str(i), f"{i}{i}"], "q": "The key"} for i in range(6)]
BUILT = ["--ruler_length", "200", "--ruler_samples", "4", "--max_length", "256"]


def answers(case: Case) -> list[str]:
    """A step of post-training on rows, or on questions, with something wrong in them."""
    rng = case.rng
    kind = rng.randrange(4)
    if kind < 2:
        file = case.written(case.folder / rng.choice(["rows.jsonl", "rows.json"]), PROMPTS, lines=True)
        words = [
            "--dataset_name",
            str(file),
            "--max_answer_tokens",
            "8",
            *rng.choice([[], ["--question_column", rng.choice(["q", "x", ""])]]),
        ]
    else:
        file = case.written(case.folder / "qa.json", SQUAD if kind == 2 else HOTPOT)
        words = [rng.choice(["--squad", "--hotpotqa"]), str(file), *BUILT]
    own: dict[str, list[Any]] = {"objective": ["none", "ntp"], "inner_steps": [0, 1, -1], "reference": ["random", "first", "x"],
           "answer_metric": ["f1", "x"], "ruler_samples": [0, 3, -1], "ruler_length": [0, 100, 10**6], "max_answer_tokens": [0, 4, 500],
           "apply_chat_template": [True], "validation_examples": [0, -1]}  # fmt: skip
    return case.real("posttrain", *words, *case.settings(own if rng.random() < 0.6 else TRAINING))


def text_of(case: Case) -> Path:
    """A short text, most often with something wrong in it."""
    path = case.folder / case.rng.choice(["t.txt", "t.md", "t"])
    good = CODE.encode() * case.rng.choice([0, 1, 10, 20])
    path.write_bytes(case.mutated(good) if case.rng.random() < 0.7 else good)
    return path


METHOD = {name: TRAINING[name] for name in ("tau", "temperature", "rollout_length", "num_generations", "min_prefix", "selection",
          "positions_per_sequence", "reward_funcs", "local_window", "local_span", "preset", "segment_tokens")}  # fmt: skip


def prompts(case: Case) -> list[str]:
    """`generate`, `ttt` and `inspect` on texts and with settings of any kind."""
    rng, model = case.rng, str(case.models / case.rng.choice(["delta_net", "lact_swiglu"]))
    given = ["--prompt_file", str(text_of(case))] if rng.random() < 0.7 else ["--prompt", rng.choice([*WORDS[:-2], CODE])]
    command = rng.choice(["generate", "ttt", "inspect"])
    if command == "generate":
        own: dict[str, list[Any]] = dict.fromkeys(("temperature", "top_k", "top_p", "seed"), NUMBERS) | {
            "max_new_tokens": [-1, 0, 1, 5, "x"]
        }
        return ["generate", model, *given, "--max_new_tokens", "3", *case.settings(own), *rng.choice([[], ["--greedy"]])]
    if command == "ttt":
        if given[0] == "--prompt_file":  # read whole and trained on, by two tokens at a time if so asked
            Path(given[1]).write_bytes(Path(given[1]).read_bytes()[:500])
        own = {f"ttt_{name}": values for name, values in METHOD.items()} | {"ttt_steps": [-1, 0, 1, 2], "ttt_seed": NUMBERS,
              "ttt_learning_rate": NUMBERS, "ttt_weight_decay": NUMBERS, "ttt_optimizer": ["sgd", "x"], "ttt_scope": ["batch", "never"],
              "ttt_parameters": ["lora", "fast_weights", "x"], "ttt_lora_r": [-1, 0, 2, 100],
              "ttt_estimator": ["closed_form"], "ttt_order": [1, 2, "inf", 0, 1.5],
              "ttt": ["ntp", "x"], "ttt_batch_size": [0, 2], "max_new_tokens": [-1, 0, 1, 4]}  # fmt: skip
        return ["ttt", model, *given, "--max_new_tokens", "3", "--ttt_positions_per_sequence", "2", *case.settings(own)]
    own = {
        **METHOD,
        "seed": NUMBERS,
        "max_tokens": [-1, 0, 1, 30, 200],
        "estimator": ["closed_form"],
        "output": ["t.txt/x.html", "", ".", "x/y.html"],
    }
    return ["inspect", model, str(text_of(case)), "--max_tokens", "200", *case.settings(own)]


CHOICES = [{"goal": "open a door", "sol1": "use a key", "sol2": "eat it", "label": i % 2} for i in range(4)]


def questions(case: Case) -> list[str]:
    """A small evaluation of files, or one gone on with, with something wrong in them."""
    rng, folder = case.rng, case.folder
    rows: dict[str, tuple[str, Any, bool]] = {
        "prompts": ("p.jsonl", PROMPTS, True), "documents": ("d.jsonl", [{"text": CODE * 9}] * 2, True), "qa_1": ("s.json", SQUAD, False),
        "qa_2": ("h.json", HOTPOT, False), "piqa": ("sc/piqa.jsonl", CHOICES, True),
        "hotpotqa": ("lb/hotpotqa.jsonl", [{**q, "input": q["question"], "_id": q["id"]} for q in QUESTIONS[:2]], True),
    }  # fmt: skip
    task = rng.choice([*rows, "niah_single_1"])
    where = {"qa_1": "squad", "qa_2": "hotpotqa", "piqa": "short_context", "hotpotqa": "longbench"}.get(task, task)
    words: list[str] = []
    if task in rows:
        name, content, lines = rows[task]
        file = case.written(folder / name, content, lines)
        words = [f"--{where}", str(file.parent if "/" in name else file)]
    elif rng.random() < 0.3:
        words = ["--essays", str(text_of(case))]
    out = ["evaluate", str(case.models / "delta_net"), "--tasks", task, *words, "--lengths", "512", "--samples", "1", "--limit", "1",
           "--prompts_budget", "3", "--output_dir", str(folder / "run")]  # fmt: skip
    own: dict[str, list[Any]] = {
        **dict.fromkeys("limit seed batch_tokens max_prompt_tokens window bucket document_tokens".split(), TOKENS),
        "lengths": [-1, 0, 1, 50, "x"], "samples": [-1, 0, 2, "x"], "prompts_budget": [-1, 0, 2, 300, "x"],
        "depths": [-1, 0, 0.5, 2, "nan", "x"], "protocol": ["published", "x"], "prompts_metric": ["f1", "x"], "text_column": ["x", "text"],
        "ttt": ["ntp", "refine"], "dtype": ["bfloat16", "float3"], "tokenizer_name": ["./x"], "tasks": ["x", "lm_eval:x", "longbench"],
    }  # fmt: skip
    if rng.random() < 0.3 and ended(out)[0] == 0:
        damage(case, folder / "run")
        return out
    return [*out, *case.settings(own)]


def damage(case: Case, folder: Path) -> None:
    """Change one of the files of a run."""
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".yaml", ".safetensors", ".pt", ".pth")
    )
    if not files:
        return
    file = case.rng.choice(files)
    if file.suffix in (".json", ".jsonl") and case.rng.random() < 0.6:
        values = (
            [json.loads(line) for line in file.read_text().splitlines()]
            if file.suffix == ".jsonl"
            else [json.loads(file.read_text())]
        )
        changed = [case.changed(v) if i == len(values) // 2 else v for i, v in enumerate(values)]
        file.write_text("".join(json.dumps(v, default=str) + "\n" for v in changed))
    else:
        file.write_bytes(case.mutated(file.read_bytes()))


@functools.cache
def finished(models: Path, command: str) -> Path:
    """Folders that good runs leave, made once: of training with a checkpoint, and of an evaluation."""
    folder = models.parent / f"finished {command}"
    folder.mkdir()
    case = Case(random.Random(0), folder, models)
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1", "--log_completions"]
    words = {
        "midtrain": case.real("midtrain", "--dataset_name", str(case.text), *saving),
        "evaluate": ["evaluate", str(models / "delta_net"), "--tasks", "niah_single_1", "--lengths", "512", "--samples", "2",
                     "--output_dir", str(folder / "run")],
    }[command]  # fmt: skip
    code, said = ended(words)
    assert code == 0, said
    return folder


def folders(case: Case) -> list[str]:
    """`report`, `compare`, `generate`, `export` and going on from a checkpoint, with folders of runs in which a file is not what it was."""
    rng = case.rng
    command = rng.choice(["report", "compare", "midtrain", "generate", "export"])
    made = finished(case.models, "evaluate" if command == "compare" else "midtrain")
    shutil.copytree(made / "run", case.folder / "earlier")
    run = case.folder / "earlier"
    damage(case, run)
    if command == "report":
        return [
            "report",
            str(run),
            *rng.choice([[], [str(made / "run")], [str(run)]]),
            "--output",
            rng.choice(["r.html", "x/r.html", ".", ""]),
        ]
    if command == "compare":
        pair = [str(run), str(made / "run")]
        return ["compare", *rng.choice([pair, pair[::-1]]), *rng.choice([[], ["--output", rng.choice(["c.html", "c.md", "."])]])]
    if command == "generate":
        return ["generate", str(run), "--prompt", "def", "--max_new_tokens", "2", "--greedy"]
    if command == "export":
        return ["export", str(run / rng.choice(["checkpoint-1", "", "x"])), rng.choice(["out", str(run), ""])]
    shutil.move(run, case.folder / "run")
    again = ["--max_steps", "2", "--dataset_name", str(made / "good.txt"), "--save_strategy", "no", "--resume_from_checkpoint"]
    return case.real("midtrain", *again, rng.choice(["last", str(case.folder / "run" / "checkpoint-1"), "x"]))


def pretraining(case: Case) -> list[str]:
    """A file of settings of `pretrain`, as far as a dry run goes."""
    good = {
        "model_type": "delta_net",
        "max_length": 2048,
        "warmup_steps": 2,
        "learning_rate": 0.001,
        "seed": 0,
        "output_dir": str(case.folder / "run"),
    }
    good |= {"phases": [{"steps": 10, "length": 64, "shares": {"needles": 0.5}, "dense": 0.2, "answer_weight": 2.0}]}
    content = case.changed(good) if case.rng.random() < 0.7 else {case.rng.choice(sorted(good)): case.rng.choice(VALUES)}
    data = yaml.safe_dump(content).encode()
    path = case.folder / "config.yaml"
    path.write_bytes(case.mutated(data) if case.rng.random() < 0.3 else data)
    return ["pretrain", "--config", str(path), "--dry_run", *case.settings({"seed": NUMBERS, "learning_rate": NUMBERS})]


KINDS: dict[str, Callable[[Case], list[str]]] = {
    "configuration": configuration, "flags": flags, "data file": data_file, "model folder": model_folder, "training": training,
    "training data": training_data, "answers": answers, "prompts": prompts, "questions": questions, "folders": folders,
    "pretraining": pretraining,
}  # fmt: skip


def run_case(kind: str, seed: int, models: Path) -> str | None:
    """What is wrong with how a case ended; None where nothing is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = Case(random.Random(f"{kind}-{seed}"), folder, models)
        here, environment = os.getcwd(), dict(os.environ)
        os.chdir(folder)
        try:
            words = KINDS[kind](case)
            before = states(folder)
            code, said = ended(words)
        finally:
            os.chdir(here)
            os.environ.clear()  # transformers notes there what was asked of it
            os.environ.update(environment)
        if code in (130, 143):
            sys.exit(code)  # the fuzzing itself was asked to stop
        ENDS[f"{kind}: exit code {code if isinstance(code, int) else '?'}"] += 1
        shown = [w if len(w) < 200 else f"{w[:200]}…" for w in words]
        problem = problem_of(code, said)
        if problem is None and "--dry_run" in words and (folder / "run").exists():
            problem = "a dry run left a folder"
        if problem is None:
            written = [path for path, state in states(folder).items() if state not in before.values()]
            problem = next((p for path in written if (p := broken(path))), None)
        return None if problem is None else f"{problem}: {shown}: {said[-600:]}"


def problem_of(code: Any, said: str) -> str | None:
    """What is wrong with an exit code and what was written on stderr; None where nothing is."""
    lines = [line for line in said.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("refine-nsp: ")]
    if code not in (0, 1, 2):
        return f"exit code {code}"
    # `describe` in cli.py says the first of errors that nobody expected.
    if "--debug for the traceback" in said or "Traceback" in said:
        return "an error that nobody expected"
    if len(ours) != (code != 0):
        return f"{len(ours)} lines of ours with exit code {code}"
    if code == 2 and (len(lines) > 1 or len(said) > LONGEST_USAGE_ERROR):
        return f"{len(lines)} lines and {len(said)} characters for a flag that cannot be read"
    strange = [line for line in lines if line not in ours and not HARMLESS.match(line)]
    return f"a line that is not ours ({strange[0][:200]!r})" if strange else None


def states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Files, and how to see whether they were written, and not only moved."""
    files = [p for p in folder.rglob("*") if not p.is_symlink() and p.is_file()]
    return {p: (s.st_ino, s.st_mtime_ns, s.st_size) for p in files for s in [p.stat()]}


def broken(path: Path) -> str | None:
    """Why a file that a command wrote is not a whole one; None where it is."""
    if ".tmp" in path.name or any(".tmp" in parent.name for parent in path.parents[:2]):
        return f"{path.name} was left"
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().split("\n") if line]
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".html":
            assert path.read_text().endswith("</html>\n")
    except Exception as error:
        return f"{path.name} is half a file ({error})"
    return None


def told_apart(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning that is not counted as the line that says what was wrong."""
    sys.stderr.write(f"warning: {' '.join(str(message).split())}\n")


class Hung(BaseException):
    """No error that a command may expect and make a line of."""


def ended(words: list[str]) -> tuple[Any, str]:
    """Exit code of the command, or what it was instead, and what it wrote on stderr."""
    hung = False

    def hang(*_: object) -> None:
        nonlocal hung
        hung = True
        signal.alarm(5)  # should something go on regardless
        raise Hung

    with tempfile.TemporaryFile("w+", buffering=1, errors="replace") as said:
        kept, previous = os.dup(2), signal.signal(signal.SIGALRM, hang)
        os.dup2(said.fileno(), 2)  # what libraries write there by other ways than ours too
        signal.alarm(SECONDS)
        try:
            warned = mock.patch("refine_nsp.cli.saying_ours", return_value=told_apart)
            with warned, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code: Any = main(words)
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        return f"hung for {SECONDS} s" if hung else code, said.read()


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to read and write what its mode forbids, where the system can take it away for a while (Linux)."""
    header, kept = (
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )  # version 3: effective, permitted, inheritable, twice
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or libc.capget(header, kept) != 0:
        yield
        return
    less = (ctypes.c_uint32 * 6)(*kept)
    less[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, less)
    try:
        yield
    finally:
        libc.capset(header, kept)


def save_models(folder: Path) -> Path:
    """Tiny models in the hub's layout, with the shipped tokenizer."""
    from refine_nsp.models.load import load_tokenizer

    tokenizer = load_tokenizer("refine-nsp/tiny-delta-net")
    for family in ("delta_net", "lact_swiglu"):
        build(family, vocab_size=len(tokenizer)).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


def fuzz(cases: int, seed: int, quiet: bool = False, kinds: list[str] | None = None) -> list[str]:
    """What is wrong, a line each."""
    disable_progress_bars()
    found: list[str] = []
    names = kinds or list(KINDS)
    cache, offline = datasets.config.HF_DATASETS_CACHE, hub.HF_HUB_OFFLINE
    with tempfile.TemporaryDirectory() as name, unprivileged(), step_progress(cases, 0, "fuzz", quiet) as progress:
        datasets.config.HF_DATASETS_CACHE = Path(name) / "cache"
        datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
        models = save_models(Path(name) / "models")
        try:
            for i in range(cases):
                kind = names[i % len(names)]
                if (wrong := run_case(kind, seed + i, models)) is not None:
                    found.append(f"{kind} {seed + i}: {wrong}")
                    sys.__stderr__.write(found[-1] + "\n")
                progress.advance(0, 1, {"wrong": len(found)})
        finally:
            datasets.config.HF_DATASETS_CACHE = cache
            datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = offline
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="only these")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SEED"), help="run one case again")
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as name, unprivileged():
            sys.exit(run_case(args.one[0], int(args.one[1]), save_models(Path(name) / "models")))
    wrong = fuzz(args.cases, args.seed, kinds=args.kinds)
    sys.__stderr__.write("".join(f"{name}: {count:,}\n" for name, count in sorted(ENDS.items())))
    sys.__stderr__.write(f"{args.cases:,} cases, {len(wrong)} wrong\n")
    sys.exit(bool(wrong))
