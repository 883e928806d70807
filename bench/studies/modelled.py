"""What the model of a GPU says of the products, for ``docs/modelled.md``; nothing is measured.

``python -m triton_sparsity.bench.studies.modelled`` writes the page and its picture.
"""

from __future__ import annotations

from pathlib import Path

from ...kernels.pattern import Block
from ..measure.charts import modelled as picture
from ..measure.files import write_atomic
from ..measure.model import (
    DEVICES,
    H200,
    ModelledDevice,
    break_even,
    efficiency,
    geometric_mean,
    sparse_time,
)
from ..measure.options import PRODUCTS
from ..measure.record import ROOT
from ..measure.shapes import SETS
from ..measure.tables import markdown
from .gpu import EFFICIENCY

SIDES = (256, 128, 64, 32)
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
SHAPES = SETS["llama3-8b"][:3]  # without the narrow key and value weights
TABLE_LEVEL = 0.8
OTHERS_SIDE = 128


def efficiencies(device: ModelledDevice) -> dict[str, dict[int, list[float]]]:
    """Return the efficiency of each product and block over ``LEVELS``, the mean of the shapes."""
    return {
        operation: {
            side: [
                geometric_mean(
                    [efficiency(operation, s, Block(side, side), level, device) for s in SHAPES]
                )
                for level in LEVELS
            ]
            for side in SIDES
        }
        for operation in PRODUCTS
    }


def page(device: ModelledDevice) -> str:
    """Return the page as Markdown."""
    found = efficiencies(device)
    at = LEVELS.index(TABLE_LEVEL)
    rows = []
    for operation in PRODUCTS:
        for side in SIDES:
            block = Block(side, side)
            terms = [sparse_time(operation, s, block, TABLE_LEVEL, device) for s in SHAPES]
            time = sum(term.time for term in terms)
            shares = [
                f"{100 * sum(getattr(term, name) for term in terms) / time:.0f} %"
                for name in ("arithmetic", "steps", "ends", "imbalance", "memory")
            ]
            even = min(break_even(operation, s, block, device) for s in SHAPES)
            rows.append(
                (
                    operation,
                    str(side),
                    f"{found[operation][side][at]:.2f}",
                    f"{EFFICIENCY[operation][side]:.2f}",
                    *shares,
                    f"{100 * (1 - even):.0f} %",
                )
            )
    headings = (
        "product:", "block", "e", "target", "arithmetic", "steps", "ends", "imbalance", "memory",
        "break-even",
    )  # fmt: skip
    return PAGE.format(
        name=device.name,
        copy=device.copy / 1e12,
        cache=device.cache / 1e12,
        gemm=device.gemm / 1e12,
        level=100 * TABLE_LEVEL,
        shapes=", ".join(f"{s.outputs} x {s.inputs}" for s in SHAPES),
        table=markdown(headings, rows),
        side=OTHERS_SIDE,
        others=others(),
    )


def others() -> str:
    """Return a table of every device that the model knows."""
    block = Block(OTHERS_SIDE, OTHERS_SIDE)
    rows = []
    for device in DEVICES.values():
        means = [
            geometric_mean([efficiency(name, s, block, TABLE_LEVEL, device) for s in SHAPES])
            for name in PRODUCTS
        ]
        rates = f"{device.gemm / 1e12:.0f} TFLOP/s", f"{device.cache / 1e12:.3g} TB/s"
        memory = f"{device.copy / 1e12:.3g} TB/s"
        rows.append((device.name, *rates, memory, *(f"{mean:.2f}" for mean in means)))
    headings = ("device:", "dense product", "L2", "memory", *(f"e of {name}" for name in PRODUCTS))
    return markdown(headings, rows)


PAGE = """# What a GPU is expected to do

No figure on this page is measured. `python -m triton_sparsity.bench.studies.modelled` writes
it, from the schedules that the kernels have (`kernels/schedule.py`) and a model of the device
(`bench/measure/model.py`): {name}, {gemm:.0f} TFLOP/s of a dense bfloat16 product, {cache:.3g}
TB/s from L2, {copy:.3g} TB/s of device memory. The first two are estimates; the page is as
wrong as they are.

The efficiency e is the rate at which kept blocks are multiplied, over the rate of the dense
product. At {level:.0f} %, random masks, 8192 tokens, weights of {shapes}:

{table}

The terms are shares of the time: what the kept blocks would take at the dense product's rate;
what the steps take, which is more where L2 is slower than the tensor cores or bundles are not
full; what writing the tiles takes; what the slowest multiprocessor takes beyond the mean; and
what device memory would take if nothing else did. The break-even is the level from which
skipping blocks is faster than the dense product.

**The short term is L2.** A tile of 256 x 128 has an intensity of 85 FLOP a byte, and
{cache:.3g} TB/s of L2 feed 0.76 of the tensor cores' rate. No schedule changes that. What
would: one fetch of a weight tile for two multiprocessors (multicast), which lifts it to 102
FLOP a byte, or an L2 that is faster than the estimate.

![efficiency over level](modelled.png)

The same for other devices, blocks of {side} at {level:.0f} %. Memory is nine tenths of the data
sheet's rate, products a share of it, L2 an estimate. A B200 is modelled with today's kernels:

{others}
"""


def main() -> None:
    docs: Path = ROOT / "docs"
    write_atomic(docs / "modelled.md", page(H200).encode())
    targets = {name: {s: EFFICIENCY[name][s] for s in SIDES} for name in PRODUCTS}
    write_atomic(docs / "modelled.png", picture(H200.name, LEVELS, efficiencies(H200), targets))


if __name__ == "__main__":
    main()
