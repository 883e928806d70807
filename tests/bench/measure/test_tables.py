import pytest

from triton_sparsity.bench.measure.tables import faster, faster_within


@pytest.mark.parametrize(
    ("speedup", "spelled"),
    [
        (37.46, "37x faster"),
        (2.6, "2.6x faster"),
        (1.037, "1.04x faster"),
        (1.001, "as fast"),
        (1.0, "as fast"),
        (0.999, "as fast"),
        (1 / 1.2, "1.2x slower"),
        (1 / 131, "131x slower"),
        (9.96, "10x faster"),
        (None, ""),
    ],
)
def test_a_speedup_is_spelled_as_one_says_it(speedup, spelled):
    assert faster(speedup) == spelled


@pytest.mark.parametrize(
    ("speedup", "low", "high", "spelled"),
    [
        (37.4, 36.1, 55.4, "37x faster (36x to 55x)"),
        (0.8, 0.5, 0.9, "1.2x slower (1.1x to 2.0x)"),
        (1.2, 0.8, 1.5, "1.2x faster (1.2x slower to 1.5x faster)"),
        (1.0, 0.8, 1.0, "as fast (1.2x slower to as fast)"),
        (2.0, None, None, "2.0x faster"),
        (None, None, None, ""),
    ],
)
def test_a_spread_is_spelled_in_the_same_direction(speedup, low, high, spelled):
    assert faster_within(speedup, low, high) == spelled
