import json

import pytest

from triton_sparsity.bench import doctor_checks as job
from triton_sparsity.bench.cli import main
from triton_sparsity.kernels import tuning


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


def test_a_healthy_machine_passes_and_is_told_what_runs_and_why(capsys):
    assert run("doctor", "--device=cpu") == 0
    text = capsys.readouterr().out
    for word in ("versions", "backend      torch: ", "tuning table none", "nncf", "self-check"):
        assert word in text
    assert "FAILED" not in text


def test_json_is_all_that_is_printed(capsys):
    assert run("doctor", "--device=cpu", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    names = {row["check"].split()[0].rstrip(",") for row in record["rows"]}
    assert names >= {"block_score", "apply_mask", "block_sparse_linear", "select", "pack"}
    assert names >= {"block_topology"}
    assert record["seconds"] < 60


def wrong_value(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.01


def wrong_gradient(function):
    def broken(*args, **kwargs):
        found = function(*args, **kwargs)
        # the same value, another derivative
        return found.detach() + (found - found.detach()) * 1.1

    return broken


def wrong_list(function):
    def broken(*args, **kwargs):
        found = function(*args, **kwargs)
        first = found[0]
        return (
            type(found)(first + 1, *found[1:])
            if isinstance(found, tuple)
            else [~first, *found[1:]]
        )

    return broken


def nothing(function):
    return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("function", "breaks", "problem"),
    [
        ("block_score", wrong_value, "value"),
        ("block_score", wrong_gradient, "gradient"),
        ("apply_mask", wrong_value, "value"),
        ("apply_mask", wrong_gradient, "gradient"),
        ("apply_mask_", nothing, "in place"),
        ("block_sparse_linear", wrong_value, "value"),
        ("block_sparse_linear", wrong_gradient, "gradient to x"),
        ("select", wrong_list, "k = 1: value"),
        ("make_mask", wrong_list, "k = 0: mask"),
        ("pack", lambda function: lambda *a, **k: ~function(*a, **k), "packed"),
        ("unpack", lambda function: lambda *a, **k: ~function(*a, **k), "unpacked"),
        ("block_topology", wrong_list, "row_tasks"),
        ("masked_linear", wrong_value, "value"),
        ("masked_linear", wrong_gradient, "gradient to x"),
        ("nm_mask", lambda f: lambda *a, **k: f(*a, **k)._replace(mask=~f(*a, **k).mask), "mask"),
        ("nm_score", wrong_value, "score"),
        ("sample_mask", wrong_value, "value"),
        ("sample_mask", wrong_gradient, "gradient to weight"),
        ("straight_through", wrong_value, "value"),
    ],
)
def test_every_kernel_that_is_wrong_is_found(monkeypatch, capsys, function, breaks, problem):
    monkeypatch.setattr(job, function, breaks(getattr(job, function)))
    assert run("doctor", "--device=cpu", "--json") == 1
    failed = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["status"] == "failed"]
    assert failed
    assert any(row["detail"].startswith(problem) for row in failed), failed


def test_a_kernel_that_raises_is_one_failed_check(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(job, "pack", broken)
    assert run("doctor", "--device=cpu") == 1
    text = capsys.readouterr().out
    assert "FAILED       pack, unpack: RuntimeError: no such instruction" in text
    assert text.count("FAILED") == 1


def test_a_bad_tuning_table_is_told(monkeypatch, capsys, tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{}")
    monkeypatch.setattr(tuning, "user_file", lambda name: path)
    assert run("doctor", "--device=cpu") == 0
    assert "is ignored: it must have format 1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--device=tpu"], ["--backend=cudnn"]])
def test_a_bad_option_is_one_line(capsys, arguments):
    assert run("doctor", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("triton-sparsity: error: ")
    assert captured.err.count("\n") == 1
