"""What every launcher needs: Triton where there is one, the backend choice, index width, device.

Triton has wheels for Linux alone. Elsewhere the plain-torch backend still works, so the kernels'
files import ``triton`` and ``tl`` from here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

if TYPE_CHECKING:
    # by Triton's own types a kernel is the Python function that it looks like, which would take a
    # constexpr where a launch gives a number; of no type, kernels and their launches are left
    # alone, and what is around them is checked
    triton: Any
    HAS_TRITON = True
    INTERPRET = False

    class tl(Any):
        constexpr: TypeAlias = Any

else:
    try:
        import triton
        import triton.language as tl
    except ModuleNotFoundError:
        triton = SimpleNamespace(jit=lambda fn=None, **_: fn or (lambda fn: fn))
        tl = SimpleNamespace(int32="int32", int64="int64")
        HAS_TRITON = INTERPRET = False
    else:
        HAS_TRITON = True
        # decided when a kernel is decorated, so it cannot change after import
        INTERPRET = triton.knobs.runtime.interpret

# whether kernels take a CPU's tensors, as the interpreter's do; tests that launch them against a
# stub of the driver say so too
ON_CPU = INTERPRET

# options of a launch: a multiplication and an addition may round once; what Triton does by default
# changes with 3.10, and 3.9 warns of it
FUSED = {"enable_fp_fusion": True}

# devices that autocast knows; asked for here, as compiled code cannot ask with torch 2.11
AUTOCASTS = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "mtia")))

TILE_ELEMENTS = 2**17  # no tile has more

PLAIN = frozenset((Tensor, nn.Parameter))  # not a subclass that sees operators

Backend = Literal["auto", "triton", "torch"]


def is_plain(*tensors: Tensor) -> bool:
    """Tell that nobody needs to see an operator: no tracer, transform, mode or subclass."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and PLAIN.issuperset(map(type, tensors))
    )


def takes_kernels(device: torch.device) -> bool:
    """Tell whether kernels run on a device's tensors: a GPU's, and where ``ON_CPU`` any."""
    return device.type == "cuda" or ON_CPU


def use_triton(operation: str, backend: Backend | str, tensor: Tensor) -> bool:
    """Tell whether ``operation`` runs its Triton kernel on ``tensor``'s device.

    Args:
        operation: the public function's name, for the message.
        backend: ``"auto"`` takes Triton on a GPU (and in the interpreter), plain torch elsewhere;
            an explicit request is met or refused, never replaced.
        tensor: any tensor operand.

    Raises:
        ValueError: ``backend`` is none of the three.
        RuntimeError: ``"triton"`` is asked for where it cannot run.
    """
    available = HAS_TRITON and takes_kernels(tensor.device)
    match backend:
        case "auto":
            return available
        case "torch":
            return False
        case "triton":
            if not available:
                raise RuntimeError(
                    f"{operation}: backend='triton' needs a GPU tensor (or TRITON_INTERPRET=1), "
                    f"got one on {tensor.device}; use backend='auto' or 'torch'"
                )
            return True
        case _:
            raise ValueError(
                f"{operation}: backend must be 'auto', 'triton' or 'torch', got {backend!r}"
            )


def is_captured(tensor: Tensor) -> bool:
    """Tell whether what is launched on a tensor now goes into a CUDA graph, and runs later."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_capture(tensor: Tensor, what: str) -> None:
    """Refuse to look at ``what`` while a CUDA graph is captured, which cannot wait."""
    if is_captured(tensor):
        raise RuntimeError(
            f"{what} must be as it was last seen when a CUDA graph is captured, got one that was "
            "written since: run it once, then capture"
        )


def extent(tensor: Tensor) -> int:
    """Return one plus the largest element offset reachable from ``tensor``'s first element."""
    if tensor.is_contiguous():  # as most are, and a list may have hundreds
        return tensor.numel()
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def index_type(*tensors: Tensor) -> Any:
    """Return the narrowest Triton integer type that holds every element offset of ``tensors``.

    Offsets of a tile that begins inside a tensor and ends past it count too, or they would wrap
    around and be taken for ones inside.
    """
    return tl.int64 if any(extent(t) > 2**31 - TILE_ELEMENTS for t in tensors) else tl.int32


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make ``tensor``'s GPU current: Triton launches there, and it need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device; the host does not wait for it."""
    if device.type != "cuda":
        return host.to(device)
    # from memory that is not pinned, the copy would wait for the device
    return host.pin_memory().to(device, non_blocking=True)


def read_later(tensor: Tensor) -> Callable[[], list[Any]]:
    """Copy a tensor to the host behind the device's work; return what gives ``tensor.tolist()``.

    Called once the device was waited for anyway, that waits no more.
    """
    if not tensor.is_cuda:
        return tensor.tolist
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def read() -> list[Any]:
        copied.synchronize()
        return host.tolist()

    return read


def autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast what ``torch.nn.functional.linear`` would cast under the autocast in force, if any."""
    kind = next(t for t in tensors if t is not None).device.type
    if kind not in AUTOCASTS or not torch.is_autocast_enabled(kind):
        return list(tensors)
    to = torch.get_autocast_dtype(kind)
    return [
        t.to(to) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]
