"""What an update of the masks allocates: peak bytes a weight, by algorithm, pattern and dtype.

``python -m triton_sparsity.bench.studies.memory``. On a CPU, by the backend in plain torch. All
that torch's allocator gives out between the beginning of an update and its end counts, inside
operators too, and what stays: the pruned values, at the first update. Masks do not count where a
controller's creation is an update, as those of SET, RigL and const are; nor what was there before:
weights, gradients, the optimiser's state, and what a criterion keeps between updates (SNIP's
products and sums 4 bytes a weight, RigL's dense gradients as much as the weights).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...controller.algorithms.base import BaseSparsityAlgoController
from ...controller.algorithms.const import ConstSparsityConfig
from ...controller.algorithms.magnitude import MagnitudeSparsityConfig
from ...controller.algorithms.movement.config import MovementSparsityConfig
from ...controller.algorithms.rb import RBSparsityConfig
from ...controller.algorithms.rigl import RigLConfig
from ...controller.algorithms.set import SETConfig
from ...controller.algorithms.sr_ste import SRSTEConfig
from ...controller.config.schedule import PolynomialSchedule, RampSchedule
from ...controller.create import create_controller
from ...controller.selection.criteria import Evidence
from ...kernels.pattern import NM, Block, Pattern, Unstructured
from ..measure.allocations import allocations, span
from ..measure.files import claim_folder, write_atomic
from ..measure.record import dump, environment, results_folder
from ..measure.spelling import spell_pattern
from ..measure.tables import console, table

LIMIT = 6.0  # bytes a weight
SIDE = 2048
STEPS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FINE, BLOCKS, TUPLES = Unstructured(), Block(32, 32), NM(2, 4)


@dataclass(frozen=True)
class Case:
    """An algorithm, and by what it prunes.

    Attributes:
        name: in tables.
        config: makes its configuration, or several, of a pattern.
        patterns: those that it is measured with.
        steps_optimizer: False: somebody else steps the weights, so that a criterion finds the
            gradients themselves at the update.
        prune: what is zero from the start.
    """

    name: str
    config: Callable[[Pattern], Any]
    patterns: tuple[Pattern, ...] = (FINE, BLOCKS)
    steps_optimizer: bool = True
    prune: Callable[[Tensor], None] = field(default=lambda weight: None)


def _ramp(pattern: Pattern) -> RampSchedule:
    target = 0.5 if isinstance(pattern, NM) else 0.8
    return RampSchedule(target_level=target, end=1, freeze=STEPS - 1)


def _magnitude(pattern: Pattern, **options: Any) -> MagnitudeSparsityConfig:
    return MagnitudeSparsityConfig(pattern=pattern, schedule=_ramp(pattern), **options)


def _regrowth(kind: type[SETConfig | RigLConfig], pattern: Pattern, **options: Any) -> Any:
    return kind(pattern=pattern, level=0.8, t_end=100, delta_t=2, **options)


def _soft(pattern: Pattern) -> MovementSparsityConfig:
    return MovementSparsityConfig(
        pattern=pattern,
        warmup_start_epoch=0,
        warmup_end_epoch=1,
        steps_per_epoch=STEPS - 1,
        importance_regularization_factor=0.1,
    )


def _hard(pattern: Pattern) -> MovementSparsityConfig:
    return MovementSparsityConfig(pattern=pattern, schedule=_ramp(pattern))


def _rb(pattern: Pattern) -> RBSparsityConfig:
    schedule = PolynomialSchedule(target_level=0.8, target_epoch=0)
    return RBSparsityConfig(pattern=pattern, schedule=schedule, seed=0)


def _composite(pattern: Pattern) -> list[Any]:
    return [
        MagnitudeSparsityConfig(pattern=pattern, schedule=_ramp(pattern), target_scopes=("0",)),
        RigLConfig(pattern=pattern, level=0.8, t_end=100, delta_t=2, target_scopes=("1",)),
    ]


def _own(evidence: Evidence) -> Tensor:
    return evidence.weight.float()


def _zeros(weight: Tensor) -> None:
    """Prune three of four elements, in tuples, and half of all blocks."""
    weight[:, ::2] = 0
    weight.unflatten(1, (-1, 32)).unflatten(0, (-1, 32))[1::2] = 0


def cases() -> Iterator[Case]:
    """Yield all that is measured."""
    every = FINE, BLOCKS, TUPLES
    for name in ("abs", "normed_abs", "snip", "snip_momentum", "taylor", "fisher"):
        yield Case(f"magnitude, {name}", partial(_magnitude, weight_importance=name), every)
    for name in ("wanda", "random", _own):
        spelled = name if isinstance(name, str) else "a function"
        yield Case(f"magnitude, {spelled}", partial(_magnitude, weight_importance=name), every)
    for name in ("snip", "taylor"):
        config = partial(_magnitude, weight_importance=name)
        yield Case(f"magnitude, {name}, gradients as they are", config, steps_optimizer=False)
    for reduction in ("max", "sum", "l2"):
        config = partial(_magnitude, weight_importance="snip", block_reduction=reduction)
        yield Case(f"magnitude, snip, {reduction}", config, (BLOCKS,), steps_optimizer=False)
    for name in ("abs", "wanda"):
        config = partial(_magnitude, weight_importance=name, distribution="owl", pool="weight")
        yield Case(f"magnitude, {name}, OWL", config)
    yield Case("const", lambda pattern: ConstSparsityConfig(pattern=pattern), every, prune=_zeros)
    for kind, title in ((SETConfig, "SET"), (RigLConfig, "RigL")):
        yield Case(title, partial(_regrowth, kind))
        yield Case(f"{title}, snip", partial(_regrowth, kind, weight_importance="snip"))
    normed = partial(_regrowth, RigLConfig, growth="normed_gradient")
    yield Case("RigL, normed gradient", normed)
    yield Case("rb", _rb)
    yield Case("movement, to a level", _hard)
    yield Case("movement, to a threshold", _soft)
    yield Case("SR-STE", lambda pattern: SRSTEConfig(pattern=pattern, level=0.5), every)
    yield Case("magnitude and RigL", _composite)


Run = tuple[Case, Pattern, torch.dtype]


def _train(run: Run, side: int, name: str) -> tuple[int, int]:
    """Train a small model for some steps, with spans around what changes the masks, ``name`` at
    the creation and ``name`` with a prime at updates. Return how many weights there are, and the
    bytes of the masks and of trained scores.
    """
    case, pattern, dtype = run
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(side, side, False), nn.Linear(side, side // 8, False))
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            case.prune(parameter)
    weights = sum(parameter.numel() for parameter in model.parameters())
    with span(name):
        controller = create_controller(model, case.config(pattern))
    held = sum(scores.nbytes for scores in controller.parameters()) + _mask_bytes(controller)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    x = torch.randn(8, side, dtype=dtype)
    if controller.needs_calibration:
        with controller.calibration(), torch.no_grad():
            model(x)
    for step in range(STEPS):
        if step == 0:
            controller.scheduler.epoch_step()
        with span(f"{name}'"):
            controller.scheduler.step()
            controller.mask_level()  # rb's masks follow where somebody looks
        model.zero_grad()
        # every weight has a gradient, wherever blocks in series let nothing through
        squares = [parameter.float().square().sum() for parameter in model.parameters()]
        loss = model(x).float().square().sum() + 1e-3 * torch.stack(squares).sum()
        (loss + controller.loss()).backward()
        if case.steps_optimizer:
            optimizer.step()
    with span(f"{name}'"):
        controller.freeze()
    return weights, held


def peak_bytes(runs: Sequence[Run], side: int = SIDE) -> list[float]:
    """Return the most bytes a weight that an update allocates, of each run.

    Args:
        runs: what is trained, with which pattern and dtype.
        side: there is a weight of ``side`` x ``side``, and one of an eighth of it: what is held of
            one weight at a time is held of nearly all.
    """
    with allocations() as session:
        sizes = [_train(run, side, str(place)) for place, run in enumerate(runs)]
    found = []
    for place, (weights, held) in enumerate(sizes):
        (made,), updates = session.inside(str(place)), session.inside(f"{place}'")
        found.append(max(made.peak - held, *(update.peak for update in updates)) / weights)
    return found


def _mask_bytes(controller: BaseSparsityAlgoController) -> int:
    """Return what the masks take, in both of their forms."""
    masks = [info.operand for info in controller.sparsified_module_info]
    words = [m._words for m in masks if m._words is not None]
    return sum(m.mask.nbytes for m in masks) + sum(w.nbytes for w in words)


def measure(side: int = SIDE) -> Iterator[dict[str, Any]]:
    """Yield a row for each case and pattern: the peak of each dtype, in bytes a weight."""
    for case in cases():
        for pattern in case.patterns:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = peak_bytes([(case, pattern, dtype) for dtype in DTYPES], side)
            names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
            peaks = dict(zip(names, found, strict=True))
            yield {"algorithm": case.name, "pattern": spell_pattern(pattern), "peaks": peaks}


def run(folder: Path, side: int = SIDE) -> bool:
    """Measure all, write ``memory.json``, and tell whether each is within ``LIMIT``."""
    where = environment(torch.device("cpu"), "torch")
    rows = list(measure(side))
    record = where | {"side": side, "limit": LIMIT, "rows": rows}
    write_atomic(folder / "memory.json", dump(record))
    headings, lines = table_of(record)
    console().print(table("Peak bytes a weight of an update", headings, lines))
    return all(peak <= LIMIT for row in rows for peak in row["peaks"].values())


def table_of(record: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and lines of a record's table."""
    dtypes = list(record["rows"][0]["peaks"])
    lines, last = [], ""
    for row in record["rows"]:
        name = "" if row["algorithm"] == last else row["algorithm"]
        last = row["algorithm"]
        lines.append((name, row["pattern"], *(f"{row['peaks'][d]:.2f}" for d in dtypes)))
    return ("algorithm:", "pattern:", *dtypes), lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", metavar="FOLDER", type=Path)
    parser.add_argument("--side", type=int, default=SIDE, help=f"of the weight; {SIDE}")
    options = parser.parse_args()
    if options.side < 256 or options.side % 256:
        parser.error(f"--side must be a multiple of 256, got {options.side}")
    if options.side != SIDE and options.output is None:
        parser.error("--side needs --output: the repository's results are of one size")
    try:
        folder = options.output or results_folder(torch.device("cpu"))
        claim_folder(folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.exit(0 if run(folder, options.side) else 1)


if __name__ == "__main__":
    main()
