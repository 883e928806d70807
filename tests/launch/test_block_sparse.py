"""Block-sparse products, forward and backward, down to the driver."""

from dataclasses import dataclass, replace

import pytest
import torch

from stub_driver import PROCESSORS, kernels
from triton_sparsity.kernels import tiles, tuning
from triton_sparsity.kernels.block_sparse_linear import block_sparse_linear
from triton_sparsity.kernels.pattern import Block, grid_shape

pytestmark = pytest.mark.launch

REGISTERS = 65536  # of a multiprocessor
SHARED = 228 * 1024  # bytes of a multiprocessor
RESERVED = 1024  # bytes of shared memory that the driver takes of every block
LISTS = ["_topology_count_kernel", "_topology_list_kernel"]
LINEAR = "_block_sparse_linear_kernel"
SPECIALISED = "_block_sparse_linear_specialised_kernel"
WGRAD = "_block_sparse_wgrad_kernel"
SUM = "_block_sparse_wgrad_sum_kernel"


@dataclass(frozen=True)
class Case:
    """One linear; the last three: whether the copy engine moves the operands of that product."""

    name: str
    block: tuple[int, int]
    weight: tuple[int, int] = (1024, 1024)
    tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16
    x: str = "contiguous"
    transposed: bool = False
    bias: bool = False
    exact: bool = False
    forward: bool = True
    dgrad: bool = True
    wgrad: bool = True

    def make_x(self):
        cols = self.weight[1]
        match self.x:
            case "unaligned":
                flat = torch.zeros(self.tokens * cols + 1, dtype=self.dtype)
                return flat[1:].view(self.tokens, cols)
            case "sliced":
                return torch.zeros(self.tokens, cols + 64, dtype=self.dtype)[:, 32:-32]
            case "one token for all":
                return torch.zeros(1, cols, dtype=self.dtype).expand(self.tokens, -1)
            case "transposed":
                return torch.zeros(cols, self.tokens, dtype=self.dtype).T
        return torch.zeros(self.tokens, cols, dtype=self.dtype)

    def make_weight(self):
        rows, cols = self.weight
        if self.transposed:
            return torch.zeros(cols, rows, dtype=self.dtype).T
        return torch.zeros(rows, cols, dtype=self.dtype)


CASES = [
    Case("256", (256, 256)),
    Case("128", (128, 128), bias=True),
    Case("64", (64, 64)),
    Case("32", (32, 32), wgrad=False),
    Case("16", (16, 16), wgrad=False),
    Case("256x16", (256, 16), dtype=torch.float16, wgrad=False),
    Case("16x256", (16, 256), dtype=torch.float16, wgrad=False),
    Case("64x128", (64, 128)),
    Case("transposed", (128, 128), transposed=True),
    Case("transposed 32", (32, 32), transposed=True, wgrad=False),
    Case("edges", (128, 128), weight=(1000, 2040), tokens=8192),
    Case("odd sides", (64, 64), weight=(333, 205), forward=False, dgrad=False, wgrad=False),
    Case("one token", (128, 128), tokens=1),
    Case("few tokens", (64, 64), tokens=100, bias=True),
    Case("one row", (16, 16), weight=(1, 512), tokens=64, forward=False, dgrad=False, wgrad=False),
    Case("unaligned x", (128, 128), x="unaligned", forward=False, wgrad=False),
    Case("sliced x", (128, 128), x="sliced"),
    Case("one x for all", (64, 64), x="one token for all", forward=False, wgrad=False),
    Case("transposed x", (128, 128), x="transposed"),
    Case("tf32", (128, 128), dtype=torch.float32),
    Case(
        "exact", (64, 64), dtype=torch.float32, exact=True, forward=False, dgrad=False, wgrad=False
    ),
]


def assert_resident(launched):
    """All programs of a persistent grid are at work at the same time."""
    resident = -(-launched.grid[0] // PROCESSORS)
    assert resident * launched.threads * launched.registers <= REGISTERS
    assert resident * (launched.shared + RESERVED) <= SHARED


def assert_describes(tensor_map, matrix):
    """A tensor map is of a matrix as it lies in memory."""
    assert tensor_map.address == matrix.data_ptr()
    assert tensor_map.shape == tuple(matrix.shape)
    assert tensor_map.strides == (matrix.stride(0) * matrix.element_size(),)


@pytest.fixture
def float32_products():
    """Set what float32 is multiplied in; as it was before, afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def set_to(precision):
        matmul.fp32_precision = precision

    yield set_to
    set_to(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_of_all_shapes_launch(case, stub, float32_products):
    float32_products("ieee" if case.exact else "tf32")
    pattern = Block(*case.block)
    mask = torch.ones(grid_shape(pattern, case.weight), dtype=torch.bool)
    weight = case.make_weight().requires_grad_()
    x = case.make_x().requires_grad_()
    bias = torch.zeros(case.weight[0], dtype=case.dtype) if case.bias else None

    y = block_sparse_linear(x, weight, mask, bias, pattern=pattern, backend="triton")
    # of stride 0, as the gradient of a sum is
    y.backward(torch.zeros((), dtype=case.dtype).expand_as(y))

    lists, products = stub.launches[:2], stub.launches[2:]
    assert kernels(lists) == LISTS
    assert {launched.grid for launched in lists} == {(sum(mask.shape), 1, 1)}
    adds_parts = [SUM] * (case.tokens >= 1024)
    assert kernels(products) == [LINEAR, LINEAR, WGRAD, *adds_parts]
    for launched in products:
        assert_resident(launched)
    forward, dgrad, wgrad = products[:3]
    by_copies = [case.forward, case.dgrad, case.wgrad]
    assert [len(launched.maps) for launched in (forward, dgrad, wgrad)] == [
        3 * b for b in by_copies
    ]
    stored = weight.T if case.transposed else weight
    if case.forward:
        assert_describes(forward.maps[1], stored)
        assert_describes(forward.maps[2], y)
    if case.dgrad:
        assert_describes(dgrad.maps[1], stored)
        assert dgrad.maps[2].shape == x.shape
    if case.wgrad:
        assert_describes(wgrad.maps[2], weight.grad.T if case.transposed else weight.grad)


def measure_specialised(monkeypatch, case):
    """Let a tuning table say that warps of two kinds are faster, with the kernel's own tiles."""
    (rows, cols), block = case.block, Block(*case.block)
    facts = tiles.device_of(torch.empty(0))
    for direction, sides in (("forward", (rows, cols)), ("dgrad", (cols, rows))):
        own, *_ = tiles.linear_tiles(*sides, case.dtype, facts, precision="tf32", bulk=True)
        tile = own._replace(specialised=1)
        assert tuning.fits(tile, direction, case.weight, block)
        monkeypatch.setitem(tiles.measured, (direction, case.weight, block, case.dtype), tile)


@pytest.mark.parametrize(
    "case",
    [
        # so many that tiles fill the device without a split of the sums
        replace(case, tokens=32768 if case.tokens >= 4096 else case.tokens)
        for case in CASES
        if case.dtype.itemsize == 2
    ],
    ids=lambda case: case.name,
)
def test_products_of_all_shapes_launch_with_warps_of_two_kinds(case, stub, monkeypatch):
    measure_specialised(monkeypatch, case)
    pattern = Block(*case.block)
    mask = torch.ones(grid_shape(pattern, case.weight), dtype=torch.bool)
    weight = case.make_weight().requires_grad_()
    x = case.make_x().requires_grad_()
    bias = torch.zeros(case.weight[0], dtype=case.dtype) if case.bias else None

    y = block_sparse_linear(x, weight, mask, bias, pattern=pattern, backend="triton")
    y.backward(torch.zeros((), dtype=case.dtype).expand_as(y))

    forward, dgrad = (
        launched for launched in stub.launches if launched.kernel in (LINEAR, SPECIALISED)
    )
    # elsewhere the tokens are few and the sums split, or the copy engine cannot move the operands
    whole = case.tokens == 32768
    for launched, by_copies in ((forward, case.forward), (dgrad, case.dgrad)):
        wanted = SPECIALISED if whole and by_copies else LINEAR
        assert launched.kernel == wanted
        if wanted == SPECIALISED:
            assert len(launched.maps) == 3
            assert launched.grid[0] <= PROCESSORS
            assert launched.shared + RESERVED <= SHARED
            assert launched.threads in (256, 384)
            assert launched.threads * launched.registers <= REGISTERS
    if whole and case.forward:
        stored = weight.T if case.transposed else weight
        assert_describes(forward.maps[1], stored)
        assert_describes(forward.maps[2], y)


@pytest.mark.parametrize("aligned", [True, False])
def test_offsets_past_int32_launch(aligned, stub):
    tokens, cols = 2**21, 1024
    # of memory that nobody touches there need not be any
    flat = torch.empty(tokens * cols + 1, dtype=torch.bfloat16)
    x = flat[: tokens * cols] if aligned else flat[1:]
    mask = torch.ones(1, 8, dtype=torch.bool)
    weight = torch.zeros(128, cols, dtype=torch.bfloat16)
    block_sparse_linear(x.view(tokens, cols), weight, mask, pattern=Block(128, 128))
    launched = stub.launches[-1]
    assert launched.kernel == LINEAR
    assert len(launched.maps) == 3 * aligned
    assert_resident(launched)
