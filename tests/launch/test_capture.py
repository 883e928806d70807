"""What a CUDA graph would hold: kernels with their arguments, which a replay cannot change.

A replay follows a mask if the arguments are the same after an update, and what has changed lies
where they point. Kernels do nothing here, so masks are written by hand.
"""

import pytest
import torch
from torch import nn
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_sparsity import Block, MagnitudeSparsityConfig, create_controller
from triton_sparsity.kernels import group_mask

pytestmark = [pytest.mark.launch, pytest.mark.usefixtures("zero_memory")]

SIDE, TOKENS = 256, 2048
PATTERN = Block(64, 64)
STEP = {
    "_block_sparse_linear_kernel", "_block_sparse_wgrad_kernel", "_block_sparse_wgrad_sum_kernel",
    "_pruned_kernel",
}  # fmt: skip


class Recorder:
    """Writes down launches: which kernel with which arguments.

    Of a tensor its address, if it is one of those that stay, else that it is fresh: inside of a
    graph that has its place too. Of a table its content, which is addresses.
    """

    def __init__(self, patch, stay):
        self.stay = {tensor.data_ptr() for tensor in stay}
        self.found = []
        run = JITFunction.run

        def recorded(kernel, *args, **options):
            named = {name: self._describe(value) for name, value in options.items()}
            self.found.append((kernel.fn.__name__, [*map(self._describe, args)], named))
            return run(kernel, *args, **options)

        patch.setattr(JITFunction, "run", recorded)

    def addresses(self):
        """Return the addresses in what was found, those in tables included."""
        arguments = [a for _, given, _ in self.found for a in given]
        tables = [numbers for a in arguments if isinstance(a, list) for numbers in a]
        return {a[0] for a in arguments if isinstance(a, tuple)} | {
            number for numbers in tables if isinstance(numbers, list) for number in numbers
        }

    def _describe(self, value):
        if isinstance(value, TensorDescriptor):
            return self._describe(value.base), value.shape, value.strides, value.block_shape
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.int64:
            return value.tolist()
        here = value.data_ptr() in self.stay
        return value.data_ptr() if here else "fresh", tuple(value.shape), value.stride()


def write_mask(weight, grid):
    """Put a mask by hand where a kernel would have written one."""
    weight.mask.copy_(grid)
    weight.set_(None, int(grid.sum()))
    weight.leave()


def grids():
    """A mask of half the blocks, and one of three quarters of the others."""
    first = torch.zeros(SIDE // 64, SIDE // 64, dtype=torch.bool)
    first[::2] = True
    second = ~first
    second[:, 0] = False
    return first, second


def sparse_linear(dispatch):
    layer = nn.Linear(SIDE, SIDE, dtype=torch.bfloat16)
    controller = create_controller(
        nn.Sequential(layer), MagnitudeSparsityConfig(pattern=PATTERN), dispatch=dispatch
    )
    (info,) = controller.sparsified_module_info
    layer.weight.grad = torch.zeros_like(layer.weight)
    return layer, controller, info.operand


def test_after_an_update_the_same_launches_read_the_same_addresses(monkeypatch, stub):
    layer, _controller, weight = sparse_linear("sparse")
    first, second = grids()
    write_mask(weight, first)
    lists = weight.product.topology
    x = torch.zeros(TOKENS, SIDE, dtype=torch.bfloat16, requires_grad=True)
    x.grad = torch.zeros_like(x)
    stay = [x, x.grad, layer.weight, layer.weight.grad, layer.bias, weight.mask, *lists]
    recorder = Recorder(monkeypatch, stay)

    def step():
        recorder.found.clear()
        layer(x).backward(torch.zeros(TOKENS, SIDE, dtype=torch.bfloat16))
        return list(recorder.found)

    captured = step()
    assert {kernel for kernel, *_ in captured} == STEP
    # they read the lists themselves
    products = (lists.row_tasks, lists.col_index, lists.col_tasks, lists.bundles)
    assert {part.data_ptr() for part in products} <= recorder.addresses()

    recorder.found.clear()
    write_mask(weight, second)
    assert {part.data_ptr() for part in lists} <= recorder.addresses()
    assert step() == captured


def test_a_path_that_turns_dense_leaves_the_lists_in_step(monkeypatch, stub):
    _layer, _controller, weight = sparse_linear("auto")
    first, _ = grids()
    write_mask(weight, first)
    # so small a weight is dense at any level
    assert str(weight.product.paths) == "dense"
    lists = [part.data_ptr() for part in weight.product.topology]
    recorder = Recorder(monkeypatch, weight.product.topology)
    write_mask(weight, ~first)
    assert set(lists) <= recorder.addresses()
    assert lists == [part.data_ptr() for part in weight.product.topology]


def test_a_step_captured_with_nothing_pruned_clears_gradients_of_later_masks(monkeypatch, stub):
    layer, _controller, weight = sparse_linear("dense")
    write_mask(weight, torch.ones_like(weight.mask))
    recorder = Recorder(monkeypatch, [weight.mask])

    def step():
        recorder.found.clear()
        layer(torch.zeros(2, SIDE, dtype=torch.bfloat16)).sum().backward()
        return [kernel for kernel, *_ in recorder.found]

    assert step() == []
    monkeypatch.setattr(group_mask, "is_captured", lambda tensor: True)
    assert step() == ["_pruned_kernel"]
    captured = list(recorder.found)
    monkeypatch.setattr(group_mask, "is_captured", lambda tensor: False)
    write_mask(weight, grids()[0])
    assert step() == ["_pruned_kernel"]
    assert recorder.found == captured
