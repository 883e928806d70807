import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import triton_sparsity as ts

WARM_UP = {
    "warmup_start_epoch": 1,
    "warmup_end_epoch": 3,
    "importance_regularization_factor": 0.1,
    "steps_per_epoch": 4,
}


def build(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    return model, ts.create_controller(model, ts.MovementSparsityConfig(**(WARM_UP | options)))


def batch(step):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def optimizer_of(model, controller, lr=0.02):
    own = {id(p) for p in controller.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own]
    return torch.optim.AdamW([{"params": rest}, {"params": controller.parameters()}], lr=lr)


def train(model, controller, steps, optimizer=None):
    optimizer = optimizer or optimizer_of(model, controller)
    model.train()
    for step in steps:
        if step % 4 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        loss = model(batch(step)).square().mean() + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def structure(mode, **options):
    return {"sparse_structure_by_scopes": ({"mode": mode, "target_scopes": ("*",), **options},)}


STRUCTURES = {
    "fine": ({}, (1, 1)),
    "block pattern": ({"pattern": ts.Block(4, 8)}, (4, 8)),
    "block": (structure("block", sparse_factors=[8, 4]), (8, 4)),
    "block of odd sides": (structure("block", sparse_factors=[3, 5]), (3, 5)),
    "rows": (structure("per_dim", axis=0), (1, 15)),
    "columns": (structure("per_dim", axis=1), (12, 1)),
}


def capped(importances, threshold):
    """Keep what is above the threshold, or above the 98 % quantile if that is lower."""
    return importances > min(threshold, np.quantile(importances, 0.98))


@pytest.mark.parametrize("case", STRUCTURES)
def test_masks_and_gradients_of_each_structure(case):
    options, (rows, cols) = STRUCTURES[case]
    torch.manual_seed(0)
    shape = (16, 32) if cols in (8, 4) else (12, 15)
    model = nn.Linear(shape[1], shape[0])
    controller = ts.create_controller(model, ts.MovementSparsityConfig(**(WARM_UP | options)))
    grid = shape[0] // rows, shape[1] // cols
    assert model.weight_scores.shape == grid
    assert model.bias_scores.shape == grid[:1]
    assert not model.weight_scores.any()

    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(grid, generator=generator)
    bias_scores = torch.randn(grid[:1], generator=generator)
    with torch.no_grad():
        model.weight_scores.copy_(scores)
        model.bias_scores.copy_(bias_scores)
    controller.update_masks(threshold=-0.5, factor=1.0)
    kept = capped(scores.numpy().repeat(rows, 0).repeat(cols, 1), -0.5)
    kept_bias = capped(bias_scores.numpy().repeat(rows, 0), -0.5)
    weight, bias = controller.sparsified_module_info
    assert np.array_equal(weight.operand.binary_mask.numpy(), kept)
    assert np.array_equal(bias.operand.binary_mask.numpy(), kept_bias)

    x, grad = torch.randn(3, shape[1]), torch.randn(3, shape[0])
    out = model(x)
    masked = weight.weight.detach().numpy() * kept
    np.testing.assert_allclose(
        out.detach().numpy(),
        x.numpy() @ masked.T + bias.weight.detach().numpy() * kept_bias,
        rtol=1e-5,
        atol=1e-6,
    )
    out.backward(grad)
    dense = (grad.T @ x).numpy()
    product = dense * weight.weight.detach().numpy()
    sums = product.reshape(grid[0], rows, grid[1], cols).sum((1, 3))
    np.testing.assert_allclose(model.weight_scores.grad.numpy(), sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weight.weight.grad.numpy(), dense * kept, rtol=1e-5, atol=1e-6)
    sums = (grad.sum(0) * bias.weight.detach()).view(grid[0], rows).sum(1)
    torch.testing.assert_close(model.bias_scores.grad, sums)
    torch.testing.assert_close(bias.weight.grad, grad.sum(0) * torch.from_numpy(kept_bias))

    # (mean sigmoid(S) r c + mean sigmoid(S_b) r) / 2, as NNCF weighs them
    bias_cols = 1
    want = scores.sigmoid().mean() * rows * cols + bias_scores.sigmoid().mean() * rows * bias_cols
    torch.testing.assert_close(controller.loss(), 0.5 * want)


def test_the_loss_is_the_mean_over_layers():
    model, controller = build()
    controller.update_masks(threshold=-1.0, factor=0.1)
    # every importance is 0: sigmoid 0.5; weight and bias of each layer
    loss = controller.loss()
    assert loss.item() == pytest.approx((0.5 + 0.5) * 0.5 * 0.1)
    loss.backward()
    want = 0.25 / (16 * 32) * 0.5 * 0.1 / 2
    torch.testing.assert_close(model[0].weight_scores.grad, torch.full((32, 16), want))


def test_threshold_and_factor_follow_the_polynomial():
    _, controller = build(
        init_importance_threshold=-1.0, final_importance_threshold=0.5, power=3.0
    )
    found = []
    for step in range(14):
        if step % 4 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        scheduler = controller.scheduler
        found.append(
            (
                scheduler.current_importance_threshold,
                scheduler.current_importance_regularization_factor,
            )
        )
    assert found[:4] == [(-math.inf, 0.0)] * 4
    for i in range(8):
        share = 1 - (1 - i / 8) ** 3
        assert found[4 + i] == pytest.approx((-1 + 1.5 * share, 0.1 * share))
    # hand-worked: halfway, 1 - 0.5^3 = 0.875
    assert found[8] == pytest.approx((0.3125, 0.0875))
    assert found[12:] == [(0.5, 0.1)] * 2
    assert controller.frozen


def test_steps_of_an_epoch_are_counted_in_the_first():
    _, controller = build(steps_per_epoch=None, init_importance_threshold=-1.0)
    scheduler = controller.scheduler
    for epoch in range(3):
        scheduler.epoch_step()
        for _ in range(5):
            scheduler.step()
            began = epoch > 0
            assert (scheduler.current_importance_threshold > -math.inf) == began
    scheduler.step()
    with pytest.raises(ValueError, match="epoch 2 must have steps_per_epoch = 5 steps, got 6"):
        scheduler.epoch_step()


def test_the_initial_threshold_is_the_kth_smallest_importance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 20, bias=False))
    structures = structure("block", sparse_factors=[4, 4])["sparse_structure_by_scopes"]
    for options in (
        {},
        {"sparse_structure_by_scopes": ({**structures[0], "target_scopes": "0"},)},
    ):
        controller = ts.create_controller(model, ts.MovementSparsityConfig(**(WARM_UP | options)))
        values = []
        for info in controller.sparsified_module_info:
            with torch.no_grad():
                info.operand.scores.normal_()
            times = math.prod(info.operand.factors)
            values.append(info.operand.scores.detach().flatten().repeat_interleave(times))
        joined = torch.cat(values)
        want = joined.sort().values[int(len(joined) * 0.001)]
        assert controller.initial_threshold() == want.item()
        controller.strip(do_copy=False)


def test_a_missing_initial_threshold_is_taken_when_the_warm_up_starts():
    model, controller = build()
    train(model, controller, range(5))
    scores = torch.cat([p.detach().flatten() for p in controller.parameters()])
    assert scores.unique().numel() > 100
    # of the 808 importances the first, before the step that followed
    assert controller.scheduler.get_state()["_init_importance_threshold"] < 0
    assert controller.threshold == controller.scheduler.current_importance_threshold
    pruned = sum(info.operand.pruned_elements() for info in controller.sparsified_module_info)
    assert pruned == 1


@pytest.mark.parametrize("factors", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_the_cap_keeps_what_is_above_the_98_percent_quantile(factors, ties):
    torch.manual_seed(0)
    model = nn.Linear(32, 40, bias=False)
    options = structure("block", sparse_factors=list(factors))
    controller = ts.create_controller(model, ts.MovementSparsityConfig(**(WARM_UP | options)))
    scores = torch.randn(model.weight_scores.shape)
    scores = scores.round() if ties else scores
    with torch.no_grad():
        model.weight_scores.copy_(scores)
    spread = scores.repeat_interleave(factors[0], 0).repeat_interleave(factors[1], 1)
    quantile = torch.quantile(spread, 0.98).item()
    for threshold in (-1.0, 0.0, quantile - 1e-3, quantile, quantile + 1e-3, 100.0):
        controller.update_masks(threshold, 0.0)
        want = spread > min(threshold, quantile)
        assert torch.equal(controller.sparsified_module_info[0].operand.binary_mask, want)


def test_the_count_of_kept_groups_is_known_without_counting():
    torch.manual_seed(0)
    model = nn.Linear(32, 96, bias=False)
    # three groups of the mask an importance: no block that is skipped is 48 high
    options = structure("block", sparse_factors=[48, 16])
    controller = ts.create_controller(model, ts.MovementSparsityConfig(**(WARM_UP | options)))
    operand = controller.sparsified_module_info[0].operand
    with torch.no_grad():
        model.weight_scores.copy_(torch.arange(4.0).view(2, 2))
    for threshold in (-1.0, 0.5, 1.5):
        controller.update_masks(threshold, 0.0)
        assert operand.kept == operand.kept_grid().sum()
        assert operand.all_kept == (threshold == -1)


def test_masks_change_in_training_steps_alone_and_freeze_after_the_warm_up():
    model, controller = build()
    stages = ts.CompressionStage
    assert controller.compression_stage() == stages.UNCOMPRESSED
    train(model, controller, range(8))
    assert controller.compression_stage() == stages.PARTIALLY_COMPRESSED
    masks = [info.operand.binary_mask for info in controller.sparsified_module_info]
    with torch.no_grad():
        for scores in controller.parameters():
            scores.neg_()
    model.eval()
    folded = controller.strip()
    assert torch.equal(model(batch(0)), folded(batch(0)))
    for info, mask in zip(controller.sparsified_module_info, masks, strict=True):
        assert torch.equal(info.operand.binary_mask, mask)
        stripped = getattr(folded.get_submodule(info.module_node_name[:1]), info.parameter_name)
        assert not stripped[~mask].any()
    with torch.no_grad():
        for scores in controller.parameters():
            scores.neg_()
    train(model, controller, range(8, 13))
    assert controller.frozen
    assert controller.compression_stage() == stages.FULLY_COMPRESSED
    assert controller.loss() == 0
    # the final threshold, 0, not the last one within the warm-up
    scores = [p.detach().clone() for p in controller.parameters()]
    for info, own in zip(controller.sparsified_module_info, scores, strict=True):
        assert np.array_equal(info.operand.binary_mask.numpy(), capped(own.numpy(), 0.0))
    train(model, controller, range(13, 16))
    assert all(torch.equal(a, b) for a, b in zip(scores, controller.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="set_sparsity_level: masks are frozen"):
        controller.set_sparsity_level(0.5)


def test_frozen_masks_that_prune_nothing_are_uncompressed():
    _, controller = build()
    controller.freeze()
    assert controller.compression_stage() == ts.CompressionStage.UNCOMPRESSED


def test_a_level_prunes_the_least_important():
    _, controller = build()
    with torch.no_grad():
        for scores in controller.parameters():
            scores.normal_()
    controller.set_sparsity_level(0.25)
    joined = torch.cat([p.detach().flatten() for p in controller.parameters()])
    masks = [info.operand.binary_mask.flatten() for info in controller.sparsified_module_info]
    kept = torch.cat(masks)
    assert (~kept).sum() == round(0.25 * len(joined)) == 202
    assert joined[kept].min() > joined[~kept].max()
    assert controller.compression_rate == controller.current_sparsity_level == 202 / 808


def test_the_report():
    model, controller = build()
    train(model, controller, range(9))
    statistics = controller.statistics().movement_sparsity
    assert statistics.importance_threshold == controller.threshold
    assert statistics.importance_regularization_factor == pytest.approx(0.0875)
    text = controller.statistics().to_str()
    assert "0.bias" in text
    assert "Importance regularization factor: 0.0875" in text


@pytest.mark.parametrize("steps", [3, 7, 13])
@pytest.mark.parametrize("steps_per_epoch", [4, None])
def test_a_resumed_run_is_bit_identical(steps, steps_per_epoch):
    model, controller = build(steps_per_epoch=steps_per_epoch)
    optimizer = optimizer_of(model, controller)
    train(model, controller, range(steps), optimizer)
    twin, other = build(seed=9, steps_per_epoch=steps_per_epoch)
    resumed = optimizer_of(twin, other)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state(controller.get_state())
    for net, control, opt in ((model, controller, optimizer), (twin, other, resumed)):
        train(net, control, range(steps, 16), opt)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert controller.scheduler.get_state() == other.scheduler.get_state()
    assert other.frozen
    assert torch.equal(model(batch(0)), twin(batch(0)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("algorithm_state", {"structures": None}, "must be of each group .*, got None"),
        ("algorithm_state", {"structures": {"a": 3}}, "must be of each group .*, got {'a': 3}"),
        ("algorithm_state", {"structures": {"a": [3, 2]}}, r"each group .*, got {'a': \[3, 2\]}"),
        ("scheduler_state", {"_steps_per_epoch": 0}, r"_steps_per_epoch'\] must be .*, got 0"),
        ("scheduler_state", {"_steps_per_epoch": 5}, "must be 4 as configured, got 5"),
        (
            "scheduler_state",
            {"_steps_in_current_epoch": -1},
            r"_steps_in_current_epoch'\] must be",
        ),
        ("scheduler_state", {"_init_importance_threshold": math.nan}, "or None, got nan"),
    ],
    ids=str,
)
def test_a_damaged_state_changes_nothing(part, change, message):
    model, controller = build()
    train(model, controller, range(7))
    damaged = copy.deepcopy(controller.get_state())
    damaged["movement_sparsity"][part] |= change
    _, other = build()
    before = other.scheduler.get_state()
    with pytest.raises(ValueError, match=f"load_state: .*{message}"):
        other.load_state(damaged)
    assert other.scheduler.get_state() == before
    assert other.threshold == -math.inf
    assert not any(scores.any() for scores in other.parameters())
    assert other.current_sparsity_level == 0


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False)
    paths = [
        {
            "q": (f"{layer}.attention.self.query", 0),
            "k": (f"{layer}.attention.self.key", 0),
            "v": (f"{layer}.attention.self.value", 0),
            "o": f"{layer}.attention.output.dense",
            "up": f"{layer}.intermediate.dense",
            "down": f"{layer}.output.dense",
        }
        for layer in ("encoder.layer.0", "encoder.layer.1")
    ]
    return model, paths, lambda m: m(torch.arange(8)[None]).last_hidden_state


def torch_encoder():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 3, 20, 0.0, batch_first=True),
        2,
        enable_nested_tensor=False,
    )
    paths = [
        {
            **{name: (f"layers.{i}.self_attn", 24 * n) for n, name in enumerate("qkv")},
            "o": f"layers.{i}.self_attn.out_proj",
            "up": f"layers.{i}.linear1",
            "down": f"layers.{i}.linear2",
        }
        for i in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    return model, paths, lambda m: m(torch.randn(2, 5, 24, generator=generator.manual_seed(0)))


def distilbert():
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(
        vocab_size=30, dim=24, n_layers=1, n_heads=3, hidden_dim=20, max_position_embeddings=16
    )
    model = transformers.DistilBertModel(config)
    layer = "transformer.layer.0"
    paths = {f"{n}": (f"{layer}.attention.{n}_lin", 0) for n in "qkv"}
    paths |= {"o": f"{layer}.attention.out_lin"}
    paths |= {"up": f"{layer}.ffn.lin1", "down": f"{layer}.ffn.lin2"}
    return model, [paths], lambda m: m(torch.arange(8)[None]).last_hidden_state


@pytest.mark.parametrize("family", [bert, torch_encoder, distilbert])
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 4)], ids=str)
def test_whole_heads_and_channels_are_resolved(family, pattern):
    torch.manual_seed(0)
    model, layers, run = family()
    keys = list(model.state_dict())
    controller = ts.create_controller(
        model,
        ts.MovementSparsityConfig(**WARM_UP, pattern=pattern, enable_structured_masking=True),
    )
    assert list(model.state_dict()) == keys
    operands = {
        (i.module_node_name, i.parameter_name): i.operand
        for i in controller.sparsified_module_info
    }

    def find(path, parameter):
        module = model.get_submodule(path)
        return next(
            i for i in controller.sparsified_module_info
            if i.module is module and i.parameter_name == parameter
        )  # fmt: skip

    def names(path):
        joined = hasattr(model.get_submodule(path), "in_proj_weight")
        return ("in_proj_weight", "in_proj_bias") if joined else ("weight", "bias")

    for operand in operands.values():
        operand.binary_mask = torch.zeros(operand.weight_shape, dtype=torch.bool)

    def keep(path, parameter, *place):
        operand = find(path, parameter).operand
        mask = operand.binary_mask
        rows, cols = operand.pattern.rows, operand.pattern.cols
        if len(place) == 1:
            mask[place[0] // cols * cols : place[0] // cols * cols + cols] = True
        else:
            i, j = place[0] // rows * rows, place[1] // cols * cols
            mask[i : i + rows, j : j + cols] = True
        operand.binary_mask = mask

    first = layers[0]
    # head 0 by one row of K, head 2 by one column of O; channels 3 (weight), 8 (bias), 17 (column)
    path, start = first["k"]
    keep(path, names(path)[0], start + 3, 5)
    keep(first["o"], "weight", 7, 2 * 8 + 4)
    keep(first["up"], "weight", 3, 9)
    keep(first["up"], "bias", 8)
    keep(first["down"], "weight", 1, 17)
    controller.resolve_structures()

    heads = torch.tensor([True, False, True]).repeat_interleave(8)
    channels = torch.zeros(20, dtype=torch.bool)
    channels[[3, 8, 17]] = True
    for n, layer in enumerate(layers):
        heads, channels = (heads & (n == 0), channels & (n == 0))
        for name in "qkv":
            path, start = layer[name]
            weight, bias = (find(path, p).operand.binary_mask for p in names(path))
            assert torch.equal(weight[start : start + 24], heads[:, None].expand(24, 24))
            assert torch.equal(bias[start : start + 24], heads)
        assert torch.equal(find(layer["o"], "weight").operand.binary_mask, heads.expand(24, 24))
        assert find(layer["o"], "bias").operand.binary_mask.all() == (n == 0)
        up, bias = (find(layer["up"], p).operand.binary_mask for p in ("weight", "bias"))
        assert torch.equal(up, channels[:, None].expand(20, 24))
        assert torch.equal(bias, channels)
        assert torch.equal(
            find(layer["down"], "weight").operand.binary_mask, channels.expand(24, 20)
        )
    assert "2 of 3 kept" in controller.statistics().to_str()
    assert "3 of 20 kept" in controller.statistics().to_str()

    model.eval()
    stripped = controller.strip()
    torch.testing.assert_close(run(stripped), run(model))
    assert list(stripped.state_dict()) == keys


def test_a_transformer_trains_to_its_structures():
    torch.manual_seed(0)
    model, _, run = torch_encoder()
    controller = ts.create_controller(model, ts.MovementSparsityConfig(**WARM_UP))
    optimizer = optimizer_of(model, controller)
    for step in range(13):
        if step % 4 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        loss = run(model)[..., 0].square().mean() + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert controller.frozen
    structures = controller.statistics().movement_sparsity.structures
    assert set(structures) == {
        *(f"layers.{i}.self_attn heads" for i in range(2)),
        *(f"layers.{i} channels" for i in range(2)),
    }
    for info in controller.sparsified_module_info:
        assert any(scores.grad is not None for scores in controller.parameters()) is False
        mask = info.operand.binary_mask
        if info.module_node_name == "layers.0.linear1":
            assert torch.equal(mask.any(1), mask.all(1))
    twin, _, _ = torch_encoder()
    other = ts.create_controller(twin, ts.MovementSparsityConfig(**WARM_UP))
    twin.load_state_dict(model.state_dict())
    other.load_state(controller.get_state())
    assert torch.equal(run(twin), run(model))
    assert other.statistics().movement_sparsity.structures == structures


def test_structures_that_cannot_be_resolved_are_named():
    torch.manual_seed(0)
    model, _, _ = torch_encoder()
    with pytest.warns(UserWarning, match=r"no structured masking.*'layers.0 \(channels\)'"):
        controller = ts.create_controller(
            model, ts.MovementSparsityConfig(**WARM_UP, ignored_scopes=("layers.0.linear2",))
        )
    controller.resolve_structures()
    assert "layers.0 channels" not in controller.statistics().movement_sparsity.structures
    controller.strip(do_copy=False)
    columns = {"mode": "per_dim", "axis": 1, "target_scopes": ("layers.*.linear1",)}
    config = ts.MovementSparsityConfig(**WARM_UP, sparse_structure_by_scopes=(columns,))
    with pytest.warns(UserWarning, match="along other dimensions"):
        ts.create_controller(model, config).strip(do_copy=False)
    config = config.model_copy(update={"enable_structured_masking": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ts.create_controller(model, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_end_epoch": 1}, "warmup_end_epoch must be after warmup_start_epoch 1, got 1"),
        ({"warmup_start_epoch": 0, "steps_per_epoch": None}, "steps_per_epoch must be given with"),
        ({"warmup_start_epoch": -1}, "warmup_start_epoch must be greater than or equal to 0"),
        ({"importance_regularization_factor": -0.1}, "importance_regularization_factor must be"),
        ({"power": 0.0}, "power must be greater than 0"),
        ({"overrides": ({"scope": "0"},)}, "overrides must be left out without a schedule"),
        ({"pool": "global"}, "pool must be left out without a schedule.*, got 'global'"),
        ({"maximum_level": 0.9}, "maximum_level must be left out without a schedule.*, got 0.9"),
        (structure("block"), "sparse_factors must be given with mode 'block'"),
        (structure("per_dim"), "axis must be given with mode 'per_dim'"),
        (structure("fine", axis=0), "axis must be left out with mode 'fine', got 0"),
        (structure("per_dim", axis=0, sparse_factors=[1, 2]), "sparse_factors must be left out"),
        (structure("per_dim", axis=2), "axis must be 0 or 1, got 2"),
        (structure("block", sparse_factors=[0, 2]), "must be greater than or equal to 1, got 0"),
        (structure("whole"), "mode must be 'fine', 'block' or 'per_dim', got 'whole'"),
        ({"sparse_structure_by_scopes": ({"mode": "fine"},)}, "target_scopes must be given"),
    ],
    ids=str,
)
def test_wrong_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ts.MovementSparsityConfig(**(WARM_UP | options))


@pytest.mark.parametrize(
    "missing", ["warmup_start_epoch", "warmup_end_epoch", "importance_regularization_factor"]
)
def test_missing_keys_are_named(missing):
    options = {key: value for key, value in WARM_UP.items() if key != missing}
    with pytest.raises(ValueError, match=f"{missing} must be given"):
        ts.MovementSparsityConfig(**options)
    section = {"algorithm": "movement_sparsity", "params": options}
    with pytest.raises(ValueError, match=f"compression: params.{missing} must be given"):
        ts.create_controller(nn.Linear(4, 4), section)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            structure("block", sparse_factors=[3, 4]),
            r"sparse_factors \[3, 4\] must divide the weight of '0', got \[32, 16\]",
        ),
        ({"enable_structured_masking": True}, "needs attention or feed-forward blocks"),
        ({"target_scopes": ("4",)}, "movement_sparsity masks linear layers, and none is left"),
        (
            {"sparse_structure_by_scopes": ({"mode": "fine", "target_scopes": "7"},)},
            "sparse_structure_by_scopes.*'7'",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_leaves_it_as_it_was(options, message):
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 1)
    )
    config = ts.MovementSparsityConfig(**(WARM_UP | options))
    with pytest.raises(ValueError, match=message):
        ts.create_controller(model, config)
    assert type(model[0]) is nn.Linear
    assert len(list(model.parameters())) == 6


def test_weights_that_are_asked_for_but_cannot_be_masked_are_named():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 4), nn.Embedding(3, 4))
    config = ts.MovementSparsityConfig(**WARM_UP, target_scopes=("0", "2"))
    with pytest.warns(UserWarning, match=r"left dense, because .* linear layers .*: \['0'\]"):
        ts.create_controller(model, config).strip(do_copy=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scopes in ({"target_scopes": ("*",), "ignored_scopes": ("0", "3")}, {}):
            config = ts.MovementSparsityConfig(**WARM_UP, **scopes)
            ts.create_controller(model, config).strip(do_copy=False)


def test_a_conv1d_is_no_linear_layer_without_a_word():
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(utils.Conv1D(8, 4), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match=r"left dense, .*\['0'\]"):
        ts.create_controller(model, ts.MovementSparsityConfig(**WARM_UP))


def test_a_warm_up_that_goes_down_warns():
    with pytest.warns(UserWarning, match="is not below final_importance_threshold"):
        ts.MovementSparsityConfig(**WARM_UP, init_importance_threshold=0.5)


def test_nncfs_dictionary():
    controller = ts.create_controller(
        nn.Linear(64, 32),
        {
            "algorithm": "movement_sparsity",
            "params": {
                "warmup_start_epoch": 1,
                "warmup_end_epoch": 4,
                "importance_regularization_factor": 0.05,
                "enable_structured_masking": False,
            },
            "sparse_structure_by_scopes": [
                {"mode": "block", "sparse_factors": [32, 32], "target_scopes": "{re}.*"}
            ],
            "compression_lr_multiplier": 0.5,
        },
    )
    assert isinstance(controller, ts.MovementSparsityController)
    assert controller.config.power == 3.0
    assert controller.config.compression_lr_multiplier == 0.5
    assert controller.sparsified_module_info[0].operand.factors == (32, 32)


def test_nncfs_dictionary_has_the_structures_beside_the_params():
    structures = structure("whole")
    section = {"algorithm": "movement_sparsity", "params": WARM_UP}
    with pytest.raises(ValueError, match=r"compression: sparse_structure_by_scopes\[0\].*'whole'"):
        ts.create_controller(nn.Linear(4, 4), section | structures)
    with pytest.raises(ValueError, match="sparse_structure_by_scopes must stand beside params"):
        ts.create_controller(nn.Linear(4, 4), section | {"params": WARM_UP | structures})


def test_compiled_training_follows_the_masks():
    model, controller = build(init_importance_threshold=-1.0, final_importance_threshold=1.0)
    with torch.no_grad():
        for scores in controller.parameters():
            scores.normal_()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    controller.update_masks(-1.0, 0.1)
    compiled(batch(0)).sum().backward()
    for threshold in (-0.5, 0.5):
        controller.update_masks(threshold, 0.1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(batch(0))
        assert torch.equal(out, model(batch(0)))
        out.sum().backward()


# to a level


RAMP = ts.RampSchedule(target_level=0.75, begin=2, end=8, freeze=11)


def hard(seed=0, schedule=RAMP, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 8))
    options = {"pool": "global"} | options
    config = ts.MovementSparsityConfig(schedule=schedule, **options)
    return model, ts.create_controller(model, config)


@pytest.mark.parametrize("pool", ["global", "weight"])
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 8)], ids=str)
def test_the_highest_importances_are_kept_and_all_have_a_gradient(pool, pattern):
    model, controller = hard(pool=pool, pattern=pattern)
    infos = controller.sparsified_module_info
    assert [info.parameter_name for info in infos] == ["weight", "weight"]
    rows, cols = pattern.rows, pattern.cols
    with torch.no_grad():
        for scores in controller.parameters():  # with ties
            scores.copy_((2 * torch.randn(scores.shape)).round() - 3)
    controller.set_sparsity_level(0.6)
    scores = [info.operand.scores.detach() for info in infos]
    for found in [scores] if pool == "global" else [[own] for own in scores]:
        flat = torch.cat([own.flatten() for own in found])
        lowest = round(0.6 * len(flat))
        # among equals the first stay
        order = sorted(range(len(flat)), key=lambda i: (flat[i].item(), -i))
        kept = torch.ones(len(flat), dtype=torch.bool)
        kept[order[:lowest]] = False
        for own, part in zip(found, kept.split([own.numel() for own in found]), strict=True):
            (info,) = [info for info in infos if info.operand.scores.shape == own.shape]
            out, width = info.weight.shape
            spread = part.view(own.shape).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
            assert torch.equal(info.operand.binary_mask, spread[:out, :width])

    x = batch(0)
    hidden = x @ torch.where(infos[0].operand.binary_mask, infos[0].weight, 0).T + model[0].bias
    torch.testing.assert_close(model[:1](x), hidden)
    model(x).square().sum().backward()
    # dL/dS = sum of w dL/dw', of what is pruned too; dL/dw of what is kept alone
    last = infos[1]
    mask, dense = last.operand.binary_mask, 2 * model(x).T @ hidden.relu()
    product = (dense * last.weight).detach()
    product = nn.functional.pad(
        product, (0, -product.shape[1] % cols, 0, -product.shape[0] % rows)
    )
    grid = product.shape[0] // rows, product.shape[1] // cols
    sums = product.view(grid[0], rows, grid[1], cols).sum((1, 3))
    torch.testing.assert_close(model[2].weight_scores.grad, sums, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.weight.grad, dense * mask, rtol=1e-4, atol=1e-5)
    assert controller.loss() == 0


def test_the_level_is_reached_exactly_along_the_ramp():
    model, controller = hard()
    optimizer = optimizer_of(model, controller)
    stages = ts.CompressionStage
    before = []
    for step in range(14):
        train(model, controller, [step], optimizer)
        progress = min(max(step - 2, 0) / 6, 1)
        level = 0.75 - 0.75 * (1 - progress) ** 3
        pruned = sum(info.operand.pruned_groups() for info in controller.sparsified_module_info)
        assert pruned == round(level * 720)
        wanted = stages.UNCOMPRESSED if step <= 2 else stages.PARTIALLY_COMPRESSED
        assert controller.compression_stage() == (stages.FULLY_COMPRESSED if step >= 8 else wanted)
        assert controller.frozen == (step >= 11)
        thresholds = controller.statistics().movement_sparsity.model_statistics
        if 2 < step < 11:
            # before the optimiser's step; of importances as they are
            summary = thresholds.sparsified_layers_summary[0]
            assert summary.threshold == pytest.approx(cut_of(before, pruned), abs=1e-6)
        before = [scores.detach().clone() for scores in controller.parameters()]
    for info in controller.sparsified_module_info:
        assert torch.equal(info.weight != 0, info.operand.binary_mask)
    assert torch.equal(controller.strip()(batch(0)), model(batch(0)))


def cut_of(scores, pruned):
    return torch.cat([own.flatten() for own in scores]).sort().values[pruned - 1].item()


def test_a_whole_weight_may_go_no_further_than_its_maximum():
    _, controller = hard(overrides=({"scope": "2", "maximum_level": 0.5},))
    first, last = controller.sparsified_module_info
    with torch.no_grad():
        first.operand.scores.normal_()
        last.operand.scores.normal_().sub_(100)
    controller.set_sparsity_level(0.6)
    assert last.operand.pruned_groups() == 120
    assert first.operand.pruned_groups() == round(0.6 * 720) - 120


@pytest.mark.parametrize("steps", [1, 6, 9, 13])
def test_a_resumed_hard_run_is_bit_identical(steps):
    model, controller = hard()
    optimizer = optimizer_of(model, controller)
    train(model, controller, range(steps), optimizer)
    twin, other = hard(seed=9)
    resumed = optimizer_of(twin, other)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state(controller.get_state())
    for net, control, opt in ((model, controller, optimizer), (twin, other, resumed)):
        train(net, control, range(steps, 16), opt)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.frozen
    _, soft = build()
    with pytest.raises(ValueError, match="load_state"):
        soft.load_state(controller.get_state())


@pytest.mark.parametrize("name", [*WARM_UP, "final_importance_threshold", "power"])
def test_what_is_of_the_threshold_alone_is_refused_with_a_level(name):
    given = {"power": 2.0, "final_importance_threshold": 0.1} | WARM_UP
    message = f"{name} must be left out with a schedule.*, got {given[name]}"
    with pytest.raises(ValueError, match=message):
        ts.MovementSparsityConfig(schedule=RAMP, **{name: given[name]})


def test_a_level_before_there_are_importances_is_refused():
    with pytest.raises(ValueError, match=r"level 0.5 needs importances that differ.* at level 0"):
        hard(schedule=ts.RampSchedule(initial_level=0.5, target_level=0.75, end=8))
    with pytest.raises(ValueError, match=r"must be Unstructured\(\) or Block"):
        hard(pattern=ts.NM(2, 4))
    with pytest.raises(ValueError, match="schedule must be a schedule such as"):
        hard(schedule=0.8)
