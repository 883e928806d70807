"""The operations on one weight, as work to be measured: set-up, check, what is timed.

Every check compares with the reference; see agreement.py. Bytes and FLOPs: counts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.bits import expand_mask, pack_reference, packed_shape, unpack_reference
from ...kernels.block_score import block_score, block_score_reference
from ...kernels.block_sparse_linear import block_sparse_linear
from ...kernels.mask import make_mask, make_mask_reference, pack
from ...kernels.masked_weight import apply_mask, apply_mask_
from ...kernels.pattern import NM, Block, Unstructured, grid_shape, is_skippable
from ...kernels.search import Threshold
from ...kernels.select import select, select_reference
from ...kernels.semi_structured import nm_mask, nm_score
from ...kernels.topology import (
    Topology,
    block_topology,
    topology_reference,
)
from .agreement import difference, disagreement, first, worse_tuples
from .cases import Built, Case
from .counts import (
    apply_bytes,
    apply_in_place_bytes,
    intensity,
    mask_bytes,
    pack_bytes,
    product_bytes,
    product_flops,
    score_bytes,
    tile_of,
    topology_bytes,
)
from .operands import Operands

# the kernels are measured, where they are slower than a dense product too
SKIP = torch.tensor([True, True, True])


def _score(o: Operands) -> Built:
    run = partial(block_score, o.weight, o.pattern, backend=o.backend)

    def check() -> str | None:
        exact = block_score_reference(o.weight.double(), o.pattern, squared=False)
        eager = block_score_reference(o.weight, o.pattern, squared=False)
        return disagreement(run(), eager, exact.double())

    return Built(run, check)


def _select(o: Operands) -> Built:
    run = partial(select, [o.scores], o.pruned, backend=o.backend)

    def check() -> str | None:
        pairs = zip(Threshold._fields, run(), select_reference([o.scores], o.pruned), strict=True)
        return first(difference(name, a, b) for name, a, b in pairs)

    return Built(run, check)


def _mask(o: Operands) -> Built:
    packed = isinstance(o.pattern, Unstructured)
    threshold = select([o.scores], o.pruned, backend=o.backend)
    rows, cols = packed_shape(o.scores.shape) if packed else o.scores.shape
    kind = torch.uint8 if packed else torch.bool
    out = [torch.zeros(rows, cols, dtype=kind, device=o.device)]

    def run() -> list[Tensor]:
        return make_mask([o.scores], threshold, packed=packed, out=out, backend=o.backend)

    def check() -> str | None:
        # what is not written shows
        out[0].bitwise_not_()
        (mask,) = run()
        wanted = torch.zeros_like(mask)
        make_mask_reference(
            [o.scores], threshold.value, threshold.keep_ties, None, packed, [wanted]
        )
        # the reference shares the threshold: count as well
        bits = o.scores.shape[1]
        kept = expand_mask(mask, Unstructured(), (rows, bits), backend="torch") if packed else mask
        pruned = kept.numel() - int(kept.sum())
        wrong = f"{pruned} groups are pruned, not {o.pruned}" if pruned != o.pruned else None
        return difference("mask", mask, wanted) or wrong

    return Built(run, check)


def _nm_mask(o: Operands) -> Built:
    """Against the n largest of every m, or the best of all 4 x 4 tiles; of equal magnitudes, of
    which random numbers have few, any may be kept.
    """
    assert isinstance(o.pattern, NM)
    pattern = o.pattern
    out = torch.zeros(packed_shape(o.shape.weight), dtype=torch.uint8, device=o.device)
    run = partial(nm_mask, o.weight, o.pattern, out=out, backend=o.backend)

    def check() -> str | None:
        out.bitwise_not_()
        run()
        return worse_tuples(o.weight, unpack_reference(out, o.shape.inputs), pattern)

    return Built(run, check)


def _nm_score(o: Operands) -> Built:
    assert isinstance(o.pattern, NM)
    pattern = o.pattern
    run = partial(nm_score, o.weight, pattern, backend=o.backend)

    def check() -> str | None:
        """What a group loses is the sum of what its mask drops."""
        tall, wide = pattern.group
        lost = o.weight.abs().masked_fill(o.grid, 0)
        groups = (-1, tall), (-1, wide)

        def total(values: Tensor) -> Tensor:
            return values.unflatten(1, groups[1]).unflatten(0, groups[0]).sum((1, 3))

        return disagreement(run(), total(lost.float()), total(lost.double()))

    return Built(run, check)


def _topology(o: Operands) -> Built:
    out = block_topology(o.grid, o.pattern, backend=o.backend)

    def run() -> Topology:
        return block_topology(o.grid, o.pattern, out=out, backend=o.backend)

    def check() -> str | None:
        for part in out[:6]:
            part.fill_(-7)
        pairs = zip(Topology._fields, run(), topology_reference(o.grid, o.pattern), strict=True)
        return first(difference(name, a, b) for name, a, b in pairs)

    return Built(run, check)


def _pack(o: Operands) -> Built:
    run = partial(pack, o.grid, backend=o.backend)
    return Built(run, lambda: difference("bits", run(), pack_reference(o.grid)))


def _apply(o: Operands) -> Built:
    run = partial(apply_mask, o.weight, o.served, o.pattern, backend=o.backend)
    return Built(run, lambda: difference("weight", run(), o.masked))


def _apply_in_place(o: Operands) -> Built:
    weight = o.weight.clone()
    run = partial(apply_mask_, weight, o.served, o.pattern, backend=o.backend)

    def check() -> str | None:
        weight.copy_(o.weight)
        run()
        return difference("weight", weight, o.masked)

    return Built(run, check)


def _multiply(o: Operands, x: Tensor, weight: Tensor) -> Tensor:
    return block_sparse_linear(
        x, weight, o.topology, pattern=o.pattern, paths=SKIP, backend=o.backend
    )


def _forward(o: Operands) -> Built:
    run = partial(_multiply, o, o.x, o.weight)

    def check() -> str | None:
        eager = F.linear(o.x, o.masked)
        return disagreement(run(), eager, F.linear(*o.exact(o.x, o.masked)))

    return Built(run, check, partial(F.linear, o.x, o.weight))


def _gradient(o: Operands, of: str) -> Callable[[], Tensor]:
    """Return what computes the gradient to ``"x"`` or ``"weight"`` of one forward pass."""
    leaf = {"x": o.x, "weight": o.weight}
    leaf[of] = leaf[of].detach().requires_grad_()
    y = _multiply(o, leaf["x"], leaf["weight"])
    return lambda: torch.autograd.grad(y, leaf[of], o.grad, retain_graph=True)[0]


def _dgrad(o: Operands) -> Built:
    run = _gradient(o, "x")

    def check() -> str | None:
        return disagreement(run(), o.grad @ o.masked, torch.matmul(*o.exact(o.grad, o.masked)))

    return Built(run, check, lambda: o.grad @ o.weight)


def _wgrad(o: Operands) -> Built:
    run = _gradient(o, "weight")

    def check() -> str | None:
        keep = expand_mask(o.mask, o.pattern, o.shape.weight, backend="torch")
        exact = torch.matmul(*o.exact(o.grad.T, o.x)).masked_fill_(~keep, 0)
        got = run()
        outside = int(got.masked_select(~keep).count_nonzero())
        wrong = f"{outside} pruned weights have a gradient" if outside else None
        return disagreement(got, (o.grad.T @ o.x).masked_fill_(~keep, 0), exact) or wrong

    return Built(run, check, lambda: o.grad.T @ o.x)


def operand_cases(operands: Operands, operations: Sequence[str]) -> Iterator[Case]:
    """Yield those operations on one weight that its pattern has."""
    o = operands
    weight, pattern, size = o.shape.weight, o.pattern, o.size
    grid = grid_shape(pattern, weight)
    is_block = isinstance(pattern, Block)
    scores_size = 4 if is_block else size

    def case(
        operation: str, moved: int, build: Callable[[Operands], Built], flops: int = 0
    ) -> Case:
        cache = None
        if flops and o.device.type == "cuda" and isinstance(pattern, Block):
            tile = tile_of(operation, weight, pattern, o.dtype, o.device)
            cache = flops / intensity(operation, tile, size)
        return Case(
            operation, (o.shape,), o.dtype, pattern, o.level, o.mask_kind, moved, flops, cache,
            partial(build, o), product_flops(o.shape.tokens, prod(weight)) if flops else 0,
        )  # fmt: skip

    for operation in operations:
        match operation:
            case "score" if isinstance(pattern, NM):
                tall, wide = pattern.group
                moved = weight[0] * weight[1] * size + 4 * (weight[0] // tall * weight[1] // wide)
                yield case(operation, moved, _nm_score)
            case "mask" if isinstance(pattern, NM):
                yield case(operation, mask_bytes(weight, size, packed=True), _nm_mask)
            case "select" if isinstance(pattern, NM):
                continue
            case "score" if is_block:
                yield case(operation, score_bytes(weight, pattern, size), _score)
            case "select":
                yield case(operation, prod(grid) * scores_size, _select)
            case "mask":
                yield case(operation, mask_bytes(grid, scores_size, not is_block), _mask)
            case "topology" if is_block:
                yield case(operation, topology_bytes(grid, pattern), _topology)
            case "pack" if not is_block:
                yield case(operation, pack_bytes(weight), _pack)
            case "apply":
                yield case(operation, apply_bytes(weight, o.kept, pattern, size), _apply)
            case "apply_":
                moved = apply_in_place_bytes(weight, o.kept, pattern, size)
                yield case(operation, moved, _apply_in_place)
            case "forward" | "dX" | "dW" if is_skippable(pattern):
                build = {"forward": _forward, "dX": _dgrad, "dW": _wgrad}[operation]
                moved = product_bytes(operation, o.shape, o.kept, size)
                yield case(operation, moved, build, product_flops(o.shape.tokens, o.kept))
