"""Seeds: the published numbers of SplitMix64, and a seed for each place that no other has."""

import torch

from refine_nsp.nsp.seeds import generator_of, seed_of, splitmix64


def test_splitmix64_gives_the_published_numbers():
    # The generator's first outputs from state 0 (Vigna's splitmix64.c); its state grows by the constant at every step.
    golden = 0x9E3779B97F4A7C15
    found = [splitmix64(i * golden % 2**64) for i in range(3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_seed_is_a_fixed_function_of_its_numbers():
    assert seed_of(0, 0, 0, 0) == splitmix64(splitmix64(splitmix64(splitmix64(0))))
    assert [seed_of(42, 7, 3, 0), seed_of(-1)] == [849195135227432884, splitmix64(2**64 - 1)]


def test_every_place_has_a_seed_and_draws_of_its_own():
    places = [
        (seed, step, example, document)
        for seed in range(4)
        for step in range(20)
        for example in range(40)
        for document in range(3)
    ]
    assert len({seed_of(*place) for place in places}) == len(places)
    u = torch.stack([torch.rand(4, generator=generator_of(*place)) for place in places])
    assert abs(float(u.mean()) - 0.5) < 0.01
    # Neighbours in every coordinate are no more alike than any two.
    by_axis = u[:, 0].view(4, 20, 40, 3) - 0.5
    for axis in range(4):
        a, b = by_axis.narrow(axis, 1, by_axis.shape[axis] - 1), by_axis.narrow(axis, 0, by_axis.shape[axis] - 1)
        assert abs(float((a * b).mean() * 12)) < 0.06
