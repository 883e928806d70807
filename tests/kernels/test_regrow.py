import pytest
import torch

import aot
from triton_sparsity.kernels import regrow as module
from triton_sparsity.kernels.bits import pack, unpack
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.pattern import Block, Unstructured
from triton_sparsity.kernels.regrow import drop_lowest, grow_highest, keep_highest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(13, 21), (1, 1), (7, 64), (40, 9)]
BLOCK, ELEMENT = PATTERNS = [Block(2, 2), Unstructured()]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def highest(scores, count, among):
    """The highest |score| first, of equals the first."""
    order = scores.abs().flatten().float().argsort(descending=True, stable=True)
    chosen = [i for i in order.tolist() if among.flatten()[i]][:count]
    grid = torch.zeros(scores.numel(), dtype=torch.bool, device=DEVICE)
    grid[chosen] = True
    return grid.view(scores.shape)


KINDS = {
    "normal": lambda x: x,
    "tied": lambda x: x.round(),
    "zeros": lambda x: torch.copysign(x * 0, x),
    "subnormal": lambda x: x * 1e-40,
    "the largest": lambda x: torch.where(x > 0, torch.finfo(torch.float32).max, x),
}
LAYOUTS = {
    "rows": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
}


# kinds of numbers and layouts of scores, each with a pattern: of equal ones, which alone tell the
# order, both
CASES = [
    *(("normal", "rows", BLOCK), ("zeros", "rows", ELEMENT), ("subnormal", "rows", BLOCK)),
    *(("the largest", "rows", ELEMENT), ("tied", "rows", BLOCK), ("tied", "rows", ELEMENT)),
    *(("tied", "transposed", BLOCK), ("tied", "strided", ELEMENT)),
    *(("tied", "bfloat16", ELEMENT), ("tied", "float64", BLOCK)),
]


def compact(grid, pattern):
    return grid if isinstance(pattern, Block) else pack(grid, backend="torch")


def grid_of(mask, pattern, shape):
    return mask if isinstance(pattern, Block) else unpack(mask, shape[1], backend="torch")


def case(kind="normal", layout="rows"):
    """Scores by which to drop and to grow, what is kept, and how many stay and come back."""
    make = LAYOUTS[layout]
    drop = [make(KINDS[kind](randn(*shape, seed=i))) for i, shape in enumerate(SHAPES)]
    grow = [make(KINDS[kind](randn(*shape, seed=9 + i))) for i, shape in enumerate(SHAPES)]
    kept = [randn(*shape, seed=19 + i) > 0.2 for i, shape in enumerate(SHAPES)]
    keep = [int(grid.sum()) * 2 // 3 for grid in kept]
    return drop, grow, kept, keep, [int(g.sum()) - n for g, n in zip(kept, keep, strict=True)]


def regrow(masks, drop, keep, grow, grown, pattern, backend="auto", spend=False):
    """What stays of each mask; that and what comes back; how many scores were not finite."""
    left, bad = drop_lowest(masks, drop, keep, pattern, spend=spend, backend=backend)
    total = [k + n for k, n in zip(keep, grown, strict=True)]
    found, more = grow_highest(left, grow, total, pattern, spend=spend, backend=backend)
    return left, found, bad + more


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_among_some_are_kept(kind, pattern):
    scores, among = KINDS[kind](randn(13, 21)), randn(13, 21, seed=1) > 0.3
    for count in (0, 1, 40, int(among.sum())):
        mask, nonfinite = keep_highest(compact(among, pattern), scores, count, growing=False)
        assert torch.equal(grid_of(mask, pattern, (13, 21)), highest(scores, count, among))
        assert nonfinite == 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("share", [0.3, 0.999] if INTERPRET else [0.001, 0.3, 0.999])
def test_among_the_elements_of_a_great_matrix(share, pattern):
    """Of which a sample is read first, and whose columns repeat as the sample's step does."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1027, 1031, generator=generator)
    among = torch.rand(1027, 1031, generator=generator) < share
    among[:, ::5] = False
    for growing in (False, True):
        candidates = ~among if growing else among
        chosen = int(candidates.sum()) // 3
        keep = chosen + growing * int(among.sum())
        mask, nonfinite = keep_highest(compact(among, pattern), scores, keep, growing)
        grid, sizes = grid_of(mask, pattern, scores.shape), scores.abs()
        assert nonfinite == 0
        assert int(grid.sum()) == keep
        if growing:
            assert grid[among].all()
        taken = grid & candidates
        assert not taken.any() or sizes[taken].min() >= sizes[candidates & ~grid].max()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("kind", "layout", "pattern"), CASES, ids=str)
def test_what_is_lowest_goes_and_what_is_highest_comes_back(kind, layout, pattern, backend):
    drop, grow, kept, keep, grown = case(kind, layout)
    masks = [compact(grid, pattern) for grid in kept]
    left, found, nonfinite = regrow(masks, drop, keep, grow, grown, pattern, backend)
    assert nonfinite.tolist() == [0] * len(masks)
    for i, mask in enumerate(found):
        stays = highest(drop[i], keep[i], kept[i])
        comes = highest(grow[i], grown[i], ~stays)
        assert mask.dtype == masks[i].dtype
        assert torch.equal(grid_of(left[i], pattern, SHAPES[i]), stays)
        assert torch.equal(grid_of(mask, pattern, SHAPES[i]), stays | comes)


@pytest.mark.parametrize(("layout", "pattern"), [("rows", BLOCK), ("strided", ELEMENT)], ids=str)
def test_what_may_be_written_over_is_not_looked_at_again(layout, pattern):
    drop, grow, kept, keep, grown = case("tied", layout)
    masks = [compact(grid, pattern) for grid in kept]
    _, wanted, _ = regrow(masks, drop, keep, grow, grown, pattern)
    _, found, _ = regrow(masks, drop, keep, grow, grown, pattern, spend=True)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_great_weights_go_one_by_one_and_keep_the_same(pattern, monkeypatch):
    drop, grow, kept, keep, grown = case("tied")
    masks = [compact(grid, pattern) for grid in kept]
    _, want, _ = regrow(masks, drop, keep, grow, grown, pattern)
    monkeypatch.setattr(module, "MOST", 100)
    drop[0][0, 0] = float("nan")
    masks[0] = torch.full_like(masks[0], 255 if masks[0].dtype == torch.uint8 else 1)
    _, found, nonfinite = regrow(masks, drop, keep, grow, grown, pattern)
    assert nonfinite.tolist() == [1, 0, 0, 0]
    assert all(map(torch.equal, found[1:], want[1:]))


@pytest.mark.parametrize("all_or_none", [True, False])
def test_everything_or_nothing_may_stay_and_come_back(all_or_none):
    drop, grow, kept, *_ = case()
    groups = [grid.numel() for grid in kept]
    keep = [int(grid.sum()) if all_or_none else 0 for grid in kept]
    grown = [n - k if all_or_none else 0 for n, k in zip(groups, keep, strict=True)]
    _, found, _ = regrow(kept, drop, keep, grow, grown, Block(1, 1))
    assert [mask.all().item() if all_or_none else not mask.any() for mask in found] == [True] * 4


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("bad", "pattern"),
    [(float("nan"), BLOCK), (float("inf"), ELEMENT), ("all bits", BLOCK)],
    ids=str,
)
def test_what_is_not_finite_counts_among_the_candidates_alone(bad, pattern, backend):
    def spoil(scores):
        if bad == "all bits":  # the NaN that a GPU makes
            scores.view(torch.int32)[2, 3] = 0x7FFFFFFF
        else:
            scores[2, 3] = bad

    drop, grow = randn(5, 7), randn(5, 7, seed=1)
    kept = torch.ones(5, 7, dtype=torch.bool, device=DEVICE)

    def counted():
        mask = compact(kept, pattern)
        return int(regrow([mask], [drop], [9], [grow], [4], pattern, backend=backend)[2])

    spoil(drop)
    assert counted() == 1
    kept[2, 3] = False
    assert counted() == 0
    spoil(grow)
    assert counted() == 1
    drop[2, 3], kept[2, 3] = 99, True  # stays
    assert counted() == 0


def test_scores_of_another_shape_are_refused():
    mask, scores = torch.ones(3, 2, dtype=torch.uint8), randn(3, 17)
    with pytest.raises(ValueError, match=r"scores must be one a group of a mask \(3, 2\)"):
        drop_lowest([mask], [scores], [1], Unstructured())


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize(("growing", "packed"), [(False, True), (True, False)])
def test_the_kernel_is_lean(growing, packed, arch):
    constants = {"DTYPE": tl.bfloat16, "GROWING": growing, "PACKED": packed, "INDEX": tl.int32}
    constants |= {"INFINITY": module._INFINITY, "N": 256, "BLOCK": module.BLOCK}
    types = {"table_ptr": "*i64", "nonfinite_ptr": "*i64"}
    aot.assert_lean(aot.compile_for(arch, module._key_kernel, types, constants), arch)
