"""The tasks: real data, a model for it, what is measured, and how long to train by default.

None needs the network: the language models read the Python standard library's own source, the
digits come with scikit-learn, and the pretrained encoder of ``minilm.py`` is a package.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import LanguageModel, VisionTransformer
from .options import TASKS

Batch = tuple[Tensor, Tensor]  # inputs, targets
Outputs = tuple[Tensor, Tensor]  # a model's for a batch, and the batch's targets


@dataclass(frozen=True)
class Recipe:
    """Defaults of a task's training."""

    dense_epochs: int
    epochs: int
    steps_per_epoch: int
    batch_size: int
    dense_lr: float
    lr: float
    ramp: float = 0.7
    scope: tuple[str, ...] = ("layers",)


@dataclass(frozen=True)
class Task:
    """Data and model of one task.

    Attributes:
        name: as on the command line.
        metric: what is measured, in words.
        higher_is_better: which way the metric improves.
        recipe: defaults of the training.
        build: make the dense model, from torch's global generator.
        sample: draw a training batch of a size from a generator.
        held_out: batches that are never trained on, each a fair sample of them all.
        loss: outputs and targets -> what training minimises, a mean over the batch.
        score: outputs and targets -> the metric of each target, ``(targets,)``.
        data: what identifies the data, for the report; a resumed run must find the same.
        further: all held-out batches' outputs and targets -> figures beside the metric, by name.
        files: what a run's folder holds beside the stripped weights, so that others load it as
            one of theirs: contents by name.
    """

    name: str
    metric: str
    higher_is_better: bool
    recipe: Recipe
    build: Callable[[], nn.Module]
    sample: Callable[[np.random.Generator, int], Batch]
    held_out: tuple[Batch, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    data: dict[str, str | int]
    further: Callable[[Sequence[Outputs]], dict[str, float]] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    def batch(self, size: int, *stream: int) -> Batch:
        """Return the training batch of a stream such as (seed, phase, step): a pure function."""
        return self.sample(np.random.default_rng(stream), size)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy in nats; ``logits`` have one dimension more than ``targets``.

    The reduction is as ``torch.nn.functional.cross_entropy``'s.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)


def load_task(name: str) -> Task:
    """Read a task's data.

    Args:
        name: ``"stdlib-lm"``, ``"stdlib-lm-wide"``, ``"digits"`` or ``"minilm"``.

    Raises:
        ValueError: the name is none of these, or the data are not there.
        ModuleNotFoundError: a package is needed and missing.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    match name:
        case "stdlib-lm":
            return stdlib_lm(stdlib)
        case "stdlib-lm-wide":
            return stdlib_lm_wide(stdlib)
        case "digits":
            return digits()
        case "minilm":
            # imports transformers
            from .minilm import minilm

            return minilm(stdlib)
    raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")


LM_LENGTH = 128
LM_HELD_OUT_WINDOWS = 512
# packages of others, tests, and modules that are generated tables rather than written source
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"} | {
    "pydoc_data"
}


def stdlib_lm(root: Path) -> Task:
    """Predict the next byte of Python source; a twentieth of the files, by name, is held out."""
    train, held_out, digest = read_sources(root)
    if min(len(train), len(held_out)) <= LM_LENGTH:
        raise ValueError(f"stdlib-lm: no Python source to learn from in {root}")

    def windows(text: np.ndarray, starts: np.ndarray) -> Batch:
        window = torch.from_numpy(text[starts[:, None] + np.arange(LM_LENGTH + 1)]).long()
        return window[:, :-1], window[:, 1:]

    def sample(generator: np.random.Generator, size: int) -> Batch:
        return windows(train, generator.integers(0, len(train) - LM_LENGTH, size))

    count = min(LM_HELD_OUT_WINDOWS, len(held_out) // LM_LENGTH)
    starts = np.linspace(0, len(held_out) - LM_LENGTH - 1, count).astype(int)
    return Task(
        name="stdlib-lm",
        metric="bits per byte",
        higher_is_better=False,
        recipe=Recipe(
            dense_epochs=28,
            epochs=12,
            steps_per_epoch=25,
            batch_size=8,
            dense_lr=6e-3,
            lr=8e-3,
        ),
        build=lambda: LanguageModel(width=128, heads=4, layers=4),
        sample=sample,
        # every batch is spread over all files
        held_out=tuple(windows(held_out, starts[i::16]) for i in range(16)),
        loss=cross_entropy,
        score=lambda logits, targets: cross_entropy(logits, targets, "none") / math.log(2),
        data={"train_bytes": len(train), "held_out_bytes": len(held_out), "sha256": digest},
    )


def stdlib_lm_wide(root: Path) -> Task:
    """The same with two layers of width 512: products from which skipping blocks takes time."""
    return replace(
        stdlib_lm(root),
        name="stdlib-lm-wide",
        recipe=Recipe(
            dense_epochs=3,
            epochs=4,
            steps_per_epoch=20,
            batch_size=8,
            dense_lr=2e-3,
            lr=2e-3,
        ),
        build=lambda: LanguageModel(width=512, heads=8, layers=2),
    )


def sources(root: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield a digest of the name, and the text, of each ``.py`` file below ``root``, by name."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP.isdisjoint(name.parts):
            yield hashlib.sha256(name.as_posix().encode()).digest(), path.read_bytes()


def is_held_out(key: bytes) -> bool:
    """Tell a twentieth of the files, by their names' digests, from those to train on."""
    return key[0] < 13


def read_sources(root: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Read the ``.py`` files below ``root`` in the order of their names.

    Returns:
        The bytes to train on and the bytes held out, uint8, and the SHA-256 of names and contents.
    """
    files: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.sha256()
    for key, text in sources(root):
        files[is_held_out(key)].append(text)
        digest.update(key + hashlib.sha256(text).digest())
    train, held_out = (np.frombuffer(b"\n".join(files[k]), np.uint8) for k in (False, True))
    return train, held_out, digest.hexdigest()


def digits() -> Task:
    """Classify handwritten digits of 8 x 8 pixels; a quarter, always the same, is held out.

    The data: E. Alpaydin and C. Kaynak, https://archive.ics.uci.edu/dataset/80.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "task 'digits' needs scikit-learn: pip install 'triton-sparsity[demo]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 8 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [len(order) // 4])

    def take(index: np.ndarray) -> Batch:
        return torch.from_numpy(images[index]), torch.from_numpy(labels[index])

    return Task(
        name="digits",
        metric="accuracy",
        higher_is_better=True,
        recipe=Recipe(
            dense_epochs=20,
            epochs=20,
            steps_per_epoch=21,
            batch_size=64,
            dense_lr=2e-3,
            lr=1e-3,
        ),
        build=lambda: VisionTransformer(side=8, patch=2, width=64, heads=4, layers=3, classes=10),
        sample=lambda generator, size: take(generator.choice(train, size)),
        held_out=tuple(take(chunk) for chunk in np.array_split(test, 4)),
        loss=cross_entropy,
        score=lambda logits, targets: logits.argmax(-1) == targets,
        data={
            "train_images": len(train),
            "held_out_images": len(test),
            "sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        },
    )
