"""What a report says of the masked weights."""

from __future__ import annotations

from typing import Any

from ...controller.algorithms.base import BaseSparsityAlgoController
from ...controller.masks.statistics import Statistics


def layers_of(statistics: Statistics) -> list[dict[str, Any]]:
    """Return of each masked weight its name, its shape, its groups and which products skip."""
    parts = [part.model_statistics for part in vars(statistics).values()]
    return [
        {
            "name": layer.name,
            "shape": list(layer.weight_shape),
            "groups": layer.groups,
            "pruned_groups": layer.pruned_groups,
            "path": layer.path,
        }
        for part in parts
        for layer in part.sparsified_layers_summary
    ]


def target_names(controller: BaseSparsityAlgoController) -> list[str]:
    """Return the names that the masked weights have among the model's parameters."""
    return [
        f"{info.module_node_name}.weight"
        if info.parameter_name == "weight"
        else info.module_node_name
        for info in controller.sparsified_module_info
    ]
