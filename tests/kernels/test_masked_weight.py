import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aot
import oracle
from triton_sparsity.kernels import masked_weight as module
from triton_sparsity.kernels import pruned
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.masked_weight import (
    apply_mask,
    apply_mask_,
    apply_mask_reference,
    count_leaks,
    count_leaks_reference,
)
from triton_sparsity.kernels.pattern import Block, Unstructured, grid_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_TRITON = INTERPRET or DEVICE == "cuda"
SHAPES = [(1, 1), (7, 13), (33, 31), (32, 64), (127, 259), (300, 40), (0, 5), (5, 0)]
PATTERNS = [
    Unstructured(),
    Block(1, 1),
    Block(1, 16),
    Block(16, 1),
    Block(2, 4),
    Block(32, 32),
    Block(256, 256),
]
FEW = [Unstructured(), Block(2, 4), Block(16, 32)]
DTYPES = [torch.float32, torch.float16]
if not INTERPRET:  # to the kernels, which move bits, they are no different
    DTYPES += [torch.bfloat16, torch.float64]
BACKENDS = ["auto"] if INTERPRET else ["auto", "torch"]  # plain torch has a stage of its own
KINDS = ["random", "all", "none", "empty row", "empty column", "skewed"]
FORMS = ["compact", "words"]


def make(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape[0] * 7919 + shape[1])
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def kept_groups(kind, pattern, shape):
    down, across = grid_shape(pattern, shape)
    rng = np.random.default_rng(down * 7919 + across)
    keep = rng.random((down, across)) < 0.5
    match kind:
        case "all" | "none":
            keep[:] = kind == "all"
        case "empty row":
            keep[down // 2 : down // 2 + 1] = False
        case "empty column":
            keep[:, across // 2 : across // 2 + 1] = False
        case "skewed":
            keep = rng.random((down, across)) < np.linspace(0, 1, down)[:, None]
    return keep


class Mask:
    """One mask in its three forms, by numpy: ``elements`` (bool), ``compact`` and ``words``."""

    def __init__(self, pattern, shape, dtype=torch.float32, kind="random"):
        groups = kept_groups(kind, pattern, shape)
        elements = oracle.expand(groups, pattern.rows, pattern.cols, shape)
        compact = groups if isinstance(pattern, Block) else oracle.packbits(groups)
        words = oracle.words(groups, pattern.cols, shape, dtype.itemsize)
        self.elements = torch.from_numpy(elements.copy()).to(DEVICE)
        self.compact = torch.from_numpy(compact.copy()).to(DEVICE)
        self.words = torch.from_numpy(words).to(DEVICE)


def bits(tensor):
    return tensor.detach().contiguous().view(module.WORDS[tensor.element_size()])


def assert_selected(result, weight, elements):
    """Kept elements to the bit, and +0 for the others."""
    assert result.dtype == weight.dtype
    assert torch.equal(bits(result), torch.where(elements, bits(weight), 0))


def poison(weight, elements):
    """Put NaN, Inf and -Inf behind the mask."""
    weight = weight.masked_fill(~elements, float("nan"))
    for i, bad in enumerate((float("inf"), float("-inf"))):
        hidden = ~elements
        hidden[:, i::3] = False
        weight = weight.masked_fill(hidden, bad)
    return weight


# each pattern with half of the dtypes, whose bits alone are moved
MOVED = [
    (DTYPES[(i + j) % len(DTYPES)], pattern)
    for i, pattern in enumerate(PATTERNS)
    for j in range(len(DTYPES) // 2)
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "pattern"), MOVED, ids=str)
def test_what_is_behind_the_mask_stays_there(dtype, form, pattern):
    for shape in SHAPES:
        mask = Mask(pattern, shape, dtype)
        weight = poison(make(shape, dtype), mask.elements)
        before = weight.clone()
        result = apply_mask(weight, getattr(mask, form), pattern)
        assert_selected(result, before, mask.elements)
        assert torch.equal(bits(weight), bits(before))

        apply_mask_(weight, getattr(mask, form), pattern)
        assert_selected(weight, before, mask.elements)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_any_kind_of_mask(pattern, form, kind):
    shape = (65, 75)
    mask = Mask(pattern, shape, kind=kind)
    weight = poison(make(shape), mask.elements)
    result = apply_mask(weight, getattr(mask, form), pattern)
    assert_selected(result, weight, mask.elements)
    assert result.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_reference_and_the_torch_backend_define_it(pattern):
    for shape in SHAPES:
        mask = Mask(pattern, shape)
        weight = poison(make(shape), mask.elements)
        assert_selected(apply_mask_reference(weight, mask.compact, pattern), weight, mask.elements)
        result = apply_mask(weight, mask.compact, pattern, backend="torch")
        assert_selected(result, weight, mask.elements)
        copy = weight.clone()
        apply_mask_(copy, mask.compact, pattern, backend="torch")
        assert_selected(copy, weight, mask.elements)


@settings(deadline=None, max_examples=30 if INTERPRET else 100, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 300)),
    sides=st.none() | st.tuples(st.integers(0, 8), st.integers(0, 8)),
    transposed=st.booleans(),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_and_block(shape, sides, transposed, form, dtype):
    pattern = Unstructured() if sides is None else Block(2 ** sides[0], 2 ** sides[1])
    mask = Mask(pattern, shape, dtype)
    weight = poison(make(shape, dtype), mask.elements)
    weight = weight.T.contiguous().T if transposed else weight
    result = apply_mask(weight, getattr(mask, form), pattern)
    assert_selected(result, weight, mask.elements)
    before = weight.clone()
    apply_mask_(weight, getattr(mask, form), pattern)
    assert_selected(weight, before, mask.elements)


VIEWS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.T.contiguous().T,
    "sliced": lambda w: torch.cat([w, w], 1)[:, 3 : 3 + w.shape[1]],
    "every other": lambda w: torch.cat([w, w], 1)[:, ::2],
    "sliced transposed": lambda w: torch.cat([w, w], 0).T.contiguous().T[: w.shape[0]],
}
EXPANDED = {
    "one row": lambda w: w[:1].expand_as(w),
    "one column": lambda w: w[:, :1].expand_as(w),
    "one element": lambda w: w[:1, :1].expand_as(w),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.parametrize("view", VIEWS | EXPANDED)
def test_the_result_is_laid_out_like_the_weight(view, pattern, form, backend):
    mask = Mask(pattern, (65, 75))
    weight = (VIEWS | EXPANDED)[view](make((65, 75)))
    result = apply_mask(weight, getattr(mask, form), pattern, backend=backend)
    assert_selected(result, weight, mask.elements)
    assert result.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_in_place_leaves_what_lies_between_the_elements(view, pattern, form):
    mask = Mask(pattern, (65, 75))
    weight = VIEWS[view](make((65, 75)))
    storage = torch.empty(0, device=DEVICE).set_(weight.untyped_storage())
    own = torch.zeros_like(storage, dtype=torch.bool)
    own.as_strided(weight.shape, weight.stride(), weight.storage_offset()).fill_(True)
    before, around = weight.clone(), storage[~own]
    apply_mask_(weight, getattr(mask, form), pattern)
    assert_selected(weight, before, mask.elements)
    assert torch.equal(storage[~own], around)


@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_masks_of_any_strides(form, pattern):
    mask = Mask(pattern, (65, 75))
    given_mask = getattr(mask, form)
    for view in (given_mask.T.contiguous().T, torch.cat([given_mask, given_mask], 1)[:, ::2]):
        if view.stride() == given_mask.stride():
            continue
        strided = view.copy_(given_mask)
        weight = make((65, 75))
        assert_selected(apply_mask(weight, strided, pattern), weight, mask.elements)
        before = weight.clone()
        apply_mask_(weight, strided, pattern)
        assert_selected(weight, before, mask.elements)


@pytest.mark.parametrize("transposed", [False, True])
def test_in_place_writes_only_pruned_blocks(transposed):
    # rows that share half their memory: an element of a pruned block and of a kept one at once
    # stays zero only if the kept block is not written back
    storage = torch.ones(12, device=DEVICE)
    weight = storage.as_strided((2, 8), (4, 1))
    keep = torch.tensor([[True, False], [True, True]], device=DEVICE)
    if transposed:
        apply_mask_(weight.T, keep.T, Block(4, 1))
    else:
        apply_mask_(weight, keep, Block(1, 4))
    assert storage.tolist() == [1] * 4 + [0] * 4 + [1] * 4


LOSSES = {
    "sum": lambda y: y.sum(),
    "transpose": lambda y: (y.T * torch.arange(y.shape[0], device=y.device)).sum(),
    "cat": lambda y: torch.cat([y, y], 1).square().sum(),
    "row sum": lambda y: -y.sum(0).square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_the_gradient_is_zero_where_pruned(pattern, form, loss):
    for view in ("contiguous", "transposed"):
        mask = Mask(pattern, (37, 51))
        weight = VIEWS[view](make((37, 51))).requires_grad_()
        result = apply_mask(weight, getattr(mask, form), pattern)
        leaf = result.detach().requires_grad_()
        (incoming,) = torch.autograd.grad(LOSSES[loss](leaf), leaf)
        (got,) = torch.autograd.grad(LOSSES[loss](result), weight)
        assert_selected(got, incoming, mask.elements)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_bad_gradients_of_pruned_elements_are_dropped(pattern, form):
    mask = Mask(pattern, (37, 51))
    weight = make((37, 51)).requires_grad_()
    incoming = poison(-make((37, 51)).abs(), mask.elements)
    apply_mask(weight, getattr(mask, form), pattern).backward(incoming)
    assert_selected(weight.grad, incoming, mask.elements)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_gradcheck(pattern, form):
    mask = Mask(pattern, (2, 3), torch.float64)
    weight = make((2, 3), torch.float64).requires_grad_()

    def square(w):
        return apply_mask(w, getattr(mask, form), pattern).square()

    assert torch.autograd.gradcheck(square, weight)
    assert torch.autograd.gradgradcheck(square, weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(16, 32)], ids=str)
def test_opcheck(pattern, form):
    mask = getattr(Mask(pattern, (37, 51)), form)
    sides = pattern.rows, pattern.cols
    for weight in (
        make((37, 51)).requires_grad_(),
        make((51, 37)).T,
        make((1, 51)).expand(37, 51),
    ):
        torch.library.opcheck(module._op, (weight, mask, *sides))
    weights = [make((37, 51)), make((51, 37)).T]
    torch.library.opcheck(module._op_, (weights, [mask, mask], *sides))
    for triton_runs in {False, ON_TRITON}:
        torch.library.opcheck(module._leaks_op, (weights, [mask, mask], *sides, triton_runs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 4)], ids=str)
def test_it_compiles_into_one_graph(pattern, form):
    mask = Mask(pattern, (37, 51))

    def loss(weight, mask):
        masked = apply_mask(weight * 2, mask, pattern)
        apply_mask_(masked, mask, pattern)
        return masked.square().sum()

    weight = VIEWS["transposed"](make((37, 51))).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(weight, getattr(mask, form)), weight)
    torch.testing.assert_close(got, torch.where(mask.elements, 8 * weight, 0))


def some_list(pattern, dtypes=(torch.float32,), form="compact"):
    """Return tensors of all sizes and layouts with NaNs behind their masks, and the masks."""
    tensors, masks = [], []
    for i, shape in enumerate([*SHAPES, (65, 300), (64, 512), (1, 5000)]):
        dtype = dtypes[i % len(dtypes)]
        view = [*VIEWS.values()][i % len(VIEWS)]
        masks.append(Mask(pattern, shape, dtype))
        tensors.append(view(poison(make(shape, dtype), masks[-1].elements)))
    return tensors, masks, [getattr(mask, form) for mask in masks]


@pytest.fixture
def launches(monkeypatch):
    """Record how the kernel of lists is launched: the options of each launch."""
    seen, kernel = [], pruned._pruned_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append(options)
                return kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(pruned, "_pruned_kernel", Spy())
    return seen


@pytest.mark.parametrize(
    "dtypes", [DTYPES] if INTERPRET else [DTYPES[:1], DTYPES], ids=lambda d: f"{len(d)} dtypes"
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_list_is_its_members(pattern, form, dtypes, launches):
    tensors, masks, given_masks = some_list(pattern, dtypes, form)
    before = [tensor.clone() for tensor in tensors]
    for result, old, mask in zip(
        apply_mask(tensors, given_masks, pattern), before, masks, strict=True
    ):
        assert_selected(result, old, mask.elements)
    apply_mask_(tensors, given_masks, pattern)
    for tensor, old, mask in zip(tensors, before, masks, strict=True):
        assert_selected(tensor, old, mask.elements)
    if form == "compact" and ON_TRITON:
        assert len(launches) == len({dtype.itemsize for dtype in dtypes})
    assert apply_mask([], [], pattern) == []
    assert apply_mask_([], [], pattern) is None


def test_a_long_list_is_one_launch(launches):
    shapes = [(3 + i % 7, 1 + i % 40) for i in range(37)]
    masks = [Mask(Block(2, 4), shape) for shape in shapes]
    tensors = [make(shape) for shape in shapes]
    before = [tensor.clone() for tensor in tensors]
    apply_mask_(tensors, [mask.compact for mask in masks], Block(2, 4))
    for tensor, old, mask in zip(tensors, before, masks, strict=True):
        assert_selected(tensor, old, mask.elements)
    assert len(launches) == ON_TRITON


def naive_leaks(tensors, masks):
    return [
        int(((tensor != 0) & ~mask.elements).sum())
        for tensor, mask in zip(tensors, masks, strict=True)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_leaks_are_counted_by_tensor(pattern, form, backend, launches):
    tensors, masks, given_masks = some_list(pattern, DTYPES, form)
    zeros = [torch.zeros_like(tensor) for tensor in tensors]
    for zero, mask in zip(zeros, masks, strict=True):
        zero[~mask.elements] = -0.0
        zero[mask.elements] = torch.nan
    # some leak and others do not, and then the others
    for odd in (0, 1):
        pairs = zip(tensors, zeros, strict=True)
        some = [z if i % 2 == odd else t for i, (t, z) in enumerate(pairs)]
        counts = count_leaks(some, given_masks, pattern, backend=backend)
        assert counts.dtype == torch.int64
        assert counts.device == tensors[0].device
        assert counts.tolist() == naive_leaks(some, masks)
    if form == "compact" and ON_TRITON:
        widths = len({dtype.itemsize for dtype in DTYPES})
        assert len(launches) == (2 * widths if backend == "auto" else 0)


@pytest.mark.parametrize("pattern", FEW[:2], ids=str)
def test_leaks_are_counted_by_definition_and_after_clearing_there_are_none(pattern):
    tensors, masks, given_masks = some_list(pattern)
    want = count_leaks_reference(tensors, given_masks, pattern)
    assert want.tolist() == naive_leaks(tensors, masks)
    assert want.any()
    assert torch.equal(count_leaks(tensors, given_masks, pattern), want)
    apply_mask_(tensors, given_masks, pattern)
    assert not count_leaks(tensors, given_masks, pattern).any()
    assert count_leaks([], [], pattern).tolist() == []


@settings(deadline=None, max_examples=15 if INTERPRET else 60, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 300)), min_size=1, max_size=4),
    sides=st.none() | st.tuples(st.integers(0, 8), st.integers(0, 8)),
    transposed=st.lists(st.booleans(), min_size=4, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_any_list(shapes, sides, transposed, dtype):
    pattern = Unstructured() if sides is None else Block(2 ** sides[0], 2 ** sides[1])
    masks = [Mask(pattern, shape, dtype) for shape in shapes]
    tensors = [poison(make(m.elements.shape, dtype), m.elements) for m in masks]
    tensors = [
        t.T.contiguous().T if turn else t for t, turn in zip(tensors, transposed, strict=False)
    ]
    before = [tensor.clone() for tensor in tensors]
    compact = [mask.compact for mask in masks]
    assert count_leaks(tensors, compact, pattern).tolist() == naive_leaks(tensors, masks)
    apply_mask_(tensors, compact, pattern)
    for tensor, old, mask in zip(tensors, before, masks, strict=True):
        assert_selected(tensor, old, mask.elements)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs are a GPU's")
@pytest.mark.gpu
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_a_list_can_be_captured_in_a_graph(pattern):
    tensors, masks, compact = some_list(pattern)
    before = [tensor.clone() for tensor in tensors]
    apply_mask_(tensors, compact, pattern)
    count_leaks(tensors, compact, pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = count_leaks(tensors, compact, pattern)
        apply_mask_(tensors, compact, pattern)
    for _ in range(3):
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        # what would overwrite a table that nobody holds
        noise = [torch.randint(2**60, (4096,), device=DEVICE) for _ in range(100)]
        graph.replay()
        assert counts.tolist() == naive_leaks(before, masks)
        for tensor, old, mask in zip(tensors, before, masks, strict=True):
            assert_selected(tensor, old, mask.elements)
        del noise


@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_two_runs_agree_to_the_bit(pattern):
    mask = Mask(pattern, (130, 515))
    weight = make((130, 515))
    first, second = (apply_mask(weight, mask.compact, pattern) for _ in range(2))
    assert torch.equal(bits(first), bits(second))


def test_in_place_takes_parameters_and_warns_autograd_of_the_change():
    mask = Mask(Block(2, 4), (6, 8))
    parameter = torch.nn.Parameter(make((6, 8)))
    before = parameter.detach().clone()
    loss = parameter.square().sum()
    apply_mask_(parameter, mask.compact, Block(2, 4))
    assert_selected(parameter, before, mask.elements)
    assert parameter.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(not ON_TRITON, reason="plain torch has no index type to force")
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_the_int64_path_matches_the_int32_path(pattern, monkeypatch):
    monkeypatch.setattr(module, "index_type", lambda *_: tl.int64)
    monkeypatch.setattr(pruned, "list_index_type", lambda *_: tl.int64)
    mask = Mask(pattern, (65, 300))
    for view in ("contiguous", "transposed"):
        weight = VIEWS[view](make((65, 300)))
        before = weight.clone()
        assert_selected(apply_mask(weight, mask.compact, pattern), before, mask.elements)
        assert count_leaks([weight], [mask.compact], pattern).tolist() == naive_leaks(
            [weight], [mask]
        )
        apply_mask_(weight, mask.compact, pattern)
        assert_selected(weight, before, mask.elements)


GRID = torch.ones(2, 2, dtype=torch.bool)
BAD = {
    "integer weight": (TypeError, {"weight": torch.ones(4, 4, dtype=torch.int32)}),
    "8-bit weight": (TypeError, {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}),
    "vector": (ValueError, {"weight": torch.ones(4)}),
    "grid of another size": (ValueError, {"mask": torch.ones(2, 3, dtype=torch.bool)}),
    "grid for unstructured": (TypeError, {"pattern": Unstructured()}),
    "packed for blocks": (TypeError, {"mask": GRID.to(torch.uint8)}),
    "packed of another size": (
        ValueError,
        {"mask": torch.ones(4, 4, dtype=torch.uint8), "pattern": Unstructured()},
    ),
    "words of another width": (TypeError, {"mask": -torch.ones(2, 4, dtype=torch.int16)}),
    "words of another size": (ValueError, {"mask": -torch.ones(4, 4, dtype=torch.int32)}),
    "mask elsewhere": (ValueError, {"mask": GRID.to("meta")}),
    "one mask for a list": (ValueError, {"weight": [torch.ones(4, 4)] * 2}),
    "fewer masks than weights": (ValueError, {"weight": [torch.ones(4, 4)] * 2, "mask": [GRID]}),
    "backend": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("function", [apply_mask, apply_mask_])
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(function, bad):
    error, change = BAD[bad]
    arguments = {"weight": torch.ones(4, 4), "mask": GRID, "pattern": Block(2, 2)} | change
    message = rf"^{function.__name__}: (weight|mask|backend) must .*got"
    with pytest.raises(error, match=message):
        function(**arguments)


BAD_COUNTS = {
    "one tensor": (TypeError, {"tensors": torch.ones(4, 4)}),
    "integer tensors": (TypeError, {"tensors": [torch.ones(4, 4, dtype=torch.int32)] * 2}),
    "fewer masks": (ValueError, {"masks": [GRID]}),
    "several forms": (ValueError, {"masks": [GRID, -torch.ones(2, 4, dtype=torch.int32)]}),
    "several devices": (
        ValueError,
        {
            "tensors": [torch.ones(4, 4), torch.ones(4, 4, device="meta")],
            "masks": [GRID, GRID.to("meta")],
        },
    ),
}


@pytest.mark.parametrize("bad", BAD_COUNTS)
def test_bad_lists_to_count_are_named(bad):
    error, change = BAD_COUNTS[bad]
    arguments = {"tensors": [torch.ones(4, 4)] * 2, "masks": [GRID] * 2} | change
    with pytest.raises(error, match=r"^count_leaks: (tensors|weight|masks) must .*got"):
        count_leaks(**arguments, pattern=Block(2, 2))


@pytest.mark.parametrize("function", [apply_mask, apply_mask_])
def test_triton_is_never_replaced_silently(function):
    mask = Mask(Block(2, 2), (4, 4))
    if ON_TRITON:
        weight = make((4, 4))
        result = function(weight.clone(), mask.compact, Block(2, 2), backend="triton")
        assert result is None or torch.equal(result, torch.where(mask.elements, weight, 0))
        with pytest.raises(ValueError, match="must be compact"):
            function(make((4, 4)), mask.words, Block(2, 2), backend="triton")
    else:
        with pytest.raises(RuntimeError, match="backend='triton' needs"):
            function(make((4, 4)), mask.compact, Block(2, 2), backend="triton")


def compile_kernel(kernel, arch, width, *, block, packed, transposed, aligned):
    pointers = {"w_ptr": f"*i{width}", "out_ptr": f"*i{width}", "mask_ptr": "*u8"}
    constants = {
        "ROWS": block[0],
        "COLS": block[1],
        "PACKED": packed,
        "INDEX": tl.int32 if aligned else tl.int64,
        **module._tile(block[1], packed and transposed),
    }
    ones = ("stride_wm", "stride_om") if transposed else ("stride_wn", "stride_on")
    return aot.compile_for(
        arch,
        kernel,
        {name: pointers.get(name, "i32") for name in kernel.arg_names},
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        aligned=aligned,
        strides_of_one=[name for name in (*ones, "stride_mn") if name in kernel.arg_names],
    )


needs_compiler = pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")


@needs_compiler
@pytest.mark.aot
@pytest.mark.parametrize(
    ("block", "packed", "transposed"),
    [
        pytest.param((1, 8), True, False, id="packed"),
        pytest.param((1, 8), True, True, id="packed, weight transposed"),
        pytest.param((1, 1), False, False, id="1x1"),
        pytest.param((4, 4), False, False, id="4x4"),
        pytest.param((32, 32), False, False, id="32x32"),
        pytest.param((256, 256), False, False, id="256x256"),
    ],
)
@pytest.mark.parametrize(("arch", "width", "aligned"), aot.WIDTHS)
def test_weights_move_16_bytes_at_a_time(arch, width, aligned, block, packed, transposed):
    compiled = compile_kernel(
        module._apply_mask_kernel,
        arch,
        width,
        block=block,
        packed=packed,
        transposed=transposed,
        aligned=aligned,
    )
    aot.assert_lean(compiled, arch)
    if aligned:
        whole = module.TILE * width // 8 // 16 // 128  # loads of a thread, in 4 warps
        assert compiled.global_loads().count(16) == whole
        assert compiled.global_stores() == [16] * whole
        # the rest are mask bytes; a thread reads no byte twice where 8 elements share one
        assert block[1] < 8 or len(compiled.global_loads()) - whole <= 4


def compile_pruned(arch, width, *, count, packed, broad, index=tl.int32):
    return aot.compile_for(
        arch,
        pruned._pruned_kernel,
        {"table_ptr": "*i64", "count_ptr": "*i64"},
        {
            "WORD": {16: tl.int16, 32: tl.int32, 64: tl.int64}[width],
            "COUNT": count,
            "PACKED": packed,
            "BROAD": broad,
            "INDEX": index,
            "ENTRIES": 256,
            **pruned.TILE,
        },
        num_warps=pruned.WARPS[packed],
    )


@needs_compiler
@pytest.mark.aot
@pytest.mark.parametrize("packed", [False, True], ids=["blocks", "packed"])
@pytest.mark.parametrize("count", [False, True], ids=["clear", "count"])
@pytest.mark.parametrize(
    ("arch", "width", "index"),
    [
        *((arch, 16, tl.int32) for arch in aot.ARCHITECTURES),
        (90, 32, tl.int32),
        (90, 16, tl.int64),
    ],
    ids=str,
)
def test_lists_move_16_bytes_at_a_time(arch, width, index, count, packed):
    compiled = compile_pruned(arch, width, count=count, packed=packed, broad=True, index=index)
    aot.assert_lean(compiled, arch)
    elements = pruned.TILE["TILE_M"] * pruned.TILE["CHUNKS"] * pruned.TILE["WIDTH"]
    elements //= 32 * pruned.WARPS[packed]  # of a thread
    whole = elements * width // 8 // 16
    loads, stores = compiled.global_loads(), compiled.global_stores()
    # where rows are runs of 16 bytes, and one by one where they are not
    assert loads.count(16) == (whole if count or packed else 0)
    assert stores.count(16) == (0 if count else whole)
    assert stores.count(width // 8) == (0 if count else elements)


@needs_compiler
@pytest.mark.aot
@pytest.mark.parametrize("packed", [False, True], ids=["blocks", "packed"])
@pytest.mark.parametrize("count", [False, True], ids=["clear", "count"])
@pytest.mark.parametrize(("arch", "width"), [(80, 16), (90, 16), (90, 64), (100, 16)])
def test_lists_with_narrow_blocks_compile(arch, width, count, packed):
    for broad in (True, False):
        compiled = compile_pruned(arch, width, count=count, packed=packed, broad=broad)
        aot.assert_lean(compiled, arch)
