from itertools import pairwise
from math import inf, nan

import numpy as np
import pytest
import torch

import aot
from triton_sparsity.kernels import block_score
from triton_sparsity.kernels import exact_sum as module
from triton_sparsity.kernels.block_score import block_scores, weight_squares
from triton_sparsity.kernels.exact_sum import (
    Places,
    exact_sums,
    inverse_norms,
    pieces_of,
    row_squares,
    row_sums,
    segment_of,
)
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.pattern import Block, Unstructured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_TRITON = INTERPRET or DEVICE == "cuda"
BACKENDS = ["torch", "triton"] if ON_TRITON else ["torch"]
DTYPES = [torch.float32, torch.float16]
if not INTERPRET:  # whose bfloat16 is unreliable
    DTYPES.append(torch.bfloat16)
# lines of 16 pieces of 1, 3, 48, 64, 192 and 688, and of one piece
LENGTHS = [16, 48, 768, 1024, 3072, 11008, 33, 500]


def make(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + shape[0] * 7919 + shape[1])
    rows = torch.logspace(-6, 3, shape[0])[:, None]
    return (torch.randn(shape, generator=generator) * rows).to(dtype).to(DEVICE)


def edges(total, parts):
    """Unequal parts, some of them empty."""
    steps = np.linspace(0, 1, parts + 1) ** 2 * total
    return [*map(int, steps[:-1].round()), total]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_are_those_of_a_weight(dtype, backend):
    for length in LENGTHS:
        for weight in (make((7, length), dtype), make((7, length), dtype).T):
            (squares,) = weight_squares([weight], backend=backend)
            assert squares.dtype == torch.float64
            want = weight.double().square().sum()
            torch.testing.assert_close(squares.sum(), want, rtol=1e-6, atol=0)


@pytest.mark.skipif(not ON_TRITON, reason="plain torch squares a rounded norm")
@pytest.mark.parametrize("length", LENGTHS)
def test_the_kernel_adds_up_small_integers_exactly(length):
    weight = make((5, length)).sign() * (torch.arange(5 * length, device=DEVICE) % 8).view(5, -1)
    n = pieces_of(length)
    segment = int(segment_of(np.array(length // n)))
    padded = torch.nn.functional.pad(weight.view(5, n, -1), (0, -(length // n) % segment))
    want = padded.double().square().view(-1, segment).sum(1)
    (squares,) = weight_squares([weight], backend="triton")
    assert torch.equal(squares, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turned", [False, True], ids=["as stored", "turned"])
@pytest.mark.parametrize("length", LENGTHS)
def test_parts_of_a_weight_add_up_to_it(length, turned, backend):
    """Whoever has some of the lines, or some of the sixteenths of each, has the same numbers."""
    weight = make((9, length))
    whole = weight_squares([weight.T if turned else weight], None, backend)
    n, want = pieces_of(length), exact_sums(whole, backend=backend)
    for down, across in ((4, 1), (1, n), (2, min(n, 4))):
        if turned and across == length:
            continue  # a part that is a single line lies in memory as one that is not turned
        ends, sides = edges(9, down), range(0, length + 1, length // across)
        parts = [weight[a:b, c:d].clone() for a, b in pairwise(ends) for c, d in pairwise(sides)]
        parts = [part.T if turned else part for part in parts]
        squares = weight_squares(parts, [n // across] * len(parts), backend)
        # in another order than that of the whole
        assert torch.equal(exact_sums([torch.cat(squares[::-1])], backend=backend), want)


def vectors_of(found):
    """Return what lies at ``Places``."""
    if not isinstance(found, Places):
        return found
    vectors = []
    for address, length in zip(found.address.tolist(), found.length.tolist(), strict=True):
        starts = [(address - held.data_ptr()) // 8 for held in found.held]
        held, start = next(
            (held, start)
            for held, start in zip(found.held, starts, strict=True)
            if 0 <= start <= len(held) - length
        )
        vectors.append(held[start : start + length])
    return vectors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(8, 4), Block(32, 32)], ids=str)
def test_squares_that_come_with_scores_are_those(pattern, backend, monkeypatch):
    weights = [make((9, length)) for length in LENGTHS]
    weights += [weight.T for weight in weights] + [make((5, 0)), make((0, 5))]
    want = weight_squares(weights, None, backend)
    seen = []
    monkeypatch.setattr(block_score, "inverse_norms", lambda found: seen.extend(vectors_of(found)))
    block_scores(weights, pattern, normed=True, backend=backend)
    assert all(map(torch.equal, seen, want))
    assert len(seen) == len(want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_that_add_up_have_the_sums_of_one_process(backend):
    vectors = [make((1, n), seed=n).abs().double()[0] for n in (40, 3, 0, 20_000)]
    want = exact_sums(vectors, backend=backend)
    halves = [[v[: len(v) // 3] for v in vectors], [v[len(v) // 3 :] for v in vectors]]
    # ranks, in turn: what each would send, and what it then gets
    sent = {"most": [], "add": []}

    def note(key):
        return lambda own: sent[key].append(own) or own

    for half in halves:
        exact_sums(half, note("most"), note("add"), backend=backend)
    most = torch.maximum(*sent["most"])
    sent["add"].clear()
    for half in halves:
        exact_sums(half, lambda _: most, note("add"), backend=backend)
    total = sum(sent["add"])
    for half in halves:
        got = exact_sums(half, lambda _: most, lambda _: total, backend=backend)
        assert torch.equal(got, want)
    exact = torch.stack([v.sum() for v in vectors])
    torch.testing.assert_close(want, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_numbers_as_experts_have_do_not_overflow(backend):
    """384 experts of 4096 x 7168 in segments of 64, all as great: here are few of the numbers."""
    numbers = 384 * 4096 * 7168 // 64
    here = torch.full((384,), 2 - 2.0**-52, dtype=torch.float64, device=DEVICE)
    sums = exact_sums([here], lambda own: own, lambda own: own * (numbers // 384), backend=backend)
    assert sums.tolist() == [pytest.approx(2 * numbers, rel=1e-9)]


@pytest.mark.skipif(not ON_TRITON, reason="compares the kernel with plain torch")
@pytest.mark.parametrize("scale", [1.0, 2.0**-600, 2.0**500])
def test_the_kernel_adds_up_what_plain_torch_does(scale):
    generator = torch.Generator().manual_seed(3)
    lengths = (0, 1, 1023, 1024, 2**14, 2**14 + 1, 50_000)
    vectors = [torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    vectors.append(torch.logspace(-60, 60, 700, dtype=torch.float64))
    vectors.append(torch.zeros(5, dtype=torch.float64))
    vectors = [(v * scale).to(DEVICE) for v in vectors]
    got = exact_sums(vectors, backend="triton")
    assert torch.equal(got, exact_sums(vectors, backend="torch"))
    with np.errstate(all="ignore"):  # the interpreter's
        norms = [inverse_norms(vectors, backend=backend) for backend in ("triton", "torch")]
    assert torch.equal(*norms)
    assert got[0] == got[-1] == 0
    assert (got[1:-1] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_what_is_not_finite_are_nan(backend):
    bad = torch.tensor([[1.0, inf], [nan, 1.0], [-nan, 1.0], [1.0, 2.0]], device=DEVICE).double()
    assert exact_sums([*bad], backend=backend).isnan().tolist() == [True, True, True, False]
    for value in (inf, -inf, nan):
        weight = make((4, 1024))
        weight[2, 77] = value
        (squares,) = weight_squares([weight], backend=backend)
        # of the second row the second piece
        assert squares.isfinite().logical_not().nonzero().flatten().tolist() == [2 * 16 + 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [3e38, 1e38, 2e19, 1e-19, 1e-37, 1.2e-38, 1e-40, 1e-45])
def test_no_square_overflows_or_vanishes(value, backend):
    weight = torch.full((3, 48), value, device=DEVICE)
    weight[1] = 0
    with np.errstate(all="ignore"):  # the interpreter's
        (squares,) = weight_squares([weight], backend=backend)
    want = weight.double().square().view(48, 3).sum(1)
    torch.testing.assert_close(squares, want, rtol=1e-6, atol=0)


def test_small_numbers_beside_a_large_one_lose_no_more_than_rounding():
    weight = torch.full((1, 256), 1e-3, device=DEVICE)
    weight[0, 9] = 1.0
    for backend in BACKENDS:
        (squares,) = weight_squares([weight], [1], backend=backend)
        want = weight.double().square().sum()
        torch.testing.assert_close(squares.sum(), want, rtol=256 * 2**-22, atol=0)


def test_sums_of_rows_go_by_no_other_row():
    for length in LENGTHS:
        matrix = make((9, length)).abs()
        n = pieces_of(length)
        for sums in (row_sums, row_squares):
            whole = sums(matrix)
            assert torch.equal(torch.cat([sums(row[None]) for row in matrix]), whole)
            half = matrix[:, length // 2 :] if n > 1 else matrix
            some = sums(half.contiguous(), n // 2 if n > 1 else 1)
            assert torch.equal(some.view(9, -1), whole.view(9, -1)[:, n // 2 if n > 1 else 0 :])
        want = matrix.double().view(9 * n, -1).sum(1)
        torch.testing.assert_close(row_sums(matrix), want, rtol=1e-12, atol=0)


def test_pairs_add_up_to_the_sum():
    for length in (0, 1, 2, 3, 7, 64, 65, 1000):
        matrix = torch.arange(5.0 * length, device=DEVICE).view(5, length)
        assert torch.equal(module._by_pairs(matrix), matrix.sum(1))


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_sums_of_all_are_made_without_atomics(arch, summed):
    kernel = module._exact_sum_kernel
    types = {"table_ptr": "*i64", "peak_ptr": "*i64", "out_ptr": "*i64"}
    types |= {"programs": "i32", "parts": "i32"}
    compiled = aot.compile_for(
        arch,
        kernel,
        types,
        {"N": 256, "SUMMED": summed, **module._SUM},
        unspecialized=["programs", "parts"],
    )
    aot.assert_lean(compiled, arch, double=summed)
    assert not compiled.has("ATOMG")
    assert not compiled.has("RED")
    if summed:
        types = {"peak_ptr": "*i64", "total_ptr": "*i64", "out_ptr": "*fp32", "parts": "i32"}
        constants = {name: module._SUM[name] for name in ("BLOCK", "BITS")}
        kernel = module._inverse_norm_kernel
        last = aot.compile_for(arch, kernel, types, constants, unspecialized=["parts"])
        aot.assert_lean(last, arch, double=True)


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("segment", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("dtype", [tl.bfloat16, tl.float32], ids=str)
def test_segments_of_any_length_compile_lean(dtype, segment):
    kernel = block_score._block_score_kernel
    pointers = {"table_ptr": "*i64", "score_ptr": "*fp32", "square_ptr": "*fp64"}
    compiled = aot.compile_for(
        90,
        kernel,
        {name: pointers.get(name, "i32") for name in kernel.arg_names},
        {
            "DTYPE": dtype,
            "ROWS": 1,
            "COLS": 1,
            "SQUARED": False,
            "SCORED": False,
            "SEGMENT": segment,
            "INDEX": tl.int32,
            "N": 256,
            "TILE_R": 4096 // segment,
            "TILE_C": segment,
        },
    )
    aot.assert_lean(compiled, 90, double=True)
    assert compiled.registers <= 168
