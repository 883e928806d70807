"""The model of a GPU: what it counts, and what the package takes from it."""

import pytest

from triton_sparsity.bench.measure.model import (
    H200,
    break_even,
    dense_time,
    efficiency,
    random_mask,
    sparse_time,
)
from triton_sparsity.bench.measure.shapes import Shape
from triton_sparsity.kernels import dispatch
from triton_sparsity.kernels.pattern import Block

SHAPE = Shape(8192, 4096, 14336)
PRODUCTS = ("forward", "dX", "dW")
FREE = H200._replace(copy=1e30, cache=1e30)


@pytest.mark.parametrize("skewed", [False, True])
def test_masks_have_the_level(skewed):
    mask = random_mask((32, 20), 0.8, skewed=skewed)
    assert mask.sum() == 128
    assert not skewed or mask[:16].sum() == pytest.approx(0.9 * 128, abs=1)


@pytest.mark.parametrize("operation", PRODUCTS)
def test_where_only_arithmetic_counts_the_kept_blocks_take_their_share(operation):
    found = sparse_time(operation, SHAPE, Block(128, 128), 0.8, FREE)
    flops = 2 * 8192 * 4096 * 14336
    assert found.arithmetic == pytest.approx(0.2 * flops / FREE.gemm, rel=1e-3)
    assert dense_time(operation, SHAPE, FREE) == pytest.approx(flops / FREE.gemm, rel=0.01)
    assert found.steps == pytest.approx(found.arithmetic, rel=0.05)
    assert 0.85 < efficiency(operation, SHAPE, Block(128, 128), 0.8, FREE) <= 1


@pytest.mark.parametrize("operation", PRODUCTS)
def test_smaller_blocks_wait_for_l2_and_sparser_ones_for_memory(operation):
    last = 1.0
    for side in (256, 64, 32):
        share = efficiency(operation, SHAPE, Block(side, side), 0.8, H200)
        assert share < last
        last = share
    slow = H200._replace(copy=1e11)
    found = sparse_time(operation, SHAPE, Block(128, 128), 0.95, slow)
    assert found.time >= found.memory > found.steps


def test_a_skewed_mask_is_no_faster():
    for operation in PRODUCTS:
        times = [
            sparse_time(operation, SHAPE, Block(128, 128), 0.8, H200, skewed).time
            for skewed in (False, True)
        ]
        assert times[1] >= 0.95 * times[0]


def test_at_the_break_even_both_take_as_long():
    block = Block(64, 64)
    density = break_even("forward", SHAPE, block, H200)
    dense = dense_time("forward", SHAPE, H200)
    assert sparse_time("forward", SHAPE, block, 1 - density, H200).time <= dense
    assert sparse_time("forward", SHAPE, block, 0.98 - density, H200).time > dense


@pytest.mark.parametrize("side", [256, 128, 64, 32, 16])
def test_the_built_in_break_even_is_two_thirds_of_the_modelled(side):
    block = Block(side, side)
    modelled = [break_even(name, SHAPE, block, H200) for name in PRODUCTS]
    built_in = dispatch._HOPPER[side]
    assert built_in == pytest.approx(2 / 3 * modelled[0], rel=0.12)
    assert 0.9 * built_in <= modelled[2]
