import pytest
import torch
from torch import distributed, nn

import triton_sparsity as ts

CONFIGS = [
    ts.RBSparsityConfig(seed=0),
    ts.MovementSparsityConfig(
        warmup_start_epoch=1,
        warmup_end_epoch=3,
        importance_regularization_factor=0.1,
        steps_per_epoch=4,
    ),
]


@pytest.fixture
def process_group():
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.algorithm)
def test_distributed_training_outlives_the_freeze(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    controller = ts.create_controller(model, config)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(steps):
        for _ in range(steps):
            controller.scheduler.step()
            optimizer.zero_grad()
            (wrapped(torch.randn(3, 8)).square().mean() + controller.loss()).backward()
            optimizer.step()

    train(3)
    controller.freeze()
    before = [scores.detach().clone() for scores in controller.parameters()]
    assert all(scores.any() for scores in before)
    train(3)
    assert all(map(torch.equal, before, controller.parameters()))
    controller.freeze(False)
    train(1)
    assert not any(map(torch.equal, before, controller.parameters()))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.algorithm)
def test_scores_that_are_not_finite_are_told_at_the_end_of_the_epoch(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    controller = ts.create_controller(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    controller.scheduler.epoch_step()
    for _ in range(4):
        controller.scheduler.step()
        (model(torch.randn(3, 8)).square().mean() + controller.loss()).backward()
        optimizer.step()
    with torch.no_grad():
        controller.parameters()[1].view(-1)[0] = torch.nan
    name = controller.sparsified_module_info[1].module_node_name
    with pytest.raises(ValueError, match=rf"scores of \['{name}'\] must be finite, got NaN"):
        controller.scheduler.epoch_step()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.algorithm)
def test_a_full_state_of_the_model_may_be_loaded_behind_the_controller(config):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    full = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    controller = ts.create_controller(model, config)
    scores = [own.detach().clone() for own in controller.parameters()]
    set_model_state_dict(model, dict(full), options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(model.state_dict()[name], full[name]) for name in full)
    assert all(map(torch.equal, scores, controller.parameters()))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(full | {"0.weight_scores": scores[0]})
