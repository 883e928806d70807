"""Mixture of experts: a fused weight is a matrix an expert; attention goes by rules of its own."""

import torch
import transformers

import triton_sparsity as ts

torch.manual_seed(0)
model = transformers.MixtralForCausalLM(
    transformers.MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
)
# what no scope names stays dense: the routers, embeddings and the head
controller = ts.create_controller(
    model,
    [
        ts.MagnitudeSparsityConfig(
            pattern=ts.Block(16, 16),
            schedule=ts.PolynomialSchedule(target_level=0.8, target_epoch=2),
            target_scopes=["*.experts"],
        ),
        ts.MagnitudeSparsityConfig(
            schedule=ts.PolynomialSchedule(target_level=0.5, target_epoch=2),
            target_scopes=["*.self_attn"],
        ),
    ],
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
for _ in range(3):
    controller.scheduler.epoch_step()
    for _ in range(5):
        controller.scheduler.step()
        ids = torch.randint(0, 128, (4, 16))
        optimizer.zero_grad()
        (model(input_ids=ids, labels=ids).loss + controller.loss()).backward()
        optimizer.step()

print(controller.statistics().to_str())
stripped = controller.strip()
experts = stripped.get_parameter("model.layers.0.mlp.experts.down_proj")
print(f"experts {tuple(experts.shape)}: {(experts == 0).float().mean():.1%} are zero")
query = stripped.get_parameter("model.layers.0.self_attn.q_proj.weight")
assert 0.3 < (query == 0).float().mean() < 0.7
assert (experts == 0).float().mean() > 0.7
