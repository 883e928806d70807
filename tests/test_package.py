"""The architecture: what is packaged, who may import whom, what an import may touch."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import triton_sparsity as ts

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "controller", "bench")
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def test_the_packages_list_is_the_tree():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    tree = {"triton_sparsity"} | {".".join(("triton_sparsity", *f.parts)) for f in folders}
    assert sorted(tree) == listed


def imported_layers(path):
    """Yield the root folders of this package that ``path`` imports from."""
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            yield target[0]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert not any(n and n.startswith("triton_sparsity") for n in names), (
                "import relatively"
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_from_bench_to_controller_to_kernels(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    assert set(imported_layers(path)) <= set(LAYERS[: layer + 1])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_live_in_kernels_and_no_file_names_a_device(path):
    text = path.read_text()
    if "kernels" not in path.parts:
        assert "triton.jit" not in text
    assert not re.search(r"""device=["']cuda["']""", text)
    assert "environ" not in text or "bench" in path.parts


def test_importing_touches_no_gpu():
    code = """
import torch

def refuse(*args, **kwargs):
    raise AssertionError("the import touched the GPU")

for name in ("init", "_lazy_init", "is_available", "device_count", "get_device_properties"):
    setattr(torch.cuda, name, refuse)

import triton

class Refuse:
    def __getattr__(self, name):
        raise AssertionError("the import started the driver")

triton.runtime.driver.set_active(Refuse())
import triton_sparsity
import triton_sparsity.bench.cli
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_public_face_is_what_it_lists():
    public = {name for name in vars(ts) if not name.startswith("_")}
    submodules = {"kernels", "controller", "bench"}
    assert public - submodules == set(ts.__all__)
    assert all(vars(ts)[name].__doc__ for name in ts.__all__)


def test_readme_code_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
