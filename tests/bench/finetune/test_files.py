"""Folders that somebody else has changed: resumed right, or refused by a file's name."""

import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict, replace

import pytest

from spoil import ODD, TENSORS, flipped, spoilt, spoilt_bytes
from triton_sparsity.bench.finetune import files, job, loop
from triton_sparsity.bench.finetune.files import DENSE, REPORT, STATE, STRIPPED, save_state
from triton_sparsity.bench.finetune.job import finetune, read_options
from triton_sparsity.bench.finetune.options import Options
from triton_sparsity.bench.measure.memory import shortage

QUICK = Options(
    task="digits",
    pattern="block:8",
    level=0.75,
    dense_epochs=1,
    epochs=1,
    steps_per_epoch=2,
    batch_size=4,
    eval_batches=1,
    save_every=1,
    threads=1,
)
# FOLDERS=4000 spoils more of them
CASES = int(os.environ.get("FOLDERS", "75"))


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def draw_nothing(monkeypatch):
    monkeypatch.setattr(job, "curves", lambda runs: b"")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    finetune(QUICK, folder)
    return folder


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A run with a sparse step done and one to go."""
    folder = tmp_path_factory.mktemp("broken off")

    def kill(phase, done, total, note):
        if (phase, done) == ("sparse", 1):
            raise Killed

    with pytest.raises(Killed):
        finetune(QUICK, folder, progress=kill)
    return folder


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).digest() for p in folder.iterdir()}


def resumed(folder):
    """Resume; return the report without times, or the error's message, and change nothing then."""
    before = contents(folder)
    try:
        report = finetune(Options(), folder, given=(), resume=True)
    except (ValueError, OSError) as error:
        assert contents(folder) == before
        return str(error)
    # a list is a tuple's in JSON
    return without_times(json.loads(json.dumps(report)))


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return value


def test_a_batch_that_no_memory_holds_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        MemoryError, match=r"\d+ bytes for a batch of 2000000000 examples"
    ) as caught:
        finetune(replace(QUICK, batch_size=2_000_000_000), tmp_path / "run")
    assert "bytes could not be had on the host" in shortage(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_saved_no_step_is_in_nobodys_way(tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", fail)
        for options in (QUICK, QUICK, replace(QUICK, seed=1)):
            with pytest.raises(MemoryError):
                finetune(options, folder)
        assert [p.name for p in folder.iterdir()] == [STATE]
    # one that has is the next start's only if it is told so
    finetune(replace(QUICK, seed=2), folder)
    with pytest.raises(FileExistsError, match="--resume goes on with that run"):
        finetune(QUICK, folder)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", "", '{"results": {}}', "\x00", "[" * 9999]
)
def test_a_report_that_is_none_is_one_error_that_names_it(tmp_path, ended, content):
    folder = shutil.copytree(ended, tmp_path / "run")
    (folder / REPORT).write_text(content)
    assert resumed(folder).startswith(f"{folder / REPORT} is damaged")


def test_options_are_read_as_they_were_given():
    given = asdict(replace(QUICK, scope=("layers",), lr=1))
    assert repr(read_options(given)) == repr(Options(**given))
    for change in ({"epochs": True}, {"scope": "layers"}, {"lr": "1"}, {"task": None}):
        with pytest.raises(ValueError, match=f"^{next(iter(change))} must be .*, got"):
            read_options(given | change)


@pytest.mark.parametrize("name", [STATE, DENSE, STRIPPED, REPORT])
def test_a_flipped_bit_is_found_in_whatever_is_stored(tmp_path, ended, name):
    folder = shutil.copytree(ended, tmp_path / "run")
    content = (ended / name).read_bytes()
    (folder / name).write_bytes(flipped(content, len(content) * 2 // 3))
    assert str(folder / name) in resumed(folder)


def test_a_flipped_bit_in_the_dense_weights_is_found_before_a_run_ends(tmp_path, broken_off):
    folder = shutil.copytree(broken_off, tmp_path / "run")
    content = (folder / DENSE).read_bytes()
    (folder / DENSE).write_bytes(flipped(content, len(content) // 2))
    with pytest.raises(ValueError, match=f"{folder / DENSE} is damaged"):
        finetune(Options(), folder, given=(), resume=True)
    assert not (folder / REPORT).exists()


def spoil(draw, folder):
    """Do something to a folder that no run does."""
    path = draw.choice(sorted(folder.iterdir()))
    kind = draw.choice(["bytes", "swap", "entry", "entry"])
    match kind:
        case "bytes":
            kind, content = spoilt_bytes(draw, path.read_bytes())
            path.write_bytes(content)
        case "swap":
            path.write_bytes(draw.choice(sorted(folder.iterdir())).read_bytes())
        case "entry":
            # by a program that knows the format, the checksum too
            save_state(folder, spoilt(draw, files.load_state(folder), (*ODD, *TENSORS)))
    return f"{kind} {path.name}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_spoilt_folder_is_refused_by_name_or_ends_right(tmp_path, ended, broken_off):
    draw = random.Random(0)
    whole = without_times(json.loads((ended / REPORT).read_text()))
    for i in range(CASES):
        source = draw.choice([ended, broken_off])
        folder = shutil.copytree(source, tmp_path / f"run{i}")
        what = spoil(draw, folder)
        found = resumed(folder)
        if isinstance(found, str):
            assert str(folder) in found or "the run to resume has" in found, (what, found)
        elif what.startswith("entry"):
            # what it says may be another run, as good as the one that is gone
            assert found["results"].keys() == whole["results"].keys(), what
        else:
            assert found == whole, what
        shutil.rmtree(folder)
