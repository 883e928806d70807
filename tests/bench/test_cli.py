import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
import typer

from forks import fork
from triton_sparsity.bench import cli
from triton_sparsity.bench.cli import main
from triton_sparsity.bench.finetune.tasks import load_task

QUICK = [
    "--task=digits",
    "--pattern=block:8",
    "--dense-epochs=2",
    "--epochs=3",
    "--steps-per-epoch=4",
    "--batch-size=8",
    "--save-every=2",
    "--threads=1",
]
PROGRAM = (sys.executable, "-m", "triton_sparsity.bench.cli")


def run(*arguments):
    """Run the program in this process; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return value


def assert_one_line_error(code, captured):
    """An error of the user's is one line on stderr, exit code 2, and nothing on stdout."""
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("triton-sparsity: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")


def test_help_and_version_tell_what_there_is(capsys):
    assert run("--help") == 0
    assert "finetune" in capsys.readouterr().out
    assert run() == 0
    assert "finetune" in capsys.readouterr().out
    assert run("finetune", "--help") == 0
    text = capsys.readouterr().out
    for option in ("--pattern", "--level", "--schedule", "--scope", "--resume", "--json"):
        assert option in text
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("triton-sparsity 0.")


@pytest.mark.slow
def test_help_and_what_is_wrong_with_an_option_are_told_before_torch_is_imported():
    code = """
import sys
from triton_sparsity.bench.cli import main

for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as end:
        assert (end.code or 0) == (0 if "--help" in line else 2), line
    slow = {"torch", "transformers", "matplotlib", "numpy"} & {*sys.modules}
    assert not slow, (line, slow)
"""
    verbs = "finetune", "profile", "autotune", "sensitivity", "doctor"
    wrong = [
        *("finetune --level 2 -o run", "finetune --task mnist -o run"),
        *("finetune --compare set,rigl --levels 0.5,0.5 -o run", "finetune --levels 0.5 -o run"),
        "finetune --model . --data . --temperature -1 -o run",
        *("profile --operation fly", "profile --shapes huge", "profile --mask none"),
        *("profile --trace /proc/nothing/trace", "profile --passes many"),
        *("autotune --pattern block:8", "autotune --recommend . --force", "autotune --budget 0"),
        *("sensitivity . --data . --levels 0.5,1", "sensitivity . --data . --level 0.95"),
        *("sensitivity . --data . --device tpu", "doctor --backend cudnn", "train"),
    ]
    lines = ["--help", *(f"{verb} --help" for verb in verbs), *wrong]
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == len(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "code"), [("typer", 130), ("torch", -signal.SIGINT)])
def test_a_signal_while_a_start_imports_prints_nothing(module, code):
    program = f"""
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

# what a shell starts in the background, as these tests may be, ignores the signal
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
from triton_sparsity.bench.cli import main
main(sys.argv[1:])
"""
    for verb in (["profile"], ["autotune"], ["doctor"], ["finetune", "-o", "run"]):
        done = subprocess.run([sys.executable, "-c", program, *verb], capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


JUNK = (
    *("", " ", "-1", "0", "1", "0.5", "1.5", "-0.0", "1e400", "-inf", "nan", "1e-400", "0x10"),
    *(
        "9" * 400,
        "9" * 5000,
        "2147483648",
        "18446744073709551617",
        "1_0",
        "\u0663",
        "true",
        "None",
    ),
    *("[]", "{}", ",", "auto,", "block:", "block:0x8", "nm:4:2", "cuda:-1", "../..", "/dev/null"),
    *("%s%n", "a" * 5000, "a\nb", "\x1b[31m"),
)
# with each of its options a verb goes on to its work, or says in one line what is wrong
WHOLE = {
    "finetune": (["-o", "run"], ["-o", "run", "--model", "m", "--data", "d"]),
    "profile": (["--device", "cpu"],),
    "autotune": (["--device", "cpu", "-o", "table.json"], ["--device", "cpu", "--recommend", "m"]),
    "sensitivity": (["m", "--data", "d"],),
    "doctor": ([],),
}


class Reached(Exception):
    """All options were taken."""


@pytest.mark.slow
@pytest.mark.parametrize("verb", WHOLE)
def test_junk_in_any_option_is_taken_or_one_line_that_names_it(
    tmp_path, capsys, monkeypatch, verb
):
    def reach(*args, **kwargs):
        raise Reached

    pytest.importorskip("transformers")
    from triton_sparsity.bench import autotune, doctor, profile, recommend, sensitivity
    from triton_sparsity.bench.finetune import job, pretrained

    for module, name in (
        *((job, "run_task"), (pretrained, "_finetune"), (profile, "profile")),
        *((autotune, "autotune"), (recommend, "matrices"), (sensitivity, "prepare")),
        (doctor, "checks"),
    ):
        monkeypatch.setattr(module, name, reach)
    # typer makes its commands anew for each call
    monkeypatch.setattr(cli, "app", typer.main.get_command(cli.app))
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_DATA)
    taken = set()
    for parameter in cli.app.commands[verb].params:
        option = max(parameter.opts, key=len)
        for base in WHOLE[verb] if option.startswith("--") else ():
            # of both kinds of run the others are checked by the same function
            of_model = parameter.name in ("model", "config", *cli.OF_MODEL)
            if verb == "finetune" and of_model != ("--model" in base):
                continue
            for junk in JUNK:
                try:
                    run(verb, *base, f"{option}={junk}")
                except Reached:
                    taken.add(parameter.name)
                else:
                    captured = capsys.readouterr()
                    assert_one_line_error(2, captured)
                    # a file whose name is blank has none to show
                    what = " ".join(junk.split())[:20] or "directory"
                    named = any(one in captured.err for one in (option[2:], parameter.name, what))
                    assert named, (option, junk, captured.err)
                finally:
                    torch.set_num_threads(before[0])
                assert resource.getrlimit(resource.RLIMIT_DATA) == before[1]
                assert not [p for p in tmp_path.rglob("*") if p.name != "table.json"], junk
    # of numbers and names some are right
    assert taken >= {"threads", "level"} & {p.name for p in cli.app.commands[verb].params}


def test_a_run_prints_its_table_and_where_it_ran(tmp_path, capsys):
    assert run("finetune", *QUICK, "-o", tmp_path / "run") == 0
    captured = capsys.readouterr()
    for text in ("digits on cpu", "backend torch", "accuracy", "dense", "sparse", "stripped"):
        assert text in captured.out
    assert re.search(r"(79|80)\.\d %", captured.out)  # of the blocks of each layer
    # no terminal: a line a phase, no bars
    assert [line.split(":")[0] for line in captured.err.splitlines()] == [
        "dense",
        "sparse",
    ]


def test_json_is_all_that_is_printed_and_is_the_stored_report(tmp_path, capsys):
    assert run("finetune", *QUICK, "-o", tmp_path, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["backend"] == "torch"
    assert report["device"].startswith("cpu")
    # a run that has ended shows its result again
    assert run("finetune", "--resume", "-o", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "1"], "level must be in [0, 1), got 1.0"),
        (["--level", "-0.1"], "level must be in [0, 1), got -0.1"),
        (["--level", "nan"], "level must be in [0, 1), got nan"),
        (["--level", "much"], "--level"),
        (["--pattern", "rows"], "got 'rows'"),
        (["--pattern", "block:17"], "power of two from 1 to 256, got 17"),
        (["--pattern", "block:256"], "larger than the weight of 'layers.0.attention.qkv'"),
        (["--task", "mnist"], "digits, minilm, got 'mnist'"),
        (["--device", "tpu"], "got 'tpu'"),
        (["--device", "cuda:99"], "'cuda:99' is not there"),
        (["--dtype", "float8"], "dtype must be one of float32, bfloat16, got 'float8'"),
        (["--schedule", "linear"], "got 'linear'"),
        (["--backend", "cudnn"], "got 'cudnn'"),
        (["--scope", "nothing"], "'nothing'"),
        (["--ignore", "layers"], "no weight to sparsify is left"),
        (["--scope", "{re}("], "'{re}('"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--resume", "--force"], "exclude each other"),
        (["--algorithm", "none"], "rigl, rb, movement, sr_ste, got 'none'"),
        (["--compare", "set", "--algorithm", "set"], "exclude each other"),
        (["--compare", "set,none"], "rigl, rb, movement, sr_ste, got 'none'"),
        (["--compare", "set,set"], "compare must name algorithms, each once, got 'set,set'"),
        (["--levels", "0.5"], "--levels needs --compare"),
        (["--compare", "set", "--levels", "0.5", "--level", "0.5"], "exclude each other"),
        (["--compare", "set", "--levels", "half"], "--levels must be numbers, by commas"),
        (["--compare", "set", "--levels", "0.5,1.5"], "level must be in [0, 1), got 1.5"),
        (["--nope"], "--nope"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line_and_makes_no_folder(tmp_path, capsys, arguments, message):
    code = run("finetune", *QUICK, "-o", tmp_path / "run", *arguments)
    captured = capsys.readouterr()
    assert_one_line_error(code, captured)
    assert message in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run on the GPU that is here")
def test_the_triton_backend_without_a_gpu_is_one_line(tmp_path, capsys):
    code = run("finetune", *QUICK, "-o", tmp_path / "run", "--backend", "triton")
    captured = capsys.readouterr()
    assert_one_line_error(code, captured)
    assert "finetune: backend='triton' needs a" in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["finetune"], ["no-such-command"], ["finetune", "-o"]])
def test_a_bad_command_line_is_one_line(capsys, arguments):
    assert_one_line_error(run(*arguments), capsys.readouterr())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "No such file or directory"),
        ("folder", "Is a directory"),
        ("empty", "is damaged or no safetensors file"),
        ("cut", "is damaged or no safetensors file"),
        ("text", "is damaged or no safetensors file"),
        ("missing", "'norm.bias' is missing"),
        ("extra", "'norm.other' is not in the model"),
        ("foreign", "'bert.embeddings' is not in the model and 1 more"),
        ("shape", "'norm.bias' has shape (3,), not (64,)"),
        ("integers", "'norm.bias' holds torch.int64"),
        ("nan", "'norm.bias' holds torch.float32, NaN or infinity"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_makes_no_folder(tmp_path, capsys, damage, message):
    path = tmp_path / "checkpoint"
    weights = load_task("digits").build().state_dict()
    match damage:
        case "missing":
            del weights["norm.bias"]
        case "extra":
            weights["norm.other"] = torch.zeros(1)
        case "foreign":
            weights = {k: v for k, v in weights.items() if k not in ("norm.bias", "norm.weight")}
            weights |= {"bert.embeddings": torch.zeros(1), "bert.pooler": torch.zeros(1)}
        case "shape":
            weights["norm.bias"] = torch.zeros(3)
        case "integers":
            weights["norm.bias"] = torch.zeros(64, dtype=torch.int64)
        case "nan":
            weights["norm.bias"] = torch.full((64,), float("nan"))
    stored = safetensors.torch.save(weights)
    match damage:
        case "absent":
            pass
        case "folder":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(stored[: len(stored) // 2])
        case "text":
            path.write_text("no weights")
        case _:
            path.write_bytes(stored)
    code = run("finetune", *QUICK, "-o", tmp_path / "run", "--checkpoint", path)
    captured = capsys.readouterr()
    assert_one_line_error(code, captured)
    assert message in captured.err
    assert str(path) in captured.err
    assert not (tmp_path / "run").exists()


def test_a_damaged_state_is_one_line(tmp_path, capsys):
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04")
    code = run("finetune", *QUICK, "-o", tmp_path, "--resume")
    captured = capsys.readouterr()
    assert_one_line_error(code, captured)
    assert str(tmp_path / "state.pt") in captured.err


def test_another_option_than_the_saved_one_is_one_line_with_both_values(tmp_path, capsys):
    assert run("finetune", *QUICK, "-o", tmp_path) == 0
    capsys.readouterr()
    code = run("finetune", "-o", tmp_path, "--resume", "--level", "0.5")
    captured = capsys.readouterr()
    assert_one_line_error(code, captured)
    assert "has level 0.8, got 0.5" in captured.err


def test_a_folder_that_holds_a_run_is_one_line(tmp_path, capsys):
    assert run("finetune", *QUICK, "-o", tmp_path) == 0
    capsys.readouterr()
    code = run("finetune", *QUICK, "-o", tmp_path)
    captured = capsys.readouterr()
    assert_one_line_error(code, captured)
    assert "--resume" in captured.err
    assert "--force" in captured.err


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, place):
    (tmp_path / "file").write_bytes(b"mine")
    code = run("finetune", *QUICK, "-o", tmp_path / place)
    captured = capsys.readouterr()
    assert_one_line_error(code, captured)
    assert place in captured.err
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_without_sklearn_the_task_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code = run("finetune", *QUICK, "-o", tmp_path / "run")
    captured = capsys.readouterr()
    assert_one_line_error(code, captured)
    assert "pip install 'triton-sparsity[demo]'" in captured.err
    assert not list(tmp_path.iterdir())


def write_little(*arguments):
    # a file of this many bytes is as large as the system lets any become
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    main([*arguments])


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    ended = fork(write_little, "finetune", *QUICK, "-o", str(folder / "run"), folder=tmp_path)
    assert ended.wait() == 2
    assert ended.out.read_text() == ""
    assert ended.err.read_text() == (
        f"triton-sparsity: error: {folder / 'run' / 'state.pt'}: File too large\n"
    )
    assert not list(folder.iterdir())


LONGER = [*QUICK, "--dense-epochs=8", "--epochs=8", "--save-every=1"]


def start(folder, *arguments):
    return fork(main, ["finetune", *LONGER, *arguments, "-o", str(folder)], folder=folder.parent)


def wait_for_saves(run, folder, count):
    """Wait until the state was replaced ``count`` times."""
    seen, last = 0, None
    while seen < count:
        assert run.process.is_alive(), run.err.read_text()
        try:
            now = os.stat(folder / "state.pt").st_mtime_ns
        except FileNotFoundError:
            now = None
        seen, last = seen + (now != last), now
        time.sleep(0.0005)


def killed_after(seconds, folder):
    """Resume a run that is killed after some time; tell whether it ended before."""
    run = start(folder, "--resume")
    time.sleep(seconds)
    code = run.wait(0)
    assert code in (0, -signal.SIGKILL), run.err.read_text()
    return code == 0


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_for_bit_as_one_that_was_not(tmp_path, capsys):
    whole = tmp_path / "whole"
    begun = time.perf_counter()
    assert run("finetune", *LONGER, "-o", whole, "--json") == 0
    took = time.perf_counter() - begun
    report = json.loads(capsys.readouterr().out)
    # KILLS=200 tries more of them
    left, moment, runs = int(os.environ.get("KILLS", "2")), random.Random(), 0
    while left:
        folder, runs, ended = tmp_path / f"run{runs}", runs + 1, False
        while not ended and left:
            ended = killed_after(moment.uniform(0, took), folder)
            left -= not ended
        assert run("finetune", *LONGER, "--resume", "-o", folder, "--json") == 0
        assert without_times(json.loads(capsys.readouterr().out)) == without_times(report)
        for name in ("dense.safetensors", "model.safetensors"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.slow
def test_a_stopped_run_exits_with_130_and_tells_how_to_go_on(tmp_path):
    stopped = start(tmp_path / "run", "--json")
    wait_for_saves(stopped, tmp_path / "run", 5)
    stopped.process.terminate()
    assert stopped.wait() == 130
    assert stopped.out.read_text() == ""
    assert stopped.err.read_text() == (
        "triton-sparsity: stopped; to go on: triton-sparsity finetune --resume -o "
        f"{tmp_path / 'run'}\n"
    )


def test_a_run_that_is_stopped_before_it_wrote_anything_says_nothing(
    tmp_path, capsys, monkeypatch
):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("triton_sparsity.bench.finetune.job.run_task", stop)
    assert run("finetune", *QUICK, "-o", tmp_path / "run") == 130
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compare_trains_each_algorithm_from_one_dense_model_and_resumes(tmp_path, capsys):
    options = [*QUICK, "--compare=magnitude,rigl", "--levels=0.5,0.75", "-o", tmp_path]
    assert run("finetune", *options, "--json") == 0
    reports = json.loads(capsys.readouterr().out)
    assert [*reports] == ["magnitude 50 %", "magnitude 75 %", "rigl 50 %", "rigl 75 %"]
    assert json.loads((tmp_path / "report.json").read_text()) == reports
    for name in ("levels.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    names = ["magnitude-0.5", "magnitude-0.75", "rigl-0.5", "rigl-0.75"]
    dense = {(tmp_path / name / "dense.safetensors").read_bytes() for name in names}
    assert len(dense) == 1
    for report in reports.values():
        settings = report["options"]
        assert len(report["history"]["sparse"]["loss"]) == 12
        assert report["results"]["stripped"]["level"] == pytest.approx(settings["level"], abs=1e-2)

    # one run of four is lost: the others are taken as they are
    shutil.rmtree(tmp_path / "rigl-0.5")
    assert run("finetune", *options, "--resume") == 0
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["rigl 50 %"]
    for text in ("dense", "magnitude 75 %", "rigl 50 %", "levels.png"):
        assert text in captured.out
    again = json.loads((tmp_path / "report.json").read_text())
    assert without_times(again) == without_times(reports)
