import pytest
import torch

from triton_sparsity.bench.measure import operations as module
from triton_sparsity.bench.measure.cases import measure_case, to_row
from triton_sparsity.bench.measure.ceilings import Ceilings
from triton_sparsity.bench.measure.operands import Operands
from triton_sparsity.bench.measure.operations import operand_cases
from triton_sparsity.bench.measure.options import OPERATIONS
from triton_sparsity.bench.measure.shapes import Shape
from triton_sparsity.kernels.pattern import NM, Block, Unstructured

CPU = torch.device("cpu")
SHAPE = Shape(24, 70, 130)  # edge blocks on both sides
CEILINGS = Ceilings(copy=1e10, cache=1e11, gemm={"float32": 1e11})


def operands(pattern, level=0.5, dtype=torch.float32, shape=SHAPE):
    return Operands(shape, pattern, level, "random", dtype, CPU, "torch")


def counted(pattern, level=0.5, dtype=torch.float32):
    cases = operand_cases(operands(pattern, level, dtype), OPERATIONS)
    return {case.operation: (case.bytes, case.flops) for case in cases}


def test_counts_of_blocks_agree_with_counting_by_hand():
    # weight 64 x 96, blocks 32 x 32: a grid of 2 x 3, of which half is pruned: 3 blocks of 1024
    o = operands(Block(32, 32), shape=Shape(10, 96, 64))
    found = {c.operation: (c.bytes, c.flops) for c in operand_cases(o, OPERATIONS)}
    weight, kept = 64 * 96, 3 * 1024
    x, y = 10 * 96, 10 * 64
    assert found == {
        "score": (4 * weight + 4 * 6, 0),
        "select": (4 * 6, 0),
        "mask": (4 * 6 + 6, 0),
        # the mask and its copy; row tasks 2 x 3, columns 6, column tasks 3 x 3, rows 6, one bundle
        # of up to 8 blocks for each of 3 columns, since the weight is wide: 3 x 3; their count
        "topology": (6 + 6 + 4 * (6 + 6 + 9 + 6 + 9 + 2), 0),
        "apply": (4 * (kept + weight) + 6, 0),
        "apply_": (4 * (weight - kept) + 6, 0),
        "forward": (4 * (x + kept + y), 2 * 10 * kept),
        "dX": (4 * (y + kept + x), 2 * 10 * kept),
        "dW": (4 * (x + y + weight), 2 * 10 * kept),
    }


def test_counts_of_single_weights_agree_with_counting_by_hand():
    # weight 130 x 70 of two bytes: masks are 130 rows of 9 bytes
    found = counted(Unstructured(), dtype=torch.bfloat16)
    weight, mask = 130 * 70, 130 * 9
    assert found == {
        "select": (2 * weight, 0),
        "mask": (2 * weight + mask, 0),
        "pack": (weight + mask, 0),
        "apply": (2 * 2 * weight + mask, 0),
        "apply_": (2 * 2 * weight + mask, 0),
    }


@pytest.mark.parametrize("pattern", [Unstructured(), Block(32, 32), Block(64, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_operation_passes_its_check(pattern, dtype):
    done = []
    for case in operand_cases(operands(pattern, dtype=dtype), OPERATIONS):
        built = case.build()
        assert built.check() is None, case.operation
        built.run()
        if built.dense is not None:
            built.dense()
        done.append(case.operation)
    assert done == list(counted(pattern))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 8), NM(2, 4, transposable=True)], ids=str)
def test_every_operation_on_tuples_passes_its_check(pattern):
    shape = Shape(24, 72, 128)
    cases = list(operand_cases(operands(pattern, shape=shape), OPERATIONS))
    assert [case.operation for case in cases] == [
        "score", "mask", "pack", "apply", "apply_",
    ]  # fmt: skip
    for case in cases:
        assert case.build().check() is None, case.operation
    groups = 128 * 72 // (16 if pattern.transposable else pattern.m)
    assert cases[0].bytes == 4 * (128 * 72 + groups)
    assert cases[1].bytes == 4 * 128 * 72 + 128 * 9


def double(function):
    def wrong(*args, **kwargs):
        found = function(*args, **kwargs)
        return [2 * t for t in found] if isinstance(found, list) else 2 * found

    return wrong


def invert(function):
    """Flip every flag of the masks and bits that come back or are written."""

    def wrong(*args, **kwargs):
        found = function(*args, **kwargs)
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            if tensor.dtype in (torch.bool, torch.uint8):
                tensor.bitwise_not_()
        return found

    return wrong


def shift(field):
    """Add one to a field of a tuple of tensors."""

    def breaks(function):
        def wrong(*args, **kwargs):
            found = function(*args, **kwargs)
            part = found[field]
            part.logical_not_() if part.dtype == torch.bool else part.add_(1)
            return found

        return wrong

    return breaks


def leave(function):
    """Write nothing."""

    def wrong(*args, out=None, **kwargs):
        return function(*args, **kwargs) if out is None else out

    return wrong


def nothing(function):
    return lambda *args, **kwargs: None


def scale_gradient(argument):
    """Let the gradient to one argument be wrong, and nothing else."""

    def breaks(function):
        def wrong(*args, **kwargs):
            args = list(args)
            if args[argument].requires_grad:
                args[argument] = args[argument] + 0.1 * (args[argument] - args[argument].detach())
            return function(*args, **kwargs)

        return wrong

    return breaks


def leak_gradient(function):
    """Let pruned weights have a tiny gradient."""

    def wrong(x, weight, *args, **kwargs):
        if weight.requires_grad:
            weight = weight.clone()
            weight.register_hook(lambda gradient: gradient + 1e-30)
        return function(x, weight, *args, **kwargs)

    return wrong


def drop_one(function):
    """Prune one group more."""

    def wrong(*args, **kwargs):
        masks = function(*args, **kwargs)
        row, column = masks[0].nonzero()[0]
        masks[0][row, column] = 0
        return masks

    return wrong


TUPLES = NM(2, 4), NM(2, 4, transposable=True)


@pytest.mark.parametrize(
    ("function", "breaks", "pattern", "operations"),
    [
        ("block_score", double, Block(32, 32), ["score"]),
        # whose masks are wrong then, too
        *(("select", shift(field), Block(32, 32), ["select", "mask"]) for field in range(2)),
        *(
            ("make_mask", breaks, pattern, ["mask"])
            for breaks in (invert, leave, drop_one)
            for pattern in (Block(32, 32), Unstructured())
        ),
        *(("block_topology", shift(field), Block(32, 32), ["topology"]) for field in range(7)),
        ("block_topology", leave, Block(32, 32), ["topology"]),
        ("pack", invert, Unstructured(), ["pack"]),
        ("apply_mask", double, Block(32, 32), ["apply"]),
        ("apply_mask", double, Unstructured(), ["apply"]),
        ("apply_mask_", nothing, Block(32, 32), ["apply_"]),
        ("apply_mask_", nothing, Unstructured(), ["apply_"]),
        ("block_sparse_linear", double, Block(32, 32), ["forward", "dX", "dW"]),
        ("block_sparse_linear", scale_gradient(0), Block(32, 32), ["dX"]),
        ("block_sparse_linear", scale_gradient(1), Block(32, 32), ["dW"]),
        ("block_sparse_linear", leak_gradient, Block(32, 32), ["dW"]),
        *(
            (function, breaks, pattern, operations)
            for pattern in TUPLES
            for function, breaks, operations in (
                ("nm_score", double, ["score"]),
                ("nm_mask", invert, ["mask"]),
                ("nm_mask", leave, ["mask"]),
                ("apply_mask", double, ["apply"]),
                ("apply_mask_", nothing, ["apply_"]),
            )
        ),
    ],
)
def test_a_wrong_kernel_is_shown_as_failed_and_has_no_speed(
    monkeypatch, function, breaks, pattern, operations
):
    shape = Shape(24, 72, 128) if isinstance(pattern, NM) else SHAPE
    monkeypatch.setattr(module, function, breaks(getattr(module, function)))
    cases = list(operand_cases(operands(pattern, shape=shape), OPERATIONS))
    shown = {
        case.operation: to_row(case, [measure_case(case, CPU, 0.0)], CEILINGS) for case in cases
    }
    assert [name for name, row in shown.items() if row.status == "failed"] == operations
    for row in (shown[name] for name in operations):
        assert row.detail
        assert (
            row.median_s is row.speedup is row.gb_per_s is row.tflop_per_s is row.dense_s is None
        )


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    ran = []

    def wrong(*args, **kwargs):
        ran.append(1)
        return 2 * apply_mask(*args, **kwargs)

    apply_mask = module.apply_mask
    monkeypatch.setattr(module, "apply_mask", wrong)
    (case,) = operand_cases(operands(Block(32, 32)), ["apply"])
    assert measure_case(case, CPU, 0.0).timing is None
    # by its check alone
    assert len(ran) == 1


def test_a_kernel_that_raises_is_shown_as_failed(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(module, "apply_mask", broken)
    (case,) = operand_cases(operands(Block(32, 32)), ["apply"])
    row = to_row(case, [measure_case(case, CPU, 0.0)], CEILINGS)
    assert (row.status, row.detail) == ("failed", "RuntimeError: no such instruction")


def test_what_does_not_fit_the_memory_is_skipped(monkeypatch):
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "apply_mask", broken)
    (case,) = operand_cases(operands(Block(32, 32)), ["apply"])
    row = to_row(case, [measure_case(case, CPU, 0.0)], CEILINGS)
    detail = "out of memory: memory could not be had on the GPU"
    assert (row.status, row.detail) == ("skipped", detail)
