"""Which parameters have features in common, and what has to keep their order."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triton_sparsity.controller.masks.features import trace_features


def traced(model, *inputs):
    with torch.no_grad():
        return trace_features(model.eval(), lambda: model(*inputs))[0]


def movable(model, *inputs):
    return [set(one.members) for one in traced(model, *inputs) if one.held_by is None]


def held(model, name, dim, *inputs):
    return next(one.held_by for one in traced(model, *inputs) if (name, dim) in one.members)


class Between(nn.Module):
    """Two linear layers and what is between them."""

    def __init__(self, between, width=6):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(4, 6), nn.Linear(width, 4), between
        self.scale, self.table = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(3, 6))
        self.register_buffer("fixed", torch.ones(6))

    def forward(self, x):
        return self.down(self.between(self, self.up(x)))


HIDDEN = {("up.weight", 0), ("up.bias", 0), ("down.weight", 1)}
X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("between", "also"),
    [
        (lambda m, h: F.gelu(h), ()),
        (lambda m, h: F.dropout(h.relu_().mul(2), 0.5, False), ()),
        (lambda m, h: 1 - torch.tanh(h) * h.mean(-1, keepdim=True), ()),
        (lambda m, h: 0.5 * h * (1 + torch.erf(h / 2**0.5)), ()),
        (lambda m, h: h.view(6, h.size(-1)).reshape(2, 3, 6).float(), ()),
        (lambda m, h: h[:, 0].mean(0), ()),
        (lambda m, h: h[:, :2, :] if len(h.shape) == 3 else h, ()),
        (lambda m, h: h.masked_fill(h.mean(-1, keepdim=True) > 0, 0), ()),
        (lambda m, h: F.layer_norm(h, (6,), m.scale), {("scale", 0)}),
        (lambda m, h: (1 + m.scale) * h, {("scale", 0)}),
        (lambda m, h: h + m.table, {("table", 1)}),
        (lambda m, h: h + F.embedding(torch.tensor([0, 1, 2]), m.table), {("table", 1)}),
    ],
)
def test_what_carries_features(between, also):
    model = Between(between)
    assert movable(model, X) == [HIDDEN | set(also)]


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda m, h: h.softmax(-1), "'softmax'"),
        (lambda m, h: h * m.fixed, "inputs that cannot be followed"),
        (lambda m, h: torch.cat([h, h[..., :0]], -1), "'getitem'"),
        (lambda m, h: h[..., [5, 4, 3, 2, 1, 0]], "'getitem'"),
        (lambda m, h: h.view(2, 3, 2, 3).flatten(2), "'view'"),
        (lambda m, h: h + torch.from_numpy(h.numpy()), "'numpy'"),
        (lambda m, h: h * h.tolist()[0][0][0], "'tolist'"),
        (lambda m, h: torch.add(h, h, out=torch.empty(2, 3, 6)), "'add'"),
        (lambda m, h: h.T.T, "'get'"),
        (lambda m, h: h.cumsum(-1), "'cumsum'"),
        (lambda m, h: h * m.up.weight.sum(1), "'sum'"),
    ],
)
@pytest.mark.filterwarnings("ignore:The use of .x.T.")
def test_what_holds_features(between, why):
    model = Between(between)
    assert movable(model, X) == []
    assert held(model, "up.weight", 0, X) == why


def test_an_element_that_is_written_holds_them():
    def write(_, h):
        h[..., 0] = 0
        return h

    assert held(Between(write), "up.weight", 0, X) == "'setitem'"


def test_what_the_model_answers_stays():
    class Two(Between):
        def forward(self, x):
            hidden = self.up(x).relu()
            return {"answer": self.down(hidden), "hidden": [hidden]}

    assert held(Two(None), "down.weight", 1, X) == "the model's output"


def test_what_comes_in_stays():
    model = Between(lambda m, h: h)
    assert held(model, "up.weight", 1, X) == "inputs that cannot be followed"
    assert held(model, "down.weight", 0, X) == "the model's output"


def test_a_layer_whose_both_sides_are_the_same_features_is_held():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.inner(x))

    assert held(Residual(), "inner.weight", 0, X) == "both sides of 'inner.weight'"


def test_a_language_model_has_a_residual_stream_and_hidden_features_a_layer():
    from triton_sparsity.bench.finetune.models import LanguageModel

    model = LanguageModel(width=16, heads=2, layers=2)
    stream, *hidden = movable(model, torch.randint(0, 256, (2, 5)))
    assert {("embedding.weight", 1), ("head.weight", 1), ("layers.1.up.weight", 1)} < stream
    assert hidden == [
        {(f"layers.{i}.up.weight", 0), (f"layers.{i}.up.bias", 0), (f"layers.{i}.down.weight", 1)}
        for i in range(2)
    ]


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(5, 6), nn.Linear(6, 6, bias=False)

        def forward(self, ids):
            return F.linear(self.inner(self.embedding(ids)), self.embedding.weight)

    # what goes in comes out: the table's columns, and so both sides of the layer
    assert movable(Tied(), torch.tensor([1, 2])) == []
    assert held(Tied(), "inner.weight", 1, torch.tensor([1])) == "both sides of 'inner.weight'"
