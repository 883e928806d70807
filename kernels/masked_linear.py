"""Masked linear: ``y = x (W * M)^T + b`` by dense matrix products, under a mask of any form.

The masked weight is made for each product and dropped after it. Kept from the forward pass to the
backward one it would cost a copy of every weight of a model at once; made again it costs a read
and a write of one weight, little beside a product with tokens enough to train on. On a CPU, which
has more memory than speed, the caller may lend ``memory`` that keeps it. The weight gradient is
masked where the product left it.

The three products (output, input gradient, weight gradient) are one another's derivatives, so
there are gradients of any order.

Reading order: reference -> products -> operators -> public function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from .launch import Backend, autocast, use_triton
from .mask import WORDS, word_mask
from .masked_weight import and_words, apply_mask, apply_mask_, apply_mask_reference
from .pattern import Block, Pattern, Unstructured

_memory = threading.local()


def masked_linear_reference(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, pattern: Pattern
) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype, differentiable."""
    return functional.linear(x, apply_mask_reference(weight, mask, pattern), bias)


def _pattern(mask: Tensor, rows: int, cols: int) -> Pattern:
    return Unstructured() if mask.dtype == torch.uint8 else Block(rows, cols)


def _words(weight: Tensor, mask: Tensor, rows: int, cols: int) -> Tensor:
    """Return the mask as words; of a grid of large blocks they take microseconds to make."""
    if mask.dtype in WORDS.values():
        return mask
    return word_mask(mask, _pattern(mask, rows, cols), weight.shape, weight.dtype)


def _scratch(like: Tensor) -> Tensor:
    """Return memory for a masked weight on a CPU, until this thread's next call: what is fresh
    from the system costs several times the masking.
    """
    kept = getattr(_memory, "bytes", None)
    if kept is None or kept.numel() < like.nbytes:
        kept = _memory.bytes = torch.empty(like.nbytes, dtype=torch.uint8)
    return kept[: like.nbytes].view(like.dtype).view(like.shape)


def keeps_all(mask: Tensor) -> bool:
    """Tell, where it costs nothing, that nothing is pruned."""
    return mask.dtype == torch.bool and mask.is_cpu and bool(mask.all())


def _masked(
    weight: Tensor, mask: Tensor, rows: int, cols: int, backend: Backend, dtype: torch.dtype
) -> Tensor:
    """Return the masked weight for one product: it may lie in scratch memory."""
    if keeps_all(mask):
        masked = weight
    elif (
        weight.is_contiguous()
        and weight.is_cpu
        and not use_triton("masked_linear", backend, weight)
    ):
        masked = _scratch(weight)
        and_words(weight, _words(weight, mask, rows, cols), rows, masked)
    else:
        masked = apply_mask(weight, mask, _pattern(mask, rows, cols), backend=backend)
    # masked, then narrowed: under autocast the mask's words are as wide as the weight
    return masked.to(dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    rows: int,
    cols: int,
    backend: Backend,
) -> Tensor:
    """Return ``x (W * M)^T + b``, shape ``(T, R)``."""
    return functional.linear(x, _masked(weight, mask, rows, cols, backend, x.dtype), bias)


def dgrad(
    grad: Tensor, weight: Tensor, mask: Tensor, rows: int, cols: int, backend: Backend
) -> Tensor:
    """Return ``grad (W * M)``, shape ``(T, C)``."""
    return grad @ _masked(weight, mask, rows, cols, backend, grad.dtype)


def wgrad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    rows: int,
    cols: int,
    backend: Backend,
) -> Tensor:
    """Return ``(grad^T x) * M``, shape ``(R, C)``, dtype of ``weight``."""
    product = (grad.T @ x).to(weight.dtype)
    apply_mask_(product, mask, _pattern(mask, rows, cols), backend=backend)
    return product


@torch.library.custom_op("triton_sparsity::masked_linear", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    rows: int,
    cols: int,
    dense_weight_grad: bool,
    backend: str,
) -> Tensor:
    return forward(x, weight, bias, mask, rows, cols, backend)


@torch.library.custom_op("triton_sparsity::masked_linear_dgrad", mutates_args=())
def _dgrad_op(
    grad: Tensor, weight: Tensor, mask: Tensor, rows: int, cols: int, backend: str
) -> Tensor:
    return dgrad(grad, weight, mask, rows, cols, backend)


@torch.library.custom_op("triton_sparsity::masked_linear_wgrad", mutates_args=())
def _wgrad_op(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, rows: int, cols: int, backend: str
) -> Tensor:
    return wgrad(grad, x, weight, mask, rows, cols, backend)


@_op.register_fake
def _(x, weight, bias, mask, rows, cols, dense_weight_grad, backend) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@_dgrad_op.register_fake
def _(grad, weight, mask, rows, cols, backend) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1]))


@_wgrad_op.register_fake
def _(grad, x, weight, mask, rows, cols, backend) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, mask, *ctx.options = inputs
    ctx.save_for_backward(x, weight, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad, _dgrad_op, _wgrad_op), None, None, None, None, None


def _gradients(
    ctx: Any, grad: Tensor, dgrad: Callable[..., Tensor], wgrad: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients to x, weight and bias that are wanted."""
    x, weight, mask = ctx.saved_tensors
    rows, cols, dense_weight_grad, backend = ctx.options
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = grad_bias = None
    if wants_x:
        grad_x = dgrad(grad, weight, mask, rows, cols, backend)
    if wants_weight and dense_weight_grad:
        grad_weight = (grad.T @ x).to(weight.dtype)
    elif wants_weight:
        grad_weight = wgrad(grad, x, weight, mask, rows, cols, backend)
    if wants_bias:
        grad_bias = bias_grad(grad)
    return grad_x, grad_weight, grad_bias


def bias_grad(grad: Tensor) -> Tensor:
    """Sum over the tokens, in float32 at least."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(0, dtype=wide).to(grad.dtype)


def _setup_dgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, mask, *ctx.options = inputs
    ctx.save_for_backward(grad, weight, mask)


def _dgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, weight, mask = ctx.saved_tensors
    wants_tokens, wants_weight = ctx.needs_input_grad[:2]
    rows, cols, backend = ctx.options
    grad_tokens = grad_weight = None
    if wants_tokens:
        grad_tokens = _op(grad, weight, None, mask, rows, cols, False, backend)
    if wants_weight:
        grad_weight = _wgrad_op(tokens, grad, weight, mask, rows, cols, backend)
    return grad_tokens, grad_weight, None, None, None, None


def _setup_wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _, mask, *ctx.options = inputs
    ctx.save_for_backward(grad, x, mask)


def _wgrad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, x, mask = ctx.saved_tensors
    wants_tokens, wants_x = ctx.needs_input_grad[:2]
    rows, cols, backend = ctx.options
    grad_tokens = grad_x = None
    if wants_tokens:
        grad_tokens = _op(x, grad, None, mask, rows, cols, False, backend)
    if wants_x:
        grad_x = _dgrad_op(tokens, grad, mask, rows, cols, backend)
    return grad_tokens, grad_x, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
_dgrad_op.register_autograd(_dgrad_backward, setup_context=_setup_dgrad_context)
_wgrad_op.register_autograd(_wgrad_backward, setup_context=_setup_wgrad_context)


class _Remembering(torch.autograd.Function):
    """The same on a CPU, outside of compiled graphs: ``memory`` has the masked weight of the last
    forward pass, and the input gradient takes it from there. It is as good as the weight itself,
    which autograd keeps by reference too: both are those of the last forward pass.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        memory: Tensor,
        rows: int,
        cols: int,
        dense_weight_grad: bool,
    ) -> Tensor:
        and_words(weight, _words(weight, mask, rows, cols), rows, memory)
        return functional.linear(x, memory, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, mask, ctx.memory, *options = inputs
        ctx.options = *options, "torch"
        ctx.save_for_backward(x, weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def remembered(grad: Tensor, *_: Any) -> Tensor:
            return grad @ ctx.memory

        # gradients that are to have gradients themselves
        again = torch.is_grad_enabled()
        ways = (_dgrad_op, _wgrad_op) if again else (remembered, wgrad)
        return *_gradients(ctx, grads[0], *ways), *[None] * 5


@register_flop_formula(torch.ops.triton_sparsity.masked_linear)
def _(x_shape, weight_shape, *_, **__) -> int:
    return 2 * x_shape[0] * prod(weight_shape)


@register_flop_formula(torch.ops.triton_sparsity.masked_linear_dgrad)
def _(grad_shape, weight_shape, *_, **__) -> int:
    return 2 * grad_shape[0] * prod(weight_shape)


@register_flop_formula(torch.ops.triton_sparsity.masked_linear_wgrad)
def _(grad_shape, x_shape, weight_shape, *_, **__) -> int:
    return 2 * grad_shape[0] * prod(weight_shape)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: Pattern,
    dense_weight_grad: bool = False,
    memory: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Multiply ``x`` by the masked ``weight`` through dense products: ``x (W * M)^T + b``.

    The result is that of ``torch.nn.functional.linear(x, apply_mask(weight, mask, pattern),
    bias)``, autocast included, for less memory: no masked weight waits for the backward pass.

    Args:
        x: activations, shape ``(..., C)``, any strides.
        weight: float, shape ``(R, C)``, any strides.
        mask: of ``weight``, in any of the forms that ``apply_mask`` takes.
        bias: shape ``(R,)``.
        pattern: the pattern that the mask belongs to.
        dense_weight_grad: give pruned weights their gradient too, as growing algorithms ask;
            otherwise it is +0 there.
        memory: contiguous, like ``weight``; the masked weight stays there until the next call with
            the same memory, so that the backward pass need not mask it again. Of use on a CPU, in
            plain torch, with a contiguous weight of x's dtype; elsewhere it is left alone.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, of masking.

    Returns:
        Shape ``(..., R)``, dtype of ``x``, or autocast's.

    Raises:
        TypeError, ValueError, RuntimeError: as ``apply_mask`` and
            ``torch.nn.functional.linear``.
    """
    if x.ndim == 0 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"masked_linear: x must have {weight.shape[-1]} features, as weight "
            f"{tuple(weight.shape)} has, got shape {tuple(x.shape)}"
        )
    x, bias = autocast(x, bias)
    flat = x[None] if x.ndim == 1 else x.flatten(0, -2)
    options = pattern.rows, pattern.cols, dense_weight_grad
    if memory is not None and _remembers(flat, weight, memory, backend):
        y: Tensor = _Remembering.apply(flat, weight, bias, mask, memory, *options)  # pyright: ignore[reportAssignmentType]
    else:
        y = _op(flat, weight, bias, mask, *options, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


def _remembers(x: Tensor, weight: Tensor, memory: Tensor, backend: Backend) -> bool:
    return (
        weight.is_cpu
        and not torch.compiler.is_compiling()
        and not use_triton("masked_linear", backend, weight)
        and x.dtype == weight.dtype == memory.dtype
        and weight.is_contiguous()
        and memory.is_contiguous()
        and memory.shape == weight.shape
    )
