"""Measure next-sequence prediction: how well K greedy tokens from a position match the text."""

from __future__ import annotations

from torch import Tensor

from refine_nsp.models.branches import Branches
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import Prefixes, gather_positions
from refine_nsp.nsp.rewards import cosine


def greedy_match(
    model: CausalModel, input_ids: Tensor, true_states: Tensor, prefixes: Prefixes, K: int
) -> tuple[float, float, int]:
    """Compare K greedy tokens from each of the prefixes with the text.

    Args:
        input_ids: [B, T] long. true_states: [B, T, D], the final-norm output after consuming each token of the text.

    Returns:
        The sum over positions of the share of equal tokens, the sum of mean cosines, and how many positions there are.
    """
    positions = prefixes.positions
    rows, hidden, match, similarity, valid = (
        Branches(model.model, prefixes.cache, 1),
        prefixes.hidden,
        0.0,
        0.0,
        positions.flatten() >= 0,
    )
    for j in range(1, K + 1):
        token = model.lm_head(hidden).argmax(-1)
        hidden = rows.advance(token)
        ahead = (positions.clamp(min=0) + j).clamp(max=input_ids.shape[1] - 1)
        truth, true_hidden = input_ids.gather(1, ahead).flatten(), gather_positions(true_states, ahead).flatten(0, 1)
        match += float((token == truth)[valid].sum())
        similarity += float(cosine(hidden=hidden, truth_hidden=true_hidden)[valid].sum())
    return match / K, similarity / K, int(valid.sum())
