"""Exact selection: the k-th smallest magnitude of a list of tensors, without sorting or joining.

How it is found is in ``search.py``; by Triton's kernels, ``search_triton.py``, or by plain torch,
``search_torch.py``.

Reading order: reference -> operator -> public functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .grid import ceil_div
from .launch import Backend, is_plain, use_triton
from .search import INFINITY_OF, Reduce, Threshold
from .search_torch import Among, select_torch
from .search_triton import select_triton


def select_reference(tensors: Sequence[Tensor], k: int, scales: Tensor | None = None) -> Threshold:
    """Define the semantics: plain torch, any device, on data small enough to join and sort."""
    keys = torch.cat([t.detach().abs().float().flatten() for t in tensors])
    if scales is not None:
        keys *= scales.repeat_interleave(
            torch.tensor([t.numel() for t in tensors], device=scales.device)
        )
    value = keys.sort().values[k - 1] if k else keys.new_tensor(-torch.inf)
    return Threshold(value, (keys <= value).sum() - k, (~keys.isfinite()).sum())


def _runs_triton(tensors: Sequence[Tensor], backend: Backend) -> bool:
    wide = any(t.dtype == torch.float64 for t in tensors)
    if wide and backend == "triton":
        raise ValueError(
            "select: tensors must be of 16 or 32 bits for backend='triton', got float64"
        )
    return use_triton("select", backend, tensors[0]) and not wide


@torch.library.custom_op("triton_sparsity::select", mutates_args=())
def _op(tensors: list[Tensor], k: int, scales: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    implementation = select_triton if _runs_triton(tensors, "auto") else select_torch
    value, keep_ties, nonfinite = implementation(tensors, k, scales)
    return value, keep_ties, nonfinite


@_op.register_fake
def _(tensors: list[Tensor], k: int, scales: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    first = tensors[0]
    value = first.new_empty((), dtype=torch.float32)
    return value, first.new_empty((), dtype=torch.int64), first.new_empty((), dtype=torch.int64)


def select(
    tensors: Sequence[Tensor],
    k: int,
    *,
    scales: Tensor | None = None,
    reduce: Reduce | None = None,
    backend: Backend = "auto",
) -> Threshold:
    """Return the exact k-th smallest of ``float32(|t|) * scale`` over all elements of all tensors.

    Args:
        tensors: of one device, any shapes and strides, float32, bfloat16 or float16 (float64 is
            rounded to float32, without Triton). Empty ones are fine. A tensor whose elements leave
            gaps in memory is copied: by Triton's backend as a whole, else by a few rows at a time.
        k: from 0 to the number of elements.
        scales: float32 ``(len(tensors),)``, on the same device, finite and not negative.
        reduce: makes this one selection over the tensors of several ranks: it gets an int64 vector
            and returns the sum of all ranks' vectors, on the same device. ``k`` then counts in
            the elements of all, and all return the same. The ranks must agree on the set of
            dtypes, on whether there are ``scales``, and on the backend; Triton's, which never
            learns how many elements there are, returns NaN for a ``k`` beyond them.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, which counts in the host's memory.

    Returns:
        ``Threshold`` on the tensors' device, bit-equal on every run and backend. Triton's backend
        does not wait for the device, but it cannot be captured in a CUDA graph: the addresses
        are copied from the host.

    Raises:
        ValueError: an argument is not as above.
    """
    if not tensors:
        raise ValueError("select: tensors must be at least one tensor, got none")
    device = tensors[0].device
    for t in tensors:
        if t.dtype not in (*INFINITY_OF, torch.float64):
            kinds = "float32, bfloat16, float16 or float64"
            raise ValueError(f"select: tensors must be {kinds}, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"select: tensors must be on one device, got {device} and {t.device}")
    if scales is not None and (
        scales.shape != (len(tensors),) or scales.dtype != torch.float32 or scales.device != device
    ):
        raise ValueError(
            f"select: scales must be float32 ({len(tensors)},) on {device}, "
            f"got {scales.dtype} {tuple(scales.shape)} on {scales.device}"
        )
    total = sum(t.numel() for t in tensors)
    if k < 0 or (reduce is None and k > total):
        raise ValueError(f"select: k must be from 0 to {total} elements, got {k}")

    runs_triton = _runs_triton(tensors, backend)
    tensors = [t.detach() for t in tensors]
    scales = None if scales is None else scales.detach()
    if reduce is None and backend == "auto" and not is_plain(*tensors):
        return Threshold(*_op(tensors, k, scales))
    return (select_triton if runs_triton else select_torch)(tensors, k, scales, reduce)


def select_among(scores: Tensor, k: int, among: Among) -> Threshold:
    """Return the exact k-th smallest |score| of some elements of a matrix, by plain torch: of a
    float dtype, any strides, with no copy but of a piece at a time.
    """
    return select_torch([scores.detach()], k, None, among=among)


def kth_smallest(
    tensors: Sequence[Tensor],
    k: int,
    backend: Backend,
    shares: Sequence[int] | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Return the k-th smallest of signed values.

    Args:
        tensors: of the values.
        k: from 1.
        backend: as ``select``'s.
        shares: how often each value of a tensor counts; None: once.
        reduce: as ``select``'s.
    """
    shares = [1] * len(tensors) if shares is None else shares
    unit = math.gcd(*shares)
    times = [share // unit for share in shares]
    k = ceil_div(k, unit)
    size = sum(tensor.numel() * n for tensor, n in zip(tensors, times, strict=True))
    if reduce is not None:
        size = int(reduce(torch.tensor([size], device=tensors[0].device)))

    def counted(limits: dict[str, int]) -> list[Tensor]:
        clamped = [tensor.clamp(**limits).flatten() for tensor in tensors]
        return [t.expand(n, -1) for t, n in zip(clamped, times, strict=True)]

    # one of the two magnitudes is 0, or both are
    above = select(counted({"min": 0}), k, reduce=reduce, backend=backend)
    below = select(counted({"max": 0}), size - k + 1, reduce=reduce, backend=backend)
    return above.value - below.value
