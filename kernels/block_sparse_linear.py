"""Block-sparse linear: ``y = x (W * M)^T + b`` with kernels that read only the kept blocks of W.

W is an ordinary dense parameter, never copied or re-packed, in either memory layout. The forward
pass and the input gradient, ``dX = dY (W * M)``, are one kernel, ``block_sparse_product.py``. The
weight gradient is ``block_sparse_wgrad.py``; the plain-torch way, ``block_sparse_torch.py``.
A product that is faster dense (``dispatch.py``) is an ordinary dense one, which masks nothing: it
reads the weight as it is, whose pruned blocks the caller keeps zero. The three are one another's
derivatives, so there are gradients of any order.

Reading order: reference -> the three products -> eager mode -> operators -> checks -> public
function.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from . import block_sparse_torch
from .block_sparse_product import launch_product, rows_of
from .block_sparse_wgrad import launch_wgrad
from .dispatch import Paths
from .grid import expand_blocks, side_lengths
from .launch import Backend, autocast, is_plain, use_triton
from .pattern import MIN_SIDE, Block, Pattern, grid_shape, is_skippable
from .tiles import Tile
from .topology import Topology, block_topology, capacities
from .tuning import tuned_tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def block_sparse_linear_reference(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, pattern: Pattern
) -> Tensor:
    """Define the semantics: plain PyTorch, any device, any float dtype, differentiable."""
    keep = expand_blocks(mask, pattern.rows, pattern.cols, weight.shape)
    return functional.linear(x, weight.masked_fill(~keep, 0), bias)


def _tuned(direction: str, weight: Tensor, rows: int, cols: int) -> Tile | None:
    shape = weight.shape[0], weight.shape[1]
    return tuned_tile(direction, shape, Block(rows, cols), weight.dtype, weight.device)


def _paths(paths: Tensor | None) -> Paths:
    return Paths(True, True, True) if paths is None else Paths(*paths.tolist())


class _Options(NamedTuple):
    """What is no tensor."""

    rows: int
    cols: int
    triton_runs: bool


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topology: Topology,
    paths: Tensor | None,
    options: _Options,
) -> Tensor:
    rows, cols, triton_runs = options
    if not _paths(paths).forward:
        return functional.linear(x, weight, bias)
    if not triton_runs:
        return block_sparse_torch.forward(x, weight, bias, topology, rows, cols)
    tuned = _tuned("forward", weight, rows, cols)
    return launch_product(
        x, weight, bias, topology.row_tasks, topology.col_index, rows, cols, tuned
    )


def _dgrad(
    grad: Tensor, weight: Tensor, topology: Topology, paths: Tensor | None, options: _Options
) -> Tensor:
    rows, cols, triton_runs = options
    if not _paths(paths).dgrad:
        return grad @ weight
    if not triton_runs:
        return block_sparse_torch.dgrad(grad, weight, topology, rows, cols)
    tuned = _tuned("dgrad", weight, rows, cols)
    return launch_product(
        grad, weight.T, None, topology.col_tasks, topology.row_index, cols, rows, tuned
    )


def _wgrad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,  # for its layout
    topology: Topology,
    paths: Tensor | None,
    options: _Options,
) -> Tensor:
    rows, cols, triton_runs = options
    out = torch.empty_like(weight)
    if x.shape[0] == 0:
        out.zero_()
    elif not _paths(paths).wgrad:
        torch.mm(grad.T, x, out=out)
    elif not triton_runs:
        block_sparse_torch.wgrad(grad, x, topology, rows, cols, out)
    elif out.numel():
        launch_wgrad(rows_of(grad), rows_of(x), topology, rows, cols, out)
    return out


def _bias_grad(grad: Tensor) -> Tensor:
    # over the tokens, in float32 at least
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(0, dtype=wide).to(grad.dtype)


class _Linear(torch.autograd.Function):
    """The product in eager mode. What the operators below cost beside it, schemas and Python
    between C++ and C++, is as long as a small product takes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        paths: Tensor | None,
        options: _Options,
        *lists: Tensor,
    ) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(x, weight, paths, *lists)
        return _forward(x, weight, bias, Topology(*lists), paths, options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, paths, *lists = ctx.saved_tensors
        return *_gradients(ctx, grads[0], x, weight, paths, lists), *[None] * (2 + len(lists))


def _gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, paths: Tensor | None, lists: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return those of x, weight and bias that are wanted."""
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = None
    # to be differentiated themselves, or seen by a mode, they must be operators
    if torch.is_grad_enabled() or not is_plain(grad, x, weight):
        if wants_x:
            grad_x = _dgrad_op(grad, weight, lists, paths, *ctx.options)
        if wants_weight:
            grad_weight = _wgrad_op(grad, x, weight, lists, paths, *ctx.options)
    else:
        topology = Topology(*lists)
        if wants_x:
            grad_x = _dgrad(grad, weight, topology, paths, ctx.options)
        if wants_weight:
            grad_weight = _wgrad(grad, x, weight, topology, paths, ctx.options)
    return grad_x, grad_weight, _bias_grad(grad) if wants_bias else None


# the paths are read on the host, and a graph of mode="reduce-overhead" would keep those of its
# capture for ever: so the compiler parts its graphs around the operators
UNCAPTURED = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("triton_sparsity::block_sparse_linear", mutates_args=(), tags=UNCAPTURED)
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lists: list[Tensor],
    paths: Tensor | None,
    rows: int,
    cols: int,
    triton_runs: bool,
) -> Tensor:
    options = _Options(rows, cols, triton_runs)
    return _forward(x, weight, bias, Topology(*lists), paths, options)


@torch.library.custom_op(
    "triton_sparsity::block_sparse_linear_dgrad", mutates_args=(), tags=UNCAPTURED
)
def _dgrad_op(
    grad: Tensor,
    weight: Tensor,
    lists: list[Tensor],
    paths: Tensor | None,
    rows: int,
    cols: int,
    triton_runs: bool,
) -> Tensor:
    return _dgrad(grad, weight, Topology(*lists), paths, _Options(rows, cols, triton_runs))


@torch.library.custom_op(
    "triton_sparsity::block_sparse_linear_wgrad", mutates_args=(), tags=UNCAPTURED
)
def _wgrad_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lists: list[Tensor],
    paths: Tensor | None,
    rows: int,
    cols: int,
    triton_runs: bool,
) -> Tensor:
    return _wgrad(grad, x, weight, Topology(*lists), paths, _Options(rows, cols, triton_runs))


@_op.register_fake
def _(x, weight, bias, lists, paths, rows, cols, triton_runs) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@_dgrad_op.register_fake
def _(grad, weight, lists, paths, rows, cols, triton_runs) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1]))


@_wgrad_op.register_fake
def _(grad, x, weight, lists, paths, rows, cols, triton_runs) -> Tensor:
    return torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lists, paths, *ctx.options = inputs
    ctx.save_for_backward(x, weight, paths, *lists)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, paths, *lists = ctx.saved_tensors
    return *_gradients(ctx, grad, x, weight, paths, lists), [None] * len(lists), *[None] * 4


def _setup_dgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, lists, paths, *ctx.options = inputs
    ctx.save_for_backward(tokens, weight, paths, *lists)


def _dgrad_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tokens, weight, paths, *lists = ctx.saved_tensors
    wants_tokens, wants_weight = ctx.needs_input_grad[:2]
    grad_tokens = grad_weight = None
    if wants_tokens:
        grad_tokens = _op(grad, weight, None, lists, paths, *ctx.options)
    if wants_weight:
        grad_weight = _wgrad_op(tokens, grad, weight, lists, paths, *ctx.options)
    return grad_tokens, grad_weight, [None] * len(lists), *[None] * 4


def _setup_wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, x, _, lists, paths, *ctx.options = inputs
    ctx.save_for_backward(tokens, x, paths, *lists)


def _wgrad_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tokens, x, paths, *lists = ctx.saved_tensors
    wants_tokens, wants_x = ctx.needs_input_grad[:2]
    grad_tokens = grad_x = None
    # here the incoming gradient is the weight, and nobody promised that it is zero where pruned:
    # it counts where the product that it belongs to was computed
    paths = None if paths is None else paths[2:].expand(3)
    if wants_tokens:
        grad_tokens = _op(x, grad, None, lists, paths, *ctx.options)
    if wants_x:
        grad_x = _dgrad_op(tokens, grad, lists, paths, *ctx.options)
    return grad_tokens, grad_x, None, [None] * len(lists), *[None] * 4


_op.register_autograd(_backward, setup_context=_setup_context)
_dgrad_op.register_autograd(_dgrad_backward, setup_context=_setup_dgrad_context)
_wgrad_op.register_autograd(_wgrad_backward, setup_context=_setup_wgrad_context)


def _flops(tokens: int, weight: Tensor, kept: Tensor, rows: int, cols: int) -> int:
    """Count the multiplications and additions with kept weights; waits for the mask."""
    heights, widths = side_lengths(weight.shape, rows, cols, device=torch.device("cpu"))
    return 2 * tokens * int((kept.cpu() * heights * widths).sum())


@register_flop_formula(torch.ops.triton_sparsity.block_sparse_linear, get_raw=True)
def _(x, weight, bias, lists, paths, rows, cols, *_, **__) -> int:
    return _flops(x.shape[0], weight, Topology(*lists).kept, rows, cols)


@register_flop_formula(torch.ops.triton_sparsity.block_sparse_linear_dgrad, get_raw=True)
def _(grad, weight, lists, paths, rows, cols, *_, **__) -> int:
    return _flops(grad.shape[0], weight, Topology(*lists).kept, rows, cols)


@register_flop_formula(torch.ops.triton_sparsity.block_sparse_linear_wgrad, get_raw=True)
def _(grad, x, weight, lists, paths, rows, cols, *_, **__) -> int:
    return _flops(grad.shape[0], weight, Topology(*lists).kept, rows, cols)


class _Facts(NamedTuple):
    """What there is to check of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _facts(tensor: Tensor) -> _Facts:
    return _Facts(tensor.shape, tensor.dtype, tensor.device)


def _check(
    features: int | None,
    x: _Facts,
    weight: _Facts,
    mask: _Facts,
    topology: tuple[torch.Size, ...] | None,
    bias: _Facts | None,
    pattern: Pattern,
    paths: _Facts | None,
) -> None:
    """Refuse operands that do not fit together.

    ``features`` are x's; ``mask`` is the topology's where one is given.
    """

    def must(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"block_sparse_linear: {message}")

    must(
        is_skippable(pattern),
        f"pattern must be blocks of at least {MIN_SIDE} a side, got {pattern}",
    )
    must(len(weight.shape) == 2, f"weight must be a matrix, got shape {tuple(weight.shape)}")
    R, C = weight.shape
    must(
        features == C,
        f"x must have {C} features, as weight {(R, C)} has, got shape {tuple(x.shape)}",
    )
    must(
        weight.dtype in (*DTYPES, torch.float64),
        f"weight must be a float of 16, 32 or 64 bits, got {weight.dtype}",
    )
    must(x.dtype == weight.dtype, f"x must have weight's {weight.dtype}, got {x.dtype}")
    must(x.device == weight.device, f"x must be on weight's {weight.device}, got {x.device}")
    if bias is not None:
        must(bias.shape == (R,), f"bias must have shape {(R,)}, got {tuple(bias.shape)}")
        must(
            bias.dtype == weight.dtype,
            f"bias must have weight's {weight.dtype}, got {bias.dtype}",
        )
        must(
            bias.device == weight.device,
            f"bias must be on weight's {weight.device}, got {bias.device}",
        )
    grid = grid_shape(pattern, (R, C))
    if topology is None:
        must(
            mask.dtype == torch.bool and mask.shape == grid,
            f"mask must be bool {grid}, one a block of {pattern} of weight {(R, C)}, got "
            f"{mask.dtype} {tuple(mask.shape)}",
        )
    else:
        must(
            topology == capacities(grid, pattern),
            f"topology must be of {grid} {pattern} of weight {(R, C)}, got one of "
            f"{tuple(mask.shape)} blocks",
        )
    must(mask.device == weight.device, f"mask must be on {weight.device}, got {mask.device}")
    must(
        paths is None
        or (paths.shape == (3,) and paths.dtype == torch.bool and paths.device.type == "cpu"),
        "paths must be bool (3,) on the CPU, "
        f"got {paths if paths is None else (paths.dtype, tuple(paths.shape), paths.device)}",
    )


# what was found to fit is not looked at again; a tracer would look through the cache and warn
_check_once = lru_cache(maxsize=4096)(_check)


def block_sparse_linear(
    x: Tensor,
    weight: Tensor,
    topology: Topology | Tensor,
    bias: Tensor | None = None,
    *,
    pattern: Pattern,
    paths: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Multiply ``x`` by the kept blocks of ``weight``: ``x (W * M)^T + b``.

    Sums are in float32 (float64 for float64) and rounded once. float32 operands are multiplied in
    TF32 on a GPU if ``torch.backends.cuda.matmul.fp32_precision`` says so, exactly otherwise. Two
    runs give the same bits. Pruned blocks that are skipped are left out, not multiplied by zero: a
    NaN in them goes nowhere. Autocast casts floats as for ``torch.nn.functional.linear``.

    Args:
        x: activations, shape ``(..., C)``, any strides.
        weight: float of 16, 32 or 64 bits, shape ``(R, C)``, any strides. Where ``paths`` asks for
            a dense output or input gradient its pruned blocks must be zero; nothing checks that.
        topology: the lists of ``block_topology``; or a bool mask ``(ceil(R / rows), ceil(C /
            cols))``, True = kept, from which they are built in every call.
        bias: shape ``(R,)``.
        pattern: ``Block`` of 16 to 256 a side, rectangular too.
        paths: bool ``(3,)`` on the CPU, see ``dispatch.Paths``: which of the output, the input
            gradient and the weight gradient skip pruned blocks. The others are ordinary dense
            products: output and input gradient read the weight as it is, and the weight gradient
            comes whole, pruned blocks included, which the caller clears or, to grow them, reads.
            A weight gradient that skips them is exactly zero there. None: all three skip.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Shape ``(..., R)``, dtype of ``x``.

    Raises:
        ValueError: a shape, dtype or device does not fit the weight's, the mask is another
            weight's, a block is smaller than 16 a side, or ``paths`` is not as above.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    x, weight, bias = autocast(x, weight, bias)
    is_mask = isinstance(topology, Tensor)
    check = _check if torch.compiler.is_compiling() else _check_once
    check(
        x.shape[-1] if x.ndim else None,
        _facts(x),
        _facts(weight),
        _facts(topology if is_mask else topology.kept),
        None if is_mask else tuple(t.shape for t in topology),
        None if bias is None else _facts(bias),
        pattern,
        None if paths is None else _facts(paths),
    )
    triton_runs = use_triton("block_sparse_linear", backend, x)
    if weight.dtype == torch.float64:
        if backend == "triton":
            raise ValueError(
                "block_sparse_linear: weight must not be float64 for backend='triton'"
            )
        triton_runs = False
    if is_mask:
        topology = block_topology(topology, pattern, backend=backend)
    flat = x[None] if x.ndim == 1 else x.flatten(0, -2)
    options = _Options(pattern.rows, pattern.cols, triton_runs)
    if is_plain(flat, weight, *([] if bias is None else [bias])):
        y = _Linear.apply(flat, weight, bias, paths, options, *topology)
    else:
        y = _op(flat, weight, bias, list(topology), paths, *options)
    # as torch's own product no view, of which FSDP2 warns: a write in place would lose its hooks
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
