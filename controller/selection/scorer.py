"""Scores by a criterion, and the evidence it needs, gathered in training and calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.exact_sum import row_sums
from ...kernels.pattern import Pattern, Unstructured
from ...kernels.squares import convolution_squares
from ...kernels.table import alike
from ..config.algorithm import Pool
from ..masks.exchange import (
    full_groups,
    full_matrix,
    full_tensor,
    known_anywhere,
    others_of,
    own_part,
    pieces_here,
    sums_of_each,
    sums_of_parts,
    within,
)
from ..masks.names import canonical
from ..masks.schema import Maybe, Schema, tensor
from ..masks.shards import is_sharded, like_shard, local_part
from ..masks.weight import SparseWeight
from .astride import (
    edge_sums,
    parted,
    steps_at_most,
    sums_of_shards,
    sums_of_whole,
    whole_rows,
)
from .criteria import (
    Evidence,
    Importance,
    Reduction,
    WeightImportance,
    check_gradients,
    check_sharded,
    check_weights,
    criterion,
    group_sums,
    product,
    rows_at_a_time,
    scores_by_group,
)
from .function import found_by_function
from .thresholds import Scores, pools

# Intel Neural Compressor's factor
MOMENTUM_DECAY = 0.9
# of each weight: float64, squared inputs a column, and how many there were
Sums = dict[str, tuple[Tensor, int]]
OUTLIER = 5  # the paper's M
SUMMED = ("snip_momentum", "fisher")
BY_GRADIENT = ("snip", "taylor", *SUMMED)


def needs(importance: WeightImportance) -> tuple[str, ...]:
    """Return what is to be gathered before a criterion can judge: "inputs", "gradients"."""
    if not isinstance(importance, str):
        return tuple(getattr(importance, "needs", ()))
    if importance in BY_GRADIENT:
        return ("gradients",)
    return ("inputs",) if importance == "wanda" else ()


class Scorer:
    """Scores by a criterion, called ``importance``, and what has been gathered for it so far."""

    def __init__(
        self,
        weights: Sequence[SparseWeight],
        importance: WeightImportance,
        seed: int,
        reduction: Reduction = "mean",
    ) -> None:
        self.importance: WeightImportance = importance
        self.needs_inputs = "inputs" in needs(importance)
        self.needs_gradients = "gradients" in needs(importance)
        self._reduction: Reduction = reduction
        self._weights = list(weights)
        self._seed = seed
        self._momenta: dict[str, Tensor] = {}
        self._parts: dict[str, list[Tensor]] = {}  # of blocks on two ranks, yet to be summed
        self._products: dict[str, Tensor] = {}  # w g, as the optimiser stepped
        self._taken: set[str] = set()  # what is summed already of this step
        self._input_norms: dict[str, Tensor] = {}

    def scores(self, weights: Sequence[SparseWeight], pool: Pool = "global") -> Scores:
        """Score every group of the weights given, which share one pattern and are ``pool``s.

        Raises:
            RuntimeError: what the criterion needs has not been gathered, or is 0 throughout.
        """
        importance_of, evidence = criterion(self.importance), map(self._evidence, weights)
        if any(weight.shard for weight in weights):
            return self._of_shards(weights, pool)
        if self.importance in ("abs", "normed_abs"):
            # of hundreds of weights: what they do not look at is not asked for
            matrices = [weight.matrix(weight.weight.detach()) for weight in weights]
            normed = self.importance == "normed_abs"
            found = [Importance(matrix, normed) for matrix in matrices]
            return scores_by_group(weights, found, self._reduction)
        if self.importance in BY_GRADIENT:
            self._refuse_unused(weights)
        if self.importance != "wanda":
            check_weights(weights)
        # one by one: of a block pattern no more than one weight's copy is there at a time
        tensors, speak = [], {}
        for weight, found in zip(weights, map(importance_of, evidence), strict=True):
            if self.importance in BY_GRADIENT:
                speak[weight] = self._speech(found)
            tensors += scores_by_group([weight], [found], self._reduction).tensors
        for members in pools(weights, pool) if speak else ():
            check_gradients(self.importance, members, [speak[weight] for weight in members])
        return Scores(tensors, None)

    def may_overwrite(self, weights: Sequence[SparseWeight], scores: Sequence[Tensor]) -> bool:
        """Tell whether scores are nobody's else, and may be written over: no weight, no gradient,
        nothing that is kept for the next update. A function may keep what it returns.
        """
        if not isinstance(self.importance, str) or self.importance in ("abs", "normed_abs"):
            return False
        parameters = [weight.weight for weight in weights]
        held = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        for kept in (self._momenta, self._products, self._input_norms):
            held += kept.values()
        memory = {local_part(tensor).untyped_storage().data_ptr() for tensor in held}
        return memory.isdisjoint(score.untyped_storage().data_ptr() for score in scores)

    def outliers(self, weights: Sequence[SparseWeight]) -> list[float]:
        """Return which share of each weight's elements has more than ``OUTLIER`` times the mean
        importance of all: OWL's ratio. Waits for the device once.
        """
        held = self._found_of_shards(weights) if any(weight.shard for weight in weights) else None

        def found() -> Iterable[Importance]:
            # else one by one: no more than one weight's copy is there at a time
            return held or map(criterion(self.importance), map(self._evidence, weights))

        sums, sizes = [], []
        for weight, (values, _, per_group) in zip(weights, found(), strict=True):
            groups = per_group and not weight.packed
            lines = values.T if weight.transposed and not groups else values
            # groups one by one: those of a piece of a line may be of two ranks
            pieces = values.shape[1] if groups else pieces_here(weight)
            parts = (row_sums(lines[at].abs(), pieces) for at in rows_at_a_time(lines))
            sums.append(torch.cat([values.new_empty(0, dtype=torch.float64), *parts]))
            sizes.append(math.prod(weight.full_grid if per_group else weight.weight_shape))
        totals = sums_of_each(weights, sums, sizes)
        size = totals.new_tensor(sizes)
        bounds = OUTLIER * totals / size
        above = [_beyond(one.values, bound) for one, bound in zip(found(), bounds, strict=True)]
        return (sums_of_parts(weights, torch.stack(above)) / size).tolist()

    def _refuse_unused(self, weights: Sequence[SparseWeight]) -> None:
        """Refuse a weight without a gradient, where others have one: nothing has used it."""
        gathered = self._momenta if self.importance in SUMMED else self._products
        used = [w for w in self._weights if w.name in gathered or w.weight.grad is not None]
        names = {weight.name for weight in used}
        unused = [i.name for i in weights if i.name not in names and not i.absent]
        if used and unused:
            raise RuntimeError(
                f"{self.importance}: the weights of {unused} have no gradient while others have: "
                "the backward pass has not used them, or they are frozen; list them in "
                "ignored_scopes, or run a pass that uses them"
            )

    def _found_of_shards(self, weights: Sequence[SparseWeight]) -> list[Importance]:
        """Return the importances of what belongs here. What one rank lacks is told to all."""
        importance, ranks = self.importance, weights[0].ranks
        if callable(importance):
            return found_by_function(importance, weights, self._evidence)
        self._add_parts()
        with ranks.together(weights[0].mask.device):
            check_sharded(weights, importance)
            if importance in BY_GRADIENT:
                self._refuse_unused(weights)
            if importance in (*BY_GRADIENT, "random"):
                check_weights(weights)
            # parts of a block may lie elsewhere: it is added up below
            lone = "snip" if importance == "taylor" and not weights[0].packed else importance
            found = [*map(criterion(lone), map(self._evidence, weights))]
        if lone != importance:
            sums = sums_of_shards(weights, [one.values for one in found])
            found = [Importance(values, per_group=True) for values in sums]
        return found

    def _of_shards(self, weights: Sequence[SparseWeight], pool: Pool) -> Scores:
        importance, ranks = self.importance, weights[0].ranks
        found = self._found_of_shards(weights)
        if importance in BY_GRADIENT:
            others = others_of(weights)
            assert others is not None
            speak = torch.stack([*map(self._speech, found)])
            total = ranks.sum(speak * speak.new_tensor(others.counted))
            seen = dict(zip(weights, total.unbind(), strict=True))
            for members in pools(weights, pool):
                check_gradients(importance, members, [seen[weight] for weight in members])
        tensors: dict[SparseWeight, Tensor] = {}
        scales = None
        for at in alike(one.per_group for one in found).values():  # of a function both may be
            members, own = [weights[i] for i in at], [found[i] for i in at]
            scores, scales = scores_by_group(members, own, self._reduction)
            tensors |= zip(members, scores, strict=True)
        return Scores([tensors[weight] for weight in weights], scales)

    def _speech(self, found: Importance) -> Tensor:
        """Return the sum of |w g| that a pool must not lack, 0-d."""
        size = torch.sqrt if self.importance == "fisher" else torch.abs
        values = found.values
        sums = [size(values[at]).sum(dtype=torch.float32) for at in rows_at_a_time(values)]
        return torch.stack([torch.zeros((), device=values.device), *sums]).sum()

    def before_step(
        self, weights: Sequence[SparseWeight], overflowed: Tensor | None = None
    ) -> None:
        """Take in the gradients by which an optimiser is about to step ``weights``, and the
        weights that they are of.

        Args:
            overflowed: above 0 where a gradient scaler lets the optimiser skip the step itself;
                torch has it for all ranks.
        """
        if self.importance in SUMMED:
            self._add(weights, overflowed)
            self._taken |= {weight.name for weight in weights}
            return
        for weight in weights:
            gradient, matrix = weight.weight.grad, weight.matrix
            if gradient is None:
                self._products.pop(weight.name, None)
                continue
            values, slopes = matrix(weight.weight.detach()), matrix(gradient.detach())
            # the memory of the last step's
            held = self._products.get(weight.name)
            fits = held is not None and (held.shape, held.device) == (values.shape, values.device)
            self._products[weight.name] = product(values, slopes, held if fits else None)
            # tells a later gradient from this, wherever it is kept meanwhile
            local: Any = gradient
            local._of_product = _version(gradient)

    def observe(self, *, frozen: bool) -> None:
        """Take in the gradients of the step that has ended, where the criterion sums them and no
        optimiser that torch knows has stepped by them; frozen masks need none.
        """
        if self.importance in SUMMED and not frozen:
            left = [weight for weight in self._weights if weight.name not in self._taken]
            self._add(left, None, by_optimizer=False)
        self._taken.clear()

    def _add(
        self,
        weights: Sequence[SparseWeight],
        overflowed: Tensor | None,
        *,
        by_optimizer: bool = True,
    ) -> None:
        """Sum gradients of one step, but for one whose gradients overflowed, as with AMP: the
        optimiser skips it too.
        """
        used = [(i, gradient) for i in weights if (gradient := i.weight.grad) is not None]
        if not used:
            return
        # stays on the device: a step must not wait for it. A NaN weight, which the update will
        # refuse, must not stay in the sum
        both = [tensor for i, gradient in used for tensor in (i.weight.detach(), gradient)]
        here = [*map(local_part, both)]
        ends = [end for tensor in here if tensor.numel() for end in tensor.aminmax()]
        finite = torch.stack([here[0].new_zeros(()), *ends]).isfinite().all()
        if overflowed is not None:
            finite &= (overflowed == 0).all()
        sharded = [weight for weight, gradient in used if is_sharded(gradient)]
        if not by_optimizer and sharded:
            # a scaler may have kept the optimiser from the step, as a shard elsewhere overflowed
            _, _, add = within(sharded[0])
            finite = add((~finite).long()) == 0
        for weight, gradient in used:
            name, matrix = weight.name, weight.matrix
            values, slopes = matrix(weight.weight.detach()), matrix(gradient.detach())
            fisher = self.importance == "fisher"
            pattern = _pattern(weight) if fisher else Unstructured()
            shard = parted(weight) if fisher else None
            if name not in self._momenta:
                self._momenta[name] = self._nothing(weight, "momenta")
            if shard is not None:
                parts = edge_sums(shard, values, slopes)
                self._parts.setdefault(name, []).append(parts.masked_fill_(~finite, torch.nan))
            whole, first = whole_rows(shard), 0
            values, slopes = values[whole], slopes[whole]
            for at in rows_at_a_time(values, pattern.rows):
                found = group_sums(product(values[at], slopes[at]), pattern)
                sizes = found.square_() if fisher else found.abs_()
                _decay_and_add(self._momenta[name][first : first + len(sizes)], sizes, finite)
                first += len(sizes)
        held = [(parted(w), steps) for w in self._weights if (steps := self._parts.get(w.name))]
        if any(shard and len(steps) >= steps_at_most(shard) for shard, steps in held):
            self._add_parts()

    def _add_parts(self) -> None:
        """Add to the sums what blocks on two ranks have had since this was last done, which ranks
        must do together.
        """
        held = [weight for weight in self._weights if weight.name in self._parts]
        parts = [self._parts.pop(weight.name) for weight in held]
        sums = zip(held, sums_of_whole(held, parts), strict=True)
        ends = [(weight, found) for weight, found in sums if len(found)]
        # of all weights at once: there may be many steps
        for at in alike(len(found) for _, found in ends).values():
            momenta = [self._momenta[ends[i][0].name][-1] for i in at]
            together = torch.cat(momenta)
            for step in torch.cat([ends[i][1] for i in at], 1):
                _decay_and_add(together, step.square(), ~step.isnan())
            for momentum, own in zip(
                momenta, together.split([len(one) for one in momenta]), strict=True
            ):
                momentum.copy_(own)

    @contextmanager
    def calibration(self, model: nn.Module, attention_mask: str | None) -> Iterator[None]:
        """Measure the inputs that the weights' modules get while the context is open.

        Args:
            model: whose forward pass is run.
            attention_mask: the keyword by which it is given which tokens are none, as zeros;
                these are left out. None: all count.

        Ranks add up what each has seen, as the context closes: all of them must open it.

        Raises:
            ValueError: the criterion has no use for it; a module's inputs cannot be measured; no
                input was seen; the model was not given the keyword, or no matrix by it.
        """
        if isinstance(self.importance, str) and self.importance != "wanda":
            raise ValueError(
                "calibration: weight_importance must be 'wanda', which alone looks at the inputs, "
                f"got {self.importance!r}"
            )
        sums: Sums = {}
        real = _RealTokens(attention_mask)
        handles = []
        try:
            # what is raised on one rank is on all: they would wait for its sums
            with self._weights[0].ranks.together(self._weights[0].weight.device):
                if attention_mask is not None:
                    handles.append(model.register_forward_pre_hook(real, with_kwargs=True))
                for weight in (weight for weight in self._weights if not weight.absent):
                    hook = _measure(weight, sums, real)
                    handles.append(weight.module.register_forward_hook(hook, with_kwargs=True))
                yield
        finally:
            for handle in handles:
                handle.remove()
        sums = _of_all_ranks(sums, self._weights)
        if not sums:
            raise ValueError(
                "calibration: the model must be run on data while the context is open, got no "
                "input of any weight"
            )
        self._input_norms = {n: (total / k).sqrt().float() for n, (total, k) in sums.items()}

    def get_state(self) -> dict[str, Any]:
        """Return what has been gathered; copies on the CPU.

        Where the next update looks at gradients, the weights' present ones are part of it.
        """
        self._add_parts()
        looks = self._weights if self.importance in BY_GRADIENT else []
        fresh = [weight for weight in looks if weight.name not in self._taken]
        gradients = {i.name: g for i in fresh if (g := i.weight.grad) is not None}
        products = {i.name: p for i in looks if (p := self._product(i)) is not None}
        gradients = {name: g for name, g in gradients.items() if name not in products}
        return {
            # copies: the next backward pass may add to a gradient in place
            key: {
                i.name: _saved(i, key, gathered.get(i.name, self._nothing(i, key))) for i in known
            }
            for key, gathered in (
                ("momenta", self._momenta),
                ("input_norms", self._input_norms),
                ("products", products),
                ("gradients", gradients),
            )
            if (known := known_anywhere(self._weights, gathered))
        }

    def _nothing(self, weight: SparseWeight, key: str) -> Tensor:
        """Return what is here of something that is known of a weight on another stage."""
        parameter = weight.weight.detach()
        if key == "gradients":
            return parameter
        matrix = weight.matrix(parameter)
        if key != "momenta" or self.importance != "fisher" or weight.packed:
            return torch.zeros_like(matrix, dtype=torch.float32)
        shard = weight.shard
        grid = weight.grid if shard is None else [at.stop - at.start for at in shard.groups]
        return torch.zeros(*grid, dtype=torch.float32, device=matrix.device)

    def schema(self) -> dict[str, Schema]:
        """Say what ``get_state()``'s result must hold."""
        found: dict[str, dict[str, Schema]]
        found = {"momenta": {}, "input_norms": {}, "products": {}, "gradients": {}}
        for weight in self._weights:
            name, matrix, columns = weight.name, weight.full_shape, weight.full_shape[1:]
            single, own = [torch.float32], [weight.weight.dtype]
            found["momenta"][name] = Maybe(tensor([matrix, weight.full_grid], single, least=0))
            found["input_norms"][name] = Maybe(tensor([columns, matrix], single, least=0))
            # these may have overflowed, as with AMP
            found["products"][name] = Maybe(tensor([matrix], single, finite=False))
            found["gradients"][name] = Maybe(tensor([weight.weight_shape], own, finite=False))
        return {key: Maybe(kinds) for key, kinds in found.items()}

    def take(self, state: Mapping[str, Any]) -> None:
        """Take over ``get_state()``'s result, which is as ``schema()`` says.

        Where an update looks at gradients, the weights' ``.grad`` become its own: None too.
        """
        device, weights = self._weights[0].weight.device, {w.name: w for w in self._weights}
        if self.importance in BY_GRADIENT:
            gradients = state.get("gradients", {})
            for name, weight in weights.items():
                found = None if weight.absent else gradients.get(name)
                weight.weight.grad = None if found is None else _gradient(weight, found)
        self._momenta, self._products, self._input_norms = (
            # a copy: a tensor of the caller's must not change with ours
            {
                name: _own(weights[name], key, tensor).to(device, copy=True)
                for name, tensor in state.get(key, {}).items()
            }
            for key in ("momenta", "products", "input_norms")
        )
        self._parts.clear()
        self._taken.clear()

    def _product(self, weight: SparseWeight) -> Tensor | None:
        """Return w g as the optimiser stepped, if there was no other backward pass since."""
        gradient, product = weight.weight.grad, self._products.get(weight.name)
        stepped = gradient is None or getattr(gradient, "_of_product", -1) == _version(gradient)
        return product if stepped else None

    def _evidence(self, weight: SparseWeight) -> Evidence:
        parameter, name = weight.weight, weight.name
        gradient = parameter.detach() if weight.absent else parameter.grad
        momentum = self._nothing(weight, "momenta") if weight.absent else self._momenta.get(name)
        return Evidence(
            name=name,
            weight=weight.matrix(parameter.detach()),
            grid=weight.full_grid,
            gradient=None if gradient is None else weight.matrix(gradient),
            momentum=momentum,
            input_norm=self._norm_of(weight) if name in self._input_norms else None,
            seed=self._seed,
            product=self._product(weight) if name in self._products else None,
            pattern=_pattern(weight),
            groups=weight.own_groups,
        )

    def _norm_of(self, weight: SparseWeight) -> Tensor | None:
        norm = self._input_norms.get(weight.name)
        if norm is None or weight.shard is None or not isinstance(self.importance, str):
            return norm  # a function sees the full weight
        rows, cols = weight.shard.here
        return norm[cols] if norm.ndim == 1 else norm[rows, cols]


def _beyond(values: Tensor, bound: Tensor) -> Tensor:
    """Count the values whose magnitude is above a bound, 0-d."""
    counts = [(values[at].abs() > bound).count_nonzero() for at in rows_at_a_time(values)]
    return torch.stack([torch.zeros_like(bound, dtype=torch.int64), *counts]).sum()


def _decay_and_add(momentum: Tensor, sizes: Tensor, finite: Tensor) -> None:
    """Add what a step has found, but where it is to be left out."""
    decay = torch.full_like(finite, MOMENTUM_DECAY, dtype=torch.float32).masked_fill_(~finite, 1)
    momentum.mul_(decay).add_(sizes.masked_fill_(~finite, 0))


def _version(gradient: Tensor) -> int:
    # FSDP2 adds to the local part of a gradient
    return local_part(gradient)._version


def _pattern(weight: SparseWeight) -> Pattern:
    return Unstructured() if weight.packed else weight.pattern


def _of_all_ranks(sums: Sums, weights: Sequence[SparseWeight]) -> Sums:
    """Add up over the ranks: 8 bytes an input, in one reduction."""
    ranks = weights[0].ranks
    if ranks.size == 1:
        return sums
    shapes: dict[str, torch.Size] = {}
    # a rank need not have seen all that the others have: experts, say
    for theirs in ranks.gather({canonical(n): total.shape for n, (total, _) in sums.items()}):
        shapes |= theirs
    known = {weight.name: shapes.get(canonical(weight.name)) for weight in weights}
    shapes = {name: shape for name, shape in known.items() if shape is not None}
    if not shapes:
        return sums
    names = list(shapes)
    device = weights[0].weight.device
    zeros = {n: (torch.zeros(shapes[n], dtype=torch.float64, device=device), 0) for n in names}
    own = zeros | sums
    counts = torch.tensor([own[n][1] for n in names], dtype=torch.float64, device=device)
    flat = ranks.sum(torch.cat([*(own[n][0].flatten() for n in names), counts]))
    *parts, counts = flat.split([*(shapes[n].numel() for n in names), len(names)])
    totals = [part.view(shapes[n]) for n, part in zip(names, parts, strict=True)]
    return dict(zip(names, zip(totals, map(int, counts.tolist()), strict=True), strict=True))


def _saved(weight: SparseWeight, key: str, tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, of a shard the full one."""
    if key == "gradients":
        return full_tensor(weight, local_part(tensor))
    if weight.shard is not None and key != "input_norms":
        whole = tensor.shape == weight.shape
        tensor = full_matrix(weight, tensor) if whole else full_groups(weight, tensor)
    return tensor.detach().to("cpu", copy=True)


def _own(weight: SparseWeight, key: str, saved: Tensor) -> Tensor:
    """Return what is here of what ``_saved`` returned."""
    if weight.shard is None or key == "input_norms":
        return saved
    whole = saved.shape == weight.shard.shape
    return saved[weight.shard.here if whole else weight.own_groups]


def _gradient(weight: SparseWeight, saved: Tensor) -> Tensor:
    own, parameter = own_part(weight, saved), weight.weight
    return like_shard(parameter, own, parameter.shape) if is_sharded(parameter) else own


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of an input that are real tokens: of what is of no token, all.

    Args:
        x: (..., in).
        mask: (batch, tokens), zero where there is no token; None: all are real.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or (x.shape[:-1] != mask.shape and x.shape[:-1] != (mask.numel(),)):
        return rows
    return rows[mask.flatten().to(rows.device) != 0]


class _RealTokens:
    """Keeps which tokens of the batch that the model is at are real; None: all."""

    def __init__(self, keyword: str | None) -> None:
        self._keyword = keyword
        self.mask: Tensor | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get(self._keyword) if self._keyword else None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"calibration: attention_mask must name a keyword by which {type(model).__name__} "
                f"is given a matrix (batch, tokens), got {got} by {self._keyword!r}"
            )
        self.mask = mask


def _measure(
    weight: SparseWeight, sums: Sums, real: _RealTokens
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    """Return a forward hook that adds up squared inputs a column of the weight's matrix."""
    name, module = weight.name, weight.module
    convolves = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    keys = ("stride", "padding", "dilation", "groups")
    settings: Any = {key: getattr(module, key, None) for key in keys}
    plain = convolves and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if not (isinstance(module, nn.Linear) or weight.transposed or plain):
        raise ValueError(
            f"calibration: the inputs of {name!r}, a {type(module).__name__}, cannot be measured; "
            "they must be those of a linear layer or of a convolution padded with zeros; list it "
            "in ignored_scopes"
        )

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if is_sharded(given) and (convolves or any(p.is_partial() for p in given.placements)):
            raise ValueError(
                f"calibration: the inputs of {name!r} must be plain tensors, got a DTensor placed "
                f"{given.placements}; list it in ignored_scopes"
            )
        x = local_part(given).detach().float()
        if x.numel() == 0:  # an expert that no token has gone to
            return
        if convolves:
            total, count = convolution_squares(x, output, weight.weight.shape, **settings)
            total = total.double()
        else:
            rows = real_tokens(x, real.mask)
            total, count = rows.square().sum(0, dtype=torch.float64), len(rows)
        if weight.shard is not None and len(total) < weight.full_shape[1]:
            # those of the columns that are here; each is counted once
            here = total
            total = here.new_zeros(weight.full_shape[1])
            total[weight.shard.here[1]] = here
            count *= weight.shard.side == 0
        if name in sums:
            total, count = sums[name][0] + total, sums[name][1] + count
        sums[name] = total, count

    return add
