import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from aot import ARCHITECTURES, assert_lean, compile_for
from triton_sparsity.controller.algorithms.movement.structures import (
    Member,
    StructureGroup,
    resolve,
)
from triton_sparsity.kernels import bits
from triton_sparsity.kernels import mask as module
from triton_sparsity.kernels.launch import HAS_TRITON, INTERPRET, tl
from triton_sparsity.kernels.mask import make_mask, pack, unpack
from triton_sparsity.kernels.search import Threshold
from triton_sparsity.kernels.select import select
from triton_sparsity.kernels.table import Matrices, addresses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter has no reliable bfloat16
DTYPES = [torch.float32, torch.float16, *([] if INTERPRET else [torch.bfloat16, torch.float64])]
BACKENDS = ["auto"] if INTERPRET else ["auto", "torch"]  # plain torch has a stage of its own
SHAPES = [(7, 13), (0, 5), (16, 64), (1, 1), (5, 0), (2, 384), (40, 24), (9, 8), (3, 131)]
VIEWS = ["contiguous", "transposed", "sliced", "expanded", "shifted", "mixed"]


def view_of(tensor, view):
    """Return ``tensor``'s values (those of its first row if expanded) with other strides."""
    match view:
        case "transposed":
            return tensor.T.contiguous().T
        case "sliced":
            return torch.cat([tensor, tensor, tensor], 1)[:, tensor.shape[1] :][
                :, : tensor.shape[1]
            ]
        case "expanded":
            return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor
        case "shifted":
            flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
            return flat[1:].view(tensor.shape)
        case _:
            return tensor


def tied(shapes, dtype=torch.float32, view="contiguous", values=4, seed=0):
    """Return matrices of a few integers, so that most elements have many equals."""
    rng = np.random.default_rng(seed)
    tensors = [
        torch.from_numpy(rng.integers(1 - values, values, s)).to(dtype).to(DEVICE) for s in shapes
    ]
    views = VIEWS[:-1] if view == "mixed" else [view]
    return [view_of(t, views[i % len(views)]) for i, t in enumerate(tensors)]


def scales_for(tensors):
    """Return factors under which keys of different tensors tie, and some products round."""
    return torch.tensor([(1.0, 2.0, 0.5, 1 / 3)[i % 4] for i in range(len(tensors))]).to(DEVICE)


def threshold_for(tensors, k, scales=None):
    value, keep_ties = oracle.threshold(
        [oracle.to_numpy(t) for t in tensors], k, None if scales is None else scales.cpu().numpy()
    )
    return Threshold(
        torch.tensor(value, dtype=torch.float32, device=DEVICE),
        torch.tensor(keep_ties, device=DEVICE),
        torch.tensor(0, device=DEVICE),
    )


def want_masks(tensors, k, packed, scales=None):
    masks = oracle.exact_masks(
        [oracle.to_numpy(t) for t in tensors], k, None if scales is None else scales.cpu().numpy()
    )
    return [oracle.packbits(m) for m in masks] if packed else masks


def assert_equal(masks, want):
    assert len(masks) == len(want)
    for got, expected in zip(masks, want, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got.cpu().numpy(), expected)


def levels(tensors):
    size = sum(t.numel() for t in tensors)
    return (1, size // 3, size - 1)


def use_small_tiles(patch):
    """Let even the small matrices of these tests take several tiles and chunks."""
    patch.setattr(bits, "CHUNK", 64)
    patch.setattr(module, "TILE_BYTES", 1024)
    patch.setattr(module, "STRIDED_TILE", 512)
    patch.setattr(module, "PIECE", 64)
    patch.setattr(module, "TIES_TILE", {True: 1024, False: 1024})


@pytest.fixture(params=["large tiles", "small tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        use_small_tiles(monkeypatch)


# every two of a view, whether bits are packed, and the size of tiles together
VIEWED = [
    *(("contiguous", True, "large tiles"), ("contiguous", False, "small tiles")),
    *(("transposed", False, "large tiles"), ("transposed", True, "small tiles")),
    *(("mixed", True, "large tiles"), ("mixed", False, "small tiles")),
]


@pytest.mark.usefixtures("poisoned_memory", "tiles")
@pytest.mark.parametrize(
    ("dtype", "view", "packed", "tiles"),
    # all views of one dtype; the keys of all are float32
    [(dtype, *case) for dtype in DTYPES for case in VIEWED[4 * (dtype != torch.float32) :]],
    indirect=["tiles"],
    ids=str,
)
def test_exactly_the_first_of_the_equal_are_kept(dtype, view, packed):
    tensors = tied(SHAPES, dtype, view)
    for k in levels(tensors):
        masks = make_mask(tensors, threshold_for(tensors, k), packed=packed)
        assert all(m.dtype == (torch.uint8 if packed else torch.bool) for m in masks)
        assert_equal(masks, want_masks(tensors, k, packed))


@pytest.mark.usefixtures("poisoned_memory", "tiles")
@pytest.mark.parametrize(
    ("dtype", "packed"), [(dtype, dtype == torch.float32) for dtype in DTYPES], ids=str
)
def test_keys_are_float32_products(dtype, packed):
    tensors = tied(SHAPES, dtype, "mixed")
    scales = scales_for(tensors)
    for k in levels(tensors):
        masks = make_mask(tensors, threshold_for(tensors, k, scales), scales=scales, packed=packed)
        assert_equal(masks, want_masks(tensors, k, packed, scales))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_a_list_may_mix_dtypes(scaled):
    tensors = [t for d in DTYPES[:2] for t in tied(SHAPES, d, "mixed")]
    scales = scales_for(tensors) if scaled else None
    for k in levels(tensors):
        masks = make_mask(tensors, threshold_for(tensors, k, scales), scales=scales, packed=True)
        assert_equal(masks, want_masks(tensors, k, True, scales))


@settings(deadline=None, max_examples=10 if INTERPRET else 20)
@given(st.data())
def test_packed_and_bool_agree_and_counts_are_exact(data):
    shape = st.tuples(st.integers(0, 12), st.integers(0, 40))
    shapes = data.draw(st.lists(shape, min_size=1, max_size=5))
    tensors = tied(
        shapes,
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.sampled_from(VIEWS)),
        values=data.draw(st.integers(1, 4)),
        seed=data.draw(st.integers(0, 2**32 - 1)),
    )
    scales = scales_for(tensors) if data.draw(st.booleans()) else None
    size = sum(t.numel() for t in tensors)
    k = data.draw(st.integers(0, size))
    threshold = threshold_for(tensors, k, scales)
    with pytest.MonkeyPatch.context() as patch:
        use_small_tiles(patch)
        masks = make_mask(tensors, threshold, scales=scales, packed=False)
        packed = make_mask(tensors, threshold, scales=scales, packed=True)
    assert sum(int(m.sum()) for m in masks) == size - k
    assert_equal(masks, want_masks(tensors, k, False, scales))
    for mask, p in zip(masks, packed, strict=True):
        assert torch.equal(unpack(p, mask.shape[1]), mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
def test_a_selected_threshold_prunes_exactly_k(packed, backend):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).half().to(DEVICE) for s in SHAPES]
    for k in levels(tensors):
        masks = make_mask(tensors, select(tensors, k), packed=packed, backend=backend)
        assert_equal(masks, want_masks(tensors, k, packed))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
def test_a_threshold_a_tensor_prunes_each_by_itself(packed, backend):
    tensors = tied(SHAPES, view="mixed")
    for first in (0, 2):  # each tensor of another share, and then of yet another
        shares = [(0, 0.3, 1, 0.7)[(i + first) % 4] for i in range(len(tensors))]
        ks = [round(share * t.numel()) for share, t in zip(shares, tensors, strict=True)]
        own = [threshold_for([t], k) for t, k in zip(tensors, ks, strict=True)]
        each = Threshold(*map(torch.stack, zip(*own, strict=True)))
        masks = make_mask(tensors, each, packed=packed, backend=backend)
        for tensor, threshold, mask in zip(tensors, own, masks, strict=True):
            (want,) = make_mask([tensor], threshold, packed=packed, backend=backend)
            assert torch.equal(mask, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
def test_minus_infinity_keeps_everything_and_pad_bits_stay_zero(packed, backend):
    tensors = tied(SHAPES, view="mixed")
    masks = make_mask(tensors, threshold_for(tensors, 0), packed=packed, backend=backend)
    ones = [np.ones(s, bool) for s in SHAPES]
    assert_equal(masks, [oracle.packbits(m) for m in ones] if packed else ones)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
def test_out_is_overwritten_in_place(packed, backend):
    tensors = tied(SHAPES, view="mixed")
    k = sum(t.numel() for t in tensors) // 2
    threshold, want = threshold_for(tensors, k), want_masks(tensors, k, packed)
    for poison in (0xFF, 0):
        out = [torch.from_numpy(np.full_like(m, poison)).to(DEVICE) for m in want]
        addresses, versions = [m.data_ptr() for m in out], [m._version for m in out]
        masks = make_mask(tensors, threshold, packed=packed, out=out, backend=backend)
        assert all(a is b for a, b in zip(masks, out, strict=True))
        assert [m.data_ptr() for m in out] == addresses
        assert_equal(out, want)
        if backend == "auto":
            assert all(m._version > v for m, v in zip(out, versions, strict=True))


def test_out_may_start_anywhere():
    tensors = tied([(4, 128), (2, 256)])
    k, total = 300, 128
    want = want_masks(tensors, k, True)
    buffer = torch.full((total + 3,), 0xFF, dtype=torch.uint8, device=DEVICE)
    out = [buffer[1:65].view(4, 16), buffer[66:130].view(2, 32)]
    make_mask(tensors, threshold_for(tensors, k), packed=True, out=out)
    assert_equal(out, want)
    assert buffer[[0, 65, 130]].tolist() == [0xFF] * 3


@pytest.mark.usefixtures("tiles")
def test_masks_repeat_bit_for_bit():
    tensors = tied(SHAPES, view="mixed")
    threshold = threshold_for(tensors, sum(t.numel() for t in tensors) // 2)
    first, second = (make_mask(tensors, threshold, packed=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
def test_int64_path_matches_int32_path(packed, monkeypatch):
    monkeypatch.setattr(module, "list_index_type", lambda *_: tl.int64)
    tensors = tied(SHAPES, view="mixed")
    for k in levels(tensors):
        masks = make_mask(tensors, threshold_for(tensors, k), packed=packed)
        assert_equal(masks, want_masks(tensors, k, packed))


def test_many_small_tensors_find_their_place():
    tensors = tied([(1 + i % 3, i % 7) for i in range(70)])
    k = sum(t.numel() for t in tensors) // 2
    masks = make_mask(tensors, threshold_for(tensors, k), packed=True)
    assert_equal(masks, want_masks(tensors, k, True))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_matrices_of_several_full_tiles(dtype, packed):
    tensors = tied([(5, 16384), (3, 9001), (70, 3000)], dtype)
    tensors += [view_of(t, "transposed") for t in tied([(128, 264)], dtype)]
    k = 200_000
    masks = make_mask(tensors, threshold_for(tensors, k), packed=packed)
    assert_equal(masks, want_masks(tensors, k, packed))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
def test_an_empty_list_gives_an_empty_list(packed):
    assert make_mask([], threshold_for([], 0), packed=packed) == []


def test_weights_that_require_gradients_give_plain_masks():
    tensors = [t.requires_grad_() for t in tied(SHAPES[:3])]
    masks = make_mask(tensors, threshold_for(tensors, 9), packed=True)
    assert_equal(masks, want_masks(tensors, 9, True))
    assert not any(m.requires_grad for m in masks)


@pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="Triton does not run here")
def test_torchs_default_device_does_not_matter():
    tensors = tied([(7, 13), (16, 64)])
    value, keep_ties, _ = threshold_for(tensors, 300)
    masks = [torch.empty_like(t, dtype=torch.bool) for t in tensors]
    with torch.device("meta"):  # stands in for another device
        module._launch(tensors, value, keep_ties, None, False, masks)
    assert_equal(masks, want_masks(tensors, 300, packed=False))


def test_torchs_default_device_does_not_matter_to_structures():
    module, mask = torch.nn.Linear(2, 4), torch.tensor([[0, 0], [0, 1], [0, 0], [0, 0]]) > 0
    group = StructureGroup("", "heads", 2, 2, (Member(module, "weight", "bias", 0),))
    with torch.device("meta"):
        masks, kept = resolve([group], {(module, "weight"): mask})
    assert masks[module, "weight"].tolist() == [[True] * 2] * 2 + [[False] * 2] * 2
    assert kept[0].tolist() == [True, False]


def test_float64_takes_plain_torch():
    tensors = tied(SHAPES, torch.float64, "mixed")
    masks = make_mask(tensors, threshold_for(tensors, 99), packed=True)
    assert_equal(masks, want_masks(tensors, 99, True))
    # rounds to the float32 threshold, so it ties with it
    near = torch.full((1, 3), 1 + 1e-12, dtype=torch.float64, device=DEVICE)
    one = Threshold(*(torch.tensor(v, device=DEVICE) for v in (1.0, 2, 0)))
    assert make_mask([near], one, packed=False)[0].tolist() == [[True, True, False]]


def tiling_of(tensor, mask, packed):
    """Return layout and tile of one tensor."""
    widths = np.array([tensor.element_size()])
    tiling = module._tiling(Matrices.of([tensor]), addresses([mask]), widths, packed)
    return module.LAYOUTS[tiling.layout.item()], tiling.block_r.item(), tiling.block_c.item()


@pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton for this platform")
def test_layouts_with_wide_loads_are_recognised():
    def layout(tensor, packed=True, out_offset=0):
        mask = torch.empty(tensor.numel() + 1, dtype=torch.uint8)[out_offset:]
        return tiling_of(tensor, mask, packed)[0]

    matrix = torch.zeros(64, 256)
    assert layout(matrix) == "flat"
    assert layout(matrix[3:]) == "flat"
    assert layout(matrix, out_offset=1) == "any"
    assert layout(matrix.T) == "columns"
    assert layout(matrix[:60].T) == "columns"
    assert layout(matrix[:, 1:].T) == "any"
    assert layout(matrix[:, :128]) == "any"
    assert layout(matrix.flatten()[1:129].view(8, 16)) == "any"
    assert layout(torch.zeros(128, 9)) == "any"
    assert layout(torch.zeros(128, 9), packed=False) == "flat"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU to wait for")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
def test_nothing_waits_for_the_device(packed):
    tensors = tied(SHAPES, view="mixed")
    threshold = threshold_for(tensors, 99)
    out = make_mask(tensors, threshold, packed=packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_mask(tensors, threshold, packed=packed, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(out, want_masks(tensors, 99, packed))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs more memory than a CPU test may take")
@pytest.mark.parametrize("shape", [(1, 2**31 - 128), (3, 2**30)], ids=str)
def test_offsets_near_and_past_2_to_the_31(shape):
    tensor = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
    tensor[0, 0] = tensor[-1, -1] = 1
    threshold = Threshold(*(torch.tensor(v, device=DEVICE) for v in (0.0, 5, 0)))
    (mask,) = make_mask([tensor], threshold, packed=True)
    assert int((mask != 0).sum()) == 2
    assert (int(mask[0, 0]), int(mask[-1, -1])) == (0b111111, 0b10000000)
    assert torch.equal(pack(unpack(mask, shape[1])), mask)


@pytest.mark.skipif(INTERPRET or DEVICE == "cuda", reason="Triton runs here")
def test_triton_is_refused_where_it_cannot_run():
    tensors = tied(SHAPES)
    with pytest.raises(RuntimeError, match=r"^make_mask: backend='triton'"):
        make_mask(tensors, threshold_for(tensors, 9), packed=True, backend="triton")


@pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="Triton does not run here")
def test_triton_is_not_asked_for_float64():
    tensors = tied(SHAPES, torch.float64)
    with pytest.raises(ValueError, match=r"^make_mask: tensors must not be float64"):
        make_mask(tensors, threshold_for(tensors, 9), packed=True, backend="triton")


ONE, TWO = torch.tensor(1.0, device=DEVICE), torch.tensor(2, device=DEVICE)
GOOD = Threshold(ONE, TWO, TWO)
BAD = [
    ("tensors", {"tensors": [torch.zeros(3, device=DEVICE)]}),
    ("tensors", {"tensors": [torch.zeros(3, 3, dtype=torch.int32, device=DEVICE)]}),
    (
        "tensors",
        {"tensors": [torch.zeros(1, 1, device=DEVICE), torch.zeros(1, 1, device="meta")]},
    ),
    ("threshold.value", {"threshold": GOOD._replace(value=ONE.expand(2))}),
    ("threshold.keep_ties", {"threshold": GOOD._replace(value=ONE[None])}),
    ("threshold.value", {"threshold": GOOD._replace(value=ONE.double())}),
    ("threshold.keep_ties", {"threshold": GOOD._replace(keep_ties=TWO.int())}),
    ("scales", {"scales": torch.ones(2, device=DEVICE)}),
    ("scales", {"scales": torch.ones(1, device=DEVICE, dtype=torch.float64)}),
    ("out must have 1", {"out": []}),
    ("out", {"out": [torch.zeros(3, 9, dtype=torch.bool, device=DEVICE)]}),
    ("out", {"out": [torch.zeros(3, 2, dtype=torch.bool, device=DEVICE)]}),
    ("out", {"out": [torch.zeros(2, 3, dtype=torch.uint8, device=DEVICE).T]}),
    ("backend", {"backend": "fast"}),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=lambda p: p if isinstance(p, str) else "")
def test_bad_arguments_are_named(name, change):
    arguments = {
        "tensors": [torch.zeros(3, 9, device=DEVICE)],
        "threshold": GOOD,
        "packed": True,
    } | change
    with pytest.raises(ValueError, match=f"^make_mask: {name}"):
        make_mask(arguments.pop("tensors"), arguments.pop("threshold"), **arguments)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_opcheck(scaled, packed):
    tensors = tied([(3, 9), (4, 16)])
    threshold = threshold_for(tensors, 40)
    arguments = (tensors, *threshold[:2], scales_for(tensors) if scaled else None, packed)
    torch.library.opcheck(module._op, arguments)
    out = [torch.zeros_like(m) for m in module._op(*arguments)]
    torch.library.opcheck(module._out_op, (*arguments, out))


TYPES = {
    "table_ptr": "*i64",
    "value_ptr": "*fp32",
    "scales_ptr": "*fp32",
    "equal_ptr": "*u8",
    "count_ptr": "*i32",
    "keep_ties_ptr": "*i64",
    "end_ptr": "*i64",
}
THREADS = 256
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def tensor_of(layout, dtype):
    """Return an example that takes ``layout``."""
    matrix = torch.zeros(256, 256, dtype=dtype)
    return {"flat": matrix, "columns": matrix.T, "any": matrix[:, 1:100]}[layout]


def compile_pass(arch, kernel, layout, dtype, packed):
    chosen, block_r, block_c = tiling_of(
        tensor_of(layout, dtype), torch.zeros(1, dtype=torch.uint8), packed
    )
    assert chosen == layout
    constants = {"EACH": packed, "PACKED": packed, "LAYOUT": layout, "INDEX": tl.int32, "N": 256}
    constants["BLOCK_C"] = block_c
    if kernel is module._compare_kernel:
        constants |= {"DTYPE": getattr(tl, DTYPE_NAMES[dtype]), "BLOCK_R": block_r}
    else:
        constants["BLOCK_U"] = max(1, module.TIES_TILE[packed and layout == "flat"] // block_c)
    types = {n: TYPES[n] for n in kernel.arg_names if n in TYPES}
    compiled = compile_for(arch, kernel, types, constants, num_warps=THREADS // 32)
    assert_lean(compiled, arch)
    # a flushed product would not be the key that the threshold was selected from
    assert ".ftz" not in compiled.ptx
    return compiled, block_r * block_c


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    ("arch", "dtype", "packed"),
    # all of them for one device, both widths of a score for each
    [
        *((90, dtype, packed) for dtype in DTYPE_NAMES for packed in (True, False)),
        *((a, dtype, dtype.itemsize == 2) for a in (80, 100) for dtype in [*DTYPE_NAMES][:2]),
    ],
    ids=str,
)
def test_scores_are_read_once_in_16_byte_loads(arch, dtype, packed):
    for layout in ("flat", "columns"):
        compiled, tile = compile_pass(arch, module._compare_kernel, layout, dtype, packed)
        # numbers from the table have 8 bytes, the threshold and the scale 4
        wide = [width for width in compiled.global_loads() if width not in (4, 8)]
        assert wide == [16] * (tile * dtype.itemsize // THREADS // 16)
        if packed and layout == "flat":
            # the bits of a 16-bit score's byte are in one thread: no exchange but two sums
            assert compiled.shared <= (64 if dtype.itemsize == 2 else 1024)
            assert compiled.registers <= 64
        elif layout == "flat":
            assert 16 in compiled.global_stores()


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_any_strides_compile(arch, packed):
    for dtype in DTYPE_NAMES:
        compile_pass(arch, module._compare_kernel, "any", dtype, packed)


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ties_are_added_in_16_byte_accesses(arch, packed):
    for layout in ("flat", "columns", "any"):
        for dtype in (torch.bfloat16, torch.float32):
            compiled, _ = compile_pass(arch, module._ties_kernel, layout, dtype, packed)
            if packed and layout == "flat":
                assert 16 in compiled.global_loads()
                assert 16 in compiled.global_stores()
                assert compiled.registers <= 64
