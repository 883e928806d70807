"""Copies, pickles and averages of a controlled model are plain models; strip takes them all."""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import triton_sparsity as ts
from triton_sparsity.controller.masks.module import MaskedModule

CLIMB = ts.PolynomialSchedule(initial_level=0.25, target_level=0.75, target_epoch=3, power=1.0)
CONFIGS = {
    "unstructured": ts.MagnitudeSparsityConfig(schedule=CLIMB),
    "blocks": ts.MagnitudeSparsityConfig(pattern=ts.Block(16, 16), schedule=CLIMB),
    "set": ts.SETConfig(level=0.5, t_end=100, delta_t=1),
    "rb": ts.RBSparsityConfig(seed=0),
    "movement": ts.MovementSparsityConfig(
        warmup_start_epoch=1,
        warmup_end_epoch=9,
        importance_regularization_factor=0.1,
        steps_per_epoch=4,
    ),
}
LEARNED = ("rb", "movement")
every_config = pytest.mark.parametrize("kind", CONFIGS)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48))


def build(kind="unstructured", model=None):
    model = net() if model is None else model
    controller = ts.create_controller(model, CONFIGS[kind], dispatch="sparse")
    for scores in controller.parameters():  # masks that keep about half
        scores.data.uniform_(-1, 1)
    if kind == "movement":  # from its warm-up on
        for _ in range(2):
            controller.scheduler.epoch_step()
            for _ in range(4):
                controller.scheduler.step()
    return model, controller


def data(step=0):
    return torch.randn(4, 48, generator=torch.Generator().manual_seed(step))


def train(model, controller, epochs, optimizer=None):
    optimizer = optim.AdamW(model.parameters(), lr=0.02) if optimizer is None else optimizer
    for epoch in epochs:
        controller.scheduler.epoch_step()
        for step in range(4):
            controller.scheduler.step()
            optimizer.zero_grad()
            (model(data(4 * epoch + step)).square().mean() + controller.loss()).backward()
            optimizer.step()
    return optimizer


def masks(controller):
    """The masks by the names of their parameters."""
    names = {id(p): name for name, p in controller.model.named_parameters()}
    return {names[id(i.weight)]: i.operand.binary_mask for i in controller.sparsified_module_info}


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "a copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@every_config
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_plain_model_with_the_zeros_and_trains_as_one(kind, how):
    model, controller = build(kind)
    model.eval()
    with torch.no_grad():
        want = model(data())
    twin = COPIES[how](model)
    assert [type(m) for m in twin.modules()] == [nn.Sequential, nn.Linear, nn.Tanh, nn.Linear]
    # scores stay parameters until they are stripped, or an average would pair others
    own = [name for name in twin.state_dict() if not name.endswith("_scores")]
    assert own == list(net().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(data()), want, atol=1e-5, rtol=1e-5)
    for name, mask in masks(controller).items():
        assert not mask.all()
        assert torch.equal(twin.get_parameter(name) != 0, mask)
    before = copy.deepcopy(model.state_dict())
    optimizer = optim.AdamW(twin.parameters(), lr=0.02)
    twin.train()(data()).square().mean().backward()
    assert all(p.grad.all() for n, p in twin.named_parameters() if n.endswith("weight"))
    optimizer.step()
    twin.load_state_dict({k: torch.ones_like(v) for k, v in twin.state_dict().items()})
    assert all((twin.get_parameter(name) == 1).all() for name in masks(controller))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["unstructured", "blocks"])
def test_a_copy_may_have_a_controller_of_its_own(kind):
    model, controller = build(kind)
    twin, other = build(kind, copy.deepcopy(model))
    other.set_sparsity_level(0.9)
    assert controller.mask_level() == pytest.approx(0.25, abs=0.05)
    train(twin, other, range(2))
    for name, mask in masks(other).items():
        assert not twin.get_parameter(name)[~mask].any()


@pytest.mark.slow
def test_a_pickle_loads_where_this_package_is_not(tmp_path):
    for kind in ("unstructured", "blocks", "rb"):
        model, _ = build(kind)
        torch.save(model, tmp_path / f"{kind} model.pt")
        torch.save(model.eval()(data()).detach(), tmp_path / f"{kind} want.pt")
    program = textwrap.dedent(
        """
        import sys, torch
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton_sparsity":
                    raise ImportError(name)
        sys.meta_path.insert(0, Refuse())
        for kind in ("unstructured", "blocks", "rb"):
            model = torch.load(f"{sys.argv[1]}/{kind} model.pt", weights_only=False)
            want = torch.load(f"{sys.argv[1]}/{kind} want.pt")
            x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(model(x).detach(), want, atol=1e-5, rtol=1e-5)
            model.train()(x).sum().backward()
            model.load_state_dict(model.state_dict())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["unstructured", "blocks"])
def test_a_copy_compiles_into_one_graph(kind):
    model, controller = build(kind)
    torch._dynamo.reset()
    for twin in (copy.deepcopy(model), controller.strip()):
        compiled = torch.compile(twin, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(data()), model(data()), atol=1e-5, rtol=1e-5)


# averages


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@pytest.mark.parametrize("kind", ["unstructured", "blocks", "set"])
@pytest.mark.parametrize("ema", [False, True])
def test_an_average_over_changing_masks_is_folded_and_says_by_how_much(kind, ema):
    model, controller = build(kind)
    how = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if ema else {}
    average = AveragedModel(model, **how)
    average.update_parameters(model)
    optimizer = None
    for step in range(3):
        optimizer = train(model, controller, [step], optimizer)
        average.update_parameters(model)
    assert type(average.module) is nn.Sequential
    assert not any(isinstance(m, MaskedModule) for m in average.modules())
    want, changed = {}, 0
    for name, mask in masks(controller).items():
        weight = average.module.get_parameter(name).detach()
        changed += int(weight[~mask].count_nonzero())
        want[name] = torch.where(mask, weight, 0.0)
    assert changed > 0
    with pytest.warns(UserWarning, match=f"strip_model: .* {changed} elements became zero"):
        stripped = controller.strip_model(average)
    assert stripped is average
    for name, weight in want.items():
        assert torch.equal(average.module.get_parameter(name), weight)
    train(model, controller, range(3, 5), optimizer)  # the model goes on


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@pytest.mark.parametrize("kind", LEARNED)
def test_an_average_of_learned_masks_is_folded_with_those_of_the_controller(kind):
    model, controller = build(kind)
    average = AveragedModel(model)
    for step in range(3):
        train(model, controller, [step])
        average.update_parameters(model)
    model.eval()
    stripped = controller.strip_model(average.eval())
    assert list(stripped.module.state_dict()) == list(net().state_dict())
    assert sum(p.numel() for p in stripped.parameters()) == sum(
        p.numel() for p in net().parameters()
    )
    for name, mask in masks(controller).items():
        assert torch.equal(stripped.module.get_parameter(name) != 0, mask)


def test_an_average_under_masks_that_stay_is_folded_without_a_word():
    model, controller = build("unstructured")
    average = AveragedModel(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    for step in range(3):
        optimizer.zero_grad()
        model(data(step)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    controller.strip_model(average)
    for name, mask in masks(controller).items():
        assert torch.equal(average.module.get_parameter(name) != 0, mask)


# others that take a model


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@every_config
def test_a_shared_model_goes_on_under_its_masks(kind):
    model, controller = build(kind)
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    train(model, controller, range(2))
    if kind not in LEARNED:
        for name, mask in masks(controller).items():
            assert torch.equal(model.get_parameter(name) != 0, mask)
    assert controller.strip()(data()).isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@every_config
def test_dynamic_quantisation_gives_the_quantised_sparse_model(kind):
    model, controller = build(kind)
    model.eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    want = torch.ao.quantization.quantize_dynamic(
        controller.strip(), {nn.Linear}, dtype=torch.qint8
    )
    assert type(quantised[0]).__module__.startswith("torch.ao")
    torch.testing.assert_close(quantised(data()), want(data()))
    for i in (0, 2):
        mask = masks(controller)[f"{i}.weight"]
        assert not quantised[i].weight().dequantize()[~mask].any()
    train(model.train(), controller, range(2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_in_place_the_weight_is_named_and_the_remedy():
    model, controller = build("unstructured")
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    for call in (lambda: controller.set_sparsity_level(0.5), controller.strip):
        with pytest.raises((RuntimeError, ValueError), match=r"'0'.*strip"):
            call()


# strip


class Wrapper(nn.Module):
    """As ``DataParallel`` names its module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


WRAPPERS = {
    "none": lambda model: model,
    "module.": Wrapper,
    "module.module.": lambda model: Wrapper(Wrapper(model)),
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "of torch.compile": lambda model: Wrapper(torch.compile(model, backend="eager")),
    "part of another": lambda model: nn.Sequential(nn.Linear(48, 48), model),
}
# an algorithm knows nothing of wrappers: two, fixed masks and learned ones, meet all of them
EACH = ("none", "torch.compile")
STRIPPED = [(kind, wrapper) for kind in CONFIGS for wrapper in EACH] + [
    (kind, wrapper) for kind in ("blocks", "movement") for wrapper in WRAPPERS.keys() - EACH
]


WAYS = [
    (made_on, what) for what in ("itself", "a copy", "do_copy") for made_on in ("model", "wrapper")
]


@pytest.mark.parametrize(
    ("kind", "wrapper", "made_on", "what"),
    # all ways by the two, one of each kind by the others
    [
        (kind, wrapper, *way)
        for kind, wrapper in sorted(STRIPPED)
        for way in (WAYS if kind in ("blocks", "movement") else WAYS[wrapper == "none" :: 2])
        if (wrapper, way[0]) != ("part of another", "wrapper")
    ],
)
def test_a_wrapper_is_stripped(kind, wrapper, made_on, what):
    model = net()
    wrapped = WRAPPERS[wrapper](model)
    torch._dynamo.reset()
    _, controller = build(kind, model if made_on == "model" else wrapped)
    wrapped.eval()
    with torch.no_grad():
        want = wrapped(data())
    if what == "itself":
        stripped = controller.strip_model(wrapped)
        assert stripped is wrapped
    elif what == "do_copy":
        stripped = controller.strip_model(wrapped, do_copy=True)
        assert stripped is not wrapped
    else:
        stripped = controller.strip_model(copy.deepcopy(wrapped))
    assert not any(isinstance(m, MaskedModule) for m in stripped.modules())
    with torch.no_grad():
        torch.testing.assert_close(stripped(data()), want, atol=1e-5, rtol=1e-5)
    zeros = sum(int((p == 0).sum()) for p in stripped.parameters())
    pruned = sum(int((~mask).sum()) for mask in masks(controller).values())
    assert zeros == pruned > 0
    if what == "itself":
        with pytest.raises(ValueError, match="stripped already"):
            controller.strip_model(wrapped)
    else:
        train(wrapped.train(), controller, range(1))  # goes on


@every_config
def test_another_model_is_refused_and_stays(kind):
    _, controller = build(kind)
    for other in (
        nn.Sequential(nn.Linear(48, 96), nn.Tanh()),
        nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 40)),
        nn.ReLU(),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="strip_model: "):
            controller.strip_model(other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    controller.strip()


def test_a_model_with_two_such_parts_is_refused():
    model, controller = build()
    both = nn.ModuleDict({"a": copy.deepcopy(model), "b": copy.deepcopy(model)})
    with pytest.raises(ValueError, match="strip_model: model must be"):
        controller.strip_model(both)


@every_config
def test_a_model_is_stripped_once_and_copies_after_that_go_on(kind):
    model, controller = build(kind)
    twin = copy.deepcopy(model)
    assert controller.strip_model(model) is model
    with pytest.raises(ValueError, match="stripped already"):
        controller.strip_model(model)
    with pytest.raises(ValueError, match="stripped already"):
        controller.strip()
    assert controller.strip_model(twin) is twin


@pytest.mark.parametrize("kind", ["unstructured", "blocks"])
@pytest.mark.parametrize("what", ["itself", "a copy", "do_copy"])
def test_a_model_of_peft_is_stripped_with_its_adapters(kind, what):
    peft = pytest.importorskip("peft")
    model, controller = build(kind)
    config = peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        want = wrapped(data())
    if what == "itself":
        stripped = controller.strip_model(wrapped)
    elif what == "do_copy":
        stripped = controller.strip_model(wrapped, do_copy=True)
    else:
        stripped = controller.strip_model(copy.deepcopy(wrapped))
    assert not any(isinstance(m, MaskedModule) for m in stripped.modules())
    with torch.no_grad():
        torch.testing.assert_close(stripped(data()), want, atol=1e-5, rtol=1e-5)
    for name, mask in masks(controller).items():
        weight = stripped.base_model.model[int(name[0])].base_layer.weight
        assert torch.equal(weight != 0, mask)
