import json
from functools import partial

import pytest
import torch

from triton_sparsity.bench.measure.processes import in_turn
from triton_sparsity.bench.measure.timing import Timing
from triton_sparsity.bench.peers import (
    blksprs,
    dense,
    semi_structured,
    stk,
)
from triton_sparsity.bench.studies import compare
from triton_sparsity.bench.studies.compare import TRIAL, Comparison, comparisons, rows

CPU = torch.device("cpu")
SUBJECTS = {
    f"{c.title.split(':')[0]}, {i}, {name}": make
    for i, c in enumerate(comparisons(TRIAL))
    for name, make in c.subjects.items()
    # Inductor's own warnings and worker processes are not under test
    if not isinstance(make, str) and name not in ("dense, compiled", "NNCF")
}


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@pytest.mark.parametrize("make", SUBJECTS.values(), ids=SUBJECTS)
def test_every_subjects_result_is_right_and_can_be_had_twice(make):
    work = make()
    work()
    work()


def test_every_peer_is_a_subject_or_has_a_reason():
    names = {name for c in comparisons(TRIAL) for name in c.subjects}
    assert names >= {
        "NNCF", "WeightNormSparsifier", "torch.nn.utils.prune", "torch.sort", "torch.topk",
        "torch.kthvalue", "dense", "dense, compiled", "torch BSR", "STK", "blksprs",
        "2:4 by cuSPARSELt",
    }  # fmt: skip
    for reason in (
        stk.available(CPU, (128, 128)),
        blksprs.available(CPU, (32, 32)),
        semi_structured.available(CPU),
    ):
        assert isinstance(reason, str)
        assert reason
    assert dense.compiler(CPU) is None or "C++" in dense.compiler(CPU)


def set_up(text):
    print("set up")
    return partial(print, text, end="")


def fail_check(text):
    raise AssertionError(f"result is wrong: {text}")


def die(text):
    raise SystemExit(text)


@pytest.mark.slow
def test_what_fails_has_a_reason_and_no_time_and_the_others_go_on():
    subjects = {
        "right": partial(set_up, ""),
        "wrong": partial(fail_check, "by far"),
        "dead": partial(die, "gone"),
    }
    found = in_turn(subjects, 2, 1)
    assert len(found["right"].seconds) == 2
    assert found["wrong"] == "AssertionError: result is wrong: by far"
    assert "gone" in found["dead"]
    table = rows(Comparison("work", subjects | {"absent": "not installed"}), found)
    assert [row["status"] for row in table] == ["ok", "failed", "failed", "skipped"]
    assert all("median_s" not in row and "speedup" not in row for row in table[1:])
    assert table[3]["detail"] == "not installed"


TIMES = {
    "ours": Timing((1.0, 2.0, 6.0)),
    "theirs": Timing((2.0, 8.0, 6.0), 4000),
    "slow": Timing((4.0, 16.0, 24.0)),
}
NAMES = dict.fromkeys(TIMES, set_up)


def cells(found):
    return [[*column.cells] for column in compare.draw("work", found).columns]


def test_speedups_are_of_the_same_round_and_all_over_one_baseline():
    found = rows(Comparison("work", NAMES, ("theirs", "slow"), {"ours": 2.5}, weights=1000), TIMES)
    ours, theirs, slow = found
    assert {row["baseline"] for row in found} == {"theirs"}
    assert (ours["speedup"], ours["speedup_p20"], ours["speedup_p80"]) == (2, 1, 4)
    assert (slow["speedup"], slow["speedup_p20"], slow["speedup_p80"]) == (0.5, 0.25, 0.5)
    assert "speedup" not in theirs
    assert theirs["scratch_bytes_per_weight"] == 4
    *_, speedups, targets = cells(found)
    assert speedups == ["2.0x faster (1.00x to 4.0x)", "baseline", "2.0x slower (2.0x to 4.0x)"]
    assert targets == ["2.5x faster: MISSED", "", ""]


def test_where_the_baseline_is_absent_the_next_is_that_of_all_rows():
    times = {name: TIMES[name] for name in ("ours", "slow")} | {"theirs": "it failed"}
    found = rows(Comparison("work", NAMES, ("theirs", "slow"), {"ours": 2.5}), times)
    assert [row.get("baseline") for row in found] == ["slow", None, "slow"]
    assert found[0]["speedup"] == 4
    # the target is of the other
    assert cells(found)[-1] == ["", "", ""]
    found = rows(Comparison("work", NAMES, ("theirs",), {"ours": 2.5}), times)
    assert not any("speedup" in row or "baseline" in row for row in found)
    assert cells(found)[-2] == ["", "", ""]


def test_a_share_is_of_what_the_baseline_adds():
    comparison = Comparison("work", NAMES, ("slow",), shares={"theirs": 0.25}, beyond="ours")
    found = rows(comparison, TIMES)
    # of the rounds: 1 of 3, 6 of 14, 0 of 18
    assert found[1]["share"] == pytest.approx(1 / 3)
    assert cells(found)[-1][1] == "adds at most 25 % of what slow adds: 33 %, MISSED"
    assert found[1]["speedup"] == 2


def test_every_work_names_a_baseline_and_targets_among_its_subjects():
    for comparison in comparisons(TRIAL):
        names = {*comparison.baselines, *comparison.targets, *comparison.shares}
        assert comparison.baselines
        assert names <= {*comparison.subjects}
        assert {comparison.beyond} <= {"", *comparison.subjects}
        assert comparison.baselines[0] not in comparison.targets


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "Mask"], "--only needs --output"),
        (["--only", "nonsense", "--output", "{}"], "--only must be part of a title"),
        (["--threads", "0", "--output", "{}"], "--threads must be at least 1, got 0"),
        (["--device", "cuda:77", "--output", "{}"], "is not there"),
    ],
)
def test_a_bad_option_of_the_comparison_is_told(tmp_path, capsys, monkeypatch, arguments, message):
    words = [word.format(tmp_path) for word in arguments]
    monkeypatch.setattr("sys.argv", ["compare", *words])
    with pytest.raises(SystemExit) as caught:
        compare.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_numbered_gpu_is_the_one_that_is_measured():
    assert compare.place_of(torch.device("cuda:1")).kind == torch.device("cuda:1")
    assert compare.place_of(torch.device("cpu")) == compare.CPU


@pytest.mark.parametrize(("wrong", "code"), [("ours, quick", 1), ("theirs", 0)])
def test_what_is_wrong_of_ours_makes_the_comparison_fail(tmp_path, monkeypatch, wrong, code):
    found = {"ours, quick": Timing((1.0,)), "theirs": Timing((2.0,))} | {wrong: "off by far"}
    subjects = dict.fromkeys(found, set_up)
    monkeypatch.setattr(compare, "comparisons", lambda place: [Comparison("work", subjects)])
    monkeypatch.setattr(compare, "in_turn", lambda *_: found)
    monkeypatch.setattr("sys.argv", ["compare", "--trial", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        compare.main()
    assert caught.value.code == code
    rows = json.loads((tmp_path / "compare.json").read_bytes())["rows"]
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert failed["detail"] == "off by far"
    assert "median_s" not in failed
