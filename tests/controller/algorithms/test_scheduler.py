import copy
import math

import pytest

from triton_sparsity.controller.algorithms.scheduler import (
    CompressionScheduler,
    SparsityScheduler,
    StubScheduler,
)
from triton_sparsity.controller.config.schedule import (
    AdaptiveSchedule,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
)

LINEAR = PolynomialSchedule(
    initial_level=0.2, target_level=0.6, target_epoch=2, power=1, freeze_epoch=4
)
PER_STEP = PolynomialSchedule(
    target_level=0.8,
    target_epoch=2,
    freeze_epoch=2,
    power=1,
    update_per_optimizer_step=True,
    steps_per_epoch=2,
)
COUNTING = PER_STEP.model_copy(update={"steps_per_epoch": None})
SCHEDULES = [
    LINEAR,
    ExponentialSchedule(target_level=0.8, target_epoch=3, freeze_epoch=3),
    MultistepSchedule(steps=(1, 3), levels=(0.1, 0.4, 0.7), freeze_epoch=2),
    AdaptiveSchedule(target_level=0.3, patience=2, freeze_epoch=6),
    PER_STEP,
]


class Controller:
    """Records how it is driven; its masks have the level last set, a little less what it lags."""

    def __init__(self, lag=0.0):
        self.level, self.frozen, self.lag, self.calls = 0.0, False, lag, []

    def follow(self, level, *, last):
        self.calls += [level, "freeze"] if last else [level]
        if not self.frozen:
            self.level = level
        self.frozen = self.frozen or last

    def begin_step(self):
        pass

    def check_epoch(self):
        pass

    def mask_level(self):
        return self.level - self.lag


def approx(calls):
    return [c if isinstance(c, str) else pytest.approx(c) for c in calls]


def train(scheduler, epochs, steps=2):
    """Return the scheduled level after each epoch_step."""
    levels = []
    for _ in range(epochs):
        scheduler.epoch_step()
        levels.append(scheduler.current_sparsity_level)
        for _ in range(steps):
            scheduler.step()
    return levels


@pytest.mark.parametrize(
    "scheduler", [CompressionScheduler(), SparsityScheduler(Controller(), LINEAR)], ids=type
)
def test_indices_count_from_minus_one_and_steps_over_all_epochs(scheduler):
    assert (scheduler.current_epoch, scheduler.current_step) == (-1, -1)
    seen = []
    for _ in range(2):
        scheduler.epoch_step()
        for _ in range(3):
            scheduler.step()
            seen.append((scheduler.current_epoch, scheduler.current_step))
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    scheduler.epoch_step(7)
    scheduler.step(next_step=40)
    assert (scheduler.current_epoch, scheduler.current_step) == (7, 40)


@pytest.mark.parametrize("bad", [-1, 1.0, "3", True, math.nan])
def test_an_index_that_is_none_is_refused(bad):
    controller = Controller()
    scheduler = SparsityScheduler(controller, AdaptiveSchedule())
    before = scheduler.get_state()
    with pytest.raises(ValueError, match=r"^epoch_step: next_epoch must be .*, got"):
        scheduler.epoch_step(bad)
    with pytest.raises(ValueError, match=r"^step: next_step must be .*, got"):
        scheduler.step(bad)
    assert scheduler.get_state() == before
    assert controller.calls == []


@pytest.mark.parametrize("schedule", [*SCHEDULES, COUNTING], ids=str)
def test_nothing_is_applied_before_the_first_epoch(schedule):
    controller = Controller()
    scheduler = SparsityScheduler(controller, schedule)
    assert scheduler.current_sparsity_level == schedule.initial_level
    assert scheduler.target_level == schedule.target_level
    assert scheduler.schedule == schedule
    assert controller.calls == []


def test_polynomial_levels_and_then_the_freeze():
    controller = Controller()
    levels = train(SparsityScheduler(controller, LINEAR), epochs=6)
    assert levels == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6, 0.6])
    # masks follow the weights in epoch 3 too, where the level stays; none are found once frozen
    assert controller.calls == approx([0.2, 0.4, 0.6, 0.6, 0.6, "freeze"])


def test_multistep_levels():
    schedule = MultistepSchedule(steps=(2, 3, 4), levels=(0.2, 0.4, 0.5, 0.6), initial_level=0.0)
    scheduler = SparsityScheduler(Controller(), schedule)
    assert scheduler.current_sparsity_level == 0
    assert train(scheduler, epochs=6) == [0.2, 0.2, 0.4, 0.5, 0.6, 0.6]


def test_exponential_levels():
    schedule = ExponentialSchedule(initial_level=0.2, target_level=0.8, target_epoch=2)
    scheduler = SparsityScheduler(Controller(), schedule)
    assert train(scheduler, epochs=4) == pytest.approx([0.2, 0.6, 0.8, 0.8])


@pytest.mark.parametrize("freeze_epoch", [0, 1, 2, 3])
def test_a_freeze_epoch_not_after_the_target_epoch_does_not_cut_the_schedule_short(freeze_epoch):
    for schedule in (
        PolynomialSchedule(target_level=0.9, target_epoch=3, freeze_epoch=freeze_epoch, power=3),
        ExponentialSchedule(target_level=0.9, target_epoch=3, freeze_epoch=freeze_epoch),
        MultistepSchedule(steps=(1, 3), levels=(0.1, 0.5, 0.9), freeze_epoch=freeze_epoch),
    ):
        controller = Controller()
        train(SparsityScheduler(controller, schedule), epochs=6)
        assert controller.level == 0.9
        assert controller.calls[-2:] == [0.9, "freeze"]
        assert len(controller.calls) == 5


def test_a_jump_past_the_freeze_epoch_applies_its_level_before_the_freeze():
    controller = Controller()
    SparsityScheduler(controller, LINEAR).epoch_step(50)
    assert controller.calls == approx([0.6, "freeze"])


def test_adaptive_follows_the_measured_level():
    keeps_up, lags = Controller(), Controller(lag=0.04)
    schedule = AdaptiveSchedule(initial_level=0.1, target_level=0.3)
    for controller in (keeps_up, lags):
        controller.level = 0.1
        scheduler = SparsityScheduler(controller, schedule)
        train(scheduler, epochs=6)
    assert keeps_up.calls == approx([0.15, 0.2, 0.25, 0.3, 0.3, 0.3])
    assert lags.calls == approx([0.1] * 6)


def test_adaptive_stays_where_it_is_frozen():
    controller = Controller()
    scheduler = SparsityScheduler(controller, AdaptiveSchedule(freeze_epoch=2))
    assert train(scheduler, epochs=5) == approx([0.05, 0.1, 0.15, 0.15, 0.15])
    assert controller.calls == approx([0.05, 0.1, 0.15, "freeze"])


def test_per_step_levels_change_at_steps_only():
    controller = Controller()
    scheduler = SparsityScheduler(controller, PER_STEP)
    seen = []
    for _ in range(2):
        scheduler.epoch_step()
        seen.append(len(controller.calls))
        scheduler.step()
        scheduler.step()
    assert seen == [0, 2]
    assert controller.calls == approx([0, 0.2, 0.4, 0.6])
    scheduler.epoch_step()
    assert not controller.frozen
    scheduler.step()
    scheduler.step()
    assert controller.calls[4:] == [0.8, "freeze"]


def test_unknown_steps_per_epoch_are_counted_in_the_first_epoch():
    controller = Controller()
    scheduler = SparsityScheduler(controller, COUNTING)
    with pytest.warns(UserWarning, match="update_per_optimizer_step without steps_per_epoch"):
        scheduler.epoch_step()
    scheduler.step()
    scheduler.step()
    assert (scheduler.current_epoch, scheduler.current_step) == (-1, -1)
    assert controller.calls == []
    assert scheduler.get_state()["_steps_per_epoch"] is None
    train(scheduler, epochs=2)
    assert (scheduler.current_epoch, scheduler.current_step) == (1, 3)
    assert controller.calls == approx([0, 0.2, 0.4, 0.6])
    assert scheduler.get_state()["_steps_per_epoch"] == 2


@pytest.mark.parametrize("steps", [1, 3])
def test_an_epoch_of_another_length_is_an_error(steps):
    scheduler = SparsityScheduler(Controller(), PER_STEP)
    train(scheduler, epochs=1)
    train(scheduler, epochs=1, steps=steps)
    before = scheduler.get_state()
    with pytest.raises(ValueError, match=rf"epoch 1 must have .* = 2 steps, got {steps}"):
        scheduler.epoch_step()
    assert scheduler.get_state() == before


def test_an_epoch_may_be_begun_again():
    controller = Controller()
    scheduler = SparsityScheduler(controller, PER_STEP)
    train(scheduler, epochs=1)
    train(scheduler, epochs=1, steps=1)
    scheduler.epoch_step(next_epoch=1)
    scheduler.step()
    scheduler.step()
    scheduler.epoch_step()
    assert controller.calls == approx([0, 0.2, 0.4, 0.4, 0.6])


@pytest.mark.filterwarnings("ignore:update_per_optimizer_step without")
@pytest.mark.parametrize("schedule", [*SCHEDULES, COUNTING], ids=str)
def test_a_resumed_run_goes_on_as_one_without_interruption(schedule):
    def events():
        for _ in range(8):
            yield "epoch_step"
            yield from ("step", "step")

    def drive(scheduler, todo):
        for event in todo:
            getattr(scheduler, event)()

    whole = Controller()
    reference = SparsityScheduler(whole, schedule)
    drive(reference, events())
    todo = list(events())
    for done in range(len(todo) + 1):
        controller = Controller()
        first = SparsityScheduler(controller, schedule)
        drive(first, todo[:done])
        state = copy.deepcopy(first.get_state())
        second = SparsityScheduler(controller, schedule)
        calls = list(controller.calls)
        second.load_state(state)
        assert controller.calls == calls
        assert second.get_state() == state
        assert second.current_sparsity_level == first.current_sparsity_level
        drive(second, todo[done:])
        assert second.get_state() == reference.get_state()
        assert controller.calls == whole.calls


def test_state_has_the_keys_of_nncf():
    def keys(schedule):
        return set(SparsityScheduler(Controller(), schedule).get_state())

    assert keys(LINEAR) == {"current_step", "current_epoch"}
    assert keys(AdaptiveSchedule()) - keys(LINEAR) == {"num_bad_epochs", "current_sparsity_level"}
    # beyond NNCF the place within the epoch, so that a run may be resumed there
    assert keys(PER_STEP) - keys(LINEAR) == {"_steps_per_epoch", "_steps_in_current_epoch"}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_state_that_does_not_fit_names_the_key_and_changes_nothing(schedule):
    scheduler = SparsityScheduler(Controller(), schedule)
    train(scheduler, epochs=2)
    before = scheduler.get_state()
    later = before | {"current_epoch": 5, "current_step": 11}
    bad = [({k: v for k, v in later.items() if k != key}, key) for key in before]
    bad += [(later | {"masks": 3}, "masks")]
    bad += [(later | {key: value}, key) for key in before for value in (-2, "1", math.nan, True)]
    for state, key in bad:
        with pytest.raises(ValueError, match=rf"^load_state: .*{key}"):
            scheduler.load_state(state)
        assert scheduler.get_state() == before
    with pytest.raises(ValueError, match="must be a mapping, got 3"):
        scheduler.load_state(3)


def test_a_state_of_another_epoch_length_is_refused():
    state = SparsityScheduler(Controller(), PER_STEP).get_state() | {"_steps_per_epoch": 5}
    with pytest.raises(ValueError, match="_steps_per_epoch must be 2 as configured, got 5"):
        SparsityScheduler(Controller(), PER_STEP).load_state(state)
    counting = SparsityScheduler(Controller(), COUNTING)
    counting.load_state(state)
    assert counting.schedule == PER_STEP.model_copy(update={"steps_per_epoch": 5})


def test_stub_changes_nothing():
    stub = StubScheduler()
    stub.epoch_step()
    stub.step(4)
    stub.load_state({"current_step": 3, "current_epoch": 1})
    assert stub.get_state() == {}
    assert (stub.current_step, stub.current_epoch) == (-1, -1)
