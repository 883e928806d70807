"""FSDP2 under torchrun: a model made on the meta device, sharded, pruned, saved and exported.

Run it as ``torchrun --nproc-per-node 2 fsdp2.py``, on CPUs or GPUs; alone it is one process. A
second run goes on from what the first has saved, on any number of processes.
"""

import io
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import triton_sparsity as ts

for name, value in {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": 0,
}.items():
    os.environ.setdefault(name, str(value))
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = distributed.get_rank(), distributed.get_world_size()
folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "fsdp2_checkpoints"


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)
    )


# sharded before it has any memory; the first rank alone reads the weights
with torch.device("meta"):
    model = build()
for layer in (model[0], model[2], model[4]):
    fully_shard(layer)
fully_shard(model)
model.to_empty(device=device)
torch.manual_seed(0)
whole = build().state_dict() if rank == 0 else {}
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
set_model_state_dict(model, whole, options=options)

config = ts.MagnitudeSparsityConfig(
    pattern=ts.Block(16, 16),
    schedule=ts.PolynomialSchedule(target_level=0.75, target_epoch=4, freeze_epoch=4),
)
# by default products skip pruned blocks where that is faster, which it is in larger layers
controller = ts.create_controller(model, config, dispatch="sparse")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

start = 0
if saves := sorted(path.parent for path in folder.glob("*/.metadata")):
    weights, moments = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": moments, "sparsity": b""}
    checkpoint.load(saved, checkpoint_id=saves[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    controller.load_state(torch.load(io.BytesIO(saved["sparsity"])))
    start = controller.scheduler.current_epoch + 1
    print(f"rank {rank} of {ranks} goes on in epoch {start}\n", end="")

inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
targets = torch.tanh(inputs @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) / 8)
for epoch in range(start, start + 3):
    controller.scheduler.epoch_step()
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        x, y = (tensor[rank::ranks].to(device) for tensor in (x, y))
        controller.scheduler.step()
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        path = controller.sparsified_module_info[0].operand.path
        level = controller.current_sparsity_level
        print(f"epoch {epoch}: level {level:.2f}, loss {loss:.4f}, products {path}")

# every rank must take part; the masks' state is one process's, and goes by any number of ranks
state = io.BytesIO()
torch.save(controller.get_state(), state)
weights, moments = get_state_dict(model, optimizer)
saved = {"model": weights, "optimizer": moments, "sparsity": state.getvalue()}
checkpoint.save(saved, checkpoint_id=folder / f"after_epoch_{start + 2:03d}")

if start:  # the second run has come to the target
    controller.strip(do_copy=False)
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        zeros = sum(int((tensor == 0).sum()) for name, tensor in whole.items() if "weight" in name)
        print(f"{zeros} weights are exactly zero in the state dict of a plain model")
        torch.save(whole, folder.parent / "model.pt")
distributed.destroy_process_group()
