"""NNCF's vectors (``M`` and its thresholds), exact counts, pools, limits, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import triton_sparsity as ts


def model_m():
    """The model of NNCF's own tests: two convolutions with known weights."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 1, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[10.0, 9], [9, 10]]).expand(2, 1, 2, 2))
        model[1].weight.copy_(
            torch.tensor([[-9.0, -10, -10], [-10, -9, -10], [-10, -10, -9]]).expand(1, 2, 3, 3)
        )
    return model


def magnitude(importance="normed_abs", **schedule):
    return ts.MagnitudeSparsityConfig(
        weight_importance=importance, schedule=ts.PolynomialSchedule(**schedule)
    )


def masks(controller):
    return [info.operand.binary_mask for info in controller.sparsified_module_info]


def pruned(controller):
    return [info.operand.pruned_groups() for info in controller.sparsified_module_info]


def test_norms_of_the_vector_model():
    norms = [torch.linalg.vector_norm(conv.weight).item() for conv in model_m()]
    assert norms == pytest.approx([26.907248, 41.060930], rel=1e-6)


@pytest.mark.parametrize(("importance", "threshold"), [("abs", 10.0), ("normed_abs", 0.243540)])
def test_threshold_vectors(importance, threshold):
    controller = ts.create_controller(model_m(), magnitude(importance))
    controller.set_sparsity_level(0.5)
    layers = controller.statistics().magnitude_sparsity.model_statistics.sparsified_layers_summary
    assert [layer.threshold for layer in layers] == pytest.approx([threshold] * 2, rel=1e-5)
    assert sum(pruned(controller)) == 13


def test_local_vector_prunes_one_layer_and_leaves_the_other():
    config = ts.MagnitudeSparsityConfig(sparsity_level_setting_mode="local", schedule=None)
    controller = ts.create_controller(model_m(), config)
    first, second = controller.sparsified_module_info
    controller.set_sparsity_level(0.5, first)
    assert pruned(controller) == [4, 0]
    controller.set_sparsity_level(0.25, second)
    assert pruned(controller) == [4, round(0.25 * 18)]


def test_ties_keep_the_first_in_module_order_then_row_major():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(-1.0)
    controller = ts.create_controller(model, magnitude("abs"))
    with pytest.warns(UserWarning, match=r"pruned to nothing, or nearly: 1 \(0 of 4 groups kept"):
        controller.set_sparsity_level(0.625)
    assert masks(controller)[0].tolist() == [[True, True], [True, False]]
    assert not masks(controller)[1].any()


def test_block_scores_are_means_so_that_edge_blocks_compare_fairly():
    model = nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[:, 4] = 1.5  # a 4 x 1 edge block of a larger mean and a smaller sum
    config = ts.MagnitudeSparsityConfig(
        pattern=ts.Block(4, 4), weight_importance="abs", schedule=ts.PolynomialSchedule()
    )
    controller = ts.create_controller(model, config)
    controller.set_sparsity_level(0.5)
    (mask,) = masks(controller)
    assert mask[:, 4].all()
    assert not mask[:, :4].any()


def oracle(weights, pattern, level, importance):
    """Masks by numpy alone: sorted by score, the lowest pruned, the first among equals kept."""
    grids = []
    for w in weights:
        w = w.astype(np.float32)
        norm = np.sqrt(np.sum(w.astype(np.float64) ** 2)).astype(np.float32)
        rows, cols = pattern.rows, pattern.cols
        down, across = -(-w.shape[0] // rows), -(-w.shape[1] // cols)
        grid = np.empty((down, across), np.float32)
        for i in range(down):
            for j in range(across):
                grid[i, j] = np.abs(
                    w[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols].astype(np.float64)
                ).mean()
        if importance == "normed_abs":
            grid = grid * np.float32(np.float32(1) / norm) if norm > 0 else grid * 0
        grids.append(grid)
    flat = np.concatenate([g.ravel() for g in grids])
    count = round(level * flat.size)
    order = np.lexsort((-np.arange(flat.size), flat))
    kept = np.ones(flat.size, bool)
    kept[order[:count]] = False
    sizes = np.cumsum([g.size for g in grids])[:-1]
    return [
        np.kron(k.reshape(g.shape), np.ones((pattern.rows, pattern.cols), bool))[
            : w.shape[0], : w.shape[1]
        ].astype(bool)
        for k, g, w in zip(np.split(kept, sizes), grids, weights, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_masks_agree_with_a_numpy_oracle(data):
    pattern = data.draw(st.sampled_from([ts.Unstructured(), ts.Block(1, 4), ts.Block(4, 2)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    importance = data.draw(st.sampled_from(["abs", "normed_abs"]))
    level = data.draw(st.floats(0, 0.999))
    shapes = data.draw(
        st.lists(st.tuples(st.integers(4, 11), st.integers(4, 13)), min_size=1, max_size=3)
    )
    # few distinct magnitudes, exact in every dtype, so that ties are the rule
    values = st.sampled_from([0.0, -0.5, 0.5, 1.0, -1.0, 2.0])
    model = nn.Sequential(*[nn.Linear(i, o, bias=False) for o, i in shapes]).to(dtype)
    weights = []
    with torch.no_grad():
        for layer, (o, i) in zip(model, shapes, strict=True):
            w = np.array(data.draw(st.lists(values, min_size=o * i, max_size=o * i)))
            layer.weight.copy_(torch.from_numpy(w.reshape(o, i)))
            weights.append(w.reshape(o, i))
    if importance == "normed_abs":
        # one rounding of the norm decides ties between layers; within one layer it cannot
        model, weights = model[:1], weights[:1]
    config = ts.MagnitudeSparsityConfig(
        pattern=pattern,
        weight_importance=importance,
        schedule=ts.PolynomialSchedule(),
        pool="global",
        maximum_level=1.0,  # the oracle has no limits
        # a weight that is zero throughout is left out unless a scope names it
        target_scopes="*",
    )
    controller = ts.create_controller(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a layer that is pruned to nothing
        controller.set_sparsity_level(level)
    want = oracle(weights, pattern, level, importance)
    for got, mask in zip(masks(controller), want, strict=True):
        assert np.array_equal(got.numpy(), mask)
    groups = sum(i.operand.groups for i in controller.sparsified_module_info)
    assert sum(pruned(controller)) == round(level * groups)


def test_groups_return_when_masks_are_updated():
    model = nn.Linear(8, 8, bias=False)
    values = model.weight.detach().clone()
    controller = ts.create_controller(model, magnitude("abs"))
    controller.set_sparsity_level(0.5)
    mask = masks(controller)[0]
    with torch.no_grad():
        model.weight *= 1e-6  # what is kept is less now than what was pruned
    controller.set_sparsity_level(0.5)
    assert masks(controller)[0][~mask].all()
    # with the values that they had
    assert torch.equal(model.weight[~mask], values[~mask])
    assert (model.weight[mask] == 0).all()


@pytest.mark.parametrize("level", [-0.1, 1.0, 1.5, math.nan, "0.5", None])
def test_a_level_outside_the_range_is_refused_and_shown(level):
    controller = ts.create_controller(model_m(), magnitude())
    with pytest.raises(ValueError, match=rf"level must be in \[0, 1\), got {level!r}"):
        controller.set_sparsity_level(level)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(2, 2)], ids=str)
def test_nonfinite_weights_name_the_module_and_leave_the_masks(bad, pattern):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = ts.MagnitudeSparsityConfig(pattern=pattern, schedule=ts.PolynomialSchedule())
    controller = ts.create_controller(model, config)
    controller.set_sparsity_level(0.5)
    before = masks(controller)
    place = tuple(before[1].nonzero()[0])
    with torch.no_grad():
        model[1].weight[place] = bad
    with pytest.raises(ValueError, match="'1' holds NaN or Inf"):
        controller.set_sparsity_level(0.75)
    assert all(torch.equal(a, b) for a, b in zip(masks(controller), before, strict=True))


def test_an_all_zero_layer_under_normed_abs_has_importance_zero():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    config = ts.MagnitudeSparsityConfig(target_scopes=["0", "1"])
    controller = ts.create_controller(model, config)
    with pytest.warns(UserWarning, match="pruned to nothing"):
        controller.set_sparsity_level(0.5)
    assert pruned(controller) == [16, 0]


class TestLimits:
    def controller(self, *overrides, level=0.5):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(3)])
        with torch.no_grad():
            model[1].weight *= 0.1
            model[2].weight *= 10
        config = ts.MagnitudeSparsityConfig(
            weight_importance="abs",
            schedule=ts.PolynomialSchedule(initial_level=level, target_level=0.5),
            overrides=overrides,
        )
        return ts.create_controller(model, config)

    @pytest.mark.filterwarnings("ignore:at level 0.5 these weights are pruned to nothing")
    def test_without_limits_one_layer_bears_most(self):
        counts = pruned(self.controller())
        assert counts[1] > 220
        assert sum(counts) == 384

    def test_limits_hold_and_the_total_stays_exact(self):
        controller = self.controller(
            ts.Override(scope="1", maximum_level=0.5), ts.Override(scope="2", minimum_level=0.25)
        )
        counts = pruned(controller)
        assert counts == [384 - 128 - 64, 128, 64]

    def test_the_unlimited_share_one_threshold(self):
        controller = self.controller(ts.Override(scope="1", maximum_level=0.5))
        free = [i for i in controller.sparsified_module_info if i.module_node_name != "1"]
        kept = torch.cat([i.weight[i.operand.binary_mask].abs() for i in free])
        dropped = torch.cat([i.weight[~i.operand.binary_mask].abs() for i in free])
        assert dropped.max() == 0
        values = torch.cat([i.operand.values[~i.operand.binary_mask].abs() for i in free])
        assert values.max() <= kept.min()

    def test_a_minimum_does_not_run_ahead_of_the_schedule(self):
        controller = self.controller(ts.Override(scope="2", minimum_level=0.8), level=0.1)
        assert pruned(controller)[2] == round(0.1 * 256)

    def test_a_level_beyond_the_limits_is_refused(self):
        with pytest.raises(ValueError, match="cannot be reached within the limits"):
            self.controller(ts.Override(scope="*", maximum_level=0.4))

    def test_a_pattern_of_its_own_makes_a_pool_of_its_own(self):
        controller = self.controller(ts.Override(scope="2", pattern=ts.Block(4, 4)))
        assert pruned(controller)[2] == 8
        assert sum(pruned(controller)[:2]) == 256
