"""Optimal brain surgeon against hand-worked values, exhaustive search and SparseGPT itself."""

import numpy as np
import pytest
import torch

from triton_sparsity import NM, Block, Unstructured
from triton_sparsity.controller.selection.obs import prune_matrix

TINY = 1e-9  # damping that hand-worked values do without


def problem(rows, cols, seed=0, samples=None):
    """Return a weight, and the moment of inputs that depend on one another."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples or 8 * cols, cols)) @ rng.standard_normal((cols, cols))
    x += rng.standard_normal(x.shape)
    weight = rng.standard_normal((rows, cols))
    return torch.from_numpy(weight).float(), torch.from_numpy(x.T @ x)


def error(weight, pruned, moment):
    gap = weight.double() - pruned.double()
    return ((gap @ moment) * gap).sum().item()


def test_two_elements_by_hand():
    # H^-1 = [[2, -1], [-1, 2]] / 3: dropping costs w^2 / (2 / 3), 1.5 for the first and 6 for the
    # second; the first goes, and the second takes over w_1 H_12 / H_22 = 0.5
    weight, moment = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    pruned = prune_matrix(weight, moment, Unstructured(), 0.5, damping=TINY)
    torch.testing.assert_close(pruned, torch.tensor([[0.0, 2.5]]))
    assert error(weight, pruned, moment.double()) == pytest.approx(1.5)


def test_inputs_that_have_nothing_to_do_with_each_other_are_weighed_by_their_size():
    weight, moment = (
        torch.tensor([[3.0, 2.0, 1.0, 1.0]]),
        torch.diag(torch.tensor([1.0, 4, 16, 1])),
    )
    pruned = prune_matrix(weight, moment, Unstructured(), 0.5, damping=TINY)
    torch.testing.assert_close(pruned, torch.tensor([[0.0, 2.0, 1.0, 0.0]]))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 8), Block(4, 1), NM(2, 4)], ids=str)
def test_the_retained_elements_are_the_best_there_are(pattern):
    weight, moment = problem(8, 24)
    pruned = prune_matrix(weight, moment, pattern, 0.5, damping=TINY)
    for row, before in zip(pruned.double(), weight.double(), strict=True):
        kept = row != 0
        # the gradient of the error by each retained element is zero
        slope = ((row - before) @ moment)[kept]
        assert slope.abs().max() < 1e-4 * moment.diagonal().max()


@pytest.mark.parametrize(
    ("pattern", "shape", "level", "groups"),
    [
        (Unstructured(), (6, 10), 0.8, 60),
        (Block(4, 4), (10, 14), 0.5, 12),
        (Block(16, 4), (10, 14), 0.25, 4),
        (Block(2, 16), (4, 10), 0.5, 2),
    ],
    ids=str,
)
def test_the_count_is_exact_and_edges_are_groups_too(pattern, shape, level, groups):
    weight, moment = problem(*shape)
    pruned = prune_matrix(weight, moment, pattern, level)
    rows, cols = pattern.rows, pattern.cols
    blocks = [
        pruned[i : i + rows, j : j + cols]
        for i in range(0, shape[0], rows)
        for j in range(0, shape[1], cols)
    ]
    assert len(blocks) == groups
    assert sum(not block.any() for block in blocks) == round(level * groups)
    assert all(block.all() for block in blocks if block.any())


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(2, 4, transposable=True)], ids=str)
def test_tuples_keep_n_of_m(pattern):
    weight, moment = problem(8, 16)
    kept = prune_matrix(weight, moment, pattern, 0.0) != 0
    assert (kept.unflatten(1, (-1, 4)).sum(2) == pattern.n).all()
    if pattern.transposable:
        assert (kept.T.unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_the_best_of_all_masks_is_found_in_a_small_weight():
    from itertools import combinations

    weight, moment = problem(1, 8, seed=3)
    pruned = prune_matrix(weight, moment, Unstructured(), 0.5, damping=TINY, rounds=4)

    def best(kept):
        kept = list(kept)
        values = torch.zeros(1, 8, dtype=torch.float64)
        answers = weight.double() @ moment
        values[0, kept] = torch.linalg.solve(moment[kept][:, kept], answers[0, kept])
        return error(weight, values, moment)

    errors = sorted(best(kept) for kept in combinations(range(8), 4))
    # greedy, of 70 masks: among the best three
    assert error(weight, pruned, moment) <= errors[2] * (1 + 1e-4)


def sparse_gpt(weight, moment, choose, damping=0.01, width=128):
    """SparseGPT, algorithm 1 of https://arxiv.org/abs/2301.00774, in float64; ``choose`` returns
    the mask of what is pruned, by the costs w^2 / d^2 of columns from ``first`` on.
    """
    weight, cols = weight.double().numpy().copy(), weight.shape[1]
    moment = moment.numpy() + damping * np.diag(moment).mean() * np.eye(cols)
    upper = np.linalg.cholesky(np.linalg.inv(moment)).T
    # H^-1 = L L^T: the algorithm wants U^T U
    pruned = np.zeros(weight.shape, bool)
    for first in range(0, cols, width):
        end = min(first + width, cols)
        errors = np.zeros((len(weight), end - first))
        for i in range(first, end):
            chosen = choose(weight, upper, i)
            if chosen is not None:
                pruned[:, i : i + chosen.shape[1]] = chosen
            errors[:, i - first] = np.where(pruned[:, i], weight[:, i], 0) / upper[i, i]
            weight[:, i:end] -= np.outer(errors[:, i - first], upper[i, i:end])
        weight[:, end:] -= errors @ upper[first:end, end:]
    return torch.from_numpy(np.where(pruned, 0, weight))


def two_of_four(weight, upper, i):
    if i % 4:
        return None
    costs = weight[:, i : i + 4] ** 2 / np.diag(upper)[i : i + 4] ** 2
    chosen = np.zeros(costs.shape, bool)
    np.put_along_axis(chosen, np.argsort(costs, axis=1, kind="stable")[:, :2], True, axis=1)
    return chosen


def half_of_all(weight, upper, i):
    if i:
        return None
    costs = weight**2 / np.diag(upper) ** 2
    chosen = np.zeros(costs.size, bool)
    chosen[np.argsort(costs, axis=None, kind="stable")[: costs.size // 2]] = True
    return chosen.reshape(costs.shape)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("pattern", "choose"),
    [(NM(2, 4), two_of_four), (Unstructured(), half_of_all)],
    ids=["2:4", "50%"],
)
def test_the_error_is_at_most_that_of_sparse_gpt(pattern, choose, seed):
    weight, moment = problem(32, 64, seed)
    ours = prune_matrix(weight, moment, pattern, 0.5)
    theirs = sparse_gpt(weight, moment, choose)
    assert (ours == 0).sum() == (theirs == 0).sum()
    assert error(weight, ours, moment) <= error(weight, theirs, moment)


def test_an_input_that_is_always_zero_costs_nothing():
    weight, moment = problem(4, 8)
    moment[2], moment[:, 2] = 0, 0
    pruned = prune_matrix(weight, moment, Unstructured(), 0.125)
    assert not pruned[:, 2].any()


def test_a_moment_that_is_singular_beyond_damping_is_refused():
    weight = torch.randn(4, 8)
    nan = torch.full((8, 8), torch.nan)
    for moment in (nan, -torch.eye(8)):
        with pytest.raises(ValueError, match="more calibration data, or a larger damping"):
            prune_matrix(weight, moment, Unstructured(), 0.5)
