"""One weight and its mask."""

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.operand import MaskOperand

PATTERNS = [ts.Unstructured(), ts.Block(4, 4), ts.Block(1, 8)]


def halve(weight, pattern, **options):
    """An operand that keeps a checkerboard of groups."""
    operand = MaskOperand(weight, pattern, **options)
    down, across = operand.grid
    board = (torch.arange(down)[:, None] + torch.arange(across)) % 2 == 0
    operand.set_(ts.pack(board) if operand.packed else board, all_kept=False)
    return operand


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_binary_mask_goes_out_and_comes_in_again(pattern, transposed):
    weight = nn.Parameter(torch.randn(13, 17))
    mask = halve(weight, pattern, transposed=transposed).binary_mask
    assert mask.shape == weight.shape
    assert mask.dtype == torch.bool
    other = MaskOperand(weight, pattern, transposed=transposed)
    address = other.mask.data_ptr()
    other.binary_mask = mask
    assert torch.equal(other.binary_mask, mask)
    assert other.mask.data_ptr() == address
    torch.testing.assert_close(other.apply(weight), weight * mask)
    assert other.pruned_elements() == (~mask).sum()


def test_a_mask_that_parts_a_block_is_refused():
    operand = MaskOperand(torch.randn(8, 8), ts.Block(4, 4))
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[5, 5] = False
    with pytest.raises(ValueError, match="constant within every block 4x4"):
        operand.binary_mask = mask
    assert operand.binary_mask.all()
    with pytest.raises(ValueError, match="must have the weight's shape"):
        operand.binary_mask = mask[:4]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_nothing_behind_the_mask_comes_through(pattern, backend):
    weight = nn.Parameter(torch.randn(13, 17))
    operand = halve(weight, pattern, backend=backend)
    mask = operand.binary_mask
    with torch.no_grad():
        weight[~mask] = torch.nan
    masked = operand.apply(weight)
    assert torch.equal(masked, torch.where(mask, weight, 0.0))
    masked.sum().backward()
    assert torch.equal(weight.grad, mask.float())


def test_without_gradient_the_masked_weight_is_computed_once_until_something_changes():
    weight = nn.Parameter(torch.randn(8, 8))
    operand = halve(weight, ts.Unstructured())
    mask = operand.binary_mask
    with torch.no_grad():
        first = operand.apply(weight)
        assert operand.apply(weight) is first
        weight += 1
        second = operand.apply(weight)
        assert second is not first
        assert torch.equal(second, weight * mask)
        operand.binary_mask = ~mask
        assert torch.equal(operand.apply(weight), weight * ~mask)
        weight.data = torch.ones(8, 8)
        assert torch.equal(operand.apply(weight), (~mask).float())


def test_a_masked_weight_found_in_inference_mode_serves_training_of_other_parameters():
    weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    operand = halve(weight, ts.Unstructured())
    with torch.inference_mode():
        operand.apply(weight)
    x = torch.randn(2, 8, requires_grad=True)
    (x @ operand.apply(weight).T).sum().backward()
    assert x.grad is not None


def test_train_and_eval_forget_the_kept_weight_so_that_data_edits_are_seen():
    layer = nn.Linear(8, 8)
    ts.create_controller(
        layer,
        ts.MagnitudeSparsityConfig(
            schedule=ts.PolynomialSchedule(initial_level=0.5, target_level=0.5)
        ),
    )
    x = torch.ones(1, 8)
    with torch.no_grad():
        layer.eval()(x)
        layer.weight.data.mul_(2)
        layer.bias.zero_()
        got = layer.eval()(x)
        want = x @ (layer.weight * layer.operands["weight"].binary_mask).T
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fold_writes_zeros_into_any_layout(pattern, layout):
    weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    if layout == "channels_last":
        weight = nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
    operand = halve(weight, pattern)
    want = torch.where(operand.binary_mask, weight.detach(), 0.0)
    torch.testing.assert_close(operand.apply(weight).detach(), want)
    operand.fold_(weight)
    assert torch.equal(weight.detach(), want)


def test_a_weight_of_which_nothing_is_pruned_is_used_as_it_is():
    weight = nn.Parameter(torch.randn(8, 8))
    operand = MaskOperand(weight, ts.Unstructured())
    assert operand.apply(weight) is weight
