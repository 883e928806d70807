import copy

import pytest
import torch
from torch import nn

import triton_sparsity as ts

LAMBDA = 0.25


def build(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    return model, ts.create_controller(model, ts.SRSTEConfig(**options))


def train(model, controller, steps, optimizer, per_epoch=4):
    model.train()
    for step in steps:
        if step % per_epoch == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x).square().mean() + controller.loss()).backward()
        optimizer.step()


def masks_of(controller):
    return [info.operand.binary_mask for info in controller.sparsified_module_info]


def test_the_gradient_is_that_of_the_masked_weight_and_the_decay():
    model = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.5, 0.25, -2.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weight)
    controller = ts.create_controller(model, ts.SRSTEConfig(decay=LAMBDA))
    (info,) = controller.sparsified_module_info
    kept = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(info.operand.binary_mask, kept)
    assert torch.equal(info.weight, weight)
    x = torch.tensor([[1.0, 2.0, 3.0, -1.0]], dtype=torch.float64)
    y = model(x)
    # -4 * 2 - 3 * 1 and 0.5 * 1 - 2 * 3
    assert y.tolist() == [[-11.0, -5.5]]
    # the loss alone would be y; in two micro-batches, of whose gradients the decay is no part
    (y[0] * torch.tensor([2.0, -1.0])).sum().backward()
    (y_again := model(x))[0, 0].backward()
    assert torch.equal(y_again, y)
    controller.loss().backward()
    # rows 3 x and -x; and lambda w of what is pruned: 1, 2; 0.25, 0
    want = [
        [3 * 1 + LAMBDA * 1, 3 * 2, 3 * 3 + LAMBDA * 2, 3 * -1],
        [-1, -2 + LAMBDA * 0.25, -3, 1 + LAMBDA * 0],
    ]
    assert info.weight.grad.tolist() == want
    assert controller.loss().item() == LAMBDA / 2 * (1 + 4 + 0.0625)
    assert controller.loss().dtype == torch.float64


@pytest.mark.parametrize("options", [{}, {"pattern": ts.Block(4, 8), "level": 0.5}], ids=str)
def test_masks_are_found_anew_at_each_step_and_groups_return(options):
    model, controller = build(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    returned = False
    for step in range(12):
        before = masks_of(controller)
        weights = [info.weight.detach().clone() for info in controller.sparsified_module_info]
        train(model, controller, [step], optimizer)
        for weight, old, new in zip(weights, before, masks_of(controller), strict=True):
            if not options:
                tuples = weight.abs().unflatten(1, (-1, 4))
                top = torch.zeros_like(tuples).scatter_(2, tuples.topk(2).indices, 1).bool()
                assert torch.equal(new, top.flatten(1))
            assert new.float().mean() == 0.5
            returned |= bool((new & ~old).any())
        assert all(info.weight.all() for info in controller.sparsified_module_info)
    assert returned
    assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED
    stripped = controller.strip()
    for place, mask in zip((0, 2), masks_of(controller), strict=True):
        assert torch.equal(stripped[place].weight != 0, mask)
    model.eval()
    x = torch.randn(3, 16)
    assert torch.equal(stripped(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_frozen_at_its_end_the_weight_holds_the_zeros():
    model, controller = build(t_end=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, controller, range(6), optimizer)
    assert not controller.frozen
    train(model, controller, range(6, 12), optimizer)
    assert controller.frozen
    assert controller.loss() == 0
    for info, mask in zip(controller.sparsified_module_info, masks_of(controller), strict=True):
        assert torch.equal(info.weight != 0, mask)
        assert info.module.weight is info.weight
        assert not optimizer.state[info.weight]["exp_avg"][~mask].any()
    controller.freeze(False)
    was_zero = [info.weight == 0 for info in controller.sparsified_module_info]
    train(model, controller, range(12, 14), optimizer)
    for info, zero in zip(controller.sparsified_module_info, was_zero, strict=True):
        assert info.weight[zero].any()


def test_the_decay_keeps_masks_at_rest():
    churn = []
    for decay in (0.0, 2.0):
        model, controller = build(decay=decay)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        changed = 0
        for step in range(40):
            before = masks_of(controller)
            train(model, controller, [step], optimizer)
            now = masks_of(controller)
            changed += sum(int((a != b).sum()) for a, b in zip(before, now, strict=True))
        churn.append(changed)
    assert churn[1] < churn[0]


def test_a_loss_that_nobody_adds_for_an_epoch_is_named():
    for decay, refused in ((2e-4, True), (0.0, False)):
        model, controller = build(decay=decay)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            controller.scheduler.step()
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
        if refused:
            with pytest.raises(
                RuntimeError, match=r"controller.loss\(\) was not part of the loss"
            ):
                controller.scheduler.epoch_step()
        else:
            controller.scheduler.epoch_step()


def test_compiled_it_trains_as_it_does_eagerly():
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        model, controller = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        net = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(4):
            controller.scheduler.step()
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (net(x).square().mean() + controller.loss()).backward()
            optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": ts.Block(4, 4)}, "level must be given with pattern block 4x4, got None"),
        ({"level": 0.8}, r"level must be at most 1 - n/m = 0.5 .*2:4, got 0.8"),
        ({"decay": -1.0}, "decay must be greater than or equal to 0, got -1.0"),
        ({"t_end": -1}, "t_end must be greater than or equal to 0"),
    ],
    ids=str,
)
def test_wrong_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ts.SRSTEConfig(**options)


def test_nncfs_dictionary_spells_it():
    section = {"algorithm": "sr_ste", "params": {"pattern": {"nm": [1, 4]}, "decay": 1e-3}}
    controller = ts.create_controller(nn.Linear(8, 4), section)
    assert controller.config == ts.SRSTEConfig(pattern=ts.NM(1, 4), decay=1e-3)
    assert controller.current_sparsity_level == controller.compression_rate == 0.75
