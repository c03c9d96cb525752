"""Validation: next-token figures, and how well K greedy tokens match the text (the NSP measure), at fixed positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.continuation import greedy_match
from refine_nsp.nsp.prefix import Batch, run_pass
from refine_nsp.nsp.records import uniforms
from refine_nsp.nsp.selection import select_positions

SEED = 0


@torch.no_grad()
def validate(model: Any, batches: Iterable[dict[str, Tensor]], config: NSPConfig, device: torch.device) -> dict[str, float]:
    """Sums over all batches: nll, correct, sampled (expected), entropy over `targets`; match and cosine of greedy tokens over `places`."""
    sums = dict.fromkeys(("nll", "correct", "sampled", "entropy", "targets", "match", "cosine", "places"), 0.0)
    generator = torch.Generator().manual_seed(SEED)  # the same positions at every validation
    for inputs in batches:
        batch = Batch(inputs["input_ids"].to(device), inputs["lengths"].to(device))
        whole = run_pass(model, batch, 1.0)
        mask = batch.target_mask.flatten()
        targets = torch.nn.functional.pad(batch.input_ids[:, 1:], (0, 1)).flatten()
        sums["nll"] += float(whole.stats.nll[mask].double().sum())
        sums["correct"] += float((whole.stats.argmax == targets)[mask].sum())
        sums["sampled"] += float((-whole.stats.nll[mask].double()).exp().sum())
        sums["entropy"] += float(whole.stats.entropy[mask].double().sum())
        sums["targets"] += int(mask.sum())
        u, _ = uniforms(len(batch.lengths), config.positions_per_sequence, 1, config.rollout_length, generator)
        flat = torch.zeros_like(batch.input_ids, dtype=torch.float32)
        positions = select_positions(flat, batch.lengths, u, replace(config, selection="uniform"))
        match, similarity, places = greedy_match(model, batch, whole, positions, config.rollout_length)
        sums["match"] += match
        sums["cosine"] += similarity
        sums["places"] += places
    return sums
