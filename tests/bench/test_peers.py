import pytest
import torch

from triton_sparsity.bench.peers import (
    semi_structured,
    thresholds,
    torch_bsr,
    torch_prune,
)


@pytest.mark.parametrize("k", [1, 20, 50, 99, 100])
def test_thresholds_of_torch_are_the_kth_smallest(k):
    values = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    wanted = sorted(values.abs().flatten().tolist())[k - 1]
    for function in (thresholds.by_sort, thresholds.by_topk, thresholds.by_kthvalue):
        assert function(values, k).item() == pytest.approx(wanted)


def test_torchs_pruning_starts_anew_at_every_update():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    update = torch_prune.compress(model, 0.5)
    for _ in range(3):
        update()
    assert sum(int((m.weight_mask == 0).sum()) for m in model) == 64


def test_two_of_four_are_pruned():
    weight = torch.tensor([[1.0, -4, 3, 2, 0, 5, -6, 1]])
    assert semi_structured.prune(weight).tolist() == [[0, -4, 3, 0, 0, 5, -6, 0]]


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_a_bsr_product_is_the_masked_one():
    x, w = torch.randn(4, 32), torch.randn(64, 32)
    w[:32, :16] = 0
    torch.testing.assert_close(torch_bsr.linear(x, w, (16, 16))(), x @ w.T)
