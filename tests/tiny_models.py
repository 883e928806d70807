"""Tiny models of ten families, and batches for them."""

import torch
import transformers as hf

SIZES = {"vocab_size": 128, "max_position_embeddings": 64}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, **WIDTHS}
GROUPED = {"num_key_value_heads": 2, **SIZES, **LAYERS}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}


def llama(**changes):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **changes))


def qwen3():
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16))


def mixtral():
    config = hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def qwen3_moe():
    options = {"moe_intermediate_size": 64, "num_experts": 4, "decoder_sparse_step": 1}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, **options))


def gpt_oss():
    attention = {"layer_types": ["full_attention"] * 2}
    sizes = GROUPED | {"intermediate_size": 64}
    config = hf.GptOssConfig(**sizes, **EXPERTS, **attention, num_local_experts=4)
    return hf.GptOssForCausalLM(config)


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, **LAYERS))


def gpt2():
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))


def t5():
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128}
    config = hf.T5Config(**sizes, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(config)


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**LAYERS, image_size=32, patch_size=8))


def whisper():
    sizes = {"vocab_size": 128, "d_model": 64, "num_mel_bins": 16}
    sides = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    positions = {"max_source_positions": 32, "max_target_positions": 32}
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**sizes, **sides, **ends, **positions)
    )


FAMILIES = {
    "Llama": llama,
    "Qwen3": qwen3,
    "Mixtral": mixtral,
    "Qwen3-MoE": qwen3_moe,
    "gpt-oss": gpt_oss,
    "BERT": bert,
    "GPT-2": gpt2,
    "T5": t5,
    "ViT": vit,
    "Whisper": whisper,
}


class Examples(torch.utils.data.Dataset):
    """Sequences in which a token follows from the one before it, in the shape of a family."""

    def __init__(self, family="Llama", count=64):
        self.family, self.count = family, count
        generator = torch.Generator().manual_seed(1)
        self.next = torch.randint(3, 128, (128,), generator=generator)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = [int(torch.randint(3, 128, (1,), generator=generator))]
        while len(tokens) < 16:
            tokens.append(int(self.next[tokens[-1]]))
        ids = torch.tensor(tokens)
        match self.family:
            case "BERT":
                return {"input_ids": ids, "labels": ids[0] % 2}
            case "ViT":
                image = torch.randn(3, 32, 32, generator=generator)
                return {"pixel_values": image, "labels": torch.tensor(index % 2)}
            case "Whisper":
                sound = torch.randn(16, 64, generator=generator)
                return {"input_features": sound, "labels": ids}
        return {"input_ids": ids, "labels": ids}
