"""NNCF 2.14.1 or 2.19.0, the last releases with sparsity controllers for PyTorch."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from torch import nn


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


def compress(
    model: nn.Module, in_features: int, level: float, algorithm: str = MAGNITUDE
) -> tuple[Any, nn.Module]:
    """Return NNCF's controller and model.

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
    return create_compressed_model(model, config)


# ours takes them too
MOVEMENT_PARAMS: dict[str, Any] = {
    "warmup_start_epoch": 0,
    "warmup_end_epoch": 10,
    "importance_regularization_factor": 0.1,
    "enable_structured_masking": False,
    "init_importance_threshold": -1.0,
    "steps_per_epoch": 100,
}
