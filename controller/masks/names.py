"""Names of weights that hold whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterable

# what DistributedDataParallel, AveragedModel, torch.compile, FullyShardedDataParallel, activation
# checkpointing and PEFT put into a path
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
_PREFIXES = ("module", "base_model")


def canonical(name: str) -> str:
    """Return the path of a module or weight as it is in the model without wrappers."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _PREFIXES:
        # PEFT's `base_model.model.` in front of the model
        parts = parts[2:] if parts[:2] == ["base_model", "model"] and parts[2:] else parts[1:]
    return ".".join(parts)


def match(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str] | None:
    """Find names of one model in another, which may be a copy of it or hold such a copy.

    None where some are missing, or where several parts of the other model fit.
    """
    names = {canonical(name): name for name in there}
    wanted = list(wanted)
    first = canonical(wanted[0])
    found = []
    for name in names:
        if name == first or name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            if all(prefix + canonical(other) in names for other in wanted):
                found.append({other: names[prefix + canonical(other)] for other in wanted})
    return found[0] if len(found) == 1 else None
