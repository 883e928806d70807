import pytest
import torch

from triton_sparsity.bench.measure.counts import intensity, kept_elements
from triton_sparsity.kernels.pattern import Block, Unstructured
from triton_sparsity.kernels.tiles import Tile


@pytest.mark.parametrize(
    ("weight", "block", "mask", "kept"),
    [
        ((5, 7), Block(2, 4), [[1, 0], [0, 1], [1, 1]], 2 * 4 + 2 * 3 + 1 * 4 + 1 * 3),
        ((4, 4), Block(4, 4), [[1]], 16),
        ((3, 1), Unstructured(), [[1], [0], [1]], 2),
    ],
)
def test_edge_blocks_are_counted_with_the_elements_that_they_have(weight, block, mask, kept):
    assert kept_elements(torch.tensor(mask, dtype=torch.bool), weight, block) == kept


@pytest.mark.parametrize(
    ("operation", "tile", "size", "found"),
    [
        # kernels/block_sparse_linear.py and _wgrad.py have these by hand, for 16-bit operands
        ("forward", (128, 256), 2, 85.3),
        ("dX", (256, 128), 2, 85.3),
        ("forward", (512, 64), 2, 56.9),
        ("forward", (512, 32), 2, 30.1),
        ("dW", (64, 256), 2, 51.2),
        ("dW", (32, 256), 2, 28.4),
        ("forward", (512, 32), 4, 15.1),
    ],
)
def test_the_intensity_of_a_tile(operation, tile, size, found):
    tile = Tile(*tile, 32, 8, 4, 1)
    assert intensity(operation, tile, size) == pytest.approx(found, abs=0.05)
