"""The files of a run: their names, how they are read, and how they are written in one piece."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from ..measure.files import SUMS, check_sums, write_atomic

FORMAT = 2
STATE, REPORT = "state.pt", "report.json"
DENSE, STRIPPED, CURVES = "dense.safetensors", "model.safetensors", "curves.png"
LEVELS = "levels.png"  # of several runs
# of a run on a model of the user's own: what was asked for, what is measured before training
RECIPE, START, MODEL, CHECKPOINTS = "recipe.yaml", "start.json", "model", "checkpoints"


class _Plain(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class Curves(_Plain):
    """What is kept of each step of a phase, and the metric after each epoch, with its step."""

    loss: list[FiniteFloat]
    level: list[FiniteFloat]
    metric: list[list[FiniteFloat]]
    seconds: list[FiniteFloat]


class History(_Plain):
    """Of both phases."""

    dense: Curves
    sparse: Curves


class Dense(_Plain):
    """What came of the dense phase; a task may have further figures."""

    metric: FiniteFloat
    seconds_per_batch: FiniteFloat
    seconds_per_step: FiniteFloat | None
    level: FiniteFloat
    bytes: int
    compressed_bytes: int
    sha256: str


class State(_Plain):
    """What a run goes on from, as far as the model, the optimiser and the masks do not tell."""

    format: int
    options: dict[str, Any]
    data: dict[str, str | int]
    phase: Literal["dense", "sparse"]
    step: Annotated[int, Field(ge=0)]
    history: History
    dense: Dense | None
    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    controller: dict[str, Any] | None
    rng: Tensor
    cuda_rng: Tensor | None

    @model_validator(mode="after")
    def _check_steps(self) -> State:
        curves = self.history.dense if self.phase == "dense" else self.history.sparse
        if any(len(c) != self.step for c in (curves.loss, curves.level, curves.seconds)):
            raise ValueError(f"must have as many losses, levels and times as steps, {self.step}")
        if self.phase == "sparse" and self.dense is None:
            raise ValueError("must have what came of the dense phase")
        return self


def load_checkpoint(model: nn.Module, path: Path, what: str = "checkpoint") -> None:
    """Load a safetensors file, ``what`` it is called, into ``model``.

    Raises:
        ValueError: the file is damaged, or is not of this model.
        OSError: it cannot be read.
    """
    try:
        found = safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{what} {path} is damaged or no safetensors file: {error}") from None
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
        raise ValueError(f"{what} {path} is not of this model: {', '.join(problems[:3])}{more}")
    model.load_state_dict(found)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the state in ``folder``, in one piece; its last bytes are the SHA-256 of the others.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomic(folder / STATE, content + hashlib.sha256(content).digest())


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the state saved in ``folder``; None where there is none.

    Raises:
        ValueError: the file is damaged, was changed, or is something else.
        OSError: it cannot be read.
    """
    path = folder / STATE
    try:
        stored = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    size = hashlib.sha256().digest_size
    content, stored_digest = stored[:-size], stored[-size:]
    if hashlib.sha256(content).digest() != stored_digest:
        raise ValueError(
            f"{path} is damaged or no saved run: its last {size} bytes are not the SHA-256 of "
            "the others"
        )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        version = state["format"]
    # it was whole when it was written, but by whom
    except Exception as error:
        raise ValueError(f"{path} is damaged or no saved run: {error}") from None
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, this program reads {FORMAT}")
    try:
        State.model_validate(state)
    except ValidationError as error:
        (first, *_) = error.errors()
        place = "".join(f"[{part!r}]" for part in first["loc"])
        what = first["msg"].replace("Input should be", "must be")
        raise ValueError(
            f"{path} is damaged or no saved run: state{place} {what}, got {first['input']!r:.60}"
        ) from None
    return state


@contextmanager
def of_state(folder: Path) -> Iterator[None]:
    """Let what cannot be taken from the state in ``folder`` be an error that names its file.

    Raises:
        ValueError: something in it does not fit.
    """
    try:
        yield
    # of a type or a value that nobody has thought of
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / STATE} is not of this run: {what}") from None


def has_ended(folder: Path) -> bool:
    """Tell whether the run in ``folder`` has ended: its report and its checksums are there."""
    return (folder / REPORT).exists() and (folder / SUMS).exists()


def load_report(folder: Path) -> dict[str, Any]:
    """Return the report of a run that has ended, whose files are as it left them.

    Raises:
        ValueError: a file is missing, damaged or was changed.
        OSError: one cannot be read.
    """
    check_sums(folder)
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / REPORT} is damaged: {error}") from None
    if not (isinstance(report, dict) and "results" in report):
        raise ValueError(f"{folder / REPORT} is damaged: it must be a report, got {report!r:.60}")
    return report


def claim(folder: Path, further: Iterable[str] = (), *, force: bool) -> None:
    """Make sure that a new run may write its files to ``folder``, ``further`` ones included.

    A run that was ended before it had saved a step, for want of memory say, is in nobody's way.

    Raises:
        FileExistsError: some are there already, and ``force`` is not given.
        OSError: ``folder`` is no folder.
    """
    # the state first: without it the other files are no run that could be resumed
    names = (
        *(STATE, RECIPE, START, CHECKPOINTS, REPORT, DENSE, STRIPPED, MODEL, CURVES, SUMS),
        *further,
    )
    present = [name for name in names if (folder / name).exists()]
    if present and not force and not _is_untrained(folder, present):
        resumes = STATE in present or RECIPE in present
        how = "--resume goes on with that run" if resumes else "there is no state to --resume from"
        raise FileExistsError(
            f"{folder} holds {', '.join(present)} already: {how}, --force replaces it"
        )
    for name in present:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()


def _is_untrained(folder: Path, present: Sequence[str]) -> bool:
    """Tell whether a run has left only what it writes before any step of training."""
    if {*present} <= {RECIPE, START, CHECKPOINTS}:
        return not any((folder / CHECKPOINTS).glob("*"))
    try:
        state = load_state(folder) if {*present} <= {STATE, DENSE} else None
    except ValueError:
        return False
    return state is not None and state["step"] == 0 and not state["history"]["dense"]["loss"]


def serialised(model: nn.Module) -> bytes:
    """Return the safetensors file of ``model``'s weights."""
    weights: dict[str, Tensor] = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    return safetensors.torch.save(weights, metadata={"format": "pt"})


def sizes(weights: bytes) -> dict[str, int | str]:
    """Return how large a file is, as it is and deflated, and its SHA-256."""
    return {
        "bytes": len(weights),
        "compressed_bytes": len(zlib.compress(weights, 6)),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
