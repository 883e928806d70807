"""The ranks that train one model together: how they come to agree, and are told if they do not.

Masks agree by construction: what they follow from is the same on every rank, or is summed over
the ranks. Until training begins the first rank's masks are everybody's; from then on each update
compares a checksum, a few bytes a weight. An error on one rank becomes an error on every rank, so
that none is left waiting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")

# errors that keep their kind on the ranks that only hear of them
_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, RuntimeError)}


def known_group(what: str, group: Any = None) -> Any:
    """Return a process group, or for None the default one; None where there is one process.

    Raises:
        RuntimeError: a group is given, and torch.distributed is not initialised.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        if group is not None:
            raise RuntimeError(
                f"{what}: process_group must belong to an initialised torch.distributed, got "
                f"{group!r}; call init_process_group() first"
            )
        return None
    found = distributed.group.WORLD if group is None else group
    return found if distributed.get_world_size(found) > 1 else None


class Ranks:
    """The ranks of one process group; None: one process, which agrees with itself."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size = 1 if group is None else distributed.get_world_size(group)
        self.rank = 0 if group is None else distributed.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank has given, which must be small: it is pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, self.group)
        return found

    def collect(self, own: Mapping[str, T]) -> dict[str, T]:
        """Return what the ranks have given by name, of one name what the first has; all small."""
        found: dict[str, T] = {}
        for theirs in self.gather(own):
            found = theirs | found
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place; return it."""
        if self.size > 1:
            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def most(self, tensor: Tensor) -> Tensor:
        """Take the greatest of a tensor's numbers over the ranks, in place; return it."""
        if self.size > 1:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX, self.group)
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=device)))

    @torch.no_grad()
    def take_first(self, tensors: Sequence[Tensor]) -> None:
        """Make contiguous tensors those of the first rank, in place: one broadcast."""
        if self.size == 1 or not tensors:
            return
        parts = [tensor.view(-1).view(torch.uint8) for tensor in tensors]
        flat = torch.cat(parts)
        source = distributed.get_global_rank(self.group, 0)
        distributed.broadcast(flat, source, group=self.group)
        for part, own in zip(flat.split([p.numel() for p in parts]), parts, strict=True):
            own.copy_(part)

    @contextmanager
    def together(self, device: torch.device, what: str = "") -> Iterator[dict[str, Any]]:
        """Let what one rank raises inside be raised on every rank. Nobody may wait for another
        rank inside; an error that other ranks have too is each one's own.

        Yields:
            What must be the same on every rank, by name, to be filled in: small values. Where they
            differ every rank raises ``check_alike``'s error, of ``what``.
        """
        error, alike = None, dict[str, Any]()
        try:
            yield alike
        except Exception as own:
            if self.size == 1:
                raise
            error = own
        if self.size == 1:
            return
        number = _number_of(alike)
        failed, most, least = self.most(
            torch.tensor([int(error is not None), number, ~number], device=device)
        ).tolist()
        if not failed:
            if most != ~least:
                self.check_alike(what, alike)
            return
        told = self.gather(None if error is None else (type(error).__name__, str(error)))
        if error is not None:
            raise error
        rank, (kind, message) = next((i, m) for i, m in enumerate(told) if m is not None)
        raise _KINDS.get(kind, RuntimeError)(f"on rank {rank}: {message}")

    def check_same(self, what: str, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Raise a RuntimeError on every rank that names the tensors which differ between ranks."""
        if self.size == 1 or not tensors:
            return
        prints = torch.stack([fingerprint(tensor) for tensor in tensors])
        most = self.most(torch.stack([prints, ~prints]))
        differs = (most[0] != ~most[1]).tolist()
        _refuse_different(what, names, differs)

    def check_copies(
        self,
        what: str,
        names: Sequence[str],
        parts: Sequence[Tensor],
        copies: Sequence[int],
        counted: Sequence[bool],
    ) -> None:
        """Raise a RuntimeError on every rank that names tensors whose copies differ.

        Args:
            parts: what is here of tensors that lie on several ranks.
            copies: how often the ranks have each.
            counted: whether what is here is of the first copy.
        """
        prints = torch.stack([fingerprint(part) for part in parts])
        first = prints * prints.new_tensor(counted)
        total, once = self.sum(torch.stack([prints, first]))
        _refuse_different(what, names, (total != once * once.new_tensor(copies)).tolist())

    def check_alike(self, what: str, values: dict[str, Any]) -> None:
        """Raise a ValueError on every rank where small values differ, by their names."""
        found = self.gather(values)
        for rank, theirs in enumerate(found):
            for key, wanted in found[0].items():
                if theirs.get(key) != wanted:
                    raise ValueError(
                        f"{what}: {key} must be the same on every rank, got "
                        f"{_difference(wanted, theirs.get(key), rank)}; ranks that train models "
                        "of their own each need a process_group, stages of a pipeline that, or "
                        "create_controller(stages=True) for one pool"
                    )


def _refuse_different(what: str, names: Sequence[str], differs: Sequence[bool]) -> None:
    if any(differs):
        found = dict.fromkeys(n for n, bad in zip(names, differs, strict=True) if bad)
        raise RuntimeError(
            f"{what}: the masks of {', '.join(map(repr, found))} differ between ranks, which "
            "train one model; load one state on all of them, and write masks and weights on "
            "all of them alike"
        )


def _difference(first: Any, other: Any, rank: int) -> str:
    """Say where two values differ, of long lists by what one of them lacks."""
    if isinstance(first, list) and isinstance(other, list):
        missing = (
            [x for x in first if x not in other][:3],
            [x for x in other if x not in first][:3],
        )
        first, other = missing if any(missing) else (first, other)
    return f"{first!r} on rank 0 and {other!r} on rank {rank}"


def _number_of(values: dict[str, Any]) -> int:
    """Return 63 bits that are the same for the same values, in any process."""
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


ALONE = Ranks()
_ODD = -7046029254386353131


def fingerprint(tensor: Tensor) -> Tensor:
    """Return int64, 0-d, of the bytes of a tensor: a change within 8 bytes always shows."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    factors = (torch.arange(len(words), device=tensor.device) * 2 + 1) * _ODD
    return (words * factors).sum()
