"""PEFT: LoRA adapters that leave a sparse weight sparse when they are merged.

PEFT asks an adapter's *variant* for the layer's output, and for the merged and the unmerged weight
(DoRA is one). ``mask_adapters`` gives the adapters of masked weights a variant of their own: no
class and no method is replaced, and with the adapter PEFT drops its variant. PEFT itself is not
imported: a model that has adapters has imported it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ...kernels.bits import pack
from ...kernels.masked_weight import apply_mask
from ...kernels.pattern import Unstructured
from ..algorithms.base import BaseSparsityAlgoController
from ..masks.linear import is_tuner_layer
from ..masks.weight import SparseWeight


def mask_adapters(model: nn.Module, controller: BaseSparsityAlgoController) -> list[str]:
    """Mask what LoRA adapters add to the weights that ``controller`` masks, while they train.

    A weight W under a mask M with adapters A, B of scale s counts as ``W + M * (s B A)``. Merged,
    by ``merge_adapter()`` or ``merge_and_unload()``, it is zero wherever the mask prunes, and the
    outputs are the same to rounding. The mask is read at each forward pass, so that it may change
    while adapters train; not between a merge and its unmerge. Adapters of weights without a mask
    are left alone. Call it again after adding an adapter.

    It holds until the adapter is merged and unloaded, or deleted; stripping the model leaves it,
    as outputs must stay. A copy of the model keeps the masks of its time; a pickle of one whose
    adapters are not merged needs this package. ``save_pretrained`` writes A and B: for another
    process merge first, or there too load the sparse model, create a controller of it with
    ``ConstSparsityConfig()``, and call this.

    An adapter costs the products of a layer that is trained whole, output and both gradients,
    which skip pruned blocks where the layer's do (DoRA's output once more, in the backward pass),
    and B times A. In memory it is a matrix of the weight's shape and dtype while the forward pass
    is in the layer, two while the backward pass is, and nothing in between or for the optimiser.
    PEFT's own DoRA, not masked, gives NaN where a whole row of the weight is pruned.

    Args:
        model: has adapters of PEFT: LoRA on linear, Conv1D, embedding or ungrouped convolution
            layers, or on experts' parameters, or DoRA on linear layers. IA3 only scales, and
            needs no mask.
        controller: of this model; it may have been stripped since.

    Returns:
        The names of the masked weights that have adapters, which a merge leaves sparse now.

    Raises:
        TypeError: ``controller`` is none.
        ValueError: the model has no adapters, or none on weights of this controller; one that is
            merged; one of another kind on a masked weight. No adapter is masked then.
    """
    if not isinstance(controller, BaseSparsityAlgoController):
        raise TypeError(
            "mask_adapters: controller must be what create_controller returned, got "
            f"{controller!r}"
        )
    layers: list[tuple[str, Any]]
    layers = [(p, m) for p, m in model.named_modules() if is_tuner_layer(type(m))]
    if not layers:
        raise ValueError(
            f"mask_adapters: model must have adapters, got a {type(model).__name__} without any; "
            "call get_peft_model of PEFT (triton-sparsity[peft]) first"
        )
    weights: dict[int, dict[str, SparseWeight]] = {}
    for info in controller.sparsified_module_info:
        for module, name in info.places:
            weights.setdefault(id(module), {})[name] = info.operand
    names: list[str] = []
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []  # what goes where
    for path, layer in layers:
        inside = [weights.get(id(module), {}) for module in layer.get_base_layer().modules()]
        own = {key: w for members in inside for key, w in members.items() if key != "bias"}
        parameter = getattr(layer, "parameter_name", None)
        if parameter is not None:  # of experts: one wrapper each
            own = {key: weight for key, weight in own.items() if key == parameter}
        names += [weight.name for weight in own.values()]
        if not own or type(layer).__module__.startswith("peft.tuners.ia3."):
            continue
        _check_layer(path, layer)
        if parameter is None:
            variants = {name: _masked(path, layer, name, inside[0]) for name in layer.scaling}
            found.append((layer.lora_variant, variants))
        else:
            found.append((layer.__dict__, _masked_parameter(path, layer, own[parameter])))
    if not names:
        raise ValueError(
            "mask_adapters: model must have adapters on weights under the controller's masks, got "
            f"a {type(model).__name__} without: it is another model, or the adapters are on "
            "other layers"
        )
    for place, parts in found:
        place.update(parts)
    return list(dict.fromkeys(names))


_KINDS = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper")


def _check_layer(path: str, layer: Any) -> None:
    kind = type(layer)
    what = f"mask_adapters: the adapter of {path!r} must be"
    if kind.__module__ != "peft.tuners.lora.layer" or kind.__name__ not in _KINDS:
        raise ValueError(
            f"{what} LoRA on a linear, embedding or convolution layer, got {kind.__module__}."
            f"{kind.__name__}, which a mask cannot follow; adapt this layer by LoRA, or leave it "
            "out of the masks by ignored_scopes"
        )
    if not hasattr(layer, "lora_variant"):
        raise ValueError(f"{what} of PEFT 0.16 or later, got one without lora_variant")
    if layer.merged_adapters:
        raise ValueError(
            f"{what} unmerged, got {layer.merged_adapters} merged; call unmerge_adapter() first"
        )
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        raise ValueError(
            f"{what} on a convolution of one group, as PEFT cannot merge others, got "
            f"groups={layer.get_base_layer().groups}"
        )


def _masked(path: str, layer: Any, adapter: str, weights: dict[str, SparseWeight]) -> MaskedLora:
    if "bias" in weights and layer.lora_bias.get(adapter):
        raise ValueError(
            f"mask_adapters: adapter {adapter!r} of {path!r} must have no lora_bias, as the "
            "layer's bias is under a mask too"
        )
    dora = layer.lora_variant.get(adapter)
    if isinstance(dora, MaskedLora):
        dora = dora.dora
    if dora is not None and type(dora).__name__ != "DoraLinearVariant":
        raise ValueError(
            f"mask_adapters: adapter {adapter!r} of {path!r} must be plain LoRA, or DoRA on a "
            f"linear layer, got {type(dora).__name__}; leave the layer out of the masks by "
            "ignored_scopes, or adapt it by LoRA"
        )
    return MaskedLora(weights["weight"], dora)


def _masked_parameter(path: str, layer: Any, weight: SparseWeight) -> dict[str, Any]:
    if not hasattr(layer, "_activate_lora"):
        raise ValueError(
            f"mask_adapters: the adapter of {path!r} must be of a PEFT whose wrapper of a "
            "parameter is known here, got another; leave it out of the masks by ignored_scopes"
        )
    if not weight.holds_zeros:
        raise ValueError(
            f"mask_adapters: the mask of {weight.name!r} must not be learned, as its adapter of "
            f"{path!r} hides the scores; freeze it before, or leave it out by ignored_scopes"
        )
    return MaskedParameter(layer, weight).methods()


@dataclass(frozen=True)
class CopiedMask:
    """The mask of a model that no controller has: of a copy.

    Attributes:
        bits: packed, uint8; a row for each of the weight's first dimension.
        transposed: the weight is stored ``(in, out)``.
    """

    bits: Tensor
    transposed: bool
    product = None

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.transposed else tensor.flatten(1)

    def masked(self, tensor: Tensor) -> Tensor:
        rows = tensor.flatten(1)
        return apply_mask(rows, self.bits.to(rows.device), Unstructured()).view_as(tensor)


def _copied(mask: SparseWeight | CopiedMask) -> CopiedMask:
    if isinstance(mask, CopiedMask):
        return mask
    mask.settle()
    return CopiedMask(pack(mask.binary_mask.flatten(1)), mask.transposed)


class MaskedLora:
    """A variant of LoRA as PEFT has them, whose product is masked as ``weight`` is.

    Args:
        weight: the layer's.
        dora: PEFT's own variant, if the adapter is DoRA.
    """

    def __init__(self, weight: SparseWeight | CopiedMask, dora: Any = None) -> None:
        self.weight = weight
        self.dora = dora

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskedLora, (_copied(self.weight), self.dora)

    def get_delta_weight(self, module: Any, adapter: str) -> Tensor:
        """Return what the adapter adds to the weight, of its shape and dtype; differentiable."""
        parameter = module.get_base_layer()._parameters["weight"]
        assert parameter is not None
        return self.weight.masked(module.get_delta_weight(adapter).to(parameter.dtype))

    # what PEFT calls

    def init(self, module: Any, adapter_name: str, **options: Any) -> None:
        if self.dora is not None:
            self.dora.init(module, adapter_name=adapter_name, **options)

    def supports_lora_conversion(self) -> bool:
        return False  # a masked product is not of low rank

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        same = True  # x is the input that gave the result
        if not isinstance(module.get_base_layer(), nn.Embedding):
            dropout = module.lora_dropout[active_adapter]
            same = isinstance(dropout, nn.Identity) or not module.training
            x = dropout(x)
        # the matrix that is added is made anew in the backward pass, from A and B
        own = self._add if self.dora is None else self._add_dora
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(own, module, active_adapter, x, result, same, **options)

    def _add(self, module: Any, adapter: str, x: Tensor, result: Tensor, _: bool) -> Tensor:
        base: Any = module.get_base_layer()
        delta = self.get_delta_weight(module, adapter)
        if isinstance(base, nn.Embedding):
            found = functional.embedding(x, delta, base.padding_idx)
            scale = getattr(module, "_get_embed_scale", lambda: None)()
            return result + (found if scale is None else found * scale.to(found.dtype))
        bias = module.lora_B[adapter].bias
        if bias is not None:
            bias = (bias * module.scaling[adapter]).to(delta.dtype)
        if isinstance(base, _ConvNd):
            return result + base._conv_forward(x.to(delta.dtype), delta, bias)  # pyright: ignore[reportAttributeAccessIssue]
        return result + self._linear(x.to(delta.dtype), delta, bias)

    def _linear(self, x: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
        matrix, product = self.weight.matrix(delta), self.weight.product
        if product is not None and (torch.compiler.is_compiling() or product.skips(delta)):
            return product(x, matrix, bias)
        return functional.linear(x, matrix, bias)

    def _add_dora(
        self, module: Any, adapter: str, x: Tensor, result: Tensor, same: bool
    ) -> Tensor:
        base: Any = module.get_base_layer()
        delta, weight = self.get_delta_weight(module, adapter), base.weight
        factor = self._factor(module, adapter, weight, delta)
        x = x.to(delta.dtype)
        if same:
            plain = result if base.bias is None else result - base.bias
        else:
            plain = functional.linear(x, self.weight.matrix(weight))
        return result + (factor - 1) * plain + factor * self._linear(x, delta)

    def _factor(self, module: Any, adapter: str, weight: Tensor, delta: Tensor) -> Tensor:
        """Return what DoRA scales each row by: its magnitude over its norm, which is no part of
        the gradient. A row that is pruned as a whole has no norm, and stays zero.
        """
        rows = self.weight.matrix((weight + delta).detach())
        # half precision would overflow
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        magnitude = module.lora_magnitude_vector[adapter].weight
        factor = magnitude / torch.where(norm > 0, norm, 1)
        return torch.where(norm > 0, factor, 1)

    def _scale(self, weight: Tensor, factor: Tensor) -> Tensor:
        scaled = weight * (factor if self.weight.transposed else factor[:, None])
        return scaled.to(weight.dtype)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = self.get_delta_weight(module, active_adapter)
        if self.dora is None:
            return orig_weight + delta
        # adapters that are merged already are no part of the norm, as in the forward pass
        unmerged = getattr(module, "_unmerged_base_weight", lambda: nullcontext(orig_weight))
        with unmerged() as weight:
            factor = self._factor(module, active_adapter, weight, delta)
        module._cache_store(f"{active_adapter}-masked", factor)
        return self._scale(orig_weight + delta, factor)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(self.merge_safe(module, active_adapter, orig_weight.data))

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        weight = orig_weight.data
        if self.dora is not None:
            weight = self._scale(weight, 1 / module._cache_pop(f"{active_adapter}-masked"))
        return weight - self.get_delta_weight(module, active_adapter)


class MaskedParameter:
    """Takes part in PEFT's wrapper of a parameter, such as experts', which knows no variants.

    Args:
        layer: the wrapper.
        weight: its parameter's mask.
    """

    def __init__(self, layer: Any, weight: SparseWeight | CopiedMask) -> None:
        self.layer = layer
        self.weight = weight

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskedParameter, (self.layer, _copied(self.weight))

    def methods(self) -> dict[str, Any]:
        """Return what the wrapper calls in place of its class's own methods."""
        return {"get_delta_weight": self.get_delta_weight, "_activate_lora": self.activate}

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        return self.weight.masked(type(self.layer).get_delta_weight(self.layer, adapter_name))

    @contextmanager
    def activate(self, active_adapters: Sequence[str]) -> Iterator[None]:
        """Let the parameter read as the sum while the context is open."""
        adapters = [name for name in active_adapters if name in self.layer.lora_A]
        if not adapters:
            yield
            return
        base, name = self.layer.get_base_layer(), self.layer.parameter_name
        requires_grad = base._parameters[name].requires_grad
        # before the parameter goes: its mask is found by it
        plus = _Plus(sum(self.get_delta_weight(adapter) for adapter in adapters))
        parametrize.register_parametrization(base, name, plus)
        base.parametrizations[name].original.requires_grad_(requires_grad)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(base, name, leave_parametrized=False)


class _Plus(nn.Module):
    def __init__(self, delta: Any) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta
