import re
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import oracle
from triton_sparsity.kernels import block_sparse_product as product_module
from triton_sparsity.kernels import block_sparse_wgrad as wgrad_module
from triton_sparsity.kernels import schedule, tiles
from triton_sparsity.kernels.block_sparse_linear import (
    block_sparse_linear,
    block_sparse_linear_reference,
)
from triton_sparsity.kernels.dispatch import Paths, as_tensor
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.mask import expand_mask
from triton_sparsity.kernels.masked_weight import apply_mask
from triton_sparsity.kernels.pattern import Block, Unstructured, grid_shape
from triton_sparsity.kernels.topology import Topology, block_topology

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = INTERPRET or DEVICE == "cuda"
DTYPES = [torch.float32, torch.float16]
if not INTERPRET:
    DTYPES += [torch.bfloat16, torch.float64]
triton_only = pytest.mark.skipif(not TRITON, reason="concerns the Triton kernels")
not_interpreted = pytest.mark.skipif(INTERPRET, reason="does not concern the Triton kernels")

# tokens, R, C, rows, cols: edge blocks on both sides, rectangles, tall and wide weights,
# operands that the copy engine takes (multiples of 16 bytes) and others
CASES = [
    (37, 128, 64, 32, 32),
    (5, 130, 70, 64, 64),
    (1, 65, 40, 64, 16),
    (37, 40, 136, 16, 128),
    (17, 128, 264, 64, 128),
    (3, 264, 80, 256, 64),
    (67, 48, 264, 16, 256),
]


def random_mask(grid, kind="some"):
    g = torch.Generator().manual_seed(grid[0] * 31 + grid[1])
    mask = torch.rand(grid, generator=g) < {"all": 2, "none": -1}.get(kind, 0.5)
    if kind == "empty lines":
        mask[:] = True
        mask[0], mask[:, -1] = False, False
    if kind == "skewed":
        mask = torch.rand(grid, generator=g) < torch.linspace(0.95, 0.05, grid[0])[:, None]
    return mask.to(DEVICE)


def make(tokens, R, C, rows, cols, dtype=torch.float32, kind="some", bias=True, by_k=False):
    g = torch.Generator().manual_seed(tokens * 7919 + R * 31 + C)

    def leaf(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype).requires_grad_()

    x, w, b = leaf(tokens, C), leaf(R, C), leaf(R) if bias else None
    if by_k:
        w = w.detach().T.contiguous().T.requires_grad_()
    pattern = Block(rows, cols)
    return x, w, random_mask(grid_shape(pattern, (R, C)), kind), b, pattern


def pruned_elements(mask, pattern, weight):
    return ~torch.from_numpy(
        oracle.expand(mask.cpu().numpy(), pattern.rows, pattern.cols, weight.shape)
    ).to(DEVICE)


def filled(weight, where, value):
    """Return ``weight``, laid out as it is, with ``value`` in some places."""
    return weight.detach().masked_fill(where, value).requires_grad_()


def doubled(tensor):
    return None if tensor is None else tensor.detach().double().requires_grad_()


def run(function, x, w, mask, b, pattern, grad, **options):
    """Return the output and the gradients of x, w and b; gradients go through the dtype once."""
    if function is block_sparse_linear:
        y = function(x, w, mask, b, pattern=pattern, **options)
    else:
        y = function(x, w, mask, b, pattern)
    leaves = [t for t in (x, w, b) if t is not None]
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def assert_as_good_as_eager(actual, eager, exact):
    """Allow the kernel no more error against float64 than eager plus one rounding step."""
    assert actual.shape == exact.shape
    if actual.numel() == 0:
        return
    step = 4 * torch.finfo(actual.dtype).eps * exact.abs().amax()
    budget = (eager.double() - exact).abs().amax() + step
    assert (actual.double() - exact).abs().amax() <= budget


def assert_all_agree(x, w, mask, b, pattern, grad=None, **options):
    g = torch.Generator().manual_seed(5)
    if grad is None:
        grad = torch.randn(*x.shape[:-1], w.shape[0], generator=g).to(DEVICE, x.dtype)
    actual = run(block_sparse_linear, x, w, mask, b, pattern, grad, **options)
    eager = run(block_sparse_linear_reference, x, w, mask, b, pattern, grad)
    wide = doubled(x), doubled(w), mask, doubled(b), pattern, grad.double()
    exact = run(block_sparse_linear_reference, *wide)
    for one in zip(actual, eager, exact, strict=True):
        assert_as_good_as_eager(*one)
    return actual


@contextmanager
def poisoned_memory():
    """Fill what is allocated and not written with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("case", "dtype"),
    # float32 of all cases, each other dtype of every second
    [
        (case, dtype)
        for i, case in enumerate(CASES)
        for j, dtype in enumerate(DTYPES)
        if j == 0 or (i + j) % 2
    ],
    ids=str,
)
def test_output_and_gradients_are_as_good_as_eager(case, dtype):
    with poisoned_memory():
        assert_all_agree(*make(*case, dtype=dtype))


@pytest.mark.parametrize("case", CASES[1:6:2], ids=str)
def test_a_weight_stored_transposed_is_read_as_it_lies(case):
    x, w, mask, b, pattern = make(*case, dtype=torch.float16, by_k=True)
    with poisoned_memory():
        _, _, grad_w, _ = assert_all_agree(x, w, mask, b, pattern)
    assert grad_w.stride() == w.stride()


@pytest.mark.parametrize(
    ("kind", "sides"),
    [
        *(("all", (64, 128)), ("none", (32, 32))),
        *(("empty lines", (32, 32)), ("skewed", (64, 128)), ("empty lines", (64, 128))),
    ],
    ids=str,
)
def test_any_mask(kind, sides):
    with poisoned_memory():
        assert_all_agree(*make(37, 160, 256, *sides, dtype=torch.float16, kind=kind))


def test_without_bias_no_blocks_mean_zeros():
    x, w, mask, b, pattern = make(5, 64, 96, 32, 32, kind="none", bias=False)
    y, grad_x, grad_w = run(block_sparse_linear, x, w, mask, b, pattern, torch.ones(5, 64))
    assert not y.any()
    assert not grad_x.any()
    assert not grad_w.any()


@pytest.mark.parametrize("tokens", [0, 1, 2, 67])
def test_any_number_of_tokens(tokens):
    with poisoned_memory():
        *_, grad_w, grad_b = assert_all_agree(*make(tokens, 64, 48, 16, 16, dtype=torch.float16))
    if tokens == 0:
        assert not grad_w.any()
        assert not grad_b.any()


@pytest.mark.parametrize("shape", [(64, 0), (0, 64)], ids=str)
def test_a_weight_without_elements(shape):
    x, w, mask, b, pattern = make(3, *shape, 32, 32)
    y, grad_x, *_ = run(block_sparse_linear, x, w, mask, b, pattern, torch.ones(3, shape[0]))
    assert torch.equal(y, b.expand(3, -1))
    assert not grad_x.any()


@pytest.mark.parametrize("leading", [(), (7,), (2, 3, 5), (4, 0)], ids=str)
def test_any_leading_dimensions(leading):
    _, w, mask, b, pattern = make(1, 64, 48, 16, 16)
    x = torch.randn(*leading, 48, device=DEVICE, requires_grad=True)
    y, grad_x, *_ = assert_all_agree(x, w, mask, b, pattern)
    assert y.shape == (*leading, 64)
    assert grad_x.shape == x.shape


VIEWS = {
    "transposed": lambda t: t.T.contiguous().T,
    "sliced": lambda t: torch.cat([t, t], 1)[:, 3 : 3 + t.shape[1]],
    "sliced, aligned": lambda t: torch.cat([t, t], 1)[:, 16 : 16 + t.shape[1]],
    "strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape[0], -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("operand", ["x", "weight"])
def test_any_strides(view, operand):
    x, w, mask, b, pattern = make(19, 96, 80, 32, 16, dtype=torch.float16)
    if operand == "x":
        x = VIEWS[view](x.detach()).requires_grad_()
    else:
        w = VIEWS[view](w.detach()).requires_grad_()
    assert_all_agree(x, w, mask, b, pattern)


@pytest.mark.parametrize("stride", [0, 2])
@pytest.mark.parametrize("C", [80, 0])
def test_a_bias_of_any_stride(C, stride):
    x, w, mask, _, pattern = make(19, 96, C, 32, 16, dtype=torch.float16)
    b = torch.randn(192, device=DEVICE).half()
    b = (b[::2] if stride else b[:1].expand(96)).requires_grad_()
    assert_all_agree(x, w, mask, b, pattern)


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: y.sum(),
        lambda y: (y.T * torch.arange(float(y.shape[0]), device=y.device)).sum(),
        lambda y: torch.cat([y, y], 1).square().sum(),
        lambda y: y[:, 1:].square().sum(),
    ],
    ids=["sum", "transpose", "cat", "slice"],
)
def test_gradients_of_any_layout(loss):
    x, w, mask, b, pattern = make(19, 96, 80, 32, 16)
    got = torch.autograd.grad(loss(block_sparse_linear(x, w, mask, b, pattern=pattern)), (x, w, b))
    wide = doubled(x), doubled(w), doubled(b)
    y = block_sparse_linear_reference(*wide[:2], mask, wide[2], pattern)
    for a, exact in zip(got, torch.autograd.grad(loss(y), wide), strict=True):
        torch.testing.assert_close(a.double(), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("case", CASES[1:5], ids=str)
def test_pruned_weights_are_never_read_and_their_gradient_is_zero(case):
    x, w, mask, b, pattern = make(*case, dtype=torch.float16)
    pruned = pruned_elements(mask, pattern, w)
    poisoned = filled(w, pruned, torch.nan)
    grad = torch.randn(x.shape[0], w.shape[0], device=DEVICE).half()
    want = run(block_sparse_linear, x, w, mask, b, pattern, grad)
    with poisoned_memory():
        got = run(block_sparse_linear, x, poisoned, mask, b, pattern, grad)
    assert all(map(torch.equal, got, want))
    assert not got[2][pruned].any()
    assert not torch.signbit(got[2][pruned]).any()


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_each_gradient_alone(wanted):
    x, w, mask, b, pattern = make(19, 96, 80, 32, 16, dtype=torch.float16)
    leaves = [x, w, b]
    all_grads = torch.autograd.grad(
        block_sparse_linear(x, w, mask, b, pattern=pattern).sum(), leaves
    )
    frozen = [t if i == wanted else t.detach() for i, t in enumerate(leaves)]
    y = block_sparse_linear(frozen[0], frozen[1], mask, frozen[2], pattern=pattern)
    (grad,) = torch.autograd.grad(y.sum(), frozen[wanted])
    assert torch.equal(grad, all_grads[wanted])


@pytest.mark.parametrize("case", CASES[4:6], ids=str)
def test_two_runs_give_the_same_bits(case):
    args = make(*case, dtype=torch.float16)
    grad = torch.randn(case[0], case[1], device=DEVICE)
    first, second = (run(block_sparse_linear, *args, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_topology_is_as_good_as_its_mask_and_follows_updates():
    x, w, mask, b, pattern = make(19, 96, 80, 32, 16, dtype=torch.float16)
    topology = block_topology(mask, pattern)
    for new in (mask, ~mask):
        block_topology(new, pattern, out=topology)
        got = block_sparse_linear(x, w, topology, b, pattern=pattern)
        assert torch.equal(got, block_sparse_linear(x, w, new, b, pattern=pattern))


def test_a_mask_update_between_forward_and_backward_is_noticed():
    x, w, mask, b, pattern = make(19, 96, 80, 32, 16, dtype=torch.float16)
    topology = block_topology(mask, pattern)
    y = block_sparse_linear(x, w, topology, b, pattern=pattern)
    block_topology(~mask, pattern, out=topology)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@triton_only
@pytest.mark.parametrize("processors", [1, 2, 64])
def test_any_number_of_programs(processors, monkeypatch):
    # 1: a program walks all tiles; 64: more programs than tiles, and the tile for few tokens
    monkeypatch.setattr(tiles, "INTERPRETED_PROCESSORS", processors)
    assert_all_agree(*make(70, 192, 128, 64, 64, dtype=torch.float16))


@triton_only
@pytest.mark.parametrize("panel", [1, 3], ids=["panels of one tile", "of three"])
def test_panels_cover_every_tile(panel, monkeypatch):
    plan = schedule.Plan(tiles.Tile(64, 32, 16, 4, 3, 2), panel, 4, 1)
    monkeypatch.setattr(product_module, "plan_product", lambda *_: plan)
    with poisoned_memory():
        assert_all_agree(*make(260, 96, 64, 32, 32, kind="skewed"))


@triton_only
@pytest.mark.parametrize(
    ("dtype", "programs", "end_steps", "kind"),
    [
        (torch.float16, 1, 1, "skewed"),
        (torch.float16, 7, 1, "empty lines"),
        (torch.float16, 40, 3, "empty lines"),
        (torch.float16, 45, 2, "skewed"),
        (torch.float32, 7, 2, "skewed"),
    ],
    ids=str,
)
def test_a_product_in_equal_shares_is_whole(dtype, programs, end_steps, kind, monkeypatch):
    # shares that hold tiles, parts of one, parts of several, and nothing
    shape = (64, 32, 16, 4, 3, 2) if dtype == torch.float32 else (64, 32, 32, 4, 2, 1)
    plan = schedule.Plan(tiles.Tile(*shape), 3, programs, 0, end_steps)
    monkeypatch.setattr(product_module, "plan_product", lambda *_: plan)
    with poisoned_memory():
        assert_all_agree(*make(130, 96, 128, 32, 32, dtype=dtype, kind=kind))


@triton_only
def test_equal_shares_leave_no_flag_up(monkeypatch):
    """So that the next launch gives the same."""
    plan = schedule.Plan(tiles.Tile(64, 32, 32, 4, 2, 1), 3, 7, 0, 1)
    monkeypatch.setattr(product_module, "plan_product", lambda *_: plan)
    x, w, mask, b, pattern = make(130, 96, 128, 32, 32, dtype=torch.float16)
    topology = block_topology(mask, pattern)
    first, second = (block_sparse_linear(x, w, topology, b, pattern=pattern) for _ in range(2))
    assert torch.equal(first, second)
    assert not product_module._flags(x.device, 7).any()


@triton_only
@pytest.mark.parametrize("case", [(70, 256, 96, 64, 32), (70, 128, 512, 128, 128)], ids=str)
@pytest.mark.parametrize("processors", [5, 16])
def test_a_weight_gradient_in_parts_is_whole(case, processors, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED_PROCESSORS", processors)
    monkeypatch.setattr(wgrad_module, "MIN_STEPS", 1)
    sums = []
    kernel = wgrad_module._block_sparse_wgrad_sum_kernel

    class Spy:
        def __getitem__(self, grid):
            sums.append(grid)
            return kernel[grid]

    monkeypatch.setattr(wgrad_module, "_block_sparse_wgrad_sum_kernel", Spy())
    with poisoned_memory():
        assert_all_agree(*make(*case, dtype=torch.float16))
    assert sums


@triton_only
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_offsets_in_int64_change_no_bit(case, monkeypatch):
    x, w, mask, b, pattern = make(*case)
    grad = torch.randn(case[0], case[1], device=DEVICE)
    want = run(block_sparse_linear, x, w, mask, b, pattern, grad)
    monkeypatch.setattr(product_module, "index_type", lambda *_: tl.int64)
    monkeypatch.setattr(wgrad_module, "index_type", lambda *_: tl.int64)
    got = run(block_sparse_linear, x, w, mask, b, pattern, grad)
    assert all(map(torch.equal, got, want))


@triton_only
def test_operands_off_the_copy_engine_give_the_same(monkeypatch):
    args = make(37, 256, 128, 128, 64, dtype=torch.float16)
    grad = torch.randn(37, 256, device=DEVICE)
    bulk = run(block_sparse_linear, *args, grad)
    for module in (product_module, wgrad_module):
        monkeypatch.setattr(module, "bulk_copies", lambda *_: False)
    loads = run(block_sparse_linear, *args, grad)
    for a, b in zip(bulk, loads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-3)


@triton_only
def test_a_measured_tile_is_used(monkeypatch):
    args = make(37, 128, 64, 32, 32, dtype=torch.float16)
    seen = []
    descriptor = tiles.descriptor

    def spy(matrix, rows, cols):
        seen.append((rows, cols))
        return descriptor(matrix, rows, cols)

    monkeypatch.setattr(product_module, "descriptor", spy)
    key = "forward", (128, 64), args[4], torch.float16
    monkeypatch.setitem(tiles.measured, key, tiles.Tile(64, 16, 16, 4, 2, 1))
    assert_all_agree(*args)
    assert seen[:3] == [(64, 16), (16, 16), (64, 16)]


SIDES = [16, 32, 64, 128, 256]
HOPPER = tiles.Device((9, 0), 132, 228 * 1024)
AMPERE = tiles.Device((8, 6), 84, 100 * 1024)


@pytest.mark.parametrize("device", [HOPPER, AMPERE], ids=["sm_90", "sm_86"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_divide_their_blocks(dtype, precision, device):
    for n in SIDES:
        for k in SIDES:
            for bulk in (True, False):
                options = {"precision": precision, "bulk": bulk}
                for tile in tiles.linear_tiles(n, k, dtype, device, **options):
                    assert n % tile.n == k % tile.k == 0
                    assert tile.stages >= 2
                tile = tiles.wgrad_tile(n, k, dtype, device, **options)
                assert n % tile.m == 0
                assert tile.stages >= 2


@pytest.mark.parametrize(
    ("setting", "want"), [("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")]
)
def test_float32_follows_the_setting_of_torch(setting, want):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting
        assert tiles.dot_precision(torch.float32) == want
        assert tiles.dot_precision(torch.bfloat16) == "tf32"
    finally:
        matmul.fp32_precision = before


PATHS = [
    Paths(True, True, True),
    Paths(False, False, False),
    Paths(True, False, True),
    Paths(False, True, False),
]


@pytest.mark.parametrize(
    ("paths", "case"),
    # all of one case; of each other case two, of which one or the other skips blocks
    [
        *((paths, CASES[0]) for paths in PATHS),
        *((paths, CASES[2]) for paths in PATHS[::3]),
        *((paths, CASES[4]) for paths in PATHS[2:]),
        *((paths, CASES[6]) for paths in PATHS[::2]),
    ],
    ids=str,
)
def test_every_path_gives_the_same_where_pruned_blocks_are_zero(paths, case):
    x, w, mask, b, pattern = make(*case, by_k=case[0] == 37)
    pruned = pruned_elements(mask, pattern, w)
    w = filled(w, pruned, 0)
    grad = torch.randn(case[0], case[1], device=DEVICE)
    given = x, w, mask, b, pattern, grad
    wide = doubled(x), doubled(w), mask, doubled(b), pattern, grad.double()
    with poisoned_memory():
        actual = run(block_sparse_linear, *given, paths=as_tensor(paths))
    eager = run(block_sparse_linear_reference, *given)
    exact = run(block_sparse_linear_reference, *wide)
    assert actual[2].stride() == w.stride()
    if paths.wgrad:
        assert not actual[2][pruned].any()
    else:
        # whole: a plain product's
        for found in (eager, exact):
            found[2].copy_(grad.to(found[2].dtype).T @ x.detach().to(found[2].dtype))
    for one in zip(actual, eager, exact, strict=True):
        assert_as_good_as_eager(*one)


@pytest.mark.parametrize("paths", [None, *PATHS], ids=str)
@pytest.mark.parametrize("kind", ["some", "empty lines"])
def test_dense_products_read_the_weight_as_it_is_and_sparse_ones_skip(paths, kind):
    x, w, mask, b, pattern = make(37, 128, 64, 32, 32, kind=kind)
    pruned = pruned_elements(mask, pattern, w)
    flags = None if paths is None else as_tensor(paths)
    y, grad_x, grad_w, _ = run(
        block_sparse_linear, x, filled(w, pruned, torch.nan), mask, b, pattern,
        torch.ones(37, 128, device=DEVICE), paths=flags,
    )  # fmt: skip
    skips = paths or Paths(True, True, True)
    assert torch.equal(y.isnan().all(0), pruned.any(1) & (not skips.forward))
    assert torch.equal(grad_x.isnan().all(0), pruned.any(0) & (not skips.dgrad))
    assert not grad_w.isnan().any()
    assert grad_w[pruned].any() != skips.wgrad


@pytest.mark.parametrize("paths", [None, *PATHS], ids=str)
def test_nothing_but_the_operands_waits_for_the_backward_pass(paths):
    x, w, mask, b, pattern = make(37, 128, 64, 32, 32)
    topology = block_topology(mask, pattern)
    saved = []
    flags = None if paths is None else as_tensor(paths)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block_sparse_linear(x, w, topology, b, pattern=pattern, paths=flags)
    known = [x, w, *topology] + ([] if flags is None else [flags])
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in known}


@not_interpreted
@pytest.mark.parametrize("paths", [None, *PATHS], ids=str)
def test_gradients_of_any_order(paths):
    x, w, mask, b, pattern = make(3, 33, 20, 16, 16, dtype=torch.float64)

    def function(x, w, b):
        # masked, so that pruned blocks are zero, and what is whole of their gradient goes nowhere
        w = apply_mask(w, mask, pattern)
        flags = None if paths is None else as_tensor(paths)
        return block_sparse_linear(x, w, mask, b, pattern=pattern, paths=flags, backend="torch")

    # one column of the Jacobian, not all: 33 x 20 inputs
    torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
    torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


@not_interpreted
def test_a_whole_weight_gradient_has_a_whole_derivative():
    x, w, mask, _, pattern = make(3, 33, 20, 16, 16, dtype=torch.float64)
    w = filled(w, pruned_elements(mask, pattern, w), 0)
    paths = as_tensor(Paths(True, True, False))

    def weight_grad(x, incoming):
        y = block_sparse_linear(x, w, mask, pattern=pattern, paths=paths, backend="torch")
        return torch.autograd.grad(y, w, incoming, create_graph=True)[0]

    incoming = torch.randn(3, 33, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(weight_grad, (x, incoming), fast_mode=True)


def test_eager_mode_needs_no_operator_and_a_mode_sees_one():
    x, w, mask, b, pattern = make(5, 64, 64, 32, 32)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    y = block_sparse_linear(x, w, mask, b, pattern=pattern)
    product = y.grad_fn.next_functions[0][0]  # before the view
    assert type(product).__name__ == "_LinearBackward"
    with Mode():
        same = block_sparse_linear(x, w, mask, b, pattern=pattern)
        same.sum().backward()
    assert torch.equal(same, y)
    for name in ("", "_dgrad", "_wgrad"):
        assert f"triton_sparsity.block_sparse_linear{name}.default" in seen


@pytest.mark.parametrize(
    ("by_k", "paths"),
    [(False, None), (True, Paths(True, False, True))],
    ids=["row-major", "column-major, of several paths"],
)
def test_opcheck(by_k, paths):
    x, w, mask, b, pattern = make(5, 40, 70, 32, 16, by_k=by_k)
    lists = list(block_topology(mask, pattern))
    ops, check = torch.ops.triton_sparsity, torch.library.opcheck
    grad = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    rest = lists, None if paths is None else as_tensor(paths), pattern.rows, pattern.cols
    check(ops.block_sparse_linear.default, (x, w, b, *rest, TRITON))
    check(ops.block_sparse_linear_dgrad.default, (grad, w, *rest, TRITON))
    check(ops.block_sparse_linear_wgrad.default, (grad, x, w.detach(), *rest, TRITON))


def test_compiles_in_one_graph_and_masks_and_paths_change_without_another():
    x, w, mask, b, pattern = make(5, 40, 70, 32, 16)
    topology = block_topology(mask, pattern)
    paths = as_tensor(PATHS[0])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def loss(x, w, b, topology, paths):
        y = block_sparse_linear(x, w, topology, b, pattern=pattern, paths=paths)
        return y.square().sum()

    original = w.detach().clone()
    for new, way in ((mask, PATHS[0]), (~mask, PATHS[1]), (mask, PATHS[3])):
        block_topology(new, pattern, out=topology)
        paths.copy_(as_tensor(way))
        with torch.no_grad():
            w.copy_(apply_mask(original, new, pattern))
        got = torch.autograd.grad(loss(x, w, b, topology, paths), (x, w, b))
        y = block_sparse_linear(x, w, new, b, pattern=pattern, paths=paths)
        want = torch.autograd.grad(y.square().sum(), (x, w, b))
        for a, e in zip(got, want, strict=True):
            torch.testing.assert_close(a, e)
    assert len(graphs) == 1


@pytest.mark.parametrize("suffix", ["", "_dgrad", "_wgrad"])
def test_the_compiler_captures_no_operator_whose_paths_are_read_on_the_host(suffix):
    operator = getattr(torch.ops.triton_sparsity, f"block_sparse_linear{suffix}").default
    assert torch.Tag.cudagraph_unsafe in operator.tags


def test_flops_are_those_of_the_kept_weights():
    x, w, mask, b, pattern = make(5, 40, 70, 32, 16)
    kept = ~pruned_elements(mask, pattern, w)
    with FlopCounterMode(display=False) as counter:
        block_sparse_linear(x, w, mask, b, pattern=pattern).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * int(kept.sum())


@pytest.mark.skipif(INTERPRET, reason="autocast on a CPU is bfloat16's")
def test_autocast_casts_as_linear_does():
    x, w, mask, b, pattern = make(5, 64, 96, 32, 32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = block_sparse_linear(x, w, mask, b, pattern=pattern)
        like = torch.nn.functional.linear(x, w, b)
    assert y.dtype == like.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), (x, w, b))
    assert all(g.dtype == torch.float32 for g in grads)
    wide = x.double(), w.double(), mask, b.double(), pattern
    torch.testing.assert_close(
        y.double(), block_sparse_linear_reference(*wide), atol=0.2, rtol=0.05
    )


def bad_arguments():
    x, w, mask, b, pattern = make(3, 64, 96, 32, 32)
    topology = block_topology(mask, pattern)
    wrong = block_topology(mask[:1], pattern)
    return {
        "x": [
            ((x[:, :95], w, mask, b), "x must have 96 features"),
            ((x.half(), w, mask, b), "x must have weight's"),
            ((x.to("meta"), w, mask, b), "x must be on"),
        ],
        "weight": [
            ((x, w[0], mask, b), "weight must be a matrix"),
            ((x.long(), w.long(), mask, None), "weight must be a float"),
        ],
        "bias": [
            ((x, w, mask, b[:1]), "bias must have shape"),
            ((x, w, mask, b.half()), "bias must have weight's"),
            ((x, w, mask, b.to("meta")), "bias must be on"),
        ],
        "mask": [
            ((x, w, mask.T, b), "mask must be bool"),
            ((x, w, mask.int(), b), "mask must be bool"),
            ((x, w, mask.to("meta"), b), "mask must be on"),
            ((x, w, wrong, b), "topology must be of"),
            ((x, w, Topology(*(t.to("meta") for t in topology)), b), "mask must be on"),
        ],
        "paths": [
            ((x, w, mask, b, torch.ones(2, dtype=torch.bool)), "paths must be bool"),
            ((x, w, mask, b, torch.ones(3)), "paths must be bool"),
        ],
    }


@pytest.mark.parametrize("argument", ["x", "weight", "bias", "mask", "paths"])
def test_bad_inputs_name_the_argument(argument):
    for (x, w, mask, b, *paths), message in bad_arguments()[argument]:
        with pytest.raises(ValueError, match=f"^block_sparse_linear: {re.escape(message)}"):
            block_sparse_linear(
                x, w, mask, b, pattern=Block(32, 32), paths=paths[0] if paths else None
            )


@pytest.mark.parametrize("pattern", [Unstructured(), Block(8, 32), Block(32, 1)], ids=str)
def test_small_blocks_are_refused(pattern):
    x, w, mask, b, _ = make(3, 64, 96, 32, 32)
    with pytest.raises(ValueError, match=r"^block_sparse_linear: pattern must be blocks"):
        block_sparse_linear(x, w, mask, b, pattern=pattern)


@triton_only
def test_triton_does_not_take_float64():
    x, w, mask, b, pattern = make(3, 64, 96, 32, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="weight must not be float64"):
        block_sparse_linear(x, w, mask, b, pattern=pattern, backend="triton")


@pytest.mark.skipif(TRITON, reason="needs a machine where Triton cannot run")
def test_triton_is_refused_where_it_cannot_run():
    x, w, mask, b, pattern = make(3, 64, 96, 32, 32)
    with pytest.raises(RuntimeError, match="block_sparse_linear: backend='triton'"):
        block_sparse_linear(x, w, mask, b, pattern=pattern, backend="triton")


@pytest.mark.skipif(TRITON, reason="of plain torch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_runs_are_rounded_once(dtype):
    # the kept blocks of a line never touch
    mask = torch.arange(64).expand(2, -1) % 2 == 0
    x, w = torch.randn(3, 64 * 64).to(dtype), torch.randn(2 * 64, 64 * 64).to(dtype)
    y = block_sparse_linear(x, w, mask, pattern=Block(64, 64))
    exact = x.double() @ (w * expand_mask(mask, Block(64, 64), w.shape)).double().T
    atol = 1e-5 * exact.abs().max().item()
    torch.testing.assert_close(y.double(), exact, rtol=0.5 * torch.finfo(dtype).eps, atol=atol)
