"""Recall probes and held-out text: the figures a mid-training is judged by at small scale.

A probe is scored from one forward pass over prompt + answer: greedy exact match (the argmax is right at every answer token, which is
what greedy decoding would produce), log p of the answer, and the probability of sampling it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.tiny.recall import RecallTokens, probe

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class ProbeSet:
    """Probes of one kind: up to `needles` facts in prompts of `length` tokens. prompts [n][length], answers [n][1 or more]."""

    length: int
    needles: int
    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class RecallScore:
    """Means over probes: greedy exact match, log-probability of the answer (nats), probability of sampling it; and the share of an
    answer's tokens that are the argmax, given those before.
    """

    greedy: float
    log_p: float
    sampled: float
    tokens: float


def make_probes(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], kinds: Sequence[tuple[int, int]], per_kind: int, seed: int
) -> list[ProbeSet]:
    """`per_kind` probes for each (length, needles)."""
    tokens = RecallTokens.of(tokenizer)
    sets = []
    for length, needles in kinds:
        rng = random.Random(f"{seed}-{length}-{needles}")
        made = [probe(rng, tokens, filler, length, needles) for _ in range(per_kind)]
        sets.append(ProbeSet(length, needles, [p for p, _ in made], [a for _, a in made]))
    return sets


@torch.no_grad()
def score_probes(model: FastWeightForCausalLM, probes: ProbeSet, temperature: float = 1.0) -> RecallScore:
    """Score one set under the distribution at `temperature`; rows are batched by what fits `BATCH_TOKENS`."""
    rows = [torch.tensor(p + a) for p, a in zip(probes.prompts, probes.answers, strict=True)]
    answers: list[tuple[float, float]] = []  # share of tokens that are the argmax, log p
    for start in range(0, len(rows), max(1, BATCH_TOKENS // probes.length)):
        batch = rows[start : start + max(1, BATCH_TOKENS // probes.length)]
        lengths = torch.tensor([len(r) for r in batch], device=model.device)
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        hidden = model.model(ids, lengths=lengths, use_cache=False).last_hidden_state
        for row, h, n in zip(batch, hidden, lengths.tolist(), strict=True):
            logits = model.lm_head(h[probes.length - 1 : n - 1]).float() / temperature
            truth = row[probes.length :].to(logits.device)
            log_p = logits.log_softmax(-1).gather(-1, truth[:, None]).sum()
            answers.append((float((logits.argmax(-1) == truth).double().mean()), float(log_p)))
    count = len(answers)
    return RecallScore(
        sum(right == 1.0 for right, _ in answers) / count,
        sum(log_p for _, log_p in answers) / count,
        float(torch.tensor([log_p for _, log_p in answers]).exp().mean()),
        sum(right for right, _ in answers) / count,
    )


@dataclass(frozen=True)
class TextScore:
    """Per target of held-out text: cross-entropy and entropy (nats), accuracy of the argmax and (expected) of a sampled token."""

    loss: float
    accuracy: float
    entropy: float
    sampled_accuracy: float


@torch.no_grad()
def score_text(model: FastWeightForCausalLM, windows: Tensor, temperature: float = 1.0) -> TextScore:
    """Next-token figures on windows [n, T] long, each from a fresh state, of the distribution at `temperature`."""
    n, T = windows.shape
    loss = accuracy = entropy = sampled = 0.0
    for rows in windows.to(model.device).split(max(1, BATCH_TOKENS // T)):
        hidden = model.model(rows, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = rows[:, 1:].flatten()
        weights = torch.ones(len(targets), device=model.device)
        total, stats = linear_cross_entropy(hidden / temperature, model.lm_head.weight, targets, weights)
        loss += float(total)
        sampled += float((-stats.nll).exp().sum())
        accuracy += float((stats.argmax == targets).sum())
        entropy += float(stats.entropy.sum())
    count = n * (T - 1)
    return TextScore(loss / count, accuracy / count, entropy / count, sampled / count)
