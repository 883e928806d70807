import threading

import pytest
import torch

from triton_sparsity.bench.measure.threads import set_threads


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_torch_gets_the_threads_that_the_machine_starts():
    set_threads(1)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("count", [10**5, 10**30])
def test_more_than_any_machine_starts_are_refused(count):
    with pytest.raises(ValueError, match=f"threads must be what this machine starts, got {count}"):
        set_threads(count)


def test_a_thread_that_does_not_start_is_a_refusal(monkeypatch):
    start, started = threading.Thread.start, []

    def few(thread):
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(threading.Thread, "start", few)
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="got 100"):
        set_threads(100)
    assert torch.get_num_threads() == before
    # none is left waiting
    assert not any(thread.is_alive() for thread in started)
