"""The files of a run: their names, how they are read, and how they are written in one piece."""

from __future__ import annotations

import io
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

FORMAT = 1
STATE, REPORT = "state.pt", "report.json"
DENSE, STRIPPED, CURVES = "dense.safetensors", "model.safetensors", "curves.png"
LEVELS = "levels.png"  # of several runs
# of a run on a model of the user's own: what was asked for, what is measured before training
RECIPE, START, MODEL, CHECKPOINTS = "recipe.yaml", "start.json", "model", "checkpoints"


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``model``.

    Raises:
        ValueError: the file is damaged, or is not of this model.
        OSError: it cannot be read.
    """
    try:
        found = safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is damaged or no safetensors file: {error}") from None
    wanted = model.state_dict()
    problems = [
        *(f"{name!r} is missing" for name in wanted if name not in found),
        *(f"{name!r} is not in the model" for name in sorted(found) if name not in wanted),
        *(
            f"{name!r} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tensor.shape
        ),
        *(
            f"{name!r} holds {tensor.dtype}, NaN or infinity"
            for name, tensor in sorted(found.items())
            if not (tensor.is_floating_point() and tensor.isfinite().all())
        ),
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"checkpoint {path} is not of this model: {', '.join(problems[:3])}{more}"
        )
    model.load_state_dict(found)


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the state saved in ``folder``; None where there is none.

    Raises:
        ValueError: the file is damaged or something else.
        OSError: it cannot be read.
    """
    try:
        stored = (folder / STATE).read_bytes()
    except FileNotFoundError:
        return None
    try:
        state = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        version = state["format"]
    # a damaged archive can fail in any way
    except Exception as error:
        raise ValueError(f"{folder / STATE} is damaged or no saved run: {error}") from None
    if version != FORMAT:
        raise ValueError(f"{folder / STATE} has format {version!r}, this program reads {FORMAT}")
    return state


def claim(folder: Path, further: Iterable[str] = (), *, force: bool) -> None:
    """Make sure that a new run may write its files to ``folder``, ``further`` ones included.

    Raises:
        FileExistsError: some are there already, and ``force`` is not given.
        OSError: ``folder`` is no folder.
    """
    # the state first: without it the other files are no run that could be resumed
    names = (
        *(STATE, RECIPE, START, CHECKPOINTS, REPORT, DENSE, STRIPPED, MODEL, CURVES),
        *further,
    )
    present = [name for name in names if (folder / name).exists()]
    if present and not force:
        raise FileExistsError(
            f"{folder} holds {', '.join(present)} already: --resume goes on with that run, "
            "--force replaces it"
        )
    for name in present:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make ``folder``, and take it away again if the first file cannot be written to it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def serialised(model: nn.Module) -> bytes:
    """Return the safetensors file of ``model``'s weights."""
    weights: dict[str, Tensor] = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    return safetensors.torch.save(weights, metadata={"format": "pt"})


def sizes(weights: bytes) -> dict[str, int]:
    """Return how large a file is, as it is and deflated."""
    return {"bytes": len(weights), "compressed_bytes": len(zlib.compress(weights, 6))}
