"""What ``compare.py`` measures: every function sets one subject up, checks its result, and returns
the work to time.

Reading order: places -> models and checks -> mask updates and thresholds -> training steps ->
evaluation and strip -> products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...controller.create import create_controller
from ...controller.magnitude import MagnitudeSparsityConfig
from ...controller.movement import MovementSparsityConfig
from ...controller.operand import MaskOperand
from ...controller.rb import RBSparsityConfig
from ...controller.schedule import MultistepSchedule, PolynomialSchedule
from ...kernels.block_sparse_linear import block_sparse_linear
from ...kernels.pattern import Block, Pattern, Unstructured
from ...kernels.select import select
from ...kernels.topology import block_topology
from ..measure.agreement import disagreement
from ..measure.operands import Operands
from ..measure.shapes import Shape
from ..measure.timing import Work
from ..peers import blksprs, dense, nncf, semi_structured, stk, thresholds, torch_bsr, torch_prune
from ..peers import weight_norm as weight_norm_peer

LEVEL = 0.8
BLOCK = Block(32, 32)


class Place(NamedTuple):
    """Where, in which dtype, and how large: what keeps the device busy without boring anybody."""

    device: str
    dtype: torch.dtype
    width: int
    layers: int
    batches: tuple[int, int]  # a large one and a small one, of tokens
    big: tuple[int, int]  # one large weight

    @property
    def kind(self) -> torch.device:
        return torch.device(self.device)


CPU = Place("cpu", torch.float32, 2048, 12, (512, 64), (4096, 14336))
GPU = Place("cuda", torch.bfloat16, 4096, 12, (8192, 512), (4096, 14336))
TRIAL = Place("cpu", torch.float32, 128, 2, (16, 8), (128, 256))


def linears(place: Place, count: int) -> nn.Sequential:
    """Return ``count`` square linear layers with reproducible weights."""
    torch.manual_seed(0)
    layers = [nn.Linear(place.width, place.width) for _ in range(count)]
    return nn.Sequential(*layers).to(place.kind, place.dtype)


def sparse(model: nn.Module, pattern: Pattern) -> Any:
    """Return our controller with ``model`` at the level of this file."""
    schedule = PolynomialSchedule(initial_level=LEVEL, target_level=LEVEL)
    config = MagnitudeSparsityConfig(pattern=pattern, schedule=schedule, weight_importance="abs")
    return create_controller(model, config)


def check(condition: bool, what: str) -> None:
    """Stop a subject whose result is wrong before it is timed."""
    if not condition:
        raise AssertionError(f"result is wrong: {what}")


def check_close(actual: Tensor, eager: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """Stop a subject that is further from the float64 result than plain torch might be."""
    problem = disagreement(actual, eager, exact, slack=slack)
    check(problem is None, str(problem))


def check_order(weights: list[Tensor], masks: list[Tensor]) -> None:
    """Every kept magnitude is at least as large as every pruned one, and the count is exact."""
    sizes = [w.detach().abs() for w in weights]
    kept = min(s[m].min().item() for s, m in zip(sizes, masks, strict=True))
    dropped = max(s[~m].max().item() for s, m in zip(sizes, masks, strict=True))
    check(dropped <= kept, "a pruned weight is larger than a kept one")
    pruned, total = sum(int((~m).sum()) for m in masks), sum(m.numel() for m in masks)
    # torch's and NNCF's pruning rounds with floats
    check(abs(pruned - LEVEL * total) <= 1e-6 * total + 1, f"{pruned} weights are pruned")


def our_global_update(place: Place) -> Work:
    model = linears(place, place.layers)
    controller = sparse(model, Unstructured())
    masks = [info.operand.binary_mask for info in controller.sparsified_module_info]
    check_order([layer.weight for layer in model], masks)
    return partial(controller.set_sparsity_level, LEVEL)


def nncf_compress(place: Place, layers: int) -> tuple[Any, nn.Module]:
    """Return NNCF's controller and model, whose masks are the right ones."""
    controller, model = nncf.compress(linears(place, layers), place.width, LEVEL)
    infos = controller.sparsified_module_info
    check_order(
        [info.module.weight for info in infos],
        [info.operand.binary_mask.bool() for info in infos],
    )
    return controller, model


def nncf_global_update(place: Place) -> Work:
    controller, _ = nncf_compress(place, place.layers)
    return partial(controller.set_sparsity_level, LEVEL)


def torch_global_update(place: Place) -> Work:
    model = linears(place, place.layers)
    update = torch_prune.compress(model, LEVEL)
    update()
    check_order([m.weight_orig for m in model], [m.weight_mask.bool() for m in model])
    return update


def big_layer(place: Place) -> nn.Linear:
    torch.manual_seed(0)
    rows, cols = place.big
    return nn.Linear(cols, rows, bias=False).to(place.kind, place.dtype)


def our_block_update(place: Place) -> Work:
    layer = big_layer(place)
    controller = sparse(layer, BLOCK)
    rows, cols = place.big
    blocks = layer.weight.detach().float().abs().view(rows // 32, 32, cols // 32, 32)
    grid = blocks.mean(dim=(1, 3))
    mask = controller.sparsified_module_info[0].operand.mask
    check(int((~mask).sum()) == round(LEVEL * grid.numel()), "count of pruned blocks")
    check(bool(grid[~mask].max() <= grid[mask].min() * (1 + 1e-5)), "order of block scores")
    return partial(controller.set_sparsity_level, LEVEL)


def weight_norm_update(place: Place) -> Work:
    return weight_norm_peer.mask_update(big_layer(place), (BLOCK.rows, BLOCK.cols), LEVEL)


def values(place: Place) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4 * place.width, place.width).to(place.kind, place.dtype)


def our_threshold(place: Place) -> Work:
    data = values(place)
    k = round(LEVEL * data.numel())
    wanted = thresholds.by_sort(data, k)
    check(select([data], k).value.item() == wanted.item(), "the k-th smallest")
    return lambda: select([data], k)


def their_threshold(place: Place, function: Callable[[Tensor, int], Tensor]) -> Work:
    data = values(place)
    k = round(LEVEL * data.numel())
    wanted = select([data], k).value.item()
    check(function(data, k).item() == wanted, "the k-th smallest")
    return lambda: function(data, k)


def batch(place: Place, tokens: int) -> Tensor:
    values = torch.randn(tokens, place.width, generator=torch.Generator().manual_seed(1))
    return values.to(place.kind, place.dtype)


def training_step(model: nn.Module, place: Place, tokens: int) -> Work:
    """Forward, backward and AdamW.

    Fused: of the other one, MKL's square root takes seven times as long for zeros, which a pruned
    weight's moments are.
    """
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = batch(place, tokens)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def check_gradients(model: nn.Sequential, controller: Any, place: Place, tokens: int) -> None:
    """Compare one backward pass with that of dense models with zeros written by hand."""
    masks = [info.operand.binary_mask for info in controller.sparsified_module_info]
    x = batch(place, tokens)
    gradients = []
    for kind in (None, place.dtype, torch.float64):
        net = model
        if kind is not None:
            net = linears(place, len(model)).to(kind)
            with torch.no_grad():
                for layer, mask in zip(net, masks, strict=True):
                    layer.weight.masked_fill_(~mask, 0)
        net(x if kind is None else x.to(kind)).square().mean().backward()
        found = [layer.weight.grad for layer in net]
        gradients.append([g.masked_fill(~m, 0) for g, m in zip(found, masks, strict=True)])
    outside = sum(
        int(layer.weight.grad[~m].count_nonzero()) for layer, m in zip(model, masks, strict=True)
    )
    check(outside == 0, f"{outside} pruned weights have a gradient")
    for three in zip(*gradients, strict=True):
        check_close(*three)
    model.zero_grad()


LAYERS = 4


def dense_step(place: Place, tokens: int) -> Work:
    return training_step(linears(place, LAYERS), place, tokens)


def our_step(place: Place, pattern: Pattern, tokens: int) -> Work:
    model = linears(place, LAYERS)
    check_gradients(model, sparse(model, pattern), place, tokens)
    return training_step(model, place, tokens)


def nncf_step(place: Place, tokens: int) -> Work:
    _, model = nncf_compress(place, LAYERS)
    return training_step(model, place, tokens)


def torch_step(place: Place, tokens: int) -> Work:
    model = linears(place, LAYERS)
    torch_prune.compress(model, LEVEL)
    check_order([m.weight_orig for m in model], [m.weight_mask.bool() for m in model])
    return training_step(model, place, tokens)


def learning_step(model: nn.Module, controller: Any, place: Place, tokens: int) -> Work:
    """Forward, backward and AdamW, with what an algorithm adds that learns its masks."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = batch(place, tokens)

    def step() -> None:
        controller.scheduler.step()
        optimizer.zero_grad()
        (model(x).square().mean() + controller.loss()).backward()
        optimizer.step()

    return step


def our_learning_step(place: Place, algorithm: str, pattern: Pattern, tokens: int) -> Work:
    """Check a step's weight and score gradients by the mask that its forward pass shows."""
    model, x, width = linears(place, LAYERS), batch(place, tokens), place.width
    config = MovementSparsityConfig(pattern=pattern, **nncf.MOVEMENT_PARAMS)
    if algorithm == nncf.RB:
        schedule = MultistepSchedule(steps=(1,), levels=(LEVEL, LEVEL))
        config = RBSparsityConfig(pattern=pattern, schedule=schedule)
    controller = create_controller(model, config)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    layer = model[0]
    eye = torch.eye(width, dtype=x.dtype, device=x.device)
    shown = layer(eye).detach() - layer(torch.zeros_like(eye[:1])).detach()
    kept = shown.T != 0
    out = layer(x)
    out.square().mean().backward()

    def gradients(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weight's gradient, and its product with the weight summed over groups."""
        y, weight = out.detach().to(dtype), layer.weight.detach().to(dtype)
        full = (2 * y / y.numel()).T @ x.to(dtype)
        rows, cols = pattern.rows, pattern.cols
        blocks = (full * weight).view(width // rows, rows, width // cols, cols)
        return full.where(kept, 0), blocks.sum((1, 3))

    eager, exact = gradients(x.dtype), gradients(torch.float64)
    check_close(layer.weight.grad, eager[0], exact[0])
    if algorithm == nncf.RB:
        share = kept.float().mean().item()
        spread = (0.99 * 0.01 * pattern.rows * pattern.cols / kept.numel()) ** 0.5
        check(abs(share - 0.99) < 5 * spread, f"{share} of the groups are kept, of logit 4.595")
    else:
        check_close(layer.weight_scores.grad, eager[1], exact[1])
    model.zero_grad()
    return learning_step(model, controller, place, tokens)


def nncf_learning_step(place: Place, algorithm: str, tokens: int) -> Work:
    controller, model = nncf.compress(linears(place, LAYERS), place.width, LEVEL, algorithm)
    controller.scheduler.epoch_step()
    return learning_step(model, controller, place, tokens)


def evaluation(model: nn.Module, place: Place, tokens: int) -> Work:
    x = batch(place, tokens)
    model.eval()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    return forward


def dense_evaluation(place: Place, tokens: int) -> Work:
    return evaluation(linears(place, LAYERS), place, tokens)


def our_evaluation(place: Place, pattern: Pattern, tokens: int) -> Work:
    model = linears(place, LAYERS)
    controller = sparse(model, pattern)
    with torch.no_grad():
        x, stripped = batch(place, 16), controller.strip()
        check_close(model(x), stripped(x), stripped.double()(x.double()))
    return evaluation(model, place, tokens)


def our_strip(place: Place) -> Work:
    controller = sparse(linears(place, LAYERS), Unstructured())
    masks = [info.operand.binary_mask for info in controller.sparsified_module_info]
    for layer, mask in zip(controller.strip(), masks, strict=True):
        check(type(layer) is nn.Linear, "the original class")
        check(not layer.weight[~mask].any(), "pruned weights are zero")
    return controller.strip


def nncf_strip(place: Place) -> Work:
    controller, _ = nncf_compress(place, LAYERS)
    return partial(controller.strip, do_copy=True)


def product_operands(place: Place, block: Block, level: float = LEVEL) -> Operands:
    shape = Shape(place.batches[0], place.width, place.width)
    return Operands(shape, block, level, "random", place.dtype, place.kind, "auto")


def our_layer(place: Place, block: Block, level: float, backward: bool) -> Work:
    """A layer, with both gradients or none, on the paths that are chosen for it."""
    o = product_operands(place, block, level)
    operand = MaskOperand(o.weight, block)
    operand.serve_linear()
    operand.set_(o.grid, all_kept=bool(o.grid.all()))
    leaves = [o.x.requires_grad_(backward), nn.Parameter(o.weight, requires_grad=backward)]

    def work() -> tuple[Tensor, ...]:
        y = operand.linear(*leaves, None)
        return (y, *torch.autograd.grad(y, leaves, o.grad)) if backward else (y,)

    plain = o.x.detach()
    wanted = [F.linear(plain, o.masked), o.grad @ o.masked, (o.grad.T @ plain) * (o.masked != 0)]
    x, w, g = o.exact(plain, o.masked, o.grad)
    exact = [F.linear(x, w), g @ w, (g.T @ x) * (w != 0)]
    for three in zip(work(), wanted, exact, strict=False):
        check_close(*three)
    return work


def dense_layer(place: Place, block: Block, backward: bool) -> Work:
    o = product_operands(place, block)
    leaves = [t.detach().requires_grad_(backward) for t in (o.x, o.weight)]

    def work() -> None:
        y = F.linear(*leaves)
        if backward:
            torch.autograd.grad(y, leaves, o.grad)

    return work


def check_product(y: Tensor, o: Operands, weight: Tensor, slack: float = 2.0) -> None:
    check_close(y, F.linear(o.x, weight), F.linear(*o.exact(o.x, weight)), slack)


def our_product(place: Place, block: Block) -> Work:
    o = product_operands(place, block)
    lists = block_topology(o.grid, block)
    check_product(block_sparse_linear(o.x, o.weight, lists, pattern=block), o, o.masked)
    return lambda: block_sparse_linear(o.x, o.weight, lists, pattern=block)


def peer_product(place: Place, block: Block, name: str) -> Work:
    """Set up another library's product with the same operands, and check its result."""
    o = product_operands(place, block)
    weight, finish = o.masked, _as_it_is
    match name:
        case "dense":
            weight = o.weight
            product = dense.linear(o.x, weight)
        case "dense, compiled":
            weight = o.weight
            product = dense.compiled_linear(o.x, weight)
        case "torch BSR":
            product = torch_bsr.linear(o.x, weight, (block.rows, block.cols))
        case "STK":
            product = stk.linear(o.x, weight)
        case "blksprs":
            product, finish = blksprs.linear(o.x, weight, block.rows)
        case _:
            weight = semi_structured.prune(o.weight)
            product = semi_structured.linear(o.x, weight)
    # others may sum in an order of their own, such as one product after the other
    check_product(finish(product()), o, weight, slack=8.0)
    return product


def _as_it_is(y: Tensor) -> Tensor:
    return y
