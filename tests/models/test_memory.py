"""The memory of a state does not grow with the context; LaCT's is bounded by its window and open chunk."""

import pytest
import torch

from tests.models.families import build


def state_bytes(model, contexts: list[int]) -> list[int]:
    found, cache, seen = [], None, 0
    with torch.no_grad():
        for context in contexts:
            out = model(torch.randint(0, 64, (1, context - seen)), past_key_values=cache)
            cache, seen = out.past_key_values, context
            found.append(cache.nbytes)
    return found


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
def test_delta_states_are_of_one_size(family):
    sizes = state_bytes(build(family), [1, 70, 1000, 4000])
    assert len(set(sizes)) == 1


def test_lact_states_are_bounded_by_window_and_open_chunk():
    model = build("lact_swiglu", lact_chunk_size=16, window_size=12)
    sizes = state_bytes(model, [16, 17, 31, 32, 160, 1600, 1601, 4000])
    full_chunk = sizes[0]
    assert max(sizes) == full_chunk  # after 16, 32, 160, ... tokens the open chunk is full
    assert sizes[4] == sizes[5] == sizes[7] == full_chunk
    assert sizes[1] == sizes[6] < full_chunk  # one open token


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet", "lact_swiglu"])
def test_a_snapshot_costs_one_state_per_row(family):
    model = build(family)
    ids = torch.randint(0, 64, (2, 160))
    with torch.no_grad():
        one = model(ids, snapshot_positions=torch.tensor([[159], [159]])).snapshots
        three = model(ids, snapshot_positions=torch.tensor([[159, 95, 31], [159, 95, 31]])).snapshots
    assert three.batch_size == 6 and three.nbytes == 3 * one.nbytes
