"""A whole update of a model's masks: how many launches it takes, and how often the host waits."""

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.kernels.launch import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="counts launches in the interpreter")

PATTERNS = [ts.Block(16, 16), ts.Unstructured()]


def model(layers):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(32 + 16 * (i % 2), 48 - 16 * (i % 2), bias=False) for i in range(layers))
    )


def update(layers, config, monkeypatch):
    """Return the launches of an update and what the host read, by name."""
    interface = __import__("triton.runtime.jit", fromlist=["KernelInterface"]).KernelInterface
    controller = ts.create_controller(model(layers), config)
    controller.set_sparsity_level(0.5)
    launches, reads = [], []
    with monkeypatch.context() as patch:
        launch = interface.__getitem__

        def counted(self, grid):
            launches.append(self.fn.__name__)
            return launch(self, grid)

        patch.setattr(interface, "__getitem__", counted)
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__"):
            read = getattr(torch.Tensor, name)

            def noted(self, *args, read=read, name=name):
                reads.append(name)
                return read(self, *args)

            patch.setattr(torch.Tensor, name, noted)
        controller.set_sparsity_level(2 / 3)
    for info in controller.sparsified_module_info:
        assert not info.weight[~info.operand.binary_mask].any()
    pruned = sum(i.operand.pruned_groups() for i in controller.sparsified_module_info)
    groups = sum(i.operand.groups for i in controller.sparsified_module_info)
    assert pruned == round(2 / 3 * groups)
    return launches, reads


@pytest.mark.parametrize(
    ("pattern", "pool"),
    [(PATTERNS[0], "weight"), (PATTERNS[0], "global"), (PATTERNS[1], "global")],
    ids=str,
)
def test_launches_do_not_grow_with_the_model(pattern, pool, monkeypatch):
    config = ts.MagnitudeSparsityConfig(pattern=pattern, pool=pool)
    few, _ = update(2, config, monkeypatch)
    many, reads = update(5, config, monkeypatch)
    # of which five are for norms, two of them as lines are as short as these
    assert len(few) == len(many) <= 23, many
    # leaks, which on a GPU were copied before, and the new masks' counts
    assert reads == ["tolist", "tolist"]


def test_a_refused_update_changes_nothing():
    controller = ts.create_controller(
        model(3), ts.MagnitudeSparsityConfig(pattern=ts.Block(16, 16))
    )
    controller.set_sparsity_level(0.5)
    infos = controller.sparsified_module_info
    with torch.no_grad():
        infos[1].weight[infos[1].operand.binary_mask] = float("nan")
    before = [(i.operand.mask.clone(), i.weight.detach().clone()) for i in infos]
    with pytest.raises(ValueError, match="the weight of '1' holds NaN or Inf"):
        controller.set_sparsity_level(0.75)
    for info, (mask, weight) in zip(infos, before, strict=True):
        assert torch.equal(info.operand.mask, mask)
        assert torch.allclose(info.weight, weight, equal_nan=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_groups_that_move_keep_every_count(pattern):
    config = ts.SETConfig(pattern=pattern, level=0.5, t_end=100, delta_t=2, alpha=0.5)
    controller = ts.create_controller(model(3), config)
    kept = [info.operand.kept for info in controller.sparsified_module_info]
    before = [info.operand.mask.clone() for info in controller.sparsified_module_info]
    for _ in range(3):
        controller.scheduler.step()
    infos = controller.sparsified_module_info
    assert [info.operand.kept for info in infos] == kept
    assert [int(info.operand.kept_grid().sum()) for info in infos] == kept
    assert any(not torch.equal(i.operand.mask, m) for i, m in zip(infos, before, strict=True))
