"""Tables of what was measured, for the terminal and, as Markdown, for pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .drift import Drift


def console() -> Console:
    """Return where tables go: stdout, wide enough not to cut them where nobody looks at it."""
    found = Console(highlight=False, soft_wrap=True)
    if not found.is_terminal:
        found.width = 160
    return found


def seconds(value: float | None) -> str:
    """Spell a time in the unit that suits it."""
    if value is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def faster(speedup: float | None) -> str:
    """Spell a time of the baseline over one's own: ``37x faster``, ``1.2x slower``."""
    if speedup is None:
        return ""
    factor = _factor(max(speedup, 1 / speedup))
    return "as fast" if factor == "1.00x" else f"{factor} {'faster' if speedup > 1 else 'slower'}"


def faster_within(speedup: float | None, low: float | None, high: float | None) -> str:
    """Spell a speed-up and its spread: ``37x faster (36x to 55x)``.

    Args:
        speedup: the baseline's time over that of what is spelled.
        low, high: its spread; None where nobody knows it.
    """
    if speedup is None or low is None or high is None:
        return faster(speedup)
    if low >= 1 and speedup > 1:
        spread = f"{_factor(low)} to {_factor(high)}"
    elif high <= 1 and speedup < 1:
        spread = f"{_factor(1 / high)} to {_factor(1 / low)}"
    else:
        spread = f"{faster(low)} to {faster(high)}"
    return f"{faster(speedup)} ({spread})"


def _factor(value: float) -> str:
    """Spell a factor of 1 or more, with as many digits as mean something."""
    return f"{value:.{0 if value >= 9.95 else 1 if value >= 1.095 else 2}f}x"


def table(title: str | None, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first columns are names: those with no digit-like heading."""
    made = Table(title=title, title_justify="left")
    for heading in headings:
        name = heading.endswith(":")
        made.add_column(heading.rstrip(":"), justify="left" if name else "right", no_wrap=name)
    for row in rows:
        made.add_row(*row)
    return made


def where(record: Mapping[str, Any]) -> str:
    """Return one line on where a record was made."""
    threads = f", {record['threads']} threads" if record.get("threads") else ""
    return (
        f"{record['device']}, backend {record['backend']}{threads}, torch {record['torch']}, "
        f"triton {record['triton'] or 'absent'}"
    )


def ceilings_line(record: Mapping[str, Any]) -> str:
    """Return one line on what the device can do."""
    found = record["ceilings"]
    gemm = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {name}" for name, rate in found["gemm"].items())
    cache = "L2 read" if record["device_type"] == "cuda" else "cached read of one core"
    return (
        f"ceilings: copy {found['copy'] / 1e9:,.0f} GB/s, {cache} {found['cache'] / 1e9:,.0f} "
        f"GB/s, GEMM {gemm}; measuring adds {seconds(record['overhead_s'])} to a time"
    )


def profile_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of ``profile``."""
    headings = (
        "operation:", "shape:", "pattern:", "level", "median", "p20 to p80", "over passes",
        "GB/s", "TFLOP/s", "of bound", "bound:", "dense", "speed-up over dense",
    )  # fmt: skip
    lines = []
    for row in rows:
        shape = row["shape"]
        head = (row["operation"], "all layers" if "," in shape else shape, row["pattern"])
        level = f"{row['level']:g}"
        if row["status"] != "ok":
            note = (row["status"].upper(), row["detail"][:60])
            lines.append((*head, level, *note, *[""] * 7))
            continue
        rate = row["tflop_per_s"]
        lines.append(
            (
                *head,
                level,
                seconds(row["median_s"]),
                f"{seconds(row['p20_s'])} to {seconds(row['p80_s'])}",
                f"{seconds(row['low_s'])} to {seconds(row['high_s'])}",
                f"{row['gb_per_s']:.3g}",
                "" if rate is None else f"{rate:.3g}",
                percent(row["of_bound"]),
                row["bound"],
                seconds(row["dense_s"]),
                faster(row["speedup"]),
            )
        )
    return table(None, headings, lines)


def show_profile(
    record: Mapping[str, Any], folder: Path | None, names: Sequence[str] = ()
) -> None:
    """Print what ``profile`` found, and where its files are."""
    out = console()
    out.print(where(record))
    out.print(ceilings_line(record))
    for note in record["notes"]:
        out.print(note)
    out.print(profile_table(record["rows"]))
    bad = [row for row in record["rows"] if row["status"] != "ok"]
    for row in bad:
        out.print(
            f"{row['status']}: {row['operation']} {row['shape']} {row['pattern']} "
            f"{row['level']:g}: {row['detail']}"
        )
    if folder is not None:
        out.print(f"{folder}: {', '.join(names)}")


def show_drift(found: Drift, earlier: Mapping[str, Any]) -> None:
    """Print which times lie beyond the spread of an earlier record's."""
    out = console()
    moved, compared, pace = found
    out.print(
        f"against commit {earlier['commit']} of {earlier['date']}, {where(earlier)}: "
        f"{compared - len(moved)} of {compared} times agree within their spread over passes"
    )
    if pace is not None:
        out.print(f"dense work, which no change of ours explains, took {pace:.2f} of its time")
    for one in moved:
        row = one.row
        out.print(
            f"  {one.ratio:.2f} of the earlier time: {'dense ' if one.dense else ''}"
            f"{row['operation']} {row['shape']} {row['pattern']} {row['level']:g}"
        )


def show_recommendation(record: Mapping[str, Any], folder: Path | None) -> None:
    """Print what ``autotune --recommend`` found."""
    out = console()
    out.print(where(record))
    out.print(
        f"{record['model']}: {record['weights']} weights, {record['parameters'] / 1e6:,.1f} M "
        f"parameters, {100 * record['level']:g} % pruned in one pool; speed-ups are "
        f"{record['basis']}"
    )
    rows = [
        (
            row["pattern"] + (" *" if row["pattern"] == record["recommended"] else ""),
            faster(row["speedup"]) or "none",
            f"{100 * row['l1_kept']:.1f} %",
            f"{100 * row['l2_kept']:.1f} %",
        )
        for row in record["rows"]
    ]
    out.print(table(None, ("pattern:", "speed-up over dense", "L1 kept", "L2 kept"), rows))
    out.print(record["sentence"])
    if folder is not None:
        out.print(f"{folder}: recommend.json, pareto.png")


def show_sensitivity(record: Mapping[str, Any], folder: Path | None) -> None:
    """Print what ``sensitivity`` found: a table a pattern, and what the levels proposed give."""
    out = console()
    out.print(where(record))
    out.print(
        f"{record['model']}, {record['objective']}: loss {record['loss']:.4f} on "
        f"{record['examples']} examples; below, how much it rises with one weight pruned"
    )
    for proposal in record["proposals"]:
        mine = [row for row in record["rows"] if row["pattern"] == proposal["pattern"]]
        levels = sorted({row["level"] for row in mine})
        found = {(row["name"], row["level"]): row["increase"] for row in mine}
        rows = [
            (name, *(f"{found[name, at]:+.2g}" for at in levels), f"{100 * level:.1f} %")
            for name, level in proposal["levels"].items()
        ]
        headings = ("weight:", *(f"{100 * level:g} %" for level in levels), "level proposed")
        out.print(table(proposal["pattern"], headings, rows))
        out.print(
            f"{proposal['pattern']}, {100 * proposal['level']:.1f} % of all: loss "
            f"{proposal['loss']:.4f} with these levels, {proposal['uniform_loss']:.4f} with one "
            "for all, before any training"
        )
    if folder is not None:
        out.print(f"{folder}: sensitivity.json, sensitivity.png")


def show_tuning(content: Mapping[str, Any], output: Path) -> None:
    """Print a tuning table: tiles with their gain, and sparsities from which skipping pays."""
    out = console()
    if content["tiles"]:
        rows = [
            (
                row["direction"],
                f"{row['weight'][0]}x{row['weight'][1]}",
                f"{row['block'][0]}x{row['block'][1]}",
                row["dtype"],
                "{m} x {n} x {k}, {warps} warps, {stages} stages, {programs} a processor".format(
                    **row["tile"]
                ),
                seconds(row["seconds"]),
                faster(row["default_seconds"] / row["seconds"]),
            )
            for row in content["tiles"]
        ]
        headings = (
            "direction:",
            "weight:",
            "block:",
            "dtype:",
            "tile:",
            "time",
            "speed-up over default",
        )
        out.print(table("Tiles", headings, rows))
    else:
        out.print("no Triton on this device: there are no tiles to tune, only where skipping pays")
    rows = [
        (
            f"{row['weight'][0]}x{row['weight'][1]}",
            f"{row['block'][0]}x{row['block'][1]}",
            row["dtype"],
            str(row["tokens"]),
            *(
                "never" if row[name] == 0 else f"{100 * (1 - row[name]):.0f} %"
                for name in ("forward", "dgrad", "wgrad", "total")
            ),
        )
        for row in content["break_even"]
    ]
    headings = ("weight:", "block:", "dtype:", "tokens", "forward", "dX", "dW", "all three")
    out.print(table("Sparsity from which skipping is not slower than dense", headings, rows))
    out.print(f"table: {output}")


def show_doctor(record: Mapping[str, Any]) -> None:
    """Print what ``doctor`` found."""
    out = console()
    out.print(f"device       {record['device']}")
    for name, value in record["facts"].items():
        out.print(f"  {name:<11}{value}")
    out.print(
        f"versions     triton-sparsity {record['version']}, torch {record['torch']}, triton "
        f"{record['triton'] or 'absent'}, cuda {record['cuda'] or 'absent'}, python "
        f"{record['python']}"
    )
    out.print(f"backend      {record['backend']}: {record['why']}")
    out.print(f"tuning table {record['table']}")
    found = ", ".join(
        f"{name} {'is' if there else 'is not'} installed"
        for name, there in record["optional"].items()
    )
    out.print(f"peers        {found}")
    failed = [row for row in record["rows"] if row["status"] != "ok"]
    for row in failed:
        out.print(f"FAILED       {row['check']}: {row['detail']}")
    out.print(
        f"self-check   {len(record['rows']) - len(failed)} of {len(record['rows'])} agree with "
        f"the reference, values and gradients; {record['seconds']:.1f} s"
    )


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; a heading that ends in a colon is of words, and stands on the left."""
    rule = ["---" if heading.endswith(":") else "---:" for heading in headings]
    lines = [[h.rstrip(":") for h in headings], rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
