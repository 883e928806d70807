"""Which optimisers leave a pruned element at zero by themselves, and what they remember of it.

An elementwise optimiser computes an element's step from the element, its gradient and its own
moments: with all of them zero the step is zero too. Of any other optimiser, and of a subclass that
may do otherwise, the weight is cleared after each step.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn, optim
from torch.optim import Optimizer

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


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yield what ``optimizer`` steps."""
    for group in optimizer.param_groups:
        yield from group["params"]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser that steps, and that torch tells of: Accelerate puts one around it."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, Optimizer) else optimizer
