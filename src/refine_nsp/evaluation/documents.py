"""Measure next-token figures on documents (the paper's Booksum figure), and how well K greedy tokens match the text (the NSP measure).

`sampled_accuracy` is the mean probability of the true token: what one token sampled at every position would score on average. The paper's
figure draws that sample, which rewards a sharper distribution, so the argmax accuracy is given next to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.models.adapters import head_weight
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.records import Batch, Prefixes, uniforms
from refine_nsp.nsp.rollouts import greedy_match
from refine_nsp.nsp.selection import select_positions, smooth_entropy
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class DocumentScore:
    """Hold means over the targets of a document (nats; accuracies 0..1), and the same for each bucket, by its first position."""

    figures: dict[str, float]
    targets: int
    buckets: dict[int, dict[str, float]]


BLOCK = 1024
FIGURES = ("loss", "entropy", "accuracy", "sampled_accuracy")


@torch.no_grad()
def score_document(
    model: CausalModel,
    ids: Sequence[int],
    window: int | None,
    bucket: int,
    on_tokens: Callable[[int], None] | None = None,
) -> DocumentScore:
    """Score a document of at least 2 tokens, over all and for each bucket of `bucket` tokens.

    Without a window it is read from its first token to its last, the state carried from block to block; else in windows of so many tokens,
    each from a fresh state. The first half of each window but the first is context only, so that every token is scored once.
    """
    sums: dict[int, Tensor] = {}
    tokens = torch.as_tensor(list(ids), device=model.device)
    for first, last, skip in spans(len(ids), window):
        cache = FastWeightCache()
        for start in range(first, last - 1, BLOCK):
            end = min(start + BLOCK, last - 1)
            out = model.model(tokens[None, start:end], past_key_values=cache, use_cache=True)
            figures = _token_figures(model, out.last_hidden_state[0], tokens[start + 1 : end + 1])
            positions = torch.arange(start + 1, end + 1)
            for at in range(max(start + 1, first + 1 + skip) // bucket * bucket, end + 1, bucket):
                inside = (positions >= max(at, first + 1 + skip)) & (positions < at + bucket)
                if bool(inside.any()):
                    total = torch.cat([figures[inside].sum(0), inside.sum()[None].double()])
                    sums[at] = sums[at] + total if at in sums else total
            if on_tokens is not None:
                on_tokens(end - start)
    overall = torch.stack(list(sums.values())).sum(0)
    return DocumentScore(_means(overall), int(overall[-1]), {at: _means(x) for at, x in sorted(sums.items())})


def spans(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """Cut a document into (first, last, skip): run tokens first..last, and score the targets after the first `skip` of them."""
    if window is None or window >= length:
        return [(0, length, 0)]
    windows, half = [(0, window, 0)], window // 2
    while windows[-1][1] < length:
        last = min(windows[-1][1] + half, length)
        windows.append((last - window, last, window - 1 - (last - windows[-1][1])))
    return windows


def _means(total: Tensor) -> dict[str, float]:
    return {name: float(x / total[-1]) for name, x in zip(FIGURES, total, strict=False)}


def _token_figures(model: CausalModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return [T, 4] double on the CPU: the loss of each target, the entropy, whether the argmax is right, and the target's probability."""
    _, stats = linear_cross_entropy(hidden, head_weight(model), targets, torch.ones(len(targets), device=hidden.device))
    columns = [stats.nll, stats.entropy, stats.argmax == targets, (-stats.nll).exp()]
    return torch.stack([c.double().cpu() for c in columns], -1)


@torch.no_grad()
def continuation_match(model: CausalModel, ids: Sequence[int], config: NSPConfig, seed: int) -> dict[str, float]:
    """Measure the share of K greedy tokens that equal the text's, and their mean cosine, at random and at high-entropy positions.

    The document is read block by block, each from the states of the one before, so that memory does not grow with it but for its tokens.
    It is read twice: which positions have a high entropy is known at its end.
    """
    batch = Batch.of(torch.as_tensor(list(ids), device=model.device)[None])
    u, _ = uniforms(1, config.positions_per_sequence, 1, config.rollout_length, torch.Generator().manual_seed(seed))
    entropy = smooth_entropy(_entropy(model, batch.input_ids), batch, config)
    figures: dict[str, float] = {}
    anywhere, greatest = replace(config, selection="uniform", draw=None), replace(config, selection="argmax", draw=None)
    ways = {"random": (torch.zeros_like(entropy), anywhere), "high_entropy": (entropy, greatest)}
    chosen = {name: select_positions(scores, batch, u, how)[0].tolist() for name, (scores, how) in ways.items()}
    sums = _matches(model, batch.input_ids, list(chosen.values()), config.rollout_length)
    for name, (match, similarity, places) in zip(chosen, sums, strict=True):
        figures[f"match_{name}"], figures[f"cosine_{name}"] = match / max(1, places), similarity / max(1, places)
    return figures


def _entropy(model: CausalModel, ids: Tensor) -> Tensor:
    """Compute the entropy of every next-token distribution of ids [1, T], block by block; [1, T], nats."""
    cache, parts = FastWeightCache(), []
    for block in ids.split(BLOCK, 1):
        hidden = model.model(block, past_key_values=cache, use_cache=True).last_hidden_state[0]
        none = torch.zeros(len(hidden), device=hidden.device)
        parts.append(linear_cross_entropy(hidden, head_weight(model), none.long(), none)[1].entropy)
    return torch.cat(parts)[None]


def _matches(model: CausalModel, ids: Tensor, kinds: Sequence[Sequence[int]], K: int) -> list[tuple[float, float, int]]:
    """Compare greedy tokens with the text ids [1, T] at the positions of each kind (-1: none); sums as `greedy_match` returns them.

    A block is run K tokens beyond its end, where the text behind its last positions stands; its states go on from its end.
    """
    cache: FastWeightCache | None = None
    sums = [(0.0, 0.0, 0)] * len(kinds)
    for start in range(0, ids.shape[1], BLOCK):
        end = min(start + BLOCK, ids.shape[1])
        inside = [[t - start for t in positions if start <= t < end] for positions in kinds]
        wanted = torch.tensor([[*(t for own in inside for t in own), end - start - 1]])
        tokens = ids[:, start : end + K]
        out = model.model(tokens, past_key_values=cache, use_cache=False, snapshot_positions=wanted)
        assert out.snapshots is not None
        cache, first = out.snapshots.index(torch.tensor([wanted.shape[1] - 1])), 0
        for i, own in enumerate(inside):
            if own:
                rows, positions = torch.arange(first, first + len(own)), torch.tensor([own], device=ids.device)
                prefixes = Prefixes(positions, out.last_hidden_state[0, own], out.snapshots.index(rows))
                found = greedy_match(model, tokens, out.last_hidden_state, prefixes, K)
                sums[i] = (sums[i][0] + found[0], sums[i][1] + found[1], sums[i][2] + found[2])
            first += len(own)
    return sums


def perplexity(loss: float) -> float:
    """Return exp(loss), or inf where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
