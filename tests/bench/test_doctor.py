import json

import pytest
import torch

from triton_sparsity.bench import doctor_checks as job
from triton_sparsity.bench.cli import main
from triton_sparsity.kernels import tuning
from triton_sparsity.kernels.topology import Topology


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
    # four steps of bfloat16's rounding are 3 %
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.1


def wrong_gradient(function):
    def broken(*args, **kwargs):
        found = function(*args, **kwargs)
        # the same value, another derivative
        return found.detach() + (found - found.detach()) * 1.1

    return broken


def wrong_rows(function):
    def broken(*args, **kwargs):
        masks, nonfinite = function(*args, **kwargs)
        return [~masks[0], *masks[1:]], nonfinite

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


def wrong_gradient_to(argument):
    """Let the gradient to one argument be wrong, and nothing else."""

    def breaks(function):
        def broken(*args, **kwargs):
            args = list(args)
            args[argument] = args[argument] + 0.1 * (args[argument] - args[argument].detach())
            return function(*args, **kwargs)

        return broken

    return breaks


def wrong_field(field):
    def breaks(function):
        def broken(*args, **kwargs):
            found = function(*args, **kwargs)
            part = found[field]
            wrong = ~part if part.dtype in (torch.bool, torch.uint8) else part + 1
            return type(found)(*found[:field], wrong, *found[field + 1 :])

        return broken

    return breaks


def wrong_bits(function):
    return lambda *args, **kwargs: ~function(*args, **kwargs)


LINEAR = "block_sparse_linear"


@pytest.mark.parametrize(
    ("function", "breaks", "name", "problem"),
    [
        ("block_score", wrong_value, "block_score", "value"),
        ("block_score", wrong_gradient, "block_score", "gradient"),
        ("apply_mask", wrong_value, "apply_mask", "value"),
        ("apply_mask", wrong_gradient, "apply_mask", "gradient"),
        ("apply_mask_", nothing, "apply_mask", "in place"),
        ("count_leaks", wrong_value, "apply_mask", "leaks"),
        (
            "take_all_pruned",
            lambda take: lambda w, *rest, **more: take([w[0].clone()], *rest, **more),
            "apply_mask",
            "empt",
        ),
        ("put_all_back_", nothing, "apply_mask", "put back"),
        (LINEAR, wrong_value, LINEAR, "value"),
        (LINEAR, wrong_gradient_to(0), LINEAR, "gradient to x"),
        (LINEAR, wrong_gradient_to(1), LINEAR, "gradient to weight"),
        (LINEAR, wrong_gradient_to(3), LINEAR, "gradient to bias"),
        ("select", wrong_field(0), "select", "k = 1: value"),
        ("select", wrong_field(1), "select", "k = 0: keep_ties"),
        ("make_mask", wrong_list, "select", "k = 0: mask"),
        ("select_each", wrong_field(0), "select_each", "value"),
        ("prune_rows", wrong_rows, "prune_rows", "k = 0: mask"),
        ("kept_counts", lambda f: lambda *a, **b: f(*a, **b) + 1, "select_each", "counts"),
        ("pack", wrong_bits, "pack", "packed"),
        ("unpack", wrong_bits, "pack", "unpacked"),
        *(
            ("block_topology", wrong_field(i), "block_topology", field)
            for i, field in enumerate(Topology._fields)
        ),
        ("nm_mask", wrong_field(0), "nm_mask", "mask"),
        ("nm_score", wrong_value, "nm_mask", "score"),
        ("sample_mask", wrong_value, "sample_mask", "value"),
        ("sample_mask", wrong_gradient_to(0), "sample_mask", "gradient to weight"),
        ("sample_mask", wrong_gradient_to(1), "sample_mask", "gradient to scores"),
        ("straight_through", wrong_value, "straight_through", "value"),
        ("straight_through", wrong_gradient_to(0), "straight_through", "gradient to weight"),
        ("straight_through", wrong_gradient_to(1), "straight_through", "gradient to scores"),
    ],
)
def test_every_check_of_a_kernel_that_is_wrong_fails(
    monkeypatch, capsys, function, breaks, name, problem
):
    monkeypatch.setattr(job, function, breaks(getattr(job, function)))
    assert run("doctor", "--device=cpu", "--json") == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    mine = [row for row in rows if row["check"].split()[0].rstrip(",") == name]
    assert mine
    for row in mine:
        assert row["status"] == "failed", row
    assert any(row["detail"].startswith(problem) for row in mine), mine
    # what is computed by a kernel that is wrong is wrong as well, everything else is right
    others = {row["check"].split()[0] for row in rows if row["status"] == "failed"} - {
        name,
        f"{name},",
    }
    assert others <= ({LINEAR} if function == "block_topology" else set())


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
