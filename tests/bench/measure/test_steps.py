import pytest
import torch

from triton_sparsity.bench.measure import steps
from triton_sparsity.bench.measure.cases import measure_case
from triton_sparsity.bench.measure.shapes import Shape
from triton_sparsity.bench.measure.steps import model_cases
from triton_sparsity.kernels.pattern import NM, Block, Unstructured
from triton_sparsity.kernels.topology import Topology

CPU = torch.device("cpu")


def test_counts_of_a_model_agree_with_counting_by_hand():
    shapes = (Shape(10, 64, 32), Shape(10, 32, 64))
    update, step = model_cases(
        shapes, Block(32, 32), 0.5, torch.float32, CPU, "torch", ["mask update", "training step"]
    )
    # each weight has two blocks: a grid of 1 x 2 or 2 x 1; both have one bundle a line of their
    # shorter side
    lists = {(1, 2): 3 + 2 + 6 + 2 + 6 + 2, (2, 1): 6 + 2 + 3 + 2 + 6 + 2}
    assert update.bytes == sum(4 * 2048 + 2 + 2 * 2 + 4 * n for n in lists.values())
    assert update.flops == 0
    assert step.flops == 2 * 3 * 2 * 10 * 1024
    products = (640 + 320 + 1024) * 2 + (640 + 320 + 2048)
    assert step.bytes == 2 * 4 * (products + 7 * 2048)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(32, 32)], ids=str)
def test_updates_and_steps_of_a_model_pass_their_checks(pattern):
    shapes = (Shape(24, 64, 128), Shape(24, 128, 64))
    for case in model_cases(
        shapes, pattern, 0.5, torch.float32, CPU, "torch", ["mask update", "training step"]
    ):
        built = case.build()
        assert built.check() is None, case.operation
        built.run()
        # the optimiser takes no step
        assert built.check() is None


def double(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def rotate(function):
    """Score every group by its neighbour's weights."""

    def wrong(*args, **kwargs):
        found, norms = function(*args, **kwargs)
        return [scores.roll(1, 1) for scores in found], norms

    return wrong


def shift(function):
    def wrong(*args, **kwargs):
        found = function(*args, **kwargs)
        return found._replace(value=1.1 * found.value)

    return wrong


def invert(function):
    def wrong(*args, **kwargs):
        masks = function(*args, **kwargs)
        for mask in masks:
            mask.bitwise_not_()
        return masks

    return wrong


def leave(function):
    """Write nothing where something was."""

    def wrong(*args, out=None, **kwargs):
        return function(*args, **kwargs) if out is None else out

    return wrong


def shift_field(field):
    def breaks(function):
        def wrong(*args, **kwargs):
            found = function(*args, **kwargs)
            for topology in found:
                topology[field].bitwise_not_()
            return found

        return wrong

    return breaks


SHAPES = (Shape(24, 96, 128), Shape(24, 128, 96))


def built(operation, pattern, level=0.5):
    (case,) = model_cases(SHAPES, pattern, level, torch.float32, CPU, "torch", [operation])
    return case


def failure(case):
    """Return what a row says of a case that is wrong, and see that it was not timed."""
    outcome = measure_case(case, CPU, 0.0)
    assert (outcome.status, outcome.timing, outcome.dense) == ("failed", None, None)
    return outcome.detail


@pytest.mark.parametrize(
    ("function", "breaks", "pattern", "detail"),
    [
        ("block_scores", rotate, Block(32, 32), "a pruned score"),
        ("select", shift, Block(32, 32), "groups are pruned, not"),
        ("select", shift, Unstructured(), "groups are pruned, not"),
        *(
            ("make_mask", breaks, pattern, detail)
            for pattern in (Block(32, 32), Unstructured())
            # as many, of an even number, but the other half
            for breaks, detail in ((invert, "a pruned score"), (leave, "a pruned score"))
        ),
        *(
            ("block_topologies", shift_field(i), Block(32, 32), name)
            for i, name in enumerate(Topology._fields)
            # the mask itself is looked at before
            if name != "kept"
        ),
        ("block_topologies", shift_field(6), Block(32, 32), "kept"),
        ("block_topologies", leave, Block(32, 32), "row_tasks"),
    ],
)
def test_a_wrong_update_is_shown_as_failed_and_is_not_timed(
    monkeypatch, function, breaks, pattern, detail
):
    monkeypatch.setattr(steps, function, breaks(getattr(steps, function)))
    assert detail in failure(built("mask update", pattern))


def spoilt(spoil):
    """Let a training step's controller or layers be another than they should."""
    sparsify = steps.sparsify

    def broken(layers, pattern, level, backend):
        return spoil(sparsify, layers, pattern, level, backend)

    return broken


def prune_less(sparsify, layers, pattern, level, backend):
    return sparsify(layers, pattern, level / 2, backend)


def scale_weight_gradient(sparsify, layers, *rest):
    controller = sparsify(layers, *rest)
    layers[1].weight.register_hook(lambda gradient: 1.1 * gradient)
    return controller


def scale_input_gradient(sparsify, layers, *rest):
    controller = sparsify(layers, *rest)
    layers[1].register_full_backward_hook(lambda module, inputs, outputs: (1.1 * inputs[0],))
    return controller


def leak_gradient(sparsify, layers, *rest):
    controller = sparsify(layers, *rest)
    layers[1].weight.register_hook(lambda gradient: gradient + gradient.abs().max())
    return controller


@pytest.mark.parametrize("pattern", [Unstructured(), Block(32, 32), NM(2, 4)], ids=str)
@pytest.mark.parametrize(
    ("spoil", "detail"),
    [
        (prune_less, "groups are pruned, not"),
        (scale_weight_gradient, "weight gradient: off by"),
        (scale_input_gradient, "input gradient: off by"),
        (leak_gradient, "weight gradient: off by"),
    ],
)
def test_a_wrong_step_is_shown_as_failed_and_is_not_timed(monkeypatch, spoil, detail, pattern):
    case = built("training step", pattern)
    assert measure_case(case, CPU, 0.0).status == "ok"
    monkeypatch.setattr(steps, "sparsify", spoilt(spoil))
    assert detail in failure(case)
