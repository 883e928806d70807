"""Pictures of what was measured, as PNG bytes, drawn from records alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"forward": "o", "dX": "s", "dW": "^", "training step": "*", "transformer step": "P"}


def _figure(**size: Any) -> Figure:
    # the figure's own canvas: no window system, no state that is shared with other plots
    from matplotlib.figure import Figure

    return Figure(dpi=120, layout="constrained", **size)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _where(record: Mapping[str, Any]) -> str:
    return f"{record['device']}, {record['backend']} backend"


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(names))}


def _measured(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in record["rows"] if row["status"] == "ok"]


def roofline(record: Mapping[str, Any]) -> bytes:
    """Draw products under the roofs that were measured, and the rest as a share of theirs.

    Args:
        record: of ``profile``.
    """
    rows = _measured(record)
    products = [row for row in rows if row["flops"] and row["bytes"]]
    moved = [row for row in rows if not row["flops"]]
    shown = _shares(moved)
    figure = _figure(figsize=(12, max(5.5, 0.26 * len(shown) + 1.5)))
    left, right = figure.subplots(1, 2)
    _draw_roofs(left, record, products)
    bars = list(shown.items())[::-1]
    right.barh([name for name, _ in bars], [100 * share for _, share in bars], color="C0")
    for i, (_, share) in enumerate(bars):
        right.text(100 * share + 1, i, f"{100 * share:.0f}", va="center", fontsize=8)
    right.axvline(100, color="0.35", linestyle="--", label="as fast as a copy")
    right.set_xlim(0, max([110.0, *(110 * share for _, share in bars)]))
    right.set_xlabel("counted bytes over time, % of the measured copy")
    right.set_title("what moves memory (median over levels and shapes)")
    right.tick_params(axis="y", labelsize=8)
    right.legend(loc="lower right")
    figure.suptitle(f"Roofline: {_where(record)}")
    return _png(figure)


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(f"{row['operation']}, {row['pattern']}", []).append(row["of_copy"])
    return {name: sorted(shares)[len(shares) // 2] for name, shares in found.items()}


def _draw_roofs(
    axes: Axes, record: Mapping[str, Any], products: Sequence[Mapping[str, Any]]
) -> None:
    ceilings = record["ceilings"]
    peak = max(ceilings["gemm"].values())
    intensities = [row["flops"] / row["bytes"] for row in products] or [1.0]
    ridge = peak / ceilings["copy"]
    low, high = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3
    span = [low, ridge, high]
    axes.plot(
        span,
        [min(peak, i * ceilings["copy"]) / 1e12 for i in span],
        color="0.2",
        label=f"copy {ceilings['copy'] / 1e9:,.0f} GB/s, GEMM {peak / 1e12:,.3g} TFLOP/s",
    )
    colours = _colours([row["pattern"] for row in products])
    for row in products:
        axes.plot(
            row["flops"] / row["bytes"],
            row["tflop_per_s"],
            marker=MARKERS.get(row["operation"], "x"),
            color=colours[row["pattern"]],
            alpha=0.75,
            linestyle="",
        )
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for name, marker in MARKERS.items():
        if any(row["operation"] == name for row in products):
            axes.plot([], [], marker, color="0.5", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of memory, both counted by formula")
    axes.set_ylabel("TFLOP/s of kept weights")
    axes.grid(alpha=0.3, which="both")
    # below: wherever it is put within, it hides points
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    axes.set_title("products")


def speedups(record: Mapping[str, Any]) -> bytes:
    """Draw speed-up over sparsity, a panel an operation, with the dense and the ideal line.

    Args:
        record: of ``profile``.
    """
    rows = [row for row in _measured(record) if row.get("speedup")]
    names = [name for name in MARKERS if any(row["operation"] == name for row in rows)]
    columns = min(max(len(names), 1), 2)
    lines_of = -(-max(len(names), 1) // columns)
    figure = _figure(figsize=(6.2 * columns, 4.6 * lines_of + 0.4))
    panels = figure.subplots(lines_of, columns, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    colours = _colours([row["pattern"] for row in rows])
    lines = ("-", "--", ":", "-.")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for axes, name in zip(panels, names, strict=False):
        mine = [row for row in rows if row["operation"] == name]
        for pattern in dict.fromkeys(row["pattern"] for row in mine):
            for shape in dict.fromkeys(row["shape"] for row in mine):
                points = sorted(
                    (row["level"], row["speedup"])
                    for row in mine
                    if row["pattern"] == pattern and row["shape"] == shape
                )
                axes.plot(
                    [100 * level for level, _ in points],
                    [speedup for _, speedup in points],
                    marker=MARKERS[name],
                    color=colours[pattern],
                    linestyle=lines[shapes.index(shape) % len(lines)],
                    label=f"{pattern}, {'all layers' if ',' in shape else shape}",
                )
        levels = sorted({row["level"] for row in mine})
        span = [min(levels) + (max(levels) - min(levels)) * i / 50 for i in range(51)]
        axes.axhline(1, color="0.2", label="dense")
        axes.plot([100 * x for x in span], [1 / (1 - x) for x in span], color="0.6", label="ideal")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.set_title(name)
        axes.set_xlabel("sparsity level, %")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    for axes in panels[::columns]:
        axes.set_ylabel("dense time / sparse time")
    figure.suptitle(f"Speed-up over sparsity: {_where(record)}")
    return _png(figure)


def sweeps(record: Mapping[str, Any]) -> bytes:
    """Draw how many times as fast as dense a block-sparse linear is over the share of its pruned
    blocks, with the p20 to p80.

    Args:
        record: of ``compare``.
    """
    figure = _figure(figsize=(8, 4.5))
    axes = figure.subplots()
    works: dict[str, list[Mapping[str, Any]]] = {}
    for row in _measured(record):
        if row["work"].startswith("Block-sparse linear") and row.get("speedup"):
            works.setdefault(row["work"], []).append(row)
    for i, (work, rows) in enumerate(works.items()):
        pruned = [int(row["subject"].split()[1]) for row in rows]
        axes.plot(
            pruned, [row["speedup"] for row in rows], "o-", color=f"C{i}", label=work.split(":")[0]
        )
        low, high = ([row[key] for row in rows] for key in ("speedup_p20", "speedup_p80"))
        axes.fill_between(pruned, low, high, color=f"C{i}", alpha=0.15)
    axes.axhline(1, color="0.2", label="dense")
    axes.set_xlabel("pruned blocks, %")
    axes.set_ylabel("dense time / sparse time")
    axes.set_title(
        f"{next(iter(works), ': ').split(': ')[1]}, measured on {record['device']}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return _png(figure)


def modelled(
    device: str,
    levels: Sequence[float],
    efficiencies: Mapping[str, Mapping[int, Sequence[float]]],
    targets: Mapping[str, Mapping[int, float]],
) -> bytes:
    """Draw modelled efficiency over sparsity, a panel a product, beside the targets.

    Args:
        device: its name.
        levels: fractions pruned.
        efficiencies: by product and side of a block, one a level.
        targets: by product and side, of 80 % and more.
    """
    figure = _figure(figsize=(12, 4.6))
    panels = figure.subplots(1, len(efficiencies), sharey=True)
    percent = [100 * level for level in levels]
    for axes, (operation, blocks) in zip(panels, efficiencies.items(), strict=True):
        for i, (side, values) in enumerate(blocks.items()):
            axes.plot(percent, values, "o-", color=f"C{i}", label=f"blocks of {side}")
            axes.hlines(
                targets[operation][side], 80, percent[-1], color=f"C{i}", linestyle="--", alpha=0.7
            )
        axes.set_title(operation)
        axes.set_xlabel("sparsity, %")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("efficiency against the dense product")
    panels[0].plot([], [], "--", color="0.4", label="target")
    panels[0].legend(loc="upper left", fontsize=8)
    figure.suptitle(f"Modelled, not measured: {device}")
    return _png(figure)


def pareto(record: Mapping[str, Any]) -> bytes:
    """Draw the speed-up of each candidate block against the magnitude that survives.

    Args:
        record: of ``recommend``.
    """
    figure = _figure(figsize=(7.5, 5.5))
    axes = figure.subplots()
    blocks = [row for row in record["rows"] if row["speedup"] is not None]
    bound = next(row for row in record["rows"] if row["pattern"] == "unstructured")
    front = _front(blocks)
    axes.plot(
        [100 * row["l1_kept"] for row in front],
        [row["speedup"] for row in front],
        color="C0",
        alpha=0.5,
        label="Pareto front",
    )
    for row in blocks:
        best = row["pattern"] == record["recommended"]
        axes.plot(
            100 * row["l1_kept"],
            row["speedup"],
            marker="*" if best else "o",
            markersize=16 if best else 8,
            color="C3" if best else "C0",
            linestyle="",
        )
        axes.annotate(
            row["pattern"].removeprefix("block:"),
            (100 * row["l1_kept"], row["speedup"]),
            # slanted, so that neighbours do not hide one another
            xytext=(4, 10),
            textcoords="offset points",
            rotation=50,
        )
    axes.axvline(
        100 * bound["l1_kept"], color="0.4", linestyle="--", label="unstructured: the upper bound"
    )
    axes.axhline(1, color="0.2", label="dense")
    axes.plot([], [], "*", color="C3", markersize=12, label="recommended")
    axes.margins(x=0.2, y=0.35)
    axes.set_xlabel("magnitude kept, % of the L1 norm")
    axes.set_ylabel("speed-up of forward and backward")
    axes.set_title(f"{record['model']} at {100 * record['level']:g} % sparsity\n{record['basis']}")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def _front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that no other beats in both, by rising magnitude."""
    best = [
        row
        for row in rows
        if not any(
            other["l1_kept"] >= row["l1_kept"]
            and other["speedup"] >= row["speedup"]
            and other is not row
            for other in rows
        )
    ]
    return sorted(best, key=lambda row: row["l1_kept"])


def heat_maps(record: Mapping[str, Any]) -> bytes:
    """Draw how much the loss rises by each weight at each level; a panel a pattern.

    Args:
        record: of ``sensitivity``.
    """
    proposals = record["proposals"]
    names = [*proposals[0]["levels"]]
    figure = _figure(figsize=(3 + 2.6 * len(proposals), 1.5 + 0.22 * len(names)))
    images = []
    panels = figure.subplots(1, len(proposals), squeeze=False, sharey=True)[0]
    rises = [row["increase"] for row in record["rows"]]
    # what is less than that is noise, or next to nothing
    least = max(max(rises) / 1000, 1e-6)
    for axes, proposal in zip(panels, proposals, strict=True):
        rows = [row for row in record["rows"] if row["pattern"] == proposal["pattern"]]
        levels = sorted({row["level"] for row in rows})
        found = {(row["name"], row["level"]): row["increase"] for row in rows}
        grid = [[max(found[name, level], least) for level in levels] for name in names]
        image = axes.imshow(
            grid,
            aspect="auto",
            cmap="viridis",
            norm="log",
            vmin=least,
            vmax=max(*rises, 2 * least),
        )
        images.append(image)
        axes.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(proposal["pattern"])
        for i, name in enumerate(names):
            axes.text(
                len(levels) - 0.4,
                i,
                f"{100 * proposal['levels'][name]:.0f} %",
                va="center",
                fontsize=7,
            )
    figure.colorbar(images[-1], ax=list(panels), label="increase of the loss", pad=0.12)
    at = f"{100 * record['level']:g} %"
    figure.suptitle(f"{record['model']}: one weight pruned; right: proposed for {at}", fontsize=9)
    return _png(figure)
