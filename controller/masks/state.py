"""Masks and pruned values as plain state, checked before anything takes them over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.bits import pack, packed_shape, unpack
from ...kernels.group_mask import GroupMask, put_back_all_, read_bits, take_all_
from ...kernels.pattern import Pattern
from ...kernels.table import alike
from .exchange import full_grid, full_matrix
from .names import match
from .schema import FLOATS, NAMES, Schema, check, exactly, optional, tensor
from .shards import local_grid
from .weight import SparseWeight


def masks_state(weights: Sequence[SparseWeight]) -> dict[str, dict[str, Any]]:
    """Return shape, pattern, packed mask and pruned values of each weight by name; on the CPU.

    A mask has one bit a group, its rows padded to bytes. Values are those of the pruned elements,
    block by block, in row-major order; of fine patterns a tensor of the weight's matrix, zero
    where it is kept; None where none are retained. Of sharded weights they are the full
    ones, gathered weight by weight: every rank must take part.
    """
    return {
        weight.name: {
            "shape": list(weight.weight_shape),
            "pattern": str(weight.pattern),
            "mask": pack(full_grid(weight)).cpu(),
            # those kept for good, not until training begins
            "values": None
            if weight.values is None or not weight.keeps_values
            else _full_values(weight, weight.values),
        }
        for weight in weights
    }


def _full_values(weight: SparseWeight, values: Tensor) -> Tensor:
    shard = weight.shard
    if shard is None:
        return values.to("cpu", copy=True)
    if weight.packed:
        return full_matrix(weight, values).cpu()
    dense = values.new_zeros(weight.shape)
    put_back_all_([weight], [dense], [values])
    return _taken(full_matrix(weight, dense).cpu(), shard.pattern, full_grid(weight).cpu())


def _taken(dense: Tensor, pattern: Pattern, grid: Tensor) -> Tensor:
    """Return the elements of a matrix that a bool grid prunes, as they are kept."""
    rows, cols = dense.shape
    mask = GroupMask(pattern, (rows, cols), dense.dtype, dense.device)
    mask.set_grid(grid)
    return take_all_([mask], [dense], [None])[0]


def masks_schema(weights: Sequence[SparseWeight]) -> Schema:
    """Say what ``masks_state``'s result must hold. How many values there are the mask says."""
    return {
        weight.name: {
            "shape": exactly(list(weight.weight_shape)),
            "pattern": exactly(str(weight.pattern)),
            "mask": tensor([packed_shape(weight.full_grid)], [torch.uint8]),
            "values": optional(tensor([weight.full_shape if weight.packed else (None,)], FLOATS)),
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
    check(saved, NAMES, "state['weights']")
    names = [weight.name for weight in weights]
    there: set[str] = set(saved)  # pyright: ignore[reportArgumentType]
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
    """Return ``masks_state``'s masks, and of each weight its pruned values; of a state that is as
    ``masks_schema`` says.

    On the weights' devices, each of which is waited for once; values are copies, in the weights'
    dtype. A ValueError refuses masks that a pattern does not allow, and values that do not fit.
    """
    bits = [state[weight.name]["mask"] for weight in weights]
    found: list[Masks] = []
    pruned: dict[SparseWeight, int] = {}
    for places in alike(weight.follow().device for weight in weights).values():
        own = [weights[place] for place in places]
        here = [
            b if w.shard is None else pack(w.local_grid(unpack(b, w.full_grid[1])))
            for w, b in ((weights[place], bits[place]) for place in places)
        ]
        masks, counts, fit = read_bits(own, here)
        for weight, (_, elements), fits in zip(own, counts, fit, strict=True):
            if not fits:
                raise ValueError(
                    f"load_state: mask of {weight.name!r} must be {weight.pattern}, got another"
                )
            pruned[weight] = math.prod(weight.shape) - elements
        found.append((own, masks, counts))
    return found, [_read_values(state[w.name], pruned[w], w) for w in weights]


def _read_values(saved: Mapping[str, Any], pruned: int, weight: SparseWeight) -> Tensor | None:
    values: Tensor | None = saved["values"]
    if values is None:
        return None
    shard, grid = weight.shard, unpack(saved["mask"], weight.full_grid[1])
    full = GroupMask(weight.pattern, weight.full_shape, values.dtype, values.device)
    if shard is not None:
        full.set_grid(grid)
        pruned = full.pruned_elements()
    if not weight.packed and len(values) != pruned:
        raise ValueError(
            f"load_state: values of {weight.name!r} must be the {pruned} pruned elements, got "
            f"{len(values)}"
        )
    if shard is not None and weight.packed:
        values = values[shard.here]
    elif shard is not None:
        dense = values.new_zeros(weight.full_shape)
        put_back_all_([full], [dense], [values])
        values = _taken(dense[shard.here], shard.own_pattern, local_grid(shard, grid))
    found = values.to(weight.mask.device, weight.weight.dtype, copy=True)
    if found.dtype != values.dtype and not found.isfinite().all():
        raise ValueError(
            f"load_state: values of {weight.name!r} must be in the range of {found.dtype}, got "
            f"{float(values.abs().max()):g}"
        )
    return found
