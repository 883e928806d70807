"""What is carried to a GPU machine is all that is needed there; and a cut-off run goes on."""

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gpu_parts

ROOT = Path(__file__).parent.parent
TARGET = {"extra": "", "python_version": "3.12", "sys_platform": "linux"}
MACHINE = ("torch", "triton", "numpy")  # are there, with all that they need
LEFT_OUT = {
    "blksprs": "a peer that may be absent",
    "datasets": "reads one kind of folder, and may be absent",
    "lightning": "of one callback, of which a GPU shows nothing new; 20 MB with what it needs",
    "matplotlib": "draws pictures, which can be drawn later; 25 MB with what it needs",
    "nncf": "a peer that may be absent",
    "onnxruntime": "of one export, which a GPU has no part in",
    "pillow": "reads images, of which a GPU shows nothing new",
    "scikit-learn": "of the demo and its tests",
    "stk": "a peer that may be absent",
}


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def imported(path):
    """Yield the topmost name of each import, wherever in the file, also by ``importorskip``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            yield node.args[0].value.split(".")[0]


def needed_by(names):
    """Return distributions and all that they need."""
    found, left = set(), list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(TARGET):
                left.append(requirement.name)
    return found


@pytest.mark.slow
def test_what_is_carried_is_what_package_and_tests_need():
    folders = ("kernels", "controller", "bench", "tests/kernels", "tests/controller")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files += (ROOT / "tests").glob("*.py")
    own = {"triton_sparsity", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    names = {name for path in files for name in imported(path)}
    names -= own | set(sys.stdlib_module_names)
    known = metadata.packages_distributions()
    distributions = {known.get(name, [name])[0] for name in names}
    assert set(LEFT_OUT) <= distributions, "left out, and nobody asks for it"

    # what they need at other versions than ours nobody knows, but at any they need themselves
    there = needed_by(("torch",)) | set(MACHINE)
    wanted = needed_by(distributions - set(LEFT_OUT) - there | {"pytest-xdist"})
    carried = set(pins("requirements-gpu.txt"))
    assert wanted - there - carried == set(), "to be added to requirements-gpu.txt"
    assert carried - wanted == set(), "to be taken out of requirements-gpu.txt"
    assert carried & set(MACHINE) == set()


def test_what_is_carried_is_what_is_tested_with():
    tested = pins("constraints.txt")
    carried = pins("requirements-gpu.txt")
    assert {name: tested.get(name, version) for name, version in carried.items()} == carried


TESTS = """
import pytest

@pytest.mark.parametrize("n", range(6))
def test_of_a_device(n):
    global broken
    if n == 1:
        broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert "broken" not in globals(), "the process before this one's is still there"

def test_that_is_wrong():
    assert 1 + 1 == 3

def test_that_is_skipped():
    pytest.skip("no such instruction")
"""


@pytest.mark.slow
def test_a_run_goes_on_and_a_broken_device_spoils_one_test(tmp_path):
    file, record = tmp_path / "test_it.py", tmp_path / "record.txt"
    file.write_text(TESTS)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    command = [
        *(sys.executable, "-m", "pytest", "-p", "gpu_parts", "-p", "xdist", "-n", "1", file),
        *(f"--record={record}", f"--rootdir={tmp_path}", "--dist", "worksteal"),
    ]

    def run():
        subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
        return {test.split("::")[1]: o for test, o in gpu_parts.read_record(record).items()}

    wanted = {f"test_of_a_device[{n}]": "passed" for n in range(6)}
    wanted |= {"test_of_a_device[1]": "failed", "test_that_is_wrong": "failed"}
    wanted["test_that_is_skipped"] = "skipped"
    assert run() == wanted
    text = record.read_text()
    assert "CUDA error: an illegal memory access" in text
    assert "    assert 1 + 1 == 3" in text

    # the second time those alone that have not passed, and the one that was cut off last
    record.write_text(f"{text}began 0.00 test_it.py::test_of_a_device[2]\n")
    before = len(record.read_text())
    file.write_text(TESTS.replace("3\n", "2\n"))
    assert run() == wanted | {"test_that_is_wrong": "passed"}
    more = record.read_text()[before:]
    ran = [line.split("::")[1] for line in more.splitlines() if line.startswith("began")]
    assert ran == ["test_of_a_device[1]", "test_that_is_wrong", "test_of_a_device[2]"]

    # outcomes of other sources are none
    record.write_text(record.read_text().replace("sources ", "sources 0"))
    assert gpu_parts.read_record(record) == {}


def test_every_test_of_kernels_and_controller_is_in_one_part():
    files = [file for part in gpu_parts.parts().values() for file in part]
    folders = (ROOT / "tests" / "kernels", ROOT / "tests" / "controller")
    there = [str(p.relative_to(ROOT)) for f in folders for p in f.rglob("test_*.py")]
    assert sorted(files) == sorted(there)
    assert len(gpu_parts.parts()["product"]) == len(gpu_parts.FIRST)


@pytest.mark.parametrize("job", ["", "dance"])
def test_the_script_says_what_it_must_be_told(job, tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "bench" / "studies" / "gpu.sh", *job.split()],
        env=os.environ | {"BUNDLE": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "must be correctness, bench or tune" in done.stderr
