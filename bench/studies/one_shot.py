"""What one shot leaves of a pretrained encoder: optimal brain surgeon against Wanda, untrained.

``python -m triton_sparsity.bench.studies.one_shot``. Every pattern and level starts from the dense
model of the task ``minilm``, on the same calibration batches; the figure is the mean cosine of all
held-out embeddings to the dense ones. Writes a JSON record, anew after each figure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ...controller.algorithms.const import ConstSparsityConfig
from ...controller.algorithms.magnitude import MagnitudeSparsityConfig
from ...controller.create import create_controller
from ...controller.one_shot import prune_obs
from ...kernels.pattern import Pattern
from ..finetune.tasks import Task, load_task
from ..measure.files import write_atomic
from ..measure.record import environment
from ..measure.spelling import parse_pattern

SCOPE = ("encoder",)
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patterns", default="block:16,unstructured")
    parser.add_argument("--levels", default="0.5,0.7,0.8")
    parser.add_argument("--batches", type=int, default=16, help=f"of {BATCH} sentences")
    parser.add_argument("--rounds", type=int, default=8, help="of optimal brain surgeon")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs", "one_shot.json"))
    arguments = parser.parse_args()
    task = load_task("minilm")
    batches = [task.batch(BATCH, 0, 2, i)[0] for i in range(arguments.batches)]
    record: dict[str, Any] = environment(torch.device("cpu"), "torch") | {
        "task": task.name,
        "data": task.data,
        "sentences": BATCH * arguments.batches,
        "rounds": arguments.rounds,
        "figures": [],
    }
    console = Console(highlight=False)
    for spelled in arguments.patterns.split(","):
        for level in map(float, arguments.levels.split(",")):
            figures = compare(task, batches, parse_pattern(spelled), level, arguments.rounds)
            for figure in figures:
                record["figures"].append({"pattern": spelled} | figure)
                console.print(record["figures"][-1])
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(arguments.output, json.dumps(record, indent=1).encode())


def compare(
    task: Task, batches: Sequence[Tensor], pattern: Pattern, level: float, rounds: int
) -> list[dict[str, Any]]:
    """Return what each method leaves at one level."""
    figures = []
    for method in ("wanda", "obs"):
        model, started = task.build(), time.perf_counter()
        if method == "obs":
            config = ConstSparsityConfig(pattern=pattern, target_scopes=SCOPE)
            controller = prune_obs(model, batches, config, level=level, rounds=rounds)
        else:
            # its pool is the row, as published
            config = MagnitudeSparsityConfig(
                pattern=pattern, target_scopes=SCOPE, weight_importance="wanda"
            )
            controller = create_controller(model, config)
            with controller.calibration(), torch.no_grad():
                for batch in batches:
                    model(batch)
            controller.set_sparsity_level(level)
        seconds = time.perf_counter() - started
        figures.append(
            {
                "method": method,
                "level": controller.compression_rate,
                "cosine": cosine(task, model),
                "seconds": seconds,
            }
        )
    return figures


@torch.no_grad()
def cosine(task: Task, model: nn.Module) -> float:
    """Return the mean cosine of all held-out embeddings to the dense model's."""
    model.eval()
    return torch.cat([task.score(model(x), y) for x, y in task.held_out]).mean().item()


if __name__ == "__main__":
    main()
