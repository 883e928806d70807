"""rb and movement: whoever reads the weight reads it masked; once frozen it is plain."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn, optim
from torch.nn import functional

import triton_sparsity as ts
from triton_sparsity.controller.masks.module import MaskedModule

STEPS = 4
KINDS = ["rb", "movement"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def config(kind, pattern=None, **options):
    options = {"pattern": pattern or ts.Unstructured()} | options
    if kind == "rb":
        schedule = ts.ExponentialSchedule(initial_level=0.25, target_level=0.5, target_epoch=4)
        return ts.RBSparsityConfig(**{"seed": 0, "schedule": schedule} | options)
    warm_up = {
        "warmup_start_epoch": 1,
        "warmup_end_epoch": 50,
        "importance_regularization_factor": 0.1,
        "steps_per_epoch": STEPS,
        "enable_structured_masking": False,
    }
    return ts.MovementSparsityConfig(**warm_up | options)


class Net(nn.Module):
    """A head that is called, or whose weight its parent multiplies by."""

    def __init__(self, direct):
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 32, bias=False)
        self.direct = direct

    def forward(self, x):
        x = self.body(x).tanh()
        return functional.linear(x, self.head.weight) if self.direct else self.head(x)


def build(kind, model=None, seed=0, **options):
    torch.manual_seed(seed)
    model = Net(direct=True) if model is None else model
    options = {"target_scopes": ["body", "head"]} | options if isinstance(model, Net) else options
    controller = ts.create_controller(model, config(kind, **options), dispatch="sparse")
    if kind == "rb":  # or it would take long until an evaluation prunes something
        for scores in controller.parameters():
            scores.data.uniform_(-2, 2)
    own = {id(scores) for scores in controller.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own]
    controller.optimizer = optim.AdamW(
        [{"params": rest}, {"params": controller.parameters(), "lr": 0.2, "weight_decay": 0}],
        lr=0.01,
    )
    return model, controller


def data(step=0):
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(step))


def train(controller, epochs, steps=STEPS, add_loss=True, forward=None):
    model = controller.model
    forward = model if forward is None else forward
    for epoch in range(epochs):
        controller.scheduler.epoch_step()
        for step in range(steps):
            controller.scheduler.step()
            x = data(10 * epoch + step)
            controller.optimizer.zero_grad()
            loss = (forward(x) - x.flip(1)).square().mean()
            (loss + controller.loss() if add_loss else loss).backward()
            controller.optimizer.step()


def masks(controller):
    return [info.operand.binary_mask for info in controller.sparsified_module_info]


def weights_only(controller):
    return [i for i in controller.sparsified_module_info if len(i.operand.weight_shape) > 1]


@every_kind
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 4)], ids=str)
def test_a_parent_that_reads_the_weight_trains_as_one_that_calls_the_module(kind, pattern):
    runs = []
    for direct in (False, True):
        model, controller = build(kind, Net(direct), pattern=pattern)
        controller.model.load_state_dict(fresh())
        train(controller, 3)
        runs.append((model, controller))
    (called, a), (read, b) = runs
    for one, other in zip(called.parameters(), read.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert any(not mask.all() for mask in masks(a))
    assert all(map(torch.equal, masks(a), masks(b)))


def fresh():
    torch.manual_seed(1)
    return Net(True).state_dict()


@every_kind
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_attribute_reads_masked_and_the_parameter_stays_dense(kind, mode):
    model, controller = build(kind)
    train(controller, 3)
    controller.scheduler.step()
    model.train(mode)
    for info in weights_only(controller):
        dense = info.weight
        read = info.module.weight
        assert isinstance(dense, nn.Parameter)
        assert dense.all()
        assert read is not dense
        pruned = read == 0
        assert 0 < pruned.sum() < pruned.numel()
        assert torch.equal(read, torch.where(pruned, 0.0, dense))
        if not mode:
            assert torch.equal(~pruned, info.operand.binary_mask)
        info.operand.scores.grad = None
        read.sum().backward()
        assert (info.operand.scores.grad is not None) is mode
    assert set(model.state_dict()) == set(Net(True).state_dict())


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@every_kind
def test_evaluated_copied_and_stripped_it_computes_the_same(kind):
    model, controller = build(kind)
    train(controller, 3)
    model.eval()
    with torch.no_grad():
        want = model(data())
        for other in (controller.strip(), copy.deepcopy(model), controller.strip_model(model)):
            torch.testing.assert_close(other(data()), want, atol=1e-5, rtol=1e-5)
    assert type(model.head) is nn.Linear
    assert isinstance(model.head.weight, nn.Parameter)
    assert (model.head.weight == 0).any()


# what is not trained


class Idle(Net):
    """Computes its loss past the head."""

    def forward(self, x):
        return self.body(x)


class Detached(Net):
    def forward(self, x):
        return functional.linear(self.body(x).tanh(), self.head.weight.detach()) + self.body(x)


@every_kind
@pytest.mark.parametrize("net", [Idle, Detached])
def test_scores_that_nothing_trains_for_an_epoch_are_named(kind, net):
    _, controller = build(kind, net(direct=True))
    # the loss of rb reaches every score, movement's once the warm-up has begun
    with pytest.raises(RuntimeError, match=r"'head'.* no gradient in 4 steps.*ignored_scopes"):
        train(controller, 2, add_loss=kind != "rb")


@every_kind
def test_a_loss_that_nobody_adds_for_an_epoch_is_named(kind):
    _, controller = build(kind)
    with pytest.raises(RuntimeError, match=r"controller.loss\(\) was not part of the loss"):
        train(controller, 4, add_loss=False)


@every_kind
@pytest.mark.filterwarnings("ignore:the first thousandth of the importances ends at 0")
@pytest.mark.parametrize("how", ["no steps", "no training", "frozen", "added in one step"])
def test_epochs_that_prove_nothing_raise_nothing(kind, how):
    model, controller = build(kind)
    if how == "no steps":
        for _ in range(3):
            controller.scheduler.epoch_step()
    elif how == "no training":
        for _ in range(3):
            controller.scheduler.epoch_step()
            for _ in range(STEPS):
                controller.scheduler.step()
                model(data())
    elif how == "frozen":
        train(controller, 1)
        controller.freeze()
        train(controller, 3, add_loss=False)
    else:
        for epoch in range(3):
            controller.scheduler.epoch_step()
            for step in range(STEPS):
                controller.scheduler.step()
                controller.optimizer.zero_grad()
                loss = model(data(epoch)).square().mean()
                (loss + controller.loss() if step == 1 else loss).backward()
                controller.optimizer.step()


# frozen


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@every_kind
@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(16, 16)], ids=str)
def test_frozen_the_weight_is_plain_and_keeps_its_zeros(kind, pattern):
    model, controller = build(kind, pattern=pattern)
    train(controller, 2)
    for scores in controller.parameters():  # some of each
        scores.data.uniform_(-2, 2)
    train(controller, 1)
    model.eval()
    with torch.no_grad():
        want = model(data())
    before = masks(controller)
    controller.freeze()
    with torch.no_grad():
        torch.testing.assert_close(model(data()), want, atol=1e-5, rtol=1e-5)
    for info, mask in zip(controller.sparsified_module_info, before, strict=True):
        assert torch.equal(info.operand.binary_mask, mask)
        assert torch.equal(info.weight != 0, mask)
    for info in weights_only(controller):
        assert info.module.weight is info.weight
        skips = pattern != ts.Unstructured()
        assert (info.operand.path == "block-sparse") is skips
    model.train()
    scores = [s.detach().clone() for s in controller.parameters()]
    train(controller, 1)
    for info, mask in zip(controller.sparsified_module_info, before, strict=True):
        assert torch.equal(info.operand.binary_mask, mask)
        assert not info.weight[~mask].any()
        assert not info.weight.grad[~mask].any()
    assert all(map(torch.equal, scores, controller.parameters()))
    torch.testing.assert_close(controller.strip()(data()), model(data()), atol=1e-5, rtol=1e-5)


@every_kind
def test_unfrozen_the_masks_are_learned_again(kind):
    model, controller = build(kind)
    train(controller, 3)
    controller.freeze()
    train(controller, 1)
    controller.freeze(False)
    before = [scores.detach().clone() for scores in controller.parameters()]
    train(controller, 1)
    assert not any(map(torch.equal, before, controller.parameters()))
    assert model.head.weight is not model.head._parameters["weight"]


@every_kind
def test_a_state_that_is_frozen_makes_plain_zeros(kind):
    _, controller = build(kind)
    train(controller, 3)
    controller.freeze()
    state = controller.get_state(), copy.deepcopy(controller.model.state_dict())
    for first in (0, 1):
        model, other = build(kind, seed=2)
        loads = [
            lambda other=other: other.load_state(state[0]),
            lambda model=model: model.load_state_dict(state[1]),
        ]
        loads[first]()
        loads[1 - first]()
        assert other.frozen
        for info, mask in zip(other.sparsified_module_info, masks(controller), strict=True):
            assert torch.equal(info.weight != 0, mask)
        torch.testing.assert_close(model(data()), controller.model(data()))


# the rest of the model's life


@every_kind
def test_compiled_a_parent_reads_the_mask_and_trains_the_scores(kind):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        model, controller = build(kind)
        model.load_state_dict(fresh())
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        train(controller, 2, forward=forward)
        runs.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("what", ["module", "its forward", "unread"])
def test_parts_that_are_compiled_train_beside_others(kind, what):
    torch._dynamo.reset()
    model, controller = build(kind, nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)))
    if what == "its forward":
        model[0].forward = torch.compile(model[0].forward, backend="aot_eager")
    else:
        model[0].compile(backend="aot_eager")
    forward = model[:2] if what == "unread" else model
    before = [scores.detach().clone() for scores in controller.parameters()]
    if what == "unread":
        with pytest.raises(RuntimeError, match=r"'2'.* no gradient"):
            train(controller, 2, forward=lambda x: forward(x) + model[2](x).detach())
        return
    train(controller, 2, forward=forward)
    for old, scores in zip(before, controller.parameters(), strict=True):
        assert not torch.equal(old, scores)


@every_kind
def test_nothing_outlives_the_model(kind):
    model, controller = build(kind)
    train(controller, 2)
    gone = [
        weakref.ref(thing)
        for thing in (model, controller, model._modules["head"]._parameters["weight"])
    ] + [weakref.ref(scores) for scores in controller.parameters()]
    del model, controller
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@every_kind
def test_stripped_the_module_has_its_class_and_no_scores(kind):
    model, controller = build(kind)
    train(controller, 2)
    stripped = controller.strip_model(model)
    assert stripped is model
    assert not any(isinstance(module, MaskedModule) for module in model.modules())
    assert list(dict(model.named_parameters())) == list(dict(Net(True).named_parameters()))
