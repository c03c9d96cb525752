"""What pretraining measures on its way: recall in every family, in wordings trained on and in held-out ones, and held-out text; and a
page of the curves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.files import read_json_lines, write_atomically
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.report import html, plots
from refine_nsp.tiny.documents import Writer
from refine_nsp.tiny.pretrain_settings import FACTS, PretrainConfig
from refine_nsp.tiny.probes import ProbeSet, make_probes, score_probes, score_text

WINDOWS, WINDOW_TOKENS = 16, 512
FACTS_STATED = 8
ITEMS_STATED = 4  # as many keys as RULER's multi-key needles have; fewer where a prompt has no room for them
HELD_OUT = "_held_out"


@dataclass(frozen=True)
class Measures:
    """windows [n, T]: held-out text. probes: by name, `family_length` or `family_held_out_length`."""

    windows: Tensor
    probes: dict[str, ProbeSet]

    @classmethod
    def of(cls, config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], stream: Tensor) -> Measures:
        """For the families that `config` trains on, in held-out texts; stream: these, encoded."""
        kinds = [(length, FACTS_STATED) for length in config.probe_lengths]
        filler, probes = stream.tolist(), {}
        if FACTS in config.families:
            sets = make_probes(tokenizer, filler, kinds, config.probes_per_kind, seed=1)
            probes = {f"{FACTS}_{p.length}": p for p in sets}
        if others := [family for family in config.families if family != FACTS]:
            writer = Writer.of(tokenizer, texts)
            probes |= family_probes(writer, others, filler, config.probe_lengths, config.probes_per_kind, seed=1)
        rows = min(WINDOWS, len(stream) // WINDOW_TOKENS)
        return cls(stream[: rows * WINDOW_TOKENS].view(rows, WINDOW_TOKENS), probes)

    def take(self, model: FastWeightForCausalLM) -> dict[str, Any]:
        """`eval_loss` on held-out text and `probes`: the figures of each set by name. Leaves the model in the mode it was in."""
        training = model.training
        model.eval()
        figures = {
            "eval_loss": score_text(model, self.windows).loss,
            "probes": {name: asdict(score_probes(model, p)) for name, p in self.probes.items()},
        }
        model.train(training)
        return figures


def family_probes(
    writer: Writer, families: Sequence[str], filler: Sequence[int], lengths: Sequence[int], per_kind: int, seed: int
) -> dict[str, ProbeSet]:
    """For each family and length, probes in the wordings that are trained on and in those held out.

    filler: tokens of held-out text, more than the longest prompt.
    """
    sets = {}
    for family in families:
        for held_out in (False, True):
            for length in lengths:
                name = f"{family}{HELD_OUT * held_out}_{length}"
                rng, made = random.Random(f"{seed}-{name}"), []
                for _ in range(per_kind):
                    start = rng.randrange(max(1, len(filler) - length))
                    made.append(writer.probe(rng, family, filler[start : start + length], length, ITEMS_STATED, held_out))
                sets[name] = ProbeSet(length, ITEMS_STATED, [p for p, _ in made], [a for _, a in made])
    return sets


# --- curves -----------------------------------------------------------------------------------------------------------


def write_curves(folder: Path) -> Path:
    """`curves.html` of a folder's `metrics.jsonl`; of steps logged twice (a resumed run's) the last record counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_json_lines(folder / "metrics.jsonl"):
        by_step[record["step"]] = {**by_step.get(record["step"], {}), **record}
    records = [by_step[step] for step in sorted(by_step)]
    losses = {name: curve(records, (name,)) for name in ("loss", "eval_loss")}
    sections = [html.Section("Loss", html.plots(plots.line_plot(losses, "nats per token: rows trained on, held-out text")))]
    names = list(dict.fromkeys(name for r in records for name in r.get("probes", {})))
    families = dict.fromkeys(name.rpartition("_")[0].removesuffix(HELD_OUT) for name in names)
    for family in families:
        own = [n for n in names if n.rpartition("_")[0].removesuffix(HELD_OUT) == family]
        drawn = []
        for key, title in (("greedy", "greedy exact match"), ("tokens", "share of tokens right"), ("log_p", "log p (nats)")):
            curves = {n.removeprefix(f"{family}_").replace("_", " "): curve(records, ("probes", n, key)) for n in own}
            drawn.append(plots.line_plot(curves, f"{family}: {title}"))
        sections.append(html.Section(f"Recall: {family}", html.plots(*drawn)))
    lead = f"{folder}; a number is a prompt's length in tokens, held out: in wordings that are not trained on"
    return write_atomically(folder / "curves.html", html.page("Pretraining", lead, sections))


def curve(records: Sequence[Mapping[str, Any]], path: Sequence[str]) -> plots.Curve:
    """Steps and values of those records that hold something under `path`."""
    points = []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            points.append((record["step"], value))
    return [step for step, _ in points], [value for _, value in points]
