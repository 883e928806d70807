import json

import pytest

from triton_sparsity.bench.peers import nncf
from triton_sparsity.bench.studies.algorithms import PEER, SUBJECTS, judge, main


def results(**metrics):
    return {
        name.replace("_", " "): {
            seed: {"metric": m, "level": 0.8} for seed, m in enumerate(values)
        }
        for name, values in metrics.items()
    }


@pytest.mark.parametrize(
    ("rigl", "difference", "holds"),
    [
        ([1.0, 1.1, 1.2], 0.1, True),
        ([1.2, 1.3, 1.4], -0.1, False),
        # worse by 0.1 in the mean, which is within a standard error of 0.15
        ([1.1, 1.5, 1.3], -0.1, True),
    ],
)
def test_no_worse_is_judged_by_paired_differences(rigl, difference, holds):
    found = results(RigL=rigl, SET=[1.1, 1.2, 1.3], magnitude=[1.0, 1.0, 1.0])
    (verdict,) = judge(found, higher_is_better=False)
    assert (verdict.subject, verdict.other) == ("RigL", "SET")
    assert verdict.difference == pytest.approx(difference)
    assert verdict.holds is holds
    (turned,) = judge(found, higher_is_better=True)
    assert turned.difference == pytest.approx(-difference)


@pytest.mark.slow
def test_the_comparison_runs_every_subject_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nncf, "available", lambda: "nncf is not installed")
    path = tmp_path / "figures.json"
    quick = ["--dense-epochs=1", "--epochs=2", "--steps-per-epoch=1", "--eval-batches=1"]
    quick += ["--regrowth-pattern=block:16"]
    main(["--seeds=1", "--threads=1", *quick, "--json", str(path)])
    captured = capsys.readouterr()
    assert "NNCF is left out: nncf is not installed" in captured.err
    assert PEER not in captured.out
    figures = json.loads(path.read_text())
    assert [*figures["results"]] == [*SUBJECTS]
    assert all(
        by_seed["0"]["level"] == pytest.approx(0.8, abs=1e-3)
        for by_seed in figures["results"].values()
    )
    patterns = [change.get("pattern") for change in figures["changes"].values()]
    assert patterns == [None, *["block:16"] * 4, None]
    assert [claim["subject"] for claim in figures["claims"]] == ["RigL", "SET"]
