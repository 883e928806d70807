"""FSDP2 under torchrun: prune the whole model, shard it, train under the fixed masks, save it.

Run it as ``torchrun --nproc-per-node 2 fsdp2.py``, on CPUs or GPUs; alone it is one process. Masks
that change on shards are not there yet; fixed ones hold.
"""

import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import triton_sparsity as ts

alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
for name, value in alone.items():
    os.environ.setdefault(name, value)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = distributed.get_rank(), distributed.get_world_size()

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)
).to(device)
inputs = torch.randn(512, 64, device=device)
targets = torch.tanh(inputs @ torch.randn(64, 64, device=device) / 8)

# every rank prunes alike; the first rank's masks count
config = ts.ConstSparsityConfig(pattern=ts.Block(16, 16))
controller = ts.prune_obs(model, inputs.split(64), config, level=0.75)
for layer in (model[0], model[2], model[4]):
    fully_shard(layer)
fully_shard(model)

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(3):
    controller.scheduler.epoch_step()
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        controller.scheduler.step()
        loss = (model(x[rank::ranks]) - y[rank::ranks]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        print(f"epoch {epoch}: level {controller.compression_rate:.2f}, loss {loss:.4f}")

options = StateDictOptions(full_state_dict=True, cpu_offload=True)
whole = get_model_state_dict(model, options=options)
if rank == 0:
    zeros = sum(int((tensor == 0).sum()) for name, tensor in whole.items() if "weight" in name)
    print(f"{zeros} weights are exactly zero in the state dict of a plain model")
    torch.save(whole, Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "model.pt")
distributed.destroy_process_group()
