"""What the subjects of ``compare.py`` share: places, models, and checks that stop what is wrong.

Reading order: places -> models -> checks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...controller.algorithms.magnitude import MagnitudeSparsityConfig
from ...controller.config.schedule import PolynomialSchedule
from ...controller.create import create_controller
from ...kernels.pattern import Block, Pattern
from ..measure.agreement import disagreement, gradient_of

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
LAYERS = 4


def linears(place: Place, count: int) -> nn.Sequential:
    """Return ``count`` square linear layers with reproducible weights."""
    torch.manual_seed(0)
    layers = [nn.Linear(place.width, place.width) for _ in range(count)]
    return nn.Sequential(*layers).to(place.kind, place.dtype)


def layers_of(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of what ``linears`` made, masked or not."""
    return [layer for layer in model.children() if isinstance(layer, nn.Linear)]


def sparse(model: nn.Module, pattern: Pattern, level: float = LEVEL) -> Any:
    """Return our controller with ``model`` at a level, by default that of this file."""
    schedule = PolynomialSchedule(initial_level=level, target_level=level)
    config = MagnitudeSparsityConfig(pattern=pattern, schedule=schedule, weight_importance="abs")
    return create_controller(model, config)


def big_layer(place: Place) -> nn.Linear:
    torch.manual_seed(0)
    rows, cols = place.big
    return nn.Linear(cols, rows, bias=False).to(place.kind, place.dtype)


def batch(place: Place, tokens: int) -> Tensor:
    values = torch.randn(tokens, place.width, generator=torch.Generator().manual_seed(1))
    return values.to(place.kind, place.dtype)


def check(condition: bool, what: str) -> None:
    """Stop a subject whose result is wrong before it is timed."""
    if not condition:
        raise AssertionError(f"result is wrong: {what}")


def check_close(actual: Tensor, eager: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """Stop a subject that is further from the float64 result than plain torch might be."""
    problem = disagreement(actual, eager, exact, slack=slack)
    check(problem is None, str(problem))


def masks_of(controller: Any) -> list[Tensor]:
    """Return the masks of a controller, ours or NNCF's: bool, of the weights' shapes."""
    return [info.operand.binary_mask.bool() for info in controller.sparsified_module_info]


def check_count(masks: list[Tensor], group: int = 1) -> None:
    """As many weights are pruned as the level of this file asks for, but for one group."""
    pruned, total = sum(int((~m).sum()) for m in masks), sum(m.numel() for m in masks)
    # torch's and NNCF's pruning rounds with floats
    check(
        abs(pruned - LEVEL * total) <= 1e-6 * total + group,
        f"{pruned} of {total} weights are pruned",
    )


def check_order(model: nn.Sequential, masks: list[Tensor]) -> None:
    """Every kept magnitude is at least as large as every pruned one, and the count is right.

    Args:
        model: dense, since a sparse one's weights no longer tell what was pruned.
        masks: of its layers.
    """
    check_count(masks)
    sizes = [layer.weight.detach().abs() for layer in layers_of(model)]
    kept = min(s[m].min().item() for s, m in zip(sizes, masks, strict=True))
    dropped = max(s[~m].max().item() for s, m in zip(sizes, masks, strict=True))
    check(dropped <= kept, "a pruned weight is larger than a kept one")


def check_blocks(sizes: Tensor, mask: Tensor) -> None:
    """Blocks are pruned whole, those of the smallest mean size, and the count is right."""
    rows, cols = BLOCK.rows, BLOCK.cols
    split = (sizes.shape[0] // rows, rows, sizes.shape[1] // cols, cols)
    check_count([mask], rows * cols)
    share = mask.view(split).float().mean((1, 3))
    check(bool(((share == 0) | (share == 1)).all()), "a block is pruned in part")
    scores, kept = sizes.double().view(split).mean((1, 3)), share == 1
    # scores are made in float32
    check(
        bool(scores[~kept].max() <= scores[kept].min() * (1 + 1e-5)),
        "a pruned block is larger than a kept one",
    )


def pruned_by_hand(
    place: Place, masks: list[Tensor], dtype: torch.dtype | None = None
) -> nn.Sequential:
    """Return the dense model, zeros written where ``masks`` prune."""
    model = linears(place, len(masks)).to(dtype or place.dtype)
    with torch.no_grad():
        for layer, mask in zip(layers_of(model), masks, strict=True):
            layer.weight.masked_fill_(~mask, 0)
    return model


def check_forward(model: nn.Module, masks: list[Tensor], place: Place, tokens: int) -> None:
    """Compare a forward pass with that of a model that was pruned by hand."""
    x = batch(place, tokens)
    exact = pruned_by_hand(place, masks, torch.float64)
    with torch.no_grad():
        check_close(model(x), pruned_by_hand(place, masks)(x), exact(x.double()))


def check_gradients(model: nn.Sequential, controller: Any, place: Place, tokens: int) -> None:
    """Compare one backward pass with that of dense models with zeros written by hand."""
    masks = masks_of(controller)
    x = batch(place, tokens)
    gradients = []
    for kind in (None, place.dtype, torch.float64):
        net = model if kind is None else pruned_by_hand(place, masks, kind)
        net(x if kind is None else x.to(kind)).square().mean().backward()
        found = [gradient_of(layer.weight) for layer in layers_of(net)]
        gradients.append([g.masked_fill(~m, 0) for g, m in zip(found, masks, strict=True)])
    outside = sum(
        int(gradient_of(layer.weight)[~m].count_nonzero())
        for layer, m in zip(layers_of(model), masks, strict=True)
    )
    check(outside == 0, f"{outside} pruned weights have a gradient")
    for three in zip(*gradients, strict=True):
        check_close(*three)
    model.zero_grad()
