"""Shards: weights whose rows lie on several ranks, pruned as the one pool that they are.

A rank masks the rows that it holds, under blocks cut to what divides their beginning, so that
every kernel takes a shard for an ordinary matrix. What is chosen among are the blocks of the full
weight: each belongs to the rank that holds its first row, which gets the rows that lie elsewhere
and sends back what becomes of them (``exchange.py``).
"""

from __future__ import annotations

import math
import operator
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ...kernels.exact_sum import pieces_of
from ...kernels.grid import ceil_div
from ...kernels.launch import PLAIN
from ...kernels.pattern import NM, Block, Pattern, grid_shape
from .ranks import Ranks


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether it is one of torch's, whose import takes a second: who has one has paid."""
    if type(tensor) in PLAIN:  # as nearly all that are asked of
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def same_layout(tensor: Any, other: Any) -> bool:
    """Tell whether it is sharded as another one is, which is a DTensor."""
    if not is_sharded(tensor):
        return False
    return (tensor.device_mesh, tensor.placements) == (other.device_mesh, other.placements)


def dimensions_of(tensor: Any) -> int:
    """Return how many dimensions of its mesh part a sharded tensor."""
    return sum(not placed.is_replicate() for placed in tensor.placements)


def is_resting(tensor: Any) -> bool:
    """Tell whether it is what FSDP2 leaves of a parameter between a forward and a backward pass by
    ``reshard_after_forward=n``: it lies on ``n`` ranks, and nothing trains it.
    """
    if not is_sharded(tensor):
        return False
    mesh, placed = tensor.device_mesh, tensor.placements
    # of two dimensions it has no other mesh without names
    unnamed = mesh.ndim == 2 and mesh.mesh_dim_names is None
    return unnamed and placed[0].is_replicate() and placed[1].is_shard(0)


def local_part(tensor: Any) -> Tensor:
    """Return what is here of a tensor, without a gradient if it is sharded."""
    if type(tensor) in PLAIN or not is_sharded(tensor):
        return tensor
    return tensor.detach().to_local()


def any_nonzero(tensor: Any) -> Tensor:
    """Return whether an element differs from zero, on whatever rank: bool, 0-d."""
    found = local_part(tensor.detach()).any()
    if is_sharded(tensor):
        count = found.long()
        for dim in range(tensor.device_mesh.ndim):
            distributed.all_reduce(count, group=tensor.device_mesh.get_group(dim))
        return count > 0
    return found


@dataclass(frozen=True)
class Shard:
    """The part of a weight that is here: a rectangle of its matrix.

    Attributes:
        shape: of the full matrix.
        bounds: the first row of each part, and behind them the number of rows.
        edges: the first column of each part, and behind them the number of columns.
        place: which of the parts below one another is here.
        side: which of those side by side.
        ranks: those, in the controller's group, that have the parts, by side and place.
        counted: this rank speaks for the part; others may hold copies.
        elsewhere: other stages of a pipeline have the last part, which is of no rows.
        speaks: it does so among the ranks of the weight's mesh.
        copies: how often the group holds the weight.
        pattern: of the full matrix.
        on_stages: of a pipeline: the weight is whole wherever it is.
    """

    shape: tuple[int, int]
    bounds: tuple[int, ...]
    edges: tuple[int, ...]
    place: int
    side: int
    ranks: tuple[tuple[int, ...], ...]
    counted: bool
    copies: int
    pattern: Pattern
    on_stages: bool = False
    elsewhere: bool = False
    speaks: bool = True

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks that have the same columns."""
        return self.ranks[self.side]

    @property
    def rows(self) -> slice:
        """The rows of the full matrix that are here."""
        return slice(*self.bounds[self.place : self.place + 2])

    @property
    def here(self) -> tuple[slice, slice]:
        """What is here of the full matrix."""
        return self.rows, slice(*self.edges[self.side : self.side + 2])

    @property
    def sides(self) -> tuple[int, int]:
        """The shape of what is here."""
        rows, cols = self.here
        return rows.stop - rows.start, cols.stop - cols.start

    @property
    def own_pattern(self) -> Pattern:
        """The pattern of the local matrix: blocks so low that one begins at its first row."""
        if not isinstance(self.pattern, Block):
            return self.pattern
        return Block(math.gcd(self.pattern.rows, self.rows.start), self.pattern.cols)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups of the full matrix, down and across."""
        return grid_shape(self.pattern, self.shape)

    @property
    def split(self) -> bool:
        """True where rows lie on several ranks."""
        return len(self.ranks) > 1

    def groups_of(self, place: int) -> slice:
        """The rows of the full grid that belong to a part: those that begin in it."""
        first, last = self.bounds[place : place + 2]
        return slice(ceil_div(first, self.pattern.rows), ceil_div(last, self.pattern.rows))

    def across(self, side: int) -> slice:
        """The columns of the full grid that a part has."""
        first, last = self.edges[side : side + 2]
        return slice(ceil_div(first, self.pattern.cols), ceil_div(last, self.pattern.cols))

    @property
    def groups(self) -> tuple[slice, slice]:
        """What belongs here of the full grid."""
        return self.groups_of(self.place), self.across(self.side)

    def head_of(self, place: int) -> int:
        """How many rows of a part belong to a group that begins in an earlier one."""
        first, last = self.bounds[place : place + 2]
        return min(self.groups_of(place).start * self.pattern.rows, last) - first

    @property
    def head(self) -> int:
        return self.head_of(self.place)

    def owner_of_head(self, place: int) -> int:
        """Return which part has the group that the head of ``place`` belongs to."""
        first = self.bounds[place] // self.pattern.rows * self.pattern.rows
        return bisect_right(self.bounds, first) - 1

    @property
    def leaves_out(self) -> bool:
        """True where some rank has nothing, of those that have the weight."""
        bounds = self.bounds[:-1] if self.elsewhere else self.bounds
        return any(a == b for ends in (bounds, self.edges) for a, b in pairwise(ends))

    @property
    def tail(self) -> int:
        """How many rows here are of a group that ends in a later part."""
        (first, last), rows = self.bounds[self.place : self.place + 2], self.shape[0]
        return (last - first - self.head) % self.pattern.rows if last < rows else 0

    @property
    def unit(self) -> int:
        """How many rows of a group no edge parts: what divides all edges."""
        inner = [bound for bound in self.bounds if bound < self.shape[0]]
        return math.gcd(self.pattern.rows, *inner)

    @property
    def neighbours(self) -> list[int]:
        """The other parts that have rows of the groups that are here, in order."""
        own, end = self.place, self.groups_of(self.place).stop * self.pattern.rows
        found = [self.owner_of_head(own)] if self.head else []
        for place in range(own + 1, len(self.peers)):
            if self.bounds[place] >= end:
                break
            if self.head_of(place) and self.owner_of_head(place) == own:
                found.append(place)
        return found

    @cached_property
    def straddles(self) -> bool:
        """True where a group lies in several parts."""
        return any(self.head_of(place) for place in range(len(self.peers)))

    def pieces(self, turned: bool) -> int | None:
        """Return how many of a line's pieces (``pieces_of``) are here; of lines that are columns
        if ``turned``, as they lie in memory. None: an edge parts a piece.
        """
        ends, length = (self.bounds, self.shape[0]) if turned else (self.edges, self.shape[1])
        place = self.place if turned else self.side
        step = length // pieces_of(length)
        if any(end % step for end in ends if step):
            return None
        return (ends[place + 1] - ends[place]) // max(step, 1)


def shard_of(
    name: str,
    weight: Any,
    pattern: Pattern,
    ranks: Ranks,
    *,
    transposed: bool,
    experts: bool,
    gathered: Sequence[int] = (),
    holders: Sequence[int] = (),
) -> Shard | None:
    """Return which part of a weight is here; None if it is not sharded.

    Args:
        name: the weight's, for messages.
        weight: the parameter.
        pattern: of the groups.
        ranks: those that train the model.
        transposed, experts: as ``Target``'s.
        gathered: dimensions of the mesh. Over these what is here is put together first: the part
            is then the one that a forward pass has, None if that is the whole.
        holders: those of ``ranks`` that have parts of it, on stages of a pipeline; none: all.

    Raises:
        ValueError: it is sharded in a way that masks do not cover.
    """
    if not is_sharded(weight):
        return None
    mesh, shape, here = weight.device_mesh, weight.shape, weight.device_mesh.get_coordinate()
    assert here is not None
    lines = 2 if experts else 1  # dimensions of one line in memory each
    axes = [range(lines), range(lines, len(shape))]
    if transposed:
        axes.reverse()
    below, beside = (_Axis.of(name, weight, axis, gathered) for axis in axes)
    if gathered and not (below.split or beside.split):
        return None
    _check_placements(name, weight, [*gathered, *below.split, *beside.split])
    _check_edges(name, pattern, below.bounds, beside.bounds)
    known = distributed.get_process_group_ranks(ranks.group) if ranks.group else [0]
    members, index = mesh.mesh.numpy(), {rank: i for i, rank in enumerate(known)}
    parts = len(below.places) * len(beside.places)
    having = [known[rank] for rank in holders] or known
    if not set(members.flatten().tolist()) <= set(having) or len(having) % parts:
        raise ValueError(
            f"create_controller: process_group must hold all ranks of {name!r}, "
            f"{members.tolist()}, and as many of each, got {having}"
        )

    def rank_of(place: tuple[int, ...], side: tuple[int, ...]) -> int:
        at = [*here]
        for i, coordinate in zip((*below.split, *beside.split), (*place, *side), strict=True):
            at[i] = coordinate
        return index[int(members[tuple(at)])]

    copied = [c for i, c in enumerate(here) if i not in (*below.split, *beside.split)]
    return Shard(
        shape=(below.bounds[-1], beside.bounds[-1]),
        bounds=below.bounds,
        edges=beside.bounds,
        place=below.places.index(tuple(here[i] for i in below.split)),
        side=beside.places.index(tuple(here[i] for i in beside.split)),
        ranks=tuple(tuple(rank_of(p, s) for p in below.places) for s in beside.places),
        counted=not any(copied) and having[0] in members,
        copies=len(having) // parts,
        pattern=pattern,
        speaks=not any(copied),
    )


def stage_of(
    holders: Sequence[int], shape: tuple[int, int], pattern: Pattern, ranks: Ranks
) -> Shard:
    """Return what is here of a weight that is whole on some stages of a pipeline: all or nothing.

    Args:
        holders: the ranks that have it.
        shape: of its matrix.
        pattern: of the groups.
        ranks: those of all stages.
    """
    rows, cols = shape
    return Shard(
        shape=shape,
        bounds=(0, rows, rows),
        edges=(0, cols),
        place=0 if ranks.rank in holders else 1,
        side=0,
        ranks=((holders[0], holders[0]),),
        counted=ranks.rank == holders[0],
        copies=len(holders),
        pattern=pattern,
        on_stages=True,
    )


def part_of_stage(shard: Shard, *, here: bool) -> Shard:
    """Return a shard of a weight that other stages of a pipeline have nothing of: behind its parts
    is one of no rows, which is what is not ``here``.
    """
    return replace(
        shard,
        bounds=(*shard.bounds, shard.bounds[-1]),
        ranks=tuple((*below, below[0]) for below in shard.ranks),
        place=shard.place if here else len(shard.bounds) - 1,
        side=shard.side if here else 0,
        counted=shard.counted and here,
        elsewhere=True,
    )


class _Axis(NamedTuple):
    """How rows, or columns, are parted.

    Attributes:
        split: the dimensions of the mesh that part them.
        places: the coordinates of the parts there, in order.
        bounds: the first line of each part, and behind them how many there are.
    """

    split: tuple[int, ...]
    places: list[tuple[int, ...]]
    bounds: tuple[int, ...]

    @classmethod
    def of(
        cls, name: str, weight: Any, dims: Sequence[int], gathered: Sequence[int] = ()
    ) -> _Axis:
        """Return how a weight is parted along dimensions of its own, of which the first may be,
        once it is gathered over dimensions of its mesh.
        """
        from torch.distributed.tensor import Replicate

        if not dims:
            return cls((), [()], (0, 1))
        shape, placed = tuple(weight.shape), enumerate(weight.placements)
        placements = tuple(Replicate() if i in gathered else p for i, p in placed)
        split = tuple(i for i, p in enumerate(placements) if getattr(p, "dim", None) == dims[0])
        found = _places(shape, tuple(weight.device_mesh.shape), placements, split, dims[0])
        lengths = [length for _, length, _ in found]
        firsts = [*accumulate(lengths, initial=0)]
        here = tuple(weight.device_mesh.get_coordinate()[i] for i in split)
        known = {place: (first, length) for first, length, place in found}
        tiled = all(first == at for (first, n, _), at in zip(found, firsts, strict=False) if n)
        own = weight.to_local().shape[dims[0]]
        wrong = not gathered and known[here][1] != own
        if not tiled or firsts[-1] != shape[dims[0]] or wrong:
            raise ValueError(
                f"create_controller: a rank's part of {name!r} must be of neighbours, as many as "
                f"torch gives it of {shape[dims[0]]}, got the placements {placements} on a mesh "
                f"of {tuple(weight.device_mesh.shape)}, {own} of them here; list it in "
                "ignored_scopes"
            )
        per = math.prod(shape[dim] for dim in dims[1:])
        return cls(split, [place for *_, place in found], tuple(per * at for at in firsts))


@cache
def _places(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: tuple[Any, ...],
    split: tuple[int, ...],
    dim: int,
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return first index, length and coordinate of each part of a dimension, in order."""
    # by torch's own arithmetic: which part is where depends on the order of the wrappers
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as find

    found = []
    for place in product(*(range(mesh[i]) for i in split)):
        coordinate = [0] * len(mesh)
        for i, own in zip(split, place, strict=True):
            coordinate[i] = own
        lengths, firsts = find(shape, mesh, coordinate, placements)
        found.append((firsts[dim] if lengths[dim] else shape[dim], lengths[dim], place))
    return sorted(found)


def _check_placements(name: str, weight: Any, split: Sequence[int]) -> None:
    from torch.distributed.tensor import Replicate

    placements = weight.placements
    rest = [placed for i, placed in enumerate(placements) if i not in split]
    if not all(isinstance(placed, Replicate) for placed in rest):
        raise ValueError(
            f"create_controller: {name!r} must be sharded on rows or columns of its matrix, as "
            "fully_shard, ColwiseParallel and RowwiseParallel do, got the placements "
            f"{placements} of a weight of shape {tuple(weight.shape)}; list it in ignored_scopes"
        )


def _check_edges(name: str, pattern: Pattern, bounds: Sequence[int], edges: Sequence[int]) -> None:
    tall, wide = pattern.group if isinstance(pattern, NM) else (1, pattern.cols)
    for what, ends, step in (("rows", bounds, tall), ("columns", edges, wide)):
        if any(end % step for end in ends if end != ends[-1]):
            raise ValueError(
                f"create_controller: the shards of {name!r} must be of whole groups of {step} "
                f"{what} for {pattern}, got {[b - a for a, b in pairwise(ends)]} {what}; list it "
                "in ignored_scopes or give it a pattern in overrides"
            )


def _sharded_modules(model: nn.Module) -> list[Any]:
    module: Any = sys.modules.get("torch.distributed.fsdp")
    # each class that is sharded gets a subclass of it: without any there is nothing to look for
    if module is None or not module.FSDPModule.__subclasses__():
        return []
    return [part for part in model.modules() if isinstance(part, module.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let no module hold weights that it has gathered: what is written would not reach them."""
    for part in _sharded_modules(model):
        part.reshard()


def _fsdp_groups(model: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters, each of which is gathered together."""
    found = []
    for state in (part._get_fsdp_state() for part in _sharded_modules(model)):
        several = getattr(state, "_fsdp_param_groups", None)  # earlier torch has one at most
        found += [state._fsdp_param_group] if several is None else several
    return [group for group in found if group is not None]


class Record(NamedTuple):
    """What FSDP2 knows of a parameter that it gathers for a forward pass.

    Attributes:
        group: its own, of parameters that are gathered together.
        held: what that has of the parameter.
    """

    group: Any
    held: Any

    @property
    def over(self) -> Sequence[int]:
        """The dimensions of the parameter's mesh over which it is gathered."""
        info = self.held.mesh_info
        named = getattr(info, "dp_mesh_dims", None)  # of later torch
        if named is None:  # its mesh comes before that of tensor parallelism
            return range(info.mesh.ndim)
        # of the mesh of both: of several names torch may make one dimension
        names = {*named.shard_names, *named.replicate_names, *(info.mesh.mesh_dim_names or ())}
        every = self.held._sharding_spec.mesh.mesh_dim_names
        return [dim for dim, name in enumerate(every) if name in names]

    @property
    def users(self) -> list[tuple[int, str]]:
        """The identities of the modules that have it, each with its name there."""
        place = self.held._module_info
        shared = zip(place.shared_modules, place.shared_param_names, strict=True)
        return [(id(module), name) for module, name in [(place.module, place.param_name), *shared]]


Records = Mapping[tuple[int, str], Record]


def records_of(model: nn.Module) -> Records:
    """Return what FSDP2 knows of each parameter that it gathers with what is in a model, by the
    identities of modules, and names in them.
    """
    every = [Record(group, held) for group in _fsdp_groups(model) for held in group.fsdp_params]
    return {user: record for record in every for user in record.users}


def like_shard(weight: Any, local: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a DTensor that is parted as a weight is.

    Args:
        weight: a DTensor, or the specification of one.
        local: what is here of it.
        shape: of the whole.
    """
    stride = [*accumulate(reversed(shape[1:]), operator.mul, initial=1)][::-1]
    options: Any = {"run_check": False, "shape": torch.Size(shape), "stride": tuple(stride)}
    kind = sys.modules["torch.distributed.tensor"].DTensor
    return kind.from_local(local, weight.device_mesh, weight.placements, **options)


def replicated(weight: Any, tensor: Tensor) -> Tensor:
    """Return a DTensor, on the mesh of another one, of what every rank has."""
    from torch.distributed.tensor import Replicate

    mesh = weight.device_mesh
    return type(weight).from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def on_all_ranks(tensor: Any) -> Any:
    """Return a DTensor of which each rank of its mesh has all."""
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def shard_beside(
    other: Record,
    places: Sequence[tuple[nn.Module, str]],
    local: Tensor,
    shape: Sequence[int],
) -> None:
    """Let FSDP2 shard a new parameter, and gather it with another one.

    Args:
        other: FSDP2's record of that.
        places: modules, with the names in them of the new one.
        local: what a forward pass has here of the new one: the whole, or a part by tensor
            parallelism as it has of the other.
        shape: of the whole.
    """
    spec = _spec_of(other.held)
    whole = local if spec is None else like_shard(spec, local, shape)
    _join_group(other, places, nn.Parameter(whole))


def bytes_beside(
    other: Record,
    place: tuple[nn.Module, str],
    shape: tuple[int, int],
    device: torch.device,
) -> Any:
    """Let FSDP2 gather bytes with a parameter, zeros at first; they are not trained.

    They are sharded as numbers of the dtype in which the other one is gathered, with their bits:
    earlier torch takes floats alone, and casts those of another dtype.

    Args:
        other: FSDP2's record of the parameter.
        place: a module, with the name in it of what is new.
        shape: of how many ranks they are gathered, and how many each has, a multiple of 8.
        device: where they are.

    Returns:
        What FSDP2's group has of them, whose ``sharded_param`` is what is here.
    """
    held = other.held
    dtype = held.mp_policy.param_dtype or held.sharded_param.dtype
    local: Any = torch.zeros(shape, dtype=torch.uint8, device=device).view(dtype)
    if (spec := _spec_of(held)) is not None:  # each part by tensor parallelism has its own
        from torch.distributed.tensor import DTensor, Replicate, Shard

        parted = [Shard(0) if hasattr(p, "dim") else Replicate() for p in spec.placements]
        local = DTensor.from_local(local, spec.device_mesh, parted, run_check=False)
    return _join_group(other, [place], nn.Parameter(local, False))


def _spec_of(held: Any) -> Any:
    """Return how a parameter lies, once gathered, by tensor parallelism; None: it is whole."""
    if not held.is_dtensor:
        return None
    # earlier torch has another name for it
    return getattr(held, "_unsharded_dtensor_spec", None) or held._tp_spec


def _join_group(
    other: Record, places: Sequence[tuple[nn.Module, str]], parameter: nn.Parameter
) -> Any:
    """Let a group of FSDP2's shard a new parameter as another one; return what it has of it."""
    group, held = other
    group.reshard()  # of one that is gathered the new one would stay in parts
    owners, names = [owner for owner, _ in places], [name for _, name in places]
    # as the group itself makes them: torch has no other way to add one
    place = type(held._module_info)(owners[0], names[0], owners[1:], names[1:])
    meshes = held.mesh_info, group.post_forward_mesh_info
    policies = held.mp_policy, group.offload_policy
    new = type(held)(parameter, place, *meshes, held.device, None, *policies)
    group.fsdp_params.append(new)
    _look_anew(group)
    _make_room(new)
    return new


def forget_gone(model: nn.Module) -> None:
    """Let FSDP2 gather no parameter that its module has no more, and hand none back to it."""
    for group in _fsdp_groups(model):
        for held in list(group.fsdp_params):
            if held._module_info.param_name not in held._module_info.module._parameters:
                group.fsdp_params.remove(held)
                held._post_load_hook_handle.remove()
                _look_anew(group)


def _make_room(held: Any) -> None:
    """Make the tensors that a parameter is gathered into: an evaluation in inference mode may be
    the first to do so, and what is made there no backward pass could read.
    """
    ranks, dtype = getattr(held.mesh_info, "shard_mesh_size", 1), held.param_dtype
    size, dtype = held._sharded_param_data.numel(), dtype or held.orig_dtype
    held.init_all_gather_outputs([size], [dtype], ranks, held.device)
    held.init_unsharded_param()
    held.free_unsharded_param()


def _look_anew(group: Any) -> None:
    """Let a group read from its parameters what it keeps of them all."""
    group._init_mp_dtypes()
    if hasattr(group, "_init_reduce_scatter_param_order"):  # of later torch
        group._init_reduce_scatter_param_order()


def local_grid(shard: Shard, grid: Tensor) -> Tensor:
    """Return the bool grid of what is here from that of the full weight."""
    if not isinstance(shard.pattern, Block):
        return grid[shard.here]
    rows, cols = shard.groups
    start = rows.start - (1 if shard.head else 0)
    return local_rows(shard, [grid[start : rows.stop, cols]])


def local_rows(shard: Shard, grids: list[Tensor]) -> Tensor:
    """Return the grid under ``own_pattern`` from that of each group that is here in part."""
    low, high = shard.own_pattern.rows, shard.pattern.rows
    here = shard.rows.stop - shard.rows.start
    grid = torch.cat(grids)
    skipped = shard.rows.start % high // low
    return grid.repeat_interleave(high // low, 0)[skipped : skipped + ceil_div(here, low)]
