"""The main job, end to end, on the shipped base: mid-train it by next-token prediction and by ReFINE on the same data in the same order,
then compare what each did to held-out text and to recall.

Whatever comes out is printed. Differences are paired by seed, with their t-interval; one that does not exceed it is called so.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from refine_nsp.environment import environment
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.statistics import t_interval
from refine_nsp.files import write_atomically
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.load import load, load_tokenizer
from refine_nsp.report import html, plots
from refine_nsp.report.runs import curve_plots as run_curves
from refine_nsp.report.runs import read_run
from refine_nsp.report.tables import Cell, Table
from refine_nsp.text.reading import read_documents
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.pretrain import encode_texts
from refine_nsp.tiny.probes import ProbeSet, make_probes, score_probes, score_text
from refine_nsp.tiny.recall import RecallTokens, recall_document
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from refine_nsp.training.data import split_documents

ARMS: dict[str, dict[str, Any]] = {
    "NTP only": {"objective": "ntp"},
    "ReFINE, paper preset": {"preset": "mid_training"},
    "ReFINE, context preset": {"preset": "context"},
    "ReFINE, exact": {"preset": "exact"},
}
BASELINE = "NTP only"
FIGURES = {
    "text_loss": "text: NTP loss",
    "text_accuracy": "text: accuracy",
    "text_entropy": "text: entropy",
    "recall_greedy": "recall: greedy EM",
    "recall_log_p": "recall: log p",
    "recall_sampled": "recall: sampled EM",
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the job. Probes are (prompt tokens, needles); the base was trained on rows of up to 512 tokens."""

    seeds: int = 3
    steps: int = 48
    sequences_per_step: int = 4
    max_length: int = 512
    learning_rate: float = 3e-4
    recall_share: float = 0.5
    probes: tuple[tuple[int, int], ...] = ((512, 16), (1024, 16), (1024, 32), (2048, 32))
    probes_per_kind: int = 48
    text_windows: int = 48


def settings(full: bool, seeds: int | None = None, steps: int | None = None) -> Settings:
    """The default job (minutes) or the full one, with the given overrides. RefineError for a count below what it can use."""
    chosen = Settings(seeds=6, steps=150, probes_per_kind=300) if full else Settings()
    if (seeds is not None and seeds < 1) or (steps is not None and steps < 1):
        raise RefineError(f"--seeds and --steps must be at least 1, got {seeds} and {steps}")
    return Settings(**{**asdict(chosen), "seeds": seeds or chosen.seeds, "steps": steps or chosen.steps})


@dataclass(frozen=True)
class Material:
    """stream: training text ids. windows [n, T]: held-out text. probes: recall, in held-out filler."""

    stream: torch.Tensor
    windows: torch.Tensor
    probes: list[ProbeSet]


def quickstart(s: Settings, output_dir: str, model_name: str, data: str | None, text_column: str) -> Table:
    """Run all arms (those finished before are kept), print the table, write the page; returns the table."""
    out, console = Path(output_dir), Console()
    torch.set_flush_denormal(True)
    tokenizer = load_tokenizer(model_name)
    material = prepare(s, tokenizer, data, text_column)
    results: dict[str, list[dict[str, float]]] = {"base": [base_figures(out, s, model_name, data, material)]}
    for arm in ARMS:
        results[arm] = [run_arm(out, s, arm, seed, model_name, data, tokenizer, material) for seed in range(s.seeds)]
    tables = [results_table(results), differences_table(results), probes_table(results, s)]
    for table in tables:
        console.print(table.rich())
    record = {"settings": asdict(s), "figures": results, "tables": [t.as_json() for t in tables]}
    write_atomically(out / "results.json", json.dumps(record, indent=1) + "\n")
    console.print(f"report: {write_report(out, s, results, model_name, data)}")
    return tables[0]


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(s: Settings, tokenizer: PreTrainedTokenizerBase, data: str | None, text_column: str) -> Material:
    """Text to train on and to be judged by; they share no document."""
    if data is None:
        train, held_out = standard_library(held_out=False), standard_library(held_out=True)
    else:
        documents = read_documents(data, (text_column,))
        most, rest = split_documents(documents, 0.1, seed=0)
        train = list(most[text_column])
        if rest is None:  # one document: its last tenth
            cut = int(len(train[0]) * 0.9)
            train, held_out = [train[0][:cut]], [train[0][cut:]]
        else:
            held_out = list(rest[text_column])
    stream, held_out_stream = encode_texts(tokenizer, train), encode_texts(tokenizer, held_out)
    count = min(s.text_windows, len(held_out_stream) // s.max_length)
    longest = max(length for length, _ in s.probes)
    if count < 1 or len(held_out_stream) < longest or len(stream) < 2 * s.max_length:
        raise RefineError(
            f"too little text: {len(stream):,} tokens to train on and {len(held_out_stream):,} held out; at least "
            f"{2 * s.max_length:,} and {longest:,} are needed"
        )
    # Windows from all over the held-out text, not its first module only.
    stride = len(held_out_stream) // count
    windows = torch.stack([held_out_stream[i * stride : i * stride + s.max_length] for i in range(count)])
    return Material(stream, windows, make_probes(tokenizer, held_out_stream.tolist(), s.probes, s.probes_per_kind, seed=12345))


def training_rows(s: Settings, seed: int, tokenizer: PreTrainedTokenizerBase, stream: torch.Tensor) -> Dataset:
    """The rows of one seed, the same for all arms: windows of text, and recall documents in a share of them."""
    rng, tokens, rows = random.Random(f"quickstart-{seed}"), RecallTokens.of(tokenizer), []
    for _ in range(s.steps * s.sequences_per_step):
        start = rng.randrange(len(stream) - s.max_length)
        ids = stream[start : start + s.max_length].tolist()
        if rng.random() < s.recall_share:
            filler = stream[start : start + 4 * s.max_length].tolist()
            ids, _ = recall_document(rng, tokens, filler, s.max_length, dense=0.3 * (0.5 + 0.5 * rng.random()))
        rows.append({"input_ids": ids})
    return Dataset.from_list(rows)


# --- arms -------------------------------------------------------------------------------------------------------------


def run_arm(
    out: Path,
    s: Settings,
    arm: str,
    seed: int,
    model_name: str,
    data: str | None,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
) -> dict[str, float]:
    """Train one arm with one seed and measure it, or read what an earlier, interrupted job measured."""
    folder = out / f"{arm.replace(', ', '-').replace(' ', '_')}-seed{seed}"
    key = {"settings": asdict(s), "arm": ARMS[arm], "seed": seed, "model": model_name, "data": data}
    if (known := read_result(folder, key)) is not None:
        return known
    model, _ = load(model_name)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    args = ReFINEConfig(
        output_dir=str(folder), run_name=f"{arm} (seed {seed})", max_steps=s.steps, max_length=s.max_length,
        per_device_train_batch_size=s.sequences_per_step, learning_rate=s.learning_rate, seed=seed, logging_steps=5,
        save_strategy="no", report_to="none", dataloader_num_workers=0, train_sampling_strategy="sequential", **ARMS[arm],
    )  # fmt: skip
    trainer = ReFINETrainer(
        model=model, args=args, train_dataset=training_rows(s, seed, tokenizer, material.stream), processing_class=tokenizer
    )
    runtime = trainer.train().metrics["train_runtime"]
    figures = {**measure(model.eval(), material), "seconds": runtime}
    write_atomically(folder / "result.json", json.dumps({"key": key, "figures": figures}, indent=1) + "\n")
    return figures


def base_figures(out: Path, s: Settings, model_name: str, data: str | None, material: Material) -> dict[str, float]:
    key = {"settings": asdict(s), "arm": None, "seed": None, "model": model_name, "data": data}
    if (known := read_result(out / "base", key)) is not None:
        return known
    figures = {**measure(load(model_name)[0], material), "seconds": 0.0}
    write_atomically(out / "base" / "result.json", json.dumps({"key": key, "figures": figures}, indent=1) + "\n")
    return figures


def read_result(folder: Path, key: dict[str, Any]) -> dict[str, float] | None:
    """Figures of a finished arm with exactly these settings."""
    path = folder / "result.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["figures"] if record["key"] == json.loads(json.dumps(key)) else None


def measure(model: FastWeightForCausalLM, material: Material) -> dict[str, float]:
    """All figures of one model."""
    text = score_text(model, material.windows)
    recall = {f"{p.length}/{p.needles}": score_probes(model, p) for p in material.probes}
    return {
        "text_loss": text.loss,
        "text_accuracy": text.accuracy,
        "text_entropy": text.entropy,
        "recall_greedy": mean(r.greedy for r in recall.values()),
        "recall_log_p": mean(r.log_p for r in recall.values()),
        "recall_sampled": mean(r.sampled for r in recall.values()),
        **{f"greedy {k}": r.greedy for k, r in recall.items()},
    }


# --- tables and page --------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """mean +- standard deviation over seeds."""
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def results_table(results: dict[str, list[dict[str, float]]]) -> Table:
    rows: list[list[Cell]] = [
        [title, *(spread([f[key] for f in seeds]) for seeds in results.values())] for key, title in FIGURES.items()
    ]
    rows.append(["training seconds", *(f"{mean(f['seconds'] for f in seeds):.0f}" for seeds in results.values())])
    note = f"mean ± standard deviation over {len(results[BASELINE])} seed(s) of training; recall: mean over all kinds of probe"
    return Table("Base and arms", ["", *results], rows, [note])


def paired(results: dict[str, list[dict[str, float]]], arm: str, key: str) -> tuple[float, float]:
    """Mean difference to the baseline, paired by seed, and half the width of its 95 % t-interval (nan with one seed)."""
    return t_interval([a[key] - b[key] for a, b in zip(results[arm], results[BASELINE], strict=True)])


def differences_table(results: dict[str, list[dict[str, float]]]) -> Table:
    arms = [arm for arm in ARMS if arm != BASELINE]
    seeds, rows, exceeding = len(results[BASELINE]), [], []
    for key, title in FIGURES.items():
        cells: list[Cell] = [title]
        for arm in arms:
            d, half = paired(results, arm, key)
            clear = abs(d) > half  # never with one seed, whose interval is nan
            cells.append(f"{d:+.4f}" + (f" ± {half:.4f}" if seeds > 1 else "") + (" *" if clear else ""))
            if clear:
                exceeding.append(f"{arm}: {title} {d:+.4f}")
        rows.append(cells)
    notes = [
        f"± half a 95 % t-interval over {seeds} seeds, paired by seed; * where the difference exceeds it"
        if seeds > 1
        else "one seed: no spread, so nothing can be said to exceed it",
        f"Exceeding the spread: {'; '.join(exceeding) or 'none'}. Of {len(arms) * len(FIGURES)} comparisons about one in twenty "
        "does so by chance.",
    ]
    return Table(f"Differences to {BASELINE}, same data order", ["", *arms], rows, notes)


def probes_table(results: dict[str, list[dict[str, float]]], s: Settings) -> Table:
    rows: list[list[Cell]] = []
    for length, needles in s.probes:
        key = f"greedy {length}/{needles}"
        rows.append([f"{length} tokens, {needles} needles", *(spread([f[key] for f in seeds]) for seeds in results.values())])
    note = f"{s.probes_per_kind} probes a kind; the arms train on rows of {s.max_length} tokens, so longer prompts extrapolate"
    return Table("Greedy recall by kind of probe", ["", *results], rows, [note])


def write_report(out: Path, s: Settings, results: dict[str, list[dict[str, float]]], model_name: str, data: str | None) -> Path:
    arms = [a for a in ARMS if a != BASELINE]
    drawn = []
    for keys, title in ((("recall_greedy", "recall_sampled"), "recall"), (("text_loss", "text_accuracy"), "held-out text")):
        groups = {a: [(d, 0.0 if math.isnan(h) else h) for d, h in (paired(results, a, k) for k in keys)] for a in arms}
        drawn.append(plots.forest_plot(groups, [FIGURES[k] for k in keys], f"{title}: difference to {BASELINE}", "difference"))
    runs = [read_run(p.parent) for p in sorted(out.glob("*-seed0/metrics.jsonl"))]
    sections = [
        html.Section("Results", results_table(results).html() + differences_table(results).html() + html.plots(*drawn)),
        html.Section("Recall by length and number of needles", probes_table(results, s).html()),
        html.Section("Training curves (seed 0)", run_curves(runs)),
        html.Section("How it was made", html.preformatted("settings", json.dumps(asdict(s), indent=1))
                     + html.preformatted("arms", json.dumps(ARMS, indent=1))
                     + html.preformatted("environment", json.dumps(environment(), indent=1))),
    ]  # fmt: skip
    lead = f"{model_name}, mid-trained on {data or 'the Python standard library and generated recall documents'}"
    return write_atomically(out / "report.html", html.page("Mid-training, with and without ReFINE", lead, sections))
