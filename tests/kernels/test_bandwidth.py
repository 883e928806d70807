import pytest
import torch

import aot
from triton_sparsity.kernels import bandwidth
from triton_sparsity.kernels.bandwidth import read_repeatedly, read_repeatedly_reference
from triton_sparsity.kernels.launch import INTERPRET

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("numel", [1, 4095, 4096, 5 * 4096 + 7])
@pytest.mark.parametrize("passes", [1, 3])
def test_everything_is_read_in_every_pass(numel, passes):
    data = torch.randint(-(2**31), 2**31, (numel,), dtype=torch.int64).to(DEVICE, torch.int32)
    want = int(data.long().sum()) * passes
    want = (want + 2**31) % 2**32 - 2**31
    assert int(read_repeatedly_reference(data, passes)) == want
    assert int(read_repeatedly(data, passes)) == want


@pytest.mark.parametrize(
    ("data", "passes", "message"),
    [
        (torch.zeros(4), 1, "data must be contiguous int32"),
        (torch.zeros(4, 4, dtype=torch.int32).T[1:], 1, "data must be contiguous int32"),
        (torch.zeros(4, dtype=torch.int32), 0, "passes must be at least 1, got 0"),
    ],
)
def test_bad_inputs_name_the_problem(data, passes, message):
    with pytest.raises(ValueError, match=rf"^read_repeatedly: {message}"):
        read_repeatedly(data, passes)


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_the_loads_are_wide_and_pass_the_first_cache_by(arch):
    compiled = aot.compile_for(
        arch,
        bandwidth._read_kernel,
        {
            "data_ptr": "*i32",
            "sums_ptr": "*i64",
            **dict.fromkeys(("numel", "tiles", "reads"), "i32"),
        },
        {"TILE": bandwidth.TILE},
        num_warps=8,
        unspecialized=("tiles", "reads"),
    )
    aot.assert_lean(compiled, arch)
    assert set(compiled.global_loads()) == {16}
    assert "ld.global.cg" in compiled.ptx
