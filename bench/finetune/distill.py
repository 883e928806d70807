"""What a sparse model learns from the dense one: its embeddings, logits and hidden states.

Knowledge distillation, Hinton et al., https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embed(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return the vector of each text, of length 1.

    Args:
        states: of its tokens, (texts, tokens, width).
        mask: 1 where there is a token, (texts, tokens).
        pooling: ``"mean"``, ``"first"`` or ``"last"`` token.
    """
    match pooling:
        case "mean":
            kept = mask.unsqueeze(-1).to(states.dtype)
            vector = (states * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        case "first":
            vector = states[torch.arange(len(states)), mask.argmax(1)]
        case _:
            places = torch.arange(mask.shape[1], device=mask.device)
            vector = states[torch.arange(len(states)), (places * mask).argmax(1)]
    return F.normalize(vector.float(), dim=-1)


def cosines(one: Any, other: Any, inputs: Mapping[str, Tensor], pooling: str) -> Tensor:
    """Return the cosine of each text's two vectors, from the outputs of two models."""
    mask = inputs["attention_mask"]
    vectors = [embed(o.last_hidden_state, mask, pooling) for o in (one, other)]
    return (vectors[0] * vectors[1]).sum(-1)


def logits_loss(
    logits: Tensor, dense: Tensor, labels: Tensor | None, temperature: float
) -> Tensor:
    """Return T^2 KL(dense || sparse) of softened probabilities, the mean over predictions.

    Args:
        logits, dense: (..., classes).
        labels: of tokens: where they are -100 nothing is predicted; None, or of whole examples:
            all count.
        temperature: T.
    """
    if labels is not None and labels.dim() == logits.dim() - 1:
        logits, dense = logits[labels != -100], dense[labels != -100]
    if not logits.numel():
        return logits.sum()
    one, other = (
        F.log_softmax(x.flatten(0, -2).float() / temperature, dim=-1) for x in (logits, dense)
    )
    return temperature**2 * F.kl_div(one, other, reduction="batchmean", log_target=True)


def hidden_loss(states: Sequence[Tensor], dense: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return the squared error of hidden states over their variance, the mean over layers.

    Args:
        states, dense: a layer each, (examples, tokens, width).
        mask: 1 where there is a token, (examples, tokens); None: everywhere.
    """
    terms = []
    for one, other in zip(states, dense, strict=True):
        if mask is not None and mask.shape == one.shape[:2]:
            one, other = one[mask.bool()], other[mask.bool()]
        one, other = one.float(), other.float()
        terms.append(F.mse_loss(one, other) / other.var().clamp(min=1e-12))
    return torch.stack(terms).mean()


class Distillation:
    """The loss of a model that has a dense one to learn from.

    Args:
        dense: the teacher, in evaluation and frozen.
        objective: what is learned; of an embedding the dense model's is the task.
        what: ``"logits"``, ``"hidden"``, both or neither.
        weight: of these in the loss, in [0, 1]; the task has the rest.
        temperature: of logits.
        pooling: of an embedding.
    """

    def __init__(
        self,
        dense: nn.Module,
        objective: str,
        what: Sequence[str],
        weight: float,
        temperature: float,
        pooling: str,
    ) -> None:
        self.dense = dense.eval().requires_grad_(False)
        self.objective, self.what, self.weight = objective, tuple(what), weight
        self.temperature, self.pooling = temperature, pooling

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Return the loss, a mean over the batch, and the model's outputs."""
        asked = {"output_hidden_states": True} if "hidden" in self.what else {}
        outputs = model(**inputs, **asked)
        with torch.no_grad():
            dense = self.dense(**{k: v for k, v in inputs.items() if k != "labels"}, **asked)
        if self.objective == "embedding":
            task = 1 - cosines(outputs, dense, inputs, self.pooling).mean()
        else:
            task = outputs.loss
        terms = []
        if "logits" in self.what:
            labels = inputs.get("labels")
            terms.append(logits_loss(outputs.logits, dense.logits, labels, self.temperature))
        if "hidden" in self.what:
            mask = inputs.get("attention_mask")
            terms.append(hidden_loss(outputs.hidden_states, dense.hidden_states, mask))
        if not terms:
            return task, outputs
        return (1 - self.weight) * task + self.weight * torch.stack(terms).mean(), outputs
