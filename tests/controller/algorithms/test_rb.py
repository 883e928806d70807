import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import triton_sparsity as ts
from triton_sparsity.controller.algorithms import logits as logits_module
from triton_sparsity.controller.algorithms.learned import PATIENCE
from triton_sparsity.controller.algorithms.logits import INITIAL_LOGIT
from triton_sparsity.kernels.draw import draw, keeps_draws

SCHEDULE = ts.ExponentialSchedule(target_level=0.6, target_epoch=2)


def build(start=0, **options):
    torch.manual_seed(start)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    options = {"schedule": SCHEDULE, "seed": 1} | options
    return model, ts.create_controller(model, ts.RBSparsityConfig(**options))


def layer(logits, **options):
    """Return a controller of one weight with these logits."""
    logits = torch.tensor(logits)
    model = nn.Linear(logits.shape[1], logits.shape[0], bias=False)
    schedule = ts.ExponentialSchedule(initial_level=0.2, target_level=0.8)
    options = {"schedule": schedule, "seed": 1} | options
    controller = ts.create_controller(model, ts.RBSparsityConfig(**options))
    with torch.no_grad():
        model.weight_scores.copy_(logits)
    return model, controller


def batch(step):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def train(model, controller, steps, lr=0.3):
    own = {id(p) for p in controller.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own]
    groups = [{"params": rest}, {"params": controller.parameters(), "lr": lr, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    model.train()
    for step in steps:
        if step % 10 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        loss = model(batch(step)).square().mean() + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("level", "loss"), [(0.2, 16), (0.4, 64), (0.6, 144)])
def test_loss_with_all_kept(level, loss):
    _, controller = build()
    controller.set_sparsity_level(level)
    assert controller.loss().item() == pytest.approx(loss)


LOGITS = [[2.0, -1.0, 0.5, -0.25], [0.0, 3.0, -2.0, 1.0]]


def test_loss_of_a_layer_and_its_gradient():
    model, controller = layer(LOGITS)
    loss = controller.loss()
    # 4 of 8 kept, for a logit of 0 counts as dropped: ((0.5 - 0.8) / 0.05)^2
    assert loss.item() == pytest.approx(36)
    loss.backward()
    p = torch.tensor(LOGITS).sigmoid()
    want = 2 * (0.5 - 0.8) / 0.05**2 / 8 * p * (1 - p)
    torch.testing.assert_close(model.weight_scores.grad, want)


def test_the_local_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    config = ts.RBSparsityConfig(sparsity_level_setting_mode="local", schedule=None)
    controller = ts.create_controller(model, config)
    first, second = controller.sparsified_module_info
    with torch.no_grad():
        model[0].weight_scores.copy_(torch.tensor(LOGITS))
    controller.set_sparsity_level(0.25, first)
    controller.set_sparsity_level(0.1, second)
    # (-(|0.5 - 0.75| + |1 - 0.9|) / 0.05)^2
    loss = controller.loss()
    assert loss.item() == pytest.approx(49)
    loss.backward()
    p = torch.tensor(LOGITS).sigmoid()
    torch.testing.assert_close(model[0].weight_scores.grad, 2 * -0.35 / 0.05**2 / 8 * p * (1 - p))
    p = torch.tensor(INITIAL_LOGIT).sigmoid()
    torch.testing.assert_close(
        model[1].weight_scores.grad, (2 * 0.35 / 0.05**2 / 8 * p * (1 - p)).expand(4, 2)
    )


def test_logits_count_groups_in_a_mixed_pool():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    override = ts.Override(scope="0", pattern=ts.Block(4, 4))
    config = ts.RBSparsityConfig(schedule=SCHEDULE, overrides=(override,))
    controller = ts.create_controller(model, config)
    with torch.no_grad():
        model[0].weight_scores.fill_(-1)
    controller.set_sparsity_level(0.0)
    # 4 blocks of 4 + 16 groups are dropped
    assert controller.loss().item() == pytest.approx((0.2 / 0.05) ** 2, rel=1e-5)
    assert controller.mask_level() == 0.2


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
def test_logits_start_at_99_percent_and_are_parameters_but_no_state():
    model, controller = build()
    assert model[0].weight_scores.mean().item() == pytest.approx(math.log(0.99 / 0.01), abs=1e-5)
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight", "0.bias", "0.weight_scores", "2.weight", "2.bias", "2.weight_scores",
    ]  # fmt: skip
    assert controller.parameters() == [model[0].weight_scores, model[2].weight_scores]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    model.load_state_dict(model.state_dict(), strict=True)
    stripped = controller.strip()
    assert [name for name, _ in stripped.named_parameters()] == list(model.state_dict())
    summary = controller.statistics().rb_sparsity.model_statistics.sparsified_layers_summary
    assert sum(layer.weight_percentage for layer in summary) == pytest.approx(
        100 * (512 + 256) / (512 + 256 + 40)
    )


@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 8)], ids=str)
def test_training_reaches_the_level(pattern):
    model, controller = build(pattern=pattern)
    train(model, controller, range(60))
    groups = sum(info.operand.groups for info in controller.sparsified_module_info)
    assert controller.mask_level() == pytest.approx(0.6, abs=max(0.02, 1.1 / groups))
    assert controller.current_sparsity_level == pytest.approx(0.6)


def test_a_mask_lasts_for_a_step():
    model, controller = build()
    with torch.no_grad():
        model[0].weight_scores.zero_()
    controller.scheduler.step()
    first = model[0](batch(0))
    assert torch.equal(model[0](batch(0)), first)
    again = checkpoint(model[0], batch(0), use_reentrant=False)
    assert torch.equal(again, first)
    weight = controller.sparsified_module_info[0].weight
    grads = [torch.autograd.grad(y.sum(), weight)[0] for y in (first, again)]
    assert torch.equal(*grads)
    controller.scheduler.step()
    assert not torch.equal(model[0](batch(0)), first)
    controller.disable_scheduler()
    before = model[0](batch(0))
    controller.scheduler.step()
    assert not torch.equal(model[0](batch(0)), before)


@pytest.mark.skipif(not keeps_draws(torch.empty(0)), reason="kernels draw wherever they read")
def test_a_cpu_draws_once_a_step(monkeypatch):
    model, controller = build()
    calls = []
    monkeypatch.setattr(logits_module, "draw", lambda *a: (calls.append(1), draw(*a))[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    weights = len(controller.parameters())
    seen = []
    for step in range(3):
        controller.scheduler.step()
        for _ in range(3):
            model(batch(0)).sum().backward()
        assert len(calls) == weights * (step + 1)
        seen.append(controller.sparsified_module_info[0].operand._drawn.clone())
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(seen[0], seen[1])
    # logits that change within a step are drawn from anew, and no pending backward pass suffers
    first = model(batch(0)).sum()
    optimizer.step()
    second = model(batch(0)).sum()
    (first + second).backward()
    del calls[-weights:]
    assert len(calls) == weights * 4
    controller.freeze()
    assert all(i.operand._drawn is None for i in controller.sparsified_module_info)


def test_another_optimisers_step_disturbs_no_pending_backward_pass():
    model, controller = build()
    other = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    controller.scheduler.step()
    fake = model(batch(0))
    other(fake.detach()).mean().backward()
    optimizer.step()
    again = model(batch(0))
    assert torch.equal(fake, again)
    (other(fake).mean() + again.square().mean()).backward()
    del model[0].weight  # of which its own model tells
    optimizer.step()
    with pytest.raises(RuntimeError, match="the weight of '0' must stay a parameter"):
        model(batch(0))


def test_inference_mode_leaves_training_possible():
    model, controller = build()
    for _ in range(2):
        controller.scheduler.step()
        with torch.inference_mode():
            shown = model(batch(0)).clone()
        out = model(batch(0))
        assert torch.equal(out, shown)
        out.sum().backward()
        assert model[0].weight_scores.grad.any()


def test_the_local_stage_goes_by_each_weights_own_target():
    model, controller = build(schedule=None, sparsity_level_setting_mode="local")
    first, second = controller.sparsified_module_info
    assert controller.compression_stage() is ts.CompressionStage.UNCOMPRESSED
    controller.set_sparsity_level(0.5, first)
    controller.set_sparsity_level(0.25, second)
    assert controller.compression_stage() is ts.CompressionStage.UNCOMPRESSED
    with torch.no_grad():
        model[0].weight_scores[:16] = -1
    assert controller.compression_stage() is ts.CompressionStage.PARTIALLY_COMPRESSED
    with torch.no_grad():
        model[2].weight_scores[:2] = -1
    assert controller.compression_stage() is ts.CompressionStage.FULLY_COMPRESSED


def test_batchnorm_is_adapted_once_the_schedule_freezes(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    schedule = ts.ExponentialSchedule(target_level=0.5, target_epoch=1, freeze_epoch=2)
    config = ts.RBSparsityConfig(
        schedule=schedule, seed=1, batchnorm_adaptation={"num_bn_adaptation_samples": 8}
    )
    calls = []
    controller = ts.create_controller(model, config, batchnorm_data=[torch.randn(8, 4)])
    monkeypatch.setattr(controller, "_adapt_batchnorm", lambda: calls.append(controller.frozen))
    for _ in range(5):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
    assert calls == [True]


def test_evaluation_reads_the_logits_as_they_are():
    model, controller = layer(LOGITS)
    model.eval()
    kept = torch.tensor(LOGITS) > 0
    eye = torch.eye(4)
    assert torch.equal(model(eye).T, model.weight.where(kept, 0))
    with torch.no_grad():
        model.weight_scores.neg_()
    kept = torch.tensor(LOGITS) < 0
    assert torch.equal(model(eye).T, model.weight.where(kept, 0))
    operand = controller.sparsified_module_info[0].operand
    assert torch.equal(operand.binary_mask, kept)
    assert controller.compression_rate == 5 / 8
    statistics = controller.statistics().rb_sparsity
    assert statistics.model_statistics.sparsity_level_for_layers == 5 / 8
    want = 1 - torch.tensor(LOGITS).neg().sigmoid().mean().item()
    assert statistics.mean_sparse_prob == pytest.approx(want)
    assert f"{want:.4f}" in controller.statistics().to_str()


def test_a_mask_can_be_assigned():
    model, controller = layer(LOGITS)
    operand = controller.sparsified_module_info[0].operand
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    operand.binary_mask = mask
    assert torch.equal(model.weight_scores > 0, mask)
    assert torch.equal(operand.binary_mask, mask)
    assert model.weight_scores[0, 0] == 2.0


def test_strip_folds_todays_logits_after_a_loss():
    model, controller = build()
    train(model, controller, range(40))
    controller.loss()
    stripped = controller.strip(do_copy=True)
    infos = controller.sparsified_module_info
    for info, dense in zip(infos, (stripped[0], stripped[2]), strict=True):
        kept = info.module.weight_scores > 0
        assert torch.equal(dense.weight, info.weight.where(kept, 0))
        assert (~kept).any()
    model.eval()
    assert torch.equal(stripped(batch(0)), model(batch(0)))
    controller.strip(do_copy=False)
    with pytest.raises(RuntimeError, match="loss: the model has been stripped"):
        controller.loss()


def test_frozen_masks_stay_and_cost_nothing():
    model, controller = build()
    train(model, controller, range(30))
    controller.freeze()
    model.eval()
    want = model(batch(0))
    model.train()
    controller.scheduler.step()
    assert torch.equal(model(batch(0)), want)
    loss = controller.loss()
    assert loss == 0
    assert not loss.requires_grad
    assert all(logits.grad is None for logits in controller.parameters())
    with torch.no_grad():
        model[0].weight_scores.neg_()
    assert torch.equal(model(batch(0)), want)
    with pytest.raises(RuntimeError, match="set_sparsity_level: masks are frozen"):
        controller.set_sparsity_level(0.5)
    with pytest.raises(RuntimeError, match="masks are frozen"):
        controller.compression_rate = 0.5
    train(model, controller, [30])  # with a level to set
    controller.freeze(False)
    assert controller.loss() > 0


def test_the_loss_of_a_mask_that_alone_is_frozen_is_refused():
    _, controller = build()
    info = controller.sparsified_module_info[0]
    info.operand.freeze(True)
    with pytest.raises(RuntimeError, match=f"loss: the mask of '{info.module_node_name}' is froz"):
        controller.loss()


def test_the_schedule_freezes():
    model, controller = build(
        schedule=ts.ExponentialSchedule(target_level=0.6, target_epoch=1, freeze_epoch=2)
    )
    train(model, controller, range(50))
    assert controller.frozen
    assert controller.loss() == 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(2, 4)], ids=str)
def test_the_state_has_logits_seed_and_draw(pattern, frozen):
    model, controller = build(pattern=pattern)
    train(model, controller, range(25))
    controller.freeze(frozen)
    twin, other = build(start=5, pattern=pattern, seed=99)
    twin.load_state_dict(model.state_dict())
    other.load_state(controller.get_state())
    assert other.frozen == frozen
    assert torch.equal(twin(batch(1)), model(batch(1)))
    for net, control in ((model, controller), (twin, other)):
        train(net, control, range(25, 35))
    assert torch.equal(twin(batch(1)), model(batch(1)))
    assert torch.equal(controller.loss(), other.loss())


def damaged(key, value):
    def damage(state):
        state["rb_sparsity"]["algorithm_state"][key] = value

    return damage


DAMAGES = [
    (damaged("seed", -1), r"seed'\] must be an integer from 0"),
    (damaged("draw", "one"), r"draw'\] must be an integer from 0"),
    (damaged("logits", {}), r"logits'\] must have '0', got \[\]"),
    (
        damaged("logits", {"0": torch.zeros(3), "2": torch.zeros(8, 32)}),
        r"logits'\]\['0'\] must be finite torch.float32 of shape",
    ),
    (damaged("more", 1), "no more than 'seed', 'draw', 'logits', got also"),
    (
        lambda state: state["rb_sparsity"].update(loss_state={"targets": [2.0]}),
        "a list of 1 values, each a number in",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[m for _, m in DAMAGES])
def test_a_damaged_state_changes_nothing(damage, message):
    model, controller = build()
    train(model, controller, range(15))
    state = copy.deepcopy(controller.get_state())
    damage(state)
    want, loss = model(batch(0)), controller.loss()
    with pytest.raises(ValueError, match=message):
        controller.load_state(state)
    assert torch.equal(model(batch(0)), want)
    assert torch.equal(controller.loss(), loss)


def test_the_multiplier_scales_the_logits_gradients():
    grads = []
    for multiplier in (None, 4.0):
        model, controller = build(compression_lr_multiplier=multiplier)
        controller.scheduler.step()
        (model(batch(0)).square().sum() + controller.loss()).backward()
        weight = controller.sparsified_module_info[0].weight
        grads.append([logits.grad for logits in controller.parameters()] + [weight.grad])
    for plain, scaled in zip(grads[0][:2], grads[1][:2], strict=True):
        torch.testing.assert_close(scaled, 4 * plain)
    assert torch.equal(grads[0][2], grads[1][2])


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_plain_model_under_the_masks_of_evaluation(duplicate):
    model, controller = build()
    train(model, controller, range(12))
    twin = duplicate(model)
    assert [type(module) for module in twin] == [nn.Linear, nn.ReLU, nn.Linear]
    model.eval()
    assert torch.equal(twin(batch(0)), model(batch(0)))
    for info, layer in zip(controller.sparsified_module_info, (twin[0], twin[2]), strict=True):
        assert torch.equal(layer.weight == 0, ~info.operand.binary_mask)
    # an average of parameters pairs them by their order
    shapes = [p.shape for p in model.parameters()]
    assert [p.shape for p in twin.parameters()] == shapes
    stripped = controller.strip_model(twin)
    assert stripped.state_dict().keys() == model.state_dict().keys()


def test_casting_the_model_leaves_logits_in_float32():
    model, controller = build()
    with torch.no_grad():
        model[0].weight_scores.fill_(4.590001)
    model.bfloat16()
    assert model[0].weight_scores.dtype == torch.float32
    assert model[0].weight_scores[0, 0].item() == pytest.approx(4.590001, abs=1e-6)
    controller.scheduler.step()
    loss = model(batch(0).bfloat16()).float().square().mean() + controller.loss()
    loss.backward()
    assert controller.sparsified_module_info[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@pytest.mark.parametrize("kind", ["conv", "embedding", "tied", "attention", "recurrent", "Conv1D"])
def test_other_modules(kind):
    torch.manual_seed(0)
    if kind == "Conv1D":
        utils = pytest.importorskip("transformers.pytorch_utils")
    tokens = torch.randint(10, (2, 5))
    model, x = {
        "conv": lambda: (nn.Conv2d(2, 4, 3), torch.randn(1, 2, 5, 5)),
        "embedding": lambda: (nn.Embedding(10, 8), tokens),
        "tied": lambda: (tied(), tokens),
        "attention": lambda: (nn.TransformerEncoderLayer(8, 2, 16, 0.0), torch.randn(3, 2, 8)),
        "recurrent": lambda: (nn.GRU(8, 6), torch.randn(3, 2, 8)),
        "Conv1D": lambda: (utils.Conv1D(12, 8), torch.randn(3, 8)),
    }[kind]()
    keys = list(model.state_dict())
    for pattern in (ts.Unstructured(), ts.Block(2, 4)):
        controller = ts.create_controller(
            model, ts.RBSparsityConfig(pattern=pattern, schedule=SCHEDULE, seed=0)
        )
        assert list(model.state_dict()) == keys
        with torch.no_grad():
            for logits in controller.parameters():
                logits.normal_()
        controller.scheduler.step()
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        (out.square().sum() + controller.loss()).backward()
        for logits in controller.parameters():
            assert (logits.grad != 0).any()
        model.eval()
        want = model(x)
        stripped = controller.strip()
        assert_close = torch.testing.assert_close
        assert_close(stripped(x), want)
        model.train()
        controller.strip(do_copy=False)
        assert all("scores" not in name for name, _ in model.named_parameters())


def tied():
    embedding, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, head)


def test_compiled_training_draws_anew_without_recompiling():
    model, controller = build()
    with torch.no_grad():
        model[0].weight_scores.zero_()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        controller.scheduler.step()
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(batch(step))
        assert torch.equal(out, model(batch(step)))
        out.sum().backward()
    model.eval()
    assert torch.equal(compiled(batch(0)), controller.strip()(batch(0)))


def test_an_optimiser_that_leaves_logits_alone_is_noticed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = ts.create_controller(model, ts.RBSparsityConfig(schedule=SCHEDULE))

    def steps():
        for step in range(PATIENCE + 2):
            controller.scheduler.step()
            optimizer.zero_grad()
            (model(batch(step)).square().mean() + controller.loss()).backward()
            optimizer.step()

    with pytest.warns(
        UserWarning, match="no optimiser has changed the trained scores in 20 steps"
    ):
        steps()
    optimizer.add_param_group({"params": controller.parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps()


def test_the_seed_is_torchs_where_none_is_given():
    outs = []
    for seed in (0, 0, 1):
        model, _ = build(start=seed, seed=None)
        with torch.no_grad():
            model[0].weight_scores.zero_()
        outs.append(model[0](torch.eye(16)) - model[0].bias != 0)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_nncfs_dictionary():
    model = nn.Linear(8, 8)
    controller = ts.create_controller(
        model,
        {
            "compression_lr_multiplier": 2.0,
            "compression": {
                "algorithm": "rb_sparsity",
                "sparsity_init": 0.1,
                "params": {"sparsity_target": 0.7, "sparsity_target_epoch": 3},
            },
        },
    )
    config = controller.config
    assert isinstance(controller, ts.RBSparsityController)
    assert config.schedule == ts.ExponentialSchedule(
        initial_level=0.1, target_level=0.7, target_epoch=3
    )
    assert config.compression_lr_multiplier == 2.0
    assert controller.loss.target == 0.9
    assert controller.current_sparsity_level == 0.1


LIMITED = ts.Override(scope="0", minimum_level=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": None}, "schedule must be given"),
        ({"sparsity_level_setting_mode": "local", "schedule": SCHEDULE}, "schedule must be None"),
        ({"schedule": SCHEDULE, "sparsity_init": 0.1}, "sparsity_init must be left out"),
        ({"overrides": (LIMITED,)}, "overrides must set no minimum_level or maximum_level"),
        ({"compression_lr_multiplier": -1.0}, "compression_lr_multiplier must be greater than"),
        ({"seed": -1}, "seed must be greater than or equal to 0"),
        ({"seeds": 1}, r"seeds is no field \(did you mean 'seed'\?\)"),
    ],
    ids=str,
)
def test_wrong_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ts.RBSparsityConfig(**options)


def test_wrong_levels_are_named():
    _, controller = build()
    for level in (1.0, -0.1, math.nan, "half"):
        with pytest.raises(ValueError, match="level must be in"):
            controller.set_sparsity_level(level)
    with pytest.raises(ValueError, match="density must be in"):
        controller.loss.set_target(1.5)
    with pytest.raises(ValueError, match="must be None with sparsity_level_setting_mode 'global'"):
        controller.set_sparsity_level(0.5, controller.sparsified_module_info[0])
    assert controller.loss.target == 1.0
