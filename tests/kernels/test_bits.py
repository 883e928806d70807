import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from aot import ARCHITECTURES, assert_lean, compile_for
from triton_sparsity.kernels import bits
from triton_sparsity.kernels.bits import expand_mask, pack, unpack, word_mask
from triton_sparsity.kernels.launch import HAS_TRITON, INTERPRET, tl
from triton_sparsity.kernels.pattern import Block, Unstructured, grid_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (3, 7), (5, 8), (7, 9), (16, 64), (2, 1040), (31, 131), (0, 5), (5, 0)]
VIEWS = ["contiguous", "transposed", "sliced", "expanded", "shifted"]
PATTERNS = [Unstructured(), Block(1, 1), Block(1, 4), Block(8, 1), Block(4, 16), Block(64, 256)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def random_bools(shape):
    return np.random.default_rng(shape[0] * 7919 + shape[1]).random(shape) < 0.5


def on_device(array):
    return torch.from_numpy(array.copy()).to(DEVICE)


def view_of(tensor, view):
    """Return ``tensor``'s values (those of its first row if expanded) with other strides."""
    match view:
        case "transposed":
            return tensor.T.contiguous().T
        case "sliced":
            return torch.cat([tensor, tensor, tensor], 1)[:, tensor.shape[1] : -tensor.shape[1]]
        case "expanded":
            return tensor[:1].expand(tensor.shape)
        case "shifted":
            flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
            return flat[1:].view(tensor.shape)
        case _:
            return tensor


def compact_mask(pattern, shape):
    """Return a mask by groups, as numpy, and its compact form."""
    groups = random_bools(grid_shape(pattern, shape))
    compact = oracle.packbits(groups) if isinstance(pattern, Unstructured) else groups
    return groups, on_device(compact)


@pytest.fixture(params=["large tiles", "small tiles"])
def tiles(request, monkeypatch):
    """Small: even the small matrices of these tests take several tiles and chunks."""
    if request.param == "small tiles":
        monkeypatch.setattr(bits, "CHUNK", 64)
        monkeypatch.setattr(bits, "TILE", 512)
        monkeypatch.setattr(bits, "PIECE", 64)


@pytest.mark.usefixtures("poisoned_memory", "tiles")
@pytest.mark.parametrize("view", VIEWS)
def test_pack_is_numpys_packbits_and_unpack_undoes_it(view):
    for shape in SHAPES:
        if 0 in shape and view in ("sliced", "expanded"):
            continue
        mask = view_of(on_device(random_bools(shape)), view)
        packed = pack(mask)
        np.testing.assert_array_equal(packed.cpu().numpy(), oracle.packbits(mask.cpu().numpy()))
        assert torch.equal(unpack(packed, shape[1]), mask)
        assert torch.equal(pack(mask, backend="torch"), packed)
        assert torch.equal(unpack(packed, shape[1], backend="torch"), mask)


@pytest.mark.usefixtures("poisoned_memory", "tiles")
@pytest.mark.parametrize("view", VIEWS)
def test_unpack_takes_any_strides(view):
    for shape in SHAPES[:-2]:
        packed = view_of(on_device(oracle.packbits(random_bools(shape))), view)
        want = oracle.unpackbits(packed.cpu().numpy(), shape[1])
        np.testing.assert_array_equal(unpack(packed, shape[1]).cpu().numpy(), want)


def test_masks_of_several_full_tiles():
    for shape in ((1, 20000), (3, 9001), (70, 3000), (600, 5)):
        mask = on_device(random_bools(shape))
        packed = pack(mask)
        np.testing.assert_array_equal(packed.cpu().numpy(), oracle.packbits(mask.cpu().numpy()))
        assert torch.equal(unpack(packed, shape[1]), mask)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_pack_roundtrips(rows, cols, seed):
    mask = on_device(np.random.default_rng(seed).random((rows, cols)) < 0.5)
    packed = pack(mask)
    assert torch.equal(unpack(packed, cols), mask)
    assert int(unpack(packed, packed.shape[1] * 8).sum()) == int(mask.sum())


@pytest.mark.usefixtures("tiles")
def test_int64_path_matches_int32_path(monkeypatch):
    masks = [view_of(on_device(random_bools((37, 51))), view) for view in VIEWS]
    want = [pack(m) for m in masks]
    monkeypatch.setattr(bits, "index_type", lambda *_: tl.int64)
    for mask, packed in zip(masks, want, strict=True):
        assert torch.equal(pack(mask), packed)
        assert torch.equal(unpack(packed, 51), mask)


@pytest.mark.usefixtures("poisoned_memory", "tiles")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_expand_mask_repeats_every_group(pattern):
    for shape in SHAPES:
        groups, mask = compact_mask(pattern, shape)
        want = oracle.expand(groups, pattern.rows, pattern.cols, shape)
        for backend in ("auto", "torch"):
            full = expand_mask(mask, pattern, shape, backend=backend)
            np.testing.assert_array_equal(full.cpu().numpy(), want)


def test_expand_mask_returns_a_copy():
    mask = on_device(random_bools((4, 4)))
    before = mask.clone()
    expand_mask(mask, Block(1, 1), (4, 4)).logical_not_()
    assert torch.equal(mask, before)


@pytest.mark.usefixtures("poisoned_memory", "tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_word_mask_is_all_ones_where_kept(pattern, dtype):
    for shape in SHAPES:
        groups, mask = compact_mask(pattern, shape)
        want = oracle.words(groups, pattern.cols, shape, dtype.itemsize)
        got = word_mask(mask, pattern, shape, dtype)
        assert str(got.dtype) == f"torch.{want.dtype}"
        np.testing.assert_array_equal(got.cpu().numpy(), want)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_word_mask_writes_out_in_place(pattern):
    shape = (37, 50)
    groups, mask = compact_mask(pattern, shape)
    want = oracle.words(groups, pattern.cols, shape, 4)
    for view in ("contiguous", "transposed", "sliced"):
        out = view_of(torch.full(want.shape, 7, dtype=torch.int32, device=DEVICE), view)
        address, strides = out.data_ptr(), out.stride()
        assert word_mask(mask, pattern, shape, torch.float32, out=out) is out
        assert (out.data_ptr(), out.stride()) == (address, strides)
        np.testing.assert_array_equal(out.cpu().numpy(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anding_the_words_selects_and_nan_vanishes(dtype):
    shape = (9, 21)
    groups, mask = compact_mask(Unstructured(), shape)
    kept = on_device(groups)
    weight = torch.randn(shape).to(dtype).to(DEVICE).masked_fill(~kept, float("nan"))
    word = word_mask(mask, Unstructured(), shape, dtype)
    masked = (weight.view(word.dtype) & word).view(dtype)
    assert torch.equal(masked, weight.nan_to_num(0.0))


@pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton for this platform")
@pytest.mark.skipif(INTERPRET or DEVICE == "cuda", reason="Triton runs here")
def test_triton_is_refused_where_it_cannot_run():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"^pack: backend='triton'"):
        pack(mask, backend="triton")
    with pytest.raises(RuntimeError, match=r"^unpack: backend='triton'"):
        unpack(pack(mask), 3, backend="triton")
    with pytest.raises(RuntimeError, match=r"^unpack: backend='triton'"):
        expand_mask(pack(mask), Unstructured(), (2, 3), backend="triton")


BAD = {
    "pack: mask": lambda m: pack(m.float()),
    "pack: mask must be a bool matrix": lambda m: pack(m[0]),
    "unpack: packed": lambda m: unpack(m, 9),
    "unpack: packed must be a uint8 matrix of 2": lambda m: unpack(pack(m)[:, :1], 9),
    "expand_mask: mask": lambda m: expand_mask(m, Unstructured(), (4, 9)),
    "expand_mask: mask must be torch.bool": lambda m: expand_mask(m, Block(2, 2), (4, 9)),
    "word_mask: mask": lambda m: word_mask(m, Unstructured(), (4, 9), torch.float32),
    "word_mask: dtype": lambda m: word_mask(pack(m), Unstructured(), (4, 9), torch.int32),
    "word_mask: out": lambda m: word_mask(
        pack(m), Unstructured(), (4, 9), torch.float32, out=torch.zeros(4, 9, device=DEVICE)
    ),
    "pack: backend": lambda m: pack(m, backend="fast"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    mask = torch.ones(4, 9, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{message}"):
        BAD[message](mask)


def test_opcheck():
    mask = on_device(random_bools((5, 19)))
    torch.library.opcheck(bits._pack_op, (mask,))
    torch.library.opcheck(bits._unpack_op, (pack(mask), 19))


TYPES = dict.fromkeys(("mask_ptr", "packed_ptr", "out_ptr"), "*u8") | dict.fromkeys(
    ("R", "C", "stride_mr", "stride_mc", "stride_pr", "stride_pb"), "i32"
)


def compile_bits(name, arch, shape, aligned=True):
    kernel = getattr(bits, f"_{name}_kernel")
    block_r, block_c, _ = bits._bit_tiling(*shape)
    compiled = compile_for(
        arch,
        kernel,
        {n: TYPES[n] for n in kernel.arg_names if n in TYPES},
        {"INDEX": tl.int32, "BLOCK_R": block_r, "BLOCK_C": block_c},
        aligned=aligned,
        strides_of_one=[n for n in kernel.arg_names if n in ("stride_mc", "stride_pb")],
    )
    assert_lean(compiled, arch)
    return compiled


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(1, 1 << 20), (512, 4096)], ids=["one run", "rows"])
def test_bools_move_in_16_byte_accesses(shape, arch):
    # packed bytes stay with the thread that has their bits; an eighth of the traffic
    assert set(compile_bits("pack", arch, shape).global_loads()) == {16}
    assert set(compile_bits("unpack", arch, shape).global_stores()) == {16}


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_generic_variants_compile(name, arch):
    for shape in ((1, 1001), (300, 5), (7, 4097)):
        compile_bits(name, arch, shape, aligned=False)


@pytest.mark.parametrize("shape", [(1, 1), (3, 13), (16, 64), (0, 5)])
def test_masks_are_counted_packed_or_not(shape):
    masks = [torch.rand(shape, device=DEVICE) < p for p in (0.0, 0.3, 1.0)]
    want = [int(mask.sum()) for mask in masks]
    assert bits.count_kept(masks) == want
    assert bits.count_kept([pack(mask) for mask in masks]) == want
