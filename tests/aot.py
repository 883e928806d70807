"""Compile a kernel for a GPU that is absent, and read the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

ARCHITECTURES = (80, 90, 100)
# the variants of a kernel that differ in how a weight is loaded: of the bits of an element, and
# generic ones; all of them for one device, what is common for each
WIDTHS = [
    pytest.param(90, 16, True, id="sm_90, 16 bits"),
    pytest.param(90, 32, True, id="sm_90, 32 bits"),
    pytest.param(90, 16, False, id="sm_90, generic"),
    pytest.param(80, 16, True, id="sm_80, 16 bits"),
    pytest.param(100, 16, True, id="sm_100, 16 bits"),
]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(eq=False)
class Compiled:
    """Machine code of one kernel variant and what the assembler says of it."""

    ptx: str
    cubin: bytes
    shared: int  # bytes
    registers: int
    stack: int  # bytes a thread: local arrays and spills

    @cached_property
    def sass(self) -> str:
        """The machine code, in half a second: some tests have no need of it."""
        return _read(self.cubin, "nvdisasm", "-c")

    @property
    def spills(self) -> int:
        """Local-memory loads and stores; without a stack there is nowhere to spill to."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass)) if self.stack else 0

    def global_loads(self) -> list[int]:
        """Bytes a thread of every global load instruction, bulk copies excluded."""
        widths = re.findall(r"\b(?:LDG|LDGSTS)\.E([\w.]*)", self.sass)
        return [_width(modifiers) for modifiers in widths]

    def global_stores(self) -> list[int]:
        """Bytes a thread of every global store instruction, bulk copies excluded."""
        return [_width(modifiers) for modifiers in re.findall(r"\bSTG\.E([\w.]*)", self.sass)]

    def has(self, instruction: str) -> bool:
        """Tell whether a SASS mnemonic (``HGMMA``, ``HMMA``, ``UTMALDG``, ...) occurs."""
        return re.search(rf"\b{instruction}\b", self.sass) is not None


def _read(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run(
            [TOOLS / tool, *options, path], check=True, capture_output=True, text=True
        ).stdout


def _width(modifiers: str) -> int:
    if "256" in modifiers:
        return 32
    if "128" in modifiers:
        return 16
    if "64" in modifiers:
        return 8
    if "U16" in modifiers or "S16" in modifiers:
        return 2
    if "U8" in modifiers or "S8" in modifiers:
        return 1
    return 4


def compile_for(
    arch,
    kernel,
    types,
    constants,
    *,
    aligned=True,
    num_warps=4,
    num_stages=3,
    strides_of_one=(),
    unspecialized=(),
    fp_fusion=True,
):
    """Compile ``kernel`` for ``sm_<arch>``.

    Args:
        arch: 80, 90 or 100.
        kernel: the ``@triton.jit`` function.
        types: Triton type string of each run-time argument, ``"*bf16"``, ``"i32"``, ...
        constants: value of each ``tl.constexpr`` argument.
        aligned: what the JIT specialises on for aligned, contiguous inputs: every run-time pointer
            and integer divisible by 16, and the integers named in ``strides_of_one`` equal to 1.
            False: the generic variant.
        num_warps, num_stages: launch options.
        strides_of_one: names of the stride arguments that are 1 for contiguous inputs.
        unspecialized: names of the integers that the JIT is told not to specialise on.
        fp_fusion: whether a multiplication and an addition may become one instruction.
    """
    constants = dict(constants)
    if aligned:
        constants |= dict.fromkeys(strides_of_one, 1)
    names = kernel.arg_names
    missing = set(names) - set(types) - set(constants)
    assert not missing, f"no type or value given for {sorted(missing)}"
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if aligned
        and n not in constants
        and n not in unspecialized
        and (types[n].startswith("*") or types[n] in ("i32", "i64"))
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    built = triton.compile(
        source(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attrs),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "enable_fp_fusion": fp_fusion,
        },
    )
    cubin = built.asm["cubin"]
    usage = _read(cubin, "cuobjdump", "-res-usage")
    registers, stack = (
        int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK")
    )
    return Compiled(built.asm["ptx"], cubin, built.metadata.shared, registers, stack)


def assert_lean(compiled, arch, *, double=False):
    """No spill, no double precision unless meant, shared memory within the device's limit."""
    assert f".target sm_{arch}" in compiled.ptx
    assert compiled.spills == 0
    assert double or ".f64" not in compiled.ptx
    assert compiled.shared <= SHARED_LIMIT[arch]


def loops(sass):
    """Return the instructions of every loop of one block or more: from a label to a jump back."""
    lines, labels = [], {}
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found.group(1)] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(found.group(1))
    jumps = [(n, re.search(r"\bBRA\b.*(\.L_x_\d+)", line)) for n, line in enumerate(lines)]
    starts = [(labels[jump.group(1)], n) for n, jump in jumps if jump and jump.group(1) in labels]
    return [lines[start : n + 1] for start, n in starts if start <= n]
