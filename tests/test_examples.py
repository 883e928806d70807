"""The examples run as they stand."""

import importlib
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from forks import fork, fork_ranks, run_script

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SECONDS = 120  # a run takes a few; a machine may be busy
# gloo's threads may abort a process that has done all and ends: torch's pull request 179291
ABORTED = "terminate called without an active exception"
TORCHRUN = (sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone")


def run(name, folder):
    script = run_script, EXAMPLES / name, str(folder)
    if name != "tensor_parallel.py":
        return fork(*script, folder=folder).lines()
    return [line for rank in fork_ranks(2, *script, folder=folder) for line in rank.lines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name, tmp_path):
    source = (EXAMPLES / name).read_text()
    for module in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE):
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(module)
    lines = run(name, tmp_path)
    assert lines
    if name in ("fsdp2.py", "tensor_parallel.py"):
        assert all(line.endswith("products block-sparse") for line in lines if "loss" in line)
    if name == "fsdp2.py":  # what one process has saved two go on from
        command = [*TORCHRUN, "--nproc-per-node", "2", str(EXAMPLES / name), str(tmp_path)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert done.returncode == 0 or ABORTED in done.stderr, done.stderr
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
