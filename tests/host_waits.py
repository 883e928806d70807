"""Find where the host waits for the device, on a machine that has none.

On a CPU nothing waits, so what would is caught as it is called: methods and functions of torch
that bring a value, or a number of elements, to the host. A tensor counts as the host's own, which
may be read at any time, if it was made with ``device="cpu"`` spelled out, as the package spells it
for those alone.

What is not seen: waits inside torch's own operators (an index that is a 0-d tensor, a scalar
argument that is one), copies into a tensor of the host, and whatever is no tensor's: streams,
events, a full queue of launches, the first use of a kernel.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_sparsity

PACKAGE = Path(triton_sparsity.__file__).parent
# values
METHODS = ["item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"]
FUNCTIONS = ["equal", "allclose", "is_nonzero"]
# sizes that follow from values
SIZES = ["nonzero", "argwhere", "masked_select", "bincount", "unique", "unique_consecutive"]


class HostWaits:
    """Where our code makes the host wait, as ``file:function:call``.

    Args:
        patch: until it is undone.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: list[str] = []
        self._patch = patch
        self._host: list[Tensor] = []  # alive, so that no other tensor has their memory
        self._inside = False
        for name in METHODS:
            self._watch(torch.Tensor, name)
        for name in FUNCTIONS:
            self._watch(torch, name)
        for name in SIZES:
            self._watch(torch, name)
            if hasattr(torch.Tensor, name):
                self._watch(torch.Tensor, name)
        self._watch(torch.Tensor, "to", lambda _, *to, **__: "cpu" in to)
        self._watch(torch.Tensor, "__getitem__", lambda _, index: _has_mask(index))
        # a number is filled in where the mask is; a tensor is scattered to the places it has
        self._watch(
            torch.Tensor, "__setitem__",
            lambda _, index, value: _has_mask(index) and isinstance(value, Tensor),
        )  # fmt: skip
        for place in (torch, torch.Tensor):
            self._watch(place, "repeat_interleave", _repeats_by_tensor)
        self._watch_upload()

    def _watch(
        self, place: Any, name: str, waits: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        original = getattr(place, name)

        @functools.wraps(original)
        def watched(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside:  # of one that has been counted
                return original(tensor, *args, **kwargs)
            if waits(tensor, *args, **kwargs) and not self._is_host(tensor):
                self._note(name)
            self._inside = True
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self._inside = False

        self._patch.setattr(place, name, watched)

    def _watch_upload(self) -> None:
        original = torch.tensor

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            made = original(*args, **kwargs)
            if kwargs.get("device") == "cpu":
                self._host.append(made)
            elif kwargs.get("device") is not None:  # from memory that is not pinned
                self._note("tensor")
            return made

        self._patch.setattr(torch, "tensor", watched)

    def _is_host(self, tensor: Any) -> bool:
        if not isinstance(tensor, Tensor):
            return False
        memory = tensor.untyped_storage().data_ptr()
        return any(own.untyped_storage().data_ptr() == memory for own in self._host)

    def _note(self, call: str) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            # not the tests, nor an environment that lies in the same folder
            if any(path.is_relative_to(PACKAGE / part) for part in ("kernels", "controller")):
                self.found.append(f"{path.name}:{frame.f_code.co_name}:{call}")
                return
            frame = frame.f_back


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _repeats_by_tensor(_: Any, repeats: Any = None, *args: Any, **kwargs: Any) -> bool:
    return isinstance(repeats, Tensor) and kwargs.get("output_size") is None
