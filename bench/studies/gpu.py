"""``make bench-gpu``: what the project promises of a GPU, measured, with the targets beside it.

Everything is checked before it is timed. Nothing stops halfway: what fails is a row that says so,
what there is no time for is a row that says so, and the record is written after every row.

Reading order: targets -> stages -> tables -> the run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.launch import Backend, use_triton
from ...kernels.pattern import Block, Pattern, Unstructured
from ..doctor_checks import checks
from ..measure.agreement import disagreement
from ..measure.cases import Built, Case, first_line, measure_case, to_row
from ..measure.ceilings import Ceilings, measure_ceilings
from ..measure.charts import roofline, speedups
from ..measure.files import claim_folder, write_atomic
from ..measure.model import DEVICES, H200, efficiency, geometric_mean
from ..measure.operands import Operands
from ..measure.operations import operand_cases
from ..measure.options import PRODUCTS
from ..measure.record import Row, dump, environment, results_folder, times, to_csv
from ..measure.shapes import Shape, spell_shapes
from ..measure.spelling import find_device, spell_pattern
from ..measure.steps import another_level, model_cases, sparsify
from ..measure.tables import ceilings_line, console, faster, percent, seconds, table, where
from ..measure.timing import measure, overhead
from ..peers import blksprs, dense, semi_structured, stk, torch_bsr
from .llama import FULL, TRIAL, LlamaLayer, Size

# block -> lowest acceptable efficiency against the dense product, and highest acceptable sparsity
# at which forward and backward together break even
EFFICIENCY = {
    "forward": {256: 0.88, 128: 0.80, 64: 0.50, 32: 0.27},
    "dX": {256: 0.88, 128: 0.80, 64: 0.50, 32: 0.27},
    "dW": {256: 0.85, 128: 0.75, 64: 0.45, 32: 0.25},
}
BREAK_EVEN = {256: 0.15, 128: 0.25, 64: 0.55, 32: 0.76}
OF_BOUND = 0.9  # of the lesser of GEMM and L2 bandwidth x intensity
UPDATE = {"block": 1.15, "unstructured": 2.3}  # times one read of the weights
OF_COPY = 0.92  # mask application
STEP = 2.0  # a transformer block's training step, dense over sparse


@dataclass
class Run:
    """What is being measured: where, how far, and how much time is left."""

    size: Size
    device: torch.device
    backend: Backend
    dtype: torch.dtype
    ceilings: Ceilings
    deadline: float
    budget: float
    out: Console
    rows: list[Row] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    # whoever stops it at any moment has all that was measured until then
    save: Callable[[], object] = lambda: None

    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def add(self, cases: Callable[[], Iterator[Case]], operation: str = "") -> list[Row]:
        """Check and time cases; return their rows, one if nothing could be set up."""
        before = len(self.rows)
        try:
            for case in cases():
                if self.late():
                    self.rows.append(_no_time(case))
                else:
                    outcome = measure_case(case, self.device, self.budget)
                    self.rows.append(to_row(case, [outcome], self.ceilings))
                    self.save()
        # operands themselves may not fit; what was measured before stays
        except Exception as error:
            detail = first_line(error)
            self.rows.append(Row(operation, "", "", "", 0.0, "", "failed", detail))
        return self.rows[before:]

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.out.print(line)
        self.save()


def _no_time(case: Case) -> Row:
    return Row(
        case.operation,
        spell_shapes(case.shapes),
        str(case.dtype).removeprefix("torch."),
        spell_pattern(case.pattern),
        case.level,
        case.mask,
        "skipped",
        "out of time",
    )


def self_check(run: Run) -> bool:
    """Compare every operator with its reference; say what disagrees."""
    failed = total = 0
    for name, check in checks(run.device, run.backend):
        try:
            problem = check()
        except Exception as error:
            problem = first_line(error)
        total += 1
        if problem is not None:
            failed += 1
            run.say(f"FAILED {name}: {problem}")
    run.say(f"self-check: {total - failed} of {total} agree with the reference")
    return failed == 0


def products(run: Run) -> None:
    """Measure forward, dX and dW: what targets need first, then what a break-even needs."""
    size = run.size
    wanted = [(level, kind) for level in size.levels for kind in ("random", "skewed")]
    wanted += [(level, "random") for level in size.more_levels]
    for level, kind in wanted:
        for shape in size.shapes:
            for side in size.blocks:
                run.add(partial(_product_cases, run, shape, side, level, kind), "forward")


def _product_cases(run: Run, shape: Shape, side: int, level: float, kind: str) -> Iterator[Case]:
    operands = Operands(shape, Block(side, side), level, kind, run.dtype, run.device, run.backend)
    yield from operand_cases(operands, PRODUCTS)


def of_bound(row: Row) -> float | None:
    """Return the fraction of the lesser of the GEMM ceiling and L2 bandwidth x intensity."""
    return max((v for v in (row.of_gemm, row.of_cache) if v is not None), default=None)


def break_even(rows: Sequence[Row]) -> float | None:
    """Return the sparsity from which forward and backward together are not slower than dense.

    Between two measured levels it is interpolated; below all of them it is the lowest.

    Args:
        rows: of one shape, pattern and mask, any levels.
    """
    points = []
    for level in sorted({row.level for row in rows}):
        mine = [row for row in rows if row.level == level and row.speedup is not None]
        if len(mine) == len(PRODUCTS):
            sparse = sum(row.median_s or 0 for row in mine)
            points.append((level, sparse / sum(row.dense_s or 0 for row in mine) - 1))
    for i, (level, excess) in enumerate(points):
        if excess <= 0:
            if i == 0:
                return level
            before, loss = points[i - 1]
            return before + (level - before) * loss / (loss - excess)
    return None


def product_table(run: Run) -> None:
    """Print efficiency and share of the bound by block and direction, beside the targets."""
    lines = []
    for side in run.size.blocks:
        pattern = spell_pattern(Block(side, side))
        for operation in PRODUCTS:
            mine = [
                r
                for r in run.rows
                if r.pattern == pattern
                and r.operation == operation
                and r.level in run.size.levels
                and r.efficiency is not None
            ]
            bad = sum(
                r.status == "failed" and r.pattern == pattern and r.operation == operation
                for r in run.rows
            )
            if not mine:
                lines.append((pattern, operation, "not measured", *[""] * 6, str(bad)))
                continue
            efficiencies = sorted(r.efficiency or 0 for r in mine)
            # of memory-bound ones the GEMM is not the bound
            shares = sorted(of_bound(r) or 0 for r in mine if r.bound != "copy")
            middle = efficiencies[len(efficiencies) // 2]
            target = EFFICIENCY[operation].get(side)
            lines.append(
                (
                    pattern,
                    operation,
                    f"{middle:.2f}",
                    f"{efficiencies[0]:.2f} to {efficiencies[-1]:.2f}",
                    *_verdict(middle, target, ">="),
                    f"{_modelled(run, operation, side):.2f}",
                    percent(shares[len(shares) // 2]) if shares else "",
                    f">= {100 * OF_BOUND:.0f} %",
                    str(bad),
                )
            )
    headings = (
        "pattern:", "product:", "e, median", "lowest to highest", "target", "verdict:",
        "modelled", "of bound", "target", "failed",
    )  # fmt: skip
    levels = ", ".join(f"{100 * level:g}" for level in run.size.levels)
    run.out.print(table(f"Efficiency e against the dense product, {levels} % sparsity, random "
                        "and skewed masks", headings, lines))  # fmt: skip

    for shape in run.size.shapes:
        for side in run.size.blocks:
            pattern = spell_pattern(Block(side, side))
            found = break_even(
                [
                    r
                    for r in run.rows
                    if (r.shape, r.pattern, r.mask) == (str(shape), pattern, "random")
                    and r.operation in PRODUCTS
                ]
            )
            limit, verdict = _verdict(found, BREAK_EVEN.get(side), "<=")
            run.say(
                f"break-even sparsity of forward and backward, {shape}, {pattern}: "
                f"{'none' if found is None else f'{found:.2f}'} (target {limit}: {verdict})"
            )


def _modelled(run: Run, operation: str, side: int) -> float:
    """Return what the model says beside a measured median: the mean of shapes and levels."""
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else H200.name
    device = next((device for key, device in DEVICES.items() if key in name), H200)
    block = Block(side, side)
    return geometric_mean(
        [
            efficiency(operation, shape, block, level, device)
            for shape in run.size.shapes
            for level in run.size.levels
        ]
    )


def _verdict(value: float | None, target: float | None, sign: str) -> tuple[str, str]:
    if target is None:
        return "", ""
    if value is None:
        return f"{sign} {target:g}", "MISSED"
    reached = value >= target if sign == ">=" else value <= target
    return f"{sign} {target:g}", "reached" if reached else "MISSED"


def updates(run: Run) -> None:
    """Measure the mask update of a model against one read of its weights at copy speed."""
    for pattern in (Block(64, 64), Block(128, 128), Unstructured()):
        cases = partial(
            model_cases, run.size.update, pattern, 0.8, run.dtype, run.device, run.backend,
            ["mask update"],
        )  # fmt: skip
        for row in run.add(cases, "mask update"):
            if row.median_s is None:
                run.say(f"mask update {pattern}: {row.status}: {row.detail}")
                continue
            read = sum(s.inputs * s.outputs for s in run.size.update) * run.dtype.itemsize
            ratio = row.median_s / (read / run.ceilings.copy)
            target = UPDATE["unstructured" if isinstance(pattern, Unstructured) else "block"]
            limit, verdict = _verdict(ratio, target, "<=")
            run.say(
                f"mask update {pattern}, {read / 1e9:.3g} GB of weights: "
                f"{seconds(row.median_s)}, {ratio:.2f} x one read (target {limit}: {verdict})"
                + ("" if row.host_s is None else f"; the host queues it in {seconds(row.host_s)}")
                + ("" if row.wall_s is None else f", by the clock {seconds(row.wall_s)}")
            )


def applications(run: Run) -> None:
    """Measure apply_mask, in place and not, against the copy ceiling."""
    shape = run.size.shapes[0]
    patterns: list[Pattern] = [Unstructured(), *(Block(s, s) for s in run.size.blocks[-2:])]
    for pattern in patterns:
        operands = Operands(shape, pattern, 0.8, "random", run.dtype, run.device, run.backend)
        wanted = ["apply", "apply_", "score", "select", "mask", "topology", "pack"]
        for row in run.add(partial(operand_cases, operands, wanted), "apply"):
            if row.median_s is None:
                run.say(f"{row.operation} {row.pattern}: {row.status}: {row.detail}")
                continue
            target = ""
            if row.operation == "apply":
                limit, verdict = _verdict(row.of_copy, OF_COPY, ">=")
                target = f" (target {limit}: {verdict})"
            run.say(
                f"{row.operation} {row.pattern}: {seconds(row.median_s)}, "
                f"{percent(row.of_copy)} of copy bandwidth{target}"
            )


def transformer_step(run: Run) -> None:
    """Measure a training step of a transformer block, sparse and dense."""
    side = 128 if 128 in run.size.blocks else run.size.blocks[0]
    pattern, level = Block(side, side), 0.8
    weights = run.size.update[:7]
    tokens = run.size.batch * run.size.length
    kept = sum(round((1 - level) * s.inputs * s.outputs) for s in weights)
    case = Case(
        "transformer step", (Shape(tokens, run.size.width, run.size.hidden),), run.dtype, pattern,
        level, "magnitude", 0, 6 * tokens * kept, None, partial(_transformer, run, pattern, level),
        6 * tokens * sum(s.inputs * s.outputs for s in weights),
    )  # fmt: skip
    for row in run.add(lambda: iter([case]), "transformer step"):
        if row.speedup is None:
            run.say(f"training step of a transformer block: {row.status}: {row.detail}")
            continue
        limit, verdict = _verdict(row.speedup, STEP, ">=")
        run.say(
            f"training step of a transformer block, {pattern}, 80 %: {seconds(row.median_s)}, "
            f"dense {seconds(row.dense_s)}: {faster(row.speedup)} (target {limit}: {verdict})"
        )
        if row.wall_s is not None and row.dense_wall_s is not None:
            run.say(
                f"  by the clock {seconds(row.wall_s)}, dense {seconds(row.dense_wall_s)}: "
                f"{faster(row.dense_wall_s / row.wall_s)}; the host queues ours in "
                f"{seconds(row.host_s)}"
            )


def _transformer(run: Run, pattern: Pattern, level: float) -> Built:
    def layer() -> LlamaLayer:
        torch.manual_seed(0)
        return LlamaLayer(run.size).to(run.device, run.dtype)

    def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=run.device.type == "cuda")

        def work() -> None:
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()

        return work

    model = layer()
    controller = sparsify(model, pattern, level, run.backend)
    generator = torch.Generator(run.device).manual_seed(1)
    x = torch.randn(
        run.size.batch, run.size.length, run.size.width, generator=generator, device=run.device
    ).to(run.dtype)

    def check() -> str | None:
        """Weight gradients, against dense models with zeros written by hand."""
        masks = {
            i.module_node_name: i.operand.binary_mask for i in controller.sparsified_module_info
        }
        found: dict[str, list[Tensor]] = {name: [] for name in masks}
        for kind in (None, run.dtype, torch.float32):
            net = model
            if kind is not None:
                net = layer().to(kind)
                for name, mask in masks.items():
                    net.get_parameter(f"{name}.weight").data.masked_fill_(~mask, 0)
            net(x if kind is None else x.to(kind)).float().square().mean().backward()
            for name, mask in masks.items():
                gradient = net.get_parameter(f"{name}.weight").grad
                assert gradient is not None
                found[name].append(gradient.masked_fill(~mask, 0) if kind else gradient.clone())
        model.zero_grad()
        for name, three in found.items():
            # zeros agree with zeros, whatever is computed
            if masks[name].any() and not three[-1].any():
                return f"{name} has no gradient to compare"
            # the errors of a whole block are those of many roundings
            if problem := disagreement(*three, slack=4.0):
                return f"gradient of {name}: {problem}"
        return another_level(list(masks.values()), pattern, level)

    return Built(step(model, x), check, step(layer(), x))


def peers(run: Run) -> Iterator[dict[str, Any]]:
    """Measure other libraries' forward products beside ours, in turn, in this process; yield a row
    each, then print them.
    """
    found: list[dict[str, Any]] = []
    shape = run.size.shapes[0]
    for side in run.size.blocks[1:3] or run.size.blocks[:1]:
        block = Block(side, side)
        o = Operands(shape, block, 0.8, "random", run.dtype, run.device, run.backend)
        sides = (side, side)
        (ours,) = operand_cases(o, ["forward"])
        subjects: dict[str, tuple[str | None, Callable[[], Any]]] = {
            "ours": (None, lambda ours=ours: ours.build().run),
            "dense": (None, lambda o=o: dense.linear(o.x, o.masked)),
            "dense, compiled": (
                dense.compiler(run.device),
                lambda o=o: dense.compiled_linear(o.x, o.masked),
            ),
            "torch BSR": (None, lambda o=o, s=sides: torch_bsr.linear(o.x, o.masked, s)),
            "STK": (stk.available(run.device, sides), lambda o=o: stk.linear(o.x, o.masked)),
            "blksprs": (
                blksprs.available(run.device, sides),
                lambda o=o, s=side: blksprs.linear(o.x, o.masked, s),
            ),
            "2:4 by cuSPARSELt, 50 %": (
                semi_structured.available(run.device),
                lambda o=o: semi_structured.linear(o.x, semi_structured.prune(o.weight)),
            ),
        }
        for name, (reason, make) in subjects.items():
            row: dict[str, Any] = {"work": f"forward {shape} {block} 80 %", "subject": name}
            if reason is None and run.late():
                reason = "out of time"
            if reason is not None:
                outcome = {"status": "skipped", "detail": reason}
            else:
                try:
                    outcome = _peer(run, o, name, make())
                # whatever a peer does wrong on this device
                except Exception as error:
                    outcome = {"status": "failed", "detail": first_line(error)}
            found.append(row | outcome)
            yield found[-1]
    lines = [
        (
            row["work"],
            row["subject"],
            seconds(row.get("median_s")) or row["status"],
            "" if row.get("median_s") is None
            else f"{seconds(row['p20_s'])} to {seconds(row['p80_s'])}",
            row["detail"][:70],
        )
        for row in found
    ]  # fmt: skip
    run.out.print(
        table("Forward product, ours and theirs", ("work:", "subject:", "median", "p20 to p80",
                                                   "note:"), lines)
    )  # fmt: skip


def _peer(run: Run, o: Operands, name: str, made: Any) -> dict[str, Any]:
    product, finish = made if isinstance(made, tuple) else (made, lambda y: y)
    weight = semi_structured.prune(o.weight) if name.startswith("2:4") else o.masked
    exact = F.linear(*o.exact(o.x, weight))
    problem = disagreement(finish(product()), F.linear(o.x, weight), exact, slack=8.0)
    if problem is not None:
        return {"status": "failed", "detail": problem}
    timing = measure(product, run.device, budget=run.budget)
    return {"status": "ok", "detail": ""} | times(timing)


def bench(
    size: Size, device: torch.device, folder: Path, limit: float, budget: float
) -> tuple[dict[str, Any], bool]:
    """Run all stages and write the record after each measurement.

    Args:
        size: how large.
        device: where.
        folder: of the record.
        limit: seconds after which nothing new is begun.
        budget: seconds of timed runs of each operation.

    Returns:
        The record, and whether all results were right.
    """
    start = time.perf_counter()
    out = console()
    triton_runs = use_triton("bench", "auto", torch.empty(0, device=device))
    backend: Backend = "triton" if triton_runs else "torch"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = measure_ceilings(device, [dtype], scale=size.scale)
    head = environment(device, backend) | {
        "ceilings": ceilings._asdict(),
        "overhead_s": overhead(device),
    }
    out.print(where(head))
    out.print(ceilings_line(head))
    run = Run(size, device, backend, dtype, ceilings, start + limit, budget, out)
    theirs: list[dict[str, Any]] = []

    def write() -> dict[str, Any]:
        record = head | {
            "seconds": time.perf_counter() - start,
            "lines": run.lines,
            "peers": theirs,
            "rows": [asdict(row) for row in run.rows],
        }
        write_atomic(folder / "gpu.json", dump(record))
        write_atomic(folder / "gpu.csv", to_csv(run.rows, head))
        return record

    run.save = write
    right = self_check(run)
    for stage in (applications, updates, transformer_step, products, product_table):
        stage(run)
        out.print(f"{stage.__name__}: {time.perf_counter() - start:.0f} s")
    for row in peers(run):
        theirs.append(row)
        write()
    record = write()
    for name, draw in (("gpu-roofline.png", roofline), ("gpu-speedup.png", speedups)):
        # a picture that cannot be drawn, for want of points or of matplotlib, is no reason to fail
        try:
            write_atomic(folder / name, draw(record))
        except Exception as error:
            out.print(f"{name} is not drawn: {type(error).__name__}: {error}")
    for row in run.rows:
        if row.status != "ok":
            what = f"{row.operation} {row.shape} {row.pattern} {row.level:g} {row.mask}"
            out.print(f"{row.status}: {what}: {row.detail}")
    out.print(f"{folder}: gpu.json, gpu.csv, two pictures; {record['seconds']:.0f} s in all")
    ours = [row for row in theirs if row["subject"] == "ours"]
    wrong = any(row["status"] == "failed" for row in ours)
    return record, right and not wrong and all(row.status != "failed" for row in run.rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", metavar="FOLDER", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=480, help="seconds to begin in")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds to time an operation")
    parser.add_argument("--trial", action="store_true", help="tiny sizes, no figures")
    options = parser.parse_args(arguments)
    try:
        device = find_device(options.device)
        folder = options.output or results_folder(device)
        if options.trial and options.output is None:
            parser.error("--trial needs --output: its figures are none")
        claim_folder(folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    size = TRIAL if options.trial else FULL
    _, right = bench(size, device, folder, options.limit, options.budget)
    sys.exit(0 if right else 1)


def summary(record: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return pattern, product and median efficiency of a record, for the page of figures."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in record["rows"]:
        if row["operation"] in PRODUCTS and row["efficiency"] is not None:
            found.setdefault((row["pattern"], row["operation"]), []).append(row["efficiency"])
    return [(*key, sorted(values)[len(values) // 2]) for key, values in found.items()]


if __name__ == "__main__":
    main()
