"""The recipe of a run on a model of the user's own: a YAML file, the command line, or both."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from ...controller.config.declaration import did_you_mean, listed
from ..measure.options import END
from .options import RunOptions, check_values, checked, same_run

OBJECTIVES = ("causal-lm", "masked-lm", "classification", "image-classification", "embedding")
DISTILLED = ("logits", "hidden")
# settings of the Trainer that options of ours decide, or that a run relies on
OWN_SETTINGS = {
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "save_steps": "save_every",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "dtype",
    "use_cpu": "device",
    "no_cuda": "device",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "force",
    "save_only_model": None,
    "remove_unused_columns": None,
    "ignore_data_skip": None,
    "auto_find_batch_size": None,
    "push_to_hub": None,
    "fsdp": None,
    "deepspeed": None,
}

Names = Annotated[tuple[str, ...], BeforeValidator(listed)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe(RunOptions):
    """All that a run's result depends on, the contents of the files apart.

    Attributes:
        model: folder that ``from_pretrained`` reads, sharded or not.
        data: files or folders to train on: text, JSON lines, CSV, a folder of images by class, a
            folder that ``datasets`` has saved.
        eval_data: likewise to evaluate on; without it a part of ``data`` is held out.
        held_out: that part, in (0, 1); at least one example.
        objective: one of ``OBJECTIVES``; None: as the model's architecture says.
        text_column, label_column: of rows; None: ``text``, or token ids in ``input_ids``.
        max_length: tokens in an example; None: 512, or what model and tokenizer take if less.
        new_head: classify by a new head, for the labels that are in the data.
        distill: what else of the dense model is learned: ``"logits"``, of encoders ``"hidden"``.
        score_lr: None: the callback's own.
        scope: none: the linear layers of the transformer blocks.
        trainer: settings of ``transformers.TrainingArguments``, for all else.
    """

    model: str = ""
    data: Names = ()
    eval_data: Names = ()
    held_out: float = 0.05
    objective: str | None = None
    text_column: str | None = None
    label_column: str = "label"
    max_length: int | None = None
    new_head: bool = False
    distill: Names = ()
    ramp: float = 0.7
    score_lr: float | None = None
    scope: Names = ()
    ignore: Names = ()
    epochs: float = 3.0
    batch_size: int = 8
    lr: float = 5e-5
    save_every: int = 200
    trainer: dict[str, Any] = field(default_factory=dict)


FIELDS = tuple(one.name for one in fields(Recipe))


def read_recipe(path: Path) -> dict[str, Any]:
    """Return what a recipe file says.

    Raises:
        ValueError: it is no YAML mapping.
        OSError: it cannot be read.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} must be YAML: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"config {path} must be a mapping of options to values, got {type(found).__name__}"
        )
    return found


def make_recipe(given: Mapping[str, Any], source: str) -> Recipe:
    """Return a recipe of what was given.

    Raises:
        ValueError: a key is no option, or a value is of another type; ``source`` says whose.
    """
    try:
        return Recipe(**{str(name): value for name, value in given.items()})
    except ValidationError as error:
        raise ValueError("; ".join(_in_words(one, source) for one in error.errors())) from None


def _in_words(details: Any, source: str) -> str:
    name = str(details["loc"][0])
    if details["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = did_you_mean(name, FIELDS)
        return f"{source} has {name!r}, which is no option{near}; they are {', '.join(FIELDS)}"
    what = details["msg"].replace("Input should be", "must be")
    return f"{source}: {name} {what}, got {details['input']!r}"


def merged(written: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe file's options with those of the command line in front."""
    both = {**written, **given}
    parts = [part["trainer"] for part in (written, given) if "trainer" in part]
    if len(parts) == 2 and all(isinstance(part, Mapping) for part in parts):
        both["trainer"] = {**parts[0], **parts[1]}
    return both


def parse_settings(texts: Collection[str]) -> dict[str, Any]:
    """Return the settings that ``key=value`` texts spell; a value is YAML.

    Raises:
        ValueError: one is not so spelled.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"trainer must be key=value, got {text!r}")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"trainer: the value of {name} must be YAML, got {value!r}") from None
    return found


def spelled(recipe: Recipe) -> str:
    """Return a recipe as YAML that ``read_recipe`` understands."""
    plain = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(recipe).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def check_recipe(recipe: Recipe) -> None:
    """Check each option, and what goes with what, without a look at the machine.

    Raises:
        ValueError: an option is unknown or out of its range.
    """
    if not recipe.model:
        raise ValueError("model must be given: a folder that from_pretrained reads")
    if not recipe.data:
        raise ValueError("data must be given: a file or folder to train on")
    if recipe.objective not in (None, *OBJECTIVES):
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)}, got {recipe.objective!r}"
        )
    for name in recipe.distill:
        if name not in DISTILLED:
            raise ValueError(f"distill must be some of {', '.join(DISTILLED)}, got {name!r}")
    for name, fits, what in (
        ("held_out", lambda x: 0 < x < 1, "in (0, 1)"),
        ("max_length", lambda x: 2 <= x < END, "from 2 to 2^31 - 1"),
        ("epochs", lambda x: 0 < x < END, "positive and below 2^31"),
    ):
        value = getattr(recipe, name)
        if value is not None and not fits(value):
            raise ValueError(f"{name.replace('_', '-')} must be {what}, got {value!r}")
    if recipe.device.startswith("cuda:"):
        raise ValueError(
            f"device must be auto, cpu or cuda, got {recipe.device!r}; which GPU there is, "
            "CUDA_VISIBLE_DEVICES says"
        )
    for name in recipe.trainer:
        if name in OWN_SETTINGS:
            option = OWN_SETTINGS[name]
            instead = f"use {option.replace('_', '-')}" if option else "a run relies on its own"
            raise ValueError(f"trainer must leave {name} out: {instead}")
    check_values(_whole(recipe))


def _whole(recipe: Recipe) -> Recipe:
    # a part of an epoch is fine, but not to the built-in tasks, whose check this is
    return replace(recipe, epochs=math.ceil(recipe.epochs))


def checked_recipe(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with paths made absolute, and what ``checked`` spells out.

    Raises:
        ValueError: an option is unknown or out of its range.
    """
    check_recipe(recipe)
    return replace(
        checked(_whole(recipe)),
        epochs=recipe.epochs,
        model=str(Path(recipe.model).absolute()),
        data=tuple(str(Path(path).absolute()) for path in recipe.data),
        eval_data=tuple(str(Path(path).absolute()) for path in recipe.eval_data),
    )


def same_recipe(saved: Recipe, asked: Recipe, given: Collection[str]) -> Recipe:
    """Return the saved recipe, if nothing that was asked for explicitly differs from it.

    Raises:
        ValueError: an option differs; the message names it and both values.
    """
    return same_run(saved, asked, given, checked_recipe)
