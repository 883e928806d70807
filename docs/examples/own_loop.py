"""A training loop of one's own: the controller, its scheduler, and a stripped model at the end."""

import torch
from torch import nn

import triton_sparsity as ts

torch.manual_seed(0)
inputs = torch.randn(512, 64)
targets = torch.tanh(inputs @ torch.randn(64, 64) / 8)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
controller = ts.create_controller(
    model,
    ts.MagnitudeSparsityConfig(
        pattern=ts.Block(16, 16),
        # slowly at the end, as Zhu and Gupta have it; frozen once it is there
        schedule=ts.PolynomialSchedule(
            target_level=0.75, target_epoch=6, freeze_epoch=6, power=3.0
        ),
    ),
)
for epoch in range(10):
    controller.scheduler.epoch_step()
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        controller.scheduler.step()
        loss = (model(x) - y).square().mean() + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: level {controller.current_sparsity_level:.2f}, loss {loss:.4f}")

print(controller.statistics().to_str())
stripped = controller.strip()
zeros = sum(int((layer.weight == 0).sum()) for layer in (stripped[0], stripped[2]))
print(f"{zeros} of {2 * 64 * 256} weights are exactly zero")
assert zeros == round(0.75 * 2 * 64) * 256
