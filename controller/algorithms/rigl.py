"""RigL: SET that grows where the gradient is greatest.

That is where |g| is, as published. In a linear layer whole rows and columns have a large |g|:
outputs that the loss is sensitive to, inputs that are large, and growth heaps up there (measured
on a transformer: two thirds of a layer's in a tenth of its rows). ``"normed_gradient"`` divides g
by the root mean square of its row, then of its column; docs/algorithms.md says when that helps.
In very large models neighbouring lines have one size in common, a band of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.line_score import line_scores, lines_a_band
from ...kernels.pattern import Unstructured
from ..masks.exchange import (
    full_tensor,
    grown,
    known_anywhere,
    lines_of_all,
    over_stages,
    own_part,
)
from ..masks.schema import FLAG, FLOATS, Maybe, Schema, tensor
from ..masks.shards import local_part
from ..masks.weight import SparseWeight
from ..selection.criteria import Importance, scores_by_group
from .base import Change
from .set import RegrowthConfig, RegrowthScheduler, SETController


class RigLConfig(RegrowthConfig):
    """Drop by magnitude, grow by gradient: Evci et al., https://arxiv.org/abs/1911.11134.

    For example ``RigLConfig(level=0.8, t_end=7500)``; ``RegrowthConfig`` has the other arguments.

    Args:
        growth: ``"gradient"``: grow where |g| is greatest, as published; ``"normed_gradient"``:
            where it is greatest against its row's and its column's, or bands' of these.
    """

    algorithm: Literal["rigl"] = "rigl"
    growth: Literal["gradient", "normed_gradient"] = "gradient"


class RigLController(SETController):
    """SET that grows where the gradient is greatest.

    In the step before an update, and in no other, pruned groups get a gradient: it is kept aside
    as it arrives, before ``weight.grad`` is made zero there, so that neither the optimiser nor a
    clipped norm sees it. An update whose gradients overflowed, as with AMP, or were not asked for,
    because steps were skipped, waits for the next step.

    Ranks that see different data grow by the mean of their gradients, which
    ``DistributedDataParallel`` finds as it finds that of what is kept. Without it they find it as
    an optimiser of torch's steps, else at the update.
    """

    name = "rigl"
    _averages = True

    def _set_up(self) -> None:
        self._normed = self.config.growth == "normed_gradient"
        self._band = lines_a_band([weight.full_shape for weight in self._weights])
        self._dense = _DenseGradients()
        self._asked: set[str] = set()  # what an optimiser has stepped, the same on every rank
        self._watching = False
        self._overdue = False
        super()._set_up()

    def update(self, step: int) -> None:
        super().update(step)
        self._dense.clear()
        self._asked.clear()
        self._watch_if_due_next()

    def _is_due(self, step: int) -> bool:
        return super()._is_due(step) or (self._overdue and step < self.config.t_end)

    def _grown(
        self, weights: Sequence[SparseWeight], masks: list[Tensor], keep: Sequence[int], step: int
    ) -> tuple[list[Tensor], Tensor]:
        first = weights[0]
        gradients = [weight.matrix(self._dense.known[weight.name]) for weight in weights]
        if self._normed and not any(weight.shard for weight in weights):
            pattern = Unstructured() if first.packed else first.pattern
            scores = line_scores(gradients, pattern, band=self._band, backend=first.backend)
        else:
            if self._normed:
                gradients = lines_of_all(weights, gradients, self._band)
            scores = scores_by_group(weights, [*map(Importance, gradients)]).tensors
        # the gradients themselves are wanted again where the update is refused
        spend = self._normed or not first.packed
        return grown(weights, masks, scores, keep, spend=spend)

    def _regrowing(self) -> list[SparseWeight]:
        # a weight that the step did not use has nothing to grow by
        return [i for i in super()._regrowing() if i.name in self._dense.known]

    def _regrow(self, step: int) -> bool:
        ranks, growing = self.ranks, super()._regrowing()
        if not ranks.any(bool(self._dense.known), self._device) and growing:
            if self._watching:
                raise RuntimeError(
                    f"rigl: the update of step {step} needs the gradients of the step before, and "
                    "there was no backward pass between the scheduler's two calls of step()"
                )
            # the step before was not known to be one: unfrozen since, or steps were skipped
            self._overdue = True
            return False
        self._average(self._whole)
        for weight in known_anywhere(growing, self._dense.known):
            if weight.absent:  # of which other ranks have a gradient, and this one no elements
                self._dense.known.setdefault(weight.name, torch.zeros_like(weight.weight))
        self._overdue = not super()._regrow(step)
        return not self._overdue

    @property
    def _whole(self) -> list[SparseWeight]:
        """The weights that may grow and of which each rank has a gradient of its own: of a shard
        FSDP2 has reduced it.
        """
        return [weight for weight in super()._regrowing() if not weight.in_parts]

    def before_optimizer_step(
        self, weights: Sequence[SparseWeight], overflowed: Tensor | None
    ) -> None:
        super().before_optimizer_step(weights, overflowed)
        if not self._watching:
            return
        self._dense.stepped.update(weight.name for weight in weights)
        # an optimiser that parts its work steps some weights once more, on each rank others
        stepped = {weight.name for weight in weights} - self._asked
        new = [weight for weight in self._whole if weight.name in stepped]
        self._asked.update(weight.name for weight in new)
        # stages of a pipeline step weights of their own; what a reducer has averaged is held
        # against other ranks' at the update
        rest = [w for w in new if not (w.on_stage or self._guard.is_reduced(w))]
        self._average(rest)

    def _average(self, weights: Sequence[SparseWeight]) -> None:
        """Let gradients be the means of all ranks', which must call this with the same weights; of
        stages of a pipeline the sums.
        """
        ranks = self.ranks
        if ranks.size == 1 or not weights:
            return
        gradients, averaged = self._dense.known, self._dense.averaged
        has = torch.tensor([weight.name in gradients for weight in weights])
        done = torch.tensor([weight.name in averaged for weight in weights])
        # of what the reducer of DistributedDataParallel is thought to have averaged
        prints = torch.zeros(len(weights), dtype=torch.int64, device=self._device)
        for i in (has & done).nonzero().flatten().tolist():
            prints[i] = gradients[weights[i].name].sum(dtype=torch.float64).view(torch.int64)
        flags = torch.stack([has, ~done]).to(prints)
        some, rest, most, least = ranks.most(torch.cat([flags, torch.stack([prints, ~prints])]))
        asked = (some.bool() & (rest.bool() | (most != ~least))).tolist()
        for weight in (weight for weight, ask in zip(weights, asked, strict=True) if ask):
            if weight.name not in gradients:  # this rank has not used it
                gradients[weight.name] = torch.zeros_like(weight.weight)
            own = gradients[weight.name]
            if weight.on_stage:
                gradients[weight.name] = over_stages(weight, own)
            else:
                # a mean: of those who have an earlier one already it is that
                ranks.sum(own).div_(ranks.size)
                averaged.add(weight.name)

    def _spoilt(self) -> list[Tensor]:
        if not self._dense.known:
            return []
        some = [gradient for gradient in self._dense.known.values() if gradient.numel()]
        spoilt = ~nn.utils.get_total_norm(some, float("inf")).isfinite().to(self._device)
        if any(weight.shard for weight in self._weights):
            spoilt = self.ranks.sum(spoilt.long()) > 0
        return [spoilt]

    def _watch_if_due_next(self) -> None:
        # a stub, which has taken the scheduler's place, begins no step
        scheduled = isinstance(self._scheduler, RegrowthScheduler) and not self.frozen
        self._watch(scheduled and self._is_due(self._scheduler.current_step + 1))

    def _watch(self, watch: bool) -> None:
        self._watching = watch
        for weight in self._weights:
            wanted = watch and not weight.all_kept and weight.weight.requires_grad
            weight.dense_gradient_taker = _Taker(weight, self._dense) if wanted else None
            if weight.product is not None:
                weight.product.want_dense_grad(wanted)

    def freeze(self, freeze: bool = True) -> None:
        super().freeze(freeze)
        if freeze:
            self._watch(False)

    def disable_scheduler(self) -> None:
        super().disable_scheduler()
        self._watch(False)

    def _read_state(self, state: Mapping[str, Mapping[str, Any]]) -> Change:
        take_state = super()._read_state(state)

        def take() -> None:
            take_state()
            # the step may have its backward pass yet to come
            scheduled = isinstance(self._scheduler, RegrowthScheduler)
            own = state[self.name]["algorithm_state"]
            self._watch(scheduled and own["watching"])

        return take

    def _own_state(self) -> dict[str, Any]:
        gradients = {
            i.name: full_tensor(i, self._dense_gradient(i))
            for i in known_anywhere(self._weights, self._dense.known)
        }
        return super()._own_state() | {
            "overdue": self._overdue,
            "watching": self._watching,
            "dense_gradients": gradients,
            "gradients_of_all": all(w.name not in self._dense.known for w in self._unshared),
        }

    @property
    def _unshared(self) -> list[SparseWeight]:
        """The weights whose gradients are yet to be averaged, and are not as a state is made."""
        alone = self.ranks.size == 1
        every = [] if alone else [w for w in self._whole if not w.on_stage]
        return [weight for weight in every if weight.name not in self._dense.averaged]

    def _dense_gradient(self, weight: SparseWeight) -> Tensor:
        # of a weight on another stage there is nothing here, nor on one that has not used it
        found = self._dense.known.get(weight.name)
        found = torch.zeros_like(weight.weight) if found is None else found
        return over_stages(weight, found) if weight.on_stage else found

    def _own_schema(self) -> dict[str, Schema]:
        gradients: Schema = {
            weight.name: Maybe(tensor([weight.weight_shape], FLOATS, finite=False))
            for weight in self._weights
        }
        return super()._own_schema() | {
            "overdue": FLAG,
            "watching": FLAG,
            "dense_gradients": gradients,
            "gradients_of_all": FLAG,
        }

    def _take_own(self, state: Mapping[str, Any]) -> None:
        super()._take_own(state)
        self._overdue = state["overdue"]
        weights = {weight.name: weight for weight in self._weights}
        self._dense.known = {
            name: own_part(weights[name], gradient) * _holds_sum(weights[name])
            for name, gradient in state["dense_gradients"].items()
        }
        sums = self._dense.known if state["gradients_of_all"] else ()
        self._dense.averaged = {name for name in sums if not weights[name].on_stage}
        self._dense.stepped = {*self._dense.known}  # what it was accumulated in is gone
        self._asked.clear()


@dataclass
class _DenseGradients:
    """Gradients by the names of their weights, pruned elements too, summed over micro-batches.

    Attributes:
        averaged: of which ranks have found the mean.
        stepped: by which an optimiser has stepped: the next backward pass begins anew.
    """

    known: dict[str, Tensor] = field(default_factory=dict)
    averaged: set[str] = field(default_factory=set)
    stepped: set[str] = field(default_factory=set)

    def clear(self) -> None:
        for some in (self.known, self.averaged, self.stepped):
            some.clear()


@dataclass(frozen=True)
class _Taker:
    weight: SparseWeight
    dense: _DenseGradients

    @torch.no_grad()
    def join(self, gradient: Tensor) -> None:
        name = self.weight.name
        if name in self.dense.known and name not in self.dense.averaged:
            gradient.add_(self._pruned(self.dense.known.pop(name)))

    @torch.no_grad()
    def take(self, gradient: Tensor, *, averaged: bool = False) -> None:
        name, known = self.weight.name, self.dense.known
        taken = local_part(gradient).clone()
        if (earlier := known.get(name)) is not None:
            averaged &= name in self.dense.averaged
            # of kept elements the gradient is the sum of all micro-batches already
            taken += earlier if name in self.dense.stepped else self._pruned(earlier)
        known[name] = taken
        self.dense.stepped.discard(name)
        (self.dense.averaged.add if averaged else self.dense.averaged.discard)(name)

    def _pruned(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill_(self.weight.like_weight(self.weight.kept_elements()), 0)


def _holds_sum(weight: SparseWeight) -> bool:
    """Tell whether a sum over stages of a pipeline, which a state has, is to be held here."""
    return not weight.on_stage or weight.is_first_stage
