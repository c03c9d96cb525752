"""Mid-train the shipped base by next-token prediction and by the presets, on the same data in the same order, and compare the results.

Whatever comes out is printed. Differences are paired by seed and come with their t-interval, and the tables mark those that exceed it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
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
from refine_nsp.models.load import LoadedModel, load, load_tokenizer
from refine_nsp.report import html, plots
from refine_nsp.report.runs import curve_plots, read_run
from refine_nsp.report.tables import Cell, Table
from refine_nsp.text.reading import read_documents
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.documents import Writer
from refine_nsp.tiny.measures import ProbeSet, score_probes, score_text
from refine_nsp.tiny.pretrain_settings import PretrainPhase
from refine_nsp.tiny.rows import Sources, encode_texts, step_rows
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from refine_nsp.training.data import split_documents

ARMS: dict[str, dict[str, Any]] = {
    "NTP only": {"objective": "ntp"},
    "paper": {"preset": "mid_training"},
    "context": {"preset": "context"},
    "expected": {"preset": "expected"},
    "likelihood": {"preset": "likelihood"},
}
BASELINE, EXPECTED, LIKELIHOOD = "NTP only", "expected", "likelihood"
MAPPED = (BASELINE, EXPECTED, LIKELIHOOD)  # arms whose needles are drawn
ROWS_SEED = 2000  # rows are made as pretraining makes them, with seeds from here on, which no base was pretrained with
Figures = dict[str, Any]
FIGURES = {
    "text_loss": "text: NTP loss",
    "text_accuracy": "text: accuracy",
    "text_entropy": "text: entropy",
    "recall_greedy": "recall: greedy EM",
    "unseen_greedy": "recall, unseen wordings: greedy EM",
    "recall_log_p": "recall: log p",
    "recall_sampled": "recall: sampled EM",
}


@dataclass(frozen=True)
class Settings:
    """Set the sizes of the job; lengths are in tokens. The base was trained on rows of up to 1,024, so longer prompts extrapolate.

    Attributes:
        shares: share of the rows that each family of generated documents has; the other rows are plain text.
        depths: places of a needle in its prompt, 0 (at the start) to 1. prompts_per_cell: prompts for each depth and length.
    """

    seeds: int = 3
    steps: int = 16
    sequences_per_step: int = 4
    max_length: int = 1024
    learning_rate: float = 1e-4
    shares: dict[str, float] = field(default_factory=lambda: {"needles": 0.2, "listing": 0.1, "chains": 0.1, "paragraphs": 0.1})
    lengths: tuple[int, ...] = (512, 1024, 2048)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts_per_cell: int = 4
    text_windows: int = 24


def settings(full: bool, seeds: int | None = None, steps: int | None = None) -> Settings:
    """Choose the default job (minutes) or the full one, with the given overrides. Raises RefineError without a seed or a step."""
    chosen = Settings(seeds=6, steps=150, prompts_per_cell=32) if full else Settings()
    if (seeds is not None and seeds < 1) or (steps is not None and steps < 1):
        raise RefineError(f"--seeds and --steps must be at least 1, got {seeds} and {steps}")
    return replace(chosen, seeds=seeds or chosen.seeds, steps=steps or chosen.steps)


@dataclass(frozen=True)
class Material:
    """Hold the data to train on (`sources` of rows) and to measure with.

    `windows` [n, T] are held-out text; `needles` and `unseen` probes with one needle, in wordings that are trained on and in others, with a
    row for each depth and a column for each length.
    """

    sources: Sources
    windows: torch.Tensor
    needles: list[list[ProbeSet]]
    unseen: list[list[ProbeSet]]


@dataclass(frozen=True)
class Job:
    """A job holds its settings `s`, its folder `out`, the base, the user's text (or None) and what follows from them."""

    s: Settings
    out: Path
    model_name: str
    data: str | None
    tokenizer: PreTrainedTokenizerBase
    material: Material


def quickstart(s: Settings, output_dir: str, model_name: str, data: str | None, text_column: str) -> Table:
    """Run all arms, but keep those that an earlier job finished; print the tables, write the page and return the first table."""
    out, console = Path(output_dir), Console()
    out.mkdir(parents=True, exist_ok=True)  # known before any work whether results can be kept
    torch.set_flush_denormal(True)
    tokenizer = load_tokenizer(model_name)
    job = Job(s, out, model_name, data, tokenizer, prepare(s, tokenizer, data, text_column))
    results = {"base": [run_arm(job, None, None)]} | {arm: [run_arm(job, arm, seed) for seed in range(s.seeds)] for arm in ARMS}
    tables = [results_table(results), differences_table(results), lengths_table(results, s)]
    for table in tables:
        console.print(table.rich())
    console.print(finding(results))
    record = {"settings": asdict(s), "figures": results, "finding": finding(results), "tables": [asdict(t) for t in tables]}
    write_atomically(out / "results.json", json.dumps(record, indent=1) + "\n")
    console.print(f"report: {write_report(out, s, results, model_name, data)}")
    return tables[0]


def prepare(s: Settings, tokenizer: PreTrainedTokenizerBase, data: str | None, text_column: str) -> Material:
    """Prepare text to train on and to measure with; they share no document. Raises RefineError for too little text."""
    library, other = standard_library(held_out=False), standard_library(held_out=True)
    train, held_out = (library, other) if data is None else split_texts(data, text_column)
    stream, held_out_stream = encode_texts(tokenizer, train), encode_texts(tokenizer, held_out)
    count = min(s.text_windows, len(held_out_stream) // s.max_length)
    longest = max(s.lengths)
    if count < 1 or len(held_out_stream) < longest or len(stream) < 2 * s.max_length:
        raise RefineError(
            f"too little text: {len(stream):,} tokens to train on and {len(held_out_stream):,} held out; at least "
            f"{2 * s.max_length:,} and {longest:,} are needed"
        )
    # Windows come from all over the held-out text, since its first module alone says little.
    stride = len(held_out_stream) // count
    windows = torch.stack([held_out_stream[i * stride : i * stride + s.max_length] for i in range(count)])
    writer, filler = Writer.of(tokenizer, other), held_out_stream.tolist()
    needles, unseen = (needle_probes(writer, filler, s, held_out) for held_out in (False, True))
    return Material(Sources(stream, Writer.of(tokenizer, library)), windows, needles, unseen)


def split_texts(data: str, text_column: str) -> tuple[list[str], list[str]]:
    """Split off a tenth of the documents to measure with; of a single document, its last tenth."""
    most, rest = split_documents(read_documents(data, (text_column,), also=()), 0.1, seed=0)
    train = list(most[text_column])
    if rest is not None:
        return train, list(rest[text_column])
    cut = int(len(train[0]) * 0.9)
    return [train[0][:cut]], [train[0][cut:]]


def needle_probes(writer: Writer, filler: list[int], s: Settings, held_out: bool) -> list[list[ProbeSet]]:
    """Make probes with one needle in a haystack: a row for each depth of the needle, a column for each length of the prompt."""

    def made(depth: float, length: int) -> ProbeSet:
        rng = random.Random(f"needles-{held_out}-{depth}-{length}")
        starts = [rng.randrange(len(filler) - length) for _ in range(s.prompts_per_cell)]
        return ProbeSet.of(
            length, [writer.probe(rng, "needles", filler[i : i + length], length, 1, held_out, depth) for i in starts]
        )

    return [[made(depth, length) for length in s.lengths] for depth in s.depths]


def training_rows(s: Settings, seed: int, sources: Sources) -> Dataset:
    """Make the rows of one seed, the same for all arms: windows of text, and generated documents in the place of some."""
    phase = PretrainPhase(s.steps, s.max_length, s.shares, dense=0.5, answer_weight=1.0)
    steps = [step_rows(ROWS_SEED + seed, step, s.sequences_per_step, phase, sources)[0] for step in range(s.steps)]
    return Dataset.from_dict({"input_ids": torch.cat(steps).tolist()})


def run_arm(job: Job, arm: str | None, seed: int | None) -> Figures:
    """Train an arm with a seed and measure it, or without an arm measure the base; read figures that an earlier job has measured."""
    folder = job.out / ("base" if arm is None else f"{arm.replace(', ', '-').replace(' ', '_')}-seed{seed}")
    key = {"settings": asdict(job.s), "arm": arm and ARMS[arm], "seed": seed, "model": job.model_name, "data": job.data}
    path = folder / "result.json"
    known: dict[str, Figures] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("key") == json.loads(json.dumps(key)):
        return known["figures"]
    model, _ = load(job.model_name)
    seconds = 0.0 if arm is None or seed is None else train(job, model, folder, arm, seed)
    figures = {**measure(model.eval(), job.material), "seconds": seconds}
    write_atomically(path, json.dumps({"key": key, "figures": figures}, indent=1) + "\n")
    return figures


def train(job: Job, model: LoadedModel, folder: Path, arm: str, seed: int) -> float:
    """Mid-train the model as an arm says, and return the seconds it took."""
    s = job.s
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    args = ReFINEConfig(
        output_dir=str(folder), run_name=f"{arm} (seed {seed})", max_steps=s.steps, max_length=s.max_length,
        per_device_train_batch_size=s.sequences_per_step, learning_rate=s.learning_rate, seed=seed, logging_steps=5,
        save_strategy="no", report_to="none", dataloader_num_workers=0, train_sampling_strategy="sequential", **ARMS[arm],
    )  # fmt: skip
    rows = training_rows(s, seed, job.material.sources)
    trainer = ReFINETrainer(model=model, args=args, train_dataset=rows, processing_class=job.tokenizer)
    return float(trainer.train().metrics["train_runtime"])


def measure(model: LoadedModel, material: Material) -> Figures:
    """Measure a model; `map` is the share of needles found, greedy, with a row for each depth and a column for each length."""
    text = score_text(model, material.windows)
    grid, others = ([[score_probes(model, p) for p in row] for row in sets] for sets in (material.needles, material.unseen))
    known, unseen = ([score for row in rows for score in row] for rows in (grid, others))
    return {
        "text_loss": text.loss,
        "text_accuracy": text.accuracy,
        "text_entropy": text.entropy,
        "recall_greedy": mean(score.greedy for score in known),
        "unseen_greedy": mean(score.greedy for score in unseen),
        "recall_log_p": mean(score.log_p for score in known + unseen),
        "recall_sampled": mean(score.sampled for score in known + unseen),
        "map": [[score.greedy for score in row] for row in grid],
    }


def spread(values: Sequence[float]) -> str:
    """Write the mean and standard deviation over seeds."""
    return f"{mean(values):.4f} ± {stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def results_table(results: dict[str, list[Figures]]) -> Table:
    """Make a table with a row for each figure, and a column for the base and each arm."""
    rows: list[list[Cell]] = [
        [title, *(spread([f[key] for f in seeds]) for seeds in results.values())] for key, title in FIGURES.items()
    ]
    rows.append(["training seconds", *(f"{mean(f['seconds'] for f in seeds):.0f}" for seeds in results.values())])
    note = f"mean ± standard deviation over {len(results[BASELINE])} seed(s) of training; recall: mean over all kinds of probe"
    return Table("Base and arms", ["", *results], rows, [note])


def paired(results: dict[str, list[Figures]], arm: str, key: str) -> tuple[float, float]:
    """Return the mean difference to the baseline, paired by seed, and half its 95 % t-interval, which is nan with one seed."""
    return t_interval([a[key] - b[key] for a, b in zip(results[arm], results[BASELINE], strict=True)])


def differences_table(results: dict[str, list[Figures]]) -> Table:
    """Make a table of each arm's differences to the baseline, with those marked that exceed their interval."""
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


def lengths_table(results: dict[str, list[Figures]], s: Settings) -> Table:
    """Make a table of the needles found by length, over all depths."""
    rows: list[list[Cell]] = [
        [f"{length:,} tokens", *(spread([mean(row[i] for row in f["map"]) for f in seeds]) for seeds in results.values())]
        for i, length in enumerate(s.lengths)
    ]
    note = f"{s.prompts_per_cell * len(s.depths)} prompts a length; the arms train on rows of {s.max_length:,} tokens"
    return Table("Greedy recall of a needle by length", ["", *results], rows, [note])


def finding(results: dict[str, list[Figures]]) -> str:
    """Say in a sentence each what the job found of the closed forms."""
    return "Finding: " + " ".join(against_baseline(results, arm) for arm in (EXPECTED, LIKELIHOOD))


def against_baseline(results: dict[str, list[Figures]], arm: str) -> str:
    """Say how an arm's recall and text loss differ from the baseline's, and whether chance would give as much."""
    (d, half), (loss, loss_half) = (paired(results, arm, key) for key in ("recall_greedy", "text_loss"))
    start, seeds = f"{arm} against {BASELINE}: {100 * d:+.1f}", len(results[BASELINE])
    if seeds == 1:
        return f"{start} points of greedy recall (one seed, so no more can be said); text loss {loss:+.4f}."
    said = f"{seeds} seeds, {'more than' if abs(d) > half else 'no more than'} chance would give"
    return f"{start} ± {100 * half:.1f} points of greedy recall over {said}; text loss {loss:+.4f} ± {loss_half:.4f}."


def needle_maps(results: dict[str, list[Figures]], s: Settings) -> list[plots.Plot]:
    """Draw heat maps of the needles found before and after training, as means over seeds."""
    drawn = []
    for name in ("base", *MAPPED):
        maps = [f["map"] for f in results[name]]
        grid = [[100 * mean(m[i][j] for m in maps) for j in range(len(s.lengths))] for i in range(len(s.depths))]
        lengths, depths = [f"{n:,}" for n in s.lengths], [f"{d:.0%}" for d in s.depths]
        drawn.append(plots.heat_map(grid, lengths, depths, f"{name}: needles found, %", "tokens", "depth"))
    return drawn


def write_report(out: Path, s: Settings, results: dict[str, list[Figures]], model_name: str, data: str | None) -> Path:
    """Write the page: finding, maps, tables, curves, and how it was made."""
    arms = [a for a in ARMS if a != BASELINE]
    drawn = []
    for keys, title in ((("recall_greedy", "recall_sampled"), "recall"), (("text_loss", "text_accuracy"), "held-out text")):
        groups = {a: [(d, 0.0 if math.isnan(h) else h) for d, h in (paired(results, a, k) for k in keys)] for a in arms}
        drawn.append(plots.forest_plot(groups, [FIGURES[k] for k in keys], f"{title}: difference to {BASELINE}", "difference"))
    runs = [read_run(p.parent) for p in sorted(out.glob("*-seed0/metrics.jsonl"))]
    made = {"settings": asdict(s), "arms": ARMS, "environment": environment()}
    sections = [
        html.Section("Finding", f"<p>{escape(finding(results))}</p>"),
        html.Section("A needle in a haystack, before and after", html.plots(*needle_maps(results, s))),
        html.Section("Results", results_table(results).html() + differences_table(results).html() + html.plots(*drawn)),
        html.Section("Recall by length", lengths_table(results, s).html()),
        html.Section("Training curves (seed 0)", curve_plots(runs)),
        html.Section("How it was made", "".join(html.preformatted(name, json.dumps(x, indent=1)) for name, x in made.items())),
    ]
    lead = f"{model_name}, mid-trained on {data or 'the Python standard library and generated documents'}"
    return write_atomically(out / "report.html", html.page("Mid-training, with and without ReFINE", lead, sections))
