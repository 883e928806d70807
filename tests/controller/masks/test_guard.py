"""The guard: what a mask prunes is zero, in weight and gradient, whatever trains or loads them."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from torch import nn, optim
from torch.nn.modules.module import _global_parameter_registration_hooks
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
)
from torch.utils.checkpoint import checkpoint
from transformers import Adafactor

import triton_sparsity as ts
from triton_sparsity.controller.masks.guard import Guard

SCHEDULE = ts.PolynomialSchedule(initial_level=0.25, target_level=0.75, target_epoch=2, power=1.0)
HALF = ts.PolynomialSchedule(initial_level=0.5, target_level=0.5)


def magnitude(pattern, schedule=SCHEDULE, **options):
    return ts.MagnitudeSparsityConfig(pattern=pattern, schedule=schedule, **options)


def regrowth(kind, pattern, **options):
    # random ones of these seeds leave a way through every layer
    common = {"level": 0.75, "t_end": 100, "delta_t": 2, "alpha": 0.5, "initial_masks": "random"}
    return kind(pattern=pattern, **common, **options)


ALGORITHMS = {
    "magnitude": magnitude(ts.Unstructured()),
    "magnitude, blocks": magnitude(ts.Block(4, 4)),
    "magnitude, skipped blocks": magnitude(ts.Block(16, 16)),
    "magnitude, N:M": magnitude(
        ts.NM(2, 4), ts.PolynomialSchedule(initial_level=0.25, target_level=0.5, target_epoch=2)
    ),
    "magnitude, nothing kept": magnitude(ts.Block(4, 4), keep_pruned_values=False),
    "const": ts.ConstSparsityConfig(pattern=ts.Block(4, 4)),
    "set": regrowth(ts.SETConfig, ts.Unstructured()),
    # a seed whose few blocks of both layers meet: else a gradient is zero throughout
    "set, skipped blocks": regrowth(ts.SETConfig, ts.Block(16, 16), seed=1),
    "rigl": regrowth(ts.RigLConfig, ts.Block(4, 4)),
    "rigl, skipped blocks": regrowth(ts.RigLConfig, ts.Block(16, 16), seed=1),
    "composite": [
        magnitude(ts.Unstructured(), target_scopes=["0"]),
        regrowth(ts.RigLConfig, ts.Block(4, 4), ignored_scopes=["0"]),
    ],
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48))


def build(algorithm="magnitude", model=None):
    model = net() if model is None else model
    if algorithm == "const":
        pruned = ts.create_controller(model, magnitude(ts.Block(4, 4), HALF))
        pruned.strip(do_copy=False)
    sparse = "skipped" in algorithm
    controller = ts.create_controller(
        model, ALGORITHMS[algorithm], dispatch="sparse" if sparse else "auto"
    )
    if sparse:
        assert all(i.operand.path == "block-sparse" for i in controller.sparsified_module_info)
    return controller


def data(step):
    return torch.randn(8, 48, generator=torch.Generator().manual_seed(step))


def backward(model, step=0):
    (model(data(step)) - data(step)).square().mean().backward()


def assert_zeros(controller, what=lambda info: info.weight):
    for info in controller.sparsified_module_info:
        pruned, tensor = ~info.operand.binary_mask, what(info)
        assert pruned.any()
        assert (tensor[pruned] == 0).all(), info.module_node_name
        assert tensor[~pruned].any()


def gradient(info):
    return info.weight.grad


def dense_checkpoint(model, seed=1):
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


@every_algorithm
def test_zeros_hold_after_every_update_and_every_step(algorithm):
    controller = build(algorithm)
    model = controller.model
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    before = [info.operand.binary_mask for info in controller.sparsified_module_info]
    for step in range(9):
        if step % 3 == 0:
            controller.scheduler.epoch_step()
            assert_zeros(controller)
        controller.scheduler.step()
        assert_zeros(controller)
        optimizer.zero_grad()
        backward(model, step)
        assert_zeros(controller, gradient)
        optimizer.step()
        assert_zeros(controller)
    after = [info.operand.binary_mask for info in controller.sparsified_module_info]
    assert algorithm == "const" or not all(map(torch.equal, before, after))


@every_algorithm
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", ["model", "submodule"])
def test_zeros_hold_after_a_dense_checkpoint_is_loaded(algorithm, assign, part):
    controller = build(algorithm)
    model = controller.model
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    loaded = model if part == "model" else model[0]
    checkpoint = dense_checkpoint(loaded)
    want = copy.deepcopy(checkpoint)
    loaded.load_state_dict(checkpoint, assign=assign)
    assert_zeros(controller)
    for info in controller.sparsified_module_info:
        if part == "model" or info.module is model[0]:
            name = "weight" if part == "submodule" else f"{info.module_node_name}.weight"
            mask = info.operand.binary_mask
            assert torch.equal(info.weight[mask], want[name][mask])
    if assign:
        optimizer = optim.AdamW(model.parameters(), lr=0.05)
    for step in range(2):
        controller.scheduler.step()
        optimizer.zero_grad()
        backward(model, step)
        assert_zeros(controller, gradient)
        optimizer.step()
        assert_zeros(controller)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("began", [False, True])
def test_what_a_dense_checkpoint_has_where_it_is_pruned_returns_with_other_masks(assign, began):
    controller = build("magnitude, blocks")
    model = controller.model
    if began:
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        backward(model)
        optimizer.step()
    checkpoint = dense_checkpoint(model)
    want = copy.deepcopy(checkpoint)
    model.load_state_dict(checkpoint, assign=assign)
    controller.set_sparsity_level(0.0)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in want.items())


@pytest.mark.parametrize("assign", [False, True])
def test_zeros_hold_after_a_dense_checkpoint_of_tied_weights_is_loaded(assign):
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48))
    model[2].weight = model[0].weight
    controller = build(model=model)
    checkpoint = dense_checkpoint(model)
    model.load_state_dict(checkpoint, assign=assign)
    assert_zeros(controller)


def test_a_checkpoint_of_a_part_leaves_the_values_of_the_rest():
    controller = build("magnitude, blocks")
    model = controller.model
    want = net().state_dict()
    model.load_state_dict({"2.bias": want["2.bias"].clone()}, strict=False)
    assert_zeros(controller)
    controller.set_sparsity_level(0.0)
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_a_sparse_run_is_loaded_as_it_is():
    controller = build()
    saved = copy.deepcopy(controller.model.state_dict())
    other = build(model=nn.Sequential(*map(copy.deepcopy, net())))
    state = controller.get_state()
    other.load_state(state)
    other.model.load_state_dict(saved)
    assert all(torch.equal(v, saved[k]) for k, v in other.model.state_dict().items())


# gradients


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude, skipped blocks", "rigl"])
def test_a_clipped_norm_is_that_of_the_folded_model(algorithm):
    controller = build(algorithm)
    twin = copy.deepcopy(controller.model)
    for _ in range(2):  # accumulated
        backward(controller.model)
        backward(twin)
    masks = {i.module_node_name: i.operand.binary_mask for i in controller.sparsified_module_info}
    for name, mask in masks.items():
        twin.get_submodule(name).weight.grad[~mask] = 0
    got = nn.utils.clip_grad_norm_(controller.model.parameters(), 1.0)
    want = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    torch.testing.assert_close(got, want)
    assert_zeros(controller, gradient)


@every_algorithm
def test_hooks_registered_before_and_after_see_zeros(algorithm):
    seen, controller = [], None

    def look(parameter):
        if controller is not None:
            (info,) = (i for i in controller.sparsified_module_info if i.weight is parameter)
            seen.append(parameter.grad[~info.operand.binary_mask].count_nonzero())

    model = net()
    model[0].weight.register_post_accumulate_grad_hook(look)
    model[2].weight.register_post_accumulate_grad_hook(look)
    controller = build(algorithm, model)
    model[0].weight.register_post_accumulate_grad_hook(look)
    model[2].weight.register_post_accumulate_grad_hook(look)
    for step in range(3):
        controller.scheduler.step()
        backward(model, step)
    assert seen == [0] * 12


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude, blocks", "rigl"])
def test_gradients_of_a_graph_of_their_own_are_zero_and_can_be_differentiated(algorithm):
    controller = build(algorithm)
    model = controller.model
    (model(data(0)) - data(0)).square().sum().backward(create_graph=True)
    assert_zeros(controller, gradient)
    penalty = sum(info.weight.grad.square().sum() for info in controller.sparsified_module_info)
    for parameter in model.parameters():
        parameter.grad = None
    penalty.backward()
    assert_zeros(controller, gradient)


class Sum(nn.Module):
    """Two weights whose gradients are one tensor, or one element at stride 0."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16, bias=False)
        self.b = nn.Linear(16, 16, bias=False)

    def forward(self, factor):
        return (self.a.weight + self.b.weight) * factor


@pytest.mark.parametrize("pattern", [ts.Unstructured(), ts.Block(4, 4), ts.NM(2, 4)], ids=str)
@pytest.mark.parametrize("factor", [torch.ones(()), torch.ones(16, 16), torch.ones(16, 1)])
@pytest.mark.parametrize("times", [1, 2])
def test_gradients_that_weights_share_are_masked_each_by_its_own(pattern, factor, times):
    torch.manual_seed(0)
    model = Sum()
    controller = ts.create_controller(model, magnitude(pattern, HALF))
    for _ in range(times):
        model(factor).sum().backward()
    for info in controller.sparsified_module_info:
        assert torch.equal(info.weight.grad, info.operand.binary_mask * float(times))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_that_list_rows_are_zero_where_those_are_pruned(kind):
    torch.manual_seed(0)
    options = {"mode": "sum"} if kind is nn.EmbeddingBag else {}
    model = kind(8, 4, sparse=True, **options)
    controller = ts.create_controller(model, magnitude(ts.Unstructured(), HALF))
    pruned = ~controller.sparsified_module_info[0].operand.binary_mask
    ids = torch.tensor([[1, 2, 2], [3, 0, 5]])
    for accumulated in range(1, 3):
        model(ids).sum().backward()
        grad = model.weight.grad
        assert grad.layout == torch.sparse_coo
        assert (grad.to_dense()[pruned] == 0).all()
        counts = torch.bincount(ids.flatten(), minlength=8)[:, None].expand(8, 4)
        assert torch.equal(grad.to_dense()[~pruned], counts[~pruned] * float(accumulated))


def test_a_gradient_is_zero_at_once_under_autograd_of_a_part_of_the_model():
    controller = build()
    model = controller.model
    torch.autograd.backward(model[0](data(0)).sum(), inputs=[model[0].weight])
    (info, _) = controller.sparsified_module_info
    assert (info.weight.grad[~info.operand.binary_mask] == 0).all()


@pytest.fixture
def all_at_once(monkeypatch):
    """Clear gradients at the end of a backward pass, as on a GPU."""
    monkeypatch.setattr(Guard, "waits_for", staticmethod(lambda parameter: True))


@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude, blocks", "rigl", "composite"])
def test_gradients_cleared_all_at_once_are_zero_behind_the_backward_pass(algorithm):
    controller = build(algorithm)
    for step in range(4):
        controller.scheduler.step()
        backward(controller.model, step)
        assert_zeros(controller, gradient)


class Once(torch.autograd.Function):
    """The identity, whose backward pass fails when it is told to, as for want of memory."""

    fails = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        if Once.fails:
            raise RuntimeError("out of memory")
        return grads[0]


@pytest.mark.usefixtures("all_at_once")
def test_a_backward_pass_that_fails_does_not_spoil_the_next(monkeypatch):
    controller = build()
    model = controller.model
    monkeypatch.setattr(Once, "fails", True)
    with pytest.raises(RuntimeError, match="out of memory"):
        model[2](Once.apply(model[1](model[0](data(0))))).square().mean().backward()
    monkeypatch.setattr(Once, "fails", False)
    for accumulated in range(2):
        model[2](Once.apply(model[1](model[0](data(accumulated))))).square().mean().backward()
        assert_zeros(controller, gradient)


@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_a_recomputed_part_are_zero(reentrant):
    controller = build()
    model = controller.model
    x = data(0).requires_grad_()
    for _ in range(2):
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
        assert_zeros(controller, gradient)
        model[2](checkpoint(model[0], x, use_reentrant=reentrant)).square().mean().backward()
        assert_zeros(controller, gradient)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW, optim.Rprop])
@pytest.mark.parametrize("how", ["assigned", "data assigned"])
def test_gradients_that_somebody_assigns_move_nothing_that_is_pruned(kind, how):
    """As from ``torch.func.grad``, or per-sample gradients."""
    controller = build()
    model = controller.model
    parameters = list(model.parameters())
    optimizer = kind(parameters, lr=0.05)
    for step in range(3):
        if step % 2:  # in turn with the usual way
            optimizer.zero_grad()
            backward(model, step)
        else:
            loss = (model(data(step)) - data(step)).square().mean()
            found = torch.autograd.grad(loss, parameters)
            for parameter, grad in zip(parameters, found, strict=True):
                if how == "assigned" or parameter.grad is None:
                    parameter.grad = grad
                else:
                    parameter.grad.data = grad
        optimizer.step()
        assert_zeros(controller)


@pytest.mark.parametrize("through", ["model", "model in evaluation", "submodule"])
@pytest.mark.filterwarnings("ignore:masking parameters that are frozen")
def test_a_weight_that_is_trained_later_trains_under_its_mask(through):
    model = net()
    model[0].weight.requires_grad_(False)
    controller = build(model=model)
    model[0].weight.requires_grad_(True)
    called = model[0] if through == "submodule" else model.train(through == "model")
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        called(data(step)).square().mean().backward()
        optimizer.step()
        assert_zeros(controller)


# optimisers


class Noisy(optim.AdamW):
    """An elementwise optimiser by its class, and none by what it does."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01)
        return loss


class Sphere(optim.Optimizer):
    """Keeps the mean of each weight: what nobody has heard of, with a state of its own name."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                speed = state.setdefault("speed", torch.zeros_like(p))
                speed.mul_(0.9).add_(p.grad)
                p.sub_(group["lr"] * (speed - speed.mean() + 0.01))


def each(parameters, **options):
    """Two dimensions alone, as some optimisers want it."""
    return [p for p in parameters if p.ndim == 2]


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, 0.05),
    "SGD momentum": lambda p: optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, maximize=True),
    "SGD foreach": lambda p: optim.SGD(p, 0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda p: optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, 0.05, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, 0.05, weight_decay=0.1),
    "AdamW foreach": lambda p: optim.AdamW(p, 0.05, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, 0.05, fused=True),
    "NAdam": lambda p: optim.NAdam(p, 0.05, weight_decay=0.1),
    "NAdam decoupled": lambda p: optim.NAdam(p, 0.05, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, 0.05, weight_decay=0.1),
    "Adamax": lambda p: optim.Adamax(p, 0.05, weight_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0, weight_decay=0.1),
    "Adagrad": lambda p: optim.Adagrad(p, 0.05, weight_decay=0.1),
    "Adagrad fused": lambda p: optim.Adagrad(p, 0.05, fused=True),
    "Rprop": lambda p: optim.Rprop(p, 0.05),
    "ASGD": lambda p: optim.ASGD(p, 0.05, weight_decay=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, 0.05, weight_decay=0.1),
    "Adafactor of transformers": lambda p: Adafactor(p, lr=0.05, relative_step=False, beta1=0.9),
    "Muon": lambda p: optim.Muon(each(p), 0.05, weight_decay=0.1),
    "LBFGS": lambda p: optim.LBFGS(p, 0.05, max_iter=3),
    "LBFGS wolfe": lambda p: optim.LBFGS(p, 0.5, max_iter=3, line_search_fn="strong_wolfe"),
    "a subclass of AdamW": lambda p: Noisy(p, 0.05),
    "one of the user's": lambda p: Sphere(p),
}


def advance(model, optimizer, step):
    def closure():
        optimizer.zero_grad()
        loss = (model(data(step)) - data(step)).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def test_every_optimiser_of_torch_is_tried():
    tried = {type(make(net().parameters())) for make in OPTIMIZERS.values()} | {optim.SparseAdam}
    there = {
        found
        for _, found in inspect.getmembers(optim, inspect.isclass)
        if issubclass(found, optim.Optimizer)
    }
    assert there - {optim.Optimizer} <= tried


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude, skipped blocks"])
@pytest.mark.parametrize("when", ["at work before", "after"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_hold_under_every_optimiser(kind, when, algorithm):
    model = net()
    if when == "at work before":
        optimizer = OPTIMIZERS[kind](model.parameters())
        for step in range(3):
            advance(model, optimizer, step)
    controller = build(algorithm, model)
    if when == "after":
        optimizer = OPTIMIZERS[kind](model.parameters())
    start = [info.weight.detach().clone() for info in controller.sparsified_module_info]
    for step in range(6):
        if step % 2 == 0:  # masks tighten under the momentum
            controller.scheduler.epoch_step()
            assert_zeros(controller)
        controller.scheduler.step()
        advance(model, optimizer, step)
        assert_zeros(controller)
    for info, weight in zip(controller.sparsified_module_info, start, strict=True):
        assert not torch.equal(info.weight, weight)


def test_zeros_hold_under_sparse_adam():
    torch.manual_seed(0)
    model = nn.Embedding(8, 4, sparse=True)
    optimizer = optim.SparseAdam(model.parameters(), 0.1)
    ids = torch.tensor([1, 2, 5])

    def advance():
        optimizer.zero_grad()
        (model(ids) - 1).square().sum().backward()
        optimizer.step()

    advance()
    controller = ts.create_controller(model, magnitude(ts.Unstructured()))
    for _ in range(3):
        controller.scheduler.epoch_step()
        for _ in range(2):
            controller.scheduler.step()
            advance()
            assert_zeros(controller)


@pytest.mark.parametrize("kind", ["SGD momentum", "AdamW", "RMSprop", "Muon"])
def test_an_optimisers_state_loaded_later_does_not_leak(kind):
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(3):
        advance(model, optimizer, step)
    dense = copy.deepcopy(optimizer.state_dict())
    controller = build(model=model)
    advance(model, optimizer, 3)
    optimizer.load_state_dict(dense)  # a checkpoint of the dense run
    for step in range(2):
        advance(model, optimizer, step)
        assert_zeros(controller)


@pytest.mark.parametrize("kind", ["SGD momentum", "AdamW", "RMSprop"])
def test_momentum_does_not_leak_into_a_mask_that_is_assigned(kind):
    controller = build()
    model = controller.model
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(2):
        advance(model, optimizer, step)
    for info in controller.sparsified_module_info:
        info.operand.binary_mask = ~info.operand.binary_mask
    assert_zeros(controller)
    for step in range(2):
        advance(model, optimizer, step)
        assert_zeros(controller)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Rprop"])
@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude, blocks", "set", "assigned"])
def test_masks_that_change_between_backward_pass_and_step_do_not_leak(algorithm, kind):
    controller = build("magnitude" if algorithm == "assigned" else algorithm)
    model = controller.model
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        if algorithm == "assigned":
            for info in controller.sparsified_module_info:
                fewer = torch.rand(info.weight.shape) > 0.2
                info.operand.binary_mask = info.operand.binary_mask & fewer
        else:
            controller.scheduler.epoch_step()
            controller.scheduler.step()
        assert_zeros(controller)
        assert_zeros(controller, gradient)
        optimizer.step()
        assert_zeros(controller)


@pytest.mark.parametrize("when", ["before", "after"])
def test_zeros_hold_under_optimisers_that_step_within_the_backward_pass(when):
    model = net()
    own = {p: optim.AdamW([p], 0.05, weight_decay=0.1) for p in model.parameters()}

    def advance(parameter):
        own[parameter].step()
        own[parameter].zero_grad()

    controller = build(model=model) if when == "after" else None
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(advance)
    if when == "before":
        backward(model)
        controller = build(model=model)
    for step in range(4):
        if step % 2 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        backward(model, step)
        assert_zeros(controller)


def test_zeros_hold_while_weights_are_perturbed_on_purpose():
    """As sharpness-aware minimisation does between two backward passes."""
    controller = build()
    model = controller.model
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(3):
        backward(model, step)
        with torch.no_grad():
            moves = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
            torch._foreach_add_(list(model.parameters()), moves)
        optimizer.zero_grad()
        backward(model, step)
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moves)
        optimizer.step()
        optimizer.zero_grad()
        assert_zeros(controller)


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude, blocks"])
@pytest.mark.parametrize("told", [False, True])
def test_elementwise_training_is_that_of_a_model_cleared_after_every_step(algorithm, told):
    """What is kept trains as under the crudest way to hold zeros there are."""
    controller = build(algorithm)
    model = controller.model
    twin = copy.deepcopy(model)
    ours, theirs = (optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1) for m in (model, twin))
    controller.optimizer = ours if told else None
    masks = {i.module_node_name: i.operand.binary_mask for i in controller.sparsified_module_info}
    for step in range(4):
        controller.scheduler.step()
        advance(model, ours, step)
        advance(twin, theirs, step)
        for name, mask in masks.items():
            twin.get_submodule(name).weight.data[~mask] = 0
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


class Plain:
    """No ``torch.optim.Optimizer``: momentum by hand, written past the version counter."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.speed = [torch.randn_like(p) for p in self.parameters]

    def step(self):
        for parameter, speed in zip(self.parameters, self.speed, strict=True):
            speed.mul_(0.9).add_(parameter.grad)
            parameter.data.sub_(speed, alpha=0.01)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


@every_algorithm
@pytest.mark.parametrize("order", ["zero_grad first", "zero_grad last"])
def test_what_is_no_optimiser_of_torch_is_made_good_at_the_next_step(algorithm, order):
    controller = build(algorithm)
    model = controller.model
    optimizer = Plain(model.parameters())
    for step in range(4):
        controller.scheduler.step()
        assert_zeros(controller)
        if order == "zero_grad first":
            optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if order == "zero_grad last":
            optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_changes_nothing(fused):
    controller = build()
    model = controller.model
    optimizer = optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, overflows in enumerate((False, True, False)):
        controller.scheduler.step()
        optimizer.zero_grad()
        before = copy.deepcopy(model.state_dict())
        loss = (model(data(step)) - data(step)).square().sum()
        scaler.scale(loss * (torch.inf if overflows else 1)).backward()
        assert_zeros(controller, gradient)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert_zeros(controller)
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same is overflows


def test_an_overflow_in_what_is_pruned_is_none():
    controller = build()
    (info, _) = controller.sparsified_module_info
    pruned = ~info.operand.binary_mask
    info.weight.backward(torch.where(pruned, torch.nan, 2.0))
    assert torch.equal(info.weight.grad, torch.where(pruned, 0.0, 2.0))


# several controllers, and none


def test_guards_are_told_of_a_step_in_the_order_in_which_they_were_made():
    """Before a step ranks talk of each guard's weights, and must not mix them up."""
    model, told = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))), []
    order = ["5", "2", "7", "0", "3", "6", "1", "4"]
    configs = [magnitude(ts.Unstructured(), HALF, target_scopes=[name]) for name in order]
    controllers = [ts.create_controller(model, config) for config in configs]
    for name, controller in zip(order, controllers, strict=True):
        controller._guard.before_step = lambda *_, name=name: told.append(name)
    model(torch.randn(2, 8)).sum().backward()
    optim.AdamW(model.parameters()).step()
    assert told == order


def test_two_controllers_on_weights_of_their_own_hold_both():
    model = net()
    first = ts.create_controller(model, magnitude(ts.Unstructured(), target_scopes=["0"]))
    second = ts.create_controller(
        model, regrowth(ts.RigLConfig, ts.Block(4, 4), target_scopes=["2"])
    )
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(6):
        if step % 2 == 0:
            first.scheduler.epoch_step()
        first.scheduler.step()
        second.scheduler.step()
        advance(model, optimizer, step)
        for controller in (first, second):
            assert_zeros(controller)
            assert_zeros(controller, gradient)
    pruned = ~first.sparsified_module_info[0].operand.binary_mask
    first.strip_model(model)
    advance(model, optimizer, 6)
    assert_zeros(second)
    assert_zeros(second, gradient)
    assert model[0].weight[pruned].any()


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude, skipped blocks"])
@pytest.mark.parametrize("kind", ["SGD momentum", "Muon"])
def test_zeros_outlive_the_controller(algorithm, kind):
    controller = build(algorithm)
    model = controller.model
    masks = {i.module_node_name: i.operand.binary_mask for i in controller.sparsified_module_info}
    del controller
    gc.collect()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(3):
        advance(model, optimizer, step)
        for name, mask in masks.items():
            assert (model.get_submodule(name).weight[~mask] == 0).all()
            assert (model.get_submodule(name).weight.grad[~mask] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude, skipped blocks", "rigl", "composite"])
def test_nothing_outlives_the_model(algorithm):
    def live():
        gc.collect()
        return len(_global_optimizer_post_hooks), len(_global_parameter_registration_hooks)

    build(algorithm)
    before = live()
    controller = build(algorithm)
    model = controller.model
    optimizer = optim.AdamW(model.parameters())
    advance(model, optimizer, 0)
    gone = weakref.ref(model), weakref.ref(model[0].weight), weakref.ref(controller)
    del model, optimizer, controller
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]
    assert live() == before


@pytest.mark.slow
def test_a_model_may_die_in_the_middle_of_another_ones_step():
    gc.collect()
    gc.disable()
    handles = []
    try:
        build()  # garbage now
        hooks = (lambda *_: gc.collect(), lambda *_: None)
        handles += map(register_optimizer_step_post_hook, hooks)
        model = net()
        advance(model, optim.AdamW(model.parameters(), lr=0.05), 0)
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()


def test_a_stripped_model_is_watched_no_more():
    controller = build("magnitude, skipped blocks")
    model = controller.strip(do_copy=False)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    advance(model, optim.AdamW(model.parameters(), lr=0.05), 0)
    assert model[0].weight.all()


def test_a_stripped_copy_has_no_hook_either():
    for controller in (build("magnitude"), build("magnitude, skipped blocks")):
        for model in (controller.strip(), controller.strip_model(copy.deepcopy(controller.model))):
            for module in model.modules():
                assert not module._forward_pre_hooks
                assert not module._load_state_dict_post_hooks
