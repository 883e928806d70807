"""Keys that lie on several ranks are selected among as in one place, however they lie."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
import torch

from triton_sparsity.kernels import spread
from triton_sparsity.kernels.prune_rows import Part, prune_rows
from triton_sparsity.kernels.search import Threshold
from triton_sparsity.kernels.select import select
from triton_sparsity.kernels.spread import (
    digit_of,
    kth_key,
    search_bytes,
    select_spread,
    ties_kept,
)
from triton_sparsity.kernels.spread_rows import prune_rows_spread


class Ranks:
    """Runs one function a rank, and adds up what they reduce."""

    def __init__(self, size):
        self.size = size
        self.given = [None] * size
        self.sent = 0  # bytes of each rank
        self.barrier = Barrier(size, timeout=20)

    def run(self, function):
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: function(rank, self.reduce(rank)), range(self.size)))

    def reduce(self, rank):
        def add(tensor):
            self.given[rank] = tensor.clone()
            if rank == 0:
                self.sent += tensor.nbytes
            self.barrier.wait()
            total = sum(self.given)
            self.barrier.wait()
            return tensor.copy_(total)

        return add


# rows and columns of the parts, by rank: the last two are copies of one part
LAYOUTS = {
    "rows": ([0, 7, 7, 13], [0, 12]),
    "columns": ([0, 13], [0, 5, 12, 12]),
    "both": ([0, 6, 13], [0, 4, 12]),
}


def parts(tensor, layout):
    rows, cols = LAYOUTS[layout]
    for first, last in pairwise(rows):
        for left, right in pairwise(cols):
            place = Part(first, tensor.shape[0]), Part(left, tensor.shape[1])
            yield tensor[first:last, left:right], place, True
    yield tensor[:first], (Part(0, tensor.shape[0]), Part(0, tensor.shape[1])), False


def tensors(ties, dtype=torch.float32):
    torch.manual_seed(1)
    found = [torch.randn(13, 12) for _ in range(3)]
    return [((t * 2).round() if ties else t).to(dtype) for t in found]


@pytest.mark.parametrize("digit", [2, 4, 6, 8])
def test_the_kth_key_of_each_pool_is_found(digit):
    keys = torch.randint(0, 1000, (3, 50), generator=torch.Generator().manual_seed(0))
    k = torch.tensor([1, 50, 0])
    steps = torch.arange(1, 2**digit)

    def search(rank, add):
        def below(low, shift):
            bounds = low[:, None] + (steps << shift)
            return (keys[:, None, rank::4] < bounds[:, :, None]).sum(2)

        return kth_key(below, k, 10, digit, add)

    ranks = Ranks(4)
    for found in ranks.run(search):
        assert found.tolist() == [keys[0].min(), keys[1].max(), 0]
    assert ranks.sent == 3 * search_bytes(10, digit)


def test_the_more_pools_there_are_the_more_passes_find_their_keys():
    assert [digit_of(pools) for pools in (1, 128, 129, 346, 347, 1092, 1093)] == [
        *(8, 8, 6, 6, 4, 4, 2)
    ]


@pytest.mark.parametrize(
    ("ties", "scaled", "layout", "digit"),
    [  # every two of them together, and ties, which depend on where parts lie, by each layout
        *((True, False, "rows", 8), (True, True, "rows", 4), (False, True, "rows", 2)),
        *((True, True, "columns", 8), (True, False, "columns", 6), (False, False, "columns", 4)),
        *((True, True, "both", 6), (True, False, "both", 2), (False, False, "both", 8)),
        *((False, True, "rows", 6), (False, True, "both", 4), (True, True, "columns", 2)),
    ],
)
def test_thresholds_are_those_of_one_place_and_the_first_ties_are_kept(
    ties, scaled, layout, digit, monkeypatch
):
    monkeypatch.setattr(spread, "MOST_SENT", 3 * search_bytes(spread.BITS, digit))
    assert digit_of(3) == digit
    whole = tensors(ties, torch.bfloat16 if scaled else torch.float32)
    scales = torch.tensor([1.0, 0.5, 2.0]) if scaled else None
    ks = [0, 70, 156]
    each = [[*parts(t, layout)] for t in whole]

    def search(rank, add):
        own = [tensor[rank] for tensor in each]
        here, places, counted = zip(*own, strict=True)
        found = select_spread(here, ks, scales, counted, add)
        return found, ties_kept(here, found, scales, places, counted, add)

    found = Ranks(len(each[0])).run(search)
    for i, (tensor, k) in enumerate(zip(whole, ks, strict=True)):
        own = None if scales is None else scales[i : i + 1]
        wanted = select([tensor], k, scales=own)
        equal = tensor.abs().float() * (1 if own is None else own) == wanted.value
        kept = equal & (equal.flatten().cumsum(0).view_as(equal) <= wanted.keep_ties)
        for (threshold, quotas), (_, place, _), n in zip(found, each[i], range(99), strict=False):
            assert [t[i] for t in threshold] == [*wanted]
            rows, cols = (slice(p.first, p.first + n) for p, n in
                          zip(place, each[i][n][0].shape, strict=True))  # fmt: skip
            assert quotas[i] == kept[rows, cols].sum()


def test_ties_of_one_threshold_are_kept_in_the_order_of_the_tensors():
    whole = [torch.ones(4, 6), torch.ones(2, 6)]
    threshold = Threshold(torch.tensor(1.0), torch.tensor(27), torch.tensor(0))
    places = [[(Part(0, 4), Part(left, 6)), (Part(0, 2), Part(left, 6))] for left in (0, 4)]

    def search(rank, add):
        here = [t[:, :4] if rank == 0 else t[:, 4:] for t in whole]
        return ties_kept(here, threshold, None, places[rank], [True, True], add).tolist()

    assert Ranks(2).run(search) == [[16, 3], [8, 0]]


def test_keys_that_are_not_finite_are_counted():
    tensor = torch.ones(2, 4)
    tensor[0, 0], tensor[1, 3] = torch.nan, torch.inf

    def search(rank, add):
        return select_spread([tensor[rank : rank + 1]], [3], None, [True], add).nonfinite

    assert [int(n) for n in Ranks(2).run(search)] == [2, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [0, 1, 77, 156])
@pytest.mark.parametrize("ties", [False, True])
def test_rows_that_lie_on_several_ranks_are_pruned_as_whole_ones(ties, k, layout):
    (tensor, *_) = tensors(ties)
    tensor[3, 5] = torch.inf
    (wanted,), bad = prune_rows([tensor], [k], packed=False, backend="torch")
    each = [*parts(tensor, layout)]

    edges = LAYOUTS[layout][1]

    def search(rank, add):
        here, place, counted = each[rank]
        return prune_rows_spread(here, k, place, edges, counted, add)

    found = Ranks(len(each)).run(search)
    for (mask, _), (here, place, _) in zip(found, each, strict=True):
        rows, cols = (slice(p.first, p.first + n) for p, n in zip(place, here.shape, strict=True))
        assert torch.equal(mask, wanted[rows, cols])
    assert sum(int(n) for (_, n), (*_, counted) in zip(found, each, strict=True) if counted) == bad


def rows_on_ranks(tensor, k, edges):
    """Return the mask of a matrix whose columns lie on several ranks, and the bytes a row."""
    ranks = Ranks(len(edges) - 1)

    def search(rank, add):
        here, place = tensor[:, edges[rank] : edges[rank + 1]], Part(edges[rank], tensor.shape[1])
        return prune_rows_spread(here, k, (Part(0, len(tensor)), place), edges, True, add)[0]

    return torch.cat(ranks.run(search), 1), ranks.sent / len(tensor)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


HARD = {
    "outliers": lambda x: x * torch.logspace(-20, 20, x.shape[1]),
    "one part far above": lambda x: x * torch.where(torch.arange(x.shape[1]) < 40, 1e6, 1e-6),
    "powers": lambda x: torch.exp2((x * 40).round()),
    "zeros": lambda x: torch.where(x.abs() < 1, 0.0, x),
    "one value": torch.ones_like,
    "subnormal": lambda x: x * 1e-40,
    "neighbours": lambda x: (2**30 + torch.arange(x.numel()).view_as(x)).int().view(torch.float32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", HARD.values(), ids=HARD)
def test_rows_are_cut_wherever_their_scores_lie(make, dtype):
    tensor = make(normal(19, 160)).to(dtype).nan_to_num(posinf=60000.0)
    most = 8 * (1 + (31 if dtype == torch.float32 else 15) + 2)
    for k in (19, 1501, 2432, 3021):
        (wanted,), _ = prune_rows([tensor], [k], packed=False, backend="torch")
        found, sent = rows_on_ranks(tensor, k, [0, 40, 41, 41, 120, 160, 160, 160])
        assert torch.equal(found, wanted)
        assert sent <= most


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 31), (torch.bfloat16, 34)])
def test_rows_of_weights_take_few_bytes(dtype, most):
    tensor = normal(64, 4096).to(dtype)
    (wanted,), _ = prune_rows([tensor], [209715], packed=False, backend="torch")
    found, sent = rows_on_ranks(tensor, 209715, [*range(0, 4097, 512)])
    assert torch.equal(found, wanted)
    assert sent <= most
