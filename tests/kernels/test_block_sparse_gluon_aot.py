"""Machine code of the product with warps of two kinds, for a Hopper GPU that is absent."""

import re

import pytest
import torch

from aot import SHARED_LIMIT, assert_lean, compile_for
from triton_sparsity.kernels.launch import INTERPRET
from triton_sparsity.kernels.tiles import Device, Tile, can_specialise, linear_tiles, stores

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler"),
]

HOPPER = Device((9, 0), 132, 228 * 1024)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RESERVED = 1024  # bytes of shared memory that the driver takes of every program
REGISTERS = 65536  # of a multiprocessor


def own_tile(side, which=0):
    tiles = linear_tiles(side, side, torch.bfloat16, HOPPER, precision="tf32", bulk=True)
    return tiles[which]._replace(specialised=1)


def compile_specialised(tile, side, *, dtype="bf16", by_k=False, bias=False):
    from triton.experimental.gluon import language as gl

    from triton_sparsity.kernels import block_sparse_gluon as product

    assert can_specialise(tile)
    consumers, parts = tile.warps // 4, stores(tile.n)

    def box(rows, cols):
        kind = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
        layout = gl.NVMMASharedLayout.get_default_for([rows, cols], kind)
        return f"tensordesc<{dtype}[{rows},{cols}],{layout!r}>"

    sizes = ["M", "N", "TASKS", "group", "shift"]
    return compile_for(
        90,
        product._block_sparse_linear_specialised_kernel,
        {
            "x": box(tile.m, tile.k),
            "w": box(*((tile.k, tile.n) if by_k else (tile.n, tile.k))),
            "y": box(tile.m // consumers, tile.n // parts),
            "bias_ptr": f"*{dtype}",
            **dict.fromkeys(("task_ptr", "index_ptr"), "*i32"),
            **dict.fromkeys(sizes, "i32"),
        },
        {
            "HAS_BIAS": bias,
            "W_BY_K": by_k,
            "SIDE_N": side,
            "SIDE_K": side,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "STAGES": tile.stages,
            "STORES": parts,
            "CONSUMERS": consumers,
            "CONSUMER_REGISTERS": product.CONSUMER_REGISTERS,
            "PRODUCER_REGISTERS": product.PRODUCER_REGISTERS,
        },
        unspecialized=["M", "TASKS", "group", "shift"],
    )


def count(compiled, pattern):
    return len(re.findall(pattern, compiled.sass))


@pytest.mark.parametrize(
    ("side", "which", "options"),
    [
        (256, 0, {}),
        (128, 0, {"bias": True}),
        (128, 0, {"by_k": True}),
        (128, 0, {"dtype": "fp16", "by_k": True}),
        (64, 0, {"bias": True}),
        (64, 1, {"by_k": True}),
        (64, 1, {"dtype": "fp16"}),
    ],
    ids=str,
)
def test_consumers_are_wgmma_and_a_producer_feeds_them(side, which, options):
    tile = own_tile(side, which)
    compiled = compile_specialised(tile, side, **options)
    assert_lean(compiled, 90)
    assert compiled.stack == 0
    assert compiled.shared + RESERVED <= SHARED_LIMIT[90] + RESERVED
    consumers = tile.warps // 4
    # groups of four warps: the consumers', and the producer's
    assert (consumers + 1) * 128 * compiled.registers <= REGISTERS

    # each consumer has one group a step, and waits for all but the last of them
    assert compiled.has("HGMMA")
    assert not compiled.has("HMMA")
    assert count(compiled, r"HGMMA.*gsb0") == consumers
    assert count(compiled, r"WARPGROUP.DEPBAR.LE gsb0, 0x1") == consumers
    assert count(compiled, r"WARPGROUP.DEPBAR.LE gsb0, 0x0") == consumers
    # operands come, and sums go, by the copy engine; threads load lists and the bias alone
    assert compiled.has("UTMALDG")
    assert compiled.has("UTMASTG")
    assert not compiled.has("LDGSTS")
    assert compiled.global_stores() == []
    assert max(compiled.global_loads()) <= 4
    # the producer gives its registers to consumers
    taken = {
        int(n, 16) for n in re.findall(r"USETMAXREG\.\w+\.CTAPOOL (?:UP\d, )?(\w+)", compiled.sass)
    }
    assert 24 in taken
    assert 240 in taken


@pytest.mark.parametrize("tile", [Tile(128, 128, 64, 4, 6, 1, 1), Tile(64, 64, 64, 4, 8, 1, 1)])
def test_one_group_of_consumers_is_lean(tile):
    compiled = compile_specialised(tile, tile.n)
    assert_lean(compiled, 90)
    assert count(compiled, r"HGMMA.*gsb0") == 1
    assert compiled.has("UTMASTG")
