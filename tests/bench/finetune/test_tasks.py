import hashlib
import math
import sys

import numpy as np
import pytest
import torch

from triton_sparsity.bench.finetune.tasks import load_task, read_sources, stdlib_lm


@pytest.fixture
def sources(tmp_path):
    """A tree of 200 small modules, and some that do not count."""
    for i in range(200):
        path = tmp_path / f"package{i % 7}" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"# module {i} #\n".encode() * 20 + b"\xff\x00")
    for skipped in ("test", "site-packages/other", "package1/tests", "encodings"):
        path = tmp_path / skipped / "skipped.py"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"SKIPPED")
    (tmp_path / "data.txt").write_bytes(b"SKIPPED")
    return tmp_path


def test_every_source_is_either_trained_on_or_held_out(sources):
    train, held_out, _ = (
        part if isinstance(part, str) else part.tobytes() for part in read_sources(sources)
    )
    for i in range(200):
        assert (f"module {i} #".encode() in train) != (f"module {i} #".encode() in held_out)
    assert b"SKIPPED" not in train + held_out
    assert 0 < len(held_out) < len(train) / 5


def test_which_files_are_held_out_depends_on_their_names_alone(sources):
    before = read_sources(sources)[1].tobytes()
    (sources / "zzz.py").write_bytes(b"# one more\n")
    assert before in read_sources(sources)[1].tobytes() + b"\n"


def test_the_fingerprint_follows_names_and_contents(sources):
    seen = {read_sources(sources)[2]}
    path = sources / "package1" / "module1.py"
    path.write_bytes(path.read_bytes()[::-1])
    seen.add(read_sources(sources)[2])
    path.rename(path.with_name("renamed.py"))
    seen.add(read_sources(sources)[2])
    assert len(seen) == 3


def test_a_library_without_sources_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match=f"no Python source.*{tmp_path}"):
        stdlib_lm(tmp_path)


def test_targets_of_the_language_model_are_the_next_bytes(sources):
    task = stdlib_lm(sources)
    inputs, targets = task.batch(4, 0, 0, 0)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.shape == targets.shape
    assert inputs.dtype == torch.int64


def test_the_language_model_sees_no_later_byte(sources):
    torch.manual_seed(0)
    task = stdlib_lm(sources)
    model, (inputs, _) = task.build(), task.batch(2, 0, 0, 0)
    changed = inputs.clone()
    changed[:, 60:] = 0
    before, after = model(inputs), model(changed)
    torch.testing.assert_close(before[:, :60], after[:, :60])
    assert not torch.allclose(before[:, 60:], after[:, 60:])


def test_a_language_model_that_knows_nothing_scores_eight_bits_a_byte(sources):
    task = stdlib_lm(sources)
    model = task.build()
    inputs, targets = task.held_out[0]
    with torch.no_grad():
        model.head.weight.zero_()
        scores = task.score(model(inputs), targets)
    assert scores.numel() == targets.numel()
    assert math.isclose(scores.mean(), 8, rel_tol=1e-6)


@pytest.mark.parametrize("name", ["stdlib-lm", "digits"])
def test_batches_are_a_pure_function_of_seed_phase_and_step(name):
    task, other = load_task(name), load_task(name)
    seen = set()
    for stream in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**62, 0, 0)]:
        inputs, targets = task.batch(8, *stream)
        again, same_targets = other.batch(8, *stream)
        assert torch.equal(inputs, again)
        assert torch.equal(targets, same_targets)
        seen.add(hashlib.sha256(inputs.numpy().tobytes()).hexdigest())
    assert len(seen) == 5


def test_no_image_is_both_trained_on_and_held_out():
    task = load_task("digits")
    held_out = {image.numpy().tobytes() for inputs, _ in task.held_out for image in inputs}
    assert len(held_out) == task.data["held_out_images"]
    for step in range(20):
        inputs, _ = task.batch(256, 0, 0, step)
        assert held_out.isdisjoint(image.numpy().tobytes() for image in inputs)


def test_digits_are_scored_by_the_share_of_right_answers():
    task = load_task("digits")
    targets = torch.arange(10)
    logits = torch.eye(10)[np.r_[0:5, 4, 3, 2, 1, 0]]
    assert task.score(logits, targets).sum() == 5


def test_digits_without_sklearn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn: pip install"):
        load_task("digits")


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"task must be .* got 'mnist'"):
        load_task("mnist")
