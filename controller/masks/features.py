"""Which dimensions of which parameters are the same features, as a forward pass shows.

A linear layer's outputs, its bias and what reads them, through elementwise operations, have their
features in common: in another order, the same for all of them, the model computes the same. What
an operation that is not known to keep features apart touches has to stay in its order.

Reading order: the trace, the operations that carry features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# each element of the result comes of the elements at its place
_ELEMENTWISE = re.compile(
    "|".join(
        (
            "abs|clamp|clamp_max|clamp_min|cos|dropout|erf|exp|log|masked_fill|maximum|minimum",
            "neg|negative|reciprocal|rsqrt|sin|sqrt|square|where",
            "[ir]?(add|sub|mul|truediv|pow)|subtract|multiply|div|divide|true_divide",
            "celu|elu|gelu|hardsigmoid|hardswish|hardtanh|leaky_relu|logsigmoid|mish|relu|relu6",
            "selu|sigmoid|silu|softplus|softsign|tanh",
            "bfloat16|clone|contiguous|detach|double|float|half|to|type|type_as",
        )
    )
)
# what is asked of a tensor without a look at its values
_ABOUT = re.compile(
    "__len__|dim|element_size|get_device|is_complex|is_contiguous|is_floating_point|ndimension"
    "|nelement|numel|size|storage_offset|stride"
)

# a tensor's identity and one of its dimensions: a parameter's from the front, else -1, the last
Place = tuple[int, int]


@dataclass(frozen=True)
class Features:
    """One set of features.

    Attributes:
        members: name of each parameter that has them, and in which dimension.
        held_by: what they have to keep their order for; None: they may change places.
    """

    members: tuple[tuple[str, int], ...]
    held_by: str | None


def trace_features(model: nn.Module, forward: Callable[[], Any]) -> tuple[list[Features], Any]:
    """Return the sets of features that parameters have, as they come up, and the answer.

    Holds all activations while it runs. Parameters that the forward pass does not read have none.

    Args:
        model: not compiled.
        forward: runs it once.
    """
    trace = _Trace({id(p): (name, p) for name, p in model.named_parameters()})
    with trace:
        answer = forward()
    for tensor in tensors_of(answer):
        trace.hold(tensor, "the model's output")
    return trace.features(), answer


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(item)


class _Trace(TorchFunctionMode):
    """Follows features through a forward pass: sets of places, which operations merge."""

    def __init__(self, parameters: dict[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.parameters = parameters
        self.parents: dict[Place, Place] = {}
        self.reasons: dict[Place, str] = {}
        self.alive: list[Tensor] = []  # so that no other tensor takes an identity

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if inputs := [*tensors_of((args, kwargs))]:
            name = getattr(func, "__name__", str(func))
            self.alive += [*inputs, *tensors_of(result)]
            if not self.carries(name, result, inputs, args, kwargs):
                for tensor in inputs:
                    self.hold(tensor, f"{name.strip('_')!r}")
        return result

    def carries(
        self, name: str, result: Any, inputs: list[Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        """Merge what an operation keeps together; tell whether it is one that is known."""
        if not isinstance(result, Tensor):
            about = name == "__get__" or _ABOUT.fullmatch(name) is not None
            return about and not any(tensors_of(result))
        name = name.strip("_")
        if _ELEMENTWISE.fullmatch(name) and "out" not in kwargs:
            return self.elementwise(result, inputs)
        try:
            match name:
                case "linear":
                    return self.linear(result, *args, **kwargs)
                case "addmm":
                    return self.addmm(result, *args, **kwargs)
                case "embedding":
                    return self.embedding(result, *args, **kwargs)
                case "layer_norm" | "rms_norm":
                    return self.norm(result, *args, **kwargs)
                case "mean" | "sum":
                    return self.reduction(result, *args, **kwargs)
                case "view" | "reshape" | "flatten" | "unflatten":
                    return self.kept_last(result, inputs[0])
                case "getitem":
                    return self.item(result, *args)
        except TypeError:  # called in another form
            return False
        return False

    # the operations that carry features

    def elementwise(self, result: Tensor, inputs: list[Tensor]) -> bool:
        width = result.shape[-1] if result.ndim else 1
        carriers = [t for t in inputs if width > 1 and t.ndim and t.shape[-1] == width]
        for tensor in inputs:
            self.hold_leading(tensor)
        if any(map(self.knows, carriers)):
            self.merge(*map(self.last, carriers), self.last(result))
        return True

    def linear(
        self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> bool:
        return self.product(result, input, weight, bias, 1)

    def addmm(self, result: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor) -> bool:
        return self.product(result, mat1, mat2, input, 0)

    def product(
        self, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, side: int
    ) -> bool:
        """Merge what x (..., in) W has in common; ``side`` is the dimension of W's inputs."""
        own = [weight] if bias is None else [weight, bias]
        if weight.ndim != 2 or not all(id(t) in self.parameters for t in own):
            return False
        self.merge(self.last(x), (id(weight), side))
        self.merge(*(self.last(t) for t in own[1:]), (id(weight), 1 - side), self.last(result))
        return True

    def embedding(self, result: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> bool:
        if id(weight) not in self.parameters:
            return False
        self.hold_leading(weight)
        self.merge(self.last(weight), self.last(result))
        return True

    def norm(
        self,
        result: Tensor,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Any = None,
        *_: Any,
        **__: Any,
    ) -> bool:
        own = [tensor for tensor in (weight, bias) if isinstance(tensor, Tensor)]
        if len(normalized_shape) != 1:
            return False
        self.merge(*map(self.last, [input, *own, result]))
        return True

    def reduction(
        self,
        result: Tensor,
        input: Tensor,
        dim: Any = None,
        keepdim: bool = False,
        *,
        dtype: Any = None,
    ) -> bool:
        if id(input) in self.parameters:
            return False
        dims = range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        if self.knows(input) and input.ndim - 1 not in [d % input.ndim for d in dims]:
            self.merge(self.last(input), self.last(result))
        return True

    def item(self, result: Tensor, input: Tensor, index: Any) -> bool:
        index = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(i, (int, slice)) and not isinstance(i, bool) for i in index)
        index = index[:-1] if index[-1:] == (slice(None),) else index
        return plain and len(index) < input.ndim and self.kept_last(result, input)

    def kept_last(self, result: Tensor, input: Tensor) -> bool:
        """Merge the last dimensions, if the operation has left it whole."""
        if id(input) in self.parameters or result.shape[-1:] != input.shape[-1:]:
            return False
        if self.knows(input):
            self.merge(self.last(input), self.last(result))
        return True

    # sets of places

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self.parameters or (id(tensor), -1) in self.parents

    def last(self, tensor: Tensor) -> Place:
        own = id(tensor) in self.parameters
        return id(tensor), tensor.ndim - 1 if own else -1

    def root(self, place: Place) -> Place:
        while (parent := self.parents.setdefault(place, place)) != place:
            place = parent
        return place

    def merge(self, *places: Place) -> None:
        """Make one set of several; the last one may be new."""
        for place in places[:-1]:
            if place[0] not in self.parameters and place not in self.parents:
                self.reasons[self.root(place)] = "inputs that cannot be followed"
        first, *others = {self.root(place): None for place in places}
        for other in others:
            self.parents[other] = first
            if other in self.reasons:
                self.reasons.setdefault(first, self.reasons[other])

    def hold(self, tensor: Tensor, reason: str) -> None:
        """Let the features of a tensor, in whichever dimension, keep their order."""
        if self.knows(tensor):
            self.hold_leading(tensor, reason)
            self.reasons.setdefault(self.root(self.last(tensor)), reason)

    def hold_leading(self, tensor: Tensor, reason: str = "their place in a table") -> None:
        """Hold all dimensions of a parameter but the last."""
        if id(tensor) in self.parameters:
            for dim in range(tensor.ndim - 1):
                self.reasons.setdefault(self.root((id(tensor), dim)), reason)

    def features(self) -> list[Features]:
        found: dict[Place, list[tuple[str, int]]] = {}
        for place in self.parents:
            if (known := self.parameters.get(place[0])) is not None:
                found.setdefault(self.root(place), []).append((known[0], place[1]))
        result = []
        for root, members in found.items():
            names = [name for name, _ in members]
            twice = next((name for name in names if names.count(name) > 1), None)
            held = self.reasons.get(root) or (twice and f"both sides of {twice!r}")
            result.append(Features(tuple(members), held))
        return result
