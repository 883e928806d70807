"""Masks that follow from scores which are trained along with the weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.dispatch import Dispatch
from ..kernels.launch import Backend
from ..kernels.pattern import Pattern
from .operand import MaskOperand

if TYPE_CHECKING:
    from .base_algo import SparseModuleInfo


class ScoredOperand(MaskOperand):
    """A mask with trained scores.

    Frozen, the scores take part in no graph: ``DistributedDataParallel`` needs
    ``find_unused_parameters=True``.

    Args:
        weight, pattern, transposed, backend, dispatch: as ``MaskOperand``'s.
        shape: of the scores.
        initial: what they all start from.
        multiplier: ``compression_lr_multiplier``, a factor of the scores' gradients; None: 1.
    """

    scores: nn.Parameter

    def __init__(
        self,
        weight: Tensor,
        pattern: Pattern,
        *,
        shape: tuple[int, ...],
        initial: float,
        multiplier: float | None,
        transposed: bool = False,
        backend: Backend = "auto",
        dispatch: Dispatch = "auto",
    ) -> None:
        super().__init__(
            weight, pattern, transposed=transposed, backend=backend, dispatch=dispatch
        )
        self.multiplier = multiplier
        self.training = True
        self.frozen = False
        scores = torch.full(shape, initial, dtype=torch.float32, device=weight.device)
        self.scores = nn.Parameter(scores)  # pyright: ignore[reportIncompatibleVariableOverride]

    def train(self, mode: bool) -> None:
        super().train(mode)
        self.training = mode

    @property
    @abstractmethod
    def learning(self) -> bool:
        """True where a forward pass goes by the scores, not by the mask as it is stored."""

    @abstractmethod
    def learned(self, weight: Tensor) -> Tensor:
        """Return the masked weight, with a gradient to the scores."""

    def apply(self, weight: Tensor) -> Tensor:
        return self.learned(weight) if self.learning else super().apply(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.learning:
            return super().linear(x, weight, bias)
        # no product skips blocks: the scores' gradient needs the weight's whole
        masked = self.learned(weight)
        return functional.linear(x, masked.T if self.transposed else masked, bias)

    def freeze(self, frozen: bool) -> None:
        """Let the mask stay as it is, in training too, or go on."""
        self.frozen = frozen
        if frozen:
            # an optimiser leaves alone what has no gradient, its momentum notwithstanding
            self.scores.grad = None

    def to(self, weight: Tensor) -> None:
        super().to(weight)
        # still None while the base class is made
        scores: nn.Parameter | None = self.scores
        if scores is None or scores.device == weight.device:
            return
        scores.data = scores.data.to(weight.device)
        if scores.grad is not None:
            scores.grad.data = scores.grad.data.to(weight.device)

    def trained_scores(self) -> Tensor:
        """Return the scores as the forward pass and the loss read them."""
        if self.multiplier is None:
            return self.scores
        return _ScaledGradient.apply(self.scores, self.multiplier)


class _ScaledGradient(torch.autograd.Function):
    """The identity; the gradient is multiplied. No hook, which copies and pickles would lose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scored_operands(infos: Sequence[SparseModuleInfo]) -> list[ScoredOperand]:
    """Return the operands of ``infos``, which all have scores."""
    operands = [info.operand for info in infos]
    assert all(isinstance(operand, ScoredOperand) for operand in operands)
    return operands  # pyright: ignore[reportReturnType]


def scores_state(infos: Sequence[SparseModuleInfo]) -> dict[str, Tensor]:
    """Return each weight's scores by name, on the CPU."""
    return {
        info.module_node_name: operand.scores.detach().cpu().clone()
        for info, operand in zip(infos, scored_operands(infos), strict=True)
    }


def read_scores(state: Mapping[str, Any], infos: Sequence[SparseModuleInfo]) -> list[Tensor]:
    """Return ``scores_state``'s tensors in the order of ``infos``.

    Raises:
        ValueError: the state is of another model or structure, or damaged.
    """
    if not isinstance(state, Mapping) or set(state) != {i.module_node_name for i in infos}:
        raise ValueError("load_state: the scores are of another model")
    for info, operand in zip(infos, scored_operands(infos), strict=True):
        name, saved = info.module_node_name, state[info.module_node_name]
        want = operand.scores
        if not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"load_state: scores of {name!r} must be {want.dtype} {tuple(want.shape)}"
            )
    return [state[info.module_node_name] for info in infos]


class ScoreWatch:
    """Tells when an optimiser has long left the scores alone.

    Args:
        operands: whose scores.
    """

    PATIENCE = 20  # steps; a gradient scaler may skip the first few
    SAMPLE = 256  # scores of each weight that are compared

    def __init__(self, operands: Sequence[ScoredOperand]) -> None:
        self._operands = operands
        self._seen: list[int] = []
        self._samples: list[Tensor] = []
        self._idle = 0

    def idle(self) -> bool:
        """Count a step; True once, when ``PATIENCE`` steps have changed nothing."""
        versions = [operand.scores._version for operand in self._operands]
        if versions != self._seen:
            self._seen, self._samples, self._idle = versions, self._sample(), 0
            return False
        self._idle += 1
        if self._idle != self.PATIENCE:
            return False
        # fused optimisers leave no trace in the versions
        return all(map(torch.equal, self._samples, self._sample()))

    def _sample(self) -> list[Tensor]:
        scores = [operand.scores.detach() for operand in self._operands]
        return [values.flatten()[: self.SAMPLE].clone() for values in scores]
