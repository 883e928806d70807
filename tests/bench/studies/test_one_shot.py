"""The study of one shot, on an encoder of two layers."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from triton_sparsity.bench.studies import one_shot


def tiny_task():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(16, 16, generator=generator) for _ in range(2)]
    mix = torch.randn(16, 16, generator=generator)

    def build():
        model = nn.Sequential()
        model.encoder = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        for layer, weight in zip(model.encoder[::2], weights, strict=True):
            layer.weight.data, layer.bias.data = weight.clone(), torch.zeros(16)
        return model

    def batch(size, *stream):
        x = torch.randn(size, 16, generator=torch.Generator().manual_seed(stream[-1])) @ mix
        return x, build()(x).detach()

    return SimpleNamespace(
        name="tiny",
        data={"sha256": "none"},
        build=build,
        batch=batch,
        held_out=[batch(64, 99)],
        score=lambda outputs, targets: functional.cosine_similarity(outputs, targets),
    )


def test_the_surgeon_keeps_more_than_wanda_and_the_record_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(one_shot, "load_task", lambda name: tiny_task())
    output = tmp_path / "record.json"
    options = ["--patterns=block:4,unstructured", "--levels=0.5", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", ["one_shot", *options])
    one_shot.main()
    record = json.loads(output.read_text())
    assert record["sentences"] == 512
    found = {(f["pattern"], f["method"]): f for f in record["figures"]}
    assert len(found) == 4
    for pattern in ("block:4", "unstructured"):
        assert found[pattern, "obs"]["level"] == pytest.approx(0.5)
        assert found[pattern, "obs"]["cosine"] > found[pattern, "wanda"]["cosine"]
    assert "cosine" in capsys.readouterr().out
