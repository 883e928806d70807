"""Which program computes which tile of a product, and how evenly."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from triton_sparsity.kernels import block_sparse_linear as linear_module
from triton_sparsity.kernels.block_sparse_linear import block_sparse_linear
from triton_sparsity.kernels.launch import INTERPRET
from triton_sparsity.kernels.pattern import Block
from triton_sparsity.kernels.schedule import (
    Plan,
    balance,
    dealt,
    plan_product,
    program_loads,
    tile_order,
)
from triton_sparsity.kernels.tiles import Device, Tile, linear_tiles
from triton_sparsity.kernels.topology import block_topology

HOPPER = Device((9, 0), 132, 228 * 1024)
TILE = Tile(64, 32, 32, 4, 2, 1)
# outputs, reduced features
SHAPES = {"up": (14336, 4096), "down": (4096, 14336), "query": (4096, 4096)}
LEVELS = (0.5, 0.8, 0.9, 0.95)


def kept_blocks(lines, blocks, level, skewed):
    """Count the kept blocks of each line, the most first: exactly as many as the level asks."""
    random = np.random.default_rng(int(100 * level) + 7 * skewed)
    kept = lines * blocks - round(level * lines * blocks)
    heavy = lines // 2 * blocks if skewed else 0
    inside = max(min(round(0.9 * kept), heavy), kept - (lines * blocks - heavy)) if heavy else 0
    mask = np.zeros(lines * blocks, bool)
    mask[random.permutation(heavy)[:inside]] = True
    mask[heavy + random.permutation(len(mask) - heavy)[: kept - inside]] = True
    return np.sort(mask.reshape(lines, blocks).sum(1))[::-1]


def plan_and_steps(tokens, shape, side, level, skewed):
    N, K = shape
    tiles = linear_tiles(side, side, torch.bfloat16, HOPPER, precision="tf32", bulk=True)
    plan = plan_product(tokens, K, N // side, side, side, 2, HOPPER.processors, tiles)
    kept = np.repeat(kept_blocks(N // side, K // side, level, skewed), side // plan.tile.n)
    return plan, np.maximum(kept * (side // plan.tile.k), 1)


@pytest.mark.parametrize("tiles", [1, 7, 8, 61])
@pytest.mark.parametrize("shift", [0, 3])
def test_each_tile_is_dealt_to_one_program(tiles, shift):
    turns = np.arange(-(-tiles // 8))[:, None]
    mine = dealt(turns, np.arange(8), 8, shift)
    assert sorted(mine[mine < tiles]) == list(range(tiles))


@pytest.mark.parametrize("group", [1, 3, 5])
def test_panels_hold_every_tile_once(group):
    found = set(zip(*map(np.ndarray.tolist, tile_order(5, 4, group)), strict=True))
    assert found == {(m, band) for m in range(5) for band in range(4)}


@pytest.mark.skipif(not INTERPRET, reason="follows the kernel in the interpreter")
@pytest.mark.parametrize(
    ("group", "programs", "shift"), [(1, 3, 0), (3, 5, 2), (4, 8, 3), (2, 40, 0)]
)
def test_the_kernel_does_as_planned(group, programs, shift, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    tokens, pattern = 4 * TILE.m - 9, Block(32, 32)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 6, generator=generator) > torch.linspace(0, 1, 7)[:, None]
    x, weight = torch.ones(tokens, 192).half(), torch.ones(224, 192).half()
    topology = block_topology(mask, pattern)
    plan = Plan(TILE, group, programs, shift)
    monkeypatch.setattr(linear_module, "plan_product", lambda *_: plan)
    load, steps = linear_module._load, defaultdict(list)

    def spy(source, row, col, *more, **options):
        steps[interpreter_builder.grid_idx[0]].append(int(row.handle.data.item()))
        return load(source, row, col, *more, **options)

    monkeypatch.setattr(linear_module, "_load", spy)
    y = block_sparse_linear(x, weight, topology, pattern=pattern)
    expected = 32 * mask.sum(1).repeat_interleave(32)
    torch.testing.assert_close(y, expected.half().expand(tokens, -1))

    lines = topology.row_tasks[:, 0].tolist()
    lengths = np.maximum(topology.row_tasks[:, 2].numpy(), 1)
    token_tile, band = tile_order(4, 7, group)
    for program in range(programs):
        mine = dealt(np.arange(100), np.full(100, program), programs, shift)
        wanted = []
        for tile in mine[mine < len(band)]:
            place = token_tile[tile] * TILE.m, lines[band[tile]] * 32
            wanted += place * lengths[band[tile]]
        assert steps[program] == wanted
    own, tiles = program_loads(plan, lengths, 4)
    assert own.tolist() == [len(steps[program]) // 2 for program in range(programs)]
    assert tiles.sum() == len(band)


@pytest.mark.parametrize(
    ("shape", "random", "skewed"),
    # of a small weight no more than eight rounds are dealt, at 95 % of tiles of one step or two
    [("up", 0.93, 0.85), ("down", 0.93, 0.85), ("query", 0.87, 0.85)],
)
@pytest.mark.parametrize("side", [256, 128, 64])
@pytest.mark.parametrize("is_skewed", [False, True], ids=["random", "skewed"])
def test_many_tokens_are_balanced(shape, side, is_skewed, random, skewed):
    least = skewed if is_skewed else random
    for level in LEVELS:
        plan, steps = plan_and_steps(8192, SHAPES[shape], side, level, is_skewed)
        assert balance(plan, steps, 8192 // plan.tile.m, HOPPER.processors) >= least


def test_a_plan_is_the_same_every_time():
    args = 4096, 4096, 32, 128, 128, 2, 132, (Tile(256, 128, 64, 8, 3, 1),)
    assert plan_product.__wrapped__(*args) == plan_product.__wrapped__(*args)
