"""What a driver refuses, the stub refuses: one test a rule, and none of what is allowed."""

import ctypes

import pytest
import torch

from triton_sparsity.kernels.launch import FUSED, tl, triton

pytestmark = pytest.mark.launch

BFLOAT16, FLOAT32 = 9, 7  # CUtensorMapDataType
SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle
PLAIN = {
    "type": BFLOAT16,
    "address": 4096,
    "sides": (1024, 512),  # innermost first
    "strides": (2048,),
    "box": (64, 128),
    "steps": (1, 1),
    "swizzle": 128,
}


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@pytest.fixture
def refusals(driver):
    """The stub, where what it refuses is expected."""
    driver.forget()
    yield driver
    driver.forget()


def encode(driver, **changes):
    """Return what cuTensorMapEncodeTiled returns for a plain matrix with some changes."""
    given = PLAIN | changes
    memory = ctypes.create_string_buffer(256)
    at = ctypes.addressof(memory)
    at += -at % 64 + given.get("misplaced", 0)
    rank = len(given["sides"])
    return driver.library.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        given["type"],
        rank,
        ctypes.c_void_p(given["address"]),
        (ctypes.c_uint64 * rank)(*given["sides"]),
        (ctypes.c_uint64 * max(rank - 1, 1))(*given["strides"]),
        (ctypes.c_uint32 * rank)(*given["box"]),
        (ctypes.c_uint32 * rank)(*given["steps"]),
        0,
        SWIZZLE[given["swizzle"]],
        2,
        given.get("fill", 0),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"box": (64, 256)},
        {"box": (256, 8), "swizzle": 0},
        {"box": (16, 8), "swizzle": 32},
        {"address": 4112},
        {"strides": (2064,)},
        {"sides": (1, 1)},
        {"type": FLOAT32, "strides": (4096,), "box": (32, 8), "fill": 1},
        {"sides": (1024,), "strides": (), "box": (64,), "steps": (1,)},
        {"sides": (64, 8, 3), "strides": (128, 1024), "box": (64, 8, 1), "steps": (1, 1, 1)},
    ],
    ids=str,
)
def test_a_tensor_map_within_the_rules_is_made(changes, stub):
    assert encode(stub, **changes) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"box": (64, 257)}, "side 1 of a box must be 1 to 256 elements, got 257"),
        ({"box": (512, 8), "swizzle": 0}, "side 0 of a box must be 1 to 256 elements, got 512"),
        ({"box": (64, 0)}, "side 1 of a box must be 1 to 256 elements, got 0"),
        ({"box": (128, 8)}, "rows must be at most the swizzle's 128 bytes, got 256"),
        ({"box": (64, 8), "swizzle": 64}, "rows must be at most the swizzle's 64 bytes, got 128"),
        ({"box": (4, 8)}, "rows must be a multiple of 16 bytes, got 8"),
        ({"address": 4104}, "an address must be a multiple of 16"),
        ({"strides": (2056,)}, "stride 0 must be a multiple of 16 bytes, got 2056"),
        ({"strides": (1 << 40,)}, "stride 0 must be below 2^40 bytes"),
        ({"strides": (1024,)}, "stride 0 must be at least the 2048 bytes it passes, got 1024"),
        ({"strides": (0,)}, "stride 0 must be at least the 2048 bytes it passes, got 0"),
        ({"sides": (1024, 0)}, "side 1 must be 1 to 2^32 elements, got 0"),
        ({"sides": (1024, 2**32 + 1)}, "side 1 must be 1 to 2^32 elements, got 4294967297"),
        ({"steps": (1, 9)}, "step 1 must be 1 to 8, got 9"),
        ({"type": 99}, "type must be a known one, got 99"),
        ({"type": 1, "fill": 1}, "integers have no NaN"),
        ({"misplaced": 32}, "must lie at a multiple of 64 bytes"),
        (
            {"sides": (64,) * 6, "strides": (128,) * 5, "box": (8,) * 6, "steps": (1,) * 6},
            "must have 1 to 5 dimensions, got 6",
        ),
    ],
    ids=str,
)
def test_a_tensor_map_against_the_rules_is_refused(changes, reason, refusals):
    assert encode(refusals, **changes) != 0
    assert refusals.refused == 1
    assert reason in refusals.error


@triton.jit
def _nothing_kernel(out_ptr):
    tl.store(out_ptr, 0)


@pytest.fixture
def compiled(driver):
    """A kernel that takes few registers and has leave for 48 KiB of shared memory."""
    return _nothing_kernel[(1,)](torch.zeros(1), **FUSED)


@pytest.fixture
def function(compiled):
    """It, as the driver knows it."""
    return compiled.function


def launch(driver, function, grid=(1, 1, 1), block=(128, 1, 1), shared=0):
    config = Config((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared, None, None, 0)
    return driver.library.cuLaunchKernelEx(
        ctypes.byref(config), ctypes.c_void_p(function), None, None
    )


def allow_shared(driver, function, size):
    maximum = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return driver.library.cuFuncSetAttribute(ctypes.c_void_p(function), maximum, size)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"grid": (2**31 - 1, 65535, 65535)},
        {"block": (1024, 1, 1)},
        {"block": (16, 1, 64)},
        {"shared": 48 * 1024},
    ],
    ids=str,
)
def test_a_launch_within_the_limits_is_taken(config, stub, function):
    stub.forget()
    assert launch(stub, function, **config) == 0
    (launched,) = stub.launches
    assert launched.kernel == "_nothing_kernel"
    assert launched.grid == config.get("grid", (1, 1, 1))
    assert launched.shared == config.get("shared", 0)
    assert 0 < launched.registers <= 255
    assert launched.maps == ()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"grid": (0, 1, 1)}, "side 0 of a grid must be 1 to 2147483647, got 0"),
        ({"grid": (2**31, 1, 1)}, "side 0 of a grid must be 1 to 2147483647, got 2147483648"),
        ({"grid": (1, 65536, 1)}, "side 1 of a grid must be 1 to 65535, got 65536"),
        ({"grid": (1, 1, 65536)}, "side 2 of a grid must be 1 to 65535, got 65536"),
        ({"block": (2048, 1, 1)}, "side 0 of a block is 2048"),
        ({"block": (32, 1, 65)}, "side 2 of a block is 65"),
        ({"block": (1024, 2, 1)}, "at most 1024 threads, got 2048"),
        ({"shared": 48 * 1024 + 1}, "49153 bytes of dynamic shared memory, and leave for 49152"),
    ],
    ids=str,
)
def test_a_launch_past_the_limits_is_refused(config, reason, refusals, function):
    refusals.forget()
    assert launch(refusals, function, **config) != 0
    assert refusals.launches == []
    assert reason in refusals.error


def test_shared_memory_past_48_kib_needs_leave_and_ends_at_227(refusals, function):
    most = 227 * 1024
    assert allow_shared(refusals, function, most) == 0
    assert launch(refusals, function, shared=most) == 0
    assert allow_shared(refusals, function, most + 1) != 0
    assert "may not have" in refusals.error
    assert launch(refusals, function, shared=most + 1) != 0
    assert allow_shared(refusals, function, 48 * 1024) == 0


@triton.jit
def _many_registers_kernel(out_ptr, SIZE: tl.constexpr):
    # a product's sums stay in registers
    offs = tl.arange(0, SIZE)
    x = tl.load(out_ptr + offs[:, None] * SIZE + offs[None, :])
    tl.store(out_ptr + offs[:, None] * SIZE + offs[None, :], tl.dot(x, x.T).to(tl.float16))


def test_registers_of_a_block_end_at_65536(refusals):
    x = torch.zeros(128, 128, dtype=torch.float16)
    compiled = _many_registers_kernel[(1,)](x, SIZE=128, num_warps=4, **FUSED)
    refusals.forget()
    assert launch(refusals, compiled.function, block=(128, 1, 1), shared=0) == 0
    registers = refusals.launches[0].registers
    assert registers > 64
    assert launch(refusals, compiled.function, block=(1024, 1, 1)) != 0
    assert f"1024 threads of {registers} registers are more than a block's 65536" in refusals.error


def test_a_kernel_that_its_module_has_not_is_refused(refusals, compiled):
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    library = refusals.library
    assert library.cuModuleLoadData(ctypes.byref(module), compiled.asm["cubin"]) == 0
    find = library.cuModuleGetFunction
    assert find(ctypes.byref(function), module, b"_nothing_kernel") == 0
    assert find(ctypes.byref(function), module, b"_another_kernel") != 0
    assert "no kernel _another_kernel" in refusals.error


def test_a_module_that_is_no_cubin_is_refused(refusals):
    module = ctypes.c_void_p()
    assert refusals.library.cuModuleLoadData(ctypes.byref(module), b"PTX" * 32) != 0
    assert "must be a cubin" in refusals.error
