"""How many launches, and how often the host waits for the device.

Kernels do nothing here, so masks are written by hand before an update, which leaves them as they
are; memory that kernels would fill is zero. What is counted does not depend on more.
"""

import sys
import warnings
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import nn

from host_waits import HostWaits
from stub_driver import kernels
from triton_sparsity import (
    NM,
    Block,
    MagnitudeSparsityConfig,
    Override,
    RigLConfig,
    SETConfig,
    Unstructured,
    create_controller,
)
from triton_sparsity.controller.selection import thresholds
from triton_sparsity.kernels import block_sparse_product
from triton_sparsity.kernels.bits import count_kept, expand_mask, pack
from triton_sparsity.kernels.product import BlockProduct, update_products
from triton_sparsity.kernels.schedule import Plan
from triton_sparsity.kernels.semi_structured import nm_fits
from triton_sparsity.kernels.tiles import Tile
from triton_sparsity.kernels.topology import runs

pytestmark = [pytest.mark.launch, pytest.mark.usefixtures("zero_memory")]

SIDE = 256


class Cost(NamedTuple):
    """What something over N weights costs: ``once + each * N``."""

    once: int
    each: int

    def of(self, count):
        return self.once + self.each * count


class Costs(NamedTuple):
    """Of a mask update: launches of our kernels, calls of torch's, waits for the device."""

    launches: Cost
    operators: Cost
    waits: Cost


def regrowth(kind, pattern, **options):
    steps = {"t_end": 1000, "delta_t": 1, "level": 0.5, "distribution": "uniform"}
    return {"set": SETConfig, "rigl": RigLConfig}[kind](pattern=pattern, **steps, **options)


BLOCKS = Block(64, 64)
UNLIMITED = {"maximum_level": 1.0}  # kernels count nothing: all weights look past a limit
CONFIGS = {
    "magnitude, blocks, each": MagnitudeSparsityConfig(pattern=BLOCKS, pool="weight"),
    "magnitude, blocks, global": MagnitudeSparsityConfig(
        pattern=BLOCKS, pool="global", **UNLIMITED
    ),
    "magnitude, blocks, rows": MagnitudeSparsityConfig(pattern=BLOCKS, pool="row"),
    "magnitude, fine, each": MagnitudeSparsityConfig(pool="weight"),
    "magnitude, fine, global": MagnitudeSparsityConfig(pool="global", **UNLIMITED),
    "magnitude, fine, rows": MagnitudeSparsityConfig(pool="row"),
    # see ``first_meets_its_limit``
    "magnitude, blocks, limits": MagnitudeSparsityConfig(
        pattern=BLOCKS,
        pool="global",
        overrides=[
            Override(scope="0", maximum_level=1.0),
            Override(scope="*", maximum_level=0.5),
        ],
    ),
    "set, blocks": regrowth("set", BLOCKS),
    "set, fine": regrowth("set", Unstructured()),
    "rigl, blocks": regrowth("rigl", BLOCKS, growth="normed_gradient"),
    "rigl, blocks, published": regrowth("rigl", BLOCKS),
    "rigl, fine": regrowth("rigl", Unstructured(), growth="normed_gradient"),
}
# to be brought down: a cost that falls is lowered here in the same commit; norms are three
# launches, and of blocks of lines as short as these one more
UPDATE = {
    "magnitude, blocks, each": Costs(Cost(17, 0), Cost(4, 0), Cost(2, 0)),
    "magnitude, blocks, global": Costs(Cost(20, 0), Cost(11, 0), Cost(2, 0)),
    "magnitude, blocks, rows": Costs(Cost(15, 0), Cost(3, 0), Cost(2, 0)),
    "magnitude, fine, each": Costs(Cost(13, 0), Cost(4, 0), Cost(2, 0)),
    "magnitude, fine, rows": Costs(Cost(11, 0), Cost(3, 0), Cost(2, 0)),
    "magnitude, fine, global": Costs(Cost(16, 0), Cost(11, 0), Cost(2, 0)),
    # one search tells that a limit is met, another what the others do; each waits for the device
    "magnitude, blocks, limits": Costs(Cost(42, 0), Cost(23, 1), Cost(5, 0)),
    "set, blocks": Costs(Cost(17, 0), Cost(5, 0), Cost(2, 0)),
    "set, fine": Costs(Cost(14, 0), Cost(5, 0), Cost(2, 0)),
    "rigl, blocks": Costs(Cost(20, 0), Cost(12, 0), Cost(2, 0)),
    "rigl, blocks, published": Costs(Cost(18, 0), Cost(12, 0), Cost(2, 0)),
    "rigl, fine": Costs(Cost(17, 0), Cost(12, 0), Cost(2, 0)),
}
# of loading a state
# a state's check unpacks each mask and looks at each threshold, before anything changes
LOAD = {
    "magnitude, blocks, each": Costs(Cost(9, 1), Cost(3, 4), Cost(2, 1)),
    "magnitude, fine, global": Costs(Cost(6, 2), Cost(3, 4), Cost(2, 1)),
}

# torch's operators that launch nothing; ``zeros`` is what ``empty`` is here
VIEWS = {
    "alias", "as_strided", "detach", "detach_", "expand", "lift_fresh", "narrow", "permute",
    "resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as", "_unsafe_view",
    "empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "zeros_like",
    "is_nonzero", "item", "promote_types", "result_type",
}  # fmt: skip
# those that launch where they copy
COPIES = {"contiguous", "flatten", "reshape", "to"}


def operators(profile):
    """Return the outermost operators of torch that launch something on a GPU, often several."""
    found = []
    for event in profile.events():
        above = event.cpu_parent
        while above is not None and not above.name.startswith("aten::"):
            above = above.cpu_parent
        name = event.name.removeprefix("aten::")
        if name == event.name or above is not None or name in VIEWS:
            continue
        if name not in COPIES or event.cpu_children:
            found.append(name)
    return found


@pytest.fixture
def waits(monkeypatch):
    return HostWaits(monkeypatch)


@pytest.fixture(autouse=True)
def no_warning_of_empty_weights():
    """Kernels count nothing: weights look empty."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "at level .* these weights are pruned to nothing")
        yield


def sparse_model(pattern, count, *, config=None, dispatch="auto"):
    """Return ``count`` linears in a row, of which half the groups are pruned, and a controller."""
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(count)))
    config = config or MagnitudeSparsityConfig(pattern=pattern, pool="global")
    controller = create_controller(model, config, dispatch=dispatch)
    for info in controller.sparsified_module_info:
        weight = info.operand
        grid = torch.ones(weight.grid, dtype=torch.bool)
        grid[::2] = False
        weight.mask.copy_(pack(grid, backend="torch") if weight.packed else grid)
        weight.set_(None, weight.groups // 2)
        weight.weight.detach().masked_fill_(
            ~expand_mask(weight.mask, weight.pattern, weight.shape, backend="torch"), 0
        )
        weight.leave()
    return model, controller


def first_meets_its_limit(total, least, most, natural):
    """Stand in for ``allocate``: kernels that do nothing count nothing that it could go by."""
    natural([*range(len(least))], total)
    rest, first = [*range(1, len(least))], min(most[0], total)
    natural(rest, total - first)
    return {0: first}, rest, total - first


def check_costs(run, wanted, stub, waits):
    stub.forget()
    waits.found.clear()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        run()
    found = Costs(*map(Counter, (kernels(stub.launches), operators(profile), waits.found)))
    assert [calls.total() for calls in found] == wanted, "\n".join(
        f"{count} x {call}" for calls in found for call, count in calls.most_common()
    )


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", UPDATE)
def test_a_mask_update_costs_what_the_table_says(kind, count, stub, waits, monkeypatch):
    monkeypatch.setattr(thresholds, "allocate", first_meets_its_limit)
    model, controller = sparse_model(None, count, config=CONFIGS[kind])
    if kind.startswith("magnitude"):
        runs = [lambda: controller.set_sparsity_level(0.5)] * 2
    else:
        controller.scheduler.step()
        runs = [lambda: controller.update(1), lambda: controller.update(2)]
    for n, run in enumerate(runs):
        if kind.startswith("rigl"):
            model(torch.zeros(32, SIDE, dtype=torch.bfloat16)).sum().backward()
        if n == 0:
            run()  # kernels are compiled, tables are on the device
        else:
            check_costs(run, [cost.of(count) for cost in UPDATE[kind]], stub, waits)


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", LOAD)
def test_loading_a_state_costs_what_the_table_says(kind, count, stub, waits):
    _, controller = sparse_model(None, count, config=CONFIGS[kind])
    state = controller.get_state()
    controller.load_state(state)
    wanted = [cost.of(count) for cost in LOAD[kind]]
    check_costs(lambda: controller.load_state(state), wanted, stub, waits)


@pytest.mark.parametrize("kind", ["magnitude, blocks, each", "magnitude, fine, global"])
def test_an_update_is_a_few_hundred_calls_of_python_a_weight(kind, stub):
    def calls(count):
        _, controller = sparse_model(None, count, config=CONFIGS[kind])
        controller.set_sparsity_level(0.5)
        found = 0

        def note(frame, event, arg):
            nonlocal found
            found += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            controller.set_sparsity_level(0.5)
        finally:
            sys.setprofile(None)
        return found

    each = (calls(24) - calls(8)) / 16
    assert each <= 142, each


def test_a_wait_is_found_and_what_the_host_owns_is_read_without(stub, waits):
    grid = torch.ones(4, 8, dtype=torch.bool)
    nm_fits(grid, NM(2, 4))
    list(runs(grid))
    count_kept([grid])
    assert waits.found == [
        "semi_structured.py:nm_fits:__bool__",
        "topology.py:runs:cpu",
        "bits.py:count_kept:tensor",
        "bits.py:count_kept:tolist",
    ]
    waits.found.clear()
    product = BlockProduct(
        Block(16, 16), (64, 128), torch.bfloat16, backend="auto", dispatch="sparse"
    )
    update_products([product], [grid], [32])
    x, weight = torch.zeros(3, 128, dtype=torch.bfloat16), torch.zeros(64, 128).bfloat16()
    product(x, weight, None)
    assert waits.found == []


@pytest.mark.parametrize("pattern", [Block(64, 64), Unstructured()], ids=str)
@pytest.mark.parametrize("count", [4, 8])
def test_a_training_step_clears_all_gradients_in_one_launch(pattern, count, stub, waits):
    model, _ = sparse_model(pattern, count, dispatch="dense")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.zeros(32, SIDE, dtype=torch.bfloat16)

    def step():
        stub.forget()
        waits.found.clear()
        optimizer.zero_grad()
        model(x).sum().backward()
        cleared = kernels(stub.launches)
        optimizer.step()
        return cleared, kernels(stub.launches)[len(cleared) :]

    # the first step makes the moments; the second clears them, once for these masks
    assert step() == (["_pruned_kernel"], [])
    assert step() == (["_pruned_kernel"], ["_pruned_kernel"])
    assert step() == (["_pruned_kernel"], [])
    assert waits.found == []


@pytest.mark.parametrize("tokens", [64, 4096])
def test_an_eager_product_is_a_launch_forward_and_two_or_three_backward(tokens, stub, waits):
    count = 3
    model, _ = sparse_model(Block(64, 64), count, dispatch="sparse")
    x = torch.zeros(tokens, SIDE, dtype=torch.bfloat16, requires_grad=True)
    stub.forget()
    waits.found.clear()
    y = model(x)
    assert kernels(stub.launches) == ["_block_sparse_linear_kernel"] * count
    stub.forget()
    y.sum().backward()
    # of many tokens the last round is split, and its parts are added up
    dweight = ["_block_sparse_wgrad_kernel", "_block_sparse_wgrad_sum_kernel"]
    assert Counter(kernels(stub.launches)) == Counter(
        ["_block_sparse_linear_kernel", *dweight[: 1 if tokens < 1024 else 2]] * count
        + ["_pruned_kernel"]
    )
    assert waits.found == []


def test_a_product_of_few_tokens_in_equal_shares_is_one_launch(stub, monkeypatch):
    layer, _ = sparse_model(Block(64, 64), 1, dispatch="sparse")
    plan = Plan(Tile(64, 64, 64, 4, 4, 2), 1, 7, 0, end_steps=1)
    monkeypatch.setattr(block_sparse_product, "plan_product", lambda *_: plan)
    stub.forget()
    with torch.no_grad():
        layer(torch.zeros(48, SIDE, dtype=torch.bfloat16))
    assert kernels(stub.launches) == ["_block_sparse_linear_kernel"]
