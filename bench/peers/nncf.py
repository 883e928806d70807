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


def compress(model: nn.Module, in_features: int, level: float) -> tuple[Any, nn.Module]:
    """Return NNCF's controller and model under magnitude sparsity at ``level``, importance |w|."""
    from nncf import NNCFConfig
    from nncf.torch import create_compressed_model

    params = {
        "schedule": "multistep",
        "multistep_steps": [1],
        "multistep_sparsity_levels": [level, level],
        "weight_importance": "abs",
    }
    config = NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": [1, in_features]},
            "log_dir": tempfile.gettempdir(),
            "compression": {
                "algorithm": "magnitude_sparsity",
                "sparsity_init": level,
                "params": params,
            },
        }
    )
    return create_compressed_model(model, config)
