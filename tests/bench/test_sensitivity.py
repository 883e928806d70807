"""The scan of a model's weights by level, and the levels that it proposes."""

import json
import math

import pytest
import torch
import transformers as hf

import triton_sparsity as ts
from tiny_folders import save_model, save_rows, save_text
from triton_sparsity.bench.cli import main
from triton_sparsity.bench.sensitivity_levels import allocate


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


def test_the_flattest_pieces_are_taken_first():
    sizes = {"a": 100, "b": 100, "c": 200}
    curves = {
        "a": {0.5: 1.0, 0.9: 9.0},  # slopes 1 / 50, then 8 / 40
        "b": {0.5: 0.0, 0.9: 4.0},  # nothing, then 4 / 40
        "c": {0.5: 10.0, 0.9: 18.0},  # 18 / 180 throughout, as its hull has no corner at 0.5
    }
    assert allocate(sizes, curves, 0.125) == {"a": 0.0, "b": 0.5, "c": 0.0}
    assert allocate(sizes, curves, 0.25) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert allocate(sizes, curves, 0.35) == {"a": 0.5, "b": 0.9, "c": 0.0}
    levels = allocate(sizes, curves, 0.575)
    assert levels == {"a": 0.5, "b": 0.9, "c": pytest.approx(0.45)}
    assert allocate(sizes, curves, 0.9) == {"a": 0.9, "b": 0.9, "c": 0.9}


def test_noise_and_overflow_do_not_mislead():
    # more pruning that seems to help is noise; a loss that is not finite comes last
    sizes = {"noisy": 100, "fine": 100, "broken": 100}
    curves = {
        "noisy": {0.5: 2.0, 0.9: -1.0},
        "fine": {0.5: 0.1, 0.9: 0.2},
        "broken": {0.5: math.nan, 0.9: 1.0},
    }
    assert allocate(sizes, curves, 0.3) == {"noisy": 0.0, "fine": 0.9, "broken": 0.0}
    assert allocate(sizes, curves, 0.6) == {"noisy": 0.9, "fine": 0.9, "broken": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model("Llama", folder / "Llama")
    save_text(folder / "text.txt", 16 * 20)
    return folder


def scan(folder, *more):
    options = ("--max-length=16", "--threads=1", "--levels=0.5,0.9", "--level=0.7")
    data = ("--data", folder / "text.txt")
    return run("sensitivity", folder / "Llama", *data, *options, "--batches=2", *more)


def test_every_weight_is_scanned_and_the_levels_reach_the_budget(folder, tmp_path, capsys):
    assert scan(folder, "--pattern=block:8", "--pattern=nm:2:4", "-o", tmp_path / "found") == 0
    text = capsys.readouterr().out
    assert "with these levels" in text
    assert (tmp_path / "found" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "found" / "sensitivity.json").read_text())
    blocks, pairs = record["proposals"]
    assert blocks["level"] == pytest.approx(0.7)
    assert pairs["level"] == 0.5
    assert set(pairs["levels"].values()) == {0.5}
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "Llama")
    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert set(blocks["levels"]) == names
    assert len(record["rows"]) == len(names) * 3
    # what is proposed is what overrides take
    overrides = [
        ts.Override(scope=name, minimum_level=level, maximum_level=level)
        for name, level in blocks["levels"].items()
    ]
    config = ts.MagnitudeSparsityConfig(pattern=ts.Block(8, 8), overrides=overrides)
    controller = ts.create_controller(model, config)
    controller.set_sparsity_level(blocks["level"])
    for info in controller.sparsified_module_info:
        found = info.operand.pruned_groups() / info.operand.groups
        assert found == pytest.approx(blocks["levels"][info.module_node_name], abs=0.01)


def test_a_scanned_weight_has_its_values_back(folder, capsys):
    # of the second scan each loss is that of the first: nothing is left of it
    assert scan(folder, "--pattern=block:8", "--pattern=block:8", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert first == second
    assert max(abs(row["increase"]) for row in rows) > 0


@pytest.mark.parametrize("importance", ["wanda", "snip"])
def test_criteria_that_look_at_data_see_some(folder, capsys, importance):
    found = []
    for name in ("abs", importance):
        assert scan(folder, "--pattern=unstructured", f"--importance={name}", "--json") == 0
        found.append(json.loads(capsys.readouterr().out)["rows"])
    assert found[0] != found[1]


def test_an_encoder_is_compared_with_its_dense_embeddings(tmp_path, capsys):
    save_model("BERT-bare", tmp_path / "BERT")
    save_rows(tmp_path / "rows.jsonl", 12)
    arguments = ("--data", tmp_path / "rows.jsonl", "--max-length=16", "--threads=1", "--json")
    levels = ("--levels=0.9", "--pattern=block:8")
    assert run("sensitivity", tmp_path / "BERT", *arguments, *levels) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["objective"] == "embedding"
    assert record["loss"] == pytest.approx(0, abs=1e-6)
    assert record["proposals"][0]["loss"] > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--levels=1.5", "levels must be in (0, 1), got 1.5"),
        ("--levels=0.5", "levels must go up to the level 0.7"),
        ("--pattern=block:0", "rows must be a power of two"),
        ("--importance=l2", "importance must be one of"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, option, message):
    assert scan(folder, option) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
