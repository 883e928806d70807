"""A layer of Llama 3, which ``gpu.py`` trains, and the sizes of all that it measures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..measure.shapes import Shape


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        shapes: of the products.
        blocks: sides of square ones.
        levels: at which efficiency is required; more of them for the break-even.
        update: weights ``(outputs, inputs)`` of the model whose masks are updated.
        width, hidden, heads, groups: of the transformer block.
        batch, length: sequences and their tokens.
        scale: of the ceilings' work.
    """

    shapes: tuple[Shape, ...]
    blocks: tuple[int, ...]
    levels: tuple[float, ...]
    more_levels: tuple[float, ...]
    update: tuple[Shape, ...]
    width: int
    hidden: int
    heads: int
    groups: int
    batch: int
    length: int
    scale: float


def llama_layer(width: int, hidden: int, narrow: int) -> tuple[Shape, ...]:
    """Return the weights of one layer: query, output, key, value, gate, up, down."""
    return (
        Shape(1, width, width),
        Shape(1, width, width),
        Shape(1, width, narrow),
        Shape(1, width, narrow),
        Shape(1, width, hidden),
        Shape(1, width, hidden),
        Shape(1, hidden, width),
    )


FULL = Size(
    shapes=(Shape(8192, 4096, 14336), Shape(8192, 14336, 4096)),
    blocks=(256, 128, 64, 32),
    levels=(0.5, 0.7, 0.8, 0.9, 0.95),
    more_levels=(0.1, 0.2, 0.3, 0.6),
    update=llama_layer(4096, 14336, 1024) * 32,
    width=4096,
    hidden=14336,
    heads=32,
    groups=8,
    batch=4,
    length=2048,
    scale=1.0,
)
# so small that few blocks stay: one head, or no kept one of the query would meet one of the key
TRIAL = Size(
    shapes=(Shape(32, 64, 128), Shape(32, 128, 64)),
    blocks=(32,),
    levels=(0.5, 0.8),
    more_levels=(0.2,),
    update=llama_layer(128, 256, 128),
    width=128,
    hidden=256,
    heads=1,
    groups=1,
    batch=2,
    length=8,
    scale=0.004,
)


class LlamaLayer(nn.Module):
    """A transformer block as Llama 3 has it: grouped attention and a gated network."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, self.heads, self.groups = size.width, size.heads, size.groups
        narrow = width // size.heads * size.groups
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, width, bias=False)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                # as Llama's: by torch's own, the widest weight would be pruned whole
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).view(batch, length, heads, -1).transpose(1, 2)
            for layer, heads in (
                (self.q, self.heads),
                (self.k, self.groups),
                (self.v, self.groups),
            )
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, width))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))
