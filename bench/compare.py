"""Ours and the peers' on the same work, in turn, on the CPU: mask update, training step,
evaluation.

``python -m triton_sparsity.bench.compare``. Every subject checks its own result before it is
timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..controller.create import create_controller
from ..controller.magnitude import MagnitudeSparsityConfig
from ..controller.movement import MovementSparsityConfig
from ..controller.rb import RBSparsityConfig
from ..controller.schedule import MultistepSchedule, PolynomialSchedule
from ..kernels.pattern import Block, Pattern, Unstructured
from .measure import Timing, Work, in_turn
from .peers import nncf, weight_norm

LEVEL = 0.8
WIDTH = 2048
BLOCK = Block(32, 32)


@dataclass(frozen=True)
class Comparison:
    """Subjects that do the same work.

    Attributes:
        title: what the work is.
        subjects: name -> set-up; the first is what the others are compared with.
        targets: name -> the largest ratio of its time to another's that is acceptable: (other,
            ratio).
        beyond: what the ratios compare is the time beyond this subject's, if one is named.
        weights: number of weights, for scratch memory a weight; 0 where it does not matter.
        rounds: timed runs of each.
    """

    title: str
    subjects: Mapping[str, Callable[[], Work]]
    targets: Mapping[str, tuple[str, float]]
    beyond: str | None = None
    weights: int = 0
    rounds: int = 15


def linears(count: int) -> nn.Sequential:
    """Return ``count`` square linear layers with reproducible weights."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(count)])


def sparse(model: nn.Module, pattern: Pattern) -> Any:
    """Return our controller with ``model`` at the level of this file."""
    schedule = PolynomialSchedule(initial_level=LEVEL, target_level=LEVEL)
    config = MagnitudeSparsityConfig(pattern=pattern, schedule=schedule, weight_importance="abs")
    return create_controller(model, config)


def check(condition: bool, what: str) -> None:
    """Stop a subject whose result is wrong before it is timed."""
    if not condition:
        raise AssertionError(f"result is wrong: {what}")


def our_global_update(count: int) -> Work:
    model = linears(count)
    controller = sparse(model, Unstructured())
    masks = [info.operand.binary_mask for info in controller.sparsified_module_info]
    weights = [layer.weight.detach().abs() for layer in model]
    kept = min(w[m].min() for w, m in zip(weights, masks, strict=True))
    dropped = max(w[~m].max() for w, m in zip(weights, masks, strict=True))
    pruned = sum(int((~m).sum()) for m in masks)
    check(dropped <= kept, "a pruned weight is larger than a kept one")
    check(pruned == round(LEVEL * count * WIDTH**2), f"{pruned} weights are pruned")
    return partial(controller.set_sparsity_level, LEVEL)


def nncf_global_update(count: int) -> Work:
    controller, _ = nncf.compress(linears(count), WIDTH, LEVEL)
    return partial(controller.set_sparsity_level, LEVEL)


def big_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(14336, 4096, bias=False)


def our_block_update() -> Work:
    layer = big_layer()
    controller = sparse(layer, BLOCK)
    grid = layer.weight.detach().abs().view(128, 32, 448, 32).mean(dim=(1, 3))
    mask = controller.sparsified_module_info[0].operand.mask
    check(int((~mask).sum()) == round(LEVEL * grid.numel()), "count of pruned blocks")
    check(bool(grid[~mask].max() <= grid[mask].min() * (1 + 1e-5)), "order of block scores")
    return partial(controller.set_sparsity_level, LEVEL)


def weight_norm_update() -> Work:
    return weight_norm.mask_update(big_layer(), (BLOCK.rows, BLOCK.cols), LEVEL)


def batch(tokens: int) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def training_step(model: nn.Module, tokens: int) -> Work:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters())
    x = batch(tokens)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def check_gradients(model: nn.Sequential, controller: Any, tokens: int) -> None:
    """Compare one backward pass with that of a dense model with zeros written by hand."""
    folded, x = linears(len(model)), batch(tokens)
    masks = [info.operand.binary_mask for info in controller.sparsified_module_info]
    with torch.no_grad():
        for layer, mask in zip(folded, masks, strict=True):
            layer.weight.masked_fill_(~mask, 0)
    for net in (model, folded):
        net(x).square().mean().backward()
    for layer, want, mask in zip(model, folded, masks, strict=True):
        torch.testing.assert_close(layer.weight.grad, want.weight.grad * mask)
    model.zero_grad()


def dense_step(tokens: int) -> Work:
    return training_step(linears(4), tokens)


def our_step(pattern: Pattern, tokens: int) -> Work:
    model = linears(4)
    check_gradients(model, sparse(model, pattern), tokens)
    return training_step(model, tokens)


def nncf_step(tokens: int) -> Work:
    _, model = nncf.compress(linears(4), WIDTH, LEVEL)
    return training_step(model, tokens)


def learning_step(model: nn.Module, controller: Any, tokens: int) -> Work:
    """Forward, backward and AdamW, with what an algorithm adds that learns its masks."""
    optimizer = torch.optim.AdamW(model.parameters())
    x = batch(tokens)

    def step() -> None:
        controller.scheduler.step()
        optimizer.zero_grad()
        (model(x).square().mean() + controller.loss()).backward()
        optimizer.step()

    return step


def our_learning_step(algorithm: str, pattern: Pattern, tokens: int) -> Work:
    """Check a step's weight and score gradients by the mask that its forward pass shows."""
    model, x = linears(4), batch(tokens)
    config = MovementSparsityConfig(pattern=pattern, **nncf.MOVEMENT_PARAMS)
    if algorithm == nncf.RB:
        schedule = MultistepSchedule(steps=(1,), levels=(LEVEL, LEVEL))
        config = RBSparsityConfig(pattern=pattern, schedule=schedule)
    controller = create_controller(model, config)
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    layer = model[0]
    shown = layer(torch.eye(WIDTH)).detach() - layer(torch.zeros(1, WIDTH)).detach()
    kept = shown.T != 0
    out = layer(x)
    out.square().mean().backward()
    dense = (2 * out.detach() / out.numel()).T @ x
    torch.testing.assert_close(layer.weight.grad, dense.where(kept, 0), rtol=1e-3, atol=1e-6)
    if algorithm == nncf.RB:
        share = kept.float().mean().item()
        check(abs(share - 0.99) < 0.01, f"{share} of the groups are kept, of logit 4.595")
    else:
        product = dense * layer.weight.detach()
        rows, cols = pattern.rows, pattern.cols
        grid = product.view(WIDTH // rows, rows, WIDTH // cols, cols).sum((1, 3))
        torch.testing.assert_close(layer.weight_scores.grad, grid, rtol=1e-3, atol=1e-6)
    model.zero_grad()
    return learning_step(model, controller, tokens)


def nncf_learning_step(algorithm: str, tokens: int) -> Work:
    controller, model = nncf.compress(linears(4), WIDTH, LEVEL, algorithm)
    controller.scheduler.epoch_step()
    return learning_step(model, controller, tokens)


def evaluation(model: nn.Module, tokens: int) -> Work:
    x = batch(tokens)
    model.eval()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    return forward


def dense_evaluation(tokens: int) -> Work:
    return evaluation(linears(4), tokens)


def our_evaluation(pattern: Pattern, tokens: int) -> Work:
    model = linears(4)
    controller = sparse(model, pattern)
    with torch.no_grad():
        torch.testing.assert_close(model(batch(4)), controller.strip()(batch(4)))
    return evaluation(model, tokens)


def comparisons() -> list[Comparison]:
    """List the work and the ratios that the project must reach."""
    update: dict[str, Callable[[], Work]] = {"ours": partial(our_global_update, 12)}
    steps: dict[int, dict[str, Callable[[], Work]]] = {
        tokens: {
            "dense": partial(dense_step, tokens),
            "ours, unstructured": partial(our_step, Unstructured(), tokens),
            "ours, 32x32 blocks": partial(our_step, BLOCK, tokens),
        }
        for tokens in (512, 64)
    }
    learning: dict[str, dict[str, Callable[[], Work]]] = {
        algorithm: {
            "dense": partial(dense_step, 64),
            "ours, unstructured": partial(our_learning_step, algorithm, Unstructured(), 64),
            "ours, 32x32 blocks": partial(our_learning_step, algorithm, BLOCK, 64),
        }
        for algorithm in (nncf.RB, nncf.MOVEMENT)
    }
    reason = nncf.available()
    if reason is None:
        update["NNCF"] = partial(nncf_global_update, 12)
        for tokens, subjects in steps.items():
            subjects["NNCF"] = partial(nncf_step, tokens)
        for algorithm, subjects in learning.items():
            subjects["NNCF"] = partial(nncf_learning_step, algorithm, 64)
    else:
        print(f"NNCF is left out: {reason}", file=sys.stderr)
    return [
        Comparison(
            "Mask update: twelve 2048 x 2048 weights, unstructured, one global pool",
            update,
            {"ours": ("NNCF", 1 / 25)},
            weights=12 * WIDTH**2,
            rounds=3,
        ),
        Comparison(
            "Mask update: one 4096 x 14336 weight, 32 x 32 blocks",
            {"ours": our_block_update, "WeightNormSparsifier": weight_norm_update},
            {"ours": ("WeightNormSparsifier", 1 / 25)},
            weights=4096 * 14336,
            rounds=3,
        ),
        Comparison(
            "Training step: 4 x Linear(2048), batch 512, 80 % pruned",
            steps[512],
            {"ours, unstructured": ("dense", 1.15), "ours, 32x32 blocks": ("dense", 1.05)},
        ),
        Comparison(
            "Training step: 4 x Linear(2048), batch 64, 80 % pruned",
            steps[64],
            {"ours, unstructured": ("NNCF", 1.0), "ours, 32x32 blocks": ("NNCF", 1.0)},
        ),
        *(
            Comparison(
                f"Training step: 4 x Linear(2048), batch 64, {algorithm}",
                learning[algorithm],
                {"ours, unstructured": ("NNCF", share), "ours, 32x32 blocks": ("NNCF", share)},
                beyond="dense",
                rounds=7,
            )
            for algorithm, share in ((nncf.RB, 1 / 4), (nncf.MOVEMENT, 1 / 8))
        ),
        Comparison(
            "Evaluation forward: 4 x Linear(2048), batch 512, 80 % pruned",
            {
                "dense": partial(dense_evaluation, 512),
                "ours, unstructured": partial(our_evaluation, Unstructured(), 512),
                "ours, 32x32 blocks": partial(our_evaluation, BLOCK, 512),
            },
            {"ours, unstructured": ("dense", 1.02), "ours, 32x32 blocks": ("dense", 1.02)},
            rounds=41,
        ),
    ]


def ratio(
    timings: Mapping[str, Timing], name: str, other: str, beyond: str | None = None
) -> float:
    """Return the median over rounds of ``name``'s time to ``other``'s in the same round.

    Both without the time of ``beyond`` in that round, if one is named.
    """
    rounds = len(timings[name].seconds)
    base = timings[beyond].seconds if beyond else (0.0,) * rounds
    triples = zip(timings[name].seconds, timings[other].seconds, base, strict=True)
    ratios = torch.tensor([(mine - less) / (theirs - less) for mine, theirs, less in triples])
    return ratios.median().item()


def rows(comparison: Comparison, timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Put one comparison's figures into plain values, one row a subject."""
    found = []
    for name, timing in timings.items():
        other, limit = comparison.targets.get(name, (None, None))
        measured = None
        if other in timings:
            measured = ratio(timings, name, other, comparison.beyond)
        scratch = None
        if comparison.weights and timing.scratch is not None:
            scratch = timing.scratch / comparison.weights
        found.append(
            {
                "work": comparison.title,
                "subject": name,
                "median_s": timing.median,
                "p20_s": timing.quantile(0.2),
                "p80_s": timing.quantile(0.8),
                "scratch_bytes_per_weight": scratch,
                "compared_with": other if measured is not None else None,
                "beyond": comparison.beyond,
                "ratio": measured,
                "ratio_target": limit if measured is not None else None,
            }
        )
    return found


def draw(title: str, found: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("", "median", "p20 to p80", "scratch a weight", "ratio", "target"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in found:
        scratch = row["scratch_bytes_per_weight"]
        reached = row["ratio"] is not None and row["ratio"] <= row["ratio_target"]
        table.add_row(
            row["subject"],
            f"{row['median_s'] * 1e3:.1f} ms",
            f"{row['p20_s'] * 1e3:.1f} to {row['p80_s'] * 1e3:.1f} ms",
            "" if scratch is None else f"{scratch:.1f} bytes",
            "" if row["ratio"] is None else _compared(row),
            ""
            if row["ratio"] is None
            else f"<= {row['ratio_target']:.3g} {'reached' if reached else 'MISSED'}",
        )
    return table


def _compared(row: dict[str, Any]) -> str:
    what = f"what {row['compared_with']} adds" if row["beyond"] else row["compared_with"]
    return f"{row['ratio']:.3f} of {what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--only", metavar="TEXT", default="", help="the work whose title has it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    console = Console()
    found = []
    for comparison in comparisons():
        if options.only not in comparison.title:
            continue
        timings = in_turn(comparison.subjects, comparison.rounds, options.threads)
        found.append(rows(comparison, timings))
        console.print(draw(comparison.title, found[-1]))
    if options.json:
        report = {
            "device": platform.processor() or platform.machine(),
            "threads": options.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": " ".join(["python -m triton_sparsity.bench.compare", *sys.argv[1:]]),
            "results": [row for part in found for row in part],
        }
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
