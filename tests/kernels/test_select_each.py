import pytest
import torch

import aot
from triton_sparsity.kernels import select_each as module
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.select import select_reference
from triton_sparsity.kernels.select_each import select_each

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = INTERPRET or DEVICE == "cuda"
BACKENDS = ["auto"] if INTERPRET else ["auto", "torch"]  # plain torch has a stage of its own
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_selects(tensors, ks, scales=None, **options):
    found = select_each(tensors, ks, scales=scales, **options)
    assert [t.dtype for t in found] == [torch.float32, torch.int64, torch.int64]
    for i, (tensor, k) in enumerate(zip(tensors, ks, strict=True)):
        scale = None if scales is None else scales[i : i + 1]
        want = select_reference([tensor], k, scale)
        for got, exact in zip(found, want, strict=True):
            assert got.shape == (len(tensors),)
            assert got[i].item() == exact.item(), (i, k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "scaled"),
    # all are float32 before they are scaled
    [(dtype, dtype == torch.float32) for dtype in DTYPES],
    ids=str,
)
def test_each_threshold_is_that_of_its_tensor(dtype, scaled, backend):
    sizes = [(1, 1), (7, 13), (64, 65), (0, 5), (3, 3)]
    tensors = [randn(*size, seed=i).to(dtype) for i, size in enumerate(sizes)]
    scales = torch.tensor([0.3, 2.0, 1e-20, 1.0, 0.0], device=DEVICE) if scaled else None
    for share in (0, 0.01, 0.99, 1):
        assert_selects(
            tensors, [round(share * t.numel()) for t in tensors], scales, backend=backend
        )


def test_ties_zeros_subnormal_and_the_largest():
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0, tiny / 4, torch.finfo(torch.float32).max])
    x = x[:, None].to(DEVICE)
    for k in range(8):
        assert_selects([x, x * 0, x[:4]], [k, k, min(k, 4)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted_where_it_is(bad):
    tensors = [randn(9, 9, seed=i) for i in range(3)]
    tensors[1][2, ::2] = bad
    assert select_each(tensors, [4, 4, 4]).nonfinite.tolist() == [0, 5, 0]
    assert select_each(tensors, [0, 0, 81]).nonfinite.tolist() == [0, 5, 0]


def test_any_strides_and_large_ones_among_small(monkeypatch):
    monkeypatch.setattr(module, "MOST", 100)
    monkeypatch.setattr(module, "BLOCK", 64)
    tensors = [randn(9, 11).T, randn(20, 30, seed=1), randn(18, 9, seed=2)[::2], randn(40, 40)]
    scales = torch.tensor([0.5, 1.5, 1.0, 2.0], device=DEVICE)
    for own in (None, scales):
        assert_selects(tensors, [50, 321, 40, 1600], own)


@pytest.mark.skipif(not TRITON, reason="counts launches of the kernel")
def test_a_list_is_one_launch(monkeypatch):
    kernel, launches = module._select_each_kernel, []
    noted = type("Noted", (), {"__getitem__": lambda _, g: launches.append(g) or kernel[g]})
    monkeypatch.setattr(module, "_select_each_kernel", noted())
    select_each([randn(5, 5 + i) for i in range(9)], [3] * 9)
    assert launches == [(9,)]


@pytest.mark.skipif(not TRITON, reason="the operator wraps the kernel")
def test_opcheck():
    torch.library.opcheck(module._op, ([randn(4, 5), randn(3, 3)], [7, 2], None))


def test_bad_arguments_are_named():
    for tensors, ks in (([], []), ([randn(2, 2)], [1, 2])):
        with pytest.raises(ValueError, match=r"^select_each: ks must be"):
            select_each(tensors, ks)
    with pytest.raises(ValueError, match=r"select.*: k must be from 0 to 4 .*got 5"):
        select_each([randn(2, 2)], [5])
    if not TRITON:
        with pytest.raises(RuntimeError, match="select_each: backend='triton'"):
            select_each([randn(2, 2)], [1], backend="triton")


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_the_kernel_is_lean(arch):
    pointers = {"table_ptr": "*i64", "scales_ptr": "*fp32", "value_ptr": "*fp32"}
    pointers |= {"keep_ties_ptr": "*i64", "nonfinite_ptr": "*i64"}
    constants = {"DTYPE": tl.float32, "N": 256, "BLOCK": module.BLOCK}
    compiled = aot.compile_for(arch, module._select_each_kernel, pointers, constants, num_warps=16)
    aot.assert_lean(compiled, arch)
