"""Draws of masks on the host: the uniform numbers, and which groups they keep.

Numbers are a function of seed, draw, stream (which weight) and group alone, so that every run and
every rank draws the same. A GPU takes them from Philox4x32-10 (Salmon et al., SC'11), whose
numbers the kernels of ``learned_mask_triton.py`` make anew wherever they need them. A CPU keeps
what it has drawn and takes numpy's SFC64 (Doty-Humphrey), which is many times faster there: one
generator for each run of ``RUN`` groups.

What is compared is exact, and e^-s is added and multiplied up in float32 in one order: given the
numbers, plain torch, which defines the mask, numpy and the kernels agree on it to the bit.

Reading order: numbers -> e^-s -> draw -> masked weight -> gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .grid import ceil_div
from .launch import takes_kernels

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
RUN = 2**18  # few enough groups for a cache, enough that threads seldom wait for Python's lock


def uniform(
    random: Tensor,
    stream: int,
    shape: tuple[int, int] | torch.Size,
    part: tuple[slice, slice] | None = None,
) -> Tensor:
    """Return the numbers that a draw compares with: float32 of ``shape``, in (0, 1).

    Args:
        random: int64 ``(2,)``: the seed, and the number of the draw; on the weight's device.
        stream: which weight.
        shape: of the grid of groups.
        part: rows and columns of it that are asked for; None: all.
    """
    rows, cols = (slice(0, shape[0]), slice(0, shape[1])) if part is None else part
    if random.is_cpu and not takes_kernels(random.device):
        return _uniform_on_cpu(random, stream, shape[1], rows)[:, cols]
    return _philox(random, stream, shape[1], rows, cols)


def _philox(random: Tensor, stream: int, across: int, rows: slice, cols: slice) -> Tensor:
    first, C = rows.start // LANES, cols.stop - cols.start
    quads = ceil_div(rows.stop, LANES) - first
    seed, number = random.tolist()
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    quad = torch.arange(first, first + quads, device=random.device)[:, None]
    c0 = (quad * across + torch.arange(cols.start, cols.stop, device=random.device)).flatten()
    c1, c2, c3 = (torch.full_like(c0, word & _LOW) for word in (0, number, stream))
    for _ in range(10):
        a, b = c0 * _A, c2 * _B
        # the shift is arithmetic, so that its upper half is to be cut
        c0, c1 = (b >> 32 ^ c1 ^ k0) & _LOW, b & _LOW
        c2, c3 = (a >> 32 ^ c3 ^ k1) & _LOW, a & _LOW
        k0, k1 = k0 + _KEY_A & _LOW, k1 + _KEY_B & _LOW
    lanes = torch.stack([c.view(quads, C) for c in (c0, c1, c2, c3)], 1)
    whole = (lanes >> 8).clamp_(_LEAST, _MOST).view(quads * LANES, C)
    skipped = rows.start - first * LANES
    return whole[skipped : skipped + rows.stop - rows.start].float() * 2.0**-24


def _uniform_on_cpu(random: Tensor, stream: int, across: int, rows: slice) -> Tensor:
    # whole runs, of which the rows are a part
    first, last = rows.start * across, rows.stop * across
    runs = range(first // RUN, ceil_div(last, RUN))
    start = runs.start * RUN
    flat = np.empty(last - start if runs else 0, np.float32)
    for place, run in enumerate(runs):
        _fill(flat[place * RUN : (place + 1) * RUN], random.tolist(), stream, run)
    found = torch.from_numpy(flat[first - start :])
    return found.view(rows.stop - rows.start, across)


def _fill(out: np.ndarray, random: Sequence[int], stream: int, run: int) -> None:
    """Write a run's numbers."""
    seed, number = random
    generator = np.random.SFC64((seed % 2**64, number, stream, run))
    bits = generator.random_raw(ceil_div(len(out), 2)).view(np.uint32)[: len(out)]
    np.right_shift(bits, 8, out=bits)
    # of 24 bits: the same as signed integers, which are faster to convert
    out[:] = np.clip(bits.view(np.int32), _LEAST, _MOST, out=bits.view(np.int32))
    np.multiply(out, np.float32(2.0**-24), out=out)


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


def keeps_draws(logits: Tensor) -> bool:
    """Tell whether to keep what is drawn, as on a CPU, or to draw it anew wherever it is read."""
    return logits.is_cpu and not takes_kernels(logits.device)


def draw(logits: Tensor, random: Tensor, stream: int, out: Tensor | None = None) -> Tensor:
    """Draw a mask on a CPU.

    In numpy, on as many threads as torch would use: each takes whole runs, whose temporaries stay
    in its cache, rather than all of them part every one of some thirty short operations.

    Args:
        logits: one a group.
        random, stream: as ``uniform``'s.
        out: an earlier draw, to be overwritten; a backward pass that still needs it raises.

    Returns:
        float32: the sigmoid's derivative of each group, its sign bit set where the group is kept.
    """
    if out is None:
        out = torch.empty(logits.shape, dtype=torch.float32, device="cpu")
    else:
        torch.autograd.graph.increment_version(out)
    numbers = random.tolist()
    s, slopes = _read(logits.contiguous()), _flat(out)
    words_out = slopes.view(np.int32)

    def work(run: int, part: slice, u: np.ndarray, v: np.ndarray, other: np.ndarray) -> None:
        _fill(u, numbers, stream, run)
        _exp_minus_into(v, other, s[part])
        np.subtract(np.float32(1), u, out=other)
        np.multiply(v, other, out=v)
        kept = np.greater(u, v)
        # with p = u / (u + v), the sigmoid, p (1 - p)
        np.add(u, v, out=other)
        np.multiply(other, other, out=other)
        np.multiply(v, u, out=v)
        np.divide(v, other, out=v)
        # a NaN may have any sign
        np.abs(v, out=v)
        sign = other.view(np.int32)
        np.negative(kept.view(np.int8), out=sign)
        np.left_shift(sign, 31, out=sign)
        np.bitwise_or(v.view(np.int32), sign, out=words_out[part])

    _in_runs(work, len(s), 3)
    return out


def draw_part(
    logits: Tensor,
    random: Tensor,
    stream: int,
    shape: tuple[int, int],
    part: tuple[slice, slice],
) -> Tensor:
    """Return what ``draw`` would of a part of a grid, on any device, in plain torch.

    Args:
        logits: of the part.
        random, stream, shape, part: as ``uniform``'s.
    """
    u = uniform(random, stream, shape, part)
    v = exp_minus(logits).mul_(1 - u)
    kept, total = u > v, u + v
    return torch.copysign(v.mul_(u).div_(total.mul_(total)), torch.where(kept, -1.0, 1.0))


def select_drawn(weight: Tensor, signed: Tensor) -> Tensor:
    """Return a weight, whose elements are the groups, masked by what ``draw`` returned."""
    out = torch.empty_like(weight)
    w, slopes, masked = (a.view(np.int32) for a in (_read(weight), _flat(signed), _flat(out)))

    def work(_: int, part: slice, buffer: np.ndarray) -> None:
        words = buffer.view(np.int32)
        np.right_shift(slopes[part], 31, out=words)
        np.bitwise_and(w[part], words, out=masked[part])

    _in_runs(work, len(w), 1)
    return out


def gradients(grad: Tensor, weight: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``select_drawn``'s weight and of the logits, given its result's."""
    grad_weight, grad_scores = torch.empty_like(grad), torch.empty_like(signed)
    g, w = _read(grad), _read(weight)
    slopes, to_weight, scores = (_flat(t) for t in (signed, grad_weight, grad_scores))
    g_words, slope_words, out_words = (a.view(np.int32) for a in (g, slopes, to_weight))

    def work(_: int, part: slice, buffer: np.ndarray) -> None:
        words = buffer.view(np.int32)
        np.right_shift(slope_words[part], 31, out=words)
        np.bitwise_and(g_words[part], words, out=out_words[part])
        np.multiply(g[part], w[part], out=scores[part])
        np.abs(slopes[part], out=buffer)
        np.multiply(scores[part], buffer, out=scores[part])

    _in_runs(work, len(g), 1)
    return grad_weight, grad_scores


def in_runs(*tensors: Tensor) -> bool:
    """Tell whether ``select_drawn`` and ``gradients`` can read them."""
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _flat(t: Tensor) -> np.ndarray:
    return t.detach().view(-1).numpy()


def _read(t: Tensor) -> np.ndarray:
    """Return what may belong to others, to be read: ``numpy()`` forbids for ever that a storage is
    resized, as FSDP2 does to let go of what it has gathered.
    """
    return np.from_dlpack(t.detach().view(-1))


def _in_runs(work: Callable[..., None], length: int, buffers: int) -> None:
    """Call ``work(run, part, *buffers)`` for every run, on as many threads as pay."""
    runs = range(ceil_div(length, RUN))

    def share(own: Sequence[int]) -> None:
        scratch = [np.empty(min(RUN, length), np.float32) for _ in range(buffers)]
        with np.errstate(all="ignore"):
            for run in own:
                part = slice(run * RUN, min((run + 1) * RUN, length))
                work(run, part, *(buffer[: part.stop - part.start] for buffer in scratch))

    threads = max(1, min(torch.get_num_threads(), 8, len(runs)))
    if threads == 1:
        share(runs)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, (runs[n::threads] for n in range(threads))))


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
