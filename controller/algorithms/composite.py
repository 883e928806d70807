"""Several algorithms on one model: losses add, schedulers fan out, all else is merged."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..api import CompressionStage
from ..config.declaration import number
from ..masks.guard import Guard
from ..masks.schema import MAPPING, check
from ..masks.statistics import Statistics
from ..masks.weight import SparseModuleInfo
from .base import BaseSparsityAlgoController, Change
from .loss import CompressionLoss
from .scheduler import CompressionScheduler


class CompositeLoss(CompressionLoss):
    """The sum of the losses, by the algorithm's name."""

    def __init__(self, losses: Mapping[str, CompressionLoss]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)

    def calculate(self) -> Tensor:
        return reduce(operator.add, [loss() for loss in self.losses.values()])


class CompositeScheduler(CompressionScheduler):
    """Steps the scheduler that each controller has; it has no state of its own.

    Where one refuses a step, those before it have taken theirs: they are ahead, and the next call
    leaves them out.
    """

    def __init__(self, controllers: Sequence[BaseSparsityAlgoController]) -> None:
        super().__init__()
        self._controllers = controllers

    @property
    def current_step(self) -> int:
        return max(scheduler.current_step for scheduler in self._due("step"))

    @property
    def current_epoch(self) -> int:
        return max(scheduler.current_epoch for scheduler in self._due("epoch_step"))

    def _due(self, what: str) -> list[CompressionScheduler]:
        schedulers = [controller.scheduler for controller in self._controllers]
        return [scheduler for scheduler in schedulers if scheduler.ahead != what]

    def _each(self, what: str, index: int | None) -> None:
        for scheduler in self._due(what):
            getattr(scheduler, what)(index)
            scheduler.ahead = what
        for controller in self._controllers:
            controller.scheduler.ahead = ""

    def step(self, next_step: int | None = None) -> None:
        self._each("step", next_step)

    def epoch_step(self, next_epoch: int | None = None) -> None:
        self._each("epoch_step", next_epoch)

    def get_state(self) -> dict[str, Any]:
        return {}

    def schema(self) -> Any:
        return {}

    def _take(self, state: Mapping[str, Any]) -> None:
        pass


class CompositeController(BaseSparsityAlgoController):
    """Controls one model by several algorithms, each on weights of its own.

    Its level, rate and stage are those of all target weights together. State and statistics have
    an entry an algorithm, by its name; the second of a name goes by ``name_2``.
    """

    name = "composite"

    def __init__(
        self, target_model: nn.Module, controllers: Sequence[BaseSparsityAlgoController]
    ) -> None:
        self._parts = list(controllers)
        infos = [info for part in self._parts for info in part.sparsified_module_info]
        super().__init__(target_model, infos)
        self.controllers: dict[str, BaseSparsityAlgoController] = {}
        for part in self._parts:
            earlier = sum(other.name == part.name for other in self.controllers.values())
            name = f"{part.name}_{earlier + 1}" if earlier else part.name
            self.controllers[name] = part
        self._loss = CompositeLoss({name: part.loss for name, part in self.controllers.items()})
        self._scheduler = CompositeScheduler(self._parts)

    def _guarded(self, model: nn.Module) -> list[Guard]:
        return [guard for part in self._parts for guard in part._guards]

    @property
    def current_sparsity_level(self) -> float:
        """The algorithms' current levels, each weighted by its groups."""
        sizes = [sum(weight.groups for weight in part._weights) for part in self._parts]
        levels = (part.current_sparsity_level for part in self._parts)
        return sum(map(operator.mul, sizes, levels)) / sum(sizes)

    def compression_stage(self) -> CompressionStage:
        return reduce(operator.add, [part.compression_stage() for part in self._parts])

    def _tell_of_early_strip(self) -> None:
        for part in self._parts:
            part._tell_of_early_strip()

    def parameters(self) -> list[nn.Parameter]:
        return [own for part in self._parts for own in part.parameters()]

    def disable_scheduler(self) -> None:
        for part in self._parts:
            part.disable_scheduler()

    def freeze(self, freeze: bool = True) -> None:
        super().freeze(freeze)
        for part in self._parts:
            part.freeze(freeze)

    def set_sparsity_level(
        self,
        level: float,
        target_sparsified_module_info: SparseModuleInfo | None = None,
        run_batchnorm_adaptation: bool = False,
    ) -> None:
        """Set the level of every algorithm, or of one weight through the algorithm that has it.
        Where an algorithm refuses, no mask has changed.
        """
        target = target_sparsified_module_info
        changing: list[tuple[BaseSparsityAlgoController, list[Any]]] = []
        with self.ranks.together(self._device, "set_sparsity_level") as alike:
            level = number(level)
            self._resolve(target)
            for part in self._parts:
                if target is None or any(info is target for info in part.sparsified_module_info):
                    weights = part._check_level(level, target, run_batchnorm_adaptation)
                    changing += [] if part.frozen else [(part, weights)]
            alike |= self._told_of_level(level, target)
            alike["frozen"] = {name: part.frozen for name, part in self.controllers.items()}
        with ExitStack() as stack, torch.no_grad():
            found: list[Change] = []
            for part, weights in changing:
                stack.enter_context(part._changing(weights))
                found.append(part._find_masks(weights, float(level)))
            for write in found:
                write()
        for part in self._parts:
            part._warn_about_empty(part._weights, level)
            if run_batchnorm_adaptation:
                part._adapt_batchnorm()

    def _thaw(self) -> dict[BaseSparsityAlgoController, bool]:
        return {one: was for part in self._parts for one, was in part._thaw().items()}

    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        found = {name: part.statistics() for name, part in self.controllers.items()}
        own = {name: getattr(one, self.controllers[name].name) for name, one in found.items()}
        return Statistics(**own)

    @contextmanager
    def _calibrating(
        self, parts: Sequence[BaseSparsityAlgoController], attention_mask: str | None
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.calibration(attention_mask=attention_mask))
            yield

    @property
    def needs_calibration(self) -> bool:
        return any(part.needs_calibration for part in self._parts)

    @property
    def needs_gradients(self) -> bool:
        return any(part.needs_gradients for part in self._parts)

    def calibration(self, *, attention_mask: str | None = None) -> AbstractContextManager[None]:
        needing = [part for part in self._parts if part.needs_calibration]
        if not needing:
            raise ValueError("calibration: no algorithm has an importance that needs one")
        return self._calibrating(needing, attention_mask)

    def get_compression_state(self) -> dict[str, Any]:
        builders = {name: part.builder_state() for name, part in self.controllers.items()}
        return {"builder_state": builders, "ctrl_state": self.get_state()}

    def get_state(self) -> dict[str, dict[str, Any]]:
        return {name: part.get_state()[part.name] for name, part in self.controllers.items()}

    def _read_state(self, state: Mapping[str, Mapping[str, Any]]) -> Change:
        check(state, dict.fromkeys(self.controllers, MAPPING))
        found = [part._read_state({part.name: state[n]}) for n, part in self.controllers.items()]

        def take() -> None:
            for take_part in found:
                take_part()

        return take

    state_dict = get_state
