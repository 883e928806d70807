"""Modules that run their dense class's forward on masked weights.

``sparsify`` turns a module into a subclass of its own class, in place: parameters, hooks,
state-dict keys and ``isinstance`` stay as they were. ``densify`` turns it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _Projection

from .operand import MaskOperand


class SparseModule(nn.Module):
    """Masks of a module's own weights. Its forward is the dense class's, on masked weights.

    Where a mask follows from trained scores, these are parameters of the module, called
    ``<weight>_scores``, but no keys of its state dict.
    """

    dense_class: ClassVar[type[nn.Module]]
    operands: dict[str, MaskOperand]

    def masked(self, name: str = "weight") -> Tensor:
        """Return the masked weight called ``name``."""
        return self.operands[name].apply(getattr(self, name))

    @contextmanager
    def masked_attributes(self) -> Iterator[None]:
        """Let ``self.<name>`` be the masked weight for as long as the context is open."""
        # an instance attribute comes before a registered parameter
        for name, operand in self.operands.items():
            self.__dict__[name] = operand.apply(getattr(self, name))
        try:
            yield
        finally:
            for name in self.operands:
                self.__dict__.pop(name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.masked_attributes():
            return super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        for operand in self.operands.values():
            operand.train(mode)
        return super().train(mode)

    @contextmanager
    def _without_scores(self) -> Iterator[None]:
        """Part with the score parameters for as long as the context is open."""
        held = dict(self._parameters)
        for name in self._score_names():
            self._parameters.pop(name, None)
        try:
            yield
        finally:
            scores = {name: held[name] for name in self._score_names() if name in held}
            self._parameters.update(scores)

    def _score_names(self) -> list[str]:
        return [_scores_name(name) for name, op in self.operands.items() if op.scores is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # scores follow to the device; their dtype stays: a 16-bit one could not take a small step
        with self._without_scores():
            super()._apply(fn, recurse)
        for name, operand in self.operands.items():
            operand.to(getattr(self, name))
        return self

    # parameters to optimisers and distributed wrappers, scores are no part of the model's state
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_scores():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._without_scores():
            super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        patterns = {name: str(operand.pattern) for name, operand in self.operands.items()}
        masks = ", ".join(
            pattern if name == "weight" else f"{name}: {pattern}"
            for name, pattern in patterns.items()
        )
        dense = super().extra_repr()
        return f"{dense}, sparse=({masks})" if dense else f"sparse=({masks})"

    # subclasses may be made at run time, where pickle and deepcopy cannot find them by name
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.dense_class,), self.__getstate__()


class SparseLinear(SparseModule, nn.Linear):
    dense_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        bias = self.masked("bias") if "bias" in self.operands else self.bias
        return self.operands["weight"].linear(input, self.weight, bias)


class SparseConv1D(SparseModule):
    """Hugging Face's Conv1D: a linear that stores ``(in_features, out_features)``."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return self.operands["weight"].linear(x, self.weight, self.bias)


class SparseEmbedding(SparseModule, nn.Embedding):
    dense_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.masked(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class SparseConv1d(SparseModule, nn.Conv1d):
    dense_class = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.masked(), self.bias)


class SparseConv2d(SparseModule, nn.Conv2d):
    dense_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.masked(), self.bias)


class SparseConv3d(SparseModule, nn.Conv3d):
    dense_class = nn.Conv3d

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.masked(), self.bias)


class SparseConvTranspose1d(SparseModule, nn.ConvTranspose1d):
    dense_class = nn.ConvTranspose1d


class SparseConvTranspose2d(SparseModule, nn.ConvTranspose2d):
    dense_class = nn.ConvTranspose2d


class SparseConvTranspose3d(SparseModule, nn.ConvTranspose3d):
    dense_class = nn.ConvTranspose3d


class SparseRNN(SparseModule):
    """Recurrent layers read their weights from a flat list."""

    dense_class = nn.RNNBase
    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    @contextmanager
    def masked_attributes(self) -> Iterator[None]:
        dense = self._flat_weights
        self._flat_weights = [
            self.masked(name) if name in self.operands else weight
            for name, weight in zip(self._flat_weights_names, dense, strict=True)
        ]
        try:
            yield
        finally:
            self._flat_weights = dense


class SparseMultiheadAttention(SparseModule, nn.MultiheadAttention):
    """Attention reads its output projection's weight without calling the projection."""

    dense_class = nn.MultiheadAttention

    @contextmanager
    def masked_attributes(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(super().masked_attributes())
            if isinstance(self.out_proj, SparseModule):
                stack.enter_context(self.out_proj.masked_attributes())
            yield


class SparseTransformerEncoderLayer(SparseModule, nn.TransformerEncoderLayer):
    """Holds no mask; keeps the layer off its fused inference path, which reads dense weights."""

    dense_class = nn.TransformerEncoderLayer

    # what both the layer and nn.TransformerEncoder consult before they take the fused path
    activation_relu_or_gelu = property(lambda _: 0, lambda _, value: None)  # pyright: ignore[reportAssignmentType]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return nn.TransformerEncoderLayer.forward(self, *args, **kwargs)


_FORWARDS: tuple[type[SparseModule], ...] = (
    SparseLinear,
    SparseEmbedding,
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseMultiheadAttention,
    SparseTransformerEncoderLayer,
)


def is_transposed(kind: type[nn.Module]) -> bool:
    """Tell whether modules of this class store their weight as ``(in_features, out_features)``."""
    return _conv1d_of(kind) is not None


def _conv1d_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return Hugging Face's Conv1D, if ``kind`` is one. By name: transformers may be missing."""
    for base in kind.__mro__:
        if base.__name__ == "Conv1D" and base.__module__.startswith("transformers."):
            return base
    return None


@cache
def sparse_class(dense: type[nn.Module]) -> type[SparseModule]:
    """Return the subclass of ``dense`` that masks its weights."""
    for sparse in _FORWARDS:
        if dense is sparse.dense_class:
            return sparse
    bases: tuple[type, ...] = (SparseModule, dense)
    if issubclass(dense, nn.RNNBase):
        bases = (SparseRNN, dense)
    conv1d = _conv1d_of(dense)
    if conv1d is not None and dense.forward is conv1d.forward:
        bases = (SparseConv1D, dense)
    for sparse in _FORWARDS:
        # a subclass that overrides forward knows best what it does with its weight
        inherits = dense.forward is sparse.dense_class.forward
        if issubclass(dense, sparse.dense_class) and (
            inherits or sparse.forward is SparseModule.forward
        ):
            bases = (sparse, dense)
    return type(f"Sparse{dense.__name__}", bases, {"dense_class": dense})


def sparsify(module: nn.Module, operands: dict[str, MaskOperand]) -> None:
    """Make ``module`` read its weights through masks, in place.

    Args:
        module: any module that owns the parameters named.
        operands: parameter name -> mask. A module that is sparse already takes them in addition.
    """
    if isinstance(module, SparseModule):
        module.operands |= operands
    else:
        module.__dict__["operands"] = dict(operands)
        module.__class__ = sparse_class(type(module))
        multiplies = type(module).forward in (SparseLinear.forward, SparseConv1D.forward)
        # attention reads its output projection's weight, and never calls it
        if multiplies and not isinstance(module, _Projection):
            operands["weight"].serve_linear()
    for name, operand in operands.items():
        if operand.scores is not None:
            module.register_parameter(_scores_name(name), operand.scores)
        operand.train(module.training)


def densify(module: nn.Module) -> None:
    """Give a sparse module its dense class back; its weights are left as they are."""
    assert isinstance(module, SparseModule)
    dense = type(module).dense_class
    for name in module._score_names():
        module._parameters.pop(name, None)
    del module.__dict__["operands"]
    # the checker takes the instance's class for fixed
    object.__setattr__(module, "__class__", dense)


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the trained scores in ``model``, each once."""
    found = [
        operand.scores
        for module in model.modules()
        if isinstance(module, SparseModule)
        for operand in module.operands.values()
        if operand.scores is not None
    ]
    return list(dict.fromkeys(found))


def _scores_name(parameter: str) -> str:
    return f"{parameter}_scores"


def _rebuild(dense: type[nn.Module]) -> SparseModule:
    cls = sparse_class(dense)
    return cls.__new__(cls)
