"""``make test-gpu``: the tests that a GPU is for, in parts, by parallel workers.

Kernels take longer to compile than to run, so there is a worker a core. Each part has a record,
to which every test is written as it ends: when time is up nothing is lost, and the same command
goes on with what has not passed yet, if no source has changed. The record is begun by pytest,
which takes this very file for a plugin.

Needs the standard library alone, and pytest with xdist.

Reading order: records -> plugin -> parts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIRST = ("block_sparse_linear", "topology", "schedule", "dispatch")  # what all else rests on
RIGHT = ("passed", "skipped")
BEGAN = "began"  # and has not ended: cut off, or it hangs
# after one of these every later launch of the process fails too
BROKEN = re.compile(r"CUDA error|CUDA driver error|Triton Error \[CUDA\]|illegal memory access")
# a kernel that hangs must not take its worker along: nothing takes that long, cold
TEST_SECONDS = 240
FOUND = pytest.StashKey[dict[str, str]]()


def parts() -> dict[str, list[str]]:
    """Return the test files of each part, as paths from the root."""
    kernels = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    first = [p for p in kernels if p.stem.removeprefix("test_") in FIRST]
    rest = [p for p in kernels if p not in first]
    controller = sorted((ROOT / "tests" / "controller").rglob("test_*.py"))
    found = {"product": first, "operators": rest, "controller": controller}
    return {name: [str(p.relative_to(ROOT)) for p in paths] for name, paths in found.items()}


def sources() -> str:
    """Return a hash of what a test's outcome depends on."""
    digest = hashlib.sha256()
    for folder in ("kernels", "controller", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_record(path: Path) -> dict[str, str]:
    """Return the outcome of each test in a record; none if it is of other sources, or absent."""
    if not path.exists():
        return {}
    head, *lines = path.read_text().splitlines() or [""]
    if head != f"sources {sources()}":
        return {}
    # what is indented belongs to the test above
    return {
        test: outcome
        for outcome, _, test in (line.split(" ", 2) for line in lines if line[:1].strip())
    }


# the plugin


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="written as tests end; what passed is left out")


def pytest_configure(config):
    # a worker only runs; the process that gave it its tests writes
    if hasattr(config, "workerinput"):
        config.stash[FOUND] = config.workerinput["found"]
        config.pluginmanager.register(_Worker())
        return
    path = config.getoption("record")
    config.stash[FOUND] = read_record(path)
    if not config.stash[FOUND]:
        path.write_text(f"sources {sources()}\n")
    config.pluginmanager.register(_Writer(path))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    # all must collect the same, those too that take over from one that fell
    node.workerinput["found"] = node.config.stash[FOUND]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    found = config.stash[FOUND]
    done = {item for item in items if found.get(item.nodeid) in RIGHT}
    config.hook.pytest_deselected(items=list(done))
    left = [item for item in items if item not in done]
    # what may hang, last
    items[:] = sorted(left, key=lambda item: found.get(item.nodeid) == BEGAN)


class _Worker:
    def __init__(self):
        self.broken_by = None

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is not None and BROKEN.search(str(call.excinfo.value)):
            self.broken_by = item.nodeid

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid):
        if self.broken_by == nodeid:
            # the report is out; xdist starts another worker, which finds the device sound
            os._exit(1)


class _Writer:
    def __init__(self, path):
        self.path = path

    def write(self, outcome, seconds, test, more=""):
        # opened anew, so that it is on the disk whatever happens to this process
        with self.path.open("a") as file:
            file.write(f"{outcome} {seconds:.2f} {test}\n")
            file.writelines(f"    {line}\n" for line in more.splitlines())

    def pytest_runtest_logstart(self, nodeid):
        self.write(BEGAN, 0, nodeid)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            more = "" if report.passed else str(reason)
            self.write(report.outcome, report.duration, report.nodeid, more)


# the parts


def run_part(
    name: str, files: list[str], record: Path, workers: int, deadline: float
) -> dict[str, str]:
    """Run one part until it ends or time is up; return the outcome of each test."""
    command = [
        *(sys.executable, "-m", "pytest", "-p", "gpu_parts", "-p", "xdist", f"--record={record}"),
        *("-m", "not aot and not launch", "-n", str(workers), "--dist", "worksteal"),
        *("--max-worker-restart", "100", "--tb=short", "--show-capture=no", "--no-header"),
        *("-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"),
        *("-p", "no:cacheprovider", *files),
    ]
    search = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        # more threads than cores would slow all
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": search,
        # others' plugins, where there are any, warn, and a warning is an error
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    start = time.monotonic()
    with record.with_suffix(".log").open("w") as log:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        for wait, send in (
            (max(deadline - start, 1), signal.SIGINT),
            (10, signal.SIGKILL),
            (None, None),
        ):
            try:
                code = job.wait(wait)
                break
            except subprocess.TimeoutExpired:
                # its workers too
                os.killpg(job.pid, send)
    found = read_record(record)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(Counter(found.values()).items()))
    over = time.monotonic() >= deadline
    print(
        f"{name}: {counts or 'no test ran'}; {time.monotonic() - start:.0f} s"
        + ("; time is up: the same command goes on" if over else ""),
        flush=True,
    )
    for test, outcome in found.items():
        if outcome not in RIGHT:
            print(f"  {outcome}: {test}", flush=True)
    # of an error outside of tests the records say nothing
    if over or (code not in (0, 1) and not (code == 5 and found)):
        if not over:
            print(record.with_suffix(".log").read_text()[-3000:])
        found["the part itself"] = "cut off"
    return found


def main() -> None:
    known = parts()
    parser = argparse.ArgumentParser(description="Run the tests that a GPU is for, in parts.")
    parser.add_argument("part", nargs="*", help=f"{', '.join(known)}; all by default")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="of records")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    options = parser.parse_args()
    if unknown := set(options.part) - set(known):
        parser.error(f"part must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    deadline = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    right = True
    for name in options.part or known:
        if time.monotonic() > deadline:
            print(f"{name}: not begun, time is up: the same command goes on")
            right = False
            continue
        record = (options.output / f"test-{name}.txt").resolve()
        found = run_part(name, known[name], record, options.workers, deadline)
        right &= set(found.values()) <= set(RIGHT)
    print(f"{options.output}: records and logs of the parts")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
