import numpy as np
import pytest
import torch

import oracle
from aot import ARCHITECTURES, assert_lean, compile_for
from triton_sparsity.kernels import semi_structured as module
from triton_sparsity.kernels.launch import HAS_TRITON, INTERPRET, tl
from triton_sparsity.kernels.masked_weight import apply_mask
from triton_sparsity.kernels.pattern import NM, Block, maximum_level
from triton_sparsity.kernels.semi_structured import nm_mask, nm_score

if HAS_TRITON:
    import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter has no reliable bfloat16
DTYPES = [torch.float32, torch.float16, *([] if INTERPRET else [torch.bfloat16, torch.float64])]
# powers of two below, at and above a byte, and lengths that straddle bytes
PAIRS = [(2, 4), (1, 2), (3, 8), (9, 16), (31, 32), (1, 3), (3, 5), (4, 7), (5, 12)]
if not INTERPRET:  # it would take half a minute
    PAIRS.append((16, 31))
TRANSPOSABLE = NM(2, 4, transposable=True)
PATTERNS = [*(NM(n, m) for n, m in PAIRS), TRANSPOSABLE]
FEW = [NM(2, 4), NM(9, 16), NM(3, 5), TRANSPOSABLE]
BACKENDS = ["auto"] if INTERPRET else ["auto", "torch"]  # plain torch has a stage of its own
VIEWS = ["contiguous", "transposed", "sliced", "expanded", "shifted"]


def tied(pattern, down, across, dtype=torch.float32, view="contiguous"):
    """Return ``down`` x ``across`` groups of small integers, so that most have many equals."""
    tall, wide = pattern.group
    shape = down * tall, across * wide
    rng = np.random.default_rng(down + 100 * across)
    tensor = torch.from_numpy(rng.integers(-4, 5, shape)).to(dtype).to(DEVICE)
    match view:
        case "transposed":
            return tensor.T.contiguous().T
        case "sliced":
            return torch.cat([tensor] * 3, 1)[:, shape[1] :][:, : shape[1]]
        case "expanded":
            return tensor[:1].expand(shape) if shape[0] else tensor
        case "shifted":
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(shape)
    return tensor


def want_mask(weight, pattern):
    array = oracle.to_numpy(weight)
    if pattern.transposable:
        return oracle.transposable_mask(array)
    return oracle.nm_mask(array, pattern.n, pattern.m)


def want_scores(weight, pattern):
    return oracle.group_sums(
        np.abs(oracle.to_numpy(weight)) * ~want_mask(weight, pattern), *pattern.group
    )


def assert_equal(got, want):
    assert got.shape == want.shape
    np.testing.assert_array_equal(got.cpu().numpy(), want)


@pytest.fixture(params=["large tiles", "small tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(module, "CHUNK", 64)
        monkeypatch.setattr(module, "TILE", 512)
        monkeypatch.setattr(module, "PIECE", 128)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ((0, 4), "n", "0"),
        ((4, 4), "n", "4"),
        ((5, 4), "n", "5"),
        ((2.0, 4), "n", "2.0"),
        ((True, 4), "n", "True"),
        ((1, 1), "m", "1"),
        ((2, 33), "m", "33"),
        ((2, "4"), "m", "'4'"),
        ((1, 4, True), "transposable", "1:4"),
        ((2, 4, 1), "transposable", "1"),
    ],
)
def test_patterns_out_of_range_are_refused_and_shown(arguments, name, value):
    with pytest.raises(ValueError, match=rf"^NM: {name} must be .* got .*{value}"):
        NM(*arguments)


def test_patterns_know_their_groups_names_and_levels():
    assert NM(32 - 1, 32).group == (1, 32)
    assert TRANSPOSABLE.group == (4, 4)
    assert [str(p) for p in (NM(2, 4), TRANSPOSABLE)] == ["2:4", "2:4 transposable"]
    assert [maximum_level(p) for p in (NM(1, 4), TRANSPOSABLE, Block(2, 2))] == [0.75, 0.5, 1]
    assert NM(2, 4) != TRANSPOSABLE


def test_the_tiles_are_the_90_patterns_in_order():
    bits = (np.array(module._CODES)[:, None] >> np.arange(16)) & 1 != 0
    assert len(bits) == 90
    assert np.array_equal(bits.reshape(90, 4, 4), oracle.tile_patterns())


@pytest.mark.usefixtures("poisoned_memory", "tiles")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_largest_are_kept_and_of_equal_ones_the_first(pattern):
    # of an odd number of groups; of whole words as well
    for down, across in [(5, 11)] if INTERPRET else [(5, 11), (3, 16)]:
        weight = tied(pattern, down, across)
        found = nm_mask(weight, pattern)
        assert_equal(found.mask, oracle.packbits(want_mask(weight, pattern)))
        assert int(found.nonfinite) == 0
        assert_equal(nm_score(weight, pattern), want_scores(weight, pattern))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_and_dtypes(pattern, view):
    for dtype in DTYPES:
        weight = tied(pattern, 6, 9, dtype, view)
        assert_equal(nm_mask(weight, pattern).mask, oracle.packbits(want_mask(weight, pattern)))
        assert_equal(nm_score(weight, pattern), want_scores(weight, pattern))


@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.parametrize(("down", "across"), [(0, 3), (3, 0), (1, 1)])
def test_empty_and_single_groups(pattern, down, across):
    weight = tied(pattern, down, across)
    found = nm_mask(weight, pattern)
    assert_equal(found.mask, oracle.packbits(want_mask(weight, pattern)))
    assert int(found.nonfinite) == 0
    assert nm_score(weight, pattern).shape == (down, across)


@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_groups_may_be_kept_whole_and_out_stays_in_place(pattern):
    weight = tied(pattern, 5, 10)
    whole = torch.from_numpy(np.random.default_rng(0).random((5, 10)) < 0.5).to(DEVICE)
    want = want_mask(weight, pattern) | np.kron(whole.cpu().numpy(), np.ones(pattern.group, bool))
    for backend in ("auto", "torch"):
        for poison in (0xFF, 0):
            out = torch.from_numpy(np.full_like(oracle.packbits(want), poison)).to(DEVICE)
            address, version = out.data_ptr(), out._version
            found = nm_mask(
                weight, pattern, whole=whole.T.contiguous().T, out=out, backend=backend
            )
            assert found.mask is out
            assert out.data_ptr() == address
            assert out._version > version
            assert_equal(out, oracle.packbits(want))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_groups_with_nan_or_inf_are_counted_and_scored_nan(pattern, backend):
    weight = tied(pattern, 6, 9)
    tall, wide = pattern.group
    for row, col, element, bad in [
        (0, 0, 0, np.nan),
        (3, 8, 0, np.inf),
        (3, 8, wide - 1, np.nan),
        (5, 2, wide - 1, -np.inf),
    ]:
        weight[row * tall, col * wide + element] = bad
    assert int(nm_mask(weight, pattern, backend=backend).nonfinite) == 3
    bad = nm_score(weight, pattern, backend=backend).isnan()
    assert bad.nonzero().tolist() == [[0, 0], [3, 8], [5, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tile_that_float32_could_not_add_up_is_counted_and_scored_nan(backend):
    weight = tied(TRANSPOSABLE, 2, 3)
    weight[0, 0], weight[5, 9] = 2.0**124, -(2.0**123)
    assert int(nm_mask(weight, TRANSPOSABLE, backend=backend).nonfinite) == 1
    assert nm_score(weight, TRANSPOSABLE, backend=backend).isnan().nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 7), TRANSPOSABLE], ids=str)
def test_backends_agree_and_repeat_bit_for_bit(pattern):
    tall, wide = pattern.group
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8 * tall, 40 * wide, generator=generator).to(DEVICE)
    for operation in (
        lambda **b: nm_mask(weight, pattern, **b).mask,
        lambda **b: nm_score(weight, pattern, **b),
    ):
        first = operation()
        assert torch.equal(first, operation())
        assert torch.equal(first, operation(backend="torch"))
    assert_equal(nm_mask(weight, pattern).mask, oracle.packbits(want_mask(weight, pattern)))


def test_a_transposable_mask_is_two_four_both_ways():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    kept = apply_mask(torch.ones_like(weight), nm_mask(weight, TRANSPOSABLE).mask, TRANSPOSABLE)
    for matrix in (kept, kept.T):
        assert (matrix.reshape(matrix.shape[0], -1, 4).sum(2) == 2).all()


def test_int64_path_matches_int32_path(monkeypatch):
    weights = {p: tied(p, 6, 9) for p in FEW}
    want = {p: nm_mask(w, p).mask for p, w in weights.items()}
    monkeypatch.setattr(module, "index_type", lambda *_: tl.int64)
    for pattern, weight in weights.items():
        assert torch.equal(nm_mask(weight, pattern).mask, want[pattern])


def test_weights_that_require_gradients_give_plain_masks_and_scores():
    weight = tied(NM(2, 4), 3, 4).requires_grad_()
    assert not nm_mask(weight, NM(2, 4)).mask.requires_grad
    assert not nm_score(weight, NM(2, 4)).requires_grad


@pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="Triton does not run here")
def test_triton_is_not_asked_for_float64():
    with pytest.raises(ValueError, match=r"^nm_mask: weight must not be float64"):
        nm_mask(tied(NM(2, 4), 3, 4, torch.float64), NM(2, 4), backend="triton")


@pytest.mark.skipif(INTERPRET or DEVICE == "cuda", reason="Triton runs here")
def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(RuntimeError, match=r"^nm_score: backend='triton'"):
        nm_score(tied(NM(2, 4), 3, 4), NM(2, 4), backend="triton")


WEIGHT = torch.zeros(4, 12, device=DEVICE)
BAD = [
    ("weight must be a floating", {"weight": WEIGHT.int()}),
    ("weight must be a floating", {"weight": WEIGHT[0]}),
    ("weight must have columns divisible by 8 for 2:8", {"pattern": NM(2, 8)}),
    ("weight must have rows divisible by 4", {"weight": WEIGHT[:3], "pattern": TRANSPOSABLE}),
    ("whole", {"whole": torch.zeros(4, 4, dtype=torch.bool, device=DEVICE)}),
    ("whole", {"whole": torch.zeros(4, 3, device=DEVICE)}),
    ("out must be contiguous", {"out": torch.zeros(2, 4, dtype=torch.uint8, device=DEVICE).T}),
    ("out", {"out": torch.zeros(4, 1, dtype=torch.uint8, device=DEVICE)}),
    ("out", {"out": torch.zeros(4, 2, dtype=torch.uint8, device="meta")}),
    ("backend", {"backend": "fast"}),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=lambda p: p if isinstance(p, str) else "")
def test_bad_arguments_are_named(name, change):
    arguments = {"weight": WEIGHT, "pattern": NM(2, 4)} | change
    with pytest.raises(ValueError, match=f"^nm_mask: {name}"):
        nm_mask(**arguments)


def test_another_pattern_is_refused():
    with pytest.raises(TypeError, match=r"^nm_score: pattern must be NM"):
        nm_score(WEIGHT, Block(4, 4))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), TRANSPOSABLE], ids=str)
def test_opcheck(pattern):
    weight = tied(pattern, 3, 4)
    spelled = pattern.n, pattern.m, pattern.transposable
    whole = torch.zeros(3, 4, dtype=torch.bool, device=DEVICE)
    out = nm_mask(weight, pattern).mask
    torch.library.opcheck(module._mask_op, (weight, *spelled, None))
    torch.library.opcheck(module._mask_out_op, (weight, *spelled, whole, out))
    torch.library.opcheck(module._score_op, (weight, *spelled))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs more memory than a CPU test may take")
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 7), TRANSPOSABLE], ids=str)
def test_offsets_past_2_to_the_31(pattern):
    cols = 2**29 // pattern.m * pattern.m
    weight = torch.zeros(8, cols, dtype=torch.float16, device=DEVICE)
    weight[-1, -1] = 1
    assert int(nm_mask(weight, pattern).mask[-1, -1]) >> ((cols - 1) % 8) == 1


TYPES = {
    "whole_ptr": "*u8",
    "out_ptr": "*u8",
    "score_ptr": "*fp32",
    "count_ptr": "*i32",
    "R": "i32",
    "C": "i32",
    "stride_xr": "i32",
    "stride_xc": "i32",
}
UNUSED = {"mask": ("whole_ptr", "score_ptr"), "partial": ("score_ptr",)}
UNUSED["score"] = ("whole_ptr", "out_ptr")
DTYPE_NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compile_selection(arch, pattern, dtype, aligned, what):
    example = torch.empty((256, 64 * pattern.m), dtype=DTYPE_NAMES[dtype], device="meta")
    plan = module._plan(example if aligned else example[:, pattern.m :], pattern)
    lanes = triton.next_power_of_2(pattern.m)
    constants = {"INDEX": tl.int32, "BLOCK_R": plan.block_r} | dict.fromkeys(UNUSED[what])
    if pattern.transposable:
        kernel = module._tile_kernel
        constants |= {
            "TABLE": module._TABLE,
            "MOST": module.TILE_LARGEST,
            "BLOCK_C": plan.block_c,
        }
    else:
        constants |= {"KEPT": pattern.n, "M": pattern.m}
        kernel = module._nm_kernel if lanes == pattern.m else module._straddling_kernel
        if lanes == pattern.m:
            constants |= {"TUPLES": plan.block_c}
        else:
            constants |= {"LANES": lanes, "UNITS": plan.block_c}
    ones = ("stride_xc", "R") if plan.shape[0] == 1 else ("stride_xc",)
    types = {"x_ptr": f"*{dtype}"} | {k: v for k, v in TYPES.items() if k not in constants}
    compiled = compile_for(arch, kernel, types, constants, aligned=aligned, strides_of_one=ones)
    assert_lean(compiled, arch)
    # a flushed magnitude would tie with zero
    assert ".ftz" not in compiled.ptx
    return compiled


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    ("arch", "pattern", "dtype"),
    # all of them for one device, what is common for each
    [
        *(
            (90, pattern, kind)
            for pattern in (NM(2, 4), TRANSPOSABLE)
            for kind in ("fp32", "bf16")
        ),
        *((90, NM(4, 8), "bf16"), (90, NM(16, 32), "bf16")),
        *((arch, pattern, "bf16") for arch in (80, 100) for pattern in (NM(2, 4), TRANSPOSABLE)),
    ],
    ids=str,
)
def test_the_weight_is_read_once_in_16_byte_loads(arch, pattern, dtype):
    compiled = compile_selection(arch, pattern, dtype, True, "mask")
    loads = compiled.global_loads()
    elements = module.TILE // 128  # of a thread
    assert loads == [16] * (elements * DTYPE_NAMES[dtype].itemsize // 16)
    assert compiled.registers <= (200 if pattern.m == 32 else 128)


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    ("arch", "pattern"),
    [
        *((arch, pattern) for arch in ARCHITECTURES for pattern in (NM(2, 3), TRANSPOSABLE)),
        (90, NM(2, 4)),
        (90, NM(5, 31)),
    ],
    ids=str,
)
def test_every_variant_compiles_lean(arch, pattern):
    for aligned, what in ((True, "score"), (False, "partial")):
        compile_selection(arch, pattern, "fp16", aligned, what)
