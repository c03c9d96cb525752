"""Broken input by the thousand: configurations, flags, data files and model folders, through the command line itself.

    python -m tests.fuzz --cases 10000 [--seed 0]        (or `make fuzz`)

Every case ends with exit code 0, or with 1 and one line that is our own: never another library's error, a hang, or a half-written file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, disable_progress_bars

from refine_nsp.cli import COMMANDS, main
from refine_nsp.commands.midtrain import COMMON
from refine_nsp.progress import step_progress
from tests.models.families import build

SECONDS = 60  # after which a case hangs
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
    "exact",
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
    "exact",
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
        self.text.write_text("def add(a, b):\n    return a + b\n" * 60)

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
    command = rng.choice([*COMMANDS, "midtrian", "", "--x"])
    keys = rng.choices([k for k in COMMON if k not in ("output_dir", "dataset_name")], k=rng.choice([1, 2, 3]))
    words = [
        w
        for key in keys
        for w in (rng.choice(["--", "-", "--no-", "---"]) * (rng.random() < 0.1) or "--" + key, rng.choice(WORDS))
    ]
    if command == "midtrain" or rng.random() < 0.6:
        return case.midtrain(*words)
    # Others only as far as they can come without doing their work.
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


KINDS: dict[str, Callable[[Case], list[str]]] = {
    "configuration": configuration, "flags": flags, "data file": data_file, "model folder": model_folder,
}  # fmt: skip


def run_case(kind: str, seed: int, models: Path) -> str | None:
    """What is wrong with how a case ended; None where nothing is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = Case(random.Random(f"{kind}-{seed}"), folder, models)
        words = KINDS[kind](case)
        here = os.getcwd()
        os.chdir(folder)
        try:
            code, said = ended(words)
        finally:
            os.chdir(here)
        if code in (130, 143):
            sys.exit(code)  # the fuzzing itself was asked to stop
        left = [p.name for p in folder.rglob("*") if ".tmp" in p.name]
        shown = [w if len(w) < 200 else f"{w[:200]}…" for w in words]
        if code not in (0, 1, 2):
            return f"exit code {code} of {shown}: {said[-600:]}"
        # `describe` in cli.py says this of errors that nobody expected.
        if "--debug for the traceback" in said or "Traceback" in said:
            return f"{shown}: {said[-600:]}"
        if (folder / "run").exists() or left:
            return f"{shown} left {left or 'a folder of a dry run'}"
        return None


def ended(words: list[str]) -> tuple[Any, str]:
    """Exit code of the command and what it wrote."""
    said = io.StringIO()

    def hang(*_: object) -> None:
        raise TimeoutError(f"hung for {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return main(words), said.getvalue()
    except BaseException as error:
        return f"{type(error).__name__}: {error}", said.getvalue()
    finally:
        signal.alarm(0)


def save_models(folder: Path) -> Path:
    """Tiny models in the hub's layout, with the shipped tokenizer."""
    from refine_nsp.models.load import load_tokenizer

    tokenizer = load_tokenizer("refine-nsp/tiny-delta-net")
    for family in ("delta_net", "lact_swiglu"):
        build(family, vocab_size=len(tokenizer)).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


def fuzz(cases: int, seed: int, quiet: bool = False) -> list[str]:
    """What is wrong, a line each."""
    disable_progress_bars()
    found: list[str] = []
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, step_progress(cases, 0, "fuzz", quiet) as progress:
        models = save_models(Path(name))
        for i in range(cases):
            kind = list(KINDS)[i % len(KINDS)]
            if (wrong := run_case(kind, seed + i, models)) is not None:
                found.append(f"{kind} {seed + i}: {wrong}")
                counted[kind] += 1
                sys.__stderr__.write(found[-1] + "\n")
            progress.advance(0, 1, {"wrong": len(found)})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SEED"), help="run one case again")
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as name:
            sys.exit(run_case(args.one[0], int(args.one[1]), save_models(Path(name))))
    wrong = fuzz(args.cases, args.seed)
    sys.__stderr__.write(f"{args.cases:,} cases, {len(wrong)} wrong\n")
    sys.exit(bool(wrong))
