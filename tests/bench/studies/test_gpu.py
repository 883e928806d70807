import csv
import io
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from triton_sparsity.bench.measure import operations
from triton_sparsity.bench.measure.ceilings import Ceilings
from triton_sparsity.bench.measure.operands import Operands
from triton_sparsity.bench.measure.options import OPERATIONS, PRODUCTS
from triton_sparsity.bench.measure.record import Row, load
from triton_sparsity.bench.studies import gpu
from triton_sparsity.bench.studies.gpu import break_even, main
from triton_sparsity.bench.studies.llama import FULL, TRIAL
from triton_sparsity.bench.studies.render import render
from triton_sparsity.kernels.pattern import Block

CPU = torch.device("cpu")


def trial(folder, limit=300):
    return gpu.bench(TRIAL, CPU, folder, limit, 0.0005)


@pytest.mark.slow
def test_a_trial_on_a_cpu_goes_through_every_stage(tmp_path, capsys):
    folder = tmp_path / "a-cpu"
    folder.mkdir()
    record, right = trial(folder)
    text = capsys.readouterr().out
    assert right
    bad = [row for row in record["rows"] if row["status"] != "ok"]
    assert bad == []
    found = {row["operation"] for row in record["rows"]}
    assert found == set(OPERATIONS) - {"training step"} | {"transformer step"}
    kinds = {(r["level"], r["mask"]) for r in record["rows"] if r["operation"] == "forward"}
    assert kinds == {
        (0.5, "random"), (0.5, "skewed"), (0.8, "random"), (0.8, "skewed"), (0.2, "random"),
    }  # fmt: skip
    (step,) = (row for row in record["rows"] if row["operation"] == "transformer step")
    # a fifth of the FLOPs is left
    assert step["efficiency"] == pytest.approx(0.2 * step["speedup"], rel=0.02)
    for promise in (
        "self-check: ", "mask update block 128x128", "apply unstructured", "break-even sparsity",
        "training step of a transformer block", "Forward product, ours and theirs", "target",
    ):  # fmt: skip
        assert promise in text
    assert {row["subject"] for row in record["peers"]} >= {"ours", "dense", "STK", "blksprs"}
    assert load(folder / "gpu.json")["rows"][0]["operation"] == "apply"
    with (folder / "gpu.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(record["rows"])
    for name in ("gpu-roofline.png", "gpu-speedup.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "| block:32x32 | forward |" in render(tmp_path)


def test_a_wrong_kernel_is_a_row_and_the_rest_is_still_measured(tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(operations, "block_sparse_linear", broken)
    monkeypatch.setattr(gpu, "peers", lambda run: [])
    record, right = trial(tmp_path)
    assert not right
    status = {row["operation"]: row["status"] for row in record["rows"]}
    assert status["forward"] == status["dX"] == status["dW"] == "failed"
    assert status["apply"] == status["mask update"] == "ok"
    assert "not measured" in capsys.readouterr().out


def test_without_time_nothing_is_begun_and_all_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "checks", lambda *_: iter(()))
    record, _ = trial(tmp_path, limit=0)
    assert {row["status"] for row in record["rows"]} == {"skipped"}
    assert {row["detail"] for row in record["rows"]} == {"out of time"}
    assert {row["status"] for row in record["peers"]} == {"skipped"}


def product_rows(level, sparse, dense=(1.0, 1.0, 1.0)):
    row = Row("", "", "", "", level, "", "ok")
    return [
        replace(row, operation=o, median_s=s, dense_s=d, speedup=d / s)
        for o, s, d in zip(PRODUCTS, sparse, dense, strict=True)
    ]


def test_the_break_even_is_of_all_three_products_and_interpolated():
    found = [*product_rows(0.2, (1.5, 1.5, 1.5)), *product_rows(0.4, (0.5, 1.0, 0.75))]
    # 1.5 too much at 0.2, 0.75 too little at 0.4
    assert break_even(found) == pytest.approx(0.2 + 0.2 * 1.5 / 2.25)
    assert break_even(found[3:]) == 0.4
    assert break_even(found[:3]) is None
    # a product that failed leaves no time to add up
    assert break_even(found[:5]) is None


def test_targets_are_those_of_the_design():
    assert gpu.EFFICIENCY["dW"] == {256: 0.85, 128: 0.75, 64: 0.45, 32: 0.25}
    assert set(FULL.blocks) == set(gpu.BREAK_EVEN) == set(gpu.EFFICIENCY["forward"])
    weights = sum(s.inputs * s.outputs for s in FULL.update)
    assert weights == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--trial", "--device=cpu"], "needs --output"), (["--device=tpu"], "got 'tpu'")],
)
def test_a_bad_option_is_told(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def a_run():
    ceilings = Ceilings(copy=1e10, cache=1e11, gemm={"float32": 1e11})
    out = Console(file=io.StringIO(), width=200)
    return gpu.Run(
        TRIAL, CPU, "torch", torch.float32, ceilings, time.perf_counter() + 60, 0.0, out
    )


def test_a_self_check_that_disagrees_is_told_and_counts(monkeypatch):
    def fails():
        raise RuntimeError("no such instruction")

    checks = [("fine", lambda: None), ("wrong", lambda: "off by 1"), ("broken", fails)]
    monkeypatch.setattr(gpu, "checks", lambda *_: iter(checks))
    run = a_run()
    assert gpu.self_check(run) is False
    assert run.lines == [
        "FAILED wrong: off by 1",
        "FAILED broken: RuntimeError: no such instruction",
        "self-check: 1 of 3 agree with the reference",
    ]
    monkeypatch.setattr(gpu, "checks", lambda *_: iter(checks[:1]))
    assert gpu.self_check(a_run()) is True


def scale_gradients(model):
    # of so small a model some are pruned whole
    for weight in model.parameters():
        weight.register_hook(lambda gradient: 1.5 * gradient)


def leak_gradients(model):
    for weight in model.parameters():
        weight.register_hook(lambda gradient: gradient + gradient.abs().max())


@pytest.mark.parametrize(
    ("spoil", "level", "detail"),
    [
        (scale_gradients, 0.8, ": off by"),
        (leak_gradients, 0.8, ": off by"),
        (lambda model: None, 0.4, "groups are pruned, not"),
    ],
)
def test_a_wrong_transformer_step_is_shown_as_failed_and_is_not_timed(
    monkeypatch, spoil, level, detail
):
    sparsify = gpu.sparsify

    def spoilt(model, pattern, _, backend):
        controller = sparsify(model, pattern, level, backend)
        spoil(model)
        return controller

    monkeypatch.setattr(gpu, "sparsify", spoilt)
    run = a_run()
    gpu.transformer_step(run)
    (row,) = run.rows
    assert (row.status, row.median_s, row.speedup) == ("failed", None, None)
    assert detail in row.detail
    assert "failed" in run.lines[-1]
    assert "x (target" not in run.lines[-1]


def quiet(name):
    def stage(run):
        pass

    stage.__name__ = name
    return stage


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_a_product_that_is_wrong_has_no_time_and_ours_counts(monkeypatch, tmp_path):
    linear, ours = gpu.dense.linear, operations.block_sparse_linear
    monkeypatch.setattr(gpu.dense, "compiler", lambda device: "not under test")
    monkeypatch.setattr(gpu.dense, "linear", lambda x, w: lambda: 1.01 * linear(x, w)())
    monkeypatch.setattr(operations, "block_sparse_linear", lambda *a, **k: 1.01 * ours(*a, **k))
    found = {row["subject"]: row for row in gpu.peers(a_run())}
    for name in ("ours", "dense"):
        assert found[name]["status"] == "failed"
        assert "off by" in found[name]["detail"]
        assert "median_s" not in found[name]
    assert found["torch BSR"]["status"] == "ok"

    # theirs alone is no fault of ours
    for stage in ("applications", "updates", "transformer_step", "products", "product_table"):
        monkeypatch.setattr(gpu, stage, quiet(stage))
    monkeypatch.setattr(gpu, "checks", lambda *_: iter(()))
    for subject, right in (("ours", False), ("dense", True)):
        monkeypatch.setattr(
            gpu, "peers", lambda run, s=subject: [{"subject": s, "status": "failed"}]
        )
        assert trial(tmp_path)[1] is right


def test_who_stops_it_has_what_was_measured_until_then(monkeypatch, tmp_path):
    def stopped(run):
        run.say("a line")
        run.rows += product_rows(0.2, (1.5, 1.5, 1.5))
        run.save()
        raise KeyboardInterrupt

    stopped.__name__ = "applications"
    monkeypatch.setattr(gpu, "applications", stopped)
    monkeypatch.setattr(gpu, "checks", lambda *_: iter(()))
    with pytest.raises(KeyboardInterrupt):
        trial(tmp_path)
    record = load(tmp_path / "gpu.json")
    assert len(record["rows"]) == 3
    assert record["lines"][-1] == "a line"

    run, written = a_run(), []
    run.save = lambda: written.append(len(run.rows))
    operands = Operands(TRIAL.shapes[0], Block(32, 32), 0.5, "random", torch.float32, CPU, "torch")
    run.add(lambda: operations.operand_cases(operands, ["score", "mask"]))
    assert written == [1, 2]


def test_a_step_is_told_by_the_device_and_by_the_clock(monkeypatch):
    run = a_run()
    row = replace(product_rows(0.8, (1.0,) * 3, (3.0,) * 3)[0], host_s=0.5)
    monkeypatch.setattr(run, "add", lambda *_: [replace(row, wall_s=1.5, dense_wall_s=3.0)])
    gpu.transformer_step(run)
    assert "3.0x faster (target >= 2: reached)" in run.lines[0]
    assert (
        run.lines[1]
        == "  by the clock 1.5 s, dense 3 s: 2.0x faster; the host queues ours in 500 ms"
    )
