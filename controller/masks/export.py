"""ONNX export of a stripped model."""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn


def export_onnx(
    model: nn.Module,
    save_path: str | PathLike[str],
    save_format: str | None,
    input_names: list[str] | None,
    output_names: list[str] | None,
    model_args: tuple[Any, ...] | None,
) -> None:
    """Export ``model`` in evaluation mode; the controller's ``export_model`` has the arguments."""
    match = re.fullmatch(r"onnx(?:_(\d+))?", save_format or "onnx")
    if match is None:
        raise ValueError(
            f"export_model: save_format must be 'onnx' or 'onnx_<opset>', got {save_format!r}"
        )
    if not model_args or not isinstance(model_args[-1], dict):
        raise ValueError(
            "export_model: model_args must be example inputs with a dictionary of keyword "
            f"arguments last, such as (x, {{}}), got {model_args!r}"
        )
    *args, kwargs = model_args
    program = torch.onnx.export(
        model.eval(),
        tuple(args),
        kwargs=kwargs,
        input_names=input_names,
        output_names=output_names,
        opset_version=int(match[1]) if match[1] else None,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    path = Path(save_path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        program.save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
