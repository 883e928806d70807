"""Tables: how a list of tensors goes into one launch.

A table is int64, ``(columns, N)``, one place a tensor: addresses, sizes, strides, and in the first
column the first of its programs, ascending. N is a power of two; what fills it up starts after
every program.

Reading order: kernels' side -> the table on the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from threading import Lock

import torch
from torch import Tensor

from .launch import tl, triton

KEPT = 64  # tables: a model's weights, gradients and optimiser states, and what they replaced
NEVER = 2**62

Key = tuple[torch.device, int, tuple[tuple[int, ...], ...]]

_tables: OrderedDict[Key, Tensor] = OrderedDict()
_captured: list[tuple[Tensor, ...]] = []
_lock = Lock()  # hooks on gradients run in autograd's threads


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


def device_table(device: torch.device, entries: Sequence[tuple[int, ...]]) -> tuple[Tensor, int]:
    """Return the table of a list, and how many programs it takes; the device is not waited for.

    The last ``KEPT`` tables stay where they are, so that the same list on the same stream is not
    copied again. What a CUDA graph is captured with stays for good, some 100 bytes a tensor, since
    nobody says when the graph is gone: each replay makes the copy again, from pinned memory.

    Args:
        device: of the kernel; the current one, if a GPU.
        entries: one a tensor: how many programs it takes, one or more, and its other columns.
    """
    programs = sum(entry[0] for entry in entries)
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        host = _host_table(entries, pin_memory=True)
        table = host.to(device, non_blocking=True)
        _captured.append((host, table))
        return table, programs
    # on another stream neither would the copy be over nor the memory's next use be later
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    key = device, stream, tuple(entries)
    with _lock:
        table = _tables.pop(key, None)
        if table is None:
            table = _host_table(entries, pin_memory=on_gpu).to(device, non_blocking=True)
        _tables[key] = table
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    return table, programs


def _host_table(entries: Sequence[tuple[int, ...]], *, pin_memory: bool) -> Tensor:
    counts, *columns = (list(column) for column in zip(*entries, strict=True))
    first = list(accumulate(counts, initial=0))[:-1]
    spare = [NEVER] * ((1 << (len(entries) - 1).bit_length()) - len(entries))
    table = [column + spare for column in (first, *columns)]
    return torch.tensor(table, device="cpu", pin_memory=pin_memory)
