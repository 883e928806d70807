import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aot
from triton_sparsity.kernels import block_score as module
from triton_sparsity.kernels import exact_sum
from triton_sparsity.kernels.block_score import (
    block_score,
    block_score_reference,
    block_scores,
)
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.pattern import Block, Unstructured, grid_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_TRITON = INTERPRET or DEVICE == "cuda"
SHAPES = [(1, 1), (7, 13), (31, 33), (32, 32), (33, 31), (127, 257), (300, 40), (0, 5), (5, 0)]
PATTERNS = [
    Unstructured(),
    Block(1, 1),
    Block(1, 16),
    Block(16, 1),
    Block(4, 8),
    Block(32, 32),
    Block(128, 2),
    Block(256, 256),
]
DTYPES = [torch.float32, torch.float16]
if not INTERPRET:  # whose bfloat16 is unreliable, and float64 is plain torch's
    DTYPES += [torch.bfloat16, torch.float64]


def make(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape[0] * 7919 + shape[1])
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def oracle(weight, pattern, norm):
    """Block by block, in float64."""
    w = weight.detach().double().cpu().numpy()
    size = np.abs(w) if norm == "l1" else w**2
    down, across = grid_shape(pattern, w.shape)
    scores = np.empty((down, across))
    for i in range(down):
        for j in range(across):
            r, c = pattern.rows, pattern.cols
            scores[i, j] = size[i * r : (i + 1) * r, j * c : (j + 1) * c].mean()
    return torch.from_numpy(scores)


def assert_scores(scores, weight, pattern, norm):
    assert scores.dtype == torch.float32
    assert scores.is_contiguous()
    # the terms are not negative, so the sum's relative error is that of a few roundings
    want = oracle(weight, pattern, norm)
    torch.testing.assert_close(scores.cpu().double(), want, rtol=1e-6, atol=1e-30)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_is_the_mean_over_the_elements_that_exist(dtype, pattern, norm):
    for shape in SHAPES:
        weight = make(shape, dtype)
        assert_scores(block_score(weight, pattern, norm=norm), weight, pattern, norm)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_reference_defines_it(pattern, norm):
    for shape in SHAPES:
        weight = make(shape)
        scores = block_score_reference(weight, pattern, squared=norm == "l2")
        assert_scores(scores, weight, pattern, norm)
        assert_scores(
            block_score(weight, pattern, norm=norm, backend="torch"), weight, pattern, norm
        )


@settings(deadline=None, max_examples=30 if INTERPRET else 100, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 300)),
    sides=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    transposed=st.booleans(),
    norm=st.sampled_from(["l1", "l2"]),
)
def test_any_shape_and_block(shape, sides, transposed, norm):
    weight = make(shape)
    weight = weight.T if transposed else weight
    pattern = Block(2 ** sides[0], 2 ** sides[1])
    assert_scores(block_score(weight, pattern, norm=norm), weight, pattern, norm)


VIEWS = {
    "transposed": lambda w: w.T.contiguous().T,
    "sliced": lambda w: torch.cat([w, w], 1)[:, 3 : 3 + w.shape[1]],
    "every other": lambda w: torch.cat([w, w], 1)[:, ::2],
    "one row expanded": lambda w: w[:1].expand_as(w),
    "one column expanded": lambda w: w[:, :1].expand_as(w),
}


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 32), Block(32, 4)], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_respected(view, pattern):
    weight = VIEWS[view](make((65, 75)))
    assert_scores(block_score(weight, pattern), weight, pattern, "l1")


@pytest.mark.parametrize(
    ("norm", "bad"), [("l1", float("nan")), ("l1", float("-inf")), ("l2", float("inf"))]
)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_block_with_nan_or_inf_alone_is_not_finite(pattern, norm, bad):
    weight = make((300, 290))
    weight[299, 5] = bad
    finite = block_score(weight, pattern, norm=norm).isfinite()
    assert not finite[299 // pattern.rows, 5 // pattern.cols]
    assert finite.sum() == finite.numel() - 1


def test_sums_of_half_floats_do_not_overflow():
    weight = torch.full((64, 64), 65504.0, dtype=torch.float16, device=DEVICE)
    for norm, want in (("l1", 65504.0), ("l2", 65504.0**2)):
        scores = block_score(weight, Block(64, 64), norm=norm)
        torch.testing.assert_close(scores.item(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", [Block(4, 8), Block(256, 256)], ids=str)
def test_two_runs_agree_to_the_bit(pattern):
    weight = make((260, 520))
    assert torch.equal(block_score(weight, pattern), block_score(weight, pattern))


LOSSES = {
    "sum": lambda s: s.sum(),
    "transpose": lambda s: (s.T * torch.arange(s.shape[0], device=s.device)).sum(),
    "cat": lambda s: torch.cat([s, s], 1).square().sum(),
}


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_that_of_the_mean(dtype, loss, norm):
    for pattern in (Unstructured(), Block(8, 4), Block(64, 64)):
        for transposed in (False, True):
            weight = make((37, 51), dtype)
            weight[3, 4] = 0
            weight = weight.T.detach() if transposed else weight
            weight.requires_grad_()
            scores = block_score(weight, pattern, norm=norm)
            (got,) = torch.autograd.grad(LOSSES[loss](scores), weight)
            exact = weight.detach().double().requires_grad_()
            reference = block_score_reference(exact, pattern, squared=norm == "l2")
            (want,) = torch.autograd.grad(LOSSES[loss](reference), exact)
            assert got.dtype == dtype
            eps = max(torch.finfo(dtype).eps, 1e-6)
            torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=1e-7)


def test_second_derivatives_exist():
    weight = make((5, 6)).requires_grad_()
    (slope,) = torch.autograd.grad(
        block_score(weight, Block(2, 4), norm="l2").sum(), weight, create_graph=True
    )
    (curvature,) = torch.autograd.grad(slope.sum(), weight)
    assert curvature[0, 0].item() == 2 / 8
    assert curvature[4, 5].item() == 2 / 2


@pytest.mark.parametrize("shape", [(37, 51), (0, 4)], ids=str)
def test_opcheck(shape):
    for weight in (make(shape).requires_grad_(), make(shape).T):
        torch.library.opcheck(module._op, (weight, 8, 4, False))
        torch.library.opcheck(module._op, (weight, 8, 4, True))


def test_it_compiles_into_one_graph():
    def loss(weight):
        return block_score(weight * 2, Block(8, 4), norm="l2").sum()

    weight = make((37, 51)).requires_grad_()
    (want,) = torch.autograd.grad(loss(weight), weight)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(weight), weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_plain_torch_in_many_chunks(pattern, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 8 * 57 * 4)
    weight = make((127, 57)).cpu()
    for view in (weight, weight.T):
        scores = module._in_chunks(view, pattern.rows, pattern.cols, False)
        assert_scores(scores, view, pattern, "l1")


class Sizes(TorchDispatchMode):
    """Note the bytes of every storage that a torch function returns."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_torch_makes_no_copy_of_the_weight(dtype, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 2**12)
    weight = torch.ones(512, 512, dtype=dtype)
    for view in (weight, weight.T):
        with Sizes() as seen:
            scores = module._in_chunks(view, 8, 4, False)
        seen.sizes.pop(weight.data_ptr())
        assert max(seen.sizes.values()) <= scores.nbytes
        assert (scores == 1).all()


@pytest.mark.skipif(not ON_TRITON, reason="plain torch has no index type to force")
def test_the_int64_path_matches_the_int32_path(monkeypatch):
    for weight in (make((65, 300)), make((65, 300)).T):
        want = block_score(weight, Block(4, 8))
        with monkeypatch.context() as patch:
            patch.setattr(module, "list_index_type", lambda *_: tl.int64)
            assert torch.equal(block_score(weight, Block(4, 8)), want)


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (TypeError, {"weight": torch.ones(4, 4, dtype=torch.int32)}),
        (TypeError, {"weight": torch.ones(4, 4, dtype=torch.complex64)}),
        (ValueError, {"weight": torch.ones(4)}),
        (ValueError, {"weight": torch.ones(4, 4, 4)}),
        (ValueError, {"norm": "max"}),
        (ValueError, {"backend": "cuda"}),
    ],
    ids=str,
)
def test_bad_arguments_are_named(error, change):
    arguments = {"weight": torch.ones(4, 4), "pattern": Block(2, 2)} | change
    with pytest.raises(error, match=r"^block_score: (weight|norm|backend) must be .*got"):
        block_score(**arguments)


def test_triton_is_never_replaced_silently():
    if ON_TRITON:
        with pytest.raises(ValueError, match="float64"):
            block_score(make((4, 4), torch.float64), Block(2, 2), backend="triton")
        weight = make((4, 4))
        scores = block_score(weight, Block(2, 2), backend="triton")
        assert_scores(scores, weight, Block(2, 2), "l1")
    else:
        with pytest.raises(RuntimeError, match="backend='triton' needs"):
            block_score(make((4, 4)), Block(2, 2), backend="triton")


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("block", [(1, 2), (4, 4), (32, 32), (256, 256)], ids=str)
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, tl.bfloat16), (90, tl.bfloat16), (90, tl.float32), (100, tl.bfloat16)],
    ids=str,
)
def test_the_weight_is_read_once_and_16_bytes_at_a_time(arch, dtype, block):
    kernel = module._block_score_kernel
    pointers = {"table_ptr": "*i64", "score_ptr": "*fp32", "square_ptr": "*fp64"}
    wide_loads = []
    for segment in (0, 64):
        compiled = aot.compile_for(
            arch,
            kernel,
            {name: pointers.get(name, "i32") for name in kernel.arg_names},
            {
                "DTYPE": dtype,
                "ROWS": block[0],
                "COLS": block[1],
                "SQUARED": False,
                "SCORED": True,
                "SEGMENT": segment,
                "INDEX": tl.int32,
                "N": 256,
                **module.TILE,
            },
        )
        aot.assert_lean(compiled, arch, double=segment > 0)
        wide_loads.append(compiled.global_loads().count(16))
        # three programs of a multiprocessor's 65536 registers
        assert compiled.registers <= 168
        assert not compiled.has("ATOMG")
        assert not compiled.has("RED")
    # the norm is of what the scores have loaded
    assert 0 < wide_loads[1] <= wide_loads[0]


@pytest.fixture
def launches(monkeypatch):
    """Note the name of every kernel that is launched."""
    names = []
    names_of = {module: ["_block_score_kernel"]}
    names_of[exact_sum] = ["_exact_sum_kernel", "_inverse_norm_kernel"]
    for owner, name in ((owner, name) for owner, own in names_of.items() for name in own):
        kernel = getattr(owner, name)

        def noted(grid, kernel=kernel, name=name):
            names.append(name)
            return kernel[grid]

        monkeypatch.setattr(
            owner, name, type("Noted", (), {"__getitem__": lambda _, g, f=noted: f(g)})()
        )
    return names


def listed():
    """Weights of all kinds, and what each is as a plain matrix."""
    weights = [make(shape) for shape in SHAPES]
    weights += [view(make((65, 75))) for view in VIEWS.values()]
    weights += [make((40, 64), torch.float16), torch.zeros(33, 65, device=DEVICE)]
    return weights


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS[::3] if INTERPRET else PATTERNS, ids=str)
def test_a_list_has_the_scores_of_each(pattern, normed):
    weights = listed()
    found, inverse = block_scores(weights, pattern, normed=normed)
    for weight, scores in zip(weights, found, strict=True):
        if isinstance(pattern, Unstructured):
            assert scores is weight
        else:
            assert torch.equal(scores, block_score(weight, pattern))
            assert_scores(scores, weight, pattern, "l1")
    if not normed:
        assert inverse is None
        return
    exact = torch.stack([weight.double().norm() for weight in weights])
    want = exact.where(exact > 0, 1).reciprocal().float()
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse, want, rtol=1e-5, atol=0)
    assert torch.equal(block_scores(weights, pattern, normed=True)[1], inverse)
    for backend in ("auto", "torch"):
        _, got = block_scores(weights[:3], pattern, normed=True, backend=backend)
        torch.testing.assert_close(got, want[:3], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_neither_overflow_nor_vanish(dtype, pattern, backend):
    if INTERPRET and dtype == torch.bfloat16 and backend == "auto":
        pytest.skip("the interpreter's bfloat16 is unreliable")
    plain = make((9, 33))
    weights = [plain.clone(), plain * 1e-24, plain * 1e-36, plain * 1e22, plain * 1e37]
    weights[0][3, 5] = 2e19
    weights += [weight.T for weight in weights] + [torch.zeros_like(plain)]
    weights = [weight.to(dtype) for weight in weights]
    with np.errstate(all="ignore"):  # the interpreter's
        _, inverse = block_scores(weights, pattern, normed=True, backend=backend)
        _, again = block_scores(weights, pattern, normed=True, backend=backend)
    exact = torch.stack([weight.double().norm() for weight in weights])
    want = exact.where(exact > 0, 1).reciprocal().float()
    torch.testing.assert_close(inverse, want, rtol=1e-5, atol=0)
    assert torch.equal(again, inverse)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_norm_whose_inverse_float32_does_not_hold_is_inf(backend):
    weights = [torch.full((2, 3), 1e-40, device=DEVICE), torch.ones(2, 3, device=DEVICE)]
    with np.errstate(all="ignore"):  # the interpreter's
        _, inverse = block_scores(weights, Unstructured(), normed=True, backend=backend)
    assert inverse.isinf().tolist() == [True, False]


@pytest.mark.skipif(not ON_TRITON, reason="counts launches of the kernels")
def test_a_list_is_one_launch_and_three_for_the_norms(launches):
    weights = [make((33, 33 + i)) for i in range(9)]
    norms = [*["_exact_sum_kernel"] * 2, "_inverse_norm_kernel"]
    block_scores(weights, Block(4, 8), normed=True)
    assert launches == ["_block_score_kernel", *norms]
    launches.clear()
    # lines of 16 pieces of 64, and of 16 of 3, which are no segments of a tile
    block_scores([*weights, make((3, 1024)), make((3, 48))], Block(4, 8), normed=True)
    assert launches == ["_block_score_kernel"] * 4 + norms
    launches.clear()
    block_scores([*weights, weights[0].T, weights[1].half()], Block(4, 8), normed=False)
    assert launches == ["_block_score_kernel"] * 3


def test_what_is_in_a_list_is_checked():
    with pytest.raises(TypeError, match=r"^block_scores: weight must be of a float dtype, got"):
        block_scores(
            [torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int8)], Block(2, 2), normed=False
        )
    with pytest.raises(ValueError, match=r"^block_scores: weight must be on the others' .*got"):
        block_scores(
            [torch.ones(2, 2), torch.ones(2, 2, device="meta")], Block(2, 2), normed=False
        )
