"""The options that the jobs of measuring have in common, checked before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .shapes import is_file, parse_shapes
from .spelling import check_device, parse_blocks, parse_pattern

DTYPES = ("float32", "bfloat16", "float16")
PRODUCTS = ("forward", "dX", "dW")
OPERATIONS = (
    "score",
    "select",
    "mask",
    "topology",
    "pack",
    "apply",
    "apply_",
    *PRODUCTS,
    "mask update",
    "training step",
)
END = 2**31  # of counts: a tensor has no longer side


def check_options(
    *,
    shapes: str | None = None,
    patterns: Sequence[str] | None = None,
    blocks: Sequence[str] | None = None,
    levels: Sequence[float] | None = None,
    operations: Sequence[str] | None = None,
    mask: str | None = None,
    dtypes: Sequence[str] | None = None,
    device: str | None = None,
    backend: str | None = None,
    budget: float | None = None,
    **counts: int | None,
) -> None:
    """Check what the command lines that measure have in common; None was not given.

    Args:
        shapes, patterns, levels, operations, mask, dtypes, device, backend: as spelled there.
        blocks: patterns whose blocks products are to skip.
        budget: seconds.
        counts: of threads, tokens and the like.

    Raises:
        ValueError: an option is unknown or out of its range; the message names it.
    """
    if shapes is not None and not is_file(shapes):
        parse_shapes(shapes, 1)
    for pattern in patterns or ():
        parse_pattern(pattern)
    parse_blocks(blocks or ())
    for level in levels or ():
        if not 0 <= level < 1:
            raise ValueError(f"level must be in [0, 1), got {level}")
    for operation in operations or ():
        if operation not in OPERATIONS:
            names = ", ".join(map(repr, OPERATIONS))
            raise ValueError(f"operation must be one of {names}, got {operation!r}")
    if mask not in (None, "random", "skewed"):
        raise ValueError(f"mask must be 'random' or 'skewed', got {mask!r}")
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device is not None:
        check_device(device)
    if backend not in (None, "auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget must be positive, got {budget}")
    for name, value in counts.items():
        if value is not None and not 0 < value < END:
            raise ValueError(f"{name} must be positive and below 2^31, got {value}")
