"""Gloo ranks for tests: four processes, forked once, that run functions by name.

To fork costs a tenth of a second, to start Python and import torch seconds. Workers that have
failed in the middle of a collective are started anew.
"""

import contextlib
import datetime
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import shutil
import tempfile
import traceback

import torch
from torch import distributed

SIZE = 4
# what cases import, which takes each rank up to a second, so that they are forked with it; torch's
# compiler too, which DDP and FSDP2 ask whether it traces
IMPORTED = (
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"),
    *("torch.distributed.tensor.parallel", "torch._dynamo.backends.debugging", "fsspec"),
    "transformers.pytorch_utils",
)
PATIENCE = 20  # seconds that a collective waits, and a third of what a case may take


def _core():
    """Return a core for all ranks, another for each worker of pytest-xdist."""
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return cores[int(worker) % len(cores)]


def _serve(rank, size, folder, pipe):
    # ranks wait for one another all the time. On one core, where nothing wakes another core, a
    # collective takes a quarter of the time, and half where threads do not preempt one another
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(0, {_core()})
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", size)
    options = {"timeout": datetime.timedelta(seconds=PATIENCE)}
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, **options)
    groups = {n: distributed.new_group(list(range(n))) for n in range(1, size)}
    groups[size] = distributed.group.WORLD
    while (task := pipe.recv()) is not None:
        function, members, args = pickle.loads(task)
        torch.manual_seed(rank)
        try:
            answer = None, function(groups[members], *args)
        except Exception as error:
            answer = (type(error).__name__, str(error), traceback.format_exc()), None
        pipe.send(pickle.dumps(answer))
    os._exit(0)


class Ranks:
    """Ranks, forked when first asked for. ``run`` returns what a function returned on each."""

    def __init__(self, size=SIZE):
        self._size = size
        self._workers = []

    def _start(self):
        # no process of another kind has what the test modules define
        context = multiprocessing.get_context("fork")
        with contextlib.suppress(ModuleNotFoundError):  # the last is not always there
            for name in IMPORTED:
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # nor do ranks look at what was imported, and copy it
        self._folder = tempfile.mkdtemp()
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            args = rank, self._size, self._folder, theirs
            worker = context.Process(target=_serve, args=args, daemon=True)
            worker.start()
            self._workers.append((worker, ours))

    def stop(self):
        for worker, _ in self._workers:
            worker.kill()
            worker.join()
        if self._workers:
            shutil.rmtree(self._folder)
        self._workers = []

    def answers(self, size, function, *args):
        """Return of each rank what it raised, as kind, message and traceback, and the result."""
        if not self._workers:
            self._start()
        chosen = self._workers[:size]
        for _, pipe in chosen:
            pipe.send(pickle.dumps((function, size, args)))
        found = []
        for _, pipe in chosen:
            try:
                answered = pipe.poll(3 * PATIENCE)
                answer = pipe.recv() if answered else None
            except (EOFError, OSError):
                self.stop()
                raise RuntimeError(
                    f"rank {len(found)} of {size} died in {function.__name__}"
                ) from None
            if not answered:
                self.stop()
                raise TimeoutError(f"rank {len(found)} of {size} hangs in {function.__name__}")
            found.append(pickle.loads(answer))
        if any(error for error, _ in found) and len({e and e[1] for e, _ in found}) > 2:
            self.stop()  # they may be out of step
        return found

    def run(self, size, function, *args):
        """Return what each rank returned."""
        found = self.answers(size, function, *args)
        for error, _ in found:
            assert error is None, error[2]
        return [result for _, result in found]

    def errors(self, size, function, *args):
        """Return the kind and message of what each rank raised."""
        found = self.answers(size, function, *args)
        assert all(error for error, _ in found), [result for error, result in found if not error]
        return [error[:2] for error, _ in found]


@functools.cache
def mesh_of(group, *names):
    """Return a mesh of a group's ranks, or by two names a square of all four.

    It is made once on a rank: each has groups of its own, and these have threads.
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if len(names) < 2:
        return DeviceMesh.from_group(group, "cpu", mesh_dim_names=names or None)
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


class LocalAdamW(torch.optim.AdamW):
    """AdamW that computes on the local parts of DTensors.

    The numbers are the same. DTensors' own operators are 40 % of the time of tests that train.
    """

    def _init_group(self, group, parameters, gradients, *states):
        from torch.distributed.tensor import DTensor

        found = super()._init_group(group, parameters, gradients, *states)
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
                gradients[i] = gradient.redistribute(placements=parameter.placements)
        for tensors in (parameters, gradients, *states):
            tensors[:] = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return found
