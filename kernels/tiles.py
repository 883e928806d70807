"""Tiles of the block-sparse kernels: which shape, how many warps, stages and programs.

Pure functions of the weight, its blocks, the dtype, the direction and the device; not of the
density, because the kernels' loops run over what is kept. Of several tiles of a product
``schedule.py`` chooses by the number of tokens.
``tuning.py`` overrides them with what was measured.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .launch import HAS_TRITON
from .pattern import Pattern
from .topology import BUNDLE_WIDTH

if HAS_TRITON or TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED_PROCESSORS = 3  # few, so that the programs of small tests walk several tiles each
MAX_STAGES = 8
RESERVE = 2048  # bytes of shared memory a program, for barriers and the driver's own


class Tile(NamedTuple):
    """One launch configuration of a matrix kernel.

    ``m``, ``n`` and ``k`` are tokens, output features and reduced features of a linear; for a
    weight gradient, elements of the lone side, of the bundle, and tokens a step.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int  # resident on a multiprocessor; the grid is no larger than they allow
    specialised: int = 0  # 1: by the kernel of ``block_sparse_gluon.py``, its warps consumers'


class Device(NamedTuple):
    """What the choice of a tile needs to know of a device."""

    capability: tuple[int, int]
    processors: int
    shared: int  # bytes that the programs on one multiprocessor may hold


# (direction, shape, pattern, dtype) -> tile, from an autotuning run on the device at hand;
# direction is "forward", "dgrad" or "wgrad"
measured: dict[tuple[str, tuple[int, int], Pattern, torch.dtype], Tile] = {}

_SHARED = {(8, 0): 164, (8, 7): 164, (9, 0): 228, (10, 0): 228, (10, 3): 228}  # KiB


def device_of(tensor: Tensor) -> Device:
    """Return the facts of the tensor's GPU, or of an imaginary one for the interpreter."""
    if not tensor.is_cuda:
        return Device((9, 0), INTERPRETED_PROCESSORS, _SHARED[9, 0] * 1024)
    return _facts_of(tensor.device)


@cache
def _facts_of(device: torch.device) -> Device:
    capability = torch.cuda.get_device_capability(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Device(capability, processors, _SHARED.get(capability, 100) * 1024)


def bulk_copies(device: Device, *tensors: Tensor) -> bool:
    """Tell whether the bulk copy engine can address all the matrices: unit stride, 16 bytes."""
    return device.capability[0] in (9, 10) and all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def descriptor(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Describe a matrix to the bulk copy engine, in tiles of ``rows`` by ``cols``.

    ``bulk_copies`` has found that it can be addressed: Triton looks at the first of a form alone.
    """
    form = *matrix.shape, *matrix.stride(), rows, cols, matrix.dtype
    fields = _forms.get(form)
    if fields is None:
        shape, strides = list(matrix.shape), list(matrix.stride())
        found = TensorDescriptor(matrix, shape, strides, [rows, cols])
        _forms[form] = {name: field for name, field in vars(found).items() if name != "base"}
        return found
    found = object.__new__(TensorDescriptor)
    vars(found).update(fields, base=matrix)
    return found


# all of a descriptor but its tensor, by what that is like; a handful a weight and batch
_forms: dict[tuple[Any, ...], dict[str, Any]] = {}


def can_specialise(tile: Tile) -> bool:
    """Tell whether warps of two kinds can compute a product's tile: each group of four consumer
    warps a ``wgmma`` of its rows, one program alone on its multiprocessor.
    """
    consumers = tile.warps // 4
    return tile.warps in (4, 8) and tile.programs == 1 and 64 * consumers <= tile.m


def dot_precision(dtype: torch.dtype) -> str:
    """Return what the dots of a launch do with float32, as torch's setting says."""
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if dtype == torch.float32 and exact else "tf32"


def _stages(device: Device, programs: int, held: int, stage: int, wanted: int = MAX_STAGES) -> int:
    """Return how many stages of ``stage`` bytes fit beside what a program ``held`` anyway."""
    return max(2, min(wanted, (device.shared // programs - RESERVE - held) // stage))


def stores(n: int) -> int:
    """Return in how many parts a product's tile is stored in bulk: it takes a part's memory."""
    return 2 if n >= 64 else 1


@cache
def linear_tiles(
    side_n: int, side_k: int, dtype: torch.dtype, device: Device, *, precision: str, bulk: bool
) -> tuple[Tile, ...]:
    """Return the tiles of a product with ``side_n`` x ``side_k`` blocks, ``side_k`` reduced over:
    the most efficient first, then smaller ones, for tokens too few to fill the device with it.

    Args:
        precision: ``dot_precision`` of the dtype.
        bulk: the bulk copy engine moves the operands.
    """
    size = dtype.itemsize
    if precision == "ieee":
        return (Tile(64, min(side_n, 64), min(side_k, 16), 4, 3, 2),)
    wide = 128 if device.capability[0] >= 9 else 64  # bytes of a step's rows
    n = min(side_n, 128)
    # tokens, outputs, reduced features a step; warps, stages at most, programs a multiprocessor
    shapes: list[tuple[int, int, int, int, int, int]] = []
    if not bulk:
        warps, programs = (8, 1) if n == 128 else (4, 2)
        shapes.append((128, n, wide // size, warps, 4, programs))
    elif size == 4:
        shapes.append((128, n, 32, 8, 4, 1))
    else:
        match side_n:
            case 256:
                shapes.append((128, 256, 64, 8, MAX_STAGES, 1))
            case 128:
                shapes.append((256, 128, 64, 8, MAX_STAGES, 1))
            case _:
                shapes += [(512, n, 32, 8, MAX_STAGES, 1), (256, n, 64, 8, MAX_STAGES, 1)]
        shapes.append((128, n, 64, 8, 6, 1))
    shapes.append((64, min(side_n, 64), 128 // size, 4, 6, 2))
    tiles = []
    for m, n, k, warps, wanted, programs in shapes:
        k = min(side_k, k)
        # the output passes through shared memory while the next tile's operands arrive there
        held = m * n * size // (stores(n) if bulk else 1)
        stages = _stages(device, programs, held, (m + n) * k * size, wanted)
        tiles.append(Tile(m, n, k, warps, stages, programs))
    return tuple(tiles)


@cache
def wgrad_tile(
    side_u: int, side_v: int, dtype: torch.dtype, device: Device, *, precision: str, bulk: bool
) -> Tile:
    """Choose the tile of a weight gradient: ``side_u`` is the lone side, ``side_v`` the bundled.

    Args:
        precision: ``dot_precision`` of the dtype.
        bulk: the bulk copy engine moves the operands.
    """
    size = dtype.itemsize
    if precision == "ieee":
        return Tile(min(side_u, 16), BUNDLE_WIDTH, 16, 8, 3, 1)
    m = min(side_u, 128 if bulk and size == 2 else 64)
    k, warps, programs, wanted = 64, 8, 1, 4
    if size == 4 or device.capability[0] < 9:
        k, wanted, warps = 64 // size, 3, 4 if m == 16 else 8
    elif m == 16 or (bulk and m == 64):
        k, warps, programs = 32, 4, 2
    elif not bulk and m == 64:
        k = 32
    stages = _stages(
        device, programs, m * BUNDLE_WIDTH * size, (m + BUNDLE_WIDTH) * k * size, wanted
    )
    return Tile(m, BUNDLE_WIDTH, k, warps, stages, programs)
