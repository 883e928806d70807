import torch

from triton_sparsity.bench.measure.agreement import disagreement


def test_a_result_may_be_no_worse_than_plain_torch():
    exact = torch.tensor([1.0, -3.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -3.001])
    assert disagreement(torch.tensor([1.0, -3.0019]), eager, exact) is None
    assert "off by 0.003" in disagreement(torch.tensor([1.0, -3.003]), eager, exact)
    assert disagreement(torch.tensor([1.0, float("nan")]), eager, exact) is not None
    assert "shape (1,)" in disagreement(torch.tensor([1.0]), eager, exact)
