"""Which optimisers leave a pruned element at zero by themselves, and what they remember of it;
how an element that has returned starts.

An elementwise optimiser computes an element's step from the element, its gradient and its own
moments: with all of them zero the step is zero too. Of any other optimiser, and of a subclass that
may do otherwise, the weight is cleared after each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from ...kernels.exact_sum import row_sums
from .shards import local_part

ELEMENTWISE = (
    *(optim.SGD, optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW),
    *(optim.NAdam, optim.RAdam, optim.RMSprop, optim.SparseAdam),
)

# what torch's optimisers, Muon and most others call the moments that they keep of each element;
# no square preconditioner of another optimiser goes by such a name
MOMENTS = (
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    *("exp_inf", "square_avg", "grad_avg", "acc_delta"),
)

# of these, what a step is divided by the root of
SQUARES = ("exp_avg_sq", "square_avg")


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Tell whether an element stays zero whose gradient and moments are zero."""
    return type(optimizer) in ELEMENTWISE


def moments(optimizer: Optimizer, weight: nn.Parameter) -> Iterator[Tensor]:
    """Yield what ``optimizer`` remembers of each element of ``weight``: tensors of its shape."""
    state = optimizer.state.get(weight, {})
    for name in MOMENTS:
        moment = state.get(name)
        if isinstance(moment, Tensor) and moment.shape == weight.shape:
            yield moment


def rows_of_others(
    optimizer: Optimizer, weight: nn.Parameter, kept: Tensor, pieces: int | None = None
) -> list[Tensor]:
    """Return what ``start_returned`` needs the sums of, float64, for each piece of a line that is
    here: g^2, m^2 and v of elements that had moments, g^2 of those that have returned, and how
    many there are of both.

    There is nothing where nothing starts: SGD divides by nothing, and its momentum starts at 0;
    Adadelta's steps start small by themselves.

    Args:
        optimizer: one about to step ``weight``, whose gradient is there.
        weight: the parameter.
        kept: bool, of the shape of what is here of it; what has returned is kept.
        pieces: of a line of the parameter; None: ``pieces_of`` it.
    """
    found = _Moving.of(optimizer, weight, kept)
    if found is None:
        return []
    asked = (
        *((found.own, found.others), (found.moving, found.others)),
        *((found.square, found.others), (found.own, found.returned)),
    )
    rows = [row_sums(torch.where(where, of, 0).flatten(1), pieces) for of, where in asked]
    counts = [row_sums(where.flatten(1), pieces) for where in (found.others, found.returned)]
    return [*rows, *counts]


@torch.no_grad()
def start_returned(optimizer: Optimizer, weight: nn.Parameter, kept: Tensor, sums: Tensor) -> None:
    """Give kept elements whose second moment is 0 moments with which they move as the others do.

    An update is m / sqrt(v), which Adam corrects by a step count that the whole weight shares. At
    a high count, an element whose m and v start at 0 would move by (1 - b1) / sqrt(1 - b2) = 3.2
    learning rates first and by more than 5 after ten steps; others, whose m is an average of
    gradients that change sign, by a quarter of one.

    Let G2, M2 and V be the means over the others of g^2, m^2 and v, and g2 the square of an
    element's gradient, or the mean of that over all which have returned, if it is more. What
    returns has noise as the others have, which leaves M2 in m^2, and a gradient that persists,
    whose square is about g2 - G2, and m becomes it. So m^2 is to be max(g2 - G2, 0) + M2, and::

        v = V (max(g2 - G2, 0) + M2) / M2

    lets it move as the others, m^2 / v = M2 / V. V has the others' bias, so that Adam's
    correction holds for both. Within some 1 / (1 - b2) steps v forgets this and is the element's
    own. For m to be of that size from the first step on, it starts as what the step makes that of,
    with the sign of g and at most its size. RMSprop has g in the place of m.

    It costs nothing in any further step, and no optimiser holds anything new.

    Args:
        optimizer, weight, kept: as ``rows_of_others``'s.
        sums: of what that returns, of all that there is of the weight.
    """
    found = _Moving.of(optimizer, weight, kept)
    assert found is not None
    *totals, many, few = sums.unbind()
    g2, m2, v, again = (
        (total / count.clamp(min=1)).float()
        for total, count in zip(totals, (many, many, many, few), strict=True)
    )
    own, square = found.own, found.square
    wanted = (torch.maximum(own, again) - g2).clamp(min=0) + m2
    fresh = kept & ~found.others & (m2 > 0)
    start = torch.where(fresh, v * wanted / m2, 0)
    square.add_(start.to(square.dtype))
    state = optimizer.state[weight]
    if (most := state.get("max_exp_avg_sq")) is not None:
        local_part(most).add_(start.to(most.dtype))
    if found.momentum is not None and (decay := _decay(optimizer, weight)):
        share = (wanted / own).sqrt().clamp(max=1)
        first = found.gradient * ((share - (1 - decay)) / decay).clamp(min=0)
        first = torch.where(fresh & (own > 0), first, 0)
        found.momentum.add_(first.to(found.momentum.dtype))


class _Moving(NamedTuple):
    """What an optimiser is about to move a weight by, of what is here of it.

    Attributes:
        gradient: float32.
        square, momentum: the moments themselves.
        own, moving: squares of the gradient, and of the momentum or else the gradient; float32.
        others, returned: bool: what had moments; what has returned with a gradient.
    """

    gradient: Tensor
    square: Tensor
    momentum: Tensor | None
    own: Tensor
    moving: Tensor
    others: Tensor
    returned: Tensor

    @classmethod
    def of(cls, optimizer: Optimizer, weight: nn.Parameter, kept: Tensor) -> _Moving | None:
        """Return it; None where no second moment is to be started."""
        state, gradient = optimizer.state.get(weight, {}), weight.grad
        name = next((name for name in SQUARES if name in state), "")
        square = state.get(name)
        if square is None or gradient is None or "acc_delta" in state:
            return None
        if gradient.layout != torch.strided or square.shape != weight.shape:
            return None
        square, gradient = local_part(square), local_part(gradient).float()
        # a fused optimiser under a gradient scaler is given what is scaled still
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            gradient = gradient / scale
        own, others = gradient.square(), square != 0
        momentum = None if (found := state.get("exp_avg")) is None else local_part(found)
        moving = (gradient if momentum is None else momentum).float().square()
        returned = kept & ~others & (own > 0)
        return cls(gradient, square, momentum, own, moving, others, returned)


def _decay(optimizer: Optimizer, weight: nn.Parameter) -> float:
    """Return the factor by which a step lets the momentum of ``weight`` decay; 0: none."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return float(group.get("betas", (0.0,))[0])
    return 0.0


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yield what ``optimizer`` steps."""
    for group in optimizer.param_groups:
        yield from group["params"]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser that steps, and that torch tells of: Accelerate puts one around it."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, Optimizer) else optimizer
