"""What a training step adds: as many launches for a hundred weights as for two."""

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.masks.guard import Guard
from triton_sparsity.kernels import group_mask as mask_module


class Homemade(torch.optim.AdamW):
    """No subclass is known to leave zeros alone."""


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize(
    ("optimizer", "launches"), [(torch.optim.AdamW, 1), (Homemade, 2)], ids=["AdamW", "other"]
)
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 4)], ids=str)
def test_a_step_clears_gradients_at_once_and_weights_at_once(
    monkeypatch, layers, optimizer, launches, pattern
):
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(layers)])
    config = ts.MagnitudeSparsityConfig(
        pattern=pattern,
        pool="weight",
        schedule=ts.PolynomialSchedule(initial_level=0.5, target_level=0.5),
    )
    controller = ts.create_controller(model, config)
    # as on a GPU: nobody looks at a gradient before the backward pass ends
    monkeypatch.setattr(Guard, "waits_for", staticmethod(lambda parameter: True))
    steps = optimizer(model.parameters(), lr=0.01)
    lists, clear = [], mask_module.apply_mask_

    def count(tensors, *rest, **options):
        lists.append(len(tensors))
        clear(tensors, *rest, **options)

    for step in range(4):
        controller.scheduler.step()
        steps.zero_grad()
        if step == 2:  # the first two clear the moments that the first has made
            monkeypatch.setattr(mask_module, "apply_mask_", count)
        model(torch.randn(4, 16)).square().sum().backward()
        for info in controller.sparsified_module_info:
            assert not info.weight.grad[~info.operand.binary_mask].any()
        steps.step()
        for info in controller.sparsified_module_info:
            assert not info.weight[~info.operand.binary_mask].any()
    assert lists == [layers] * launches * 2


def test_a_backward_pass_that_fails_leaves_none_behind(monkeypatch):
    monkeypatch.setattr(Guard, "waits_for", staticmethod(lambda parameter: True))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    schedule = ts.PolynomialSchedule(initial_level=0.5, target_level=0.5)
    controller = ts.create_controller(model, ts.MagnitudeSparsityConfig(schedule=schedule))
    fails = [True]

    def out_of_memory(gradient):
        if fails.pop():
            raise RuntimeError("out of memory")

    hidden = model[0](torch.randn(3, 8))
    hidden.register_hook(out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        model[1](hidden).sum().backward()
    for _ in range(2):
        model(torch.randn(3, 8)).square().sum().backward()
        for info in controller.sparsified_module_info:
            assert info.weight.grad.any()
            assert not info.weight.grad[~info.operand.binary_mask].any()
