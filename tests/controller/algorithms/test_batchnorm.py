import pytest
import torch
from torch import nn

import triton_sparsity as ts

ADAPTATION = ts.BatchNormAdaptation(num_bn_adaptation_samples=64)
MAGNITUDE = ts.MagnitudeSparsityConfig(
    schedule=ts.PolynomialSchedule(initial_level=0.5),
    batchnorm_adaptation=ADAPTATION,
)
RB = ts.RBSparsityConfig(batchnorm_adaptation=ADAPTATION)
MOVEMENT = ts.MovementSparsityConfig(
    warmup_start_epoch=0,
    warmup_end_epoch=1,
    importance_regularization_factor=0.1,
    steps_per_epoch=4,
    batchnorm_adaptation=ADAPTATION,
)
LEARNED = pytest.mark.parametrize("config", [RB, MOVEMENT], ids=lambda config: config.algorithm)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def batches():
    return list(torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(1)))


def learning(controller):
    return [info.operand.learning for info in controller.sparsified_module_info]


@LEARNED
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:at level 0.3 these weights are pruned to nothing")
def test_learned_masks_go_on_as_they_were(config, training):
    model = net().train(training)
    controller = ts.create_controller(model, config, batchnorm_data=batches())
    controller.set_sparsity_level(0.3, run_batchnorm_adaptation=True)
    assert learning(controller) == [training] * len(controller.sparsified_module_info)


@LEARNED
@pytest.mark.filterwarnings("ignore:at level 0.3 these weights are pruned to nothing")
def test_a_failing_forward_lets_learned_masks_go_on(config):
    model = net()
    controller = ts.create_controller(model, config, batchnorm_data=[torch.randn(3, 5)])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        controller.set_sparsity_level(0.3, run_batchnorm_adaptation=True)
    assert all(learning(controller))


@LEARNED
def test_another_algorithms_adaptation_lets_learned_masks_go_on(config):
    learned = config.model_copy(update={"target_scopes": ("0",), "batchnorm_adaptation": None})
    magnitude = MAGNITUDE.model_copy(update={"target_scopes": ("2",)})
    model = net()
    controller = ts.create_controller(model, [learned, magnitude], batchnorm_data=batches())
    part = controller.controllers[config.algorithm]
    assert all(learning(part))


def test_movement_adapts_once_to_the_masks_that_it_ends_with():
    model = net()
    controller = ts.create_controller(model, MOVEMENT, batchnorm_data=batches())
    with torch.no_grad():
        for scores in controller.parameters():
            scores.normal_()
    controller.scheduler.epoch_step()
    for _ in range(4):
        controller.scheduler.step()
        assert model[1].num_batches_tracked == 0
    controller.scheduler.step()
    assert controller.frozen
    assert controller.sparsified_module_info[0].operand.pruned_groups() > 0
    with torch.no_grad():
        want = torch.stack([model[0](batch).mean(0) for batch in batches()]).mean(0)
    torch.testing.assert_close(model[1].running_mean, want)
    model[1].running_mean.zero_()
    controller.scheduler.step()
    assert not model[1].running_mean.any()
