"""Masks that are fixed before the model is sharded hold on the shards."""

import subprocess
import sys

import pytest
import torch

RANK = """
import sys
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
import triton_sparsity as ts

rank, folder = int(sys.argv[1]), sys.argv[2]
if rank >= 0:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 5))
schedule = ts.PolynomialSchedule(target_level=0.5, target_epoch=0, freeze_epoch=0)
controller = ts.create_controller(model, ts.MagnitudeSparsityConfig(schedule=schedule))
controller.scheduler.epoch_step()
if rank >= 0:
    fully_shard(model[0])
    fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
for step in range(4):
    controller.scheduler.step()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
if rank >= 0:
    try:
        controller.compression_rate = 0.6
    except RuntimeError as error:
        assert "must not be sharded" in str(error)
weights = [info.weight.full_tensor() if rank >= 0 else info.weight
           for info in controller.sparsified_module_info]
found = [(w.detach(), i.operand.binary_mask)
         for w, i in zip(weights, controller.sparsified_module_info)]
torch.save(found, f"{folder}/{rank}")
if rank >= 0:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch lacks gloo")
def test_zeros_hold_under_fsdp2_and_weights_are_those_of_one_process(tmp_path, monkeypatch):
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path)])
        for rank in (0, 1)
    ]
    monkeypatch.setattr(sys, "argv", ["", "-1", str(tmp_path)])
    exec(RANK, {})
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    one = torch.load(tmp_path / "-1")
    for rank in (0, 1):
        for (weight, mask), (wanted, wanted_mask) in zip(
            torch.load(tmp_path / str(rank)), one, strict=True
        ):
            assert torch.equal(mask, wanted_mask)
            assert (weight[~mask] == 0).all()
            torch.testing.assert_close(weight, wanted)
