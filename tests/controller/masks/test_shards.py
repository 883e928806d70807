"""FSDP2's shards are pruned as the one pool that they are: bit for bit as in one process."""

import io
import math
import os
import signal
import time
from unittest import mock

import pytest
import torch
from ranks import PATIENCE, LocalAdamW, Ranks, mesh_of
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.masks.exchange import full_grid
from triton_sparsity.kernels import line_score

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch lacks gloo"
)

PATTERNS = {
    "unstructured": ts.Unstructured(),
    "blocks": ts.Block(8, 4),
    "tall": ts.Block(16, 2),
    "wide": ts.Block(1, 8),
    "nm": ts.NM(2, 4),
}


def net(dtype=torch.float32, ties=False):
    """Heights that no number of ranks divides, and one of which some ranks get nothing."""
    numbers = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Linear(16, 35), nn.Tanh(), nn.Linear(35, 16, bias=False), nn.Tanh(), nn.Linear(16, 56)
    )
    model.append(nn.Linear(56, 20))
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=numbers)
        parameter.data = ((values * 2).round() / 4 if ties else values / 4).to(dtype)
    return model


def sharded(model, group, hybrid=False):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(group, "replicate", "shard") if hybrid else mesh_of(group)
    for layer in (model[0], model[4]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# algorithms and patterns, each on layers of its own in one model
TOGETHER = {
    "weight": {
        ("blocks", "abs", "weight"): ["0", "2"],
        ("unstructured", "abs", "weight"): ["4"],
        ("nm", "abs", "weight"): ["5"],
    },
    "row": {
        ("blocks", "abs", "row"): ["0", "2"],
        ("unstructured", "normed_abs", "row"): ["4"],
        ("nm", "abs", "row"): ["5"],
    },
    **{
        i: {("unstructured", i): ["0", "4"], ("tall", i): ["2", "5"]}
        for i in ("normed_abs", "random")
    },
    "heights": {("blocks", "abs"): ["0", "2"], ("tall", "abs"): ["4", "5"]},
    "single rows": {("wide", "abs"): ["0", "5"], ("nm", "abs"): ["4"]},
    "products": {("unstructured", "snip"): ["0", "4"], ("tall", "snip"): ["2", "5"]},
    "inputs and products": {
        ("unstructured", "wanda"): ["0"],
        ("unstructured", "snip_momentum"): ["4"],
        ("tall", "wanda"): ["5"],
        ("tall", "snip_momentum"): ["2"],
    },
    "sums of parts": {
        ("unstructured", "taylor"): ["0"],
        ("unstructured", "fisher"): ["4"],
        ("tall", "taylor"): ["2"],
        ("tall", "fisher"): ["5"],
    },
    "reductions": {
        ("tall", "abs", "weight", "erk", "max"): ["0", "2"],
        ("tall", "normed_abs", "weight", "erk", "l2"): ["4", "5"],
    },
    "magnitude and draws": {
        ("tall", "abs"): ["0"],
        ("unstructured", "abs"): ["5"],
        ("tall", "set"): ["2"],
        ("unstructured", "set"): ["4"],
    },
    "gradients": {
        ("tall", "gradient"): ["0"],
        ("unstructured", "gradient"): ["5"],
        ("tall", "normed_gradient"): ["2"],
        ("unstructured", "normed_gradient"): ["4"],
    },
    "sums": {
        ("tall", "taylor"): ["0"],
        ("tall", "gradient"): ["2"],
        ("tall", "snip_momentum"): ["4"],
        ("tall", "fisher"): ["5"],
    },
    "saved": {("tall", "abs"): ["0", "4"], ("unstructured", "set"): ["2", "5"]},
}


def config(pattern, importance="abs", pool="global", *more, layers=None):
    """Return a configuration; ``more`` is a distribution, and a reduction of blocks."""
    if pattern in TOGETHER:
        return [config(*how, layers=own) for how, own in TOGETHER[pattern].items()]
    some = {"pattern": PATTERNS[pattern], "ignored_scopes": ["2"] if pattern == "nm" else []}
    if layers:
        some = {"pattern": PATTERNS[pattern], "target_scopes": layers}
    if importance == "set":
        return ts.SETConfig(level=0.6, t_end=20, delta_t=2, **some)
    if importance in ("gradient", "normed_gradient", "bands"):
        growth = "gradient" if importance == "gradient" else "normed_gradient"
        return ts.RigLConfig(level=0.6, t_end=20, delta_t=2, growth=growth, **some)
    schedule = ts.PolynomialSchedule(initial_level=0.0, target_level=0.5, target_epoch=3)
    some |= dict(zip(("distribution", "block_reduction"), more, strict=False))
    return ts.MagnitudeSparsityConfig(
        schedule=schedule, weight_importance=importance, pool=pool, **some
    )


def prune(model, controller, rank=0, size=1):
    """Prune at several levels, up and down, with training in between; return what became of it."""
    optimizer = LocalAdamW(model.parameters(), lr=0.0, foreach=False)
    found = []
    for step, level in enumerate((0.45, 0.2)):
        numbers = torch.Generator().manual_seed(step)
        x = torch.randint(-2, 3, (12, 16), generator=numbers).to(next(model.parameters()).dtype)
        if controller.needs_calibration:
            with controller.calibration():
                model(x.unflatten(0, (size, -1))[rank])
        optimizer.zero_grad()
        if controller.needs_gradients:
            model(x).square().mean().backward()
        controller.scheduler.step()
        controller.set_sparsity_level(level)
        infos = controller.sparsified_module_info
        found += [
            (full_grid(i.operand).clone(), i.operand.kept, i.operand.pruned_elements())
            for i in infos
        ]
        last = [(full(i.weight), full(i.operand.binary_mask)) for i in infos if step == 1]
        optimizer.step()
    return found, last, controller.mask_level()


def full(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def outlying():
    model = net()
    with torch.no_grad():
        model[0].weight[3:20, 2:5] *= 20
        model[4].weight[10:40, 5] *= 30
    return model


def prune_shards(group, chosen, dtype, ties, wrap_first, hybrid=False, outliers=False):
    model = outlying() if outliers else net(dtype, ties)
    if wrap_first:
        sharded(model, group, hybrid)
    controller = ts.create_controller(model, chosen, process_group=group)
    if not wrap_first:
        sharded(model, group, hybrid)
    rank, size = torch.distributed.get_rank(group), group.size()
    return prune(model, controller, rank, size)


def check(found, wanted):
    for got, last, level in found:
        assert level == wanted[2]
        for (grid, *counts), (whole, *own) in zip(got, wanted[0], strict=True):
            assert counts == own
            assert torch.equal(grid, whole)
        for (weight, mask), whole in zip(last, wanted[1], strict=True):
            assert (weight[~mask] == 0).all()
            assert torch.equal(weight, whole[0])
            assert torch.equal(mask, whole[1])


@pytest.mark.parametrize(
    ("how", "size"),
    [
        *(("heights", 4), ("unstructured", 3), ("weight", 3)),
        *((name, 2) for name in ("single rows", "row", "normed_abs", "random")),
    ],
)
def test_shards_are_pruned_as_one_process_prunes(ranks, how, size):
    model = net(torch.bfloat16, ties=True)
    wanted = prune(model, ts.create_controller(model, config(how)))
    check(ranks.run(size, prune_shards, config(how), torch.bfloat16, True, True), wanted)


@pytest.mark.parametrize("how", ["blocks", "weight", "row", "random"])
def test_a_model_may_be_sharded_when_it_is_pruned_already(ranks, how):
    model = net()
    wanted = prune(model, ts.create_controller(model, config(how)))
    check(ranks.run(2, prune_shards, config(how), torch.float32, False, False), wanted)


def thresholds(model, pool, group=None):
    """Return thresholds of N:M weights, of which one goes no further, by level."""
    least = ts.Override(scope="4", maximum_level=0.25)
    schedule = ts.PolynomialSchedule(initial_level=0.0, target_level=0.413)
    chosen = ts.MagnitudeSparsityConfig(
        pattern=ts.NM(2, 4), ignored_scopes=["2"], schedule=schedule, pool=pool, overrides=[least]
    )
    controller = ts.create_controller(model, chosen, process_group=group)
    found = []
    for level in (0.2, 0.413):
        controller.set_sparsity_level(level)
        layers = controller.statistics().magnitude_sparsity.model_statistics
        found.append([one.threshold for one in layers.sparsified_layers_summary])
    return found


def thresholds_of_shards(group, pool):
    return thresholds(sharded(net(), group), pool, group)


@pytest.mark.parametrize("pool", ["global", "weight"])
def test_statistics_have_the_thresholds_of_one_process(ranks, pool):
    wanted = thresholds(net(), pool)
    assert [None in found for found in wanted] == [False, True]
    assert wanted[1][1] is not None  # the one with a limit
    assert ranks.run(2, thresholds_of_shards, pool) == [wanted] * 2


def by_columns(evidence):
    """Sums that are exact in any order; of elements, and of groups, which are plain or not."""
    weight, grid = evidence.weight.float(), evidence.grid
    if evidence.name == "5":
        return torch.arange(math.prod(grid)).view(grid) / 9
    sums = weight.square().sum(0, keepdim=True)
    return sums[:, : grid[1]].expand(grid) if evidence.name == "4" else weight / (1 + sums)


def by_inputs(evidence):
    return evidence.weight * evidence.input_norm * evidence.gradient


by_inputs.needs = ("inputs", "gradients")


def by_product(evidence):
    found = evidence.weight if evidence.product is None else evidence.product
    return found / (1 + evidence.weight.abs().amax(dim=0, keepdim=True))


by_product.needs = ("gradients",)


@pytest.mark.parametrize("function", [by_columns, by_inputs])
def test_a_function_sees_full_weights_as_dtensors(ranks, function):
    chosen = config("tall", function, "weight")
    ties = function is by_columns
    wanted = prune((model := net(ties=ties)), ts.create_controller(model, chosen))
    check(ranks.run(3 if ties else 2, prune_shards, chosen, torch.float32, ties, True), wanted)


@pytest.mark.parametrize(
    ("how", "size"), [("products", 2), ("inputs and products", 2), ("sums of parts", 3)]
)
def test_evidence_on_shards_is_that_of_one_process(ranks, how, size):
    model = net()
    wanted = prune(model, ts.create_controller(model, config(how)))
    check(ranks.run(size, prune_shards, config(how), torch.float32, False, True), wanted)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((("tall", "abs"), ("tall", "normed_abs")), (("tall", "wanda"), ("tall", "random"))),
        *((("tall", "taylor"), ("unstructured", "snip")), (("tall", "fisher"), ("tall", "abs"))),
    ],
    ids="-".join,
)
def test_outliers_are_counted_over_all_shards(ranks, one, other):
    found = {}
    for distribution in ("uniform", "owl"):
        chosen = [
            config(*how, "weight", distribution, layers=layers)
            for how, layers in ((one, ["0", "2"]), (other, ["4", "5"]))
        ]
        found[distribution] = prune((model := outlying()), ts.create_controller(model, chosen))
    kept = {name: [kept for _, kept, *_ in grids] for name, (grids, *_) in found.items()}
    assert kept["owl"] != kept["uniform"]
    shards = ranks.run(2, prune_shards, chosen, torch.float32, False, True, False, True)
    check(shards, found["owl"])


@pytest.mark.parametrize(
    ("how", "size"), [(("reductions",), 3), (("tall", "snip", "weight", "erk", "sum"), 2)]
)
def test_blocks_across_edges_are_reduced_as_in_one_process(ranks, how, size):
    wanted = prune((model := net()), ts.create_controller(model, config(*how)))
    check(ranks.run(size, prune_shards, config(*how), torch.float32, False, True), wanted)


@pytest.mark.parametrize("wrap_first", [True, False])
def test_copies_of_shards_count_once(ranks, wrap_first):
    chosen = config("tall")
    model = net(ties=True)
    wanted = prune(model, ts.create_controller(model, chosen))
    check(ranks.run(4, prune_shards, chosen, torch.float32, True, wrap_first, True), wanted)


def keep_zeros(group, pattern):
    model = holed()
    sharded(model, group)
    controller = ts.create_controller(
        model,
        ts.ConstSparsityConfig(pattern=PATTERNS[pattern], ignored_scopes=["2"]),
        process_group=group,
    )
    return [full(i.operand.binary_mask) for i in controller.sparsified_module_info]


def holed():
    model = net()
    with torch.no_grad():
        for layer in (model[0], model[4], model[5]):
            layer.weight[4:20, 2:12] = 0  # across an edge of shards
    return model


@pytest.mark.parametrize("pattern", ["unstructured", "blocks", "nm"])
def test_zeros_are_found_across_the_edges_of_shards(ranks, pattern):
    controller = ts.create_controller(
        holed(), ts.ConstSparsityConfig(pattern=PATTERNS[pattern], ignored_scopes=["2"])
    )
    wanted = [info.operand.binary_mask for info in controller.sparsified_module_info]
    for found in ranks.run(3, keep_zeros, pattern):
        assert all(map(torch.equal, found, wanted))


def train(model, controller, steps):
    """Train on one batch on every rank, whose mean over two or four is exact, or on two of which
    both or the last are reduced.
    """
    optimizer = LocalAdamW(model.parameters(), lr=0.05, weight_decay=0.1, foreach=False)
    for step in range(steps):
        if step % 3 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        numbers = torch.Generator().manual_seed(step)
        for last in (True,) if step % 3 == 2 else (False, True):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last or step % 3 == 1)
            model(torch.randn(6, 16, generator=numbers)).square().mean().backward()
        norm = full(nn.utils.clip_grad_norm_(model.parameters(), 1e3))
        if step + 1 == steps:
            gradients = {name: full(p.grad) for name, p in model.named_parameters()}
            whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
            torch.testing.assert_close(norm, whole.norm())
            for info in controller.sparsified_module_info:
                gradient = gradients[f"{info.module_node_name}.weight"]
                assert not gradient[~full(info.operand.binary_mask)].any()
        optimizer.step()
    weights = [full(info.weight) for info in controller.sparsified_module_info]
    return weights, [full(i.operand.binary_mask) for i in controller.sparsified_module_info]


def trained_net(how):
    """For a function with a head of one row, of which the last of 2 ranks has none."""
    torch.manual_seed(0)
    return net().append(nn.Linear(20, 1)) if by_product in how else net()


def controlled(model, how, **options):
    """Return a controller; by "bands" 4 lines share a size, as in a huge model."""
    most = 70 if "bands" in how else line_score.MOST_BANDS
    with mock.patch.object(line_score, "MOST_BANDS", most):
        return ts.create_controller(model, config(*how), **options)


def train_shards(group, how, steps, state=None, wrap_first=True, saves=False):
    model = trained_net(how)
    if state is not None:
        model.load_state_dict(state[0])
    if wrap_first:
        sharded(model, group)
    controller = controlled(model, how, process_group=group)
    if not wrap_first:
        sharded(model, group)
    if state is not None:
        controller.load_state(state[1])
    found = train(model, controller, steps)
    if not saves:
        return found
    weights = {name: full(tensor) for name, tensor in model.state_dict().items()}
    return found, (weights, controller.get_state())


@pytest.mark.parametrize(
    "how",
    [("magnitude and draws",), ("gradients",), ("tall", "bands"), ("unstructured", by_product)],
)
def test_training_on_shards_is_that_of_one_process(ranks, how):
    model = trained_net(how)
    controller = controlled(model, how)
    wanted = train(model, controller, 5)
    for weights, masks in ranks.run(2, train_shards, how, 5, None, False):
        assert all(map(torch.equal, masks, wanted[1]))
        assert all(map(torch.equal, weights, wanted[0]))
    assert any_pruned_by_each(controller)


def any_pruned_by_each(controller):
    each = getattr(controller, "controllers", {"": controller}).values()
    return all(
        not all(info.operand.binary_mask.all() for info in one.sparsified_module_info)
        for one in each
    )


def test_a_state_is_that_of_one_process_and_goes_on_at_another_number_of_ranks(ranks):
    how, model = ("sums",), net()
    controller = ts.create_controller(model, config(*how))
    train(model, controller, 4)
    own = controller.get_state()
    found = ranks.run(2, train_shards, how, 4, None, True, True)
    for _, (_, state) in found:
        assert same(state, own)
    assert any_pruned_by_each(controller)
    saved = found[0][1]
    more = net()
    more.load_state_dict(saved[0])
    resumed = ts.create_controller(more, config(*how), state=saved[1])
    wanted = train(more, resumed, 3)
    for weights, masks in ranks.run(4, train_shards, how, 3, saved):
        assert all(map(torch.equal, masks, wanted[1]))
        assert all(map(torch.equal, weights, wanted[0]))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def save_shards(group, folder, how):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = sharded(net(), group)
    controller = ts.create_controller(model, config(*how), process_group=group)
    found = train(model, controller, 3)
    state = io.BytesIO()
    torch.save(controller.get_state(), state)
    saved = {"model": get_model_state_dict(model), "sparsity": state.getvalue()}
    checkpoint.save(saved, checkpoint_id=folder, process_group=group)
    return found


def load_shards(group, folder, how):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = sharded(net().to("meta"), group).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    saved = {"model": get_model_state_dict(model), "sparsity": b""}
    checkpoint.load(saved, checkpoint_id=folder, process_group=group)
    set_model_state_dict(model, saved["model"])
    state = torch.load(io.BytesIO(saved["sparsity"]))
    controller = ts.create_controller(model, config(*how), state=state, process_group=group)
    return model, controller


def read_shards(group, folder, how):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model, controller = load_shards(group, folder, how)
    infos, saved = controller.sparsified_module_info, get_model_state_dict(model)
    weights = [full(info.weight) for info in infos]
    masks = [full(info.operand.binary_mask) for info in infos]
    names = [f"{info.module_node_name}.weight" for info in infos]
    return weights, masks, [full(saved[name]) for name in names]


def test_a_distributed_checkpoint_has_exact_zeros_and_loads_at_another_number_of_ranks(
    ranks, tmp_path
):
    how = ("saved",)
    weights, masks = ranks.run(2, save_shards, str(tmp_path), how)[0]
    assert any((~mask).any() for mask in masks)
    for size in (1, 3):
        for loaded in ranks.run(size, read_shards, str(tmp_path), how):
            assert all(map(torch.equal, loaded[0], weights))
            assert all(map(torch.equal, loaded[1], masks))
            for tensor, mask in zip(loaded[2], masks, strict=True):
                assert ((tensor == 0) | mask).all()


def save_and_die(group, folder, how):
    """Save, then lose a rank in the middle of a backward pass."""
    save_shards(group, folder, how)
    model = sharded(net(), group)
    controller = ts.create_controller(model, config(*how), process_group=group)
    if torch.distributed.get_rank(group) == 1:
        model[4].register_forward_hook(die_in_the_backward_pass)
    train(model, controller, 5)


def die_in_the_backward_pass(module, inputs, output):
    output.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))


def go_on(group, folder, how):
    model, controller = load_shards(group, folder, how)
    return train(model, controller, 2)


def test_what_a_killed_rank_leaves_goes_on_at_another_number_of_ranks(ranks, tmp_path):
    how, begun = ("tall", "set"), time.monotonic()
    # the other rank has told of it, rather than waited
    with pytest.raises(RuntimeError, match="rank 1 of 2 died in save_and_die"):
        Ranks(2).run(2, save_and_die, str(tmp_path), how)
    assert time.monotonic() - begun < PATIENCE
    (wanted,) = ranks.run(1, go_on, str(tmp_path), how)
    assert not all(mask.all() for mask in wanted[1])
    for found in ranks.run(4, go_on, str(tmp_path), how):
        assert same([*found], [*wanted])


def overflow(group, importance, stepped):
    model = sharded(net(), group)
    pattern = "tall" if importance == "fisher" else "unstructured"
    controller = ts.create_controller(model, config(pattern, importance), process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=stepped == "fused")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sums = []
    for bad in (False, True):
        model.zero_grad()
        scaler.scale(model(torch.ones(2, 16)).sum()).backward()
        if bad and torch.distributed.get_rank(group) == 1:
            model[4].weight.grad.to_local()[0, 0] = torch.inf
        if stepped != "by nobody":
            scaler.step(optimizer)
            scaler.update()
        controller.scheduler.step()
        sums.append(controller.get_state()["magnitude_sparsity"]["algorithm_state"]["momenta"])
    return sums


@pytest.mark.parametrize("stepped", ["by nobody", "by a loop", "fused"])
@pytest.mark.parametrize("importance", ["snip_momentum", "fisher"])
def test_no_rank_sums_a_step_that_overflowed_on_one(ranks, importance, stepped):
    for once, twice in ranks.run(2, overflow, importance, stepped):
        assert same(once, twice)
        assert all(sums.any() for sums in once.values())


MOVES = ("all_reduce", "all_to_all_single", "broadcast", "all_gather", "all_gather_object")
MOVES += ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter")


def count_moves(group, how):
    """Return what a step and an update send, beside what FSDP2 does."""
    from torch import distributed

    model = sharded(net(), group)
    controller = ts.create_controller(model, config(*how), process_group=group)
    optimizer = torch.optim.AdamW(model.parameters())
    controller.scheduler.step()
    found = {}
    plain = {name: getattr(distributed, name) for name in MOVES if hasattr(distributed, name)}

    def counting(name):
        def call(*args, **kwargs):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            size = sum(tensor.nbytes for tensor in tensors[-1:])
            found.setdefault(name, []).append(size)
            return plain[name](*args, **kwargs)

        return call

    try:
        for name in plain:
            setattr(distributed, name, counting(name))
        model(torch.ones(2, 16)).sum().backward()
        theirs = {name: len(sizes) for name, sizes in found.items()}
        found.clear()
        optimizer.step()
        controller.scheduler.step()
        step = dict(found)
        controller.set_sparsity_level(0.6)
    finally:
        for name, function in plain.items():
            setattr(distributed, name, function)
    edges = sum(w.shard.head * w.shape[1] * 4 for w in controller._weights if w.shard is not None)
    return theirs, step, found, edges


@pytest.mark.parametrize("how", [("unstructured", "snip_momentum"), ("tall", "fisher")])
def test_a_step_moves_nothing_where_gradients_are_summed_either(ranks, how):
    for theirs, step, update, _ in ranks.run(2, count_moves, how):
        assert theirs
        assert step == {}
        assert update["all_reduce"]


def test_a_step_moves_nothing_and_an_update_counts_and_rows_at_edges(ranks):
    found = ranks.run(3, count_moves, ("tall",))
    for _, step, update, edges in found:
        assert step == {}
        assert set(update) == {"all_reduce", "all_to_all_single"}
        assert sum(update["all_reduce"]) < 10_000_000
        rows, masks = update["all_to_all_single"]
        assert rows == edges  # no more than the rows of blocks that begin elsewhere
        assert masks <= 4 * 28  # a byte a block
    assert any(edges for *_, edges in found)


def count_starts(group):
    """Return what optimisers' steps send, of which the third is behind an update."""
    model, sizes, plain = sharded(net(), group), [], torch.distributed.all_reduce
    chosen = ts.SETConfig(level=0.5, t_end=20, delta_t=2, ignored_scopes=["5"])
    controller = ts.create_controller(model, chosen, process_group=group)
    optimizer = torch.optim.AdamW(model.parameters())

    def counting(tensor, *args, **options):
        sizes[-1].append(tensor.nbytes)
        return plain(tensor, *args, **options)

    for _ in range(4):
        controller.scheduler.step()
        model(torch.ones(2, 16)).sum().backward()
        with torch.no_grad():
            model(torch.ones(2, 16))  # leaves the outermost weights gathered
        sizes.append([])
        torch.distributed.all_reduce = counting
        try:
            optimizer.step()
        finally:
            torch.distributed.all_reduce = plain
    return sizes, len(controller._weights)


def test_what_returns_is_started_by_two_reductions_for_all_weights(ranks):
    for sizes, weights in ranks.run(2, count_starts):
        assert weights > 1
        assert sizes == [[], [], [48 * weights] * 2, []]


def strip_shards(group):
    model = net()
    kinds = [type(module) for module in model]
    controller = ts.create_controller(
        model, config("tall"), dispatch="sparse", process_group=group
    )
    controller.set_sparsity_level(0.5)
    sharded(model, group)
    wanted = [full(i.operand.binary_mask) if i.operand.follow() is not None else None
              for i in controller.sparsified_module_info]  # fmt: skip
    x = torch.ones(2, 16)
    before = model(x)
    with pytest.raises(ValueError, match="do_copy must be False for a sharded model"):
        controller.strip()
    stripped = controller.strip(do_copy=False)
    assert torch.equal(stripped(x), before)
    assert [kind in type(m).__mro__ for kind, m in zip(kinds, model, strict=True)] == [True] * 6
    assert not any("BlockSparse" in type(m).__name__ for m in model)
    weights = [full(model[i].weight) for i in (0, 2, 4, 5)]
    assert all((w[~m] == 0).all() for w, m in zip(weights, wanted, strict=True))
    return [int((w == 0).sum()) for w in weights]


def test_a_sharded_model_is_stripped_in_place(ranks):
    controller = ts.create_controller(net(), config("tall"))
    controller.set_sparsity_level(0.5)
    wanted = [int((i.weight == 0).sum()) for i in controller.sparsified_module_info]
    assert ranks.run(2, strip_shards) == [wanted, wanted]


def of_plain_tensors(evidence):
    return evidence.weight * torch.ones(evidence.weight.shape)


def of_one_value(evidence):
    return evidence.weight * 0 + (3 if evidence.name == "4" else evidence.weight)


def on_one_rank_alone(evidence):
    """Sends nothing; its groups' scores are gathered where it returns some."""
    if torch.distributed.get_rank() == 1 and evidence.name == "0":
        raise KeyError("no such table here")
    whole = evidence.weight
    return whole if evidence.name == "2" else whole.unflatten(1, (-1, 8)).abs().mean(2)


def refuse(group, what):
    from torch.distributed.fsdp import fully_shard

    model = net()
    mesh = mesh_of(group)
    if what != "split":
        fully_shard(model, mesh=mesh)
    if what == "obs":
        ts.prune_obs(model, [torch.ones(2, 16)], ts.ConstSparsityConfig(), level=0.5)
    chosen = {
        "split": ts.RBSparsityConfig(),
        "plain": config("blocks", of_plain_tensors),
        "equal": config("blocks", of_one_value),
        "alone": config("wide", on_one_rank_alone),
        "assign": config("blocks"),
        "nan": config("tall"),
        "inf": config("unstructured"),
    }[what]
    controller = ts.create_controller(model, chosen, process_group=group)
    if what == "split":
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    info = controller.sparsified_module_info[2]
    if what == "assign":
        info.operand.binary_mask = torch.ones(info.weight.shape)
    if torch.distributed.get_rank(group) == 1 and what in ("nan", "inf"):
        with torch.no_grad():
            info.weight.to_local()[3, 4] = torch.nan if what == "nan" else torch.inf
    controller.set_sparsity_level(0.5)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("obs", "ValueError", "prune_obs: '0' must not be sharded"),
        ("split", "ValueError", "'0' must not be parted by tensor parallelism under a mask that"),
        (
            "plain",
            "ValueError",
            "of_plain_tensors must work on DTensors for '0', which is sharded: by torch's oper",
        ),
        ("equal", "ValueError", "of_one_value must return values that tell groups of '4' apart"),
        ("alone", "ValueError", "what its Evidence has, got KeyError: 'no such table here'"),
        ("assign", "ValueError", "the mask of '4', which is sharded, must not be assigned"),
        ("nan", "ValueError", "of '4' holds NaN or Inf"),
        ("inf", "ValueError", "the weight of '4' holds NaN or Inf"),
    ],
)
def test_what_shards_do_not_cover_is_refused_on_every_rank(ranks, what, kind, message):
    for raised, text in ranks.errors(2, refuse, what):
        assert raised == kind
        assert message in text
