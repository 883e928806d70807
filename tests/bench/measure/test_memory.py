import resource

import numpy as np
import pytest
import torch

from triton_sparsity.bench.measure import memory
from triton_sparsity.bench.measure.memory import free_bytes, shortage, within_memory

OVERFLOW = "a size was asked for that is more than any memory has"


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: torch.empty(2**50, dtype=torch.uint8), "1125899906842624 bytes could not be had"),
        (lambda: np.empty(2**50, np.uint8), "1.00 PiB could not be had on the host"),
        (lambda: bytearray(2**50), "memory could not be had on the host"),
        (lambda: torch.empty(2**40, 2**40), OVERFLOW),
        (lambda: np.empty((2**40, 2**40)), OVERFLOW),
        (lambda: torch.empty(2**70), OVERFLOW),
        (lambda: float(10**400), OVERFLOW),
    ],
)
def test_what_was_asked_for_is_told(ask, said):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        ask()
    assert said in (shortage(caught.value) or repr(caught.value))


def test_no_more_is_had_than_is_free(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(memory, "free_bytes", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with within_memory():
        torch.empty(2**29, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**31, dtype=torch.uint8)
    assert shortage(caught.value) == "2147483648 bytes could not be had on the host"
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    # of a GPU's driver nobody knows what it addresses
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with within_memory():
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_what_is_free_is_the_least_that_machine_and_groups_leave(tmp_path, monkeypatch):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    assert free_bytes() is None
    write("proc/meminfo", "MemTotal: 90 kB\nMemAvailable: 70 kB\nSwapFree: 10 kB\n")
    write("proc/self/cgroup", "1:name=systemd:/\n0::/a/b\n")
    assert free_bytes() == 80 * 1024
    for group, limit in (("a/b", "max"), ("a", "50000"), ("", "60000")):
        write(f"cgroup/{group}/memory.max", limit)
        write(f"cgroup/{group}/memory.current", "40000")
        write(f"cgroup/{group}/memory.stat", "anon 1\ninactive_file 5000\n")
    assert free_bytes() == 50000 - 40000 + 5000
    # the older kind, in a container that sees its own group as the root
    write("proc/self/cgroup", "4:cpu,memory:/docker/x\n")
    write("cgroup/memory/memory.limit_in_bytes", "9000")
    write("cgroup/memory/memory.usage_in_bytes", "9500")
    write("cgroup/memory/memory.stat", "total_inactive_file 0\n")
    assert free_bytes() == 0


def test_a_gpu_s_is_told_and_other_errors_are_none():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 ...")
    assert shortage(full) == "20.00 GiB could not be had on the GPU"
    for error in (
        ValueError("level must be in [0, 1)"),
        RuntimeError("size mismatch"),
        KeyError(),
    ):
        assert shortage(error) is None
