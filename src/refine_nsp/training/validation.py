"""Validation measures the prediction of the next token, and how well K greedy tokens match the text, at fixed positions."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from refine_nsp.config import NSPConfig
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.forward import run
from refine_nsp.nsp.next_token import next_tokens
from refine_nsp.nsp.records import Batch, Learning, Work, uniforms
from refine_nsp.nsp.rollouts import greedy_match
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.nsp.selection import select_positions
from refine_nsp.training.data import ANSWER_COLUMN, BEGINS_COLUMN, Collated
from refine_nsp.training.lane_states import LaneStates

SEED = 0


@torch.no_grad()
def validate(
    model: CausalModel, batches: Iterable[Collated], config: NSPConfig, device: torch.device, carried_keys: int | None = None
) -> dict[str, float]:
    """Sum up over all batches: nll, correct, sampled (expected) and entropy over `targets`; match and cosine of greedy tokens over
    `places`. Batches of documents in lanes (`documents_in_lanes`) continue from the states of their windows before."""
    sums = dict.fromkeys(("nll", "correct", "sampled", "entropy", "targets", "match", "cosine", "places"), 0.0)
    at_random = config.at_random()
    carried = LaneStates(recent=0, keys=carried_keys)
    rows = 0
    for inputs in batches:
        ids = inputs["input_ids"].to(device)
        lanes: list[int] = inputs.get("_lanes", [])
        carried.forget(lane for lane, begins in zip(lanes, inputs.get(BEGINS_COLUMN, []), strict=False) if begins)
        starts = carried.starts(lanes, device) if lanes else None
        batch = Batch.of(ids, inputs["lengths"], starts=starts, answer_starts=inputs.get(ANSWER_COLUMN))
        # Positions are the same at every validation, whatever else is in a batch; known beforehand, only their states are kept.
        where = inputs.get("_places", [(rows + i, 0) for i in range(len(batch.sizes))])
        rows += len(batch.sizes)
        generators = [generator_of(SEED, *place) for place in where]
        u, _ = uniforms(len(batch.sizes), config.positions_per_sequence, 1, config.rollout_length, generators)
        positions = select_positions(torch.zeros(batch.input_ids.shape, device=device), batch, u, at_random)
        sequence_pass = run(Work(model, batch, at_random, learning=Learning(ntp_normalizer=1.0)), positions)
        if sequence_pass.left is not None:
            carried.keep(lanes, batch, sequence_pass.left)
        stats, mask, targets = sequence_pass.stats, batch.target_mask.flatten(), next_tokens(batch)
        sums["nll"] += float(stats.nll[mask].double().sum())
        sums["correct"] += float((stats.argmax == targets)[mask].sum())
        sums["sampled"] += float((-stats.nll[mask].double()).exp().sum())
        sums["entropy"] += float(stats.entropy[mask].double().sum())
        sums["targets"] += batch.num_targets
        prefixes = sequence_pass.states(positions)
        match, similarity, places = greedy_match(model, batch.input_ids, sequence_pass.hidden, prefixes, config.rollout_length)
        sums["match"] += match
        sums["cosine"] += similarity
        sums["places"] += places
    return sums
