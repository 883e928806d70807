"""Compile a kernel for a GPU that is absent, and read the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel variant and what the assembler says of it."""

    ptx: str
    sass: str
    shared: int  # bytes
    registers: int
    stack: int  # bytes a thread: local arrays and spills

    @property
    def spills(self) -> int:
        """Local-memory loads and stores."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass))

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
    built = triton.compile(
        ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attrs),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "enable_fp_fusion": fp_fusion,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True
        ).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = (
        int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK")
    )
    return Compiled(built.asm["ptx"], sass, built.metadata.shared, registers, stack)


def assert_lean(compiled, arch):
    """No spill, no double precision, shared memory within the device's limit."""
    assert f".target sm_{arch}" in compiled.ptx
    assert compiled.spills == 0
    assert ".f64" not in compiled.ptx
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
