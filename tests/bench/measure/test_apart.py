import os
import time

from triton_sparsity.bench.measure.apart import apart


def test_work_apart_returns_what_it_found():
    assert apart(divmod, 7, 2, limit=60) == (3, 1)
    assert apart(os.getpid, limit=60) != os.getpid()


def test_work_apart_that_fails_or_dies_finds_nothing():
    assert apart(divmod, 7, 0, limit=60) is None
    assert apart(os._exit, 1, limit=60) is None


def test_work_apart_that_does_not_return_is_ended():
    begun = time.monotonic()
    assert apart(time.sleep, 600, limit=0.2) is None
    assert time.monotonic() - begun < 30
