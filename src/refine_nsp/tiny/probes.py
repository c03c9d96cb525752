"""Score recall probes and held-out text, whose figures judge a training at small scale.

A probe is scored from one forward pass over prompt + answer. The argmax is right at every token of the answer exactly where greedy
decoding would produce that answer; the same pass gives the answer's log p and the probability of sampling it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_nsp.models.adapters import head_weight
from refine_nsp.models.protocols import CausalModel
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class ProbeSet:
    """A set holds probes of one kind: `prompts` of `length` tokens each, [n][length], and their `answers`, [n][1 or more]."""

    length: int
    prompts: list[list[int]]
    answers: list[list[int]]


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


@torch.no_grad()
def answer_logits(model: CausalModel, probes: ProbeSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each probe the logits [A, V] float32 of its answer, given the prompt and the answer so far, and the answer [A].

    As many probes as fit into `BATCH_TOKENS` go through the model together.
    """
    rows = [torch.tensor(p + a) for p, a in zip(probes.prompts, probes.answers, strict=True)]
    for start in range(0, len(rows), max(1, BATCH_TOKENS // probes.length)):
        batch = rows[start : start + max(1, BATCH_TOKENS // probes.length)]
        lengths = torch.tensor([len(r) for r in batch], device=model.device)
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        hidden = model.model(ids, lengths=lengths, use_cache=False).last_hidden_state
        for row, h, n in zip(batch, hidden, lengths.tolist(), strict=True):
            yield model.lm_head(h[probes.length - 1 : n - 1]).float(), row[probes.length :].to(h.device)


def score_answers(answers: Iterable[tuple[Tensor, Tensor]], temperature: float = 1.0) -> RecallScore:
    """Score what `answer_logits` yields, under the distribution at `temperature`."""
    right, log_ps = [], []
    for logits, truth in answers:
        log_p = (logits / temperature).log_softmax(-1).gather(-1, truth[:, None])
        right.append(float((logits.argmax(-1) == truth).double().mean()))
        log_ps.append(float(log_p.sum()))
    count = len(right)
    return RecallScore(
        sum(share == 1.0 for share in right) / count,
        sum(log_ps) / count,
        float(torch.tensor(log_ps).exp().mean()),
        sum(right) / count,
    )


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
    loss = accuracy = entropy = sampled = 0.0
    for rows in windows.to(model.device).split(max(1, BATCH_TOKENS // T)):
        hidden = model.model(rows, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = rows[:, 1:].flatten()
        weights = torch.ones(len(targets), device=model.device)
        total, stats = linear_cross_entropy(hidden / temperature, head_weight(model), targets, weights)
        loss += float(total)
        sampled += float((-stats.nll).exp().sum())
        accuracy += float((stats.argmax == targets).sum())
        entropy += float(stats.entropy.sum())
    count = n * (T - 1)
    return TextScore(loss / count, accuracy / count, entropy / count, sampled / count)
