"""The command line ``triton-sparsity``.

What is wrong with an option, a file or the disk becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.exit("triton-sparsity: error: a package is missing: pip install 'triton-sparsity[cli]'")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0, 2 after an error that is the user's to mend, 130 if stopped."""
    # typer brings its own click or depends on one, by version; the base of its errors is the same
    usage_error = typer.BadParameter.__mro__[2]
    try:
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


def fail(message: str) -> None:
    """Print ``message`` as one line and exit with code 2."""
    print("triton-sparsity: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
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
        Path,
        typer.Option("--output", "-o", help="Folder for the run's files; made if not there."),
    ],
    task: Annotated[
        Text, _option("stdlib-lm (language model of Python's source) or digits.", "stdlib-lm")
    ] = None,
    pattern: Annotated[
        Text, _option("unstructured, block:ROWSxCOLS or block:SIDE.", "block:16x16")
    ] = None,
    level: Annotated[Real, _option("Sparsity level at the end, in [0, 1).", "0.8")] = None,
    initial_level: Annotated[Real, _option("Sparsity level at the start.", "0")] = None,
    schedule: Annotated[
        Text, _option("polynomial, exponential, multistep or adaptive.", "polynomial")
    ] = None,
    ramp: Annotated[
        Real, _option("Fraction of the sparse epochs in which the level rises.", "0.7")
    ] = None,
    importance: Annotated[
        Text, _option("abs or normed_abs (by the norm of each weight).", "abs")
    ] = None,
    scope: Annotated[
        list[str] | None,
        _option("Modules to prune: path, glob or {re}expression; may be repeated.", "layers"),
    ] = None,
    ignore: Annotated[
        list[str] | None, _option("Modules to leave dense; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        Text, _option("Dense baseline to start from, a safetensors file.", "train one")
    ] = None,
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
    force: Annotated[bool, typer.Option("--force", help="Replace a run in the folder.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON and nothing else.")
    ] = False,
) -> None:
    """Train a dense baseline, fine-tune it under a sparsity schedule, strip and evaluate it.

    Writes model.safetensors (stripped), dense.safetensors, report.json, curves.png and state.pt,
    from which --resume goes on after the run was stopped or killed.
    """
    if resume and force:
        raise typer.BadParameter("--resume and --force exclude each other")
    names = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in context.params.items()
        if value not in (None, [], ()) and name not in ("output", "resume", "force", "as_json")
    }
    # torch and matplotlib take seconds to import, which --help has no use for
    from .finetune import finetune as run
    from .options import Options
    from .report import print_report, progress_bars

    try:
        with progress_bars(quiet=as_json) as progress:
            report = run(
                Options(**names),
                output,
                given=names,
                resume=resume,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        print(
            f"triton-sparsity: stopped; to go on: triton-sparsity finetune --resume -o {output}",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(report, allow_nan=False))
    else:
        print_report(report, output)


if __name__ == "__main__":
    main()
