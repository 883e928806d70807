import pytest
import torch

from triton_sparsity.bench.measure import work
from triton_sparsity.bench.measure.ceilings import Ceilings
from triton_sparsity.bench.measure.counts import intensity, kept_elements
from triton_sparsity.bench.measure.shapes import Shape
from triton_sparsity.bench.measure.work import (
    OPERATIONS,
    Operands,
    disagreement,
    model_cases,
    operand_cases,
    random_mask,
)
from triton_sparsity.bench.profile import measure_case, to_row
from triton_sparsity.kernels.pattern import NM, Block, Unstructured
from triton_sparsity.kernels.tiles import Tile

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
        "topology": (6 + 6 + 4 * (6 + 6 + 9 + 6 + 9 + 1), 0),
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
    x, y = 24 * 70, 24 * 130
    product = 2 * (x + y + weight) + mask, 2 * 24 * weight
    assert found == {
        "select": (2 * weight, 0),
        "mask": (2 * weight + mask, 0),
        "pack": (weight + mask, 0),
        "apply": (2 * 2 * weight + mask, 0),
        "apply_": (2 * 2 * weight + mask, 0),
        "forward": product,
        "dX": product,
        "dW": product,
    }


def test_counts_of_a_model_agree_with_counting_by_hand():
    shapes = (Shape(10, 64, 32), Shape(10, 32, 64))
    update, step = model_cases(
        shapes, Block(32, 32), 0.5, torch.float32, CPU, "torch", ["mask update", "training step"]
    )
    # each weight has two blocks: a grid of 1 x 2 or 2 x 1; both have one bundle a line of their
    # shorter side
    lists = {(1, 2): 3 + 2 + 6 + 2 + 6 + 1, (2, 1): 6 + 2 + 3 + 2 + 6 + 1}
    assert update.bytes == sum(4 * 2048 + 2 + 2 * 2 + 4 * n for n in lists.values())
    assert update.flops == 0
    assert step.flops == 2 * 3 * 2 * 10 * 1024
    products = (640 + 320 + 1024) * 2 + (640 + 320 + 2048)
    assert step.bytes == 2 * 4 * (products + 7 * 2048)


@pytest.mark.parametrize(
    ("weight", "block", "mask", "kept"),
    [
        ((5, 7), Block(2, 4), [[1, 0], [0, 1], [1, 1]], 2 * 4 + 2 * 3 + 1 * 4 + 1 * 3),
        ((4, 4), Block(4, 4), [[1]], 16),
        ((3, 1), Unstructured(), [[1], [0], [1]], 2),
    ],
)
def test_edge_blocks_are_counted_with_the_elements_that_they_have(weight, block, mask, kept):
    assert kept_elements(torch.tensor(mask, dtype=torch.bool), weight, block) == kept


@pytest.mark.parametrize(
    ("operation", "tile", "size", "found"),
    [
        # kernels/block_sparse_linear.py and _wgrad.py have these by hand, for 16-bit operands
        ("forward", (128, 256), 2, 85.3),
        ("dX", (256, 128), 2, 85.3),
        ("forward", (512, 64), 2, 56.9),
        ("forward", (512, 32), 2, 30.1),
        ("dW", (64, 256), 2, 51.2),
        ("dW", (32, 256), 2, 28.4),
        ("forward", (512, 32), 4, 15.1),
    ],
)
def test_the_intensity_of_a_tile(operation, tile, size, found):
    tile = Tile(*tile, 32, 8, 4, 1)
    assert intensity(operation, tile, size) == pytest.approx(found, abs=0.05)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["random", "skewed"])
def test_masks_prune_exactly_as_many_groups_as_asked(level, kind):
    mask = random_mask((16, 25), level, kind)
    assert int((~mask).sum()) == round(level * 400)
    assert torch.equal(mask, random_mask((16, 25), level, kind))
    if kind == "skewed" and level >= 0.5:
        heavy = mask.sum(1).sort(descending=True).values[:8].sum()
        assert heavy == round(0.9 * int(mask.sum()))


def test_large_masks_are_drawn_by_chance():
    mask = random_mask((2048, 1024), 0.8, "random")
    assert mask.float().mean().item() == pytest.approx(0.2, abs=0.002)


def test_a_result_may_be_no_worse_than_plain_torch():
    exact = torch.tensor([1.0, -3.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -3.001])
    assert disagreement(torch.tensor([1.0, -3.0019]), eager, exact) is None
    assert "off by 0.003" in disagreement(torch.tensor([1.0, -3.003]), eager, exact)
    assert disagreement(torch.tensor([1.0, float("nan")]), eager, exact) is not None
    assert "shape (1,)" in disagreement(torch.tensor([1.0]), eager, exact)


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
        "score", "mask", "pack", "apply", "apply_", "forward", "dX", "dW",
    ]  # fmt: skip
    for case in cases:
        assert case.build().check() is None, case.operation
    groups = 128 * 72 // (16 if pattern.transposable else pattern.m)
    assert cases[0].bytes == 4 * (128 * 72 + groups)
    assert cases[1].bytes == 4 * 128 * 72 + 128 * 9


@pytest.mark.parametrize("pattern", [Unstructured(), Block(32, 32)], ids=str)
def test_updates_and_steps_of_a_model_pass_their_checks(pattern):
    shapes = (Shape(24, 64, 128), Shape(24, 128, 64))
    for case in model_cases(
        shapes, pattern, 0.5, torch.float32, CPU, "torch", ["mask update", "training step"]
    ):
        built = case.build()
        assert built.check() is None, case.operation
        built.run()
        # the optimiser takes no step
        assert built.check() is None


def double(function):
    def wrong(*args, **kwargs):
        found = function(*args, **kwargs)
        return [2 * t for t in found] if isinstance(found, list) else 2 * found

    return wrong


def invert(function):
    def wrong(*args, out=None, **kwargs):
        found = function(*args, **kwargs, **({} if out is None else {"out": out}))
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            if tensor.dtype == torch.bool or tensor.dtype == torch.uint8:
                tensor.bitwise_not_()
        return found

    return wrong


def shift(function):
    def wrong(*args, **kwargs):
        value, *rest = function(*args, **kwargs)
        return type(function(*args, **kwargs))(value + 1, *rest)

    return wrong


@pytest.mark.parametrize(
    ("function", "breaks", "pattern", "operations"),
    [
        ("block_score", double, Block(32, 32), ["score"]),
        ("select", shift, Block(32, 32), ["select"]),
        ("make_mask", invert, Block(32, 32), ["mask"]),
        ("make_mask", invert, Unstructured(), ["mask"]),
        ("block_topology", invert, Block(32, 32), ["topology"]),
        ("pack", invert, Unstructured(), ["pack"]),
        ("apply_mask", double, Block(32, 32), ["apply"]),
        ("block_sparse_linear", double, Block(32, 32), ["forward", "dX", "dW"]),
        ("masked_linear", double, Unstructured(), ["forward", "dX", "dW"]),
    ],
)
def test_a_wrong_kernel_is_shown_as_failed_and_has_no_speed(
    monkeypatch, function, breaks, pattern, operations
):
    monkeypatch.setattr(work, function, breaks(getattr(work, function)))
    cases = list(operand_cases(operands(pattern), operations))
    assert [case.operation for case in cases] == operations
    for case in cases:
        row = to_row(case, [measure_case(case, CPU, 0.0)], CEILINGS)
        assert row.status == "failed", case.operation
        assert row.detail
        assert (
            row.median_s is row.speedup is row.gb_per_s is row.tflop_per_s is row.dense_s is None
        )


def test_a_kernel_that_raises_is_shown_as_failed(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(work, "apply_mask", broken)
    (case,) = operand_cases(operands(Block(32, 32)), ["apply"])
    row = to_row(case, [measure_case(case, CPU, 0.0)], CEILINGS)
    assert (row.status, row.detail) == ("failed", "RuntimeError: no such instruction")


def test_what_does_not_fit_the_memory_is_skipped(monkeypatch):
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(work, "apply_mask", broken)
    (case,) = operand_cases(operands(Block(32, 32)), ["apply"])
    row = to_row(case, [measure_case(case, CPU, 0.0)], CEILINGS)
    assert (row.status, row.detail) == ("skipped", "out of memory")
