import pytest
import torch

import aot
from triton_sparsity.kernels import count as module
from triton_sparsity.kernels.bits import expand_mask, pack
from triton_sparsity.kernels.count import kept_counts
from triton_sparsity.kernels.launch import INTERPRET
from triton_sparsity.kernels.pattern import NM, Block, Unstructured, grid_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = INTERPRET or DEVICE == "cuda"
BACKENDS = ["auto"] if INTERPRET else ["auto", "torch"]  # plain torch has a stage of its own
SHAPES = [(1, 1), (7, 13), (64, 64), (65, 130), (0, 5), (300, 40), (5, 0)]
PATTERNS = [Unstructured(), NM(2, 4), Block(1, 16), Block(32, 32), Block(4, 8)]


def make(pattern, kind):
    masks = []
    for seed, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(seed)
        share = {"some": 0.3, "all": 1.0, "none": 0.0}[kind]
        grid = torch.rand(grid_shape(pattern, shape), generator=generator) < share
        masks.append((grid if isinstance(pattern, Block) else pack(grid)).to(DEVICE))
    return masks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["some", "all", "none"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_groups_and_elements_are_counted(pattern, kind, backend, monkeypatch):
    monkeypatch.setattr(module, "BYTES", 64)
    masks = make(pattern, kind)
    got = kept_counts(masks, pattern, SHAPES, backend=backend)
    assert got.dtype == torch.int64
    for mask, shape, (groups, elements) in zip(masks, SHAPES, got.tolist(), strict=True):
        kept = expand_mask(mask, pattern, shape)
        assert elements == int(kept.sum())
        assert groups == (int(mask.sum()) if isinstance(pattern, Block) else elements)


def test_an_unaligned_mask():
    memory = torch.ones(1 + 9 * 10, dtype=torch.bool, device=DEVICE)
    mask = memory[1:].view(9, 10)
    mask[0, 0] = False
    got = kept_counts([mask], Block(4, 4), [(35, 40)])
    assert got.tolist() == [[89, 35 * 40 - 16]]


@pytest.mark.parametrize("pattern", [Unstructured(), Block(32, 32)], ids=str)
def test_opcheck(pattern):
    masks = make(pattern, "some")
    heights, widths = map(list, zip(*SHAPES, strict=True))
    torch.library.opcheck(module._op, (masks, pattern.rows, pattern.cols, heights, widths))


def test_bad_masks_are_named():
    mask = torch.ones(4, 4, dtype=torch.bool)
    for bad, pattern in (
        (mask, Unstructured()),
        (mask.to(torch.uint8), Block(2, 2)),
        (mask[:, ::2], Block(2, 2)),
        (mask.to("meta"), Block(2, 2)),
    ):
        good = mask.to(torch.uint8) if isinstance(pattern, Unstructured) else mask
        with pytest.raises(ValueError, match=r"^kept_counts: masks must be .*got"):
            kept_counts([good, bad], pattern, [(8, 8), (8, 8)])


@pytest.mark.skipif(TRITON, reason="needs a machine where Triton cannot run")
def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="kept_counts: backend='triton'"):
        kept_counts(make(Block(4, 4), "all"), Block(4, 4), SHAPES, backend="triton")


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "blocks"])
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_bytes_are_read_sixteen_at_a_time(arch, packed):
    constants = {"ROWS": 32, "COLS": 32, "PACKED": packed, "ALIGNED": True, "N": 256}
    types = {"table_ptr": "*i64", "count_ptr": "*i64"}
    constants["BYTES"] = module.BYTES
    compiled = aot.compile_for(arch, module._count_kernel, types, constants, num_warps=8)
    aot.assert_lean(compiled, arch)
    assert compiled.global_loads().count(16) == module.BYTES // 16 // 256
