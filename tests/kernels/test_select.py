import threading
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aot
import oracle
from triton_sparsity.kernels import search, search_torch, search_triton
from triton_sparsity.kernels.block_score import block_scores
from triton_sparsity.kernels.launch import INTERPRET, tl
from triton_sparsity.kernels.pattern import Block, Unstructured
from triton_sparsity.kernels.select import kth_smallest, select, select_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_TRITON = INTERPRET or DEVICE == "cuda"
BACKENDS = (["triton"] if ON_TRITON else []) + ([] if INTERPRET else ["torch"])
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request):
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _watch_reads():
    """Note in ``READS`` how many full reads each selection took."""
    with pytest.MonkeyPatch.context() as patch:
        by_torch, by_triton = search_torch._search, search_triton._search

        def watched_torch(*args):
            result = by_torch(*args)
            READS.append(result[3])
            return result

        def watched_triton(*args):
            state = by_triton(*args)
            READS.append(state[search_triton._READS].item())
            return state

        patch.setattr(search_torch, "_search", watched_torch)
        patch.setattr(search_triton, "_search", watched_triton)
        yield


READS = []


@contextmanager
def other_default(what):
    """Give new tensors a type or a device that is not meant; meta stands in for a GPU."""
    if isinstance(what, torch.device):
        with what:
            yield
        return
    torch.set_default_dtype(what)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def small_samples(monkeypatch):
    """Sample lists of a few thousand elements as if they were large."""
    monkeypatch.setattr(search, "MOST_SAMPLED", 1 << 11)
    monkeypatch.setattr(search_torch, "_SAMPLE", 1 << 10)
    monkeypatch.setattr(search_triton, "_SAMPLE", 1 << 10)
    monkeypatch.setattr(search_triton, "_WHOLE", 0)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def want(tensors, k, scales=None):
    arrays = [oracle.to_numpy(t) for t in tensors]
    scales = None if scales is None else scales.cpu().numpy()
    with np.errstate(all="ignore"):
        keys = oracle.keys(arrays, scales)
        return *oracle.threshold(arrays, k, scales), int((~np.isfinite(keys)).sum())


def numbers(threshold):
    value, keep_ties, nonfinite = threshold
    assert (value.dtype, value.shape, value.device.type) == (torch.float32, (), DEVICE)
    assert (keep_ties.dtype, keep_ties.shape) == (torch.int64, ())
    assert (nonfinite.dtype, nonfinite.shape) == (torch.int64, ())
    return value.item(), keep_ties.item(), nonfinite.item()


def most_reads(tensors, scales):
    narrow = scales is None and {t.dtype for t in tensors} in ({torch.bfloat16}, {torch.float16})
    return 2 if narrow else 3


def assert_selects(tensors, k, scales=None, *, backend, reduce=None, reads=None):
    """Compare with the oracle, and the number of full reads with what is allowed or asked for."""
    READS.clear()
    got = numbers(select(tensors, k, scales=scales, reduce=reduce, backend=backend))
    assert got == want(tensors, k, scales)
    assert 1 <= READS[0] <= most_reads(tensors, scales)
    assert reads is None or READS[0] == reads


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_threshold_is_the_kth_smallest_key(dtype, scaled, backend):
    shapes = [(37, 51), (1,), (0,), (3, 5, 7), ()]
    tensors = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    scales = torch.tensor([0.3, 2.0, 1.0, 1.7, 0.0], device=DEVICE) if scaled else None
    total = sum(t.numel() for t in tensors)
    for k in (0, 2, total // 3, total):
        assert_selects(tensors, k, scales, backend=backend)


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize(("dtype", "scaled"), [(d, d == torch.float32) for d in DTYPES], ids=str)
def test_a_sample_does_not_change_the_answer(dtype, scaled, backend):
    tensors = [randn(20, 333, seed=1).to(dtype), randn(2000, seed=2).to(dtype), randn(9).to(dtype)]
    scales = torch.tensor([0.3, 2.0, 1.0], device=DEVICE) if scaled else None
    total = sum(t.numel() for t in tensors)
    for k in (1, total // 2, total - 1):
        assert_selects(tensors, k, scales, backend=backend)


def test_the_reference_defines_it(backend):
    tensors = [randn(40, 30), torch.tensor([0.0, -0.0, 1.0, -1.0, INF], device=DEVICE)]
    for scales in (None, torch.tensor([0.5, 2.0], device=DEVICE)):
        for k in (0, 2, 1205):
            reference = numbers(select_reference(tensors, k, scales))
            assert reference == want(tensors, k, scales)
            assert reference == numbers(select(tensors, k, scales=scales, backend=backend))


@settings(deadline=None, max_examples=10 if INTERPRET else 150, derandomize=True)
@given(data=st.data())
def test_any_list(backend, data):
    draw = data.draw
    shapes = draw(
        st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=1, max_size=4)
    )
    # few levels: many ties
    levels = draw(st.sampled_from([1, 2, 10, 1000, 10**6]))
    tensors = []
    for i, shape in enumerate(shapes):
        x = (randn(*shape, seed=i) * levels / 3).round() / levels
        tensors.append(x.to(draw(st.sampled_from(DTYPES))))
    total = sum(t.numel() for t in tensors)
    k = draw(st.integers(0, total))
    scales = None
    if draw(st.booleans()):
        scales = torch.tensor([0.25 * (i + 1) for i in range(len(tensors))], device=DEVICE)
    least = draw(st.sampled_from([64, 1024, 1 << 21]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "MOST_SAMPLED", 2 * least)
        patch.setattr(search_triton, "_SAMPLE", least)
        patch.setattr(search_torch, "_SAMPLE", least)
        patch.setattr(search_triton, "_WHOLE", draw(st.sampled_from([0, 1 << 24])))
        patch.setattr(search_torch, "_CHUNK", 1000)
        patch.setattr(search_torch, "_KEPT", 3000)
        assert_selects(tensors, k, scales, backend=backend)


TIES = {
    "all equal": lambda x: x * 0 + 0.3,
    "all zero": lambda x: x * 0,
    "zeros of both signs": lambda x: torch.where(x > 1, x, torch.copysign(x * 0, x)),
    "many equal among others": lambda x: torch.where(x.abs() < 0.5, 0.25, x),
    "subnormal": lambda x: x * 1e-7 if x.dtype == torch.float16 else x * 1e-39,
    "the largest finite": lambda x: torch.where(x > 0, torch.finfo(x.dtype).max, x),
}


# all of them in float32, and in 16 bits those that are other numbers there
TIED = [(ties, torch.float32) for ties in TIES]
TIED += [(t, d) for t in ("all equal", "subnormal", "the largest finite") for d in DTYPES[1:]]


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize(("ties", "dtype"), TIED, ids=str)
def test_ties_are_counted(ties, dtype, backend):
    x = TIES[ties](randn(5000).to(dtype)).to(dtype)
    for k in (1, 2500, 5000):
        assert_selects([x], k, backend=backend)


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_at_both_ends_of_the_bracket_need_one_read(dtype, backend):
    x = (torch.arange(1 << 13, device=DEVICE) % 2 + 0.5).to(dtype)
    for k in (100, 1 << 12, (1 << 12) + 1):
        assert_selects([x], k, backend=backend, reads=1)


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_read_is_the_rule(dtype, backend):
    # a part of a binade: fewer patterns than bins in the bracket, as in large lists
    for seed in range(2 if INTERPRET else 20):
        x = (1 + 0.01 * randn(10_000, seed=seed).abs()).to(dtype)
        assert_selects([x], 4321, backend=backend, reads=1)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="millions of elements are too many for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_read_of_a_large_list(dtype, backend):
    tensors = [randn(1 << 11, 1 << 11, seed=i).to(dtype) for i in range(3)]
    for level in (0.01, 0.5, 0.9):
        k = round(level * 3 * 2**22)
        # a bracket far out in the tail has more patterns than bins
        assert_selects(tensors, k, backend=backend, reads=1 if level > 0.4 else None)


class LyingSample:
    """A ``reduce`` that claims all sampled keys were in one bin, and lets full reads pass."""

    def __init__(self, where, dtype, backend):
        self.header = 4 if backend == "triton" else 3
        highest = {torch.float32: 0x7F7FFFFF >> 14, torch.float16: 0x7BFF, torch.bfloat16: 0x7F7F}
        # of float32's second sample, any bin will do
        bins = [highest[dtype], 1000] if where == "high" else [0, 0]
        # the first call is about the number of elements
        self.bins = [None, *bins[: 2 if dtype == torch.float32 else 1]]

    def __call__(self, counts):
        lie = self.bins.pop(0) if self.bins else None
        if lie is None:
            return counts
        mass = counts.sum()
        counts = torch.zeros_like(counts)
        counts[self.header + lie] = mass
        if self.header == 3:
            counts[2] = mass  # all that were seen
        return counts


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("where", ["low", "high"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_missed_bracket_is_noticed_and_repaired(dtype, where, backend):
    x = randn(6000).to(dtype)
    for k in (1, 3000, 6000):
        reduce = LyingSample(where, dtype, backend)
        assert_selects([x], k, reduce=reduce, backend=backend)
        # a lie about the extremes is covered by the margin
        assert READS[0] > 1 or k != 3000


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_that_hides_from_the_sample_is_found(dtype, backend):
    if backend == "triton":
        pytest.skip("what the kernel draws is not known outside it")
    x = randn(30_000).to(dtype)
    step = search.sample_step(x.numel(), search_torch._SAMPLE) | 1
    for piece in search_torch._pieces([x], None, step):
        piece.values[piece.skip :: step] = 1e-4
    assert step > 1
    assert (x == 1e-4).any()
    assert_selects([x], 20_000, backend=backend)
    assert READS[0] > 1


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("size", [100, 4000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_keys_are_counted(dtype, size, backend):
    x = randn(size).to(dtype)
    y = randn(7).to(dtype)
    for bad, k in ((NAN, 0), (NAN, 1), (NAN, size + 7), (-INF, size // 2)):
        x[::9] = bad
        assert numbers(select([x, y], k, backend=backend))[2] == len(x[::9])
        assert READS[-1] <= most_reads([x], None)
    # infinities are keys like others, only counted too
    x[::9] = INF
    assert_selects([x, y], size + 7, backend=backend)


def test_scales_can_make_keys_nonfinite(backend):
    x = torch.tensor([3e38, 1.0, INF, 0.0], device=DEVICE)
    for scale, count in ((2.0, 2), (0.0, 1), (NAN, 4)):
        scales = torch.tensor([scale], device=DEVICE)
        with np.errstate(all="ignore"):  # the interpreter's
            assert numbers(select([x], 1, scales=scales, backend=backend))[2] == count


VIEWS = {
    "transposed": lambda x: x.T,
    "permuted": lambda x: x.view(6, 10, 75).permute(1, 2, 0),
    "unaligned": lambda x: x.view(-1)[1:],
    "sliced": lambda x: x[:, 3:40],
    "every other": lambda x: x[:, ::2],
    "rows": lambda x: x[5:30],
    "expanded": lambda x: x[:1].expand(50, -1),
    "expanded column": lambda x: x[:, :1].expand(-1, 50),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_respected(view, dtype, backend):
    tensors = [VIEWS[view](randn(60, 75).to(dtype)), randn(11).to(dtype)]
    assert_selects(tensors, 1001, backend=backend)


def test_dense_views_are_not_copied():
    x = randn(4, 6, 8)
    for view in (x, x.permute(2, 0, 1), x.mT, x[1:], x[:0], x[0, 0, 0]):
        flat = search.flat_view(view)
        assert flat.numel() == view.numel()
        assert flat.data_ptr() == view.data_ptr()
    for view in (x[..., 1:], x[:, ::2], x[:1].expand(3, 6, 8), x.as_strided((3, 3), (1, 1))):
        assert search.flat_view(view) is None


@pytest.mark.usefixtures("small_samples")
def test_many_tensors_and_types_make_one_list(backend, monkeypatch):
    # more than a program looks at together, some of them not aligned
    monkeypatch.setattr(search_triton, "_SEARCH", 16)
    tensors = [randn(8 + i % 5, seed=i).to(DTYPES[i % len(DTYPES)])[i % 3 :] for i in range(34)]
    tensors[20] = randn(3000)
    total = sum(t.numel() for t in tensors)
    scales = torch.arange(34, device=DEVICE) / 20
    assert_selects(tensors, total // 2, backend=backend)
    assert_selects(tensors, total // 2, scales, backend=backend)


@pytest.mark.parametrize("layout", ["every other", "expanded"])
def test_scales_may_have_any_stride(layout, backend):
    tensors = [randn(30, seed=i) for i in range(3)]
    factors = torch.tensor([0.3, 100.0, 2.0, 0.0, 1.0], device=DEVICE)
    scales = factors[::2] if layout == "every other" else factors[:1].expand(3)
    assert_selects(tensors, 41, scales, backend=backend)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.device("meta")], ids=str)
@pytest.mark.parametrize("k", [0, 99])
def test_torchs_defaults_do_not_matter(k, default, backend):
    x = randn(200)
    with other_default(default):
        threshold = select([x], k, backend=backend)
        reference = select_reference([x], k, x.new_ones(1))
    assert numbers(threshold) == numbers(reference) == want([x], k)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.device("meta")], ids=str)
def test_torchs_defaults_do_not_matter_to_scales_of_one(default):
    weights = [torch.zeros(4, 4, device=DEVICE), torch.full((3, 3), 1.0, device=DEVICE)]
    for pattern in (Unstructured(), Block(2, 2)):
        with other_default(default):
            _, scales = block_scores(weights, pattern, normed=True)
        assert torch.equal(scales, torch.tensor([1, 1 / 3], device=DEVICE))


def test_parameters_are_read_without_a_graph(backend):
    x = randn(50, 50).requires_grad_()
    threshold = select([x], 99, backend=backend)
    assert not threshold.value.requires_grad
    assert numbers(threshold) == want([x], 99)


@pytest.mark.usefixtures("small_samples")
def test_twice_is_bit_equal(backend):
    tensors = [randn(5000), randn(300)]
    first = select(tensors, 1000, backend=backend)
    second = select(tensors, 1000, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Ranks:
    """Run one function a rank, one at a time, and switch when they reduce."""

    def __init__(self, count):
        self.count = count
        self.running = threading.Lock()
        self.barrier = threading.Barrier(count)
        self.offered = [None] * count

    def reduce(self, rank, calls):
        def reduce(counts):
            self.offered[rank] = counts.clone()
            counts.fill_(-1)  # it may work in place
            calls.append(len(counts))
            self.running.release()
            self.barrier.wait(60)
            summed = sum(self.offered)
            self.barrier.wait(60)
            self.running.acquire()
            return summed

        return reduce

    def run(self, function):
        results, calls = [None] * self.count, [[] for _ in range(self.count)]

        def work(rank):
            with self.running:
                try:
                    results[rank] = function(rank, self.reduce(rank, calls[rank]))
                except Exception as error:
                    results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(sizes == calls[0] for sizes in calls)
        return results


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize(("dtype", "scaled"), [(d, d != torch.float32) for d in DTYPES], ids=str)
def test_ranks_select_over_all_of_their_tensors(dtype, scaled, backend):
    # one large enough to be sampled, one not, one with nothing
    ranks = [
        [randn(6000, seed=1).to(dtype), randn(40, seed=2).to(dtype)],
        [3 * randn(500, seed=3).to(dtype)],
        [randn(0).to(dtype)],
    ]
    everything = [t for tensors in ranks for t in tensors]
    factors = [torch.tensor(f, device=DEVICE) for f in ([1.0, 2.0], [0.1], [1.0])]
    for k in (0, 3, 5000):

        def local(rank, reduce, k=k):
            return numbers(
                select(
                    ranks[rank],
                    k,
                    scales=factors[rank] if scaled else None,
                    reduce=reduce,
                    backend=backend,
                )
            )

        results = Ranks(3).run(local)
        assert results == [want(everything, k, torch.cat(factors) if scaled else None)] * 3


@pytest.mark.usefixtures("small_samples")
def test_one_ranks_nan_is_known_to_all(backend):
    ranks = [[randn(3000)], [randn(50)]]
    ranks[1][0][7] = NAN
    results = Ranks(2).run(
        lambda rank, reduce: numbers(select(ranks[rank], 99, reduce=reduce, backend=backend))[2]
    )
    assert results == [1, 1]


def test_a_k_beyond_all_ranks_does_not_pass_as_an_answer(backend):
    def local(rank, reduce):
        return select([randn(10)], 21, reduce=reduce, backend=backend)

    for result in Ranks(2).run(local):
        if backend == "triton":
            assert result.value.isnan()
        else:
            assert str(result) == "select: k must be at most the 20 elements of all ranks, got 21"


@pytest.mark.parametrize("scaled", [True] if INTERPRET else [True, False])
def test_opcheck(scaled):
    scales = torch.tensor([0.5, 2.0], device=DEVICE) if scaled else None
    tensors = [randn(33, 5), randn(70)]
    torch.library.opcheck(torch.ops.triton_sparsity.select.default, (tensors, 100, scales))


def test_it_compiles_into_a_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def prune(x, y):
        value, _, _ = select([x, y], 120)
        return x * (x.abs() > value)

    x, y = randn(33, 5), randn(70)
    value = want([x, y], 120)[0]
    assert torch.equal(prune(x, y), x * (x.abs() > value))


@pytest.mark.skipif(INTERPRET, reason="float64 does not go through Triton")
def test_float64_is_rounded_to_float32(backend):
    x = randn(3000).double() * (1 + 1e-9)
    assert numbers(select([x], 1500)) == want([x], 1500)
    if backend == "triton":
        with pytest.raises(ValueError, match="got float64"):
            select([x], 1500, backend="triton")


@pytest.mark.skipif(INTERPRET, reason="the interpreter's memory says nothing")
@pytest.mark.parametrize("data", ["normal", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_is_bounded_on_the_cpu(dtype, data, backend):
    if backend == "triton":
        pytest.skip("it is about numpy's memory")
    x = randn(1 << 25).to(dtype)
    if data == "tied":
        x = torch.where(x > 0, 0.5, 1.5).to(dtype)
    tracemalloc.start()
    try:
        select([x], x.numel() // 2, backend=backend)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.numel()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_nothing_waits_for_the_device(backend):
    if backend == "torch":
        pytest.skip("it counts in the host's memory")
    tensors = [randn(1 << 22), randn(1000)]
    scales = torch.ones(2, device=DEVICE)
    select(tensors, 1 << 20, scales=scales, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(tensors, 1 << 20, scales=scales, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_TRITON, reason="it is about the kernel's offsets")
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "generic"])
def test_offsets_beyond_2_to_the_31_are_64_bit(aligned, backend):
    if backend == "torch":
        pytest.skip("it is about the kernel's offsets")
    size = 2**31 + 8192
    # never touched but at its end, so that it takes no memory
    memory = np.zeros(size, np.float16)
    memory[-8192:-4096] = 1.0
    memory[-4096:] = NAN
    x = torch.from_numpy(memory).to(DEVICE)
    (launch,) = search_triton._launches([x], 1)
    if not aligned:
        (launch,) = search_triton._launches([x[1:]], 1)
    assert launch.aligned is aligned
    # begin near the end: as if the first tiles were behind
    address, covered, position, _, tiles = launch.table.tolist()
    skipped = tiles - 6
    table = torch.tensor([address, covered, position, -skipped, 6], device=DEVICE)
    plan = search.plan_of([x], None)
    state = torch.tensor([0, 0, plan.top, 0, plan.top, 0, 0, 0, 0], device=DEVICE)
    counts = torch.zeros(1, search_triton._HEADER + plan.bins, dtype=torch.int64, device=DEVICE)
    search_triton._launch_count(
        launch._replace(table=table, tiles=6), plan, None, state, counts, exactly=True
    )
    bins = counts[0, search_triton._HEADER :]
    span = launch.rows * launch.vec
    assert counts[0, 3] == 4096
    assert bins[0x3C00] == 4096
    assert bins[0] == covered - skipped * span - 8192
    assert bins.sum() == bins[0] + 4096


@pytest.mark.skipif(not ON_TRITON, reason="it is about the kernel")
def test_a_finished_search_reads_nothing():
    x = randn(5000)
    plan = search.plan_of([x], None)
    counts = torch.zeros(1, search_triton._HEADER + plan.bins, dtype=torch.int64, device=DEVICE)
    (launch,) = search_triton._launches([x], 1)
    for done in (1, 0):
        state = torch.tensor([done, 0, plan.top, 0, plan.top, 13, 0, 0, 0], device=DEVICE)
        search_triton._launch_count(launch, plan, None, state, counts, exactly=True)
        assert counts.any() == (not done)


BAD = {
    "no tensors": (lambda x: ([], 0, None), "tensors must be at least one tensor, got none"),
    "integers": (lambda x: ([x, x.int()], 0, None), "tensors must be float32.*got torch.int32"),
    "complex": (lambda x: ([x + 0j], 0, None), "tensors must be float32.*got torch.complex64"),
    "two devices": (
        lambda x: ([x, x.to("meta")], 0, None),
        "tensors must be on one device, got .* and meta",
    ),
    "k too large": (lambda x: ([x, x], 13, None), "k must be from 0 to 12 elements, got 13"),
    "k negative": (lambda x: ([x], -1, None), "k must be from 0 to 6 elements, got -1"),
    "too few scales": (
        lambda x: ([x, x], 1, x.new_ones(1)),
        r"scales must be float32 \(2,\) on .*, got torch.float32 \(1,\)",
    ),
    "scales' type": (
        lambda x: ([x], 1, x.new_ones(1).double()),
        r"scales must be float32 \(1,\) on .*, got torch.float64 \(1,\)",
    ),
    "scales' device": (
        lambda x: ([x], 1, torch.ones(1, device="meta")),
        r"scales must be float32 .* got .* on meta",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad, backend):
    make, message = BAD[bad]
    tensors, k, scales = make(randn(2, 3))
    with pytest.raises(ValueError, match=f"^select: {message}"):
        select(tensors, k, scales=scales, backend=backend)


ELEMENTS = {  # what is loaded, bytes, scaled, pattern, bins
    "bfloat16": ("int16", 2, False, 0x7FFF, 1 << 15),
    "float32": ("int32", 4, False, 0x7FFFFFFF, 1 << 18),
    "bfloat16 scaled": ("bfloat16", 2, True, 0x7FFFFFFF, 1 << 18),
    "float16 scaled": ("float16", 2, True, 0x7FFFFFFF, 1 << 18),
    "float32 scaled": ("float32", 4, True, 0x7FFFFFFF, 1 << 18),
}


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    ("arch", "variant", "elements"),
    # all of them for one device, what is common for each
    [
        *((90, f"aligned {read}", of) for of in ELEMENTS for read in ("full", "repair", "sample")),
        *((90, f"generic {read}", of) for of in ELEMENTS for read in ("full", "sample")),
        *((arch, "aligned full", of) for arch in (80, 100) for of in ELEMENTS),
    ],
)
def test_elements_are_read_16_bytes_at_a_time(arch, elements, variant):
    aligned, read = variant.startswith("aligned"), variant.split()[1]
    loaded, size, scaled, pattern, bins = ELEMENTS[elements]
    rows, vec = (512, 16 // size) if aligned else (2048, 1)
    types = dict.fromkeys(["table_ptr", "state_ptr", "counts_ptr"], "*i64")
    types |= {"tensors": "i32", "stride": "i32", "scales_ptr": "*fp32"}
    constants = {
        "DTYPE": getattr(tl, loaded), "PATTERN": pattern, "INFINITY": pattern - 0x7F,
        "ALIGNED": aligned, "SCALED": scaled, "SAMPLED": read == "sample",
        "COUNT_NONFINITE": read != "full", "BINS": bins, "COPIES": (1 << 20) // bins,
        "ROWS": rows, "VEC": vec, "RUN": 32 // (vec * size), "SEARCH": search_triton._SEARCH,
        "PAIRS": arch == 90 and pattern == 0x7FFF,
    }  # fmt: skip
    if not scaled:
        constants["scales_ptr"] = None
    compiled = aot.compile_for(arch, search_triton._count_kernel, types, constants)
    aot.assert_lean(compiled, arch)
    assert ".ftz" not in compiled.ptx  # subnormal keys count
    loads = compiled.global_loads()
    per_thread = rows * vec * size // (4 * 32)
    if aligned:
        # numbers of the state, neighbours, may be read 16 bytes at a time too
        assert loads.count(16) >= per_thread // 16
        assert loads.count(size) < per_thread // size
        # as many programs run at a time as are launched
        assert compiled.registers <= 96
    else:
        assert loads.count(size) >= per_thread // size


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
def test_pairs_of_16_bit_patterns_take_eight_instructions_an_element():
    types = dict.fromkeys(["table_ptr", "state_ptr", "counts_ptr"], "*i64")
    types |= {"tensors": "i32", "stride": "i32"}
    constants = {
        "DTYPE": tl.int16, "PATTERN": 0x7FFF, "INFINITY": 0x7F80, "ALIGNED": True,
        "SCALED": False, "SAMPLED": False, "COUNT_NONFINITE": False, "BINS": 1 << 15,
        "COPIES": 32, "ROWS": 512, "VEC": 8, "RUN": 2, "SEARCH": search_triton._SEARCH,
        "PAIRS": True, "scales_ptr": None,
    }  # fmt: skip
    numbers = ("tensors", "stride")
    compiled = aot.compile_for(
        90, search_triton._count_kernel, types, constants, unspecialized=numbers
    )
    loads = 512 * 8 // 128 * 2 // 16
    bodies = [body for body in aot.loops(compiled.sass) if sum("LDG" in i for i in body) == loads]
    pairs = [body for body in bodies if not any("RED" in i or "ATOM" in i for i in body)]
    binned = [body for body in bodies if body not in pairs]
    elements = 512 * 8 // 128
    assert len(min(pairs, key=len)) <= 8 * elements
    # what other brackets take
    assert len(min(binned, key=len)) <= 20 * elements


@pytest.mark.skipif(not ON_TRITON, reason="it is about the kernel")
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRET else DTYPES[1:], ids=str)
def test_pairs_are_counted_as_bins_are(dtype):
    tensors = [torch.randint(-9, 9, (n,)).to(DEVICE).to(dtype) for n in (64, 4104, 9000)]
    tensors[1][7] = -0.0
    plan = search.plan_of(tensors, None)
    (launch,) = search_triton._launches(tensors, 1)
    keys = torch.cat(tensors).cpu().view(torch.int16).int() & 0x7FFF
    found = keys.unique().tolist()
    some = found[1 :: 12 if INTERPRET else 3]
    for lo, width in [(0, 1), (0, 2), *((key - n, 2) for key in some for n in (0, 1))]:
        for tied in (False, True):
            hi = lo + width
            start, last = (lo + 1, max(hi - 1, lo + 1)) if tied else (lo, hi)
            state = torch.tensor([0, lo, hi, start, last, 0, 0, 0, 0], device=DEVICE)
            counts = torch.zeros(
                1, search_triton._HEADER + plan.bins, dtype=torch.int64, device=DEVICE
            )
            search_triton._launch_count(launch, plan, None, state, counts, exactly=False)
            header, bins = counts[0, :4].tolist(), counts[0, 4:]
            assert header[0] == (keys < start).sum()
            assert header[1] == ((keys == lo).sum() if start > lo else 0)
            assert header[2] == ((keys == hi - 1).sum() if last < hi else 0)
            assert bins[: last - start].tolist() == [
                (keys == key).sum() for key in range(start, last)
            ]
            assert not bins[last - start :].any()
            assert not header[3]
    tensors[2][5] = INF
    search_triton._launch_count(launch, plan, None, state, counts, exactly=False)
    assert counts[0, 3] > 0


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("sampled", [True, False], ids=["sample", "full"])
@pytest.mark.parametrize("bins", [1 << 15, 1 << 17, 1 << 18])
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_the_narrowing_kernel_is_lean(arch, bins, sampled):
    names = ["state_ptr", "counts_ptr", "coarse_ptr", "pool_ptr", "out_ptr"]
    constants = {
        "SAMPLED": sampled, "COUNT_NONFINITE": sampled, "TOP": 0x7F81, "BINS": bins,
        "COARSE": search_triton._COARSE,
    }  # fmt: skip
    types = dict.fromkeys(names, "*i64") | {"k": "i64"}
    compiled = aot.compile_for(
        arch, search_triton._narrow_kernel, types, constants, num_warps=search_triton.NARROW_WARPS
    )
    aot.assert_lean(compiled, arch)


def test_kth_smallest_of_signed_values(backend):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(50, generator=generator), torch.zeros(7), -torch.rand(3, 4)]
    values = [tensor.to(DEVICE) for tensor in values]
    ordered = torch.cat([v.flatten() for v in values]).sort().values
    # the interpreter takes its time
    for k in range(1, len(ordered) + 1, 11 if INTERPRET else 1):
        assert kth_smallest(values, k, backend) == ordered[k - 1]
