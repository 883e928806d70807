"""What there is to say of a sparse model, as data and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from tabulate import tabulate
from torch import Tensor, nn

from .learned_module import score_parameters
from .stages import parameters_of_all, paths_of_all
from .weight import SparseWeight


@dataclass(frozen=True)
class SparsifiedLayerSummary:
    """One masked weight.

    Attributes:
        name: as ``SparseModuleInfo.module_node_name``.
        weight_shape: its shape.
        pattern: the shape of a group.
        groups, pruned_groups: how many there are; under N:M of elements.
        pruned_elements: weight elements that are masked out.
        weight_percentage: share of this weight in the model's parameters, in percent.
        threshold: the score at or below which groups are pruned; None before the first mask.
        path: which matrix products skip pruned blocks: ``"block-sparse"``, ``"dense"``, or the
            names of some.
    """

    name: str
    weight_shape: tuple[int, ...]
    pattern: str
    groups: int
    pruned_groups: int
    pruned_elements: int
    weight_percentage: float
    threshold: float | None
    path: str

    @property
    def sparsity_level(self) -> float:
        """Fraction of the groups that is pruned."""
        return self.pruned_groups / self.groups


@dataclass(frozen=True)
class SparsifiedModelStatistics:
    """The whole model.

    Attributes:
        sparsity_level: masked-out elements over all parameters of the model.
        sparsity_level_for_layers: pruned groups over all groups of the masked weights.
        sparsified_layers_summary: one entry a masked weight.
    """

    sparsity_level: float
    sparsity_level_for_layers: float
    sparsified_layers_summary: tuple[SparsifiedLayerSummary, ...]


@dataclass(frozen=True)
class SparsityStatistics:
    """One algorithm's statistics.

    Attributes:
        model_statistics: what the masks are.
        target_sparsity_level: what the schedule asks for at present; None without a schedule.
    """

    model_statistics: SparsifiedModelStatistics
    target_sparsity_level: float | None

    def to_str(self) -> str:
        """Draw the tables: the model's figures, then one line a layer."""
        model = self.model_statistics
        figures = [
            ("Sparsity level of the whole model", f"{model.sparsity_level:.4f}"),
            ("Sparsity level of all sparsified layers", f"{model.sparsity_level_for_layers:.4f}"),
        ]
        if self.target_sparsity_level is not None:
            figures.append(("Scheduled level", f"{self.target_sparsity_level:.4f}"))
        layers = [
            (
                layer.name,
                "x".join(map(str, layer.weight_shape)),
                layer.pattern,
                f"{layer.sparsity_level:.4f}",
                f"{layer.weight_percentage:.2f}",
                "" if layer.threshold is None else f"{layer.threshold:.6g}",
                layer.path,
            )
            for layer in model.sparsified_layers_summary
        ]
        headers = ("Layer", "Weight", "Pattern", "Level", "% of parameters", "Threshold", "Path")
        tables = ((figures, ()), (layers, headers))
        return "\n\n".join(tabulate(rows, head, disable_numparse=True) for rows, head in tables)


class Statistics(SimpleNamespace):
    """One field an algorithm, ``statistics.magnitude_sparsity`` for instance."""

    def to_str(self) -> str:
        """Draw the tables of every algorithm."""
        return "\n\n".join(f"{name}\n{part.to_str()}" for name, part in vars(self).items())


def summarise(
    model: nn.Module, weights: Sequence[SparseWeight], thresholds: Mapping[str, Tensor | None]
) -> SparsifiedModelStatistics:
    """Put figures together; ``thresholds`` are scalars, by name. Synchronises with the device."""
    parameters = parameters_of_all(model, weights, score_parameters(model))
    layers = tuple(
        SparsifiedLayerSummary(
            name=weight.name,
            weight_shape=tuple(weight.weight_shape),
            pattern=str(weight.pattern),
            groups=weight.groups,
            pruned_groups=weight.pruned_groups(),
            pruned_elements=weight.pruned_elements(),
            weight_percentage=100 * weight.weight_shape.numel() / parameters,
            threshold=None if (t := thresholds.get(weight.name)) is None else float(t),
            path=path,
        )
        for weight, path in zip(weights, paths_of_all(weights), strict=True)
    )
    groups = sum(layer.groups for layer in layers)
    return SparsifiedModelStatistics(
        sum(layer.pruned_elements for layer in layers) / parameters,
        sum(layer.pruned_groups for layer in layers) / groups,
        layers,
    )
