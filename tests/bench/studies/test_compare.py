import json
from functools import partial

import pytest
import torch

from triton_sparsity.bench.measure.processes import in_turn
from triton_sparsity.bench.measure.record import RESULTS, ROOT, dump
from triton_sparsity.bench.measure.timing import Timing
from triton_sparsity.bench.peers import (
    blksprs,
    dense,
    semi_structured,
    stk,
    thresholds,
    torch_bsr,
    torch_prune,
)
from triton_sparsity.bench.studies import compare
from triton_sparsity.bench.studies.compare import TRIAL, Comparison, comparisons, rows
from triton_sparsity.bench.studies.render import END, START, insert, main, render

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
    table = rows(Comparison("work", subjects | {"absent": "not installed"}, {}), found)
    assert [row["status"] for row in table] == ["ok", "failed", "failed", "skipped"]
    assert all("median_s" not in row and "ratio" not in row for row in table[1:])
    assert table[3]["detail"] == "not installed"


def test_ratios_are_of_the_same_round():
    times = {"ours": Timing((1.0, 2.0, 6.0)), "theirs": Timing((2.0, 8.0, 6.0), 4000)}
    subjects = {"ours": lambda: None, "theirs": lambda: None}
    ours, theirs = rows(
        Comparison("work", subjects, {"ours": ("theirs", 0.4)}, weights=1000), times
    )
    assert (ours["ratio"], ours["compared_with"], ours["ratio_target"]) == (0.5, "theirs", 0.4)
    assert (ours["ratio_p20"], ours["ratio_p80"]) == (0.25, 1.0)
    assert (theirs["ratio"], theirs["compared_with"]) == (2.0, "ours")
    assert theirs["scratch_bytes_per_weight"] == 4
    assert "reached" not in str(compare.draw("work", [ours]).columns[-1]._cells)


@pytest.mark.parametrize("k", [1, 20, 50, 99, 100])
def test_thresholds_of_torch_are_the_kth_smallest(k):
    values = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    wanted = sorted(values.abs().flatten().tolist())[k - 1]
    for function in (thresholds.by_sort, thresholds.by_topk, thresholds.by_kthvalue):
        assert function(values, k).item() == pytest.approx(wanted)


def test_torchs_pruning_starts_anew_at_every_update():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    update = torch_prune.compress(model, 0.5)
    for _ in range(3):
        update()
    assert sum(int((m.weight_mask == 0).sum()) for m in model) == 64


def test_two_of_four_are_pruned():
    weight = torch.tensor([[1.0, -4, 3, 2, 0, 5, -6, 1]])
    assert semi_structured.prune(weight).tolist() == [[0, -4, 3, 0, 0, 5, -6, 0]]


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_a_bsr_product_is_the_masked_one():
    x, w = torch.randn(4, 32), torch.randn(64, 32)
    w[:32, :16] = 0
    torch.testing.assert_close(torch_bsr.linear(x, w, (16, 16))(), x @ w.T)


def results(folder):
    """Write a small record of each kind."""
    head = {
        "schema": 1, "device": "a CPU", "device_type": "cpu", "threads": 2, "torch": "2.11",
        "triton": "3.6", "commit": "abc", "command": "make bench", "date": "2026-01-01T00:00:00",
    }  # fmt: skip
    subjects = {
        "ours": lambda: None,
        "theirs": lambda: None,
        "bad": lambda: None,
        "gone": "absent",
    }
    times = {"ours": Timing((1.0,)), "theirs": Timing((2.0,)), "bad": "AssertionError: wrong"}
    found = rows(Comparison("Some work", subjects, {"ours": ("theirs", 1.0)}), times)
    folder.mkdir()
    (folder / "compare.json").write_bytes(dump(head | {"rows": found}))
    ended = {
        name: {seed: {"metric": value + int(seed), "level": 0.8} for seed in "01"}
        for name, value in (("RigL", 2.0), ("SET", 2.5))
    }
    claim = {"subject": "RigL", "other": "SET", "difference": 0.5, "error": 0.0, "holds": True}
    head |= {"task": "stdlib-lm", "metric": "bits per byte", "higher_is_better": False}
    ended = head | {"results": ended, "claims": [claim, claim | {"holds": False}]}
    (folder / "algorithms-regrowth.json").write_bytes(dump(ended))


def test_the_readme_is_made_from_the_records_alone(tmp_path, capsys):
    results(tmp_path / "a-cpu")
    text = render(tmp_path)
    assert "### a CPU" in text
    assert "| Some work | ours | 1 s | 0.5 (0.5 to 0.5) | theirs |" in text
    assert "|  | bad | FAILED |  |  |" in text
    assert "Left out: gone: absent." in text
    assert "`make bench`, 2026-01-01, commit abc" in text
    assert "| RigL | 2.5000 | 2.0000 | 3.0000 | 80 % |" in text
    assert (
        "- RigL is no worse than SET: better by 0.5000, standard error 0.0000 of 2 seeds" in text
    )
    assert "- RigL IS WORSE than SET" in text

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    with pytest.raises(SystemExit, match="not up to date"):
        main([*arguments, "--check"])
    main(arguments)
    assert readme.read_text() == f"before\n{START}\n{text}\n{END}\nafter\n"
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--check"])
    assert caught.value.code == 0
    readme.write_text("no markers")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_figures_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert insert(text, render(RESULTS)) == text


def test_results_name_no_path_of_a_machine():
    for path in RESULTS.glob("*/*.json"):
        assert "/root" not in path.read_text()
        assert json.loads(path.read_bytes())["schema"] == 1


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
