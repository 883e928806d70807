"""``transformers.Trainer``: one callback; the saved folder loads without this package."""

import tempfile

import torch
import transformers

import triton_sparsity as ts

torch.manual_seed(0)
successor = torch.randint(0, 128, (128,))


class Chains(torch.utils.data.Dataset):
    """Sequences in which each token follows from the one before it."""

    def __len__(self):
        return 256

    def __getitem__(self, index):
        tokens = [index % 128]
        while len(tokens) < 16:
            tokens.append(int(successor[tokens[-1]]))
        ids = torch.tensor(tokens)
        return {"input_ids": ids, "labels": ids}


model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
)
schedule = ts.PolynomialSchedule(
    target_level=0.7, target_epoch=3, power=3.0, update_per_optimizer_step=True
)
config = ts.MagnitudeSparsityConfig(pattern=ts.Block(16, 16), schedule=schedule)

with tempfile.TemporaryDirectory() as folder:
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=5,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Chains(),
        callbacks=[ts.TransformersCallback(config)],
    )
    trainer.train()
    trainer.save_model(f"{folder}/sparse")
    again = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/sparse")

weight = again.model.layers[0].mlp.up_proj.weight
print(f"loss {trainer.state.log_history[-2]['loss']:.3f}")
print(f"{(weight == 0).float().mean():.1%} of a weight are zero")
assert (weight == 0).float().mean() > 0.6
