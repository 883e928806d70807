"""Modules whose class a mask has changed, in place: a copy or a pickle is of the class before."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, ClassVar

from torch import nn


class MaskedModule(nn.Module):
    """Base of the classes that take a module's place, each a subclass of the module's own:
    parameters, hooks, state-dict keys and ``isinstance`` stay as they were.
    """

    dense_class: ClassVar[type[nn.Module]]

    def _state_of_copy(self) -> dict[str, Any]:
        """Return the attributes that a module of the original class has."""
        return dict(self.__getstate__())  # pyright: ignore[reportArgumentType, reportCallIssue]

    # such classes are made at run time, where pickle cannot find them by name; nor need it
    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (original_class(type(self)),), self._state_of_copy()


def original_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before any mask."""
    while issubclass(kind, MaskedModule):
        kind = kind.dense_class
    return kind


def unsharded_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that ``fully_shard`` has made another one of."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharding = fsdp is not None and fsdp.FSDPModule in kind.__bases__
    return kind.__bases__[1] if sharding else kind


def compiled_parts(model: nn.Module) -> set[nn.Module]:
    """Return the modules of which compiled code runs the forward: those that were compiled by
    themselves, or their forward, and all inside them.
    """
    whole = [
        module
        for module in model.modules()
        if module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    ]
    return {part for module in whole for part in module.modules()}


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, in place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        kind = _sharding(fsdp.FSDPModule, kind)
    # the checker takes an instance's class for fixed
    object.__setattr__(module, "__class__", kind)


@cache
def _sharding(base: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """Return what ``fully_shard`` makes of a class: a module that it has sharded is still so."""
    return type(f"FSDP{kind.__name__}", (base, kind), {})
