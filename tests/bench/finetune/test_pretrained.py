"""``finetune --model``: a folder and data in, a sparse folder out."""

import json
import random
import re
import shutil
import signal
import sys
import time

import pytest
import safetensors.torch
import torch
import transformers as hf

from forks import fork, fork_ranks
from tiny_folders import CAUSAL, save_images, save_model, save_rows, save_text
from triton_sparsity.bench.cli import main
from triton_sparsity.bench.finetune import pretrained
from triton_sparsity.bench.measure.files import write_sums

# two epochs of six steps
QUICK = ("--threads=1", "--epochs=2", "--lr=1e-3", "--level=0.75", "--batch-size=4")
DATA = {
    "ViT": "images",
    "BERT": "rows.jsonl",
    "BERT-bare": "rows.jsonl",
    "T5-encoder": "rows.jsonl",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:at level .* pruned to nothing"),
    pytest.mark.filterwarnings("ignore:left dense, because"),  # the routers of experts
    pytest.mark.filterwarnings("ignore:training has ended at level"),  # of learned masks
    pytest.mark.filterwarnings("ignore:.*no group of any target weight"),  # one pruning makes them
    pytest.mark.filterwarnings("ignore:.*had been written by somebody else"),  # by NaN
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


def run(*arguments):
    """Run the program in this process; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code or 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models by family, made when first asked for, and data for them."""
    folder = tmp_path_factory.mktemp("folders")
    save_text(folder / "text.txt", 16 * 25)
    save_rows(folder / "rows.jsonl", 25)
    save_images(folder / "images")
    return folder


def command(place, family, *more):
    """Return what trains a family on data for it."""
    if not (place / family).exists():
        save_model(family, place / family)
    data = place / DATA.get(family, "text.txt")
    short = () if family == "ViT" else ("--max-length=16",)
    return ["finetune", "--model", place / family, "--data", data, *short, *QUICK, *more]


def zero_share(folder, layers, cls):
    """Return the share of zeros in the masked weights that plain transformers finds."""
    model = cls.from_pretrained(folder)
    names = [layer["name"] for layer in layers]
    weights = [
        model.get_parameter(name if name in dict(model.named_parameters()) else f"{name}.weight")
        for name in names
    ]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


FAMILIES = {
    **dict.fromkeys(CAUSAL, (hf.AutoModelForCausalLM, "perplexity", ())),
    "BERT-masked": (hf.AutoModelForMaskedLM, "perplexity of masked tokens", ()),
    "BERT": (hf.AutoModelForSequenceClassification, "accuracy", ("--distill=logits",)),
    "ViT": (
        hf.AutoModelForImageClassification,
        "accuracy",
        ("--new-head", "--distill=hidden", "--pattern=unstructured"),
    ),
    "BERT-bare": (hf.AutoModel, "cosine to the dense embedding", ("--distill=hidden",)),
    "T5-encoder": (hf.AutoModelForTextEncoding, "cosine to the dense embedding", ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_ends_as_a_folder_that_plain_transformers_loads(place, tmp_path, capsys, family):
    cls, metric, more = FAMILIES[family]
    assert run(*command(place, family, *more), "-o", tmp_path / "run", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metric"] == metric
    results = report["results"]
    assert results["dense"]["level"] < 0.01
    assert results["sparse"]["level"] == pytest.approx(0.75, abs=0.01)
    assert results["stripped"]["metric"] == pytest.approx(results["sparse"]["metric"], rel=1e-5)
    assert results["stripped"]["compressed_bytes"] < 0.8 * results["dense"]["compressed_bytes"]
    share = zero_share(tmp_path / "run" / "model", report["layers"], cls)
    assert share == pytest.approx(results["stripped"]["level"], abs=1e-6)
    assert share == pytest.approx(0.75, abs=0.01)
    if metric.startswith("perplexity"):
        assert results["stripped"]["metric"] < results["dense"]["metric"]
    for row in ("dense", "sparse"):
        assert results[row]["seconds_per_step"] > 0
    logged = report["history"]["train"]
    steps = [entry["step"] for entry in logged]
    assert steps == list(range(1, len(steps) + 1))
    levels = [entry["sparsity_level"] for entry in logged]
    assert levels == sorted(levels)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_sharded_bfloat16_folder_is_read_and_ends_in_its_dtype(place, tmp_path, capsys):
    folder = save_model("Llama", tmp_path / "sharded", max_shard_size="100KB")
    hf.AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(
        folder, max_shard_size="100KB"
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    arguments = command(place, "Llama", "-o", tmp_path / "run", "--dtype=bfloat16")
    arguments[2] = folder
    assert run(*arguments) == 0
    text = capsys.readouterr().out
    for part in (
        "sharded, causal-lm, guessed",
        "dense",
        "sparse",
        "stripped",
        "5 % of the windows",
    ):
        assert part in text
    weights = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    # the other jobs take such folders too
    assert run("autotune", "--recommend", folder, "--pattern=block:16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"] > 0


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(*command(place, "Llama"), "-o", folder) == 0
    return folder


def copied(finished, folder):
    """Return a copy of a run's folder."""
    return shutil.copytree(finished, folder)


def unfinished(finished, folder):
    """Return a copy that ends with the last checkpoint."""
    copied(finished, folder)
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "model")
    return folder


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    # that a model was saved for the test is not of the run
    others = ("weights under masks", "Writing model shards")
    lines = [x for x in captured.err.splitlines() if x and not any(o in x for o in others)]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("triton-sparsity: error: ")
    return lines[0]


def test_a_run_that_has_ended_shows_its_report_again(finished, capsys):
    assert run("finetune", "--resume", "-o", finished, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        (finished / "report.json").read_text()
    )


def test_a_run_killed_after_its_last_step_ends_with_the_same_weights(finished, tmp_path, capsys):
    folder = unfinished(finished, tmp_path / "run")
    assert run("finetune", "--resume", "-o", folder) == 0
    assert weights_of(folder) == weights_of(finished)


def weights_of(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--level=0.5",), "has level 0.75, got 0.5"),
        (("--trainer", "weight_decay=0.1"), "has trainer {}, got {'weight_decay': 0.1}"),
        (("--task=digits",), "--task is of the built-in tasks"),
    ],
)
def test_another_recipe_than_the_saved_one_is_refused(finished, capsys, arguments, message):
    assert run("finetune", "--resume", "-o", finished, *arguments) == 2
    assert message in one_line(capsys)


def test_a_folder_that_holds_a_run_is_refused(place, finished, tmp_path, capsys):
    before = weights_of(finished)
    assert run(*command(place, "Llama"), "-o", finished) == 2
    assert "--resume goes on with that run, --force replaces it" in one_line(capsys)
    assert weights_of(finished) == before
    # checkpoints alone are somebody's run too
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    assert run(*command(place, "Llama"), "-o", tmp_path, "--resume") == 2
    assert "holds checkpoints already" in one_line(capsys)


def test_a_checkpoint_of_another_run_is_refused(place, finished, tmp_path, capsys):
    folder = unfinished(finished, tmp_path / "run")
    other = tmp_path / "other"
    assert run(*command(place, "Llama"), "--seed=1", "-o", other) == 0
    capsys.readouterr()
    (last,) = (other / "checkpoints").iterdir()
    shutil.copytree(last, folder / "checkpoints" / "checkpoint-99")
    assert run("finetune", "--resume", "-o", folder) == 2
    assert "checkpoint-99 must be a checkpoint of the run in" in one_line(capsys)
    # a state beside weights that it is not of
    shutil.rmtree(folder / "checkpoints" / "checkpoint-99")
    (mine,) = (folder / "checkpoints").iterdir()
    shutil.copy(last / "sparsity_state.pt", mine / "sparsity_state.pt")
    assert run("finetune", "--resume", "-o", folder) == 2
    assert f"{mine / 'sparsity_state.pt'} is damaged" in one_line(capsys)
    write_sums(mine)
    assert run("finetune", "--resume", "-o", folder) == 2
    assert "not of the weights that were loaded" in one_line(capsys)
    assert not (folder / "model").exists()


def test_a_checkpoint_without_sparsity_state_is_resumed_only_if_told_so(
    finished, tmp_path, capsys
):
    folder = unfinished(finished, tmp_path / "run")
    (checkpoint,) = (folder / "checkpoints").iterdir()
    for name in ("sparsity_state.pt", "SHA256SUMS"):
        (checkpoint / name).unlink()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    # as of a dense run, in the midst of training
    dense = folder / "checkpoints" / "checkpoint-6"
    state |= {"trial_name": None, "global_step": 6, "epoch": 1.0}
    state["log_history"] = [one for one in state["log_history"] if one["step"] <= 6]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    checkpoint.rename(dense)
    assert run("finetune", "--resume", "-o", folder) == 2
    assert "--resume-without-state goes on from it" in one_line(capsys)
    assert run("finetune", "--resume-without-state", "-o", folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["results"]["stripped"]["level"] == pytest.approx(0.75, abs=0.01)


def test_other_data_than_those_of_the_run_are_refused(place, finished, tmp_path, capsys):
    folder = unfinished(finished, tmp_path / "run")
    text = place / "text.txt"
    before = text.read_text()
    try:
        text.write_text(before + " w1")
        assert run("finetune", "--resume", "-o", folder) == 2
    finally:
        text.write_text(before)
    assert "the data must be that of the run to resume" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--level=1",), "level must be in [0, 1), got 1.0"),
        (("--pattern=block:128",), "larger than the weight of 'model.layers.0."),
        (("--ignore=model",), "no weight to sparsify is left"),
        (("--objective=translation",), "objective must be one of causal-lm,"),
        (("--objective=masked-lm",), "must have a tokenizer with a mask token"),
        (("--held-out=1",), "held-out must be in (0, 1), got 1.0"),
        (("--held-out=0.99",), "the split would leave one side empty"),
        (("--max-length=100",), "max-length must be at most 64"),
        (("--text-column=body",), "must have a column 'body', got text"),
        (("--distill=hidden",), "hidden is of encoders"),
        (("--distill=softmax",), "distill must be some of logits, hidden, got 'softmax'"),
        (("--new-head",), "new-head is for classification"),
        (("--trainer", "learning_rate=1"), "trainer must leave learning_rate out: use lr"),
        (("--trainer", "warmup=1"), "'warmup', which is no setting of transformers"),
        (("--trainer", "weight_decay=much"), "trainer: weight_decay must be a valid number"),
        (("--trainer", "weight_decay"), "trainer must be key=value, got 'weight_decay'"),
        (("--trainer", "eval_strategy=never"), "trainer: never is not a valid"),
        (("--device=cuda:0",), "device must be auto, cpu or cuda, got 'cuda:0'"),
        (("--eval-data=none.txt",), "none.txt: No such file or directory"),
        (("--dense-epochs=1",), "--dense-epochs is of the built-in tasks"),
        (("--algorithm=movement", "--pattern=nm:2:4"), "algorithm must be one of"),
        (("--algorithm=rigl", "--delta-t=100"), "delta_t must be less than t_end"),
    ],
    ids=" ".join,
)
def test_a_bad_option_is_one_line_and_makes_no_folder(place, tmp_path, capsys, arguments, message):
    assert run(*command(place, "Llama"), *arguments, "-o", tmp_path / "run") == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


def damaged(folder, how):
    """Do to a model's folder what may have been done to it."""
    config = json.loads((folder / "config.json").read_text())
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "no JSON":
            (folder / "config.json").write_text("{")
        case "no such architecture":
            config |= {"model_type": "llama9", "architectures": ["Llama9ForCausalLM"]}
        case "no type":
            config = {}
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "half the weights":
            content = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
        case "a layer less":
            weights = safetensors.torch.load_file(folder / "model.safetensors")
            weights = {name: w for name, w in weights.items() if "layers.1.mlp" not in name}
            safetensors.torch.save_file(
                weights, folder / "model.safetensors", metadata={"format": "pt"}
            )
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
    if how in ("no such architecture", "no type"):
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "which has no config.json"),
        ("no JSON", "is not a valid JSON file"),
        ("no such architecture", "of an architecture that transformers"),
        ("no type", "of an architecture that transformers"),
        ("no weights", "must hold whole weights"),
        ("half the weights", "must hold whole weights"),
        ("a layer less", "lacks model.layers.1.mlp.down_proj.weight, "),
        ("no tokenizer", "must hold a tokenizer for text, and has none"),
    ],
)
def test_a_bad_model_folder_is_one_line_and_makes_no_folder(place, tmp_path, capsys, how, message):
    arguments = command(place, "Llama", "-o", tmp_path / "run")
    folder = arguments[2] = shutil.copytree(place / "Llama", tmp_path / "model")
    damaged(folder, how)
    assert run(*arguments) == 2
    line = one_line(capsys)
    assert message in line
    assert str(folder) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["T5", "Whisper"])
def test_a_model_of_no_objective_here_is_pointed_to_the_callback(place, tmp_path, capsys, family):
    assert run(*command(place, family), "-o", tmp_path / "run") == 2
    assert "TransformersCallback trains any model" in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w1"}, "must have a column 'label', got text; --label-column names another"),
        ({"text": "w1", "label": 2}, "must be from 0 to 1 or one of LABEL_0, LABEL_1, got 2"),
        ({"text": "w1", "label": "good"}, "got 'good'; --new-head trains a head for the labels"),
        (
            {"text": 7, "label": 1},
            "text must be text or a list of token ids, alike in all rows, got '7'",
        ),
        ({"label": 1}, "must have a column 'text', got label; --text-column names another"),
        ("w1", "must be an object"),
    ],
)
def test_a_bad_row_is_one_line_that_says_where_it_is(place, tmp_path, capsys, row, message):
    data = tmp_path / "bad.jsonl"
    text = (place / "rows.jsonl").read_text()
    data.write_text(f"{text}{json.dumps(row)}\n")
    arguments = command(place, "BERT", "-o", tmp_path / "run")
    arguments[4] = data
    assert run(*arguments) == 2
    line = one_line(capsys)
    assert message in line
    assert re.search(r"bad\.jsonl, number 26", line)
    assert not (tmp_path / "run").exists()


def test_a_recipe_is_merged_with_the_command_line_and_printed(place, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: some/model\ndata: text.txt\nlr: 1e-4\ntrainer: {weight_decay: 0.1}\n"
    )
    arguments = ("--config", recipe, "--level=0.6", "--trainer", "max_grad_norm=0.5")
    assert run("finetune", *arguments, "--print-config") == 0
    printed = capsys.readouterr().out
    for line in ("model: some/model", "lr: 0.0001", "level: 0.6", "pattern: block:16x16"):
        assert f"{line}\n" in printed
    assert "trainer:\n  weight_decay: 0.1\n  max_grad_norm: 0.5\n" in printed
    # what is printed is a recipe
    recipe.write_text(printed)
    assert run("finetune", "--config", recipe, "--print-config") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("levl: 0.5", "has 'levl', which is no option (did you mean 'level'?)"),
        ("level: much", "level must be a valid number"),
        ("- level", "must be a mapping of options to values, got list"),
        ("level: [", "must be YAML"),
        ("level: 0.5", "model must be given"),
        ("model: x", "data must be given"),
    ],
)
def test_a_bad_recipe_is_one_line_and_makes_no_folder(tmp_path, capsys, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert run("finetune", "--config", recipe, "-o", tmp_path / "run") == 2
    assert message in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_training_that_diverges_is_one_line(place, tmp_path, capsys):
    assert run(*command(place, "Llama"), "--lr=1e30", "-o", tmp_path / "run", "--json") == 2
    line = one_line(capsys)  # of whoever sees it first
    assert "the training diverged: loss" in line or "holds NaN or Inf" in line


def start(folder, *arguments):
    arguments = [*map(str, arguments), "-o", str(folder)]
    return fork(main, arguments, folder=folder.parent)


def wait_for(run, path):
    while not path.exists():
        assert run.process.is_alive(), run.err.read_text()
        time.sleep(0.005)


# where a step draws random numbers: masked tokens, dropout
LONG = ("--epochs=8", "--save-every=2", "--algorithm=magnitude")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(place, tmp_path, capsys):
    arguments = command(place, "BERT-masked", *LONG)
    assert run(*arguments, "-o", tmp_path / "whole") == 0
    folder = tmp_path / "killed"
    moment = random.Random()
    killed = start(folder, *arguments)
    wait_for(killed, folder / "checkpoints" / f"checkpoint-{2 * moment.randint(1, 15)}")
    time.sleep(moment.uniform(0, 0.1))
    killed.process.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (folder / "report.json").exists()
    assert run("finetune", "--resume", "-o", folder) == 0
    assert weights_of(folder) == weights_of(tmp_path / "whole")
    reports = [json.loads((f / "report.json").read_text()) for f in (folder, tmp_path / "whole")]
    one, other = (report["results"]["stripped"]["metric"] for report in reports)
    assert one == other


@pytest.mark.slow
def test_a_stopped_run_saves_its_step_and_tells_how_to_go_on(place, tmp_path, capsys):
    folder = tmp_path / "run"
    stopped = start(folder, *command(place, "Llama", "--epochs=50", "--save-every=4"))
    wait_for(stopped, folder / "checkpoints" / "checkpoint-4")
    stopped.process.terminate()
    assert stopped.wait() == 130
    assert stopped.out.read_text() == ""
    assert stopped.err.read_text().endswith(
        f"triton-sparsity: stopped; to go on: triton-sparsity finetune --resume -o {folder}\n"
    )
    assert not (folder / "model").exists()
    for path in (folder / "checkpoints").iterdir():
        assert (path / "sparsity_state.pt").exists()


@pytest.mark.slow
def test_of_several_processes_one_writes_and_all_train(place, tmp_path):
    folder = tmp_path / "run"
    arguments = [*map(str, command(place, "Llama", "--batch-size=2", "-o", folder, "--json"))]
    first, second = fork_ranks(2, main, arguments, folder=tmp_path)
    report = json.loads("\n".join(first.lines()))
    assert second.lines() == []
    assert report["processes"] == 2
    assert report["results"]["stripped"]["level"] == pytest.approx(0.75, abs=0.01)
    # as many steps as one process with batches twice as large
    assert report["history"]["train"][-1]["step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["const", "const obs", "set", "rigl", "rb", "movement"])
def test_every_algorithm_trains_such_a_model(place, tmp_path, capsys, algorithm):
    algorithm, *importance = algorithm.split()
    arguments = command(place, "BERT", "-o", tmp_path / "run", "--json", "--algorithm", algorithm)
    arguments += [f"--importance={name}" for name in importance]
    assert run(*arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["results"]["stripped"]["level"] == pytest.approx(0.75, abs=0.02)


def test_a_model_of_ones_own_needs_transformers(place, tmp_path, capsys, monkeypatch):
    arguments = command(place, "Llama", "-o", tmp_path / "run")
    monkeypatch.delitem(sys.modules, pretrained.__name__)
    monkeypatch.delattr("triton_sparsity.bench.finetune.pretrained")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(*arguments) == 2
    assert "pip install 'triton-sparsity[transformers]'" in one_line(capsys)
