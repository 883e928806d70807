import json

import pytest

from triton_sparsity.bench import demo

QUICK = {
    "task": "digits",
    "dense_epochs": 2,
    "epochs": 2,
    "steps_per_epoch": 4,
    "batch_size": 8,
    "threads": 1,
    "pattern": "block:16",  # digits has no 64-blocks to spare
}


@pytest.mark.slow
def test_the_demo_prunes_one_dense_model_in_each_way(tmp_path):
    # what an earlier demo left is replaced
    for _, name, _ in demo.RUNS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "dense.safetensors").write_bytes(b"stale")
    reports = demo.run(tmp_path, QUICK)
    assert json.loads((tmp_path / "report.json").read_text()).keys() == reports.keys()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    weights = {(tmp_path / name / "dense.safetensors").read_bytes() for _, name, _ in demo.RUNS}
    assert len(weights) == 1
    assert weights != {b"stale"}

    rows = demo.timed_rows(tmp_path, reports, seconds=0.05)
    assert [*rows] == ["dense", "dense, trained on", "80 % in 64x64 blocks"]
    assert [row["level"] for row in rows.values()] == pytest.approx([0, 0, 0.8], abs=4e-3)
    # of all models in turn, not of the runs one after the other
    for row, plain in zip(rows.values(), demo.rows(reports).values(), strict=True):
        assert 0 < row["seconds_per_step"] != plain["seconds_per_step"]
    sizes = [row["compressed_bytes"] for row in rows.values()]
    assert sizes[2] < 0.6 * min(sizes[:2])
