"""Pruning a model in one shot: the order of its layers, what counts as input, what is refused."""

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.selection.obs import prune_matrix

CONFIG = ts.ConstSparsityConfig(pattern=ts.Block(4, 4))


class Attention(nn.Module):
    """Query and key see the same input, the output another; a linear layer is never run."""

    def __init__(self):
        super().__init__()
        self.out, self.query, self.key = (nn.Linear(16, 16) for _ in range(3))
        self.runs = 0

    def forward(self, x, attention_mask=None):
        self.runs += 1
        return self.out(torch.tanh(self.query(x)) * self.key(x))


def batches(count=4, shape=(8, 16)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def moment_of(inputs):
    return sum((x.T @ x).double() for x in inputs)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention()


def test_each_layer_sees_what_the_pruned_layers_before_it_give(model):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    data = batches()
    controller = ts.prune_obs(model, data, CONFIG, level=0.5)
    with torch.no_grad():
        inner = [torch.tanh(model.query(x)) * model.key(x) for x in data]
    for name, inputs in (("query", data), ("key", data), ("out", inner)):
        want = prune_matrix(weights[f"{name}.weight"], moment_of(inputs), CONFIG.pattern, 0.5)
        torch.testing.assert_close(getattr(model, name).weight.detach(), want)
        assert (getattr(model, name).weight == 0).float().mean() == 0.5
        assert torch.equal(getattr(model, name).bias, weights[f"{name}.bias"])
    assert isinstance(controller, ts.ConstSparsityController)
    assert controller.compression_rate == 0.5


def test_layers_with_one_input_share_their_passes(model):
    ts.prune_obs(model, batches(3), CONFIG, level=0.5)
    assert model.runs == 1 + 2 * 3  # what runs when; then query and key, and the output


def test_what_it_leaves_trains_under_its_masks(model):
    controller = ts.prune_obs(model, batches(), CONFIG, level=0.5)
    kept = model.out.weight != 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(batches()[0]).sum().backward()
    optimizer.step()
    assert torch.equal(model.out.weight != 0, kept)
    assert type(controller.strip().out) is nn.Linear


def test_it_answers_more_like_the_dense_model_than_by_magnitude(model):
    data = batches(16)
    with torch.no_grad():
        dense = [model(x) for x in data]
    by_magnitude = Attention()
    by_magnitude.load_state_dict(model.state_dict())
    controller = ts.create_controller(
        by_magnitude, ts.MagnitudeSparsityConfig(pattern=CONFIG.pattern, pool="weight")
    )
    controller.set_sparsity_level(0.5)
    ts.prune_obs(model, data, CONFIG, level=0.5)
    with torch.no_grad():
        errors = [
            sum((m(x) - y).square().sum() for x, y in zip(data, dense, strict=True))
            for m in (model, by_magnitude)
        ]
    assert errors[0] < 0.9 * errors[1]


def test_tokens_that_the_mask_leaves_out_do_not_count(model):
    x = torch.randn(2, 6, 16)
    there = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    other = Attention()
    other.load_state_dict(model.state_dict())
    padded = x.masked_fill(~there[:, :, None].bool(), 1e3)
    ts.prune_obs(model, [{"x": padded, "attention_mask": there}], CONFIG, level=0.5)
    ts.prune_obs(other, [x[there.bool()]], CONFIG, level=0.5)
    torch.testing.assert_close(model.query.weight, other.query.weight)


def test_of_a_pair_the_first_is_the_input(model):
    other = Attention()
    other.load_state_dict(model.state_dict())
    ts.prune_obs(model, batches(), CONFIG, level=0.5)
    ts.prune_obs(other, [(x, torch.zeros(len(x))) for x in batches()], CONFIG, level=0.5)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_modes_are_as_they_were_and_dropout_is_off():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    model[0].eval()
    x = [torch.ones(4, 8)]
    ts.prune_obs(model, x, CONFIG, level=0.5)
    assert [module.training for module in model] == [False, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "batches must hold calibration data"),
        ({"level": 1.5}, r"level must be in \(0, 1\), got 1.5"),
        ({"level": None}, r"level must be in \(0, 1\), got None"),
        ({"damping": 0.0}, "damping must be positive and finite, got 0.0"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        (
            {"config": ts.ConstSparsityConfig(pattern=ts.NM(2, 4)), "level": 0.3},
            "level must be 0.5 under the pattern 2:4 of 'out', or None, got 0.3",
        ),
        ({"batches": [torch.full((4, 16), torch.nan)]}, "'query': the moment of the inputs"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(model, changes, message):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    arguments = {"batches": batches(), "config": CONFIG, "level": 0.5} | changes
    with pytest.raises(ValueError, match=message):
        ts.prune_obs(model, arguments.pop("batches"), arguments.pop("config"), **arguments)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    ts.create_controller(model, ts.MagnitudeSparsityConfig())  # it has no controller


def test_a_failure_in_the_middle_puts_the_first_layers_back(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    calls = []

    def run(model, batch):
        calls.append(batch)
        if len(calls) > 5:
            raise RuntimeError("out of data")
        return model(batch)

    with pytest.raises(RuntimeError, match="out of data"):
        ts.prune_obs(model, batches(), CONFIG, level=0.5, run=run)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_layer_that_no_data_reach_is_named(model):
    model.spare = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="no calibration data reach 'spare'"):
        ts.prune_obs(model, batches(), CONFIG, level=0.5)


def test_what_is_no_linear_layer_is_named():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="'0', a Conv2d, cannot be measured"):
        ts.prune_obs(model, [torch.ones(1, 4, 3, 3)], CONFIG, level=0.5)


def test_another_configuration_is_refused(model):
    with pytest.raises(TypeError, match="config must be a ConstSparsityConfig, got Magnitude"):
        ts.prune_obs(model, batches(), ts.MagnitudeSparsityConfig(), level=0.5)


def test_a_weight_that_is_stored_transposed(model):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    turned = Conv1D(16, 16)
    turned.weight.data = model.query.weight.detach().T.clone()
    data = batches()
    ts.prune_obs(nn.Sequential(turned), data, CONFIG, level=0.5)
    ts.prune_obs(model, data, CONFIG, level=0.5)
    torch.testing.assert_close(turned.weight.detach().T, model.query.weight.detach())
