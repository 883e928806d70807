"""The study of accuracy: what it runs, that it goes on from its record, and its tables."""

import json
from types import SimpleNamespace

import pytest

from triton_sparsity.bench.finetune.files import DENSE
from triton_sparsity.bench.studies import accuracy

OPTIONS = ["--task=stdlib-lm", "--seeds=2", "--levels=0.8,0.5", "--patterns=block:16,nm:2:4"]


@pytest.fixture
def finetune(monkeypatch):
    """Replace training: the metric follows from seed and criterion; return what was asked."""
    asked = []

    def run(options, folder):
        folder.mkdir()
        if options.checkpoint is None:
            (folder / DENSE).write_bytes(b"dense")
        asked.append(options)
        metric = 2 + len(options.importance) / 10 + options.seed
        stripped = {"metric": metric, "level": options.level}
        return {"results": {"stripped": stripped, "dense": {"metric": 1.0}}}

    task = SimpleNamespace(metric="bits per byte", higher_is_better=False, data={})
    monkeypatch.setattr(accuracy, "load_task", lambda name: task)
    monkeypatch.setattr(accuracy, "finetune", run)
    return asked


def study(folder, *more):
    path = folder / "accuracy.json"
    accuracy.main([*OPTIONS, f"--output={path}", f"--work={folder / 'work'}", *more])
    return json.loads(path.read_text())


def test_each_cell_is_run_once_from_the_dense_model_of_its_seed(finetune, tmp_path):
    record = study(tmp_path)
    # a dense run a seed; 11 of blocks at both levels; 2:4 has one level, no RigL and no taylor
    assert len(finetune) == len(record["runs"]) == 2 * (1 + 2 * 11 + 8)
    # the first run of a seed trains it
    assert [options.seed for options in finetune if options.checkpoint is None] == [0, 1]
    for options in finetune:
        if options.checkpoint is not None:
            assert options.checkpoint.endswith(f"dense-stdlib-lm-{options.seed}.safetensors")
            assert options.dense_epochs == 0
    assert [run["method"] for run in record["runs"][-2:]] == ["dense"] * 2
    methods = {(o.algorithm, o.importance) for o in finetune[:-2]}
    assert len(methods) == 11
    assert {o.level for o in finetune if o.pattern == "nm:2:4"} == {0.5}
    assert {o.ramp for o in finetune if o.algorithm == "rigl"} == {0.75}
    # 80 % of every seed comes first
    order = [(run["level"], run["seed"]) for run in record["runs"] if run["pattern"] == "block:16"]
    assert order == sorted(order, key=lambda one: (-one[0], one[1]))


def test_a_study_goes_on_from_its_record(finetune, tmp_path):
    accuracy.main(
        [*OPTIONS, "--minutes=0", f"--output={tmp_path / 'none.json'}", f"--work={tmp_path}"]
    )
    assert not finetune
    study(tmp_path, "--levels=0.8")
    study(tmp_path)
    count = len(finetune)
    # an option that came after the record was begun
    path = tmp_path / "accuracy.json"
    content = json.loads(path.read_text())
    del content["options"]["permute"]
    path.write_text(json.dumps(content))
    record = study(tmp_path, "--seeds=3")
    assert len(finetune) == count * 3 // 2 == len(record["runs"])
    with pytest.raises(SystemExit) as caught:
        study(tmp_path, "--epochs=3")
    assert caught.value.code == 2


def test_some_criteria_can_be_studied_before_others(finetune, tmp_path, capsys):
    record = study(tmp_path, "--criteria=obs,fisher", "--ramp=0.3")
    assert {options.ramp for options in finetune} == {0.3}
    subjects = {(one["method"], one["importance"]) for one in record["runs"]}
    assert subjects == {("dense", "normed_abs"), ("one-shot", "obs"), ("gradual", "fisher")}
    with pytest.raises(SystemExit):
        study(tmp_path, "--criteria=obs,hessian")
    assert "--criteria must be of normed_abs, wanda, snip" in capsys.readouterr().err


def test_the_tables_have_means_errors_and_the_best_in_bold(finetune, tmp_path):
    record = study(tmp_path)
    text = accuracy.tables(record)
    assert text.index("50 %") < text.index("80 %")
    lines = text[text.index("80 %") :].splitlines()
    # 2.3 and 3.3 of "obs" and "abs"; lower is better
    assert "| one-shot | `obs` | **2.800 ± 0.500** |" in lines
    assert "| RigL | `abs` | **2.800 ± 0.500** |" in lines
    assert "| gradual | `wanda` | 3.000 ± 0.500 |" in lines
    assert accuracy.dense(record) == "Dense, trained alike: 3.500 ± 0.500."
    assert accuracy.spelled([2.0]) == "2.000"
    better = accuracy.tables(record | {"higher_is_better": True})
    assert "| gradual | `normed_abs` | **3.500 ± 0.500** |" in better


def test_a_criterion_that_refuses_ends_its_cell_and_not_the_study(finetune, tmp_path, monkeypatch):
    trained = accuracy.finetune

    def run(options, folder):
        if (options.importance, options.seed) == ("taylor", 1):
            raise RuntimeError("taylor: |w g| is 0 throughout")
        return trained(options, folder)

    monkeypatch.setattr(accuracy, "finetune", run)
    record = study(tmp_path)
    refused = [one for one in record["runs"] if one["metric"] is None]
    assert [one["refused"] for one in refused] == ["taylor: |w g| is 0 throughout"] * len(refused)
    assert len(refused) == 4  # one-shot and gradual, at both levels
    assert "| one-shot | `taylor` | refused |" in accuracy.tables(record)


def test_another_error_ends_the_study(finetune, tmp_path, monkeypatch):
    def run(options, folder):
        raise RuntimeError("a bug")

    monkeypatch.setattr(accuracy, "finetune", run)
    with pytest.raises(RuntimeError, match="a bug"):
        study(tmp_path)


@pytest.mark.slow
def test_a_cell_is_really_trained(tmp_path, monkeypatch):
    short = {"eval_batches": 1, "dense_epochs": 1}
    monkeypatch.setitem(accuracy.TASKS, "stdlib-lm", short)
    quick = ["--epochs=2", "--steps-per-epoch=2", "--seeds=1", "--levels=0.8"]
    record = study(tmp_path, *quick, "--patterns=block:16", "--minutes=0.01")
    assert 1 < record["runs"][0]["metric"] < 9
