"""Reordering a model's hidden features: what it computes stays, what its blocks keep rises."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_sparsity as ts
from triton_sparsity.bench.finetune.models import LanguageModel

BLOCKS = ts.ConstSparsityConfig(pattern=ts.Block(4, 4))


class Gated(nn.Module):
    """A gated feed-forward network, as LLaMA's."""

    def __init__(self, width=12, hidden=32):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden) for _ in range(2))
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def transformer(name):
    import transformers

    config = transformers.AutoConfig.for_model(
        name,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_inner=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.AutoModel.from_config(config)


IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MODELS = {
    "gated": (Gated, lambda: torch.randn(5, 12), 1),
    "language model": (lambda: LanguageModel(width=64, heads=4, layers=2), lambda: IDS, 3),
    "torch": (
        lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        lambda: torch.randn(2, 3, 16),
        1,
    ),
    "bert": (lambda: transformer("bert"), lambda: {"input_ids": IDS}, 2),
    "gpt2": (lambda: transformer("gpt2"), lambda: {"input_ids": IDS}, 2),
    "llama": (lambda: transformer("llama"), lambda: {"input_ids": IDS}, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_did_and_its_blocks_keep_more(name):
    torch.manual_seed(0)
    make, batch, sets = MODELS[name]
    model, batch = make().double(), batch()
    batch = (
        batch.double() if isinstance(batch, torch.Tensor) and batch.is_floating_point() else batch
    )
    dense = copy.deepcopy(model)
    found = ts.permute_features(model, batch, BLOCKS, level=0.75)
    assert len(found) == sets
    assert all(one.kept_after > one.kept_before for one in found)
    assert not all(map(torch.equal, model.state_dict().values(), dense.state_dict().values()))
    answers = []
    for one in (model, dense):
        with torch.no_grad():
            answer = one.eval()(**batch) if isinstance(batch, dict) else one.eval()(batch)
        answers.append(getattr(answer, "last_hidden_state", answer))
    torch.testing.assert_close(*answers, rtol=1e-9, atol=1e-12)


def test_what_it_reports_is_what_magnitude_keeps_by_rows_of_blocks():
    model, rows = Gated(), ts.Override(scope="down", pattern=ts.Block(4, 1))
    config = ts.ConstSparsityConfig(pattern=ts.Block(4, 4), overrides=[rows])
    (found,) = ts.permute_features(model, torch.randn(3, 12), config, level=2 / 3)
    assert set(found.parameters) == {
        ("gate.weight", 0),
        ("gate.bias", 0),
        ("up.weight", 0),
        ("up.bias", 0),
        ("down.weight", 1),
    }
    total = sum(layer.weight.abs().sum().item() for layer in (model.gate, model.up))
    magnitude = ts.MagnitudeSparsityConfig(
        pattern=ts.Block(4, 4), weight_importance="abs", pool="row", ignored_scopes=["down"]
    )
    ts.create_controller(model, magnitude).set_sparsity_level(2 / 3)
    kept = sum(layer.weight.abs().sum().item() for layer in (model.gate, model.up))
    assert found.kept_after == pytest.approx(kept / total, rel=1e-5)


def test_its_order_says_which_feature_has_come_to_each_place():
    model = Gated()
    before = copy.deepcopy(model)
    (found,) = ts.permute_features(model, torch.randn(3, 12), BLOCKS, level=0.75)
    assert torch.equal(model.down.weight, before.down.weight[:, found.order])
    assert torch.equal(model.gate.bias, before.gate.bias[found.order])


def test_modes_of_modules_and_objects_of_parameters_stay():
    model = Gated().train()
    model.gate.eval()
    parameters = [*model.parameters()]
    ts.permute_features(model, torch.randn(3, 12), BLOCKS, level=0.75)
    assert model.training
    assert not model.gate.training
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_same_model_too(dtype):
    model = Gated(64, 256).to(dtype)
    found = ts.permute_features(model, torch.randn(64, 64, dtype=dtype), BLOCKS, level=0.75)
    assert found[0].kept_after > found[0].kept_before


def test_a_model_that_answers_differently_is_refused_and_as_it_was():
    class Random(Gated):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, training=True))

    model = Random()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="batch must get the same answer twice"):
        ts.permute_features(model, torch.randn(3, 12), BLOCKS, level=0.75)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_features_that_nothing_may_move_are_named_with_what_holds_them():
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"may change places: '0' held by .* and 'softmax'"):
        ts.permute_features(model, torch.randn(2, 8), BLOCKS, level=0.5)


@pytest.mark.parametrize("level", [0, 1, 1.5, "0.5", True, None])
def test_a_level_that_is_none_is_refused(level):
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got"):
        ts.permute_features(Gated(), torch.randn(2, 12), BLOCKS, level=level)


@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.NM(2, 4)], ids=str)
def test_a_pattern_without_blocks_is_refused(pattern):
    config = ts.ConstSparsityConfig(pattern=pattern)
    with pytest.raises(ValueError, match="config must have a pattern of blocks, got"):
        ts.permute_features(Gated(), torch.randn(2, 12), config, level=0.5)


def test_an_answer_without_numbers_is_refused():
    model = Gated()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="run must return the model's answer, got NoneType"):
        ts.permute_features(
            model, torch.randn(2, 12), BLOCKS, level=0.5, run=lambda m, x: print(m(x).shape)
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_under_masks_is_refused():
    model = Gated()
    ts.create_controller(model, ts.MagnitudeSparsityConfig(pattern=ts.Block(4, 4)))
    with pytest.raises(ValueError, match="under the masks of another controller"):
        ts.permute_features(model, torch.randn(2, 12), BLOCKS, level=0.5)
