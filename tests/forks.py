"""Programs as forks of this process, which has imported what they need.

To import torch and transformers takes longer than all else that most of them do.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch


@dataclass(frozen=True)
class Fork:
    """A process that runs, and the files that it prints into."""

    process: BaseProcess
    out: Path
    err: Path

    def wait(self, seconds=120):
        """Return the exit status, a signal's negative; kill what takes longer."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def lines(self):
        """Return what it has printed, once it has ended well."""
        assert self.wait() == 0, self.err.read_text()
        return self.out.read_text().splitlines()


def fork(function, *args, folder, name="program", environment=None):
    """Start ``function(*args)`` in a working directory.

    ``name.out`` and ``name.err`` there are what it prints.
    """
    out, err = (folder / f"{name}.{kind}" for kind in ("out", "err"))
    context = multiprocessing.get_context("fork")
    here = (function, args, folder, out, err, environment or {})
    process = context.Process(target=_run, args=here)
    process.start()
    return Fork(process, out, err)


def fork_ranks(ranks, function, *args, folder):
    """Start a fork for each rank, as torchrun starts processes; return them by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        _, port = free.getsockname()
    forks = []
    for rank in range(ranks):
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        said |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in said.items()}
        where = {"folder": folder, "name": f"rank{rank}", "environment": environment}
        forks.append(fork(function, *args, **where))
    return forks


def _run(function, args, folder, out, err, environment):
    os.chdir(folder)
    os.environ.update(environment)
    with out.open("w", buffering=1) as sys.stdout, err.open("w", buffering=1) as sys.stderr:
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        torch.set_num_threads(1)
        warnings.resetwarnings()
        # what a shell starts in the background, as these tests may be, ignores the signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if "accelerate" in sys.modules:  # it says what the process is, once
            state = sys.modules["accelerate.state"].AcceleratorState
            state._reset_state(reset_partial_state=True)
        function(*args)


def run_script(path, *args):
    """Run a script as ``python -W error path args`` does."""
    warnings.simplefilter("error")
    # PEFT asks transformers for what it has renamed
    warnings.simplefilter("ignore", FutureWarning)
    sys.argv = [str(path), *args]
    runpy.run_path(str(path), run_name="__main__")
