"""Forms of a mask: bool, packed bits, in full, and words for a CPU.

A packed mask has one bit an element, its rows start at a byte, the first element is the lowest
bit, and the bits past the last column are 0: ``numpy.packbits(mask, axis=1, bitorder="little")``.

Reading order: references -> kernels -> launchers -> operators -> public functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .grid import ceil_div, expand_blocks
from .launch import FUSED, Backend, index_type, on_device, takes_kernels, tl, triton, use_triton
from .pattern import Block, Pattern, grid_shape

CHUNK = 2**18  # elements that plain torch handles at a time, so that its temporaries stay in cache
GPU_CHUNK = 2**24  # on a GPU, where every chunk costs launches
TILE = 4096  # elements that a program packs or unpacks, twice as many where they lie in one run
PIECE = 1024  # longest part of a row in a tile of several rows
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by a weight element's bytes
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: their bits, in order, in the top byte


def packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the packed mask of a matrix of ``shape``."""
    return shape[0], ceil_div(shape[1], 8)


def chunks(shape: Sequence[int], size: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into parts of at most ``size`` (``CHUNK``) packed bits, in row-major order."""
    size = size or CHUNK
    width = max(8, min(size, ceil_div(shape[1], 8) * 8))
    height = size // width
    for row in range(0, shape[0], height):
        for col in range(0, shape[1], width):
            yield (
                slice(row, min(row + height, shape[0])),
                slice(col, min(col + width, shape[1])),
            )


def chunk_of(device: torch.device) -> int:
    """Return how many elements are handled at a time where masks are only looked up."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def chunk_size(shape: Sequence[int]) -> int:
    """Return how many packed bits the largest of the chunks has."""
    rows, width = packed_shape(shape)
    return min(CHUNK, rows * width * 8)


def bytes_of(chunk: tuple[slice, slice]) -> tuple[slice, slice]:
    """Return where the packed bits of a chunk are."""
    return chunk[0], slice(chunk[1].start // 8, ceil_div(chunk[1].stop, 8))


class Packer:
    """Packs the chunks of one matrix, through buffers that it keeps: fresh memory costs more."""

    def __init__(self, like: Tensor) -> None:
        size = chunk_size(like.shape)
        self._bits = like.new_empty(size, dtype=torch.bool)
        self._words = like.new_empty(size // 8, dtype=torch.int64)

    def buffer(self, rows: int, cols: int) -> Tensor:
        """Return a bool matrix to fill; its rows are padded to whole bytes with False."""
        width = ceil_div(cols, 8) * 8
        bits = self._bits[: rows * width].view(rows, width)
        bits[:, cols:] = False
        return bits[:, :cols]

    def write(self, out: Tensor) -> None:
        """Pack what the last buffer was filled with into ``out``."""
        size = out.numel()
        words = self._words[:size]
        torch.mul(self._bits[: size * 8].view(torch.int64), _GATHER, out=words)
        out.copy_(words.bitwise_right_shift_(56).view(out.shape))


def pack_reference(mask: Tensor) -> Tensor:
    """Define the semantics: plain PyTorch, any device; 2 bytes x CHUNK of scratch."""
    out = mask.new_empty(packed_shape(mask.shape), dtype=torch.uint8)
    packer = Packer(mask)
    for chunk in chunks(mask.shape):
        keep = mask[chunk]
        packer.buffer(*keep.shape).copy_(keep)
        packer.write(out[bytes_of(chunk)])
    return out


def _look_up(packed: Tensor, table: Tensor, out: Tensor) -> None:
    """Write for every byte of ``packed`` its row of ``table``, (256, 8), as wide as ``out`` is."""
    for chunk in chunks(out.shape, chunk_of(out.device)):
        target = out[chunk]
        index = packed[bytes_of(chunk)].to(torch.int32).flatten()
        if target.is_contiguous() and target.shape[1] % 8 == 0:
            torch.index_select(table, 0, index, out=target.view(-1, 8))
        else:
            rows = table.index_select(0, index).view(target.shape[0], -1)
            target.copy_(rows[:, : target.shape[1]])


def _bits_of_bytes(device: torch.device) -> Tensor:
    """Return the bits of every byte, lowest first, (256, 8) bool."""
    return (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1 != 0


def unpack_reference(packed: Tensor, cols: int) -> Tensor:
    """Define the semantics: plain PyTorch, any device; 12 bytes of scratch a byte of a chunk."""
    out = packed.new_empty((packed.shape[0], cols), dtype=torch.bool)
    _look_up(packed, _bits_of_bytes(packed.device), out)
    return out


@triton.jit
def _pack_kernel(
    mask_ptr,
    out_ptr,
    R,
    C,
    stride_mr,
    stride_mc,
    INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pieces = tl.cdiv(C, BLOCK_C)
    offs_r = (tl.program_id(0) // pieces).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    piece = (tl.program_id(0) % pieces).to(INDEX)
    offs_c = piece * BLOCK_C + tl.arange(0, BLOCK_C)
    in_r = offs_r < R
    keep = tl.load(
        mask_ptr + offs_r[:, None] * stride_mr + offs_c[None, :] * stride_mc,
        mask=in_r[:, None] & (tl.arange(0, BLOCK_C) < C - piece * BLOCK_C)[None, :],
        other=0,
    )  # [BLOCK_R, BLOCK_C]
    bits = keep.to(tl.int32) << (tl.arange(0, BLOCK_C) % 8)[None, :]
    bits = tl.sum(bits.reshape([BLOCK_R, BLOCK_C // 8, 8]), axis=2).to(tl.uint8)
    width = tl.cdiv(C, 8)
    offs_b = piece * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    tl.store(
        out_ptr + offs_r[:, None] * width + offs_b[None, :],
        bits,
        mask=in_r[:, None] & (offs_b < width)[None, :],
    )


@triton.jit
def _unpack_kernel(
    packed_ptr,
    out_ptr,
    R,
    C,
    stride_pr,
    stride_pb,
    INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pieces = tl.cdiv(C, BLOCK_C)
    offs_r = (tl.program_id(0) // pieces).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    piece = (tl.program_id(0) % pieces).to(INDEX)
    offs_b = piece * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    in_r = offs_r < R
    packed = tl.load(
        packed_ptr + offs_r[:, None] * stride_pr + offs_b[None, :] * stride_pb,
        mask=in_r[:, None] & (offs_b < tl.cdiv(C, 8))[None, :],
        other=0,
    )  # [BLOCK_R, BLOCK_C // 8]
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1
    offs_c = piece * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(
        out_ptr + offs_r[:, None] * C + offs_c[None, :],
        bits.reshape([BLOCK_R, BLOCK_C]),
        mask=in_r[:, None] & (tl.arange(0, BLOCK_C) < C - piece * BLOCK_C)[None, :],
    )


def _bit_tiling(rows: int, cols: int) -> tuple[int, int, int]:
    """Return the tile's sides and the number of tiles."""
    block_c = max(8, min(triton.next_power_of_2(cols), PIECE if rows > 1 else 2 * TILE))
    block_r = max(1, TILE // block_c)
    return block_r, block_c, ceil_div(rows, block_r) * ceil_div(cols, block_c)


def _launch_pack(mask: Tensor) -> Tensor:
    out = mask.new_empty(packed_shape(mask.shape), dtype=torch.uint8)
    if mask.is_contiguous() and mask.shape[1] % 8 == 0:
        mask = mask.view(1, -1)
    block_r, block_c, tiles = _bit_tiling(*mask.shape)
    if mask.numel():
        with on_device(mask):
            _pack_kernel[(tiles,)](
                mask.view(torch.uint8), out, *mask.shape, *mask.stride(),
                INDEX=index_type(mask), BLOCK_R=block_r, BLOCK_C=block_c,
                **FUSED,
            )  # fmt: skip
    return out


def _launch_unpack(packed: Tensor, cols: int) -> Tensor:
    out = packed.new_empty((packed.shape[0], cols), dtype=torch.bool)
    shape = out.shape
    if packed.is_contiguous() and cols % 8 == 0:
        packed, shape = packed.view(1, -1), (1, out.numel())
    block_r, block_c, tiles = _bit_tiling(*shape)
    if out.numel():
        with on_device(packed):
            _unpack_kernel[(tiles,)](
                packed, out.view(torch.uint8), *shape, *packed.stride(),
                INDEX=index_type(packed, out), BLOCK_R=block_r, BLOCK_C=block_c,
                **FUSED,
            )  # fmt: skip
    return out


def _pack(mask: Tensor) -> Tensor:
    return (_launch_pack if takes_kernels(mask.device) else pack_reference)(mask)


def _unpack(packed: Tensor, cols: int) -> Tensor:
    return (_launch_unpack if takes_kernels(packed.device) else unpack_reference)(packed, cols)


_pack_op = torch.library.custom_op("triton_sparsity::pack", _pack, mutates_args=())
_unpack_op = torch.library.custom_op("triton_sparsity::unpack", _unpack, mutates_args=())


@_pack_op.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(packed_shape(mask.shape), dtype=torch.uint8)


@_unpack_op.register_fake
def _(packed: Tensor, cols: int) -> Tensor:
    return packed.new_empty((packed.shape[0], cols), dtype=torch.bool)


def pack(mask: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Pack a bool mask to bits: ``numpy.packbits(mask, axis=1, bitorder="little")``.

    Args:
        mask: bool ``(R, C)``, any strides.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        uint8 ``(R, ceil(C / 8))``; bits past the last column are 0.

    Raises:
        ValueError: ``mask`` is no bool matrix.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"pack: mask must be a bool matrix, got {mask.dtype} {tuple(mask.shape)}")
    use_triton("pack", backend, mask)
    return pack_reference(mask) if backend == "torch" else _pack_op(mask)


def unpack(packed: Tensor, cols: int, *, backend: Backend = "auto") -> Tensor:
    """Undo ``pack``.

    Args:
        packed: uint8 ``(R, ceil(cols / 8))``, any strides.
        cols: number of columns of the mask.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        bool ``(R, cols)``.

    Raises:
        ValueError: ``packed`` is no uint8 matrix of ``ceil(cols / 8)`` columns.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    width = ceil_div(cols, 8)
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] != width:
        raise ValueError(
            f"unpack: packed must be a uint8 matrix of {width} columns for cols={cols}, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    use_triton("unpack", backend, packed)
    return unpack_reference(packed, cols) if backend == "torch" else _unpack_op(packed, cols)


def _check_compact(operation: str, mask: Tensor, pattern: Pattern, shape: Sequence[int]) -> None:
    if isinstance(pattern, Block):
        dtype, expected = torch.bool, grid_shape(pattern, (shape[0], shape[1]))
    else:
        dtype, expected = torch.uint8, packed_shape(shape)
    if mask.dtype != dtype or mask.shape != expected:
        raise ValueError(
            f"{operation}: mask must be {dtype} {expected} for {pattern} and {tuple(shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )


def expand_mask(
    mask: Tensor, pattern: Pattern, shape: Sequence[int], *, backend: Backend = "auto"
) -> Tensor:
    """Write a compact mask out in full.

    Args:
        mask: bool, one element a block, or packed uint8 ``(R, ceil(C / 8))`` for other patterns.
        pattern: what an element of the mask stands for.
        shape: ``(R, C)`` of the weight.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, of unpacking; blocks take plain torch.

    Returns:
        A new bool tensor ``(R, C)``.

    Raises:
        ValueError: ``mask`` does not fit ``pattern`` and ``shape``.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    _check_compact("expand_mask", mask, pattern, shape)
    if not isinstance(pattern, Block):
        return unpack(mask, shape[1], backend=backend)
    return expand_blocks(mask, pattern.rows, pattern.cols, shape)


def word_mask(
    mask: Tensor,
    pattern: Pattern,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Widen a compact mask to words: the weight's bits AND its word are the masked weight's bits.

    In plain torch on a CPU this takes a quarter of the time of a selection (measured), and a NaN
    behind the mask vanishes as it must.

    Args:
        mask: bool, one element a block, or packed uint8 ``(R, ceil(C / 8))`` for other patterns.
        pattern: what an element of the mask stands for.
        shape: ``(R, C)`` of the weight.
        dtype: the weight's, of 2, 4 or 8 bytes an element.
        out: a word mask to write in place, any strides.

    Returns:
        ``(ceil(R / pattern.rows), C)``, int16, int32 or int64 as wide as ``dtype``: -1 where kept,
        0 where pruned; one row for all rows of a block. ``out`` if given.

    Raises:
        ValueError: ``mask`` does not fit ``pattern`` and ``shape``; ``dtype`` has no such width;
            ``out`` has another shape, dtype or device.
    """
    _check_compact("word_mask", mask, pattern, shape)
    if not dtype.is_floating_point or dtype.itemsize not in WORDS:
        raise ValueError(
            f"word_mask: dtype must be a float of 2, 4 or 8 bytes an element, got {dtype}"
        )
    word, size = WORDS[dtype.itemsize], (ceil_div(shape[0], pattern.rows), shape[1])
    if out is None:
        out = mask.new_empty(size, dtype=word)
    elif out.shape != size or out.dtype != word or out.device != mask.device:
        raise ValueError(
            f"word_mask: out must be {word} {size} on {mask.device}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if not isinstance(pattern, Block):
        _look_up(mask, -_bits_of_bytes(mask.device).to(word), out)
        return out
    words = -mask.to(word)
    full = shape[1] // pattern.cols
    whole = full * pattern.cols
    out[:, :whole].unflatten(1, (full, pattern.cols)).copy_(words[:, :full, None])
    out[:, whole:] = words[:, full:]
    return out


def count_kept(masks: Sequence[Tensor]) -> list[int]:
    """Count what compact masks of one device keep, in one wait for it.

    Args:
        masks: bool, or uint8 with one bit an element.
    """
    bits = torch.tensor([byte.bit_count() for byte in range(256)], device=masks[0].device)
    counts = [
        mask.count_nonzero()
        if mask.dtype == torch.bool
        else torch.bincount(mask.flatten(), minlength=256) @ bits
        for mask in masks
    ]
    return torch.stack(counts).tolist()
