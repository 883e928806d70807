"""The self-check of ``doctor``: every operator on small hostile operands, against its reference.

Edge blocks, tall and wide weights, masks with empty lines; values and gradients. Behind the masks
lies NaN, so that a pruned weight that is read shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ..kernels.bits import expand_mask, pack_reference, unpack_reference
from ..kernels.block_score import block_score, block_score_reference
from ..kernels.block_sparse_linear import block_sparse_linear, block_sparse_linear_reference
from ..kernels.count import kept_counts
from ..kernels.launch import INTERPRET, Backend
from ..kernels.learned_mask import (
    sample_mask,
    sample_mask_reference,
    straight_through,
    straight_through_reference,
)
from ..kernels.mask import make_mask, make_mask_reference, pack, unpack
from ..kernels.masked_weight import apply_mask, apply_mask_, apply_mask_reference, count_leaks
from ..kernels.pattern import NM, Block, Pattern, Unstructured, grid_shape
from ..kernels.prune_rows import prune_rows, prune_rows_reference
from ..kernels.retained import put_all_back_, take_all_pruned
from ..kernels.search import Threshold
from ..kernels.select import select, select_reference
from ..kernels.select_each import select_each, select_each_reference
from ..kernels.semi_structured import nm_mask, nm_score
from ..kernels.topology import Topology, block_topology, topology_reference
from .measure.agreement import difference, disagreement, first, gradient_of, worse_tuples

Check = Callable[[], str | None]

# tokens, outputs, inputs, block: edges on both sides, tall and wide, every path of the kernels
CASES = (
    (37, 130, 70, Block(32, 32)),
    (65, 264, 80, Block(64, 16)),
    (130, 128, 264, Block(128, 128)),
)


def checks(device: torch.device, backend: Backend) -> Iterator[tuple[str, Check]]:
    """Yield every operator's checks by name."""
    # the interpreter's bfloat16 is unreliable
    main = torch.float16 if backend == "triton" and INTERPRET else torch.bfloat16
    dtypes = list(dict.fromkeys((main, torch.float32, torch.float16)))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def grid_of(pattern: Pattern, weight: Tensor) -> Tensor:
        rows, cols = weight.shape
        mask = torch.rand(grid_shape(pattern, (rows, cols)), generator=generator) < 0.5
        mask[0], mask[:, -1] = False, False
        mask[-1, 0] = True
        return mask.to(device)

    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        # on a GPU every block size and dtype takes seconds to compile
        for tokens, rows, cols, block in CASES if dtype == main else CASES[:1]:
            weight, x = normal(rows, cols, dtype=dtype), normal(tokens, cols, dtype=dtype)
            bias, grad = normal(rows, dtype=dtype), normal(tokens, rows, dtype=dtype)
            mask = grid_of(block, weight)
            size = f"{rows}x{cols}, {block}, {name}"
            yield f"block_score {size}", _score(weight, block, backend)
            yield f"apply_mask {size}", _apply(weight, mask, block, backend)
            for path, skip in (("", True), (", dense paths", False)):
                linear = _linear(x, weight, mask, bias, grad, block, backend, skip)
                yield f"block_sparse_linear {size}{path}", linear
        fine = normal(37, 130, dtype=dtype).round(decimals=1)  # with equal magnitudes
        packed = pack_reference(grid_of(Unstructured(), fine))
        yield f"select, make_mask {name}", _select([fine, fine[:5].neg()], backend)
        yield f"prune_rows {name}", _rows([fine, fine[:5].neg()], backend)
        yield f"select_each, kept_counts {name}", _each([fine, fine[:5].neg()], backend)
        yield f"apply_mask unstructured, {name}", _apply(fine, packed, Unstructured(), backend)
        tuples = normal(36, 128, dtype=dtype).round(decimals=1)
        for pattern in (NM(2, 4), NM(1, 8), NM(2, 4, transposable=True)):
            yield f"nm_mask {pattern}, {name}", _tuples(tuples, pattern, backend)
        for pattern in (Unstructured(), Block(8, 16)):
            logits = normal(*grid_shape(pattern, (37, 130)))
            random = torch.tensor([7, 3], device=device)
            rest = {"pattern": pattern, "backend": backend}
            size = f"37x130, {pattern}, {name}"
            drawn = partial(sample_mask, random=random, **rest)
            wanted = partial(sample_mask_reference, random=random, pattern=pattern)
            yield f"sample_mask {size}", _learned(drawn, wanted, fine, logits)
            grid = grid_of(pattern, fine)
            mask = pack_reference(grid) if isinstance(pattern, Unstructured) else grid
            given = partial(straight_through, mask=mask, **rest)
            wanted = partial(straight_through_reference, mask=mask, pattern=pattern)
            yield f"straight_through {size}", _learned(given, wanted, fine, logits)
    flags = grid_of(Unstructured(), normal(37, 131))
    yield "pack, unpack", _bits(flags, backend)
    for block in (Block(16, 64), Block(64, 16)):
        yield (
            f"block_topology {block}",
            _topology(grid_of(block, normal(700, 450)), block, backend),
        )


def _score(weight: Tensor, pattern: Pattern, backend: Backend) -> Check:
    def check() -> str | None:
        leaves = [weight.detach().to(kind).requires_grad_() for kind in _kinds(weight)]
        got = block_score(leaves[0], pattern, backend=backend)
        eager, exact = (block_score_reference(w, pattern, squared=False) for w in leaves[1:])
        for score in (got, eager, exact):
            score.square().sum().backward()
        return first(
            (
                _named("value", disagreement(got, eager, exact.double())),
                _named("gradient", disagreement(*map(gradient_of, leaves))),
            )
        )

    return check


def _kinds(tensor: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    return tensor.dtype, tensor.dtype, torch.float64


def _named(name: str, problem: str | None) -> str | None:
    return None if problem is None else f"{name}: {problem}"


def _apply(weight: Tensor, mask: Tensor, pattern: Pattern, backend: Backend) -> Check:
    def check() -> str | None:
        keep = expand_mask(mask, pattern, weight.shape, backend="torch")
        poisoned = weight.detach().masked_fill(~keep, float("nan")).requires_grad_()
        wanted = apply_mask_reference(weight, mask, pattern)
        got = apply_mask(poisoned, mask, pattern, backend=backend)
        got.backward(torch.full_like(got, 3))
        in_place = poisoned.detach().clone()
        leaks = count_leaks([in_place], [mask], pattern, backend=backend)
        apply_mask_([in_place], [mask], pattern, backend=backend)
        emptied = weight.detach().clone()
        pruned = int((~keep).sum())
        values = take_all_pruned(
            [emptied], [mask], pattern, pruned=[pruned], out=[None], backend=backend
        )
        found = [
            difference("value", got, wanted),
            difference("gradient", gradient_of(poisoned), keep.to(weight.dtype) * 3),
            difference("leaks", leaks, (~keep).sum()[None]),
            difference("in place", in_place, wanted),
            difference("emptied", emptied, wanted),
        ]
        put_all_back_([emptied], values, [mask], pattern, backend=backend)
        return first([*found, difference("put back", emptied, weight)])

    return check


def _linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor,
    grad: Tensor,
    block: Block,
    backend: Backend,
    skip: bool,
) -> Check:
    def check() -> str | None:
        keep = expand_mask(mask, block, weight.shape, backend="torch")
        paths = torch.tensor([skip] * 3)
        results = []
        for i, kind in enumerate(_kinds(x)):
            # a dense product reads the weight as it is
            behind = float("nan") if i == 0 and skip else 0.0
            w = weight.detach().to(kind).masked_fill(~keep, behind).requires_grad_()
            a, b = (t.detach().to(kind).requires_grad_() for t in (x, bias))
            if i == 0:
                topology = block_topology(mask, block, backend=backend)
                y = block_sparse_linear(
                    a, w, topology, b, pattern=block, paths=paths, backend=backend
                )
            else:
                y = (
                    block_sparse_linear_reference(a, w, mask, b, block)
                    if skip
                    else torch.nn.functional.linear(a, w, b)
                )
            results.append((y, *torch.autograd.grad(y, (a, w, b), grad.to(kind))))
        names = ("value", "gradient to x", "gradient to weight", "gradient to bias")
        return first(
            _named(name, disagreement(*three))
            for name, three in zip(names, zip(*results, strict=True), strict=True)
        )

    return check


def _learned(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    weight: Tensor,
    scores: Tensor,
) -> Check:
    """Values to the bit; the gradient of the scores is a sum, as is the weight's behind a mask."""

    def check() -> str | None:
        results = []
        for run, kind in zip((function, reference, reference), _kinds(weight), strict=True):
            w, s = weight.detach().to(kind).requires_grad_(), scores.clone().requires_grad_()
            y = run(w, s)
            results.append((y, *torch.autograd.grad(y.square().sum(), (w, s))))
        got, eager, exact = results
        return first(
            (
                difference("value", got[0], eager[0]),
                _named("gradient to weight", disagreement(got[1], eager[1], exact[1])),
                _named("gradient to scores", disagreement(got[2], eager[2], exact[2].double())),
            )
        )

    return check


def _tuples(weight: Tensor, pattern: NM, backend: Backend) -> Check:
    """Against a stable sort of every tuple: of equal magnitudes the first are kept.

    Against all 4 x 4 tiles there are, where rows and columns count.
    """

    def check() -> str | None:
        if pattern.transposable:
            mask = nm_mask(weight, pattern, backend=backend).mask
            keep = unpack_reference(mask, weight.shape[1])
            lost = weight.double().abs().masked_fill(keep, 0)
            lost = lost.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).sum((1, 3))
            scores = nm_score(weight, pattern, backend=backend)
            return first(
                (
                    _named("mask", worse_tuples(weight, keep, pattern)),
                    _named("score", disagreement(scores, lost, lost)),
                )
            )
        size = weight.float().abs().unflatten(1, (-1, pattern.m))
        order = size.argsort(dim=2, descending=True, stable=True)
        keep = torch.zeros_like(size, dtype=torch.bool)
        keep.scatter_(2, order[..., : pattern.n], True)
        lost = size.masked_fill(keep, 0).double().sum(2)
        return first(
            (
                difference(
                    "mask",
                    nm_mask(weight, pattern, backend=backend).mask,
                    pack_reference(keep.flatten(1)),
                ),
                _named(
                    "score", disagreement(nm_score(weight, pattern, backend=backend), lost, lost)
                ),
            )
        )

    return check


def _select(tensors: list[Tensor], backend: Backend) -> Check:
    def check() -> str | None:
        total = sum(t.numel() for t in tensors)
        for k in (0, 1, total // 2, total):
            threshold, wanted = select(tensors, k, backend=backend), select_reference(tensors, k)
            pairs = zip(Threshold._fields, threshold, wanted, strict=True)
            if problem := first(difference(name, a, b) for name, a, b in pairs):
                return f"k = {k}: {problem}"
            for packed in (False, True):
                got = make_mask(tensors, threshold, packed=packed, backend=backend)
                masks = [torch.zeros_like(m) for m in got]
                make_mask_reference(tensors, wanted.value, wanted.keep_ties, None, packed, masks)
                for a, b in zip(got, masks, strict=True):
                    if problem := difference("mask", a, b):
                        return f"k = {k}: {problem}"
        return None

    return check


def _rows(tensors: list[Tensor], backend: Backend) -> Check:
    def check() -> str | None:
        for packed, share in product((False, True), (0, 0.5, 0.9)):
            ks = [round(share * tensor.numel()) for tensor in tensors]
            masks, _ = prune_rows(tensors, ks, packed=packed, backend=backend)
            for tensor, k, mask in zip(tensors, ks, masks, strict=True):
                wanted, _ = prune_rows_reference(tensor, k, packed)
                if problem := difference("mask", mask, wanted):
                    return f"k = {k}: {problem}"
        return None

    return check


def _each(tensors: list[Tensor], backend: Backend) -> Check:
    def check() -> str | None:
        ks = [tensor.numel() // 2 for tensor in tensors]
        threshold = select_each(tensors, ks, backend=backend)
        wanted = select_each_reference(tensors, ks, None)
        pairs = zip(Threshold._fields, threshold, wanted, strict=True)
        if problem := first(difference(name, a, b) for name, a, b in pairs):
            return problem
        kept = [tensor > 0 for tensor in tensors]
        shapes = [(t.shape[0], t.shape[1]) for t in tensors]
        counts = kept_counts([*map(pack_reference, kept)], Unstructured(), shapes, backend=backend)
        return difference("counts", counts, torch.stack([k.sum().expand(2) for k in kept]))

    return check


def _bits(mask: Tensor, backend: Backend) -> Check:
    def check() -> str | None:
        packed = pack(mask, backend=backend)
        return first(
            (
                difference("packed", packed, pack_reference(mask)),
                difference(
                    "unpacked",
                    unpack(packed, mask.shape[1], backend=backend),
                    unpack_reference(packed, mask.shape[1]),
                ),
            )
        )

    return check


def _topology(mask: Tensor, block: Block, backend: Backend) -> Check:
    def check() -> str | None:
        got = block_topology(mask, block, backend=backend)
        pairs = zip(Topology._fields, got, topology_reference(mask, block), strict=True)
        return first(difference(name, a, b) for name, a, b in pairs)

    return check
