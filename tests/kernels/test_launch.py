import pytest
import torch

from triton_sparsity.kernels.launch import (
    INTERPRET,
    TILE_ELEMENTS,
    autocast,
    extent,
    index_type,
    tl,
    use_triton,
)

EDGE = 2**31 - TILE_ELEMENTS
HAS_GPU = torch.cuda.is_available()


def meta(shape, stride):
    return torch.empty_strided(shape, stride, dtype=torch.float16, device="meta")


@pytest.mark.parametrize(
    ("tensor", "reach"),
    [
        (meta((3, 5), (5, 1)), 15),
        (meta((3, 5), (1, 3)), 15),
        (meta((3, 5), (0, 1)), 5),
        (meta((3, 5), (100, 2)), 209),
        (meta((0, 5), (5, 1)), 0),
        (meta((), ()), 1),
    ],
)
def test_extent_counts_what_strides_can_reach(tensor, reach):
    assert extent(tensor) == reach


@pytest.mark.parametrize(
    ("tensor", "wide"),
    [
        (meta((1, EDGE), (EDGE, 1)), False),
        (meta((1, EDGE + 1), (EDGE + 1, 1)), True),
        (meta((2, 3), (EDGE - 3, 1)), False),
        (meta((2, 3), (EDGE, 1)), True),
        (meta((2**20, 2**20), (0, 1)), False),
    ],
)
def test_offsets_are_64_bit_once_a_tile_could_end_past_2_to_the_31(tensor, wide):
    assert index_type(tensor) == (tl.int64 if wide else tl.int32)
    assert index_type(meta((1, 1), (1, 1)), tensor) == (tl.int64 if wide else tl.int32)


def test_a_backend_is_met_or_refused():
    x = torch.ones(1, device="cuda" if HAS_GPU else "cpu")
    runs = HAS_GPU or INTERPRET
    assert use_triton("op", "auto", x) == runs
    assert use_triton("op", "torch", x) is False
    if runs:
        assert use_triton("op", "triton", x) is True
    else:
        with pytest.raises(RuntimeError, match="op: backend='triton' needs a GPU tensor"):
            use_triton("op", "triton", x)
    with pytest.raises(ValueError, match=r"op: backend must be .*, got 'gpu'"):
        use_triton("op", "gpu", x)


def test_autocast_casts_floats_and_leaves_the_rest():
    x, wide = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert autocast(x, None) == [x, None]
    with torch.autocast("cpu", torch.bfloat16):
        cast = autocast(x, wide, None, torch.ones(1, dtype=torch.int64))
    kinds = [t if t is None else t.dtype for t in cast]
    assert kinds == [torch.bfloat16, torch.float64, None, torch.int64]
