"""Machine code of the block-sparse kernels for GPUs that are absent."""

import re

import pytest
import torch

from aot import SHARED_LIMIT, assert_lean, compile_for
from triton_sparsity.kernels import block_sparse_wgrad as wgrad
from triton_sparsity.kernels.block_sparse_product import (
    _block_sparse_linear_kernel,
)
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.tiles import Device, Tile, linear_tiles, stores, wgrad_tile
from triton_sparsity.kernels.topology import (
    CHUNK,
    _topology_count_kernel,
    _topology_list_kernel,
)

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler"),
]

DEVICES = {
    80: Device((8, 0), 108, 164 * 1024),
    90: Device((9, 0), 132, 228 * 1024),
    100: Device((10, 0), 148, 228 * 1024),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TL = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
REGISTERS = 65536  # of a multiprocessor


def box(dtype, rows, cols):
    return f"tensordesc<{dtype}[{rows},{cols}]>"


def compile_linear(
    arch,
    dtype,
    side_n,
    side_k,
    *,
    by_k=False,
    bulk=None,
    smaller=0,
    aligned=True,
    tf32=True,
    bias=False,
    end_steps=0,
    index=tl.int32,
):
    precision = "tf32" if dtype != "fp32" or tf32 else "ieee"
    bulk = (arch >= 90 and aligned and precision != "ieee") if bulk is None else bulk
    tile = linear_tiles(
        side_n, side_k, DTYPES[dtype], DEVICES[arch], precision=precision, bulk=bulk
    )[smaller]
    if end_steps:
        tile = tile._replace(stages=tile.stages - 1)
    types = dict.fromkeys("xwy", f"*{dtype}")
    if bulk:
        types = {
            "x": box(dtype, tile.m, tile.k),
            "w": box(dtype, *((tile.k, tile.n) if by_k else (tile.n, tile.k))),
            "y": box(dtype, tile.m, tile.n // stores(tile.n)),
        }
    strides = [f"stride_{name}" for name in ("xm", "xk", "wn", "wk", "ym", "yn")]
    sizes = ["M", "N", "K", "TASKS", "absent", "group", "shift"]
    types |= dict.fromkeys([*sizes, *strides], "i32")
    types |= {"bias_ptr": f"*{dtype}", "task_ptr": "*i32", "index_ptr": "*i32"}
    types |= {"y_ptr": f"*{dtype}", "scratch_ptr": "*fp32", "flag_ptr": "*i32"}
    compiled = compile_for(
        arch,
        _block_sparse_linear_kernel,
        types,
        {
            "HAS_BIAS": bias,
            "W_BY_K": by_k,
            "SIDE_N": side_n,
            "SIDE_K": side_k,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "STORES": stores(tile.n),
            "END_STEPS": end_steps,
            "OUT": TL[dtype],
            "BULK": bulk,
            "PRECISION": precision,
            "INDEX": index,
        },
        aligned=aligned,
        num_warps=tile.warps,
        num_stages=tile.stages,
        strides_of_one=["stride_xk", "stride_yn", "stride_wn" if by_k else "stride_wk"],
        unspecialized=["M", "TASKS", "absent", "group", "shift"],
    )
    return tile, compiled


def compile_wgrad(
    arch, dtype, side_a, side_b, *, lone_a=True, bulk=None, aligned=True, tf32=True, index=tl.int32
):
    precision = "tf32" if dtype != "fp32" or tf32 else "ieee"
    device = DEVICES[arch]
    side_u, side_v = (side_a, side_b) if lone_a else (side_b, side_a)
    if bulk is None:
        wide = wgrad.takes_bulk_copies(side_u, side_v, precision)
        bulk = arch >= 90 and aligned and wide
    tile = wgrad_tile(side_u, side_v, DTYPES[dtype], device, precision=precision, bulk=bulk)
    shared = wgrad.layout(tile, lone_a, side_a, side_b, bulk, device)
    types = dict.fromkeys(("a", "b", "out"), f"*{dtype}")
    if bulk:
        block_a, block_b = (tile.m, shared["BLOCK_V"])[:: 1 if lone_a else -1]
        types = {
            "a": box(dtype, tile.k, block_a),
            "b": box(dtype, tile.k, block_b),
            "out": box(dtype, shared["ACC_ROWS"], shared["ACC_COLS"]),
        }
    strides = [f"stride_{name}" for name in ("at", "aa", "bt", "bb", "oa", "ob", "ka", "kb")]
    types |= dict.fromkeys(["T", "NA", "NB", "absent", *strides], "i32")
    types |= {"out_ptr": f"*{dtype}", "scratch_ptr": "*fp32", "kept_ptr": "*u8"}
    types |= dict.fromkeys(("bundle_ptr", "bundle_count_ptr", "index_ptr"), "*i32")
    compiled = compile_for(
        arch,
        wgrad._block_sparse_wgrad_kernel,
        types,
        {
            "STRIP_ROWS": wgrad.STRIP_ROWS,
            "STRIP_COLS": wgrad.strip_cols(tile, DTYPES[dtype]),
            "BULK": bulk,
            "PRECISION": precision,
            "INDEX": index,
            **shared,
        },
        aligned=aligned,
        num_warps=tile.warps,
        num_stages=tile.stages,
        strides_of_one=["stride_aa", "stride_bb", "stride_ob", "stride_kb"],
        unspecialized=["T", "absent"],
    )
    return tile, compiled


def count(compiled, pattern):
    return len(re.findall(pattern, compiled.sass))


def widths(compiled, instruction):
    """Bytes a thread of every such instruction; cp.async counts as LDGSTS alone."""
    found = re.findall(rf"\b{instruction}\.E([\w.]*)", compiled.sass)
    sizes = {"128": 16, "64": 8, "U16": 2, "U8": 1, "S8": 1}
    return [next((n for key, n in sizes.items() if key in m), 4) for m in found]


def assert_resident(tile, compiled, arch):
    """As many programs fit on a multiprocessor as the tile says."""
    assert_lean(compiled, arch)
    assert compiled.stack == 0
    threads = tile.programs * tile.warps * 32
    assert compiled.registers * threads <= REGISTERS
    reserved = 1024  # bytes of shared memory that the driver takes of every program
    assert tile.programs * (compiled.shared + reserved) <= SHARED_LIMIT[arch] + reserved


def assert_operands_arrive_in_bulk(compiled, widest=4):
    """Operands come by the copy engine; what threads load are lists, flags and the bias."""
    assert count(compiled, "UTMALDG") >= 2
    assert not compiled.has("LDGSTS")
    assert count(compiled, r"\bLDG\b") <= 64
    assert max(widths(compiled, "LDG")) <= widest


def assert_operands_arrive_async(compiled, narrow=()):
    """Operands come by cp.async, 16 bytes a thread; what threads load are lists and flags."""
    pieces = widths(compiled, "LDGSTS")
    assert pieces
    assert set(pieces) <= {16, *narrow}
    assert pieces.count(16) > len(pieces) / 2


def assert_wgmma_runs_async(compiled, *dots):
    """All products are wgmma, and only the last of a step ends a group: none is serialised.

    ``dots`` are the groups of a step, of each loop.
    """
    dots = dots or (1,)
    assert compiled.has("HGMMA")
    assert not compiled.has("HMMA")
    assert count(compiled, r"HGMMA.*gsb0") == sum(dots)
    assert count(compiled, r"WARPGROUP.DEPBAR.LE gsb0, 0x[1-9]") == len(dots)


def instructions_of_loops(compiled):
    """Return the instructions of each innermost loop that has a wgmma, the longest first."""
    lines = [line.strip() for line in compiled.sass.splitlines() if line.strip()]
    labels, loops = {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = i
        elif (jump := re.search(r"BRA[^`]*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
            loops.append((labels[jump[1]], i))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = ["\n".join(lines[first:last]) for first, last in inner]
    return sorted((body for body in bodies if "HGMMA" in body), key=len, reverse=True)


@pytest.mark.parametrize("by_k", [False, True], ids=["forward", "dgrad"])
@pytest.mark.parametrize("side", [256, 128, 64, 32, 16])
def test_hopper_linear_is_wgmma_fed_by_bulk_copies(side, by_k):
    tile, compiled = compile_linear(90, "bf16", side, side, by_k=by_k, bias=not by_k)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_in_bulk(compiled)
    assert_wgmma_runs_async(compiled)
    assert compiled.has("UTMASTG")
    assert compiled.global_stores() == []
    # every stage that was asked for is there: two copies in each but the last, two in the loop
    assert count(compiled, "UTMALDG") == 2 * tile.stages


@pytest.mark.parametrize("sides", [(256, 16), (16, 256)], ids=str)
def test_hopper_linear_takes_rectangles(sides):
    tile, compiled = compile_linear(90, "fp16", *sides)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_in_bulk(compiled)
    assert_wgmma_runs_async(compiled)


@pytest.mark.parametrize(("side", "smaller"), [(256, 1), (128, 1), (128, 2), (64, 1), (64, 3)])
def test_hopper_linear_of_few_tokens_keeps_many_copies_in_flight(side, smaller):
    tile, compiled = compile_linear(90, "bf16", side, side, smaller=smaller)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_in_bulk(compiled)
    assert_wgmma_runs_async(compiled)
    assert count(compiled, "UTMALDG") == 2 * tile.stages
    assert tile.stages >= 4


@pytest.mark.parametrize(("side", "smaller"), [(256, 0), (128, 0), (128, 1), (64, 0), (64, 1)])
def test_hopper_linear_in_equal_shares_costs_no_spill(side, smaller):
    tile, compiled = compile_linear(90, "bf16", side, side, smaller=smaller, end_steps=2)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_in_bulk(compiled, widest=16)
    assert_wgmma_runs_async(compiled)
    assert count(compiled, "UTMALDG") == 2 * tile.stages
    # of parts
    assert min(compiled.global_stores()) >= 8
    assert {width for width in widths(compiled, "LDG") if width > 4} == {16}


@pytest.mark.parametrize(("arch", "side"), [(80, 128), (90, 128), (90, 32), (100, 128)])
def test_a_part_is_there_before_its_flag_is_up(arch, side):
    tile, compiled = compile_linear(arch, "bf16", side, side, end_steps=1)
    assert_resident(tile, compiled, arch)
    up = re.search(r"atom\.global\.(?:release\.gpu|gpu\.release)\.exch", compiled.ptx)
    assert re.search(r"atom\.global\.(?:acquire\.gpu|gpu\.acquire)\.cas", compiled.ptx)
    # no thread stores between the barrier of all and the flag
    before = compiled.ptx[: up.start()]
    assert "st.global" not in before[before.rindex("bar.sync") :]


@pytest.mark.parametrize("by_k", [False, True], ids=["forward", "dgrad"])
def test_hopper_linear_without_bulk_copies(by_k):
    tile, compiled = compile_linear(90, "bf16", 128, 128, by_k=by_k, bulk=False)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_async(compiled)
    assert_wgmma_runs_async(compiled)
    assert set(compiled.global_stores()) == {16}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_linear_of_unaligned_operands_is_lean(arch):
    tile, compiled = compile_linear(arch, "bf16", 128, 128, bulk=False, aligned=False)
    assert_resident(tile, compiled, arch)


@pytest.mark.parametrize("compile_one", [compile_linear, compile_wgrad])
def test_offsets_past_int32_cost_no_spill(compile_one):
    tile, compiled = compile_one(90, "bf16", 128, 128, bulk=False, index=tl.int64)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_async(compiled)


@pytest.mark.parametrize("side", [128, 32])
def test_ampere_linear_is_mma_fed_by_async_copies(side):
    tile, compiled = compile_linear(80, "bf16", side, side)
    assert_resident(tile, compiled, 80)
    assert_operands_arrive_async(compiled)
    assert compiled.has("HMMA")


@pytest.mark.parametrize("side", [256, 128, 64])
def test_blackwell_linear_is_fed_by_bulk_copies(side):
    tile, compiled = compile_linear(100, "bf16", side, side)
    assert_resident(tile, compiled, 100)
    assert_operands_arrive_in_bulk(compiled)
    assert "tcgen05.mma" in compiled.ptx


@pytest.mark.parametrize("by_k", [False, True], ids=["forward", "dgrad"])
def test_hopper_linear_in_tf32_is_wgmma(by_k):
    tile, compiled = compile_linear(90, "fp32", 128, 128, by_k=by_k)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_in_bulk(compiled)
    assert compiled.has("HGMMA")


@pytest.mark.parametrize("arch", [80, 90])
def test_exact_float32_uses_no_tensor_core(arch):
    tile, compiled = compile_linear(arch, "fp32", 64, 64, tf32=False)
    assert_resident(tile, compiled, arch)
    assert_operands_arrive_async(compiled)
    assert not compiled.has("HGMMA")
    assert not compiled.has("HMMA")


@pytest.mark.parametrize("lone_a", [True, False])
@pytest.mark.parametrize(("side", "dots"), [(256, [1]), (128, [2, 1]), (64, [4, 2])])
def test_hopper_wgrad_of_wide_blocks_is_wgmma_fed_by_bulk_copies(side, dots, lone_a):
    tile, compiled = compile_wgrad(90, "bf16", side, side, lone_a=lone_a)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_in_bulk(compiled)
    assert_wgmma_runs_async(compiled, *dots)
    assert compiled.has("UTMASTG")
    assert set(compiled.global_stores()) == {16}  # zeros, and parts
    assert count(compiled, "UTMALDG") == sum(1 + n for n in dots) * tile.stages
    # a step divides nothing
    loops = instructions_of_loops(compiled)
    assert len(loops) == len(dots)
    assert not any("I2F" in loop or "MUFU" in loop for loop in loops)


@pytest.mark.parametrize("lone_a", [True, False])
@pytest.mark.parametrize("side", [32, 16])
def test_hopper_wgrad_gathers_narrow_blocks_into_wgmma_tiles(side, lone_a):
    tile, compiled = compile_wgrad(90, "bf16", side, side, lone_a=lone_a)
    assert_resident(tile, compiled, 90)
    # a lone side of 16 columns is 8 bytes a thread
    assert_operands_arrive_async(compiled, narrow=(8,) if side == 16 else ())
    assert_wgmma_runs_async(compiled, 1, 1)
    assert set(compiled.global_stores()) == {16}


@pytest.mark.parametrize(("sides", "dots"), [((64, 128), [2, 1]), ((128, 64), [4, 2])], ids=str)
def test_hopper_wgrad_of_rectangles(sides, dots):
    tile, compiled = compile_wgrad(90, "fp16", *sides)
    assert_resident(tile, compiled, 90)
    assert_operands_arrive_in_bulk(compiled)
    assert_wgmma_runs_async(compiled, *dots)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_wgrad_of_unaligned_operands_is_lean(arch):
    tile, compiled = compile_wgrad(arch, "bf16", 128, 128, bulk=False, aligned=False)
    assert_resident(tile, compiled, arch)


@pytest.mark.parametrize("lone_a", [True, False])
def test_ampere_wgrad_is_mma_fed_by_async_copies(lone_a):
    tile, compiled = compile_wgrad(80, "bf16", 64, 64, lone_a=lone_a)
    assert_resident(tile, compiled, 80)
    assert_operands_arrive_async(compiled)
    assert compiled.has("HMMA")


@pytest.mark.parametrize("side", [256, 128, 64])
def test_blackwell_wgrad_is_lean(side):
    tile, compiled = compile_wgrad(100, "bf16", side, side)
    assert_resident(tile, compiled, 100)
    assert "tcgen05.mma" in compiled.ptx


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])
@pytest.mark.parametrize("side", [128, 32])
def test_wgrad_in_float32_is_lean(side, tf32):
    tile, compiled = compile_wgrad(90, "fp32", side, side, tf32=tf32)
    assert_resident(tile, compiled, 90)
    assert compiled.has("HGMMA") == tf32


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_sum_of_parts_is_lean(arch):
    tile = Tile(64, 256, 64, 8, 4, 1)
    shared = wgrad.layout(tile, True, 64, 64, False, DEVICES[arch])
    strides = ["stride_oa", "stride_ob"]
    types = dict.fromkeys(["T", "NA", "NB", "absent", "programs", *strides], "i32")
    types |= dict.fromkeys(("bundle_ptr", "bundle_count_ptr", "index_ptr"), "*i32")
    compiled = compile_for(
        arch,
        wgrad._block_sparse_wgrad_sum_kernel,
        types | {"out_ptr": "*bf16", "scratch_ptr": "*fp32"},
        {"SUM_ROWS": 16, "INDEX": tl.int32, **shared},
        strides_of_one=["stride_ob"],
        unspecialized=["T", "absent", "programs"],
    )
    assert_lean(compiled, arch)
    assert set(widths(compiled, "LDG")) <= {4, 16}
    assert set(compiled.global_stores()) == {16}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_topology_kernels_are_lean(arch):
    types = {"table_ptr": "*i64", "counts_ptr": "*i32"}
    for kernel, constants in (
        (_topology_count_kernel, {}),
        (_topology_list_kernel, {"ROW_SIZE": 2, "COL_SIZE": 4}),
    ):
        constants |= {"N": 256, "CHUNK": CHUNK}
        assert_lean(compile_for(arch, kernel, types, constants), arch)
