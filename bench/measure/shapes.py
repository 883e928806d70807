"""The matrices that are measured: named sets, spelled out, or those of a model's file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MIN_SIDE = 64  # of a weight that is worth pruning: norms, biases and class heads have less


class Shape(NamedTuple):
    """One linear layer at work: ``tokens`` rows through a weight ``(outputs, inputs)``."""

    tokens: int
    inputs: int
    outputs: int

    @property
    def weight(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    def __str__(self) -> str:
        return f"{self.tokens}x{self.inputs}x{self.outputs}"


def spell_shapes(shapes: Sequence[Shape]) -> str:
    """Return shapes with commas between; of equal ones how many there are."""
    counts = Counter(shapes)
    return ",".join(str(s) if n == 1 else f"{n}*{s}" for s, n in counts.items())


SETS = {
    # up (and gate), down, query (and output), key (and value) of Llama 3 8B
    "llama3-8b": (
        Shape(8192, 4096, 14336),
        Shape(8192, 14336, 4096),
        Shape(8192, 4096, 4096),
        Shape(8192, 4096, 1024),
    ),
    # both halves of ViT-H/14's MLP, 256 images of 257 tokens
    "vit-h": (Shape(65792, 1280, 5120), Shape(65792, 5120, 1280)),
    "square": (Shape(4096, 4096, 4096), Shape(8192, 8192, 8192)),
    # for CPUs
    "tiny": (Shape(256, 512, 2048), Shape(256, 2048, 512)),
}


def parse_shapes(text: str, tokens: int) -> tuple[Shape, ...]:
    """Return the shapes that a command line names.

    Args:
        text: a set's name; ``TOKENSxINxOUT``, several with commas between; or a safetensors file.
        tokens: for a file's weights.

    Raises:
        ValueError: it is none of these, or no weight in the file is worth measuring.
        OSError: the file cannot be read.
    """
    if text in SETS:
        return SETS[text]
    if text.endswith(".safetensors"):
        return shapes_of(Path(text), tokens)
    shapes = []
    for part in text.split(","):
        sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", part.strip())
        if sides is None:
            raise ValueError(
                f"shapes must be one of {', '.join(SETS)}, TOKENSxINxOUT[,...] or a .safetensors "
                f"file, got {part.strip() or text!r}"
            )
        shapes.append(Shape(*map(int, sides.groups())))
    return tuple(dict.fromkeys(shapes))


def shapes_of(path: Path, tokens: int) -> tuple[Shape, ...]:
    """Return the distinct shapes of a model file's weights, the largest first."""
    found = {(tokens, matrix.shape[1], matrix.shape[0]) for _, matrix in matrices(path)}
    return tuple(sorted((Shape(*s) for s in found), key=lambda s: -s.inputs * s.outputs))


def matrices(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model's file that can be pruned, as matrices, by name.

    Those are floats of two or more dimensions, 64 or more a side when seen as ``(outputs, the
    rest)``; tables that look tokens or places up are left out, as the controller's default does.

    Raises:
        ValueError: the file is damaged, holds NaN or infinity, or has no such weight.
        OSError: it cannot be read.
    """
    # safetensors' own errors name no file
    with path.open("rb"):
        pass
    found = False
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if re.search(r"embed|position|\bwte\b|\bwpe\b|lm_head", name):
                    continue
                if len(file.get_slice(name).get_shape()) < 2:
                    continue
                tensor = file.get_tensor(name)
                if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                    continue
                matrix = tensor.flatten(1)
                if min(matrix.shape) >= MIN_SIDE:
                    found = True
                    yield name, matrix
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if not found:
        raise ValueError(
            f"{path} must hold a float weight of at least {MIN_SIDE}x{MIN_SIDE}, embeddings "
            "apart, and has none"
        )
