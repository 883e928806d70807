import pytest
import torch

import aot
from triton_sparsity.kernels import numbers as module
from triton_sparsity.kernels.draw import uniform
from triton_sparsity.kernels.launch import INTERPRET
from triton_sparsity.kernels.numbers import uniform_numbers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def numbers(shape, seed=0, number=0, stream=0):
    options = {"seed": seed, "number": number, "device": DEVICE}
    (found,) = uniform_numbers([shape], streams=[stream], **options)
    return found


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 40), (0, 5), (5, 0), (130, 33)], ids=str)
@pytest.mark.parametrize(
    ("seed", "number", "stream"), [(0, 0, 0), (7, 100, 3), (2**62 + 5, 2**32 - 1, 0xDEADBEEF)]
)
def test_they_are_those_of_a_draw(shape, seed, number, stream):
    random = torch.tensor([seed, number], device=DEVICE)
    got = numbers(shape, seed, number, stream)
    assert got.dtype == torch.float32
    assert torch.equal(got, uniform(random, stream, shape))


def test_a_list_has_the_numbers_of_each():
    shapes, streams = [(7, 13), (0, 5), (64, 40), (1, 1)], [3, 1, 2**32 - 1, 3]
    found = uniform_numbers(shapes, seed=5, number=9, streams=streams, device=DEVICE)
    for shape, stream, got in zip(shapes, streams, found, strict=True):
        assert torch.equal(got, numbers(shape, 5, 9, stream))


def test_seed_draw_and_stream_each_make_others():
    found = [numbers((40, 30), *which) for which in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(t.flatten().tolist()) for t in found}) == 4
    for t in found:
        assert t.min() > 0
        assert t.max() < 1
        assert abs(t.mean() - 0.5) < 0.05


@pytest.mark.aot
@pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_the_kernel_is_lean(arch):
    kernel = module._number_kernel
    words = ("low", "high", "number")
    types = {"table_ptr": "*i64"} | dict.fromkeys(words, "i64")
    constants = {"N": 256, "BLOCK": module.BLOCK, "LANES": 4}
    compiled = aot.compile_for(arch, kernel, types, constants, unspecialized=words)
    aot.assert_lean(compiled, arch)
