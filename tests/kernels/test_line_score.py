import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import aot
from triton_sparsity.kernels import line_score as module
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.line_score import (
    Piece,
    line_scores,
    line_scores_reference,
    lines_a_band,
    norm_,
    norm_all_,
    sizing_tiles,
)
from triton_sparsity.kernels.pattern import Block, Unstructured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# the interpreter cuts a bfloat16 off where a GPU rounds it
TOLERANCE = dict.fromkeys(DTYPES, 2e-6) | ({torch.bfloat16: 2**-6} if INTERPRET else {})


def gradients(dtype=torch.float32):
    """Of several sizes and layouts; with a row and a column of zeros, and rows of unlike size."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator) for shape in ((37, 70), (1, 5), (64, 300))]
    found[0][3], found[0][:, 7] = 0, 0
    found[2] *= torch.logspace(-2, 2, 64)[:, None]
    found.append(found[0].T.contiguous().T)
    return [g.to(DEVICE, dtype) for g in found] + [found[2].to(DEVICE, dtype)[:, ::3]]


def normed(gradient, band):
    """Divide in float64 by the root mean square of each band of lines, and what is zero by 1."""
    exact = gradient.double().numpy()
    for axis in (1, 0):
        squares = np.square(exact).mean(axis)
        starts = np.arange(0, len(squares), band)
        counts = np.diff([*starts, len(squares)])
        sizes = np.sqrt(np.add.reduceat(squares, starts) / counts).repeat(counts)
        exact = exact / np.expand_dims(np.where(sizes > 0, sizes, 1), axis)
    return torch.from_numpy(exact)


@pytest.mark.parametrize("band", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_of_tiny_and_zero_rows(dtype, band):
    gradient = torch.randn(6, 5).to(dtype)
    gradient[1] = 0
    gradient[:, 3] = 0
    gradient[2] *= 1e-3 if dtype == torch.float16 else 1e-36
    exact = normed(gradient, band)
    norm_(gradient, band)
    # squares are added up as integers
    eps = max(8 * torch.finfo(dtype).eps, 2**-20)
    assert torch.allclose(gradient.double(), exact, rtol=eps, atol=0)


@pytest.mark.parametrize("band", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_are_normed_as_the_whole(dtype, band):
    """Four threads are the ranks; of a copy of the whole a fifth has no say."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(40_000, 6, generator=generator)
    whole[:, :2] *= 0.01
    whole[123, 1] = 2  # beside whose square the others are less than one, and as much in all
    whole = whole.to(dtype)
    ends = (slice(0, 13_333), slice(13_333, 40_000)), (slice(0, 1), slice(1, 6))
    bounds = [(rows, cols) for rows in ends[0] for cols in ends[1]]
    parts = [whole[at].clone() for at in bounds] + [whole.clone()]
    firsts = [(rows.start, cols.start) for rows, cols in bounds] + [(0, 0)]
    given, barrier = {}, threading.Barrier(len(parts))

    def reduce(rank, together, vector):
        given[rank] = vector
        barrier.wait()
        found = together(torch.stack([given[i] for i in range(len(parts))]))
        barrier.wait()
        return found

    def norm_part(rank):
        piece = Piece(firsts[rank], tuple(whole.shape), (True, True), rank < 4)
        most = partial(reduce, rank, lambda all: all.amax(0))
        add = partial(reduce, rank, lambda all: all.sum(0, dtype=all.dtype))
        norm_all_([parts[rank]], [piece], band, most, add)

    with ThreadPoolExecutor(len(parts)) as ranks:
        list(ranks.map(norm_part, range(len(parts))))
    exact = normed(whole, band)
    norm_(whole, band)
    for part, at in zip(parts, [*bounds, (slice(None), slice(None))], strict=True):
        assert torch.equal(part, whole[at])
    assert torch.allclose(whole.double(), exact, rtol=max(2e-3, 4 * torch.finfo(dtype).eps))


PATTERNS = [(Block(16, 16), 1), (Block(64, 8), 1), (Unstructured(), 1), (Unstructured(), 16)]
LOADS = [DTYPES, DTYPES[:1], DTYPES, DTYPES[2:]]


@pytest.mark.parametrize(
    ("pattern", "band", "dtype"),
    # all dtypes of blocks and of elements; what else there is differs in no load
    [(*PATTERNS[i], dtype) for i, own in enumerate(LOADS) for dtype in own],
    ids=str,
)
def test_a_list_has_the_scores_of_each(pattern, band, dtype):
    given = gradients(dtype)
    before = [g.clone() for g in given]
    found = line_scores(given, pattern, band=band)
    for gradient, copy, scores in zip(given, before, found, strict=True):
        want = line_scores_reference(gradient, pattern, "torch", band)
        assert scores.shape == want.shape
        assert torch.allclose(
            scores.float().abs(), want.float().abs(), rtol=TOLERANCE[dtype], atol=0
        )
        assert torch.equal(gradient, copy), "an update that is put off takes it again"


@pytest.mark.parametrize("band", [0, 3])
def test_bands_that_no_tile_has_whole_are_refused(band):
    with pytest.raises(ValueError, match=f"line_scores: band must be a power of two, got {band}"):
        line_scores(gradients(), Block(4, 4), band=band)


def test_dtypes_mix_and_doubles_take_plain_torch():
    given = [*gradients(torch.bfloat16), *gradients()]
    for gradient, scores in zip(given, line_scores(given, Block(4, 4)), strict=True):
        want = line_scores_reference(gradient, Block(4, 4), "torch")
        assert torch.allclose(scores, want, rtol=TOLERANCE[gradient.dtype], atol=0)
    wide = [g.double() for g in gradients()]
    (scores, *_) = line_scores(wide, Block(4, 4))
    assert torch.equal(scores, line_scores_reference(wide[0], Block(4, 4), "torch"))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    given = gradients()
    given[1][0, 2] = bad
    found = line_scores(given, Block(1, 1))
    assert [bool(scores.isfinite().all()) for scores in found] == [True, False, True, True, True]


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "band"), [("row_size", 1), ("col_size", 1), ("line_score", 1), ("row_size", 32)]
)
def test_the_kernels_are_lean(name, band, arch):
    kernel = getattr(module, f"_{name}_kernel")
    types = {"table_ptr": "*i64", "rows_ptr": "*fp64", "cols_ptr": "*fp64", "score_ptr": "*fp32"}
    types = {key: types[key] for key in kernel.arg_names if key in types}
    constants = {"DTYPE": tl.bfloat16, "INDEX": tl.int32, "N": 256}
    constants |= {"GOLDEN": module.GOLDEN, "BAND": band} if name != "line_score" else {}
    tiles = dict(zip(("row_size", "col_size"), sizing_tiles(band), strict=True))
    constants |= tiles.get(name) or {"ROWS": 64, "COLS": 64, **module.TILE}
    warps = 8 if name == "line_score" else 4
    compiled = aot.compile_for(arch, kernel, types, constants, num_warps=warps)
    # sums of squares are float64, so that they are the reference's
    aot.assert_lean(compiled, arch, double=True)


def test_bands_are_of_one_line_until_ranks_would_send_more_than_8_megabytes():
    assert lines_a_band([(8, 2), (3, 5)]) == 1
    most = module.MOST_BANDS
    assert lines_a_band([(10 * most, most)]) == 1  # a rank has whole rows
    assert lines_a_band([(most - 1, most + 1)]) == 2
    assert lines_a_band([(most, most + 1)]) == 4
    assert lines_a_band([(3 * most, 5 * most + 1)]) == 16
