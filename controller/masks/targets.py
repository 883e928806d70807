"""Which weights of a model are masked, and under which pattern and limits.

The rule is in docs/defaults.md. Adapters, and weights that are zero throughout when the controller
is made, are left out unless a scope names them: they are at their start, not unimportant.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.pattern import NM
from ..config.algorithm import AlgorithmConfig
from ..config.scope import check_scopes, matches
from . import kinds
from .guard import guards_of
from .linear import conv1d_of
from .names import canonical
from .shards import any_nonzero
from .weight import Target

_log = logging.getLogger("triton_sparsity")


@dataclass(frozen=True)
class Candidate:
    """A parameter that may be masked, every (module, parameter name) that holds it, its names."""

    users: tuple[tuple[nn.Module, str], ...]
    names: tuple[str, ...]

    @property
    def weight(self) -> Tensor:
        module, name = self.users[0]
        return module._parameters[name]  # pyright: ignore[reportReturnType]

    @property
    def is_conv1d(self) -> bool:
        return conv1d_of(type(self.users[0][0])) is not None

    def has(self, kind: Callable[[nn.Module, str, Tensor], bool]) -> bool:
        """Tell whether the parameter is of a kind in any of its modules."""
        return any(kind(module, name, self.weight) for module, name in self.users)

    @property
    def paths(self) -> list[str]:
        """The names, and what they are without what wraps the model."""
        return _with_plain(self.names)

    def matches(self, scopes: Sequence[str] | None) -> bool:
        return any(matches(scope, path) for scope in scopes or () for path in self.paths)


def _with_plain(names: Sequence[str]) -> list[str]:
    return [*dict.fromkeys([*names, *map(canonical, names)])]


class Whereabouts(NamedTuple):
    """What a rule or a scope may ask of a model, of which other ranks may have other stages.

    Attributes:
        names: of what may be weights.
        paths: of modules.
        blocks: those of transformer blocks.
    """

    names: list[str]
    paths: list[str]
    blocks: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> Whereabouts:
        names = [name for candidate in weights_of(model) for name in candidate.names]
        paths = [path for path, _ in model.named_modules()]
        return cls(names, paths, kinds.transformer_blocks(model))


def find_targets(
    model: nn.Module, config: AlgorithmConfig, elsewhere: Whereabouts | None = None
) -> list[Target]:
    """List the weights that rule and scopes of ``config`` select, in module order, each once.

    A weight is a floating-point parameter of at least two dimensions of a linear, convolution,
    embedding, attention, recurrent or experts module, or any such parameter that a target scope
    names itself. A tied parameter is left dense when any of its names is ignored.

    Logs one line: how many weights, which share of the parameters, what is left dense and why.

    Args:
        model: any.
        config: what selects.
        elsewhere: of all stages of a pipeline, of which ``model`` is one and may have none of the
            weights; None: it is all that there is.

    Warns:
        UserWarning: parameters that look like weights but cannot be covered; frozen ones that are.

    Raises:
        ValueError: a scope matches nothing; no weight is left; a block is larger than its weight;
            N:M, or a block of experts, does not divide its weight; a weight is on the meta device,
            sharded or not initialised; another controller has it under a mask.
        TypeError: a target is integer or complex.
    """
    candidates = weights_of(model)
    if config.validate_scopes:
        names, paths, _ = elsewhere or Whereabouts.of(model)
        known = _with_plain([*names, *paths])
        check_scopes(config.target_scopes or (), known, "target_scopes")
        check_scopes(config.ignored_scopes, known, "ignored_scopes")
        check_scopes([o.scope for o in config.overrides], _with_plain(names), "overrides")
    blocks = kinds.transformer_blocks(model) if elsewhere is None else elsewhere.blocks
    found, left = _select(model, candidates, config, blocks)
    chosen = [_target(candidate, config) for candidate in found]
    for target in chosen:
        _check_weight(target)
    if not chosen and elsewhere is None:
        raise ValueError(
            f"create_controller: no weight to sparsify is left, of {len(candidates)} in the "
            f"model; targets={config.targets!r}, target_scopes={config.target_scopes!r}, "
            f"ignored_scopes={config.ignored_scopes!r}; "
            f"left dense: {_in_words(left) or 'none by rule'}"
        )
    if len(devices := {str(t.weight.device) for t in chosen}) > 1:
        raise ValueError(
            f"create_controller: the weights must be on one device, got {sorted(devices)}"
        )
    if chosen or elsewhere is None:
        _tell(model, chosen, left)
    return chosen


def weights_of(model: nn.Module) -> list[Candidate]:
    """List what may be weights, each parameter once, in module order."""
    found: dict[int, dict[tuple[nn.Module, str], str]] = {}
    for path, module in model.named_modules():
        for own, parameter in kinds.may_be_weights(module):
            name = path if path and own == "weight" else f"{path}.{own}".lstrip(".")
            found.setdefault(id(parameter), {})[module, own] = name
    return [Candidate(tuple(users), tuple(users.values())) for users in found.values()]


# why a weight is left dense
_RULE = "outside the transformer blocks, or no linear layer (targets='all' takes them)"
_ADAPTER = "adapters"
_ZERO = "zero throughout"
_UNKNOWN = "of modules that are not known to read weights"


def _select(
    model: nn.Module,
    candidates: Sequence[Candidate],
    config: AlgorithmConfig,
    blocks: Sequence[str],
) -> tuple[list[Candidate], dict[str, list[str]]]:
    """Return what is masked, and by reason the names of what is left dense without being asked."""
    beside = kinds.adapters(model)
    scopes = config.target_scopes or ()
    only_linear = config.targets == "linear" or (not (config.targets or scopes) and bool(blocks))
    chosen: list[Candidate] = []
    left: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate.matches(config.ignored_scopes) or (scopes and not candidate.matches(scopes)):
            continue
        known = candidate.has(kinds.is_known) or any(path in scopes for path in candidate.paths)
        linear = candidate.has(kinds.is_linear)
        inside = not blocks or any(_is_below(n, blocks) for n in candidate.names)
        if any(_is_adapter(n, beside, scopes) for n in candidate.names):
            reason = _ADAPTER
        elif only_linear and not (inside and (linear or not known)):
            reason = _RULE
        elif not known:
            reason = _UNKNOWN
        else:
            chosen.append(candidate)
            continue
        left.setdefault(reason, []).append(candidate.names[0])
    if not scopes and chosen:
        nonzero = _nonzero(chosen)
        if zeros := [c.names[0] for c in chosen if not nonzero[c]]:
            left[_ZERO] = zeros
        chosen = [candidate for candidate in chosen if nonzero[candidate]]
    return chosen, left


def _nonzero(candidates: Sequence[Candidate]) -> dict[Candidate, bool]:
    """Tell of each weight whether an element differs from zero; waits for each device once."""
    found: dict[Candidate, bool] = {}
    for device in dict.fromkeys(candidate.weight.device for candidate in candidates):
        members = [candidate for candidate in candidates if candidate.weight.device == device]
        if device.type == "meta":  # refused later, by name
            found |= dict.fromkeys(members, True)
            continue
        # a sum of magnitudes would overflow; NaN is not zero
        flags = torch.stack([any_nonzero(candidate.weight) for candidate in members]).tolist()
        found |= dict(zip(members, flags, strict=True))
    return found


def _is_below(name: str, paths: Sequence[str]) -> bool:
    return any(path in ("", name) or name.startswith(f"{path}.") for path in paths)


def _is_adapter(name: str, beside: dict[str, str], target_scopes: Sequence[str]) -> bool:
    """Tell whether PEFT holds a weight beside a layer, and no scope names it alone."""
    for path, holder in beside.items():
        if _is_below(name, [path]):
            return not any(matches(s, name) and not matches(s, holder) for s in target_scopes)
    return False


def _target(candidate: Candidate, config: AlgorithmConfig) -> Target:
    override = next((o for o in config.overrides if candidate.matches([o.scope])), None)
    module, weight = candidate.users[0][0], candidate.weight
    layout = kinds.is_transposed(module, weight), kinds.holds_experts(module, weight)
    target = Target(candidate.names[0], candidate.users, config.pattern, *layout)
    limits: dict[str, Any] = {}
    for given in (config, override):
        own = {name: getattr(given, name, None) for name in ("minimum_level", "maximum_level")}
        limits |= {name: level for name, level in own.items() if level is not None}
    pattern = config.pattern if override is None else override.pattern or config.pattern
    return replace(target, pattern=pattern, **limits)


def _check_weight(target: Target) -> None:
    weight = target.weight
    if not weight.is_floating_point():
        raise TypeError(
            f"create_controller: {target.name!r} must have a floating-point weight, "
            f"got {weight.dtype}; list it in ignored_scopes"
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"create_controller: {target.name!r} is on the meta device; load its weights first"
        )
    for module, name in target.users:
        if guards_of(module, name):
            raise ValueError(
                f"create_controller: {target.name!r} is under the masks of another controller; "
                "strip the model first, or put all algorithms into one configuration"
            )
    full = torch.empty(weight.shape, device="meta")
    rows, cols = full.shape[1:] if target.experts else target.matrix(full).shape
    if target.experts and target.transposed:
        rows, cols = cols, rows
    pattern = target.pattern
    sides = pattern.group if isinstance(pattern, NM) else (pattern.rows, pattern.cols)
    if isinstance(pattern, NM) or (target.experts and max(sides) > 1):
        for side, length, step in zip(("out", "in"), (rows, cols), sides, strict=True):
            if length % step:
                raise ValueError(
                    f"create_controller: {side}_features of {target.name!r} must be divisible by "
                    f"{step} for {pattern}, got {length}; list it in ignored_scopes or "
                    "give it a pattern in overrides"
                )
    if pattern.rows > rows or pattern.cols > cols:
        raise ValueError(
            f"create_controller: {pattern} is larger than the weight of {target.name!r}, "
            f"{(rows, cols)}; list it in ignored_scopes or give it a pattern in overrides"
        )


def _tell(model: nn.Module, targets: Sequence[Target], left: dict[str, list[str]]) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(target.weight.numel() for target in targets) / total
    by_rule = {reason: names for reason, names in left.items() if reason != _UNKNOWN}
    line = f"{len(targets)} weights under masks, {share:.1%} of the parameters"
    line += f"; left dense: {_in_words(by_rule)}" if by_rule else ""
    # what is left dense without being asked is worth a line on a console that shows no more
    _log.log(logging.WARNING if by_rule else logging.INFO, line)
    if unknown := left.get(_UNKNOWN):
        warnings.warn(
            f"left dense, because their modules are not known to read weights: {unknown}; "
            "name them in target_scopes to mask them, or in ignored_scopes to silence this",
            stacklevel=5,
        )
    if frozen := [t.name for t in targets if not t.weight.requires_grad]:
        warnings.warn(
            f"masking parameters that are frozen (requires_grad=False): {frozen}", stacklevel=5
        )


def _in_words(left: dict[str, list[str]]) -> str:
    parts = []
    for reason, names in left.items():
        named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        parts.append(f"{len(names)} {reason}: {named}")
    return "; ".join(parts)
