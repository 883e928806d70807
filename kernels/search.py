"""The search for a magnitude among bit patterns: what both of its backends share.

``key = float32(|t|) * scale``. Keys that are no NaN order as their bit patterns do: 31 bits, or 15
if all tensors are of one 16-bit type and unscaled. So this is a search over integers, which
narrows a bracket of patterns until one is left.

1. A sample (everything, if that is little) is counted into bins: over all patterns and, if these
   are more than the bins, again over the bracket that this gave, k -+ six standard deviations. Of
   everything the bracket is a single pattern then, and nothing follows.
2. A full read counts the keys below the bracket, and by bin those inside. As a rule each pattern
   of the bracket has its own bin, and k's bin is the answer: one read.
3. If k turns out to lie outside the bracket (the counts of a full read are exact, so this shows)
   or in a bin of several patterns, the next full read goes on with the part that holds it.

At most two full reads for patterns of 15 bits, which have a bin each, and three for those of 31.

Reading order: the answer -> what a search works with -> samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]

# the pattern of +Inf; larger ones are NaN
INFINITY_OF = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_BINS_LOG2 = 18
BINS_SHARED = 1 << 17  # where ranks add them up: a megabyte
MOST_SAMPLED = 1 << 22  # elements


class Threshold(NamedTuple):
    """What separates the k smallest keys from the others.

    Attributes:
        value: 0-d float32, the k-th smallest key; -inf if k is 0.
        keep_ties: 0-d int64, how many of the keys equal to ``value`` are not among the k smallest.
        nonfinite: 0-d int64, how many keys are NaN or Inf; if any, the others mean nothing.
    """

    value: Tensor
    keep_ties: Tensor
    nonfinite: Tensor


def threshold_of(
    k: int, kind: torch.dtype, pattern: Tensor, keep_ties: Tensor, nonfinite: Tensor
) -> Threshold:
    """Return the answer of a search that has found the bit pattern of the k-th smallest key."""
    if k == 0:
        value = torch.full((), -torch.inf, dtype=torch.float32, device=pattern.device)
        return Threshold(value, torch.zeros_like(keep_ties), nonfinite)
    bits = pattern.to(torch.int32 if kind == torch.float32 else torch.int16)
    return Threshold(bits.view(kind).float(), keep_ties, nonfinite)


class Plan(NamedTuple):
    """What a search works with: the type whose bit patterns are compared, and what follows."""

    kind: torch.dtype
    top: int  # the end of the patterns that can be found: +Inf can, NaN cannot
    bins: int
    samples: int  # sampled passes that it takes to tell single patterns apart


def plan_of(
    tensors: Sequence[Tensor], scales: Tensor | None, reduce: Reduce | None = None
) -> Plan:
    """Return what a search over the tensors works with; ``reduce`` as ``select``'s."""
    kinds = {t.dtype for t in tensors}
    narrow = scales is None and kinds in ({torch.bfloat16}, {torch.float16})
    kind = kinds.pop() if narrow else torch.float32
    bits = 8 * kind.itemsize - 1
    samples = 1 if bits <= _BINS_LOG2 else 2
    bins = 1 << min(bits, _BINS_LOG2)
    bins = bins if reduce is None else min(bins, BINS_SHARED)
    return Plan(kind, INFINITY_OF[kind] + 1, bins, samples)


def bin_shift(width: int, bins: int) -> int:
    """Return log2 of the narrowest bins that reach across ``width`` patterns."""
    return max(0, (width - 1).bit_length() - (bins - 1).bit_length())


def rank_margin(k: int, total: int, spread: int) -> float:
    """Return six standard deviations of a sampled rank, and some for the extremes.

    Of ``total`` elements one in ``step`` was sampled; ``spread = (step - 1) * total``.
    """
    return 6 * (spread * (k / total) * (1 - k / total)) ** 0.5 + 64 * spread / total


def sample_step(total: int, least: int) -> int:
    """Return of how many elements one is sampled: of 64, within limits."""
    return max(1, total // min(max(total // 64, least), MOST_SAMPLED))


def flat_view(tensor: Tensor) -> Tensor | None:
    """Return a view of the elements in the order of memory; None if there are gaps or overlaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    dense = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return dense.view(-1) if dense.is_contiguous() else None
