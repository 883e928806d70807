"""The architecture: what is packaged, who may import whom, what an import may touch."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import typer
import yaml

import triton_sparsity as ts
from forks import fork
from triton_sparsity.bench.cli import app

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "controller", "bench")
# of the controller, from the ground
FLOORS = (
    *("__init__", "api", "config", "masks", "selection", "algorithms", "nncf", "create"),
    *("permute", "one_shot", "integrations"),
)
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def test_the_packages_list_is_the_tree():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    tree = {"triton_sparsity"} | {".".join(("triton_sparsity", *f.parts)) for f in folders}
    assert sorted(tree) == listed


def imports(path):
    """Yield what ``path`` imports from this package, as paths below its root.

    Wherever in the file it does so: inside functions and under ``TYPE_CHECKING`` too.
    """
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            base = tuple(part for part in base if part)
            for alias in node.names:
                inner = (*base, alias.name)
                yield inner if (ROOT.joinpath(*inner).with_suffix(".py")).exists() else base
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert not any(n and n.startswith("triton_sparsity") for n in names), (
                f"{path}: import relatively"
            )


def test_imports_go_down_through_layers_and_floors():
    wrong = []
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        for target in imports(path):
            up = LAYERS.index(target[0]) > LAYERS.index(parts[0])
            if parts[0] == target[0] == "controller" and len(parts) > 1 < len(target):
                up = FLOORS.index(target[1]) > FLOORS.index(parts[1])
            if up:
                wrong.append(f"{'/'.join(parts)} imports {'/'.join(target)}")
    assert not wrong


def test_files_of_the_controller_import_one_another_in_no_circle():
    graph = {}
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "controller":
            graph[parts] = {target for target in imports(path) if target[0] == "controller"}
    # raises CycleError, which names the circle
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_kernels_live_in_kernels_and_no_file_names_a_device():
    for path in SOURCES:
        text = path.read_text()
        assert "kernels" in path.parts or "triton.jit" not in text, path
        assert not re.search(r"""device=["']cuda["']""", text), path
        assert "environ" not in text or "bench" in path.parts, path


def test_the_public_face_is_what_it_lists():
    public = {name for name in dir(ts) if not name.startswith("_")}
    others = {"kernels", "controller", "bench", "exports", "annotations", "import_module", "sys"}
    assert public - others - {"TYPE_CHECKING", "Any"} == set(ts.__all__)
    assert all(getattr(ts, name).__doc__ for name in ts.__all__)


@pytest.mark.slow
def test_a_name_is_imported_when_it_is_asked_for_and_touches_no_gpu(tmp_path):
    code = """
import sys
import triton_sparsity as ts

assert "torch" not in sys.modules

import torch
import triton

def refuse(*args, **kwargs):
    raise AssertionError("the import touched the GPU")

class Refuse:
    def __getattr__(self, name):
        raise AssertionError("the import started the driver")

names = ("init", "_lazy_init", "is_available", "device_count", "get_device_properties")
plain = {name: getattr(torch.cuda, name) for name in names}
for name in names:
    setattr(torch.cuda, name, refuse)
triton.runtime.driver.set_active(Refuse())

assert ts.kernels.pattern.Block is ts.Block
assert {"Block", "create_controller", "TransformersCallback"} <= {*dir(ts)}
try:
    ts.nothing
except AttributeError as error:
    assert str(error) == "module 'triton_sparsity' has no attribute 'nothing'", error
from triton_sparsity import *
import triton_sparsity.bench.cli

assert create_controller is ts.create_controller
for name in names:
    setattr(torch.cuda, name, plain[name])

weights = torch.nn.Linear(32, 32)
controller = create_controller(
    weights, MagnitudeSparsityConfig(pattern=Block(16, 16)), dispatch="sparse"
)
controller.set_sparsity_level(0.5)
exported = torch.export.export(weights.eval(), (torch.ones(2, 32),))
torch.export.save(exported, "exported.pt2")
torch.save(weights(torch.ones(2, 32)), "expected.pt")
"""
    load = """
import torch
import triton_sparsity

found = torch.export.load("exported.pt2").module()(torch.ones(2, 32))
assert "block_sparse_linear" in str(torch.export.load("exported.pt2").graph)
assert torch.equal(found, torch.load("expected.pt"))
"""
    for part in (code, load):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", part],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_needs_an_extra_is_imported_when_it_is_asked_for():
    code = """
import sys
import triton_sparsity as ts
assert not {"transformers", "lightning", "accelerate", "peft"} & set(sys.modules)
sys.modules["transformers"] = sys.modules["lightning"] = None
for name, extra in (("TransformersCallback", "transformers"), ("LightningCallback", "lightning")):
    try:
        getattr(ts, name)
    except ModuleNotFoundError as error:
        assert f"pip install 'triton-sparsity[{extra}]'" in str(error), error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def fenced(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def run_blocks():
    warnings.simplefilter("error")
    for page in PAGES:
        for block in fenced(page, "python"):
            exec(compile(block, page.name, "exec"), {})


@pytest.mark.slow
def test_code_of_the_pages_runs(tmp_path):
    fork(run_blocks, folder=tmp_path).lines()


@every_page
def test_commands_of_the_pages_are_commands(page):
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for line in "".join(fenced(page, "sh")).splitlines():
        match shlex.split(line, comments=True):
            case ["make", target]:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
            case ["triton-sparsity", *arguments]:
                # parsed, options and all; not run
                command = typer.main.get_command(app).commands[arguments[0]]
                command.make_context(arguments[0], arguments[1:])
            case ["pip", "install", *packages]:
                for package in packages:
                    named = re.search(r"\[(.*)\]", package)
                    assert not named or set(named[1].split(",")) <= set(extras), line
            case ["bash", script, *_]:
                assert (ROOT / script).exists(), line
            case [] | ["git" | "python" | "torchrun", *_]:
                pass
            case other:
                raise AssertionError(f"{page.name}: {other}")


def test_recipes_of_the_pages_are_recipes():
    pytest.importorskip("transformers")
    from triton_sparsity.bench.finetune.recipe import make_recipe

    recipes = [block for page in PAGES for block in fenced(page, "yaml")]
    assert recipes
    for block in recipes:
        make_recipe(yaml.safe_load(block), "a page")


@every_page
def test_links_of_the_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link
