from itertools import pairwise

import pytest
import torch

from triton_sparsity.kernels import topology as module
from triton_sparsity.kernels.launch import INTERPRET
from triton_sparsity.kernels.pattern import Block
from triton_sparsity.kernels.topology import (
    Topology,
    block_topologies,
    block_topology,
    bundling,
    capacities,
    runs,
    topology_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = INTERPRET or DEVICE == "cuda"
GRIDS = [(1, 1), (7, 1), (3, 5), (11, 17)]


def make(grid, kind):
    g = torch.Generator().manual_seed(grid[0] * 31 + grid[1])
    mask = torch.rand(grid, generator=g) < {"all": 2, "none": -1}.get(kind, 0.4)
    if kind == "empty lines":
        mask[0], mask[:, -1] = False, False
    if kind == "skewed":
        mask &= torch.arange(grid[0])[:, None] < (grid[0] + 1) // 2
    return mask.to(DEVICE)


def by_hand(mask, pattern):
    """The lists as loops over the blocks, nothing vectorised."""
    lists = []
    for kept in (mask.tolist(), mask.T.tolist()):
        index, tasks = [], []
        for line, flags in enumerate(kept):
            entries = [i for i, flag in enumerate(flags) if flag]
            tasks.append([line, len(index), len(entries)])
            index += entries
        lists.append((tasks, index))
    by_rows, size = bundling(pattern, tuple(mask.shape))
    bundles = [
        [line, first + done, min(size, count - done)]
        for line, first, count in lists[0 if by_rows else 1][0]
        for done in range(0, count, size)
    ]
    narrow = [bundle for bundle in bundles if 2 * bundle[2] <= size]
    wide = [bundle for bundle in bundles if 2 * bundle[2] > size]
    by_length = [sorted(tasks, key=lambda task: -task[2]) for tasks, _ in lists]
    return *zip(by_length, (index for _, index in lists), strict=True), wide, narrow


KINDS = ["some", "all", "none", "empty lines", "skewed"]
# by the first most grids are bundled along columns, by the second along rows; of each grid every
# kind is bundled one way or the other
BUNDLED = [Block(64, 128), Block(256, 32)]


@pytest.mark.parametrize(
    ("pattern", "grid", "kind"),
    [(BUNDLED[(i + j) % 2], g, k) for i, g in enumerate(GRIDS) for j, k in enumerate(KINDS)],
    ids=str,
)
def test_lists_are_what_loops_over_the_blocks_give(grid, kind, pattern):
    mask = make(grid, kind)
    got = block_topology(mask, pattern)
    rows, cols, wide, narrow = by_hand(mask, pattern)
    for tasks, index, (want_tasks, want_index), absent in (
        (got.row_tasks, got.col_index, rows, grid[1]),
        (got.col_tasks, got.row_index, cols, grid[0]),
    ):
        assert tasks.tolist() == want_tasks
        padding = [absent] * (mask.numel() - len(want_index))
        assert index.tolist() == want_index + padding
    assert got.bundle_count.tolist() == [len(wide), len(narrow)]
    bundles = wide + narrow
    assert got.bundles.tolist()[: len(bundles)] == bundles
    assert not got.bundles[len(bundles) :].any()
    assert torch.equal(got.kept, mask)


@pytest.mark.skipif(not TRITON, reason="compares the kernels with plain torch")
@pytest.mark.parametrize("view", ["contiguous", "transposed", "strided", "expanded"])
def test_kernels_agree_with_the_reference_on_any_strides(view):
    mask = make((11, 17), "some")
    mask = {
        "contiguous": lambda: mask,
        "transposed": lambda: mask.T.contiguous().T,
        "strided": lambda: mask.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda: mask[:1].expand(11, -1),
    }[view]()
    got = block_topology(mask, Block(32, 32))
    for name, a, b in zip(
        Topology._fields, got, topology_reference(mask, Block(32, 32)), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.skipif(not TRITON, reason="compares the kernels with plain torch")
def test_lines_longer_than_a_chunk_are_whole(monkeypatch):
    monkeypatch.setattr("triton_sparsity.kernels.topology.CHUNK", 16)
    mask = make((5, 37), "some")
    got = block_topology(mask, Block(16, 16))
    for a, b in zip(got, topology_reference(mask, Block(16, 16)), strict=True):
        assert torch.equal(a, b)


def test_an_update_keeps_every_address():
    pattern, grid = Block(64, 32), (9, 14)
    topology = block_topology(make(grid, "all"), pattern)
    addresses = [t.data_ptr() for t in topology]
    for kind in ("some", "none", "skewed"):
        mask = make(grid, kind)
        out = block_topology(mask, pattern, out=topology)
        assert out is topology
        assert [t.data_ptr() for t in out] == addresses
        for a, b in zip(out, topology_reference(mask, pattern), strict=True):
            assert torch.equal(a, b)


def test_an_update_from_its_own_mask_changes_nothing():
    topology = block_topology(make((9, 14), "some"), Block(64, 64))
    before = [t.clone() for t in topology]
    block_topology(topology.kept, Block(64, 64), out=topology)
    assert all(map(torch.equal, topology, before))


def test_shapes_depend_on_the_grid_alone():
    for kind in ("all", "none"):
        topology = block_topology(make((9, 14), kind), Block(64, 32))
        assert tuple(tuple(t.shape) for t in topology) == capacities((9, 14), Block(64, 32))


def test_an_empty_mask_has_empty_lists():
    topology = block_topology(torch.zeros(0, 5, dtype=torch.bool, device=DEVICE), Block(16, 16))
    assert topology.col_index.numel() == 0
    assert topology.bundle_count.tolist() == [0, 0]


@pytest.mark.skipif(not TRITON, reason="the operator wraps the kernels")
def test_opcheck():
    mask, pattern = make((5, 7), "some"), Block(32, 32)
    lists = block_topology(mask, pattern)
    op = torch.ops.triton_sparsity.block_topology_.default
    op_arguments = [mask], pattern.rows, pattern.cols, *([t] for t in lists)
    torch.library.opcheck(op, op_arguments)


def masks_of(kind):
    grids = [(1, 1), (3, 5), (11, 17), (0, 5), (40, 2)]
    masks = [make(grid, kind) if min(grid) else torch.zeros(grid) > 0 for grid in grids]
    return [mask.to(DEVICE) for mask in masks] + [make((11, 17), kind).T]


@pytest.mark.parametrize("pattern", [Block(64, 128), Block(32, 32)], ids=str)
def test_a_list_of_masks_gets_the_lists_of_each_in_place(pattern):
    topologies = block_topologies(masks_of("all"), pattern)
    addresses = [[t.data_ptr() for t in topology] for topology in topologies]
    for kind in ("skewed",) if INTERPRET else ("some", "none", "skewed"):
        masks = masks_of(kind)
        got = block_topologies(masks, pattern, out=topologies)
        assert all(a is b for a, b in zip(got, topologies, strict=True))
        assert [[t.data_ptr() for t in topology] for topology in got] == addresses
        for mask, topology in zip(masks, got, strict=True):
            for a, b in zip(topology, topology_reference(mask, pattern), strict=True):
                assert torch.equal(a, b)


@pytest.mark.skipif(not INTERPRET, reason="counts launches in the interpreter")
def test_a_list_of_masks_is_two_launches(monkeypatch):
    launches = []
    for name in ("_topology_count_kernel", "_topology_list_kernel"):
        kernel = getattr(module, name)
        noted = type(
            "Noted", (), {"__getitem__": lambda _, g, k=kernel: launches.append(k) or k[g]}
        )
        monkeypatch.setattr(module, name, noted())
    block_topologies(masks_of("some"), Block(64, 128))
    assert len(launches) == 2


def test_a_bad_mask_in_a_list_leaves_the_others():
    pattern = Block(32, 32)
    out = block_topologies([make((5, 7), "all"), make((3, 3), "all")], pattern)
    with pytest.raises(ValueError, match="block_topology: out must be of a mask"):
        block_topologies([make((5, 7), "none"), make((3, 4), "none")], pattern, out=out)
    assert out[0].kept.all()
    with pytest.raises(ValueError, match="block_topology: mask must be on the others'"):
        block_topologies([make((5, 7), "none"), torch.zeros(3, 4, device="meta") > 0], pattern)


@pytest.mark.parametrize("bad", ["dtype", "shape", "out shape", "out pattern"])
def test_bad_inputs_name_the_problem(bad):
    mask, pattern = make((5, 7), "some"), Block(32, 64)
    out = block_topology(mask, pattern)
    arguments = {
        "dtype": (mask.to(torch.uint8), pattern),
        "shape": (mask[0], pattern),
        "out shape": (mask[:4], pattern, out),
        "out pattern": (mask, Block(128, 32), out),
    }[bad]
    with pytest.raises(ValueError, match=r"^block_topology: (mask|out) must be"):
        block_topology(*arguments[:2], out=(arguments[2:] or (None,))[0])


@pytest.mark.skipif(TRITON, reason="needs a machine where Triton cannot run")
def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="block_topology: backend='triton'"):
        block_topology(make((5, 7), "some"), Block(32, 32), backend="triton")


@pytest.mark.parametrize("kind", ["some", "all", "none", "empty lines"])
@pytest.mark.parametrize("grid", [*GRIDS, (3, 0), (0, 3)])
def test_runs_are_the_neighbours_of_each_line(grid, kind):
    mask = make(grid, kind).cpu() if min(grid) else torch.empty(grid, dtype=torch.bool)
    for view in (mask, mask.T):
        found = [*runs(view)]
        assert len(found) == len(view)
        for line, pairs in zip(view.tolist(), found, strict=True):
            covered = [at for first, end in pairs for at in range(first, end)]
            assert covered == [at for at, flag in enumerate(line) if flag]
            # none is empty, none touches the next
            assert all(first < end for first, end in pairs)
            assert all(a[1] < b[0] for a, b in pairwise(pairs))
