import json
from collections import Counter

import pytest
import safetensors.torch
import torch

from triton_sparsity.bench import recommend as job
from triton_sparsity.bench.cli import main
from triton_sparsity.bench.measure import operations
from triton_sparsity.bench.measure.model import H200
from triton_sparsity.bench.measure.shapes import Shape
from triton_sparsity.bench.measure.timing import Timing
from triton_sparsity.bench.recommend import choose, magnitude_kept, modelled_speedup
from triton_sparsity.kernels.pattern import Block, Unstructured


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


@pytest.fixture
def model(tmp_path):
    g = torch.Generator().manual_seed(0)

    def weight(rows, cols):
        # rows of very different sizes, as trained models have
        return torch.randn(rows, cols, generator=g) * torch.randn(rows, 1, generator=g).exp()

    path = tmp_path / "model.safetensors"
    weights = {"up": weight(320, 128), "down": weight(128, 320), "norm": torch.ones(128)}
    safetensors.torch.save_file(weights, path)
    return path


def test_the_magnitude_kept_agrees_with_counting_by_hand():
    # four blocks of 2 x 2 with sums of |w| 4, 8, 12, 16; an edge block of two elements in another
    first = torch.tensor([[1.0, -1, 2, 2], [1, 1, -2, 2], [3, 3, 4, -4], [3, -3, 4, 4]])
    edge = torch.tensor([[10.0], [-10.0]])
    l1, l2 = magnitude_kept([first, edge], Block(2, 2), 0.4, "torch")
    assert l1 == pytest.approx((12 + 16 + 20) / 60)
    assert l2 == pytest.approx(((36 + 64 + 200) / (4 + 16 + 36 + 64 + 200)) ** 0.5)
    l1, l2 = magnitude_kept([first, edge], Unstructured(), 0.5, "torch")
    # nine of eighteen go: four ones, four twos, a three
    assert l1 == pytest.approx(1 - 15 / 60)
    assert l2 == pytest.approx((1 - (4 + 16 + 9) / 320) ** 0.5)
    assert magnitude_kept([torch.zeros(4, 4)], Block(2, 2), 0.5, "torch") == (0, 0)


def test_no_pattern_keeps_more_than_single_weights(model):
    weights = [w for n, w in safetensors.torch.load_file(model).items() if n != "norm"]
    bound = magnitude_kept(weights, Unstructured(), 0.7, "torch")
    last = (1.0, 1.0)
    for side in (1, 16, 32, 64, 128):
        kept = magnitude_kept(weights, Block(side, side), 0.7, "torch")
        assert all(k <= b + 1e-6 for k, b in zip(kept, bound, strict=True))
        assert kept[0] <= last[0] + 1e-6
        last = kept
    assert magnitude_kept(weights, Block(1, 1), 0.7, "torch") == pytest.approx(bound, rel=1e-5)


def test_a_modelled_speedup_is_that_of_the_products_and_nothing_is_slower_than_dense():
    shapes = Counter({Shape(8192, 4096, 4096): 2})
    assert 2 < modelled_speedup(shapes, Block(128, 128), 0.8, H200) < 5
    # a slow memory makes everything equal
    slow = H200._replace(copy=1e6)
    assert 1 < modelled_speedup(shapes, Block(128, 128), 0.8, slow) < 1.2
    narrow = H200._replace(cache=1e6)
    assert modelled_speedup(shapes, Block(16, 16), 0.8, narrow) == 1


def test_the_block_that_keeps_most_among_the_fast_ones_is_chosen():
    rows = [
        {"pattern": name, "speedup": speedup, "l1_kept": kept}
        for name, speedup, kept in [
            ("unstructured", None, 0.9),
            ("block:16x16", 1.1, 0.6),
            ("block:64x64", 3.3, 0.5),
            ("block:128x128", 4.0, 0.4),
            ("block:256x256", 4.1, 0.3),
        ]
    ]
    assert choose(rows)["pattern"] == "block:64x64"


def test_a_recommendation_is_a_table_a_picture_and_one_line(model, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("autotune", "--recommend", model, "--device=cpu", "-o", output) == 0
    text = capsys.readouterr().out
    assert "modelled for an H200, not measured" in text
    record = json.loads((output / "recommend.json").read_text())
    assert text.splitlines()[-2] == record["sentence"]
    assert [row["pattern"] for row in record["rows"]] == [
        "unstructured", *(f"block:{s}x{s}" for s in (16, 32, 64, 128, 256)),
    ]  # fmt: skip
    assert record["recommended"] in [row["pattern"] for row in record["rows"]]
    assert record["rows"][0]["speedup"] is None
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "0"], "level must be in (0, 1)"),
        (["--pattern", "unstructured"], "pattern must be blocks"),
        (["--tokens", "0"], "tokens must be positive"),
        (["--output", "/proc/nothing"], "/proc/nothing"),
    ],
    ids=str,
)
def test_a_bad_option_is_one_line(model, capsys, arguments, message):
    assert run("autotune", "--recommend", model, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("triton-sparsity: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"nothing", "is damaged or no safetensors file"),
        ({"norm": torch.ones(64)}, "must hold a float weight"),
        ({"up": torch.full((64, 64), float("nan"))}, "'up' has NaN or infinity"),
    ],
    ids=["absent", "damaged", "no weight", "nan"],
)
def test_a_bad_model_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        safetensors.torch.save_file(content, path)
    assert run("autotune", "--recommend", path) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("triton-sparsity: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_wrong_product_is_not_timed_and_recommends_nothing(monkeypatch):
    timed = []

    def measure(*_, **__):
        timed.append(1)
        return Timing((1.0,))

    monkeypatch.setattr(job, "measure", measure)
    arguments = (
        Counter({Shape(16, 64, 64): 1}),
        Block(32, 32),
        0.5,
        torch.device("cpu"),
        "torch",
        0.0,
    )
    assert job._measured(*arguments) == 1
    assert len(timed) == 6
    right = operations.block_sparse_linear
    monkeypatch.setattr(operations, "block_sparse_linear", lambda *a, **k: 2 * right(*a, **k))
    timed.clear()
    with pytest.raises(ValueError, match=r"recommend: 16x64x64 block 32x32 forward: off by"):
        job._measured(*arguments)
    assert timed == []
