"""``torch.nn.functional.linear`` with a BSR weight: MKL on a CPU, ``_triton_ops.py`` on a GPU.

Forward only: there is no backward to the activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, masked: Tensor, block: tuple[int, int]) -> Callable[[], Tensor]:
    """Return the product with the nonzero blocks of ``masked``, converted beforehand."""
    with warnings.catch_warnings():
        # it is in beta state, as it says
        warnings.simplefilter("ignore", UserWarning)
        weight = masked.to_sparse_bsr(block)
    return lambda: F.linear(x, weight)
