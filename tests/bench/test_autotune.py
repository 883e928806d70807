import json
import os
import random
import signal
import time

import pytest
import torch

from forks import fork
from spoil import spoilt, spoilt_bytes
from triton_sparsity.bench import autotune as job
from triton_sparsity.bench.autotune import crossing, make_search
from triton_sparsity.bench.autotune_tiles import descend, neighbours
from triton_sparsity.bench.autotune_tiles import usable as usable_tile
from triton_sparsity.bench.cli import main
from triton_sparsity.bench.measure import operations
from triton_sparsity.bench.measure.cases import Built
from triton_sparsity.bench.measure.counts import tile_of
from triton_sparsity.bench.measure.shapes import Shape
from triton_sparsity.bench.measure.tables import show_tuning
from triton_sparsity.bench.measure.timing import Timing
from triton_sparsity.kernels import dispatch, tiles, tuning
from triton_sparsity.kernels.pattern import Block
from triton_sparsity.kernels.tiles import Tile

CPU = torch.device("cpu")
START = Tile(128, 64, 32, 4, 3, 1)
QUICK = [
    "--shapes=16x64x128",
    "--pattern=block:32",
    "--pattern=block:64",
    "--budget=0.0001",
    "--device=cpu",
    "--threads=1",
]


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


def cost(tile):
    """A smooth valley with its floor at m = 256, k = 64, 8 warps, 5 stages, 1 program,
    warps of two kinds.
    """
    goal = Tile(256, 64, 64, 8, 5, 1, 1)
    pairs = zip(tile[:6], goal[:6], strict=True)
    away = sum(abs(a / b - 1) + abs(b / a - 1) for a, b in pairs)
    return 1 + away + (tile.specialised != goal.specialised)


def test_the_descent_ends_where_no_neighbour_is_faster():
    found, seconds, tried = descend(START, lambda tile: True, lambda tile, _: cost(tile), 200)
    assert found == Tile(256, 64, 64, 8, 5, 1, 1)
    assert seconds == cost(found) == min(tried.values())
    assert all(cost(tile) >= seconds for tile in neighbours(found))


def test_the_descent_keeps_to_its_limits():
    tried = []

    def time(tile, best):
        tried.append(tile)
        # each is told the best so far, so that it can give up
        assert best is None if len(tried) == 1 else best == min(map(cost, tried[:-1]))
        return cost(tile)

    found, _, seen = descend(START, lambda tile: tile.warps == 4, time, 6)
    assert len(tried) == len(seen) == 6
    assert all(tile.warps == 4 for tile in tried)
    assert found in tried


def test_a_tile_that_does_not_work_is_no_candidate():
    found, seconds, tried = descend(
        START, lambda tile: True, lambda tile, _: cost(tile) if tile == START else None, 50
    )
    assert (found, seconds) == (START, cost(START))
    assert len(tried) > 5
    with pytest.raises(ValueError, match="own tile"):
        descend(START, lambda tile: True, lambda tile, _: None, 50)


def test_usable_tiles_fit_the_device_and_the_blocks():
    device = tiles.Device((9, 0), 132, 228 * 1024)

    def usable(tile, direction="forward", block=(64, 64), **changes):
        given = {"device": device, "size": 2, "specialise": True} | changes
        return usable_tile(
            tile, direction=direction, shape=(256, 256), block=Block(*block), least=20.0, **given
        )

    assert usable(Tile(128, 64, 64, 4, 4, 1))
    assert not usable(Tile(128, 128, 64, 8, 3, 1))  # wider than the block
    assert not usable(Tile(512, 64, 64, 8, 8, 1))  # more shared memory than there is
    assert not usable(Tile(512, 64, 32, 4, 2, 1))  # 256 sums a thread
    assert not usable(Tile(16, 16, 64, 4, 3, 1))  # reads far too much
    assert usable(Tile(128, 32, 32, 4, 4, 1), "dgrad", (64, 32))
    assert not usable(Tile(128, 64, 32, 4, 4, 1), "dgrad", (64, 32))
    assert usable(Tile(64, 256, 32, 4, 3, 1), "wgrad")
    assert not usable(Tile(64, 128, 32, 4, 3, 1), "wgrad")
    two_kinds = Tile(128, 64, 64, 4, 4, 1, 1)
    assert usable(two_kinds)
    assert not usable(two_kinds, specialise=False)
    assert not usable(two_kinds, size=4)
    assert not usable(two_kinds, device=device._replace(capability=(10, 0)))
    assert not usable(two_kinds._replace(warps=16))
    assert not usable(Tile(64, 256, 32, 4, 3, 1, 1), "wgrad")


@pytest.mark.parametrize(("slope", "found"), [(10, 0.1), (2, 0.5), (1.25, 0.8)])
def test_the_crossing_is_where_sparse_takes_as_long_as_dense(slope, found):
    assert crossing(lambda density: (slope * density, 1.0)) == pytest.approx(found, abs=0.031)
    # never above it
    assert slope * crossing(lambda density: (slope * density, 1.0)) <= 1


def test_sparse_may_pay_always_or_never():
    assert crossing(lambda density: (0.5, 1.0)) == 1
    assert crossing(lambda density: (1.5, 1.0)) == 0


def test_a_table_is_written_read_and_used(tmp_path, capsys, monkeypatch):
    output = tmp_path / "table.json"
    assert run("autotune", *QUICK, "-o", output) == 0
    text = capsys.readouterr().out
    assert "no Triton on this device" in text
    assert str(output) in text
    content = json.loads(output.read_text())
    assert content["tiles"] == []
    assert [row["block"] for row in content["break_even"]] == [[32, 32], [64, 64]]
    # a line an entry
    assert len(output.read_text().splitlines()) < 25

    # say that it pays at any density, and the dispatch follows
    for row in content["break_even"]:
        row |= {"forward": 1.0, "dgrad": 0.0, "wgrad": 1.0}
    output.write_text(json.dumps(content))
    monkeypatch.setattr(tuning, "user_file", lambda name: output)
    tuning.table.cache_clear()
    paths = dispatch.choose(8, (128, 64), Block(32, 32), torch.float32, CPU, triton_runs=False)
    assert paths == (True, False, True)


def count_measurements(monkeypatch):
    measured = []
    built = job._built

    def counting(operands, direction):
        measured.append((operands.pattern, direction))
        return built(operands, direction)

    monkeypatch.setattr(job, "_built", counting)
    return measured


def test_a_second_run_measures_only_what_is_missing(tmp_path, monkeypatch):
    output = tmp_path / "table.json"
    measured = count_measurements(monkeypatch)
    assert run("autotune", *QUICK[:2], *QUICK[3:], "-o", output) == 0
    assert {pattern for pattern, _ in measured} == {Block(32, 32)}
    first = json.loads(output.read_text())["break_even"]
    measured.clear()
    assert run("autotune", *QUICK, "-o", output) == 0
    assert {pattern for pattern, _ in measured} == {Block(64, 64)}
    assert json.loads(output.read_text())["break_even"][:1] == first
    measured.clear()
    assert run("autotune", *QUICK, "-o", output) == 0
    assert measured == []
    assert run("autotune", *QUICK, "-o", output, "--force") == 0
    assert {pattern for pattern, _ in measured} == {Block(32, 32), Block(64, 64)}


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    output = tmp_path / "table.json"
    row = job._break_even_row

    def interrupted(head, search, shape, block, *rest):
        if block == Block(64, 64):
            raise KeyboardInterrupt
        return row(head, search, shape, block, *rest)

    monkeypatch.setattr(job, "_break_even_row", interrupted)
    assert run("autotune", *QUICK, "-o", output) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(json.loads(output.read_text())["break_even"]) == 1


def test_what_fails_does_not_keep_the_rest_from_being_measured(tmp_path, monkeypatch, capsys):
    output = tmp_path / "table.json"
    row = job._break_even_row

    def fails(head, search, shape, block, *rest):
        if block == Block(32, 32):
            raise ValueError("autotune: it is all wrong")
        return row(head, search, shape, block, *rest)

    monkeypatch.setattr(job, "_break_even_row", fails)
    assert run("autotune", *QUICK, "-o", output) == 2
    error = capsys.readouterr().err
    assert "1 of 2 could not be measured" in error
    assert "it is all wrong" in error
    (row,) = json.loads(output.read_text())["break_even"]
    assert row["block"] == [64, 64]


def test_a_search_that_is_refused_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "user_file", lambda name: tmp_path / "folder" / "table.json")
    assert run("autotune", "--shapes", "huge") == 2
    assert list(tmp_path.iterdir()) == []
    assert run("autotune", "--shapes", "huge", "-o", tmp_path / "table.json") == 2
    assert list(tmp_path.iterdir()) == []


def test_the_search_starts_from_the_kernels_own_tile_and_tries_its_others(tmp_path, monkeypatch):
    start, timed, search = tile_row(tmp_path, monkeypatch, lambda own: None)
    others = job.tiles_of("forward", (256, 256), Block(64, 64), torch.bfloat16, CPU)[1:]
    # what an earlier search found is no start
    key = "forward", (256, 256), Block(64, 64), torch.bfloat16
    monkeypatch.setitem(tiles.measured, key, start._replace(warps=2 * start.warps))
    search()
    assert timed[:2] == [start, others[0]]


def test_a_measured_tile_counts_in_the_tile_of_a_product(monkeypatch):
    weight, dtype = (4096, 4096), torch.bfloat16
    own = tile_of("forward", weight, Block(64, 64), dtype, CPU)
    other = own._replace(warps=own.warps * 2)
    monkeypatch.setitem(tiles.measured, ("forward", weight, Block(64, 64), dtype), other)
    assert tile_of("forward", weight, Block(64, 64), dtype, CPU) == other
    assert job.tiles_of("forward", weight, Block(64, 64), dtype, CPU)[0] == own


@pytest.mark.slow
def test_a_stopped_process_says_how_to_go_on(tmp_path):
    output = tmp_path / "table.json"
    slow = ["--shapes=16x256x256,512x2048x2048", "--device=cpu", "--budget=0.1", "--threads=1"]
    stopped = fork(main, ["autotune", *slow, "-o", str(output)], folder=tmp_path)
    deadline = time.monotonic() + 60
    while not output.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(stopped.process.pid, signal.SIGINT)
    assert stopped.wait() == 130
    assert "the same command goes on" in stopped.err.read_text()


@pytest.mark.parametrize("change", [{"triton": "1.0"}, {"kernels": "0"}, {"tiles": [3]}])
def test_a_stale_or_damaged_table_is_replaced_with_a_warning(tmp_path, capsys, change):
    output = tmp_path / "table.json"
    assert run("autotune", *QUICK[:2], *QUICK[3:], "-o", output) == 0
    content = json.loads(output.read_text())
    capsys.readouterr()
    output.write_bytes(job.dump(content | change))
    assert run("autotune", *QUICK[:2], *QUICK[3:], "-o", output) == 0
    errors = capsys.readouterr().err
    assert errors.count("warning: tuning table") == 1
    assert "is replaced" in errors
    tuning.read(output, tuning.identity(CPU))


def test_a_spoilt_table_is_refused_when_it_is_read_or_goes_on(tmp_path, monkeypatch, capsys):
    search = make_search(device="cpu", backend="torch", output=tmp_path / "table.json")
    row = {"weight": [128, 64], "block": [32, 32], "dtype": "float32", "tokens": 16}
    tile = row | {"direction": "forward", "tile": Tile(16, 32, 32, 4, 2, 1, 0)._asdict()}
    tile |= {"seconds": 1.0, "default_seconds": 2.0, "tried": 3}
    even = row | dict.fromkeys(("forward", "dgrad", "wgrad", "total"), 0.5)
    content = job._start(search, pytest.fail) | {"tiles": [tile], "break_even": [even]}
    draw, refused = random.Random(0), []
    for i in range(250):
        if i % 2:
            changed = json.dumps(spoilt(draw, content)).encode()
        else:
            _, changed = spoilt_bytes(draw, job.dump(content))
        search.output.write_bytes(changed)
        before = len(refused)
        found = job._start(search, refused.append)
        show_tuning(found, search.output)
        # a new table, or one that says all that a report shows
        assert (found["tiles"] == []) == (len(refused) > before or not changed), changed
    assert 25 < len(refused) < 225
    assert all(line.startswith(f"tuning table {search.output} is replaced") for line in refused)


def test_another_file_is_never_replaced(tmp_path, capsys):
    output = tmp_path / "package.json"
    output.write_text('{"name": "mine"}')
    assert run("autotune", *QUICK, "-o", output) == 2
    assert "output must be a tuning table or a new file" in capsys.readouterr().err
    assert output.read_text() == '{"name": "mine"}'


def test_the_default_place_is_the_users_cache(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "tuning" / "cpu.json"
    monkeypatch.setattr(tuning, "user_file", lambda name: path)
    search = make_search(shapes="16x64x128", device="cpu")
    assert search.output == path
    assert path.parent.is_dir()
    assert search.shapes == (Shape(16, 64, 128),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "huge"], "shapes must be one of llama3-8b"),
        (["--pattern", "unstructured"], "pattern must be blocks of at least 16 a side"),
        (["--pattern", "block:8"], "got 'block 8x8'"),
        (["--dtype", "float64"], "dtype must be one of float32, bfloat16, float16"),
        (["--level", "1"], "level must be in [0, 1)"),
        (["--candidates", "0"], "candidates must be positive"),
        (["--device", "tpu"], "got 'tpu'"),
        (["--output", "/proc/nothing/table.json"], "/proc/nothing/table.json"),
        (["--recommend", "m.safetensors", "--force"], "--recommend takes shapes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line(tmp_path, capsys, arguments, message):
    output = [] if "--output" in arguments else ["-o", tmp_path / "table.json"]
    assert run("autotune", *output, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("triton-sparsity: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_wrong_kernel_gets_no_break_even_and_is_not_timed(tmp_path, monkeypatch, capsys):
    right, timed = operations.block_sparse_linear, []
    monkeypatch.setattr(operations, "block_sparse_linear", lambda *a, **k: 2 * right(*a, **k))
    monkeypatch.setattr(job, "measure", lambda *_, **__: timed.append(1))
    output = tmp_path / "table.json"
    assert run("autotune", *QUICK, "-o", output) == 2
    assert timed == []
    error = capsys.readouterr().err
    assert "2 of 2 could not be measured" in error
    assert "off by" in error
    assert not output.exists() or json.loads(output.read_text())["break_even"] == []


def tile_row(folder, monkeypatch, check):
    """Search the forward product's tile with a clock by which every other tile is faster."""
    block, shape = Block(64, 64), Shape(64, 256, 256)
    key = "forward", shape.weight, block, torch.bfloat16
    start = job.tiles_of("forward", shape.weight, block, torch.bfloat16, CPU)[0]
    timed = []

    def measure(work, device, **_):
        timed.append(tiles.measured[key])
        return Timing((2.0 if timed[-1] == start else 1.0,))

    built = Built(lambda: None, lambda: check(tiles.measured[key] == start))
    monkeypatch.setattr(job, "_built", lambda *_: built)
    monkeypatch.setattr(job, "measure", measure)
    monkeypatch.setattr(job, "apart", lambda work, *arguments, limit: work(*arguments))
    monkeypatch.setattr(job, "usable", lambda *_, **__: True)
    search = make_search(
        shapes="64x256x256", patterns=["block:64"], device="cpu", output=folder / "table.json"
    )
    return start, timed, lambda: job._tile_row({}, search, shape, block, torch.bfloat16, "forward")


def test_a_tile_with_a_wrong_result_is_never_timed_or_chosen(tmp_path, monkeypatch):
    start, timed, search = tile_row(
        tmp_path, monkeypatch, lambda own: None if own else "off by far"
    )
    found = search()
    assert found["tile"] == start._asdict()
    assert found["tried"] > 3
    assert timed == [start]
    # it is the check that keeps them out
    start, timed, search = tile_row(tmp_path, monkeypatch, lambda own: None)
    assert search()["tile"] != start._asdict()


def test_a_kernel_whose_own_tile_is_wrong_is_an_error(tmp_path, monkeypatch):
    _, timed, search = tile_row(tmp_path, monkeypatch, lambda own: "off by far")
    with pytest.raises(ValueError, match=r"the kernel's own tile .* fails: off by far"):
        search()
    assert timed == []
