"""What any compression algorithm's controller offers, sparsity or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from os import PathLike
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from .api import CompressionStage, StripFormat
from .export import export_onnx
from .loss import CompressionLoss
from .scheduler import CompressionScheduler

Statistics = TypeVar("Statistics")


class PTCompressionAlgorithmController(ABC, Generic[Statistics]):
    """Control of a compressed model during fine-tuning.

    Args:
        target_model: the model, changed in place already.
    """

    name: ClassVar[str]

    def __init__(self, target_model: nn.Module) -> None:
        self._model = target_model

    @property
    def model(self) -> nn.Module:
        """The model that was passed in."""
        return self._model

    @property
    @abstractmethod
    def loss(self) -> CompressionLoss:
        """The term to add to the task's loss: ``loss = task_loss + controller.loss()``."""

    @property
    @abstractmethod
    def scheduler(self) -> CompressionScheduler:
        """To be stepped at the start of each optimiser step and of each epoch."""

    def parameters(self) -> list[nn.Parameter]:
        """List what the algorithm trains of its own; an optimiser must be given it.

        They are parameters of the model too, so that an optimiser made from these after the
        controller has them.
        """
        return []

    @abstractmethod
    def disable_scheduler(self) -> None:
        """Replace the scheduler by one that changes nothing. Masks stay as they are."""

    @abstractmethod
    def compression_stage(self) -> CompressionStage:
        """Tell how far compression has come."""

    @abstractmethod
    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        """Collect what there is to say of the model; see the algorithm's class."""

    @property
    @abstractmethod
    def compression_rate(self) -> float:
        """Fraction of the target weights' groups that is pruned; may be set."""

    @compression_rate.setter
    @abstractmethod
    def compression_rate(self, compression_rate: float) -> None: ...

    @property
    def maximal_compression_rate(self) -> float:
        """Upper bound of ``compression_rate``."""
        return 1.0

    @abstractmethod
    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return what a resumed run needs, by the algorithm's name: plain values and tensors."""

    @abstractmethod
    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from ``get_state()``'s result. A state that does not fit changes nothing."""

    @abstractmethod
    def builder_state(self) -> dict[str, Any]:
        """Return the configuration as plain values."""

    def get_compression_state(self) -> dict[str, Any]:
        """Return ``{"builder_state": {name: configuration}, "ctrl_state": get_state()}``."""
        return {"builder_state": {self.name: self.builder_state()}, "ctrl_state": self.get_state()}

    @abstractmethod
    def strip_model(
        self,
        model: nn.Module,
        do_copy: bool = False,
        strip_format: StripFormat = StripFormat.NATIVE,
    ) -> nn.Module:
        """Fold the masks into the weights of ``model`` and return it with its original classes."""

    def strip(
        self, do_copy: bool = True, strip_format: StripFormat = StripFormat.NATIVE
    ) -> nn.Module:
        """``strip_model`` of the controlled model; by default of a copy: training can go on."""
        return self.strip_model(self._model, do_copy, strip_format)

    def prepare_for_export(self) -> None:
        """Strip the controlled model in place."""
        self._model = self.strip_model(self._model)

    def export_model(
        self,
        save_path: str | PathLike[str],
        save_format: str | None = None,
        input_names: list[str] | None = None,
        output_names: list[str] | None = None,
        model_args: tuple[Any, ...] | None = None,
    ) -> None:
        """Write the stripped model as ONNX. The controlled model stays as it is.

        Args:
            save_path: the file to write.
            save_format: ``"onnx"`` or ``"onnx_<opset>"``; None: ``"onnx"``.
            input_names, output_names: names for the graph's inputs and outputs.
            model_args: example inputs, positional, with a dictionary of keyword arguments last:
                ``(x, {})``, ``(x, {"mask": m})``.

        Raises:
            ValueError: ``save_format`` or ``model_args`` is not of these forms.
        """
        export_onnx(
            self.strip(do_copy=True), save_path, save_format, input_names, output_names, model_args
        )

    def distributed(self) -> None:
        """Make ranks agree. Masks that follow from the weights alone agree already."""


class SparsityController(ABC):
    """What a sparsity algorithm offers beyond any compression algorithm."""

    @property
    @abstractmethod
    def current_sparsity_level(self) -> float:
        """The scheduled level where there is a schedule, else the level that the masks have."""

    @abstractmethod
    def freeze(self, freeze: bool = True) -> None:
        """Stop updating the masks, or go on."""
