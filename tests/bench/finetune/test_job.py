import contextlib
import errno
import io
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from triton_sparsity.bench.finetune import files
from triton_sparsity.bench.finetune import job as module
from triton_sparsity.bench.finetune.files import CURVES, DENSE, REPORT, STATE, STRIPPED
from triton_sparsity.bench.finetune.job import finetune
from triton_sparsity.bench.finetune.options import Options
from triton_sparsity.bench.finetune.tasks import Task, load_task
from triton_sparsity.bench.measure import files as written
from triton_sparsity.bench.measure.files import SUMS, write_atomic

QUICK = Options(
    task="digits",
    pattern="block:8",
    dense_epochs=2,
    epochs=3,
    steps_per_epoch=4,
    batch_size=8,
    save_every=3,
    threads=1,
)


class Killed(BaseException):
    """Stands for the end of the process."""


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return value


def tensors(value, path=""):
    """List the tensors in a nested state by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list | tuple) else pairs
    return {k: v for key, part in pairs for k, v in tensors(part, f"{path}/{key}").items()}


def assert_same_result(folder, other):
    for name in (DENSE, STRIPPED):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    a, b = (json.loads((f / REPORT).read_text()) for f in (folder, other))
    assert without_times(a) == without_times(b)
    # the optimiser's state, the masks and the generators too
    a, b = (tensors(torch.load(f / STATE, weights_only=True)) for f in (folder, other))
    assert a.keys() == b.keys()
    assert any("/optimizer/" in path for path in a)
    assert any("/controller/" in path for path in a)
    for path in a:
        assert torch.equal(a[path], b[path]), path


@pytest.fixture(autouse=True)
def draw_nothing(monkeypatch):
    """Spare each of these many runs the half second that a plot takes."""
    monkeypatch.setattr(module, "curves", lambda runs: b"")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finetune(QUICK, folder)
    return folder


def test_a_run_ends_with_exactly_the_pruned_model_on_disk(uninterrupted):
    report = json.loads((uninterrupted / REPORT).read_text())
    assert sorted(p.name for p in uninterrupted.iterdir()) == sorted(
        [DENSE, STRIPPED, STATE, REPORT, CURVES, SUMS]
    )
    stripped = safetensors.torch.load_file(uninterrupted / STRIPPED)
    dense = safetensors.torch.load_file(uninterrupted / DENSE)
    assert stripped.keys() == dense.keys() == load_task("digits").build().state_dict().keys()

    for layer in report["layers"]:
        assert layer["pruned_groups"] == round(0.8 * layer["groups"])
    zero_blocks = 0
    for layer in report["layers"]:
        weight = stripped[f"{layer['name']}.weight"]
        blocks = weight.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2)
        assert blocks[..., 0].numel() == layer["groups"]
        zero_blocks += int((blocks == 0).all(-1).sum())
        assert int((blocks != 0).any(-1).sum()) == layer["groups"] - layer["pruned_groups"]
    assert zero_blocks == sum(layer["pruned_groups"] for layer in report["layers"])
    # what is no target stays dense
    assert (stripped["head.weight"] != 0).all()
    assert (stripped["embedding.weight"] != 0).all()


def test_features_are_permuted_between_the_dense_training_and_the_sparse_one(tmp_path):
    report = finetune(replace(QUICK, permute=True, lr=1e-9), tmp_path)
    dense, sparse = (safetensors.torch.load_file(tmp_path / name) for name in (DENSE, STRIPPED))
    for layer in range(2):
        name = f"layers.{layer}.up.bias"
        assert not torch.equal(dense[name], sparse[name])
        torch.testing.assert_close(
            dense[name].sort().values, sparse[name].sort().values, rtol=0, atol=1e-6
        )
    assert report["results"]["stripped"]["level"] == pytest.approx(0.8, abs=0.01)


def test_the_logits_of_a_teacher_are_learned_in_the_sparse_training(tmp_path, uninterrupted):
    taught = replace(QUICK, teacher=str(uninterrupted / DENSE), temperature=3.0)
    plain = json.loads((uninterrupted / REPORT).read_text())["history"]
    for weight in (0.0, 0.75):
        report = finetune(replace(taught, distill_weight=weight), tmp_path / str(weight))
        assert report["history"]["dense"]["loss"] == plain["dense"]["loss"]
        alike = report["history"]["sparse"]["loss"] == plain["sparse"]["loss"]
        assert alike == (weight == 0)

    task = load_task("digits")
    model = task.build()
    model.load_state_dict(safetensors.torch.load_file(uninterrupted / DENSE))
    images, labels = task.batch(8, 0, 1, 0)
    # nothing is pruned in the first step: the teacher's are the model's own
    own = (1 - 0.75) * task.loss(model(images), labels)
    assert report["history"]["sparse"]["loss"][0] == pytest.approx(own.item(), rel=1e-5)


def test_a_run_that_learns_from_a_teacher_goes_on_with_the_same_one_alone(tmp_path, uninterrupted):
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes((uninterrupted / DENSE).read_bytes())
    taught = replace(QUICK, teacher=str(teacher))
    finetune(taught, tmp_path / "whole")

    def kill(phase, done, total, note):
        if (phase, done) == ("sparse", 5):
            raise Killed

    with pytest.raises(Killed):
        finetune(taught, tmp_path / "killed", progress=kill)
    changed = safetensors.torch.load(teacher.read_bytes())
    changed["head.bias"] += 1
    before = teacher.read_bytes()
    safetensors.torch.save_file(changed, teacher)
    with pytest.raises(ValueError, match="is not the file that the run to resume has learned"):
        finetune(taught, tmp_path / "killed", resume=True)
    teacher.write_bytes(before)
    finetune(taught, tmp_path / "killed", resume=True)
    assert_same_result(tmp_path / "killed", tmp_path / "whole")


def test_a_teacher_of_another_task_is_refused(tmp_path, uninterrupted):
    teacher = tmp_path / "teacher.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2)}, teacher)
    with pytest.raises(ValueError, match=f"teacher {teacher} is not of this model"):
        finetune(replace(QUICK, teacher=str(teacher)), tmp_path / "run")
    assert not (tmp_path / "run" / STATE).exists()


@pytest.mark.slow
def test_training_that_skips_blocks_follows_the_masked_dense_losses(tmp_path):
    runs = {}
    for dispatch in ("sparse", "dense"):
        options = Options(
            pattern="block:32", dispatch=dispatch, dense_epochs=1, epochs=2, steps_per_epoch=6,
            batch_size=2, eval_batches=1, threads=1,
        )  # fmt: skip
        runs[dispatch] = finetune(options, tmp_path / dispatch)
    paths = {name: {layer["path"] for layer in run["layers"]} for name, run in runs.items()}
    assert paths == {"sparse": {"block-sparse"}, "dense": {"dense"}}
    sparse, dense = (runs[name]["history"] for name in ("sparse", "dense"))
    assert sparse["dense"]["loss"] == dense["dense"]["loss"]
    assert sparse["sparse"]["loss"] == pytest.approx(dense["sparse"]["loss"], rel=1e-4)
    assert sparse["sparse"]["loss"] != dense["sparse"]["loss"], "one path was taken by both"
    pruned = [[layer["pruned_groups"] for layer in run["layers"]] for run in runs.values()]
    assert pruned[0] == pruned[1]


def test_the_stripped_model_computes_what_the_masked_one_does(uninterrupted):
    results = json.loads((uninterrupted / REPORT).read_text())["results"]
    assert results["sparse"]["metric"] == results["stripped"]["metric"]
    assert results["sparse"]["level"] == results["stripped"]["level"]
    assert results["stripped"]["compressed_bytes"] < 0.5 * results["dense"]["compressed_bytes"]


def test_the_stored_stripped_model_has_the_metric_of_the_report(uninterrupted):
    task = load_task("digits")
    model = task.build()
    model.load_state_dict(safetensors.torch.load_file(uninterrupted / STRIPPED))
    with torch.no_grad():
        score = sum(float(task.score(model(x), y).sum()) for x, y in task.held_out)
    report = json.loads((uninterrupted / REPORT).read_text())
    assert score / report["data"]["held_out_images"] == report["results"]["stripped"]["metric"]


def test_the_history_has_every_step_and_epoch_and_the_level_of_each(uninterrupted):
    history = json.loads((uninterrupted / REPORT).read_text())["history"]
    for phase, epochs in (("dense", 2), ("sparse", 3)):
        assert [len(history[phase][k]) for k in ("loss", "level", "seconds")] == [4 * epochs] * 3
        assert [step for step, _ in history[phase]["metric"]] == [4, 8, 12][:epochs]
    assert history["dense"]["level"] == [0.0] * 8
    assert history["sparse"]["level"] == sorted(history["sparse"]["level"])
    assert history["sparse"]["level"][0] == 0
    # two epochs of ramp, then the target
    assert history["sparse"]["level"][7] < 0.8
    assert history["sparse"]["level"][8:] == [0.8] * 4


@pytest.mark.parametrize(
    "phase_and_step",
    [*(("dense", n) for n in (1, 3, 5, 8)), *(("sparse", n) for n in (1, 4, 6, 10, 12))],
    ids=lambda moment: f"{moment[0]} {moment[1]}",
)
def test_a_run_killed_after_any_step_ends_as_if_it_had_not_been(
    tmp_path, uninterrupted, phase_and_step
):
    def kill(phase, done, total, note):
        if (phase, done) == phase_and_step:
            raise Killed

    with pytest.raises(Killed):
        finetune(QUICK, tmp_path, progress=kill)
    finetune(QUICK, tmp_path, resume=True)
    assert_same_result(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_at_every_write_in_turn_ends_as_if_it_had_not_been(
    tmp_path, uninterrupted, monkeypatch, moment
):
    killed_at = []

    def kill_once(path, content):
        what = (path.name,)
        if path.name == STATE:
            state = torch.load(io.BytesIO(content), weights_only=True)
            what += (state["phase"], state["step"])
        if moment == "after" or what in killed_at:
            write_atomic(path, content)
        if what not in killed_at:
            killed_at.append(what)
            raise Killed

    for part in (module, files, written):
        monkeypatch.setattr(part, "write_atomic", kill_once)
    ended = False
    while not ended:
        with contextlib.suppress(Killed):
            finetune(QUICK, tmp_path, resume=True)
            ended = True
    dense = [(STATE, "dense", n) for n in (0, 3, 6, 8)]
    sparse = [(STATE, "sparse", n) for n in (0, 3, 6, 9, 12)]
    last = [(STRIPPED,), (CURVES,), (REPORT,), (SUMS,)]
    assert killed_at == [*dense, (DENSE,), *sparse, *last]
    assert_same_result(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*before the schedule has")  # adaptive, in five epochs
@pytest.mark.parametrize(
    ("schedule", "pattern"),
    [("exponential", "unstructured"), ("multistep", "block:16x4"), ("adaptive", "unstructured")],
)
def test_every_schedule_resumes(tmp_path, schedule, pattern):
    options = replace(
        QUICK,
        schedule=schedule,
        pattern=pattern,
        dense_epochs=0,
        epochs=5,
        importance="normed_abs",
    )
    finetune(options, tmp_path / "whole")

    def kill(phase, done, total, note):
        if done == 11:
            raise Killed

    with pytest.raises(Killed):
        finetune(options, tmp_path / "killed", progress=kill)
    finetune(options, tmp_path / "killed", resume=True)
    assert_same_result(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"algorithm": "const"},
        {"algorithm": "const", "importance": "obs"},
        {"algorithm": "set", "initial_masks": "random", "pattern": "unstructured"},
        # killed in the step after whose gradients it grows, which was saved, and later
        {"algorithm": "rigl", "delta_t": 4, "save_every": 1},
        {"importance": "snip_momentum"},
        {"importance": "wanda"},
        {"algorithm": "rb"},
        {"algorithm": "movement", "pattern": "unstructured"},
        {"algorithm": "movement", "level": 0.8},
    ],
    ids=lambda how: " ".join(map(str, how.values())),
)
def test_every_algorithm_resumes(tmp_path, how):
    options = replace(QUICK, dense_epochs=0, epochs=5, **how)
    results = finetune(options, tmp_path / "whole")["results"]
    if options.algorithm in ("rb", "movement") and options.level is None:
        assert results["stripped"]["metric"] == results["sparse"]["metric"]
    else:
        assert results["stripped"]["level"] == pytest.approx(0.8, abs=1e-2)

    moments = [4, 11]

    def kill(phase, done, total, note):
        if done in moments:
            moments.remove(done)
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            finetune(options, tmp_path / "killed", resume=True, progress=kill)
    finetune(options, tmp_path / "killed", resume=True, progress=kill)
    assert_same_result(tmp_path / "killed", tmp_path / "whole")


def test_const_keeps_the_zeros_of_a_sparse_checkpoint(tmp_path, uninterrupted):
    checkpoint = str(uninterrupted / STRIPPED)
    options = replace(QUICK, algorithm="const", dense_epochs=None, checkpoint=checkpoint)
    finetune(options, tmp_path)
    before, after = (safetensors.torch.load_file(f / STRIPPED) for f in (uninterrupted, tmp_path))
    report = json.loads((tmp_path / REPORT).read_text())
    names = [f"{layer['name']}.weight" for layer in report["layers"]]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in names)
    # what is left has been trained
    assert any((before[name] != after[name]).any() for name in names)


def test_const_prunes_to_the_level_asked_for_unless_it_is_there(tmp_path, uninterrupted):
    weights = safetensors.torch.load_file(uninterrupted / DENSE)
    name = next(key for key in weights if key.startswith("layers") and key.endswith("weight"))
    weights[name][:8, :8] = 0
    safetensors.torch.save_file(weights, tmp_path / "one_zero")
    levels = {}
    for level in (0.7, None):
        options = replace(
            QUICK,
            algorithm="const",
            level=level,
            dense_epochs=None,
            checkpoint=str(tmp_path / "one_zero"),
            epochs=1,
        )
        folder = tmp_path / str(level)
        levels[level] = finetune(options, folder)["results"]["stripped"]["level"]
        (folder / REPORT).unlink()
        again = finetune(options, folder, resume=True)["results"]["stripped"]["level"]
        assert again == levels[level]
    assert levels[0.7] == pytest.approx(0.7, abs=1e-2)
    assert 0 < levels[None] < 0.1


def test_every_step_of_every_phase_has_a_batch_of_its_own(tmp_path, monkeypatch):
    streams = []

    def note(task, size, *stream):
        streams.append(stream)
        return task.sample(np.random.default_rng(stream), size)

    monkeypatch.setattr(Task, "batch", note)
    finetune(replace(QUICK, seed=7), tmp_path)
    assert streams == [*((7, 0, n) for n in range(8)), *((7, 1, n) for n in range(12))]


def test_the_seed_makes_a_difference(tmp_path, uninterrupted):
    finetune(replace(QUICK, seed=1), tmp_path)
    assert (tmp_path / STRIPPED).read_bytes() != (uninterrupted / STRIPPED).read_bytes()


def test_a_run_goes_on_from_the_dense_model_of_another(tmp_path, uninterrupted):
    checkpoint = str(uninterrupted / DENSE)
    report = finetune(replace(QUICK, dense_epochs=None, checkpoint=checkpoint), tmp_path)
    before = json.loads((uninterrupted / REPORT).read_text())
    assert report["history"]["dense"]["loss"] == []
    assert report["results"]["dense"]["metric"] == before["results"]["dense"]["metric"]
    assert (tmp_path / DENSE).read_bytes() == (uninterrupted / DENSE).read_bytes()
    # phase, step and seed decide the batches
    assert (tmp_path / STRIPPED).read_bytes() == (uninterrupted / STRIPPED).read_bytes()


@pytest.mark.slow
def test_the_language_model_learns_and_is_pruned(tmp_path):
    options = Options(
        dense_epochs=2,
        epochs=2,
        steps_per_epoch=8,
        batch_size=4,
        eval_batches=1,
        pattern="unstructured",
        threads=1,
    )
    results = finetune(options, tmp_path)["results"]
    # eight bits at the start
    assert results["stripped"]["metric"] < results["dense"]["metric"] < 6
    assert results["stripped"]["level"] == pytest.approx(0.8, abs=1e-6)


def test_bfloat16_runs_and_keeps_float32_weights(tmp_path):
    finetune(replace(QUICK, dtype="bfloat16", epochs=1, dense_epochs=1), tmp_path)
    weights = safetensors.torch.load_file(tmp_path / STRIPPED)
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_lets_the_step_end_and_its_state_be_saved(tmp_path, uninterrupted, number):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(phase, done, total, note):
        if (phase, done) == ("sparse", 1):
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        finetune(QUICK, tmp_path, progress=interrupt)
    state = torch.load(tmp_path / STATE, weights_only=True)
    # no multiple of save_every: it was saved because of the signal
    assert (state["phase"], state["step"]) == ("sparse", 2)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    finetune(QUICK, tmp_path, resume=True)
    assert_same_result(tmp_path, uninterrupted)


def test_a_full_disk_keeps_the_last_state(tmp_path, uninterrupted, monkeypatch):
    def fill(phase, done, total, note):
        if (phase, done) == ("dense", 4):
            monkeypatch.setattr(os, "fsync", full)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        finetune(QUICK, tmp_path, progress=fill)
    assert caught.value.filename == str(tmp_path / STATE)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [STATE]
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 3
    finetune(QUICK, tmp_path, resume=True)
    assert_same_result(tmp_path, uninterrupted)


def test_a_disk_that_is_full_from_the_start_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        finetune(QUICK, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_ended_is_not_done_again(tmp_path, uninterrupted):
    before = {p.name: p.stat().st_mtime_ns for p in uninterrupted.iterdir()}
    report = finetune(QUICK, uninterrupted, resume=True)
    assert report == json.loads((uninterrupted / REPORT).read_text())
    assert {p.name: p.stat().st_mtime_ns for p in uninterrupted.iterdir()} == before


def test_the_options_of_the_saved_run_hold_unless_others_are_given(uninterrupted):
    report = finetune(Options(), uninterrupted, given=(), resume=True)
    assert report["options"]["pattern"] == "block:8x8"
    # another spelling of the same
    finetune(replace(QUICK, pattern="block:8x8"), uninterrupted, given=["pattern"], resume=True)


def test_resuming_with_another_option_names_it_and_both_values(uninterrupted):
    with pytest.raises(ValueError, match=r"has level 0\.8, got 0\.7"):
        finetune(replace(QUICK, level=0.7), uninterrupted, given=["level"], resume=True)
    with pytest.raises(ValueError, match=r"has save-every 3, got 4"):
        finetune(replace(QUICK, save_every=4), uninterrupted, resume=True)


def test_resuming_on_other_data_is_refused(tmp_path, monkeypatch):
    def kill(phase, done, total, note):
        raise Killed

    with pytest.raises(Killed):
        finetune(QUICK, tmp_path, progress=kill)
    task = load_task("digits")
    other = replace(task, data=task.data | {"sha256": "another"})
    monkeypatch.setattr(module, "load_task", lambda name: other)
    with pytest.raises(ValueError, match=r"data of 'digits' are not .*sha256 is 'another', was '"):
        finetune(QUICK, tmp_path, resume=True)


@pytest.mark.parametrize("name", [STATE, REPORT, STRIPPED])
def test_a_folder_with_such_files_is_left_alone_unless_forced(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "other").write_bytes(b"other")
    options = replace(QUICK, dense_epochs=0, epochs=1)
    with pytest.raises(FileExistsError, match=f"{name} already.*--resume.*--force"):
        finetune(options, tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine"
    finetune(options, tmp_path, force=True)
    assert (tmp_path / name).read_bytes() != b"mine"
    assert (tmp_path / "other").read_bytes() == b"other"


def test_bad_input_does_not_cost_an_earlier_run(uninterrupted):
    before = (uninterrupted / REPORT).read_bytes()
    with pytest.raises(ValueError, match="larger than the weight"):
        finetune(replace(QUICK, pattern="block:256"), uninterrupted, force=True)
    assert (uninterrupted / REPORT).read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "foreign", "format"])
def test_a_damaged_state_is_named(tmp_path, uninterrupted, damage):
    good = (uninterrupted / STATE).read_bytes()
    path = tmp_path / STATE
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(good[: len(good) // 2])
        case "text":
            path.write_text("no state")
        case "foreign":
            torch.save({"weight": torch.zeros(1)}, path)
        case "format":
            torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match=rf"{path} (is damaged|has format 99)"):
        finetune(QUICK, tmp_path, resume=True)


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": 1, "trap": Trap()}, tmp_path / STATE)
    with pytest.raises(ValueError, match="is damaged or no saved run"):
        finetune(QUICK, tmp_path, resume=True)
    assert not (tmp_path / "sprung").exists()


def test_diverging_training_is_an_error_and_no_result(tmp_path):
    with pytest.raises(ValueError, match="dense training diverged: loss nan"):
        finetune(replace(QUICK, dense_lr=1e30), tmp_path)
    assert not (tmp_path / REPORT).exists()


@pytest.mark.parametrize("importance", ["wanda", "snip", "random"])
def test_const_prunes_once_by_the_importance(tmp_path, importance):
    options = replace(QUICK, algorithm="const", dense_epochs=0, epochs=1, level=0.5)
    masks = []
    for name in ("abs", importance):
        report = finetune(replace(options, importance=name), tmp_path / name)
        assert report["results"]["stripped"]["level"] == pytest.approx(0.5, abs=0.02)
        weights = safetensors.torch.load_file(tmp_path / name / STRIPPED)
        masks.append({name: weight != 0 for name, weight in weights.items()})
    assert any(not mask.equal(masks[1][name]) for name, mask in masks[0].items())
