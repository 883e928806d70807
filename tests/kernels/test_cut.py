import pytest
import torch

from triton_sparsity.kernels.cut import find_cut
from triton_sparsity.kernels.pattern import NM, Block, Unstructured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_tensors_that_are_pools_by_themselves_are_cut_one_by_one():
    tensors = [randn(4, 9, seed=i) for i in range(3)]
    cut = find_cut(tensors, [0, 7, 36], Block(2, 2), None, "auto")
    masks = cut.masks()
    assert [int((~mask).sum()) for mask in masks] == [0, 7, 36]
    assert cut.pruned() == [0, 7, 36]
    alone = find_cut([tensors[1]], 7, Block(2, 2), None, "auto")
    assert torch.equal(masks[1], alone.masks()[0])
    assert cut.values()[1] == alone.values()[0]
    assert not cut.nonfinite.any()


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_pruned_groups_or_tuples_are_counted(pattern):
    tensors = [randn(4, 16, seed=i) for i in range(2)]
    choices = 128 if isinstance(pattern, Unstructured) else 32
    for k in (1, choices // 2, choices):
        assert sum(find_cut(tensors, k, pattern, None, "auto").pruned()) == k
