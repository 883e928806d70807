"""Weights that are dense and read masked: their masks are learned, from scores that are trained
along with them or from what pruned elements come to be.

The module's attribute reads masked: whoever computes with ``child.weight`` sees the mask, and
what the mask follows from is in the graph. Once the masks are frozen the weight holds the zeros,
as any sparse weight.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels.learned_mask import scale_gradient
from .linear import restore_class, skip_blocks
from .module import MaskedModule, become
from .weight import SparseWeight, Target, take_values

_WEIGHTS = "_learned_weights"


class LearnedWeight(SparseWeight):
    """A weight that is dense and reads masked, until it is frozen."""

    def __init__(self, target: Target, **options: Any) -> None:
        self.frozen = False
        super().__init__(target, **options)
        self._folded: tuple[tuple[Any, ...], weakref.ref[nn.Parameter]] | None = None

    @property
    def holds_zeros(self) -> bool:
        return self.frozen

    @property
    def learning(self) -> bool:
        """True where a forward pass reads what is to be trained, not the mask of evaluation."""
        return self.learns()

    def learns(self) -> bool:
        """Tell what ``learning`` is: a method, as torch 2.11 compiles no ``super().learning``."""
        return self.module.training and not self.frozen and isinstance(self.module, LearnedModule)

    @abstractmethod
    def learned(self, weight: Tensor) -> Tensor:
        """Return the masked weight, with a gradient to all that the mask follows from."""

    def evaluated(self, weight: Tensor) -> Tensor:
        """Return the weight under the mask of evaluation, differentiable."""
        self.settle()
        # traced, the count would be guarded: an update would compile anew
        if self.all_kept and not torch.compiler.is_compiling():
            return weight
        return torch.where(self.binary_mask, weight, 0)

    def read(self) -> Tensor:
        """Return what the module's attribute is: the masked weight, or once frozen the weight."""
        weight = self.weight
        if self.frozen:
            return weight
        if not self._is_here(weight):
            self.follow()
        return self.learned(weight) if self.learning else self.evaluated(weight)

    def masked(self, tensor: Tensor) -> Tensor:
        if self.frozen:
            return super().masked(tensor)
        self.follow()
        return self.learned(tensor) if self.learning else self.evaluated(tensor)

    def freeze(self, frozen: bool) -> None:
        """Let the stored mask stay, and the weight be zero where it prunes; or go on."""
        self.frozen = frozen
        if frozen:
            take_values([self])
            skip_blocks(self, self.module, self.parameter_name)
        else:
            restore_class(self.module)

    def mask_state(self) -> tuple[Any, ...]:
        """Return what differs once the mask of evaluation may be another."""
        return (self.changes,)

    @torch.no_grad()
    def folded(self) -> nn.Parameter:
        """Return the weight under the mask of evaluation as a parameter of its own, for a copy.
        Modules that share a weight share this too, as long as somebody holds it.
        """
        key = self.weight.data_ptr(), self.weight._version, *self.mask_state()
        found = self._folded[1]() if self._folded and self._folded[0] == key else None
        if found is None:
            value = self.evaluated(self.weight.detach()).clone()
            found = nn.Parameter(value, requires_grad=self.weight.requires_grad)
            self._folded = key, weakref.ref(found)
        return found


class ScoredWeight(LearnedWeight):
    """A weight whose mask follows from trained scores.

    Args:
        target: which parameter, and the shape of its groups.
        multiplier: ``compression_lr_multiplier``, a factor of the scores' gradients; None: 1.
        options: as ``SparseWeight``'s.
    """

    scores: nn.Parameter
    initial_score: ClassVar[float] = 0.0  # what all scores start from

    def __init__(self, target: Target, *, multiplier: float | None = None, **options: Any) -> None:
        super().__init__(target, **options)
        self.multiplier = multiplier
        options = {"dtype": torch.float32, "device": self.weight.device}
        scores = torch.full(self.scores_shape, self.initial_score, **options)
        self.scores = nn.Parameter(scores)  # pyright: ignore[reportIncompatibleVariableOverride]
        # fused optimisers rewrite a parameter without a trace in its version
        self.optimizer_steps = 0
        # since these were last set to False: whether the weight was read in training, whether a
        # backward pass has reached what was read, and whether one has reached the scores
        self.was_read = self.has_learned = self.has_gradient = False
        # weakly: torch holds a tensor's hooks where the garbage collector cannot see the circle
        note = weakref.WeakMethod(self._note_gradient)
        self.scores.register_post_accumulate_grad_hook(lambda _: (note() or bool)())

    def _note_gradient(self) -> None:
        self.has_gradient = True

    def _note_learning(self, _: Tensor) -> None:
        self.has_learned = True

    @property
    @abstractmethod
    def scores_shape(self) -> tuple[int, ...]:
        """How many scores there are, down and across."""

    def read(self) -> Tensor:
        masked = super().read()
        noted = self.learning and masked.requires_grad
        if noted and not torch.compiler.is_compiling():
            self.was_read = True
            masked.register_hook(self._note_learning)
        return masked

    def _move(self, weight: Tensor) -> None:
        super()._move(weight)
        scores: nn.Parameter | None = self.scores  # still None while the base class is made
        if scores is None or scores.device == weight.device:
            return
        scores.data = scores.data.to(weight.device)
        if scores.grad is not None:
            scores.grad.data = scores.grad.data.to(weight.device)

    def freeze(self, frozen: bool) -> None:
        if frozen:
            # an optimiser leaves alone what has no gradient, its momentum notwithstanding
            self.scores.grad = None
        super().freeze(frozen)

    def trained_scores(self) -> Tensor:
        """Return the scores as the forward pass and the loss read them."""
        if self.multiplier is None:
            return self.scores
        return scale_gradient(self.scores, self.multiplier)

    def mask_state(self) -> tuple[Any, ...]:
        return self.scores.data_ptr(), self.scores._version, self.optimizer_steps


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
            if weight.follow().is_shared() and weight.scores is not None:
                weight.scores.share_memory_()
        return self

    def train(self, mode: bool = True) -> Any:
        # compiled code cannot look at the scores: it reads the mask as it is
        if not mode:
            for weight in self._learned_weights.values():
                weight.settle()
        return super().train(mode)

    @contextmanager
    def _without_scores(self) -> Iterator[None]:
        """Part with the score parameters for as long as the context is open."""
        scored = [
            name for name, weight in self._learned_weights.items() if weight.scores is not None
        ]
        held = {name: self._parameters.pop(name) for name in map(_scores_name, scored)}
        try:
            yield
        finally:
            self._parameters.update(held)

    # parameters to optimisers and distributed wrappers, scores are no part of the model's state
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_scores():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_scores():
            super()._load_from_state_dict(*args, **kwargs)

    # The mask of evaluation is folded into the weight of a copy. The scores stay parameters of it,
    # or an average of parameters would pair wrong ones.
    def _state_of_copy(self) -> dict[str, Any]:
        state = super()._state_of_copy()
        weights: dict[str, LearnedWeight] = state.pop(_WEIGHTS)
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
    module.__dict__[_WEIGHTS] = dict(weights)
    become(module, _class_of(type(module), tuple(weights)))
    for name, weight in weights.items():
        if weight.scores is not None:
            module.register_parameter(_scores_name(name), weight.scores)


def read_plain(module: nn.Module) -> None:
    """Give a module its class back; its weights are left as they are."""
    if isinstance(module, LearnedModule):
        for name in module.__dict__.pop(_WEIGHTS):
            module._parameters.pop(_scores_name(name), None)
        become(module, type(module).dense_class)


def drop_scores(module: nn.Module, parameter_name: str) -> None:
    """Take the scores out of a copy of a learned module."""
    module._parameters.pop(_scores_name(parameter_name), None)


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the trained scores in ``model``, each once."""
    found = [
        weight.scores
        for module in model.modules()
        if isinstance(module, LearnedModule)
        for weight in module._learned_weights.values()
        if weight.scores is not None
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


def _scores_name(parameter: str) -> str:
    return f"{parameter}_scores"
