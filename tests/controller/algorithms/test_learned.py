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
