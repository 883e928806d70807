"""Adapters of PEFT, beside and merged into sparse weights; resized embeddings."""

import copy

import pytest
import torch
from torch import nn, optim
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import triton_sparsity as ts
from tiny_models import mixtral
from triton_sparsity.controller.masks.module import MaskedModule

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

HALF = ts.PolynomialSchedule(initial_level=0.5, target_level=0.5)
PATTERNS = {"unstructured": ts.Unstructured(), "skipped blocks": ts.Block(16, 16)}
both_paths = pytest.mark.parametrize("pattern", PATTERNS)
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(1))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def build(pattern, model=None, **options):
    model = llama() if model is None else model
    options = {"schedule": HALF, "pattern": PATTERNS[pattern]} | options
    controller = ts.create_controller(
        model,
        ts.MagnitudeSparsityConfig(**options),
        dispatch="sparse" if pattern == "skipped blocks" else "auto",
    )
    return model, controller


def masks(controller):
    return {i.module_node_name: i.operand.binary_mask for i in controller.sparsified_module_info}


def zeros_of(controller):
    return all(
        not i.weight[~i.operand.binary_mask].any() for i in controller.sparsified_module_info
    )


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def train(model, steps=2, lr=0.05):
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def adapted(model, **options):
    options = {"init_lora_weights": False, "r": 4, "target_modules": TARGETS} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def merged_logits(model):
    model.merge_adapter()
    return logits(model)


@both_paths
@pytest.mark.parametrize("first", ["controller", "adapter"])
@pytest.mark.filterwarnings("ignore:masking parameters that are frozen")
def test_a_merged_adapter_has_its_effect_in_evaluation(pattern, first):
    model = llama()
    if first == "controller":
        _, controller = build(pattern, model)
        wrapped = adapted(model)
    else:
        wrapped = adapted(model)
        _, controller = build(pattern, wrapped)
    wrapped.eval()
    unmerged = logits(wrapped)
    with wrapped.disable_adapter():
        plain = logits(wrapped)
    assert not torch.allclose(unmerged, plain, atol=1e-2)
    if pattern == "skipped blocks":
        with pytest.warns(UserWarning, match="products are dense until they are zero again"):
            merged = merged_logits(wrapped)
    else:
        merged = merged_logits(wrapped)
    close(merged, unmerged)
    wrapped.unmerge_adapter()
    close(logits(wrapped), unmerged)
    with wrapped.disable_adapter():
        close(logits(wrapped), plain)
    if pattern == "skipped blocks":
        paths = {i.operand.path for i in controller.sparsified_module_info}
        assert paths == {"block-sparse"}


@both_paths
def test_what_was_merged_into_pruned_elements_is_dropped_at_strip_with_a_count(pattern):
    model, controller = build(pattern)
    wrapped = adapted(model).eval()
    wrapped.merge_adapter()
    found = masks(controller)
    written = sum(
        int(i.weight[~found[i.module_node_name]].count_nonzero())
        for i in controller.sparsified_module_info
    )
    kept = {
        i.module_node_name: torch.where(found[i.module_node_name], i.weight, 0.0)
        for i in controller.sparsified_module_info
    }
    with pytest.warns(UserWarning, match=f"strip_model: {written} pruned elements"):
        stripped = controller.strip_model(wrapped)
    assert not any(isinstance(m, MaskedModule) for m in stripped.modules())
    for info in controller.sparsified_module_info:
        assert torch.equal(info.weight, kept[info.module_node_name])


@both_paths
@pytest.mark.filterwarnings("ignore:.*products are dense until")
def test_merged_and_unloaded_an_adapter_has_its_effect_in_evaluation(pattern):
    wrapped = adapted(build(pattern)[0]).eval()
    want = logits(wrapped)
    close(logits(wrapped.merge_and_unload()), want)


@both_paths
def test_a_merge_that_training_goes_on_with_is_dropped_with_a_count(pattern):
    model, controller = build(pattern)
    wrapped = adapted(model)
    wrapped.merge_adapter()
    with pytest.warns(UserWarning, match="pruned elements ha"):
        wrapped.train()(input_ids=IDS, labels=IDS)
    assert zeros_of(controller)


@both_paths
def test_merge_and_unload_leaves_a_controlled_model(pattern):
    model, controller = build(pattern)
    merged = adapted(model).merge_and_unload().requires_grad_(True)
    with pytest.warns(UserWarning, match="pruned elements ha"):
        train(merged)
    assert zeros_of(controller)
    close(logits(controller.strip_model(merged).eval()), logits(model.eval()))


@both_paths
@pytest.mark.parametrize("merge_first", [False, True])
@pytest.mark.filterwarnings("ignore:.*pruned elements of")
def test_adapters_train_and_the_base_stays(pattern, merge_first):
    model, controller = build(pattern)
    wrapped = adapted(model)
    if merge_first:
        merged_logits(wrapped.eval())
        wrapped.unmerge_adapter()
    infos = controller.sparsified_module_info
    before = [info.weight.detach().clone() for info in infos]
    train(wrapped)
    assert not any(info.weight.requires_grad for info in infos)
    assert all(torch.equal(i.weight, weight) for i, weight in zip(infos, before, strict=True))
    assert zeros_of(controller)


KINDS = {
    "LoRA": lambda: peft.LoraConfig(target_modules=TARGETS, r=4),
    "DoRA": lambda: peft.LoraConfig(target_modules=TARGETS, r=4, use_dora=True),
    "rsLoRA": lambda: peft.LoraConfig(target_modules=TARGETS, r=4, use_rslora=True),
    "PiSSA": lambda: peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights="pissa"),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=TARGETS, init_r=4, total_step=10),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=TARGETS, r=4),
    "LoKr": lambda: peft.LoKrConfig(target_modules=TARGETS, r=4),
    "OFT": lambda: peft.OFTConfig(
        target_modules=TARGETS, oft_block_size=4, use_cayley_neumann=False
    ),
    "HRA": lambda: peft.HRAConfig(target_modules=TARGETS, r=4),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj", "v_proj"], r=4),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=16),
    "RandLoRA": lambda: peft.RandLoraConfig(target_modules=TARGETS, r=4),
    "VB-LoRA": lambda: peft.VBLoRAConfig(
        target_modules=TARGETS, r=2, num_vectors=16, vector_length=16
    ),
}


@both_paths
@pytest.mark.parametrize("first", ["controller", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*pruned elements")
@pytest.mark.filterwarnings("ignore:masking parameters that are frozen")
def test_every_kind_of_adapter_trains_over_zeros_and_strips_to_the_same(kind, first, pattern):
    model = llama()
    if first == "controller":
        _, controller = build(pattern, model)
        wrapped = peft.get_peft_model(model, KINDS[kind]())
    else:
        wrapped = peft.get_peft_model(model, KINDS[kind]())
        _, controller = build(pattern, wrapped)
    assert len(controller.sparsified_module_info) == 7
    train(wrapped)
    assert zeros_of(controller)
    want = logits(wrapped.eval())
    stripped = controller.strip_model(copy.deepcopy(wrapped))
    assert not any(isinstance(m, MaskedModule) for m in stripped.modules())
    close(logits(stripped), want)
    wrapped.merge_adapter()
    close(logits(wrapped), want)


BESIDE = KINDS | {
    "prompts": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32
    ),
    "prefixes": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32,
        prefix_projection=True,
    ),
    "tokens": lambda: peft.LoraConfig(
        target_modules=TARGETS, r=4, trainable_token_indices=[1, 2]
    ),
    "LoRA of embeddings": lambda: peft.LoraConfig(target_modules=[*TARGETS, "embed_tokens"], r=4),
}  # fmt: skip


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.filterwarnings("ignore:masking parameters that are frozen")
def test_adapters_of_no_kind_are_targets_unless_named(kind):
    wrapped = peft.get_peft_model(llama(), BESIDE[kind]())
    own = {id(parameter) for parameter in wrapped.parameters() if parameter.requires_grad}
    assert own
    _, controller = build("unstructured", wrapped, targets="all")
    infos = controller.sparsified_module_info
    assert not any(id(info.weight) in own for info in infos)
    # the table that tokens are trained beside is PEFT's too
    assert len(infos) == (8 if kind == "tokens" else 9)


def test_an_adapter_that_is_named_is_a_target():
    wrapped = peft.get_peft_model(llama(), KINDS["LoRA"]())
    _, controller = build("unstructured", wrapped, target_scopes=["*.lora_A.default"])
    names = [info.module_node_name for info in controller.sparsified_module_info]
    assert len(names) == 3
    assert all(name.endswith("lora_A.default") for name in names)
    wrapped = peft.get_peft_model(llama(), BESIDE["P-tuning"]())
    _, controller = build("unstructured", wrapped, target_scopes=["prompt_encoder.*.mlp_head.*"])
    assert len(controller.sparsified_module_info) == 3


@both_paths
@pytest.mark.filterwarnings("ignore:.*products are dense until")
def test_what_is_merged_is_saved_as_it_stands_until_strip_drops_it_with_the_number(
    pattern, tmp_path
):
    model, controller = build(pattern)
    wrapped = adapted(model)
    train(wrapped)
    want = logits(wrapped.eval())
    merged = wrapped.merge_and_unload()
    close(logits(merged), want)
    found = masks(controller)
    infos = controller.sparsified_module_info
    written = sum(int(i.weight[~found[i.module_node_name]].count_nonzero()) for i in infos)
    assert written > 1000
    merged.save_pretrained(tmp_path)
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), want)
    close(logits(copy.deepcopy(merged)), want)
    with pytest.warns(UserWarning, match=f"strip_model: {written} pruned elements"):
        stripped = controller.strip_model(merged)
    assert zeros_of(controller)
    assert not torch.allclose(logits(stripped), want, atol=1e-3)


def test_modules_that_peft_saves_beside_are_adapters():
    model = llama()
    wrapped = adapted(model, modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="masking parameters that are frozen"):
        _, controller = build("unstructured", wrapped, targets="all")
    names = [i.module_node_name for i in controller.sparsified_module_info]
    assert not any("lora" in name or "modules_to_save" in name for name in names)
    assert all(
        ".base_layer" in n for n in names if n.split(".base_layer")[0].endswith(tuple(TARGETS))
    )


# embeddings of another size


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0,
        )
    )  # fmt: skip


def test_embeddings_that_are_left_dense_may_be_resized():
    model, controller = build("unstructured", gpt2())
    model.resize_token_embeddings(70)
    train(model)
    assert zeros_of(controller)
    controller.set_sparsity_level(0.6)
    stripped = controller.strip()
    assert stripped.transformer.wte.weight.shape[0] == 70


@pytest.mark.parametrize("call", ["set_sparsity_level", "forward", "strip"])
def test_masked_embeddings_that_are_resized_are_named_with_the_remedy(call):
    model, controller = build("unstructured", gpt2(), targets="all")
    found = masks(controller)
    calls = {
        "set_sparsity_level": lambda: controller.set_sparsity_level(0.6),
        "forward": lambda: train(model),
        "strip": controller.strip,
    }
    with pytest.raises((ValueError, RuntimeError), match=r"wte'.*create_controller"):  # noqa: PT012
        model.resize_token_embeddings(70)  # may be refused at once
        calls[call]()
    assert all(torch.equal(mask, found[name]) for name, mask in masks(controller).items())


def test_a_model_of_accelerate_trains_under_its_masks():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    _, controller = build("unstructured", model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = optim.AdamW(model.parameters(), 0.05)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    for _ in range(4):
        with accelerator.accumulate(wrapped):
            controller.scheduler.step()
            accelerator.backward(wrapped(torch.randn(3, 32)).square().sum())
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            prepared.step()
            prepared.zero_grad()
        assert zeros_of(controller)
    stripped = controller.strip_model(accelerator.unwrap_model(wrapped))
    assert (stripped[0].weight == 0).any()


@pytest.mark.parametrize("pattern", ["unstructured", "skipped blocks"])
@pytest.mark.filterwarnings("ignore:.*pruned elements")
def test_pruned_values_outlast_an_adapter_of_experts(pattern):
    """PEFT takes the parameter out and puts it back at every forward pass."""
    torch.manual_seed(0)
    model, controller = build(pattern, mixtral(), ignored_scopes=["*mlp.gate"])
    experts = [i for i in controller.sparsified_module_info if "gate_up" in i.module_node_name]
    before = [info.operand.values.clone() for info in experts]
    parameters = [info.weight for info in experts]
    wrapped = adapted(model, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    train(wrapped)
    logits(wrapped.eval())
    assert len(experts) == 2
    for info, parameter, values in zip(experts, parameters, before, strict=True):
        assert info.weight is parameter
        assert torch.equal(info.operand.values, values)
        assert values.any()
    assert zeros_of(controller)
    controller.set_sparsity_level(0)
    assert all(info.weight.count_nonzero() == info.weight.numel() for info in experts)


def test_a_new_parameter_in_the_place_of_one_that_is_gone_is_a_new_one():
    model, controller = build("unstructured")
    layer = controller.sparsified_module_info[0].module
    for _ in range(20):  # it may be at the same address
        del layer.weight
        layer.weight = nn.Parameter(torch.ones(64, 64))
        assert zeros_of(controller)
        train(model, steps=1)
        assert zeros_of(controller)
