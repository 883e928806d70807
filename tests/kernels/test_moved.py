"""The kernels behind ``take_all_pruned`` and ``put_all_back_``, against plain torch."""

import pytest
import torch

import aot
from triton_sparsity.kernels import moved as module
from triton_sparsity.kernels.bits import pack
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.pattern import NM, Block, Unstructured, grid_shape
from triton_sparsity.kernels.retained import put_all_back_, take_all_pruned, take_pruned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = INTERPRET or DEVICE == "cuda"
SHAPES = [(1, 1), (32, 64), (33, 64), (32, 63), (31, 65), (40, 300), (7, 13), (0, 5), (64, 128)]
PATTERNS = [Unstructured(), Block(2, 4), Block(256, 256)]
if not INTERPRET:
    PATTERNS += [NM(2, 4), Block(1, 1), Block(16, 32)]
DTYPES = [torch.float16] if INTERPRET else [torch.float32, torch.float16, torch.float64]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.detach().contiguous().view(WORDS[tensor.element_size()])


def anything(shape, dtype, seed):
    g = torch.Generator().manual_seed(seed + shape[0] * 7919 + shape[1])
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=g, dtype=torch.uint8)
    return raw.view(dtype).view(shape).to(DEVICE)


def make_mask(pattern, shape, share, seed):
    g = torch.Generator().manual_seed(seed)
    grid = torch.rand(grid_shape(pattern, shape), generator=g) < share
    return (grid if isinstance(pattern, Block) else pack(grid, backend="torch")).to(DEVICE)


def subjects(pattern, dtype, share):
    """Weights of all shapes and layouts, with masks of any strides."""
    weights = [anything(shape, dtype, i) for i, shape in enumerate(SHAPES)]
    turned = weights[::2] if INTERPRET else weights
    weights += [torch.empty_like(w.T.contiguous()).copy_(w.T).T for w in turned]
    weights.append(torch.cat([anything((65, 75), dtype, 0)] * 2, 1)[:, 3:78])
    weights.append(torch.cat([anything((65, 75), dtype, 1)] * 2, 1)[:, ::2])
    masks = [make_mask(pattern, w.shape, share, i) for i, w in enumerate(weights)]
    masks[5] = masks[5].T.contiguous().T
    return weights, masks


# all and nothing of what is moved alike, of blocks and of elements
SHARES = {"some": 0.5, "all kept": 2.0, "none kept": -1.0}
CASES = [
    *((pattern, "some") for pattern in PATTERNS),
    *((Block(2, 4), "all kept"), (Block(2, 4), "none kept"), (Unstructured(), "none kept")),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("pattern", "kept"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_is_taken_and_put_back_as_each_weight_would_be(dtype, pattern, kept):
    weights, masks = subjects(pattern, dtype, SHARES[kept])
    before = [bits(w).clone() for w in weights]
    copies = [w.clone() for w in weights]
    want = [take_pruned(w, m, pattern) for w, m in zip(copies, masks, strict=True)]
    pruned = [w.numel() if isinstance(pattern, Block) else 0 for w in want]
    found = take_all_pruned(weights, masks, pattern, pruned=pruned, out=[None] * len(weights))
    for weight, values, copy, exact in zip(weights, found, copies, want, strict=True):
        assert values.dtype == dtype
        assert torch.equal(bits(values), bits(exact))
        assert torch.equal(bits(weight), bits(copy))
    memory = [torch.empty_like(values) for values in found]
    put_all_back_(weights, found, masks, pattern)
    assert all(map(torch.equal, map(bits, weights), before))
    again = take_all_pruned(weights, masks, pattern, pruned=pruned, out=memory)
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in memory]
    assert all(map(torch.equal, map(bits, again), map(bits, want)))


def test_nothing_between_the_elements_changes():
    memory = torch.ones(65, 150, device=DEVICE)
    weight, mask = memory[:, ::2], make_mask(Block(4, 8), (65, 75), -1, 0)
    take_all_pruned([weight], [mask], Block(4, 8), pruned=[65 * 75], out=[None])
    assert not weight.any()
    assert memory[:, 1::2].all()


@pytest.mark.skipif(not TRITON, reason="counts launches of the kernels")
@pytest.mark.parametrize(("pattern", "count"), [(Block(2, 4), 2), (Unstructured(), 1)], ids=str)
def test_a_list_is_two_launches_of_blocks_and_one_of_elements(pattern, count, monkeypatch):
    launches = []
    for name in ("_place_kernel", "_move_kernel"):
        kernel = getattr(module, name)
        noted = {"__getitem__": lambda _, g, k=kernel: launches.append(k) or k[g]}
        monkeypatch.setattr(module, name, type("Noted", (), noted)())
    weights, masks = subjects(pattern, torch.float32, -1)
    pruned = [weight.numel() for weight in weights]
    values = take_all_pruned(weights, masks, pattern, pruned=pruned, out=[None] * len(weights))
    assert len(launches) == count
    put_all_back_(weights, values, masks, pattern)
    assert len(launches) == 2 * count


def test_a_bad_weight_in_a_list_is_named():
    good = torch.ones(4, 4, device=DEVICE)
    mask = torch.zeros(2, 2, dtype=torch.bool, device=DEVICE)
    options = {"pruned": [16, 16], "out": [None, torch.ones(3, device=DEVICE)]}
    with pytest.raises(ValueError, match=r"^take_pruned: out must have shape .*got"):
        take_all_pruned([good.clone(), good], [mask, mask], Block(2, 2), **options)
    assert good.all()
    with pytest.raises(TypeError, match=r"^put_back_: values must be .*got"):
        put_all_back_([good], [torch.zeros(16, device=DEVICE).half()], [mask], Block(2, 2))


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("take", [True, False], ids=["take", "put back"])
@pytest.mark.parametrize("packed", [True, False], ids=["elements", "blocks"])
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_values_are_moved_sixteen_bytes_at_a_time(arch, packed, take):
    types = {"table_ptr": "*i64", "place_ptr": "*i64"}
    constants = {"WORD": tl.int16, "TAKE": take, "PACKED": packed, "BROAD": True}
    constants |= {"INDEX": tl.int32, "N": 256, **module.TILE}
    compiled = aot.compile_for(
        arch, module._move_kernel, types, constants, num_warps=8 if packed else 4
    )
    aot.assert_lean(compiled, arch)
    threads = 256 if packed else 128
    share = 16 * 256 * 2 // 16 // threads
    assert compiled.global_loads().count(16) == share * (2 if packed and not take else 1)
    assert compiled.global_stores().count(16) == share * (2 if take else 1)


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_the_kernel_of_places_is_lean(arch):
    types = {"table_ptr": "*i64", "place_ptr": "*i64"}
    constants = {"N": 256, "ROWS": 32, "COLS": 64, "CHUNK": module.CHUNK}
    aot.assert_lean(
        aot.compile_for(arch, module._place_kernel, types, constants, num_warps=8), arch
    )
