"""Sums of squared inputs a column of a weight's matrix, as Wanda's importance needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight


def convolution_squares(
    x: Tensor, output: Tensor, shape: Sequence[int], *, groups: int, **settings: Any
) -> tuple[Tensor, int]:
    """Sum the squares that each kernel element of a convolution meets.

    It is the weight gradient for squares and ones.

    Args:
        x: float32, the input, with or without a batch.
        output: the output.
        shape: of the weight.
        groups: as the convolution's.
        settings: its ``stride``, ``padding`` and ``dilation``.

    Returns:
        Sums, ``(columns,)``, or ``(out_channels, columns)`` with groups; how many squares in each.
    """
    gradient = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}[len(shape)]
    if x.ndim < len(shape):  # without a batch
        x, output = x[None], output[None]
    spatial = output.shape[2:]
    ones = x.new_ones((len(x), groups, *spatial))
    kernel = (groups, *shape[1:])
    total = gradient(x.square(), kernel, ones, **settings, groups=groups).flatten(1)
    # the rows of a group share its inputs
    rows = total.repeat_interleave(shape[0] // groups, 0) if groups > 1 else total[0]
    return rows, len(x) * spatial.numel()
