"""Several algorithms on one model: what adds, what fans out, what merges, what is refused."""

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.algorithms.loss import CompressionLoss

MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "target_scopes": ["body"],
    "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 2, "power": 1.0},
}
SET = {
    "algorithm": "set",
    "target_scopes": ["head"],
    "params": {"level": 0.75, "t_end": 100, "delta_t": 2, "pattern": {"block": [2, 2]}},
}
UNCOMPRESSED, PARTIALLY, FULLY = ts.CompressionStage


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4)})


def build(*configs):
    controller = ts.create_controller(net(), list(configs))
    controller.optimizer = torch.optim.SGD(controller.model.parameters(), lr=0.1)
    return controller


class Constant(CompressionLoss):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def calculate(self):
        return torch.tensor(self.value)


def test_dictionaries_and_objects_say_the_same():
    objects = [
        ts.MagnitudeSparsityConfig(
            target_scopes=("body",),
            schedule=ts.PolynomialSchedule(target_level=0.5, target_epoch=2, power=1.0),
        ),
        ts.SETConfig(
            target_scopes=("head",), level=0.75, t_end=100, delta_t=2, pattern=ts.Block(2, 2)
        ),
    ]
    for configs in ([MAGNITUDE, SET], objects):
        controller = build(*configs)
        assert list(controller.controllers) == ["magnitude_sparsity", "set"]
        assert [c.config for c in controller.controllers.values()] == objects
    whole = {"compression": [MAGNITUDE, SET], "ignored_scopes": ["nothing"]}
    with pytest.raises(ValueError, match="ignored_scopes must match"):
        ts.create_controller(net(), whole)


def test_a_weight_of_two_algorithms_is_named():
    model = net()
    everywhere = MAGNITUDE | {"target_scopes": ["*"]}
    with pytest.raises(ValueError, match=r"'head' must be masked by one algorithm, got magnitude"):
        ts.create_controller(model, [everywhere, SET])
    assert type(model["head"]) is type(model["body"]) is nn.Linear


def test_schedulers_fan_out_and_the_level_is_that_of_all_weights():
    controller = build(MAGNITUDE, SET)
    magnitude, dynamic = controller.controllers.values()
    assert controller.compression_stage() == PARTIALLY
    assert controller.compression_rate == 6 / 72  # 64 elements, none pruned, and 8 blocks
    for epoch in range(3):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
        assert magnitude.scheduler.current_epoch == epoch
        assert dynamic.scheduler.current_step == epoch
    assert controller.scheduler.current_epoch == controller.scheduler.current_step == 2
    assert magnitude.compression_rate == 0.5
    assert controller.compression_stage() == FULLY
    assert controller.compression_rate == controller.current_sparsity_level == (32 + 6) / 72
    controller.disable_scheduler()
    controller.scheduler.step()
    assert dynamic.scheduler.current_step == -1


def test_masks_are_drawn_anew_where_the_schedulers_are_disabled():
    rb = {"algorithm": "rb_sparsity", "params": {"pattern": {"block": [2, 2]}}}
    controller = build(MAGNITUDE, rb | {"target_scopes": ["head"]})
    controller.disable_scheduler()
    draws = []
    for _ in range(2):
        controller.scheduler.step()
        draws.append(controller.get_state()["rb_sparsity"]["algorithm_state"]["draw"])
    assert draws[1] == draws[0] + 1


def test_losses_add():
    controller = build(MAGNITUDE, SET)
    assert controller.loss() == 0
    for part, value in zip(controller.controllers.values(), (1.5, 2.0), strict=True):
        part._loss = Constant(value)
    assert ts.CompositeController(controller.model, [*controller.controllers.values()]).loss() == (
        3.5
    )


def test_statistics_and_state_have_an_entry_an_algorithm():
    controller = build(MAGNITUDE, SET)
    statistics = controller.statistics()
    assert statistics.magnitude_sparsity.target_sparsity_level == 0
    assert statistics.set.model_statistics.sparsity_level_for_layers == 0.75
    assert "magnitude_sparsity" in statistics.to_str()
    assert "block 2x2" in statistics.to_str()
    state = controller.get_compression_state()
    assert list(state["ctrl_state"]) == list(state["builder_state"])
    assert list(state["ctrl_state"]) == ["magnitude_sparsity", "set"]


def test_an_algorithm_may_be_there_twice():
    controller = build(MAGNITUDE, MAGNITUDE | {"target_scopes": ["head"]})
    assert list(controller.controllers) == ["magnitude_sparsity", "magnitude_sparsity_2"]
    controller.set_sparsity_level(0.5)
    assert vars(controller.statistics()).keys() == controller.get_state().keys()
    other = build(MAGNITUDE, MAGNITUDE | {"target_scopes": ["head"]})
    other.load_state(controller.get_state())
    assert other.compression_rate == 0.5


@pytest.mark.parametrize("bad", ["name", "masks"])
def test_a_state_that_does_not_fit_changes_nothing(bad):
    controller = build(MAGNITUDE, SET)
    state = controller.get_state()
    controller.scheduler.epoch_step(2)
    before = controller.get_state()
    if bad == "name":
        state["rigl"] = state.pop("set")
    else:
        state["set"]["weights"]["head"]["shape"] = [1, 1]
    with pytest.raises(ValueError, match="load_state"):
        controller.load_state(state)
    after = controller.get_state()
    for name in before:
        assert before[name]["scheduler_state"] == after[name]["scheduler_state"]
    assert controller.controllers["magnitude_sparsity"].compression_rate == 0.5


def test_a_level_is_set_everywhere_or_nowhere():
    zeros = ts.ConstSparsityConfig(target_scopes=("head",))
    model = net()
    nn.init.zeros_(model["head"].weight[:2])
    controller = ts.create_controller(model, [MAGNITUDE, zeros])
    with pytest.raises(RuntimeError, match="masks of const_sparsity never change"):
        controller.set_sparsity_level(0.5)
    assert controller.controllers["magnitude_sparsity"].compression_rate == 0
    body, head = controller.sparsified_module_info
    controller.set_sparsity_level(0.5, body)
    assert body.operand.pruned_groups() == 32
    assert head.operand.pruned_groups() == 16


def test_rigl_goes_on_from_a_refused_level_as_if_it_had_not_been_asked_for():
    def run(refused):
        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
        nn.init.zeros_(model["head"].weight[:2])
        rigl = ts.RigLConfig(target_scopes=("body",), level=0.5, t_end=100, delta_t=4)
        zeros = ts.ConstSparsityConfig(target_scopes=("head",))
        controller = ts.create_controller(model, [rigl, zeros])
        controller.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mask, moved = controller.sparsified_module_info[0].operand.binary_mask, []
        for step in range(10):
            controller.scheduler.step()
            now = controller.sparsified_module_info[0].operand.binary_mask
            if not torch.equal(mask, now):
                mask = now
                moved.append(step)
            if step == refused:
                with pytest.raises(RuntimeError, match="masks of const_sparsity never change"):
                    controller.set_sparsity_level(0.6)
            controller.optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            (model["head"](model["body"](x).tanh()) - x).square().sum().backward()
            controller.optimizer.step()
        return moved, mask

    moved, mask = run(refused=3)
    assert moved == [4, 8]
    assert torch.equal(mask, run(refused=None)[1])


def test_strip_folds_the_masks_of_all():
    controller = build(MAGNITUDE, SET)
    controller.scheduler.epoch_step(2)
    masks = [info.operand.binary_mask for info in controller.sparsified_module_info]
    stripped = controller.strip()
    for layer, mask in zip(stripped.values(), masks, strict=True):
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight != 0, mask)


def test_calibration_reaches_the_algorithms_that_need_it():
    wanda = MAGNITUDE | {"params": {"weight_importance": "wanda"}}
    controller = ts.create_controller(net(), [wanda, SET])
    with controller.calibration():
        controller.model["body"](torch.randn(5, 8))
    controller.controllers["magnitude_sparsity"].set_sparsity_level(0.5)
    with pytest.raises(ValueError, match="no algorithm has an importance"):
        build(MAGNITUDE, SET).calibration()
