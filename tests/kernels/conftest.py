from dataclasses import replace

import pytest
import torch

from triton_sparsity.kernels.launch import INTERPRET


@pytest.fixture(scope="session", autouse=INTERPRET)
def _integers_wrap_around():
    """Let sums and products of int32 wrap around in the interpreter, as compiled ones do.

    It would compute each again in int64 to see whether it fits, in a third of its time. What does
    not fit is a wrong offset, hence a wrong result, here too.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture
def poisoned_memory():
    """Fill fresh memory: NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(False)
