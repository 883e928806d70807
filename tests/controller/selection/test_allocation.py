"""Limits of a pool against a search over every threshold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_sparsity.controller.selection.allocation import (
    Distribution,
    allocate,
    distribute,
    erdos_renyi,
    outlier_densities,
)


def counts_below(scores, members, k):
    """How many of each member's scores are among the ``k`` lowest of all of them."""
    order = sorted((s, i) for i in members for s in scores[i])[:k]
    return [sum(owner == i for _, owner in order) for i in members]


@given(data=st.data())
def test_the_split_is_that_of_one_threshold_held_within_limits(data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    values = iter(rng.permutation(sum(sizes)).tolist())
    scores = [[next(values) for _ in range(n)] for n in sizes]
    minimum = [data.draw(st.integers(0, n)) for n in sizes]
    maximum = [data.draw(st.integers(low, n)) for low, n in zip(minimum, sizes, strict=True)]
    total = data.draw(st.integers(sum(minimum), sum(maximum)))

    fixed, free, left = allocate(
        total, minimum, maximum, lambda members, k: counts_below(scores, members, k)
    )
    got = fixed | dict(zip(free, counts_below(scores, free, left), strict=True))

    def clamped(threshold):
        return [
            min(max(sum(s < threshold for s in own), low), high)
            for own, low, high in zip(scores, minimum, maximum, strict=True)
        ]

    want = next(c for t in range(sum(sizes) + 1) if sum(c := clamped(t)) == total)
    assert [got[i] for i in range(len(sizes))] == want


def test_without_limits_nothing_is_fixed():
    assert allocate(3, [0, 0], [4, 4], lambda members, k: [1, 2]) == ({}, [0, 1], 3)


@pytest.mark.parametrize("total", [2, 6])
def test_limits_that_leave_no_choice(total):
    fixed, free, left = allocate(
        total, [1, 1], [3, 3], lambda members, k: [k] if len(members) == 1 else [0, k]
    )
    assert sum(fixed.values()) + left == total
    assert left == 0 or free


def test_erdos_renyi_is_sides_over_product():
    assert erdos_renyi((4, 8)) == 12 / 32
    assert erdos_renyi((16, 8, 3, 3)) == 30 / 1152


@pytest.mark.parametrize(
    ("total", "groups", "densities", "least", "most", "expected"),
    [
        # factor 16 / 18: 7.1 and 8.9
        (16, [16, 16], [8 / 16, 10 / 16], [0, 0], [16, 16], [7, 9]),
        # the small weight would keep 6.7 of its 4 groups: it stays dense, the other has the rest
        (60, [4, 256], [1.0, 32 / 256], [0, 0], [4, 256], [4, 56]),
        # the same number everywhere, the remainder to the first
        (8, [5, 5, 5], [1, 1, 1], [0, 0, 0], [5, 5, 5], [3, 3, 2]),
        (8, [5, 5, 5], [1, 1, 1], [0, 4, 0], [1, 5, 5], [1, 4, 3]),
        (0, [5, 5], [1, 1], [0, 0], [5, 5], [0, 0]),
        (10, [5, 5], [1, 1], [0, 0], [5, 5], [5, 5]),
    ],
)
def test_hand_worked_distributions(total, groups, densities, least, most, expected):
    assert distribute(total, groups, Distribution(densities), least, most) == expected


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.floats(1e-4, 10), st.floats(0, 1), st.floats(0, 1)),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 1),
    st.booleans(),
)
def test_every_distribution_adds_up_within_its_limits(weights, fraction, adds):
    groups = [n for n, *_ in weights]
    least = [int(n * min(a, b)) for n, _, a, b in weights]
    most = [int(n * max(a, b)) for n, _, a, b in weights]
    total = sum(least) + round(fraction * (sum(most) - sum(least)))
    distribution = Distribution([d for _, d, *_ in weights], adds)
    counts = distribute(total, groups, distribution, least, most)
    assert sum(counts) == total
    assert all(a <= n <= b for a, n, b in zip(least, counts, most, strict=True))


def test_owl_keeps_more_of_what_has_more_outliers():
    # scaled to a span of 2 * 0.08, as the paper's code does
    assert outlier_densities([0.01, 0.05, 0.03]).densities == pytest.approx([0, 0.16, 0.08])
    assert outlier_densities([0.2, 0.2]) == ([0.0, 0.0], True)
    # of 3 x 1000 groups 600 are kept: 0.2 - 0.08, 0.2 + 0.08 and 0.2 of each
    owl = outlier_densities([0.01, 0.05, 0.03])
    assert distribute(600, [1000] * 3, owl, [0] * 3, [1000] * 3) == [120, 280, 200]
    # what would be beyond all is shared out among the others
    assert distribute(2900, [1000] * 3, owl, [0] * 3, [1000] * 3) == [910, 1000, 990]
