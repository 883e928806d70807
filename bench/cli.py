"""The command line ``triton-sparsity``.

What is wrong with an option, a file or the disk becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import sys

try:
    import json
    import os
    import signal
    import threading
    from collections.abc import Iterator, Sequence
    from contextlib import contextmanager, nullcontext
    from pathlib import Path
    from typing import Annotated, Any

    import typer
except ModuleNotFoundError:
    sys.exit("triton-sparsity: error: a package is missing: pip install 'triton-sparsity[cli]'")
except KeyboardInterrupt:
    sys.exit(130)

SMALLER = "try fewer or smaller --shapes, or fewer --tokens"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit.

    With 0; 2 after an error that is the user's to mend; 128 and the signal's number if one ended
    it, children and all, with 130 for a ``finetune`` that any of them stopped.
    """
    # typer brings its own click or depends on one, by version; the base of its errors is the same
    usage_error: Any = typer.BadParameter.__mro__[2]
    try:
        with _signals(_leave, signal.SIGTERM):
            sys.exit(app(args=arguments, prog_name="triton-sparsity", standalone_mode=False))
    except usage_error as error:
        fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        reason = error.strerror or str(error)
        fail(f"{error.filename}: {reason}" if error.filename else reason)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))


def _leave(number: int, frame: object) -> None:
    # as an exception, so that whoever has started processes ends them
    sys.exit(128 + number)


@contextmanager
def _signals(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Let ``handler`` have these signals meanwhile, where the thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _imports() -> Any:
    """Let a signal end the program at once: an import makes much noise of an exception."""
    return _signals(signal.SIG_DFL, signal.SIGINT, signal.SIGTERM)


@contextmanager
def _in_memory(remedy: str) -> Iterator[None]:
    """Let memory that is too small be an error with a remedy, on one line."""
    from .measure.memory import shortage, within_memory

    try:
        with within_memory():
            yield
    except Exception as error:
        if (asked := shortage(error)) is None:
            raise
        fail(f"out of memory: {asked}; {remedy}")


def fail(message: str) -> None:
    """Print ``message`` as one line and exit with code 2."""
    print("triton-sparsity: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"triton-sparsity {metadata.version('triton-sparsity')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Fine-tune PyTorch models under sparse masks."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _option(help: str, default: str = "") -> Any:
    return typer.Option(help=help, show_default=default or False)


# None tells that an option was not given; its default is in options.py, or in a run to resume
Text = str | None
Whole = int | None
Real = float | None


@app.command()
def finetune(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the run's files; made if not there."),
    ] = None,
    task: Annotated[
        Text,
        _option(
            "stdlib-lm (language model of Python's source), stdlib-lm-wide, digits or minilm "
            "(pretrained sentence encoder).",
            "stdlib-lm",
        ),
    ] = None,
    model: Annotated[
        Text, _option("Instead of a task: folder of a model that from_pretrained reads.")
    ] = None,
    data: Annotated[
        list[str] | None,
        _option(
            "Of model: text, JSON lines, CSV, image or datasets folder; may be repeated.",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None, _option("Of model: data to evaluate on; may be repeated.", "held out")
    ] = None,
    held_out: Annotated[
        Real, _option("Of model: fraction of the data that is evaluated on.", "0.05")
    ] = None,
    objective: Annotated[
        Text,
        _option(
            "Of model: causal-lm, masked-lm, classification, image-classification or embedding.",
            "by architecture",
        ),
    ] = None,
    text_column: Annotated[
        Text, _option("Of model: column of texts, or of token ids.", "text, input_ids")
    ] = None,
    label_column: Annotated[Text, _option("Of model: column of labels.", "label")] = None,
    max_length: Annotated[
        Whole, _option("Of model: tokens in an example.", "512, or what it takes")
    ] = None,
    new_head: Annotated[
        bool, typer.Option("--new-head", help="Of model: classify the labels of the data anew.")
    ] = False,
    distill: Annotated[
        Text, _option("Of model: learn logits, hidden or logits,hidden of the dense one.", "none")
    ] = None,
    teacher: Annotated[
        Text, _option("Dense model whose logits are learned too, a safetensors file.", "none")
    ] = None,
    distill_weight: Annotated[
        Real, _option("Share in the loss of what is learned of the dense one.", "0.5")
    ] = None,
    temperature: Annotated[Real, _option("Of distilled logits.", "2")] = None,
    trainer: Annotated[
        list[str] | None,
        _option("Of model: key=value of transformers.TrainingArguments; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Of model: a recipe, YAML of these options.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole recipe, and do no more.")
    ] = False,
    algorithm: Annotated[
        Text, _option("magnitude, const, set, rigl, rb, movement or sr_ste.", "magnitude")
    ] = None,
    compare: Annotated[
        Text,
        typer.Option("--compare", help="Algorithms, by commas: run each from one dense baseline."),
    ] = None,
    levels: Annotated[
        Text, typer.Option("--levels", help="With --compare: levels, by commas, not one level.")
    ] = None,
    pattern: Annotated[
        Text,
        _option(
            "unstructured, block:ROWSxCOLS, block:SIDE, nm:N:M or nm:2:4:transposable.",
            "block:16x16",
        ),
    ] = None,
    level: Annotated[
        Real, _option("Sparsity level at the end, in [0, 1).", "0.8; of N:M all")
    ] = None,
    initial_level: Annotated[Real, _option("Sparsity level at the start.", "0")] = None,
    schedule: Annotated[
        Text, _option("polynomial, exponential, multistep or adaptive.", "polynomial")
    ] = None,
    ramp: Annotated[
        Real,
        _option("Fraction of the sparse epochs in which the level rises.", "0.7; of minilm 0.2"),
    ] = None,
    importance: Annotated[
        Text,
        _option(
            "abs, normed_abs, snip, snip_momentum, taylor, fisher, wanda, random; const: obs.",
            "normed_abs",
        ),
    ] = None,
    block_reduction: Annotated[
        Text, _option("Of the importance over a block: mean, max, sum or l2.", "mean")
    ] = None,
    pool: Annotated[
        Text,
        _option("Of magnitude: global, weight or row.", "row (wanda), weight (blocks), global"),
    ] = None,
    initial_masks: Annotated[
        Text, _option("Of set and rigl: importance or random.", "importance")
    ] = None,
    distribution: Annotated[
        Text,
        _option("Over the layers: erk, uniform, or of magnitude owl.", "uniform; set, rigl: erk"),
    ] = None,
    minimum_level: Annotated[
        Real, _option("Each weight is pruned at least so far; not by rb and movement.", "0")
    ] = None,
    maximum_level: Annotated[
        Real, _option("Each weight is pruned at most so far; not by rb and movement.", "0.98")
    ] = None,
    alpha: Annotated[
        Real, _option("Of set and rigl: fraction of the groups that moves at first.", "0.3")
    ] = None,
    delta_t: Annotated[
        Whole, _option("Of set and rigl: steps between updates.", "ramp / 20")
    ] = None,
    growth: Annotated[Text, _option("Of rigl: gradient or normed_gradient.", "gradient")] = None,
    score_lr: Annotated[
        Real, _option("Of rb and movement: peak learning rate of the scores.", "0.1")
    ] = None,
    regularization: Annotated[
        Real, _option("Of movement without a level: factor of its loss.", "0.1")
    ] = None,
    scope: Annotated[
        list[str] | None,
        _option("Modules to prune: path, glob or {re}expression; may be repeated.", "its layers"),
    ] = None,
    ignore: Annotated[
        list[str] | None, _option("Modules to leave dense; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        Text, _option("Dense baseline to start from, a safetensors file.", "train one")
    ] = None,
    permute: Annotated[
        bool,
        typer.Option("--permute", help="Reorder hidden features first, so that blocks keep more."),
    ] = False,
    dense_epochs: Annotated[Whole, _option("Epochs of dense training.", "by task")] = None,
    epochs: Annotated[Whole, _option("Epochs of sparse training.", "by task")] = None,
    steps_per_epoch: Annotated[Whole, _option("Steps in an epoch.", "by task")] = None,
    batch_size: Annotated[Whole, _option("Examples in a step.", "by task")] = None,
    dense_lr: Annotated[Real, _option("Peak learning rate, dense.", "by task")] = None,
    lr: Annotated[Real, _option("Peak learning rate, sparse.", "by task")] = None,
    eval_batches: Annotated[Whole, _option("Held-out batches to evaluate on.", "all")] = None,
    save_every: Annotated[Whole, _option("Steps between two saves of the state.", "50")] = None,
    device: Annotated[Text, _option("auto, cpu, cuda or cuda:N.", "auto")] = None,
    dtype: Annotated[Text, _option("float32, or bfloat16 by autocast.", "float32")] = None,
    backend: Annotated[Text, _option("auto, triton or torch.", "auto")] = None,
    dispatch: Annotated[
        Text, _option("Which layers skip pruned blocks: auto, sparse or dense.", "auto")
    ] = None,
    threads: Annotated[Whole, _option("CPU threads.", "torch's own choice")] = None,
    seed: Annotated[Whole, _option("Seed of weights and data order.", "0")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in the folder, with its options; start one if there is none.",
        ),
    ] = False,
    resume_without_state: Annotated[
        bool,
        typer.Option(
            "--resume-without-state",
            help="Of model: resume also from a checkpoint that has no masks.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run in the folder.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON and nothing else.")
    ] = False,
) -> None:
    """Fine-tune a dense model under a sparsity schedule, strip and evaluate it.

    A --task trains its own dense model first, and writes model.safetensors (stripped),
    dense.safetensors, report.json, curves.png and state.pt. A --model is a folder, and so is what
    comes of it, model/, beside checkpoints/, recipe.yaml, report.json and curves.png. After a run
    was stopped or killed --resume goes on.
    """
    resume = resume or resume_without_state
    if resume and force:
        raise typer.BadParameter("--resume and --force exclude each other")
    if output is None and not print_config:
        raise typer.BadParameter("--output must be given: a folder for the run's files")
    for one, other, both in (
        ("--compare", "--algorithm", compare is not None and algorithm is not None),
        ("--levels", "--level", levels is not None and level is not None),
    ):
        if both:
            raise typer.BadParameter(f"{one} and {other} exclude each other")
    if levels is not None and compare is None:
        raise typer.BadParameter("--levels needs --compare")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in context.params.items()
        # 0 is a value
        if not (value is None or value is False or value in ([], ())) and name not in CALL
    }
    whose = "task" if model is config is None and not print_config else "model"
    if resume and output is not None and (output / "recipe.yaml").exists():
        whose = "model"
    for name in OF_TASK if whose == "model" else OF_MODEL:
        if name in given:
            needs = "the built-in tasks" if whose == "model" else "--model, which is not given"
            raise typer.BadParameter(f"--{name.replace('_', '-')} is of {needs}")
    how: dict[str, Any] = {"resume": resume, "force": force}
    try:
        if whose == "model":
            _finetune_model(given, output, print_config, resume_without_state, as_json, how)
        else:
            assert output is not None
            _finetune_task(given, output, as_json, how)
    except KeyboardInterrupt:
        # a folder that nothing was written to is not left
        if output is not None and output.exists():
            again = f"triton-sparsity finetune --resume -o {output}"
            print(f"triton-sparsity: stopped; to go on: {again}", file=sys.stderr)
        raise typer.Exit(130) from None


# options that say how to run, not what; those of either kind of run alone
CALL = ("output", "resume", "resume_without_state", "force", "as_json", "print_config")
OF_TASK = (
    "task", "compare", "levels", "checkpoint", "dense_epochs", "steps_per_epoch", "dense_lr",
    "permute", "teacher",
)  # fmt: skip
OF_MODEL = (
    "data", "eval_data", "held_out", "objective", "text_column", "label_column", "max_length",
    "new_head", "distill", "trainer",
)  # fmt: skip


def _finetune_task(
    given: dict[str, Any], output: Path, as_json: bool, how: dict[str, Any]
) -> None:
    from .finetune.comparison import comparison
    from .finetune.options import Options, check_values

    compare, levels = given.pop("compare", None), _numbers(given.pop("levels", None))
    options, entries = Options(**given), []
    if compare is not None:
        entries = comparison(options, compare.split(","), levels or [options.level])
    # what is wrong with an option is told before torch is imported, which takes seconds
    for one in () if how["resume"] else [entry.options for entry in entries] or [options]:
        check_values(one)
    with _imports():
        from .finetune.job import finetune as run
        from .finetune.report import print_comparison, print_report
        from .finetune.series import run_series
        from .measure.progress import progress_bars

    remedy = "try a smaller --batch-size or --eval-batches, or --dtype bfloat16"
    with _in_memory(remedy), progress_bars(quiet=as_json) as progress:
        if entries:
            names = {*given, "algorithm", "level"}
            report = run_series(entries, output, given=names, progress=progress, **how)
        else:
            report = run(options, output, given=given, progress=progress, **how)
    if as_json:
        print(json.dumps(report, allow_nan=False))
    elif entries:
        print_comparison(report, output)
    else:
        print_report(report, output)


def _finetune_model(
    given: dict[str, Any],
    output: Path | None,
    print_config: bool,
    resume_without_state: bool,
    as_json: bool,
    how: dict[str, Any],
) -> None:
    try:
        from .finetune import recipe as recipes
    except ModuleNotFoundError as error:
        raise _transformers("finetune --model", error) from None
    path = given.pop("config", None)
    if "distill" in given:
        given["distill"] = tuple(given["distill"].split(","))
    if "trainer" in given:
        given["trainer"] = recipes.parse_settings(given["trainer"])
    written = {} if path is None else recipes.read_recipe(path)
    both = recipes.merged(written, given)
    recipe = recipes.make_recipe(both, f"recipe {path}" if path else "the command line")
    if print_config:
        recipes.checked_recipe(recipe)
        print(recipes.spelled(recipe), end="")
        return
    assert output is not None
    if not how["resume"]:
        recipes.check_recipe(recipe)
    try:
        with _imports():
            from .finetune.pretrained import finetune as run
            from .finetune.report import print_pretrained
            from .measure.progress import progress_bars
    except ModuleNotFoundError as error:
        raise _transformers("finetune --model", error) from None
    # of several processes, which torchrun starts, one speaks
    speaks = os.environ.get("RANK", "0") == "0"
    remedy = "try a smaller --batch-size or --max-length, or --dtype bfloat16"
    with _in_memory(remedy), progress_bars(quiet=as_json or not speaks) as progress:
        report = run(
            recipe,
            output,
            given=both,
            resume_without_state=resume_without_state,
            progress=progress,
            **how,
        )
    if speaks and as_json:
        print(json.dumps(report, allow_nan=False))
    elif speaks:
        print_pretrained(report, output)


def _transformers(verb: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{verb} needs {error.name}: pip install 'triton-sparsity[transformers]'"
    )


def _numbers(text: str | None) -> list[float]:
    try:
        return [] if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--levels must be numbers, by commas, got {text!r}") from None


Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for the files; made if not there.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON and nothing else.")]
Shapes = Annotated[
    Text,
    _option(
        "llama3-8b, vit-h, square, tiny, TOKENSxINxOUT[,...], a .safetensors file or a model's "
        "folder.",
        "by device",
    ),
]
Tokens = Annotated[Whole, _option("Tokens through a model file's weights.", "by device")]
Patterns = Annotated[list[str] | None, _option("As of finetune; may be repeated.", "by device")]


@app.command()
def profile(
    shapes: Shapes = None,
    tokens: Annotated[
        Whole, _option("Tokens through a model file's weights.", "by device")
    ] = None,
    pattern: Patterns = None,
    level: Annotated[
        list[float] | None, _option("Sparsity level; may be repeated.", "0.5, 0.8, 0.9")
    ] = None,
    mask: Annotated[
        Text, _option("random, or skewed: half of the rows hold 90 % of it.", "random")
    ] = None,
    operation: Annotated[
        list[str] | None, _option("One of the table; may be repeated.", "all")
    ] = None,
    dtype: Annotated[Text, _option("float32, bfloat16 or float16.", "by device")] = None,
    device: Annotated[Text, _option("auto, cpu, cuda or cuda:N.", "auto")] = None,
    backend: Annotated[Text, _option("auto, triton or torch.", "auto")] = None,
    threads: Annotated[Whole, _option("CPU threads.", "torch's own choice")] = None,
    budget: Annotated[
        Real, _option("Seconds to time an operation in a pass.", "by device")
    ] = None,
    passes: Annotated[Whole, _option("Times that all is set up anew and timed.", "5")] = None,
    output: Output = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="An earlier profile.json: list what moved since."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="File for a torch profiler trace.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what each kernel achieves, against what this device can do and against dense.

    Every result is checked before it is timed; exit code 1 if one is wrong. --output gets
    profile.json, profile.csv, roofline.png and speedup.png.
    """
    from .measure.files import claim_file, only_writer
    from .measure.options import check_options

    options: dict[str, Any] = {
        "shapes": shapes,
        "patterns": pattern,
        "levels": level,
        "operations": operation,
        "mask": mask,
        "device": device,
        "backend": backend,
        "budget": budget,
        "tokens": tokens,
        "threads": threads,
        "passes": passes,
    }
    check_options(**options, dtypes=None if dtype is None else [dtype])
    if trace is not None:
        claim_file(trace)
    with _imports():
        from . import profile as job
        from .measure.drift import drift, load_profile
        from .measure.progress import progress_bars
        from .measure.tables import show_drift, show_profile

    plan = job.make_plan(**options, dtype=dtype)
    earlier = None if against is None else load_profile(against)
    with _in_memory(SMALLER), only_writer(output) if output else nullcontext():
        with progress_bars(quiet=as_json) as progress:
            record = job.profile(plan, progress)
        short = [row["detail"] for row in record["rows"] if "out of memory" in row["detail"]]
        if short and all(row["status"] == "skipped" for row in record["rows"]):
            fail(f"{short[0]}; {SMALLER}")
        names = [] if output is None else job.save(record, output)
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        show_profile(record, output, names)
        if earlier is not None:
            show_drift(drift(record, earlier), earlier)
    if trace is not None:
        job.write_trace(trace, plan, record)
    if any(row["status"] == "failed" for row in record["rows"]):
        raise typer.Exit(1)


@app.command()
def autotune(
    shapes: Shapes = None,
    tokens: Tokens = None,
    pattern: Patterns = None,
    dtype: Annotated[
        list[str] | None, _option("bfloat16, float16 or float32; may be repeated.", "by device")
    ] = None,
    level: Annotated[
        Real, _option("Sparsity at which tiles are compared, or to recommend for.", "0.8")
    ] = None,
    device: Annotated[Text, _option("auto, cpu, cuda or cuda:N.", "auto")] = None,
    backend: Annotated[Text, _option("auto, triton or torch.", "auto")] = None,
    threads: Annotated[Whole, _option("CPU threads.", "torch's own choice")] = None,
    candidates: Annotated[Whole, _option("Tiles to try for each direction.", "16")] = None,
    budget: Annotated[Real, _option("Seconds to time a candidate.", "by device")] = None,
    recommend: Annotated[
        Path | None,
        typer.Option(
            "--recommend", help="Instead, choose the block for this model: file or folder."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The table's file, by default in your cache folder; with --recommend a folder.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is known.")] = False,
    as_json: Json = False,
) -> None:
    """Find the best tiles of the block-sparse kernels, and the sparsity from which they pay.

    What was found is kept in a table that the kernels read. After an interruption the same command
    goes on.
    """
    from .measure.files import only_writer
    from .measure.options import check_options

    common: dict[str, Any] = {
        "tokens": tokens,
        "device": device,
        "backend": backend,
        "threads": threads,
        "budget": budget,
    }
    check_options(
        **common,
        shapes=shapes,
        blocks=pattern,
        levels=None if level is None else [level],
        dtypes=dtype,
        candidates=candidates,
    )
    common |= {"patterns": pattern, "level": level}
    if recommend is not None and not (shapes is dtype is candidates is None and not force):
        raise typer.BadParameter(
            "--recommend takes shapes and dtypes from the model: leave --shapes, --dtype, "
            "--candidates and --force out"
        )
    with _imports():
        from . import autotune as job
        from . import recommend as chooser
        from .measure.progress import progress_bars
        from .measure.tables import show_recommendation, show_tuning

    if recommend is not None:
        with _in_memory(SMALLER), only_writer(output) if output else nullcontext():
            with progress_bars(quiet=as_json) as progress:
                record = chooser.recommend(recommend, **common, progress=progress)
            if output is not None:
                chooser.save(record, output)
        if as_json:
            print(json.dumps(record, allow_nan=False))
        else:
            show_recommendation(record, output)
        return
    search = job.make_search(
        **common,
        shapes=shapes,
        dtypes=dtype,
        candidates=candidates,
        output=output,
        force=force,
    )
    try:
        with (
            _in_memory(SMALLER),
            only_writer(search.output.parent, search.output.name),
            progress_bars(quiet=as_json) as progress,
        ):
            content = job.autotune(search, progress, _warn)
    except KeyboardInterrupt:
        print(
            f"triton-sparsity: stopped; {search.output} has what was measured, and the same "
            "command goes on",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(dict(content), allow_nan=False))
    else:
        show_tuning(content, search.output)


@app.command()
def sensitivity(
    model: Annotated[Path, typer.Argument(help="Folder of a model that from_pretrained reads.")],
    data: Annotated[list[str], typer.Option("--data", help="As of finetune; may be repeated.")],
    pattern: Annotated[
        list[str] | None,
        _option("As of finetune; may be repeated.", "unstructured, block:16"),
    ] = None,
    levels: Annotated[Text, _option("Levels to scan, by commas.", "0.5,0.7,0.8,0.9")] = None,
    level: Annotated[
        Real, _option("Of all target weights together, to be reached.", "0.8")
    ] = None,
    importance: Annotated[Text, _option("As of finetune.", "normed_abs")] = None,
    batches: Annotated[Whole, _option("Held-out batches to measure the loss on.", "8")] = None,
    batch_size: Annotated[Whole, _option("Examples in a batch.", "8")] = None,
    objective: Annotated[Text, _option("As of finetune.", "by architecture")] = None,
    text_column: Annotated[Text, _option("As of finetune.", "text, input_ids")] = None,
    max_length: Annotated[Whole, _option("Tokens in an example.", "as finetune's")] = None,
    scope: Annotated[list[str] | None, _option("As of finetune; may be repeated.")] = None,
    ignore: Annotated[list[str] | None, _option("As of finetune; may be repeated.")] = None,
    device: Annotated[Text, _option("auto, cpu or cuda.", "auto")] = None,
    threads: Annotated[Whole, _option("CPU threads.", "torch's own choice")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Find what each weight of a model loses by each level, and the levels that lose least.

    Nothing is trained. The record has levels for every weight, as overrides of a configuration.
    """
    try:
        from .finetune.recipe import check_recipe, make_recipe
    except ModuleNotFoundError as error:
        raise _transformers("sensitivity", error) from None
    from .measure.files import only_writer
    from .sensitivity_levels import BUDGET, LEVELS, PATTERNS, check_levels

    patterns = pattern or PATTERNS
    scanned = LEVELS if levels is None else _numbers(levels)
    given = {
        "model": str(model),
        "data": tuple(data),
        # nothing is trained: one half is for what the importance looks at
        "held_out": 0.5,
        "pattern": "unstructured",
        "level": BUDGET if level is None else level,
        "importance": importance,
        "eval_batches": 8 if batches is None else batches,
        "batch_size": batch_size,
        "objective": objective,
        "text_column": text_column,
        "max_length": max_length,
        "scope": tuple(scope or ()),
        "ignore": tuple(ignore or ()),
        "device": device,
        "threads": threads,
    }
    recipe = make_recipe({k: v for k, v in given.items() if v is not None}, "the command line")
    check_recipe(recipe)
    check_levels(patterns, scanned, given["level"])
    try:
        with _imports():
            from . import sensitivity as job
            from .measure.progress import progress_bars
            from .measure.tables import show_sensitivity
    except ModuleNotFoundError as error:
        raise _transformers("sensitivity", error) from None

    remedy = "try a smaller --batch-size or --max-length"
    with _in_memory(remedy), only_writer(output) if output else nullcontext():
        with progress_bars(quiet=as_json) as progress:
            record = job.sensitivity(recipe, patterns, scanned, output or Path(), progress)
        if output is not None:
            job.save(record, output)
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        show_sensitivity(record, output)


@app.command()
def doctor(
    device: Annotated[Text, _option("auto, cpu, cuda or cuda:N.", "auto")] = None,
    backend: Annotated[Text, _option("auto, triton or torch.", "auto")] = None,
    as_json: Json = False,
) -> None:
    """Tell what is here, which backend would run and why, and check every kernel.

    The check compares values and gradients with the reference; exit code 1 if one disagrees.
    """
    from .measure.options import check_options

    check_options(device=device, backend=backend)
    with _imports():
        from .doctor import doctor as examine
        from .measure.tables import show_doctor

    with _in_memory("end what else takes it"):
        record = examine(device, backend)
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        show_doctor(record)
    if any(row["status"] != "ok" for row in record["rows"]):
        raise typer.Exit(1)


def _warn(message: str) -> None:
    print("triton-sparsity: warning:", message, file=sys.stderr)


if __name__ == "__main__":
    main()
