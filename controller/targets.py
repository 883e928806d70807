"""Which weights of a model are masked, and under which pattern and limits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..kernels.pattern import Pattern
from .config import Override
from .modules import SparseModule, is_transposed
from .scope import check_scopes, matches


@dataclass(frozen=True)
class Target:
    """One weight to mask.

    Attributes:
        name: dotted path of the module; with the parameter's name behind it where that is not
            ``weight``.
        users: every (module, parameter name) that holds this very parameter; the first is the
            owner.
        transposed: stored as (in, out).
        pattern, minimum_level, maximum_level: what holds for this weight.
    """

    name: str
    users: tuple[tuple[nn.Module, str], ...]
    transposed: bool
    pattern: Pattern
    minimum_level: float
    maximum_level: float

    @property
    def weight(self) -> Tensor:
        module, name = self.users[0]
        return getattr(module, name)


_WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def find_targets(
    model: nn.Module,
    *,
    pattern: Pattern,
    target_scopes: Sequence[str] | None = None,
    ignored_scopes: Sequence[str] = (),
    validate_scopes: bool = True,
    overrides: Sequence[Override] = (),
) -> list[Target]:
    """List the weights of ``model`` that scopes select, in module order, each parameter once.

    A weight is a floating-point parameter of at least two dimensions of a linear, convolution,
    embedding, attention or recurrent module, or any such parameter that a target scope names
    itself. A tied parameter is left dense when any of its names is ignored.

    Warns:
        UserWarning: parameters that look like weights but cannot be covered; frozen ones that are.

    Raises:
        ValueError: a scope matches nothing; no weight is left; a block is larger than its weight;
            a weight is on the meta device or not initialised; the model holds masks already.
        TypeError: a target is integer or complex.
    """
    sparse = [name for name, module in model.named_modules() if isinstance(module, SparseModule)]
    if sparse:
        raise ValueError(
            f"create_controller: model has a sparsity controller already (module {sparse[0]!r}); "
            "strip it first, or put all algorithms into one configuration"
        )
    found, uncovered = _weights_of(model, target_scopes or ())
    names = [name for users in found.values() for name, _, _ in users]
    if validate_scopes:
        modules = [path for path, _ in model.named_modules()]
        known = [*names, *uncovered, *modules]
        check_scopes(target_scopes or (), known, "target_scopes")
        check_scopes(ignored_scopes, known, "ignored_scopes")
        check_scopes([o.scope for o in overrides], names, "overrides")

    targets = []
    for users in found.values():
        user_names = [name for name, _, _ in users]
        ignored = any(_is_in(n, ignored_scopes) for n in user_names)
        chosen = any(_is_targeted(n, target_scopes) for n in user_names)
        if ignored or not chosen:
            continue
        override = next(
            (o for o in overrides if any(matches(o.scope, n) for n in user_names)), None
        )
        module = users[0][1]
        target = Target(
            name=users[0][0],
            users=tuple((module, name) for _, module, name in users),
            transposed=is_transposed(type(module)),
            pattern=override.pattern if override and override.pattern else pattern,
            minimum_level=override.minimum_level if override else 0.0,
            maximum_level=override.maximum_level if override else 1.0,
        )
        _check_weight(target)
        targets.append(target)
    if not targets:
        raise ValueError(
            f"create_controller: no weight to sparsify is left, of {len(names)} in the model; "
            f"target_scopes={target_scopes!r}, ignored_scopes={ignored_scopes!r}"
        )
    devices = {str(t.weight.device) for t in targets}
    if len(devices) > 1:
        raise ValueError(
            f"create_controller: the weights must be on one device, got {sorted(devices)}"
        )
    left_dense = [
        n for n in uncovered if _is_targeted(n, target_scopes) and not _is_in(n, ignored_scopes)
    ]
    _warn_about(left_dense, targets)
    return targets


def _is_in(name: str, scopes: Sequence[str]) -> bool:
    return any(matches(scope, name) for scope in scopes)


def _is_targeted(name: str, target_scopes: Sequence[str] | None) -> bool:
    return target_scopes is None or _is_in(name, target_scopes)


def _weights_of(
    model: nn.Module, named: Sequence[str]
) -> tuple[dict[int, list[tuple[str, nn.Module, str]]], list[str]]:
    """Return each weight's users (name, module, parameter name), and what cannot be covered."""
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    uncovered: list[str] = []
    for path, module in model.named_modules():
        for parameter_name, parameter, covered in _parameters_of(module):
            name = _target_name(path, parameter_name)
            if covered or name in named:
                found.setdefault(id(parameter), []).append((name, module, parameter_name))
            else:
                uncovered.append(name)
    return found, uncovered


def _parameters_of(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name, parameter, covered by its module's kind) of what may be a weight."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"create_controller: {type(module).__name__} holds an uninitialised {name!r}; "
                "run the lazy module once first"
            )
        if parameter.ndim < 2 or "bias" in name or isinstance(module, _NORMS):
            continue
        covered = (
            ((isinstance(module, _WEIGHTED) or is_transposed(type(module))) and name == "weight")
            or (isinstance(module, nn.MultiheadAttention) and name in _ATTENTION_WEIGHTS)
            or (isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name.startswith("weight_"))
        )
        yield name, parameter, covered


def _target_name(path: str, parameter: str) -> str:
    if not path:
        return parameter
    return path if parameter == "weight" else f"{path}.{parameter}"


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
    shape = (weight.T if target.transposed else weight.flatten(1)).shape
    if target.pattern.rows > shape[0] or target.pattern.cols > shape[1]:
        raise ValueError(
            f"create_controller: {target.pattern} is larger than the weight of {target.name!r}, "
            f"{tuple(shape)}; list it in ignored_scopes or give it a pattern in overrides"
        )


def _warn_about(uncovered: list[str], targets: list[Target]) -> None:
    if uncovered:
        warnings.warn(
            f"left dense, because their modules are not known to read weights: {uncovered}; "
            "name them in target_scopes to mask them, or in ignored_scopes to silence this",
            stacklevel=4,
        )
    frozen = [t.name for t in targets if not t.weight.requires_grad]
    if frozen:
        warnings.warn(
            f"masking parameters that are frozen (requires_grad=False): {frozen}", stacklevel=4
        )
