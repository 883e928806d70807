"""The matrices that are measured: named sets, spelled out, or those of a model's file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
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
        text: a set's name; ``TOKENSxINxOUT``, several with commas between; a safetensors file, or
            a folder of such files as ``save_pretrained`` writes it.
        tokens: for a file's weights.

    Raises:
        ValueError: it is none of these, or no weight in the file is worth measuring.
        OSError: the file cannot be read.
    """
    if text in SETS:
        return SETS[text]
    if is_file(text):
        return shapes_of(Path(text), tokens)
    shapes = []
    for part in text.split(","):
        sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", part.strip())
        if sides is None:
            raise ValueError(
                f"shapes must be one of {', '.join(SETS)}, TOKENSxINxOUT[,...], a .safetensors "
                f"file or a model's folder, got {part.strip() or text!r}"
            )
        shapes.append(Shape(*map(int, sides.groups())))
    return tuple(dict.fromkeys(shapes))


def is_file(text: str) -> bool:
    """Tell whether a command line names a model's file or folder, and spells no shapes."""
    return text.endswith(".safetensors") or (text not in ("", *SETS) and Path(text).is_dir())


def shapes_of(path: Path, tokens: int) -> tuple[Shape, ...]:
    """Return the distinct shapes of a model file's weights, the largest first."""
    found = {(tokens, matrix.shape[1], matrix.shape[0]) for _, matrix in matrices(path)}
    return tuple(sorted((Shape(*s) for s in found), key=lambda s: -s.inputs * s.outputs))


def matrices(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a model that can be pruned, as matrices, by name.

    Those are floats of two or more dimensions, 64 or more a side when seen as ``(outputs, the
    rest)``; tables that look tokens or places up are left out, as the controller's default does.
    Fused experts are a matrix each. In a folder weights that the architecture stores as
    ``(inputs, outputs)`` are turned.

    Args:
        path: a safetensors file, or a folder of such files as ``save_pretrained`` writes it.

    Raises:
        ValueError: a file is damaged or missing, or there is no such weight.
        OSError: it cannot be read.
    """
    files, family = (_files(path), _family(path)) if path.is_dir() else ([path], "")
    found = False
    for file in files:
        for name, matrix in _matrices(file, family):
            found = True
            yield name, matrix
    if not found:
        raise ValueError(
            f"{path} must hold a float weight of at least {MIN_SIDE}x{MIN_SIDE}, embeddings "
            "apart, and has none"
        )


def _files(folder: Path) -> list[Path]:
    """Return a folder's files, those that its index names if it is sharded."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
    else:
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} must be the index of a sharded model: {error!r}") from None
        files = sorted(folder / name for name in names)
    if not files:
        raise ValueError(f"{folder} must hold a model as save_pretrained writes it, .safetensors")
    return files


def _family(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type", ""))
    except FileNotFoundError:
        return ""
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} must be a configuration: {error!r}") from None


# whose weights stand as (inputs, outputs)
CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
TURNED_EXPERTS = {"gpt_oss", "llama4", "llama4_text"}


def _matrices(path: Path, family: str) -> Iterator[tuple[str, Tensor]]:
    # safetensors' own errors name no file
    with path.open("rb"):
        pass
    # they take seconds to import, and shapes that are spelled out need neither
    import torch
    from safetensors import SafetensorError, safe_open

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
                if tensor.dim() == 3 and "experts" in name:
                    turned = family in TURNED_EXPERTS
                    parts = [(f"{name}[{i}]", matrix) for i, matrix in enumerate(tensor)]
                else:
                    turned = family in CONV1D and tensor.dim() == 2
                    parts = [(name, tensor.flatten(1))]
                for part, matrix in parts:
                    if min(matrix.shape) >= MIN_SIDE:
                        yield part, matrix.T.contiguous() if turned else matrix
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
