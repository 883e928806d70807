"""The dense product: eager, and compiled by Inductor."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def compiler(device: torch.device) -> str | None:
    """Return why Inductor cannot compile here, or None."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "Inductor needs a C++ compiler on a CPU"
    return None


def linear(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(x, weight)


def compiled_linear(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Return the product as Inductor compiles it by default."""
    function = torch.compile(F.linear, dynamic=False)
    return lambda: function(x, weight)
