"""NNCF 2.14.1 or 2.19.0, the last releases with sparsity controllers for PyTorch."""

# a peer need not be installed
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ...controller.config.schedule import PolynomialSchedule


def available() -> str | None:
    """Return why NNCF cannot be measured, or None."""
    # 2.19 refuses its own sparsity without it; it must be set before the first import
    os.environ.setdefault("NNCF_TORCH_LEGACY_TRACING", "1")
    try:
        import nncf
    except ImportError:
        return "nncf is not installed (pip install nncf==2.19.0)"
    return None if nncf.__version__ < "3" else f"nncf {nncf.__version__} has no sparsity"


MAGNITUDE = "magnitude_sparsity"
RB = "rb_sparsity"
MOVEMENT = "movement_sparsity"
# ours takes them too
MOVEMENT_PARAMS: dict[str, Any] = {
    "warmup_start_epoch": 0,
    "warmup_end_epoch": 10,
    "importance_regularization_factor": 0.1,
    "enable_structured_masking": False,
    "init_importance_threshold": -1.0,
    "steps_per_epoch": 100,
}


def compress(
    model: nn.Module, in_features: int, level: float, algorithm: str = MAGNITUDE
) -> tuple[Any, nn.Module]:
    """Return NNCF's controller, its layers in the model's order, and its model.

    Args:
        model: what to compress.
        in_features: of its input.
        level: magnitude's (importance |w|) and rb's target; movement has none.
        algorithm: ``MAGNITUDE``, ``RB`` or ``MOVEMENT``, this from the first step in its warm-up.
    """
    from nncf import NNCFConfig
    from nncf.torch import create_compressed_model

    section: dict[str, Any] = {"algorithm": algorithm}
    if algorithm == MOVEMENT:
        section["params"] = MOVEMENT_PARAMS
    else:
        section["sparsity_init"] = level
        section["params"] = {
            "schedule": "multistep",
            "multistep_steps": [1],
            "multistep_sparsity_levels": [level, level],
        }
    if algorithm == MAGNITUDE:
        section["params"]["weight_importance"] = "abs"
    config = NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": [1, in_features]},
            "log_dir": tempfile.gettempdir(),
            "compression": section,
        }
    )
    controller, compressed = create_compressed_model(model, config)
    # NNCF's order is that of its graph, in which layer 9 comes after layer 0
    places = {module: place for place, module in enumerate(compressed.modules())}
    controller.sparsified_module_info.sort(key=lambda info: places[info.module])
    return controller, compressed


@dataclass
class Controlled:
    """What the training loop of ``finetune`` asks of a controller, by NNCF's."""

    scheduler: Any
    loss: Any
    optimizer: Any = None

    @property
    def current_sparsity_level(self) -> float:
        return self.scheduler.current_sparsity_level

    def parameters(self) -> list[nn.Parameter]:
        """Return nothing: magnitude trains no scores."""
        return []

    def get_state(self) -> None:
        """Return nothing: a peer's run is not resumed."""


def gradual_magnitude(
    model: nn.Module, batch: tuple[int, int], schedule: PolynomialSchedule, scope: str
) -> tuple[Controlled, nn.Module, Callable[[], nn.Module]]:
    """Put a language model under NNCF's magnitude sparsity, importance |w|, at every step.

    Args:
        model: takes tokens, int64 ``(batch, length)``.
        batch: their shape.
        schedule: which of NNCF's schedules, in our terms.
        scope: regular expression for NNCF's names of what to prune.

    Returns:
        What drives it; the model to train; a function that returns the stripped model.
    """
    from nncf import NNCFConfig
    from nncf.torch import create_compressed_model

    params = {
        "schedule": "polynomial",
        "sparsity_target": schedule.target_level,
        "sparsity_target_epoch": schedule.target_epoch,
        "sparsity_freeze_epoch": schedule.freeze_epoch,
        "power": schedule.power,
        "concave": schedule.concave,
        "update_per_optimizer_step": True,
        "steps_per_epoch": schedule.steps_per_epoch,
        "weight_importance": "abs",
    }
    config = NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": list(batch), "type": "long", "filler": "zeros"},
            "log_dir": tempfile.gettempdir(),
            "compression": {
                "algorithm": "magnitude_sparsity",
                "sparsity_init": schedule.initial_level,
                "target_scopes": [f"{{re}}{scope}"],
                "params": params,
            },
        }
    )
    with warnings.catch_warnings():
        # that it is deprecated is why this project is there
        warnings.simplefilter("ignore")
        controller, compressed = create_compressed_model(model, config)
    strip = partial(controller.strip, do_copy=True)
    return Controlled(controller.scheduler, controller.loss), compressed, strip
