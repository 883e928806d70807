"""Rows become the examples of an objective: tokens, labels, pixels, and how they are batched."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    default_data_collator,
)

from .data import Row, column, read, split
from .recipe import Recipe

LENGTH = 512  # tokens in an example, where model and tokenizer take as many
MASKED = 0.15  # of a masked language model's tokens
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Examples:
    """What a model is trained and evaluated on.

    Attributes:
        train, held_out: the examples.
        collate, collate_held_out: make a batch.
        labels: of a new head; None where the model's own are kept.
        epoch: which epoch it is, for what is drawn anew in each.
        about: counts and the split, for the report.
        pad_token: id that fills a batch up, where the tokenizer had to be given one.
    """

    train: Dataset[dict[str, Any]]
    held_out: Dataset[dict[str, Any]]
    collate: Collate
    collate_held_out: Collate
    labels: tuple[str, ...] | None = None
    epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    about: dict[str, Any] = field(default_factory=dict)
    pad_token: int | None = None


class Items(Dataset[dict[str, Any]]):
    """Examples by index; a sequence and a function of it."""

    def __init__(self, count: int, item: Callable[[int], dict[str, Any]]) -> None:
        self.count, self.item = count, item

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(int(index))


def make_examples(recipe: Recipe, objective: str, config: Any, processor: Any) -> Examples:
    """Read the data of a recipe and make them examples of an objective.

    Args:
        recipe: checked.
        objective: what is learned.
        config: the model's.
        processor: its tokenizer or image processor; None where the folder has none.

    Raises:
        ValueError: a row lacks a column, a label is none of the model's, a token is not in its
            vocabulary, or a side of the split is empty.
        ModuleNotFoundError, OSError: as ``read``.
    """
    whole = objective in ("causal-lm", "masked-lm")
    parts = [read(Path(path), whole=whole) for path in recipe.data]
    rows = [row for part in parts for row in part.train]
    apart = [row for part in parts for row in part.held_out]
    if recipe.eval_data:
        apart = [r for path in recipe.eval_data for r in read(Path(path), whole=whole).train]
    if objective == "image-classification":
        return _images(recipe, config, processor, rows, apart)
    if processor is None and objective != "causal-lm":
        raise ValueError(
            f"model {recipe.model} must hold a tokenizer for {objective}, and has none"
        )
    if whole:
        return _windows(recipe, objective, config, processor, rows, apart)
    return _texts(recipe, objective, config, processor, rows, apart)


def _parted(
    recipe: Recipe, rows: Sequence[Any], apart: Sequence[Any], what: str
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Return what is trained on, what is held out, and that in words for the report."""
    if apart:
        how = "files of their own" if recipe.eval_data else "a split of the data's own"
        train, held_out = list(rows), list(apart)
    else:
        one, other = split(len(rows), recipe.held_out, recipe.seed, what)
        train, held_out = [rows[i] for i in one], [rows[i] for i in other]
        how = f"{100 * recipe.held_out:g} % of the {what}, drawn by seed {recipe.seed}"
    about = {"examples": what, "train": len(train), "held_out": len(held_out), "split": how}
    return train, held_out, about


# text


def _text_column(recipe: Recipe, rows: Sequence[Row]) -> str:
    if recipe.text_column:
        return recipe.text_column
    return (
        "input_ids" if "text" not in rows[0].values and "input_ids" in rows[0].values else "text"
    )


def _length(recipe: Recipe, config: Any, tokenizer: Any) -> int:
    places = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (places, getattr(tokenizer, "model_max_length", None)) if limit]
    most = min(limits, default=LENGTH)
    if recipe.max_length and recipe.max_length > most:
        raise ValueError(
            f"max-length must be at most {most}, which model and tokenizer take, got "
            f"{recipe.max_length}"
        )
    return recipe.max_length or min(LENGTH, most)


def _encode(
    recipe: Recipe, config: Any, tokenizer: Any, rows: Sequence[Row], **how: Any
) -> list[list[int]]:
    """Return the token ids of each row."""
    name = _text_column(recipe, rows)
    values = column(rows, name, "--text-column")
    is_text = isinstance(values[0], str)
    for row, value in zip(rows, values, strict=True):
        # an id that is no integer would be cut to one
        fits = isinstance(value, list) and all(type(token) is int for token in value)
        if isinstance(value, str) != is_text or not (is_text or fits):
            raise ValueError(
                f"data {row.place}: {name} must be text or a list of token ids, alike in all "
                f"rows, got {str(value)[:60]!r}"
            )
    if is_text:
        if tokenizer is None:
            raise ValueError(f"model {recipe.model} must hold a tokenizer for text, and has none")
        ids = tokenizer(values, **how)["input_ids"]
    else:
        ids = [value[: how.get("max_length")] for value in values]
    size = config.get_text_config().vocab_size
    for row, tokens in zip(rows, ids, strict=True):
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise ValueError(
                f"data {row.place} must have token ids from 0 to {size - 1}, the model's "
                f"vocabulary, got {wrong}"
            )
    return ids


def _windows(
    recipe: Recipe,
    objective: str,
    config: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    apart: Sequence[Row],
) -> Examples:
    """All text in a row, cut into windows."""
    length = _length(recipe, config, tokenizer)
    masked = objective == "masked-lm"
    if masked and tokenizer.mask_token_id is None:
        raise ValueError(f"model {recipe.model} must have a tokenizer with a mask token")

    def cut(rows: Sequence[Row], option: str) -> list[np.ndarray]:
        if not rows:
            return []
        documents = _encode(recipe, config, tokenizer, rows)
        end = None if masked else getattr(tokenizer, "eos_token_id", None)
        tokens: list[int] = []
        for document in documents:
            tokens += document
            if end is not None and tokens[-1:] != [end]:
                tokens.append(end)
        count = len(tokens) // length
        if not count:
            raise ValueError(
                f"{option} must have at least one window of {length} tokens, got {len(tokens)} "
                "tokens; give more, or a smaller max-length"
            )
        found = np.array(tokens[: count * length], np.int64).reshape(count, length)
        return list(found)

    what = f"windows of {length} tokens"
    train, held_out, about = _parted(recipe, cut(rows, "data"), cut(apart, "eval-data"), what)

    def items(windows: list[np.ndarray]) -> Items:
        def item(index: int) -> dict[str, Any]:
            ids = torch.from_numpy(windows[index])
            return {"input_ids": ids} | ({"index": index} if masked else {"labels": ids})

        return Items(len(windows), item)

    if not masked:
        collate: Collate = default_data_collator
        return Examples(items(train), items(held_out), collate, collate, about=about)
    epoch = torch.zeros((), dtype=torch.int64).share_memory_()
    draws = Masking(tokenizer, recipe.seed, epoch), Masking(tokenizer, recipe.seed, None)
    return Examples(items(train), items(held_out), *draws, epoch=epoch, about=about)


class Masking:
    """Masks tokens for a masked language model: which, seed, epoch and example alone decide.

    So a run that is resumed within an epoch goes on with the masks that it would have had.

    Args:
        tokenizer: has a mask token.
        seed: of the run.
        epoch: a scalar in shared memory, which workers see too; None: the same masks always.
    """

    def __init__(self, tokenizer: Any, seed: int, epoch: Tensor | None) -> None:
        self.inner = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
        self.seed, self.epoch = seed, epoch

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        epoch = -1 if self.epoch is None else int(self.epoch)
        which = (self.seed, epoch, *(example["index"] for example in examples))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(repr(which).encode()))
            return dict(self.inner([{"input_ids": e["input_ids"]} for e in examples]))


def _texts(
    recipe: Recipe,
    objective: str,
    config: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    apart: Sequence[Row],
) -> Examples:
    """A row an example: to classify, or to embed."""
    length = _length(recipe, config, tokenizer)
    pad = None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model {recipe.model} must have a tokenizer with a padding token")
        tokenizer.pad_token = tokenizer.eos_token
        pad = tokenizer.pad_token_id
    train, held_out, about = _parted(recipe, rows, apart, "rows")
    labels, numbers = None, ((), ())
    if objective == "classification":
        labels, numbers = _labels(recipe, config, train, held_out)

    def items(rows: list[Row], side: int) -> Items:
        how = {"truncation": True, "max_length": length}
        ids = _encode(recipe, config, tokenizer, rows, **how)

        def item(index: int) -> dict[str, Any]:
            found: dict[str, Any] = {"input_ids": ids[index]}
            if objective == "classification":
                found["labels"] = numbers[side][index]
            return found

        return Items(len(rows), item)

    collate = DataCollatorWithPadding(tokenizer)
    return Examples(
        items(train, 0),
        items(held_out, 1),
        collate,
        collate,
        labels=labels,
        about=about,
        pad_token=pad,
    )


# labels and images


def _labels(
    recipe: Recipe, config: Any, train: Sequence[Row], held_out: Sequence[Row]
) -> tuple[tuple[str, ...] | None, tuple[list[int], list[int]]]:
    """Return a new head's labels, or None, and of both sides each row's number."""
    sides = [column(rows, recipe.label_column, "--label-column") for rows in (train, held_out)]
    if recipe.new_head:
        found = {str(value) for side in sides for value in side}
        if len(found) < 2:
            raise ValueError(f"{recipe.label_column} must have two labels or more, got {found}")
        numeric = all(label.isdecimal() for label in found)
        names = tuple(sorted(found, key=(lambda x: (int(x), x)) if numeric else None))
        known = {name: i for i, name in enumerate(names)}
        one, other = ([known[str(value)] for value in side] for side in sides)
        return names, (one, other)
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"model {recipe.model} must choose one of several labels, got {config.num_labels} of "
            f"problem_type {config.problem_type!r}; --new-head trains another head"
        )
    one, other = (
        [_label(config, row, value) for row, value in zip(rows, side, strict=True)]
        for rows, side in zip((train, held_out), sides, strict=True)
    )
    return None, (one, other)


def _label(config: Any, row: Row, value: Any) -> int:
    known = config.label2id or {}
    if isinstance(value, str) and value in known:
        return int(known[value])
    text = str(value)
    if type(value) in (int, str) and text.isdecimal() and int(text) < config.num_labels:
        return int(text)
    names = [str(name) for name in known][:4]
    raise ValueError(
        f"data {row.place}: the label must be from 0 to {config.num_labels - 1} or one of "
        f"{', '.join(names)}{', ...' if len(known) > 4 else ''}, got {value!r}; --new-head trains "
        "a head for the labels that are in the data"
    )


def _images(
    recipe: Recipe, config: Any, processor: Any, rows: Sequence[Row], apart: Sequence[Row]
) -> Examples:
    """An image an example."""
    if processor is None:
        raise ValueError(
            f"model {recipe.model} must hold an image processor, preprocessor_config.json, and "
            "has none"
        )
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "images need pillow: pip install 'triton-sparsity[transformers]'"
        ) from None
    train, held_out, about = _parted(recipe, rows, apart, "images")
    labels, numbers = _labels(recipe, config, train, held_out)
    for row in (*train, *held_out):
        column([row], "image", "a folder of images")

    def picture(row: Row) -> Any:
        found = row.values["image"]
        if isinstance(found, str | Path):
            # a path in a table is relative to the table
            try:
                found = Image.open(Path(row.file).parent / found)
                return found.convert("RGB")
            except OSError as error:
                raise ValueError(f"data {row.place} must be an image: {error}") from None
        return found.convert("RGB")

    def items(rows: list[Row], side: int) -> Items:
        def item(index: int) -> dict[str, Any]:
            pixels = processor(images=picture(rows[index]), return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels[0], "labels": numbers[side][index]}

        return Items(len(rows), item)

    collate: Collate = default_data_collator
    return Examples(
        items(train, 0), items(held_out, 1), collate, collate, labels=labels, about=about
    )
