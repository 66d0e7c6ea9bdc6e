"""Bits for units under a budget, against all combinations."""

import itertools
import random

import pytest

from speechbrain_stablequant.methods.search.bit_allocation import (
    Option,
    choose_bits,
    monotone,
)

BITS = (4, 6, 8, 16)


def units_of(seed, count=4):
    """Options whose harm falls with the bits, with some noise."""
    draw = random.Random(seed)
    units = {}
    for index in range(count):
        weights = draw.randint(100, 5000)
        pain = draw.uniform(0, 5)
        units[f"u{index}"] = monotone(
            [
                Option(
                    bits,
                    weights * bits // 8,
                    max(0, pain * (16 - bits) / 12 + draw.gauss(0, 0.2)),
                )
                for bits in BITS
            ]
        )
    return units


def total(units, choice):
    """Size and harm of a choice."""
    size = harm = 0
    for unit, row in units.items():
        option = next(o for o in row if o.bits == choice[unit])
        size += option.size
        harm += option.harm
    return size, harm


@pytest.mark.parametrize("seed", range(12))
def test_no_combination_is_better(seed):
    units = units_of(seed)
    largest = sum(row[-1].size for row in units.values())
    budget = int(largest * random.Random(-seed).uniform(0.3, 0.9))
    choice = choose_bits(units, budget)
    size, harm = total(units, choice)
    assert size <= budget
    # A step of the knapsack is a 4096th: what only just fits is left out.
    room = budget - 4 * -(-budget // 4096)
    for bits in itertools.product(BITS, repeat=len(units)):
        other = dict(zip(units, bits, strict=True))
        other_size, other_harm = total(units, other)
        if other_size <= room:
            assert harm <= other_harm + 1e-9


def test_all_bits_where_there_is_room():
    units = units_of(1)
    everything = sum(row[-1].size for row in units.values())
    assert set(choose_bits(units, 2 * everything).values()) == {16}


def test_only_the_smallest_fit():
    units = units_of(2)
    least = sum(row[0].size for row in units.values())
    assert set(choose_bits(units, least).values()) == {4}
    with pytest.raises(ValueError, match=r"plus\.budget\.size: the fewest"):
        choose_bits(units, least - 1)


def test_harm_never_rises_with_the_bits():
    """Noise made 4 bits look better than 8."""
    row = [Option(4, 1, 0.0), Option(8, 2, 1.0)]
    assert [option.harm for option in monotone(row)] == [1.0, 1.0]


def test_the_unit_that_suffers_less_gets_fewer_bits():
    units = {
        "a": [Option(4, 10, 0.5), Option(8, 20, 0.0)],
        "b": [Option(4, 10, 0.1), Option(8, 20, 0.0)],
        "c": [Option(4, 10, 1.0), Option(8, 20, 0.0)],
    }
    assert choose_bits(units, 50) == {"a": 8, "b": 4, "c": 8}
