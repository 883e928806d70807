"""The controller's surface, and where it differs from NNCF on purpose (one test a point)."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.algorithms.loss import ZeroCompressionLoss

NNCF_FORMATS = [ts.StripFormat.NATIVE, ts.StripFormat.DQ, ts.StripFormat.IN_PLACE]


def build(pattern=None, seed=0, **schedule):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    settings = {"target_level": 0.8, "target_epoch": 4, "power": 1.0} | schedule
    config = ts.MagnitudeSparsityConfig(
        pattern=pattern or ts.Unstructured(), schedule=ts.PolynomialSchedule(**settings)
    )
    return model, ts.create_controller(model, config)


def masks(controller):
    return [info.operand.binary_mask for info in controller.sparsified_module_info]


def train(model, controller, optimizer, epochs, steps=3):
    for epoch in epochs:
        controller.scheduler.epoch_step()
        for step in range(steps):
            controller.scheduler.step()
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * epoch + step))
            optimizer.zero_grad()
            (model(x).square().mean() + controller.loss()).backward()
            optimizer.step()


def test_the_surface_is_there():
    model, controller = build()
    assert isinstance(controller, ts.BaseSparsityAlgoController)
    assert controller.model is model
    assert controller.name == "magnitude_sparsity"
    assert isinstance(controller.loss, ZeroCompressionLoss)
    assert controller.loss() == 0
    assert controller.maximal_compression_rate == 1.0
    assert [i.module_node_name for i in controller.sparsified_module_info] == ["0", "2"]
    assert controller.sparsified_module_info[0].module is model[0]
    assert controller.distributed() is None


def test_level_zero_prunes_nothing():
    _, controller = build()
    controller.set_sparsity_level(0.0)
    assert all(mask.all() for mask in masks(controller))


@pytest.mark.parametrize(("level", "groups"), [(0.29, 100), (0.5, 7), (0.999, 64)])
def test_counts_are_exact(level, groups):
    model = nn.Linear(groups, 1)
    controller = ts.create_controller(model, ts.MagnitudeSparsityConfig())
    controller.set_sparsity_level(level)
    assert (~masks(controller)[0]).sum() == round(level * groups)


def test_current_level_is_the_scheduled_one_else_the_measured_one():
    _, controller = build()
    controller.scheduler.epoch_step()
    controller.scheduler.epoch_step()
    assert controller.current_sparsity_level == pytest.approx(0.2)
    controller.disable_scheduler()
    assert controller.current_sparsity_level == pytest.approx(0.2, abs=1 / 768)
    local = ts.create_controller(
        nn.Linear(10, 10),
        ts.MagnitudeSparsityConfig(sparsity_level_setting_mode="local", schedule=None),
    )
    local.set_sparsity_level(0.3, local.sparsified_module_info[0])
    assert local.current_sparsity_level == pytest.approx(0.3)


def test_the_stage_looks_at_the_masks():
    _, controller = build()
    stages = [controller.compression_stage()]
    for _ in range(5):
        controller.scheduler.epoch_step()
        stages.append(controller.compression_stage())
    uncompressed, partially, fully = ts.CompressionStage
    assert stages == [uncompressed, uncompressed, partially, partially, partially, fully]
    controller.set_sparsity_level(0.1)
    assert controller.compression_stage() == partially
    controller.disable_scheduler()
    assert controller.compression_stage() == partially


@pytest.mark.parametrize("kind", [ts.MagnitudeSparsityConfig, ts.RBSparsityConfig])
def test_without_a_schedule_too_nothing_pruned_is_uncompressed(kind):
    config = kind(sparsity_level_setting_mode="local", schedule=None)
    controller = ts.create_controller(nn.Linear(10, 10), config)
    uncompressed, _, fully = ts.CompressionStage
    assert controller.compression_stage() == uncompressed
    controller.set_sparsity_level(0.8)
    learned = kind is ts.RBSparsityConfig
    assert controller.compression_stage() == (uncompressed if learned else fully)


def test_compression_rate_reads_what_it_writes():
    _, controller = build()
    controller.compression_rate = 0.5
    assert controller.compression_rate == 0.5
    before = masks(controller)
    controller.scheduler.epoch_step()
    assert all(torch.equal(a, b) for a, b in zip(masks(controller), before, strict=True))


def test_a_refused_compression_rate_leaves_it_unfrozen():
    _, controller = build()
    with pytest.raises(ValueError, match="level must be in"):
        controller.compression_rate = 1.0
    controller.set_sparsity_level(0.5)
    assert controller.compression_rate == 0.5


def test_freezing_comes_after_the_level_of_that_epoch():
    _, controller = build(target_level=0.7, target_epoch=4, freeze_epoch=4)
    for _ in range(5):
        controller.scheduler.epoch_step()
    assert controller.mask_level() == pytest.approx(0.7, abs=1 / 768)
    assert controller.frozen


def test_frozen_masks_stay():
    _, controller = build()
    controller.set_sparsity_level(0.5)
    before = masks(controller)
    controller.freeze()
    controller.set_sparsity_level(0.75)
    assert all(torch.equal(a, b) for a, b in zip(masks(controller), before, strict=True))
    controller.freeze(False)
    controller.set_sparsity_level(0.75)
    assert controller.mask_level() == 0.75


def test_disable_scheduler_changes_nothing_from_then_on():
    _, controller = build()
    controller.scheduler.epoch_step(2)
    before = masks(controller)
    controller.disable_scheduler()
    for _ in range(3):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(masks(controller), before, strict=True))


@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 8)], ids=str)
@pytest.mark.parametrize("per_step", [False, True])
def test_a_resumed_run_is_bit_identical(pattern, per_step, tmp_path):
    schedule = {"update_per_optimizer_step": per_step, "steps_per_epoch": 3 if per_step else None}

    def start(seed):
        model, controller = build(pattern, seed, **schedule)
        return model, controller, torch.optim.AdamW(model.parameters(), lr=0.05)

    model, controller, optimizer = start(seed=0)
    train(model, controller, optimizer, range(2))
    torch.save(
        (model.state_dict(), optimizer.state_dict(), controller.get_state()), tmp_path / "state"
    )
    train(model, controller, optimizer, range(2, 6))

    twin, resumed, other = start(seed=1)
    weights, moments, state = torch.load(tmp_path / "state", weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(moments)
    resumed.load_state(state)
    train(twin, resumed, other, range(2, 6))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(masks(controller), masks(resumed), strict=True):
        assert torch.equal(a, b)
    assert resumed.scheduler.get_state() == controller.scheduler.get_state()


def test_the_frozen_flag_comes_back():
    _, controller = build()
    controller.freeze()
    _, twin = build(seed=1)
    twin.load_state(controller.get_state())
    assert twin.frozen


def test_masks_are_stored_at_one_bit_a_group():
    _, controller = build()
    weights = controller.get_state()["magnitude_sparsity"]["weights"]
    assert weights["0"]["mask"].shape == (32, 2)
    assert weights["0"]["mask"].dtype == torch.uint8


def other_version(state):
    state["magnitude_sparsity"]["version"] = 99


def other_model(state):
    state["magnitude_sparsity"]["weights"]["5"] = state["magnitude_sparsity"]["weights"].pop("2")


def other_pattern(state):
    state["magnitude_sparsity"]["weights"]["2"]["pattern"] = "block 4x4"


def other_shape(state):
    state["magnitude_sparsity"]["weights"]["2"]["shape"] = [8, 33]


def damaged_mask(state):
    saved = state["magnitude_sparsity"]["weights"]["2"]
    saved["mask"] = saved["mask"][:, :-1]


def other_algorithm(state):
    state["rb_sparsity"] = state.pop("magnitude_sparsity")


def no_scheduler(state):
    del state["magnitude_sparsity"]["scheduler_state"]


def bad_scheduler(state):
    state["magnitude_sparsity"]["scheduler_state"] = {"current_step": "one"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_version, r"\['version'\] must be 2, got 99"),
        (other_model, "of another model"),
        (other_pattern, r"\['2'\]\['pattern'\] must be 'unstructured', got 'block 4x4'"),
        (other_shape, r"\['2'\]\['shape'\] must be"),
        (damaged_mask, r"\['2'\]\['mask'\] must be torch.uint8 of shape"),
        (other_algorithm, "must have 'magnitude_sparsity'"),
        (no_scheduler, "must have 'scheduler_state'"),
        (bad_scheduler, "load_state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage, message):
    _, controller = build()
    controller.set_sparsity_level(0.5)
    controller.freeze()
    state = copy.deepcopy(controller.get_state())
    damage(state)
    _, other = build(seed=1)
    other.set_sparsity_level(0.25)
    before, schedule = masks(other), other.scheduler.get_state()
    with pytest.raises(ValueError, match=message):
        other.load_state(state)
    assert all(torch.equal(a, b) for a, b in zip(masks(other), before, strict=True))
    assert not other.frozen
    assert other.scheduler.get_state() == schedule


def test_compression_state_rebuilds_the_configuration():
    _, controller = build(ts.Block(4, 8))
    state = controller.get_compression_state()
    assert set(state) == {"builder_state", "ctrl_state"}
    config = ts.MagnitudeSparsityConfig.model_validate(
        state["builder_state"]["magnitude_sparsity"]
    )
    assert config == controller.config


def test_statistics_count_and_draw_every_layer():
    _, controller = build(ts.Block(4, 8))
    controller.set_sparsity_level(0.5)
    statistics = controller.statistics()
    part = statistics.magnitude_sparsity
    layers = part.model_statistics.sparsified_layers_summary
    assert [layer.groups for layer in layers] == [16, 8]
    assert sum(layer.pruned_groups for layer in layers) == 12
    assert part.model_statistics.sparsity_level_for_layers == 0.5
    zeros = sum((~mask).sum().item() for mask in masks(controller))
    total = sum(p.numel() for p in controller.model.parameters())
    assert part.model_statistics.sparsity_level == zeros / total
    drawn = statistics.to_str()
    for layer in layers:
        assert layer.name in drawn
        assert f"{layer.sparsity_level:.4f}" in drawn


def test_edge_blocks_count_the_elements_that_exist():
    model = nn.Linear(10, 6, bias=False)
    config = ts.MagnitudeSparsityConfig(pattern=ts.Block(4, 4), schedule=ts.PolynomialSchedule())
    controller = ts.create_controller(model, config)
    controller.set_sparsity_level(0.5)
    (layer,) = (
        controller.statistics().magnitude_sparsity.model_statistics.sparsified_layers_summary
    )
    assert layer.pruned_elements == (~masks(controller)[0]).sum()


def test_strip_by_default_leaves_the_model_and_strip_model_does_not():
    model, controller = build()
    controller.set_sparsity_level(0.5)
    stripped = controller.strip()
    assert stripped is not model
    assert all(type(layer) is nn.Linear for layer in (model[0], stripped[0]))
    controller.set_sparsity_level(0.6)
    assert controller.strip_model(model) is model
    assert type(model[0]) is nn.Linear
    with pytest.raises(RuntimeError, match="stripped"):
        controller.set_sparsity_level(0.7)
    with pytest.raises(ValueError, match="holds no masks"):
        controller.strip_model(model)


@pytest.mark.parametrize("strip_format", ["native", *NNCF_FORMATS])
def test_every_format_of_nncf_folds_the_masks(strip_format):
    model, controller = build()
    controller.set_sparsity_level(0.5)
    x = torch.randn(3, 16)
    torch.testing.assert_close(controller.strip(strip_format=strip_format)(x), model(x))


def test_an_unknown_strip_format_is_refused():
    _, controller = build()
    with pytest.raises(ValueError, match="zip"):
        controller.strip(strip_format="zip")


def test_an_unknown_target_is_refused():
    _, controller = build()
    _, other = build()
    with pytest.raises(ValueError, match="must be an entry of this controller's"):
        controller.set_sparsity_level(0.5, other.sparsified_module_info[0])


def test_prepare_for_export_strips_the_model_in_place():
    model, controller = build()
    controller.set_sparsity_level(0.5)
    controller.prepare_for_export()
    assert controller.model is model
    assert (model[0].weight == 0).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the exporter's own making
def test_export_writes_onnx_whose_outputs_are_the_masked_models(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, controller = build()
    controller.set_sparsity_level(0.5)
    x = torch.randn(3, 16)
    path = tmp_path / "model.onnx"
    controller.export_model(path, "onnx_18", ["x"], ["y"], (x, {}))
    (got,) = onnxruntime.InferenceSession(path).run(["y"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_format": "tflite", "model_args": (1, {})}, "save_format must be"),
        ({"model_args": None}, "model_args must be"),
        ({"model_args": (torch.ones(1),)}, "model_args must be"),
    ],
)
def test_export_arguments_of_another_form_are_refused(arguments, message, tmp_path):
    _, controller = build()
    with pytest.raises(ValueError, match=message):
        controller.export_model(tmp_path / "model.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_strip_before_the_target_tells_both_levels():
    _, controller = build()
    message = (
        r"magnitude_sparsity: strip at {}, before the schedule has reached its target of 80 %"
    )
    with pytest.warns(UserWarning, match=message.format("0 %")):
        controller.strip()
    controller.scheduler.epoch_step(1)
    with pytest.warns(UserWarning, match=r"strip at 20.05 %, .* 80 %; .*level\(0.8\)"):
        controller.strip()
    controller.scheduler.epoch_step(4)
    controller.strip()


def test_a_level_that_was_set_while_no_step_was_made_is_no_early_strip():
    _, controller = build()
    controller.set_sparsity_level(0.3)
    stripped = controller.strip()  # a warning would be an error
    zeros = sum(int((layer.weight == 0).sum()) for layer in stripped[::2])
    assert zeros == round(0.3 * (16 * 32 + 32 * 8))


def test_an_early_strip_is_told_of_the_algorithm_that_is_not_there_yet():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    late = ts.PolynomialSchedule(target_level=0.5, target_epoch=9)
    configs = [
        ts.ConstSparsityConfig(target_scopes=["0"]),
        ts.MagnitudeSparsityConfig(target_scopes=["1"], schedule=late),
    ]
    with pytest.warns(UserWarning, match="const_sparsity: no group"):
        controller = ts.create_controller(model, configs)
    with pytest.warns(UserWarning, match=r"magnitude_sparsity: strip at 0 %") as told:
        controller.strip()
    assert len(told) == 1


@pytest.mark.parametrize(
    "level", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)]
)
def test_scalars_of_numpy_and_torch_are_levels(level):
    found = ts.PolynomialSchedule(target_level=level, target_epoch=3).target_level
    assert (type(found), found) == (float, 0.5)
    steps = ts.MultistepSchedule(initial_level=level * 0, levels=(level,), steps=())
    assert steps.level(0, 0) == 0.5
    controller = ts.create_controller(nn.Linear(8, 8), ts.MagnitudeSparsityConfig())
    controller.set_sparsity_level(level)
    assert controller.compression_rate == 0.5


@pytest.mark.parametrize(
    "level", [True, np.bool_(True), torch.tensor(True), np.array([0.5]), "0.5"]
)
def test_what_is_no_number_is_no_level(level):
    with pytest.raises(ValueError, match="target_level must be a valid number"):
        ts.PolynomialSchedule(target_level=level, target_epoch=3)
    controller = ts.create_controller(nn.Linear(8, 8), ts.MagnitudeSparsityConfig())
    with pytest.raises(ValueError, match=r"level must be in \[0, 1\), got"):
        controller.set_sparsity_level(level)
