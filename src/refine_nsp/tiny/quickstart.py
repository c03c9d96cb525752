"""Mid-train the shipped base by next-token prediction, with carried states and by the presets, on the same data, and compare the results.

Documents of one, two and four windows take turns. `NTP` starts every window from nothing, the other arms from the state that the window
before left. Whatever comes out is printed: differences come with a t-interval over seeds, and the tables mark those that exceed it.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from itertools import cycle
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
from refine_nsp.training.data import BEGINS_COLUMN, cut_windows, split_documents

BASE, NTP, CARRIED, EXPECTED, LIKELIHOOD = "base", "NTP", "carried", "expected", "likelihood"
ARMS: dict[str, dict[str, Any]] = {
    NTP: {"objective": "ntp"},
    CARRIED: {"objective": "ntp", "carry_states": True},
    EXPECTED: {"preset": "expected", "carry_states": True},
    LIKELIHOOD: {"preset": "likelihood", "carry_states": True},
}
CONTRASTS = ((CARRIED, BASE), (CARRIED, NTP), (EXPECTED, CARRIED), (LIKELIHOOD, CARRIED))
MAPPED = (BASE, NTP, CARRIED, LIKELIHOOD)  # have their needles drawn by depth
ROWS_SEED = 2000  # rows are made as pretraining makes them, with seeds from here on, which no base was pretrained with
Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Set the sizes of the job; lengths are in tokens. The base was trained on rows of up to 1,024, so longer prompts extrapolate.

    Attributes:
        max_length: tokens of a window.
        document_windows: windows of the documents of a block, block after block; all lanes of a step read documents of one length.
        bf16: compute products in bfloat16, in training and in measuring.
        shares: share of the documents that each family of generated documents has; the others are plain text.
        lengths: of prompts with needles. unseen_lengths: of those in wordings that are not trained on.
        depths: places of a needle in its prompt, 0 (at the start) to 1. prompts_per_cell: prompts for each depth and length.
        text_windows: stretches of held-out text, each as long as the longest prompt.
    """

    seeds: int = 3
    steps: int = 21
    sequences_per_step: int = 8
    max_length: int = 1024
    document_windows: tuple[int, ...] = (1, 2, 4)
    learning_rate: float = 1e-4
    bf16: bool = False
    shares: dict[str, float] = field(default_factory=lambda: {"needles": 0.4, "listing": 0.1, "chains": 0.05, "paragraphs": 0.05})
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    unseen_lengths: tuple[int, ...] = (1024,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts_per_cell: int = 8
    text_windows: int = 8

    def document_tokens(self, windows: int) -> int:
        """Count the tokens of a document that is cut into so many windows, of which neighbours share a token."""
        return windows * (self.max_length - 1) + 1

    @property
    def longest(self) -> int:
        """Return the tokens of the longest prompt, or of a window where that is longer."""
        return max(self.max_length, *self.lengths)


def settings(full: bool, seeds: int | None = None, steps: int | None = None) -> Settings:
    """Choose the default job (minutes) or the full one, with the given overrides. Raises RefineError without a seed or a step."""
    chosen = Settings(seeds=6, steps=140, prompts_per_cell=32) if full else Settings()
    if (seeds is not None and seeds < 1) or (steps is not None and steps < 1):
        raise RefineError(f"--seeds and --steps must be at least 1, got {seeds} and {steps}")
    return replace(chosen, seeds=seeds or chosen.seeds, steps=steps or chosen.steps, bf16=bfloat16_is_fast())


def bfloat16_is_fast() -> bool:
    """Tell whether this processor multiplies bfloat16 in hardware that torch uses; elsewhere float32 is faster."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class Material:
    """Hold the data to train on (`sources` of rows) and to measure with.

    `windows` [n, T] are held-out text, T the longest prompt; `needles` and `unseen` probes with one needle, in wordings that are trained on
    and in others, with a row for each depth and a column for each length.
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
    results: dict[str, list[Figures]] = {BASE: [run_arm(job, None, None)]} | {arm: [] for arm in ARMS}
    for seed in range(s.seeds):  # seed by seed, so that an interrupted job leaves whole comparisons
        for arm in ARMS:
            results[arm].append(run_arm(job, arm, seed))
    tables = [results_table(results, s), differences_table(results, s)]
    for table in tables:
        console.print(table.rich())
    console.print(finding(results, s))
    record = {"settings": asdict(s), "figures": results, "finding": finding(results, s), "tables": [asdict(t) for t in tables]}
    write_atomically(out / "results.json", json.dumps(record, indent=1) + "\n")
    console.print(f"report: {write_report(out, s, results, model_name, data)}")
    return tables[0]


def prepare(s: Settings, tokenizer: PreTrainedTokenizerBase, data: str | None, text_column: str) -> Material:
    """Prepare text to train on and to measure with; they share no document. Raises RefineError for too little text."""
    library, other = standard_library(held_out=False), standard_library(held_out=True)
    train, held_out = (library, other) if data is None else split_texts(data, text_column)
    stream, held_out_stream = encode_texts(tokenizer, train), encode_texts(tokenizer, held_out)
    count = min(s.text_windows, len(held_out_stream) // s.longest)
    least = 2 * s.document_tokens(max(s.document_windows))
    if count < 1 or len(stream) < least:
        raise RefineError(
            f"too little text: {len(stream):,} tokens to train on and {len(held_out_stream):,} held out; at least "
            f"{least:,} and {s.longest:,} are needed"
        )
    # Windows come from all over the held-out text, since its first module alone says little.
    stride = len(held_out_stream) // count
    windows = torch.stack([held_out_stream[i * stride : i * stride + s.longest] for i in range(count)])
    writer, filler = Writer.of(tokenizer, other), held_out_stream.tolist()
    needles = needle_probes(writer, filler, s, s.lengths, held_out=False)
    unseen = needle_probes(writer, filler, s, s.unseen_lengths, held_out=True)
    return Material(Sources(stream, Writer.of(tokenizer, library)), windows, needles, unseen)


def split_texts(data: str, text_column: str) -> tuple[list[str], list[str]]:
    """Split off a tenth of the documents to measure with; of a single document, its last tenth."""
    most, rest = split_documents(read_documents(data, (text_column,), also=()), 0.1, seed=0)
    train = list(most[text_column])
    if rest is not None:
        return train, list(rest[text_column])
    cut = int(len(train[0]) * 0.9)
    return [train[0][:cut]], [train[0][cut:]]


def needle_probes(writer: Writer, filler: list[int], s: Settings, lengths: Sequence[int], held_out: bool) -> list[list[ProbeSet]]:
    """Make probes with one needle in a haystack: a row for each depth of the needle, a column for each length of the prompt."""

    def made(depth: float, length: int) -> ProbeSet:
        rng = random.Random(f"needles-{held_out}-{depth}-{length}")
        starts = [rng.randrange(len(filler) - length) for _ in range(s.prompts_per_cell)]
        return ProbeSet.of(
            length, [writer.probe(rng, "needles", filler[i : i + length], length, 1, held_out, depth) for i in starts]
        )

    return [[made(depth, length) for length in lengths] for depth in s.depths]


def blocks(s: Settings, seed: int, sources: Sources) -> Iterator[list[list[list[int]]]]:
    """Make the documents of one seed, each cut into windows: a block has one for each row of a step, all with as many windows."""
    left = s.steps
    for number, windows in enumerate(cycle(s.document_windows)):
        if left <= 0:
            return
        phase = PretrainPhase(1, s.document_tokens(windows), s.shares, dense=0.5, answer_weight=1.0)
        documents, _ = step_rows(ROWS_SEED + seed, number, s.sequences_per_step, phase, sources)
        yield [cut_windows(ids, s.max_length, 2, shared=1) for ids in documents.tolist()]
        left -= windows


def training_rows(s: Settings, seed: int, sources: Sources, carried: bool = False) -> Dataset:
    """Make the rows of one seed. A step reads the same windows in all arms: with `carried` documents follow each other, from which lanes
    take theirs; else the rows of a step do."""
    made = blocks(s, seed, sources)
    if not carried:
        return Dataset.from_dict({"input_ids": [row for block in made for step in zip(*block, strict=True) for row in step]})
    documents = [windows for block in made for windows in block]
    begins = [at == 0 for windows in documents for at in range(len(windows))]
    return Dataset.from_dict({"input_ids": [row for windows in documents for row in windows], BEGINS_COLUMN: begins})


def run_arm(job: Job, arm: str | None, seed: int | None) -> Figures:
    """Train an arm with a seed and measure it, or without an arm measure the base; read figures that an earlier job has measured."""
    folder = job.out / (BASE if arm is None else f"{arm}-seed{seed}")
    one = {name: value for name, value in asdict(job.s).items() if name != "seeds"}  # more seeds repeat nothing
    key = {"settings": one, "arm": arm and ARMS[arm], "seed": seed, "model": job.model_name, "data": job.data}
    path = folder / "result.json"
    known: dict[str, Figures] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("key") == json.loads(json.dumps(key)):
        return known["figures"]
    model, _ = load(job.model_name)
    seconds = 0.0 if arm is None or seed is None else train(job, model, folder, arm, seed)
    figures = {**measure(model.eval(), job.material, job.s), "seconds": seconds}
    write_atomically(path, json.dumps({"key": key, "figures": figures}, indent=1) + "\n")
    return figures


def train(job: Job, model: LoadedModel, folder: Path, arm: str, seed: int) -> float:
    """Mid-train the model as an arm says, and return the processor seconds it took, of all threads."""
    s = job.s
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    args = ReFINEConfig(
        output_dir=str(folder), run_name=f"{arm} (seed {seed})", max_steps=s.steps, max_length=s.max_length,
        per_device_train_batch_size=s.sequences_per_step, learning_rate=s.learning_rate, seed=seed, logging_steps=5,
        bf16=s.bf16, save_strategy="no", report_to="none", dataloader_num_workers=0, train_sampling_strategy="sequential", **ARMS[arm],
    )  # fmt: skip
    rows = training_rows(s, seed, job.material.sources, carried=args.carry_states)
    trainer = ReFINETrainer(model=model, args=args, train_dataset=rows, processing_class=job.tokenizer)
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


def measure(model: LoadedModel, material: Material, s: Settings) -> Figures:
    """Measure a model; `map` is the share of needles found, greedy, with a row for each depth and a column for each length.

    The text's figures are of the first window; `text_beyond` is the loss of what stands behind it, where there is that.
    """
    with torch.autocast(model.device.type, torch.bfloat16, enabled=s.bf16):
        text, whole = (score_text(model, material.windows[:, :length]) for length in (s.max_length, s.longest))
        grid, others = ([[score_probes(model, p) for p in row] for row in sets] for sets in (material.needles, material.unseen))
    known, unseen = ([score for row in rows for score in row] for rows in (grid, others))
    behind = s.longest - s.max_length
    beyond = {"text_beyond": (whole.loss * (s.longest - 1) - text.loss * (s.max_length - 1)) / behind} if behind else {}
    return {
        "text_loss": text.loss,
        **beyond,
        "text_accuracy": text.accuracy,
        "text_entropy": text.entropy,
        "recall_greedy": mean(score.greedy for score in known),
        "unseen_greedy": mean(score.greedy for score in unseen),
        "recall_log_p": mean(score.log_p for score in known + unseen),
        "recall_sampled": mean(score.sampled for score in known + unseen),
        "map": [[score.greedy for score in row] for row in grid],
    }


@dataclass(frozen=True)
class Shown:
    """A figure is shown by its title, as `of` takes it from a model's figures, with so many digits behind the point."""

    title: str
    of: Callable[[Figures], float]
    digits: int


def needles_at(i: int) -> Callable[[Figures], float]:
    """Return what takes the needles found at the i-th length, in % over all depths, from a model's figures."""
    return lambda figures: 100 * mean(row[i] for row in figures["map"])


def shown(s: Settings) -> list[Shown]:
    """List the figures that the tables show."""
    found = [Shown(f"needles {length:,}", needles_at(i), 1) for i, length in enumerate(s.lengths)]
    beyond = [Shown("text beyond", lambda f: float(f["text_beyond"]), 3)] if s.longest > s.max_length else []
    return [
        *found,
        Shown("unseen wordings", lambda f: 100 * float(f["unseen_greedy"]), 1),
        Shown(f"text to {s.max_length:,}", lambda f: float(f["text_loss"]), 3),
        *beyond,
    ]


def short(value: float, digits: int, sign: str = "") -> str:
    """Write a figure without a zero before its point where three digits stand behind it, so that a table fits into 80 columns."""
    text = f"{value:{sign}.{digits}f}"
    return text.replace("0.", ".", 1) if digits > 2 and abs(value) < 1 else text


def spread(values: Sequence[float], digits: int) -> str:
    """Write the mean and standard deviation over seeds."""
    return short(mean(values), digits) + (f" ± {short(stdev(values), digits)}" if len(values) > 1 else "")


def results_table(results: dict[str, list[Figures]], s: Settings) -> Table:
    """Make a table with a row for each figure, and a column for the base and each arm."""
    rows: list[list[Cell]] = [
        [row.title, *(spread([row.of(f) for f in seeds], row.digits) for seeds in results.values())] for row in shown(s)
    ]
    rows.append(["training, CPU s", *(f"{mean(f['seconds'] for f in seeds):.0f}" for seeds in results.values())])
    lengths = " and ".join(f"{length:,}" for length in s.unseen_lengths)
    notes = [
        f"Mean ± standard deviation over {len(results[NTP])} seed(s) of training. Needles: % found greedily of {prompts(s)} prompts of so "
        f"many tokens; unseen wordings, which are not trained on: at {lengths}. Text: nats of loss on held-out text in the first "
        f"{s.max_length:,} tokens, and beyond them to {s.longest:,}, read in one pass.",
        f"{NTP} trains on windows of {s.max_length:,} tokens that start from nothing; {CARRIED} is {NTP} with states carried through "
        f"documents of {', '.join(map(str, s.document_windows))} windows, and so are {EXPECTED} and {LIKELIHOOD}.",
    ]
    return Table("Before and after mid-training", ["", *results], rows, notes)


def prompts(s: Settings) -> int:
    """Count the prompts of a length."""
    return s.prompts_per_cell * len(s.depths)


def difference(results: dict[str, list[Figures]], arm: str, other: str, of: Callable[[Figures], float]) -> tuple[float, float]:
    """Return the mean difference of two arms, paired by seed, and half its 95 % t-interval, which is nan with one seed."""
    before = results[other] * (len(results[arm]) if other == BASE else 1)  # the one base, which no seed changes
    return t_interval([of(a) - of(b) for a, b in zip(results[arm], before, strict=True)])


def differences_table(results: dict[str, list[Figures]], s: Settings) -> Table:
    """Make a table of the differences between arms, with those marked that exceed their interval."""
    seeds, rows, exceeding = len(results[NTP]), [], 0
    for row in shown(s):
        cells: list[Cell] = [row.title]
        for arm, other in CONTRASTS:
            d, half = difference(results, arm, other, row.of)
            clear = abs(d) > half  # never with one seed, whose interval is nan
            cells.append(
                short(d, row.digits, "+") + (f" ± {short(half, row.digits)}" if seeds > 1 else "") + (" *" if clear else "")
            )
            exceeding += clear
        rows.append(cells)
    comparisons = len(rows) * len(CONTRASTS)
    note = (
        f"± half a 95 % t-interval over {seeds} seeds of training, on the same prompts; * where the difference exceeds it: {exceeding} of "
        f"{comparisons} comparisons, of which about one in twenty does so by chance"
        if seeds > 1
        else "one seed: no spread, so nothing can be said to exceed it"
    )
    return Table("Differences", ["", *(f"{arm} - {other}" for arm, other in CONTRASTS)], rows, [note])


def finding(results: dict[str, list[Figures]], s: Settings) -> str:
    """Say for each comparison, in a line, what the job found."""
    return "\n".join(["Finding:", *(compared(results, s, arm, other) for arm, other in CONTRASTS)])


def compared(results: dict[str, list[Figures]], s: Settings, arm: str, other: str) -> str:
    """Say how two arms differ in needles at the longest and the shortest length and in text loss, and whether chance would give as much."""
    seeds, said = len(results[arm]), []
    for i in sorted({len(s.lengths) - 1, 0}, reverse=True):
        d, half = difference(results, arm, other, needles_at(i))
        chance = f", {'more than' if abs(d) > half else 'no more than'} chance would give" if seeds > 1 else ""
        said.append(f"{d:+.1f}{f' ± {half:.1f}' if seeds > 1 else ''} points of needles at {s.lengths[i]:,} tokens{chance}")
    loss, half = difference(results, arm, other, lambda f: float(f["text_loss"]))
    end = f" ± {half:.3f}" if seeds > 1 else " (one seed, so no more can be said)"
    return f"{arm} against {other}: {'; '.join(said)}; text loss {loss:+.3f}{end}."


def length_plot(results: dict[str, list[Figures]], s: Settings) -> plots.Plot:
    """Draw the needles found by length, before training and after it, as means over seeds."""
    found = {
        name: (s.lengths, [mean(needles_at(i)(f) for f in seeds) for i in range(len(s.lengths))])
        for name, seeds in results.items()
    }
    return plots.line_plot(found, "needles found, %, by length of the prompt", "tokens")


def needle_maps(results: dict[str, list[Figures]], s: Settings) -> list[plots.Plot]:
    """Draw heat maps of the needles found before and after training, as means over seeds."""
    drawn = []
    for name in MAPPED:
        maps = [f["map"] for f in results[name]]
        grid = [[100 * mean(m[i][j] for m in maps) for j in range(len(s.lengths))] for i in range(len(s.depths))]
        lengths, depths = [f"{n:,}" for n in s.lengths], [f"{d:.0%}" for d in s.depths]
        drawn.append(plots.heat_map(grid, lengths, depths, f"{name}: needles found, %", "tokens", "depth"))
    return drawn


def write_report(out: Path, s: Settings, results: dict[str, list[Figures]], model_name: str, data: str | None) -> Path:
    """Write the page: finding, maps, tables, curves, and how it was made."""
    pairs = {f"{arm} - {other}": (arm, other) for arm, other in CONTRASTS}
    drawn = []
    for unit, digits in (("points", 1), ("nats", 3)):
        kind = [row for row in shown(s) if row.digits == digits]
        found = {name: [difference(results, *pair, row.of) for row in kind] for name, pair in pairs.items()}
        groups = {name: [(d, 0.0 if math.isnan(h) else h) for d, h in row] for name, row in found.items()}
        drawn.append(plots.forest_plot(groups, [row.title for row in kind], f"differences, {unit}", unit))
    runs = [read_run(p.parent) for p in sorted(out.glob("*-seed0/metrics.jsonl"))]
    made = {"settings": asdict(s), "arms": ARMS, "environment": environment()}
    sections = [
        html.Section("Finding", "<p>" + "<br>".join(map(escape, finding(results, s).splitlines())) + "</p>"),
        html.Section("Needles by length, before and after", html.plots(length_plot(results, s))),
        html.Section("Results", results_table(results, s).html() + differences_table(results, s).html() + html.plots(*drawn)),
        html.Section("Needles by depth and length", html.plots(*needle_maps(results, s))),
        html.Section("Training curves (seed 0)", curve_plots(runs)),
        html.Section("How it was made", "".join(html.preformatted(name, json.dumps(x, indent=1)) for name, x in made.items())),
    ]
    lead = f"{model_name}, mid-trained on {data or 'the Python standard library and generated documents'}"
    return write_atomically(out / "report.html", html.page("Mid-training with carried states and by the presets", lead, sections))
