"""The examples run as they stand."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SECONDS = 120  # a run takes a few; a machine may be busy


def run(name, folder, *launcher):
    # PEFT asks transformers for what it has renamed
    options = ["-W", "error", "-W", "ignore::FutureWarning"]
    done = subprocess.run(
        [sys.executable, *options, *launcher, str(EXAMPLES / name), str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name, tmp_path):
    source = (EXAMPLES / name).read_text()
    for module in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE):
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    lines = run(name, tmp_path, *(ranks if name == "tensor_parallel.py" else ()))
    assert lines
    if name in ("fsdp2.py", "tensor_parallel.py"):
        assert all(line.endswith("products block-sparse") for line in lines if "loss" in line)
    if name == "fsdp2.py":  # what one process has saved two go on from
        again = run(name, tmp_path, *ranks)
        assert sorted(again)[-2:] == [f"rank {rank} of 2 goes on in epoch 3" for rank in (0, 1)]
        assert any(line.startswith("73728 weights are exactly zero") for line in again)
        whole = torch.load(tmp_path / "model.pt").values()
        assert sum(int((tensor == 0).sum()) for tensor in whole) == 73728
    if name == "tensor_parallel.py":
        assert lines[-1].startswith("52224 weights are exactly zero")
    if name == "accelerate_loop.py":  # it has left a checkpoint, from which it goes on
        again = run(name, tmp_path)
        assert again[0] == "resumed in epoch 1 after 8 micro-batches"
        assert again[1:] == lines[1:]
