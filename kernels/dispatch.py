"""Dispatch: which products of a linear take the block-sparse kernels, and which the dense GEMM.

A product with density d of its blocks kept takes ``d / e`` of the dense product's time, where e
depends on the block, the device and the direction; so below a density, its break-even, it is the
faster one. The dense product reads the weight as it is; so where its pruned blocks are zero, both
give the same result within rounding, but for a dense weight gradient, which is whole. The choice
needs the number of kept blocks on the host, once an update of the mask.

Reading order: what is chosen -> the tables -> the choice.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .pattern import Block, grid_shape
from .tiles import dot_precision
from .topology import bundling
from .tuning import break_even, shape_class

Dispatch = Literal["auto", "sparse", "dense"]


class Paths(NamedTuple):
    """Which products skip pruned blocks; the others are dense, and mask nothing.

    A dense ``forward`` or ``dgrad`` needs a weight whose pruned blocks are zero; a dense ``wgrad``
    gives them their gradient too.
    """

    forward: bool
    dgrad: bool
    wgrad: bool

    def __str__(self) -> str:
        names = [name for name, sparse in self._asdict().items() if sparse]
        return "block-sparse" if all(self) else ", ".join(names) or "dense"


class BreakEven(NamedTuple):
    """The highest density at which each product is faster block-sparse; 0: never."""

    forward: float
    dgrad: float
    wgrad: float


class Kind(NamedTuple):
    """What a break-even is a property of.

    Attributes:
        device: ``torch.cuda.get_device_name``, or ``"cpu"``.
        dtype: of the products.
        pattern: the blocks.
        shape: the weight's sides, each rounded down to a power of two.
    """

    device: str
    dtype: torch.dtype
    pattern: Block
    shape: tuple[int, int]


# what a program says itself; comes before the device's tuning table, and that before what is below
measured: dict[Kind, BreakEven] = {}

# Side of a block -> break-even. On a CPU the side is a line's, by which an activation that is read
# is used; of endless lines, see ``_CPU_LINE``. Measured on two quiet cores of an AMD EPYC, MKL,
# float32, 2048 x 2048 and 512 tokens, 512 x 2048 and 256; a little less where both disagree.
_CPU = {256: 1.0, 128: 1.0, 64: 0.92, 32: 0.35, 16: 0.12}
_CPU_WGRAD = {256: 0.85, 128: 0.8, 64: 0.55, 32: 0.2, 16: 0.06}
# elements of a line of blocks whose product takes as long as its Python
_CPU_LINE = 12288
# the products of a smaller weight are over before the first line's are set up
_CPU_ELEMENTS = 2**18
# No GPU has been measured yet. Hopper: two thirds of the density at which the model of
# docs/modelled.md breaks even. Others: two thirds of the densities at which torch.sparse's BSR
# linear does on an A100: 0.4, 0.2 and 0.1 for blocks of 64, 32 and 16.
_HOPPER = {256: 0.5, 128: 0.5, 64: 0.33, 32: 0.18, 16: 0.09}
_OTHER_GPU = {256: 0.27, 128: 0.27, 64: 0.27, 32: 0.13, 16: 0.06}
# of a smaller weight the dense product takes little longer than a launch
_GPU_ELEMENTS = 2**20


def kind_of(
    shape: tuple[int, int], pattern: Block, dtype: torch.dtype, device: torch.device
) -> Kind:
    """Return the key of a weight in ``measured``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Kind(name, dtype, pattern, shape_class(shape))


def built_in(
    shape: tuple[int, int],
    pattern: Block,
    dtype: torch.dtype,
    device: torch.device,
    *,
    triton_runs: bool,
) -> BreakEven:
    """Return what is known before anything was measured on the device: rather too little."""
    (R, C), (rows, cols) = shape, (pattern.rows, pattern.cols)
    grid = grid_shape(pattern, shape)
    if triton_runs:
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
        table = _HOPPER if major == 9 else _OTHER_GPU
        # exact float32 has no tensor cores, which the tables are about
        if R * C < _GPU_ELEMENTS or dot_precision(dtype) == "ieee":
            return BreakEven(0, 0, 0)
        lone = rows if bundling(pattern, grid)[0] else cols
        return BreakEven(table[rows], table[cols], 0.9 * table[lone])
    # 16-bit products have instructions of their own there, and nobody has measured them
    if device.type != "cpu" or dtype != torch.float32 or R * C < _CPU_ELEMENTS:
        return BreakEven(0, 0, 0)

    def gathered(table: dict[int, float], side: int, length: int) -> float:
        return table[side] * max(0.0, 1 - _CPU_LINE / max(side * length, 1))

    wide = (rows, C) if rows >= cols else (cols, R)
    return BreakEven(gathered(_CPU, rows, C), gathered(_CPU, cols, R), gathered(_CPU_WGRAD, *wide))


def choose(
    kept: int,
    shape: tuple[int, int],
    pattern: Block,
    dtype: torch.dtype,
    device: torch.device,
    *,
    triton_runs: bool,
    dispatch: Dispatch = "auto",
    known: dict[object, list[float]] | None = None,
) -> Paths:
    """Choose the paths of a weight.

    Never by the number of tokens: a batch of another size must not change what a model computes.
    Under ``torch.use_deterministic_algorithms`` what was measured does not count, so that the
    choice is the same on every machine of one kind.

    Args:
        kept: number of kept blocks.
        shape: of the weight, ``(R, C)``.
        pattern: its blocks, of 16 to 256 a side.
        dtype: of the products.
        device: the weight's.
        triton_runs: whether the Triton kernels run there, or plain torch.
        dispatch: ``"auto"``: what is faster; ``"sparse"``, ``"dense"``: this for all.
        known: the most blocks that may be kept, as found for weights of these blocks here.

    Raises:
        ValueError: ``dispatch`` is none of the three.
    """
    if dispatch != "auto":
        check_dispatch(dispatch)
        return Paths(*[dispatch == "sparse"] * 3)
    known, key = {} if known is None else known, (shape, dtype)
    if (most := known.get(key)) is not None:
        return Paths(*[kept <= blocks for blocks in most])
    limits = None
    if not torch.are_deterministic_algorithms_enabled():
        limits = measured.get(kind_of(shape, pattern, dtype, device))
        if limits is None and (found := break_even(shape, pattern, dtype, device)):
            limits = BreakEven(*found)
    if limits is None:
        limits = built_in(shape, pattern, dtype, device, triton_runs=triton_runs)
    down, across = grid_shape(pattern, shape)
    known[key] = most = [limit * down * across if limit > 0 else -1 for limit in limits]
    return Paths(*[kept <= blocks for blocks in most])


def check_dispatch(dispatch: str) -> None:
    """Refuse what is no ``Dispatch``.

    Raises:
        ValueError: it is none of the three.
    """
    if dispatch not in get_args(Dispatch):
        raise ValueError(f"dispatch must be 'auto', 'sparse' or 'dense', got {dispatch!r}")


def as_tensor(paths: Paths) -> Tensor:
    """Return ``paths`` as a bool tensor ``(3,)`` on the CPU: a compiled graph keeps no guard on
    its values, so an update does not recompile it.
    """
    return torch.tensor(paths, device="cpu")
