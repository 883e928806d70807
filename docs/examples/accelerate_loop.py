"""A loop with Accelerate: gradients accumulated over micro-batches, a checkpoint within an epoch.

What pruning adds are the lines marked with (*). pip install 'triton-sparsity[accelerate]'
"""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import triton_sparsity as ts

EPOCHS, ACCUMULATE = 8, 2
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "checkpoint"

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64))
schedule = ts.PolynomialSchedule(target_level=0.8, target_epoch=2, freeze_epoch=3)
config = ts.MagnitudeSparsityConfig(pattern=ts.Block(16, 16), schedule=schedule)
controller = ts.create_controller(model, config)  # (*)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
x = torch.randn(256, 8) @ torch.randn(8, 64)
# a generator of its own: so a run that is resumed within an epoch has the same random numbers
data = DataLoader(TensorDataset(x), batch_size=16, generator=torch.Generator())
model, optimizer, data = accelerator.prepare(model, optimizer, data)
accelerator.register_for_checkpointing(controller)  # (*)

done = 0  # micro-batches of this epoch
if folder.exists():
    accelerator.load_state(folder)
    done = int((folder / "micro_batches").read_text())
    print(f"resumed in epoch {controller.scheduler.current_epoch} after {done} micro-batches")

for epoch in range(max(controller.scheduler.current_epoch, 0), EPOCHS):
    if epoch > controller.scheduler.current_epoch:  # an epoch that is resumed has begun
        controller.scheduler.epoch_step()  # (*)
    for i, (x,) in enumerate(accelerator.skip_first_batches(data, done), done):
        if i % ACCUMULATE == 0:
            controller.scheduler.step()  # (*)
        with accelerator.accumulate(model):
            loss = (model(x) - x).square().mean() + controller.loss()  # (*) the second term
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if epoch == 1 and i == 7 and not folder.exists():
            accelerator.save_state(folder)
            (folder / "micro_batches").write_text(str(i + 1))
    done = 0
    print(f"epoch {epoch}: loss {loss.item():.3f}, {controller.mask_level():.0%} pruned")

model = controller.strip_model(accelerator.unwrap_model(model))  # (*)
print(f"{(model[0].weight == 0).float().mean():.0%} of the first weight is zero")
print(f"checksum {sum(p.double().sum().item() for p in model.parameters()):.12f}")
