"""What ``triton_sparsity`` exports; it imports this file when it is first asked for a name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .controller.algorithms.base import BaseSparsityAlgoController
from .controller.algorithms.composite import CompositeController
from .controller.algorithms.const import (
    ConstSparsityConfig,
    ConstSparsityController,
)
from .controller.algorithms.magnitude import (
    MagnitudeSparsityConfig,
    MagnitudeSparsityController,
)
from .controller.algorithms.movement.config import (
    MovementSparsityConfig,
    SparseStructure,
)
from .controller.algorithms.movement.controller import MovementSparsityController
from .controller.algorithms.rb import RBSparsityConfig, RBSparsityController
from .controller.algorithms.rigl import RigLConfig, RigLController
from .controller.algorithms.set import SETConfig, SETController
from .controller.algorithms.sr_ste import SRSTEConfig, SRSTEController
from .controller.api import CompressionStage, StripFormat
from .controller.config.algorithm import BatchNormAdaptation, Override
from .controller.config.schedule import (
    AdaptiveSchedule,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
    RampSchedule,
)
from .controller.create import create_controller
from .controller.integrations.peft import mask_adapters
from .controller.masks.weight import SparseModuleInfo
from .controller.one_shot import prune_obs
from .controller.permute import FeaturePermutation, permute_features
from .kernels.block_score import block_score
from .kernels.block_sparse_linear import block_sparse_linear
from .kernels.learned_mask import sample_mask, straight_through
from .kernels.mask import make_mask, pack, unpack
from .kernels.masked_weight import apply_mask, apply_mask_, count_leaks
from .kernels.pattern import NM, Block, Unstructured
from .kernels.retained import put_back_, take_pruned
from .kernels.search import Threshold
from .kernels.select import select
from .kernels.semi_structured import NMMask, nm_mask, nm_score
from .kernels.topology import Topology, block_topology

if TYPE_CHECKING:
    from .controller.integrations.lightning import LightningCallback
    from .controller.integrations.transformers import TransformersCallback

__all__ = [
    "NM",
    "AdaptiveSchedule",
    "BaseSparsityAlgoController",
    "BatchNormAdaptation",
    "Block",
    "CompositeController",
    "CompressionStage",
    "ConstSparsityConfig",
    "ConstSparsityController",
    "ExponentialSchedule",
    "FeaturePermutation",
    "LightningCallback",
    "MagnitudeSparsityConfig",
    "MagnitudeSparsityController",
    "MovementSparsityConfig",
    "MovementSparsityController",
    "MultistepSchedule",
    "NMMask",
    "Override",
    "PolynomialSchedule",
    "RBSparsityConfig",
    "RBSparsityController",
    "RampSchedule",
    "RigLConfig",
    "RigLController",
    "SETConfig",
    "SETController",
    "SRSTEConfig",
    "SRSTEController",
    "SparseModuleInfo",
    "SparseStructure",
    "StripFormat",
    "Threshold",
    "Topology",
    "TransformersCallback",
    "Unstructured",
    "apply_mask",
    "apply_mask_",
    "block_score",
    "block_sparse_linear",
    "block_topology",
    "count_leaks",
    "create_controller",
    "make_mask",
    "mask_adapters",
    "nm_mask",
    "nm_score",
    "pack",
    "permute_features",
    "prune_obs",
    "put_back_",
    "sample_mask",
    "select",
    "straight_through",
    "take_pruned",
    "unpack",
]

# what needs a package that is an extra: imported when it is asked for
_EXTRAS = {"TransformersCallback": "transformers", "LightningCallback": "lightning"}


def __getattr__(name: str) -> Any:
    if (extra := _EXTRAS.get(name)) is None:
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    try:
        module = import_module(f".controller.integrations.{extra}", __package__)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs {error.name}: pip install 'triton-sparsity[{extra}]'", name=error.name
        ) from error
    return getattr(module, name)
