"""Measure a model. Figures are kept for each prompt where a table may want a subset or pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp import NSPConfig
from refine_nsp.evaluation.tasks import Context, Task
from refine_nsp.evaluation.text_metrics import any_match
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.generation import Decoding, Request, decode, end_tokens, prefill
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.records import Batch
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.tiny.measures import ProbeSet, answer_logits, score_answers, score_text
from refine_nsp.training.test_time import TestTimeTrainer

from . import material as m
from .settings import FAR_SHARE, SPAN, TEMPERATURES, Scale

ROWS = 16  # prompts at a time
BATCH_TOKENS = 16384
STANDARD_TOKENS, PUBLISHED_TOKENS = 8, 32
Figures = dict[str, Any]


def sampled(seed: int, temperature: float) -> Decoding:
    """Sample as the paper's code does: at temperature 1 among the 50 likeliest tokens.

    Draws follow the seed of training, so that the spread over seeds holds theirs, and the arms of a seed share them.
    """
    return Decoding(greedy=False, temperature=temperature, top_k=50, seed=seed)


class Clock:
    """Count seconds of processor time inside a `with` block, which other work of the machine does not change."""

    def __enter__(self) -> Clock:
        self.start = time.process_time()
        return self

    def __exit__(self, *failure: object) -> None:
        self.seconds = time.process_time() - self.start


# --- recall -----------------------------------------------------------------------------------------------------------


def ruler_figures(
    model: FastWeightForCausalLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> dict[str, dict[str, float]]:
    """Compute the mean of RULER's score of greedy answers, by task and length (a string, as in json)."""
    figures: dict[str, dict[str, float]] = {}
    for task in tasks:
        rows = list(task.rows(list(task.questions()), Context(model, tokenizer, BATCH_TOKENS)))
        by_length: dict[str, list[float]] = {}
        for row in rows:
            by_length.setdefault(str(row.meta["length"]), []).append(next(iter(row.scores.values())))
        figures[task.name] = {length: mean(scores) for length, scores in by_length.items()}
    return figures


def probe_figures(
    model: FastWeightForCausalLM, probes: Mapping[str, ProbeSet], temperatures: Sequence[float] = (1.0,)
) -> dict[str, dict[str, Any]]:
    """Compute the figures of a `RecallScore` for each set of probes, by temperature (a string, as in json)."""
    answers = {name: list(answer_logits(model, p)) for name, p in probes.items()}
    return {str(t): {name: asdict(score_answers(a, t)) for name, a in answers.items()} for t in temperatures}


def best_temperature(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> float:
    """Return the temperature of `probe_figures` at which answers are likeliest."""
    return max((float(t) for t in figures), key=lambda t: mean(p["log_p"] for p in figures[str(t)].values()))


# --- text -------------------------------------------------------------------------------------------------------------


def text_figures(model: FastWeightForCausalLM, windows: Tensor, temperature: float = 1.0) -> Figures:
    """Compute next-token figures on held-out text."""
    return asdict(score_text(model, windows, temperature))


def best_text_temperature(model: FastWeightForCausalLM, windows: Tensor) -> float:
    """Return the temperature at which the loss on `windows` is least."""
    return min(TEMPERATURES, key=lambda t: score_text(model, windows, t).loss)


@torch.no_grad()
def far_tokens(model: FastWeightForCausalLM, windows: Tensor, W: int) -> list[list[int]]:
    """Find in each window [T] the tokens t whose next token's prediction depends most on what lies beyond the last W.

    These are the greatest `FAR_SHARE` of the context scores of all windows.
    """
    config = NSPConfig(selection="context_kl", local_window=W, local_span=SPAN)
    scores = []
    for row in windows:
        batch = Batch.of(row[None])
        hidden = model.model(batch.input_ids, use_cache=False).last_hidden_state
        scores.append(context_divergence(model, batch, hidden, config, gain=False)[0, :-1])
    d = torch.stack(scores)
    least = d.flatten().topk(round(FAR_SHARE * d.numel())).values[-1]
    return [(row >= least).nonzero()[:, 0].tolist() for row in d]


@torch.no_grad()
def figures_at(model: FastWeightForCausalLM, windows: Tensor, at: Sequence[Sequence[int]], temperature: float = 1.0) -> Figures:
    """Compute loss, accuracy and sampled accuracy of the predictions made at tokens `at` of each window."""
    nll, right = [], []
    for row, where in zip(windows, at, strict=True):
        if where:
            hidden = model.model(row[None], use_cache=False).last_hidden_state[0, list(where)] / temperature
            targets = row[1:][list(where)]
            _, stats = linear_cross_entropy(hidden, model.lm_head.weight, targets, torch.ones(len(targets)))
            nll.append(stats.nll)
            right.append((stats.argmax == targets).float())
    losses, hits = torch.cat(nll), torch.cat(right)
    return {"loss": float(losses.mean()), "accuracy": float(hits.mean()), "sampled_accuracy": float((-losses).exp().mean())}


# --- questions on documents -------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_figures(
    model: FastWeightForCausalLM, tokenizer: PreTrainedTokenizerBase, asked: Sequence[m.Asked], seed: int, temperature: float = 1.0,
    adapter: TestTimeTrainer | None = None,
) -> Figures:  # fmt: skip
    """Measure each question: whether it is answered under both protocols, log p of the answer, and mean entropy over its tokens.

    With an `adapter`, prompts are taken one at a time, and the seconds of each are kept.
    """
    eos = end_tokens(model, tokenizer)
    figures: dict[str, list[float]] = {"standard": [], "published": [], "log_p": [], "entropy": []}
    size = 1 if adapter is not None else ROWS
    for at in range(0, len(asked), size):
        batch = asked[at : at + size]
        rows = [q.prompt for q in batch]
        with adapter.adapt(rows) if adapter is not None else nullcontext():
            hidden, cache = prefill(model, rows)
            for protocol, budget, decoding in (
                ("standard", STANDARD_TOKENS, Decoding()),
                ("published", PUBLISHED_TOKENS, sampled(seed, temperature)),
            ):
                requests = [Request(at + i, r, budget) for i, r in enumerate(rows)]
                for q, tokens in zip(batch, decode(model, hidden, cache, requests, eos, decoding, keep_rows=True), strict=True):
                    text = tokenizer.decode(tokens, skip_special_tokens=True)
                    # As published: the first line, taken before stripping.
                    text = text.split("\n")[0] if protocol == "published" else text
                    figures[protocol].append(any_match(text, [q.reference]))
            nll, entropy = forced(model, hidden, cache, [q.answer for q in batch], temperature)
            figures["log_p"] += (-nll.sum(1)).tolist()
            figures["entropy"] += entropy.mean(1).tolist()
        if adapter is not None and adapter.last is not None:
            figures.setdefault("seconds", []).append(adapter.last.seconds)
    return figures


def forced(
    model: FastWeightForCausalLM, hidden: Tensor, cache: FastWeightCache, answers: Sequence[list[int]], temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute loss and entropy [B, A] of given answers of A tokens each, after prompts read to `hidden` [B, D] and `cache`."""
    ids = torch.tensor(answers)
    states = answer_states(model, hidden, cache, ids) / temperature
    _, stats = linear_cross_entropy(states, model.lm_head.weight, ids.flatten(), torch.ones(ids.numel()))
    return stats.nll.view(ids.shape), stats.entropy.view(ids.shape)


@torch.no_grad()
def answer_states(model: FastWeightForCausalLM, hidden: Tensor, cache: FastWeightCache, ids: Tensor) -> Tensor:
    """Return the hidden states [B*A, D] that predict the tokens of answers [B, A]."""
    after = model.model(ids[:, :-1], past_key_values=cache.copy(), use_cache=False).last_hidden_state
    return torch.cat([hidden[:, None], after], 1).flatten(0, 1)


def qa_figures(model: FastWeightForCausalLM, material: m.Material, scale: Scale, seed: int, temperature: float = 1.0) -> Figures:
    """Compute `answer_figures` by source and length."""
    return {
        f"{source} {length}": answer_figures(
            model, material.tokenizer, m.questions(material, "report", source, length, scale.qa_prompts), seed, temperature
        )
        for source in material.paragraphs
        for length in scale.qa_lengths
    }


def adapted_figures(
    model: FastWeightForCausalLM, material: m.Material, scale: Scale, part: str, seed: int, adapter: TestTimeTrainer
) -> Figures:
    """Compute `answer_figures` of the first questions of every source at the shortest length, each from weights adapted to it.

    This goes source by source, so that a sampled answer has the draws that it has without adaptation.
    """
    by_source = [
        answer_figures(
            model,
            material.tokenizer,
            m.questions(material, part, source, scale.qa_lengths[0], scale.qa_prompts)[: scale.test_time_prompts],
            seed,
            adapter=adapter,
        )
        for source in material.paragraphs
    ]
    return {name: [x for figures in by_source for x in figures[name]] for name in by_source[0]}


def answer_entropy(model: FastWeightForCausalLM, asked: Sequence[m.Asked]) -> Callable[[float], float]:
    """Make a function from a temperature to the mean entropy over the answers' tokens; it reads the prompts once."""
    states = []
    for at in range(0, len(asked), ROWS):
        batch = asked[at : at + ROWS]
        hidden, cache = prefill(model, [q.prompt for q in batch])
        states.append(answer_states(model, hidden, cache, torch.tensor([q.answer for q in batch])))
    rows = torch.cat(states)
    # Entropy needs no targets: any in range will do.
    nothing = torch.zeros(len(rows), dtype=torch.long), torch.ones(len(rows))
    return lambda t: float(linear_cross_entropy(rows / t, model.lm_head.weight, *nothing)[1].entropy.mean())


# --- sharpening -------------------------------------------------------------------------------------------------------


def matching_temperature(entropy_at: Callable[[float], float], wanted: float) -> float:
    """Find the temperature from 0.3 to 3 at which `entropy_at(temperature)`, which grows with it, is `wanted`, by bisection."""
    low, high = 0.3, 3.0
    for _ in range(18):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_at(middle) < wanted else (low, middle)
    return (low + high) / 2
