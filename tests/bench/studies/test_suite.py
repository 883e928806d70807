import sys

import pytest

from triton_sparsity.bench import profile
from triton_sparsity.bench.measure.record import load
from triton_sparsity.bench.studies import compare, memory, suite


@pytest.mark.slow
def test_the_suite_records_the_profile_and_the_comparison(tmp_path, monkeypatch, capsys):
    ran = []

    def run(place, threads, folder):
        ran.append((place, threads, folder))
        return True

    plan = profile.make_plan(
        shapes="16x64x64",
        patterns=["block:32"],
        levels=[0.5],
        operations=["apply"],
        budget=0.001,
        passes=1,
    )
    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(memory, "run", lambda folder: ran.append(folder) or True)
    monkeypatch.setattr(profile, "make_plan", lambda **_: plan)
    monkeypatch.setattr(suite, "profiler_overhead", lambda device, pairs: 0.004)
    monkeypatch.setattr(
        sys, "argv", ["suite", "--device", "cpu", "--threads", "1", "--output", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as caught:
        suite.main()
    assert caught.value.code == 0
    assert ran == [(compare.CPU, 1, tmp_path), tmp_path]
    record = load(tmp_path / "profile.json")
    assert [row["status"] for row in record["rows"]] == ["ok"]
    assert "moved the median of a known product by +0.4%" in capsys.readouterr().out
    assert (tmp_path / "roofline.png").exists()


@pytest.mark.parametrize(
    ("status", "right", "small", "code"),
    [
        ("failed", True, True, 1),
        ("skipped", True, True, 0),
        ("ok", False, True, 1),
        ("ok", True, False, 1),
    ],
)
def test_a_wrong_row_comparison_or_peak_makes_the_suite_fail(
    tmp_path, monkeypatch, status, right, small, code
):
    record = {"rows": [{"status": "ok"}, {"status": status}], "notes": []}
    monkeypatch.setattr(compare, "run", lambda *_: right)
    monkeypatch.setattr(memory, "run", lambda _: small)
    monkeypatch.setattr(profile, "profile", lambda plan, progress: record)
    monkeypatch.setattr(profile, "save", lambda record, folder: [])
    monkeypatch.setattr(suite, "show_profile", lambda *_: None)
    monkeypatch.setattr(suite, "profiler_overhead", lambda device, pairs: 0.004)
    monkeypatch.setattr(sys, "argv", ["suite", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        suite.main()
    assert caught.value.code == code
