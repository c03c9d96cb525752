"""Score recall probes and held-out text, whose figures judge a training at small scale, and draw a page of a pretraining's curves.

A probe is scored from one forward pass over prompt + answer. The argmax is right at every token of the answer exactly where greedy
decoding would produce that answer; the same pass gives the answer's log p and the probability of sampling it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refine_nsp.evaluation.likelihood import continuation_logits
from refine_nsp.files import write_atomically
from refine_nsp.models.adapters import head_weight
from refine_nsp.models.protocols import CausalModel
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.report import html, plots
from refine_nsp.report.runs import read_run
from refine_nsp.tiny.documents import Writer, take_filler
from refine_nsp.tiny.families import FACTS

BATCH_TOKENS = 8192  # as many probes as fit into these go through the model together
FACTS_STATED, ITEMS_STATED = 8, 4  # by a probe of `facts`, and of other families: as many keys as RULER's multi-key needles have
HELD_OUT = "_held_out"
RECALL = "recall_"  # begins the names of the probes' figures
DRAWN = {"greedy": "greedy exact match", "tokens": "share of tokens right", "log_p": "log p (nats)"}


@dataclass(frozen=True)
class ProbeSet:
    """A set holds probes of one kind: `prompts` of `length` tokens each, [n][length], and their `answers`, [n][1 or more]."""

    length: int
    prompts: list[list[int]]
    answers: list[list[int]]

    @classmethod
    def of(cls, length: int, probes: Sequence[tuple[list[int], list[int]]]) -> ProbeSet:
        """Make a set of prompts of `length` tokens with their answers."""
        return cls(length, [prompt for prompt, _ in probes], [answer for _, answer in probes])


@dataclass(frozen=True)
class RecallScore:
    """Scores are means over probes.

    Attributes:
        greedy: share of answers that greedy decoding produces. log_p: log-probability of the answer, nats.
        sampled: probability of sampling the answer. tokens: share of an answer's tokens that are the argmax, given those before.
    """

    greedy: float
    log_p: float
    sampled: float
    tokens: float


def answer_logits(model: CausalModel, probes: ProbeSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each probe the logits [A, V] of its answer, given the prompt and the answer so far, and the answer [A]."""
    pairs, size = list(zip(probes.prompts, probes.answers, strict=True)), max(1, BATCH_TOKENS // probes.length)
    for start in range(0, len(pairs), size):
        yield from continuation_logits(model, pairs[start : start + size])


def score_answers(answers: Iterable[tuple[Tensor, Tensor]], temperature: float = 1.0) -> RecallScore:
    """Score what `answer_logits` yields, under the distribution at `temperature`."""
    right, log_ps = [], []
    for logits, truth in answers:
        log_p = (logits / temperature).log_softmax(-1).gather(-1, truth[:, None])
        right.append(float((logits.argmax(-1) == truth).double().mean()))
        log_ps.append(float(log_p.sum()))
    count, sampled = len(right), float(torch.tensor(log_ps).exp().mean())
    return RecallScore(sum(share == 1.0 for share in right) / count, sum(log_ps) / count, sampled, sum(right) / count)


def score_probes(model: CausalModel, probes: ProbeSet, temperature: float = 1.0) -> RecallScore:
    """Score one set of probes under the distribution at `temperature`."""
    return score_answers(answer_logits(model, probes), temperature)


@dataclass(frozen=True)
class TextScore:
    """Scores are means over the targets of a text: nats of cross-entropy and entropy, accuracy of the argmax and of a sampled token."""

    loss: float
    accuracy: float
    entropy: float
    sampled_accuracy: float


@torch.no_grad()
def score_text(model: CausalModel, windows: Tensor, temperature: float = 1.0) -> TextScore:
    """Score windows [n, T] long, each from a fresh state, under the distribution at `temperature`."""
    n, T = windows.shape
    sums = [0.0] * 4
    for rows in windows.to(model.device).split(max(1, BATCH_TOKENS // T)):
        hidden = model.model(rows, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = rows[:, 1:].flatten()
        weights = torch.ones(len(targets), device=model.device)
        total, stats = linear_cross_entropy(hidden / temperature, head_weight(model), targets, weights)
        found = total, (stats.argmax == targets).sum(), stats.entropy.sum(), (-stats.nll).exp().sum()
        sums = [so_far + float(x) for so_far, x in zip(sums, found, strict=True)]
    return TextScore(*(x / (n * (T - 1)) for x in sums))


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
                rng, items = random.Random(f"{seed}-{name}"), FACTS_STATED if family == FACTS else ITEMS_STATED
                texts = (take_filler(rng, filler, length) for _ in range(per_kind))
                sets[name] = ProbeSet.of(length, [writer.probe(rng, family, text, length, items, held_out) for text in texts])
    return sets


def score_all(model: CausalModel, probes: Mapping[str, ProbeSet]) -> dict[str, float]:
    """Score every set of probes: `recall_SET_FIGURE` for each figure of a `RecallScore`."""
    scores = {name: asdict(score_probes(model, probe)) for name, probe in probes.items()}
    return {f"{RECALL}{name}_{figure}": value for name, score in scores.items() for figure, value in score.items()}


def recall_in(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Read the probes' figures in a record of metrics.jsonl: by set, then by figure."""
    found: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        if match := re.fullmatch(f"eval_{RECALL}(.*)_(greedy|tokens|log_p|sampled)", key):
            found.setdefault(match[1], {})[match[2]] = float(value)
    return found


def write_curves(folder: Path) -> Path:
    """Write `curves.html` of a run's folder: losses, and recall by family."""
    run = read_run(folder)
    losses = {name: run.curve(name) for name in ("loss_ntp", "eval_loss")}
    sections = [html.Section("Loss", html.plots(plots.line_plot(losses, "nats per token: rows trained on, held-out text")))]
    names: dict[str, dict[str, str]] = {}  # of sets of probes, and how curves are labelled, by family
    for name in (name for record in run.metrics for name in recall_in(record)):
        family = name.rpartition("_")[0].removesuffix(HELD_OUT)
        names.setdefault(family, {})[name] = name.removeprefix(f"{family}_").replace("_", " ")
    for family, own in names.items():
        drawn = []
        for figure, title in DRAWN.items():
            curves = {label: run.curve(f"eval_{RECALL}{name}_{figure}") for name, label in own.items()}
            drawn.append(plots.line_plot(curves, f"{family}: {title}"))
        sections.append(html.Section(f"Recall: {family}", html.plots(*drawn)))
    lead = f"{folder}; a number is a prompt's length in tokens, held out: in wordings that are not trained on"
    return write_atomically(folder / "curves.html", html.page("Pretraining", lead, sections))
