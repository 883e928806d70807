"""Launch kernels on a GPU that is absent, through all of Triton but the driver.

Triton's binder, ptxas, launcher and tensor maps are the real ones, for sm_90; the driver is
``launch/libcuda_stub.c``, which refuses what an H100's refuses and writes down the rest. Tensors
are of the CPU, and no kernel runs: whatever one would write is as it was before.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from triton_sparsity.kernels import launch, tiles

SOURCE = Path(__file__).with_name("launch") / "libcuda_stub.c"
CUDA_H = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
PROCESSORS = 132

_COUNT, _SIDE = ctypes.c_uint64, ctypes.c_uint32


class _Counters(ctypes.Structure):
    _fields_ = (
        *((name, _COUNT) for name in ("launches", "tensor_maps", "refused")),
        ("error", ctypes.c_char * 256),
    )


class _TensorMap(ctypes.Structure):
    _fields_ = (
        ("address", _COUNT),
        ("sides", _COUNT * 5),
        ("strides", _COUNT * 5),
        ("box", _SIDE * 5),
        *((name, _SIDE) for name in ("type", "rank", "swizzle")),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("tensor_maps", _COUNT),
        ("grid", _SIDE * 3),
        ("block", _SIDE * 3),
        ("shared", _SIDE),
        ("registers", _SIDE),
        ("name", ctypes.c_char * 128),
    )


class TensorMap(NamedTuple):
    """What the copy engine is told of a tensor; the outermost dimension first, as in torch."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all dimensions but the innermost
    box: tuple[int, ...]


class Launch(NamedTuple):
    """One launch that the driver took."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int  # of a block
    shared: int  # bytes of a block
    registers: int  # of a thread
    maps: tuple[TensorMap, ...]  # made for it


class Stub:
    """The stub of the driver, loaded; its log begins at the last ``forget``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.stub_counters.restype = ctypes.POINTER(_Counters)
        library.stub_launch.restype = ctypes.POINTER(_Launch)
        library.stub_launch.argtypes = library.stub_tensor_map.argtypes = [_COUNT]
        library.stub_tensor_map.restype = ctypes.POINTER(_TensorMap)

    def forget(self) -> None:
        """Empty the log."""
        self.library.stub_forget()

    @property
    def refused(self) -> int:
        """How many calls were refused."""
        return self.library.stub_counters().contents.refused

    @property
    def error(self) -> str:
        """Why the last one was."""
        return self.library.stub_counters().contents.error.decode()

    @property
    def launches(self) -> list[Launch]:
        """The log."""
        found, made = [], 0
        for n in range(self.library.stub_counters().contents.launches):
            entry = self.library.stub_launch(n).contents
            maps = tuple(map(self._tensor_map, range(made, entry.tensor_maps)))
            made = entry.tensor_maps
            threads = entry.block[0] * entry.block[1] * entry.block[2]
            found.append(
                Launch(
                    entry.name.decode(), tuple(entry.grid), threads, entry.shared,
                    entry.registers, maps,
                )
            )  # fmt: skip
        return found

    def _tensor_map(self, n: int) -> TensorMap:
        entry = self.library.stub_tensor_map(n).contents
        outwards = slice(None, entry.rank), slice(None, entry.rank - 1)
        return TensorMap(
            entry.address,
            tuple(entry.sides[outwards[0]][::-1]),
            tuple(entry.strides[outwards[1]][::-1]),
            tuple(entry.box[outwards[0]][::-1]),
        )


def kernels(launches: Sequence[Launch]) -> list[str]:
    """Return the names of what was launched, in order."""
    return [launched.kernel for launched in launches]


def build(folder: Path) -> Path:
    """Compile the stub; return the folder's library.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: there is no compiler, or it fails.
    """
    # the driver's own name, by which Triton's libraries ask for it
    library = folder / "libcuda.so.1"
    subprocess.run(
        [
            os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
            f"-I{CUDA_H}", "-o", library, SOURCE,
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return library


@contextmanager
def installed(library: Path) -> Iterator[Stub]:
    """Make the stub Triton's driver, and let kernels take the CPU's tensors, while it is open."""
    before = os.environ.get("TRITON_LIBCUDA_PATH"), launch.ON_CPU, tiles.INTERPRETED_PROCESSORS
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    # for all: Triton's own library finds its symbols here
    stub = Stub(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda _: 0
    driver.get_device_capability = lambda *_: (9, 0)
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)
    launch.ON_CPU, tiles.INTERPRETED_PROCESSORS = True, PROCESSORS
    try:
        yield stub
    finally:
        triton.runtime.driver.set_active(None)  # found anew by whoever asks
        path, launch.ON_CPU, tiles.INTERPRETED_PROCESSORS = before
        if path is None:
            del os.environ["TRITON_LIBCUDA_PATH"]
        else:
            os.environ["TRITON_LIBCUDA_PATH"] = path
