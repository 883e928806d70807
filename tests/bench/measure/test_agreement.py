import torch

from triton_sparsity.bench.measure.agreement import difference, disagreement, first, worse_tuples
from triton_sparsity.kernels.bits import unpack_reference
from triton_sparsity.kernels.pattern import NM
from triton_sparsity.kernels.semi_structured import nm_mask


def test_a_result_may_be_no_worse_than_plain_torch():
    exact = torch.tensor([1.0, -3.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -3.001])
    assert disagreement(torch.tensor([1.0, -3.0019]), eager, exact) is None
    assert "off by 0.003" in disagreement(torch.tensor([1.0, -3.003]), eager, exact)
    assert disagreement(torch.tensor([1.0, float("nan")]), eager, exact) is not None
    assert "shape (1,)" in disagreement(torch.tensor([1.0]), eager, exact)


def test_tensors_are_compared_to_the_bit():
    wanted = torch.tensor([1.0, 2.0])
    assert difference("value", wanted.clone(), wanted) is None
    assert difference("value", wanted + 1e-6, wanted) == "value: 2 of 2 elements differ"
    assert difference("value", torch.tensor([1.0, float("nan")]), wanted).startswith("value: 1 of")
    assert difference("value", wanted.double(), wanted) == "value is torch.float64 (2,)"
    assert difference("value", wanted[:1], wanted) == "value is torch.float32 (1,)"
    assert first([None, "this", "that"]) == "this"
    assert first([None]) is None


def test_tuples_keep_n_and_the_largest():
    weight = torch.tensor([[1.0, -4, 3, 2, 0, 5, -6, 1]])
    keep = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    assert worse_tuples(weight, keep, NM(2, 4)) is None
    assert worse_tuples(weight, ~keep, NM(2, 4)) == "2 tuples keep a smaller magnitude"
    keep[0, 0] = True
    assert worse_tuples(weight, keep, NM(2, 4)) == "1 tuples keep another number than 2"


def test_tiles_keep_two_of_four_both_ways_and_the_best_of_all():
    pattern = NM(2, 4, transposable=True)
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    keep = unpack_reference(nm_mask(weight, pattern, backend="torch").mask, 24)
    assert worse_tuples(weight, keep, pattern) is None
    assert worse_tuples(weight, ~keep, pattern) == "24 tiles keep a smaller magnitude"
    # right along rows alone
    rows = torch.tensor([True, True, False, False]).repeat(16, 6)
    assert "transposed tuples keep another number" in worse_tuples(weight, rows, pattern)
