"""Tensor parallelism, and FSDP2 beside it, under torchrun: pruned, trained, and exported.

Run it as ``torchrun --nproc-per-node 2 tensor_parallel.py``, on CPUs or GPUs: two ranks share each
layer; of four, two pairs share the batch. Alone it is one process.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import triton_sparsity as ts

for name, value in {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": 0,
}.items():
    os.environ.setdefault(name, str(value))
kind = "cuda" if torch.cuda.is_available() else "cpu"
if kind == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
rank, ranks = distributed.get_rank(), distributed.get_world_size()
pairs = ranks // 2 or 1
mesh = init_device_mesh(kind, (pairs, ranks // pairs), mesh_dim_names=("data", "tensor"))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


torch.manual_seed(0)
model = nn.Sequential(FeedForward(), FeedForward(), nn.Linear(64, 64)).to(kind)
# rows of `up` and columns of `down` lie on the ranks of "tensor"; the last layer they all have
for layer in (model[0], model[1]):
    parallelize_module(layer, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
fully_shard(model, mesh=mesh["data"])

config = ts.MagnitudeSparsityConfig(
    pattern=ts.Block(16, 16),
    schedule=ts.PolynomialSchedule(target_level=0.75, target_epoch=4, freeze_epoch=4),
)
# by default products skip pruned blocks where that is faster, which it is in larger layers
controller = ts.create_controller(model, config, dispatch="sparse")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)

inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
targets = torch.tanh(inputs @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) / 8)
pair = mesh["data"].get_local_rank()
for epoch in range(6):
    controller.scheduler.epoch_step()
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        x, y = (tensor[pair::pairs].to(kind) for tensor in (x, y))
        controller.scheduler.step()
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        path = controller.sparsified_module_info[0].operand.path
        level = controller.current_sparsity_level
        print(f"epoch {epoch}: level {level:.2f}, loss {loss:.4f}, products {path}")

controller.strip(do_copy=False)
whole = get_model_state_dict(
    model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
)
if rank == 0:
    zeros = sum(int((tensor == 0).sum()) for name, tensor in whole.items() if "weight" in name)
    print(f"{zeros} weights are exactly zero in the state dict of a plain model")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    torch.save(whole, folder / "model.pt")
distributed.destroy_process_group()
