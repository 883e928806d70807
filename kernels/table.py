"""Tables: how a list of tensors goes into one launch.

A table is int64, ``(columns, N)``, one place a tensor: addresses, sizes, strides, and in the first
column the first of its programs, ascending. N is a power of two; what fills it up starts after
every program. A tensor without programs is found by none.

A launch of hundreds of tensors is short beside a few microseconds of Python for each. So what a
tensor says of itself is read once, and columns are computed as columns.

Reading order: what a list says -> kernels' side -> the table on the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .launch import TILE_ELEMENTS, tl, triton, upload

KEPT = 64  # tables: a model's weights, gradients and optimiser states, and what they replaced
NEVER = 2**62

Key = tuple[torch.device, int, int, bytes]
Column = np.ndarray  # int64, one number a tensor
Kind = TypeVar("Kind", bound=Hashable)

_tables: OrderedDict[Key, Tensor] = OrderedDict()
_captured: list[tuple[Tensor, ...]] = []
_lock = Lock()  # hooks on gradients run in autograd's threads


class Matrices(NamedTuple):
    """Where the matrices of a list lie."""

    address: Column
    rows: Column
    cols: Column
    row_stride: Column
    col_stride: Column

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Matrices:
        """Read it."""
        shapes = chain.from_iterable([t.shape for t in tensors])
        strides = chain.from_iterable(map(Tensor.stride, tensors))
        sizes, steps = (
            np.fromiter(them, np.int64, 2 * len(tensors)) for them in (shapes, strides)
        )
        return cls(addresses(tensors), *sizes.reshape(-1, 2).T, *steps.reshape(-1, 2).T)

    @property
    def turned(self) -> Column:
        """Which are stored transposed: neighbours lie down the columns."""
        return self.row_stride < self.col_stride

    @property
    def extent(self) -> int:
        """One plus the largest offset of an element in any: ``launch.extent``."""
        ends = (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride
        return int(ends.max(initial=-1, where=self.rows * self.cols > 0)) + 1


def addresses(tensors: Iterable[Tensor]) -> Column:
    """Return where tensors begin."""
    return np.array([*map(Tensor.data_ptr, tensors)], np.int64)


def list_index_type(*lists: Matrices) -> Any:
    """Return ``launch.index_type`` of all matrices of the lists."""
    wide = any(matrices.extent > 2**31 - TILE_ELEMENTS for matrices in lists)
    return tl.int64 if wide else tl.int32


def swap(where: Column, one: Column | int, other: Column | int) -> tuple[Column, Column]:
    """Return two columns, exchanged where that is so."""
    return np.where(where, other, one), np.where(where, one, other)


def first_of(counts: Column) -> Column:
    """Return where each begins when all stand one after another."""
    return counts.cumsum() - counts


def alike(kinds: Iterable[Kind]) -> dict[Kind, list[int]]:
    """Return the places of each kind: what shares a launch."""
    kinds = [*kinds]
    if kinds and kinds.count(kinds[0]) == len(kinds):  # as most lists are
        return {kinds[0]: [*range(len(kinds))]}
    found: dict[Kind, list[int]] = {}
    for place, kind in enumerate(kinds):
        if kind in found:
            found[kind].append(place)
        else:
            found[kind] = [place]
    return found


@triton.jit
def find_tensor(first_ptr, N: tl.constexpr):
    """Return which tensor a program works on, given the first program of each, ascending."""
    # by halves: a program reads a handful of numbers, and not all of a long list
    found = 0
    step = N // 2
    while step > 0:
        first = tl.load(first_ptr + found + step)
        found = tl.where(first <= tl.program_id(0), found + step, found)
        step = step // 2
    return found


def device_table(device: torch.device, columns: Sequence[Any]) -> tuple[Tensor, int]:
    """Return the table of a list, and how many programs it takes; the device is not waited for.

    The last ``KEPT`` tables stay where they are, so that the same list on the same stream is not
    copied again. What a CUDA graph is captured with stays for good, some 100 bytes a tensor, since
    nobody says when the graph is gone: each replay makes the copy again, from pinned memory.

    Args:
        device: of the kernel; the current one, if a GPU.
        columns: of one or more tensors: how many programs each takes, and the other columns; or
            a number for all, but of the second.
    """
    length = len(columns[1])
    table = np.full((len(columns), 1 << (length - 1).bit_length()), NEVER)
    for row, column in zip(table, columns, strict=True):
        row[:length] = column
    counts = table[0, :length]
    programs = int(counts.sum())
    counts[:] = first_of(counts)
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        host = torch.from_numpy(table).pin_memory()
        found = host.to(device, non_blocking=True)
        _captured.append((host, found))
        return found, programs
    # on another stream neither would the copy be over nor the memory's next use be later
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    key = device, stream, len(columns), table.tobytes()
    with _lock:
        found = _tables.pop(key, None)
        if found is None:
            found = upload(torch.from_numpy(table), device)
        _tables[key] = found
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    return found, programs
