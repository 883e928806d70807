import numpy as np
import pytest
import torch

from triton_sparsity.kernels import grid

SHAPES = [(1, 1), (7, 13), (15, 33), (16, 32), (17, 31), (64, 40), (0, 5), (5, 0), (0, 0)]
SIDES = [(1, 1), (2, 4), (16, 32), (256, 256)]
every_case = pytest.mark.parametrize(
    ("shape", "sides"), [(shape, sides) for shape in SHAPES for sides in SIDES], ids=str
)


def sizes(shape, rows, cols):
    """Return the number of elements of each block, by counting."""
    down, across = grid.block_counts(shape, rows, cols)
    counts = np.zeros((down, across), int)
    for i in range(shape[0]):
        for j in range(shape[1]):
            counts[i // rows, j // cols] += 1
    assert counts.all()
    return counts


@every_case
def test_side_lengths_are_those_of_the_elements_that_exist(shape, sides):
    tall, wide = grid.side_lengths(shape, *sides)
    np.testing.assert_array_equal((tall * wide).numpy(), sizes(shape, *sides))


@every_case
def test_expanding_gives_every_element_its_blocks_value(shape, sides):
    down, across = grid.block_counts(shape, *sides)
    values = torch.arange(down * across).view(down, across)
    full = grid.expand_blocks(values, *sides, shape)
    assert full.shape == shape
    for i, j in np.ndindex(shape):
        assert full[i, j] == values[i // sides[0], j // sides[1]]


@every_case
def test_padding_keeps_the_sums_of_blocks(shape, sides):
    blocks = grid.pad_to_blocks(torch.ones(shape), *sides)
    down, across = grid.block_counts(shape, *sides)
    assert blocks.shape == (down, sides[0], across, sides[1])
    np.testing.assert_array_equal(blocks.sum((1, 3)).numpy(), sizes(shape, *sides))


@every_case
@pytest.mark.parametrize("view", [lambda m: m, lambda m: m.T.contiguous().T], ids=["", "turned"])
def test_regions_are_whole_blocks_and_cover_every_element_once(shape, sides, view):
    matrix = view(torch.zeros(shape, dtype=torch.int64))
    seen = torch.zeros(grid.block_counts(shape, *sides), dtype=torch.int64)
    found = list(grid.regions(shape, *sides))
    assert len(found) <= 4
    for region in found:
        blocks = grid.view_blocks(matrix[region.elements], region.rows, region.cols)
        down, across = seen[region.blocks].shape
        assert blocks.shape == (down, region.rows, across, region.cols)
        assert blocks.numel()
        blocks += 1
        seen[region.blocks] += region.rows * region.cols
    assert (matrix == 1).all()
    np.testing.assert_array_equal(seen.numpy(), sizes(shape, *sides))
