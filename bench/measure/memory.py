"""Memory that a job may have, and whether an error says that it was too little.

Linux promises more than it has, and ends some process when the promise comes due. So a job asks
for no more than there is, and what exceeds that is an error like any other.
"""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARE = 0.95  # of what is free: others may come to need some
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

# of the allocators of torch and numpy
SHORT = r"can't allocate memory|not enough memory|out of memory|unable to allocate"
OVERFLOWS = (
    r"calculation overflowed|multiplication overflow|overflow when unpacking"
    r"|maximum allowed dimension|array is too big|too large to convert"
)
ASKED = r"(?:tried to allocate|unable to allocate) ([\d.]+ ?(?:bytes|[KMGTPE]i?B))"


@contextmanager
def within_memory() -> Iterator[None]:
    """Let allocations fail, here and in processes started meanwhile, that exceed what is free now.

    Not beside a GPU, whose driver reserves addresses that are no memory.
    """
    # torch itself takes seconds to import, and whoever works has it
    import torch

    free = free_bytes()
    if free is None or torch.cuda.is_available():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _kilobytes(PROC / "self" / "status", "VmData") + int(free * SHARE)
    limits = [limit, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def free_bytes() -> int | None:
    """Return how much more memory this process can have; None where the system does not tell.

    That is what the machine has available, or what is left of the limit of a control group that
    the process is in, of a container say.
    """
    try:
        meminfo = PROC / "meminfo"
        left = [_kilobytes(meminfo, "MemAvailable") + _kilobytes(meminfo, "SwapFree")]
        groups = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in groups:
        _, kinds, place = line.split(":", 2)
        if kinds == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root = CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / place.strip("/")
        # a container sees its own group as the root, whatever it is called outside
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                left += _left(group, *names)
    return max(min(left), 0)


def _left(group: Path, limit: str, usage: str, cache: str) -> list[int]:
    """Return the bytes that are left of a control group's limit; nothing where it has none."""
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        # of files that were read: given back when it is needed
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return []
    given_back = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cache} "))
    return [most - used + given_back]


def _kilobytes(path: Path, field: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def shortage(error: BaseException) -> str | None:
    """Return what an error says was asked of a memory that is too small; None: it says no such.

    Args:
        error: torch's and numpy's own, of any device, or Python's.
    """
    text = str(error)
    if isinstance(error, OverflowError) or (
        isinstance(error, RuntimeError | ValueError | TypeError)
        and re.search(OVERFLOWS, text, re.IGNORECASE)
    ):
        return "a size was asked for that is more than any memory has"
    if not (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and re.search(SHORT, text, re.IGNORECASE))
    ):
        return None
    asked = re.search(ASKED, text, re.IGNORECASE)
    where = "the GPU" if re.search(r"\bCUDA\b|\bGPU\b", text) else "the host"
    return f"{asked[1] if asked else 'memory'} could not be had on {where}"
