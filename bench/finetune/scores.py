"""How good a model is on the held-out examples, and how long a forward pass takes."""

from __future__ import annotations

import math
import statistics
import time
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .distill import cosines
from .examples import Examples

METRICS = {
    "causal-lm": ("perplexity", False),
    "masked-lm": ("perplexity of masked tokens", False),
    "classification": ("accuracy", True),
    "image-classification": ("accuracy", True),
    "embedding": ("cosine to the dense embedding", True),
}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    objective: str,
    *,
    batch_size: int,
    batches: int | None = None,
    dense: nn.Module | None = None,
    pooling: str = "mean",
    bfloat16: bool = False,
) -> dict[str, float]:
    """Measure loss and metric on held-out examples, each once, shared among the processes.

    Args:
        model: on its device; left in training or evaluation as it was.
        examples: whose held-out ones.
        objective: what is measured, see ``METRICS``.
        batch_size: examples in a batch.
        batches: the first so many; None: all.
        dense: what an embedding is compared with.
        pooling: of an embedding.
        bfloat16: by autocast.

    Returns:
        ``metric``, ``loss`` in nats a token or example (of embeddings 1 - cosine), and
        ``seconds_per_batch``, the median.
    """
    device = next(model.parameters()).device
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, size = 0, 1
    if distributed:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    collate: Any = examples.collate_held_out
    # its generator only keeps it from drawing of the training's
    loader = DataLoader(
        examples.held_out, batch_size, collate_fn=collate, generator=torch.Generator()
    )
    trained = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, metric, count
    seconds = []
    for i, batch in enumerate(islice(loader, batches)):
        if i % size != rank:
            continue
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            if not seconds:
                model(**inputs)  # the first pass sets up
            _wait(device)
            started = time.perf_counter()
            outputs = model(**inputs)
            _wait(device)
            seconds.append(time.perf_counter() - started)
            other = None if dense is None else dense(**inputs)
        sums += _sums(objective, inputs, outputs, other, pooling)
    model.train(trained)
    if distributed:
        torch.distributed.all_reduce(sums)
    loss, metric, count = sums.tolist()
    loss = loss / count
    # e^700 is about the largest number
    found = math.exp(min(loss, 700.0)) if objective.endswith("-lm") else metric / count
    return {
        "metric": found,
        "loss": loss,
        "seconds_per_batch": statistics.median(seconds) if seconds else 0.0,
    }


def _sums(
    objective: str, inputs: dict[str, Tensor], outputs: Any, dense: Any, pooling: str
) -> Tensor:
    """Return loss, metric and count, summed over a batch."""
    device = next(iter(inputs.values())).device
    if objective == "embedding":
        cosine = cosines(outputs, dense, inputs, pooling).double()
        parts = (1 - cosine).sum(), cosine.sum(), len(cosine)
    else:
        labels = inputs["labels"]
        if objective.endswith("-lm"):
            # each token is predicted from those before it: the first from none
            labels = labels[:, 1:] if objective == "causal-lm" else labels
            count = int((labels != -100).sum())
            right: Any = 0
        else:
            count, right = len(labels), (outputs.logits.argmax(-1) == labels).sum()
        # without anything to predict the mean is NaN
        parts = (outputs.loss.double() * count if count else 0.0), right, count
    return torch.stack(
        [torch.as_tensor(part, dtype=torch.float64, device=device) for part in parts]
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
