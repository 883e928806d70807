"""Fine-tune PyTorch models under sparse masks, with Triton kernels that make the sparsity pay."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# absolute: pytest imports this file once more under the checkout's folder name
from triton_sparsity.controller.algorithms.base import BaseSparsityAlgoController
from triton_sparsity.controller.algorithms.composite import CompositeController
from triton_sparsity.controller.algorithms.const import (
    ConstSparsityConfig,
    ConstSparsityController,
)
from triton_sparsity.controller.algorithms.magnitude import (
    MagnitudeSparsityConfig,
    MagnitudeSparsityController,
)
from triton_sparsity.controller.algorithms.movement.config import (
    MovementSparsityConfig,
    SparseStructure,
)
from triton_sparsity.controller.algorithms.movement.controller import MovementSparsityController
from triton_sparsity.controller.algorithms.rb import RBSparsityConfig, RBSparsityController
from triton_sparsity.controller.algorithms.rigl import RigLConfig, RigLController
from triton_sparsity.controller.algorithms.set import SETConfig, SETController
from triton_sparsity.controller.algorithms.sr_ste import SRSTEConfig, SRSTEController
from triton_sparsity.controller.api import CompressionStage, StripFormat
from triton_sparsity.controller.config.algorithm import BatchNormAdaptation, Override
from triton_sparsity.controller.config.schedule import (
    AdaptiveSchedule,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
    RampSchedule,
)
from triton_sparsity.controller.create import create_controller
from triton_sparsity.controller.integrations.peft import mask_adapters
from triton_sparsity.controller.masks.weight import SparseModuleInfo
from triton_sparsity.controller.one_shot import prune_obs
from triton_sparsity.kernels.block_score import block_score
from triton_sparsity.kernels.block_sparse_linear import block_sparse_linear
from triton_sparsity.kernels.learned_mask import sample_mask, straight_through
from triton_sparsity.kernels.mask import make_mask, pack, unpack
from triton_sparsity.kernels.masked_weight import apply_mask, apply_mask_, count_leaks
from triton_sparsity.kernels.pattern import NM, Block, Unstructured
from triton_sparsity.kernels.retained import put_back_, take_pruned
from triton_sparsity.kernels.select import Threshold, select
from triton_sparsity.kernels.semi_structured import NMMask, nm_mask, nm_score
from triton_sparsity.kernels.topology import Topology, block_topology

if TYPE_CHECKING:
    from triton_sparsity.controller.integrations.lightning import LightningCallback
    from triton_sparsity.controller.integrations.transformers import TransformersCallback

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
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"triton_sparsity.controller.integrations.{extra}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs {error.name}: pip install 'triton-sparsity[{extra}]'", name=error.name
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXTRAS})
