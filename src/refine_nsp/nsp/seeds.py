"""Make seeds by stated arithmetic on integers, so that randomness is the same in every process and every Python."""

from __future__ import annotations

import torch

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


def splitmix64(x: int) -> int:
    """Take one step of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of 64-bit integers whose outputs pass tests of randomness."""
    z = (x + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def seed_of(*numbers: int) -> int:
    """Make a 64-bit seed of integers in their order: z = 0, then z = splitmix64(z xor n) for each n (modulo 2^64)."""
    z = 0
    for n in numbers:
        z = splitmix64(z ^ (n & _MASK))
    return z


def generator_of(*numbers: int) -> torch.Generator:
    """Make a CPU generator seeded by `seed_of`. Torch's engine takes the lower 32 bits."""
    return torch.Generator().manual_seed(seed_of(*numbers))
