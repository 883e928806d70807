import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from triton_sparsity.kernels import bits as bits_module
from triton_sparsity.kernels.launch import INTERPRET
from triton_sparsity.kernels.pattern import NM, Block, Unstructured, grid_shape
from triton_sparsity.kernels.retained import put_back_, take_pruned

pytestmark = pytest.mark.skipif(INTERPRET, reason="plain torch, without a Triton kernel")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# edges at neither side, at one, at the other, at both; smaller than a block; nothing at all
SHAPES = [(1, 1), (32, 64), (33, 64), (32, 63), (31, 65), (127, 259), (7, 13), (0, 5), (5, 0)]
PATTERNS = [Unstructured(), NM(2, 4), Block(1, 1), Block(2, 4), Block(16, 32), Block(256, 256)]
FEW = [Unstructured(), Block(2, 4), Block(16, 32)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FORMS = ["compact", "words"]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.detach().contiguous().view(WORDS[tensor.element_size()])


def anything(shape, dtype=torch.float32, seed=0):
    """Draw bit patterns: among them NaNs with payloads, infinities, -0 and subnormal numbers."""
    g = torch.Generator().manual_seed(seed + shape[0] * 7919 + shape[1])
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=g, dtype=torch.uint8)
    return raw.view(dtype).view(shape).to(DEVICE)


def make_mask(pattern, shape, dtype=torch.float32, form="compact", share=0.5):
    """Return which elements are kept, and the mask in one of its forms."""
    rng = np.random.default_rng(shape[0] * 7919 + shape[1])
    groups = rng.random(grid_shape(pattern, shape)) < share
    elements = oracle.expand(groups, pattern.rows, pattern.cols, shape)
    if form == "words":
        mask = oracle.words(groups, pattern.cols, shape, dtype.itemsize)
    else:
        mask = groups if isinstance(pattern, Block) else oracle.packbits(groups)
    return torch.from_numpy(elements.copy()).to(DEVICE), torch.from_numpy(mask.copy()).to(DEVICE)


def assert_taken_and_put_back(weight, pattern, elements, mask):
    before = bits(weight).clone()
    values = take_pruned(weight, mask, pattern)
    assert values.dtype == weight.dtype
    assert torch.equal(bits(weight), torch.where(elements, before, 0))
    if isinstance(pattern, Block):
        assert values.shape == (int((~elements).sum()),)
        assert torch.equal(bits(values).sort()[0], before[~elements].sort()[0])
    else:
        assert torch.equal(bits(values), torch.where(elements, 0, before))
    put_back_(weight, values, mask, pattern)
    assert torch.equal(bits(weight), before)
    memory = torch.empty_like(values)
    again = take_pruned(weight, mask, pattern, out=memory)
    assert again.data_ptr() == memory.data_ptr()
    assert torch.equal(bits(again), bits(values))
    assert torch.equal(bits(weight), torch.where(elements, before, 0))
    # training changes what is kept, and only that comes from the weight
    trained = anything(weight.shape, weight.dtype, seed=1)
    weight.copy_(torch.where(elements, trained, weight))
    put_back_(weight, values, mask, pattern)
    assert torch.equal(bits(weight), torch.where(elements, bits(trained), before))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_taken_comes_back_to_the_bit(dtype, form, pattern):
    for shape in SHAPES:
        weight = anything(shape, dtype)
        assert_taken_and_put_back(weight, pattern, *make_mask(pattern, shape, dtype, form))


@pytest.mark.parametrize("share", [2.0, -1.0], ids=["all kept", "none kept"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_that_keep_all_or_nothing(pattern, share):
    for shape in SHAPES:
        elements, mask = make_mask(pattern, shape, share=share)
        assert_taken_and_put_back(anything(shape), pattern, elements, mask)


VIEWS = {
    "transposed": lambda w: w.T.contiguous().T,
    "sliced": lambda w: torch.cat([w, w], 1)[:, 3 : 3 + w.shape[1]],
    "every other": lambda w: torch.cat([w, w], 1)[:, ::2],
    "sliced transposed": lambda w: torch.cat([w, w], 0).T.contiguous().T[: w.shape[0]],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_and_nothing_between_the_elements_changes(view, pattern, form):
    weight = VIEWS[view](anything((65, 75)))
    storage = torch.empty(0, device=DEVICE).set_(weight.untyped_storage())
    own = torch.zeros_like(storage, dtype=torch.bool)
    own.as_strided(weight.shape, weight.stride(), weight.storage_offset()).fill_(True)
    around = bits(storage[~own])
    assert_taken_and_put_back(weight, pattern, *make_mask(pattern, (65, 75), form=form))
    assert torch.equal(bits(storage[~own]), around)


@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_masks_of_any_strides(pattern):
    elements, mask = make_mask(pattern, (65, 75))
    for strided in (mask.T.contiguous().T, torch.cat([mask, mask], 1)[:, ::2].copy_(mask)):
        assert_taken_and_put_back(anything((65, 75)), pattern, elements, strided)


def test_a_matrix_of_several_chunks(monkeypatch):
    monkeypatch.setattr(bits_module, "CHUNK", 64)
    monkeypatch.setattr(bits_module, "GPU_CHUNK", 64)
    for shape in ((3, 150), (70, 9)):
        elements, mask = make_mask(Unstructured(), shape)
        assert_taken_and_put_back(anything(shape), Unstructured(), elements, mask)


def test_values_of_blocks_lie_region_by_region():
    weight = torch.arange(1.0, 16.0, device=DEVICE).view(3, 5)
    mask = torch.tensor([[True, False, False], [False, True, False]], device=DEVICE)
    values = take_pruned(weight, mask, Block(2, 2))
    assert values.tolist() == [3, 4, 8, 9, 5, 10, 11, 12, 15]
    assert weight.tolist() == [[1, 2, 0, 0, 0], [6, 7, 0, 0, 0], [0, 0, 13, 14, 0]]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 150)),
    pattern=st.sampled_from([Unstructured(), NM(1, 2)])
    | st.builds(Block, *[st.integers(0, 8).map(lambda i: 2**i)] * 2),
    transposed=st.booleans(),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_and_pattern(shape, pattern, transposed, form, dtype):
    weight = anything(shape, dtype)
    weight = weight.T.contiguous().T if transposed else weight
    assert_taken_and_put_back(weight, pattern, *make_mask(pattern, shape, dtype, form))


@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_parameters_are_taken_from_and_autograd_is_warned(pattern):
    _, mask = make_mask(pattern, (33, 65))
    parameter = torch.nn.Parameter(torch.randn(33, 65, device=DEVICE))
    before, loss = parameter.detach().clone(), parameter.square().sum()
    values = take_pruned(parameter, mask, pattern)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = parameter.square().sum()
    put_back_(parameter, values, mask, pattern)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert parameter.is_leaf
    assert torch.equal(parameter, before)


GRID = torch.zeros(2, 2, dtype=torch.bool)
BAD = {
    "integer weight": (TypeError, {"weight": torch.ones(4, 4, dtype=torch.int32)}),
    "vector": (ValueError, {"weight": torch.ones(4)}),
    "grid of another size": (ValueError, {"mask": torch.ones(2, 3, dtype=torch.bool)}),
    "grid for unstructured": (TypeError, {"pattern": Unstructured()}),
    "mask elsewhere": (ValueError, {"mask": GRID.to("meta")}),
}
BAD_OUT = {
    "out of another dtype": (TypeError, {"out": torch.zeros(16).double()}),
    "out of another length": (ValueError, {"out": torch.zeros(17)}),
    "out elsewhere": (ValueError, {"out": torch.zeros(16, device="meta")}),
    "out of another shape": (
        ValueError,
        {
            "pattern": Unstructured(),
            "mask": torch.zeros(4, 1, dtype=torch.uint8),
            "out": torch.zeros(16),
        },
    ),
}
BAD_VALUES = {
    "another dtype": (TypeError, {"values": torch.zeros(16).double()}),
    "too few": (ValueError, {"values": torch.zeros(15)}),
    "a matrix": (ValueError, {"values": torch.zeros(4, 4)}),
    "elsewhere": (ValueError, {"values": torch.zeros(16, device="meta")}),
    "flat for unstructured": (
        ValueError,
        {"pattern": Unstructured(), "mask": torch.zeros(4, 1, dtype=torch.uint8)},
    ),
}


@pytest.mark.parametrize("bad", BAD_OUT)
def test_memory_that_does_not_fit_is_refused_before_anything_is_taken(bad):
    error, change = BAD_OUT[bad]
    weight = torch.ones(4, 4)
    arguments = {"mask": GRID, "pattern": Block(2, 2)} | change
    with pytest.raises(error, match=r"^take_pruned: out must .*got"):
        take_pruned(weight, **arguments)
    assert weight.all()


@pytest.mark.parametrize("bad", BAD | BAD_VALUES)
def test_bad_arguments_are_named(bad):
    error, change = (BAD | BAD_VALUES)[bad]
    arguments = {"weight": torch.ones(4, 4), "mask": GRID, "pattern": Block(2, 2)} | change
    if bad in BAD:
        with pytest.raises(error, match=r"^take_pruned: (weight|mask) must .*got"):
            take_pruned(**arguments)
    with pytest.raises(error, match=r"^put_back_: (weight|mask|values) must .*got"):
        put_back_(**{"values": torch.zeros(16)} | arguments)
