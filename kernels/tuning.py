"""Tuning tables: what an autotuning run measured, as a file, and how kernels look it up.

A table is of one device model, one version of Triton and one state of the kernels' source. It is
read when a kernel first asks, from the user's cache folder, else from the tables that come with
the package. A file that is another's, is stale or is damaged is left aside with one warning.

Keys hold the weight, its blocks and the dtype, never the number of tokens: a table must not be
searched anew for every batch. Tiles are of the exact shape of a weight. Break-even densities are
of a shape class, both sides rounded down to powers of two: they change slowly, and a model's
weights have more shapes than anybody wants to measure. Of two weights of a class the lower density
counts, so that nothing becomes slower for being sparse.

Reading order: content -> identity -> files -> lookup.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .launch import HAS_TRITON, Backend, triton, use_triton
from .pattern import Block, Pattern, grid_shape
from .tiles import Tile, can_specialise, measured
from .topology import BUNDLE_WIDTH, bundling

FORMAT = 1
SOURCES = (
    "block_sparse_gluon.py",
    "block_sparse_linear.py",
    "block_sparse_product.py",
    "block_sparse_torch.py",
    "block_sparse_wgrad.py",
    "launch.py",
    "schedule.py",
    "tiles.py",
    "topology.py",
)
SHIPPED = Path(__file__).parent / "tables"
IGNORED = "triton-sparsity: tuning table"  # how the warning about one begins
DIRECTIONS = ("forward", "dgrad", "wgrad")
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}

# highest densities at which skipping pruned blocks is not slower, by direction; 0: never. The last
# is that of all three together, as a training step has them
DENSITIES = (*DIRECTIONS, "total")

TileKey = tuple[str, tuple[int, int], Pattern, torch.dtype]
ClassKey = tuple[torch.dtype, Pattern, tuple[int, int]]


class Table(NamedTuple):
    """What a device's tuning table says."""

    tiles: dict[TileKey, Tile]
    break_even: dict[ClassKey, tuple[float, float, float]]


class Identity(NamedTuple):
    """What a table is valid for: names and versions, and a hash of the kernels' source."""

    device: str
    backend: str
    triton: str
    kernels: str


def shape_class(shape: tuple[int, int]) -> tuple[int, int]:
    """Return a weight's sides, each rounded down to a power of two."""
    rows, cols = (1 << max(side, 1).bit_length() - 1 for side in shape)
    return rows, cols


def parse(content: Any) -> Table:
    """Turn the parsed JSON of a table into what kernels look up.

    Raises:
        ValueError: it is no table, or a value is out of its range.
    """
    _must(isinstance(content, dict), "an object", content)
    _must(content.get("format") == FORMAT, f"format {FORMAT}", content.get("format"))
    for part in ("tiles", "break_even"):
        _must(isinstance(content.get(part), list), f"a list {part!r}", content.get(part))
    tiles: dict[TileKey, Tile] = {}
    for row in content["tiles"]:
        shape, block, dtype = _subject(row)
        direction = row.get("direction")
        _must(direction in DIRECTIONS, f"a direction of {', '.join(DIRECTIONS)}", direction)
        tile = _tile(row.get("tile"))
        _must(fits(tile, direction, shape, block), "tiles that fit their blocks", row["tile"])
        tiles[direction, shape, block, dtype] = tile
    break_even: dict[ClassKey, tuple[float, float, float]] = {}
    for row in content["break_even"]:
        shape, block, dtype = _subject(row)
        values = [row.get(name) for name in DENSITIES]
        ok = all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
        _must(ok, f"densities {', '.join(DENSITIES)} from 0 to 1", values)
        key = dtype, block, shape_class(shape)
        forward, dgrad, wgrad = map(min, values[:3], break_even.get(key, (1.0, 1.0, 1.0)))
        break_even[key] = float(forward), float(dgrad), float(wgrad)
    return Table(tiles, break_even)


def _must(condition: bool, wanted: str, found: object) -> None:
    if not condition:
        raise ValueError(f"it must have {wanted}, got {found!r:.60}")


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)


def _subject(row: Any) -> tuple[tuple[int, int], Block, torch.dtype]:
    _must(isinstance(row, dict), "objects as rows", row)
    shape, block, dtype = row.get("weight"), row.get("block"), row.get("dtype")
    _must(_pair(shape) and min(shape) > 0, "a weight's two sides", shape)
    _must(_pair(block), "a block's two sides", block)
    _must(isinstance(dtype, str) and dtype in DTYPES, f"a dtype of {', '.join(DTYPES)}", dtype)
    return (shape[0], shape[1]), Block(*block), DTYPES[dtype]


def _tile(value: Any) -> Tile:
    fields = Tile._fields
    ok = isinstance(value, dict) and set(value) == set(fields)
    ok = ok and all(type(value[name]) is int for name in fields)
    ok = ok and min(value[name] for name in fields if name != "specialised") > 0
    _must(ok and value["specialised"] in (0, 1), f"tiles of {', '.join(fields)}", value)
    tile = Tile(**value)
    powers = all(v & (v - 1) == 0 for v in (tile.m, tile.n, tile.k, tile.warps))
    sane = min(tile[:3]) >= 16 and max(tile[:3]) <= 1024 and tile.warps <= 16
    _must(powers and sane and tile.stages <= 16 and tile.programs <= 16, "sane tiles", value)
    return tile


def fits(tile: Tile, direction: str, shape: tuple[int, int], block: Block) -> bool:
    """Tell whether a kernel can cut a weight's blocks into such tiles."""
    if tile.specialised and (direction == "wgrad" or not can_specialise(tile)):
        return False
    match direction:
        case "forward":
            return tile.n <= block.rows and tile.k <= block.cols
        case "dgrad":
            return tile.n <= block.cols and tile.k <= block.rows
        case _:
            by_rows, _ = bundling(block, grid_shape(block, shape))
            return tile.n == BUNDLE_WIDTH and tile.m <= (block.rows if by_rows else block.cols)


def device_name(device: torch.device) -> str:
    """Return the model of a device: a GPU's name, or a CPU's as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return name if "cpu" in name.lower() else f"{name} CPU"


def slug(name: str) -> str:
    """Return a device's name as a file's: lower case, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def source_hash() -> str:
    """Return a hash of the source that a table's figures depend on."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def identity(device: torch.device, backend: Backend = "auto") -> Identity:
    """Return what a table must say to be used on ``device`` by this code."""
    version = triton.__version__ if HAS_TRITON else "none"
    runs = use_triton("tuning", backend, torch.empty(0, device=device))
    return Identity(device_name(device), "triton" if runs else "torch", version, source_hash())


def user_file(name: str) -> Path | None:
    """Return where the user's own table of a device is or would be; None if nobody can tell."""
    try:
        import platformdirs
    except ModuleNotFoundError:
        return None
    folder = platformdirs.user_cache_path("triton-sparsity", appauthor=False)
    return folder / "tuning" / f"{slug(name)}.json"


def read(path: Path, wanted: Identity) -> Mapping[str, Any]:
    """Return the content of a table that ``parse`` understands and that is valid here.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table, or not of this device, Triton or source.
    """
    try:
        content = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    parse(content)
    for name, value in wanted._asdict().items():
        if content.get(name) != value:
            what = "kernel source" if name == "kernels" else name
            raise ValueError(f"it is of {what} {content.get(name)!r}, here is {value!r}")
    return content


@functools.cache
def table(device: torch.device) -> Table:
    """Return the table of a device, read once a process; an empty one if there is none."""
    found = _find(identity(device))
    return Table({}, {}) if found is None else parse(found)


def _find(wanted: Identity) -> Mapping[str, Any] | None:
    path = user_file(wanted.device)
    try:
        if path is not None and path.exists():
            return read(path, wanted)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{IGNORED} {path} is ignored: {error}; `triton-sparsity autotune` measures it anew",
            stacklevel=4,
        )
    shipped = SHIPPED / f"{slug(wanted.device)}.json"
    try:
        return read(shipped, wanted) if shipped.exists() else None
    # the package's table, not the user's: there is nothing to tell
    except (OSError, ValueError):
        return None


def tuned_tile(
    direction: str,
    shape: tuple[int, int],
    block: Pattern,
    dtype: torch.dtype,
    device: torch.device,
) -> Tile | None:
    """Return the measured tile of a weight, if there is one and it may count.

    ``tiles.measured``, which a program may fill, comes before the device's table. Under
    ``torch.use_deterministic_algorithms`` neither counts: the same sums in the same order on every
    machine of one kind.
    """
    if torch.are_deterministic_algorithms_enabled():
        return None
    key = direction, shape, block, dtype
    tile = measured.get(key)
    if tile is None and device.type == "cuda":
        tile = table(device).tiles.get(key)
    return tile


def break_even(
    shape: tuple[int, int], block: Pattern, dtype: torch.dtype, device: torch.device
) -> tuple[float, float, float] | None:
    """Return the measured break-even densities of weights like this one, by direction, if any."""
    return table(device).break_even.get((dtype, block, shape_class(shape)))
