"""What ``compare.py`` measures, products apart: every function sets one subject up, checks its
result, and returns the work to time.

Reading order: mask updates and thresholds -> training steps -> evaluation and strip.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...controller.algorithms.movement.config import MovementSparsityConfig
from ...controller.algorithms.rb import RBSparsityConfig
from ...controller.config.schedule import MultistepSchedule
from ...controller.create import create_controller
from ...kernels.pattern import Pattern, Unstructured
from ...kernels.select import select
from ..measure.agreement import gradient_of
from ..measure.timing import Work
from ..peers import nncf, thresholds, torch_prune
from ..peers import weight_norm as weight_norm_peer
from .setup import (
    BLOCK,
    LAYERS,
    LEVEL,
    Place,
    batch,
    big_layer,
    check,
    check_blocks,
    check_close,
    check_count,
    check_forward,
    check_gradients,
    check_order,
    layers_of,
    linears,
    masks_of,
    pruned_by_hand,
    sparse,
)


def our_global_update(place: Place) -> Work:
    # another level to start from, so that an update that does nothing shows
    controller = sparse(linears(place, place.layers), Unstructured(), LEVEL / 2)
    update = partial(controller.set_sparsity_level, LEVEL)
    update()
    check_order(linears(place, place.layers), masks_of(controller))
    return update


def nncf_compress(place: Place, layers: int) -> tuple[Any, nn.Module]:
    """Return NNCF's controller and model, whose masks are the right ones."""
    controller, model = nncf.compress(linears(place, layers), place.width, LEVEL)
    check_order(linears(place, layers), masks_of(controller))
    return controller, model


def nncf_global_update(place: Place) -> Work:
    controller, _ = nncf.compress(linears(place, place.layers), place.width, LEVEL / 2)
    update = partial(controller.set_sparsity_level, LEVEL)
    update()
    check_order(linears(place, place.layers), masks_of(controller))
    return update


def torch_global_update(place: Place) -> Work:
    model = linears(place, place.layers)
    update = torch_prune.compress(model, LEVEL)
    for mask in model.buffers():
        mask.zero_()
    update()
    check_order(linears(place, place.layers), [mask.bool() for mask in model.buffers()])
    return update


def our_block_update(place: Place) -> Work:
    controller = sparse(big_layer(place), BLOCK, LEVEL / 2)
    update = partial(controller.set_sparsity_level, LEVEL)
    update()
    check_blocks(big_layer(place).weight.detach().abs(), *masks_of(controller))
    return update


def weight_norm_update(place: Place) -> Work:
    layer = big_layer(place)
    update = weight_norm_peer.mask_update(layer, (BLOCK.rows, BLOCK.cols), LEVEL)
    update()
    # its norm is the second
    mask = weight_norm_peer.mask_of(layer)
    check_blocks(big_layer(place).weight.detach().square(), mask)
    return update


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


def dense_step(place: Place, tokens: int) -> Work:
    return training_step(linears(place, LAYERS), place, tokens)


def our_step(place: Place, pattern: Pattern, tokens: int) -> Work:
    model = linears(place, LAYERS)
    controller = sparse(model, pattern)
    check_count(masks_of(controller), pattern.rows * pattern.cols)
    check_gradients(model, controller, place, tokens)
    return training_step(model, place, tokens)


def nncf_step(place: Place, tokens: int) -> Work:
    controller, model = nncf_compress(place, LAYERS)
    check_forward(model, masks_of(controller), place, tokens)
    return training_step(model, place, tokens)


def torch_step(place: Place, tokens: int) -> Work:
    model = linears(place, LAYERS)
    torch_prune.compress(model, LEVEL)
    masks = [mask.bool() for mask in model.buffers()]
    check_order(linears(place, LAYERS), masks)
    check_forward(model, masks, place, tokens)
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


def shown_mask(layer: nn.Linear, algorithm: str, pattern: Pattern) -> Tensor:
    """Return which weights a forward pass shows, having checked that these are as they must be.

    A sigmoid of rb's first logits, 4.595, keeps 99 %; movement's first threshold keeps all.
    """
    weight, bias = layer.weight.detach(), layer.bias.detach()
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    shown = (layer(eye).detach() - bias).T
    kept = shown != 0
    masked = weight.where(kept, 0)
    check_close(shown, (F.linear(eye, masked, bias) - bias).T, masked.double())
    share = kept.float().mean().item()
    wanted = 0.99 if algorithm == nncf.RB else 1.0
    group = pattern.rows * pattern.cols
    spread = (wanted * (1 - wanted) * group / kept.numel()) ** 0.5
    check(abs(share - wanted) <= 5 * spread, f"{share} of the groups are kept, not {wanted}")
    return kept


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
    (layer, *_), parameter = layers_of(model), controller.sparsified_module_info[0].weight
    kept = shown_mask(layer, algorithm, pattern)
    out = layer(x)
    out.square().mean().backward()

    def gradients(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weight's gradient, and its product with the weight summed over groups."""
        y, weight = out.detach().to(dtype), parameter.detach().to(dtype)
        full = (2 * y / y.numel()).T @ x.to(dtype)
        rows, cols = pattern.rows, pattern.cols
        blocks = (full * weight).view(width // rows, rows, width // cols, cols)
        return full.where(kept, 0), blocks.sum((1, 3))

    eager, exact = gradients(x.dtype), gradients(torch.float64)
    check_close(gradient_of(parameter), eager[0], exact[0])
    if algorithm == nncf.MOVEMENT:
        check_close(gradient_of(layer.get_parameter("weight_scores")), eager[1], exact[1])
    model.zero_grad()
    return learning_step(model, controller, place, tokens)


def nncf_learning_step(place: Place, algorithm: str, tokens: int) -> Work:
    controller, model = nncf.compress(linears(place, LAYERS), place.width, LEVEL, algorithm)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    shown_mask(controller.sparsified_module_info[0].module, algorithm, Unstructured())
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
    forward = evaluation(model, place, tokens)
    masks = masks_of(controller)
    check_count(masks, pattern.rows * pattern.cols)
    check_forward(model, masks, place, tokens)
    return forward


def our_strip(place: Place) -> Work:
    controller = sparse(linears(place, LAYERS), Unstructured())
    masks = masks_of(controller)
    check_order(linears(place, LAYERS), masks)
    wanted = pruned_by_hand(place, masks)
    for layer, other in zip(controller.strip(), layers_of(wanted), strict=True):
        check(type(layer) is nn.Linear, f"{type(layer).__name__} is not the original class")
        check(torch.equal(layer.weight, other.weight), "weights are not the masked ones")
        check(torch.equal(layer.bias, other.bias), "biases have changed")
    return controller.strip


def nncf_strip(place: Place) -> Work:
    controller, _ = nncf_compress(place, LAYERS)
    strip = partial(controller.strip, do_copy=True)
    check_forward(strip(), masks_of(controller), place, 16)
    return strip
