"""Pretraining measures, in addition to held-out text, recall in every family that is trained on, in trained and in held-out wordings;
and it draws a page of the curves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refine_nsp.files import write_atomically
from refine_nsp.models.protocols import CausalModel
from refine_nsp.report import html, plots
from refine_nsp.report.runs import read_run
from refine_nsp.tiny.documents import Writer
from refine_nsp.tiny.families import FACTS
from refine_nsp.tiny.pretrain_settings import PretrainConfig
from refine_nsp.tiny.probes import ProbeSet, score_probes

STATED = {FACTS: 8}  # things that a probe of a family states
ITEMS_STATED = 4  # other families: as many keys as RULER's multi-key needles have; fewer where a prompt has no room for them
HELD_OUT = "_held_out"
RECALL = "recall_"  # begins the names of the probes' figures
DRAWN = {"greedy": "greedy exact match", "tokens": "share of tokens right", "log_p": "log p (nats)"}


def probes_of(args: PretrainConfig, writer: Writer, filler: Sequence[int]) -> dict[str, ProbeSet]:
    """Make the probes of a pretraining, by name: for each family that it trains on, by length."""
    return family_probes(writer, args.families, filler, args.probe_lengths, args.probes_per_kind, seed=1)


def family_probes(
    writer: Writer, families: Sequence[str], filler: Sequence[int], lengths: Sequence[int], per_kind: int, seed: int
) -> dict[str, ProbeSet]:
    """Make probes by name: `FAMILY_LENGTH` in wordings that are trained on, `FAMILY_held_out_LENGTH` in those that are not.

    Args:
        filler: tokens of held-out text, more than the longest prompt.
    """
    sets = {}
    for family in families:
        for held_out in (False,) if family == FACTS else (False, True):
            for length in lengths:
                name = f"{family}{HELD_OUT * held_out}_{length}"
                rng, made = random.Random(f"{seed}-{name}"), []
                for _ in range(per_kind):
                    start = rng.randrange(max(1, len(filler) - length))
                    items = STATED.get(family, ITEMS_STATED)
                    made.append(writer.probe(rng, family, filler[start : start + length], length, items, held_out))
                sets[name] = ProbeSet(length, [p for p, _ in made], [a for _, a in made])
    return sets


def score_all(model: CausalModel, probes: Mapping[str, ProbeSet]) -> dict[str, float]:
    """Score every set of probes: `recall_SET_FIGURE` for each figure of a `RecallScore`."""
    scores = {name: asdict(score_probes(model, probe)) for name, probe in probes.items()}
    return {f"{RECALL}{name}_{figure}": value for name, score in scores.items() for figure, value in score.items()}


def recall_in(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Read the probes' figures in a record of metrics.jsonl: by set, then by figure."""
    found: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        if key.startswith(f"eval_{RECALL}"):
            figure = next(f for f in ("greedy", "tokens", "log_p", "sampled") if key.endswith(f"_{f}"))
            name = key.removeprefix(f"eval_{RECALL}").removesuffix(f"_{figure}")
            found.setdefault(name, {})[figure] = float(value)
    return found


def family_in(name: str) -> str:
    """Return the family that a set of probes belongs to."""
    return name.rpartition("_")[0].removesuffix(HELD_OUT)


def write_curves(folder: Path) -> Path:
    """Write `curves.html` of a run's folder: losses, and recall by family."""
    run = read_run(folder)
    losses = {name: run.curve(name) for name in ("loss_ntp", "eval_loss")}
    sections = [html.Section("Loss", html.plots(plots.line_plot(losses, "nats per token: rows trained on, held-out text")))]
    names = list(dict.fromkeys(name for record in run.metrics for name in recall_in(record)))
    for family in dict.fromkeys(map(family_in, names)):
        own = {n: n.removeprefix(f"{family}_").replace("_", " ") for n in names if family_in(n) == family}
        drawn = []
        for figure, title in DRAWN.items():
            curves = {label: run.curve(f"eval_{RECALL}{name}_{figure}") for name, label in own.items()}
            drawn.append(plots.line_plot(curves, f"{family}: {title}"))
        sections.append(html.Section(f"Recall: {family}", html.plots(*drawn)))
    lead = f"{folder}; a number is a prompt's length in tokens, held out: in wordings that are not trained on"
    return write_atomically(folder / "curves.html", html.page("Pretraining", lead, sections))
