"""Make the page of one run, or of several side by side, from the files in their folders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refine_nsp.errors import RefineError
from refine_nsp.evaluation.text_metrics import MATCHES
from refine_nsp.files import expecting, read_json, read_json_lines, write_atomically
from refine_nsp.report import html, plots
from refine_nsp.report.tables import Cell, Table

CURVES = (
    ("loss_ntp", "NTP loss (training)", "nats"),
    ("loss_answer", "cross-entropy of answers (training)", "nats"),
    ("inner_loss_ntp", "NTP loss on prompts (inner update)", "nats"),
    ("loss_policy", "policy loss", ""),
    ("loss_kl", "KL from the teacher (training)", "nats"),
    ("kl_beyond", "KL from the teacher beyond the window (training)", "nats"),
    ("eval_kl", "KL from the teacher (validation)", "nats"),
    ("eval_kl_beyond", "KL from the teacher beyond the window (validation)", "nats"),
    ("loss_transfer", "error of a layer's mixer (training)", ""),
    ("eval_transfer", "error of a layer's mixer (validation)", ""),
    ("eval_loss", "loss (validation)", "nats"),
    *((f"eval_{name}", f"answers: {name.replace('_', ' ')} (validation)", "") for name in MATCHES),
    ("eval_accuracy", "NTP accuracy (validation)", ""),
    ("eval_sampled_accuracy", "NTP accuracy of a sampled token (validation)", ""),
    ("eval_greedy_match", "greedy K-token match (validation)", ""),
    ("eval_cosine", "mean cosine (validation)", ""),
    ("entropy", "entropy", "nats"),
    ("inner_entropy", "entropy on prompts", "nats"),
    ("entropy_at_positions", "entropy at chosen positions", "nats"),
    ("entropy_at_weights", "entropy at the closed form's weights", "nats"),
    ("expected_reward", "expected reward (closed form)", ""),
    ("inner_expected_reward", "expected reward on prompts (closed form)", ""),
    ("reward_group_std", "reward std within groups", ""),
    ("grad_norm", "gradient norm", ""),
    ("tokens_per_second", "tokens per second", ""),
)
# Figures of validation that are shown for each of several sets too, and how the share of a source begins.
BY_SET = (("loss", "loss", "nats"), ("accuracy", "NTP accuracy", ""))
SHARE = "source_share_"
COMPLETION = ("step", "position", "prefix", "truth", "rollout", "reward", "advantage")
SHOWN_COMPLETIONS = 24
ROUNDING = 1e-5


@dataclass(frozen=True)
class Run:
    """Hold what a run's folder holds; missing parts are empty."""

    name: str
    metrics: list[dict[str, Any]]
    completions: list[dict[str, object]]
    config: str
    environment: dict[str, object]

    def curve(self, key: str) -> plots.Curve:
        points = [(m["step"], m[key]) for m in self.metrics if isinstance(m.get(key), int | float)]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, key: str) -> Cell:
        values = self.curve(key)[1]
        return float(values[-1]) if values else None


def run_of(folder: Path, environment: dict[str, object], with_figures: bool = True) -> Run:
    """Read what a run's folder holds so far, which may be nothing; `environment` stands in where the folder has no file of it."""
    there = with_figures and (folder / "metrics.jsonl").exists()
    run = read_run(folder) if there else Run(folder.resolve().name, [], [], "", {})
    return replace(run, environment=run.environment or environment)


def read_run(folder: Path) -> Run:
    """Read metrics.jsonl, completions.jsonl, config.yaml and environment.json. Raises RefineError when the folder is not a run's."""
    if not folder.is_dir():
        raise RefineError(f"no run folder {folder}")
    metrics = read_json_lines(folder / "metrics.jsonl")
    if not metrics:
        raise RefineError(f"{folder} has no metrics.jsonl; expected the output_dir of a refine-nsp run")
    # A resumed run makes some steps again: what it logs then counts, and what was logged of these and later steps before does not.
    by_step: dict[tuple[float, str, bool], dict[str, Any]] = {}
    with expecting("a step, a number, in every record", folder / "metrics.jsonl"):
        latest = 0.0
        for m in metrics:
            if (step := float(m["step"])) < latest:
                by_step = {k: known for k, known in by_step.items() if k[0] <= step}
            validated = " ".join(sorted(name for name in m if name.startswith("eval_")))  # each set has a record of its own
            by_step[step, validated, "train_runtime" in m] = m
            latest = step
    completions = read_json_lines(folder / "completions.jsonl")
    with expecting(f"{', '.join(COMPLETION)} in every record", folder / "completions.jsonl"):
        completions = [{name: c[name] for name in COMPLETION} for c in completions]
    config, environment = folder / "config.yaml", folder / "environment.json"
    with expecting("text", config):
        settings = config.read_text(encoding="utf-8") if config.exists() else ""
    found = read_json(environment, "what a run was made with") if environment.exists() else {}
    return Run(folder.resolve().name, [by_step[k] for k in sorted(by_step)], completions, settings, found)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Give each folder a name, no two alike: its last part, with as many parts before it as tell it from others of that name."""
    paths = [f.resolve().parts for f in folders]
    names = []
    for i, path in enumerate(paths):
        alike = [p for p in paths if p[-1:] == path[-1:] and p != path]
        tail = next(n for n in range(1, len(path) + 1) if all(p[-n:] != path[-n:] for p in alike) or n == len(path))
        again = paths[:i].count(path)
        names.append("/".join(path[-tail:]) + (f" ({again + 1})" if again else ""))
    return names


def report(folders: list[Path], output: Path) -> Path:
    """Write one page that compares the runs, and return its path."""
    runs = [replace(read_run(f), name=name) for f, name in zip(folders, names_of(folders), strict=True)]
    sections = [html.Section("Last figures", summary_table(runs).html()), html.Section("Curves", curve_plots(runs))]
    sections += [html.Section(f"Rollouts of {r.name}", completions_table(r).html()) for r in runs if r.completions]
    settings = "".join(
        html.preformatted(f"{r.name}: {title}", text)
        for r in runs
        for title, text in (("configuration", r.config), ("environment", json.dumps(r.environment, indent=1)))
        if text and text != "{}"
    )
    sections.append(html.Section("Settings", settings or "<p class='note'>No config.yaml in these folders.</p>"))
    return write_atomically(output, html.page("refine-nsp report", ", ".join(r.name for r in runs), sections))


def summary_table(runs: list[Run]) -> Table:
    """List the last value of every known figure, with a column for each run."""
    keys = [(k, title) for k, title, _ in [*CURVES, *by_source(runs)] if any(r.curve(k)[1] for r in runs)]
    rows: list[list[Cell]] = [[title, *(r.last(k) for r in runs)] for k, title in keys]
    return Table("Last logged value", ["figure", *(r.name for r in runs)], rows)


def by_source(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """List the figures of several sets for validation, and the shares of a mixture's sources: key, title and unit."""
    keys = sorted({k for r in runs for m in r.metrics for k in m} - {k for k, _, _ in CURVES})
    sets = [match[1] for k in keys if (match := re.fullmatch("eval_(.*)_runtime", k))]
    of_sets = [(f"eval_{s}_{figure}", f"{title} (validation, {s})", unit) for figure, title, unit in BY_SET for s in sets]
    return [*of_sets, *((k, f"share of tokens: {k.removeprefix(SHARE)}", "") for k in keys if k.startswith(SHARE))]


def curve_plots(runs: list[Run]) -> str:
    logged = sorted({k for r in runs for m in r.metrics for k in m})
    rewards = [k for k in logged if k.startswith(("reward_", "inner_reward_")) and not k.endswith("_std")]
    wanted = [*CURVES, *by_source(runs), *((k, k.replace("_", " "), "") for k in rewards)]
    drawn = []
    for key, title, unit in wanted:
        # Runs without this curve keep their place, so that a run has the same style in every plot of the page.
        curves = {r.name: curve if len((curve := r.curve(key))[1]) > 1 else ([], []) for r in runs}
        if key == "loss_policy":
            # Advantages sum to 0, so on policy the loss is nothing but rounding, and a curve of it would tell nothing.
            curves = {name: c if any(abs(y) > ROUNDING for y in c[1]) else ([], []) for name, c in curves.items()}
        if any(ys for _, ys in curves.values()):
            drawn.append(plots.line_plot(curves, f"{title}, {unit}" if unit else title))
    return html.plots(*drawn) if drawn else "<p class='note'>Fewer than two logged steps: no curves.</p>"


def completions_table(run: Run) -> Table:
    def cell(value: object) -> Cell:
        return repr(value)[1:-1] if isinstance(value, str) else value if isinstance(value, int | float) else str(value)

    rows = [[cell(c[name]) for name in COMPLETION] for c in run.completions[-SHOWN_COMPLETIONS:]]
    return Table("prefix tail, truth, rollout", list(COMPLETION), rows)
