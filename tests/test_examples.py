"""The examples run as they stand."""

import importlib
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SECONDS = 120  # a run takes a few; a machine may be busy
TORCHRUN = (sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone")


def run(name, folder, ranks=1):
    """Return what an example prints, on as many ranks as torchrun would start.

    They are forks of this process. To import what an example needs takes longer than all else
    that it does.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        _, port = free.getsockname()
    context = multiprocessing.get_context("fork")
    outputs = [folder / f"{name} {rank}" for rank in range(ranks)]
    processes = []
    for rank, output in enumerate(outputs):
        of_ranks = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost"}
        of_ranks |= {"LOCAL_RANK": rank, "MASTER_PORT": port}
        environment = {key: str(value) for key, value in of_ranks.items()} if ranks > 1 else {}
        process = context.Process(target=execute, args=(name, folder, output, environment))
        process.start()
        processes.append(process)
    for process, output in zip(processes, outputs, strict=True):
        process.join(SECONDS)
        process.kill()
        process.join()
        assert process.exitcode == 0, output.read_text()
    return [line for output in outputs for line in output.read_text().splitlines()]


def execute(name, folder, output, environment):
    """Be a process of its own that runs an example, every warning an error."""
    os.chdir(folder)
    os.environ.update(environment)
    with output.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        sys.argv = [name, str(folder)]
        torch.set_num_threads(1)
        warnings.resetwarnings()
        warnings.simplefilter("error")
        # PEFT asks transformers for what it has renamed
        warnings.simplefilter("ignore", FutureWarning)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name, tmp_path):
    source = (EXAMPLES / name).read_text()
    for module in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE):
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module)
    lines = run(name, tmp_path, ranks=2 if name == "tensor_parallel.py" else 1)
    assert lines
    if name in ("fsdp2.py", "tensor_parallel.py"):
        assert all(line.endswith("products block-sparse") for line in lines if "loss" in line)
    if name == "fsdp2.py":  # what one process has saved two go on from
        command = [*TORCHRUN, "--nproc-per-node", "2", str(EXAMPLES / name), str(tmp_path)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert done.returncode == 0, done.stderr
        again = done.stdout.splitlines()
        assert sorted(again)[-2:] == [f"rank {rank} of 2 goes on in epoch 3" for rank in (0, 1)]
        assert any(line.startswith("73728 weights are exactly zero") for line in again)
        whole = torch.load(tmp_path / "model.pt").values()
        assert sum(int((tensor == 0).sum()) for tensor in whole) == 73728
    if name == "tensor_parallel.py":
        assert any(line.startswith("52224 weights are exactly zero") for line in lines)
    if name == "accelerate_loop.py":  # it has left a checkpoint, from which it goes on
        again = run(name, tmp_path)
        assert again[0] == "resumed in epoch 1 after 8 micro-batches"
        assert again[1:] == lines[1:]
