"""One weight and its mask."""

import copy
import pickle

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.masks.weight import MaskOperand
from triton_sparsity.kernels.dispatch import Paths

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


DENSE, SPARSE = Paths(False, False, False), Paths(True, True, True)


def linear_operand(dispatch="auto", pattern=None, shape=(512, 512), kept=0.1, **options):
    """A weight for ``linear``, of whose blocks the first ones are kept."""
    weight = nn.Parameter(torch.randn(shape))
    pattern = pattern or ts.Block(64, 64)
    operand = MaskOperand(weight, pattern, dispatch=dispatch, **options)
    operand.serve_linear()
    grid = torch.arange(operand.groups).view(operand.grid) < kept * operand.groups
    operand.set_(ts.pack(grid) if operand.packed else grid, all_kept=False)
    return operand, weight


@pytest.mark.parametrize("dispatch", ["sparse", "dense", "auto"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 4), ts.Block(32, 64)], ids=str)
def test_linear_is_the_product_with_the_masked_weight(pattern, transposed, dispatch):
    operand, weight = linear_operand(dispatch, pattern, transposed=transposed, kept=0.05)
    skips = isinstance(pattern, ts.Block) and pattern.rows > 4 and dispatch != "dense"
    assert operand.paths == (SPARSE if skips else DENSE)
    mask = operand.binary_mask
    x, bias = torch.randn(7, 512, requires_grad=True), torch.randn(512, requires_grad=True)
    with torch.no_grad():
        weight[~mask] = torch.nan
    y = operand.linear(x, weight, bias)
    folded = torch.where(mask, weight, 0.0).detach().requires_grad_()
    want = torch.nn.functional.linear(x, folded.T if transposed else folded, bias)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weight, bias), grad)
    dense = torch.autograd.grad(want, (x, folded, bias), grad)
    torch.testing.assert_close(got[0], dense[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], dense[1] * mask, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[2], dense[2])
    assert not got[1][~mask].any()


def test_an_update_changes_the_paths_and_keeps_every_address():
    operand, weight = linear_operand(kept=0.1)
    addresses = [t.data_ptr() for t in (*operand.topology, *operand._path_flags.values())]
    assert operand.paths == SPARSE
    x = torch.randn(3, 512)
    for kept, paths in ((0.9, DENSE), (0.1, SPARSE)):
        grid = torch.arange(operand.groups).view(operand.grid) < kept * operand.groups
        operand.set_(grid, all_kept=False)
        assert operand.paths == paths
        assert operand._path_flags[torch.float32].tolist() == list(paths)
        want = torch.nn.functional.linear(x, operand.binary_mask * weight)
        torch.testing.assert_close(operand.linear(x, weight, None), want, atol=1e-4, rtol=1e-4)
    assert addresses == [t.data_ptr() for t in (*operand.topology, *operand._path_flags.values())]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_skips_the_same_blocks_and_goes_its_own_way(way):
    operand, weight = linear_operand(kept=0.1)
    twin = way(operand)
    x = torch.randn(3, 512)
    before = operand.linear(x, weight, None)
    assert torch.equal(twin.linear(x, weight, None), before)
    twin.set_(~twin.mask, all_kept=False)
    assert torch.equal(operand.linear(x, weight, None), before)
    assert not torch.equal(twin.linear(x, weight, None), before)


def test_a_weight_that_becomes_float64_goes_on_densely():
    operand, weight = linear_operand(kept=0.1)
    x = torch.randn(3, 512)
    want = operand.linear(x, weight, None)
    weight.data = weight.data.double()
    operand.to(weight)
    assert operand.topology is None
    got = operand.linear(x.double(), weight, None)
    torch.testing.assert_close(got.float(), want, atol=1e-4, rtol=1e-4)


def test_without_gradient_to_the_weight_a_dense_product_uses_the_kept_masked_weight():
    for grad_mode in (torch.no_grad, torch.enable_grad):
        operand, weight = linear_operand("dense")
        weight.requires_grad_(grad_mode is torch.no_grad)
        with grad_mode():
            operand.linear(torch.randn(3, 512), weight, None)
            kept = operand._folded[1]
            operand.linear(torch.randn(3, 512), weight, None)
        assert operand._folded[1] is kept


@pytest.mark.parametrize("dispatch", ["sparse", "dense"])
def test_a_dense_weight_gradient_reaches_pruned_groups(dispatch):
    operand, weight = linear_operand(dispatch)
    operand.dense_weight_grad = True
    x = torch.randn(3, 512)
    operand.linear(x, weight, None).sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones(512, 3) @ x)


@pytest.mark.parametrize("fused", [False, True])
def test_the_kept_masked_weight_does_not_outlive_an_optimiser_step(fused):
    weight = nn.Parameter(torch.randn(8, 8))
    operand = halve(weight, ts.Unstructured())
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    weight.grad = torch.ones(8, 8)
    with torch.no_grad():
        operand.apply(weight)
        optimizer.step()
        assert torch.equal(operand.apply(weight), weight * operand.binary_mask)


def test_memory_of_the_masked_weight_is_for_training_alone():
    operand, weight = linear_operand("dense")
    x = torch.randn(3, 512, requires_grad=True)
    operand.linear(x, weight, None).sum().backward()
    assert operand._memory is not None
    assert copy.deepcopy(operand)._memory is None
    operand.train(False)
    assert operand._memory is None
    frozen = weight.detach()
    operand.linear(x, nn.Parameter(frozen, requires_grad=False), None)
    assert operand._memory is None
