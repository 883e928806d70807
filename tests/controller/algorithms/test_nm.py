"""N:M under the controller: levels, exact counts, limits, state, and what is refused."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import oracle
import triton_sparsity as ts
from triton_sparsity.controller.masks.weight import SparseWeight, Target

TRANSPOSABLE = ts.NM(2, 4, transposable=True)
PATTERNS = [ts.NM(2, 4), ts.NM(1, 4), ts.NM(2, 3), ts.NM(5, 12), ts.NM(16, 24), TRANSPOSABLE]


def config(pattern, target=None, importance="abs", **arguments):
    most = 0.5 if pattern == TRANSPOSABLE else (pattern.m - pattern.n) / pattern.m
    schedule = ts.PolynomialSchedule(
        target_level=most if target is None else target, target_epoch=4, power=1.0
    )
    return ts.MagnitudeSparsityConfig(
        pattern=pattern, schedule=schedule, weight_importance=importance, **arguments
    )


def build(pattern, seed=0, **arguments):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(48, 8, bias=False))
    return model, ts.create_controller(model, config(pattern, **arguments))


def masks(controller):
    return [info.operand.binary_mask for info in controller.sparsified_module_info]


def pruned(controller):
    return [info.operand.pruned_elements() for info in controller.sparsified_module_info]


def want_masks(weights, pattern, level, scales=None):
    """Prune the tuples that lose the least, each to N:M; of equal ones the last in order."""
    full, losses = [], []
    for weight in weights:
        if pattern.transposable:
            full.append(oracle.transposable_mask(weight))
        else:
            full.append(oracle.nm_mask(weight, pattern.n, pattern.m))
        losses.append(oracle.group_sums(np.abs(weight) * ~full[-1], *pattern.group))
    groups = sum(loss.size for loss in losses)
    share = min(level / ((pattern.m - pattern.n) / pattern.m), 1)
    whole = oracle.exact_masks(losses, round(share * groups), scales)
    return [
        mask | np.kron(kept, np.ones(pattern.group, bool))
        for mask, kept in zip(full, whole, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_at_every_level_the_tuples_that_lose_the_least_are_pruned(pattern, dtype):
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(48, 8, bias=False)).to(dtype)
    rng = np.random.default_rng(0)
    weights = [rng.integers(-4, 5, layer.weight.shape).astype(np.float32) for layer in model]
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
    controller = ts.create_controller(model, config(pattern))
    addresses = [info.operand.mask.data_ptr() for info in controller.sparsified_module_info]
    most = controller.scheduler.target_level
    for level in (0.2 * most, 0.55 * most, most, 0.0):
        controller.set_sparsity_level(level)
        want = want_masks(weights, pattern, level)
        for got, mask in zip(masks(controller), want, strict=True):
            assert np.array_equal(got.numpy(), mask)
        zeros = sum(int((~mask).sum()) for mask in want)
        assert sum(pruned(controller)) == zeros
        assert controller.mask_level() == zeros / 768
    assert [i.operand.mask.data_ptr() for i in controller.sparsified_module_info] == addresses


def test_normed_importance_decides_between_weights_and_not_within():
    model, controller = build(ts.NM(2, 4), importance="normed_abs")
    with torch.no_grad():
        model[2].weight *= 100  # to which the norm is blind
    controller.set_sparsity_level(0.25)
    weights = [info.weight.detach().numpy() for info in controller.sparsified_module_info]
    scales = [np.float32(1) / np.linalg.norm(weight) for weight in weights]
    want = want_masks(weights, ts.NM(2, 4), 0.25, np.array(scales))
    assert all(np.array_equal(a, b) for a, b in zip(masks(controller), want, strict=True))
    assert min(pruned(controller)) > 50


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_schedule_ends_at_full_n_m(pattern):
    model, controller = build(pattern)
    levels, stages = [], []
    for _ in range(6):
        controller.scheduler.epoch_step()
        levels.append(controller.mask_level())
        stages.append(controller.compression_stage())
    most = controller.scheduler.target_level
    assert levels == pytest.approx([0, most / 4, most / 2, 3 * most / 4, most, most], abs=0.03)
    assert levels[4] == controller.compression_rate == pytest.approx(most)
    uncompressed, partially, fully = ts.CompressionStage
    assert stages == [uncompressed, *[partially] * 3, fully, fully]
    for layer in (model[0], model[2]):
        zeros = controller.strip()[0 if layer is model[0] else 2].weight == 0
        tuples = zeros.reshape(zeros.shape[0], -1, pattern.m).sum(2)
        assert (tuples == pattern.m - pattern.n).all()


@pytest.mark.parametrize("pattern", [ts.NM(2, 4), ts.NM(2, 3), TRANSPOSABLE], ids=str)
def test_a_level_above_1_minus_n_over_m_is_refused_and_says_so(pattern):
    _, controller = build(pattern)
    most = controller.scheduler.target_level
    controller.set_sparsity_level(most / 2)
    before = masks(controller)
    for target in (None, controller.sparsified_module_info[0]):
        with pytest.raises(ValueError, match=rf"at most 1 - n/m = {most:g} .*{pattern}, got 0.7"):
            controller.set_sparsity_level(0.7, target)
    with pytest.raises(ValueError, match=r"at most 1 - n/m"):
        controller.compression_rate = 0.7
    assert all(torch.equal(a, b) for a, b in zip(masks(controller), before, strict=True))
    everywhere = ts.Override(scope="*", pattern=pattern)
    with pytest.raises(ValueError, match=r"target_level must be at most 1 - n/m"):
        ts.create_controller(
            nn.Sequential(nn.Linear(12, 12)),
            ts.MagnitudeSparsityConfig(
                schedule=ts.PolynomialSchedule(target_level=0.8), overrides=[everywhere]
            ),
        )


def test_beside_weights_that_go_further_n_m_stops_at_its_own_level():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    controller = ts.create_controller(
        model,
        ts.MagnitudeSparsityConfig(
            schedule=ts.PolynomialSchedule(target_level=0.75, target_epoch=1),
            overrides=[ts.Override(scope="1", pattern=ts.NM(2, 4))],
        ),
    )
    controller.scheduler.epoch_step(1)
    assert pruned(controller) == [192, 128]
    assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED
    controller.set_sparsity_level(0.25)
    assert pruned(controller) == [64, 64]


@pytest.mark.parametrize(
    ("limits", "counts"),
    [
        ({"maximum_level": 0.125}, [48, 144]),
        ({"maximum_level": 0.4}, [154, 38]),
        ({"minimum_level": 0.2}, [192, 0]),
    ],
)
def test_limits_hold_within_a_pool_of_n_m(limits, counts):
    def scaled(factor):
        model, controller = build(
            ts.NM(2, 4), target=0.25, overrides=[ts.Override(scope="0", **limits)]
        )
        with torch.no_grad():
            model[0].weight *= factor
        controller.set_sparsity_level(0.25)
        return controller

    # of which without limits all is pruned first
    assert pruned(scaled(1e-3)) == counts
    # the floor lifts what the pool would leave
    controller = scaled(1e3)
    least = round(limits.get("minimum_level", 0) / 0.5 * 96) * 2
    assert pruned(controller) == [least, 192 - least]
    if "maximum_level" in limits:
        with pytest.raises(ValueError, match=r"level 0.5 cannot be reached within the limits"):
            controller.set_sparsity_level(0.5)


def test_a_target_between_two_counts_of_groups_is_reached():
    model = nn.Linear(8, 8)
    controller = ts.create_controller(model, config(TRANSPOSABLE, target=0.3))
    controller.scheduler.epoch_step(4)
    # 0.6 of 4 tiles is 2 of them, 16 elements of the 19 that 0.3 would be
    assert pruned(controller) == [16]
    assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED
    controller.set_sparsity_level(0.1)
    assert controller.compression_stage() == ts.CompressionStage.PARTIALLY_COMPRESSED


def test_local_levels_touch_one_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(24, 16))
    local = ts.MagnitudeSparsityConfig(
        pattern=ts.NM(1, 3), sparsity_level_setting_mode="local", schedule=None
    )
    controller = ts.create_controller(model, local)
    controller.set_sparsity_level(2 / 3, controller.sparsified_module_info[1])
    assert pruned(controller) == [0, 256]
    assert controller.current_sparsity_level == pytest.approx(1 / 3)


def test_statistics_count_elements():
    _, controller = build(ts.NM(1, 4))
    controller.set_sparsity_level(0.75)
    statistics = controller.statistics()
    model = statistics.magnitude_sparsity.model_statistics
    assert model.sparsity_level_for_layers == 0.75
    for layer in model.sparsified_layers_summary:
        assert (layer.pattern, layer.sparsity_level, layer.threshold) == ("1:4", 0.75, None)
        assert layer.pruned_elements == layer.pruned_groups == 0.75 * layer.groups
    assert "1:4" in statistics.to_str()
    controller.set_sparsity_level(0.25)
    layers = controller.statistics().magnitude_sparsity.model_statistics.sparsified_layers_summary
    assert all(layer.threshold > 0 for layer in layers)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", [0.25, 0.5])
@pytest.mark.parametrize("pattern", [ts.NM(2, 4), TRANSPOSABLE], ids=str)
def test_nonfinite_weights_name_the_module_and_leave_the_masks(pattern, level, bad):
    model, controller = build(pattern)
    controller.set_sparsity_level(0.4)
    before = masks(controller)
    with torch.no_grad():
        model[2].weight[tuple(before[1].nonzero()[0])] = bad
    with pytest.raises(ValueError, match="'2' holds NaN or Inf"):
        controller.set_sparsity_level(level)
    assert all(torch.equal(a, b) for a, b in zip(masks(controller), before, strict=True))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (ts.NM(2, 5), r"in_features of '0' must be divisible by 5 for 2:5, got 24"),
        (TRANSPOSABLE, r"out_features of '0' must be divisible by 4 for 2:4 trans.*, got 18"),
    ],
    ids=str,
)
def test_weights_that_the_pattern_does_not_divide_are_named(pattern, message):
    model = nn.Sequential(nn.Linear(24, 18))
    with pytest.raises(ValueError, match=message):
        ts.create_controller(model, config(pattern))
    assert type(model[0]) is nn.Linear


def train(model, controller, optimizer, epochs, steps=2):
    for epoch in epochs:
        controller.scheduler.epoch_step()
        for step in range(steps):
            controller.scheduler.step()
            generator = torch.Generator().manual_seed(100 * epoch + step)
            x = torch.randn(4, 24, generator=generator)
            optimizer.zero_grad()
            model[2](torch.cat([model[:2](x)] * 3, 1)).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_resumed_run_is_bit_identical(pattern, tmp_path):
    model, controller = build(pattern)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, controller, optimizer, range(2))
    torch.save(
        (model.state_dict(), optimizer.state_dict(), controller.get_state()), tmp_path / "state"
    )
    train(model, controller, optimizer, range(2, 6))

    twin, resumed = build(pattern, seed=1)
    other = torch.optim.AdamW(twin.parameters(), lr=0.05)
    weights, moments, state = torch.load(tmp_path / "state", weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(moments)
    resumed.load_state(state)
    train(twin, resumed, other, range(2, 6))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(masks(controller), masks(resumed), strict=True))


def test_a_state_whose_mask_is_no_n_m_is_refused():
    _, controller = build(ts.NM(1, 4))
    controller.set_sparsity_level(0.75)
    state = copy.deepcopy(controller.get_state())
    state["magnitude_sparsity"]["weights"]["2"]["mask"][0, 0] |= 0b0110
    before = masks(controller)
    with pytest.raises(ValueError, match=r"mask of '2' must be 1:4"):
        controller.load_state(state)
    assert all(torch.equal(a, b) for a, b in zip(masks(controller), before, strict=True))


def test_zeros_follow_deep_copies():
    model, controller = build(ts.NM(2, 4))
    controller.set_sparsity_level(0.5)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 24)
    assert torch.equal(twin[0](x), model[0](x))
    before = twin[0].weight == 0
    controller.set_sparsity_level(0.0)
    assert torch.equal(twin[0].weight == 0, before)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_binary_mask_takes_what_the_pattern_allows(pattern, transposed):
    layer = nn.Linear(24, 24, bias=False)
    weight = layer.weight
    operand = SparseWeight(Target("0", ((layer, "weight"),), pattern, transposed))
    address = operand.mask.data_ptr()
    array = weight.detach().numpy().T if transposed else weight.detach().numpy()
    (want,) = want_masks([array], pattern, 1 - pattern.n / pattern.m)
    mask = torch.from_numpy(want.T if transposed else want)
    operand.binary_mask = mask
    assert torch.equal(operand.binary_mask, mask)
    assert operand.mask.data_ptr() == address
    assert (weight[~mask] == 0).all()
    assert (weight[mask] != 0).all()
    row, col = (mask.T if transposed else mask)[:, :].logical_not().nonzero()[0].tolist()
    one_more = mask.clone()
    one_more[(col, row) if transposed else (row, col)] = True
    if pattern.m - pattern.n > 1:
        with pytest.raises(
            ValueError, match=rf"must keep no more of any group of '0' than {pattern}"
        ):
            operand.binary_mask = one_more
        assert torch.equal(operand.binary_mask, mask)
    operand.binary_mask = torch.zeros_like(mask)
    assert operand.pruned_elements() == 24 * 24


def test_columns_of_a_transposable_mask_count_too():
    layer = nn.Linear(4, 4)
    operand = SparseWeight(Target("0", ((layer, "weight"),), TRANSPOSABLE))
    mask = torch.tensor([[True, True, False, False]] * 4)
    with pytest.raises(ValueError, match="2:4 transposable"):
        operand.binary_mask = mask
    SparseWeight(Target("0", ((layer, "weight"),), ts.NM(2, 4))).binary_mask = mask


def test_convolutions_are_seen_as_matrices():
    model = nn.Conv2d(4, 8, 3)
    controller = ts.create_controller(model, config(ts.NM(2, 4)))
    controller.set_sparsity_level(0.5)
    (mask,) = masks(controller)
    assert (mask.flatten(1).reshape(8, 9, 4).sum(2) == 2).all()


WITHOUT_NM = {
    ts.RBSparsityConfig: {},
    ts.MovementSparsityConfig: {
        "warmup_start_epoch": 1,
        "warmup_end_epoch": 2,
        "importance_regularization_factor": 0.1,
    },
    ts.SETConfig: {"level": 0.5, "t_end": 200},
    ts.RigLConfig: {"level": 0.5, "t_end": 200},
}


@pytest.mark.parametrize("algorithm", WITHOUT_NM)
def test_algorithms_that_do_not_choose_within_tuples_refuse_n_m(algorithm):
    settings = WITHOUT_NM[algorithm]
    assert algorithm(**settings).pattern == ts.Unstructured()
    message = r"must be Unstructured\(\) or Block\(rows, cols\), got NM\(n=2, m=4"
    with pytest.raises(ValueError, match=f"pattern {message}"):
        algorithm(**settings, pattern=ts.NM(2, 4))
    with pytest.raises(ValueError, match=f"overrides {message}"):
        algorithm(**settings, overrides=[ts.Override(scope="0", pattern=ts.NM(2, 4))])


def test_an_nncf_dictionary_spells_n_m():
    model = nn.Sequential(nn.Linear(12, 4))
    controller = ts.create_controller(
        model,
        {
            "algorithm": "magnitude_sparsity",
            "params": {"pattern": {"nm": [1, 3]}, "sparsity_target": 2 / 3},
        },
    )
    controller.set_sparsity_level(2 / 3)
    assert pruned(controller) == [32]
