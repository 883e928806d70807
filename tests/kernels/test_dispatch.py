import pytest
import torch

from triton_sparsity.kernels import dispatch
from triton_sparsity.kernels.dispatch import BreakEven, Kind, Paths, as_tensor, choose, kind_of
from triton_sparsity.kernels.pattern import Block

CPU = torch.device("cpu")
SIDES = [16, 32, 64, 128, 256]


def paths(density, side, triton_runs, shape=(2048, 2048), **options):
    pattern = side if isinstance(side, Block) else Block(side, side)
    blocks = -(-shape[0] // pattern.rows) * -(-shape[1] // pattern.cols)
    kept = round(density * blocks)
    dtype = torch.bfloat16 if triton_runs else torch.float32
    return choose(kept, shape, pattern, dtype, CPU, triton_runs=triton_runs, **options)


@pytest.mark.parametrize("triton_runs", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("side", SIDES)
def test_few_blocks_are_skipped_to_and_many_are_not(side, triton_runs):
    assert all(paths(0.01, side, triton_runs))
    assert not any(paths(1.0, side, triton_runs))
    taken = [sum(paths(density / 50, side, triton_runs)) for density in range(51)]
    assert taken == sorted(taken, reverse=True)


@pytest.mark.parametrize("triton_runs", [True, False], ids=["triton", "torch"])
def test_a_small_weight_stays_dense(triton_runs):
    assert not any(paths(0.1, 16, triton_runs, shape=(128, 128)))


def test_each_product_has_the_side_that_its_sums_share():
    narrow, wide = Block(16, 256), Block(256, 16)
    assert paths(0.3, narrow, True) == Paths(False, True, paths(0.3, narrow, True).wgrad)
    assert paths(0.3, wide, True) == Paths(True, False, paths(0.3, wide, True).wgrad)
    assert paths(0.3, narrow, False) == Paths(False, True, True)
    assert paths(0.3, wide, False) == Paths(True, False, True)


def test_16_bit_products_on_a_cpu_stay_dense():
    for dtype in (torch.bfloat16, torch.float16):
        found = choose(1, (2048, 2048), Block(128, 128), dtype, CPU, triton_runs=False)
        assert found == (False, False, False)


def test_exact_float32_stays_dense_where_tensor_cores_do_the_rest(monkeypatch):
    few = 1, (2048, 2048), Block(128, 128), torch.float32, CPU
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, sparse in (("ieee", False), ("none", False), ("tf32", True)):
            matmul.fp32_precision = setting
            assert choose(*few, triton_runs=True) == Paths(sparse, sparse, sparse)
            assert all(choose(*few, triton_runs=False))
        matmul.fp32_precision = "ieee"
        monkeypatch.setitem(dispatch.measured, kind_of(*few[1:]), BreakEven(0.5, 0.5, 0.5))
        assert all(choose(*few, triton_runs=True)), "what was measured there is known"
    finally:
        matmul.fp32_precision = before


def test_a_choice_can_be_forced():
    assert paths(1.0, 16, False, dispatch="sparse") == (True, True, True)
    assert paths(0.0, 16, False, dispatch="dense") == (False, False, False)
    with pytest.raises(ValueError, match="dispatch must be 'auto', 'sparse' or 'dense', got 'x'"):
        paths(0.0, 16, False, dispatch="x")


def test_what_was_measured_comes_first_but_not_under_deterministic_algorithms(monkeypatch):
    kind = kind_of((2048, 3000), Block(16, 16), torch.float32, CPU)
    assert kind == Kind("cpu", torch.float32, Block(16, 16), (2048, 2048))
    monkeypatch.setitem(dispatch.measured, kind, BreakEven(0.9, 0.0, 0.85))
    assert paths(0.87, 16, False) == Paths(True, False, False)
    assert paths(0.0, 16, False) == Paths(True, False, True), "0 means never"
    torch.use_deterministic_algorithms(True)
    try:
        assert not any(paths(0.87, 16, False))
    finally:
        torch.use_deterministic_algorithms(False)


def test_paths_read_well_and_go_into_a_tensor():
    assert str(Paths(True, True, True)) == "block-sparse"
    assert str(Paths(False, False, False)) == "dense"
    assert str(Paths(True, False, True)) == "forward, wgrad"
    with torch.device("meta"):  # stands in for a GPU
        assert as_tensor(Paths(True, False, True)).tolist() == [True, False, True]


def test_a_weight_without_elements_has_a_choice():
    assert paths(0.0, 64, False, shape=(0, 64)) is not None
