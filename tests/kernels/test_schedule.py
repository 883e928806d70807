"""Which program computes which tile of a product or a weight gradient, and how evenly."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from triton_sparsity.kernels import block_sparse_product as product_module
from triton_sparsity.kernels import block_sparse_wgrad as wgrad_module
from triton_sparsity.kernels import schedule
from triton_sparsity.kernels import tiles as tiles_module
from triton_sparsity.kernels.block_sparse_linear import block_sparse_linear
from triton_sparsity.kernels.block_sparse_wgrad import launch_wgrad
from triton_sparsity.kernels.launch import INTERPRET
from triton_sparsity.kernels.pattern import Block
from triton_sparsity.kernels.schedule import (
    Plan,
    balance,
    dealt,
    gradient_balance,
    gradient_loads,
    plan_product,
    program_loads,
    tile_order,
    tile_times,
)
from triton_sparsity.kernels.tiles import Device, Tile, linear_tiles, wgrad_tile
from triton_sparsity.kernels.topology import block_topology, bundling

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


def number(value):
    """Return a scalar that the interpreter hands on: a tensor, a constant or a plain one."""
    if hasattr(value, "handle"):
        return int(value.handle.data.item())
    return int(getattr(value, "value", value))


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
    ("group", "programs", "shift", "end_steps"),
    [
        (1, 3, 0, 0),
        (3, 5, 2, 0),
        (4, 8, 3, 0),
        (2, 28, 0, 0),
        (4, 3, 0, 1),
        (4, 25, 0, 2),
        (4, 90, 0, 1),
        (4, 90, 0, 3),
    ],
)
def test_the_kernel_does_as_planned(group, programs, shift, end_steps, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    tokens, pattern = 4 * TILE.m - 9, Block(32, 32)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 6, generator=generator) > torch.linspace(0, 1, 7)[:, None]
    x, weight = torch.ones(tokens, 192).half(), torch.ones(224, 192).half()
    topology = block_topology(mask, pattern)
    plan = Plan(TILE, group, programs, shift, end_steps)
    monkeypatch.setattr(product_module, "plan_product", lambda *_: plan)
    load, steps = product_module._load, defaultdict(list)
    stored, left, waited = Counter(), Counter(), Counter()

    def spy(source, row, col, *more, **options):
        steps[interpreter_builder.grid_idx[0]].append(number(row))
        return load(source, row, col, *more, **options)

    def counted(function, counter):
        def spy(*arguments):
            counter[interpreter_builder.grid_idx[0]] += 1
            return function(*arguments)

        return spy

    monkeypatch.setattr(product_module, "_load", spy)
    for name, counter in (("_store", stored), ("_store_sum", stored)):
        monkeypatch.setattr(product_module, name, counted(getattr(product_module, name), counter))
    monkeypatch.setattr(product_module, "_store_part", counted(product_module._store_part, left))
    monkeypatch.setattr(product_module, "_wait", counted(product_module._wait, waited))
    y = block_sparse_linear(x, weight, topology, pattern=pattern)
    expected = 32 * mask.sum(1).repeat_interleave(32)
    torch.testing.assert_close(y, expected.half().expand(tokens, -1))

    lines = topology.row_tasks[:, 0].tolist()
    lengths = np.maximum(topology.row_tasks[:, 2].numpy(), 1)
    token_tile, band = tile_order(4, 7, group)
    row = np.repeat(np.arange(28), lengths[band])
    # with the ends of tiles as steps that do nothing
    timed = [[tile] * lengths[band[tile]] + [-1] * end_steps for tile in range(28)]
    timed = np.concatenate(timed)
    own, tiles, parts = program_loads(plan, lengths, 4)
    for program in range(programs):
        if end_steps:
            first, last = (len(timed) * p // programs for p in (program, program + 1))
            mine = timed[first:last]
            mine = mine[mine >= 0]
        else:
            mine = dealt(np.arange(100), np.full(100, program), programs, shift)
            mine = np.concatenate([row[row == tile] for tile in mine[mine < 28]] or [mine[:0]])
        wanted = [(token_tile[tile] * TILE.m, lines[band[tile]] * 32) for tile in mine]
        # of a split the last program has the first share
        place = programs - 1 - program if end_steps else program
        assert steps[place] == [place for both in wanted for place in both]
        assert own[program] == len(wanted)
        assert tiles[program] == stored[place]
        assert parts[program] == left[place] + waited[place]


def modelled_time(plan, shape, side, tokens, level, skewed):
    N, K = SHAPES[shape]
    kept = np.repeat(kept_blocks(N // side, K // side, level, skewed), side // plan.tile.n)
    steps = np.maximum(kept * (side // plan.tile.k), 1)
    load = program_loads(plan, steps, -(-tokens // plan.tile.m))
    step, end, part = tile_times(plan.tile, 2)
    busy = load.steps * step + load.tiles * end + load.parts * part
    busy = np.bincount(np.arange(plan.programs) % HOPPER.processors, busy)
    return busy.max()


@pytest.mark.parametrize("tokens", [512, 1024])
@pytest.mark.parametrize("side", [128, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_gain_by_smaller_tiles_or_equal_shares(shape, side, tokens, monkeypatch):
    """Of so few the usual tiles leave a part of the device idle."""
    N, K = SHAPES[shape]
    tiles = linear_tiles(side, side, torch.bfloat16, HOPPER, precision="tf32", bulk=True)
    sizes = tokens, K, N // side, side, side, 2, HOPPER.processors
    plan = plan_product(*sizes, tiles)
    monkeypatch.setattr(schedule, "FEW_ROUNDS", 0)
    usual = plan_product.__wrapped__(*sizes, tiles[:1])
    assert not usual.split
    times = [
        sum(
            modelled_time(one, shape, side, tokens, level, skewed)
            for level in (0.8, 0.9)
            for skewed in (False, True)
        )
        for one in (plan, usual)
    ]
    # plans are made on model masks, which are others
    assert times[0] <= (1.15 if shape == "up" else 0.9) * times[1]


@pytest.mark.parametrize("tokens", [512, 1024])
@pytest.mark.parametrize("side", [256, 128, 64])
@pytest.mark.parametrize("shape", ["up", "down"])
@pytest.mark.parametrize("skewed", [False, True], ids=["random", "skewed"])
def test_few_tokens_are_balanced(shape, side, tokens, skewed):
    """A weight of 4096 x 4096 has so few steps that its plan is the fastest, not the most even."""
    for level in LEVELS:
        plan, steps = plan_and_steps(tokens, SHAPES[shape], side, level, skewed)
        num_m = -(-tokens // plan.tile.m)
        assert balance(plan, steps, num_m, HOPPER.processors) >= 0.8


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


@pytest.mark.skipif(not INTERPRET, reason="follows the kernel in the interpreter")
@pytest.mark.parametrize(
    ("sides", "tokens", "processors"),
    # short tiles and long ones
    [((64, 64), 96, 3), ((64, 64), 330, 16), ((32, 32), 96, 16), ((32, 32), 330, 3)],
    ids=str,
)
def test_the_weight_gradient_does_as_planned(sides, tokens, processors, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(tiles_module, "INTERPRETED_PROCESSORS", processors)
    monkeypatch.setattr(wgrad_module, "MIN_STEPS", 4)
    R, C, pattern = 768, 512, Block(*sides)
    grid = R // sides[0], C // sides[1]
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(1)) > 0.5
    grad, x = torch.ones(tokens, R).half(), torch.ones(tokens, C).half()
    done, compute = defaultdict(list), wgrad_module._tile

    def spy(*arguments):
        names = dict(zip(compute.arg_names, arguments, strict=True))
        is_narrow = number(names["DOTS"]) * number(names["BLOCK_V"]) < 256
        steps = number(names["end"]) - number(names["first"])
        done[interpreter_builder.grid_idx[0]].append((is_narrow, steps))
        return compute(*arguments)

    monkeypatch.setattr(wgrad_module, "_tile", spy)
    topology = block_topology(mask, pattern)
    out = torch.full((R, C), float("nan")).half()
    launch_wgrad(grad, x, topology, *sides, out)
    expected = tokens * mask.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    torch.testing.assert_close(out, expected.half())

    bulk = min(sides) >= 64
    by_rows = bundling(pattern, grid)[0]
    side_u, side_v = sides if by_rows else sides[::-1]
    device = tiles_module.device_of(x)
    tile = wgrad_tile(side_u, side_v, torch.float16, device, precision="tf32", bulk=bulk)
    programs = processors * tile.programs
    counts = [n * side_u // tile.m for n in topology.bundle_count.tolist()]
    loads = gradient_loads(*counts, -(-tokens // tile.k), programs, 4)
    for program in range(programs):
        for is_narrow, planned in ((False, loads.wide_steps), (True, loads.narrow_steps)):
            steps = sum(n for narrow, n in done[program] if narrow == is_narrow)
            assert steps == planned[program]
        assert len(done[program]) == loads.tiles[program]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [256, 128, 64])
@pytest.mark.parametrize("skewed", [False, True], ids=["random", "skewed"])
def test_weight_gradients_fill_their_rounds_and_bundles(shape, side, skewed):
    R, C = SHAPES[shape]
    grid = R // side, C // side
    by_rows, size = bundling(Block(side, side), grid)
    lines = grid if by_rows else grid[::-1]
    tile = wgrad_tile(side, side, torch.bfloat16, HOPPER, precision="tf32", bulk=True)
    for level, least in ((0.5, 0.95), (0.8, 0.93), (0.9, 0.9), (0.95, 0.82)):
        kept = kept_blocks(*lines, level, skewed)
        share = gradient_balance(
            kept, size, side // tile.m, 8192 // tile.k, HOPPER.processors * tile.programs, 8
        )
        assert share >= least
