"""Constant sparsity: which zeros become masks, and that nothing brings them back."""

import pytest
import torch
from torch import nn

import triton_sparsity as ts

PATTERNS = [ts.Unstructured(), ts.Block(4, 8), ts.Block(16, 2), ts.NM(1, 6)]


def zeros_of(model):
    return [(p == 0) for p in model.parameters() if p.ndim > 1]


def pruned_model(pattern, level=0.75):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(18, 30), nn.GELU(), nn.Linear(30, 18))
    schedule = ts.PolynomialSchedule(initial_level=level, target_level=level)
    magnitude = ts.MagnitudeSparsityConfig(pattern=pattern, schedule=schedule)
    return ts.create_controller(model, magnitude).strip()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_after_magnitude_every_zero_stays_through_200_steps(pattern):
    model = pruned_model(pattern)
    zeros = zeros_of(model)
    controller = ts.create_controller(model, ts.ConstSparsityConfig(pattern=pattern))
    infos = controller.sparsified_module_info
    assert all(torch.equal(~i.operand.binary_mask, z) for i, z in zip(infos, zeros, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    before = [p.clone() for p in model.parameters()]
    for step in range(200):
        controller.scheduler.step()
        x = torch.randn(8, 18, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x).square().mean() + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(zeros_of(controller.strip()), zeros, strict=True))
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def test_momentum_from_before_cannot_bring_a_zero_back():
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.weight[:, ::2] = 0
    controller = ts.create_controller(model, ts.ConstSparsityConfig())
    x = torch.randn(4, 8)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert (model.weight[:, ::2] == 0).all()
    stripped = controller.strip()
    assert (stripped.weight[:, ::2] == 0).all()
    torch.testing.assert_close(stripped(x), model(x))


def test_a_block_is_masked_only_where_it_is_zero_as_a_whole():
    model = nn.Linear(10, 6, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[:4, :4] = 0
        model.weight[4:, 8:] = 0  # an edge block, 2 x 2
        model.weight[:4, 4:8] = 0
        model.weight[3, 7] = 1e-45  # the mean of this block would round to zero
    controller = ts.create_controller(model, ts.ConstSparsityConfig(pattern=ts.Block(4, 4)))
    (info,) = controller.sparsified_module_info
    assert info.operand.mask.tolist() == [[False, True, True], [True, True, False]]
    assert controller.compression_rate == 2 / 6
    assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED


def test_a_tuple_is_masked_only_where_it_is_n_m():
    model = nn.Linear(12, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 2, 0, 1, 2, 3, 0, 0, 0, 0, 4]]))
    controller = ts.create_controller(model, ts.ConstSparsityConfig(pattern=ts.NM(2, 4)))
    (info,) = controller.sparsified_module_info
    kept = [True, False, True, False, *[True] * 4, False, False, False, True]
    assert info.operand.binary_mask.tolist() == [kept]


def test_masks_come_from_a_state_too():
    source = ts.create_controller(pruned_model(ts.Unstructured()), ts.ConstSparsityConfig())
    with pytest.warns(UserWarning, match="no group of any target weight is zero"):
        controller = ts.create_controller(
            nn.Sequential(nn.Linear(18, 30), nn.GELU(), nn.Linear(30, 18)),
            ts.ConstSparsityConfig(),
        )
    controller.load_state(source.get_state())
    for a, b in zip(controller.sparsified_module_info, source.sparsified_module_info, strict=True):
        assert torch.equal(a.operand.binary_mask, b.operand.binary_mask)


def test_the_masks_never_change():
    controller = ts.create_controller(pruned_model(ts.Unstructured()), ts.ConstSparsityConfig())
    with pytest.raises(RuntimeError, match=r"masks of const_sparsity never change.* 0.5"):
        controller.set_sparsity_level(0.5)
    with pytest.raises(RuntimeError, match="never change"):
        controller.compression_rate = 0.5
    controller.freeze(False)
    assert controller.frozen
    assert controller.compression_rate == 0.75
