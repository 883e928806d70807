"""Triton's driver is one a process: these tests put the stub in its place, and have their own."""

import subprocess

import pytest
import torch

import stub_driver
from triton_sparsity.kernels.launch import INTERPRET


@pytest.fixture(scope="session", autouse=True)
def driver(tmp_path_factory):
    if INTERPRET:
        pytest.skip("the interpreter replaces the compiler")
    if torch.cuda.is_available():
        pytest.skip("the real driver is here, and a process has one")
    try:
        library = stub_driver.build(tmp_path_factory.mktemp("driver"))
    except FileNotFoundError as error:
        pytest.skip(f"the stub of the driver needs a C compiler: {error}")
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the stub of the driver does not compile:\n{error.stderr}")
    with stub_driver.installed(library) as stub:
        yield stub


@pytest.fixture
def stub(driver):
    """The stub, with an empty log; nothing may be left refused, unless the test forgets it."""
    driver.forget()
    yield driver
    assert not driver.refused, driver.error
    driver.forget()


@pytest.fixture
def zero_memory(monkeypatch):
    """Fill fresh memory with zeros, for what kernels would write there and the host reads."""
    empty = torch.empty

    def zeros(*shape, **options):
        # zeros of meta are made by this very function
        of = empty if options.get("device") == "meta" else torch.zeros
        return of(*shape, **options)

    monkeypatch.setattr(torch, "empty", zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
