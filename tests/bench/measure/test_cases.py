import pytest
import torch

from triton_sparsity.bench.measure.cases import Case, rates
from triton_sparsity.bench.measure.ceilings import Ceilings
from triton_sparsity.bench.measure.shapes import Shape
from triton_sparsity.bench.measure.timing import Timing
from triton_sparsity.kernels.pattern import Block


def test_rates_follow_from_the_counts_and_ceilings():
    shape = Shape(10, 20, 30)
    case = Case(
        "forward", (shape,), torch.float32, Block(16, 16), 0.5, "random", 4000, 6000, 1000.0, None,
        12000,
    )  # fmt: skip
    ceilings = Ceilings(copy=1e6, cache=1e5, gemm={"float32": 2e6})
    found = rates(case, 0.02, ceilings, Timing((0.04,)))
    assert found["gb_per_s"] == pytest.approx(4000 / 0.02 / 1e9)
    assert found["tflop_per_s"] == pytest.approx(6000 / 0.02 / 1e12)
    # 4 ms of copying, 3 ms of arithmetic, 10 ms of reading the cache
    assert found["of_copy"] == pytest.approx(0.2)
    assert found["of_gemm"] == pytest.approx(0.15)
    assert found["of_cache"] == found["of_bound"] == pytest.approx(0.5)
    assert (found["bound"], found["bound_s"]) == ("cache", pytest.approx(0.01))
    assert found["speedup"] == pytest.approx(2)
    # half of the dense FLOPs in half of the time
    assert found["efficiency"] == pytest.approx(1)
