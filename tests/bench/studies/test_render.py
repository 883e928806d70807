import json

import pytest

from triton_sparsity.bench.measure.record import RESULTS, ROOT, dump
from triton_sparsity.bench.measure.timing import Timing
from triton_sparsity.bench.studies.compare import Comparison, rows
from triton_sparsity.bench.studies.render import (
    END,
    START,
    baselines,
    insert,
    main,
    render,
    speedup_over,
    studies,
)


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
    found = rows(Comparison("Some work", subjects, ("theirs",), {"ours": 1.0}), times)
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


def test_the_page_is_made_from_the_records_alone(tmp_path, capsys):
    results(tmp_path / "a-cpu")
    text = render(tmp_path)
    assert "### a CPU" in text
    assert "| Some work | ours | 1 s | 2.0x faster (2.0x to 2.0x) | as fast: reached |" in text
    assert "|  | theirs | 2 s | the baseline |  |" in text
    assert "|  | bad | FAILED |  |  |" in text
    assert "Left out: gone: absent." in text
    assert "`make bench`, 2026-01-01, commit abc" in text
    assert "| RigL | 2.5000 | 2.0000 | 3.0000 | 80 % |" in text
    assert (
        "- RigL is no worse than SET: better by 0.5000, standard error 0.0000 of 2 seeds" in text
    )
    assert "- RigL IS WORSE than SET" in text

    page, other = tmp_path / "benchmarks.md", tmp_path / "accuracy.md"
    for one in (page, other):
        one.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path)]
    with pytest.raises(SystemExit, match="not up to date"):
        main([*arguments, "--check"])
    main(arguments)
    assert page.read_text() == f"before\n{START}\n{text}\n{END}\nafter\n"
    assert other.read_text() == f"before\n{START}\nNothing was recorded yet.\n{END}\nafter\n"
    main([*arguments, "--check"])
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page.write_text("no markers")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_figures_of_the_page_are_those_of_the_results():
    for name, figures in (("benchmarks.md", render), ("accuracy.md", studies)):
        text = (ROOT / "docs" / name).read_text()
        assert insert(text, figures(RESULTS)) == text


def test_results_name_no_path_of_a_machine():
    for path in RESULTS.glob("*/*.json"):
        assert "/root" not in path.read_text()
        assert json.loads(path.read_bytes())["schema"] == 1


def test_a_record_from_before_there_were_speedups_is_rendered_over_one_baseline():
    def row(subject, seconds, **more):
        times = {"median_s": seconds, "p20_s": 0.5 * seconds, "p80_s": 2 * seconds}
        return {"work": "Some work", "subject": subject, "status": "ok"} | times | more

    ours = {"compared_with": "theirs", "ratio": 0.25, "ratio_p20": 0.2, "ratio_p80": 0.5}
    found = [
        row("ours", 1.0, **ours, ratio_target=1.0),
        row("theirs", 4.0, compared_with="ours", ratio=4.0, ratio_p20=2.0, ratio_p80=5.0),
        row("other", 8.0, compared_with="ours", ratio=8.0, ratio_p20=7.0, ratio_p80=9.0),
    ]
    assert baselines(found) == {"Some work": "theirs"}
    # as it was recorded of pairs of rounds
    assert speedup_over(found[0], found[1]) == (4, 2, 5)
    # of both times, with the spread of both
    assert speedup_over(found[2], found[1]) == (0.5, 0.125, 2)
    ours["compared_with"] = "what NNCF adds"
    assert baselines([row("ours", 1.0, **ours, ratio_target=0.25)]) == {"Some work": "NNCF"}
    assert speedup_over(row("ours", 1.0, **ours), row("NNCF", 3.0))[0] == 3
