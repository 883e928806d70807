"""What the device can do at most, measured: copying, reading from cache, multiplying matrices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from ...kernels.bandwidth import TILE, read_repeatedly
from .timing import l2_bytes, measure


class Ceilings(NamedTuple):
    """Rates of a device, measured in one run with what is compared with them.

    Attributes:
        copy: bytes a second, read and written, of a large copy.
        cache: bytes a second of reading again and again what fits the L2 (on a CPU: a core's).
        gemm: FLOP a second of a large dense product, by dtype; on random numbers.
    """

    copy: float
    cache: float
    gemm: dict[str, float]


def measure_ceilings(
    device: torch.device, dtypes: list[torch.dtype], *, scale: float = 1.0
) -> Ceilings:
    """Measure the ceilings; on a GPU in about a second, on two CPU cores in about two.

    Args:
        device: where.
        dtypes: of the products.
        scale: shrinks the work, for a trial run.
    """
    gpu = device.type == "cuda"
    size = int((2**30 if gpu else 2**27) * scale) // 4
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    copy = measure(partial(target.copy_, source), device, least=7)
    del source, target
    side = int((8192 if gpu else 1536) * scale**0.5) // 16 * 16
    gemm = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = measure(partial(torch.matmul, a, b), device, least=7)
        gemm[str(dtype).removeprefix("torch.")] = 2 * side**3 / product.median
    return Ceilings(2 * size * 4 / copy.median, _cache(device, scale), gemm)


def highest(found: Sequence[Ceilings]) -> Ceilings:
    """Return the highest of each rate."""
    return Ceilings(
        max(ceilings.copy for ceilings in found),
        max(ceilings.cache for ceilings in found),
        {name: max(ceilings.gemm[name] for ceilings in found) for name in found[0].gemm},
    )


def _cache(device: torch.device, scale: float) -> float:
    if device.type != "cuda":
        # of one core's: torch reads a vector this short in one thread
        data = torch.ones(2**15)
        passes = 64

        def read() -> None:
            for _ in range(passes):
                data.sum()

        return passes * data.numel() * 4 / measure(read, device).median
    # a third of the cache, so that it stays there whatever the addresses are
    numel = l2_bytes(device) // 3 // 4 // TILE * TILE
    data = torch.ones(numel, dtype=torch.int32, device=device)
    # so many that the sum at the end does not count
    passes = max(int(512 * scale), 1)
    seconds = measure(lambda: read_repeatedly(data, passes), device, least=7).median
    return passes * data.numel() * 4 / seconds
