import json

import pytest
import torch

from triton_sparsity.bench.studies import memory
from triton_sparsity.bench.studies.memory import FINE, LIMIT, cases, peak_bytes, table_of
from triton_sparsity.kernels import bits, block_score, prune_rows, search_torch, semi_structured

SIDE = 256
# those whose values take as much as a float32 weight does
WIDE = ["magnitude, random", "SET, snip", "RigL, normed gradient", "movement, to a level"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A chunk is as little beside these weights as it is beside those of a model."""
    for module, names in (
        (bits, ["CHUNK"]),
        (block_score, ["CPU_CHUNK"]),
        (prune_rows, ["_CHUNK"]),
        (search_torch, ["_CHUNK", "_KEPT", "_SAMPLE"]),
        (semi_structured, ["CHUNK"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 2**12)


@pytest.mark.filterwarnings("ignore")
def test_an_update_allocates_at_most_6_bytes_a_weight():
    runs = [(case, pattern, torch.bfloat16) for case in cases() for pattern in case.patterns]
    runs += [(case, FINE, torch.float32) for case in cases() if case.name in WIDE]
    peaks = peak_bytes(runs, SIDE)
    # and the chunks: beside weights so small half a byte
    above = {
        (case.name, str(pattern), dtype): peak
        for (case, pattern, dtype), peak in zip(runs, peaks, strict=True)
        if not 0 < peak <= LIMIT + 0.5
    }
    assert above == {}


def test_what_passes_the_limit_makes_the_run_fail(tmp_path, monkeypatch, capsys):
    peaks = {"float32": 1.0, "bfloat16": 6.5}
    row = {"algorithm": "SET", "pattern": "unstructured", "peaks": peaks}
    monkeypatch.setattr(memory, "measure", lambda side: iter([row, row | {"pattern": "nm:2:4"}]))
    assert not memory.run(tmp_path)
    record = json.loads((tmp_path / "memory.json").read_bytes())
    assert record["limit"] == LIMIT
    headings, lines = table_of(record)
    assert headings[2:] == ("float32", "bfloat16")
    assert lines == [("SET", "unstructured", "1.00", "6.50"), ("", "nm:2:4", "1.00", "6.50")]
    assert "6.50" in capsys.readouterr().out
    peaks["bfloat16"] = 6.0
    assert memory.run(tmp_path)
