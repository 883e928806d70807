import math

import numpy as np
import pytest
import torch

import aot
import oracle
from triton_sparsity.kernels import draw as drawing
from triton_sparsity.kernels import learned_mask as module
from triton_sparsity.kernels import learned_mask_triton as kernels
from triton_sparsity.kernels.draw import uniform
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.learned_mask import (
    sample_mask,
    sample_mask_reference,
    sample_part,
    straight_through,
    straight_through_reference,
)
from triton_sparsity.kernels.mask import word_mask
from triton_sparsity.kernels.pattern import Block, Unstructured, grid_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_TRITON = INTERPRET or DEVICE == "cuda"
PATTERNS = [
    Unstructured(),
    Block(1, 1),
    Block(1, 16),
    Block(16, 1),
    Block(2, 4),
    Block(32, 32),
    Block(256, 128),
]
FEW = [Unstructured(), Block(2, 4), Block(16, 32)]
SHAPES = [(1, 1), (7, 13), (33, 31), (66, 259), (300, 8), (0, 5), (5, 0)]
DTYPES = [torch.float32, torch.float16]
if not INTERPRET:
    DTYPES += [torch.bfloat16, torch.float64]
SEED, DRAW = 0x1234_5678_9ABC_DEF0, 3


def randn(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed * 7919 + shape[0] * 31 + shape[1])
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def random_state(seed=SEED, draw=DRAW):
    return torch.tensor([seed, draw], device=DEVICE)


def make(shape, pattern, dtype=torch.float32):
    """Return weight, logits and gradient."""
    logits = randn(grid_shape(pattern, shape), 2) * 2
    weight = randn(shape, 1, dtype)
    return weight.requires_grad_(), logits.requires_grad_(), randn(shape, 3, dtype)


def philox(counter, key):
    """Philox4x32-10 in Python's integers, after Salmon et al., SC'11."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def numpy_uniform(shape, seed=SEED, draw=DRAW, stream=0):
    """Return the numbers of the device under test, one at a time."""
    return (philox_uniform if ON_TRITON else sfc_uniform)(shape, seed, draw, stream)


def sfc_uniform(shape, seed, draw, stream):
    """Halves of the 64-bit numbers, the lower first; a generator for each run of groups."""
    u = np.empty(shape[0] * shape[1])
    for i in range(len(u)):
        run, at = divmod(i, drawing.RUN)
        if at == 0:
            numbers = np.random.SFC64((seed % 2**64, draw, stream, run)).random_raw(len(u) + 1)
        half = int(numbers[at // 2]) >> (32 if at % 2 else 0) & 0xFFFFFFFF
        u[i] = min(max(half >> 8, 17), 2**24 - 17) / 2**24
    return u.reshape(shape)


def philox_uniform(shape, seed, draw, stream):
    """Rows 4i to 4i + 3 of column j take the four numbers of counter i * columns + j."""
    key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    u = np.empty(shape)
    for row in range(0, shape[0], 4):
        for col in range(shape[1]):
            numbers = philox((row // 4 * shape[1] + col, 0, draw, stream), key)
            for lane in range(min(4, shape[0] - row)):
                u[row + lane, col] = min(max(numbers[lane] >> 8, 17), 2**24 - 17) / 2**24
    return u


def numpy_sample(logits, u):
    """Return mask and slope by the formulas of the paper, in float64."""
    p = 1 / (1 + np.exp(-(logits.astype(np.float64) + np.log(u / (1 - u)))))
    assert (np.abs(p - 0.5) > 1e-6).all(), "too near to call: choose other data"
    return p > 0.5, p * (1 - p)


def spread(groups, pattern, shape):
    return groups.repeat(pattern.rows, 0).repeat(pattern.cols, 1)[: shape[0], : shape[1]]


def sums(elements, pattern):
    """Add up each block, one at a time."""
    rows, cols = pattern.rows, pattern.cols
    out = np.zeros(grid_shape(pattern, elements.shape))
    for i, j in np.ndindex(*out.shape):
        out[i, j] = elements[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols].sum()
    return out


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # known answers of the Random123 library
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_oracle_is_philox(counter, key, want):
    assert tuple(philox(counter, key)) == want


def test_numbers_are_a_function_of_seed_draw_stream_and_group():
    shape = (9, 50)
    want = numpy_uniform(shape)
    assert np.array_equal(uniform(random_state(), 0, shape).double().cpu().numpy(), want)
    for other in ({"seed": 1}, {"draw": 4}, {"seed": -SEED}):
        got = uniform(random_state(**other), 0, shape).double().cpu().numpy()
        assert np.array_equal(got, numpy_uniform(shape, **other))
        assert (got != want).mean() > 0.99
    got = uniform(random_state(), 6, shape).double().cpu().numpy()
    assert np.array_equal(got, numpy_uniform(shape, stream=6))
    assert (got != want).mean() > 0.99


def test_numbers_are_uniform():
    u = uniform(random_state(), 0, (512, 512)).double()
    assert u.min() >= 17 / 2**24
    assert u.max() <= 1 - 17 / 2**24
    counts = torch.histc(u, 64, 0, 1)
    # chi-squared of 63 degrees of freedom: mean 63, standard deviation 11.2
    assert (counts - 4096).square().sum() / 4096 < 63 + 5 * 11.2
    pairs = torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]
    assert abs(pairs) < 0.01


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_masks_and_gradients_are_those_of_the_formula(pattern, dtype):
    shape = (33, 31)
    weight, logits, grad = make(shape, pattern, dtype)
    kept, slope = numpy_sample(oracle.to_numpy(logits), numpy_uniform(logits.shape, stream=5))
    elements = torch.from_numpy(spread(kept, pattern, shape).copy()).to(DEVICE)

    out = sample_mask(weight, logits, random_state(), pattern, stream=5)
    assert torch.equal(out, torch.where(elements, weight, 0))
    grad_weight, grad_logits = torch.autograd.grad(out, (weight, logits), grad)
    assert torch.equal(grad_weight, torch.where(elements, grad, 0))
    product = oracle.to_numpy(grad).astype(float) * oracle.to_numpy(weight).astype(float)
    np.testing.assert_allclose(
        oracle.to_numpy(grad_logits), sums(product, pattern) * slope, rtol=1e-4, atol=1e-5
    )
    assert grad_logits.dtype == torch.float32


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_masks_pass_the_gradient_straight_through(pattern, dtype):
    shape = (33, 31)
    weight, scores, grad = make(shape, pattern, dtype)
    kept = np.random.default_rng(0).random(scores.shape) < 0.5
    elements = torch.from_numpy(spread(kept, pattern, shape).copy()).to(DEVICE)
    compact = oracle.packbits(kept) if isinstance(pattern, Unstructured) else kept
    compact = torch.from_numpy(compact.copy()).to(DEVICE)
    product = oracle.to_numpy(grad).astype(float) * oracle.to_numpy(weight).astype(float)
    for mask in (compact, word_mask(compact, pattern, shape, dtype)):
        out = straight_through(weight, scores, mask, pattern)
        assert torch.equal(out, torch.where(elements, weight, 0))
        grad_weight, grad_scores = torch.autograd.grad(out, (weight, scores), grad)
        assert torch.equal(grad_weight, torch.where(elements, grad, 0))
        np.testing.assert_allclose(
            oracle.to_numpy(grad_scores), sums(product, pattern), rtol=1e-4, atol=1e-5
        )


def compact_mask(pattern, shape):
    kept = np.random.default_rng(1).random(grid_shape(pattern, shape)) < 0.5
    compact = oracle.packbits(kept) if isinstance(pattern, Unstructured) else kept
    return torch.from_numpy(compact.copy()).to(DEVICE)


# each pattern with two shapes that it does not divide, and each shape with three patterns
SHAPED = [(p, SHAPES[(i + j) % len(SHAPES)]) for i, p in enumerate(PATTERNS) for j in (0, 2, 3)]


@pytest.mark.parametrize(("pattern", "shape"), SHAPED, ids=str)
def test_masks_equal_the_references_to_the_bit(pattern, shape):
    weight, logits, grad = make(shape, pattern)
    mask = compact_mask(pattern, shape)
    for function, reference, extra in (
        (sample_mask, sample_mask_reference, random_state()),
        (straight_through, straight_through_reference, mask),
    ):
        got = function(weight, logits, extra, pattern)
        want = reference(weight, logits, extra, pattern)
        assert torch.equal(got, want)
        got = torch.autograd.grad(got, (weight, logits), grad)
        want = torch.autograd.grad(want, (weight, logits), grad)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_e_to_the_minus_s_holds_over_its_range():
    s = torch.linspace(-20, 20, 40001)
    exact = torch.exp(-s.double())
    assert ((drawing.exp_minus(s) - exact) / exact).abs().max() < 1.1e-6
    assert torch.equal(
        drawing.exp_minus(torch.tensor([-1e30, 1e30])), drawing.exp_minus(s[[0, -1]])
    )
    assert drawing.exp_minus(torch.tensor([math.nan])).isnan()


def test_certain_logits_are_certain():
    logits = torch.tensor([[-math.inf, -14.0, 14.0, math.inf]] * 64, device=DEVICE)
    for draw in range(5):
        out = sample_mask(torch.ones_like(logits), logits, random_state(draw=draw), Unstructured())
        assert torch.equal(out, (logits > 0).float())


# the interpreter's NaN, as an integer, becomes one that leaves a NaN a NaN, as on a GPU
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_a_logit_that_is_nan_prunes(pattern):
    weight, logits, grad = make((65, 70), pattern)
    with torch.no_grad():
        logits.fill_(math.nan)
    out = sample_mask(weight, logits, random_state(), pattern)
    assert torch.equal(out, torch.zeros_like(weight))
    (grad_weight,) = torch.autograd.grad(out, weight, grad)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_a_group_is_kept_with_the_sigmoid_of_its_logit():
    logits = torch.tensor([-2.0, 0.0, 1.0, 4.59512], device=DEVICE).repeat_interleave(64)
    logits = logits.expand(256, -1).contiguous()
    out = sample_mask(torch.ones_like(logits), logits, random_state(), Unstructured())
    rates = out.view(256, 4, 64).mean((0, 2))
    assert torch.allclose(rates, torch.sigmoid(logits[0, ::64]), atol=0.02)


@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_what_is_behind_the_mask_stays_there(pattern):
    weight, logits, grad = make((65, 70), pattern)
    kept = sample_mask(torch.ones_like(weight), logits, random_state(), pattern) != 0
    poisoned = weight.detach().masked_fill(~kept, math.nan).requires_grad_()
    bad = grad.masked_fill(~kept, math.inf)
    out = sample_mask(poisoned, logits, random_state(), pattern)
    assert torch.equal(out, torch.where(kept, weight, 0))
    (grad_weight,) = torch.autograd.grad(out, poisoned, bad)
    assert torch.equal(grad_weight, torch.where(kept, grad, 0))


@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(pattern, layout):
    shape = (36, 70)
    weight, logits, grad = (t.detach() for t in make(shape, pattern))
    view = {
        "transposed": lambda t: t.T.contiguous().T,
        "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "expanded": lambda t: t[:1].expand(t.shape),
    }[layout]
    mask = compact_mask(pattern, shape)
    for function, extra in ((sample_mask, random_state()), (straight_through, mask)):
        given = [view(t).requires_grad_() for t in (weight, logits)]
        plain = [view(t).contiguous().requires_grad_() for t in (weight, logits)]
        out, want = (function(*pair, extra, pattern) for pair in (given, plain))
        assert torch.equal(out, want)
        got = torch.autograd.grad(out, given, view(grad))
        want = torch.autograd.grad(want, plain, view(grad).contiguous())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(ON_TRITON, reason="the kernels have no runs and threads")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("run", [401, 2**18])
def test_threads_and_the_lengths_of_runs_do_not_matter(monkeypatch, run, threads):
    weight, logits, grad = make((67, 50), Unstructured())
    monkeypatch.setattr(drawing, "RUN", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    kept, _ = numpy_sample(oracle.to_numpy(logits), numpy_uniform(logits.shape))
    out = sample_mask(weight, logits, random_state(), Unstructured())
    assert torch.equal(out, torch.where(torch.from_numpy(kept), weight, 0))
    grads = torch.autograd.grad(out, (weight, logits), grad)
    want = sample_mask_reference(weight, logits, random_state(), Unstructured())
    for a, b in zip(grads, torch.autograd.grad(want, (weight, logits), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ["sum", "transpose", "cat"])
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_gradients_of_any_layout(pattern, loss):
    weight, logits, _ = make((33, 31), pattern)
    f = {
        "sum": lambda y: y.sum(),
        "transpose": lambda y: (y.T * torch.arange(33.0, device=y.device)).sum(),
        "cat": lambda y: torch.cat([y, y], 1).square().sum(),
    }[loss]
    got, want = (
        torch.autograd.grad(f(function(weight, logits, random_state(), pattern)), (weight, logits))
        for function in (sample_mask, sample_mask_reference)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_two_runs_agree_to_the_bit_and_two_draws_do_not(pattern):
    weight, logits, grad = make((65, 70), pattern)
    runs = []
    for draw in (3, 3, 4):
        out = sample_mask(weight, logits, random_state(draw=draw), pattern)
        runs.append((out, *torch.autograd.grad(out, (weight, logits), grad)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


def test_a_draw_may_not_change_before_the_backward_pass():
    weight, logits, _ = make((8, 8), Unstructured())
    random = random_state()
    out = sample_mask(weight, logits, random, Unstructured())
    random[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.skipif(not ON_TRITON, reason="plain torch has no index type to force")
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_the_int64_path_matches_the_int32_path(pattern, monkeypatch):
    weight, logits, grad = make((33, 70), pattern)
    mask = compact_mask(pattern, (33, 70))
    for function, extra in ((sample_mask, random_state()), (straight_through, mask)):
        want = function(weight, logits, extra, pattern)
        want = (want, *torch.autograd.grad(want, (weight, logits), grad))
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "index_type", lambda *_: tl.int64)
            got = function(weight, logits, extra, pattern)
            got = (got, *torch.autograd.grad(got, (weight, logits), grad))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 4)], ids=str)
def test_opcheck(pattern):
    weight, logits, _ = make((9, 12), pattern)
    mask = compact_mask(pattern, (9, 12))
    sides = pattern.rows, pattern.cols
    torch.library.opcheck(module._sample_op, (weight, logits, random_state(), None, 5, *sides))
    torch.library.opcheck(module._straight_op, (weight, logits, mask, *sides))
    part = 1, logits.shape[0], 0, logits.shape[1]
    whole = logits.detach(), random_state(), 5, *logits.shape
    torch.library.opcheck(module._draw_part_op, (whole[0][1:], *whole[1:], *part))
    grad, plain = weight.detach() + 1, weight.detach()
    _, drawn = module._sample_op(plain, logits.detach(), random_state(), None, 5, *sides)
    if drawing.keeps_draws(logits):
        inputs = weight, logits, random_state(), drawn, 5, *sides
        torch.library.opcheck(module._sample_op, inputs)
    rest = (plain, logits.detach(), random_state(), drawn, 5, *sides)
    torch.library.opcheck(module._sample_grad_op, (grad, *rest))
    torch.library.opcheck(module._straight_grad_op, (grad, plain, mask, *sides))


@pytest.mark.parametrize("cut", [(0, 0), (3, 0), (0, 2), (5, 1)])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 4)], ids=str)
def test_parts_are_those_of_the_whole(monkeypatch, pattern, cut):
    monkeypatch.setattr(drawing, "RUN", 64)
    weight, logits, grad = make((33, 70), pattern)
    down, across = logits.shape
    masked = sample_mask(weight, logits, random_state(), pattern, stream=5)
    slopes = torch.autograd.grad(masked, (weight, logits), grad)
    for rows in (slice(0, cut[0]), slice(cut[0], down)):
        for cols in (slice(0, cut[1]), slice(cut[1], across)):
            here = tuple(
                slice(s.start * side, min(s.stop * side, size))
                for s, side, size in zip(
                    (rows, cols), (pattern.rows, pattern.cols), weight.shape, strict=True
                )
            )
            own, s = weight[here].contiguous(), logits[rows, cols]
            args = random_state(), pattern, (down, across), (rows, cols)
            found = sample_part(own, s, *args, stream=5)
            assert torch.equal(found, masked[here])
            to_weight, to_logits = torch.autograd.grad(found, (own, s), grad[here])
            assert torch.equal(to_weight, slopes[0][here])
            # a kernel's division is not torch's
            near = 0 if drawing.keeps_draws(logits) else 1e-5
            torch.testing.assert_close(to_logits, slopes[1][rows, cols], rtol=near, atol=near)


@pytest.mark.skipif(not drawing.keeps_draws(torch.empty(0, device=DEVICE)), reason="CPU only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_a_draw_can_be_shared(pattern, dtype):
    weight, logits, grad = make((33, 70), pattern)
    weight, grad = weight.detach().to(dtype).requires_grad_(), grad.to(dtype)
    drawn = drawing.draw(logits, random_state(), 5)

    def results(**given):
        out = sample_mask(weight, logits, random_state(), pattern, stream=5, **given)
        return (out, *torch.autograd.grad(out, (weight, logits), grad))

    for _ in range(2):
        for own, shared in zip(results(), results(drawn=drawn), strict=True):
            assert torch.equal(own, shared)
    out = sample_mask(weight, logits, random_state(), pattern, stream=5, drawn=drawn)
    again = drawing.draw(logits, random_state(draw=2), 5, drawn)
    assert again is drawn
    assert torch.equal(drawn, drawing.draw(logits, random_state(draw=2), 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, weight, grad)


@pytest.mark.skipif(not drawing.keeps_draws(torch.empty(0, device=DEVICE)), reason="CPU only")
def test_torchs_defaults_do_not_matter_to_draws():
    logits, random = randn((33, 70), 2), random_state()
    want = uniform(random, 5, logits.shape), drawing.draw(logits, random, 5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):  # stands in for a GPU
            got = uniform(random, 5, logits.shape), drawing.draw(logits, random, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(INTERPRET, reason="the interpreter cannot be traced")
def test_compiled_code_draws_anew_without_recompiling():
    weight, logits, _ = make((16, 24), Unstructured())
    random = random_state()
    torch._dynamo.reset()
    function = torch.compile(
        lambda w, s, r: sample_mask(w, s, r, Unstructured()), fullgraph=True, backend="aot_eager"
    )
    for draw in range(3):
        random[1] = draw
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = function(weight, logits, random)
        assert torch.equal(out, sample_mask(weight, logits, random, Unstructured()))
        out.sum().backward()


GRID = torch.zeros(2, 2)
BAD = {
    "integer weight": (TypeError, {"weight": torch.ones(4, 4, dtype=torch.int32)}),
    "8-bit weight": (TypeError, {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}),
    "vector": (ValueError, {"weight": torch.ones(4)}),
    "grid of another size": (ValueError, {"scores": torch.zeros(2, 3)}),
    "grid of another dtype": (TypeError, {"scores": GRID.half()}),
    "grid elsewhere": (ValueError, {"scores": GRID.to("meta")}),
    "backend": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("function", [sample_mask, straight_through])
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(function, bad):
    error, change = BAD[bad]
    extra = torch.zeros(2, dtype=torch.int64) if function is sample_mask else GRID.bool()
    given = {"weight": torch.ones(4, 4), "scores": GRID, "backend": "auto"} | change
    with pytest.raises(error, match=rf"^{function.__name__}: (weight|logits|scores|backend) must"):
        function(given["weight"], given["scores"], extra, Block(2, 2), backend=given["backend"])


def test_bad_random_state_or_mask_is_named():
    weight = torch.ones(4, 4)
    for random in (torch.zeros(3, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"^sample_mask: random must be int64"):
            sample_mask(weight, GRID, random, Block(2, 2))
    with pytest.raises(TypeError, match=r"^straight_through: mask must be compact or words"):
        straight_through(weight, GRID, GRID, Block(2, 2))
    for drawn in (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^sample_mask: drawn must be"):
            sample_mask(weight, GRID, torch.zeros(2).long(), Block(2, 2), drawn=drawn)


@pytest.mark.parametrize("function", [sample_mask, straight_through])
def test_triton_is_never_replaced_silently(function):
    weight, extra = torch.ones(4, 4, device=DEVICE), random_state()
    if function is straight_through:
        extra = torch.ones(2, 2, dtype=torch.bool, device=DEVICE)
    scores = GRID.to(DEVICE)
    if ON_TRITON:
        function(weight, scores, extra, Block(2, 2), backend="triton")
        with pytest.raises(ValueError, match="must not be float64"):
            function(weight.double(), scores, extra, Block(2, 2), backend="triton")
        if function is straight_through:
            words = torch.full((2, 4), -1, dtype=torch.int32, device=DEVICE)
            with pytest.raises(ValueError, match="must be compact"):
                function(weight, scores, words, Block(2, 2), backend="triton")
    else:
        with pytest.raises(RuntimeError, match="backend='triton' needs"):
            function(weight, scores, extra, Block(2, 2), backend="triton")


def compile_kernel(kernel, arch, width, *, sampled, block, aligned):
    weight = {16: "*bf16", 32: "*fp32"}[width]
    types = dict.fromkeys(("w_ptr", "out_ptr", "g_ptr", "grad_w_ptr"), weight)
    types |= {"logit_ptr": "*fp32", "grad_s_ptr": "*fp32"}
    types |= {"random_ptr": "*i64", "mask_ptr": "*fp32" if sampled else "*u8"}
    layout = kernels.TILE
    if block is not None:
        layout = {"ROWS": block[0], "COLS": block[1], **kernels.BLOCK_TILE}
    constants = {"SAMPLED": sampled, "INDEX": tl.int32 if aligned else tl.int64, **layout}
    ones = ("stride_wc", "stride_lc", "stride_oc", "stride_gc", "stride_dc")
    return aot.compile_for(
        arch,
        kernel,
        {name: types.get(name, "i32") for name in kernel.arg_names},
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        aligned=aligned,
        strides_of_one=[name for name in ones if name in kernel.arg_names],
        fp_fusion=False,
        unspecialized=("stream",),
    )


VARIANTS = {
    "sample": (kernels._sample_kernel, True, None),
    "sample 4x4": (kernels._sample_blocks_kernel, True, (4, 4)),
    "sample 64x64": (kernels._sample_blocks_kernel, True, (64, 64)),
    "sampled gradients": (kernels._grad_kernel, True, None),
    "sampled gradients 4x4": (kernels._grad_blocks_kernel, True, (4, 4)),
    "sampled gradients 64x64": (kernels._grad_blocks_kernel, True, (64, 64)),
    "gradients": (kernels._grad_kernel, False, None),
    "gradients 64x64": (kernels._grad_blocks_kernel, False, (64, 64)),
}


@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.aot
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("arch", "width", "aligned"), aot.WIDTHS)
def test_weights_and_logits_move_16_bytes_at_a_time(arch, width, aligned, variant):
    kernel, sampled, block = VARIANTS[variant]
    compiled = compile_kernel(kernel, arch, width, sampled=sampled, block=block, aligned=aligned)
    aot.assert_lean(compiled, arch)
    # the bits of a mask depend on it
    assert "fma.rn.f32" not in compiled.ptx
    if aligned:
        grad = "gradients" in variant
        whole = 4096 * width // 8 // 16 // 128  # accesses of a thread, in 4 warps, to one weight
        scores = 4096 * 4 // 16 // 128 if block is None else 0
        reads = whole * (2 if grad else 1) + (scores if sampled else 0)
        assert compiled.global_loads().count(16) == reads
        assert compiled.global_stores().count(16) == whole + (scores if grad else 0)
        # what else there is: the random state, mask bytes, logits and sums of blocks
        assert len(compiled.global_loads()) - reads <= 8
        assert len(compiled.global_stores()) - compiled.global_stores().count(16) <= 2


def test_kept_groups_are_counted_with_the_gradient_of_the_sigmoid():
    logits = [torch.randn(5, 3, dtype=torch.float32, device=DEVICE) for _ in range(2)]
    leaves = [s.clone().requires_grad_() for s in logits]
    counts = module.kept_groups(leaves)
    assert counts.tolist() == [int((s > 0).sum()) for s in logits]
    (counts * counts.new_tensor([1.0, 3.0])).sum().backward()
    for leaf, factor in zip(leaves, (1, 3), strict=True):
        p = leaf.detach().sigmoid()
        torch.testing.assert_close(leaf.grad, factor * p * (1 - p))


def test_a_scaled_gradient_leaves_the_value():
    x = torch.randn(4, device=DEVICE, requires_grad=True)
    y = module.scale_gradient(x, 2.5)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.5))
