"""Bytes and FLOPs of the operations, by formula.

Bytes are the least that must be moved through memory, each input read once and each output written
once, of which pruned blocks are no part where a kernel need not touch them. FLOPs count kept
weights only, a multiplication and an addition each; of an unstructured mask all weights, since it
saves a dense product nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from ...kernels.bits import packed_shape
from ...kernels.block_sparse_wgrad import takes_bulk_copies
from ...kernels.pattern import Block, Pattern, grid_shape
from ...kernels.tiles import Tile, device_of, dot_precision, linear_tiles, wgrad_tile
from ...kernels.topology import BUNDLE_WIDTH, bundling, capacities
from ...kernels.tuning import tuned_tile
from .options import PRODUCTS
from .shapes import Shape

DIRECTIONS = {"forward": "forward", "dX": "dgrad", "dW": "wgrad"}


def score_bytes(weight: tuple[int, int], pattern: Pattern, size: int) -> int:
    """Read the weight, write a float32 a group."""
    return weight[0] * weight[1] * size + 4 * groups(weight, pattern)


def mask_bytes(scores: tuple[int, int], size: int, packed: bool) -> int:
    """Read the scores, write a bit or a byte for each."""
    rows, cols = packed_shape(scores) if packed else scores
    return scores[0] * scores[1] * size + rows * cols


def topology_bytes(grid: tuple[int, int], pattern: Pattern) -> int:
    """Read the mask, write the lists, padding included, and a copy of the mask."""
    *lists, kept = (prod(shape) for shape in capacities(grid, pattern))
    return 2 * kept + 4 * sum(lists)


def pack_bytes(shape: tuple[int, int]) -> int:
    """Read a byte an element, write a bit."""
    return shape[0] * shape[1] + prod(packed_shape(shape))


def apply_bytes(weight: tuple[int, int], kept: int, pattern: Pattern, size: int) -> int:
    """Read the mask and of the weight the kept blocks (of single elements, all); write it all."""
    total = weight[0] * weight[1]
    read = kept if isinstance(pattern, Block) else total
    return (read + total) * size + mask_size(weight, pattern)


def apply_in_place_bytes(weight: tuple[int, int], kept: int, pattern: Pattern, size: int) -> int:
    """Read the mask and write the pruned blocks; of single elements, read and write all."""
    total = weight[0] * weight[1]
    moved = total - kept if isinstance(pattern, Block) else 2 * total
    return moved * size + mask_size(weight, pattern)


def product_bytes(operation: str, shape: Shape, kept: int, size: int) -> int:
    """Read both operands, of a weight the kept blocks; write the result, zeros included."""
    x, y = shape.tokens * shape.inputs, shape.tokens * shape.outputs
    weight = shape.inputs * shape.outputs if operation == "dW" else kept
    return (x + y + weight) * size


def product_flops(tokens: int, kept: int) -> int:
    """Multiply and add once for every token and kept weight."""
    return 2 * tokens * kept


def update_bytes(weights: Iterable[tuple[int, int]], pattern: Pattern, size: int) -> int:
    """Read the weights once, write the masks and the lists."""
    total = 0
    for weight in weights:
        total += weight[0] * weight[1] * size + mask_size(weight, pattern)
        if isinstance(pattern, Block):
            total += topology_bytes(grid_shape(pattern, weight), pattern)
    return total


def step_bytes(shape: Shape, kept: int, size: int) -> int:
    """The three products, and AdamW: read weight, gradient and two moments, write all but one."""
    products = sum(product_bytes(name, shape, kept, size) for name in PRODUCTS)
    return products + 7 * shape.inputs * shape.outputs * size


def groups(weight: tuple[int, int], pattern: Pattern) -> int:
    """Count the groups of a weight, those at the edge included."""
    return prod(grid_shape(pattern, weight))


def mask_size(weight: tuple[int, int], pattern: Pattern) -> int:
    """Count the bytes of a mask: one a block, one for eight single weights."""
    if isinstance(pattern, Block):
        return groups(weight, pattern)
    return prod(packed_shape(weight))


def kept_elements(mask: Tensor, weight: tuple[int, int], pattern: Pattern) -> int:
    """Count the kept weights of a bool grid, edge blocks with the elements that they have."""
    heights, widths = (
        torch.tensor([min(block, side - start) for start in range(0, side, block)])
        for side, block in zip(weight, (pattern.rows, pattern.cols), strict=True)
    )
    return int(heights.double() @ mask.cpu().double() @ widths.double())


def tile_of(
    operation: str,
    weight: tuple[int, int],
    block: Block,
    dtype: torch.dtype,
    device: torch.device,
) -> Tile:
    """Return the tile that a kernel takes for contiguous operands that fill the device."""
    tuned = tuned_tile(DIRECTIONS[operation], weight, block, dtype, device)
    return tuned or tiles_of(operation, weight, block, dtype, device)[0]


def tiles_of(
    operation: str,
    weight: tuple[int, int],
    block: Block,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tile, ...]:
    """Return the kernels' own tiles of a product, as ``tile_of``: the first for many tokens."""
    direction = DIRECTIONS[operation]
    facts = device_of(torch.empty(0, device=device))
    precision = dot_precision(dtype)
    aligned = all(side * dtype.itemsize % 16 == 0 for side in weight)
    copies = precision != "ieee" and aligned and facts.capability[0] in (9, 10)
    rows, cols = block.rows, block.cols
    if direction == "wgrad":
        by_rows = bundling(block, grid_shape(block, weight))[0]
        lone, other = (rows, cols) if by_rows else (cols, rows)
        bulk = copies and takes_bulk_copies(lone, other, precision)
        return (wgrad_tile(lone, other, dtype, facts, precision=precision, bulk=bulk),)
    side_n, side_k = (rows, cols) if direction == "forward" else (cols, rows)
    return linear_tiles(side_n, side_k, dtype, facts, precision=precision, bulk=copies)


def intensity(operation: str, tile: Tile, size: int) -> float:
    """Return FLOPs per byte that a tile reads from the L2: 2 m n for (m + n) elements a step."""
    n = BUNDLE_WIDTH if operation == "dW" else tile.n
    return 2 * tile.m * n / ((tile.m + n) * size)
