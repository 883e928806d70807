"""LoRA on a sparse model: what the adapters add is masked, so that the merged model is sparse.

pip install 'triton-sparsity[peft]' transformers
"""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import triton_sparsity as ts

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)

# any controller will do: here blocks of 16 are pruned at once, to 75 %
controller = ts.create_controller(
    model,
    ts.MagnitudeSparsityConfig(
        pattern=ts.Block(16, 16),
        schedule=ts.PolynomialSchedule(initial_level=0.75, target_level=0.75),
    ),
)
lora = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=8, lora_alpha=16)
model = peft.get_peft_model(model, lora)
masked = ts.mask_adapters(model, controller)
print(f"{len(masked)} weights have adapters that are masked")

ids = torch.randint(64, (8, 32))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(30):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2d}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    before = model(input_ids=ids).logits
    merged = controller.strip_model(model.merge_and_unload())
    after = merged(input_ids=ids).logits

weight = merged.model.layers[0].mlp.down_proj.weight
print(f"merged: {(weight == 0).float().mean():.0%} of down_proj is zero")
print(f"largest difference of the outputs: {(after - before).abs().max():.1e}")
torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
assert (weight == 0).float().mean() >= 0.75
