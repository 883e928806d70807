"""Resume a run within an epoch, bit for bit, from the states of model, optimiser, controller."""

import tempfile

import torch
from torch import nn

import triton_sparsity as ts

CONFIG = ts.RigLConfig(level=0.8, t_end=30, delta_t=5, pattern=ts.Block(8, 8))


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(model, optimizer, controller, steps):
    for step in steps:
        if step % 10 == 0:  # an epoch begins; not after a resume within one
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        ((model(x) - x).square().mean() + controller.loss()).backward()
        optimizer.step()


model, optimizer = build()
controller = ts.create_controller(model, CONFIG)
train(model, optimizer, controller, range(17))
with tempfile.NamedTemporaryFile() as file:
    parts = {"model": model, "optimizer": optimizer, "controller": controller}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file.name)
    train(model, optimizer, controller, range(17, 40))

    # another process, later
    saved = torch.load(file.name, weights_only=True)
    other, other_optimizer = build()
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    other_controller = ts.create_controller(other, CONFIG, state=saved["controller"])
    train(other, other_optimizer, other_controller, range(17, 40))

same = map(torch.equal, model.state_dict().values(), other.state_dict().values())
assert all(same)
print(f"bit for bit the same at level {controller.compression_rate:.2f}")
