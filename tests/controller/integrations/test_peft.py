"""Masked adapters: what LoRA adds to a sparse weight is masked, in training and once merged."""

import copy
import pickle

import pytest
import torch
from torch import nn, optim
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import triton_sparsity as ts
from tiny_models import gpt_oss, mixtral

peft = pytest.importorskip("peft")
# PEFT says so of every Conv1D
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]

HALF = ts.PolynomialSchedule(initial_level=0.5, target_level=0.5)
PATTERNS = {
    "unstructured": ts.Unstructured(),
    "blocks": ts.Block(4, 8),
    "skipped blocks": ts.Block(16, 16),
    "N:M": ts.NM(2, 4),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
frozen = pytest.mark.filterwarnings("ignore:masking parameters that are frozen")


class Net(nn.Module):
    """A linear, a Conv1D of Hugging Face, and a linear that nobody masks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(32, 64)
        self.mid = Conv1D(48, 64)
        self.down = nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def control(model, pattern="unstructured", **options):
    options = {
        "schedule": HALF, "pattern": PATTERNS[pattern], "ignored_scopes": ["{re}.*down.*"],
    } | options  # fmt: skip
    dispatch = "sparse" if pattern == "skipped blocks" else "auto"
    return ts.create_controller(model, ts.MagnitudeSparsityConfig(**options), dispatch=dispatch)


def adapted(model, **options):
    options = {
        "target_modules": ["up", "mid", "down"], "r": 4, "lora_alpha": 8,
        "init_lora_weights": False,
    } | options  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def build(pattern="unstructured", model=None, **options):
    model = Net() if model is None else model
    controller = control(model, pattern)
    wrapped = adapted(model, **options)
    names = ts.mask_adapters(wrapped, controller)
    return wrapped, controller, names


def data(rows=5, width=32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


def train(model, steps=3, x=None):
    x = data() if x is None else x
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def masks(controller):
    return {i.module_node_name: i.operand.binary_mask for i in controller.sparsified_module_info}


def zeros_of(controller):
    return all(
        not i.weight[~i.operand.binary_mask].any() for i in controller.sparsified_module_info
    )


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# the oracle: in float64, by the formula, without PEFT


def whole(layer, mask=None, adapters=("default",)):
    """W + M * sum(s B A), (out, in), in float64, with a gradient to each A and B."""
    base = layer.get_base_layer()
    transposed = isinstance(base, Conv1D)
    found = (base.weight.T if transposed else base.weight).detach().double()
    parts = []
    for name in adapters:
        a, b = (
            side[name].weight.detach().double().requires_grad_()
            for side in (layer.lora_A, layer.lora_B)
        )
        delta = layer.scaling[name] * b @ a
        kept = 1 if mask is None else (mask.T if transposed else mask).double()
        found = found + delta * kept
        parts += [a, b]
    return found, parts


def oracle(model, controller, x, adapters=("default",)):
    found = masks(controller)
    parts = []
    for name in ("up", "mid", "down"):
        layer = getattr(model.base_model.model, name)
        weight, own = whole(layer, found.get(name), adapters)
        bias = layer.get_base_layer().bias
        x = functional.linear(x.double(), weight, None if bias is None else bias.double())
        x = torch.tanh(x) if name != "down" else x
        parts += own
    return x, parts


@every_pattern
def test_outputs_and_gradients_are_those_of_the_masked_product(pattern):
    wrapped, controller, names = build(pattern)
    assert names == ["up", "mid"]
    want, parts = oracle(wrapped, controller, data())
    got = wrapped(data())
    close(got.double(), want)
    got.square().sum().backward()
    want.square().sum().backward()
    layers = [getattr(wrapped.base_model.model, name) for name in ("up", "mid", "down")]
    own = [s["default"].weight for layer in layers for s in (layer.lora_A, layer.lora_B)]
    for parameter, expected in zip(own, parts, strict=True):
        close(parameter.grad.double(), expected.grad, 1e-3)
    assert all(p.grad is None for p in wrapped.parameters() if not p.requires_grad)


@every_pattern
@pytest.mark.parametrize("safe", [False, True])
def test_merged_the_weight_is_sparse_and_the_outputs_are_the_same(pattern, safe):
    wrapped, controller, _ = build(pattern)
    train(wrapped)
    want = wrapped.eval()(data())
    found = masks(controller)
    merged = wrapped.merge_and_unload(safe_merge=safe)
    close(merged(data()), want)
    assert zeros_of(controller)
    assert not hasattr(merged.up, "lora_variant")
    # no warning: nothing has been written that is pruned
    stripped = controller.strip_model(merged)
    close(stripped(data()), want)
    assert all((getattr(stripped, name).weight[~m] == 0).all() for name, m in found.items())
    kept = stripped.up.weight[found["up"]]
    assert (kept != Net().up.weight[found["up"]]).any()


@every_pattern
@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_is_undone(pattern, safe):
    wrapped, controller, _ = build(pattern)
    wrapped.eval()
    want = wrapped(data())
    before = [i.weight.detach().clone() for i in controller.sparsified_module_info]
    wrapped.merge_adapter(safe_merge=safe)
    close(wrapped(data()), want)
    assert zeros_of(controller)
    wrapped.unmerge_adapter()
    close(wrapped(data()), want)
    for info, weight in zip(controller.sparsified_module_info, before, strict=True):
        close(info.weight, weight, 1e-6)
    assert zeros_of(controller)
    if pattern == "skipped blocks":
        assert {i.operand.path for i in controller.sparsified_module_info} == {"block-sparse"}
    train(wrapped)  # no warning either


@every_pattern
def test_a_mask_that_changes_while_adapters_train_is_followed(pattern):
    wrapped, controller, _ = build(pattern)
    train(wrapped)
    before = masks(controller)
    controller.set_sparsity_level(0.3)
    train(wrapped)
    assert any((mask != before[name]).any() for name, mask in masks(controller).items())
    close(wrapped(data()).double(), oracle(wrapped, controller, data())[0])
    want = wrapped.eval()(data())
    close(wrapped.merge_and_unload()(data()), want)
    assert zeros_of(controller)


@pytest.mark.parametrize("pattern", ["unstructured", "skipped blocks"])
def test_several_adapters_are_active_at_once_and_may_be_mixed_in_a_batch(pattern):
    wrapped, controller, _ = build(pattern)
    wrapped.add_adapter(
        "second",
        peft.LoraConfig(target_modules=["up", "mid", "down"], r=2, init_lora_weights=False),
    )
    ts.mask_adapters(wrapped, controller)
    wrapped.base_model.set_adapter(["default", "second"])
    wrapped.eval()
    both = ("default", "second")
    close(wrapped(data()).double(), oracle(wrapped, controller, data(), both)[0])
    wrapped.base_model.set_adapter("second")
    close(wrapped(data()).double(), oracle(wrapped, controller, data(), ["second"])[0])
    layer = wrapped.base_model.model.up
    rows = layer(data(4), adapter_names=["second", "default", "__base__", "second"])
    mask = masks(controller)["up"]
    for row, names in enumerate((["second"], ["default"], [], ["second"])):
        weight, _ = whole(layer, mask, names)
        want = functional.linear(data(4)[row].double(), weight, layer.bias.double())
        close(rows[row].double(), want)
    wrapped.base_model.set_adapter(list(both))
    want = wrapped(data())
    wrapped.merge_adapter()
    close(wrapped(data()), want)
    assert zeros_of(controller)
    wrapped.unmerge_adapter()
    close(wrapped(data()), want)
    wrapped.delete_adapter("second")
    assert "second" not in layer.lora_variant


@every_pattern
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_is_masked_before_it_is_scaled(pattern, dropout):
    wrapped, controller, _ = build(pattern, use_dora=True, lora_dropout=dropout)
    train(wrapped, steps=2)
    x, found = data().double(), masks(controller)
    for name in ("up", "mid", "down"):
        layer = getattr(wrapped.base_model.model, name)
        weight, _ = whole(layer, found.get(name))
        magnitude = layer.lora_magnitude_vector["default"].weight.double()
        norm = weight.norm(dim=1)
        weight = weight * torch.where(norm == 0, 0, magnitude / norm)[:, None]
        bias = layer.get_base_layer().bias
        x = functional.linear(x, weight, None if bias is None else bias.double())
        x = torch.tanh(x) if name != "down" else x
    wrapped.eval()
    want = wrapped(data())
    close(want.double(), x)
    wrapped.merge_adapter()
    close(wrapped(data()), want)
    assert zeros_of(controller)
    wrapped.unmerge_adapter()
    close(wrapped(data()), want)
    close(wrapped.merge_and_unload(safe_merge=True)(data()), want)
    assert zeros_of(controller)


def test_where_nothing_is_pruned_it_is_what_peft_computes_dropout_and_dora_included():
    for options in ({}, {"lora_dropout": 0.3}, {"use_dora": True, "lora_dropout": 0.3}):
        plain = adapted(Net(), **options)
        model = Net()
        controller = control(model)
        controller.set_sparsity_level(0)
        wrapped = adapted(model, **options)
        ts.mask_adapters(wrapped, controller)
        grads = []
        for one in (plain, wrapped):
            torch.manual_seed(3)
            one.train()(data()).square().sum().backward()
            grads.append([p.grad for p in one.parameters() if p.requires_grad])
        for a, b in zip(*grads, strict=True):
            close(a, b, 1e-3)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 16, padding_idx=0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", dilation=2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, ids):
        return self.last(torch.tanh(self.conv(self.table(ids).unflatten(1, (4, -1)))))


@pytest.mark.parametrize("pattern", ["unstructured", "blocks"])
@frozen
def test_embeddings_and_convolutions_are_masked(pattern):
    targets = ["table", "conv", "last"]
    model = adapted(Pictures(), target_modules=targets)
    options = {"schedule": HALF, "targets": "all"}
    block = ts.Block(2, 2) if pattern == "blocks" else ts.Unstructured()
    controller = ts.create_controller(model, ts.MagnitudeSparsityConfig(pattern=block, **options))
    ids = torch.randint(20, (3, 16), generator=torch.Generator().manual_seed(0))
    assert len(ts.mask_adapters(model, controller)) == 3
    train(model, x=ids)
    want = model.eval()(ids)
    merged = model.merge_and_unload()
    close(merged(ids), want)
    assert zeros_of(controller)
    assert (merged.conv.weight != Pictures().conv.weight)[
        controller_mask(controller, "conv")
    ].any()


def controller_mask(controller, name):
    return next(m for path, m in masks(controller).items() if f".{name}." in f"{path}.")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_another_dtype_multiply_in_the_weights(dtype, use_dora):
    wrapped, controller, _ = build("skipped blocks", Net().to(dtype), use_dora=use_dora)
    assert wrapped.base_model.model.up.lora_A["default"].weight.dtype == torch.float32
    x = data().to(dtype)
    train(wrapped, x=x)
    want = wrapped.eval()(x)
    assert want.dtype == dtype
    close(wrapped.merge_and_unload()(x), want, 0.05)
    assert zeros_of(controller)


@every_pattern
def test_under_autocast(pattern):
    wrapped, controller, _ = build(pattern)
    optimizer = optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (wrapped(data()) - 1).square().mean()
        loss.backward()
        optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        want = wrapped.eval()(data())
    close(wrapped.merge_and_unload()(data()), want.float(), 0.05)
    assert zeros_of(controller)


def test_a_bias_of_the_adapter_counts():
    wrapped, _, _ = build(target_modules=["up", "mid"], lora_bias=True)
    with torch.no_grad():
        wrapped.base_model.model.up.lora_B["default"].bias.fill_(0.5)
    want = wrapped.eval()(data())
    close(wrapped.merge_and_unload()(data()), want)


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
@pytest.mark.parametrize("kind", ["rb", "movement"])
def test_learned_masks_see_the_adapter_and_freeze_with_it(kind):
    model = Net()
    config = ts.RBSparsityConfig(seed=0, ignored_scopes=["down"])
    if kind == "movement":
        config = ts.MovementSparsityConfig(
            warmup_start_epoch=1, warmup_end_epoch=2, importance_regularization_factor=0.1,
            steps_per_epoch=3, ignored_scopes=["mid", "down"],
        )  # fmt: skip
    controller = ts.create_controller(model, config)
    wrapped = adapted(model)
    for weight in controller.parameters():
        weight.requires_grad_(True)  # get_peft_model has frozen them
    ts.mask_adapters(wrapped, controller)
    # a gradient of the adapter's part alone reaches the scores
    layer, scores = wrapped.base_model.model.up, controller.parameters()[0]
    (layer(data()) - layer.base_layer(data()).detach()).sum().backward()
    assert scores.grad.any()
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = optim.AdamW(parameters, 0.05)
    for _ in range(3):
        controller.scheduler.epoch_step()
        for _ in range(3):
            controller.scheduler.step()
            optimizer.zero_grad()
            ((wrapped(data()) - 1).square().mean() + controller.loss()).backward()
            optimizer.step()
    controller.freeze()
    want = wrapped.eval()(data())
    merged = wrapped.merge_and_unload()
    close(merged(data()), want)
    assert zeros_of(controller)
    close(controller.strip_model(merged)(data()), want)


# experts: one parameter, of which PEFT makes a sum for the length of a forward pass

EXPERTS = {"stored (out, in)": mixtral, "stored (in, out)": gpt_oss}
every_store = pytest.mark.parametrize("store", EXPERTS)
IDS = torch.randint(128, (2, 8), generator=torch.Generator().manual_seed(1))


def experts(store, pattern="unstructured", mask=True):
    torch.manual_seed(0)
    model = EXPERTS[store]().eval()
    controller = control(
        model, pattern, ignored_scopes=[], target_scopes=["*.gate_up_proj", "*.q_proj"]
    )
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            r=4,
            init_lora_weights=False,
        ),
    )
    if mask:
        names = ts.mask_adapters(wrapped, controller)
        assert sum("gate_up_proj" in name for name in names) == 2
    return wrapped, controller


def logits(model):
    return model(input_ids=IDS).logits


@every_store
@pytest.mark.parametrize("pattern", ["unstructured", "skipped blocks"])
def test_what_is_added_to_experts_is_masked(store, pattern):
    wrapped, controller = experts(store, pattern)
    plain, _ = experts(store, pattern, mask=False)
    # the oracle: by PEFT's own product, in a model whose experts are no parameters
    found = masks(controller)
    sums = {}
    for path, layer in plain.named_modules():
        if type(layer).__name__ == "ParamWrapper":
            name = f"{path.removeprefix('base_model.model.')}.{layer.parameter_name}"
            name = name.replace(".base_layer", "")
            weight = layer.get_base_layer().get_parameter(layer.parameter_name).detach()
            delta = layer.get_delta_weight("default")
            sums[name] = weight + (delta * found[name] if name in found else delta)
        elif hasattr(layer, "base_layer"):
            name = path.removeprefix("base_model.model.")
            delta = layer.get_delta_weight("default")
            sums[f"{name}.weight"] = layer.base_layer.weight.detach() + delta * found[name]
    torch.manual_seed(0)
    bare = EXPERTS[store]().eval()
    kept = {
        n: (p * found[n.removesuffix(".weight")] if n.removesuffix(".weight") in found else p)
        for n, p in bare.named_parameters()
    }
    want = torch.func.functional_call(bare, kept | sums, kwargs={"input_ids": IDS}).logits
    got = logits(wrapped)
    close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    own = {n: p.grad for n, p in wrapped.named_parameters() if "lora" in n}
    theirs = {n: p.grad for n, p in plain.named_parameters() if "lora" in n}
    assert own.keys() == theirs.keys()
    for name, gradient in own.items():
        close(gradient, theirs[name], 1e-3)


@every_store
@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle", "stripped"])
def test_experts_merge_to_zeros_with_the_same_outputs(store, how):
    wrapped, controller = experts(store)
    want, found = logits(wrapped), masks(controller)
    wrapped.merge_adapter()
    close(logits(wrapped), want)
    assert zeros_of(controller)
    wrapped.unmerge_adapter()
    close(logits(wrapped), want)
    if how == "deepcopy":
        wrapped = copy.deepcopy(wrapped)
    elif how == "pickle":
        wrapped = pickle.loads(pickle.dumps(wrapped))
    elif how == "stripped":
        wrapped = controller.strip_model(wrapped)
    close(logits(wrapped), want)
    merged = wrapped.merge_and_unload()
    close(logits(merged), want)
    for name, mask in found.items():
        parameter = merged.get_parameter(name if "experts" in name else f"{name}.weight")
        assert not parameter[~mask].any()


def test_experts_whose_masks_are_learned_are_refused():
    model = mixtral()
    scopes = ["*.gate_up_proj"]
    controller = ts.create_controller(model, ts.RBSparsityConfig(seed=0, target_scopes=scopes))
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
    )
    with pytest.raises(ValueError, match=r"gate_up_proj' must not be learned"):
        ts.mask_adapters(wrapped, controller)
    controller.freeze()
    assert len(ts.mask_adapters(wrapped, controller)) == 2


# copies, strip, files


@every_pattern
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_keeps_the_masks_of_its_time(pattern, how):
    wrapped, controller, _ = build(pattern)
    train(wrapped)
    want, found = wrapped.eval()(data()), masks(controller)
    twin = copy.deepcopy(wrapped) if how == "deepcopy" else pickle.loads(pickle.dumps(wrapped))
    controller.set_sparsity_level(0.2)
    assert not torch.equal(wrapped(data()), want)
    close(twin(data()), want)
    twin = copy.deepcopy(twin)
    merged = twin.merge_and_unload()
    close(merged(data()), want)
    assert all((getattr(merged, name).weight[~m] == 0).all() for name, m in found.items())


@every_pattern
@pytest.mark.parametrize("do_copy", [False, True])
def test_stripped_with_adapters_on_the_outputs_stay_and_merge_to_zeros(pattern, do_copy):
    wrapped, controller, _ = build(pattern)
    train(wrapped)
    want, found = wrapped.eval()(data()), masks(controller)
    stripped = controller.strip_model(wrapped, do_copy=do_copy)
    close(stripped(data()), want)
    train(stripped)
    want = stripped.eval()(data())
    merged = stripped.merge_and_unload()
    close(merged(data()), want)
    assert all((getattr(merged, name).weight[~m] == 0).all() for name, m in found.items())


@frozen
def test_saved_adapters_load_on_the_sparse_model_of_another_process(tmp_path):
    wrapped, controller, _ = build()
    train(wrapped)
    want = wrapped.eval()(data())
    wrapped.save_pretrained(tmp_path)
    with wrapped.disable_adapter():
        sparse = controller.strip_model(wrapped, do_copy=True).unload()
    controller = ts.create_controller(sparse, ts.ConstSparsityConfig(ignored_scopes=["down"]))
    loaded = peft.PeftModel.from_pretrained(sparse, tmp_path).eval()
    assert not torch.allclose(loaded(data()), want, atol=1e-3)
    ts.mask_adapters(loaded, controller)
    close(loaded(data()), want)


@pytest.mark.parametrize("pattern", ["unstructured", "skipped blocks"])
def test_a_compiled_model_is_one_graph_and_follows_an_update(pattern):
    wrapped, controller, _ = build(pattern)
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=True)
    for level in (0.5, 0.8):
        controller.set_sparsity_level(level)
        grads = []
        for model in (compiled, wrapped):
            wrapped.zero_grad()
            model(data()).square().sum().backward()
            grads.append([p.grad.clone() for p in wrapped.parameters() if p.requires_grad])
        close(compiled(data()), wrapped(data()))
        for a, b in zip(*grads, strict=True):
            close(a, b)


def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass():
    model = nn.Sequential(nn.Linear(256, 256))
    controller = ts.create_controller(model, ts.MagnitudeSparsityConfig(schedule=HALF))
    wrapped = adapted(model, target_modules=["0"])
    ts.mask_adapters(wrapped, controller)
    sizes = []

    def note(tensor):
        if not tensor.is_leaf:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        wrapped(data(5, 256).requires_grad_()).sum().backward()
    assert max(sizes, default=0) <= 5 * 256


# what is refused


def lora(model):
    return model.base_model.model.up


def test_without_adapters_or_without_ours_a_line_says_what_was_expected():
    model = Net()
    controller = control(model)
    with pytest.raises(ValueError, match=r"model must have adapters, got a Net.*get_peft_model"):
        ts.mask_adapters(model, controller)
    other = adapted(Net())
    with pytest.raises(ValueError, match=r"under the controller's masks.*another model"):
        ts.mask_adapters(other, controller)
    assert not lora(other).lora_variant
    with pytest.raises(TypeError, match=r"controller must be what create_controller"):
        ts.mask_adapters(other, None)
    wrapped = adapted(model, target_modules=["down"])
    with pytest.raises(ValueError, match=r"on other layers"):
        ts.mask_adapters(wrapped, controller)


KINDS = {
    "HRA": (
        lambda: peft.HRAConfig(target_modules=["up", "down"], r=4),
        r"'base_model.*\.up'.*hra",
    ),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=["up"], r=4), r"loha.*by LoRA"),
    "AdaLora": (
        lambda: peft.AdaLoraConfig(target_modules=["up"], init_r=4, total_step=10),
        r"adalora",
    ),
    "MiCA": (
        lambda: peft.LoraConfig(target_modules=["up"], r=4, init_lora_weights="mica"),
        r"plain LoRA.*MiCA",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mask_cannot_follow_is_refused_by_name(kind):
    config, match = KINDS[kind]
    model = Net()
    controller = control(model)
    wrapped = peft.get_peft_model(model, config())
    with pytest.raises(ValueError, match=match):
        ts.mask_adapters(wrapped, controller)


def test_one_that_is_refused_leaves_the_others_as_they_were():
    model = Net()
    controller = control(model, ignored_scopes=[])
    wrapped = adapted(model, target_modules=["up"])
    wrapped.add_adapter("dora", peft.LoraConfig(target_modules=["mid", "up"], use_dora=True))
    wrapped.base_model.merge_adapter(["default"])
    with pytest.raises(ValueError, match=r"unmerged.*'default'.*unmerge_adapter"):
        ts.mask_adapters(wrapped, controller)
    layers = (wrapped.base_model.model.up, wrapped.base_model.model.mid)
    assert [sorted(layer.lora_variant) for layer in layers] == [["dora"], ["dora"]]
    assert type(layers[1].lora_variant["dora"]).__name__ == "DoraLinearVariant"


def test_ia3_only_scales_and_is_left_alone():
    model = Net()
    controller = control(model)
    wrapped = peft.get_peft_model(
        model, peft.IA3Config(target_modules=["up", "mid"], feedforward_modules=[])
    )
    assert ts.mask_adapters(wrapped, controller) == ["up", "mid"]
    train(wrapped)
    want = wrapped.eval()(data())
    close(wrapped.merge_and_unload()(data()), want)
    assert zeros_of(controller)


def test_attention_of_torch_and_grouped_convolutions_are_refused():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "b": nn.Conv1d(8, 8, 3, groups=2)})
    controller = ts.create_controller(model, ts.MagnitudeSparsityConfig(schedule=HALF))
    wrapped = adapted(model, target_modules=["a"])
    with pytest.raises(ValueError, match=r"MultiheadAttention"):
        ts.mask_adapters(wrapped, controller)
    with pytest.warns(UserWarning, match="groups"):
        wrapped = adapted(wrapped.unload(), target_modules=["b"])
    with pytest.raises(ValueError, match=r"one group.*groups=2"):
        ts.mask_adapters(wrapped, controller)
