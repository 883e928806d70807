"""Every kind of module computes what its dense class computes on folded weights, in every mode."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import triton_sparsity as ts
from triton_sparsity.controller.masks.module import MaskedModule
from triton_sparsity.kernels import block_sparse_linear as product
from triton_sparsity.kernels import dispatch
from triton_sparsity.kernels.launch import INTERPRET


class OwnForward(nn.Linear):
    """A subclass with a forward of its own, as users write them."""

    def forward(self, x):
        return x @ self.weight.T * 2 + self.bias


class Keyed(nn.Module):
    """Adapts a module whose forward takes or gives more than one tensor."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x):
        return self.call(self.inner, x)


def _attend(m, x):
    return m(x, x, x, need_weights=False)[0]


def _first(m, x):
    return m(x)[0]


def _second_step(m, x):
    return m(x, m(x))[0]


def _tokens(*shape):
    return torch.randint(0, 24, shape, generator=torch.Generator().manual_seed(1))


def _randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


CASES = {
    "Linear": (lambda: nn.Linear(20, 12), lambda: _randn(3, 20)),
    "OwnForward": (lambda: OwnForward(20, 12), lambda: _randn(3, 20)),
    "Conv1d": (lambda: nn.Conv1d(8, 12, 4, groups=2), lambda: _randn(2, 8, 9)),
    "Conv2d": (
        lambda: nn.Conv2d(4, 12, 3, padding_mode="circular", padding=1),
        lambda: _randn(2, 4, 6, 6),
    ),
    "Conv3d": (lambda: nn.Conv3d(4, 12, 2), lambda: _randn(2, 4, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(12, 6, 3, stride=2), lambda: _randn(2, 12, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(12, 6, 3), lambda: _randn(2, 12, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(12, 6, 2), lambda: _randn(2, 12, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(24, 12, padding_idx=3), lambda: _tokens(3, 5)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(24, 12), lambda: _tokens(3, 5)),
    "Conv1D": (lambda: Conv1D(12, 20), lambda: _randn(3, 20)),
    "MultiheadAttention": (
        lambda: Keyed(nn.MultiheadAttention(16, 4, batch_first=True), _attend),
        lambda: _randn(2, 5, 16),
    ),
    "MultiheadAttention, separate": (
        lambda: Keyed(nn.MultiheadAttention(16, 4, kdim=16, vdim=16, batch_first=True), _attend),
        lambda: _randn(2, 5, 16),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2
        ),
        lambda: _randn(2, 5, 16),
    ),
    "LSTM": (
        lambda: Keyed(nn.LSTM(16, 12, 2, bidirectional=True), _first),
        lambda: _randn(5, 2, 16),
    ),
    "GRU": (lambda: Keyed(nn.GRU(16, 12), _first), lambda: _randn(5, 2, 16)),
    "LSTMCell": (lambda: Keyed(nn.LSTMCell(16, 12), _second_step), lambda: _randn(5, 16)),
    "RNNCell": (lambda: Keyed(nn.RNNCell(16, 12), lambda m, x: m(x, m(x))), lambda: _randn(5, 16)),
}
PATTERNS = [ts.Unstructured(), ts.Block(4, 4), ts.Block(2, 8)]
CONFIG = {
    pattern: ts.MagnitudeSparsityConfig(
        pattern=pattern, schedule=ts.PolynomialSchedule(initial_level=0.5, target_level=0.7)
    )
    for pattern in PATTERNS
}


def build(kind):
    torch.manual_seed(0)
    make, inputs = CASES[kind]
    return make(), inputs()


def folded(dense, controller):
    """The dense model with zeros written where the masks are, by hand."""
    names = {id(p): name for name, p in controller.model.named_parameters()}
    dense = copy.deepcopy(dense)
    parameters = dict(dense.named_parameters())
    with torch.no_grad():
        for info in controller.sparsified_module_info:
            parameters[names[id(info.weight)]][~info.operand.binary_mask] = 0
    return dense


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", CASES)
def test_outputs_are_those_of_the_folded_dense_module(kind, pattern):
    model, x = build(kind)
    dense = copy.deepcopy(model)
    controller = ts.create_controller(model, CONFIG[pattern])
    assert 0 < controller.mask_level() < 1
    want = folded(dense, controller)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), want.train(mode)(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want(x), rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), want(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CASES)
def test_pruned_weights_get_no_gradient_and_kept_ones_get_theirs(kind):
    model, x = build(kind)
    dense = copy.deepcopy(model)
    controller = ts.create_controller(model, CONFIG[PATTERNS[1]])
    want = folded(dense, controller)
    model(x).square().sum().backward()
    want(x).square().sum().backward()
    names = {id(p): name for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in want.named_parameters()}
    for info in controller.sparsified_module_info:
        mask, grad = info.operand.binary_mask, info.weight.grad
        assert (grad[~mask] == 0).all()
        assert grad[mask].any()
        torch.testing.assert_close(
            grad[mask], gradients[names[id(info.weight)]][mask], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", CASES)
def test_parameters_keys_and_classes_stay(kind):
    model, _ = build(kind)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    classes = [type(m) for m in model.modules()]
    controller = ts.create_controller(model, CONFIG[PATTERNS[0]])
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    # no block of these patterns is skipped
    assert [type(m) for m in model.modules()] == classes
    stripped = controller.strip()
    assert list(stripped.state_dict()) == keys
    assert [type(m) for m in stripped.modules()] == classes


@pytest.mark.parametrize("kind", CASES)
def test_strip_gives_zeros_and_the_same_outputs(kind):
    model, x = build(kind)
    controller = ts.create_controller(model, CONFIG[PATTERNS[1]])
    infos = controller.sparsified_module_info
    before = [(info.operand.binary_mask, info.weight.detach().clone()) for info in infos]
    with torch.no_grad():
        want = model.eval()(x)
    stripped = controller.strip(do_copy=False)
    assert stripped is model
    for info, (mask, weight) in zip(infos, before, strict=True):
        assert torch.equal(info.weight, torch.where(mask, weight, 0.0))
    with torch.no_grad():
        torch.testing.assert_close(stripped(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["Linear", "OwnForward", "Conv1D", "Embedding", "TransformerEncoder"]
)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_plain_models_with_zeros_of_their_own(kind, how):
    model, x = build(kind)
    classes = [type(m) for m in model.modules()]
    controller = ts.create_controller(model, CONFIG[PATTERNS[0]])
    want = model(x)
    twin = how(model)
    assert [type(m) for m in twin.modules()] == classes
    controller.set_sparsity_level(0.0)
    torch.testing.assert_close(twin(x), want)
    assert not torch.allclose(model(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_follow_a_change_of_dtype_and_keep_it(pattern, dtype):
    model, x = build("Linear")
    controller = ts.create_controller(model, CONFIG[pattern])
    mask = controller.sparsified_module_info[0].operand.binary_mask
    model.to(dtype)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert model.weight.grad.dtype == dtype
    assert (model.weight.grad[~mask] == 0).all()
    controller.set_sparsity_level(0.3)


@pytest.mark.parametrize(
    "kind", ["Linear", "Conv2d", "Embedding", "Conv1D", "OwnForward", "MultiheadAttention"]
)
def test_compiles_into_one_graph_that_sees_mask_updates(kind):
    model, x = build(kind)
    controller = ts.create_controller(model, CONFIG[PATTERNS[1]])
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for level in (0.5, 0.25, 0.75):
        controller.set_sparsity_level(level)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


def test_a_compiled_training_step_matches_eager():
    model, x = build("Linear")
    ts.create_controller(model, CONFIG[PATTERNS[1]])
    torch._dynamo.reset()
    model(x).square().sum().backward()
    want, model.weight.grad = model.weight.grad, None
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, want)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_compiled_model_moves_between_paths_in_one_graph(kind):
    model = nn.Sequential(nn.Linear(512, 512) if kind == "Linear" else Conv1D(512, 512))
    controller = ts.create_controller(
        model, ts.MagnitudeSparsityConfig(pattern=ts.Block(32, 32), weight_importance="abs")
    )
    operand = controller.sparsified_module_info[0].operand
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    x, paths = _randn(3, 512), []
    for level in (0.0, 0.2, 0.99, 0.3):
        controller.set_sparsity_level(level)
        paths.append(operand.path)
        compiled(x).square().sum().backward()
        got, model[0].weight.grad = model[0].weight.grad, None
        model(x).square().sum().backward()
        want, model[0].weight.grad = model[0].weight.grad, None
        torch.testing.assert_close(got, want)
        assert (got == 0).float().mean() == pytest.approx(level, abs=0.01)
    assert paths == ["dense", "dense", "block-sparse", "dense"]
    assert len(graphs) == 1


def test_a_projection_that_attention_reads_itself_has_no_lists():
    model = nn.MultiheadAttention(64, 4)
    ts.create_controller(
        model, ts.MagnitudeSparsityConfig(pattern=ts.Block(16, 16)), dispatch="sparse"
    )
    assert type(model.out_proj) is type(nn.MultiheadAttention(64, 4).out_proj)


def test_tied_weights_have_one_mask_and_count_once():
    model = nn.Sequential(nn.Embedding(24, 16), nn.Linear(16, 24, bias=False))
    model[1].weight = model[0].weight
    controller = ts.create_controller(model, CONFIG[PATTERNS[0]])
    assert [i.module_node_name for i in controller.sparsified_module_info] == ["0"]
    mask = controller.sparsified_module_info[0].operand.binary_mask
    model(_tokens(4, 3)).sum().backward()
    assert (model[0].weight.grad[~mask] == 0).all()
    stripped = controller.strip()
    assert stripped[0].weight is stripped[1].weight
    assert (stripped[0].weight[~mask] == 0).all()


@pytest.mark.skipif(INTERPRET, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_takes_the_paths_of_its_own_dtype(compiled, monkeypatch):
    sides, block, place = (512, 512), ts.Block(64, 64), torch.device("cpu")
    for dtype, limit in ((torch.bfloat16, 0.0), (torch.float32, 1.0), (torch.float16, 1.0)):
        kind = dispatch.kind_of(sides, block, dtype, place)
        monkeypatch.setitem(dispatch.measured, kind, dispatch.BreakEven(limit, limit, limit))
    model = nn.Linear(*sides)
    config = ts.MagnitudeSparsityConfig(pattern=block, schedule=ts.PolynomialSchedule())
    controller = ts.create_controller(model, config)
    controller.set_sparsity_level(0.8)
    (info,) = controller.sparsified_module_info
    taken, run = [], product._paths
    monkeypatch.setattr(product, "_paths", lambda *a: (taken.append(found := run(*a)), found)[1])
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    for dtype, skips in ((torch.bfloat16, False), (None, True), (torch.float16, True)):
        taken.clear()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            forward(torch.randn(4, 512))
        assert any(any(paths) for paths in taken) is skips
        if not compiled:
            assert info.operand.product.paths.forward is skips


def test_autocast_runs_masked_weights_in_low_precision():
    model, x = build("Linear")
    controller = ts.create_controller(model, CONFIG[PATTERNS[1]])
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    want = folded(model, controller)
    torch.testing.assert_close(y.float(), want(x), rtol=2e-2, atol=2e-2)


def test_a_dense_checkpoint_loads_into_a_sparse_model():
    model, x = build("Linear")
    checkpoint = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    controller = ts.create_controller(model, CONFIG[PATTERNS[0]])
    with torch.no_grad():
        model.eval()(x)
        model.load_state_dict(checkpoint)
        mask = controller.sparsified_module_info[0].operand.binary_mask
        want = x @ (checkpoint["weight"] * mask).T + checkpoint["bias"]
        torch.testing.assert_close(model(x), want)


def test_lora_over_a_sparse_base_trains_and_merges():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))
    controller = ts.create_controller(model, CONFIG[PATTERNS[0]])
    mask = controller.sparsified_module_info[0].operand.binary_mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
        lora(_randn(3, 20)).sum().backward()
        merged = lora.merge_and_unload()
    controller.strip_model(merged)
    assert (merged[0].weight[~mask] == 0).all()
    assert not any(isinstance(m, MaskedModule) for m in merged.modules())
