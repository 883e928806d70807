"""A weight with its mask and activations, as the operations take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.bits import unpack_reference
from ...kernels.block_score import block_score
from ...kernels.launch import Backend
from ...kernels.mask import pack, word_mask
from ...kernels.masked_weight import apply_mask_reference
from ...kernels.pattern import NM, Block, Pattern, Unstructured, grid_shape
from ...kernels.semi_structured import nm_mask
from ...kernels.topology import Topology, block_topology
from .agreement import exact_dtype
from .counts import kept_elements
from .shapes import Shape

MANY = 2**20


def random_mask(grid: tuple[int, int], level: float, kind: str, seed: int = 0) -> Tensor:
    """Return a bool grid with exactly ``round(level * groups)`` pruned; of more than a million
    groups each is pruned by chance, because drawing them exactly takes seconds.

    Args:
        kind: ``"random"``, or ``"skewed"``: half of the rows hold 90 % of what is kept, or all
            that they have room for.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = grid[0] * grid[1]
    if groups > MANY and kind == "random":
        return torch.rand(grid, generator=generator) >= level
    kept = groups - round(level * groups)
    heavy = grid[0] // 2 * grid[1] if kind == "skewed" else 0
    inside = max(min(round(0.9 * kept), heavy), kept - (groups - heavy)) if heavy else 0
    mask = torch.zeros(groups, dtype=torch.bool)
    mask[torch.randperm(heavy, generator=generator)[:inside]] = True
    mask[heavy + torch.randperm(groups - heavy, generator=generator)[: kept - inside]] = True
    rows = torch.randperm(grid[0], generator=generator)
    return mask.view(grid)[rows]


@dataclass(frozen=True)
class Operands:
    """A weight with its mask and activations, on the device; all from a fixed seed."""

    shape: Shape
    pattern: Pattern
    level: float
    mask_kind: str
    dtype: torch.dtype
    device: torch.device
    backend: Backend

    def _normal(self, seed: int, *size: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(*size, generator=generator, device=self.device)
        return values.to(self.dtype)

    @cached_property
    def weight(self) -> Tensor:
        return self._normal(0, *self.shape.weight)

    @cached_property
    def x(self) -> Tensor:
        return self._normal(1, self.shape.tokens, self.shape.inputs)

    @cached_property
    def grad(self) -> Tensor:
        return self._normal(2, self.shape.tokens, self.shape.outputs)

    @cached_property
    def grid(self) -> Tensor:
        if isinstance(self.pattern, NM):
            return unpack_reference(self.mask, self.shape.inputs)
        grid = grid_shape(self.pattern, self.shape.weight)
        return random_mask(grid, self.level, self.mask_kind).to(self.device)

    @cached_property
    def mask(self) -> Tensor:
        """The mask as ``apply_mask`` takes it."""
        match self.pattern:
            case NM():
                return nm_mask(self.weight, self.pattern, backend=self.backend).mask
            case Block():
                return self.grid
            case _:
                return pack(self.grid, backend=self.backend)

    @cached_property
    def served(self) -> Tensor:
        """The mask as a layer keeps it for its passes: plain torch on a CPU takes words."""
        if self.backend == "torch" and self.device.type == "cpu":
            return word_mask(self.mask, self.pattern, self.shape.weight, self.dtype)
        return self.mask

    @cached_property
    def topology(self) -> Topology:
        return block_topology(self.grid, self.pattern, backend=self.backend)

    @cached_property
    def masked(self) -> Tensor:
        return apply_mask_reference(self.weight, self.mask, self.pattern)

    def exact(self, *tensors: Tensor) -> list[Tensor]:
        return [t.to(exact_dtype(self.dtype)) for t in tensors]

    @cached_property
    def kept(self) -> int:
        return kept_elements(self.grid, self.shape.weight, self.pattern)

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    @cached_property
    def scores(self) -> Tensor:
        if isinstance(self.pattern, Unstructured):
            return self.weight
        return block_score(self.weight, self.pattern, backend=self.backend)

    @property
    def pruned(self) -> int:
        return round(self.level * self.scores.numel())
