"""Which groups of a pool are pruned: those of the k lowest scores, under any pattern.

Under N:M tuples compete by what they lose, and the pruned ones keep n of m; else the groups do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bits import count_kept
from .launch import Backend
from .mask import make_mask
from .pattern import NM, Pattern, Unstructured
from .prune_rows import prune_rows
from .select import Threshold, select
from .select_each import select_each
from .semi_structured import nm_mask, nm_score


class Cut(NamedTuple):
    """A threshold found and not yet applied.

    Attributes:
        pattern: of all tensors.
        elements: what was given; under N:M scores of elements.
        scores: those of the groups, or of the tuples.
        scales: a factor of each tensor's, or None.
        threshold: of all, or one a tensor; None where every tuple is pruned or each row is a pool:
            ``whole`` masks are found.
        nonfinite: how many scores are NaN or Inf, on the device: of all, or one a tensor.
        whole: these masks.
        backend: what runs.
    """

    pattern: Pattern
    elements: list[Tensor]
    scores: list[Tensor]
    scales: Tensor | None
    threshold: Threshold | None
    nonfinite: Tensor
    whole: list[Tensor]
    backend: Backend

    def kept(self) -> list[Tensor]:
        """Return which of the scores' groups are kept: packed if unstructured, else bool."""
        assert self.threshold is not None
        return make_mask(
            self.scores,
            self.threshold,
            scales=self.scales,
            packed=isinstance(self.pattern, Unstructured),
            backend=self.backend,
        )

    def masks(self) -> list[Tensor]:
        """Return new masks, compact."""
        if self.threshold is None:
            return self.whole
        if not isinstance(self.pattern, NM):
            return self.kept()
        pairs = zip(self.elements, self.kept(), strict=True)
        return [nm_mask(t, self.pattern, whole=w, backend=self.backend).mask for t, w in pairs]

    def pruned(self) -> list[int]:
        """Count the groups, or tuples, pruned of each tensor; no row is a pool. Waits for the
        device.
        """
        groups = [scores.numel() for scores in self.scores]
        if self.threshold is None:
            rows, cols = self.pattern.group if isinstance(self.pattern, NM) else (1, 1)
            return [n // (rows * cols) for n in groups]
        return [n - kept for n, kept in zip(groups, count_kept(self.kept()), strict=True)]

    def values(self) -> list[Tensor | None]:
        """Return the threshold of each tensor, 0-d."""
        if self.threshold is None:
            return [None] * len(self.elements)
        return [*self.threshold.value.expand(len(self.elements)).unbind()]


def find_cut(
    tensors: list[Tensor],
    k: int | list[int],
    pattern: Pattern,
    scales: Tensor | None,
    backend: Backend,
    rows: bool = False,
) -> Cut:
    """Find where the ``k`` lowest groups of a pool end; at least 1.

    Args:
        tensors: scores of groups, or under N:M of elements.
        k: how many groups are pruned, or tuples; a list, where each tensor is a pool by itself,
            which no tensor under N:M is.
        rows: each row of each tensor is a pool by itself, of the tensor's share; ``k`` is a list,
            and under N:M counts tuples.
        pattern: of all tensors.
        scales: float32 ``(len(tensors),)``, a factor of each tensor's scores; None: 1.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
    """
    if rows:
        assert isinstance(k, list)
        scores = tensors
        if isinstance(pattern, NM):
            scores = [nm_score(tensor, pattern, backend=backend) for tensor in tensors]
        packed = isinstance(pattern, Unstructured)
        masks, nonfinite = prune_rows(scores, k, packed=packed, backend=backend)
        if isinstance(pattern, NM):
            pairs = zip(tensors, masks, strict=True)
            masks = [nm_mask(t, pattern, whole=w, backend=backend).mask for t, w in pairs]
        return Cut(pattern, tensors, scores, scales, None, nonfinite, masks, backend)
    if isinstance(k, list):
        each = select_each(tensors, k, scales=scales, backend=backend)
        return Cut(pattern, tensors, tensors, scales, each, each.nonfinite, [], backend)
    scores = tensors
    if isinstance(pattern, NM):
        tall, wide = pattern.group
        if k == sum(tensor.numel() // (tall * wide) for tensor in tensors):
            ends = [nm_mask(tensor, pattern, backend=backend) for tensor in tensors]
            nonfinite = torch.stack([end.nonfinite for end in ends]).sum()
            masks = [end.mask for end in ends]
            return Cut(pattern, tensors, tensors, scales, None, nonfinite, masks, backend)
        scores = [nm_score(tensor, pattern, backend=backend) for tensor in tensors]
    threshold = select(scores, k, scales=scales, backend=backend)
    return Cut(pattern, tensors, scores, scales, threshold, threshold.nonfinite, [], backend)
