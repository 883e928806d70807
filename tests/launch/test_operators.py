"""Every other operator, forward and backward, down to the driver."""

import re
from pathlib import Path

import pytest
import torch

import triton_sparsity.kernels
from stub_driver import kernels
from triton_sparsity.kernels.bandwidth import read_repeatedly
from triton_sparsity.kernels.bits import expand_mask, pack, packed_shape, unpack
from triton_sparsity.kernels.block_score import block_score, block_scores
from triton_sparsity.kernels.copy import copy_all_
from triton_sparsity.kernels.count import kept_counts
from triton_sparsity.kernels.cut import find_cut
from triton_sparsity.kernels.group_mask import GroupMask
from triton_sparsity.kernels.learned_mask import sample_mask, straight_through
from triton_sparsity.kernels.line_score import line_scores
from triton_sparsity.kernels.mask import make_mask
from triton_sparsity.kernels.masked_weight import apply_mask, apply_mask_, count_leaks
from triton_sparsity.kernels.numbers import uniform_numbers
from triton_sparsity.kernels.pattern import NM, Block, Unstructured, grid_shape
from triton_sparsity.kernels.product import BlockProduct, update_products
from triton_sparsity.kernels.prune_rows import prune_rows
from triton_sparsity.kernels.regrow import drop_lowest, grow_highest
from triton_sparsity.kernels.retained import put_all_back_, put_back_, take_all_pruned, take_pruned
from triton_sparsity.kernels.select import kth_smallest, select
from triton_sparsity.kernels.select_each import select_each
from triton_sparsity.kernels.semi_structured import nm_mask, nm_score
from triton_sparsity.kernels.topology import block_topology

pytestmark = pytest.mark.launch

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
COMPARE = ["_compare_kernel", "_ties_kernel"]


def make(shape, dtype=BF16, layout="rows"):
    """Return a matrix; of which none lies as another."""
    rows, cols = shape
    match layout:
        case "columns":
            return torch.ones(cols, rows, dtype=dtype).T
        case "sliced":
            return torch.ones(rows, cols + 3, dtype=dtype)[:, 1 : cols + 1]
    return torch.ones(rows, cols, dtype=dtype)


def compact(pattern, shape):
    """Return a mask that prunes every other group."""
    grid = torch.ones(grid_shape(pattern, shape), dtype=torch.bool)
    grid.view(-1)[::2] = False
    if isinstance(pattern, Block):
        return grid
    return pack(grid, backend="torch")


def programs(stub):
    return [launched.grid[0] for launched in stub.launches]


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "layout", "norm"),
    [
        (Block(32, 32), (512, 1024), BF16, "rows", "l1"),
        (Block(256, 256), (1000, 1016), BF16, "rows", "l1"),
        (Block(1, 16), (333, 205), FP16, "sliced", "l2"),
        (Block(64, 16), (512, 1024), FP32, "columns", "l1"),
        (Unstructured(), (512, 1024), BF16, "rows", "l1"),
        (Block(16, 16), (1, 1), BF16, "rows", "l1"),
    ],
    ids=str,
)
def test_block_scores_are_one_launch(pattern, shape, dtype, layout, norm, stub):
    weight = make(shape, dtype, layout).requires_grad_()
    scores = block_score(weight, pattern, norm=norm, backend="triton")
    scores.sum().backward()
    assert scores.shape == grid_shape(pattern, shape)
    assert kernels(stub.launches) == ["_block_score_kernel"]


@pytest.mark.parametrize(
    ("shapes", "dtype", "layout", "scaled", "reads"),
    [
        ([(512, 1024)] * 3, BF16, "rows", False, 1),
        # of a long list a sample is read first
        ([(8192, 4096)], BF16, "rows", False, 3),
        # keys of 32 bits, which the product with a scale has too
        ([(512, 1024), (333, 205)], FP16, "columns", True, 2),
        ([(31, 7), (1, 1), (0, 5)], FP32, "sliced", False, 2),
    ],
    ids=str,
)
def test_a_selection_is_a_fixed_number_of_launches(shapes, dtype, layout, scaled, reads, stub):
    tensors = [make(shape, dtype, layout) for shape in shapes]
    scales = torch.ones(len(shapes)) if scaled else None
    select(tensors, 20, scales=scales, backend="triton")
    names = kernels(stub.launches)
    # whether memory is aligned or not: a launch each
    assert names.count("_narrow_kernel") == reads
    assert set(names) == {"_count_kernel", "_narrow_kernel"}
    assert names.count("_count_kernel") <= 2 * reads


def test_a_selection_of_signed_values_launches(stub):
    kth_smallest([make((64, 128), FP32)], 7, "triton")
    assert set(kernels(stub.launches)) == {"_count_kernel", "_narrow_kernel"}


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "packed", "scaled"),
    [
        ((512, 1024), BF16, "rows", True, False),
        ((512, 1024), FP32, "rows", False, True),
        ((512, 1024), BF16, "columns", True, False),
        ((333, 205), FP16, "sliced", True, True),
    ],
    ids=str,
)
def test_masks_of_a_list_are_two_launches(shape, dtype, layout, packed, scaled, stub):
    tensors = [make(shape, dtype, layout) for _ in range(5)]
    threshold = select(tensors, 20, backend="torch")
    scales = torch.ones(5) if scaled else None
    masks = make_mask(tensors, threshold, scales=scales, packed=packed, backend="triton")
    assert [mask.shape for mask in masks] == [packed_shape(shape) if packed else shape] * 5
    assert kernels(stub.launches) == COMPARE
    make_mask(tensors, threshold, scales=scales, packed=packed, out=masks, backend="triton")
    assert kernels(stub.launches) == COMPARE * 2


@pytest.mark.parametrize("layout", ["rows", "columns", "sliced"])
@pytest.mark.parametrize("shape", [(512, 1024), (333, 205)], ids=str)
def test_packing_and_unpacking_are_a_launch_each(shape, layout, stub):
    packed = pack(make(shape, torch.bool, layout), backend="triton")
    unpack(packed, shape[1], backend="triton")
    assert kernels(stub.launches) == ["_pack_kernel", "_unpack_kernel"]
    expand_mask(packed, Unstructured(), shape, backend="triton")
    assert kernels(stub.launches)[2:] == ["_unpack_kernel"]


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "layout"),
    [
        (Block(32, 32), (512, 1024), BF16, "rows"),
        (Block(64, 128), (1000, 1016), BF16, "columns"),
        (Block(2, 4), (333, 205), FP32, "sliced"),
        (Unstructured(), (512, 1024), BF16, "rows"),
        (Unstructured(), (333, 205), FP64, "columns"),
    ],
    ids=str,
)
def test_a_masked_copy_is_one_launch_each_way(pattern, shape, dtype, layout, stub):
    weight = make(shape, dtype, layout).requires_grad_()
    masked = apply_mask(weight, compact(pattern, shape), pattern, backend="triton")
    assert kernels(stub.launches) == ["_apply_mask_kernel"]
    masked.backward(torch.zeros((), dtype=dtype).expand(shape))
    assert kernels(stub.launches) == ["_apply_mask_kernel"] * 2


@pytest.mark.parametrize("pattern", [Block(32, 32), Block(2, 4), Unstructured()], ids=str)
def test_a_list_is_masked_in_place_in_a_launch_for_each_width(pattern, stub):
    weights = [
        make(shape, dtype, layout)
        for shape in [(512, 1024), (1000, 1016), (333, 205), (1, 1), (0, 5)]
        for layout in ("rows", "columns", "sliced")
        for dtype in (BF16, FP16, FP32)
    ]
    masks = [compact(pattern, weight.shape) for weight in weights]
    apply_mask_(weights, masks, pattern, backend="triton")
    assert kernels(stub.launches) == ["_pruned_kernel"] * 2


def test_leaks_of_a_list_are_counted_in_a_launch_for_each_width(stub):
    pattern = Block(32, 32)
    weights = [make((333, 205), dtype) for dtype in (BF16, FP64)]
    counts = count_leaks(weights, [compact(pattern, (333, 205))] * 2, pattern, backend="triton")
    assert counts.shape == (2,)
    assert kernels(stub.launches) == ["_pruned_kernel"] * 2


@pytest.mark.parametrize(
    ("pattern", "shape", "layout", "launches"),
    [
        (Block(32, 32), (512, 1024), "rows", 1),
        (Block(64, 64), (1000, 1016), "columns", 1),
        (Unstructured(), (333, 205), "rows", 0),
    ],
    ids=str,
)
def test_pruned_values_are_taken_in_one_launch_and_put_back(
    pattern, shape, layout, launches, stub
):
    weight = make(shape, BF16, layout)
    mask = compact(pattern, shape)
    if not isinstance(pattern, Block):
        mask = torch.where(mask == 0, 0, 255).to(torch.uint8)
    values = take_pruned(weight, mask, pattern)
    assert kernels(stub.launches) == ["_pruned_kernel"] * launches
    put_back_(weight, values, mask, pattern)
    assert len(stub.launches) == launches


@pytest.mark.parametrize(
    ("pattern", "launches"),
    [(Block(32, 32), ["_place_kernel", "_move_kernel"]), (Unstructured(), ["_move_kernel"])],
    ids=str,
)
def test_pruned_values_of_a_list_are_moved_in_two_launches_each_way(pattern, launches, stub):
    shapes = [(512, 1024), (1000, 1016), (333, 205)]
    weights = [make(shape) for shape in shapes]
    masks = [compact(pattern, shape) for shape in shapes]
    pruned = [
        int((~expand_mask(m, pattern, s, backend="torch")).sum())
        for m, s in zip(masks, shapes, strict=True)
    ]
    values = take_all_pruned(
        weights, masks, pattern, pruned=pruned, out=[None] * 3, backend="triton"
    )
    assert kernels(stub.launches) == launches
    put_all_back_(weights, values, masks, pattern, backend="triton")
    assert kernels(stub.launches) == launches * 2


@pytest.mark.parametrize("pattern", [Block(32, 32), Unstructured()], ids=str)
def test_scores_and_norms_of_a_list_are_four_launches(pattern, stub):
    weights = [make(shape) for shape in [(512, 4096), (1000, 8192), (256, 4096)]]
    block_scores(weights, pattern, normed=True, backend="triton")
    norms = [*["_exact_sum_kernel"] * 2, "_inverse_norm_kernel"]
    assert kernels(stub.launches) == ["_block_score_kernel", *norms]


def test_thresholds_and_counts_of_small_tensors_are_a_launch_each(stub):
    scores = [torch.ones(16, 32) for _ in range(5)]
    select_each(scores, [3] * 5, backend="triton")
    assert kernels(stub.launches) == ["_select_each_kernel"]
    stub.forget()
    masks = [compact(Block(32, 32), (512, 1024)) for _ in range(5)]
    kept_counts(masks, Block(32, 32), [(512, 1024)] * 5, backend="triton")
    assert kernels(stub.launches) == ["_count_kernel"]


def test_rows_of_a_list_are_a_launch_for_each_width(stub, zero_memory):
    scores = [torch.ones(16, 700) for _ in range(5)]
    for packed in (True, False):
        prune_rows(scores, [3000] * 5, packed=packed, backend="triton")
    assert kernels(stub.launches) == ["_prune_rows_kernel"] * 2
    assert programs(stub) == [5 * 16] * 2
    stub.forget()
    prune_rows([*scores, torch.ones(40, 20), torch.ones(700, 16).T], [1] * 7, packed=True)
    assert programs(stub) == [5 * 16, 2, 2]


def test_scores_against_the_lines_of_a_list_are_three_launches(stub, zero_memory):
    gradients = [make((512, 1024)), make((1024, 512)).T, make((128, 192))]
    line_scores(gradients, Block(64, 64), backend="triton")
    names = ["_row_size_kernel", "_col_size_kernel", "_line_score_kernel"]
    assert kernels(stub.launches) == names


def test_numbers_for_a_draw_are_one_launch(stub):
    device = torch.device("cpu")
    shapes = [(16, 32), (7, 5), (64, 3)]
    uniform_numbers(shapes, seed=7, number=1, streams=[2, 3, 5], device=device)
    assert kernels(stub.launches) == ["_number_kernel"]


@pytest.mark.parametrize(
    ("pattern", "grid"),
    [
        (Block(128, 128), (32, 112)),
        (Block(64, 64), (224, 64)),
        (Block(16, 16), (300, 700)),
        (Block(32, 64), (1, 5)),
    ],
    ids=str,
)
def test_lists_of_blocks_are_two_launches_of_a_program_a_line(pattern, grid, stub):
    topology = block_topology(
        torch.ones(grid[::-1], dtype=torch.bool).T, pattern, backend="triton"
    )
    assert kernels(stub.launches) == ["_topology_count_kernel", "_topology_list_kernel"]
    assert programs(stub) == [sum(grid)] * 2
    block_topology(torch.ones(grid, dtype=torch.bool), pattern, out=topology, backend="triton")
    assert len(stub.launches) == 4


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "layout", "kernel"),
    [
        (NM(2, 4), (512, 1024), BF16, "rows", "_nm_kernel"),
        (NM(2, 4), (333, 204), FP32, "sliced", "_nm_kernel"),
        (NM(1, 16), (256, 512), BF16, "columns", "_nm_kernel"),
        (NM(3, 7), (333, 196), FP16, "rows", "_straddling_kernel"),
        (NM(2, 4, True), (512, 1024), BF16, "rows", "_tile_kernel"),
    ],
    ids=str,
)
def test_masks_and_scores_of_n_of_m_are_a_launch_each(pattern, shape, dtype, layout, kernel, stub):
    weight = make(shape, dtype, layout)
    tall, wide = pattern.group
    whole = torch.zeros(shape[0] // tall, shape[1] // wide, dtype=torch.bool)
    nm_mask(weight, pattern, whole=whole, backend="triton")
    nm_score(weight, pattern, backend="triton")
    assert kernels(stub.launches) == [kernel] * 2


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "layout", "suffix"),
    [
        (Block(32, 32), (512, 1024), BF16, "rows", "_blocks"),
        (Block(64, 16), (333, 205), FP32, "columns", "_blocks"),
        (Unstructured(), (512, 1024), BF16, "rows", ""),
        (Unstructured(), (333, 205), FP16, "sliced", ""),
    ],
    ids=str,
)
def test_learned_masks_are_a_launch_each_way(pattern, shape, dtype, layout, suffix, stub):
    weight = make(shape, dtype, layout).requires_grad_()
    logits = torch.zeros(grid_shape(pattern, shape), requires_grad=True)
    random = torch.tensor([7, 0])
    sample_mask(weight, logits, random, pattern, stream=3, backend="triton").sum().backward()
    assert kernels(stub.launches) == [f"_sample{suffix}_kernel", f"_grad{suffix}_kernel"]
    stub.forget()
    mask = compact(pattern, shape)
    straight_through(weight, logits, mask, pattern, backend="triton").sum().backward()
    assert kernels(stub.launches) == ["_apply_mask_kernel", f"_grad{suffix}_kernel"]


@pytest.mark.parametrize("pattern", [Block(32, 32), Unstructured(), NM(2, 4)], ids=str)
def test_a_cut_and_its_masks_launch(pattern, stub):
    shape = (512, 1024)
    scores = [torch.ones(grid_shape(pattern, shape)) for _ in range(3)]
    masks = [compact(pattern, shape) for _ in scores]
    copy_all_(masks, find_cut(scores, 100, pattern, None, "triton").masks(), backend="triton")
    names = set(kernels(stub.launches))
    wanted = {"_count_kernel", "_narrow_kernel", "_copy_kernel", *COMPARE}
    assert names == (wanted | {"_nm_kernel"} if isinstance(pattern, NM) else wanted)


@pytest.mark.parametrize("pattern", [Block(16, 16), Unstructured()], ids=str)
def test_what_stays_and_what_comes_back_are_four_launches_each(pattern, stub, zero_memory):
    scores = [torch.rand(64, 64), torch.rand(64, 8).T, torch.rand(16, 64)]
    masks = [torch.ones(s.shape, dtype=torch.bool) for s in scores]
    masks = masks if isinstance(pattern, Block) else [pack(m, backend="torch") for m in masks]
    drop_lowest(masks, scores, [9] * 3, pattern, backend="triton")
    grow_highest(masks, scores, [4] * 3, pattern, backend="triton")
    assert kernels(stub.launches) == ["_key_kernel", "_select_each_kernel", *COMPARE] * 2


@pytest.mark.parametrize("pattern", [Block(64, 64), Unstructured()], ids=str)
def test_a_mask_on_the_device_has_no_form_for_the_host(pattern, stub):
    shape = (512, 1024)
    mask = GroupMask(pattern, shape, BF16, torch.device("cpu"))
    weight = make(shape)
    assert mask.mask_for(weight) is mask.mask
    mask.set_grid(torch.zeros(mask.grid, dtype=torch.bool))
    packs = ["_pack_kernel"] * mask.packed
    assert kernels(stub.launches) == packs * 2
    if isinstance(pattern, Block):
        product = BlockProduct(pattern, shape, BF16, backend="auto", dispatch="sparse")
        update_products([product], [mask.mask], [0])
        stub.forget()
        product(make((64, 1024)), weight, None)
        assert kernels(stub.launches) == ["_block_sparse_linear_kernel"]


def test_reading_a_cache_is_one_launch_of_resident_programs(stub):
    read_repeatedly(torch.zeros(2**20, dtype=torch.int32), 3, backend="triton")
    (launched,) = stub.launches
    assert launched.kernel == "_read_kernel"
    assert launched.grid[0] == 4 * 132


def test_offsets_past_int32_launch(stub):
    # of memory that nobody touches there need not be any
    weight = torch.empty(2**21, 1024, dtype=BF16)
    grid = torch.ones(2**13, 4, dtype=torch.bool)
    block_score(weight, Block(256, 256), backend="triton")
    apply_mask(weight, grid, Block(256, 256), backend="triton")
    apply_mask_([weight], [grid], Block(256, 256), backend="triton")
    names = ["_block_score_kernel", "_apply_mask_kernel", "_pruned_kernel"]
    assert kernels(stub.launches) == names


def test_every_kernel_has_a_test_here():
    (folder,) = triton_sparsity.kernels.__path__
    sources = "".join(path.read_text() for path in Path(folder).glob("*.py"))
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tests = tests.replace("{suffix}", "") + tests.replace("{suffix}", "_blocks")
    found = re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE)
    assert len(found) > 15
    assert [name for name in found if f'"{name}"' not in tests] == []
