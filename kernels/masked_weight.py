"""Masked weights: a weight with its pruned elements exactly +0, as a new tensor or in place.

Pruned elements are deselected, never multiplied by zero: a NaN or an Inf behind the mask stays
there, or in place vanishes. In place a whole list (weights, gradients, optimiser states) is one
launch, in ``pruned.py``; so is counting what of a list is not zero though it is pruned.

Reading order: references -> plain torch -> kernel -> launcher -> operators -> public functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor

from .bits import WORDS, chunk_of, expand_mask, packed_shape, word_mask
from .grid import ceil_div
from .launch import (
    FUSED,
    Backend,
    index_type,
    is_plain,
    on_device,
    takes_kernels,
    tl,
    triton,
    use_triton,
)
from .pattern import Block, Pattern, Unstructured, grid_shape
from .pruned import launch_pruned
from .table import alike
from .topology import runs

TILE = 4096  # elements of a program: 4 or 8 16-byte loads in flight for each thread
TILE_COLS = 256
RUN_ELEMENTS = 2**14  # of a weight are masked in the time that Python takes to clear one run


def apply_mask_reference(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype, differentiable."""
    keep = expand_mask(mask, pattern, weight.shape, backend="torch")
    return weight.clone().masked_fill_(~keep, 0)


def count_leaks_reference(
    tensors: Sequence[Tensor], masks: Sequence[Tensor], pattern: Pattern
) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype."""
    pairs = zip(tensors, masks, strict=True)
    return torch.stack(
        [((t != 0) & ~expand_mask(m, pattern, t.shape, backend="torch")).sum() for t, m in pairs]
    )


def and_words(weight: Tensor, words: Tensor, rows: int, out: Tensor) -> None:
    """AND the weight's bits with a word mask: on a CPU four times as fast as a selection."""
    bits = weight.view(words.dtype)
    result = bits if out is weight else out.view(words.dtype)
    if rows == 1:
        torch.bitwise_and(bits, words, out=result)
        return
    R, C = weight.shape
    full, rest = divmod(R, rows)
    if rest:  # the last row of blocks is lower than the others
        torch.bitwise_and(bits[-rest:], words[full:], out=result[-rest:])
        bits, words, result = bits[:-rest], words[:full], result[:-rest]
    torch.bitwise_and(bits.view(full, rows, C), words[:, None], out=result.view(full, rows, C))


@triton.jit
def _tile_offsets(
    M,
    N,
    INDEX: tl.constexpr,
    TILE_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Offsets of a program's rows, chunks of columns, and columns; [TILE_M, CHUNKS, WIDTH]."""
    tiles_n = tl.cdiv(N, CHUNKS * WIDTH)
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    offs_m = (pid_m * TILE_M + tl.arange(0, TILE_M)).to(INDEX)[:, None, None]
    chunk = (pid_n * CHUNKS + tl.arange(0, CHUNKS)).to(INDEX)[None, :, None]
    return offs_m, chunk, chunk * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _load_keep(
    mask_ptr,
    M,
    N,
    stride_mm,
    stride_mn,
    offs_m,
    chunk,
    offs_n,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Tell which elements are kept; a mask byte covers ROWS x COLS of them and is read once."""
    group = chunk if COLS == WIDTH else offs_n // COLS
    flags = tl.load(
        mask_ptr + (offs_m // ROWS) * stride_mm + group * stride_mn,
        mask=(offs_m < M) & (group * COLS < N),
        other=0,
    )  # [TILE_M, CHUNKS, 1], or WIDTH where a chunk holds several blocks
    if PACKED:
        flags = (flags >> (offs_n % 8).to(tl.uint8)) & 1
    return flags != 0


@triton.jit
def _apply_mask_kernel(
    w_ptr,
    mask_ptr,
    out_ptr,
    M,
    N,
    stride_wm,
    stride_wn,
    stride_mm,
    stride_mn,
    stride_om,
    stride_on,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
    TILE_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    offs_m, chunk, offs_n = _tile_offsets(M, N, INDEX, TILE_M, CHUNKS, WIDTH)
    keep = _load_keep(
        mask_ptr, M, N, stride_mm, stride_mn, offs_m, chunk, offs_n, ROWS, COLS, PACKED, WIDTH
    )
    inside = (offs_m < M) & (offs_n < N)
    # a mask that changes within 16 bytes would split the load, so only whole chunks are skipped
    SKIP: tl.constexpr = COLS == WIDTH and not PACKED
    w = tl.load(
        w_ptr + offs_m * stride_wm + offs_n * stride_wn,
        mask=inside & keep if SKIP else inside,
        other=0,
    )  # [TILE_M, CHUNKS, WIDTH]
    tl.store(out_ptr + offs_m * stride_om + offs_n * stride_on, tl.where(keep, w, 0), mask=inside)


def _tile(cols: int, transposed: bool) -> dict[str, int]:
    """Return the tile of a weight whose mask bytes cover ``cols`` columns.

    A chunk is no narrower than 8 columns, 16 bytes of a 16-bit float.
    """
    width = max(cols, 8)
    tile_cols = 64 if transposed else TILE_COLS
    return {"TILE_M": TILE // tile_cols, "CHUNKS": tile_cols // width, "WIDTH": width}


def _launch(weight: Tensor, mask: Tensor, rows: int, cols: int, out: Tensor) -> None:
    if weight.numel() == 0:
        return
    M, N = weight.shape
    packed = mask.dtype == torch.uint8
    transposed = out.stride(0) < out.stride(1)
    words = WORDS[weight.element_size()]  # the kernels move bits, whichever float they make up
    w, o, m = weight.view(words), out.view(words), mask.view(torch.uint8)
    if packed:
        rows, cols = 1, 8
    elif transposed:
        w, o, m, M, N, rows, cols = w.T, o.T, m.T, N, M, cols, rows
    tile = _tile(cols, packed and transposed)
    grid = (ceil_div(M, tile["TILE_M"]) * ceil_div(N, tile["CHUNKS"] * tile["WIDTH"]),)
    layout = {"ROWS": rows, "COLS": cols, "INDEX": index_type(w, m, o), **tile}
    with on_device(weight):
        _apply_mask_kernel[grid](
            w,
            m,
            o,
            M,
            N,
            *w.stride(),
            *m.stride(),
            *o.stride(),
            PACKED=packed,
            **layout,
            **FUSED,
        )


def _pattern(mask: Tensor, rows: int, cols: int) -> Pattern:
    return Unstructured() if mask.dtype == torch.uint8 else Block(rows, cols)


def _apply(weight: Tensor, mask: Tensor, rows: int, cols: int) -> Tensor:
    out = torch.empty_like(weight)
    if mask.dtype not in WORDS.values():
        if use_triton("apply_mask", "auto", weight):
            _launch(weight, mask, rows, cols, out)
            return out
        mask = word_mask(mask, _pattern(mask, rows, cols), weight.shape, weight.dtype)
    and_words(weight, mask, rows, out)
    return out


def _apply_(weights: Sequence[Tensor], masks: Sequence[Tensor], rows: int, cols: int) -> None:
    launched = []
    for weight, mask in zip(weights, masks, strict=True):
        if mask.dtype in WORDS.values():
            and_words(weight, mask, rows, weight)
        elif takes_kernels(weight.device):
            launched.append((weight, mask))
        else:
            _clear(weight, mask, rows, cols)
    if launched:
        tensors, own = zip(*launched, strict=True)
        launch_pruned(tensors, own, rows, cols)
        torch.autograd.graph.increment_version(tensors)


def _clear(weight: Tensor, mask: Tensor, rows: int, cols: int) -> None:
    if mask.dtype == torch.bool and weight.is_cpu and _few_runs(pruned := ~mask, weight):
        for line, found in enumerate(runs(pruned)):
            for first, end in found:
                weight[line * rows : (line + 1) * rows, first * cols : end * cols] = 0
    else:
        words = word_mask(mask, _pattern(mask, rows, cols), weight.shape, weight.dtype)
        and_words(weight, words, rows, weight)


def _few_runs(pruned: Tensor, weight: Tensor) -> bool:
    """Tell whether clearing them one by one is faster than masking all of the weight."""
    begins = pruned[:, :1].count_nonzero() + (pruned[:, 1:] > pruned[:, :-1]).count_nonzero()
    return int(begins) * RUN_ELEMENTS <= weight.numel()


def _count(
    tensors: Sequence[Tensor], masks: Sequence[Tensor], rows: int, cols: int, triton_runs: bool
) -> Tensor:
    counts = tensors[0].new_zeros(len(tensors), dtype=torch.int64)
    if triton_runs and masks[0].dtype not in WORDS.values():
        launch_pruned(tensors, masks, rows, cols, counts)
    else:
        for count, tensor, mask in zip(counts, tensors, masks, strict=True):
            _count_in_chunks(count, tensor, mask, rows, cols)
    return counts


def _count_in_chunks(count: Tensor, tensor: Tensor, mask: Tensor, rows: int, cols: int) -> None:
    """Add to ``count``, with no temporary but a chunk of whole block rows."""
    is_words = mask.dtype in WORDS.values()
    blocks = max(1, chunk_of(tensor.device) // max(1, rows * tensor.shape[1]))
    for first in range(0, mask.shape[0], blocks):
        part = tensor[first * rows : (first + blocks) * rows]
        words = mask[first : first + blocks]
        if not is_words:
            words = word_mask(words, _pattern(mask, rows, cols), part.shape, tensor.dtype)
        pruned = torch.empty_like(part)
        and_words(part, words, rows, pruned)
        pruned = pruned.view(words.dtype)
        pruned ^= part.view(words.dtype)
        pruned <<= 1  # without the sign
        count += pruned.count_nonzero()


_op = torch.library.custom_op("triton_sparsity::apply_mask", _apply, mutates_args=())
_op_ = torch.library.custom_op("triton_sparsity::apply_mask_", _apply_, mutates_args={"weights"})
_leaks_op = torch.library.custom_op("triton_sparsity::count_leaks", _count, mutates_args=())


@_op.register_fake
def _(weight: Tensor, mask: Tensor, rows: int, cols: int) -> Tensor:
    return torch.empty_like(weight)


@_op_.register_fake
def _(weights, masks, rows, cols) -> None:
    return None


@_leaks_op.register_fake
def _(tensors, masks, rows, cols, triton_runs) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, ctx.rows, ctx.cols = inputs
    ctx.save_for_backward(mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (mask,) = ctx.saved_tensors
    return _op(grad, mask, ctx.rows, ctx.cols), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def check_mask(operation: str, weight: Tensor, mask: Tensor, pattern: Pattern) -> None:
    """Refuse what is no weight, or no mask of it, compact or words.

    Raises:
        TypeError, ValueError: as ``apply_mask``.
    """
    width = WORDS.get(weight.element_size()) if weight.is_floating_point() else None
    if width is None:
        raise TypeError(
            f"{operation}: weight must be a float of 16, 32 or 64 bits, got {weight.dtype}"
        )
    if weight.ndim != 2:
        raise ValueError(f"{operation}: weight must be a matrix, got shape {tuple(weight.shape)}")
    R, C = weight.shape
    if mask.dtype == torch.uint8 and not isinstance(pattern, Block):
        expected = packed_shape((R, C))
    elif mask.dtype == torch.bool and isinstance(pattern, Block):
        expected = grid_shape(pattern, (R, C))
    elif mask.dtype == width:
        expected = ceil_div(R, pattern.rows), C
    else:
        compact = "bool" if isinstance(pattern, Block) else "uint8"
        raise TypeError(
            f"{operation}: mask must be {compact} (compact) or {width} (words) for pattern "
            f"{pattern} and a {weight.dtype} weight, got {mask.dtype}"
        )
    if mask.shape != expected:
        raise ValueError(
            f"{operation}: mask must have shape {expected} for a weight of shape {(R, C)} and "
            f"pattern {pattern}, got {tuple(mask.shape)}"
        )
    if mask.device != weight.device:
        raise ValueError(
            f"{operation}: mask must be on the weight's device {weight.device}, got {mask.device}"
        )


_facts = attrgetter("dtype", "shape", "device")


def kinds(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of pairs that are alike in all that is checked: few, in a model."""
    if torch.compiler.is_compiling():  # which looks once, and traces no such getter
        return [[place] for place in range(len(weights))]
    pairs = zip(map(_facts, weights), map(_facts, masks), strict=True)
    return [*alike(pairs).values()]


def _takes_operator(
    operation: str, weight: Tensor, mask: Tensor, pattern: Pattern, backend: Backend
) -> bool:
    """Validate the arguments; tell whether the operator runs, or the reference in its stead."""
    check_mask(operation, weight, mask, pattern)
    triton_possible = use_triton(operation, backend, weight)
    if mask.dtype in WORDS.values():
        if backend == "triton":
            raise ValueError(
                f"{operation}: mask must be compact with backend='triton', got {mask.dtype} words"
            )
        return True
    return triton_possible or not takes_kernels(weight.device)


def _pairs(
    operation: str,
    weights: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor],
    weight_name: str = "weight",
    mask_name: str = "mask",
):
    if isinstance(weights, Tensor):
        raise TypeError(
            f"{operation}: {weight_name} must be a sequence of tensors, got one tensor"
        )
    if isinstance(masks, Tensor) or len(weights) != len(masks):
        got = "one tensor" if isinstance(masks, Tensor) else f"{len(masks)}"
        raise ValueError(f"{operation}: {mask_name} must be {len(weights)} tensors, got {got}")
    return zip(weights, masks, strict=True)


@overload
def apply_mask(
    weight: Tensor, mask: Tensor, pattern: Pattern, *, backend: Backend = "auto"
) -> Tensor: ...
@overload
def apply_mask(
    weight: Sequence[Tensor],
    mask: Sequence[Tensor],
    pattern: Pattern,
    *,
    backend: Backend = "auto",
) -> list[Tensor]: ...
def apply_mask(weight: Any, mask: Any, pattern: Pattern, *, backend: Backend = "auto") -> Any:
    """Return ``weight`` with its pruned elements +0; gradients are +0 there too.

    Args:
        weight: float of 16, 32 or 64 bits, shape ``(R, C)``, any strides; or a sequence of such.
        mask: on the weight's device; a sequence, one mask a weight, if ``weight`` is one. Either
            compact: for ``Block``, bool ``(ceil(R / rows), ceil(C / cols))``; for
            ``Unstructured`` and ``NM``, the bits of ``(R, C)`` packed along the rows in little
            bit order, uint8 ``(R, ceil(C / 8))``. Or words, always in plain torch and meant for a
            CPU: an integer of the weight's width, ``(ceil(R / rows), C)``, -1 where kept and 0
            where not.
        pattern: the pattern that the mask belongs to.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        A new tensor of the weight's shape and dtype, or a list of them. Its layout is that of
        ``torch.empty_like``: a weight stored transposed stays so. What lies behind the mask, NaN
        and Inf included, reaches neither the result nor the gradient.

    Raises:
        TypeError: the weight's or the mask's dtype is none of the above.
        ValueError: a shape, a device, a length or ``backend`` does not fit, or ``"triton"`` is
            asked for with words.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    if not isinstance(weight, Tensor):
        pairs = _pairs("apply_mask", weight, mask)
        return [apply_mask(w, m, pattern, backend=backend) for w, m in pairs]
    if _takes_operator("apply_mask", weight, mask, pattern, backend):
        return _op(weight, mask, pattern.rows, pattern.cols)
    return apply_mask_reference(weight, mask, pattern)


@torch.no_grad()
def apply_mask_(
    weight: Tensor | Sequence[Tensor],
    mask: Tensor | Sequence[Tensor],
    pattern: Pattern,
    *,
    backend: Backend = "auto",
) -> None:
    """Set the pruned elements of ``weight`` to +0 in place, unseen by autograd.

    A list is one launch on a GPU (one for each width of element, if they differ), without waiting
    for the device, and may be captured in a CUDA graph. With a compact ``Block`` mask only the
    pruned blocks are written, and no weight is read. Other masks write kept elements back as they
    were.

    Args:
        weight: as for ``apply_mask``; a sequence may hold gradients and optimiser states too, of
            several dtypes.
        mask: as for ``apply_mask``.
        pattern: the pattern that the masks belong to.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``apply_mask``.
    """
    one: Any = [(weight, mask)]  # the mask of one weight is one too
    pairs: Any = one if isinstance(weight, Tensor) else [*_pairs("apply_mask_", weight, mask)]
    given: list[int] = []
    for places in kinds([w for w, _ in pairs], [m for _, m in pairs]):
        first, its_mask = pairs[places[0]]
        if _takes_operator("apply_mask_", first, its_mask, pattern, backend):
            given += places
            continue
        for w, m in (pairs[place] for place in places):
            w.masked_fill_(~expand_mask(m, pattern, w.shape, backend="torch"), 0)
    if given:
        weights, masks = map(list, zip(*(pairs[place] for place in given), strict=True))
        # on a CPU weights are cleared one by one, and an operator costs as much as a small one
        apply = _apply_ if is_plain(*weights) else _op_
        apply(weights, masks, pattern.rows, pattern.cols)


@torch.no_grad()
def count_leaks(
    tensors: Sequence[Tensor],
    masks: Sequence[Tensor],
    pattern: Pattern,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Count the elements that are pruned and yet not zero. A NaN is not zero, -0 is.

    On a GPU one launch (one for each width of element, if they differ)
    that does not wait for the device and reads the pruned elements alone; of fine masks, what
    shares 8 elements with one. In plain torch temporaries are a chunk's, not a weight's.

    Args:
        tensors: floats of 16, 32 or 64 bits, shape ``(R, C)``, any strides, on one device.
        masks: one a tensor, compact or words, as for ``apply_mask``, all of one form.
        pattern: the pattern that the masks belong to.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        int64, one count a tensor, on their device; of no tensors, on the CPU.

    Raises:
        TypeError, ValueError, RuntimeError: as ``apply_mask``.
    """
    pairs = [*_pairs("count_leaks", tensors, masks, "tensors", "masks")]
    if not pairs:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    device, is_words = tensors[0].device, masks[0].dtype in WORDS.values()
    for tensor, mask in (pairs[places[0]] for places in kinds(tensors, masks)):
        _takes_operator("count_leaks", tensor, mask, pattern, backend)
        if tensor.device != device:
            raise ValueError(
                f"count_leaks: tensors must be on one device ({device}), got one on "
                f"{tensor.device}"
            )
        if (mask.dtype in WORDS.values()) != is_words:
            raise ValueError("count_leaks: masks must be of one form, got compact ones and words")
    triton_runs = use_triton("count_leaks", backend, tensors[0])
    count = _count if is_plain(*tensors) else _leaks_op
    return count(list(tensors), list(masks), pattern.rows, pattern.cols, triton_runs)
