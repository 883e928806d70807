"""One sparse weight: its mask, zeros and retained values, and the product that skips blocks."""

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.masks.linear import skip_blocks
from triton_sparsity.controller.masks.weight import (
    SparseWeight,
    Target,
    clear_,
    dense_weights,
    leaks,
)
from triton_sparsity.kernels import launch
from triton_sparsity.kernels import product as product_module
from triton_sparsity.kernels.block_sparse_linear import block_sparse_linear
from triton_sparsity.kernels.dispatch import Paths

PATTERNS = [ts.Unstructured(), ts.Block(4, 4), ts.Block(1, 8), ts.NM(2, 4)]


def weight_of(shape, pattern, **layout):
    """A sparse weight of a module that is nothing else, filled at random."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape))
    return SparseWeight(Target("fc", ((module, "weight"),), pattern, **layout))


def halve(weight):
    """Keep a checkerboard of groups, which is 2:4 too."""
    down, across = weight.grid
    board = (torch.arange(down)[:, None] + torch.arange(across)) % 2 == 0
    with dense_weights([weight]):
        weight.set_grid(board)
    return weight.binary_mask


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_binary_mask_goes_out_and_comes_in_again(pattern, transposed):
    mask = halve(weight_of((13, 17), pattern, transposed=transposed))
    assert mask.shape == (13, 17)
    assert mask.dtype == torch.bool
    other = weight_of((13, 17), pattern, transposed=transposed)
    dense, address = other.weight.detach().clone(), other.mask.data_ptr()
    other.binary_mask = mask
    assert torch.equal(other.binary_mask, mask)
    assert other.mask.data_ptr() == address
    assert torch.equal(other.weight, torch.where(mask, dense, 0.0))
    assert other.pruned_elements() == (~mask).sum()
    assert other.pruned_groups() == (~other.kept_grid()).sum()


def test_a_mask_that_does_not_fit_is_refused_and_changes_nothing():
    weight = weight_of((8, 8), ts.Block(4, 4))
    before = weight.weight.detach().clone()
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[5, 5] = False
    with pytest.raises(ValueError, match="constant within every block 4x4 group of 'fc'"):
        weight.binary_mask = mask
    with pytest.raises(ValueError, match=r"must have the shape \(8, 8\) of 'fc', got \(4, 8\)"):
        weight.binary_mask = mask[:4]
    assert weight.binary_mask.all()
    assert torch.equal(weight.weight, before)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("keep", [True, False])
def test_values_leave_the_weight_and_come_back(pattern, layout, keep):
    weight = weight_of((8, 4, 3, 3), pattern)
    if layout == "channels_last":
        weight.weight.data = weight.weight.data.to(memory_format=torch.channels_last)
    weight.keeps_values = keep
    dense = weight.weight.detach().clone()
    mask = halve(weight)
    assert torch.equal(weight.weight, torch.where(mask, dense, 0.0))
    with dense_weights([weight]):
        assert torch.equal(weight.weight, dense if keep else torch.where(mask, dense, 0.0))
        weight.set_grid(torch.ones(weight.grid, dtype=torch.bool))
    assert torch.equal(weight.weight, dense if keep else torch.where(mask, dense, 0.0))
    assert weight.values is None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_cost_the_level_for_blocks_and_once_the_weight_for_fine_patterns(pattern):
    weight = weight_of((64, 64), pattern)
    weight.keeps_values = True
    halve(weight)
    share = 0.5 if isinstance(pattern, ts.Block) else 1.0
    assert weight.values.nbytes == share * weight.weight.nbytes


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_context_that_fails_has_changed_nothing(pattern):
    weight = weight_of((16, 16), pattern)
    weight.keeps_values = True
    mask, zeros = halve(weight), weight.weight.detach().clone()
    values = weight.values.clone()
    with pytest.raises(RuntimeError, match="refused"), dense_weights([weight]):
        raise RuntimeError("refused")
    assert torch.equal(weight.binary_mask, mask)
    assert torch.equal(weight.weight, zeros)
    assert torch.equal(weight.values, values)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_clearing_a_list_selects_and_leaves_what_is_kept(pattern, dtype):
    weights = [weight_of(shape, pattern) for shape in ((16, 24), (8, 32), (4, 8))]
    masks = [halve(weight) for weight in weights]
    tensors = [torch.randn(mask.shape).to(dtype) for mask in masks]
    want = [torch.where(m, t, 0) for m, t in zip(masks, tensors, strict=True)]
    for weight, mask, tensor in zip(weights, masks, tensors, strict=True):
        tensor[~mask] = torch.nan
        weight.module.weight = nn.Parameter(tensor)
    assert leaks(weights)() == [int((~mask).sum()) for mask in masks]
    clear_(weights, tensors)
    assert all(torch.equal(t, w) for t, w in zip(tensors, want, strict=True))
    assert leaks(weights)() == [0, 0, 0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 8), ts.NM(2, 4)], ids=str)
def test_experts_are_matrices_of_their_own(pattern, transposed):
    shape = (3, 16, 8) if transposed else (3, 8, 16)
    weight = weight_of(shape, pattern, transposed=transposed, experts=True)
    torch.manual_seed(1)
    mask = torch.rand(shape) > 2  # nothing kept
    mask[1] = True  # but one expert
    weight.binary_mask = mask
    assert torch.equal(weight.binary_mask, mask)
    assert torch.equal(weight.weight != 0, mask)
    # a matrix (out, in), whose groups lie along the inputs of one expert
    assert weight.shape == ((8, 48) if transposed else (24, 16))


DENSE, SPARSE = Paths(False, False, False), Paths(True, True, True)


def linear_of(dispatch="auto", pattern=None, kept=0.1, transposed=False):
    """A linear, of whose weight's blocks the first ones are kept."""
    pattern = pattern or ts.Block(64, 64)
    layer = nn.Linear(512, 512)
    target = Target("fc", ((layer, "weight"),), pattern, transposed)
    weight = SparseWeight(target, dispatch=dispatch)
    skip_blocks(weight, layer, "weight")
    keep(weight, kept)
    return layer, weight


def keep(weight, share):
    grid = torch.arange(weight.groups).view(weight.grid) < share * weight.groups
    with dense_weights([weight]):
        weight.set_grid(grid)


@pytest.mark.parametrize("dispatch", ["sparse", "dense", "auto"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 4), ts.Block(32, 64)], ids=str)
def test_linear_is_the_product_with_the_weight(pattern, transposed, dispatch):
    _, weight = linear_of(dispatch, pattern, transposed=transposed, kept=0.05)
    skips = isinstance(pattern, ts.Block) and pattern.rows > 4 and dispatch != "dense"
    assert (weight.product is not None) is skips
    parameter = weight.weight
    x, bias = torch.randn(7, 512, requires_grad=True), torch.randn(512, requires_grad=True)
    y = weight.linear(x, parameter, bias)
    twin = parameter.detach().requires_grad_()
    want = torch.nn.functional.linear(x, twin.T if transposed else twin, bias)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, parameter, bias), grad)
    dense = torch.autograd.grad(want, (x, twin, bias), grad)
    torch.testing.assert_close(got[0], dense[0], atol=1e-4, rtol=1e-4)
    mask = weight.binary_mask
    torch.testing.assert_close(got[1][mask], dense[1][mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[2], dense[2])


def test_an_update_changes_the_paths_and_keeps_every_address():
    layer, weight = linear_of(kept=0.1)
    product = weight.product

    def addresses():
        return [t.data_ptr() for t in (*product.topology, *product._flags.values())]

    before = addresses()
    assert product.paths == SPARSE
    x = torch.randn(3, 512)
    for share, paths in ((0.9, DENSE), (0.1, SPARSE)):
        keep(weight, share)
        assert product.paths == paths
        assert product._flags[torch.float32].tolist() == list(paths)
        want = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)
    assert before == addresses()


def test_while_pruned_blocks_are_written_the_lists_have_all_blocks():
    # a captured graph skips what its lists leave out, and asks nobody
    layer, weight = linear_of(kept=0.1)
    product = weight.product
    lists = [part.clone() for part in product.topology]
    addresses = [part.data_ptr() for part in product.topology]
    x = torch.randn(3, 512)

    def replayed():
        return block_sparse_linear(x, layer.weight, product.topology, pattern=product.pattern)

    with torch.no_grad():
        layer.weight += 1
    with pytest.warns(UserWarning, match="have been written"):
        layer.eval()
    want = torch.nn.functional.linear(x, layer.weight)
    torch.testing.assert_close(replayed(), want, atol=1e-4, rtol=1e-4)
    clear_([weight], [layer.weight])
    layer(x)
    assert not product.unsafe
    assert all(torch.equal(a, b) for a, b in zip(product.topology, lists, strict=True))
    assert addresses == [part.data_ptr() for part in product.topology]
    want = torch.nn.functional.linear(x, layer.weight)
    torch.testing.assert_close(replayed(), want, atol=1e-4, rtol=1e-4)


def test_a_capture_that_would_have_to_look_at_a_weight_is_refused(monkeypatch):
    layer, _weight = linear_of(kept=0.1)
    with torch.no_grad():
        layer.weight += 1
    monkeypatch.setattr(launch, "is_captured", lambda tensor: True)
    with pytest.raises(RuntimeError, match="must be as it was last seen when a CUDA graph"):
        layer(torch.randn(3, 512))


def captured_step(step):
    """Return a CUDA graph of a step that has run a few times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dispatch", ["sparse", "dense"])
@pytest.mark.parametrize("level", [0.25, 0.75])
def test_a_captured_training_step_follows_the_masks(dispatch, level):
    gpu = torch.device("cuda", 0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).to(gpu, torch.bfloat16)
    config = ts.MagnitudeSparsityConfig(
        pattern=ts.Block(64, 64),
        schedule=ts.PolynomialSchedule(initial_level=level, target_level=level),
    )
    controller = ts.create_controller(model, config, dispatch=dispatch)
    (info,) = controller.sparsified_module_info
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(256, 512, device=gpu, dtype=torch.bfloat16)
    y = torch.empty_like(x)

    def step():
        optimizer.zero_grad(set_to_none=False)
        out = model(x)
        y.copy_(out.detach())
        out.float().square().mean().backward()
        optimizer.step()

    graph = captured_step(step)
    for new in (level, 0.5, 0.9, 0.1):
        controller.set_sparsity_level(new)
        for _ in range(3):
            before = info.weight.detach().clone()
            graph.replay()
            torch.testing.assert_close(y, x @ before.T, atol=2e-2, rtol=2e-2)
            pruned = ~info.operand.binary_mask
            assert not info.weight.detach()[pruned].any()
            assert not info.weight.grad[pruned].any()
            assert info.weight.grad.any()


def test_a_weight_that_becomes_float64_goes_on_densely():
    layer, weight = linear_of(kept=0.1)
    x = torch.randn(3, 512)
    want = layer(x)
    layer.double()
    torch.testing.assert_close(layer(x.double()).float(), want, atol=1e-4, rtol=1e-4)
    assert weight.product is None


@pytest.mark.parametrize("dispatch", ["sparse", "auto"])
def test_a_dense_weight_gradient_reaches_pruned_groups(dispatch):
    layer, weight = linear_of(dispatch)
    weight.product.want_dense_grad(True)
    x = torch.randn(3, 512)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.ones(512, 3) @ x)


def test_written_blocks_are_multiplied_until_they_are_zero_again():
    layer, weight = linear_of()
    weight.leave()
    x = torch.randn(3, 512)
    with torch.no_grad():
        layer.weight[-1, -1] = 5.0
        with pytest.warns(UserWarning, match="1 pruned elements of 'fc' have been written"):
            got = layer(x)
        torch.testing.assert_close(
            got, nn.functional.linear(x, layer.weight, layer.bias), atol=1e-4, rtol=1e-4
        )
        assert weight.path == "dense (pruned blocks were written)"
        layer.weight[-1, -1] = 0.0
        layer(x)
    assert weight.path == "block-sparse"


def test_an_edit_that_leaves_no_trace_is_seen_at_the_switch_to_evaluation():
    layer, weight = linear_of()
    weight.leave()
    layer.weight.data[-1, -1] = 5.0
    with pytest.warns(UserWarning, match="have been written"):
        layer.eval()
    x = torch.randn(3, 512)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-4, rtol=1e-4
    )


def test_a_weight_of_somebody_else_is_multiplied_as_it_is():
    layer, _ = linear_of()
    x, other = torch.randn(3, 512), torch.randn(512, 512)
    got = torch.func.functional_call(layer, {"weight": other}, (x,))
    torch.testing.assert_close(got, nn.functional.linear(x, other, layer.bias))


def test_a_method_that_outlives_the_strip_goes_on():
    model = nn.Sequential(nn.Linear(512, 512))
    config = ts.MagnitudeSparsityConfig(
        pattern=ts.Block(64, 64),
        schedule=ts.PolynomialSchedule(initial_level=0.9, target_level=0.9),
    )
    controller = ts.create_controller(model, config)
    forward, x = model[0].forward, torch.randn(3, 512)
    want = forward(x)
    controller.strip(do_copy=False)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(forward(x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.9])
def test_creation_builds_the_lists_of_blocks_once(monkeypatch, level):
    built, build = [], product_module.write_topologies

    def count(masks, *args, **options):
        built.append(len(masks))
        return build(masks, *args, **options)

    monkeypatch.setattr(product_module, "write_topologies", count)
    schedule = ts.PolynomialSchedule(initial_level=level, target_level=0.9)
    config = ts.MagnitudeSparsityConfig(pattern=ts.Block(64, 64), schedule=schedule)
    ts.create_controller(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), config)
    # of both at once
    assert built == [2]
