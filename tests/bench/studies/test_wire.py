"""The formula of what an update sends is what gloo is given."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import mesh_of
from torch import nn

import triton_sparsity as ts
from triton_sparsity.bench.studies import wire
from triton_sparsity.kernels import line_score
from triton_sparsity.kernels.line_score import lines_a_band

BINS = (3 + 4096) * 8  # of few elements on a CPU
CONFIGS = {
    "magnitude": {"weight_importance": "normed_abs", "pool": "global"},
    "weight": {"weight_importance": "abs", "pool": "weight"},
    "skips": {"weight_importance": "abs", "pool": "weight"},
    **{i: {"weight_importance": i, "pool": "weight"} for i in ("fisher", "taylor")},
    "set": {},
    "rigl": {},
    "normed": {"growth": "normed_gradient"},
    "bands": {"growth": "normed_gradient"},
}
RIGL = ("rigl", "normed", "bands")
BANDS = 22  # too few for the lines of this net: of 8 each
SUMMED = {"fisher": 2, "taylor": 1}  # of how many steps sums of parts are sent
BLOCK = ts.Block(16, 2)
SKIPPED = ts.Block(16, 16)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 35), nn.Linear(35, 16), nn.Linear(16, 56))


def update(group, name):
    """Return what this rank gives to collectives in an update, by collective; bytes of lists."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net(), mesh=mesh_of(group))
    moves = {"set": ts.SETConfig, **dict.fromkeys(RIGL, ts.RigLConfig)}.get(name)
    pattern = SKIPPED if name == "skips" else BLOCK
    config = (
        moves(level=0.6, t_end=20, delta_t=2, pattern=pattern, **CONFIGS[name])
        if moves
        else ts.MagnitudeSparsityConfig(
            schedule=ts.PolynomialSchedule(
                initial_level=0.1 * (name not in SUMMED), target_level=0.5
            ),
            pattern=pattern,
            **CONFIGS[name],
        )
    )
    with mock.patch.object(line_score, "MOST_BANDS", BANDS if name == "bands" else math.inf):
        controller = ts.create_controller(model, config, process_group=group)
    optimizer = torch.optim.AdamW(model.parameters())
    found = {"all_reduce": [], "all_to_all_single": []}
    plain = {key: getattr(distributed, key) for key in found}

    def counting(key, at):
        def call(*args, **kwargs):
            found[key].append(args[at].nbytes)
            return plain[key](*args, **kwargs)

        return call

    def train():
        for _ in range(2):
            controller.scheduler.step()
            model(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()

    if name not in SUMMED:
        train()
    distributed.all_reduce = counting("all_reduce", 0)
    distributed.all_to_all_single = counting("all_to_all_single", 1)
    try:
        if name in SUMMED:
            train()
        if name == "fisher":
            # of a weight whose edges part single rows two steps' are sent as soon as made
            assert len(found["all_to_all_single"]) == 1
        controller.scheduler.step() if moves else controller.set_sparsity_level(0.5)
    finally:
        distributed.all_reduce = plain["all_reduce"]
        distributed.all_to_all_single = plain["all_to_all_single"]
    products = [info.operand.product for info in controller.sparsified_module_info]
    return found, sum(t.nbytes for p in products if p for t in (p.mask, *p.topology))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch lacks gloo")
@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 4 if name == "magnitude" else 3) for name in CONFIGS],
)
def test_the_formula_is_what_gloo_is_given(ranks, monkeypatch, name, size):
    if name == "bands":
        monkeypatch.setattr(line_score, "MOST_BANDS", BANDS)
        assert lines_a_band([layer.weight.shape for layer in net()]) == 8
    shapes = [tuple(layer.weight.shape) for layer in net()]
    weights = [wire.Parted(shape, wire.bounds(shape[0], size)) for shape in shapes]
    pattern = SKIPPED if name == "skips" else BLOCK
    matrices = (dict.fromkeys(RIGL, 2) | dict.fromkeys(SUMMED, 0)).get(name, 1)
    rows = wire.rows_sent(weights, pattern, 4, of=matrices)
    parts = wire.parts_sent(weights, pattern, SUMMED.get(name, 0))
    grids = wire.grids_sent(shapes, pattern)
    assert grids == (3 + 1 + 4 if name == "skips" else 0)
    for place, (sent, held) in enumerate(ranks.run(size, update, name)):
        assert held == wire.lists_held(shapes, pattern)
        assert bool(held) == (name == "skips")
        reduced = [n for n in sent["all_reduce"] if n != BINS]
        histograms = len(sent["all_reduce"]) - len(reduced)
        assert histograms <= wire.REDUCTIONS
        assert bool(histograms) == (name == "magnitude")
        numbers = wire.numbers_sent(
            shapes,
            pattern,
            moves=name in ("set", *RIGL),
            each=name in ("weight", "skips", *SUMMED),
            normed=name == "magnitude",
            tied=0,
            histograms=0,
        )
        # RigL asks whether some rank has gradients, and whether they overflowed
        asked = 2 * wire.NUMBER if name in RIGL else 0
        asked += wire.lines_sent(shapes) if name in ("normed", "bands") else 0
        # and these whether gradients say something
        asked += wire.FLOAT32 * len(shapes) if name in SUMMED else 0
        assert sum(reduced) == numbers + grids + asked
        assert sum(sent["all_to_all_single"]) == rows[place] + parts[place]
    assert any(rows)
    assert any(parts) == (name in SUMMED)


def test_parts_are_as_torch_makes_them():
    assert wire.bounds(35, 4) == (0, 9, 18, 27, 35)
    assert wire.bounds(5, 4) == (0, 2, 4, 5, 5)
    assert wire.bounds(12, 2, 3) == (0, 2, 4, 6, 8, 10, 12)


def test_an_update_sends_less_than_10_megabytes_of_numbers_however_many_ranks_there_are():
    for name in wire.LLAMA:
        shapes = [shape for shape, _ in wire.llama(name)]
        for pattern in (ts.Unstructured(), ts.Block(32, 32)):
            assert wire.numbers_sent(shapes, pattern, normed=True) < 10e6
            assert wire.numbers_sent(shapes, pattern, moves=True) < 10e6
            assert wire.numbers_sent(shapes, pattern, each=True) < 10e6
    found = []
    for name in wire.LLAMA:
        weights = wire.llama(name)
        shapes, parted = [shape for shape, _ in weights], [shape for shape, cut in weights if cut]
        lines = wire.lines_sent(shapes), wire.lines_sent(shapes, parted=parted)
        found.append((lines_a_band(shapes), *lines))
        moved = max(
            wire.numbers_sent(shapes, pattern, moves=True)
            for pattern in (ts.Unstructured(), ts.Block(32, 32))
        )
        assert lines[1] + moved < 10e6
    bands = [(1, 6_225_920, 7_536_640), (8, 8_089_600, 8_089_600), (32, 6_088_320, 6_088_320)]
    assert found == bands  # as the page has it


def test_sums_of_parts_are_a_hundredth_of_rows():
    weights = [wire.Parted(shape, wire.bounds(shape[0], 1024)) for shape, _ in wire.llama("400B")]
    assert max(wire.parts_sent(weights, ts.Block(32, 32), 1)) == 5_483_520  # as the page has it
    assert max(wire.rows_sent(weights, ts.Block(32, 32), 2)) == 586_414_080


def test_the_page_has_the_table():
    page = Path(wire.__file__).parents[2] / "docs" / "scaling.md"
    assert wire.table() in page.read_text()
