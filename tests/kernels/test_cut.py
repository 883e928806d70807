import pytest
import torch

from triton_sparsity.kernels import cut as module
from triton_sparsity.kernels.cut import find_cut, keep_highest
from triton_sparsity.kernels.pattern import NM, Block, Unstructured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def by_sorting(scores, count, among):
    """The highest |score| first, of equals the first."""
    order = scores.abs().flatten().float().argsort(descending=True, stable=True)
    chosen = [i for i in order.tolist() if among.flatten()[i]][:count]
    grid = torch.zeros(scores.numel(), dtype=torch.bool, device=DEVICE)
    grid[chosen] = True
    return grid.view(scores.shape)


KINDS = {
    "normal": lambda x: x,
    "tied": lambda x: x.round(),
    "zeros": lambda x: torch.copysign(x * 0, x),
    "subnormal": lambda x: x * 1e-40,
    "the largest": lambda x: torch.where(x > 0, torch.finfo(torch.float32).max, x),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [keep_highest, module._keep_highest_keys])
def test_the_highest_among_some_are_kept(way, kind):
    scores, among = KINDS[kind](randn(13, 21)), randn(13, 21, seed=1) > 0.3
    for count in (0, 1, 40, int(among.sum())):
        grid, nonfinite = way(scores, count, among, "auto")
        assert torch.equal(grid, by_sorting(scores, count, among))
        assert nonfinite == 0


@pytest.mark.parametrize("way", [keep_highest, module._keep_highest_keys])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all bits"])
def test_what_is_not_finite_counts_among_the_candidates_alone(way, bad):
    scores, among = randn(5, 7), torch.ones(5, 7, dtype=torch.bool, device=DEVICE)
    if bad == "all bits":  # the NaN that a GPU makes
        scores.view(torch.int32)[2, 3] = 0x7FFFFFFF
    else:
        scores[2, 3] = bad
    assert way(scores, 9, among, "auto")[1] == 1
    among[2, 3] = False
    grid, nonfinite = way(scores, 9, among, "auto")
    assert nonfinite == 0
    assert grid.sum() == 9


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
