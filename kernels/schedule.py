"""The schedule of a block-sparse product: which program computes which tile, and in what order.

A product has ``num_m`` token tiles times ``bands`` of outputs, and a tile takes as many steps as
its band has kept blocks. Only the device knows how many these are, and a program must know its
tiles before it starts: so the schedule is fixed by shape, and has to balance whatever the masks.

- **Order.** Bands are sorted, the longest first. Panels of ``group`` token tiles; in each, band
  after band, and within a band token tile after token tile. A panel's activations stay in L2.
- **Dealing.** Programs take the tiles in rounds, in odd rounds backwards: what a program gains in
  one round it gives back in the next. Each pair of rounds is turned by ``shift`` programs, so that
  where a round is a whole panel no program has the same band in each.
- **Split.** Where tokens are few and tiles fewer than a round or two, all steps are one row, tile
  after tile, each followed by the steps that its end takes as long as. Programs take equal shares
  of the row, however that cuts tiles ("stream-K", arXiv 2301.03598). The float32 sums of a tile's
  later parts go to a scratch; who began the tile adds them up in order and stores it. A later part
  is the first that its program computes: nobody waits for long.

``plan_product`` tries panels, numbers of programs, shifts and tiles on model masks. The functions
above it are the kernel's arithmetic in numpy, and a test holds the two together.

Reading order: the plan -> the kernel's arithmetic -> the cost of a plan -> the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .grid import ceil_div
from .tiles import Tile

Ints = NDArray[np.int64]

PANEL_BYTES = 32 * 2**20  # of activations
MAX_GROUP = 32  # token tiles of a panel
BALANCED = 0.96
FILLED = 0.9  # one this good, and smaller tiles are not tried
EVEN = 0.82  # the balance that a plan should have under every model mask,
WORTH = 1.12  # if it takes no longer than so many times what the fastest one takes


class Rates(NamedTuple):
    """What one multiprocessor can do; estimates that serve to compare plans with one another.

    Attributes:
        flops: of 16-bit products a nanosecond.
        bytes: from the L2 cache a nanosecond.
    """

    flops: float
    bytes: float


HOPPER = Rates(5985, 53)  # 790 TFLOP/s of a dense product and 7 TB/s of L2, by 132
TILE_TIME = 200.0  # ns of a tile's end, beside its bytes
FEW_ROUNDS = 4  # up to so many a split is tried


class Plan(NamedTuple):
    """How a product is launched.

    Attributes:
        tile: its tile.
        group: token tiles of a panel.
        programs: of the launch.
        shift: by how many programs a pair of rounds is turned against the pair before.
        end_steps: of a split, as how many steps the end of a tile counts; 0: no split.
    """

    tile: Tile
    group: int
    programs: int
    shift: int
    end_steps: int = 0

    @property
    def split(self) -> bool:
        """Whether each program takes an equal share of all steps."""
        return self.end_steps > 0


def tile_order(num_m: int, bands: int, group: int) -> tuple[Ints, Ints]:
    """Return the token tile and the band of every tile, in their order."""
    tile = np.arange(num_m * bands)
    first = tile // (group * bands) * group
    width = np.minimum(num_m - first, group)
    within = tile - first * bands
    return first + within % width, within // width


def dealt(turn: Ints, program: Ints, programs: int, shift: int) -> Ints:
    """Return which tile a program takes in round ``turn``; past the last one, none."""
    rank = (program + turn // 2 * shift) % programs
    return turn * programs + np.where(turn % 2 == 1, programs - 1 - rank, rank)


class Loads(NamedTuple):
    """What each program does.

    Attributes:
        steps: of its tiles.
        tiles: that it stores.
        parts: later parts of tiles: that it leaves to others, and of others that it adds.
    """

    steps: Ints
    tiles: Ints
    parts: Ints


def program_loads(plan: Plan, steps: Ints, num_m: int) -> Loads:
    """Return what each program does.

    Args:
        plan: the schedule.
        steps: of a tile of each band, the longest first.
        num_m: token tiles.
    """
    if plan.split:
        return _split_loads(plan, np.repeat(steps, num_m))
    band = tile_order(num_m, len(steps), plan.group)[1]
    turns = np.arange(ceil_div(len(band), plan.programs))[:, None]
    mine = dealt(turns, np.arange(plan.programs), plan.programs, plan.shift)
    there = mine < len(band)
    own = (steps[band[np.where(there, mine, 0)]] * there).sum(0)
    return Loads(own, there.sum(0), np.zeros_like(own))


def shares(plan: Plan, steps: Ints) -> Ints:
    """Return where the share of each program of a split begins, and the last one's end, in steps.

    Args:
        plan: the schedule.
        steps: of every tile, in order.
    """
    row = steps + plan.end_steps
    ends = row.cumsum()
    cuts = np.arange(plan.programs + 1) * int(ends[-1]) // plan.programs
    tile = np.searchsorted(ends, cuts, "right")
    begins, before = (np.append(0, lengths.cumsum()) for lengths in (row, steps))
    return before[tile] + np.minimum(cuts - begins[tile], np.append(steps, 0)[tile])


def _split_loads(plan: Plan, steps: Ints) -> Loads:
    """Return the loads of a split; ``steps`` are of every tile, in order."""
    ends, cuts = steps.cumsum(), shares(plan, steps)
    begin, stop = cuts[:-1], cuts[1:]
    # the tiles that a share touches, those that begin in it, and whose tile a later part is of
    first, last = np.searchsorted(ends, [begin, stop - 1], "right")
    touched = np.where(stop > begin, last - first + 1, 0)
    begun = np.diff(np.searchsorted(ends - steps, cuts))
    later = touched > begun
    owners = np.searchsorted(cuts, (ends - steps)[first[later]], "right") - 1
    added = np.bincount(owners, minlength=plan.programs)
    return Loads(stop - begin, begun, later + added)


def _loads(
    plan: Plan, steps: Ints, num_m: int, processors: int, times: TileTimes
) -> NDArray[np.float64]:
    """Return the load of each multiprocessor: programs beyond as many share them, in order."""
    own, tiles, parts = program_loads(plan, steps, num_m)
    load = own * times.step + tiles * times.end + parts * times.part
    places = np.arange(plan.programs) % processors
    weights: NDArray[np.float64] = load.astype(np.float64)
    return np.bincount(places, weights, processors).astype(np.float64, copy=False)


def balance(plan: Plan, steps: Ints, num_m: int, processors: int, end: float = 1.5) -> float:
    """Return the mean load of the multiprocessors over that of the slowest, 1 at best.

    Args:
        plan, steps, num_m: as ``program_loads``'s.
        processors: multiprocessors of the device.
        end: what a tile's end takes, in steps.
    """
    load = _loads(plan, steps, num_m, processors, TileTimes(1, end, end))
    return float(load.mean() / load.max())


class TileTimes(NamedTuple):
    """Nanoseconds of a step, of storing a tile, and of storing or adding a part in float32."""

    step: float
    end: float
    part: float


def tile_times(tile: Tile, size: int, rates: Rates = HOPPER) -> TileTimes:
    """Return what a tile takes; a step by arithmetic or L2, whichever is slower.

    Args:
        tile: of a product.
        size: bytes of an element.
        rates: of a multiprocessor.
    """
    flops, area = 2 * tile.m * tile.n * tile.k * (size / 2), tile.m * tile.n
    step = max(flops / rates.flops, (tile.m + tile.n) * tile.k * size / rates.bytes)
    return TileTimes(step, *(TILE_TIME + area * n / rates.bytes for n in (size, 4)))


def model_masks(lines: int, blocks: int) -> list[Ints]:
    """Return how many of its ``blocks`` each line keeps, the most first, under masks that a plan
    must suit: random ones, and some that have nine kept blocks in ten in half of the lines; at
    50, 80, 90 and 95 %, of the last two draws. The same in every process.
    """
    random = np.random.default_rng(0)
    heavy = np.where(np.arange(lines) < lines // 2, 1.8, 0.2)
    found = []
    for density in (0.5, 0.2, 0.1, 0.05, 0.05):
        for share in (np.ones(lines), heavy):
            kept = random.binomial(blocks, density * share)
            found.append(np.sort(kept)[::-1])
    return found


def _candidates(
    tile: Tile, num_m: int, bands: int, widest: int, processors: int
) -> Iterator[Plan]:
    limit = processors * tile.programs
    tiles = num_m * bands
    for group in range(min(num_m, max(widest, 1), MAX_GROUP), 0, -1):
        # as many programs as there can be, or nearly so many that make whole rounds of a panel
        whole = [p for p in range(limit, limit - limit // 16, -1) if group * bands % p == 0]
        for programs in dict.fromkeys([limit, *whole]):
            pairs = max(1, ceil_div(ceil_div(tiles, programs), 2))
            for shift in dict.fromkeys([0, programs // pairs % programs, programs // (2 * pairs)]):
                yield Plan(tile, group, min(programs, tiles), shift)


def _cost(
    plan: Plan, all_steps: Sequence[Ints], num_m: int, processors: int, times: TileTimes
) -> tuple[float, float]:
    """Return a plan's time, masks counting alike however dense, and its worst balance."""
    time, share = 0.0, 1.0
    for steps in all_steps:
        load = _loads(plan, steps, num_m, processors, times)
        time += load.max() / (plan.tile.k * plan.tile.n * steps.sum())
        share = min(share, load.mean() / load.max())
    return time, share


@lru_cache(maxsize=4096)
def plan_product(
    M: int,
    K: int,
    lines: int,
    side_n: int,
    side_k: int,
    size: int,
    processors: int,
    tiles: Sequence[Tile],
) -> Plan:
    """Choose a plan: the fastest of those that balance every model mask and are hardly slower than
    the fastest of all; if there are none, the most even of those.

    Args:
        M, K: tokens and reduced features.
        lines: of blocks, ``side_n`` outputs each.
        side_n, side_k: of a block.
        size: bytes of an element.
        processors: multiprocessors of the device.
        tiles: what to choose among, the most efficient first: smaller ones, for few tokens.
    """
    found: list[tuple[float, float, Plan]] = []  # time, balance
    masks = model_masks(lines, ceil_div(K, side_k))
    for tile in tiles:
        num_m, per_line, parts = ceil_div(M, tile.m), side_n // tile.n, side_k // tile.k
        all_steps = [np.maximum(np.repeat(kept, per_line) * parts, 1) for kept in masks]
        times = tile_times(tile, size)
        widest = PANEL_BYTES // (tile.m * K * size)

        filled, dealt_out = 0.0, None
        for plan in _candidates(tile, num_m, lines * per_line, widest, processors):
            time, share = _cost(plan, all_steps, num_m, processors, times)
            if share > filled:
                filled, dealt_out = share, (time, share, plan)
            if share >= BALANCED:
                break
        assert dealt_out is not None
        found.append(dealt_out)
        if filled >= FILLED:
            break
        limit = processors * tile.programs
        if num_m * lines * per_line <= FEW_ROUNDS * limit:
            # parts pass through the memory of a stage
            fewer = tile._replace(stages=max(2, tile.stages - 1))
            for end_steps in (1, 2):
                plan = Plan(fewer, num_m, limit, 0, end_steps)
                found.append((*_cost(plan, all_steps, num_m, processors, times), plan))
    least = min(time for time, _, _ in found)
    near = [one for one in found if one[0] <= WORTH * least]
    return max(near, key=lambda one: (min(one[1], EVEN), -one[0]))[2]


class GradientLoads(NamedTuple):
    """What each program does of a weight gradient.

    Attributes:
        steps: of wide tiles, and of narrow ones, which are half as long.
        tiles: that it stores, in whole or as a part.
    """

    wide_steps: Ints
    narrow_steps: Ints
    tiles: Ints


def gradient_loads(
    wide: int, narrow: int, steps: int, programs: int, min_steps: int
) -> GradientLoads:
    """Return the schedule of ``block_sparse_wgrad.py``, whose functions these lines follow.

    Args:
        wide, narrow: how many tiles there are.
        steps: of a tile.
        programs: of the launch.
        min_steps: of a part.
    """
    left_wide, left_narrow = wide % programs, narrow % programs
    wide_end = 2 * left_wide * steps
    row = wide_end + left_narrow * steps
    is_cut = steps >= 2 * min_steps
    sharers = max(min(programs, ceil_div(row, 2 * min_steps)) if is_cut else programs, 1)
    begin = np.minimum(np.arange(programs + 1), sharers) * row // sharers
    grain = 1 if is_cut else steps
    begin -= np.where(begin < wide_end, begin % (2 * grain), (begin - wide_end) % grain)
    in_wide = np.minimum(begin, wide_end) // 2
    in_narrow = np.maximum(begin - wide_end, 0)
    # the tiles that a share touches
    ordinal = np.where(
        begin < wide_end, begin // (2 * steps), left_wide + (begin - wide_end) // steps
    )
    last = begin[1:] - 1
    last = np.where(last < wide_end, last // (2 * steps), left_wide + (last - wide_end) // steps)
    touched = np.where(begin[1:] > begin[:-1], last - ordinal[:-1] + 1, 0)
    return GradientLoads(
        wide // programs * steps + np.diff(in_wide),
        narrow // programs * steps + np.diff(in_narrow),
        wide // programs + narrow // programs + touched,
    )


def gradient_balance(
    kept: Ints, size: int, per_bundle: int, steps: int, programs: int, min_steps: int
) -> float:
    """Return the arithmetic of the kept blocks over what the slowest program's time had room for:
    full bundles in whole rounds are 1.

    Args:
        kept: blocks of each line that bundles lie along.
        size: blocks of a full bundle.
        per_bundle: tiles of a bundle.
        steps, programs, min_steps: as ``gradient_loads``'s.
    """
    pieces = -(-kept // size)
    wide = (kept + size - size // 2 - 1) // size
    tiles = int(wide.sum()) * per_bundle, int((pieces - wide).sum()) * per_bundle
    loads = gradient_loads(*tiles, steps, programs, min_steps)
    slowest = (loads.wide_steps + loads.narrow_steps / 2).max()
    return float(kept.sum() * per_bundle / size * steps / (programs * slowest))
