"""The operations as work to be measured: set-up, check, what is timed. Bytes and FLOPs: counts.py.

Every check compares with the reference; for matrix products in float64 (of 16-bit operands in
float32, which is as good and does not take a GPU for ever), and no element may be further off than
twice what plain torch is in the same dtype, plus four steps of rounding.

Reading order: masks -> checks -> operands -> the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.bits import expand_mask, pack_reference, packed_shape, unpack_reference
from ...kernels.block_score import block_score, block_score_reference
from ...kernels.block_sparse_linear import MIN_SIDE, block_sparse_linear
from ...kernels.launch import Backend
from ...kernels.mask import make_mask, make_mask_reference, pack, word_mask
from ...kernels.masked_linear import masked_linear
from ...kernels.masked_weight import apply_mask, apply_mask_, apply_mask_reference
from ...kernels.pattern import NM, Block, Pattern, Unstructured, grid_shape
from ...kernels.select import Threshold, select, select_reference
from ...kernels.semi_structured import nm_mask, nm_score
from ...kernels.topology import (
    Topology,
    block_topology,
    topology_reference,
)
from .counts import (
    PRODUCTS,
    apply_bytes,
    apply_in_place_bytes,
    groups,
    intensity,
    kept_elements,
    mask_bytes,
    mask_size,
    pack_bytes,
    product_bytes,
    product_flops,
    score_bytes,
    step_bytes,
    tile_of,
    topology_bytes,
    update_bytes,
)
from .shapes import Shape
from .timing import Work

OPERATIONS = (
    "score",
    "select",
    "mask",
    "topology",
    "pack",
    "apply",
    "apply_",
    *PRODUCTS,
    "mask update",
    "training step",
)
MANY = 2**20
# the kernels are measured, where they are slower than a dense product too
SKIP = torch.tensor([True, True, True])


class Built(NamedTuple):
    """An operation that is set up.

    Attributes:
        run: what is timed.
        check: runs it once and returns what is wrong with the result, or None.
        dense: the same work without sparsity, if there is such.
    """

    run: Work
    check: Callable[[], str | None]
    dense: Work | None = None


@dataclass(frozen=True)
class Case:
    """One operation on one operand.

    Attributes:
        operation: of ``OPERATIONS``.
        shapes: one, or those of a whole model.
        dtype, pattern, level, mask: of the weights and their masks.
        bytes, flops: see above.
        cache_bytes: what the kernel's tiles read from the L2 cache; None where nobody counts it.
        build: sets it up.
        dense_flops: of the same work without sparsity; 0 where there are none.
    """

    operation: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    pattern: Pattern
    level: float
    mask: str
    bytes: int
    flops: int
    cache_bytes: float | None
    build: Callable[[], Built]
    dense_flops: int = 0


def random_mask(grid: tuple[int, int], level: float, kind: str, seed: int = 0) -> Tensor:
    """Return a bool grid with exactly ``round(level * groups)`` pruned; of more than a million
    groups each is pruned by chance, because drawing them exactly takes seconds.

    Args:
        kind: ``"random"``, or ``"skewed"``: half of the rows hold 90 % of what is kept, or all
            that they have room for.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = grid[0] * grid[1]
    if groups > MANY and kind == "random":
        return torch.rand(grid, generator=generator) >= level
    kept = groups - round(level * groups)
    heavy = grid[0] // 2 * grid[1] if kind == "skewed" else 0
    inside = max(min(round(0.9 * kept), heavy), kept - (groups - heavy)) if heavy else 0
    mask = torch.zeros(groups, dtype=torch.bool)
    mask[torch.randperm(heavy, generator=generator)[:inside]] = True
    mask[heavy + torch.randperm(groups - heavy, generator=generator)[: kept - inside]] = True
    rows = torch.randperm(grid[0], generator=generator)
    return mask.view(grid)[rows]


def disagreement(
    actual: Tensor, eager: Tensor, exact: Tensor, *, slack: float = 2.0
) -> str | None:
    """Say how far ``actual`` is off, if it is further off than plain torch might be.

    Args:
        eager: the same result by plain torch in the same dtype.
        exact: the same in ``exact_dtype``.
        slack: how many times plain torch's largest error is allowed.
    """
    if actual.shape != exact.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    error = (actual.double() - exact).abs().amax().item()
    usual = (eager.double() - exact).abs().amax().item()
    largest = exact.abs().amax().item()
    limit = slack * usual + 4 * torch.finfo(actual.dtype).eps * largest
    # a NaN compares false
    if error <= limit:
        return None
    return f"off by {error:.3g}, plain torch by {usual:.3g}, largest value {largest:.3g}"


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype whose rounding is nothing beside that of ``dtype``."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def difference(name: str, actual: Tensor, wanted: Tensor) -> str | None:
    """Say in how many elements two tensors differ, bit for bit."""
    if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        return f"{name} is {actual.dtype} {tuple(actual.shape)}"
    wrong = int((actual != wanted).sum())
    return f"{name}: {wrong} of {wanted.numel()} elements differ" if wrong else None


def first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


@dataclass(frozen=True)
class Operands:
    """A weight with its mask and activations, on the device; all from a fixed seed."""

    shape: Shape
    pattern: Pattern
    level: float
    mask_kind: str
    dtype: torch.dtype
    device: torch.device
    backend: Backend

    def _normal(self, seed: int, *size: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(*size, generator=generator, device=self.device)
        return values.to(self.dtype)

    @cached_property
    def weight(self) -> Tensor:
        return self._normal(0, *self.shape.weight)

    @cached_property
    def x(self) -> Tensor:
        return self._normal(1, self.shape.tokens, self.shape.inputs)

    @cached_property
    def grad(self) -> Tensor:
        return self._normal(2, self.shape.tokens, self.shape.outputs)

    @cached_property
    def grid(self) -> Tensor:
        if isinstance(self.pattern, NM):
            return unpack_reference(self.mask, self.shape.inputs)
        grid = grid_shape(self.pattern, self.shape.weight)
        return random_mask(grid, self.level, self.mask_kind).to(self.device)

    @cached_property
    def mask(self) -> Tensor:
        """The mask as ``apply_mask`` takes it."""
        match self.pattern:
            case NM():
                return nm_mask(self.weight, self.pattern, backend=self.backend).mask
            case Block():
                return self.grid
            case _:
                return pack(self.grid, backend=self.backend)

    @cached_property
    def served(self) -> Tensor:
        """The mask as a layer keeps it for its passes: plain torch on a CPU takes words."""
        if self.backend == "torch" and self.device.type == "cpu":
            return word_mask(self.mask, self.pattern, self.shape.weight, self.dtype)
        return self.mask

    @cached_property
    def topology(self) -> Topology:
        return block_topology(self.grid, self.pattern, backend=self.backend)

    @cached_property
    def masked(self) -> Tensor:
        return apply_mask_reference(self.weight, self.mask, self.pattern)

    def exact(self, *tensors: Tensor) -> list[Tensor]:
        return [t.to(exact_dtype(self.dtype)) for t in tensors]

    @cached_property
    def kept(self) -> int:
        return kept_elements(self.grid, self.shape.weight, self.pattern)

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    @cached_property
    def scores(self) -> Tensor:
        if isinstance(self.pattern, Unstructured):
            return self.weight
        return block_score(self.weight, self.pattern, backend=self.backend)

    @property
    def pruned(self) -> int:
        return round(self.level * self.scores.numel())


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
    """Against the n largest of every m; without a mask of ties, of which random numbers have few,
    only the counts are compared where magnitudes are equal.
    """
    assert isinstance(o.pattern, NM)
    n, m = o.pattern.n, o.pattern.m
    out = torch.zeros(packed_shape(o.shape.weight), dtype=torch.uint8, device=o.device)
    run = partial(nm_mask, o.weight, o.pattern, out=out, backend=o.backend)

    def check() -> str | None:
        run()
        keep = unpack_reference(out, o.shape.inputs).unflatten(1, (-1, m))
        size = o.weight.float().abs().unflatten(1, (-1, m))
        wrong = int((keep.sum(2) != n).sum())
        if wrong:
            return f"{wrong} tuples keep another number than {n}"
        least = size.masked_fill(~keep, float("inf")).amin(2)
        most = size.masked_fill(keep, -1).amax(2)
        wrong = int((most > least).sum())
        # a transposable mask weighs rows against columns
        return f"{wrong} tuples keep a smaller magnitude" if wrong and not _turns(o) else None

    return Built(run, check)


def _turns(o: Operands) -> bool:
    return isinstance(o.pattern, NM) and o.pattern.transposable


def _nm_score(o: Operands) -> Built:
    assert isinstance(o.pattern, NM)
    run = partial(nm_score, o.weight, o.pattern, backend=o.backend)

    def check() -> str | None:
        """What a group loses is the sum of what its mask drops."""
        tall, wide = o.pattern.group
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
        run()
        return difference("weight", weight, o.masked)

    return Built(run, check)


def _multiply(o: Operands, x: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(o.pattern, Block):
        return masked_linear(x, weight, o.served, pattern=o.pattern, backend=o.backend)
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


def _multiplies(pattern: Pattern) -> bool:
    return min(pattern.rows, pattern.cols) >= MIN_SIDE


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
            case "forward" | "dX" | "dW" if not is_block or _multiplies(pattern):
                build = {"forward": _forward, "dX": _dgrad, "dW": _wgrad}[operation]
                read = o.kept if is_block else weight[0] * weight[1]
                moved = product_bytes(operation, o.shape, read, size)
                moved += 0 if is_block else mask_size(weight, pattern)
                yield case(operation, moved, build, product_flops(o.shape.tokens, read))


def _weights(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(*s.weight, generator=generator, device=device).to(dtype) for s in shapes]


def mask_update(
    weights: Sequence[Tensor], pattern: Pattern, level: float, backend: Backend
) -> Callable[[], list[Tensor]]:
    """Return a whole update of the masks of all weights, one pool, as kernels do it: score,
    select, write the masks and the lists in place. On a GPU nothing waits for the host.
    """
    packed = isinstance(pattern, Unstructured)

    def scores() -> list[Tensor]:
        if packed:
            return list(weights)
        return [block_score(w, pattern, backend=backend) for w in weights]

    count = sum(groups((w.shape[0], w.shape[1]), pattern) for w in weights)
    pruned = round(level * count)
    threshold = select(scores(), pruned, backend=backend)
    masks = make_mask(scores(), threshold, packed=packed, backend=backend)
    lists = None if packed else [block_topology(m, pattern, backend=backend) for m in masks]

    def run() -> list[Tensor]:
        found = scores()
        threshold = select(found, pruned, backend=backend)
        make_mask(found, threshold, packed=packed, out=masks, backend=backend)
        for mask, out in zip(masks, lists or (), strict=False):
            block_topology(mask, pattern, out=out, backend=backend)
        return masks

    return run


def _update(
    shapes: tuple[Shape, ...],
    pattern: Pattern,
    level: float,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
) -> Built:
    weights = _weights(shapes, dtype, device)
    run = mask_update(weights, pattern, level, backend)

    def check() -> str | None:
        """By order and count: every kept score is at least as large as every pruned one."""
        for mask in run():
            mask.zero_()
        masks = run()
        kept_least, pruned_most, pruned, groups = float("inf"), -1.0, 0, 0
        for weight, mask in zip(weights, masks, strict=True):
            if isinstance(pattern, Unstructured):
                score = weight.float().abs()
                kept = expand_mask(mask, pattern, weight.shape, backend="torch")
            else:
                score, kept = block_score(weight, pattern, backend=backend), mask
            groups += score.numel()
            pruned += int((~kept).sum())
            kept_least = min(kept_least, score.masked_fill(~kept, float("inf")).amin().item())
            pruned_most = max(pruned_most, score.masked_fill(kept, -1).amax().item())
        if pruned != round(level * groups):
            return f"{pruned} of {groups} groups are pruned, not {round(level * groups)}"
        if pruned_most > kept_least:
            return f"a pruned score {pruned_most} is larger than a kept one, {kept_least}"
        return None

    return Built(run, check)


class Step(NamedTuple):
    """Layers side by side, each with a batch of its own, and an optimiser."""

    layers: nn.ModuleList
    batches: list[Tensor]
    optimizer: torch.optim.Optimizer

    def backward(self) -> None:
        losses = [
            layer(x).float().square().mean()
            for layer, x in zip(self.layers, self.batches, strict=True)
        ]
        torch.stack(losses).sum().backward()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        for x in self.batches:
            x.grad = None
        self.backward()
        self.optimizer.step()


def training_step(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Step:
    """Return forward, both gradients and AdamW over linear layers of ``shapes``."""
    layers = nn.ModuleList()
    for weight, shape in zip(_weights(shapes, dtype, device), shapes, strict=True):
        layer = nn.Linear(shape.inputs, shape.outputs, bias=False, device="meta")
        layer.weight = nn.Parameter(weight)
        layers.append(layer)
    generator = torch.Generator(device).manual_seed(1)
    batches = [
        torch.randn(s.tokens, s.inputs, generator=generator, device=device)
        .to(dtype)
        .requires_grad_()
        for s in shapes
    ]
    # no learning, so that every run does the same; the arithmetic is the same
    return Step(layers, batches, torch.optim.AdamW(layers.parameters(), lr=0.0, fused=True))


def sparsify(model: nn.Module, pattern: Pattern, level: float, backend: Backend) -> Any:
    """Put ``model`` under magnitude masks at a level, one pool, and return the controller."""
    # the controller's configuration needs pydantic, which the kernels do without
    from ...controller.create import create_controller
    from ...controller.magnitude import MagnitudeSparsityConfig
    from ...controller.schedule import PolynomialSchedule

    schedule = PolynomialSchedule(initial_level=level, target_level=level)
    config = MagnitudeSparsityConfig(pattern=pattern, schedule=schedule, weight_importance="abs")
    return create_controller(model, config, backend=backend)


def _step(
    shapes: tuple[Shape, ...],
    pattern: Pattern,
    level: float,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
) -> Built:
    step = training_step(shapes, dtype, device)
    controller = sparsify(step.layers, pattern, level, backend)

    def check() -> str | None:
        """One layer after the other, against the dense one with zeros in its weight."""
        step.optimizer.zero_grad()
        for x in step.batches:
            x.grad = None
        step.backward()
        for info, x in zip(controller.sparsified_module_info, step.batches, strict=True):
            keep = info.operand.binary_mask
            pruned = info.operand.pruned_groups
            wanted = {}
            for kind in (dtype, exact_dtype(dtype)):
                w = info.weight.detach().masked_fill(~keep, 0).to(kind).requires_grad_()
                leaf = x.detach().to(kind).requires_grad_()
                y = F.linear(leaf, w)
                (y.square() if kind == torch.float64 else y.float().square()).mean().backward()
                wanted[kind] = (w.grad.masked_fill_(~keep, 0), leaf.grad)
            got = info.weight.grad, x.grad
            names = "weight gradient", "input gradient"
            for name, a, eager, exact in zip(names, got, *wanted.values(), strict=True):
                if problem := disagreement(a, eager, exact):
                    return f"{name}: {problem}"
            if pruned == 0 and level > 0.01:
                return "nothing is pruned"
        step.optimizer.zero_grad()
        return None

    return Built(step, check, training_step(shapes, dtype, device))


def model_cases(
    shapes: tuple[Shape, ...],
    pattern: Pattern,
    level: float,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    operations: Sequence[str],
) -> Iterator[Case]:
    """Yield what concerns all weights at once: the update of their masks and a training step."""
    size = dtype.itemsize
    fine = not isinstance(pattern, Block)
    for operation in operations:
        arguments = (shapes, pattern, level, dtype, device, backend)
        match operation:
            case "mask update" if not isinstance(pattern, NM):
                moved = update_bytes([s.weight for s in shapes], pattern, size)
                yield Case(
                    operation, shapes, dtype, pattern, level, "magnitude", moved, 0, None,
                    partial(_update, *arguments),
                )  # fmt: skip
            case "training step":
                # magnitudes decide how many of a weight's blocks stay; of all, the level's share
                share = 1.0 if fine else 1 - level
                kept = [round(share * s.inputs * s.outputs) for s in shapes]
                pairs = list(zip(shapes, kept, strict=True))
                moved = sum(step_bytes(s, k, size) for s, k in pairs)
                flops = sum(3 * product_flops(s.tokens, k) for s, k in pairs)
                whole = sum(3 * product_flops(s.tokens, s.inputs * s.outputs) for s in shapes)
                yield Case(
                    operation, shapes, dtype, pattern, level, "magnitude", moved, flops, None,
                    partial(_step, *arguments), whole,
                )  # fmt: skip
