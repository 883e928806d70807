"""Oracles in numpy, written without the package's code: what a right result is."""

from __future__ import annotations

import itertools

import numpy as np


def to_numpy(tensor):
    """Return ``tensor``'s values; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()


def packbits(mask):
    """Pack a bool (R, C) to uint8 (R, ceil(C / 8)), rows aligned, lowest bit first."""
    width = -(-mask.shape[1] // 8)
    return np.packbits(mask, axis=1, bitorder="little").reshape(mask.shape[0], width)


def unpackbits(packed, cols):
    """Undo ``packbits``."""
    return np.unpackbits(packed, axis=1, bitorder="little")[:, :cols].astype(bool)


def keys(arrays, scales=None):
    """Return all keys, float32, in order: magnitudes times their tensor's scale."""
    scales = np.ones(len(arrays), np.float32) if scales is None else scales
    parts = [
        np.abs(a).astype(np.float32).ravel() * np.float32(s)
        for a, s in zip(arrays, scales, strict=True)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def exact_masks(arrays, k, scales=None):
    """Prune the k smallest keys; of equal ones the last in order. Returns a bool array each."""
    joined = keys(arrays, scales)
    # the k first by key, then by position from the end
    pruned = np.lexsort((-np.arange(joined.size), joined))[:k]
    kept = np.ones(joined.size, bool)
    kept[pruned] = False
    ends = np.cumsum([a.size for a in arrays])[:-1]
    return [part.reshape(a.shape) for part, a in zip(np.split(kept, ends), arrays, strict=True)]


def threshold(arrays, k, scales=None):
    """Return the k-th smallest key and how many keys equal to it are kept."""
    if k == 0:
        return -np.inf, 0
    joined = np.sort(keys(arrays, scales))
    value = joined[k - 1]
    return float(value), int((joined <= value).sum()) - k


def expand(groups, rows, cols, shape):
    """Write a bool grid of ``rows`` x ``cols`` blocks out in full."""
    return groups.repeat(rows, 0).repeat(cols, 1)[: shape[0], : shape[1]]


def words(groups, cols, shape, itemsize):
    """Return -1 where kept and 0 where pruned, one row a block row, ``itemsize`` bytes each."""
    dtype = {2: np.int16, 4: np.int32, 8: np.int64}[itemsize]
    return -groups.repeat(cols, 1)[:, : shape[1]].astype(dtype)


def nm_mask(array, n, m):
    """Keep of every m columns the n largest magnitudes, of equal ones the first."""
    tuples = np.abs(array).astype(np.float32).reshape(array.shape[0], array.shape[1] // m, m)
    kept = np.zeros(tuples.shape, bool)
    order = np.argsort(-tuples, axis=2, kind="stable")
    np.put_along_axis(kept, order[..., :n], True, 2)
    return kept.reshape(array.shape)


def tile_patterns():
    """Return all 4 x 4 patterns with two ones in each row and column, the first columns first."""
    rows = [row for row in itertools.product((1, 0), repeat=4) if sum(row) == 2]
    grids = (np.array(grid) for grid in itertools.product(rows, repeat=4))
    return np.array([grid for grid in grids if (grid.sum(0) == 2).all()], bool)


def transposable_mask(array):
    """Keep of every 4 x 4 tile the pattern of the largest sum, of equal ones the first."""
    patterns, kept = tile_patterns(), np.zeros(array.shape, bool)
    for i in range(0, array.shape[0], 4):
        for j in range(0, array.shape[1], 4):
            sums = (np.abs(array[i : i + 4, j : j + 4]).astype(float) * patterns).sum((1, 2))
            kept[i : i + 4, j : j + 4] = patterns[sums.argmax()]
    return kept


def group_sums(array, tall, wide):
    """Add up every group of ``tall`` x ``wide`` elements."""
    rows, cols = array.shape[0] // tall, array.shape[1] // wide
    return array.reshape(rows, tall, cols, wide).sum((1, 3))
