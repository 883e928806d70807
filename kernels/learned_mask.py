"""Masks that are learned: weights masked by a trained score a group, and the scores' gradients.

``sample_mask`` draws the mask at random, group by group, from logits s (regularisation-based
sparsity, after Louizos et al., https://arxiv.org/abs/1712.01312, as in NNCF's ``rb_sparsity``):
with u uniform, kept where ``sigmoid(s + log(u / (1 - u))) > 1/2``, which is ``u > (1 - u) e^-s``.
``straight_through`` takes a mask that is given (movement pruning, Sanh et al.,
https://arxiv.org/abs/2005.07683). In both the comparison is straight-through: with the incoming
gradient g, dL/dw = g where kept, and dL/ds = slope * (g w summed over the group), the slope being
the sigmoid's derivative at ``s + log(u / (1 - u))``, or 1.

u is a function of seed, draw, stream (which weight) and group alone (``draw.py``). So the kernels'
backward pass makes the forward's mask again rather than keep it, and any rank and launch grid
makes the same: e^-s is added and multiplied up in float32 without fusion, in one order, by every
implementation here, and all that it is compared with is exact.

Floor: forward, one read of weight and logits and one write of the weight; backward, one read of
gradient, weight and logits and one write of two gradients. For blocks logits cost nothing.

Reading order: reference -> CPU (``draw.py``) -> kernels (``learned_mask_triton.py``) -> operators
-> public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bits import WORDS, expand_mask, pack, word_mask
from .draw import (
    draw,
    draw_part,
    exp_minus,
    gradients,
    in_runs,
    keeps_draws,
    select_drawn,
    uniform,
)
from .grid import block_counts, expand_blocks, pad_to_blocks
from .launch import Backend, takes_kernels, use_triton
from .learned_mask_triton import launch_gradients, launch_sample
from .masked_weight import apply_mask
from .pattern import Block, Pattern, Unstructured, grid_shape

SUM_CHUNK = 2**20  # the same of all threads, where torch parts each operation


class _StraightThrough(torch.autograd.Function):
    """Mask a weight; to the gradients the mask is ``soft``, one value a group."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, soft: Tensor, kept: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(weight, soft, kept)
        ctx.pattern = pattern
        return torch.where(kept, weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        weight, soft, kept = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        sums = _block_sums(grad.to(wide) * weight, ctx.pattern.rows, ctx.pattern.cols)
        return torch.where(kept, grad, 0), sums.to(soft.dtype), None, None


def sample_mask_reference(
    weight: Tensor, logits: Tensor, random: Tensor, pattern: Pattern, stream: int = 0
) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype, differentiable."""
    u = uniform(random, stream, logits.shape)
    kept = u > (1 - u) * exp_minus(logits)
    soft = torch.sigmoid(logits + torch.log(u / (1 - u)))
    spread = expand_blocks(kept, pattern.rows, pattern.cols, weight.shape)
    return _StraightThrough.apply(weight, soft, spread, pattern)


def straight_through_reference(
    weight: Tensor, scores: Tensor, mask: Tensor, pattern: Pattern
) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype, differentiable."""
    kept = expand_mask(mask, pattern, weight.shape, backend="torch")
    return _StraightThrough.apply(weight, scores, kept, pattern)


def _block_sums(elements: Tensor, rows: int, cols: int) -> Tensor:
    """Add up every block; those at the edge have the elements that exist."""
    if rows == cols == 1:
        return elements
    return pad_to_blocks(elements, rows, cols).sum(1).sum(2)


def _select(weight: Tensor, kept: Tensor, rows: int, cols: int) -> Tensor:
    pattern = Block(rows, cols)
    return apply_mask(weight, word_mask(kept, pattern, weight.shape, weight.dtype), pattern)


def _sum_in_chunks(grad: Tensor, weight: Tensor, rows: int, cols: int) -> Tensor:
    """Add up ``grad * weight`` over every block, a chunk of whole block rows at a time."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if rows == cols == 1:
        return (grad.to(wide) * weight).float()
    grid = block_counts(weight.shape, rows, cols)
    sums = torch.empty(grid, dtype=torch.float32, device=weight.device)
    step = max(1, SUM_CHUNK // max(1, rows * weight.shape[1]))
    for first in range(0, sums.shape[0], step):
        part = slice(first * rows, (first + step) * rows)
        sums[first : first + step] = _block_sums(grad[part].to(wide) * weight[part], rows, cols)
    return sums


def _sample(
    weight: Tensor,
    logits: Tensor,
    random: Tensor,
    drawn: Tensor | None,
    stream: int,
    rows: int,
    cols: int,
) -> tuple[Tensor, Tensor]:
    if use_triton("sample_mask", "auto", weight):
        return launch_sample(weight, logits, random, stream, rows, cols), logits.new_empty(0)
    # here drawing again would cost more than keeping what was drawn
    signed = draw(logits, random, stream) if drawn is None else drawn
    masked = _select_drawn(weight, signed, rows, cols)
    return masked, signed if drawn is None else logits.new_empty(0)


def _select_drawn(weight: Tensor, signed: Tensor, rows: int, cols: int) -> Tensor:
    if rows == cols == 1 and in_runs(weight):
        return select_drawn(weight, signed)
    return _select(weight, signed.signbit(), rows, cols)


def _sample_grad(
    grad: Tensor,
    weight: Tensor,
    logits: Tensor,
    random: Tensor,
    signed: Tensor,
    stream: int,
    rows: int,
    cols: int,
) -> tuple[Tensor, Tensor]:
    if use_triton("sample_mask", "auto", weight):
        return launch_gradients(grad, weight, logits, random, stream, None, rows, cols)
    if rows == cols == 1 and in_runs(grad, weight):
        return gradients(grad, weight, signed)
    sums = _sum_in_chunks(grad, weight, rows, cols)
    return _select(grad, signed.signbit(), rows, cols), sums.mul_(signed.abs())


def _draw_part(
    logits: Tensor,
    random: Tensor,
    stream: int,
    down: int,
    across: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
) -> Tensor:
    part = slice(top, bottom), slice(left, right)
    return draw_part(logits, random, stream, (down, across), part)


def _straight(weight: Tensor, scores: Tensor, mask: Tensor, rows: int, cols: int) -> Tensor:
    return apply_mask(weight, mask, _pattern(mask, rows, cols))


def _straight_grad(
    grad: Tensor, weight: Tensor, mask: Tensor, rows: int, cols: int
) -> tuple[Tensor, Tensor]:
    if mask.dtype not in WORDS.values() and use_triton("straight_through", "auto", weight):
        return launch_gradients(grad, weight, None, None, 0, mask, rows, cols)
    grad_weight = apply_mask(grad, mask, _pattern(mask, rows, cols))
    return grad_weight, _sum_in_chunks(grad, weight, rows, cols)


def _pattern(mask: Tensor, rows: int, cols: int) -> Pattern:
    return Unstructured() if mask.dtype == torch.uint8 else Block(rows, cols)


def _operator(name: str, run: Any) -> Any:
    return torch.library.custom_op(f"triton_sparsity::{name}", run, mutates_args=())


_sample_op = _operator("sample_mask", _sample)
_sample_grad_op = _operator("sample_mask_backward", _sample_grad)
_draw_part_op = _operator("draw_part", _draw_part)
_straight_op = _operator("straight_through", _straight)
_straight_grad_op = _operator("straight_through_backward", _straight_grad)


@_sample_op.register_fake
def _(weight: Tensor, logits: Tensor, random: Tensor, drawn: Tensor | None, *_: int):
    if drawn is not None or use_triton("sample_mask", "auto", weight):
        return torch.empty_like(weight), logits.new_empty(0)
    return torch.empty_like(weight), logits.new_empty(logits.shape)


@_draw_part_op.register_fake
def _(logits: Tensor, *_: Any):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_straight_op.register_fake
def _(weight: Tensor, scores: Tensor, mask: Tensor, rows: int, cols: int):
    return torch.empty_like(weight)


def _fake_grads(grad: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grid = block_counts(weight.shape, *rest[-2:])
    return torch.empty_like(weight), weight.new_empty(grid, dtype=torch.float32)


_sample_grad_op.register_fake(_fake_grads)
_straight_grad_op.register_fake(_fake_grads)


def _setup_sample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, drawn, ctx.stream, ctx.rows, ctx.cols = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1] if drawn is None else drawn)


def _sample_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _sample_grad_op(grad, *ctx.saved_tensors, ctx.stream, ctx.rows, ctx.cols)
    return *grads, None, None, None, None, None


def _setup_straight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _, mask, ctx.rows, ctx.cols = inputs
    ctx.save_for_backward(weight, mask)


def _straight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, mask = ctx.saved_tensors
    grads = _straight_grad_op(grad, weight, mask, ctx.rows, ctx.cols)
    return *grads, None, None, None


_sample_op.register_autograd(_sample_backward, setup_context=_setup_sample)
_straight_op.register_autograd(_straight_backward, setup_context=_setup_straight)


def sample_mask(
    weight: Tensor,
    logits: Tensor,
    random: Tensor,
    pattern: Pattern,
    *,
    stream: int = 0,
    drawn: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return ``weight`` under a mask drawn at random; pruned elements are +0.

    A group is kept with probability ``sigmoid(logit)``: where ``sigmoid(logit + log(u / (1 - u)))
    > 1/2``, u uniform in (0, 1), from 1.02e-6 to 1 - 1.02e-6 (NNCF clamps to 1e-6 and 1 - 1e-6).
    The same ``random`` and ``stream`` give the same mask again; a CPU draws other numbers than a
    GPU.

    Args:
        weight: float of 16, 32 or 64 bits, shape ``(R, C)``, any strides. The Triton kernels take
            16 and 32; ``"auto"`` computes 64 in plain torch.
        logits: float32, one a group, ``(ceil(R / pattern.rows), ceil(C / pattern.cols))``, fewer
            than 2^34.
        random: int64 ``(2,)``, on the weight's device: the seed, and the number of the draw, from
            0 to 2^32 - 1. It must not change before the backward pass.
        pattern: ``Unstructured`` or ``Block``.
        stream: from 0 to 2^31 - 1; weights of different streams draw independently.
        drawn: where ``keeps_draws(logits)``, what ``draw(logits, random, stream)`` returned, so
            that several forward passes share it; None: draw here. The triton backend takes none.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        A new tensor like ``weight``. What lies behind the mask, NaN and Inf included, reaches
        neither it nor the weight's gradient. With the incoming gradient g, the weight's is g where
        kept and +0 elsewhere; a logit's is ``p (1 - p)`` times the sum of g w over its group, in
        float32, with ``p = sigmoid(logit + log(u / (1 - u)))``, kept or not. Both are bit-equal
        on every run.

    Raises:
        TypeError: a dtype is none of the above.
        ValueError: a shape, a device or ``backend`` does not fit, or ``"triton"`` is asked for
            with a float64 weight.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    takes_operator = _check("sample_mask", weight, logits, "logits", pattern, backend)
    if random.shape != (2,) or random.dtype != torch.int64 or random.device != weight.device:
        raise ValueError(
            f"sample_mask: random must be int64 (2,) on {weight.device}, "
            f"got {random.dtype} {tuple(random.shape)} on {random.device}"
        )
    if drawn is not None and not keeps_draws(logits):
        raise ValueError(
            f"sample_mask: drawn must be None on {logits.device}, where kernels draw by "
            f"themselves, got {drawn.dtype} {tuple(drawn.shape)}"
        )
    if drawn is not None and (drawn.dtype != torch.float32 or drawn.shape != logits.shape):
        raise ValueError(
            f"sample_mask: drawn must be float32 {tuple(logits.shape)} like logits, got "
            f"{drawn.dtype} {tuple(drawn.shape)}"
        )
    if takes_operator:
        return _sample_op(weight, logits, random, drawn, stream, pattern.rows, pattern.cols)[0]
    return sample_mask_reference(weight, logits, random, pattern, stream)


def sample_part(
    weight: Tensor,
    logits: Tensor,
    random: Tensor,
    pattern: Pattern,
    shape: tuple[int, int],
    part: tuple[slice, slice],
    *,
    stream: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Return a part of ``sample_mask``'s, whose other parts lie on other ranks.

    Numbers are drawn by plain torch, on a GPU too.

    Args:
        weight, logits: of whole groups that are here.
        random, pattern, stream, backend: as for ``sample_mask``.
        shape: of the grid of all groups.
        part: rows and columns of it that are here.

    Raises:
        TypeError, ValueError, RuntimeError: as ``straight_through``.
    """
    ends = part[0].start, part[0].stop, part[1].start, part[1].stop
    signed = _draw_part_op(logits.detach(), random, stream, *shape, *ends)
    kept = signed.signbit()
    mask = pack(kept) if isinstance(pattern, Unstructured) else kept
    # the values of scores are not read: this is their slope
    return straight_through(weight, logits * signed.abs(), mask, pattern, backend=backend)


def straight_through(
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    pattern: Pattern,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return ``weight`` masked, with a gradient to the scores that the mask came from.

    Args:
        weight: as for ``sample_mask``.
        scores: float32, one a group; their values are not read.
        mask: as for ``apply_mask``, compact or words.
        pattern: ``Unstructured`` or ``Block``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``apply_mask(weight, mask, pattern)``. With the incoming gradient g, the weight's gradient
        is g where kept and +0 elsewhere; a score's is the sum of g w over its group, in float32,
        kept or not: the comparison that made the mask counts as the identity. Both are bit-equal
        on every run.

    Raises:
        TypeError, ValueError, RuntimeError: as ``sample_mask`` and ``apply_mask``.
    """
    takes_operator = _check("straight_through", weight, scores, "scores", pattern, backend)
    if mask.dtype == WORDS[weight.element_size()]:
        if backend == "triton":
            raise ValueError(
                f"straight_through: mask must be compact with backend='triton', got {mask.dtype}"
            )
        takes_operator = True
    elif mask.dtype != (torch.uint8 if isinstance(pattern, Unstructured) else torch.bool):
        raise TypeError(
            f"straight_through: mask must be compact or words for {pattern} and a {weight.dtype} "
            f"weight, got {mask.dtype}"
        )
    if takes_operator:
        return _straight_op(weight, scores, mask, pattern.rows, pattern.cols)
    return straight_through_reference(weight, scores, mask, pattern)


def _check(
    operation: str, weight: Tensor, scores: Tensor, name: str, pattern: Pattern, backend: Backend
) -> bool:
    """Validate what both have in common; tell whether the operator runs, or the reference."""
    if not weight.is_floating_point() or weight.element_size() not in WORDS:
        raise TypeError(
            f"{operation}: weight must be a float of 16, 32 or 64 bits, got {weight.dtype}"
        )
    if weight.ndim != 2:
        raise ValueError(f"{operation}: weight must be a matrix, got shape {tuple(weight.shape)}")
    if scores.dtype != torch.float32:
        raise TypeError(f"{operation}: {name} must be float32, got {scores.dtype}")
    expected = grid_shape(pattern, (weight.shape[0], weight.shape[1]))
    if scores.shape != expected or scores.device != weight.device:
        raise ValueError(
            f"{operation}: {name} must have shape {expected} on {weight.device} for a weight of "
            f"shape {tuple(weight.shape)} and pattern {pattern}, got {tuple(scores.shape)} on "
            f"{scores.device}"
        )
    on_triton = use_triton(operation, backend, weight)
    if on_triton and weight.dtype == torch.float64:
        if backend == "triton":
            raise ValueError(f"{operation}: weight must not be float64 with backend='triton'")
        return False
    return on_triton or not takes_kernels(weight.device)


class _KeptGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *logits: Tensor) -> Tensor:
        ctx.save_for_backward(*logits)
        return torch.stack([(s > 0).count_nonzero() for s in logits]).double()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        found = []
        for grad, s in zip(grads[0].float(), ctx.saved_tensors, strict=True):
            p = torch.sigmoid(s)
            found.append(p.addcmul_(p, p, value=-1).mul_(grad))  # in the memory of the sigmoid
        return tuple(found)


def kept_groups(logits: Sequence[Tensor]) -> Tensor:
    """Count s > 0 in each tensor of logits: float64; the gradient is that of sigmoid(s)."""
    return _KeptGroups.apply(*logits)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``, its gradient multiplied. No hook, which copies and pickles would lose."""
    return _ScaledGradient.apply(x, factor)
