"""Regularisation-based sparsity, NNCF's ``rb_sparsity``: which groups stay is learned.

Each group has a logit s, the log-odds of being kept. In training masks are drawn at random; the
logits learn from the task's gradient and from a loss that pulls the number kept to the scheduled
one (after Louizos et al., https://arxiv.org/abs/1712.01312). In evaluation, and once frozen, a
group is kept where s > 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..kernels.dispatch import Dispatch
from ..kernels.draw import draw, keeps_draws
from ..kernels.launch import Backend
from ..kernels.learned_mask import sample_mask
from ..kernels.pattern import Block, Pattern
from .api import CompressionStage
from .base_algo import BaseSparsityAlgoController, SparseModuleInfo
from .config import ScheduledConfig, ScheduleField
from .learned import ScoredOperand, ScoreWatch, read_scores, scored_operands, scores_state
from .loss import CompressionLoss
from .modules import SparseModule
from .operand import MaskOperand, state_of
from .schedule import ExponentialSchedule, Schedule
from .scheduler import SparsityScheduler, StubScheduler
from .statistics import SparsityStatistics, Statistics

if TYPE_CHECKING:
    from .targets import Target

INITIAL_LOGIT = 4.59512  # logit(0.99)
TOLERANCE = 0.05  # NNCF's p: a miss of the target by so much of the groups costs 1


def _default_schedule(data: dict[str, Any]) -> ExponentialSchedule | None:
    local = data.get("sparsity_level_setting_mode") == "local"
    return None if local else ExponentialSchedule()


class RBSparsityConfig(ScheduledConfig):
    """Learn which groups stay.

    For example ``RBSparsityConfig(pattern=Block(32, 32),
    schedule=ExponentialSchedule(target_level=0.8, target_epoch=3))``. Pattern, scopes, overrides
    (of patterns) and BatchNorm adaptation are ``AlgorithmConfig``'s.

    Args:
        algorithm: its name, fixed.
        sparsity_level_setting_mode: ``"global"``: a schedule sets the level that the loss pulls
            all target weights together to; ``"local"``: no schedule, and each weight is pulled to
            a level of its own, set through the controller.
        schedule: which level holds when, the initial one included; by default
            ``ExponentialSchedule()``. None in ``local`` mode.
        sparsity_init: in ``local`` mode the level before any is set, in [0, 1).
        compression_lr_multiplier: a factor of the logits' gradients, not negative; None: 1.
        seed: of the draws, from 0 to 2^63 - 1; None: torch's (``torch.initial_seed()``).

    Raises:
        ValueError: an argument is unknown or out of its range, or two do not go together.
    """

    algorithm: Literal["rb_sparsity"] = "rb_sparsity"
    schedule: ScheduleField = Field(default_factory=_default_schedule)
    compression_lr_multiplier: (
        Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None
    ) = None
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _check_overrides_set_no_level(self) -> RBSparsityConfig:
        for override in self.overrides:
            if override.minimum_level > 0 or override.maximum_level < 1:
                raise ValueError(
                    "overrides must set no minimum_level or maximum_level, as levels are learned, "
                    f"got {override!r}; sparsity_level_setting_mode 'local' gives each weight its "
                    "own"
                )
        return self


class Draws:
    """What the operands of one controller draw their masks from.

    Attributes:
        random: int64 ``(2,)``: the seed and the number of the draw.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.random = torch.tensor([seed, 0], device=device)


class LogitOperand(ScoredOperand):
    """A mask drawn from logits, one a group.

    It is drawn once an optimiser step: forward passes of one step, be they of several
    micro-batches, of a module used twice or of activation checkpointing, agree.

    Args:
        weight, pattern, transposed, backend, dispatch, multiplier: as ``ScoredOperand``'s.
        draws: shared by the operands of one controller.
        stream: this weight's number.
    """

    def __init__(
        self,
        weight: Tensor,
        pattern: Pattern,
        draws: Draws,
        stream: int,
        *,
        multiplier: float | None = None,
        transposed: bool = False,
        backend: Backend = "auto",
        dispatch: Dispatch = "auto",
    ) -> None:
        self.draws = draws
        self.stream = stream
        rows, cols = (weight.T if transposed else weight.flatten(1)).shape
        down, across = -(-rows // pattern.rows), -(-cols // pattern.cols)
        super().__init__(
            weight,
            pattern,
            # as the weight is stored, so that both are read along their rows
            shape=(across, down) if transposed else (down, across),
            initial=INITIAL_LOGIT,
            multiplier=multiplier,
            transposed=transposed,
            backend=backend,
            dispatch=dispatch,
        )
        self._read_at: tuple[Any, ...] | None = None
        self._drawn: Tensor | None = None
        self._drawn_at: tuple[Any, ...] | None = None

    def to(self, weight: Tensor) -> None:
        super().to(weight)
        if self.draws.random.device != weight.device:
            self.draws.random = self.draws.random.to(weight.device)

    @property
    def learning(self) -> bool:
        return self.training and not self.frozen

    def learned(self, weight: Tensor) -> Tensor:
        matrix, pattern = weight.flatten(1), self.pattern
        if self.transposed and isinstance(pattern, Block):
            pattern = Block(pattern.cols, pattern.rows)
        masked = sample_mask(
            matrix,
            self.trained_scores(),
            self.draws.random,
            pattern,
            stream=self.stream,
            drawn=self._draw(),
            backend=self.backend,
        )
        return masked.reshape(weight.shape)

    def _draw(self) -> Tensor | None:
        """Return this step's draw where it is kept, drawn by the step's first forward pass."""
        if torch.compiler.is_compiling() or not keeps_draws(self.scores):
            return None
        number, key = self.draws.random.tolist(), state_of(self.scores)
        if self._drawn_at != (number, key):
            # within a step another forward pass may still wait for its backward pass
            new_step = self._drawn_at is not None and self._drawn_at[0] != number
            # a tensor made in inference mode could not be saved for a backward pass later
            with torch.inference_mode(False):
                self._drawn = draw(
                    self.scores,
                    self.draws.random,
                    self.stream,
                    self._drawn if new_step else None,
                )
            self._drawn_at = number, key
        return self._drawn

    def freeze(self, frozen: bool) -> None:
        super().freeze(frozen)
        self._drawn = self._drawn_at = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_drawn": None, "_drawn_at": None}

    def apply(self, weight: Tensor) -> Tensor:
        if not self.learning and not torch.compiler.is_compiling():
            self.read_logits()
        return super().apply(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.learning and not torch.compiler.is_compiling():
            self.read_logits()
        return super().linear(x, weight, bias)

    def train(self, mode: bool) -> None:
        super().train(mode)
        # compiled code cannot: it reads the mask as it is
        if not mode:
            self.read_logits()

    def read_logits(self) -> None:
        """Let the mask be that of evaluation, s > 0, if logits have changed. Frozen, it stays."""
        key = state_of(self.scores)
        if self.frozen or self._read_at == key:
            return
        kept = self.scores.detach() > 0
        kept = (kept.T if self.transposed else kept).contiguous()
        self.set_(self._compact(kept), all_kept=bool(kept.all()))
        self._read_at = key

    @property
    def binary_mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True = kept. A copy; assigning turns signs of s."""
        self.read_logits()
        return MaskOperand.binary_mask.fget(self)  # pyright: ignore[reportOptionalCall]

    @binary_mask.setter
    def binary_mask(self, mask: Tensor) -> None:
        MaskOperand.binary_mask.fset(self, mask)  # pyright: ignore[reportOptionalCall]
        kept = MaskOperand.kept_grid(self)
        with torch.no_grad():
            kept = kept.T if self.transposed else kept
            logits = torch.where(kept, INITIAL_LOGIT, -INITIAL_LOGIT)
            self.scores.copy_(torch.where((self.scores > 0) == kept, self.scores, logits))
        self._read_at = state_of(self.scores)

    def kept_grid(self) -> Tensor:
        self.read_logits()
        return super().kept_grid()

    def pruned_groups(self) -> int:
        self.read_logits()
        return super().pruned_groups()

    def pruned_elements(self) -> int:
        self.read_logits()
        return super().pruned_elements()

    def fold_(self, weight: Tensor) -> None:
        self.read_logits()
        super().fold_(weight)


def logit_operands(
    targets: Sequence[Target], config: RBSparsityConfig, backend: Backend, dispatch: Dispatch
) -> list[LogitOperand]:
    """Return an operand for each target; they draw from one seed, each in a stream of its own."""
    # torch's seed may have 64 bits
    seed = torch.initial_seed() % 2**63 if config.seed is None else config.seed
    draws = Draws(seed, targets[0].weight.device)
    return [
        LogitOperand(
            target.weight,
            target.pattern,
            draws,
            stream,
            multiplier=config.compression_lr_multiplier,
            transposed=target.transposed,
            backend=backend,
            dispatch=dispatch,
        )
        for stream, target in enumerate(targets)
    ]


class _KeptGroups(torch.autograd.Function):
    """Count s > 0 in each tensor; the gradient is that of sigmoid(s)."""

    @staticmethod
    def forward(ctx: Any, *logits: Tensor) -> Tensor:
        ctx.save_for_backward(*logits)
        return torch.stack([(s > 0).count_nonzero() for s in logits]).double()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            _sigmoid_slope(s).mul_(grad)
            for grad, s in zip(grads[0].float(), ctx.saved_tensors, strict=True)
        )


def _sigmoid_slope(s: Tensor) -> Tensor:
    """Return the derivative of the sigmoid, in the memory of the sigmoid."""
    p = torch.sigmoid(s)
    return p.addcmul_(p, p, value=-1)


class SparseLoss(CompressionLoss):
    """Pulls the share of groups kept to a target.

    With N groups, of which kept have s > 0: ``((kept / N - target) / p)^2`` with one target for
    all weights, else ``(-sum_l |kept_l / N_l - target_l| / p)^2``; the comparison is
    straight-through, so that a logit's gradient is that of sigmoid(s).

    Args:
        infos: the weights, whose operands hold the logits.
        local: a target for each of them.
        p: how far off the target costs 1.
    """

    def __init__(
        self, infos: Sequence[SparseModuleInfo], *, local: bool = False, p: float = TOLERANCE
    ) -> None:
        super().__init__()
        self.local = local
        self.p = p
        self.disabled = False
        self._infos = list(infos)
        self._targets: list[float] = [1.0] * (len(infos) if local else 1)

    @property
    def target(self) -> float | list[float]:
        """Share of groups to keep, 1 - level; in ``local`` mode one a weight."""
        return list(self._targets) if self.local else self._targets[0]

    @property
    def densities(self) -> list[float]:
        """Share of groups to keep, of all weights or of each."""
        return list(self._targets)

    def set_target(self, density: float, info: SparseModuleInfo | None = None) -> None:
        """Set the target of all weights, or of one.

        Args:
            density: share of groups to keep, in [0, 1].
            info: one of the weights, in ``local`` mode.

        Raises:
            ValueError: the density is outside [0, 1], or one target is for all weights.
        """
        if not 0 <= density <= 1:
            raise ValueError(f"set_target: density must be in [0, 1], got {density!r}")
        if info is None:
            self._targets = [density] * len(self._targets)
        elif self.local:
            at = next(i for i, own in enumerate(self._infos) if own is info)
            self._targets[at] = density
        else:
            raise ValueError(
                "set_sparsity_level: target_sparsified_module_info must be None with "
                "sparsity_level_setting_mode 'global', where one loss is for all weights, got "
                f"{info.module_node_name!r}"
            )

    def calculate(self) -> Tensor:
        """Return the loss; 0 once masks are frozen.

        Raises:
            RuntimeError: the model has been stripped; a mask alone is frozen.
        """
        if not isinstance(self._infos[0].module, SparseModule):
            raise RuntimeError("loss: the model has been stripped; its masks cannot be trained")
        operands = scored_operands(self._infos)
        device = operands[0].scores.device
        if self.disabled:
            return torch.zeros((), device=device)
        for info, operand in zip(self._infos, operands, strict=True):
            if operand.frozen:
                raise RuntimeError(
                    f"loss: the mask of {info.module_node_name!r} is frozen, so that no loss can "
                    "move it; freeze all masks by controller.freeze(), or none"
                )
        kept = _KeptGroups.apply(*[operand.trained_scores() for operand in operands])
        sizes = [operand.groups for operand in operands]
        if self.local:
            rates = kept / torch.tensor(sizes, device=device)
            targets = torch.tensor(self._targets, dtype=torch.float64, device=device)
            miss = -(rates - targets).abs().sum()
        else:
            miss = kept.sum() / sum(sizes) - self._targets[0]
        return (miss / self.p).square().float()

    def get_state(self) -> dict[str, Any]:
        return {"targets": list(self._targets)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the targets.

        Raises:
            ValueError: there are more or fewer, or one is outside [0, 1].
        """
        targets = state.get("targets", ()) if set(state) == {"targets"} else ()
        if len(targets) != len(self._targets) or not all(
            type(target) in (int, float) and 0 <= target <= 1 for target in targets
        ):
            raise ValueError(
                f"load_state: the loss's state must hold {len(self._targets)} targets in [0, 1], "
                f"got {dict(state)!r}"
            )
        self._targets = list(targets)


@dataclass(frozen=True)
class RBSparsityStatistics(SparsityStatistics):
    """Statistics of ``rb_sparsity``, read off the logits as they are.

    Attributes:
        mean_sparse_prob: mean probability of a group to be pruned.
    """

    mean_sparse_prob: float

    def to_str(self) -> str:
        return f"{super().to_str()}\n\nMean probability to be pruned: {self.mean_sparse_prob:.4f}"


class RBSparsityController(BaseSparsityAlgoController):
    """Controls masks that are drawn from trained logits.

    The logits are parameters of the sparse modules, ``<weight>_scores``, and so of the model: an
    optimiser made from ``model.parameters()`` after the controller trains them, one made before
    needs ``optimizer.add_param_group({"params": controller.parameters()})``. They are no keys of
    the model's state dict; ``get_state()`` has them. ``loss`` must be added to the task's, and
    ``scheduler.step()`` called at the start of each optimiser step: there masks are drawn anew.
    ``DistributedDataParallel`` needs ``find_unused_parameters=True``, as frozen masks leave the
    logits without a gradient.

    Args:
        target_model: the model, whose target modules are sparse already, by ``LogitOperand``.
        sparsified_module_info: one entry a masked weight.
        config: what to prune, and when.
        batchnorm_data: batches for ``config.batchnorm_adaptation``.
    """

    name = "rb_sparsity"

    def __init__(
        self,
        target_model: nn.Module,
        sparsified_module_info: Sequence[SparseModuleInfo],
        config: RBSparsityConfig,
        batchnorm_data: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(target_model, sparsified_module_info)
        self.config = config
        self._configure(config, batchnorm_data)
        self._operands = scored_operands(self.sparsified_module_info)
        self._draws: Draws = self._operands[0].draws  # pyright: ignore[reportAttributeAccessIssue]
        self._watch = ScoreWatch(self._operands)
        self._sparse_loss = SparseLoss(
            self.sparsified_module_info, local=config.sparsity_level_setting_mode == "local"
        )
        self._loss = self._sparse_loss
        if config.schedule is None:
            self._scheduler = SamplingStub(self)
        else:
            self._scheduler = SamplingScheduler(self, config.schedule)
            self._target_level = config.schedule.target_level
        self.set_sparsity_level(config.initial_level)

    def parameters(self) -> list[nn.Parameter]:
        return [operand.scores for operand in self._operands]

    def draw_masks(self) -> None:
        """Draw new masks for the coming optimiser step."""
        self._draws.random[1] += 1
        if self._watch.idle() and not self.frozen and self._model.training:
            warnings.warn(
                f"{self.name}: no optimiser has changed the logits in {ScoreWatch.PATIENCE} "
                "steps; one made before the controller needs "
                "optimizer.add_param_group({'params': controller.parameters()})",
                stacklevel=3,
            )

    def disable_scheduler(self) -> None:
        self._scheduler = SamplingStub(self)

    def set_sparsity_level(
        self,
        level: float,
        target_sparsified_module_info: SparseModuleInfo | None = None,
        run_batchnorm_adaptation: bool = False,
    ) -> None:
        """Set the level that the loss pulls to; training takes the masks there.

        Args:
            level: fraction of groups to prune, in [0, 1).
            target_sparsified_module_info: pull this weight only, in ``local`` mode; None: every
                target weight.
            run_batchnorm_adaptation: re-estimate BatchNorm statistics afterwards.

        Raises:
            ValueError: the level is outside [0, 1); the entry is another controller's, or there is
                one in ``global`` mode; there is no BatchNorm adaptation configured.
            RuntimeError: masks are frozen, so that no loss can move them, or the model has been
                stripped.
        """
        if self.frozen:
            raise RuntimeError(
                "set_sparsity_level: masks are frozen and their loss is disabled; freeze(False) "
                "goes on"
            )
        super().set_sparsity_level(level, target_sparsified_module_info, run_batchnorm_adaptation)

    def _set_level(self, infos: list[SparseModuleInfo], level: float) -> None:
        for info in [None] if infos is self.sparsified_module_info else infos:
            self._sparse_loss.set_target(1 - level, info)

    @property
    def compression_rate(self) -> float:
        """The level that the masks have in evaluation; setting it sets the loss's target."""
        return self.measured_sparsity_level()

    @compression_rate.setter
    def compression_rate(self, compression_rate: float) -> None:
        self.set_sparsity_level(compression_rate)

    def freeze(self, freeze: bool = True) -> None:
        """Keep today's masks of evaluation, in training too, and let the loss be 0; or go on."""
        super().freeze(freeze)
        for operand in self._operands:
            operand.read_logits()  # pyright: ignore[reportAttributeAccessIssue]
        self._take_frozen()

    def adapt_to_frozen(self) -> None:
        """Adapt BatchNorm to the masks that stay, if that is configured."""
        if self._batchnorm is not None:
            self._adapt_batchnorm()

    def compression_stage(self) -> CompressionStage:
        stage = super().compression_stage()
        if stage is CompressionStage.FULLY_COMPRESSED and self._sparse_loss.local:
            for info, density in zip(
                self.sparsified_module_info, self._sparse_loss.densities, strict=True
            ):
                operand = info.operand
                if operand.pruned_groups() < round((1 - density) * operand.groups) - 1:
                    return CompressionStage.PARTIALLY_COMPRESSED
        return stage

    def _take_frozen(self) -> None:
        self._sparse_loss.disabled = self.frozen
        for operand in self._operands:
            operand.freeze(self.frozen)

    def distributed(self) -> None:
        """Let all ranks draw what the first of them draws.

        Raises:
            RuntimeError: ``torch.distributed`` has no process group.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                "distributed: torch.distributed must have a process group; call "
                "init_process_group() first"
            )
        torch.distributed.broadcast(self._draws.random, src=0)

    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        found: SparsityStatistics = getattr(super().statistics(), self.name)
        with torch.no_grad():
            kept = sum(op.scores.sigmoid().sum(dtype=torch.float64) for op in self._operands)
        mean = 1 - float(kept) / sum(operand.groups for operand in self._operands)
        own = RBSparsityStatistics(found.model_statistics, found.target_sparsity_level, mean)
        return Statistics(**{self.name: own})

    def _own_state(self) -> dict[str, Any]:
        seed, draw = self._draws.random.tolist()
        return {"seed": seed, "draw": draw, "logits": scores_state(self.sparsified_module_info)}

    @torch.no_grad()
    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"seed", "draw", "logits"}:
            raise ValueError(
                f"load_state: algorithm_state must have seed, draw and logits, got {sorted(state)}"
            )
        for key, end in (("seed", 2**63), ("draw", 2**32)):
            if type(state[key]) is not int or not 0 <= state[key] < end:
                raise ValueError(
                    f"load_state: {key} must be an integer from 0, got {state[key]!r}"
                )
        logits = read_scores(state["logits"], self.sparsified_module_info)
        for operand, saved in zip(self._operands, logits, strict=True):
            operand.frozen = False
            operand.scores.copy_(saved)
        random = self._draws.random
        random.copy_(torch.tensor([state["seed"], state["draw"]], device=random.device))

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        super().load_state(state)
        self._take_frozen()


class SamplingScheduler(SparsityScheduler):
    """Has the controller draw masks at each step, besides following the schedule."""

    def __init__(self, controller: RBSparsityController, schedule: Schedule) -> None:
        super().__init__(controller, schedule)
        self._sampler = controller

    def _apply(self) -> None:
        # masks that the user froze before the schedule does
        if not self._sampler.frozen:
            super()._apply()
            if self._sampler.frozen:
                self._sampler.adapt_to_frozen()

    def step(self, next_step: int | None = None) -> None:
        super().step(next_step)
        self._sampler.draw_masks()


class SamplingStub(StubScheduler):
    """Changes no level; has the controller draw masks at each step."""

    def __init__(self, controller: RBSparsityController) -> None:
        super().__init__()
        self._sampler = controller

    def step(self, next_step: int | None = None) -> None:
        self._sampler.draw_masks()
