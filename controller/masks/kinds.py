"""Kinds of weights: which parameters a module multiplies by, how they lie, where in the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .linear import conv1d_of, is_tuner_layer

_LINEAR = (nn.Linear, nn.Bilinear)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_MIXES_TOKENS = re.compile("Attention|Attn|Mixer|SSM")


def may_be_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and parameter of what may be a weight: two dimensions or more, no bias, no norm.

    A ValueError refuses a parameter that is not initialised.
    """
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"create_controller: {type(module).__name__} holds an uninitialised {name!r}; "
                "run the lazy module once first"
            )
        if parameter.ndim >= 2 and "bias" not in name and not isinstance(module, _NORMS):
            yield name, parameter


def is_linear(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter is the weight of a linear map: attention's and experts' too."""
    return (
        ((isinstance(module, _LINEAR) or conv1d_of(type(module)) is not None) and name == "weight")
        or (isinstance(module, nn.MultiheadAttention) and name in _ATTENTION_WEIGHTS)
        or holds_experts(module, parameter)
    )


def is_known(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter is a weight by its module's kind."""
    return (
        is_linear(module, name, parameter)
        or (isinstance(module, (_ConvNd, *_EMBEDDINGS)) and name == "weight")
        or (isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name.startswith("weight_"))
    )


def holds_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Tell whether a parameter is one matrix an expert, by its class: ``MixtralExperts``."""
    return parameter.ndim == 3 and "Experts" in type(module).__name__


def is_transposed(module: nn.Module, parameter: Tensor) -> bool:
    """Tell whether a weight, or each expert's, is stored ``(in_features, out_features)``."""
    if not holds_experts(module, parameter):
        return conv1d_of(type(module)) is not None
    declared = getattr(module, "is_transposed", None)  # what Hugging Face's grouped products go by
    if isinstance(declared, bool):
        return declared
    up: Any = module._parameters.get("gate_up_proj")
    down: Any = module._parameters.get("down_proj")
    if up is None or down is None or up.ndim != 3 or down.ndim != 3:
        return False
    as_in_out = up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]
    as_out_in = up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1]
    return as_in_out and not as_out_in


def transformer_blocks(model: nn.Module) -> list[str]:
    """List the paths of the model's transformer blocks: items of one class in a list, each with a
    module that mixes tokens (by its name: attention, a state-space mixer), or ``torch.nn``'s.
    """
    blocks = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            blocks.append(path)
        elif isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            alike = len({type(child) for child in module}) == 1
            if alike and all(map(_mixes_tokens, module)):
                blocks += [f"{path}.{name}" if path else name for name in module._modules]
    return blocks


def _mixes_tokens(module: nn.Module) -> bool:
    return any(_MIXES_TOKENS.search(type(m).__name__) for m in module.modules())


# PEFT's models, and by what name each holds the model that it adapts
_WRAPPERS = {"PeftModel": "base_model", "BaseTuner": "model"}


def adapters(model: nn.Module) -> dict[str, str]:
    """Return path and holder of what PEFT puts beside a layer, or beside a model: soft prompts,
    banks that layers share. By name: PEFT may be missing.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        names = {base.__name__ for base in type(module).__mro__}
        if is_tuner_layer(type(module)):
            inside = {*module._modules, *module._parameters} - {"base_layer"}
        elif "AuxiliaryTrainingWrapper" in names:
            inside = set(module._modules)
        elif wrapper := names & set(_WRAPPERS):
            inside = _beside(module, _WRAPPERS[wrapper.pop()])
        else:
            continue
        found |= {f"{path}.{name}" if path else name: path for name in inside}
    return found


def _beside(wrapper: nn.Module, adapted: str) -> set[str]:
    """Name what a wrapper holds that is no part of the model that it adapts."""
    model = wrapper._modules.get(adapted)
    own = set() if model is None else {id(module) for module in model.modules()}
    return {name for name, child in wrapper._modules.items() if id(child) not in own}
