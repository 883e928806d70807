"""SET and RigL: counts, what is dropped, what is grown, and what returns with it."""

import copy
import math
import statistics
from functools import partial

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.masks.guard import Guard

PATTERNS = [ts.Unstructured(), ts.Block(4, 4)]
CONFIGS = [ts.SETConfig, ts.RigLConfig]
both = pytest.mark.parametrize("config", CONFIGS, ids=["set", "rigl"])
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def build(config=ts.RigLConfig, optimizer=torch.optim.AdamW, dispatch="auto", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 12))
    options = {"level": 0.8, "t_end": 1000, "delta_t": 4, "alpha": 0.5} | options
    controller = ts.create_controller(model, config(**options), dispatch=dispatch)
    controller.optimizer = optimizer(model.parameters(), lr=0.01)
    return controller


def data(step):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def loss_of(model, x):
    return (model(x) - x[:, :12]).square().mean()


def train(controller, steps, after=lambda step: None):
    for step in steps:
        controller.scheduler.step()
        controller.optimizer.zero_grad()
        loss_of(controller.model, data(step)).backward()
        controller.optimizer.step()
        after(step)


def grids(controller):
    return [info.operand.kept_grid().clone() for info in controller.sparsified_module_info]


def kept(controller):
    return [int(grid.sum()) for grid in grids(controller)]


@both
@patterns
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_counts_stay_exact_while_masks_move(config, pattern, distribution):
    controller = build(config, pattern=pattern, distribution=distribution)
    infos = controller.sparsified_module_info
    groups = [info.operand.groups for info in infos]
    counts = kept(controller)
    assert sum(counts) == sum(groups) - round(0.8 * sum(groups))
    if distribution == "uniform":
        assert all(abs(c - 0.2 * n) < 1 for c, n in zip(counts, groups, strict=True))
    else:
        # in plus out over in times out: 56 / 640 and 52 / 480
        assert counts[1] / groups[1] > 1.1 * counts[0] / groups[0]
    moves = []
    before = [grids(controller)]

    def look(step):
        now = grids(controller)
        assert kept(controller) == counts
        moves.append([int((a & ~b).sum()) for a, b in zip(now, before[0], strict=True)])
        before[0] = now

    train(controller, range(13), look)
    for step, moved in enumerate(moves):
        # of those that are dropped some may be grown again at once
        limit = [int(controller.drop_fraction(step) * c) for c in counts]
        due = step in (4, 8, 12)
        assert all(m <= (most if due else 0) for m, most in zip(moved, limit, strict=True))
    assert all(sum(moved) > 0 for step, moved in enumerate(moves) if step in (4, 8, 12))
    assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED


@both
@patterns
def test_the_least_important_are_dropped(config, pattern):
    controller = build(config, pattern=pattern)
    train(controller, range(4))
    before = grids(controller)
    scores = [
        ts.block_score(info.weight.detach(), pattern) for info in controller.sparsified_module_info
    ]
    train(controller, range(4, 5))
    for score, a, b in zip(scores, before, grids(controller), strict=True):
        moving = int(controller.drop_fraction(4) * int(a.sum()))
        lowest = score[a].sort().values[:moving]
        # each that is gone was among them
        gone = a & ~b
        assert 0 < gone.sum() <= moving
        assert score[gone].max() <= lowest[-1]


def normed(gradient):
    for dim in (1, 0):
        size = gradient.square().mean(dim, keepdim=True).sqrt()
        gradient = gradient / size.where(size > 0, 1)
    return gradient


@patterns
@pytest.mark.parametrize("growth", ["gradient", "normed_gradient"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rigl_grows_where_the_dense_gradient_is_greatest(pattern, growth, micro_batches):
    controller = build(pattern=pattern, growth=growth)
    train(controller, range(3))
    # the same weights, zeros written by hand, give the gradient of every weight
    dense = controller.strip()
    controller.scheduler.step()
    controller.optimizer.zero_grad()
    x = data(3)
    for part in x.chunk(micro_batches):
        (loss_of(controller.model, part) / micro_batches).backward()
    loss_of(dense, x).backward()
    controller.optimizer.step()
    before = grids(controller)
    drops = [ts.block_score(i.weight.detach(), pattern) for i in controller.sparsified_module_info]
    controller.scheduler.step()
    layers = [layer for layer in dense if isinstance(layer, nn.Linear)]
    for layer, drop, a, b in zip(layers, drops, before, grids(controller), strict=True):
        gradient = layer.weight.grad
        if growth == "normed_gradient":
            gradient = normed(gradient)
        grow = ts.block_score(gradient, pattern)
        moving = int(controller.drop_fraction(4) * int(a.sum()))
        survives = a & (drop > drop[a].sort().values[moving - 1])
        best = grow[~survives].sort(descending=True).values[moving - 1]
        assert int(b.sum()) == int(a.sum())
        grown = ~survives & b
        assert torch.equal(b, survives | grown)
        assert grow[grown].min() >= best * (1 - 1e-6)
        # of equals, to rounding, any
        assert b[grow > best * (1 + 1e-6)].all()


def test_a_row_of_large_gradients_takes_no_growth_from_the_others():
    def grown(growth):
        # all but one output matter a thousandth as much to the loss
        controller = build(growth=growth)
        scale = torch.full((12,), 1e-3)
        scale[5] = 1
        before = grids(controller)[1]
        for step in range(5):
            controller.scheduler.step()
            controller.optimizer.zero_grad()
            (controller.model(data(step)) * scale).sum().backward()
        return (grids(controller)[1] & ~before).sum(1)

    assert grown("gradient")[5] > 4 * grown("gradient").float().mean()
    assert grown("normed_gradient")[5] < 3 * grown("normed_gradient").float().mean()


@patterns
def test_set_grows_at_random_by_its_seed_alone(pattern):
    def run(seed, globally):
        controller = build(ts.SETConfig, pattern=pattern, seed=seed)
        torch.manual_seed(globally)
        train(controller, range(9))
        return grids(controller)

    first, again, other = run(0, 1), run(0, 2), run(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def muon_and_adamw(parameters, lr):
    matrices = [p for p in parameters if p.ndim == 2]
    return torch.optim.Muon(matrices, lr=lr)


@both
@patterns
@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
        torch.optim.RMSprop,
        muon_and_adamw,
    ],
    ids=["AdamW", "SGD", "RMSprop", "Muon"],
)
@pytest.mark.parametrize("told", [True, False])
def test_what_returns_starts_at_zero_with_moments_of_zero(config, pattern, optimizer, told):
    controller = build(config, optimizer, pattern=pattern)
    optimizer = controller.optimizer
    if not told:
        controller._optimizer = None
    infos = controller.sparsified_module_info

    def step(i):
        controller.scheduler.step()
        optimizer.zero_grad()
        loss_of(controller.model, data(i)).backward()
        optimizer.step()

    for i in range(4):
        step(i)
    before = [info.operand.binary_mask for info in infos]
    weights = [info.weight.detach().clone() for info in infos]
    states = [copy.deepcopy(optimizer.state[info.weight]) for info in infos]
    controller.scheduler.step()
    for info, mask, weight, state in zip(infos, before, weights, states, strict=True):
        after = info.operand.binary_mask
        grown = after & ~mask
        assert grown.any()
        assert (info.weight[~after | grown] == 0).all()
        stays = after & mask
        assert torch.equal(info.weight[stays], weight[stays])
        cleared = 0
        for name, tensor in optimizer.state[info.weight].items():
            if tensor is not None and tensor.ndim:
                assert (tensor[~after | grown] == 0).all()
                assert torch.equal(tensor[stays], state[name][stays])
                cleared += 1
        assert cleared


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.3), (25, 0.15 * (1 + 0.5**0.5)), (50, 0.15), (100, 0), (500, 0)]
)
def test_the_drop_fraction_follows_a_cosine(step, expected):
    controller = build(alpha=0.3, t_end=100)
    assert controller.drop_fraction(step) == pytest.approx(expected)


def test_a_constant_drop_fraction_stays_until_t_end():
    controller = build(alpha=0.3, t_end=100, drop_schedule="constant")
    assert [controller.drop_fraction(step) for step in (0, 50, 99, 100)] == [0.3, 0.3, 0.3, 0]
    with pytest.raises(ValueError, match=r"drop_schedule must be .*'constant', got 'linear'"):
        build(drop_schedule="linear")


@both
def test_the_first_masks_keep_what_matters_where_there_is_something_to_judge_by(config):
    controller = build(config, t_end=0)
    torch.manual_seed(0)
    weight, mask = nn.Linear(16, 40).weight.abs(), grids(controller)[0]
    assert weight[mask].min() >= weight[~mask].max()
    assert config(level=0.5, t_end=0).initial_masks == "importance"
    for criterion in ("snip", "snip_momentum", "wanda"):
        assert config(level=0.5, t_end=0, weight_importance=criterion).initial_masks == "random"


OPTIMISERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "AdamW, fused": partial(torch.optim.AdamW, fused=True),
    "AdamW, foreach": partial(torch.optim.AdamW, foreach=True),
    "AdamW, amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
    "SGD": lambda p, lr: torch.optim.SGD(p, 50 * lr, momentum=0.9),
}


def paces(optimizer, config, pattern, updates=3):
    """Return mean updates of what has grown over the others', and steps since it has, of each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    teacher = nn.Linear(32, 32)
    options = {"level": 0.8, "t_end": 4000, "delta_t": 100, "pattern": pattern}
    controller = ts.create_controller(model, config(**options))
    optimizer = optimizer(model.parameters(), lr=1e-3)
    infos = controller.sparsified_module_info
    masks = [info.operand.binary_mask for info in infos]
    found = []
    for step in range(100 * updates + 20):
        controller.scheduler.step()
        now = [info.operand.binary_mask for info in infos]
        if step % 100 == 0:
            grown, masks = [a & ~b for a, b in zip(now, masks, strict=True)], now
        x = torch.randn(64, 32)
        optimizer.zero_grad()
        (model(x) - teacher(x)).square().mean().backward()
        before = [info.weight.detach().clone() for info in infos]
        optimizer.step()
        if step < 100 or step % 100 >= 20:
            continue
        for info, old, new, mask in zip(infos, before, grown, now, strict=True):
            moved = (info.weight.detach() - old).abs()
            found.append((moved[new].mean() / moved[mask & ~new].mean(), step % 100))
    return found


# each optimiser under both configurations and both patterns, of which it knows nothing
PACED = [(name, CONFIGS[i], pattern) for name in OPTIMISERS for i, pattern in enumerate(PATTERNS)]


@pytest.mark.parametrize(("name", "config", "pattern"), PACED, ids=str)
def test_what_returns_moves_as_the_others_do(config, pattern, name):
    found = paces(OPTIMISERS[name], config, pattern)
    assert len(found) == 3 * 2 * 20
    if name == "SGD":  # momentum starts at zero, and then is as large as the gradients
        assert all(pace <= 1.5 for pace, step in found if step == 0)
        return
    assert all(pace <= 1.5 for pace, _ in found)
    for first in (True, False):
        assert statistics.mean(pace.item() for pace, step in found if (step == 0) == first) >= 0.6


def test_what_returns_would_be_shocked_without_a_second_moment(monkeypatch):
    monkeypatch.setattr(Guard, "_start_returned", lambda *_: None)
    assert max(pace for pace, _ in paces(torch.optim.AdamW, ts.SETConfig, ts.Block(4, 4))) > 5


@pytest.mark.parametrize("skips", [False, True])
def test_what_returns_starts_alike_under_a_gradient_scaler(skips):
    def run(scale):
        torch.manual_seed(0)
        controller = build(ts.SETConfig, partial(torch.optim.AdamW, fused=True))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for step in range(6):
            controller.scheduler.step()
            passes = [torch.inf, 1.0] if skips and scale > 1 and step == 4 else [1.0]
            for factor in passes:
                controller.optimizer.zero_grad()
                loss = loss_of(controller.model, data(step)) * factor
                scaler.scale(loss).backward()
                scaler.step(controller.optimizer)
                scaler.update()
        infos, optimizer = controller.sparsified_module_info, controller.optimizer
        return [optimizer.state[info.weight]["exp_avg_sq"] for info in infos]

    for plain, scaled in zip(run(1.0), run(1024.0), strict=True):
        torch.testing.assert_close(plain, scaled)


@both
def test_masks_stay_from_t_end_on(config):
    controller = build(config, t_end=8)
    train(controller, range(7))
    before = grids(controller)
    train(controller, range(7, 20))
    assert all(torch.equal(a, b) for a, b in zip(before, grids(controller), strict=True))
    static = build(config, t_end=0)
    before = grids(static)
    train(static, range(9))
    assert all(torch.equal(a, b) for a, b in zip(before, grids(static), strict=True))


@pytest.mark.parametrize("stop", ["freeze", "disable_scheduler"])
def test_a_stopped_rigl_asks_for_no_dense_gradient(stop):
    controller = build()
    train(controller, range(3))
    controller.scheduler.step()
    assert all(i.operand.dense_gradient_taker for i in controller.sparsified_module_info)
    getattr(controller, stop)()
    before = grids(controller)
    train(controller, range(4, 10))
    assert all(torch.equal(a, b) for a, b in zip(before, grids(controller), strict=True))
    assert not any(i.operand.dense_gradient_taker for i in controller.sparsified_module_info)


@patterns
def test_pruned_groups_get_no_gradient_in_any_step(pattern):
    controller = build(pattern=pattern)
    dense = []

    def look(step):
        dense.append(controller.sparsified_module_info[0].operand.dense_gradient_taker is not None)
        for info in controller.sparsified_module_info:
            assert (info.weight.grad[~info.operand.binary_mask] == 0).all()
            assert (info.weight.grad != 0).any()

    train(controller, range(9), look)
    # the dense gradient is computed in the step before an update and in no other
    assert dense == [step in (3, 7) for step in range(9)]


def test_rigl_without_a_backward_pass_is_refused():
    controller = build()
    train(controller, range(3))
    controller.scheduler.step()
    with pytest.raises(RuntimeError, match="rigl: the update of step 4 needs the gradients"):
        controller.scheduler.step()


def test_an_update_after_skipped_steps_waits_for_the_next_step():
    controller = build()
    train(controller, range(2))
    before = grids(controller)
    controller.scheduler.step(4)
    loss_of(controller.model, data(4)).backward()
    assert torch.equal(before[0], grids(controller)[0])
    controller.scheduler.step()
    assert not torch.equal(before[0], grids(controller)[0])


@pytest.mark.parametrize("way", ["sparse", "compiled"])
def test_block_sparse_and_compiled_linears_grow_the_same(way):
    pattern = ts.Block(16, 16)
    options = {"level": 0.5, "delta_t": 2, "t_end": 100, "alpha": 0.5, "pattern": pattern}

    def run(dispatch, compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        controller = ts.create_controller(model, ts.RigLConfig(**options), dispatch=dispatch)
        controller.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(7):
            controller.scheduler.step()
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            controller.optimizer.zero_grad()
            (forward(x) - x).square().mean().backward()
            for info in controller.sparsified_module_info:
                assert (info.weight.grad[~info.operand.binary_mask] == 0).all()
            controller.optimizer.step()
        return grids(controller)

    want = run("dense", compiled=False)
    got = run("sparse" if way == "sparse" else "dense", compiled=way == "compiled")
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_an_update_whose_gradients_overflowed_waits_for_the_next_step():
    controller = build()
    train(controller, range(3))
    before = grids(controller)
    controller.scheduler.step()
    (loss_of(controller.model, data(3)) * math.inf).backward()
    controller.optimizer.zero_grad()
    train(controller, range(4, 5))
    assert all(torch.equal(a, b) for a, b in zip(before, grids(controller), strict=True))
    train(controller, range(5, 6))
    assert not torch.equal(before[0], grids(controller)[0])
    after = grids(controller)
    train(controller, range(6, 8))
    assert all(torch.equal(a, b) for a, b in zip(after, grids(controller), strict=True))


def test_a_weight_that_is_not_finite_is_told_at_the_update_that_its_gradients_spoil():
    controller = build()
    train(controller, range(3))
    before = grids(controller)
    info = controller.sparsified_module_info[0]
    controller.scheduler.step()
    with torch.no_grad():
        info.weight.view(-1)[info.operand.binary_mask.view(-1).nonzero()[0]] = math.nan
    loss_of(controller.model, data(3)).backward()
    with pytest.raises(ValueError, match=rf"\['{info.module_node_name}'\] hold NaN or Inf"):
        controller.scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(before, grids(controller), strict=True))


def test_a_weight_that_a_step_did_not_use_keeps_its_mask():
    controller = build()
    train(controller, range(3))
    before = grids(controller)
    controller.scheduler.step()
    controller.optimizer.zero_grad()
    controller.model[:2](data(3)).square().sum().backward()
    controller.scheduler.step()
    after = grids(controller)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@both
def test_a_level_set_later_drops_the_least_important_or_grows(config):
    controller = build(config)
    before = grids(controller)
    controller.set_sparsity_level(0.9)
    fewer = grids(controller)
    assert sum(kept(controller)) == 1120 - round(0.9 * 1120)
    assert not any((b & ~a).any() for a, b in zip(before, fewer, strict=True))
    controller.compression_rate = 0.5
    assert controller.compression_rate == 0.5
    assert not any((a & ~b).any() for a, b in zip(fewer, grids(controller), strict=True))


def test_overrides_limit_the_counts_and_the_total_stays_exact():
    few = build(level=0.5, overrides=[ts.Override(scope="2", maximum_level=0.25)])
    assert kept(few) == [560 - 360, 360]
    many = build(level=0.5, overrides=[ts.Override(scope="2", minimum_level=0.75)])
    assert kept(many) == [560 - 120, 120]
    with pytest.raises(ValueError, match="224 of 1120 groups to keep, between 373 and 1120"):
        build(level=0.8, overrides=[ts.Override(scope="2", maximum_level=0.25)])


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t_end": 10}, "level must be given"),
        ({"level": 0.5}, "t_end must be given"),
        ({"level": 1.0, "t_end": 10}, "level must be less than 1, got 1.0"),
        ({"level": 0.5, "t_end": 10, "alpha": 1.5}, "alpha must be .*, got 1.5"),
        ({"level": 0.5, "t_end": 10, "delta_t": 0}, "delta_t must be .*, got 0"),
        ({"level": 0.5, "t_end": 10, "distribution": "er"}, "distribution must be .*, got 'er'"),
        ({"level": 0.5, "t_end": 10, "alfa": 1}, r"alfa is no field \(did you mean 'alpha'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name_and_value(config, arguments, message):
    with pytest.raises(ValueError, match=rf"^{config.__name__}: .*{message}"):
        config(**arguments)
    section = {"algorithm": config.model_fields["algorithm"].default, "params": arguments}
    with pytest.raises(ValueError, match=r"^compression"):
        ts.create_controller(nn.Linear(4, 4), section)


@both
def test_masks_that_would_never_move_are_refused(config):
    for t_end, delta_t in ((75, 100), (100, 100), (2, 2)):
        with pytest.raises(ValueError, match=f"delta_t must be less than t_end {t_end}, .*got"):
            config(level=0.5, t_end=t_end, delta_t=delta_t)
    controller = build(config, t_end=5, delta_t=4)
    before = grids(controller)
    train(controller, range(5))
    assert not all(torch.equal(a, b) for a, b in zip(before, grids(controller), strict=True))
    # asked for, or the fine-tuning's default after a single step
    for options in ({"t_end": 0}, {"t_end": 75, "alpha": 0.0}, {"t_end": 1, "delta_t": 1}):
        config(level=0.5, **options)


def test_rigl_says_what_growth_there_is():
    with pytest.raises(ValueError, match=r"growth must be .*'normed_gradient', got 'random'"):
        ts.RigLConfig(level=0.5, t_end=200, growth="random")


@both
def test_a_dictionary_says_what_the_configuration_says(config):
    name = config.model_fields["algorithm"].default
    params = {"level": 0.75, "t_end": 200, "distribution": "uniform", "pattern": {"block": [2, 2]}}
    controller = ts.create_controller(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        {"algorithm": name, "params": params, "ignored_scopes": ["1"]},
    )
    assert controller.config == config(ignored_scopes=("1",), **params)
    assert controller.compression_rate == 0.75
    with pytest.raises(ValueError, match=r"compression: sparsity_init must be left out.* 0.5"):
        ts.create_controller(
            nn.Linear(4, 4), {"algorithm": name, "sparsity_init": 0.5, "params": params}
        )
