"""The search for the best tile of a kernel: one field is changed at a time, and a faster tile
becomes the new start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..kernels import tiles, tuning
from ..kernels.pattern import MIN_SIDE, Block
from ..kernels.tiles import RESERVE, Device, Tile
from .measure.counts import DIRECTIONS, intensity

MAX_ACCUMULATORS = 128  # float32 registers a thread, of 255 that it has
WORTH = 0.99  # a tile must take at most this part of the best one's time to replace it
OPERATION = {direction: operation for operation, direction in DIRECTIONS.items()}


def descend(
    start: Tile,
    usable: Callable[[Tile], bool],
    time: Callable[[Tile, float | None], float | None],
    most: int,
    others: Sequence[Tile] = (),
) -> tuple[Tile, float, dict[Tile, float | None]]:
    """Find a tile that no neighbour beats.

    Args:
        start: the first one, which must work.
        usable: whether a tile is worth trying.
        time: seconds that a tile takes, given the best time so far, or None if it does not work.
        most: tiles to try in all.
        others: tiles that may be far from ``start``, tried before neighbours are.

    Returns:
        The best tile, its seconds, and all that were tried.

    Raises:
        ValueError: the first one does not work.
    """
    seconds = time(start, None)
    if seconds is None:
        raise ValueError(f"autotune: the kernel's result with its own tile {start} is wrong")
    tried: dict[Tile, float | None] = {start: seconds}
    best, moved = start, True
    while moved and len(tried) < most:
        moved = False
        for tile in (*others, *neighbours(best)):
            if tile in tried or not usable(tile):
                continue
            if len(tried) == most:
                break
            tried[tile] = found = time(tile, seconds)
            if found is not None and found <= WORTH * seconds:
                best, seconds, moved = tile, found, True
                break
    return best, seconds, tried


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Yield tiles with one field changed, those first that tend to matter most."""
    for stages in (tile.stages + 1, tile.stages - 1, tile.stages - 2):
        if stages >= 2:
            yield tile._replace(stages=stages)
    yield tile._replace(specialised=1 - tile.specialised)
    for name in ("k", "m", "n"):
        for value in (getattr(tile, name) * 2, getattr(tile, name) // 2):
            # the pipeline keeps as many bytes in flight, or as many stages
            for stages in (max(2, tile.stages * getattr(tile, name) // value), tile.stages):
                yield tile._replace(**{name: value, "stages": stages})
    yield tile._replace(warps=4 if tile.warps == 8 else 8)
    other = 2 if tile.programs == 1 else 1
    yield tile._replace(programs=other, stages=max(2, tile.stages * tile.programs // other))


def usable(
    tile: Tile,
    *,
    direction: str,
    shape: tuple[int, int],
    block: Block,
    device: Device,
    size: int,
    specialise: bool,
    least: float,
) -> bool:
    """Tell whether a tile can run and is worth trying.

    Args:
        tile: with what.
        direction, shape, block: of the product: whether ``m``, ``n`` and ``k`` divide them.
        device: whose shared memory it must fit.
        size: bytes of an element.
        specialise: whether warps of two kinds can be tried, on a Hopper device with 16 bits.
        least: FLOPs per byte read from the L2 that it must reach.
    """
    if not tuning.fits(tile, direction, shape, block) or min(tile[:3]) < MIN_SIDE:
        return False
    if tile.specialised and not (specialise and device.capability == (9, 0) and size == 2):
        return False
    room = device.shared // tile.programs - RESERVE
    held = tile.m * tile.n // (1 if direction == "wgrad" else tiles.stores(tile.n))
    shared = (held + tile.stages * (tile.m + tile.n) * tile.k) * size
    accumulators = tile.m * tile.n // (32 * tile.warps)
    operation = OPERATION[direction]
    return (
        shared <= room
        and accumulators <= MAX_ACCUMULATORS
        and tile.stages <= tiles.MAX_STAGES
        and intensity(operation, tile, size) >= least
    )
