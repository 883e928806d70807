"""The producer and the consumers of a block-sparse product, replayed under many interleavings."""

import inspect
import random
import textwrap

import numpy as np
import pytest
import torch
from gluon_replay import Descriptor, Machine, Pointer

from triton_sparsity.kernels import block_sparse_gluon as gluon_product
from triton_sparsity.kernels.pattern import Block
from triton_sparsity.kernels.topology import topology_reference

KERNEL = "_block_sparse_linear_specialised_kernel"
FUNCTIONS = ("_place", "_dealt", "_task", "_produce", "_consume", KERNEL)


def sources():
    """The kernel's functions, as plain ones."""
    return {name: getattr(gluon_product, name).fn for name in FUNCTIONS}


def replay(seed, functions):
    """Run all programs of a random small product; return what it gave and what it should."""
    draw = random.Random(seed)
    consumers, stores = draw.choice([1, 2]), draw.choice([1, 2])
    block_m, block_n, block_k = 4 * consumers, draw.choice([2, 4]), draw.choice([2, 4])
    side_n, side_k = block_n * draw.choice([1, 2]), block_k * draw.choice([1, 2])
    # edges that tiles pass, and some that they meet
    M, N, K = (
        draw.randint(1, 6 * block_m),
        draw.randint(1, 4 * side_n),
        draw.randint(1, 9 * side_k),
    )
    shape = -(-N // side_n), -(-K // side_k)
    values = np.random.default_rng(seed)
    mask = values.random(shape) < draw.choice([0.1, 0.5, 0.5, 1])
    mask[draw.randrange(shape[0]) :][: draw.randint(0, 1)] = False
    topology = topology_reference(torch.from_numpy(mask), Block(side_n, side_k))
    tasks, index = topology.row_tasks.numpy(), topology.col_index.numpy()

    x, w, bias = (values.standard_normal(s).round(2) for s in ((M, K), (N, K), (N,)))
    kept = mask.repeat(side_n, 0)[:N].repeat(side_k, 1)[:, :K]
    w[~kept] = np.nan  # is not read
    by_k, has_bias = draw.random() < 0.5, draw.random() < 0.5
    y = Descriptor(np.full((M, N), np.nan), block_m // consumers, block_n // stores)
    tiles = -(-M // block_m) * len(tasks) * (side_n // block_n)
    programs = draw.randint(1, min(tiles, 3))
    group, shift = draw.randint(1, 3), draw.randrange(programs)
    stages = draw.randint(2, 4)
    for program in range(programs):
        machine = Machine(seed, program, programs, consumers)
        machine.know(**functions)
        operand = (w.T, block_k, block_n) if by_k else (w, block_n, block_k)
        machine.run(
            KERNEL, Descriptor(x, block_m, block_k), Descriptor(*operand), y, Pointer(bias),
            Pointer(tasks.ravel()), Pointer(index), M, N, len(tasks), group, shift,
            has_bias, by_k, side_n, side_k, block_m, block_n, block_k, stages, stores, consumers,
            0, 0,
        )  # fmt: skip
    assert (y.writes == 1).all(), "each output is stored once"
    return y.matrix, x @ np.where(kept, w, 0).T + has_bias * bias


@pytest.mark.parametrize("seed", range(60))
def test_no_interleaving_hangs_or_races(seed):
    given, wanted = replay(seed, sources())
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5)


# a line of the kernel, and what would be wrong in its place
WRONG = {
    "the producer waits for its own phase": (
        "_produce", "wait(empty.index(stage), phase ^ 1)", "wait(empty.index(stage), phase)",
    ),
    "the producer's phase never turns": ("_produce", "phase ^= 1", "phase ^= 0"),
    "the consumer's phase never turns": ("_consume", "phase ^= 1", "phase ^= 0"),
    "the ring starts anew in each tile": (
        "_produce", "for turn in range(turns):", "for turn in range(turns):\n        stage = 0",
    ),
    "a consumer's ring starts anew in each tile": (
        "_consume", "before = stage\n        for", "before = stage = 0\n        for",
    ),
    "a stage is given back while it is read": (
        "_consume", "empty.index(before), pred=step > 0", "empty.index(stage), pred=step >= 0",
    ),
    "the last stage of a tile is not given back": (
        "_consume", "pred=entries > 0", "pred=entries < 0",
    ),
    "a tile without blocks gives a stage back": (
        "_consume", "pred=entries > 0", "pred=entries >= 0",
    ),
    "both operands' bytes are not waited for": (
        "_produce", "x.block_type.nbytes + w.block_type.nbytes", "x.block_type.nbytes",
    ),
    "one consumer's arrival empties a stage": (
        KERNEL, "mbarrier.init(empty.index(stage), count=CONSUMERS)",
        "mbarrier.init(empty.index(stage), count=1)",
    ),
    "the staging is rewritten too early": ("_consume", "tma.store_wait(0)\n", "pass\n"),
    "the staging is not fenced": ("_consume", "fence_async_shared()", "pass"),
    "the last round is left out": (KERNEL, "turns += 1", "turns += 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_replay_finds_what_is_wrong(what):
    name, line, instead = WRONG[what]
    functions = sources()
    source = textwrap.dedent(inspect.getsource(functions[name]))
    assert line in source
    body = source[source.index("def ") :].replace(line, instead)
    defined = dict(functions[name].__globals__)
    exec(f"from __future__ import annotations\n{body}", defined)
    functions[name] = defined[name]
    found = 0
    for seed in range(20):
        try:
            given, wanted = replay(seed, functions)
            found += not np.allclose(given, wanted, rtol=0, atol=1e-5)
        except AssertionError:
            found += 1
    assert found, "no interleaving shows it"
