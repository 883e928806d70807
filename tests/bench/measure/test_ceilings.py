from triton_sparsity.bench.measure.ceilings import Ceilings, highest


def test_the_highest_ceilings_count():
    found = highest([Ceilings(1, 5, {"float32": 7}), Ceilings(2, 4, {"float32": 6})])
    assert found == Ceilings(2, 5, {"float32": 7})
