"""Which weights are masked, and what is refused before anything has changed."""

import re
import warnings

import pytest
import torch
from torch import nn

import triton_sparsity as ts

DENSE = ts.MagnitudeSparsityConfig()


def names(controller):
    return [info.module_node_name for info in controller.sparsified_module_info]


def net():
    return nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)),
            "norm": nn.LayerNorm([4, 8]),
            "head": nn.Linear(32, 10),
        }
    )


@pytest.mark.parametrize(
    ("scopes", "expected"),
    [
        ({}, ["body.0", "body.2", "head"]),
        ({"ignored_scopes": ("head",)}, ["body.0", "body.2"]),
        ({"target_scopes": ("body",)}, ["body.0", "body.2"]),
        ({"target_scopes": ("body.*",), "ignored_scopes": ("{re}.*2",)}, ["body.0"]),
    ],
)
def test_scopes_choose_the_targets(scopes, expected):
    assert names(ts.create_controller(net(), ts.MagnitudeSparsityConfig(**scopes))) == expected


@pytest.mark.parametrize("field", ["target_scopes", "ignored_scopes"])
def test_a_scope_that_matches_nothing_is_named(field):
    model = net()
    with pytest.raises(ValueError, match=rf"{field}.*tail"):
        ts.create_controller(model, ts.MagnitudeSparsityConfig(**{field: ("tail",)}))
    assert type(model["head"]) is nn.Linear


def test_nncf_dictionary_is_taken_as_it_is():
    controller = ts.create_controller(
        net(),
        {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.25,
            "ignored_scopes": ["head"],
            "params": {
                "schedule": "multistep",
                "multistep_steps": [2],
                "multistep_sparsity_levels": [0.3, 0.6],
            },
        },
    )
    assert names(controller) == ["body.0", "body.2"]
    assert controller.mask_level() == 0.25
    controller.scheduler.epoch_step()
    assert controller.current_sparsity_level == 0.3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"algorithm": "magic"}, "magic"),
        ({"algorithm": "magnitude_sparsity", "parms": {}}, "parms"),
        ({"algorithm": "magnitude_sparsity", "params": {"pattern": "hexagonal"}}, "hexagonal"),
    ],
)
def test_unknown_names_in_a_dictionary_are_shown(config, message):
    with pytest.raises(ValueError, match=message):
        ts.create_controller(net(), config)


def test_one_controller_a_model():
    model = net()
    ts.create_controller(model, DENSE)
    with pytest.raises(ValueError, match=r"'body.0' is under the masks of another controller"):
        ts.create_controller(model, DENSE)


class TestState:
    CONFIG = ts.MagnitudeSparsityConfig(pattern=ts.Block(8, 8), pool="weight")

    def saved(self):
        """A state with the weights that it goes with."""
        model = net()
        controller = ts.create_controller(model, self.CONFIG)
        controller.set_sparsity_level(0.5)
        return controller.get_state(), model.state_dict()

    def test_masks_come_with_it(self):
        state, weights = self.saved()
        model = net()
        model.load_state_dict(weights)
        controller = ts.create_controller(model, self.CONFIG, state=state)
        assert controller.compression_rate == pytest.approx(0.5, abs=0.02)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name])
        for info in controller.sparsified_module_info:
            assert torch.equal(info.operand.binary_mask, (info.weight != 0).float())

    def test_its_weights_are_the_targets_even_one_that_is_zero_by_now(self):
        state, weights = self.saved()
        model = net()
        model.load_state_dict(weights)
        model["body"][2].weight.detach().zero_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller = ts.create_controller(model, self.CONFIG, state=state)
        assert names(controller) == ["body.0", "body.2", "head"]

    def test_one_of_another_model_is_refused_and_the_model_is_as_it_was(self):
        state, _ = self.saved()
        other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        before = {name: weight.clone() for name, weight in other.state_dict().items()}
        with pytest.raises(ValueError, match="load_state: state"):
            ts.create_controller(other, self.CONFIG, state=state)
        assert all(torch.equal(weight, before[name]) for name, weight in other.named_parameters())
        assert {type(module) for module in other} == {nn.Linear}
        ts.create_controller(other, self.CONFIG)  # it has no controller


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64], ids=str)
def test_integer_and_complex_weights_are_refused(dtype):
    model = net()
    model["head"].weight = nn.Parameter(torch.ones(10, 32, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=rf"'head' must have a floating-point weight, got {dtype}"):
        ts.create_controller(model, DENSE)
    assert type(model["body"][0]) is nn.Linear


def test_a_block_larger_than_the_weight_is_refused():
    config = ts.MagnitudeSparsityConfig(pattern=ts.Block(16, 16))
    with pytest.raises(
        ValueError, match=re.escape("block 16x16 is larger than the weight of 'head', (10, 32)")
    ):
        ts.create_controller(net(), config)


def test_a_smaller_pattern_for_one_weight_makes_it_fit():
    config = ts.MagnitudeSparsityConfig(
        pattern=ts.Block(16, 16), overrides=(ts.Override(scope="head", pattern=ts.Block(2, 16)),)
    )
    controller = ts.create_controller(net(), config)
    assert str(controller.sparsified_module_info[-1].operand.pattern) == "block 2x16"


def test_nonfinite_weights_leave_the_model_as_it_was():
    model = net()
    with torch.no_grad():
        model["head"].weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    half = ts.MagnitudeSparsityConfig(
        schedule=ts.PolynomialSchedule(initial_level=0.4, target_level=0.5)
    )
    with pytest.raises(ValueError, match="'head' holds NaN or Inf"):
        ts.create_controller(model, half)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    for module in model.modules():
        assert not module._load_state_dict_post_hooks
        assert not module._forward_pre_hooks
    assert model["head"].weight._post_accumulate_grad_hooks is None or not (
        model["head"].weight._post_accumulate_grad_hooks
    )


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="no weight to sparsify"):
        ts.create_controller(nn.ReLU(), DENSE)


def test_meta_and_lazy_weights_are_refused():
    with pytest.raises(ValueError, match="meta device"):
        ts.create_controller(nn.Linear(4, 4, device="meta"), DENSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(4)
    with pytest.raises(ValueError, match="uninitialised"):
        ts.create_controller(lazy, DENSE)


class Bare(nn.Module):
    """Uses a parameter of its own in a function."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Parameter(torch.randn(8, 8))
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x @ self.proj.T)


def test_a_weight_that_is_not_covered_is_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"left dense.*\['proj'\]"):
        controller = ts.create_controller(Bare(), DENSE)
    assert names(controller) == ["fc"]


def test_a_weight_that_is_ignored_is_not_warned_about():
    controller = ts.create_controller(Bare(), ts.MagnitudeSparsityConfig(ignored_scopes=("proj",)))
    assert names(controller) == ["fc"]


def test_a_parameter_named_by_a_scope_is_masked_wherever_it_is_used():
    model = Bare()
    config = ts.MagnitudeSparsityConfig(
        target_scopes=("proj",),
        schedule=ts.PolynomialSchedule(initial_level=0.5, target_level=0.5),
    )
    controller = ts.create_controller(model, config)
    assert names(controller) == ["proj"]
    x = torch.randn(3, 8)
    mask = controller.sparsified_module_info[0].operand.binary_mask
    torch.testing.assert_close(model(x), model.fc(x @ (model.proj * mask).T))


def test_frozen_parameters_are_masked_with_a_warning():
    model = net()
    model["head"].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"frozen.*\['head'\]"):
        controller = ts.create_controller(model, DENSE)
    assert "head" in names(controller)


def test_a_tied_weight_is_left_dense_when_one_of_its_names_is_ignored():
    model = nn.ModuleDict(
        {"wte": nn.Embedding(8, 4), "head": nn.Linear(4, 8), "fc": nn.Linear(4, 4)}
    )
    model["head"].weight = model["wte"].weight
    controller = ts.create_controller(model, ts.MagnitudeSparsityConfig(ignored_scopes=("wte",)))
    assert names(controller) == ["fc"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("triton_sparsity.kernels.launch.INTERPRET", False)
    model = net()
    with pytest.raises(RuntimeError, match="backend='triton' needs"):
        ts.create_controller(model, DENSE, backend="triton")
    assert type(model["head"]) is nn.Linear


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be"):
        ts.create_controller(net(), DENSE, backend="cudnn")


class TestBatchNorm:
    config = ts.MagnitudeSparsityConfig(
        ignored_scopes=("2",),
        schedule=ts.PolynomialSchedule(initial_level=0.5, target_level=0.5),
        batchnorm_adaptation=ts.BatchNormAdaptation(num_bn_adaptation_samples=64),
    )

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def test_statistics_are_those_of_the_masked_model(self):
        model = self.model().eval()
        batches = list(torch.randn(5, 32, 8))
        ts.create_controller(model, self.config, batchnorm_data=batches)
        with torch.no_grad():
            hidden = [model[0](batch) for batch in batches[:2]]
        want = torch.stack([h.mean(0) for h in hidden]).mean(0)
        torch.testing.assert_close(model[1].running_mean, want)
        assert not model.training
        assert model[1].momentum == 0.1

    def test_it_runs_on_request(self):
        model = self.model()
        batches = list(torch.randn(2, 32, 8))
        controller = ts.create_controller(model, self.config, batchnorm_data=batches)
        before = model[1].running_mean.clone()
        controller.set_sparsity_level(0.75)
        assert torch.equal(model[1].running_mean, before)
        controller.set_sparsity_level(0.75, run_batchnorm_adaptation=True)
        assert not torch.equal(model[1].running_mean, before)

    def test_it_needs_data(self):
        with pytest.raises(ValueError, match="batchnorm_data, got None"):
            ts.create_controller(self.model(), self.config)

    def test_no_data_puts_the_old_statistics_back(self):
        model = self.model()
        model[1].running_mean.fill_(7)
        with pytest.raises(ValueError, match="at least one batch"):
            ts.create_controller(model, self.config, batchnorm_data=[])
        assert (model[1].running_mean == 7).all()
        assert type(model[0]) is nn.Linear

    def test_asking_without_configuration_is_refused(self):
        controller = ts.create_controller(self.model(), DENSE)
        with pytest.raises(ValueError, match="needs batchnorm_adaptation"):
            controller.set_sparsity_level(0.5, run_batchnorm_adaptation=True)


def test_a_choice_of_paths_is_held_to_its_three_names():
    model = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="dispatch must be 'auto', 'sparse' or 'dense', got 1"):
        ts.create_controller(model, ts.MagnitudeSparsityConfig(), dispatch=1)
    assert type(model) is torch.nn.Linear


@pytest.mark.parametrize(("dispatch", "path"), [("sparse", "block-sparse"), ("dense", "dense")])
def test_the_statistics_tell_which_path_each_weight_takes(dispatch, path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Conv1d(64, 64, 1))
    config = ts.MagnitudeSparsityConfig(pattern=ts.Block(16, 16))
    controller = ts.create_controller(model, config, dispatch=dispatch)
    layers = controller.statistics().magnitude_sparsity.model_statistics.sparsified_layers_summary
    assert [layer.path for layer in layers] == [path, "dense"]
    assert path in controller.statistics().to_str()
