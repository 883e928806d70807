"""What others do to a controlled model: it is right, or an error says what to do instead."""

import copy
import functools
import warnings

import pytest
import torch
from torch import distributed, nn, optim
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import triton_sparsity as ts
from triton_sparsity.controller.masks.module import MaskedModule

HALF = ts.PolynomialSchedule(initial_level=0.5, target_level=0.5)
PATTERNS = {
    "unstructured": ts.Unstructured(),
    "blocks": ts.Block(4, 4),
    "skipped blocks": ts.Block(16, 16),
    "N:M": ts.NM(2, 4),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
both_paths = pytest.mark.parametrize("pattern", ["unstructured", "skipped blocks"])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def build(pattern="unstructured", model=None, **options):
    model = net() if model is None else model
    options = {"schedule": HALF, "pattern": PATTERNS[pattern]} | options
    dispatch = "sparse" if pattern == "skipped blocks" else "auto"
    return model, ts.create_controller(
        model, ts.MagnitudeSparsityConfig(**options), dispatch=dispatch
    )


def data(step=0):
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(step))


def by_hand(model, x):
    """What the model computes by its parameters as they are."""
    for layer in model:
        x = (
            functional.linear(x, layer.weight, layer.bias)
            if hasattr(layer, "weight")
            else layer(x)
        )
    return x


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def zeros_of(controller):
    return all(
        not i.weight[~i.operand.binary_mask].any() for i in controller.sparsified_module_info
    )


def step(model, optimizer=None, batch=0):
    optimizer = optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    optimizer.zero_grad()
    model(data(batch)).square().mean().backward()
    optimizer.step()


# the parameter is written or replaced


def assign_data(weight):
    weight.data = torch.randn_like(weight)


def multiply(weight):
    with torch.no_grad():
        weight.add_(1.0)


WRITES = {
    "data.copy_": lambda w: w.data.copy_(torch.randn_like(w)),
    "data.add_": lambda w: w.data.add_(1.0),
    "detach().add_": lambda w: w.detach().add_(1.0),
    "data =": assign_data,
    "add_": multiply,
    "init": nn.init.orthogonal_,
    "numpy": lambda w: w.detach().numpy().__setitem__(slice(None), 1.0),
}
# writes that leave a trace; others are seen at a switch to evaluation, where blocks are skipped
SEEN = ("data =", "add_", "init", "detach().add_")


@every_pattern
@pytest.mark.parametrize("how", WRITES)
def test_evaluation_reads_what_was_written_and_the_next_step_drops_it(pattern, how):
    model, controller = build(pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for parameter in (model[0].weight, model[2].weight):
            WRITES[how](parameter)
        model.eval()
        with torch.no_grad():
            close(model(data()), by_hand(model, data()))
    assert not zeros_of(controller)
    model.train()
    if how in SEEN or pattern == "skipped blocks":
        with pytest.warns(UserWarning, match=r"\d+ pruned elements had been written"):
            model(data())
        assert zeros_of(controller)
    controller.scheduler.step()
    if zeros_of(controller):
        step(model)
    else:
        with pytest.warns(UserWarning, match=r"\d+ pruned elements had been written"):
            controller.set_sparsity_level(0.5)
    assert zeros_of(controller)


@every_pattern
@pytest.mark.parametrize("how", WRITES)
def test_what_was_written_is_dropped_at_strip_with_a_count(pattern, how):
    model, controller = build(pattern)
    masks = [i.operand.binary_mask for i in controller.sparsified_module_info]
    for parameter in (model[0].weight, model[2].weight):
        WRITES[how](parameter)
    written = sum(
        int(i.weight[~mask].count_nonzero())
        for i, mask in zip(controller.sparsified_module_info, masks, strict=True)
    )
    kept = [
        torch.where(mask, i.weight, 0.0)
        for i, mask in zip(controller.sparsified_module_info, masks, strict=True)
    ]
    with pytest.warns(UserWarning, match=f"{written} pruned elements had been written"):
        stripped = controller.strip()
    assert torch.equal(stripped[0].weight, kept[0])
    assert torch.equal(stripped[2].weight, kept[1])


REPLACEMENTS = {
    "module.weight =": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(64, 64))),
    "register_parameter": lambda m: m[0].register_parameter(
        "weight", nn.Parameter(torch.randn(64, 64))
    ),
    "_parameters": lambda m: m[0]._parameters.update(weight=nn.Parameter(torch.randn(64, 64))),
    "swap_tensors": lambda m: torch.utils.swap_tensors(
        m[0].weight, nn.Parameter(torch.randn(64, 64))
    ),
    "tied afterwards": lambda m: setattr(m[0], "weight", m[2].weight),
    "a subclass": lambda m: setattr(m[0], "weight", Marked(torch.randn(64, 64))),
    "assign": lambda m: m.load_state_dict(
        {k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True
    ),
}


class Marked(nn.Parameter):
    pass


@pytest.mark.filterwarnings("ignore:before a forward pass of training")
@every_pattern
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_a_replaced_parameter_trains_under_the_mask(pattern, how):
    model, controller = build(pattern)
    REPLACEMENTS[how](model)
    optimizer = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for batch in range(2):
        controller.scheduler.step()
        model(data())
        assert zeros_of(controller)
        optimizer.zero_grad()
        model(data(batch)).square().mean().backward()
        for info in controller.sparsified_module_info:
            assert not info.weight.grad[~info.operand.binary_mask].any()
        optimizer.step()
        assert zeros_of(controller)
        close(model(data()), by_hand(model, data()))
    close(controller.strip()(data()), model(data()))


BAD = {
    "another shape": lambda m: setattr(m[2], "weight", nn.Parameter(torch.randn(60, 64))),
    "another shape, data": lambda m: setattr(m[2].weight, "data", torch.randn(60, 64)),
    "another rank": lambda m: setattr(m[2].weight, "data", torch.randn(64)),
    "float8": lambda m: setattr(m[2].weight, "data", torch.zeros(64, 64).to(torch.float8_e4m3fn)),
    "gone": lambda m: m[2]._parameters.pop("weight"),
}


@every_pattern
@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("call", ["set_sparsity_level", "strip", "strip_model", "get_state"])
def test_a_weight_that_does_not_fit_its_mask_is_named_and_nothing_changes(pattern, how, call):
    model, controller = build(pattern)
    first = model[0].weight.detach().clone()
    masks = [i.operand.binary_mask for i in controller.sparsified_module_info]
    calls = {
        "set_sparsity_level": lambda: controller.set_sparsity_level(0.25),
        "strip": controller.strip,
        "strip_model": lambda: controller.strip_model(model),
        "get_state": lambda: controller.load_state(controller.get_state()),
    }
    with pytest.raises((ValueError, RuntimeError), match=r"'2'.*strip") as told:  # noqa: PT012
        BAD[how](model)  # may be refused at once
        calls[call]()
    assert "create" in str(told.value)
    assert torch.equal(model[0].weight, first)
    after = [i.operand.binary_mask for i in controller.sparsified_module_info]
    assert all(map(torch.equal, masks, after))


@every_pattern
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_past_the_module_and_back_keep_mask_zeros_and_values(pattern, dtype):
    model, controller = build(pattern)
    before = [i.operand.binary_mask for i in controller.sparsified_module_info]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model(data().to(dtype)).float().square().mean().backward()
    for info, mask in zip(controller.sparsified_module_info, before, strict=True):
        assert info.weight.dtype == info.weight.grad.dtype == dtype
        assert not info.weight.grad[~mask].any()
        assert torch.equal(info.weight != 0, mask)
    model.float()
    close(model(data()), by_hand(model, data()))
    controller.set_sparsity_level(0.0)  # what was pruned comes back, rounded
    for info, mask in zip(controller.sparsified_module_info, before, strict=True):
        assert info.weight[~mask].all()
        fresh = dict(net().named_parameters())[f"{info.module_node_name}.weight"]
        torch.testing.assert_close(info.weight, fresh, atol=2e-2, rtol=1e-2)


# parents that read the parameter


class Chunked(nn.Module):
    """A fused linear cross entropy: the loss multiplies by the head's weight."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return functional.linear(self.body(x), self.head.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.body = nn.Linear(64, 64)

    def forward(self, x):
        return self.body(self.embedding(x.argmax(1))) @ self.embedding.weight.T


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(64, 64) / 8)])
        self.body = nn.Linear(64, 64)

    def forward(self, x):
        return self.body(x) @ self.weights[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.proj = nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return functional.linear(
            functional.scaled_dot_product_attention(q, k, v), self.proj.weight, self.proj.bias
        )


@every_pattern
@pytest.mark.parametrize("kind", [Chunked, Tied, Listed, Attention])
def test_a_parent_that_reads_the_weight_reads_zeros(kind, pattern):
    torch.manual_seed(0)
    scopes = ["weights.0", "body"] if kind is Listed else None
    model, controller = build(pattern, kind(), target_scopes=scopes)
    assert len(controller.sparsified_module_info) == 2
    twin = controller.strip()
    optimizers = [optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    masks = {n: p != 0 for n, p in twin.named_parameters() if p.ndim == 2}
    for batch in range(3):
        for net_, optimizer in zip((model, twin), optimizers, strict=True):
            step(net_, optimizer, batch)
        with torch.no_grad():
            for name, mask in masks.items():
                twin.get_parameter(name).mul_(mask)
        assert zeros_of(controller)
        close(model(data()), twin(data()))


def test_a_weight_tied_before_has_one_mask_and_untied_goes_on():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    model, controller = build("unstructured", model)
    (info,) = controller.sparsified_module_info
    model[1].weight = nn.Parameter(torch.randn(64, 64))
    step(model)
    assert zeros_of(controller)
    assert model[1].weight.all()
    stripped = controller.strip()
    assert torch.equal(stripped[0].weight != 0, info.operand.binary_mask)


# forward wrapped on the instance, hooks


def timed(module):
    forward = module.forward

    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    module.forward = call


def checkpointed(module):
    forward = module.forward
    module.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)


def with_hooks_of_accelerate(module):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def with_hooks(module):
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    module.register_forward_hook(lambda m, args, out: out + 1)


PATCHES = {
    "timed": timed,
    "checkpointed": checkpointed,
    "accelerate": with_hooks_of_accelerate,
    "hooks": with_hooks,
}
LAYERS = {
    "Linear": (lambda: nn.Linear(64, 64), data),
    "Conv1d": (lambda: nn.Conv1d(64, 64, 1), lambda: data()[:, :, None]),
    "Embedding": (lambda: nn.Embedding(64, 64), lambda: torch.arange(5)),
}


@every_pattern
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", PATCHES)
def test_a_wrapped_forward_computes_with_the_zeros_and_outlives_the_strip(
    how, when, layer, pattern
):
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    if when == "before":
        PATCHES[how](model[0])
    _, controller = build(pattern, model)
    if when == "after":
        PATCHES[how](model[0])
    twin = nn.Sequential(make())
    twin.load_state_dict(model.state_dict())
    PATCHES[how](twin[0])
    want, got = twin(inputs()), model(inputs())
    close(got, want)
    got.square().mean().backward()
    want.square().mean().backward()
    mask = controller.sparsified_module_info[0].operand.binary_mask
    close(model[0].weight.grad, twin[0].weight.grad * mask)
    assert controller.strip_model(model) is model
    assert not isinstance(model[0], MaskedModule)
    close(model(inputs()), want)


# parametrizations


@both_paths
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "own"])
def test_a_parametrization_put_on_afterwards_is_named_with_the_remedy(pattern, how):
    model, _ = build(pattern)

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    puts = {
        "weight_norm": lambda: parametrizations.weight_norm(model[2]),
        "spectral_norm": lambda: parametrizations.spectral_norm(model[2]),
        "orthogonal": lambda: parametrizations.orthogonal(model[2]),
        "own": lambda: parametrize.register_parametrization(model[2], "weight", Double()),
    }
    with pytest.raises((RuntimeError, ValueError), match=r"'2'.*parametri.*strip"):  # noqa: PT012
        puts[how]()  # may be refused at once
        step(model)


@both_paths
def test_a_parametrization_that_is_taken_off_again_leaves_the_mask(pattern):
    model, controller = build(pattern)
    want = model[2].weight.detach().clone()
    try:
        parametrizations.weight_norm(model[2])
        parametrize.remove_parametrizations(model[2], "weight")
    except (RuntimeError, ValueError) as error:
        assert "'2'" in str(error)  # noqa: PT017
        return
    close(model[2].weight, want)
    step(model)
    assert zeros_of(controller)


def test_a_weight_that_is_gone_is_no_matter_of_other_models():
    model, _controller = build()
    model[2]._parameters.pop("weight")
    other, controller = build()
    step(other)
    assert zeros_of(controller)
    step(net())


# torch.func, torch.compile, wrappers


@both_paths
def test_functional_call_multiplies_by_what_it_is_given(pattern):
    model, _ = build(pattern)
    others = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    twin = net()
    twin.load_state_dict(others)
    for mode in (True, False):
        model.train(mode)
        close(torch.func.functional_call(model, others, (data(),)), twin(data()))
    own = dict(model.named_parameters())
    close(torch.func.functional_call(model, own, (data(),)), model(data()))


@both_paths
def test_torch_func_differentiates(pattern):
    model, controller = build(pattern)
    twin = controller.strip()
    own = {n: p.detach() for n, p in model.named_parameters()}

    def loss(net_):
        def call(parameters, x):
            return torch.func.functional_call(net_, parameters, (x,)).square().mean()

        return call

    got = torch.func.grad(loss(model))(own, data())
    want = torch.func.grad(loss(twin))(own, data())
    for name, value in want.items():
        close(got[name], value)
    each = torch.func.vmap(torch.func.grad(loss(model)), (None, 0))(own, data()[:, None])
    for name, value in want.items():
        close(each[name].mean(0), value)
    assert zeros_of(controller)


@both_paths
def test_symbolic_traces_and_exports_compute_the_same(pattern):
    model, _ = build(pattern)
    model.eval()
    close(torch.fx.symbolic_trace(model)(data()), model(data()))
    close(torch.export.export(model, (data(),)).module()(data()), model(data()))


@both_paths
def test_torch_func_maps_over_a_batch(pattern):
    model, _ = build(pattern)
    close(torch.func.vmap(lambda x: model(x[None])[0])(data()), model(data()))


@both_paths
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_goes_as_uncompiled_over_updates(pattern, backend):
    torch._dynamo.reset()
    states = []
    for compiled in (False, True):
        model, controller = build(
            pattern,
            schedule=ts.PolynomialSchedule(
                initial_level=0.25, target_level=0.75, target_epoch=2, power=1.0
            ),
        )
        forward = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        for batch in range(6):
            if batch % 2 == 0:
                controller.scheduler.epoch_step()
            controller.scheduler.step()
            step(forward, optimizer, batch)
            assert zeros_of(controller)
        states.append(copy.deepcopy(model.state_dict()))
    for name, value in states[0].items():
        close(states[1][name], value)


@pytest.fixture
def process_group():
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@every_pattern
@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.parallel.DistributedDataParallel])
@pytest.mark.parametrize("made_on", ["model", "wrapper"])
def test_parallel_wrappers_train_as_the_model(pattern, wrap, made_on):
    states = []
    for wrapped in (False, True):
        model = net()
        inner = wrap(model) if wrapped else model
        _, controller = build(pattern, inner if made_on == "wrapper" else model)
        if wrapped and made_on == "model":
            inner = wrap(model)
        optimizer = optim.AdamW(inner.parameters(), lr=0.01)
        for batch in range(3):
            controller.scheduler.step()
            step(inner, optimizer, batch)
            assert zeros_of(controller)
            for info in controller.sparsified_module_info:
                assert not info.weight.grad[~info.operand.binary_mask].any()
        states.append(model.state_dict())
    for name, value in states[0].items():
        close(states[1][name], value)
