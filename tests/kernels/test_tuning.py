import json
import warnings
from pathlib import Path

import pytest
import torch

from triton_sparsity.kernels import dispatch, tiles, tuning
from triton_sparsity.kernels.pattern import Block
from triton_sparsity.kernels.tiles import Tile

CPU = torch.device("cpu")
TILE = {"m": 128, "n": 64, "k": 32, "warps": 4, "stages": 3, "programs": 1, "specialised": 0}
BLOCK = Block(64, 64)


def tile_row(**changes):
    row = {
        "direction": "forward",
        "weight": [256, 128],
        "block": [64, 64],
        "dtype": "bfloat16",
        "tile": TILE,
    }
    return row | changes


def even_row(**changes):
    row = {"weight": [300, 128], "block": [64, 64], "dtype": "float32"}
    return row | {"forward": 0.5, "dgrad": 0.4, "wgrad": 0.3, "total": 0.4} | changes


def content(**changes):
    head = {"format": tuning.FORMAT} | tuning.identity(CPU)._asdict()
    return head | {"tiles": [tile_row()], "break_even": [even_row()]} | changes


@pytest.fixture
def user_file(monkeypatch, tmp_path):
    """Where this machine's own table is looked for, in this test."""
    path = tmp_path / "table.json"
    monkeypatch.setattr(tuning, "user_file", lambda name: path)
    tuning.table.cache_clear()
    return path


def test_a_table_says_tiles_and_break_even_densities():
    found = tuning.parse(content())
    key = "forward", (256, 128), BLOCK, torch.bfloat16
    assert found.tiles == {key: Tile(**TILE)}
    assert found.break_even == {(torch.float32, BLOCK, (256, 128)): (0.5, 0.4, 0.3)}


def test_of_two_weights_of_a_class_the_lower_density_counts():
    rows = [even_row(), even_row(weight=[511, 255], forward=0.2, dgrad=0.9)]
    found = tuning.parse(content(break_even=rows)).break_even
    assert list(found.values()) == [(0.2, 0.4, 0.3)]


@pytest.mark.parametrize(
    ("shape", "found"),
    [((1, 1), (1, 1)), ((256, 255), (256, 128)), ((4096, 14336), (4096, 8192))],
)
def test_a_shape_class_rounds_down_to_powers_of_two(shape, found):
    assert tuning.shape_class(shape) == found


DAMAGE = {
    "no object": [],
    "another format": content(format=99),
    "no tiles": content(tiles=None),
    "a row that is none": content(tiles=[3]),
    "a direction": content(tiles=[tile_row(direction="sideways")]),
    "a weight": content(tiles=[tile_row(weight=[256])]),
    "a block": content(tiles=[tile_row(block=[63, 64])]),
    "a dtype": content(tiles=[tile_row(dtype="int8")]),
    "a tile with no stages": content(tiles=[tile_row(tile={k: TILE[k] for k in "mnk"})]),
    "a tile that is no power of two": content(tiles=[tile_row(tile=TILE | {"m": 100})]),
    "a tile wider than the block": content(tiles=[tile_row(tile=TILE | {"n": 128})]),
    "a tile of a third kind": content(tiles=[tile_row(tile=TILE | {"specialised": 2})]),
    "warps of two kinds for a weight gradient": content(
        tiles=[
            tile_row(
                direction="wgrad",
                tile=TILE | {"m": 64, "n": 256, "specialised": 1},
            )
        ]
    ),
    "warps of two kinds that share a program's room": content(
        tiles=[tile_row(tile=TILE | {"programs": 2, "specialised": 1})]
    ),
    "consumers without rows": content(
        tiles=[tile_row(tile=TILE | {"m": 64, "warps": 8, "specialised": 1})]
    ),
    "a huge tile": content(tiles=[tile_row(tile=TILE | {"m": 4096})]),
    "a density": content(break_even=[even_row(dgrad=1.5)]),
    "a density that is none": content(break_even=[even_row(total=None)]),
    "a flag as a density": content(break_even=[even_row(total=True)]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table_is_refused(damage):
    with pytest.raises(ValueError, match=r"must (have|be)"):
        tuning.parse(damage)


SHAPE = (300, 128)  # ten blocks


@pytest.fixture
def no_built_in_gains(monkeypatch):
    """What is built in says dense everywhere, so that a choice shows the table it came from."""
    monkeypatch.setattr(dispatch, "built_in", lambda *_, **__: dispatch.BreakEven(0, 0, 0))


def chosen(kept=4):
    return dispatch.choose(kept, SHAPE, BLOCK, torch.float32, CPU, triton_runs=False)


@pytest.mark.usefixtures("no_built_in_gains")
def test_the_users_table_is_used_by_dispatch(user_file):
    assert chosen() == (False, False, False)
    user_file.write_text(json.dumps(content()))
    tuning.table.cache_clear()
    assert chosen() == (True, True, False)
    assert chosen(5) == (True, False, False)
    # what a program says comes first
    kind = dispatch.kind_of(SHAPE, BLOCK, torch.float32, CPU)
    dispatch.measured[kind] = dispatch.BreakEven(0, 1, 0)
    try:
        assert chosen() == (False, True, False)
    finally:
        del dispatch.measured[kind]


@pytest.mark.usefixtures("no_built_in_gains")
def test_a_deterministic_program_takes_nothing_that_was_measured(user_file, monkeypatch):
    user_file.write_text(json.dumps(content()))
    key = "forward", (256, 128), BLOCK, torch.bfloat16
    monkeypatch.setitem(tiles.measured, key, Tile(**TILE))
    assert tuning.tuned_tile(*key, CPU) == Tile(**TILE)
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == (False, False, False)
        assert tuning.tuned_tile(*key, CPU) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is no JSON"),
        ("\xff\xfe", "it is no JSON"),
        ("[1, 2", "it is no JSON"),
        ('{"name": "a package"}', "it must have format 1, got None"),
        (json.dumps(content(device="NVIDIA H100")), "it is of device 'NVIDIA H100', here is"),
        (json.dumps(content(backend="other")), "it is of backend 'other', here is"),
        (json.dumps(content(break_even=[even_row(forward=10**400)])), "it must have densities"),
        (json.dumps(content(break_even=[even_row(forward=True)])), "it must have densities"),
        (json.dumps(content(triton="2.0.0")), "it is of triton '2.0.0', here is"),
        (json.dumps(content(kernels="0" * 16)), "it is of kernel source '0000"),
    ],
    ids=[
        "empty",
        "binary",
        "cut",
        "foreign",
        "device",
        "backend",
        "huge",
        "bool",
        "triton",
        "source",
    ],
)
def test_a_table_that_is_not_ours_is_ignored_with_one_warning(user_file, text, reason):
    user_file.write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="is ignored") as caught:
        found = tuning.table(CPU)
    assert found == ({}, {})
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert str(user_file) in str(caught[0].message)
    # once a process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.table(CPU) is found


def test_a_table_that_cannot_be_read_is_ignored_with_a_warning(user_file):
    user_file.mkdir()
    with pytest.warns(UserWarning, match="is ignored"):
        assert tuning.table(CPU) == ({}, {})


def test_a_shipped_table_is_the_second_choice_and_never_warns(user_file, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    shipped = tmp_path / f"{tuning.slug(tuning.device_name(CPU))}.json"
    shipped.write_text(json.dumps(content(break_even=[even_row(forward=0.1)])))
    assert next(iter(tuning.table(CPU).break_even.values())) == (0.1, 0.4, 0.3)
    user_file.write_text(json.dumps(content()))
    tuning.table.cache_clear()
    assert next(iter(tuning.table(CPU).break_even.values())) == (0.5, 0.4, 0.3)
    user_file.unlink()
    shipped.write_text(json.dumps(content(triton="2.0.0")))
    tuning.table.cache_clear()
    assert tuning.table(CPU) == ({}, {})


def test_tiles_of_a_table_are_for_gpus_only(user_file):
    user_file.write_text(json.dumps(content()))
    key = "forward", (256, 128), BLOCK, torch.bfloat16
    assert tuning.tuned_tile(*key, CPU) is None
    assert tuning.table(CPU).tiles[key] == Tile(**TILE)


def test_the_source_hash_names_files_that_exist_and_changes_with_them(monkeypatch, tmp_path):
    before = tuning.source_hash()
    tuning.source_hash.cache_clear()
    for name in tuning.SOURCES:
        (tmp_path / name).write_bytes(Path(tuning.__file__).with_name(name).read_bytes())
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    assert tuning.source_hash() == before
    for name in tuning.SOURCES:
        tuning.source_hash.cache_clear()
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"#")
        assert tuning.source_hash() != before
        before = tuning.source_hash()
    tuning.source_hash.cache_clear()


@pytest.mark.parametrize(
    ("name", "found"), [("NVIDIA H200", "nvidia-h200"), ("AMD EPYC (x) CPU", "amd-epyc-x-cpu")]
)
def test_a_devices_file_is_named_after_it(name, found):
    assert tuning.slug(name) == found


def test_the_table_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.undo()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *a, **k: tmp_path)
    assert tuning.user_file("NVIDIA H200") == tmp_path / "tuning" / "nvidia-h200.json"
