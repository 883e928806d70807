"""Which weights are masked: the rule on models of every family, scopes, experts, what is said."""

import logging

import pytest
import torch
import transformers as hf
from torch import nn

import triton_sparsity as ts

# routers of mixtures are no linear layers in transformers
pytestmark = [
    pytest.mark.filterwarnings("ignore:left dense, because their modules"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]
HALF = ts.PolynomialSchedule(initial_level=0.5, target_level=0.5)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, **SIZES, **HEADS, **options))


def mixtral():
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=64, num_local_experts=4, num_experts_per_tok=2, **SIZES, **HEADS
        )
    )


def gpt_oss():
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            vocab_size=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
            layer_types=["full_attention", "full_attention"],
            **SIZES | {"intermediate_size": 48},
            **HEADS,
        )
    )


def gpt2():
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    )


def bert():
    return hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=64, num_attention_heads=2, max_position_embeddings=16, **SIZES)
    )


def vit():
    return hf.ViTForImageClassification(
        hf.ViTConfig(image_size=16, patch_size=4, num_attention_heads=2, **SIZES)
    )


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.lstm = nn.LSTM(16, 16, 2)
        self.head = nn.Linear(16, 64)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0])


# model, the weights of one block, how many blocks, what is left dense by the rule
TRANSFORMERS = {
    "llama": (
        llama,
        "model.layers.{}",
        [
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        ],
        ["model.embed_tokens", "lm_head"],
    ),
    "mixtral": (
        mixtral,
        "model.layers.{}",
        [
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
        ],
        ["model.embed_tokens", "lm_head"],
    ),
    "gpt_oss": (
        gpt_oss,
        "model.layers.{}",
        [
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
        ],
        ["model.embed_tokens", "lm_head"],
    ),
    "gpt2": (
        gpt2,
        "transformer.h.{}",
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        ["transformer.wte", "transformer.wpe"],
    ),
    "bert": (
        bert,
        "bert.encoder.layer.{}",
        [
            *(f"attention.self.{name}" for name in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        ],
        ["bert.embeddings.word_embeddings", "bert.pooler.dense", "classifier"],
    ),
}


def targets(model, **options):
    options = {"schedule": HALF} | options
    controller = ts.create_controller(model, ts.MagnitudeSparsityConfig(**options))
    return [info.module_node_name for info in controller.sparsified_module_info]


def in_blocks(kind):
    _, path, names, _ = TRANSFORMERS[kind]
    return {f"{path.format(block)}.{name}" for block in range(2) for name in names}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="triton_sparsity")

    def lines():
        return [r.getMessage() for r in caplog.records if "under masks" in r.getMessage()]

    return lines


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_linear_layers_of_transformer_blocks_are_taken(kind, said):
    make, _, _, left = TRANSFORMERS[kind]
    model = make()
    found = targets(model)
    assert in_blocks(kind) <= set(found)
    # a router is a linear layer of its block, where it is one
    assert all("router" in name or "mlp.gate" in name for name in set(found) - in_blocks(kind))
    assert not set(left) & set(found)
    (line,) = said()
    assert line.startswith(f"{len(found)} weights under masks, ")
    assert "% of the parameters" in line
    assert left[0] in line


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_all_takes_embeddings_positions_and_heads_too(kind):
    make, _, _, left = TRANSFORMERS[kind]
    found = targets(make(), targets="all")
    assert in_blocks(kind) | set(left) <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("make", [vit, t5])
def test_patches_position_tables_and_heads_are_left_dense(make):
    model = make()
    found = targets(model)
    taken = [model.get_submodule(name) for name in found]
    assert all(type(module) is nn.Linear for module in taken)
    assert not {"classifier", "lm_head", "shared"} & set(found)
    blocks = ("encoder.layer", "layers.", "block.")
    assert all(any(block in name for block in blocks) for name in found)
    inside = sum(
        isinstance(module, nn.Linear) and any(block in name for block in blocks)
        for name, module in model.named_modules()
    )
    assert len(found) == inside


@pytest.mark.parametrize("tied", [False, True])
def test_the_share_is_of_the_parameters_and_tied_weights_count_once(tied, said):
    model = llama(tie_word_embeddings=tied)
    targets(model)
    masked = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    total = sum(p.numel() for p in model.parameters())
    (line,) = said()
    assert f"14 weights under masks, {masked / total:.1%} of the parameters" in line
    assert "model.embed_tokens" in line


def test_models_without_transformer_blocks_are_taken_whole(said):
    assert targets(cnn()) == ["0", "4"]
    assert targets(Recurrent()) == [
        "embedding",
        *(f"lstm.weight_{kind}h_l{layer}" for layer in (0, 1) for kind in "ih"),
        "head",
    ]
    assert [line.split("; ")[1:] for line in said()] == [[], []]
    assert targets(cnn(), targets="linear") == ["4"]
    assert targets(Recurrent(), targets="linear") == ["head"]


def test_a_scope_takes_what_it_names_whatever_it_is(said):
    assert targets(llama(), target_scopes=["lm_head"]) == ["lm_head"]
    assert targets(llama(), target_scopes=["*embed_tokens", "*.0.*down_proj"]) == [
        "model.embed_tokens",
        "model.layers.0.mlp.down_proj",
    ]
    assert set(targets(llama(), ignored_scopes=["model.layers.0"])) == {
        name for name in in_blocks("llama") if ".1." in name
    }
    assert "left dense" not in said()[0]


def test_a_scope_and_linear_together_take_what_both_allow():
    assert targets(llama(), target_scopes=["model"], targets="linear") == sorted_like(
        llama(), in_blocks("llama")
    )


def sorted_like(model, names):
    return [name for name, _ in model.named_modules() if name in names]


# experts


class PlainExperts(nn.Module):
    """Stored (experts, out, in), as Mixtral's, or (experts, in, out), as gpt-oss's."""

    def __init__(self, transposed, count=3, hidden=16, inner=24):
        super().__init__()
        shapes = [(count, 2 * inner, hidden), (count, hidden, inner)]
        if transposed:
            shapes = [(e, i, o) for e, o, i in shapes]
        self.gate_up_proj = nn.Parameter(torch.randn(shapes[0]))
        self.down_proj = nn.Parameter(torch.randn(shapes[1]))
        self.transposed = transposed

    def forward(self, x):
        up, down = self.gate_up_proj, self.down_proj
        if not self.transposed:
            up, down = up.mT, down.mT
        gate, up = (x @ up).chunk(2, -1)
        return (gate.sigmoid() * up) @ down


class Mixture(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        torch.manual_seed(0)
        self.experts = PlainExperts(transposed)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.experts(x).mean(0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", [ts.Block(4, 8), ts.NM(2, 4), ts.Unstructured()], ids=str)
def test_experts_are_matrices_along_whose_inputs_groups_lie(pattern, transposed):
    model = Mixture(transposed)
    controller = ts.create_controller(
        model, ts.MagnitudeSparsityConfig(pattern=pattern, schedule=HALF)
    )
    up, down, _ = controller.sparsified_module_info
    assert [i.module_node_name for i in (up, down)] == [
        "experts.gate_up_proj",
        "experts.down_proj",
    ]
    for info in (up, down):
        mask = info.operand.binary_mask
        assert torch.equal(info.weight != 0, mask)
        mask = mask.mT if transposed else mask  # (experts, out, in)
        rows, cols = (1, 4) if isinstance(pattern, ts.NM) else (pattern.rows, pattern.cols)
        groups = mask.unflatten(2, (-1, cols)).unflatten(1, (-1, rows)).transpose(2, 3)
        kept = groups.flatten(3).sum(3)
        if isinstance(pattern, ts.NM):
            assert (kept == 2).all()
        else:
            assert set(kept.unique().tolist()) == {0, rows * cols}
    x = torch.randn(3, 5, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        for info in (up, down):
            assert not info.weight[~info.operand.binary_mask].any()
            assert not info.weight.grad[~info.operand.binary_mask].any()
    torch.testing.assert_close(controller.strip()(x), model(x))


def test_blocks_that_would_reach_from_expert_to_expert_are_refused():
    with pytest.raises(ValueError, match=r"out_features of 'experts.down_proj' .* by 32 for"):
        targets(Mixture(False), pattern=ts.Block(32, 8), target_scopes=["experts.down_proj"])
    with pytest.raises(ValueError, match=r"in_features of 'experts.gate_up_proj' .* by 32 for"):
        targets(Mixture(True), pattern=ts.Block(1, 32))


def test_experts_are_addressed_by_globs_parents_and_overrides():
    assert targets(Mixture(False), target_scopes=["experts"]) == [
        "experts.gate_up_proj",
        "experts.down_proj",
    ]
    assert targets(Mixture(False), target_scopes=["*.down_proj"]) == ["experts.down_proj"]
    assert targets(Mixture(False), ignored_scopes=["experts"]) == ["head"]
    override = ts.Override(scope="experts.*", pattern=ts.Block(8, 8), maximum_level=0.5)
    controller = ts.create_controller(
        Mixture(True), ts.MagnitudeSparsityConfig(schedule=HALF, overrides=(override,))
    )
    assert [str(i.operand.pattern) for i in controller.sparsified_module_info] == [
        "block 8x8",
        "block 8x8",
        "unstructured",
    ]
    for info in controller.sparsified_module_info[:2]:
        assert 0 < info.operand.pruned_groups() <= info.operand.groups / 2 + 1


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("pattern", [ts.Block(8, 8), ts.NM(2, 4)], ids=str)
def test_a_mixture_of_experts_trains_and_strips_to_the_same(make, pattern):
    torch.manual_seed(0)
    model = make()
    controller = ts.create_controller(
        model, ts.MagnitudeSparsityConfig(pattern=pattern, schedule=HALF)
    )
    ids = torch.randint(64, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    experts = [i for i in controller.sparsified_module_info if "experts" in i.module_node_name]
    assert len(experts) == 4
    for info in controller.sparsified_module_info:
        assert not info.weight[~info.operand.binary_mask].any()
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(controller.strip()(input_ids=ids).logits, want)


# adapters and zeros


def adapted(**options):
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | options
    return peft.get_peft_model(llama(), peft.LoraConfig(**options))


@pytest.mark.filterwarnings("ignore:masking parameters that are frozen")
@pytest.mark.parametrize("chosen", ["linear", "all"])
def test_adapters_are_left_out_and_said_to_be(chosen, said):
    found = targets(adapted(), targets=chosen)
    assert not any("lora" in name for name in found)
    assert sum("base_layer" in name for name in found) == 4
    assert "adapters" in said()[0]
    assert "lora_A" in said()[0]


@pytest.mark.filterwarnings("ignore:masking parameters that are frozen")
def test_adapters_are_taken_where_a_scope_names_them_and_not_with_their_layer():
    assert not any("lora" in name for name in targets(adapted(), target_scopes=["*.q_proj"]))
    found = targets(adapted(), target_scopes=["*.lora_A.default"])
    assert len(found) == 4
    assert all("lora_A" in name for name in found)


def test_weights_that_are_zero_throughout_are_left_out_unless_named(said):
    def zeroed():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        nn.init.zeros_(model[1].weight)
        return model

    assert targets(zeroed()) == ["0"]
    assert "1 zero throughout: 1" in said()[0]
    unlimited = {"weight_importance": "abs", "maximum_level": 1.0}
    with pytest.warns(UserWarning, match="pruned to nothing"):
        assert targets(zeroed(), target_scopes=["0", "1"], **unlimited) == ["0", "1"]
    alone = nn.Linear(8, 8)
    nn.init.zeros_(alone.weight)
    with pytest.raises(ValueError, match="zero throughout"):
        targets(alone)


# what is wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "everything"}, "targets"),
        ({"target_scopes": ["model.layers.7"]}, "model.layers.7"),
        ({"ignored_scopes": ["lmhead"]}, "lmhead"),
        ({"ignored_scopes": ["model", "lm_head"]}, "no weight to sparsify is left"),
        ({"pattern": ts.Block(128, 8)}, "larger than the weight of 'model.layers.0.self_attn.q"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        targets(llama(), **options)


def test_a_second_controller_on_a_weight_is_refused_and_changes_nothing():
    model = llama()
    controller = ts.create_controller(model, ts.MagnitudeSparsityConfig(schedule=HALF))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"q_proj' is under the masks of another controller"):
        targets(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert targets(model, target_scopes=["lm_head"]) == ["lm_head"]
    controller.strip_model(model)
    assert len(targets(model)) == 14


def test_scopes_are_paths_in_the_model_whatever_wraps_it():
    class Wrapper(nn.Module):  # as DistributedDataParallel
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    for scope in ("1", "module.1", "{re}^1$"):
        config = ts.MagnitudeSparsityConfig(
            schedule=HALF,
            target_scopes=[scope, "2"],
            ignored_scopes=["2"],
            overrides=[ts.Override(scope=scope, pattern=ts.Block(2, 2))],
        )
        (info,) = ts.create_controller(Wrapper(), config).sparsified_module_info
        assert info.module_node_name == "module.1"
        assert info.operand.pattern == ts.Block(2, 2)
    with pytest.raises(ValueError, match="target_scopes must match a module each, got '3'"):
        ts.create_controller(
            Wrapper(), ts.MagnitudeSparsityConfig(schedule=HALF, target_scopes=["3"])
        )
