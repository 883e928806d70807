"""Data of the user's own: rows from files of several kinds, and which of them are held out."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class Row(NamedTuple):
    """One row of a file: its values by column, and where it stands."""

    values: Mapping[str, Any]
    file: str
    number: int  # from 1: the line, the image, the record

    @property
    def place(self) -> str:
        return f"{self.file}, number {self.number}"


class Rows(NamedTuple):
    """The rows to train on and, where a data set has its own, those to evaluate on."""

    train: list[Row]
    held_out: list[Row]


def read(path: Path, *, whole: bool) -> Rows:
    """Read a file or folder.

    Text has a column ``text``, an image folder ``image`` and ``label``, its subfolders' names; the
    others have the columns that they have. A ``datasets`` folder of several splits gives
    ``train``, and ``validation`` or ``test`` as held out.

    Args:
        path: JSON lines, JSON, CSV, TSV, an image folder or a ``datasets`` folder; any other file
            is text.
        whole: text is one row, not one a line that is not blank.

    Raises:
        ValueError: it is not what it seems, or has no row.
        ModuleNotFoundError: ``datasets`` is needed and missing.
        OSError: it cannot be read.
    """
    rows = Rows(*_dataset(path)) if _is_dataset(path) else Rows(list(_rows(path, whole)), [])
    if not rows.train:
        raise ValueError(f"data {path} must have at least one row, and has none")
    return rows


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()


def _rows(path: Path, whole: bool) -> Iterator[Row]:
    if path.is_dir():
        yield from _image_folder(path)
        return
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from _json_lines(path)
            case ".json":
                yield from _json(path)
            case ".csv" | ".tsv":
                yield from _csv(path)
            case _ if whole:
                yield Row({"text": path.read_text("utf-8")}, str(path), 1)
            case _:
                for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                    if text := line.strip():
                        yield Row({"text": text}, str(path), number)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data {path} must be readable as UTF-8 text: {error}") from None


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data {path}, line {number} must be JSON: {error}") from None
            yield Row(_object(values, path, number), str(path), number)


def _json(path: Path) -> Iterator[Row]:
    text = path.read_text("utf-8")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        # lines, by another name
        yield from _json_lines(path)
        return
    for number, values in enumerate(found if isinstance(found, list) else [found], 1):
        yield Row(_object(values, path, number), str(path), number)


def _object(values: Any, path: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(
            f'data {path}, number {number} must be an object such as {{"text": ...}}, got '
            f"{type(values).__name__}"
        )
    return values


def _csv(path: Path) -> Iterator[Row]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter=separator)
        for values in reader:
            if None in values or None in values.values():
                names = ", ".join(reader.fieldnames or ())
                raise ValueError(
                    f"data {path}, line {reader.line_num} must have a value for each of {names}"
                )
            yield Row(values, str(path), reader.line_num)


def _image_folder(path: Path) -> Iterator[Row]:
    found = [
        (file, folder.name)
        for folder in sorted(path.iterdir())
        if folder.is_dir()
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGES
    ]
    if not found:
        raise ValueError(
            f"data {path} must be a folder of images, a subfolder a class, or one that datasets "
            "has saved, and is neither"
        )
    for number, (file, label) in enumerate(found, 1):
        yield Row({"image": file, "label": label}, str(path), number)


def _dataset(path: Path) -> tuple[list[Row], list[Row]]:
    try:
        # an extra of the user's
        from datasets import (  # pyright: ignore[reportMissingImports]
            DatasetDict,
            load_from_disk,
        )
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"data {path} was saved by datasets, which is missing: "
            "pip install 'triton-sparsity[datasets]'"
        ) from None
    found = load_from_disk(str(path))
    if not isinstance(found, DatasetDict):
        found = {"train": found}
    if "train" not in found:
        raise ValueError(f"data {path} must have a split 'train', got {', '.join(found)}")
    held_out = next((found[name] for name in ("validation", "test") if name in found), ())
    return _records(found["train"], path), _records(held_out, path)


def _records(records: Any, path: Path) -> list[Row]:
    rows = [Row(values, str(path), number) for number, values in enumerate(records, 1)]
    classes = {
        name: kind.names
        for name, kind in getattr(records, "features", {}).items()
        if hasattr(kind, "names")
    }
    for row in rows:
        for name, names in classes.items():
            if row.values[name] in range(len(names)):
                row.values[name] = names[row.values[name]]  # pyright: ignore[reportIndexIssue]
    return rows


def column(rows: Sequence[Row], name: str, option: str) -> list[Any]:
    """Return a column.

    Raises:
        ValueError: a row lacks it; the message names the columns that there are, and ``option``.
    """
    for row in rows:
        if row.values.get(name) is None:
            raise ValueError(
                f"data {row.place} must have a column {name!r}, got {', '.join(row.values)}; "
                f"{option} names another"
            )
    return [row.values[name] for row in rows]


def split(count: int, share: float, seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those held out, drawn by a seed, each in order.

    Args:
        count: of examples.
        share: of them that is held out, rounded, at least one.
        seed: of the draw.
        what: the examples, for messages.

    Raises:
        ValueError: one of the two would be empty.
    """
    held = max(1, round(share * count))
    if held >= count:
        raise ValueError(
            f"data must have {what} to train on and {what} to hold out, got {count} and "
            f"held-out {share:g}: the split would leave one side empty"
        )
    order = np.random.default_rng((seed, 0)).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def digest(paths: Sequence[str]) -> str:
    """Return the SHA-256 of what files contain; of folders, of the names and sizes in them."""
    whole = hashlib.sha256()
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    name = file.relative_to(path).as_posix()
                    whole.update(f"{name} {file.stat().st_size}\n".encode())
        else:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
