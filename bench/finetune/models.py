"""The transformers that the tasks train: ordinary PyTorch; nothing in them knows of sparsity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width of a head)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Attention and a GELU network, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class LanguageModel(nn.Module):
    """Causal transformer over bytes: (batch, length) int64 -> logits (batch, length, 256)."""

    def __init__(self, *, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(width, heads, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head_width = width // heads
        self.apply(_initialise)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        rotation = rotations(text.shape[1], self.head_width, x.device)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.head(self.norm(x))


class VisionTransformer(nn.Module):
    """Images (batch, side, side) -> logits (batch, classes), over square patches."""

    def __init__(
        self, *, side: int, patch: int, width: int, heads: int, layers: int, classes: int
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, width)
        self.position = nn.Parameter(torch.randn((side // patch) ** 2, width))
        self.layers = nn.ModuleList(Layer(width, heads, causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch
        patches = images.unfold(1, p, p).unfold(2, p, p).flatten(3).flatten(1, 2)
        x = self.embedding(patches) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def rotations(length: int, width: int, device: torch.device) -> Tensor:
    """Return cosine and sine of every position's angles, (2, length, width / 2), float32.

    Rotary position embedding, Su et al., https://arxiv.org/abs/2104.09864.
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (i, i + width / 2) of ``x``, shape (..., length, width)."""
    cos, sin = rotation.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _initialise(module: nn.Module) -> None:
    """Start with signals of about unit size: it halves the steps that a short run needs."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
