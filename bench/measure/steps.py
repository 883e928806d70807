"""What concerns all weights of a model: the update of their masks, and a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.bits import expand_mask
from ...kernels.block_score import block_score_reference, block_scores
from ...kernels.launch import Backend
from ...kernels.mask import make_mask
from ...kernels.pattern import NM, Block, Pattern, Unstructured
from ...kernels.select import select
from ...kernels.topology import Topology, block_topologies, topology_reference
from .agreement import difference, disagreement, exact_dtype, first
from .cases import Built, Case
from .counts import groups, product_flops, step_bytes, update_bytes
from .shapes import Shape


def _weights(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(*s.weight, generator=generator, device=device).to(dtype) for s in shapes]


def mask_update(
    weights: Sequence[Tensor], pattern: Pattern, level: float, backend: Backend
) -> Callable[[], tuple[list[Tensor], list[Topology]]]:
    """Return a whole update of the masks of all weights, one pool, as kernels do it: score,
    select, write the masks and, of blocks, the lists in place. On a GPU nothing waits for the
    host.
    """
    packed = isinstance(pattern, Unstructured)

    def scores() -> list[Tensor]:
        if packed:
            return list(weights)
        return block_scores(weights, pattern, normed=False, backend=backend)[0]

    count = sum(groups((w.shape[0], w.shape[1]), pattern) for w in weights)
    pruned = round(level * count)
    threshold = select(scores(), pruned, backend=backend)
    masks = make_mask(scores(), threshold, packed=packed, backend=backend)
    lists = [] if packed else block_topologies(masks, pattern, backend=backend)

    def run() -> tuple[list[Tensor], list[Topology]]:
        found = scores()
        threshold = select(found, pruned, backend=backend)
        make_mask(found, threshold, packed=packed, out=masks, backend=backend)
        if not packed:
            block_topologies(masks, pattern, out=lists, backend=backend)
        return masks, lists

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
        masks, lists = run()
        # what is not written shows
        for mask in masks:
            mask.bitwise_not_()
        for part in (part for out in lists for part in out):
            part.fill_(0 if part.dtype == torch.bool else -7)
        run()
        kept_least, pruned_most, pruned, groups = float("inf"), -1.0, 0, 0
        for weight, mask in zip(weights, masks, strict=True):
            if isinstance(pattern, Unstructured):
                score = weight.abs().double()
                kept = expand_mask(mask, pattern, weight.shape, backend="torch")
            else:
                score = block_score_reference(weight.double(), pattern, squared=False)
                kept = mask
            groups += score.numel()
            pruned += int((~kept).sum())
            kept_least = min(kept_least, score.masked_fill(~kept, float("inf")).amin().item())
            pruned_most = max(pruned_most, score.masked_fill(kept, -1).amax().item())
        if pruned != round(level * groups):
            return f"{pruned} of {groups} groups are pruned, not {round(level * groups)}"
        # scores are made in float32
        slack = 0.0 if isinstance(pattern, Unstructured) else 1e-5 * kept_least
        if not pruned_most <= kept_least + slack:
            return f"a pruned score {pruned_most} is larger than a kept one, {kept_least}"
        return first(
            difference(name, part, wanted)
            for mask, out in zip(masks if lists else (), lists, strict=True)
            for name, part, wanted in zip(
                Topology._fields, out, topology_reference(mask, pattern), strict=True
            )
        )

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
    """Put ``model`` under magnitude masks at a level, and return the controller."""
    # the controller's configuration needs pydantic, which the kernels do without
    from ...controller.algorithms.magnitude import MagnitudeSparsityConfig
    from ...controller.config.schedule import PolynomialSchedule
    from ...controller.create import create_controller

    schedule = PolynomialSchedule(initial_level=level, target_level=level)
    config = MagnitudeSparsityConfig(pattern=pattern, schedule=schedule, weight_importance="abs")
    return create_controller(model, config, backend=backend)


def another_level(masks: Sequence[Tensor], pattern: Pattern, level: float) -> str | None:
    """Say how many groups are pruned, if these are not as many as a level asks for: of blocks in
    each weight, of other patterns over all weights.

    Args:
        masks: bool, of the weights' shapes.
        pattern: of them all.
        level: fraction that is to be pruned; under N:M of the elements.
    """
    # the first element of a block stands for it
    flags = [mask[:: pattern.rows, :: pattern.cols] for mask in masks]
    total, pruned = sum(f.numel() for f in flags), sum(int((~f).sum()) for f in flags)
    pools = [f.numel() for f in flags] if isinstance(pattern, Block) else [total]
    wanted = sum(round(level * groups) for groups in pools)
    return None if pruned == wanted else f"{pruned} of {total} groups are pruned, not {wanted}"


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
        step.optimizer.zero_grad()
        masks = [info.operand.binary_mask for info in controller.sparsified_module_info]
        return another_level(masks, pattern, level)

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
