"""A model of a GPU: how long a product takes by its schedule, before any is measured.

Each program's steps and tiles come from the kernels' own schedule (``kernels/schedule.py``). A
step takes what multiplying or reading from the L2 takes, whichever is longer, each multiprocessor
having its share of the device's rate; a tile's end, what writing it takes. The slowest
multiprocessor sets the time, or device memory does; a launch comes on top. Not in it: how well
copies and arithmetic overlap, clocks, and what a busy L2 does. So it says which term is short, not
what will be measured.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.block_sparse_wgrad import MIN_STEPS, takes_bulk_copies
from ...kernels.grid import ceil_div
from ...kernels.pattern import Block
from ...kernels.schedule import (
    Ints,
    Plan,
    Rates,
    gradient_loads,
    plan_product,
    program_loads,
    tile_times,
)
from ...kernels.tiles import Device, Tile, linear_tiles, wgrad_tile
from ...kernels.topology import BUNDLE_WIDTH, bundling
from .counts import product_bytes, product_flops
from .shapes import Shape

LAUNCH = 2e-6  # seconds between two kernels of a stream
SHARED = 228 * 1024  # bytes of a multiprocessor's shared memory
BFLOAT16 = 2  # bytes


class ModelledDevice(NamedTuple):
    """A device as the model sees it.

    Attributes:
        name: of the device.
        basis: where the ceilings are from.
        processors: multiprocessors.
        copy, cache: bytes a second of device memory and of L2.
        gemm: FLOP a second of a large 16-bit product.
        capability: its compute capability, by which tiles are chosen.
    """

    name: str
    basis: str
    processors: int
    copy: float
    cache: float
    gemm: float
    capability: tuple[int, int] = (9, 0)


# Memory is nine tenths of the data sheet's rate. Products are what cuBLAS is known to reach on
# Hopper, of 989 TFLOP/s on the data sheet; the same share of a B200's 2,250. No data sheet has the
# L2's rate: Hopper's 7 TB/s is an estimate, and a B200's is that by its number of multiprocessors.
_DATASHEET = "modelled, data sheet and estimates"
H200 = ModelledDevice("H200", _DATASHEET, 132, 4.3e12, 7e12, 790e12)
H100 = ModelledDevice("H100", _DATASHEET, 132, 3.0e12, 7e12, 750e12)
B200 = ModelledDevice("B200", _DATASHEET, 148, 7.2e12, 7.8e12, 1.8e15, (10, 0))
DEVICES = {device.name: device for device in (H200, H100, B200)}


def random_mask(grid: tuple[int, int], level: float, *, skewed: bool = False) -> np.ndarray:
    """Return a bool mask of blocks, the same every time: ``round(level * blocks)`` are pruned.

    A skewed one has nine kept blocks in ten in half of its rows.
    """
    random = np.random.default_rng(0)
    blocks = grid[0] * grid[1]
    kept = blocks - round(level * blocks)
    heavy = grid[0] // 2 * grid[1] if skewed else 0
    inside = min(max(min(round(0.9 * kept), heavy), kept - (blocks - heavy)), kept) if heavy else 0
    mask = np.zeros(blocks, bool)
    mask[random.permutation(heavy)[:inside]] = True
    mask[heavy + random.permutation(blocks - heavy)[: kept - inside]] = True
    return mask.reshape(grid)


def dense_time(operation: str, shape: Shape, device: ModelledDevice) -> float:
    """Return the seconds of the dense product."""
    full = shape.inputs * shape.outputs
    arithmetic = product_flops(shape.tokens, full) / device.gemm
    memory = product_bytes(operation, shape, full, BFLOAT16) / device.copy
    return max(arithmetic, memory) + LAUNCH


class Modelled(NamedTuple):
    """A product's time, and what it would be if nothing but one term counted.

    Attributes:
        time: seconds.
        arithmetic: of the kept blocks at the dense product's rate.
        steps: of the mean multiprocessor's steps: what L2 takes beyond arithmetic, and bundles
            that are not full.
        ends: of writing tiles, beside its steps.
        imbalance: of the slowest multiprocessor beyond the mean.
        memory: of device memory, alone.
    """

    time: float
    arithmetic: float
    steps: float
    ends: float
    imbalance: float
    memory: float


@lru_cache(maxsize=1024)
def sparse_time(
    operation: str,
    shape: Shape,
    block: Block,
    level: float,
    device: ModelledDevice,
    skewed: bool = False,
) -> Modelled:
    """Return how long a block-sparse product takes under ``random_mask``.

    Args:
        operation: ``"forward"``, ``"dX"`` or ``"dW"``, in bfloat16.
        shape: of the product.
        block: of 16 to 256 a side.
        level: fraction of the blocks that is pruned.
        device: on which.
        skewed: of the mask.
    """
    R, C = shape.outputs, shape.inputs
    mask = random_mask((ceil_div(R, block.rows), ceil_div(C, block.cols)), level, skewed=skewed)
    share = 1e9 * device.processors
    rates = Rates(device.gemm / share, device.cache / share)
    if operation == "dW":
        steps, ends, after = _gradient(shape, block, mask, device, rates)
    else:
        by_rows = operation == "forward"
        lines, sides = (
            (mask, (block.rows, block.cols)) if by_rows else (mask.T, block_turned(block))
        )
        kept = np.sort(lines.sum(1))[::-1]
        steps, ends = _product(shape.tokens, kept, lines.shape[1], sides, device, rates)
        after = 0.0
    load = steps + ends
    kept_elements = int(mask.sum()) * block.rows * block.cols
    memory = product_bytes(operation, shape, kept_elements, BFLOAT16) / device.copy
    slowest = load.max() * 1e-9
    return Modelled(
        time=max(slowest, memory) + after + LAUNCH,
        arithmetic=product_flops(shape.tokens, kept_elements) / device.gemm,
        steps=steps.mean() * 1e-9,
        ends=ends.mean() * 1e-9 + after,
        imbalance=slowest - load.mean() * 1e-9,
        memory=memory,
    )


def block_turned(block: Block) -> tuple[int, int]:
    """Return the sides as the transposed weight has them."""
    return block.cols, block.rows


def efficiency(
    operation: str,
    shape: Shape,
    block: Block,
    level: float,
    device: ModelledDevice,
    skewed: bool = False,
) -> float:
    """Return the share of the dense product's rate that the kept blocks are multiplied at."""
    found = sparse_time(operation, shape, block, level, device, skewed)
    return (1 - level) * dense_time(operation, shape, device) / found.time


def break_even(operation: str, shape: Shape, block: Block, device: ModelledDevice) -> float:
    """Return the highest density at which skipping blocks is not slower than the dense product."""
    dense = dense_time(operation, shape, device)
    low, high = 0, 100
    # percent of the blocks that are kept
    while low < high:
        middle = (low + high + 1) // 2
        found = sparse_time(operation, shape, block, 1 - middle / 100, device)
        low, high = (middle, high) if found.time <= dense else (low, middle - 1)
    return low / 100


def _facts(device: ModelledDevice) -> Device:
    return Device(device.capability, device.processors, SHARED)


def _product(
    tokens: int,
    kept: Ints,
    blocks: int,
    sides: tuple[int, int],
    device: ModelledDevice,
    rates: Rates,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nanoseconds of each multiprocessor's steps, and of its tiles' ends."""
    (side_n, side_k), processors = sides, device.processors
    options = {"precision": "tf32", "bulk": True}
    tiles = linear_tiles(side_n, side_k, torch.bfloat16, _facts(device), **options)
    sizes = tokens, blocks * side_k, len(kept), side_n, side_k, BFLOAT16
    plan: Plan = plan_product(*sizes, processors, tiles)
    tile = plan.tile
    steps = np.maximum(np.repeat(kept, side_n // tile.n) * (side_k // tile.k), 1)
    load = program_loads(plan, steps, ceil_div(tokens, tile.m))
    times = tile_times(tile, BFLOAT16, rates)
    place = np.arange(plan.programs) % processors
    return (
        np.bincount(place, load.steps * times.step, processors),
        np.bincount(place, load.tiles * times.end + load.parts * times.part, processors),
    )


def _gradient(
    shape: Shape, block: Block, mask: np.ndarray, device: ModelledDevice, rates: Rates
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the same of a weight gradient, and the seconds that adding up its parts takes."""
    processors = device.processors
    by_rows, size = bundling(block, (mask.shape[0], mask.shape[1]))
    kept = mask.sum(1 if by_rows else 0)
    lone, other = (block.rows, block.cols) if by_rows else (block.cols, block.rows)
    bulk = takes_bulk_copies(lone, other, "tf32")
    options = {"precision": "tf32", "bulk": bulk}
    tile = wgrad_tile(lone, other, torch.bfloat16, _facts(device), **options)
    pieces, wide = -(-kept // size), (kept + size - size // 2 - 1) // size
    per_bundle = lone // tile.m
    programs = processors * tile.programs
    counts = int(wide.sum()) * per_bundle, int((pieces - wide).sum()) * per_bundle
    steps = ceil_div(shape.tokens, tile.k)
    loads = gradient_loads(*counts, steps, programs, MIN_STEPS)
    step, end, part = tile_times(tile, BFLOAT16, rates)
    narrow = tile_times(Tile(tile.m, BUNDLE_WIDTH // 2, *tile[2:]), BFLOAT16, rates).step
    place = np.arange(programs) % processors
    # in the last rounds a program stores two parts at most, in float32
    parts = min(2 * programs, sum(counts)) if steps >= 2 * MIN_STEPS else 0
    bytes_a_part = tile.m * BUNDLE_WIDTH * 4
    summed = parts * bytes_a_part / (rates.bytes * processors) * 1e-9 + LAUNCH if parts else 0.0
    return (
        np.bincount(place, loads.wide_steps * step + loads.narrow_steps * narrow, processors),
        np.bincount(place, loads.tiles * end, processors) + part * parts / programs,
        summed,
    )


def geometric_mean(values: list[float]) -> float:
    """Return the mean by which efficiencies of several shapes count alike."""
    return math.exp(sum(map(math.log, values)) / len(values))
