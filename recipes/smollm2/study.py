"""Run the study on a real model (plan.md), or a part of it; a second call does what is missing.

    python recipes/smollm2/study.py base          fetch, convert, write texts, teach the memory, and measure its curve
    python recipes/smollm2/study.py arms          train and measure every arm
    python recipes/smollm2/study.py baselines     measure the window alone, full attention, and prompts read twice
    python recipes/smollm2/study.py after         post-train the two best arms, adapt them at test time, and ask questions
    python recipes/smollm2/study.py               all of these, one after the other

Each job is one command that could be typed, is printed before it is run, and is done when what it makes is there. --seeds lets two
processes share the arms. Novels, essays, questions and short contexts are files of yours; without novels the text is that of Python's
standard library, and without the others their jobs are left out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from refine_nsp.evaluation.run import read_results
from refine_nsp.files import read_json_lines

HERE = Path(__file__).resolve().parent
KINDS = ("novels", "echoes", "facts", "code")
NEEDLES = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
LENGTHS = (512, 1024, 2048)
MEMORY = {  # why these: docs/your_own_checkpoint.md, "What the memory starts with"
    "window_size": 256, "lact_chunk_size": 256, "num_lact_heads": 9, "inter_multi": 3, "qkv_silu": False, "w1_learning_rate": 1,
}  # fmt: skip
SCORED = {"local_window": 256, "context_scores": "teacher"}
ARMS: dict[str, dict[str, object]] = {
    "ntp": {"objective": "ntp"},
    "likelihood": {"preset": "likelihood", **SCORED},
    "expected": {"preset": "expected", **SCORED},
    "distill": {"objective": "distill", "lambda_context": 0, "lambda_ntp": 0},
    "order_4": {"preset": "expected", "order": 4, **SCORED},
    "paper": {"preset": "mid_training"},
    "carried": {"objective": "ntp", "carry_states": True},
}
MAIN_ARMS = ("ntp", "likelihood", "expected", "distill")  # with three seeds; the others have the first alone
TAUGHT = ("likelihood", "expected", "distill", "order_4")  # read the teacher
RATES = (5e-4, 2e-3)  # tried for every arm alike, on a seed that is not reported
TRIAL_SEED, TRIAL_STEPS = 9, 30
CARRIED_TOKENS = 4096  # of a document whose windows are carried
POST = {"sft": {"objective": "none"}, "nested": {"objective": "refine"}}
POST_TRAINING: dict[str, object] = {
    "learning_rate": 0, "ruler_length": 2048, "ruler_samples": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "bf16": True, "warmup_steps": 2, "logging_steps": 2, "seed": 1, "eval_strategy": "steps", "report_to": "none",
}  # fmt: skip
POST_STEPS, POST_TRIAL_STEPS = 24, 8
QUESTIONS = 50  # of each file
TTT_RATES = (1e-5, 1e-4)  # of all weights: one step a prompt


@dataclass(frozen=True)
class Job:
    """Make a file or folder by a command."""

    makes: Path
    command: tuple[str, ...]


@dataclass(frozen=True)
class Files:
    """Hold the folder of the study, and the paths of a user's files, each of which may be missing."""

    out: Path
    novels: str | None
    held_out: str | None
    essays: str | None
    short_context: str | None
    questions: str | None
    samples: int


def script(name: str, *arguments: object) -> tuple[str, ...]:
    """Make a command of one of the scripts beside this one."""
    return (sys.executable, str(HERE / name), *map(str, arguments))


def refine_nsp(command: str, *places: object, **settings: object) -> tuple[str, ...]:
    """Make a command of refine-nsp, with settings as flags; a setting of None is left out."""
    flags = []
    for name, value in settings.items():
        if value is not None:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return (sys.executable, "-m", "refine_nsp.cli", command, *map(str, places), *flags)


def measured(files: Files, name: str, model: Path, texts: str = "held_out") -> Job:
    """Measure a model's losses on held-out rows."""
    return Job(
        files.out / "figures" / texts / f"{name}.json",
        script("measure.py", model, "--teacher", files.out / "teacher", "--texts", files.out / texts, "--output",
               files.out / "figures" / texts / f"{name}.json"),
    )  # fmt: skip


def asked(files: Files, name: str, model: Path, **settings: object) -> Iterator[Job]:
    """Ask a model for RULER's needles, and for what a short context holds."""
    needles, short = (files.out / kind / name for kind in ("needles", "short"))
    yield Job(
        needles / "report.html",
        refine_nsp("evaluate", model, tasks=NEEDLES, lengths=LENGTHS, samples=files.samples, essays=files.essays, output_dir=needles,
                   dtype="bfloat16", **settings),
    )  # fmt: skip
    if files.short_context is not None and not settings:
        yield Job(
            short / "report.html",
            refine_nsp("evaluate", model, tasks="short_context", short_context=files.short_context, limit=100, output_dir=short,
                       dtype="bfloat16"),
        )  # fmt: skip


def texts(files: Files, name: str, seed: object, rows: int, tokens: int = 1024, held_out: bool = False) -> Job:
    """Write rows of a seed."""
    long = files.held_out if held_out else files.novels
    given = (["--long", long] if long is not None else []) + (["--held_out"] if held_out else [])
    command = script(
        "texts.py", files.out / "teacher", files.out / name, "--rows", rows, "--tokens", tokens, "--seed", seed, *given
    )
    return Job(files.out / name / "code.jsonl", command)


def data_of(files: Files, name: str) -> list[Path]:
    return [files.out / name / f"{kind}.jsonl" for kind in KINDS]


def base(files: Files) -> Iterator[Job]:
    """Make the base, its control that never writes, and the curves of both."""
    out = files.out
    yield Job(out / "teacher", script("fetch.py", out / "teacher"))
    yield texts(files, "texts", 0, 2400)
    yield texts(files, "held_out", "held out", 96, held_out=True)
    yield texts(files, "choose", "choose", 96, held_out=True)
    for made, name, more in (("taught", "converted", {}), ("control", "silent", {"lact_chunk_size": 4096})):
        memory = {**MEMORY, **more, "centre_on": out / "texts" / "centre.jsonl"}
        yield Job(out / name, refine_nsp("convert", out / "teacher", out / name, **memory))
        yield Job(
            out / made / "report.html",
            refine_nsp("midtrain", config=HERE / "teach.yaml", model_name_or_path=out / name, teacher=out / "teacher",
                       dataset_name=data_of(files, "texts"), output_dir=out / made, resume_from_checkpoint="last"),
        )  # fmt: skip
    yield Job(out / "memory.safetensors", script("memory.py", "pack", out / "taught", out / "memory.safetensors"))
    yield Job(out / "base", script("memory.py", "unpack", out / "converted", out / "memory.safetensors", out / "base"))
    for made in ("taught", "control"):
        for checkpoint in sorted((out / made).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
            yield measured(files, f"{made}-{checkpoint.name.split('-')[1]}", checkpoint)


def baselines(files: Files) -> Iterator[Job]:
    """Measure what is there without training, and the base."""
    for name, model in (("full attention", "teacher"), ("window alone", "converted"), ("base", "base"), ("control", "control")):
        yield measured(files, name, files.out / model)
        yield from asked(files, name, files.out / model)
    yield from asked(files, "window alone, read twice", files.out / "converted", read_twice=True)
    yield from asked(files, "base, read twice", files.out / "base", read_twice=True)


def trained(files: Files, arm: str, seed: int, rate: float, folder: Path, **settings: object) -> Job:
    """Train an arm from the base on a seed's rows."""
    name = f"texts-{seed}-long" if arm == "carried" else f"texts-{seed}"
    taught = {"teacher": files.out / "teacher"} if arm in TAUGHT else {}
    command = refine_nsp(
        "midtrain", config=HERE / "arm.yaml", model_name_or_path=files.out / "base", dataset_name=data_of(files, name), seed=seed,
        fast_weight_learning_rate=rate, output_dir=folder, resume_from_checkpoint="last", **ARMS[arm], **taught, **settings,
    )  # fmt: skip
    return Job(folder / "report.html", command)


def rows_for(files: Files, arm: str, seed: int) -> Job:
    """Write the rows that an arm of a seed is trained on: half a million tokens and some, so that none comes twice."""
    if arm == "carried":
        return texts(files, f"texts-{seed}-long", seed, 150, tokens=CARRIED_TOKENS)
    return texts(files, f"texts-{seed}", seed, 600)


def chosen_rate(files: Files, arm: str) -> float:
    """Choose the rate whose trial answers best."""

    def loss(rate: float) -> float:
        return float(json.loads((files.out / "figures" / "choose" / f"{arm}-{rate:g}.json").read_text())["answers"])

    return min(RATES, key=loss)


def arms(files: Files, seeds: Sequence[int]) -> Iterator[Job]:
    """Try every arm's rates, train every arm with the better one, and measure it, seed by seed."""
    for arm in ARMS:
        yield rows_for(files, arm, TRIAL_SEED)
        for rate in RATES:
            folder = files.out / "trials" / f"{arm}-{rate:g}"
            yield trained(files, arm, TRIAL_SEED, rate, folder, max_steps=TRIAL_STEPS)
            yield measured(files, f"{arm}-{rate:g}", folder, "choose")
    for seed in seeds:
        for arm in ARMS if seed == 0 else MAIN_ARMS:
            folder = files.out / "arms" / f"{arm}-{seed}"
            yield rows_for(files, arm, seed + 1)
            yield trained(files, arm, seed + 1, chosen_rate(files, arm), folder)
            yield measured(files, f"{arm}-{seed}", folder)
            yield from asked(files, f"{arm}-{seed}", folder)


def best_arms(files: Files) -> list[str]:
    """Choose the two main arms whose seed 0 has found most needles."""

    def found(arm: str) -> float:
        return mean(next(iter(r.estimates.values())).mean for r in read_results(files.out / "needles" / f"{arm}-0"))

    return sorted(MAIN_ARMS, key=found, reverse=True)[:2]


def questioned(files: Files, name: str, model: Path, **settings: object) -> Iterator[Job]:
    """Ask a model RULER's questions."""
    assert files.questions is not None
    for prompts in sorted(Path(files.questions).glob("*.parquet")):
        folder = files.out / "questions" / prompts.stem / name
        yield Job(
            folder / "report.html",
            refine_nsp("evaluate", model, tasks="prompts", prompts=prompts, limit=QUESTIONS, output_dir=folder, dtype="bfloat16",
                       **settings),
        )  # fmt: skip


def post_trained(files: Files, arm: str, how: str, rate: float, folder: Path, steps: int) -> Job:
    """Post-train the memory of an arm on RULER's form of questions."""
    short = Path(str(files.short_context))
    command = refine_nsp(
        "posttrain", model_name_or_path=files.out / "arms" / f"{arm}-0", squad=short / "squad.jsonl", hotpotqa=short / "hotpotqa.jsonl",
        fast_weight_learning_rate=rate, max_steps=steps, eval_steps=steps, output_dir=folder, resume_from_checkpoint="last",
        **POST[how], **POST_TRAINING,
    )  # fmt: skip
    return Job(folder / "report.html", command)


def validation_loss(folder: Path) -> float:
    """Read a run's last validation loss."""
    return float([row["eval_loss"] for row in read_json_lines(folder / "metrics.jsonl") if "eval_loss" in row][-1])


def after(files: Files) -> Iterator[Job]:
    """Post-train the two best arms in two ways, adapt them at test time, and ask all of them RULER's questions."""
    if files.questions is None or files.short_context is None:
        print("no questions, or nothing to train on them: give --questions and --short_context")
        return
    for name, model in (("full attention", "teacher"), ("window alone", "converted"), ("base", "base")):
        yield from questioned(files, name, files.out / model)
    for arm in best_arms(files):
        model = files.out / "arms" / f"{arm}-0"
        yield from questioned(files, arm, model)
        for how in POST:
            trials = {rate: files.out / "trials" / f"{arm}-{how}-{rate:g}" for rate in RATES}
            for rate, folder in trials.items():
                yield post_trained(files, arm, how, rate, folder, POST_TRIAL_STEPS)
            best = min(RATES, key=lambda rate: validation_loss(trials[rate]))
            yield post_trained(files, arm, how, best, files.out / "post" / f"{arm}-{how}", POST_STEPS)
            yield from questioned(files, f"{arm}, {how}", files.out / "post" / f"{arm}-{how}")
        for ttt in ("ntp", "refine"):
            for rate in TTT_RATES:
                yield from questioned(files, f"{arm}, {ttt} {rate:g}", model, ttt=ttt, ttt_learning_rate=rate)


def run(jobs: Iterator[Job]) -> None:
    """Run the jobs that have not made what they make, each after the ones before it."""
    for job in jobs:
        if not job.makes.exists():
            print("\n$", shlex.join(job.command), flush=True)
            subprocess.run(job.command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts",
        nargs="*",
        default=["base", "baselines", "arms", "after"],
        help="base, baselines, arms, after [all, in this order]",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--novels", help="file of long texts to teach with")
    parser.add_argument("--held_out", help="and to measure on")
    parser.add_argument("--essays", help="haystack of RULER's needles (default: Python's reference documentation)")
    parser.add_argument("--short_context", help="folder with piqa.jsonl, arc_easy.jsonl, ...")
    parser.add_argument("--questions", help="folder of files with RULER's questions, prompts and answers")
    parser.add_argument("--samples", type=int, default=12, help="needles of a task and length [12]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    files = Files(args.out, args.novels, args.held_out, args.essays, args.short_context, args.questions, args.samples)
    parts = {
        "base": lambda: base(files), "baselines": lambda: baselines(files), "arms": lambda: arms(files, args.seeds),
        "after": lambda: after(files),
    }  # fmt: skip
    for part in args.parts:
        run(parts[part]())


if __name__ == "__main__":
    main()
