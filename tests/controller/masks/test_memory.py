"""What the zeros cost: the bytes that stay, those of a step, an update and a forward pass."""

import gc

import pytest
import torch
from torch import nn, optim

import triton_sparsity as ts
from triton_sparsity.bench.measure.allocations import allocations

pytestmark = pytest.mark.slow  # it looks at every tensor that lives

SIDE, LAYERS = 256, 4
ONE = 4 * SIDE * SIDE  # bytes of a weight
ALL = LAYERS * ONE
PATTERNS = {"unstructured": ts.Unstructured(), "blocks": ts.Block(16, 16), "N:M": ts.NM(1, 4)}
# N:M goes no further
LEVELS = {"unstructured": 0.8, "blocks": 0.8, "N:M": 0.75}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def alive():
    """Count the bytes of all tensors that there are, each storage once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))


def build(pattern, **options):
    model = net()
    level = LEVELS[pattern]
    schedule = ts.PolynomialSchedule(initial_level=level, target_level=level)
    options = {"pattern": PATTERNS[pattern], "schedule": schedule} | options
    controller = ts.create_controller(
        model,
        ts.MagnitudeSparsityConfig(**options),
        dispatch="sparse" if pattern == "blocks" else "auto",
    )
    return model, controller


def step(model, optimizer, batch=2):
    model(torch.randn(batch, SIDE)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def masks_bytes(pattern):
    """The mask, and on a CPU its form that clears at the speed of memory."""
    if pattern == "blocks":  # a byte a block; as wide as a row of blocks
        return ALL / 4 / 256 + ALL / 16
    return ALL / 32 + ALL  # a bit an element; as wide as the weight


def values_bytes(pattern):
    return LEVELS[pattern] * ALL if pattern == "blocks" else ALL


SLACK = ALL / 32  # lists of blocks, scores of blocks, activations


@every_pattern
@pytest.mark.parametrize("keep", [True, False])
def test_what_stays_is_masks_and_retained_values(pattern, keep):
    before = alive()
    model, controller = build(pattern, keep_pruned_values=keep)
    optimizer = optim.SGD(model.parameters(), 0.1)
    step(model, optimizer)
    took = alive() - before - ALL
    want = masks_bytes(pattern) + keep * values_bytes(pattern)
    assert want - SLACK <= took <= want + SLACK
    controller.freeze()
    step(model, optimizer)
    assert alive() - before - ALL <= masks_bytes(pattern) + SLACK


@every_pattern
def test_a_run_peaks_at_that_of_a_dense_one_and_what_stays(pattern):
    """With an update at each epoch, momentum, and the freeze at the end."""
    level = LEVELS[pattern]
    schedule = ts.PolynomialSchedule(
        initial_level=level / 2, target_level=level, target_epoch=2, freeze_epoch=3, power=1.0
    )

    def run(sparse):
        with allocations() as found:
            model, controller = build(pattern, schedule=schedule) if sparse else (net(), None)
            optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
            for _ in range(4):
                if controller is not None:
                    controller.scheduler.epoch_step()
                for _ in range(2):
                    if controller is not None:
                        controller.scheduler.step()
                    step(model, optimizer)
        return found().peak

    run(True)  # what is made once a process
    dense, sparse = run(False), run(True)
    assert sparse - dense <= masks_bytes(pattern) + values_bytes(pattern) + SLACK


@every_pattern
@pytest.mark.parametrize("optimizer", [optim.SGD, optim.AdamW, optim.Rprop])
def test_a_step_allocates_what_a_dense_one_does(pattern, optimizer):
    peaks = []
    for model in (net(), build(pattern)[0]):
        stepper = optimizer(model.parameters(), 0.1)
        for _ in range(2):
            step(model, stepper)
        with allocations() as found:
            step(model, stepper)
        peaks.append(found().peak)
    dense, sparse = peaks
    assert sparse <= dense + SLACK


@every_pattern
@pytest.mark.parametrize("mode", ["evaluation", "training", "compiled"])
def test_a_forward_pass_allocates_nothing_as_large_as_a_weight(pattern, mode):
    model, _ = build(pattern)
    model.train(mode != "evaluation")
    torch._dynamo.reset()
    forward = torch.compile(model, backend="eager") if mode == "compiled" else model
    x = torch.randn(2, SIDE)
    for _ in range(2):
        forward(x)
    with allocations() as found:
        forward(x)
    assert 0 < found().largest <= ONE / 8
    assert found().peak <= ONE / 8


@every_pattern
def test_an_update_needs_no_second_copy_of_the_weights(pattern):
    """What is scored lives before the values are taken, and is of a weight or two at a time."""
    model, controller = build(pattern)
    step(model, optim.SGD(model.parameters(), 0.1))
    controller.set_sparsity_level(LEVELS[pattern] - 0.1)
    with allocations() as found:
        controller.set_sparsity_level(LEVELS[pattern])
    assert found().peak <= values_bytes(pattern) + SLACK


def test_a_second_reading_of_the_state_holds_nothing_on():
    _, controller = build("blocks")
    before = alive()
    controller.get_state()
    assert alive() == before
