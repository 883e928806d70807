"""The rooms of the bench: which may import from which."""

import ast
from pathlib import Path

import pytest

from triton_sparsity.bench.measure.record import BENCH

ROOMS = ("finetune", "measure", "peers", "studies")
SOURCES = sorted(BENCH.rglob("*.py"))
# a room, or at the top a job with its parts -> where else it may import from
ALLOWED = {
    "measure": set(),
    "peers": set(),
    "finetune": {"measure"},
    "profile": {"measure"},
    "autotune": {"measure"},
    "recommend": {"measure"},
    "sensitivity": {"finetune", "measure"},
    "doctor": {"measure"},
    "demo": {"finetune", "measure"},
    "cli": {"finetune", "measure", "profile", "autotune", "recommend", "sensitivity", "doctor"},
    "studies": {"finetune", "measure", "peers", "profile", "doctor"},
    "__init__": set(),
}


def room_of(parts):
    """Return the room of a path below ``bench``; of a file at the top its job."""
    return (
        parts[0] if parts[0] in ROOMS else parts[0].removesuffix(".py").split("_")[0] or parts[0]
    )


def imported_rooms(path, text):
    """Yield the rooms that ``text`` imports from, wherever in it, under ``TYPE_CHECKING`` too."""
    here = path.relative_to(BENCH.parent).parts[:-1]
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        module = node.module.split(".") if node.module else []
        names = [alias.name for alias in node.names]
        base = (*here[: len(here) - node.level + 1], *module)
        # ``from . import profile`` names a module, ``from .profile import Plan`` what is in it
        for target in [base] if module else [(*base, name) for name in names]:
            if target[0] == "bench":
                yield room_of(target[1:])


def test_imports_go_from_studies_to_jobs_to_measure_and_never_back():
    for path in SOURCES:
        parts = path.relative_to(BENCH).parts
        room = "__init__" if parts == ("__init__.py",) else room_of(parts)
        assert set(imported_rooms(path, path.read_text())) <= ALLOWED[room] | {room}, path


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("from ..studies.compare import run", "studies"),
        ("from .. import profile", "profile"),
        ("if TYPE_CHECKING:\n    from ..finetune.job import finetune", "finetune"),
        ("def f():\n    from ..doctor_checks import checks", "doctor"),
    ],
)
def test_an_import_that_goes_back_is_seen_wherever_it_stands(line, room):
    found = set(imported_rooms(BENCH / "measure" / "timing.py", line))
    assert found == {room}
    assert not found & ALLOWED["measure"]


def test_every_test_stands_where_its_subject_does():
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        room = path.relative_to(tests).parent
        assert (BENCH / room).is_dir()
        # of two kinds that test what has no file of its own
        if path.name not in ("test_rooms.py", "test_peers.py"):
            assert (BENCH / room / path.name.removeprefix("test_")).exists(), path
