"""The product of ``block_sparse_product.py`` for Hopper, with warps of two kinds, in Gluon.

A producer warp walks this program's tiles and their kept blocks, and has the bulk copy engine
bring the operands of one step after the other into a ring of stages. One or two groups of four
consumer warps multiply them, each its share of a tile's tokens, and store its sums. What one kind
waits for the other need not: while consumers convert and store a tile, the producer fills the ring
with the next one's operands, and no consumer computes an operand's address or loads an index.

**The ring.** A stage is one step's tile of x and one of w. It has two barriers: ``full``, of which
a phase ends when all bytes of both have arrived, and ``empty``, of which one ends when every
consumer has read them. Steps are numbered through all tiles: step i is in stage i % STAGES, as its
use i // STAGES. Use u is filled after the ``empty`` of use u - 1, and read after the ``full`` of
use u. A barrier knows the last phase from the one before by a bit, which each side carries from
tile to tile. Before the first round there is no use: to wait for the phase before a barrier's
first returns at once.

**Sums.** One ``wgmma`` group stays in flight across steps, as in the other kernel: a stage is
given back when the next one's group was issued. A tile without kept blocks takes no step at all.

It is launched only where a tuning table has measured it to be faster: for a tile that is
``specialised``. It needs 16-bit operands that the bulk copy engine can address, and no split of
the sums; ``launch_product`` takes the other kernel elsewhere. Gluon has no interpreter;
``tests/gluon_replay.py`` runs this file's own functions on a model of barriers and copies.

**No multicast.** Two programs of a cluster could share w's tiles. Triton 3.7.1 can launch clusters
and multicast, but not so: only the copy's arrivals reach the other program. ``mbarrier.arrive``
stays in its own, so that the one that copies cannot know when the other has emptied a stage; and
the barrier of a cluster, which all its threads must reach, is compiled for the first partition's
alone. 3.6 has neither.

Reading order: the walk -> producer -> consumer -> kernel -> launcher.
"""

# Gluon is typed as what Python would make of it, not as its compiler does
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import block_sparse_product as product
from .launch import FUSED, on_device
from .schedule import Plan
from .tiles import stores

# their names from Triton 3.9 on, and before
if hasattr(tma, "async_load"):
    _load_tile, _store_tile = tma.async_load, tma.async_store
else:
    _load_tile, _store_tile = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

# a thread; together what a multiprocessor has for three groups
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24

# the other kernel's schedule, in Gluon
_place = gluon.jit(product._place.fn)
_dealt = gluon.jit(product._dealt.fn)


@gluon.jit
def _task(
    turn,
    task_ptr,
    walk,
    SIDE_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Return where this program's tile of round ``turn`` lies, and its part of the index list."""
    num_m, bands, group, shift = walk
    PER_TASK: gl.constexpr = SIDE_N // BLOCK_N
    tile_m, band = _place(_dealt(turn, shift), num_m, bands, group)
    task = task_ptr + band // PER_TASK * 3
    n = gl.load(task) * SIDE_N + band % PER_TASK * BLOCK_N
    return tile_m * BLOCK_M, n, gl.load(task + 1), gl.load(task + 2)


@gluon.jit
def _produce(
    x,
    w,
    ring,
    task_ptr,
    index_ptr,
    walk,
    turns,
    W_BY_K: gl.constexpr,
    SIDE_N: gl.constexpr,
    SIDE_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """Bring the operands of all steps of this program into the ring."""
    xs, ws, full, empty = ring
    STAGES: gl.constexpr = xs.shape[0]
    PARTS: gl.constexpr = SIDE_K // BLOCK_K
    stage, phase = 0, 0
    for turn in range(turns):
        m, n, entry, entries = _task(turn, task_ptr, walk, SIDE_N, BLOCK_M, BLOCK_N)
        block = gl.load(index_ptr + entry, mask=entries > 0, other=0)
        for i in range(entries):
            # a step ahead of its use
            following = gl.load(index_ptr + entry + i + 1, mask=i + 1 < entries, other=0)
            for part in range(PARTS):
                k = block * SIDE_K + part * BLOCK_K
                mbarrier.wait(empty.index(stage), phase ^ 1)
                arrived = full.index(stage)
                mbarrier.expect(arrived, x.block_type.nbytes + w.block_type.nbytes)
                _load_tile(x, [m, k], arrived, xs.index(stage))
                if W_BY_K:
                    _load_tile(w, [k, n], arrived, ws.index(stage))
                else:
                    _load_tile(w, [n, k], arrived, ws.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            block = following


@gluon.jit
def _consume(
    y,
    bias_ptr,
    ring,
    staging,
    task_ptr,
    walk,
    turns,
    N,
    CONSUMER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    W_BY_K: gl.constexpr,
    SIDE_N: gl.constexpr,
    SIDE_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STORES: gl.constexpr,
):
    """Multiply the operands of all steps of this program, this consumer's share of the tokens."""
    xs, ws, full, empty = ring
    STAGES: gl.constexpr = xs.shape[0]
    PARTS: gl.constexpr = SIDE_K // BLOCK_K
    ROWS: gl.constexpr = y.block_type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out = staging.index(CONSUMER)
    stage, phase = 0, 0
    for turn in range(turns):
        m, n, _, entries = _task(turn, task_ptr, walk, SIDE_N, BLOCK_M, BLOCK_N)
        acc = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_N], gl.float32, layout))
        before = stage
        for step in range(entries * PARTS):
            mbarrier.wait(full.index(stage), phase)
            a = xs.index(stage).slice(CONSUMER * ROWS, ROWS)
            b = ws.index(stage) if W_BY_K else ws.index(stage).permute([1, 0])
            acc = warpgroup_mma(a, b, acc, is_async=True)
            # the step before has been read when all but the last group have ended
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            mbarrier.arrive(empty.index(before), pred=step > 0)
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        sums = warpgroup_mma_wait(0, deps=[acc])  # [ROWS, BLOCK_N]
        mbarrier.arrive(empty.index(before), pred=entries > 0)
        if HAS_BIAS:
            offs_n = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)  # [BLOCK_N]
            sums += bias.to(gl.float32)[None, :]
        m += CONSUMER * ROWS
        if STORES == 2:
            # one half after the other through a buffer of one
            halves = sums.reshape([ROWS, 2, BLOCK_N // 2]).permute(0, 2, 1).split()
            for half in gl.static_range(2):
                tma.store_wait(0)
                out.store(halves[half].to(y.dtype))
                fence_async_shared()
                _store_tile(y, [m, n + half * (BLOCK_N // 2)], out)
        else:
            tma.store_wait(0)
            out.store(sums.to(y.dtype))
            fence_async_shared()
            _store_tile(y, [m, n], out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "TASKS", "group", "shift"])
def _block_sparse_linear_specialised_kernel(
    x,  # descriptors: of a step's tiles of x and w, and of what a consumer stores at once of y
    w,
    y,
    bias_ptr,
    task_ptr,
    index_ptr,
    M,
    N,
    TASKS,
    group,  # as the plan's, and
    shift,
    HAS_BIAS: gl.constexpr,
    W_BY_K: gl.constexpr,  # w lies with its N elements side by side
    SIDE_N: gl.constexpr,
    SIDE_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    STORES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    num_m, bands = gl.cdiv(M, BLOCK_M), TASKS * (SIDE_N // BLOCK_N)
    tiles = num_m * bands
    turns = tiles // gl.num_programs(0)
    if _dealt(turns, shift) < tiles:
        turns += 1

    x_shape: gl.constexpr = x.block_type.shape
    w_shape: gl.constexpr = w.block_type.shape
    y_shape: gl.constexpr = y.block_type.shape
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, x_shape[0], x_shape[1]], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, w_shape[0], w_shape[1]], w.layout)
    staging = gl.allocate_shared_memory(y.dtype, [CONSUMERS, y_shape[0], y_shape[1]], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)

    ring = (xs, ws, full, empty)
    walk = (num_m, bands, group, shift)
    # written out, since a tuple that has a name holds no constants
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    y, bias_ptr, ring, staging, task_ptr, walk, turns, N, 0,
                    HAS_BIAS, W_BY_K, SIDE_N, SIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, STORES,
                )),
                (_consume, (
                    y, bias_ptr, ring, staging, task_ptr, walk, turns, N, 1,
                    HAS_BIAS, W_BY_K, SIDE_N, SIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, STORES,
                )),
                (_produce, (
                    x, w, ring, task_ptr, index_ptr, walk, turns,
                    W_BY_K, SIDE_N, SIDE_K, BLOCK_M, BLOCK_N, BLOCK_K,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    y, bias_ptr, ring, staging, task_ptr, walk, turns, N, 0,
                    HAS_BIAS, W_BY_K, SIDE_N, SIDE_K, BLOCK_M, BLOCK_N, BLOCK_K, STORES,
                )),
                (_produce, (
                    x, w, ring, task_ptr, index_ptr, walk, turns,
                    W_BY_K, SIDE_N, SIDE_K, BLOCK_M, BLOCK_N, BLOCK_K,
                )),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


def _descriptor(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Describe a matrix to the bulk copy engine, in tiles of ``rows`` by ``cols``."""
    kind = getattr(gl, str(matrix.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], kind)
    return TensorDescriptor(
        matrix, list(matrix.shape), list(matrix.stride()), [rows, cols], layout
    )


def launch_specialised(
    x: Tensor,
    stored: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tasks: Tensor,
    index: Tensor,
    side_n: int,
    side_k: int,
    by_k: bool,
    plan: Plan,
) -> None:
    """Compute ``y = x weight^T + bias`` over the blocks that ``tasks`` and ``index`` list.

    Args:
        x, y: as ``launch_product``'s, of 16 bits, which the bulk copy engine can address.
        stored: the weight as its rows lie in memory: [N, K], or if ``by_k`` [K, N].
        bias, tasks, index, side_n, side_k: as ``launch_product``'s.
        plan: the schedule; no split, and of a tile that ``tiles.can_specialise``.
    """
    tile, consumers = plan.tile, plan.tile.warps // 4
    with on_device(x):
        _block_sparse_linear_specialised_kernel[(plan.programs,)](
            _descriptor(x, tile.m, tile.k),
            _descriptor(stored, *((tile.k, tile.n) if by_k else (tile.n, tile.k))),
            _descriptor(y, tile.m // consumers, tile.n // stores(tile.n)),
            x if bias is None else bias, tasks, index, x.shape[0], y.shape[1], len(tasks),
            plan.group, plan.shift,
            HAS_BIAS=bias is not None,
            W_BY_K=by_k,
            SIDE_N=side_n,
            SIDE_K=side_k,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            STAGES=tile.stages,
            STORES=stores(tile.n),
            CONSUMERS=consumers,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4,
            **FUSED,
        )  # fmt: skip
