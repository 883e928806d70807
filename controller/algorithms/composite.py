"""Several algorithms on one model: losses add, schedulers fan out, all else is merged."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..api import CompressionStage
from ..masks.guard import Guard
from ..masks.statistics import Statistics
from ..masks.weight import SparseModuleInfo
from .base import BaseSparsityAlgoController, Change
from .loss import CompressionLoss
from .scheduler import CompressionScheduler


class CompositeLoss(CompressionLoss):
    """The sum of the algorithms' losses.

    Args:
        losses: by the algorithm's name.
    """

    def __init__(self, losses: Mapping[str, CompressionLoss]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)

    def calculate(self) -> Tensor:
        return reduce(operator.add, [loss() for loss in self.losses.values()])


class CompositeScheduler(CompressionScheduler):
    """Steps the scheduler of every algorithm; it has no state of its own.

    Args:
        controllers: whose schedulers; each may still replace its own.
    """

    def __init__(self, controllers: Sequence[BaseSparsityAlgoController]) -> None:
        super().__init__()
        self._controllers = controllers

    @property
    def current_step(self) -> int:
        return max(controller.scheduler.current_step for controller in self._controllers)

    @property
    def current_epoch(self) -> int:
        return max(controller.scheduler.current_epoch for controller in self._controllers)

    def step(self, next_step: int | None = None) -> None:
        for controller in self._controllers:
            controller.scheduler.step(next_step)

    def epoch_step(self, next_epoch: int | None = None) -> None:
        for controller in self._controllers:
            controller.scheduler.epoch_step(next_epoch)

    def get_state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"load_state: the scheduler's state must be empty, got {state!r}")


class CompositeController(BaseSparsityAlgoController):
    """Controls one model by several algorithms, each on weights of its own.

    Its level, rate and stage are those of all target weights together. State and statistics have
    an entry an algorithm, by its name; the second of a name goes by ``name_2``.

    Args:
        target_model: the model.
        controllers: one an algorithm.
    """

    name = "composite"

    def __init__(
        self, target_model: nn.Module, controllers: Sequence[BaseSparsityAlgoController]
    ) -> None:
        self._parts = list(controllers)
        infos = [info for part in controllers for info in part.sparsified_module_info]
        super().__init__(target_model, infos)
        self.controllers: dict[str, BaseSparsityAlgoController] = {}
        for part in controllers:
            earlier = sum(other.name == part.name for other in self.controllers.values())
            name = f"{part.name}_{earlier + 1}" if earlier else part.name
            self.controllers[name] = part
        self._loss = CompositeLoss({name: part.loss for name, part in self.controllers.items()})
        self._scheduler = CompositeScheduler(list(controllers))

    def _guarded(self, model: nn.Module) -> list[Guard]:
        return [guard for part in self._parts for guard in part._guards]

    @property
    def current_sparsity_level(self) -> float:
        """The algorithms' current levels, each weighted by its groups."""
        sizes = {
            name: sum(info.operand.groups for info in part.sparsified_module_info)
            for name, part in self.controllers.items()
        }
        levels = (sizes[n] * part.current_sparsity_level for n, part in self.controllers.items())
        return sum(levels) / sum(sizes.values())

    def compression_stage(self) -> CompressionStage:
        return reduce(
            operator.add, [part.compression_stage() for part in self.controllers.values()]
        )

    def parameters(self) -> list[nn.Parameter]:
        return [own for part in self.controllers.values() for own in part.parameters()]

    def disable_scheduler(self) -> None:
        super().disable_scheduler()
        for part in self.controllers.values():
            part.disable_scheduler()

    def freeze(self, freeze: bool = True) -> None:
        super().freeze(freeze)
        for part in self.controllers.values():
            part.freeze(freeze)

    def set_sparsity_level(
        self,
        level: float,
        target_sparsified_module_info: SparseModuleInfo | None = None,
        run_batchnorm_adaptation: bool = False,
    ) -> None:
        """Set the level of every algorithm, or of one weight through the algorithm that has it.

        Raises:
            ValueError, RuntimeError: an algorithm refuses; no mask has changed then.
        """
        target = target_sparsified_module_info
        self._resolve(target)
        with ExitStack() as stack, torch.no_grad():
            found: list[Change] = []
            for part in self.controllers.values():
                if target is None or any(info is target for info in part.sparsified_module_info):
                    infos = part._check_level(level, target, run_batchnorm_adaptation)
                    if not part.frozen:
                        stack.enter_context(part._changing(infos))
                        found.append(part._find_masks(infos, level))
            for write in found:
                write()
        for part in self.controllers.values():
            part._warn_about_empty(part.sparsified_module_info, level)
            if run_batchnorm_adaptation:
                part._adapt_batchnorm()

    @property
    def compression_rate(self) -> float:
        return self.mask_level()

    @compression_rate.setter
    def compression_rate(self, compression_rate: float) -> None:
        frozen = {part: part.frozen for part in self.controllers.values() if not part.learns}
        for part in frozen:
            part.frozen = False
        try:
            self.set_sparsity_level(compression_rate)
            frozen = dict.fromkeys(frozen, True)
        finally:
            for part, was in frozen.items():
                part.frozen = was

    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        """Return the statistics of every algorithm under its name."""
        return Statistics(
            **{
                name: getattr(part.statistics(quickly_collected_only), part.name)
                for name, part in self.controllers.items()
            }
        )

    def calibration(self) -> Any:
        """Measure the inputs for every algorithm whose importance needs it.

        Raises:
            ValueError: none needs it; a module's inputs cannot be measured.
        """
        needing = [part for part in self.controllers.values() if part.needs_calibration]
        if not needing:
            raise ValueError("calibration: no algorithm has an importance that needs one")
        return _all_open([part.calibration() for part in needing])

    def distributed(self) -> None:
        for part in self.controllers.values():
            part.distributed()

    def get_compression_state(self) -> dict[str, Any]:
        builders = {name: part.builder_state() for name, part in self.controllers.items()}
        return {"builder_state": builders, "ctrl_state": self.get_state()}

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return the whole state of each algorithm under its name."""
        return {name: part.get_state()[part.name] for name, part in self.controllers.items()}

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from ``get_state()``'s result, bit for bit.

        Raises:
            ValueError: the state is of other algorithms, or one does not fit; nothing has changed
                then.
        """
        if set(state) != set(self.controllers):
            raise ValueError(
                f"load_state: state must be of {sorted(self.controllers)}, got one of "
                f"{sorted(state)}"
            )
        found = [part._read_state({part.name: state[n]}) for n, part in self.controllers.items()]
        for take in found:
            take()

    state_dict = get_state
    load_state_dict = load_state

    def _use_optimizer(self, optimizer: Optimizer | None) -> None:
        super()._use_optimizer(optimizer)
        for part in self.controllers.values():
            part.optimizer = optimizer


@contextmanager
def _all_open(contexts: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
