"""A little of `make fuzz` in every run of the tests."""

from tests.fuzz import fuzz


def test_broken_input_ends_in_one_line_of_ours():
    assert fuzz(60, seed=1_000_000, quiet=True) == []
