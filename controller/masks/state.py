"""Masks and pruned values as plain state, checked before anything takes them over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.bits import pack, packed_shape
from ...kernels.group_mask import read_bits
from ...kernels.table import alike
from .names import match
from .weight import SparseWeight


def masks_state(weights: Sequence[SparseWeight]) -> dict[str, dict[str, Any]]:
    """Return shape, pattern, packed mask and pruned values of each weight by name; on the CPU.

    A mask has one bit a group, its rows padded to bytes. Values are those of the pruned elements,
    block by block, in row-major order; of fine patterns a tensor of the weight's matrix, zero
    where it is kept; None where none are retained.
    """
    return {
        weight.name: {
            "shape": list(weight.weight_shape),
            "pattern": str(weight.pattern),
            "mask": pack(weight.kept_grid()).cpu(),
            # those kept for good, not until training begins
            "values": None
            if weight.values is None or not weight.keeps_values
            else weight.values.to("cpu", copy=True),
        }
        for weight in weights
    }


def names_in(state: Any) -> list[str]:
    """Return the names of the weights of a controller's state; none of what is no such state."""
    weights = state.get("weights") if isinstance(state, Mapping) else None
    return list(weights) if isinstance(weights, Mapping) else []


def with_names_of(weights: Sequence[SparseWeight], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a controller's state with the weights called as they are here; a state made on
    a wrapper of the model becomes one of the model, and the other way round. A ValueError refuses
    that of another model.
    """
    saved = state.get("weights")
    names = [weight.name for weight in weights]
    there = set(saved) if isinstance(saved, Mapping) else set()
    found = match(names, there)
    if found is None or len(found) != len(there):
        raise ValueError(
            "load_state: state is of another model; "
            f"without a mask there: {sorted(set(names) - there)}, "
            f"unknown here: {sorted(there - set(names))}"
        )
    return _renamed(state, {there: here for here, there in found.items()})


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {
        names.get(key, key): _renamed(value, names) if isinstance(value, Mapping) else value
        for key, value in state.items()
    }


# ``set_masks``'s arguments, for the weights of one device
Masks = tuple[list[SparseWeight], list[Tensor], list[list[int]]]


def read_masks(
    state: Mapping[str, Mapping[str, Any]], weights: Sequence[SparseWeight]
) -> tuple[list[Masks], list[Tensor | None]]:
    """Return ``masks_state``'s masks, and of each weight its pruned values.

    On the weights' devices, each of which is waited for once; values are copies, in the weights'
    dtype. A ValueError refuses a state of another pattern, or damaged.
    """
    bits = [_read_bits(weight, state[weight.name]) for weight in weights]
    found: list[Masks] = []
    pruned: dict[SparseWeight, int] = {}
    for places in alike(weight.follow().device for weight in weights).values():
        own = [weights[place] for place in places]
        masks, counts, fit = read_bits(own, [bits[place] for place in places])
        for weight, (_, elements), fits in zip(own, counts, fit, strict=True):
            if not fits:
                raise ValueError(
                    f"load_state: mask of {weight.name!r} must be {weight.pattern}, got another"
                )
            pruned[weight] = math.prod(weight.shape) - elements
        found.append((own, masks, counts))
    return found, [_read_values(state[w.name].get("values"), pruned[w], w) for w in weights]


def _read_bits(weight: SparseWeight, saved: Any) -> Tensor:
    name = weight.name
    if not isinstance(saved, Mapping):
        raise ValueError(f"load_state: {name!r} must have a mapping, got {saved!r}")
    wanted = {"shape": list(weight.weight_shape), "pattern": str(weight.pattern)}
    for key, here in wanted.items():
        if saved.get(key) != here:
            raise ValueError(f"load_state: {key} of {name!r} must be {here}, got {saved.get(key)}")
    mask, shape = saved.get("mask"), packed_shape(weight.grid)
    if not isinstance(mask, Tensor) or mask.shape != shape or mask.dtype != torch.uint8:
        raise ValueError(f"load_state: mask of {name!r} must be packed bits, uint8 {shape}")
    return mask


def _read_values(values: Any, pruned: int, weight: SparseWeight) -> Tensor | None:
    if values is None:
        return None
    shape = weight.shape if weight.packed else (pruned,)
    if not isinstance(values, Tensor) or values.shape != shape or not values.is_floating_point():
        raise ValueError(
            f"load_state: values of {weight.name!r} must be the pruned elements, float {shape}"
        )
    return values.to(weight.mask.device, weight.weight.dtype, copy=True)
