"""Tiny models in folders as Hugging Face saves them, with tokenizers, and data for them."""

import json

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tiny_models import FAMILIES, LAYERS, SIZES

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[EOS]")
WORDS = tuple(f"w{i}" for i in range(100))
CAUSAL = ("Llama", "Qwen3", "Mixtral", "Qwen3-MoE", "gpt-oss", "GPT-2")


def tokenizer(family="Llama"):
    words = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    if family.startswith("BERT"):
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)


def t5_encoder():
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128}
    return hf.T5EncoderModel(hf.T5Config(**sizes, num_layers=2, num_heads=4))


def bert(cls):
    return lambda: cls(hf.BertConfig(**SIZES, **LAYERS))


MODELS = FAMILIES | {
    "BERT-masked": bert(hf.BertForMaskedLM),
    "BERT-bare": bert(hf.BertModel),
    "T5-encoder": t5_encoder,
}


def save_model(family, folder, **how):
    """Write a model's folder, as ``save_pretrained(**how)`` does."""
    torch.manual_seed(0)
    MODELS[family]().save_pretrained(folder, **how)
    if family == "ViT":
        size = {"height": 32, "width": 32}
        processor = {"image_processor_type": "ViTImageProcessor", "size": size}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    else:
        tokenizer(family).save_pretrained(folder)
    return folder


def words(count, seed=0):
    """Return words of which each follows from the one before it, but for every sixteenth."""
    generator = torch.Generator().manual_seed(seed)
    following = torch.randint(0, 100, (100,), generator=generator).tolist()
    found = []
    for i in range(count):
        if i % 16 == 0:
            place = int(torch.randint(0, 100, (1,), generator=generator))
        found.append(WORDS[place])
        place = following[place]
    return found


def save_text(file, count=1000):
    file.write_text(" ".join(words(count)))
    return file


def save_rows(file, count=48):
    """Write JSON lines of texts, labelled by whether their first word is even."""
    rows = [words(12, seed) for seed in range(count)]
    lines = [{"text": " ".join(row), "label": int(row[0][1:]) % 2} for row in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def save_images(folder, count=12):
    """Write images of two classes, one of them brighter."""
    generator = np.random.default_rng(0)
    for label, light in (("dark", 0), ("light", 120)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = (generator.random((36, 40, 3)) * 120 + light).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder
