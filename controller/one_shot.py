"""Pruning in one shot from calibration data: ``prune_obs``.

Reading order: the entry point, what runs the model, what one layer's inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.pattern import NM, maximum_level
from .algorithms.base import BaseSparsityAlgoController
from .algorithms.const import ConstSparsityConfig
from .algorithms.evaluation import Run, evaluating, run
from .config.declaration import number
from .create import create_controller
from .masks.linear import conv1d_of
from .masks.shards import is_sharded
from .masks.targets import find_targets
from .masks.weight import Target
from .selection.obs import prune_matrix
from .selection.scorer import real_tokens


class _Enough(Exception):
    """A forward pass has come to the layer that was waited for."""


@torch.no_grad()
def prune_obs(
    model: nn.Module,
    batches: Sequence[Any],
    config: ConstSparsityConfig,
    *,
    level: float | None = None,
    damping: float = 0.01,
    rounds: int = 8,
    run: Run = run,
) -> BaseSparsityAlgoController:
    """Prune every target weight to one level and let its retained elements make up for the loss.

    Optimal brain surgeon, layer by layer in the order in which the model runs them: a layer sees
    the inputs that the pruned layers before it give. See ``selection/obs.py`` for the method and
    its sources. There is no training; what it leaves may be fine-tuned under the masks.

    It takes a forward pass of all batches, as far as the layer, for each input that targets have
    (layers that share one, as query, key and value do, share the pass), and time that grows with
    the cube of a layer's inputs. Memory beside the model: a copy of the targets' weights, and six
    matrices ``(in_features, in_features)`` in float64 of one layer at a time.

    Args:
        model: linear targets alone; pruned in place. It runs in evaluation mode, and without
            gradients.
        batches: calibration data, gone through many times. The tokens that a batch's
            ``attention_mask`` leaves out do not count.
        config: pattern and targets.
        level: share of each weight's groups that is pruned, in (0, 1); of N:M its own.
        damping: added to the moment's diagonal, as a share of its mean; positive.
        rounds: in which the groups go, at least 1; more are better and take longer.
        run: calls the model on a batch; by default ``model(**batch)`` of a mapping, ``model`` of
            the first item of a tuple or list, else ``model(batch)``.

    Returns:
        The controller of ``config``, whose masks are the zeros.

    Raises:
        ValueError, TypeError: an argument or a target does not fit, no calibration data reach a
            target, or a moment is too close to singular; the model is then as it was.
    """
    if not isinstance(config, ConstSparsityConfig):
        raise TypeError(f"prune_obs: config must be a ConstSparsityConfig, got {config!r}")
    if not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
        raise ValueError(f"prune_obs: damping must be positive and finite, got {damping!r}")
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"prune_obs: rounds must be an integer of at least 1, got {rounds!r}")
    batches = [*batches]
    if not batches:
        raise ValueError("prune_obs: batches must hold calibration data, got none")
    targets = find_targets(model, config)
    level = number(level)
    levels = {target.name: _level(target, level) for target in targets}
    for target in targets:
        _check_linear(target)
    before = [(target.weight, target.weight.detach().clone()) for target in targets]
    try:
        with evaluating(model):
            for members in _by_input(model, targets, batches[0], run):
                moment = _moment(model, members[0], batches, run)
                for target in members:
                    matrix = target.matrix(target.weight.detach())
                    pruned = _pruned(target, matrix, moment, levels[target.name], damping, rounds)
                    matrix.copy_(pruned)
        return create_controller(model, config)
    except BaseException:
        for weight, values in before:
            weight.copy_(values)
        raise


def _level(target: Target, level: float | None) -> float:
    most = maximum_level(target.pattern)
    if isinstance(target.pattern, NM) and level is None:
        return most
    if not isinstance(level, (int, float)) or isinstance(level, bool) or not 0 < level < 1:
        raise ValueError(f"prune_obs: level must be in (0, 1), got {level!r}")
    if isinstance(target.pattern, NM) and abs(level - most) > 1e-9:
        raise ValueError(
            f"prune_obs: level must be {most:g} under the pattern {target.pattern} of "
            f"{target.name!r}, or None, got {level!r}"
        )
    return level


def _check_linear(target: Target) -> None:
    module = target.users[0][0]
    if not isinstance(module, nn.Linear) and conv1d_of(type(module)) is None:
        raise ValueError(
            f"prune_obs: the inputs of {target.name!r}, a {type(module).__name__}, cannot be "
            "measured; it must be a linear layer: list it in ignored_scopes"
        )
    if is_sharded(target.weight):
        raise ValueError(
            f"prune_obs: {target.name!r} must not be sharded, got a DTensor; prune before "
            "fully_shard, or list it in ignored_scopes"
        )


def _pruned(
    target: Target, matrix: Tensor, moment: Tensor, level: float, damping: float, rounds: int
) -> Tensor:
    try:
        return prune_matrix(
            matrix, moment, target.pattern, level, damping=damping, rounds=rounds
        ).to(matrix.dtype)
    except ValueError as error:
        raise ValueError(f"prune_obs: {target.name!r}: {error}") from None


# running the model


@contextmanager
def _watching(targets: Sequence[Target], see: Callable[[Target, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with a target and its input before each of their forward passes."""

    def watch(target: Target) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(target, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [
        target.users[0][0].register_forward_pre_hook(watch(target), with_kwargs=True)
        for target in targets
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_input(
    model: nn.Module, targets: Sequence[Target], batch: Any, run: Run
) -> list[list[Target]]:
    """Part the targets by the input that they share, in the order in which the model runs them.

    Raises:
        ValueError: the model does not run one of them.
    """
    found: list[list[Target]] = []
    seen: set[str] = set()
    last: Tensor | None = None  # held, so that no other takes its identity

    def see(target: Target, x: Tensor) -> None:
        nonlocal last
        if target.name in seen:  # run once more: its first input places it
            return
        seen.add(target.name)
        if x is last:
            found[-1].append(target)
        else:
            found.append([target])
        last = x

    with _watching(targets, see):
        run(model, batch)
    for target in targets:
        if target.name not in seen:
            raise ValueError(
                f"prune_obs: no calibration data reach {target.name!r}; give batches that do, or "
                "list it in ignored_scopes"
            )
    return found


def _moment(model: nn.Module, target: Target, batches: Sequence[Any], run: Run) -> Tensor:
    """Return the sum of x x^T over all inputs x of a target, float64. Of a layer that a forward
    pass runs several times, the first inputs count.
    """
    side = target.matrix(target.weight).shape[1]
    total = torch.zeros(side, side, dtype=torch.float64, device=target.weight.device)
    counted = None

    def see(_: Target, x: Tensor) -> None:
        nonlocal total
        rows = real_tokens(x, counted).float()
        total += (rows.T @ rows).double()
        raise _Enough

    with _watching([target], see):
        for batch in batches:
            counted = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            try:
                run(model, batch)
            except _Enough:
                continue
    return total
