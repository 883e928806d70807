"""The mask of one matrix: which groups are kept, in the forms that kernels read.

The tensors are rewritten in place, so that compiled and captured graphs see an update. In bytes
beside the matrix: one bit a group (one byte a block); on a CPU under a fine pattern the mask once
more, as wide as the matrix, which clears in place at the speed of memory (under blocks it is
``1 / rows`` of that).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .bits import expand_mask, pack, unpack, word_mask
from .copy import copy_all_
from .count import kept_counts
from .grid import side_lengths
from .launch import Backend, is_captured, upload, use_triton
from .masked_weight import apply_mask_, count_leaks
from .pattern import NM, Block, Pattern, grid_shape
from .retained import put_all_back_, take_all_pruned
from .semi_structured import nm_fits, nm_misfits
from .table import alike


@dataclass(frozen=True, eq=False)
class Kind:
    """What masks that share launches have in common; the same object, so that none is compared."""

    pattern: Pattern
    backend: Backend


_kind_of = cache(Kind)


class GroupMask:
    """Which groups of a matrix are kept; at first all.

    Args:
        pattern: the shape of a group.
        shape: of the matrix, (out, in).
        dtype: of the matrix.
        device: where it is.
        backend: of the operations that mask it.
    """

    def __init__(
        self,
        pattern: Pattern,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend = "auto",
    ) -> None:
        self.pattern = pattern
        self.shape = shape
        self.backend: Backend = backend
        self.kind = _kind_of(pattern, backend)
        # groups down and across; under N:M elements, since a pruned group keeps some of its
        self.grid = grid_shape(pattern, shape)
        # what a level counts, and what is chosen among: under N:M elements, and its tuples
        self.groups = self.choices = math.prod(self.grid)
        if isinstance(pattern, NM):
            self.choices //= math.prod(pattern.group)
        # the mask holds one bit an element, not one bool a block
        self.packed = not isinstance(pattern, Block)
        self.mask = self._compact(torch.ones(self.grid, dtype=torch.bool, device=device))
        # number of kept groups, known on the host: what has nothing pruned needs no care
        self.kept = self.groups
        # of the matrix; None until somebody asks
        self._kept_elements: int | None = math.prod(shape)
        self.changes = 0
        self._dtype = dtype
        self._words: Tensor | None = None
        self.move_mask(device, dtype)

    def move_mask(self, device: torch.device, dtype: torch.dtype) -> None:
        """Go along with the matrix to another device and dtype."""
        self.mask = self.mask.to(device)
        if not self.mask.is_cpu or use_triton("apply_mask_", self.backend, self.mask):
            self._words = None
        elif self._words is None or self._dtype != dtype:
            self._words = word_mask(self.mask, self.kind.pattern, self.shape, dtype)
        self._dtype = dtype

    def settle(self) -> None:
        """Bring the stored mask in line with what it follows from, where it is learned."""

    @property
    def all_kept(self) -> bool:
        """True where nothing is pruned."""
        return self.kept == self.groups

    def clears(self, tensor: Tensor) -> bool:
        """Tell whether something is pruned of ``tensor``, or may be when a graph runs that is
        captured now: what it leaves out is left out for ever.
        """
        return not self.all_kept or is_captured(tensor)

    def pruned_groups(self) -> int:
        """Return how many of ``groups`` are pruned."""
        self.settle()
        return self.groups - self.kept

    def pruned_elements(self) -> int:
        """Return how many elements are pruned. May wait for the device, once a mask."""
        pruned = self.pruned_groups()
        if self.packed:
            return pruned
        if self._kept_elements is None:
            self._kept_elements = self.elements_of(self.mask)
        return math.prod(self.shape) - self._kept_elements

    def pruned_here(self) -> int:
        """Return how many elements of the matrix are pruned; it may be a part of another."""
        return self.pruned_elements()

    def elements_of(self, blocks: Tensor) -> int:
        """Count the elements in the blocks that are True: those at the edges have fewer."""
        rows, cols = self.kind.pattern.rows, self.kind.pattern.cols
        heights, widths = side_lengths(self.shape, rows, cols, device=blocks.device)
        return int((blocks * heights * widths).sum())

    def kept_grid(self) -> Tensor:
        """Return the mask as a bool tensor of one element a group."""
        self.settle()
        return unpack(self.mask, self.shape[1]) if self.packed else self.mask

    def kept_elements(self) -> Tensor:
        """Return the mask as a bool matrix."""
        self.settle()
        return expand_mask(self.mask, self.kind.pattern, self.shape)

    def mask_for(self, tensor: Tensor) -> Tensor:
        """Return the form of the mask in which ``tensor`` is masked fastest."""
        fits = self._words is not None and self._words.element_size() == tensor.element_size()
        return self._words if fits and tensor.is_cpu else self.mask  # pyright: ignore[reportReturnType]

    def full_mask(self) -> Tensor:
        """Return a compact mask that keeps everything."""
        if self.all_kept:
            return self.mask
        return self._compact(torch.ones(self.grid, dtype=torch.bool, device=self.mask.device))

    def fits(self, grid: Tensor) -> bool:
        """Tell whether the pattern allows ``grid``: N:M's groups keep n of m at most, or all."""
        return not isinstance(self.pattern, NM) or nm_fits(grid, self.pattern)

    def grid_of(self, kept: Tensor) -> Tensor | None:
        """Return the grid of a bool matrix; None where it is not constant within every group."""
        grid = kept[:: self.pattern.rows, :: self.pattern.cols].contiguous()
        same = torch.equal(expand_mask(self._compact(grid), self.pattern, self.shape), kept)
        return grid if same else None

    def set_grid(self, grid: Tensor) -> None:
        """Take over a bool grid, in place. The matrix is the caller's to bring in line."""
        self.set_(self._compact(grid), int(grid.count_nonzero()))

    def set_(self, mask: Tensor | None, kept: int, kept_elements: int | None = None) -> None:
        """Take over a compact mask, in place. The matrix is the caller's to bring in line.

        Args:
            mask: as ``self.mask``; None where ``self.mask`` itself has just been written.
            kept: number of kept groups.
            kept_elements: number of the matrix's elements in them, if known.
        """
        if mask is not None:
            self.mask.copy_(mask)
        self.note(kept, kept_elements)
        self.masks_changed([self])

    def note(self, kept: int, kept_elements: int | None) -> None:
        """Take note that the mask has been written, as in ``set_``."""
        rows, cols = self.kind.pattern.rows, self.kind.pattern.cols
        if kept_elements is None and not (self.shape[0] % rows or self.shape[1] % cols):
            kept_elements = kept * rows * cols
        self.kept, self._kept_elements = kept, kept_elements
        self.changes += 1
        if self._words is not None:
            word_mask(self.mask, self.kind.pattern, self.shape, self._dtype, out=self._words)

    @staticmethod
    def masks_changed(owners: Sequence[GroupMask]) -> None:
        """Bring in line what else follows from masks that have been set together."""

    def _compact(self, grid: Tensor) -> Tensor:
        return pack(grid) if self.packed else grid


# Several masks at once. On a GPU what is said of launches is of all masks of one pattern.


def _kinds(owners: Sequence[GroupMask]) -> Iterable[tuple[Pattern, Backend, list[int]]]:
    """Return patterns and backends, and the places of those that share launches."""
    found = alike(owner.kind for owner in owners)
    return [(kind.pattern, kind.backend, places) for kind, places in found.items()]


def _chosen(
    owners: Sequence[GroupMask], matrices: Sequence[Tensor], places: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return matrices, and the masks in the forms in which they are masked fastest."""
    chosen = [matrices[place] for place in places]
    return chosen, [owners[i].mask_for(matrices[i]) for i in places]


def clear_all_(owners: Sequence[GroupMask], matrices: Sequence[Tensor]) -> None:
    """Set what the masks prune to zero, in place: one launch for each width of element."""
    for pattern, backend, places in _kinds(owners):
        apply_mask_(*_chosen(owners, matrices, places), pattern, backend=backend)


def count_all_leaks(
    owners: Sequence[GroupMask], matrices: Sequence[Tensor]
) -> tuple[list[int], list[Tensor]]:
    """Count what is pruned and yet not zero, in one launch.

    Returns:
        Places in the lists, and int64 vectors: one after another, the counts of those places.
    """
    order, counts = [], []
    for pattern, backend, places in _kinds(owners):
        order += places
        counts.append(count_leaks(*_chosen(owners, matrices, places), pattern, backend=backend))
    return order, counts


def take_all_(
    owners: Sequence[GroupMask], matrices: Sequence[Tensor], memory: Sequence[Tensor | None]
) -> list[Tensor]:
    """Take pruned values out, as ``take_all_pruned``; into ``memory`` where that fits."""
    values: dict[int, Tensor] = {}
    pruned = [owner.pruned_here() for owner in owners]
    for pattern, backend, places in _kinds(owners):
        found = take_all_pruned(
            *_chosen(owners, matrices, places),
            pattern,
            pruned=[pruned[place] for place in places],
            out=[_fitting(memory[place], owners[place], pruned[place]) for place in places],
            backend=backend,
        )
        values |= zip(places, found, strict=True)
    return [values[place] for place in range(len(owners))]


def _fitting(memory: Tensor | None, owner: GroupMask, pruned: int) -> Tensor | None:
    shape = owner.shape if owner.packed else (pruned,)
    return memory if memory is not None and memory.shape == shape else None


def put_back_all_(
    owners: Sequence[GroupMask], matrices: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Put pruned values back, as ``put_all_back_``."""
    for pattern, backend, places in _kinds(owners):
        chosen, masks = _chosen(owners, matrices, places)
        own = [values[place] for place in places]
        put_all_back_(chosen, own, masks, pattern, backend=backend)


def read_counts(
    owners: Sequence[GroupMask], masks: Sequence[Tensor], more: Sequence[Tensor]
) -> tuple[list[list[int]], list[int]]:
    """Count what new masks keep; read further numbers with it. Waits for the device once.

    Args:
        owners: one or more, of any patterns, on one device.
        masks: a compact mask of each.
        more: int64, on that device.

    Returns:
        How many groups and elements each mask keeps; ``more``'s numbers.
    """
    kinds = _kinds(owners)
    found = [number.flatten() for number in more]
    for pattern, backend, places in kinds:
        shapes = [owners[place].shape for place in places]
        own = [masks[place] for place in places]
        found.append(kept_counts(own, pattern, shapes, backend=backend).flatten())
    numbers = torch.cat(found).tolist()
    first = start = sum(number.numel() for number in more)
    counts = [[0, 0]] * len(owners)
    for place in (place for _, _, places in kinds for place in places):
        counts[place] = numbers[first : first + 2]
        first += 2
    return counts, numbers[:start]


def read_bits(
    owners: Sequence[GroupMask], saved: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[int]], list[bool]]:
    """Make masks from bits that were saved; one copy to the device, which is waited for once.

    Args:
        owners: as ``read_counts``'s.
        saved: one bit a group, ``pack``ed, of each.

    Returns:
        Compact masks, in parts of one tensor; ``read_counts``'s counts; whether the pattern of
        each allows it.
    """
    compact = []
    for owner, packed in zip(owners, saved, strict=True):
        bits, across = (packed if packed.is_cpu else packed.cpu()).numpy(), owner.grid[1]
        if not owner.packed:
            bits = np.unpackbits(bits, axis=1, count=across, bitorder="little")
        elif across % 8:  # what is past the last column counts for nothing
            bits = bits.copy()
            bits[:, -1] &= (1 << across % 8) - 1
        compact.append(bits)
    flat = torch.from_numpy(np.concatenate([bits.ravel() for bits in compact]))
    parts = upload(flat, owners[0].mask.device).split([bits.size for bits in compact])
    masks = [
        part.view(owner.mask.dtype).view(bits.shape)
        for owner, part, bits in zip(owners, parts, compact, strict=True)
    ]
    misfits: dict[int, Tensor] = {}
    for place, (owner, mask) in enumerate(zip(owners, masks, strict=True)):
        if isinstance(owner.pattern, NM):
            misfits[place] = nm_misfits(unpack(mask, owner.grid[1]), owner.pattern).long()
    counts, bad = read_counts(owners, masks, [*misfits.values()])
    refused = {place for place, misfit in zip(misfits, bad, strict=True) if misfit}
    return masks, counts, [place not in refused for place in range(len(owners))]


def set_masks(
    owners: Sequence[GroupMask], masks: Sequence[Tensor], counts: Sequence[Sequence[int]]
) -> None:
    """Take over compact masks, in place; on a GPU in one launch.

    Args:
        owners, masks: as ``read_counts``'s.
        counts: how many groups and elements each keeps.
    """
    copy_all_([owner.mask for owner in owners], masks, backend=owners[0].backend)
    for owner, (kept, kept_elements) in zip(owners, counts, strict=True):
        owner.note(kept, kept_elements)
    owners[0].masks_changed(owners)
