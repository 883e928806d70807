"""Run a warp-specialised Gluon kernel's own Python source, without a GPU or a compiler.

Gluon has no interpreter. Here the names that a kernel knows, ``gl``, ``mbarrier``, ``tma`` and the
``wgmma`` functions, are replaced by models of what the hardware does with them. Each partition is
a thread; copies and products end later than they were issued. One actor runs at a time, and which
one a random generator draws at every operation on shared state: so a seed is an interleaving.

``Fault`` is raised for what would be a hang or a race on the device:

- all partitions wait and nothing is under way,
- a stage is filled while its last content is still to be read by a consumer, or read while it is
  being filled,
- a barrier gets more arrivals than its phase has,
- shared memory is rewritten, or given up, while a store still reads it, or was not fenced before.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from types import FunctionType, SimpleNamespace

import numpy as np


class Fault(AssertionError):
    """What would be a hang or a race on the device."""


class _Stopped(BaseException):
    """Ends a partition whose run is over."""


class Tensor(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype):
        return self.astype(dtype).view(Tensor)

    def permute(self, *axes):
        return self.transpose(axes)

    def split(self):
        return self[..., 0], self[..., 1]


class Pointer:
    """An address in a list."""

    def __init__(self, values, offset=0):
        self.values, self.offset = values, offset

    def __add__(self, other):
        return Pointer(self.values, self.offset + other)


def _load(pointer, mask=True, other=0):
    at, inside = np.broadcast_arrays(pointer.offset, mask)
    if inside.any() and not (at[inside] >= 0).all() & (at[inside] < len(pointer.values)).all():
        raise Fault(f"a load at {at[inside]} of a list of {len(pointer.values)}")
    found = np.where(inside, pointer.values[np.where(inside, at, 0)], other)
    return found.view(Tensor) if found.ndim else found.item()


class Descriptor:
    """A matrix, and the tiles in which the copy engine moves it."""

    def __init__(self, matrix, rows, cols):
        self.matrix, self.dtype, self.layout = matrix, matrix.dtype, None
        nbytes = rows * cols * matrix.itemsize
        self.block_type = SimpleNamespace(shape=[rows, cols], nbytes=nbytes)
        self.writes = np.zeros(matrix.shape, int)

    def _window(self, coord):
        """Return the part of a tile that is inside, in the tile and in the matrix."""
        within, whole = [], []
        for start, size, side in zip(coord, self.block_type.shape, self.matrix.shape, strict=True):
            stop = max(min(start + size, side), start)
            within.append(slice(0, stop - start))
            whole.append(slice(start, stop))
        return tuple(within), tuple(whole)

    def read(self, coord):
        tile = np.zeros(self.block_type.shape, self.dtype)
        within, whole = self._window(coord)
        tile[within] = self.matrix[whole]
        return tile

    def write(self, coord, tile):
        within, whole = self._window(coord)
        self.matrix[whole] = tile[within]
        self.writes[whole] += 1


class Slot:
    """One of a buffer's pieces, and who is at work on it."""

    def __init__(self, shape, dtype):
        self.content = np.full(shape, np.nan, dtype)
        self.filling, self.unread, self.reading, self.fenced = False, 0, 0, True


class View:
    """A slot, or a part of it; ``store`` keeps a tensor in it."""

    def __init__(self, slot, content, store):
        self.slot, self.content, self.keep = slot, content, store

    def slice(self, start, length):
        return View(self.slot, self.content[start : start + length], self.keep)

    def permute(self, axes):
        return View(self.slot, self.content.transpose(axes), self.keep)

    def store(self, value):
        self.keep(self, value)


class Barrier:
    """An mbarrier: ``phase`` counts those that are complete."""

    def __init__(self):
        self.count = self.phase = self.pending = self.bytes = 0

    def arrive(self, count=1, nbytes=0):
        if self.pending < count:
            raise Fault("more arrivals than a phase has")
        self.pending -= count
        self.move(nbytes)

    def move(self, nbytes):
        self.bytes += nbytes
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Sums:
    """An accumulator, and the groups of products that are still to be added."""

    def __init__(self, value):
        self.value, self.groups = value, deque()


class Partition(threading.Thread):
    """A partition: it runs only between ``wake`` and the next ``idle``."""

    def __init__(self, machine, function, arguments):
        super().__init__(daemon=True)
        self.machine, self.function, self.arguments = machine, function, arguments
        self.wake, self.waits_for, self.error = threading.Semaphore(0), None, None
        self.sums, self.stores, self.unfenced = [], deque(), []

    def run(self):
        self.wake.acquire()
        try:
            if not self.machine.over:
                self.function(*self.arguments)
                if self.stores:
                    raise Fault("shared memory is given up while a store reads it")
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.waits_for = False  # it has ended
        self.machine.idle.release()


class Machine:
    """One program's multiprocessor; ``names`` are what its kernel is to know."""

    def __init__(self, seed, program, programs, consumers):
        self.random, self.consumers = random.Random(seed), consumers
        self.idle, self.over, self.current = threading.Semaphore(0), False, None
        self.partitions, self.copies, self.slots = [], [], []
        gl = SimpleNamespace(
            load=_load, cdiv=lambda a, b: -(-a // b), static_range=range, float32=np.float32,
            int64="barriers", maximum=max, minimum=min, where=lambda c, a, b: a if c else b,
            program_id=lambda _: program, num_programs=lambda _: programs,
            arange=lambda a, b, _: np.arange(a, b).view(Tensor), SliceLayout=lambda *_: None,
            zeros=lambda shape, dtype, _: np.zeros(shape, dtype).view(Tensor),
            NVMMADistributedLayout=lambda *_: None, warp_specialize=self._specialise,
            allocate_shared_memory=self._allocate,
        )  # fmt: skip
        self.names = {
            "gl": gl,
            "tl": gl,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: None, init=self._init, expect=self._expect,
                wait=self._wait, arrive=self._arrive,
            ),
            "tma": SimpleNamespace(store_wait=self._store_wait),
            "_load_tile": self._fetch,
            "_store_tile": self._store,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_init": lambda v: v if isinstance(v, Sums) else self._sums(v),
            "warpgroup_mma_wait": self._multiply_wait,
            "fence_async_shared": self._fence,
        }  # fmt: skip

    def know(self, **functions):
        """Let the kernel call plain functions by these names, with all others replaced."""
        for name, function in functions.items():
            around = {**function.__globals__, **self.names}
            self.names[name] = FunctionType(function.__code__, around, name)
        for function in functions:
            self.names[function].__globals__.update(self.names)

    def run(self, kernel, *arguments):
        """Run a kernel to its end; raise ``Fault`` for what would be a hang or a race."""
        self.names[kernel](*arguments)
        for partition in self.partitions:
            partition.start()
        try:
            while not all(partition.waits_for is False for partition in self.partitions):
                self._advance()
        finally:
            self.over = True
            for partition in self.partitions:
                partition.wake.release()
        if self.copies or any(slot.unread for slot in self.slots):
            raise Fault("operands were brought that nobody read")

    def _advance(self):
        """Let one actor do one thing."""
        groups = [sums for p in self.partitions for sums in p.sums if sums.groups]
        stores = [p for p in self.partitions if p.stores]
        ready = [p for p in self.partitions if p.waits_for is None or self._may_go(p)]
        actors = [*self.copies, *groups, *stores, *ready]
        if not actors:
            raise Fault("all partitions wait, and nothing is under way")
        actor = self.random.choice(actors)
        if isinstance(actor, Sums):
            self._add(actor)
        elif actor in ready and not (actor in stores and self.random.random() < 0.5):
            actor.waits_for, self.current = None, actor
            actor.wake.release()
            self.idle.acquire()
            if actor.error is not None:
                raise actor.error
        elif isinstance(actor, Partition):
            self._write(actor)
        else:
            self.copies.remove(actor)
            actor()

    @staticmethod
    def _may_go(partition):
        return bool(partition.waits_for and partition.waits_for())

    def _pause(self, until=None):
        """Let others go on, at least until something is so."""
        me = self.current
        if me is None:  # before the partitions start
            return
        me.waits_for = until
        self.idle.release()
        me.wake.acquire()
        if self.over:
            raise _Stopped

    # -- what a kernel calls ------------------------------------------------------------------

    def _allocate(self, dtype, shape, _):
        if dtype == "barriers":
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=barriers.__getitem__, shape=shape)
        slots = [Slot(shape[1:], dtype) for _ in range(shape[0])]
        self.slots += slots

        def index(i):
            return View(slots[i], slots[i].content, self._keep)

        return SimpleNamespace(index=index, shape=shape)

    def _specialise(self, partitions, *_):
        self.partitions = [Partition(self, *partition) for partition in partitions]

    @staticmethod
    def _init(barrier, count):
        barrier.count = barrier.pending = count

    def _expect(self, barrier, nbytes):
        self._pause()
        barrier.arrive(nbytes=-nbytes)

    def _wait(self, barrier, phase):
        assert phase in (0, 1)
        self._pause(lambda: barrier.phase % 2 != phase)

    def _arrive(self, barrier, pred=True):
        self._pause()
        if pred:
            barrier.arrive()

    def _fetch(self, source, coord, barrier, view):
        self._pause()
        slot = view.slot
        if slot.filling or slot.unread or slot.reading:
            raise Fault("a stage is filled before it was read")
        slot.filling, slot.unread = True, self.consumers
        slot.content[...] = np.nan

        def arrive():
            slot.content[...] = source.read(coord)
            slot.filling = False
            barrier.move(source.block_type.nbytes)

        self.copies.append(arrive)

    def _sums(self, value):
        sums = Sums(value)
        self.current.sums = [sums]
        return sums

    def _multiply(self, a, b, sums, is_async):
        assert is_async
        self._pause()
        for operand in (a, b):
            if operand.slot.filling or not operand.slot.unread:
                raise Fault("a stage is read before it was filled")
            operand.slot.reading += 1
        sums.groups.append((a, b))
        return sums

    @staticmethod
    def _add(sums):
        a, b = sums.groups.popleft()
        sums.value += a.content @ b.content
        for operand in (a, b):
            operand.slot.reading -= 1
            operand.slot.unread -= 1

    def _multiply_wait(self, outstanding, deps):
        (sums,) = deps
        self._pause(lambda: len(sums.groups) <= outstanding)
        return sums if outstanding else sums.value

    def _keep(self, view, value):
        self._pause()
        if view.slot.reading:
            raise Fault("shared memory is rewritten while a store reads it")
        view.content[...] = value
        view.slot.fenced = False
        self.current.unfenced.append(view.slot)

    def _fence(self):
        for slot in self.current.unfenced:
            slot.fenced = True
        self.current.unfenced = []

    def _store(self, target, coord, view):
        self._pause()
        if not view.slot.fenced:
            raise Fault("shared memory is stored that was not fenced")
        view.slot.reading += 1
        self.current.stores.append((target, coord, view))

    @staticmethod
    def _write(partition):
        target, coord, view = partition.stores.popleft()
        target.write(coord, view.content)
        view.slot.reading -= 1

    def _store_wait(self, outstanding):
        stores = self.current.stores
        self._pause(lambda: len(stores) <= outstanding)
