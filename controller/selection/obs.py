"""Optimal brain surgeon for one weight: what is pruned, and how the retained elements make up.

A layer with the inputs X (tokens x in) and the weight W (out x in) answers X W^T. Of a pruned
weight V the squared error is tr((W - V) H (W - V)^T) with the moment H = X^T X. Rows that are
pruned alike, those of a row of blocks, are a least-squares problem of their own; all share H.

With H_K, the part of H for the inputs that are kept, the best retained values are (W H)_K H_K^-1,
and dropping the inputs S as well costs v_S ((H_K^-1)_SS)^-1 v_S^T more (Hassibi and Stork 1992;
Frantar and Alistarh, https://arxiv.org/abs/2208.11580). Groups are dropped in rounds, each time
those that cost least in the whole weight, given what is gone. Of N:M each tuple drops one element
a round. In the end the retained values are the best there are.

H gets ``damping`` times the mean of its diagonal on its diagonal. It is inverted once, to G. Each
round then factors a matrix for each row of groups: H_K, or, while less is gone than kept, G_P of
the inputs P that are gone, since H_K^-1 = G_K - G_KP G_P^-1 G_PK. Blocks of 16 have a sixteenth
of the rows that single elements have. Memory: six matrices of H's size in float64, H included,
and two of the weight's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.bits import unpack
from ...kernels.pattern import NM, Pattern, grid_shape
from ...kernels.semi_structured import nm_mask


def prune_matrix(
    weight: Tensor,
    moment: Tensor,
    pattern: Pattern,
    level: float,
    *,
    damping: float = 0.01,
    rounds: int = 8,
) -> Tensor:
    """Return a weight that is pruned to ``level``, its retained elements updated.

    Args:
        weight: float ``(out, in)``.
        moment: float ``(in, in)``, H or a positive multiple of it, on the weight's device.
        pattern: the shape of a group.
        level: ``round(level * groups)`` groups are pruned. Of N:M it has no bearing: all tuples
            are.
        damping: positive; see above.
        rounds: at least 1; of N:M there are as many as a tuple drops elements.

    Returns:
        float32, of the weight's shape; exactly zero where it is pruned.

    Raises:
        ValueError: the moment is not finite, or so close to singular that damping does not help.
    """
    moment = moment.double()
    dead = moment.diagonal() == 0  # inputs that are always zero
    ridge = damping * moment.diagonal().mean() + dead.double()
    moment = moment + torch.diag(ridge)
    shape, edge = (weight.shape[0], weight.shape[1]), -len(moment) % pattern.cols
    weight = functional.pad(weight.double().masked_fill(dead, 0), (0, edge))
    if edge:  # with inputs that are always zero all groups are whole
        moment = torch.block_diag(moment, torch.eye(edge).to(moment))
    parts = weight, weight @ moment, moment, torch.cholesky_inverse(_factor(moment))
    kept = torch.ones(grid_shape(pattern, shape), dtype=torch.bool, device=weight.device)
    single = _Problem(*(part.float() for part in parts))  # enough to rank by
    for pruned in _totals(pattern, kept, level, rounds):
        costs = torch.full(kept.shape, torch.inf, dtype=torch.float32, device=weight.device)
        for band, rows, inputs in _bands(kept, pattern):
            costs[band, kept[band]] = _costs(single, rows, inputs, pattern.cols)
        kept = _drop(kept, costs, pattern, pruned)
    result = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for _, rows, inputs in _bands(kept, pattern):
        result[rows, inputs] = _values(_Problem(*parts), rows, inputs).float()
    return result[:, : shape[1]]


@dataclass(frozen=True)
class _Problem:
    """W and W H, both ``(out, in)``, H and its inverse G, both ``(in, in)``."""

    weight: Tensor
    answers: Tensor
    moment: Tensor
    inverse: Tensor


def _totals(pattern: Pattern, kept: Tensor, level: float, rounds: int) -> list[int]:
    """Return how many groups are gone after each round."""
    groups = kept.numel()
    if isinstance(pattern, NM):
        rounds = 1 if pattern.transposable else pattern.m - pattern.n
        return [groups // pattern.m * done for done in range(1, rounds + 1)]
    total = round(level * groups)
    return sorted({total * done // rounds for done in range(1, rounds + 1)} - {0})


def _bands(kept: Tensor, pattern: Pattern) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield the number of each row of groups, its rows, and which inputs it keeps."""
    for band, groups in enumerate(kept):
        rows = slice(band * pattern.rows, (band + 1) * pattern.rows)
        yield band, rows, groups.repeat_interleave(pattern.cols)


def _factor(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.any() or not factor.isfinite().all():
        raise ValueError(
            "the moment of the inputs must be finite, and positive definite with its damping; "
            "give more calibration data, or a larger damping"
        )
    return factor


def _few_gone(inputs: Tensor) -> bool:
    return 2 * int(inputs.sum()) > len(inputs)


def _values(problem: _Problem, rows: slice, inputs: Tensor) -> Tensor:
    """Return the best values of the elements that are retained, ``(rows, kept inputs)``."""
    weight, moment, inverse = problem.weight[rows], problem.moment, problem.inverse
    if _few_gone(inputs):
        gone = ~inputs
        factor = _factor(inverse[gone][:, gone])
        share = torch.cholesky_solve(weight[:, gone].T, factor).T
        return weight[:, inputs] - share @ inverse[gone][:, inputs]
    answers = problem.answers[rows, inputs]
    return torch.cholesky_solve(answers.T, _factor(moment[inputs][:, inputs])).T


def _costs(problem: _Problem, rows: slice, inputs: Tensor, width: int) -> Tensor:
    """Return what it costs to drop each group that is kept, of ``width`` inputs."""
    weight, moment, inverse = problem.weight[rows], problem.moment, problem.inverse
    if _few_gone(inputs):
        gone = ~inputs
        factor = _factor(inverse[gone][:, gone])
        root = torch.linalg.solve_triangular(factor, inverse[gone][:, inputs], upper=False)
        share = torch.linalg.solve_triangular(factor, weight[:, gone].T, upper=False)
        values = weight[:, inputs] - share.T @ root
        index = inputs.nonzero().view(-1, width)
        own = inverse[index[:, :, None], index[:, None, :]] - _grams(root, width)
    else:
        factor = _factor(moment[inputs][:, inputs])
        root = torch.linalg.solve_triangular(
            factor, torch.eye(len(factor)).to(factor), upper=False
        )
        values = problem.answers[rows, inputs] @ root.T @ root
        own = _grams(root, width)
    parts = values.unflatten(1, (-1, width)).transpose(0, 1)  # [groups, rows, width]
    return (torch.linalg.solve(own, parts.mT) * parts.mT).sum((1, 2))


def _grams(root: Tensor, width: int) -> Tensor:
    """Return the blocks on the diagonal of R^T R, ``(groups, width, width)``."""
    if width == 1:
        return root.square().sum(0)[:, None, None]
    parts = root.unflatten(1, (-1, width)).transpose(0, 1)
    return parts.mT @ parts


def _drop(kept: Tensor, costs: Tensor, pattern: Pattern, pruned: int) -> Tensor:
    """Return which groups stay when ``pruned`` are gone in all."""
    if isinstance(pattern, NM) and pattern.transposable:
        return unpack(nm_mask(costs.sqrt(), pattern, backend="torch").mask, kept.shape[1])
    costs = costs.masked_fill(~kept, -torch.inf)
    if isinstance(pattern, NM):
        tuples = costs.unflatten(1, (-1, pattern.m))
        gone = pruned * pattern.m // kept.numel()
        order = tuples.sort(dim=2, stable=True).indices[:, :, :gone]
        return torch.ones_like(tuples, dtype=torch.bool).scatter_(2, order, False).flatten(1)
    kept = torch.ones_like(kept)
    kept.view(-1)[costs.flatten().sort(stable=True).indices[:pruned]] = False
    return kept
