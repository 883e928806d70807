"""Model folders as Hugging Face saves them: what is in one, loading it, and writing another."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto import modeling_auto

TABLES = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "embedding": modeling_auto.MODEL_MAPPING_NAMES,
}
CLASSES = {
    "causal-lm": hf.AutoModelForCausalLM,
    "masked-lm": hf.AutoModelForMaskedLM,
    "classification": hf.AutoModelForSequenceClassification,
    "image-classification": hf.AutoModelForImageClassification,
    "embedding": hf.AutoModel,
}
ENCODERS = modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
# of a sentence encoder, beside the model: how its tokens become one vector
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


def read_config(folder: Path) -> Any:
    """Return a folder's configuration.

    Raises:
        ValueError: there is none, it is damaged, or of an architecture that is not known.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model must be a folder that save_pretrained has written, got {folder}, which has no "
            "config.json"
        )
    try:
        return hf.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"model {folder} must be of an architecture that transformers {hf.__version__} knows: "
            f"{_first_line(error)}"
        ) from None


def guess_objective(config: Any, folder: Path) -> str:
    """Return the objective that an architecture is for.

    Raises:
        ValueError: it is for none, as an encoder and decoder.
    """
    for name in config.architectures or ():
        for objective, table in TABLES.items():
            known = {n for value in table.values() for n in _names(value)}
            if name in known and not (objective == "embedding" and config.is_encoder_decoder):
                return objective
        if name in ENCODERS.values():
            return "embedding"
    raise ValueError(
        f"model {folder} must be for one of {', '.join(TABLES)}, got architecture "
        f"{', '.join(config.architectures or ['of no name'])}; --objective says which, and "
        "TransformersCallback trains any model by a Trainer of one's own"
    )


def _names(value: Any) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def load(
    folder: Path, objective: str, *, labels: Sequence[str] | None = None, seed: int = 0
) -> Any:
    """Return a folder's model in float32, on the CPU.

    Args:
        folder: as ``read_config`` has accepted it.
        objective: what its head is for.
        labels: of a new head for them; None keeps the head.
        seed: of a new head's weights.

    Raises:
        ValueError: the architecture has no such head, or weights are missing or damaged.
    """
    changes: dict[str, Any] = {}
    if labels is not None:
        changes = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
    torch.manual_seed(seed)
    try:
        config = read_config(folder)
        auto = CLASSES[objective]
        if objective == "embedding" and set(config.architectures or ()) & set(ENCODERS.values()):
            auto = hf.AutoModelForTextEncoding
        model, found = auto.from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, **changes
        )
    except (OSError, RuntimeError, SafetensorError, KeyError, EOFError, pickle.PickleError) as e:
        raise ValueError(f"model {folder} must hold whole weights: {_first_line(e)}") from None
    except ValueError as error:
        raise ValueError(
            f"model {folder} must have a head for {objective}: {_first_line(error)}"
        ) from None
    missing = sorted(set(found["missing_keys"]))
    if objective == "embedding":
        # the vector is made of the tokens' states
        missing = [name for name in missing if "pooler" not in name.split(".")]
    if labels is not None:
        inside = f"{model.base_model_prefix}."
        missing = [n for n in missing if n.startswith(inside) and "pooler" not in n.split(".")]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"model {folder} must have all weights of {type(model).__name__}, and lacks "
            f"{', '.join(missing[:3])}{more}"
        )
    return model.float()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def stored_dtype(config: Any) -> torch.dtype:
    """Return the dtype that a folder's weights are stored in, as its configuration says."""
    found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def load_processor(folder: Path, objective: str) -> Any:
    """Return a folder's tokenizer or image processor; None where it has none.

    Raises:
        ValueError: it is damaged.
    """
    kind = hf.AutoImageProcessor if objective == "image-classification" else hf.AutoTokenizer
    names = ("preprocessor_config.json",)
    if kind is hf.AutoTokenizer:
        names = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a parser of somebody else's raises
        raise ValueError(
            f"model {folder}: {names[0]} cannot be read: {_first_line(error)}"
        ) from None


def pooling(folder: Path) -> str:
    """Return how a sentence encoder's tokens become one vector: ``mean`` where nothing says so.

    Raises:
        ValueError: in a way that is not known here.
    """
    file = folder / "1_Pooling" / "config.json"
    if not file.exists():
        return "mean"
    asked = [name for name, on in json.loads(file.read_text()).items() if on is True]
    asked = [name for name in asked if name.startswith("pooling_mode_")]
    if len(asked) != 1 or asked[0] not in POOLINGS:
        raise ValueError(f"{file} must ask for one of {', '.join(POOLINGS)}, got {asked}")
    return POOLINGS[asked[0]]


def save(model: Any, processor: Any, source: Path, folder: Path) -> None:
    """Write ``model`` to ``folder`` in the dtype of ``source``, and what lay beside it there.

    The folder is there in whole or not at all.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(stored_dtype(read_config(source))).save_pretrained(partial)
    if processor is not None:
        processor.save_pretrained(partial)
    for name in SENTENCE_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, partial / name)
    if (source / "modules.json").is_file():
        for module in json.loads((source / "modules.json").read_text()):
            if (part := module.get("path")) and (source / part).is_dir():
                shutil.copytree(source / part, partial / part)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def sizes(folder: Path) -> dict[str, int]:
    """Return how large a folder's weights are, as they are and deflated."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    deflated = 0
    for path in files:
        packer = zlib.compressobj(6)
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                deflated += len(packer.compress(part))
        deflated += len(packer.flush())
    return {"bytes": sum(f.stat().st_size for f in files), "compressed_bytes": deflated}


def zeros(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return of each parameter how many elements are zero, and how many there are."""
    return {
        name: (int((parameter == 0).sum()), parameter.numel())
        for name, parameter in model.named_parameters()
    }
