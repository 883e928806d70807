"""What a scorer makes anew, and what it or others have in memory still."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import triton_sparsity as ts


def doubled(evidence):
    return 2 * evidence.weight


@pytest.mark.parametrize(
    ("importance", "stepped", "expected"),
    [
        ("abs", False, False),  # the weights themselves
        ("normed_abs", False, False),
        ("wanda", False, True),
        ("random", False, True),
        ("snip", False, True),
        ("snip", True, False),  # the products of the step
        ("snip_momentum", True, False),
        (doubled, False, False),  # a function may keep what it returns
    ],
)
def test_only_scores_that_nobody_has_are_written_over(importance, stepped, expected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    controller = ts.create_controller(
        model, ts.SETConfig(level=0.5, t_end=100, delta_t=50, weight_importance=importance)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with controller.calibration() if importance == "wanda" else nullcontext():
        model(torch.randn(4, 16)).square().sum().backward()
    controller.scheduler.step()
    if stepped:
        optimizer.step()
        controller.scheduler.step()
    weights, criterion = controller._weights, controller._criterion
    scores = criterion.scores(weights).tensors
    assert criterion.may_overwrite(weights, scores) is expected
