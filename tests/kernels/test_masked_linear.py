import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from triton_sparsity.kernels.launch import INTERPRET
from triton_sparsity.kernels.mask import pack, word_mask
from triton_sparsity.kernels.masked_linear import masked_linear, masked_linear_reference
from triton_sparsity.kernels.masked_weight import apply_mask_reference
from triton_sparsity.kernels.pattern import Block, Unstructured, grid_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = INTERPRET or DEVICE == "cuda"
PATTERNS = [Unstructured(), Block(4, 8), Block(16, 16)]
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16, torch.float64])


def make(pattern, shape=(19, 37), tokens=(5,), dtype=torch.float32):
    g = torch.Generator().manual_seed(shape[0])
    kept = torch.rand(grid_shape(pattern, shape), generator=g) < 0.5
    mask = (pack(kept, backend="torch") if isinstance(pattern, Unstructured) else kept).to(DEVICE)

    def leaf(*size):
        return torch.randn(*size, generator=g).to(DEVICE, dtype).requires_grad_()

    return leaf(*tokens, shape[1]), leaf(*shape), mask, leaf(shape[0])


def lend(w, remembers):
    """Memory for the masked weight, with rubbish in it."""
    return {"memory": torch.full_like(w.detach(), torch.nan)} if remembers else {}


remembering = pytest.mark.parametrize("remembers", [False, True], ids=["", "with memory"])


def gradients(function, x, w, mask, b, pattern, grad, **options):
    y = function(x, w, mask, b, pattern=pattern, **options)
    return y, *torch.autograd.grad(y, (x, w, b), grad.to(y.dtype))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(5,), (), (0,), (2, 3)], ids=str)
@remembering
def test_output_and_gradients_are_those_of_the_reference(pattern, dtype, tokens, remembers):
    x, w, mask, b = make(pattern, tokens=tokens, dtype=dtype)
    grad = torch.randn(*tokens, 19, device=DEVICE)
    actual = gradients(masked_linear, x, w, mask, b, pattern, grad, **lend(w, remembers))
    exact = gradients(
        masked_linear_reference,
        *(t.detach().double().requires_grad_() for t in (x, w)),
        mask,
        b.detach().double().requires_grad_(),
        pattern,
        grad.to(dtype).double(),
    )
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype
        tolerance = (
            4 * torch.finfo(dtype).eps * max(1.0, e.abs().amax().item() if e.numel() else 0)
        )
        torch.testing.assert_close(a.double(), e, atol=8 * tolerance, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@remembering
def test_nothing_behind_the_mask_comes_through(pattern, remembers):
    x, w, mask, b = make(pattern)
    clean = gradients(masked_linear, x, w, mask, b, pattern, torch.ones(5, 19, device=DEVICE))
    pruned = clean[2] == 0
    assert 0 < pruned.sum() < pruned.numel()
    poisoned = w.detach().masked_fill(pruned, torch.nan).requires_grad_()
    grad = torch.ones(5, 19, device=DEVICE)
    lent = lend(w, remembers)
    got = gradients(masked_linear, x, poisoned, mask, b, pattern, grad, **lent)
    assert all(map(torch.equal, got, clean))
    assert not got[2][pruned].any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@remembering
def test_a_dense_weight_gradient_is_dense(pattern, remembers):
    x, w, mask, b = make(pattern)
    grad = torch.randn(5, 19, device=DEVICE)
    options = {"dense_weight_grad": True} | lend(w, remembers)
    got = gradients(masked_linear, x, w, mask, b, pattern, grad, **options)
    torch.testing.assert_close(got[2], grad.T @ x)


@pytest.mark.skipif(DEVICE == "cuda", reason="words are for a CPU")
def test_words_are_as_good_as_a_compact_mask():
    for pattern in PATTERNS:
        x, w, mask, b = make(pattern)
        words = word_mask(mask, pattern, w.shape, w.dtype)
        grad = torch.randn(5, 19)
        want = gradients(masked_linear, x, w, mask, b, pattern, grad)
        got = gradients(masked_linear, x, w, words, b, pattern, grad)
        assert all(map(torch.equal, got, want))


@pytest.mark.skipif(INTERPRET, reason="does not concern the Triton kernels")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@remembering
def test_gradients_of_second_order(pattern, remembers):
    x, w, mask, b = make(pattern, dtype=torch.float64)

    def function(x, w, b):
        return masked_linear(x, w, mask, b, pattern=pattern, **lend(w, remembers))

    torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
    torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


@pytest.mark.skipif(TRITON, reason="of plain torch")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_memory_has_the_masked_weight_of_the_last_forward_pass(pattern):
    x, w, mask, b = make(pattern)
    lent = lend(w, True)
    grad = torch.randn(5, 19)
    want = gradients(masked_linear, x, w, mask, b, pattern, grad)
    first = masked_linear(x, w, mask, b, pattern=pattern, **lent)
    second = masked_linear(2 * x, w, mask, b, pattern=pattern, **lent)
    assert torch.equal(lent["memory"], apply_mask_reference(w, mask, pattern))
    # two passes before the first backward, as of a module that is used twice
    (grad_second,) = torch.autograd.grad(second, x, grad)
    (grad_first,) = torch.autograd.grad(first, x, grad)
    assert torch.equal(grad_first, want[1])
    assert torch.equal(grad_second, 2 * want[1])


@pytest.mark.skipif(TRITON, reason="of plain torch")
def test_a_weight_that_changes_before_the_backward_pass_is_an_error():
    x, w, mask, b = make(Unstructured())
    y = masked_linear(x, w, mask, b, pattern=Unstructured(), **lend(w, True))
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.skipif(TRITON, reason="of plain torch")
@pytest.mark.parametrize("memory", ["transposed", "another dtype", "another shape"])
def test_memory_that_does_not_fit_is_left_alone(memory):
    x, w, mask, b = make(Unstructured(), shape=(19, 19))
    like = {
        "transposed": torch.zeros(19, 19).T,
        "another dtype": torch.zeros(19, 19, dtype=torch.float64),
        "another shape": torch.zeros(19, 20),
    }[memory]
    y = masked_linear(x, w, mask, b, pattern=Unstructured(), memory=like)
    torch.testing.assert_close(y, masked_linear_reference(x, w, mask, b, Unstructured()))
    assert not like.any()


def test_no_masked_weight_waits_for_the_backward_pass():
    x, w, mask, b = make(Unstructured())
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        masked_linear(x, w, mask, b, pattern=Unstructured())
    assert {t.data_ptr() for t in saved} <= {x.data_ptr(), w.data_ptr(), mask.data_ptr()}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_opcheck(pattern):
    x, w, mask, b = make(pattern)
    ops, sides = torch.ops.triton_sparsity, (pattern.rows, pattern.cols)
    grad = torch.randn(5, 19, device=DEVICE, requires_grad=True)
    check = torch.library.opcheck
    check(ops.masked_linear.default, (x, w, b, mask, *sides, False, "auto"))
    check(ops.masked_linear_dgrad.default, (grad, w, mask, *sides, "auto"))
    check(ops.masked_linear_wgrad.default, (grad, x, w.detach(), mask, *sides, "auto"))


@pytest.mark.skipif(INTERPRET, reason="autocast on a CPU is bfloat16's")
def test_autocast_casts_as_linear_does():
    for pattern in PATTERNS:
        x, w, mask, b = make(pattern)
        forms = [mask] if DEVICE == "cuda" else [mask, word_mask(mask, pattern, w.shape, w.dtype)]
        for form in forms:
            with torch.autocast(DEVICE, torch.bfloat16):
                y = masked_linear(x, w, form, b, pattern=pattern)
                like = masked_linear_reference(x, w, mask, b, pattern)
            torch.testing.assert_close(y, like)
            got = torch.autograd.grad(y.float().sum(), (x, w, b))
            assert all(g.dtype == torch.float32 for g in got)


def test_compiles_in_one_graph_and_masks_change_without_another():
    x, w, mask, b = make(Block(4, 8))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(masked_linear, fullgraph=True, backend=backend)
    grad = torch.randn(5, 19, device=DEVICE)
    for _ in range(2):
        got = gradients(compiled, x, w, mask, b, Block(4, 8), grad)
        want = gradients(masked_linear, x, w, mask, b, Block(4, 8), grad)
        for a, e in zip(got, want, strict=True):
            torch.testing.assert_close(a, e)
        mask.logical_not_()
    assert len(graphs) == 1


def test_flops_are_those_of_the_dense_products():
    x, w, mask, b = make(Unstructured())
    with FlopCounterMode(display=False) as counter:
        masked_linear(x, w, mask, b, pattern=Unstructured()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 19 * 37


def test_features_must_be_the_weights():
    x, w, mask, b = make(Unstructured())
    with pytest.raises(ValueError, match="masked_linear: x must have 37 features"):
        masked_linear(x[:, :36], w, mask, b, pattern=Unstructured())
