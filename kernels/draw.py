"""Draws of masks on the host: the uniform numbers, and which groups they keep.

The numbers come from Philox4x32-10 (Salmon et al., SC'11), a function of seed, draw, stream (which
weight) and group alone; all that is compared with them is exact, and e^-s is added and multiplied
up in float32 in one order. So plain torch, which defines them, numpy, which a CPU uses, and the
kernels in ``learned_mask.py`` draw the same mask.

Reading order: numbers -> e^-s -> mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

LANES = 4  # numbers that one evaluation of Philox gives, to the groups of four consecutive rows
# u is a multiple of 2^-24 and no nearer to 0 or 1 than the first that is past 1e-6
_LEAST, _MOST = 17, 2**24 - 17
# past +-20 the mask is certain whatever u is, and 2^y below stays a normal number
_CERTAIN = 20.0
_MINUS_LOG2_E = -1.4426950216293335  # float32
# 2^f on [0, 1) to 1.6e-7: lowest power first, each rounded to float32
_EXP2 = (
    0.9999999403953552,
    0.6931530833244324,
    0.24015361070632935,
    0.05582631751894951,
    0.00898933969438076,
    0.0018775766948238015,
)
_A, _B, _KEY_A, _KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

# elements that a CPU thread handles at a time: few enough for their temporaries to stay in its
# cache, enough for threads not to wait for Python's lock
CHUNK = 2**18


def uniform(random: Tensor, stream: int, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Return the numbers that a draw compares with: float32 of ``shape``, in (0, 1).

    Args:
        random: int64 ``(2,)``: the seed, and the number of the draw.
        stream: which weight.
        shape: of the grid of groups.
    """
    R, C = shape
    quads = -(-R // LANES)
    seed, number = random.tolist()
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    c0 = torch.arange(quads * C, device=random.device)
    c1, c2, c3 = (torch.full_like(c0, word & _LOW) for word in (0, number, stream))
    for _ in range(10):
        a, b = c0 * _A, c2 * _B
        # the shift is arithmetic, so that its upper half is to be cut
        c0, c1 = (b >> 32 ^ c1 ^ k0) & _LOW, b & _LOW
        c2, c3 = (a >> 32 ^ c3 ^ k1) & _LOW, a & _LOW
        k0, k1 = k0 + _KEY_A & _LOW, k1 + _KEY_B & _LOW
    lanes = torch.stack([c.view(quads, C) for c in (c0, c1, c2, c3)], 1)
    whole = (lanes >> 8).clamp_(_LEAST, _MOST).view(quads * LANES, C)[:R]
    return whole.float() * 2.0**-24


def exp_minus(logits: Tensor) -> Tensor:
    """Return exp(-logits) to 1.1e-6, constant beyond +-20, bit-equal on every device."""
    y = logits.detach().float().clamp(-_CERTAIN, _CERTAIN).mul_(_MINUS_LOG2_E)
    whole = y.floor()
    fraction = y.sub_(whole)
    power = fraction * _EXP2[-1]
    for coefficient in _EXP2[-2:0:-1]:
        power.add_(coefficient).mul_(fraction)
    power.add_(_EXP2[0])
    # adding to a float's exponent
    power.view(torch.int32).add_(whole.to(torch.int32).bitwise_left_shift_(23))
    return power


def draw_mask(
    logits: Tensor, random: Tensor, stream: int, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return which groups are kept, and the sigmoid's derivative of each.

    The former as bool, or as integers with all bits set or none, by ``kind``.

    In numpy, on as many threads as torch would use: each takes whole chunks, whose temporaries
    stay in its cache, rather than all of them part every one of some hundred short operations.
    """
    R, C = logits.shape
    kept = torch.empty((R, C), dtype=kind)
    words = kept.numpy()
    slope = np.empty((R, C), np.float32)
    s = logits.detach().numpy()
    quads = -(-R // LANES)
    height = max(1, CHUNK // (LANES * max(1, C)))
    starts = range(0, quads if C else 0, height)
    seed, number = random.tolist()

    def work(share: Sequence[int]) -> None:
        philox = _Philox(seed, number, stream, height * C)
        shape = height, LANES, C
        numbers, part = np.empty(shape, np.float32), np.empty(height * C, np.int32)
        scratch = [np.empty((height * LANES, C), np.float32) for _ in range(2)]
        for first in share:
            count = min(height, quads - first)
            for lane, bits in enumerate(philox(first * C, count * C)):
                np.right_shift(bits, np.uint64(8), out=part[: count * C], casting="unsafe")
                np.clip(part, _LEAST, _MOST, out=part)
                numbers[:count, lane] = part[: count * C].reshape(count, C)
            rows = slice(first * LANES, min(R, (first + count) * LANES))
            size = rows.stop - rows.start
            u = numbers.reshape(-1, C)[:size]
            np.multiply(u, np.float32(2.0**-24), out=u)
            v, other = (buffer[:size] for buffer in scratch)
            _exp_minus_into(v, other, s[rows])
            np.subtract(np.float32(1), u, out=other)
            np.multiply(v, other, out=v)
            flags = np.greater(u, v, out=words[rows] if kind == torch.bool else None)
            if kind != torch.bool:
                np.negative(flags.view(np.int8), out=words[rows])
            # with p = u / (u + v), the sigmoid, p (1 - p)
            np.add(u, v, out=other)
            np.multiply(other, other, out=other)
            np.multiply(v, u, out=v)
            np.divide(v, other, out=slope[rows])

    def silent(share: Sequence[int]) -> None:
        with np.errstate(all="ignore"):
            work(share)

    threads = max(1, min(torch.get_num_threads(), 8, len(starts)))
    if threads == 1:
        silent(starts)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(silent, (starts[n::threads] for n in range(threads))))
    return kept, torch.from_numpy(slope)


class _Philox:
    """Philox4x32-10 of runs of quads, through buffers that it keeps."""

    def __init__(self, seed: int, number: int, stream: int, size: int) -> None:
        self._key = seed & _LOW, seed >> 32 & _LOW
        self._counter = number & _LOW, stream & _LOW
        self._buffers = [np.empty(size, np.uint64) for _ in range(6)]

    def __call__(self, start: int, size: int) -> list[np.ndarray]:
        """Return the four numbers, from 0 to 2^32 - 1, of each quad from ``start``."""
        c0, c1, c2, c3, a, b = (buffer[:size] for buffer in self._buffers)
        c0[:] = np.arange(start, start + size, dtype=np.uint64)
        c1[:] = 0
        c2[:], c3[:] = self._counter
        k0, k1 = self._key
        low, half = np.uint64(_LOW), np.uint64(32)
        for _ in range(10):
            np.multiply(c0, np.uint64(_A), out=a)
            np.multiply(c2, np.uint64(_B), out=b)
            # c1 and c3 hold whole products: what is above 32 bits is cut once
            for c, product, word, key in ((c0, b, c1, k0), (c2, a, c3, k1)):
                np.right_shift(product, half, out=c)
                np.bitwise_xor(c, word, out=c)
                np.bitwise_xor(c, np.uint64(key), out=c)
                np.bitwise_and(c, low, out=c)
            c1, b, c3, a = b, c1, a, c3
            k0, k1 = k0 + _KEY_A & _LOW, k1 + _KEY_B & _LOW
        np.bitwise_and(c1, low, out=c1)
        np.bitwise_and(c3, low, out=c3)
        return [c0, c1, c2, c3]


def _exp_minus_into(power: np.ndarray, y: np.ndarray, logits: np.ndarray) -> None:
    """Write what ``exp_minus`` returns; ``y`` is scratch."""
    np.clip(logits, np.float32(-_CERTAIN), np.float32(_CERTAIN), out=y)
    np.multiply(y, np.float32(_MINUS_LOG2_E), out=y)
    whole = np.floor(y)
    np.subtract(y, whole, out=y)
    np.multiply(y, np.float32(_EXP2[-1]), out=power)
    for coefficient in _EXP2[-2:0:-1]:
        np.add(power, np.float32(coefficient), out=power)
        np.multiply(power, y, out=power)
    np.add(power, np.float32(_EXP2[0]), out=power)
    power.view(np.int32)[...] += whole.astype(np.int32) << 23
