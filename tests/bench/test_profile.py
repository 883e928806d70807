import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from triton_sparsity.bench import profile as job
from triton_sparsity.bench.cli import main
from triton_sparsity.bench.measure import operations
from triton_sparsity.bench.measure.ceilings import Ceilings, measure_ceilings
from triton_sparsity.bench.measure.drift import drift
from triton_sparsity.bench.measure.record import load
from triton_sparsity.bench.measure.timing import Timing

QUICK = [
    "--shapes=16x64x128,16x128x64",
    "--pattern=unstructured",
    "--pattern=block:32",
    "--level=0.5",
    "--level=0.75",
    "--budget=0.001",
    "--passes=1",
    "--device=cpu",
    "--threads=1",
]


# of one operation
SMALL = {
    "shapes": "16x64x128",
    "patterns": ["block:32"],
    "levels": [0.5],
    "operations": ["apply"],
    "device": "cpu",
    "threads": 1,
    "budget": 1e-9,
}


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    found = measure_ceilings(torch.device("cpu"), [torch.float32], scale=0.001)
    monkeypatch.setattr(job, "measure_ceilings", lambda *_: found)


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


@pytest.mark.slow
def test_a_profile_leaves_its_table_files_and_pictures(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert run("profile", *QUICK, "-o", tmp_path / "out", "--trace", trace) == 0
    text = capsys.readouterr().out
    for word in ("backend torch", "ceilings: copy", "no GPU", "forward", "training step", "dense"):
        assert word in text

    record = load(tmp_path / "out" / "profile.json")
    assert {row["status"] for row in record["rows"]} == {"ok"}
    operations = {row["operation"] for row in record["rows"]}
    assert operations == set(job.OPERATIONS)
    for row in record["rows"]:
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["low_s"] <= row["p20_s"] <= row["p80_s"] <= row["high_s"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9, rel=1e-3)
        assert row["of_bound"] == pytest.approx(row["bound_s"] / row["median_s"], rel=1e-3)
        if row["operation"] in ("forward", "dX", "dW", "training step"):
            assert row["speedup"] == pytest.approx(row["dense_s"] / row["median_s"], rel=1e-3)
            assert row["flops"] > 0
    for name in ("device", "torch", "triton", "commit", "command", "date"):
        assert record[name] or name == "commit"

    with (tmp_path / "out" / "profile.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(record["rows"])
    assert table[0]["operation"] == record["rows"][0]["operation"]
    assert table[0]["device"] == record["device"]
    for name in ("roofline.png", "speedup.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("forward 16x64x128" in str(event.get("name")) for event in events)


def test_a_pass_checks_once_and_then_times(monkeypatch):
    calls, masked = [], operations.apply_mask
    monkeypatch.setattr(
        operations, "apply_mask", lambda *a, **k: (calls.append(1), masked(*a, **k))[1]
    )
    plan = job.make_plan(**SMALL, passes=1)
    outcome = None
    for check in (True, False):
        earlier = None if check else [outcome]
        calls.clear()
        ((case, outcome),), _ = job.one_pass(plan, earlier, lambda done: None)
        assert (case.operation, outcome.status) == ("apply", "ok")
        # one run to warm up and three that count; and one that is checked
        assert len(calls) == 1 + 3 + check
    with pytest.raises(RuntimeError, match="in another process"):
        case.build()


@pytest.mark.slow
def test_passes_take_place_in_processes_and_are_pooled():
    told = []
    record = job.profile(job.make_plan(**SMALL, passes=2), lambda *step: told.append(step[1:3]))
    (row,) = record["rows"]
    assert row["status"] == "ok"
    assert row["runs"] == 2 * 3
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.slow
def test_a_process_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(job, "_serve_pass", os._exit)
    plan = job.make_plan(**SMALL, passes=2)
    with pytest.raises(ValueError, match="the process of a pass died"):
        job.in_a_process(plan, None, lambda done: None)


def test_a_failure_in_any_pass_takes_the_speed_away():
    (case, _), *_ = job.one_pass(job.make_plan(**SMALL), None, lambda done: None)[0]
    fine, failed = job.Outcome("ok", timing=Timing((1.0,))), job.Outcome("failed", "no")
    ceilings = Ceilings(copy=1e6, cache=1e5, gemm={"float32": 2e6})
    for outcomes in ([fine, failed], [failed, fine]):
        row = job.to_row(case, outcomes, ceilings)
        assert (row.status, row.detail, row.median_s) == ("failed", "no", None)
    assert job.to_row(case, [fine, fine], ceilings).runs == 2


def test_a_row_states_the_spread_of_all_runs_and_of_the_passes():
    (case, _), *_ = job.one_pass(job.make_plan(**SMALL), None, lambda done: None)[0]
    ceilings = Ceilings(copy=1e6, cache=1e5, gemm={"float32": 2e6})
    fast, slow = (
        Timing((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)),
        Timing((11.0, 12.0, 13.0, 14.0, 15.0, 16.0)),
    )
    outcomes = [job.Outcome("ok", "", one, other) for one, other in ((slow, fast), (fast, fast))]
    row = job.to_row(case, outcomes, ceilings)
    assert (row.p20_s, row.median_s, row.p80_s, row.runs) == (3, 8.5, 14, 12)
    # sorted, number 1 and number 4 of 0 to 5
    assert (row.low_s, row.high_s) == (2, 15)
    assert (row.dense_low_s, row.dense_high_s) == (2, 5)


def test_an_earlier_record_is_compared(tmp_path, capsys):
    quick = [*QUICK, "--operation=apply", "--operation=forward"]
    assert run("profile", *quick, "-o", tmp_path) == 0
    record = load(tmp_path / "profile.json")
    capsys.readouterr()
    for row in record["rows"]:
        for name in ("median_s", "low_s", "high_s"):
            row[name] *= 1e3 if row["operation"] == "apply" else 1
        if row["operation"] == "forward":
            row["low_s"] = row["dense_low_s"] = 0
            row["high_s"] = row["dense_high_s"] = 10
    (tmp_path / "slow.json").write_text(json.dumps(record))
    assert run("profile", *quick, "--against", tmp_path / "slow.json") == 0
    text = capsys.readouterr().out
    applies = sum(row["operation"] == "apply" for row in record["rows"])
    compared = applies + 2 * (len(record["rows"]) - applies)
    assert (
        f"{compared - applies} of {compared} times agree within their spread over passes" in text
    )
    assert text.count("0.00 of the earlier time: apply") == applies


def test_a_set_up_that_fails_is_a_row_and_not_the_end(monkeypatch):
    from triton_sparsity.bench.measure import operands

    def fails(*_):
        raise RuntimeError("no memory for that\nat all")

    monkeypatch.setattr(operands, "random_mask", fails)
    plan = job.make_plan(**SMALL | {"operations": ["apply", "mask update"]}, passes=1)
    first, second = job.profile(plan, lambda *_: None)["rows"]
    assert (first["operation"], first["status"]) == ("set-up", "failed")
    assert first["detail"] == "RuntimeError: no memory for that"
    assert (second["operation"], second["status"]) == ("mask update", "ok")


def test_what_a_pattern_does_not_divide_is_told_and_the_rest_is_measured():
    small = SMALL | {"patterns": ["nm:2:4"], "operations": ["apply", "training step"]}
    plan = job.make_plan(**small | {"shapes": "16x66x64,16x64x64"}, passes=1)
    record = job.profile(plan, lambda *_: None)
    assert {row["shape"] for row in record["rows"]} == {"16x64x64"}
    assert any("nm:2:4 does not divide 16x66x64" in note for note in record["notes"])
    rows = job.profile(job.make_plan(**small, passes=1), lambda *_: None)["rows"]
    assert [(r["operation"], r["status"], r["level"]) for r in rows] == [
        ("apply", "ok", 0.5),
        ("training step", "ok", 0.5),
    ]


def test_dense_work_tells_how_the_machine_moved():
    def case_of(*times):
        return [(None, job.Outcome("ok", "", Timing((1.0,)), dense)) for dense in times]

    slow = [case_of(Timing((seconds,)), Timing((2 * seconds,)), None) for seconds in (1, 1.3, 1.1)]
    paces = job.pass_paces(slow)
    assert paces == pytest.approx([1 / 1.1, 1.3 / 1.1, 1])
    (note,) = job.unrest(paces)
    assert "not idle" in note
    assert "1.30 times as long" in note
    assert job.unrest([1, 1.05, 0.97]) == job.unrest([]) == []

    row = {"operation": "forward", "shape": "1x1x1", "status": "ok", "dtype": "", "pattern": ""}
    row |= {"level": 0.5, "mask": "", "median_s": 1, "low_s": 1, "high_s": 1}
    before = row | {"dense_s": 2, "dense_low_s": 1, "dense_high_s": 3}
    after = row | {"dense_s": 4, "dense_low_s": 3.5, "dense_high_s": 5}
    found = drift({"rows": [after]}, {"rows": [before]})
    assert (found.compared, found.pace, found.moved[0].dense) == (2, 2, True)


def test_json_is_all_that_is_printed(tmp_path, capsys):
    assert run("profile", *QUICK, "--operation=apply", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    record = json.loads(captured.out)
    assert {row["operation"] for row in record["rows"]} == {"apply"}
    assert record["notes"]


def test_what_fails_is_listed_with_its_reason_and_without_speed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(operations, "apply_mask", lambda weight, *_, **__: weight + 1)
    assert run("profile", *QUICK, "--operation=apply", "-o", tmp_path) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "elements differ" in text
    for row in load(tmp_path / "profile.json")["rows"]:
        assert row["status"] == "failed"
        assert row["median_s"] is row["gb_per_s"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "huge"], "shapes must be one of llama3-8b"),
        (["--shapes", "16x64"], "got '16x64'"),
        (["--shapes", "nothing.safetensors"], "nothing.safetensors: No such file"),
        (["--level", "1"], "level must be in [0, 1), got 1.0"),
        (["--pattern", "block:17"], "power of two"),
        (["--operation", "sort"], "operation must be one of 'score'"),
        (["--mask", "striped"], "mask must be 'random' or 'skewed', got 'striped'"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--device", "tpu"], "got 'tpu'"),
        (["--device", "cpu:"], "got 'cpu:'"),
        (["--backend", "cudnn"], "got 'cudnn'"),
        (["--tokens", "0"], "tokens must be positive and below 2^31, got 0"),
        (["--budget", "-1"], "budget must be positive"),
        (["--passes", "0"], "passes must be positive and below 2^31, got 0"),
        (["--against", "nothing.json"], "nothing.json: No such file"),
        (["--output", "/proc/nothing"], "/proc/nothing"),
        (["--trace", "/proc/nothing/trace"], "/proc/nothing/trace"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line(capsys, arguments, message):
    assert run("profile", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("triton-sparsity: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_nothing_to_measure_is_an_error():
    plan = job.make_plan(**SMALL | {"patterns": ["nm:2:4"], "operations": ["topology"]}, passes=1)
    with pytest.raises(ValueError, match=r"nothing to measure.*: topology with 2:4"):
        job.profile(plan, lambda *_: None)


def test_what_failed_in_the_first_pass_is_not_timed_in_the_others(monkeypatch):
    ran = []

    def wrong(weight, *_, **__):
        ran.append(1)
        return weight + 1

    monkeypatch.setattr(operations, "apply_mask", wrong)
    # passes here: what is patched is not so in other processes
    monkeypatch.setattr(job, "in_a_process", job.one_pass)
    plan = job.make_plan(**SMALL | {"operations": ["apply", "pack", "apply_"]}, passes=3)
    rows = {row["operation"]: row for row in job.profile(plan, lambda *_: None)["rows"]}
    assert (rows["apply"]["status"], rows["apply"]["median_s"]) == ("failed", None)
    assert rows["apply_"]["status"] == "ok"
    assert rows["apply_"]["runs"] == 3 * 3
    assert len(ran) == 1


def test_where_no_memory_holds_anything_is_one_line(tmp_path, capsys):
    # even its mask takes more than any machine has: some would have the mask of a narrow weight
    huge = ["--shapes=512x9999999999x9999999999", "--operation=forward", "--pattern=block:32"]
    assert run("profile", *huge, *QUICK[4:], "-o", tmp_path / "run") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    # below that of the progress
    error = captured.err.splitlines()[-1]
    assert re.match(r"triton-sparsity: error: out of memory: \d+ bytes could not be had", error)
    assert "on the host; try fewer or smaller --shapes" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_terminated_profile_ends_its_children_and_says_nothing(tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "triton_sparsity.bench.cli", "profile", "--device=cpu"),
            *("--passes=50", "--threads=1", "-o", tmp_path / "run", "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        # a child has started, and works
        deadline = time.monotonic() + 120
        while len(running(process.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.terminate()
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, errors) == (128 + signal.SIGTERM, b"", b"")
    # multiprocessing's own helper ends once it notices
    deadline = time.monotonic() + 10
    while running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(process.pid)
    assert not (tmp_path / "run").exists()


def running(session):
    """Return the processes of a session that have not ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, of = place.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(place.parent.name)
    return found
