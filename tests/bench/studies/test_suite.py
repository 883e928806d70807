import sys

import pytest

from triton_sparsity.bench import profile
from triton_sparsity.bench.measure.record import load
from triton_sparsity.bench.studies import compare, suite


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_the_suite_records_the_profile_and_the_comparison(tmp_path, monkeypatch, capsys, right):
    ran = []

    def run(place, threads, folder):
        ran.append((place, threads, folder))
        return right

    plan = profile.make_plan(
        shapes="16x64x64", patterns=["block:32"], levels=[0.5], operations=["apply"], budget=0.001
    )
    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(profile, "make_plan", lambda **_: plan)
    monkeypatch.setattr(suite, "profiler_overhead", lambda device, pairs: 0.004)
    monkeypatch.setattr(
        sys, "argv", ["suite", "--device", "cpu", "--threads", "1", "--output", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as caught:
        suite.main()
    assert caught.value.code == (0 if right else 1)
    assert ran == [(compare.CPU, 1, tmp_path)]
    record = load(tmp_path / "profile.json")
    assert [row["status"] for row in record["rows"]] == ["ok"]
    assert "moved the median of a known product by +0.4%" in capsys.readouterr().out
    assert (tmp_path / "roofline.png").exists()


def test_a_profile_with_a_wrong_row_makes_the_suite_fail(tmp_path, monkeypatch):
    record = {"rows": [{"status": "ok"}, {"status": "failed"}], "notes": []}
    monkeypatch.setattr(compare, "run", lambda *_: True)
    monkeypatch.setattr(profile, "profile", lambda plan, progress: record)
    monkeypatch.setattr(profile, "save", lambda record, folder: [])
    monkeypatch.setattr(suite, "show_profile", lambda *_: None)
    monkeypatch.setattr(suite, "profiler_overhead", lambda device, pairs: 0.004)
    monkeypatch.setattr(sys, "argv", ["suite", "--device", "cpu", "--output", str(tmp_path)])
    for wrong, code in ((True, 1), (False, 0)):
        record["rows"][1]["status"] = "failed" if wrong else "skipped"
        with pytest.raises(SystemExit) as caught:
            suite.main()
        assert caught.value.code == code
