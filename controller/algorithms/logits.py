"""Logits: what rb sparsity trains, and draws masks from; one a group.

``rb.py`` says when masks are drawn, and which level the loss pulls to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.bits import pack
from ...kernels.draw import draw, keeps_draws
from ...kernels.learned_mask import kept_groups, sample_mask, sample_part
from ...kernels.masked_weight import apply_mask
from ...kernels.pattern import Block
from ..masks.exchange import full_grid_within
from ..masks.schema import Schema, list_of, number
from ..masks.scored import ScoredWeight
from ..masks.weight import SparseWeight, Target
from .learned import LearnedLoss

INITIAL_LOGIT = 4.59512  # logit(0.99)
TOLERANCE = 0.05  # NNCF's p: a miss of the target by so much of the groups costs 1


@dataclass
class Draws:
    """What the weights of one controller draw their masks from: int64 ``(2,)``, the seed and the
    number of the draw.
    """

    random: Tensor


class LogitWeight(ScoredWeight):
    """A weight whose mask is drawn from logits, one a group.

    It is drawn once an optimiser step: forward passes of one step, be they of several
    micro-batches, of a module used twice or of activation checkpointing, agree. The weights of
    one controller share ``draws``; ``stream`` is this one's number.
    """

    initial_score = INITIAL_LOGIT

    def __init__(self, target: Target, draws: Draws, stream: int, **options: Any) -> None:
        self.draws = draws
        self.stream = stream
        self._read_at: tuple[Any, ...] | None = None
        self._drawn: Tensor | None = None
        self._drawn_at: tuple[Any, ...] | None = None
        super().__init__(target, **options)

    @property
    def scores_shape(self) -> tuple[int, int]:
        # as the weight is stored, so that both are read along their rows
        down, across = self.full_grid
        return (across, down) if self.transposed else (down, across)

    @property
    def score_sides(self) -> tuple[int, int]:
        return self.pattern.rows, self.pattern.cols

    def _move(self, weight: Tensor) -> None:
        super()._move(weight)
        if self.draws.random.device != weight.device:
            self.draws.random = self.draws.random.to(weight.device)

    def learned(self, weight: Tensor) -> Tensor:
        pattern = self.pattern
        if self.transposed and isinstance(pattern, Block):
            pattern = Block(pattern.cols, pattern.rows)
        matrix, scores = self.matrix(weight), self.trained_scores()
        stored = matrix.T if self.transposed else matrix
        options: Any = {"stream": self.stream, "backend": self.backend}
        if self.in_parts and self.multiplied is not None:  # by tensor parallelism
            grids = self.scores_shape, self.own_scores
            return sample_part(stored, scores, self.draws.random, pattern, *grids, **options)
        drawn = self._draw(scores.detach())
        masked = sample_mask(stored, scores, self.draws.random, pattern, drawn=drawn, **options)
        return masked.reshape(weight.shape)

    def evaluated(self, weight: Tensor) -> Tensor:
        if not self.in_parts:
            return super().evaluated(weight)
        kept = self.trained_scores().detach() > 0
        matrix, kept = self.target.matrix(weight), kept.T if self.transposed else kept
        mask = pack(kept) if self.packed else kept.contiguous()
        masked = apply_mask(matrix, mask, self.pattern, backend=self.backend)
        return (masked.T if self.transposed else masked).reshape(weight.shape)

    def _draw(self, scores: Tensor) -> Tensor | None:
        """Return this step's draw where it is kept, drawn by the step's first forward pass."""
        if torch.compiler.is_compiling() or not keeps_draws(scores):
            return None
        number, key = self.draws.random.tolist(), self.mask_state()
        if self._drawn_at != (number, key):
            # within a step another forward pass may still wait for its backward pass
            new_step = self._drawn_at is not None and self._drawn_at[0] != number
            # a tensor made in inference mode could not be saved for a backward pass later
            with torch.inference_mode(False):
                out = self._drawn if new_step else None
                self._drawn = draw(scores, self.draws.random, self.stream, out)
            self._drawn_at = number, key
        return self._drawn

    def freeze(self, frozen: bool) -> None:
        self._count()
        super().freeze(frozen)
        self._drawn = self._drawn_at = None

    def pruned_groups(self) -> int:
        self._count()
        return super().pruned_groups()

    def pruned_elements(self) -> int:
        self._count()
        return super().pruned_elements()

    def _count(self) -> None:
        """Ask the stage that has the weight what its mask keeps. Every rank must call this."""
        if self.target.holders and not self.frozen:
            self.tell_counts()

    def settle(self) -> None:
        """Let the mask be that of evaluation, s > 0, if logits have changed. Frozen, it stays. Of
        a weight that lies in parts the ranks that have these must call this, and no others.

        Compiled code cannot look: it reads the mask as it is.
        """
        if self.frozen or self.absent or torch.compiler.is_compiling():
            return
        key = self.mask_state()
        if self._read_at != key:
            self.follow()  # the weight may be a shard by now
            kept = self.part() > 0
            kept = (kept.T if self.transposed else kept).contiguous()
            if not self.in_parts:
                self.set_grid(kept)
            elif self.gathers_scores and not self.scores_lie_as_elements:
                self._take_full(full_grid_within(self, kept))
            else:
                self.take_part(kept)
            self._read_at = key

    def _become_sharded(self, weight: Any) -> None:
        self._read_at = self.mask_state()  # logits are shards already, and the mask whole
        super()._become_sharded(weight)
        self._read_at = None

    def _assign(self, grid: Tensor) -> None:
        """Turn the signs of logits too, where they say otherwise."""
        super()._assign(grid)
        with torch.no_grad():
            kept = grid.T if self.transposed else grid
            logits = torch.where(kept, INITIAL_LOGIT, -INITIAL_LOGIT)
            self.scores.copy_(torch.where((self.scores > 0) == kept, self.scores, logits))
        self._read_at = self.mask_state()


def logit_weights(
    targets: Sequence[Target], seed: int | None, **options: Any
) -> list[SparseWeight]:
    """Return each target under logits; they draw from one seed, each in a stream of its own."""
    # torch's seed may have 64 bits
    seed = torch.initial_seed() % 2**63 if seed is None else seed
    draws = Draws(torch.tensor([seed, 0], device=targets[0].weight.device))
    return [LogitWeight(target, draws, i, **options) for i, target in enumerate(targets)]


class SparseLoss(LearnedLoss):
    """Pulls the share of groups kept to a target.

    With N groups, of which kept have s > 0: ``((kept / N - target) / p)^2`` with one target for
    all weights, else ``(-sum_l |kept_l / N_l - target_l| / p)^2``; the comparison is
    straight-through, so that a logit's gradient is that of sigmoid(s). With ``local`` each weight
    has a target; ``p`` off the target costs 1.
    """

    _weights: list[ScoredWeight]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, weights: Sequence[ScoredWeight], *, local: bool = False, p: float = TOLERANCE
    ) -> None:
        super().__init__(weights)
        self.local = local
        self.p = p
        # shares of groups to keep, of all weights or of each
        self.densities: list[float] = [1.0] * (len(weights) if local else 1)

    @property
    def target(self) -> float | list[float]:
        """Share of groups to keep, 1 - level; in ``local`` mode one a weight."""
        return list(self.densities) if self.local else self.densities[0]

    def set_target(self, density: float, weight: SparseWeight | None = None) -> None:
        """Set the share of groups to keep of all weights, or of one in ``local`` mode.

        Raises:
            ValueError: the density is outside [0, 1], or one target is for all weights.
        """
        if not 0 <= density <= 1:
            raise ValueError(f"set_target: density must be in [0, 1], got {density!r}")
        self.check_target(weight)
        for i, own in enumerate(self._weights if self.local else [None]):
            if weight is None or own is weight:
                self.densities[i] = density

    def check_target(self, weight: SparseWeight | None) -> None:
        if weight is not None and not self.local:
            raise ValueError(
                "set_sparsity_level: target_sparsified_module_info must be None with "
                "sparsity_level_setting_mode 'global', where one loss is for all weights, got "
                f"{weight.name!r}"
            )

    def numbers(self) -> Tensor:
        """Return how many groups each weight keeps, straight-through."""
        return kept_groups([weight.trained_part() for weight in self._weights])

    def trained(self) -> Tensor | None:
        if self.disabled:
            return None
        if frozen := [weight.name for weight in self._weights if weight.frozen]:
            raise RuntimeError(
                f"loss: the mask of {frozen[0]!r} is frozen, so that no loss can move it; freeze "
                "all masks by controller.freeze(), or none"
            )
        kept = self.numbers_of_all()
        sizes = [weight.groups for weight in self._weights]
        if self.local:
            rates = kept / torch.tensor(sizes, device=kept.device)
            miss = -(rates - rates.new_tensor(self.densities)).abs().sum()
        else:
            miss = kept.sum() / sum(sizes) - self.densities[0]
        return (miss / self.p).square().float()

    def get_state(self) -> dict[str, Any]:
        return {"targets": list(self.densities)}

    def schema(self) -> Schema:
        return {"targets": list_of(number("a number in [0, 1]", 0, 1), len(self.densities))}

    def _take(self, state: Mapping[str, Any]) -> None:
        self.densities = list(state["targets"])
