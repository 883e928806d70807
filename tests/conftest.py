import gc

import pytest
from ranks import Ranks
from torch import distributed

from triton_sparsity.kernels import tuning


def pytest_collection_finish():
    """Let no collection of garbage look at what was imported, which stays: half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_tuning_table_of_this_machine(monkeypatch, tmp_path):
    """No test depends on what somebody has tuned on this machine."""
    monkeypatch.setattr(tuning, "user_file", lambda name: tmp_path / "no such folder" / name)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "no such folder")
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


@pytest.fixture(scope="session")
def ranks():
    """Up to four gloo ranks, forked when first asked for."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch lacks gloo")
    found = Ranks()
    yield found
    found.stop()
