"""What a model is measured by. Everything is kept per prompt where a table may want a subset or a pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.evaluation.text_metrics import any_match
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.generation import Decoding, Request, decode, end_tokens, prefill
from refine_nsp.models.state import FastWeightCache
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.tiny.probes import make_probes, score_probes, score_text
from refine_nsp.training.test_time import TestTimeTrainer

from . import material as m
from .settings import Scale

NEEDLE_TASKS = ("S", "MK", "MQ", "MV")
ROWS = 16  # prompts at a time
STANDARD_TOKENS, PUBLISHED_TOKENS = 8, 32
Figures = dict[str, Any]


def sampled(seed: int, temperature: float) -> Decoding:
    """The paper's code: temperature 1, the 50 likeliest tokens. The draws are those of a seed of training, so that spread over seeds
    holds theirs, and the arms of a seed share them."""
    return Decoding(greedy=False, temperature=temperature, top_k=50, seed=seed)


# --- text and recall --------------------------------------------------------------------------------------------------


def text_figures(model: FastWeightForCausalLM, material: m.Material, part: str = "report", temperature: float = 1.0) -> Figures:
    """Next-token figures on held-out text."""
    return asdict(score_text(model, material.windows[part], temperature))


def recall_figures(model: FastWeightForCausalLM, material: m.Material, scale: Scale, temperature: float = 1.0) -> Figures:
    """Mean over kinds of probe: greedy exact match, log p of the answer, probability of sampling it at `temperature`."""
    kinds = [(n, scale.needles) for n in scale.needle_lengths[-2:]]
    kinds += [(scale.needle_lengths[-1], 2 * scale.needles)]
    probes = make_probes(material.tokenizer, material.held_out, kinds, scale.recall_prompts, seed=100)
    scores = [score_probes(model, p, temperature) for p in probes]
    return {name: mean(getattr(s, name) for s in scores) for name in ("greedy", "log_p", "sampled")}


@torch.no_grad()
def needle_figures(
    model: FastWeightForCausalLM, material: m.Material, scale: Scale, seed: int, temperature: float = 1.0
) -> Figures:
    """By task and length, the share of asked values found under both protocols."""
    figures: Figures = {"standard": {}, "published": {}}
    protocols = {"standard": Decoding(), "published": sampled(seed, temperature)}
    for task in NEEDLE_TASKS:
        for length in scale.needle_lengths:
            prompts = m.needles(material, task, length, scale.needles, scale.needle_prompts, seed=2)
            shares: dict[str, list[float]] = {name: [] for name in protocols}
            for at in range(0, len(prompts), ROWS):
                batch = prompts[at : at + ROWS]
                read = prefill(model, [p.prompt for p in batch])
                for name, decoding in protocols.items():
                    shares[name] += in_turn(model, batch, *read, decoding, at)
            for name in protocols:
                figures[name][f"{task} {length}"] = mean(shares[name])
    return figures


def in_turn(
    model: FastWeightForCausalLM,
    prompts: Sequence[m.Needle],
    hidden: Tensor,
    cache: FastWeightCache,
    decoding: Decoding,
    first: int = 0,
) -> list[float]:
    """Share of each prompt's values found: the model's answer to the first question, the next question after it, and so on.

    first: place of the first prompt among all, by which its draws are chosen.
    """
    given: list[list[list[int]]] = [[] for _ in prompts]
    size = len(prompts[0].answers[0])
    for turn in range(len(prompts[0].answers)):
        if turn:
            more = [g[-1] + p.following[turn - 1] for g, p in zip(given, prompts, strict=True)]
            hidden, cache = prefill(model, more, cache)
        requests = [Request((first + i) * len(p.answers) + turn, [], size) for i, p in enumerate(prompts)]
        for g, tokens in zip(given, decode(model, hidden, cache, requests, set(), decoding, keep_rows=True), strict=True):
            g.append(tokens)
    # Each value counts once, however often it is given.
    return [sum(a in g for a in p.answers) / len(p.answers) for g, p in zip(given, prompts, strict=True)]


# --- questions on documents -------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_figures(
    model: FastWeightForCausalLM, tokenizer: PreTrainedTokenizerBase, asked: Sequence[m.Asked], seed: int, temperature: float = 1.0,
    adapter: TestTimeTrainer | None = None,
) -> Figures:  # fmt: skip
    """Per question: found under both protocols, log p of the answer, mean entropy over its tokens. adapter: one prompt at a time."""
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
    return figures


def forced(
    model: FastWeightForCausalLM, hidden: Tensor, cache: FastWeightCache, answers: Sequence[list[int]], temperature: float
) -> tuple[Tensor, Tensor]:
    """nll and entropy [B, A] of given answers of A tokens each, after prompts read to `hidden` [B, D] and `cache`."""
    ids = torch.tensor(answers)
    states = answer_states(model, hidden, cache, ids) / temperature
    _, stats = linear_cross_entropy(states, model.lm_head.weight, ids.flatten(), torch.ones(ids.numel()))
    return stats.nll.view(ids.shape), stats.entropy.view(ids.shape)


@torch.no_grad()
def answer_states(model: FastWeightForCausalLM, hidden: Tensor, cache: FastWeightCache, ids: Tensor) -> Tensor:
    """Hidden states [B*A, D] that predict the tokens of answers [B, A]."""
    after = model.model(ids[:, :-1], past_key_values=cache.copy(), use_cache=False).last_hidden_state
    return torch.cat([hidden[:, None], after], 1).flatten(0, 1)


def qa_figures(model: FastWeightForCausalLM, material: m.Material, scale: Scale, seed: int, temperature: float = 1.0) -> Figures:
    """`answer_figures` by source and length."""
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
    """`answer_figures` of the first questions of every source at the shortest length, each from weights adapted to it.

    Source by source, so that a sampled answer has the draws it has without adaptation.
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
    """temperature -> mean entropy over the answers' tokens; the prompts are read once."""
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
    """The temperature at which `entropy_at(temperature)`, which grows with it, is `wanted` (within 0.3 to 3), by bisection."""
    low, high = 0.3, 3.0
    for _ in range(18):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_at(middle) < wanted else (low, middle)
    return (low + high) / 2
