import numpy as np
import pytest
import torch

import aot
from triton_sparsity.kernels import prune_rows as module
from triton_sparsity.kernels.bits import unpack
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.prune_rows import (
    Part,
    prune_rows,
    prune_rows_reference,
    row_counts,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = INTERPRET or DEVICE == "cuda"
BACKENDS = ["auto"] if INTERPRET else ["auto", "torch"]
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16, torch.float64])


def randn(*shape, seed=0, dtype=torch.float32):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.round(decimals=1).to(DEVICE, dtype)  # with equal magnitudes


def by_hand(tensor, k):
    """Return kept elements as a bool list of lists: each row sorted in Python."""
    rows, cols = tensor.shape
    mask = np.ones((rows, cols), bool)
    for r in range(rows):
        n = (r + 1) * k // rows - r * k // rows
        # of equals the last goes first
        order = sorted(range(cols), key=lambda c: (abs(tensor[r, c].item()), -c))
        mask[r, order[:n]] = False
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "packed"),
    # bits are packed when all are float32
    [(dtype, dtype != torch.float16) for dtype in DTYPES],
    ids=str,
)
def test_each_row_loses_its_lowest(dtype, packed, backend, poisoned_memory):
    many = 9 if INTERPRET else 40  # a program takes a row
    sizes = [(1, 1), (7, 13), (many, 8), (5, 64), (3, 65), (2, 4100), (many, 1)]
    tensors = [randn(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]
    tensors += [randn(130, 9, seed=8, dtype=dtype).T, randn(18, 20, seed=9, dtype=dtype)[::2, 1:]]
    for share in (0, 0.81) if INTERPRET else (0, 0.03, 0.5, 0.81, 1):
        ks = [round(share * t.numel()) for t in tensors]
        masks, nonfinite = prune_rows(tensors, ks, packed=packed, backend=backend)
        assert nonfinite.tolist() == [0] * len(tensors)
        for tensor, k, mask in zip(tensors, ks, masks, strict=True):
            wanted, _ = prune_rows_reference(tensor, k, packed)
            assert mask.dtype == wanted.dtype
            assert torch.equal(mask, wanted), (tuple(tensor.shape), k)
            if tensor.numel() < 500:
                full = unpack(mask, tensor.shape[1], backend="torch") if packed else mask
                assert (full.cpu().numpy() == by_hand(tensor.cpu(), k)).all()
                assert int((~full).sum()) == k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
def test_parts_are_pruned_as_the_whole_is(packed, backend):
    tensors = [randn(33, 13), randn(7, 40, seed=1)]
    ks = [211, 99]
    wanted, _ = prune_rows(tensors, ks, packed=packed)
    for rows in (slice(0, 5), slice(5, 5), slice(2, 7)):
        parts = [Part(rows.start, len(tensor)) for tensor in tensors]
        own = [tensor[rows] for tensor in tensors]
        found, _ = prune_rows(own, ks, packed=packed, parts=parts, backend=backend)
        assert all(torch.equal(m, w[rows]) for m, w in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match="parts must have 7 rows each"):
        prune_rows(tensors[1:], [99], packed=packed, parts=[Part(1, 7)])


def test_counts_are_even_and_add_up():
    assert row_counts(7, 5).tolist() == [1, 1, 2, 1, 2]
    for k in range(30):
        counts = row_counts(k, 7)
        assert counts.sum() == k
        assert np.ptp(counts) <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted_where_it_is(bad):
    tensors = [randn(9, 9, seed=i) for i in range(3)]
    tensors[1][2, ::2] = bad
    for packed in (True, False):
        _, nonfinite = prune_rows(tensors, [40, 0, 81], packed=packed)
        assert nonfinite.tolist() == [0, 5, 0]


def test_nothing_is_a_tensor_too():
    masks, nonfinite = prune_rows([randn(0, 5), randn(5, 0)], [0, 0], packed=True)
    assert [tuple(mask.shape) for mask in masks] == [(0, 1), (5, 0)]
    assert nonfinite.tolist() == [0, 0]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(module, "_CHUNK", 64)
    tensor = randn(50, 30)
    (mask,), _ = prune_rows([tensor], [777], packed=False)
    assert torch.equal(mask, prune_rows_reference(tensor, 777, False)[0])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^prune_rows: ks must be 1.*got 2"):
        prune_rows([randn(2, 2)], [1, 2], packed=True)
    with pytest.raises(ValueError, match=r"^prune_rows: k must be from 0 to 4 scores, got 5"):
        prune_rows([randn(2, 2)], [5], packed=True)
    with pytest.raises(ValueError, match=r"^prune_rows: tensors must be float .*int"):
        prune_rows([torch.ones(2, 2, dtype=torch.int32)], [1], packed=True)
    if not TRITON:
        with pytest.raises(RuntimeError, match="prune_rows: backend='triton'"):
            prune_rows([randn(2, 2)], [1], packed=True, backend="triton")


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "bool"])
@pytest.mark.parametrize("block_c", [module.NARROWEST, 128, module.TILE])
def test_the_kernel_is_lean(arch, packed, block_c):
    pointers = {"table_ptr": "*i64", "nonfinite_ptr": "*i64"}
    constants = {"DTYPE": tl.float32, "PACKED": packed, "INDEX": tl.int32, "N": 256}
    constants |= {"BLOCK_R": module.TILE // block_c, "BLOCK_C": block_c}
    warps = {"num_warps": module.WARPS}
    compiled = aot.compile_for(arch, module._prune_rows_kernel, pointers, constants, **warps)
    aot.assert_lean(compiled, arch)
