import numpy as np
import pytest
import torch

from triton_sparsity.kernels import table as module
from triton_sparsity.kernels.launch import INTERPRET, TILE_ELEMENTS, extent, tl, triton
from triton_sparsity.kernels.table import (
    NEVER,
    Matrices,
    device_table,
    find_tensor,
    list_index_type,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_TRITON = INTERPRET or DEVICE.type == "cuda"


def table_of(entries):
    entries = [*zip(*entries, strict=True)]  # columns
    if DEVICE.type == "cuda":
        with torch.cuda.device(0):
            return device_table(torch.device("cuda", 0), entries)
    return device_table(DEVICE, entries)


def test_columns_stand_side_by_side_and_programs_are_numbered():
    table, programs = table_of([(3, 10, 2**40), (1, 11, -1), (5, 12, 0)])
    assert programs == 9
    assert table.dtype == torch.int64
    assert table.tolist() == [[0, 3, 4, NEVER], [10, 11, 12, NEVER], [2**40, -1, 0, NEVER]]


def test_the_same_list_is_not_copied_again_and_old_ones_go():
    first, _ = table_of([(1, 1)])
    assert table_of([(1, 1)])[0] is first
    assert table_of([(1, 2)])[0] is not first
    for i in range(module.KEPT - 2):
        table_of([(2, 10 + i)])
    assert table_of([(1, 1)])[0] is first, "used last, although made first"
    for i in range(module.KEPT):
        table_of([(3, 100 + i)])
    assert len(module._tables) == module.KEPT
    assert table_of([(1, 1)])[0] is not first


@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 5), (5, 1)), ((3, 5), (1, 3)), ((1, 7), (9, 2)), ((0, 4), (4, 1))]
)
def test_a_list_of_matrices_says_what_each_does(shape, strides):
    tensors = [torch.zeros(2, 2), torch.zeros(99).as_strided(shape, strides)]
    found = Matrices.of(tensors)
    for place, t in enumerate(tensors):
        said = (t.data_ptr(), *t.shape, *t.stride())
        assert tuple(column[place] for column in found) == said
    assert found.turned.tolist() == [False, strides[0] < strides[1]]
    assert found.extent == max(map(extent, tensors))
    assert Matrices.of([]).extent == 0


@pytest.mark.parametrize("past", [0, 1])
def test_offsets_take_as_many_bits_as_the_longest_matrix_needs(past):
    ends = 2**31 - TILE_ELEMENTS + past
    long = Matrices(*(np.array([n]) for n in (0, 1, ends, ends, 1)))
    short = Matrices(*(np.array([n]) for n in (0, 1, 1, 1, 1)))
    assert list_index_type(short, long) == (tl.int64 if past else tl.int32)


@triton.jit
def _owner_kernel(table_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), find_tensor(table_ptr, N))


@pytest.mark.skipif(not ON_TRITON, reason="of the kernels")
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 33])
def test_every_program_finds_its_tensor(length, least):
    counts = [least + (3 + i * 7) % 5 for i in range(length)]
    table, programs = table_of([(count, 0) for count in counts])
    out = torch.full((programs,), -1, dtype=torch.int32, device=table.device)
    _owner_kernel[(programs,)](table, out, N=table.shape[1])
    assert out.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
