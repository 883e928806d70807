"""Scores by a criterion, and the evidence it needs, gathered in training and calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.squares import convolution_squares
from ..config.algorithm import Pool
from ..masks.weight import SparseWeight
from .criteria import Evidence, WeightImportance, check_gradients, criterion, scores_by_group
from .thresholds import Scores, pools

# Intel Neural Compressor's factor
MOMENTUM_DECAY = 0.9
# of each weight: float64, squared inputs a column, and how many there were
Sums = dict[str, tuple[Tensor, int]]
OUTLIER = 5  # the paper's M
BY_GRADIENT = ("snip", "snip_momentum")


class Scorer:
    """Scores by a criterion, called ``importance``, and what has been gathered for it so far."""

    def __init__(
        self, weights: Sequence[SparseWeight], importance: WeightImportance, seed: int
    ) -> None:
        self.importance: WeightImportance = importance
        self._weights = list(weights)
        self._seed = seed
        self._momenta: dict[str, Tensor] = {}
        self._input_norms: dict[str, Tensor] = {}

    def scores(self, weights: Sequence[SparseWeight], pool: Pool = "global") -> Scores:
        """Score every group of the weights given, which share one pattern and are ``pool``s.

        Raises:
            RuntimeError: what the criterion needs has not been gathered, or is 0 throughout.
        """
        importance_of, evidence = criterion(self.importance), map(self._evidence, weights)
        if self.importance in ("abs", "normed_abs"):
            return scores_by_group(weights, [*map(importance_of, evidence)])
        # one by one: of a block pattern no more than one weight's copy is there at a time
        tensors, speak = [], {}
        for weight, found in zip(weights, map(importance_of, evidence), strict=True):
            if self.importance in BY_GRADIENT:
                speak[weight] = found.values.any()
            tensors += scores_by_group([weight], [found]).tensors
        for members in pools(weights, pool) if speak else ():
            check_gradients(self.importance, members, [speak[weight] for weight in members])
        return Scores(tensors, None)

    def outliers(self, weights: Sequence[SparseWeight]) -> list[float]:
        """Return which share of each weight's elements has more than ``OUTLIER`` times the mean
        importance of all: OWL's ratio. Waits for the device once.
        """
        importance_of, shares = criterion(self.importance), []
        for weight in weights:
            sizes = importance_of(self._evidence(weight)).values.abs()
            bound = OUTLIER * sizes.mean(dtype=torch.float32)
            shares.append((sizes > bound).count_nonzero() / sizes.numel())
        return torch.stack(shares).tolist()

    def observe(self) -> None:
        """Take in the gradients of the step that has ended, where the criterion sums them.

        A step whose gradients overflowed, as with AMP, is left out: the optimiser skips it too.
        """
        if self.importance != "snip_momentum":
            return
        used = [(i, gradient) for i in self._weights if (gradient := i.weight.grad) is not None]
        if not used:
            return
        # stays on the device: a step must not wait for it
        finite = torch.stack([gradient.isfinite().all() for _, gradient in used]).all()
        decay = torch.full((), MOMENTUM_DECAY, dtype=torch.float32, device=finite.device)
        decay.masked_fill_(~finite, 1)
        for weight, gradient in used:
            name, matrix = weight.name, weight.matrix
            values, slopes = matrix(weight.weight.detach()), matrix(gradient.detach())
            product = (values.float() * slopes.float()).abs_()
            product.masked_fill_(~finite, 0)
            if name in self._momenta:
                self._momenta[name].mul_(decay).add_(product)
            else:
                self._momenta[name] = product

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """Measure the inputs that the weights' modules get while the context is open.

        Ranks add up what each has seen, as the context closes: all of them must open it.

        Raises:
            ValueError: the criterion has no use for it; a module's inputs cannot be measured.
        """
        if self.importance != "wanda":
            raise ValueError(
                "calibration: weight_importance must be 'wanda', which alone looks at the inputs, "
                f"got {self.importance!r}"
            )
        sums: Sums = {}
        handles = []
        try:
            for weight in self._weights:
                hook = _measure(weight, sums)
                handles.append(weight.module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
        sums = _of_all_ranks(sums, self._weights)
        self._input_norms = {n: (total / k).sqrt().float() for n, (total, k) in sums.items()}

    def get_state(self) -> dict[str, Any]:
        """Return what has been gathered; copies on the CPU.

        Where the next update looks at gradients, the weights' present ones are part of it.
        """
        looks = self._weights if self.importance in BY_GRADIENT else []
        gradients = {i.name: g for i in looks if (g := i.weight.grad) is not None}
        return {
            # copies: the next backward pass may add to a gradient in place
            key: {name: tensor.detach().to("cpu", copy=True) for name, tensor in gathered.items()}
            for key, gathered in (
                ("momenta", self._momenta),
                ("input_norms", self._input_norms),
                ("gradients", gradients),
            )
            if gathered
        }

    def read_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check ``get_state``'s result; return what takes it over.

        Where an update looks at gradients, the weights' ``.grad`` become its own: None too.

        Raises:
            ValueError: a key is unknown, or a tensor is of another model.
        """
        weights = {weight.name: weight for weight in self._weights}
        for key, gathered in state.items():
            if key not in ("momenta", "input_norms", "gradients"):
                raise ValueError(f"load_state: algorithm_state has the unknown key {key!r}")
            for name, tensor in gathered.items():
                if name not in weights or not _fits(key, tensor, weights[name]):
                    raise ValueError(f"load_state: {key} of {name!r} must fit its weight")

        def take() -> None:
            device = self._weights[0].weight.device
            if self.importance in BY_GRADIENT:
                gradients = state.get("gradients", {})
                for name, weight in weights.items():
                    found = gradients.get(name)
                    weight.weight.grad = None if found is None else found.to(device, copy=True)
            self._momenta, self._input_norms = (
                # a copy: a tensor of the caller's must not change with ours
                {name: tensor.to(device, copy=True) for name, tensor in state.get(key, {}).items()}
                for key in ("momenta", "input_norms")
            )

        return take

    def _evidence(self, weight: SparseWeight) -> Evidence:
        parameter = weight.weight
        gradient = parameter.grad
        return Evidence(
            name=weight.name,
            weight=weight.matrix(parameter.detach()),
            grid=weight.grid,
            gradient=None if gradient is None else weight.matrix(gradient),
            momentum=self._momenta.get(weight.name),
            input_norm=self._input_norms.get(weight.name),
            seed=self._seed,
        )


def _of_all_ranks(sums: Sums, weights: Sequence[SparseWeight]) -> Sums:
    """Add up over the ranks: 8 bytes an input, in one reduction."""
    ranks = weights[0].ranks
    if ranks.size == 1:
        return sums
    shapes: dict[str, torch.Size] = {}
    # a rank need not have seen all that the others have: experts, say
    for theirs in ranks.gather({name: total.shape for name, (total, _) in sums.items()}):
        shapes |= theirs
    names = [weight.name for weight in weights if weight.name in shapes]
    if not names:
        return sums
    device = weights[0].weight.device
    zeros = {n: (torch.zeros(shapes[n], dtype=torch.float64, device=device), 0) for n in names}
    own = zeros | sums
    counts = torch.tensor([own[n][1] for n in names], dtype=torch.float64, device=device)
    flat = ranks.sum(torch.cat([*(own[n][0].flatten() for n in names), counts]))
    *parts, counts = flat.split([*(shapes[n].numel() for n in names), len(names)])
    totals = [part.view(shapes[n]) for n, part in zip(names, parts, strict=True)]
    return dict(zip(names, zip(totals, map(int, counts.tolist()), strict=True), strict=True))


def _fits(key: str, tensor: Tensor, weight: SparseWeight) -> bool:
    rows, cols = weight.shape
    match key:
        case "gradients":
            return tensor.shape == weight.weight.shape and tensor.dtype == weight.weight.dtype
        case "momenta":
            return tensor.shape == (rows, cols)
    return tensor.shape in ((cols,), (rows, cols))


def _measure(
    weight: SparseWeight, sums: Sums
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
        x = given.detach().float()
        if x.numel() == 0:  # an expert that no token has gone to
            return
        if convolves:
            total, count = convolution_squares(x, output, weight.weight.shape, **settings)
            total = total.double()
        else:
            rows = x.reshape(-1, x.shape[-1])
            total, count = rows.square().sum(0, dtype=torch.float64), len(rows)
        if name in sums:
            total, count = sums[name][0] + total, sums[name][1] + count
        sums[name] = total, count

    return add
