"""Pools, distributions and limits over weights, against what a few lines of numpy find."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.selection import thresholds

ONCE = ts.RampSchedule(target_level=0.8, end=0)


def model_of(*shapes, seed=0, scales=None):
    torch.manual_seed(seed)
    layers = [nn.Linear(cols, rows, bias=False) for rows, cols in shapes]
    for layer, scale in zip(layers, scales or (), strict=False):
        with torch.no_grad():
            layer.weight *= scale
    return nn.Sequential(*layers)


def controlled(model, **options):
    options = {"schedule": ONCE} | options
    return ts.create_controller(model, ts.MagnitudeSparsityConfig(**options))


def grids(controller):
    return [i.operand.kept_grid().numpy() for i in controller.sparsified_module_info]


def levels(controller):
    return [1 - grid.mean() for grid in grids(controller)]


@pytest.mark.parametrize(
    ("pattern", "score"),
    [
        (ts.Unstructured(), lambda w: np.abs(w)),
        (ts.Block(2, 4), lambda w: np.abs(w).reshape(12, 2, 6, 4).mean((1, 3))),
    ],
    ids=["unstructured", "blocks"],
)
def test_a_row_prunes_its_share_of_lowest_scores(pattern, score):
    model = model_of((24, 24), (24, 24), scales=(1, 10))
    scores = [score(layer.weight.detach().numpy()) for layer in model]
    controller = controlled(model, pattern=pattern, pool="row")
    controller.scheduler.step()
    for grid, own in zip(grids(controller), scores, strict=True):
        rows = len(grid)
        k = round(0.8 * grid.size)
        for r in range(rows):
            n = (r + 1) * k // rows - r * k // rows
            assert n in (k // rows, k // rows + 1)
            pruned = np.argsort(own[r], kind="stable")[:n]
            assert set(np.flatnonzero(~grid[r])) == set(pruned)
    assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED
    assert controller.compression_rate == pytest.approx(0.8, abs=0.5 / grids(controller)[0].size)


@pytest.mark.parametrize("transposable", [False, True])
def test_a_row_of_n_of_m_prunes_its_share_of_tuples(transposable):
    model = model_of((8, 32))
    tall = 4 if transposable else 1
    pattern = ts.NM(2, 4, transposable=transposable)
    schedule = ts.RampSchedule(target_level=0.5, end=0)
    controller = controlled(model, pattern=pattern, pool="row", schedule=schedule)
    controller.set_sparsity_level(0.25)
    (grid,) = grids(controller)
    per_row = (~grid).reshape(8 // tall, -1).sum(1)
    assert per_row.tolist() == [8 * tall] * (8 // tall)
    controller.set_sparsity_level(0.5)
    assert (grids(controller)[0].reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_outputs_however_the_weight_is_stored(transposed):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(6, 20) if transposed else nn.Linear(20, 6))
    controller = controlled(model, pool="row", pattern=ts.Unstructured())
    controller.scheduler.step()
    weight = model[0].weight.T if transposed else model[0].weight
    assert (weight != 0).sum(1).tolist() == [4] * 6


def test_wanda_compares_in_rows_as_published():
    config = ts.MagnitudeSparsityConfig
    assert config(weight_importance="wanda").pool == "row"
    assert config(weight_importance="wanda", pattern=ts.Block(4, 4)).pool == "row"
    assert config(weight_importance="wanda", pool="global").pool == "global"
    assert [config().pool, config(pattern=ts.Block(4, 4)).pool] == ["global", "weight"]
    assert config(distribution="erk").pool == "weight"
    model = model_of((5, 40))
    controller = controlled(model, weight_importance="wanda")
    x = torch.randn(3, 7, 40) * torch.rand(40)
    with controller.calibration():
        model(x)
    score = (model[0].weight * x.reshape(-1, 40).norm(dim=0)).abs().detach().numpy()
    controller.scheduler.step()
    (grid,) = grids(controller)
    for row, own in zip(grid, score, strict=True):
        # the published rule: the lowest 80 % of each output row
        assert set(np.flatnonzero(~row)) == set(np.argsort(own)[:32])


@pytest.mark.parametrize("pool", ["weight", "row"])
def test_erk_gives_narrow_weights_more(pool):
    shapes = [(16, 16), (64, 16), (64, 64)]
    controller = controlled(model_of(*shapes), distribution="erk", pool=pool)
    controller.scheduler.step()
    kept = [grid.sum() for grid in grids(controller)]
    # densities (16+16)/256 = 0.125, 80/1024 = 0.078125, 128/4096 = 0.03125, times a factor x with
    # 32 x + 80 x + 128 x = 1075 of 5376: x = 4.479, so 143.3, 358.3 and 573.3
    assert [n - exact for n, exact in zip(kept, (143, 358, 573), strict=True)].count(1) == 1
    assert sum(kept) == 5376 - round(0.8 * 5376)
    assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED


def test_owl_keeps_more_where_more_elements_stand_out():
    model = model_of((40, 50), (40, 50), (40, 50))
    with torch.no_grad():
        for layer, count in zip(model, (0, 100, 20), strict=True):
            layer.weight.fill_(1).mul_(torch.rand(40, 50) + 0.5)
            layer.weight.view(-1)[:count] = 1000.0
    config = {"distribution": "owl", "weight_importance": "abs"}
    controller = controlled(model, **config)
    # 1000 is above 5 x the mean in the third; in the second the mean of 5 % is 51, in all above
    assert controller._criterion.outliers(controller._weights) == pytest.approx([0, 0.05, 0.01])
    controller.scheduler.step()
    # ratios 0, 0.05 and 0.01 span 0.16 of density: 0, 0.16 and 0.032 about a mean of 0.2
    assert levels(controller) == pytest.approx([0.864, 0.704, 0.832], abs=1e-3)
    assert controller.compression_rate == pytest.approx(0.8)


def test_the_default_maximum_is_98_percent_and_can_be_lifted():
    scales = (1e-3, 1, 1)
    found = {}
    for name, options in {
        "default": {},
        "lifted": {"maximum_level": 1.0},
        "lower": {"maximum_level": 0.9},
        "override": {"overrides": [ts.Override(scope="0", maximum_level=1.0)]},
    }.items():
        model = model_of(*[(50, 40)] * 3, scales=scales)
        controller = controlled(model, pool="global", weight_importance="abs", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller.scheduler.step()
        found[name] = levels(controller)
        assert sum(round(level * 2000) for level in found[name]) == 4800
    assert [found[name][0] for name in found] == pytest.approx([0.98, 1, 0.9, 1])


def test_a_level_beyond_the_default_maximum_is_borne_by_all_alike():
    model = model_of((50, 40), (50, 40), scales=(1e-3, 1))
    schedule = ts.RampSchedule(target_level=0.99, end=0)
    controller = controlled(model, schedule=schedule, weight_importance="abs")
    controller.scheduler.step()
    assert levels(controller) == pytest.approx([0.99, 0.99])


def test_a_minimum_for_all_holds_once_the_level_is_there():
    model = model_of(*[(50, 40)] * 3, scales=(1e-3, 1, 1000))
    controller = controlled(model, weight_importance="abs", minimum_level=0.6, pool="global")
    controller.set_sparsity_level(0.3)
    assert levels(controller) == pytest.approx([0.3] * 3)
    controller.set_sparsity_level(0.8)
    assert levels(controller) == pytest.approx([0.98, 0.82, 0.6])


@pytest.mark.parametrize("pool", ["weight", "row"])
def test_a_spared_weight_is_made_up_for_by_the_others(pool):
    model = model_of((20, 10), (20, 10), (20, 10))
    overrides = [ts.Override(scope="1", maximum_level=0.5)]
    controller = controlled(model, pool=pool, overrides=overrides)
    controller.scheduler.step()
    assert levels(controller) == pytest.approx([0.95, 0.5, 0.95])


@pytest.mark.parametrize("pool", ["global", "weight", "row"])
def test_limits_never_fail_by_rounding_along_a_schedule(pool):
    generator = random.Random(3)
    for trial in range(16):
        shapes = [(generator.randint(1, 9), generator.randint(1, 9)) for _ in range(6)]
        limit = generator.choice([0.5, 0.75, 0.8])
        model = model_of(*shapes, seed=trial)
        options = {"maximum_level": limit, "pool": pool, "minimum_level": limit}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = ts.RampSchedule(target_level=limit, end=8)
            controller = controlled(model, **options, schedule=schedule)
            for _ in range(9):
                controller.scheduler.step()
            again = controlled(model_of(*shapes, seed=trial), **options, schedule=schedule)
            again.scheduler.step(8)
        assert controller.frozen
        assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED
        for one, other, shape in zip(grids(controller), grids(again), shapes, strict=True):
            assert (one == other).all()
            assert (~one).sum() <= round(limit * math.prod(shape))


def test_a_limit_that_is_not_met_costs_no_second_search(monkeypatch):
    searches = []
    find_cut = thresholds.find_cut
    monkeypatch.setattr(thresholds, "find_cut", lambda *a: searches.append(1) or find_cut(*a))
    controller = controlled(model_of(*[(20, 30)] * 4))
    controller.set_sparsity_level(0.7)
    assert len(searches) == 1
    controller = controlled(model_of(*[(20, 30)] * 4, scales=(1e-3,)), weight_importance="abs")
    searches.clear()
    controller.set_sparsity_level(0.7)
    # all; those that meet no limit; what meets one
    assert len(searches) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "column"}, "pool must be 'global', 'weight' or 'row', got 'column'"),
        (
            {"distribution": "erk", "pool": "global"},
            "distribution must be 'uniform' with pool 'global', .* got 'erk'",
        ),
        (
            {"distribution": "owl", "pattern": ts.NM(2, 4), "schedule": None}
            | {"sparsity_level_setting_mode": "local"},
            "distribution must be 'uniform' with pattern 2:4, got 'owl'",
        ),
        ({"minimum_level": 0.9, "maximum_level": 0.5}, "minimum_level must be at most .* got 0.9"),
        ({"maximum_level": 1.5}, "maximum_level must be .* got 1.5"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ts.MagnitudeSparsityConfig(**options)


@pytest.mark.parametrize("pool", ["global", "weight", "row"])
def test_a_target_that_limits_do_not_allow_is_refused_at_the_start(pool):
    model = model_of((20, 30), (20, 30))
    with pytest.raises(ValueError, match=r"level 0.8 cannot be reached .* 960 of 1200 groups"):
        controlled(model, pool=pool, maximum_level=0.7)
