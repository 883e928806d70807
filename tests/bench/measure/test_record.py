import subprocess
import sys

import pytest

from triton_sparsity.bench.measure.record import BENCH, ROOT, Row, command, commit, dump, load


def test_the_columns_of_the_csv_last():
    # columns may be added at the end only
    names = list(Row.__dataclass_fields__)
    assert names[:32] == [
        "operation", "shape", "dtype", "pattern", "level", "mask", "status", "detail", "median_s",
        "p20_s", "p80_s", "runs", "host_s", "bytes", "flops", "gb_per_s", "tflop_per_s",
        "of_copy", "of_cache", "of_gemm", "bound", "bound_s", "of_bound", "dense_s", "speedup",
        "efficiency", "dense_p20_s", "dense_p80_s", "low_s", "high_s", "dense_low_s",
        "dense_high_s",
    ]  # fmt: skip


def test_the_commit_is_that_of_the_checkout():
    found = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip("not in a checkout")
    short = commit().removesuffix("-dirty")
    assert len(short) == 12
    assert found.stdout.startswith(short)


def test_a_command_can_be_typed_again(monkeypatch):
    words = ["/a/bin/triton-sparsity", "x", "--only", "two words", "-o", "/a/b/c"]
    monkeypatch.setattr(sys, "argv", words)
    assert command() == "triton-sparsity x --only 'two words' -o c"
    monkeypatch.setattr(sys, "argv", [str(BENCH / "studies" / "compare.py"), "--only", "Strip"])
    assert command() == "python -m triton_sparsity.bench.studies.compare --only Strip"


def test_a_record_is_one_line_an_entry_and_reads_back(tmp_path):
    path = tmp_path / "record.json"
    record = {"schema": 1, "rows": [{"a": 1.23456789, "b": None}, {"a": 2}], "empty": []}
    path.write_bytes(dump(record))
    assert load(path) == {"schema": 1, "rows": [{"a": 1.2346, "b": None}, {"a": 2}], "empty": []}
    assert len(path.read_text().splitlines()) == 8
    for damage in (b"", b"[]", b'{"schema": 99}', b"{}"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=str(path)):
            load(path)


def test_the_commit_is_the_checkouts():
    found = commit()
    assert found is None or len(found.removesuffix("-dirty")) == 12
