"""Which groups of a pool are pruned: those of the k lowest scores, under any pattern.

Under N:M tuples compete by what they lose, and the pruned ones keep n of m; else the groups do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import count_kept, pack
from .launch import Backend
from .mask import make_mask
from .pattern import NM, Pattern, Unstructured
from .prune_rows import Part, prune_rows
from .search import Reduce, Threshold
from .select import select
from .select_each import select_each
from .semi_structured import nm_mask, nm_score
from .spread import select_spread, ties_kept
from .spread_rows import prune_rows_spread


class Others(NamedTuple):
    """How a cut goes through tensors of which other ranks have further parts.

    Attributes:
        reduce: adds up int64 over the ranks.
        counted: of each tensor, whether this rank's part counts; else it is another's copy.
        places: of each tensor which rows and which columns of all its groups are here.
        edges: of each the first column of groups of each part, and behind them how many there are.
    """

    reduce: Reduce
    counted: list[bool]
    places: list[tuple[Part, Part]]
    edges: list[tuple[int, ...]]


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
        others: other ranks that have parts of the tensors, or None.
    """

    pattern: Pattern
    elements: list[Tensor]
    scores: list[Tensor]
    scales: Tensor | None
    threshold: Threshold | None
    nonfinite: Tensor
    whole: list[Tensor]
    backend: Backend
    others: Others | None = None

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
            pruned = [n // (rows * cols) for n in groups]
        else:
            pruned = [n - kept for n, kept in zip(groups, count_kept(self.kept()), strict=True)]
        return pruned if self.others is None else _of_all(pruned, self.nonfinite, self.others)

    def finite(self, i: int) -> bool:
        """Tell whether what is compared of tensor ``i`` is finite. Waits for the device."""
        keys = self.scores[i]
        if isinstance(self.pattern, NM) and self.threshold is None:
            keys = nm_score(self.elements[i], self.pattern, backend=self.backend)
        keys = keys.float()
        return bool((keys if self.scales is None else keys * self.scales[i]).isfinite().all())

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
    others: Others | None = None,
) -> Cut:
    """Find where the ``k`` lowest groups of a pool end; at least 1.

    Args:
        tensors: scores of groups, or under N:M of elements.
        k: how many groups are pruned, or tuples; a list, where each tensor is a pool by itself,
            which no tensor under N:M is that is all here.
        rows: each row of each tensor is a pool by itself, of the tensor's share; ``k`` is a list,
            and under N:M counts tuples.
        pattern: of all tensors.
        scales: float32 ``(len(tensors),)``, a factor of each tensor's scores; None: 1.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        others: other ranks that have parts of the tensors; ``k`` counts in all.
    """
    if others is not None and not rows:
        return _find_among(tensors, k, pattern, scales, backend, others)
    if rows:
        assert isinstance(k, list)
        scores = tensors
        if isinstance(pattern, NM):
            scores = [nm_score(tensor, pattern, backend=backend) for tensor in tensors]
        packed = isinstance(pattern, Unstructured)
        if others is None:
            masks, nonfinite = prune_rows(scores, k, packed=packed, backend=backend)
        else:
            masks, nonfinite = _rows_among(scores, k, packed, backend, others)
        if isinstance(pattern, NM):
            pairs = zip(tensors, masks, strict=True)
            masks = [nm_mask(t, pattern, whole=w, backend=backend).mask for t, w in pairs]
        return Cut(pattern, tensors, scores, scales, None, nonfinite, masks, backend, others)
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


def _find_among(
    tensors: list[Tensor],
    k: int | list[int],
    pattern: Pattern,
    scales: Tensor | None,
    backend: Backend,
    others: Others,
) -> Cut:
    scores = tensors
    if isinstance(pattern, NM):
        rows, cols = pattern.group
        every = [down.rows * across.rows for down, across in others.places]
        if k == (sum(every) if isinstance(k, int) else every):
            tuples = sum(tensor.numel() // (rows * cols) for tensor in tensors)
            whole = find_cut(tensors, tuples, pattern, scales, backend)
            counted = [int(end) for end in others.counted]
            bad = [nm_mask(t, pattern, backend=backend).nonfinite for t in tensors]
            bad = others.reduce(torch.stack(bad) * whole.nonfinite.new_tensor(counted))
            return whole._replace(nonfinite=bad.sum(), others=others)
        scores = [nm_score(tensor, pattern, backend=backend) for tensor in tensors]
    if isinstance(k, int):
        each = zip(scores, others.counted, strict=True)
        spoken = [own if counts else own[:0] for own, counts in each]
        found = select(spoken, k, scales=scales, reduce=others.reduce, backend=backend)
    else:
        found = select_spread(scores, k, scales, others.counted, others.reduce)
    ties = ties_kept(scores, found, scales, others.places, others.counted, others.reduce)
    values = found.value.expand(len(scores)).contiguous()
    threshold = Threshold(values, ties, found.nonfinite)
    return Cut(pattern, tensors, scores, scales, threshold, found.nonfinite, [], backend, others)


def _rows_among(
    scores: list[Tensor], ks: list[int], packed: bool, backend: Backend, others: Others
) -> tuple[list[Tensor], Tensor]:
    """Return ``prune_rows``'s of all ranks: rows that are whole on a rank are its own matter."""
    reduce, counted, places, edges = others
    split = [len(ends) > 2 for ends in edges]
    own = [i for i, parted in enumerate(split) if not parted]
    found: dict[int, Tensor] = {}
    bad = torch.zeros(len(scores), dtype=torch.int64, device=scores[0].device)
    if own:
        parts = [places[i][0] for i in own]
        tensors, pruned = [scores[i] for i in own], [ks[i] for i in own]
        masks, bad[own] = prune_rows(tensors, pruned, packed=packed, parts=parts, backend=backend)
        found |= zip(own, masks, strict=True)
    for i in range(len(scores)):
        if split[i]:
            place = places[i], edges[i], counted[i]
            mask, bad[i] = prune_rows_spread(scores[i], ks[i], *place, reduce)
            found[i] = pack(mask) if packed else mask
    bad *= bad.new_tensor(counted)
    return [found[i] for i in range(len(scores))], reduce(bad)


def _of_all(numbers: Sequence[int], like: Tensor, others: Others) -> list[int]:
    """Add up over the ranks a number of each tensor's."""
    own = [n * counts for n, counts in zip(numbers, others.counted, strict=True)]
    return others.reduce(torch.tensor(own, dtype=torch.int64, device=like.device)).tolist()
