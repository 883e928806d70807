"""Optimal brain surgeon for one weight: what is pruned, and how the retained elements make up.

A layer with the inputs X (tokens x in) and the weight W (out x in) answers X W^T. Of a pruned
weight V the squared error is tr((W - V) H (W - V)^T) with the moment H = X^T X. Rows that are
pruned alike, those of a row of blocks, are a least-squares problem of their own; all share H.

With H_K, the part of H for the inputs that are kept, the best retained values are (W H)_K H_K^-1,
and dropping the inputs S as well costs v_S ((H_K^-1)_SS)^-1 v_S^T more (Hassibi and Stork 1992;
Frantar and Alistarh, https://arxiv.org/abs/2208.11580). Groups are dropped in rounds, each time
those that cost least in the whole weight, given what is gone. Of N:M each tuple drops one element
a round. In the end the retained values are the best there are.

H gets ``damping`` times the mean of its diagonal on its diagonal. The time is that of inverting
H_K once a round for each row of groups: blocks of 16 take a sixteenth of what single elements
take. Memory: four matrices of H's size in float64, and two of the weight's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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
    weight = weight.double().masked_fill(dead, 0)
    answers = weight @ moment
    kept = torch.ones(
        grid_shape(pattern, (len(weight), len(moment))), dtype=torch.bool, device=weight.device
    )
    single = answers.float(), moment.float()  # enough to rank by
    for pruned in _totals(pattern, kept, level, rounds):
        costs = torch.full(kept.shape, torch.inf, dtype=torch.float32, device=weight.device)
        for band, inputs, (rows, inverse) in _bands(*single, kept, pattern):
            values = rows @ inverse  # [rows, kept inputs]
            costs[band, kept[band]] = _costs(values, inverse, inputs, pattern.cols)
        kept = _drop(kept, costs, pattern, pruned)
    result = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for band, inputs, (rows, inverse) in _bands(answers, moment, kept, pattern):
        part = slice(band * pattern.rows, (band + 1) * pattern.rows)
        result[part, inputs] = (rows @ inverse).float()
    return result


def _totals(pattern: Pattern, kept: Tensor, level: float, rounds: int) -> list[int]:
    """Return how many groups are gone after each round."""
    groups = kept.numel()
    if isinstance(pattern, NM):
        rounds = 1 if pattern.transposable else pattern.m - pattern.n
        return [groups // pattern.m * done for done in range(1, rounds + 1)]
    total = round(level * groups)
    return sorted({total * done // rounds for done in range(1, rounds + 1)} - {0})


def _bands(
    answers: Tensor, moment: Tensor, kept: Tensor, pattern: Pattern
) -> Iterator[tuple[int, Tensor, tuple[Tensor, Tensor]]]:
    """Yield the number of each row of groups, which inputs it keeps, and of these its rows of
    W H and the inverse of H.
    """
    for band, groups in enumerate(kept):
        inputs = groups.repeat_interleave(pattern.cols)[: len(moment)]
        rows = answers[band * pattern.rows : (band + 1) * pattern.rows, inputs]
        yield band, inputs, (rows, _inverse(moment[inputs][:, inputs]))


def _inverse(moment: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(moment)
    if info.any() or not factor.isfinite().all():
        raise ValueError(
            "the moment of the inputs must be finite, and positive definite with its damping; "
            "give more calibration data, or a larger damping"
        )
    return torch.cholesky_inverse(factor)


def _costs(values: Tensor, inverse: Tensor, inputs: Tensor, width: int) -> Tensor:
    """Return what it costs to drop each group that is kept.

    Args:
        values: of the retained elements, ``(rows, kept)``.
        inverse: of the moment of the inputs that are kept.
        inputs: bool ``(in,)``: those.
        width: of a group, in inputs.
    """
    if width == 1:
        return values.square().sum(0) / inverse.diagonal()
    whole = len(values.T) // width
    if len(inputs) % width and bool(inputs[-1]):  # the last group is narrower
        rest = values[:, whole * width :]
        last = _cost(rest[None], inverse[None, whole * width :, whole * width :])
    else:
        last = values.new_empty(0)
    blocks = inverse[: whole * width, : whole * width].view(whole, width, whole, width)
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, width, width]
    parts = values[:, : whole * width].view(len(values), whole, width).transpose(0, 1)
    return torch.cat([_cost(parts, own), last])


def _cost(values: Tensor, inverse: Tensor) -> Tensor:
    return (torch.linalg.solve(inverse, values.mT) * values.mT).sum((1, 2))


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
