"""The search for an order of features against hand-worked values and exhaustive search."""

from itertools import combinations

import pytest
import torch

from triton_sparsity import Block
from triton_sparsity.controller.selection.permutation import Side, group_features, kept_mass


def side(matrix, pattern, level=0.5, *, rows=False):
    return Side.of(torch.as_tensor(matrix), pattern, level, rows=rows)


def groups(order, width):
    return {frozenset(part.tolist()) for part in order.split(width)}


def test_columns_that_are_strong_in_one_row_come_together():
    # each pair of columns keeps one of its two blocks: 5 + 1 as they lie, 5 + 5 at best
    columns = side([[5.0, 1, -5, 1], [1, 5, 1, -5]], Block(1, 2))
    order = group_features([columns])
    assert kept_mass([columns], torch.arange(4)) == 12
    assert kept_mass([columns], order) == 20
    assert groups(order, 2) == {frozenset((0, 2)), frozenset((1, 3))}


def test_strong_columns_do_not_come_together_for_their_strength_alone():
    # columns 0 and 2 are the strongest, but nothing is gained by a pair of them: whichever is
    # beside column 0 keeps its half in the other row
    columns = side([[9.0, 1, 9, 1], [9, 1, 9, 1]], Block(1, 2))
    _, kept = columns.blocks(group_features([columns]))
    assert kept.sum(1).tolist() == [1, 1]


def test_columns_that_are_strong_in_the_same_rows_come_together():
    # blocks of two columns and two rows
    columns = side([[9.0, 0, 0, 8], [9, 1, 0, 8], [0, 8, 9, 1], [1, 8, 9, 0]], Block(2, 2))
    order = group_features([columns])
    assert groups(order, 2) == {frozenset((0, 3)), frozenset((1, 2))}
    assert kept_mass([columns], order) == 4 * 9 + 4 * 8


def test_rows_and_columns_of_two_weights_have_one_order():
    first = torch.tensor([[6.0, 0], [0, 6], [6, 0], [0, 6]])
    sides = [side(first, Block(2, 1), rows=True), side(first.T + 1, Block(1, 2))]
    order = group_features(sides)
    assert groups(order, 2) == {frozenset((0, 2)), frozenset((1, 3))}
    assert kept_mass(sides, order) == 2 * 12 + 2 * 14


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ((24, 32), Block(4, 8)),
        ((13, 37), Block(4, 8)),
        ((7, 9), Block(8, 2)),
        ((5, 3), Block(1, 4)),
    ],
    ids=str,
)
def test_what_is_kept_never_falls(shape, pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=generator) for _ in range(2))
    last = torch.randn(shape[::-1], generator=generator)
    sides = [
        side(first, pattern, 0.6),
        side(second, Block(2, 2), 0.8),
        side(last, pattern, 0.7, rows=True),
    ]
    order = group_features(sides)
    assert torch.equal(order.sort().values, torch.arange(shape[1]))
    assert kept_mass(sides, order) >= kept_mass(sides, torch.arange(shape[1]))
    assert torch.equal(order, group_features(sides))


@pytest.mark.parametrize("seed", range(5))
def test_a_small_weight_is_nearly_as_good_as_the_best_of_all_orders(seed):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    columns = side(weight, Block(2, 4), 0.5)
    masses = []
    for chosen in combinations(range(1, 8), 3):
        first = [0, *chosen]
        places = torch.tensor([*first, *(set(range(8)) - set(first))])
        masses.append(kept_mass([columns], places))
    identity = kept_mass([columns], torch.arange(8))
    found = kept_mass([columns], group_features([columns]))
    assert identity <= found <= max(masses) * (1 + 1e-12)
    assert found >= 0.96 * max(masses)


def test_what_is_alike_stays_where_it_is():
    assert torch.equal(group_features([side(torch.ones(4, 8), Block(2, 4))]), torch.arange(8))
