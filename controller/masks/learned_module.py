"""Modules some of whose weights read masked while their masks are learned (``learned.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from .learned import WEIGHTS, LearnedWeight, scores_name
from .module import MaskedModule, become, unsharded_class
from .shards import is_sharded


class LearnedModule(MaskedModule):
    """A module some of whose weights read masked. Its forward is its own class's; scores, where a
    weight has such, are its parameters ``<weight>_scores``, but no keys of its state dict.
    """

    _learned_weights: dict[str, LearnedWeight]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # scores follow to the device; their dtype stays: a 16-bit one could not take a small step
        with self._without_scores():
            super()._apply(fn, recurse)
        for weight in self._learned_weights.values():
            found = weight.follow()
            if weight.scores is not None and not is_sharded(found) and found.is_shared():
                weight.scores.share_memory_()
        return self

    def train(self, mode: bool = True) -> Any:
        # compiled code cannot look at the scores: it reads the mask as it is. Of what lies in
        # parts it reads no stored mask, which other ranks would have to be asked for
        if not mode:
            for weight in self._learned_weights.values():
                if not weight.in_parts:
                    weight.settle()
        return super().train(mode)

    @contextmanager
    def _without_scores(self) -> Iterator[None]:
        """Part with the score parameters for as long as the context is open."""
        scored = [*map(scores_name, self._learned_weights)]
        held = {name: self._parameters.pop(name) for name in scored if name in self._parameters}
        try:
            yield
        finally:
            self._parameters.update(held)

    # parameters to optimisers and distributed wrappers, scores are no part of the model's state
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_scores():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in map(scores_name, self._learned_weights):
            # torch's set_model_state_dict adds the model's own parameters to a full state
            if state_dict.get(prefix + name) is self._parameters.get(name):
                state_dict.pop(prefix + name, None)
        with self._without_scores():
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # The mask of evaluation is folded into the weight of a copy. The scores stay parameters of it,
    # or an average of parameters would pair wrong ones.
    def _state_of_copy(self) -> dict[str, Any]:
        state = super()._state_of_copy()
        weights: dict[str, LearnedWeight] = state.pop(WEIGHTS)
        folded = {name: weight.folded() for name, weight in weights.items()}
        return state | {"_parameters": dict(state["_parameters"]) | folded}


class _LearnedRNN(LearnedModule):
    """Recurrent layers read their weights from a flat list."""

    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dense = self._flat_weights
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._flat_weights = dense


def read_masked(module: nn.Module, weights: Mapping[str, LearnedWeight]) -> None:
    """Let attributes of ``module`` read masked, in place; scores become its parameters."""
    module.__dict__[WEIGHTS] = dict(weights)
    become(module, _class_of(unsharded_class(type(module)), tuple(weights)))
    for name, weight in weights.items():
        if weight.scores is not None:
            module.register_parameter(scores_name(name), weight.scores)


def read_plain(module: nn.Module) -> None:
    """Give a module its class back; its weights are left as they are."""
    if isinstance(module, LearnedModule):
        for name, weight in module.__dict__.pop(WEIGHTS).items():
            drop_scores(module, name)
            weight.let_go()
        become(module, type(module).dense_class)


def drop_scores(module: nn.Module, parameter_name: str) -> None:
    """Take the scores of a weight out of a module."""
    module._parameters.pop(scores_name(parameter_name), None)


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the trained scores in ``model``, each once, as modules have them now."""
    found = [
        parameter
        for module in model.modules()
        if isinstance(module, LearnedModule)
        for name in module._learned_weights
        if (parameter := module._parameters.get(scores_name(name))) is not None
    ]
    return list(dict.fromkeys(found))


@cache
def _class_of(dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    base: type[nn.Module] = _LearnedRNN if issubclass(dense, nn.RNNBase) else LearnedModule
    # a property comes before a registered parameter; assigning one still registers it
    attributes: dict[str, Any] = {name: property(_reader(name)) for name in names}
    attributes |= {"dense_class": dense}
    return type(f"Learned{dense.__name__}", (base, dense), attributes)  # pyright: ignore[reportReturnType]


def _reader(name: str) -> Callable[[LearnedModule], Tensor]:
    def read(module: LearnedModule) -> Tensor:
        return module._learned_weights[name].read()

    return read
