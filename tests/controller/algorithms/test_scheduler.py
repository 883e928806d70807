import copy
import math

import pytest

from triton_sparsity.controller.algorithms.scheduler import (
    CompressionScheduler,
    StubScheduler,
    make_scheduler,
)
from triton_sparsity.controller.config.schedule import (
    AdaptiveSchedule,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
    RampSchedule,
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

    def have_begun(self):
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
    "scheduler", [CompressionScheduler(), make_scheduler(Controller(), LINEAR)], ids=type
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
    scheduler = make_scheduler(controller, AdaptiveSchedule())
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
    scheduler = make_scheduler(controller, schedule)
    assert scheduler.current_sparsity_level == schedule.initial_level
    assert scheduler.target_level == schedule.target_level
    assert scheduler.schedule == schedule
    assert controller.calls == []


def test_polynomial_levels_and_then_the_freeze():
    controller = Controller()
    levels = train(make_scheduler(controller, LINEAR), epochs=6)
    assert levels == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6, 0.6])
    # masks follow the weights in epoch 3 too, where the level stays; none are found once frozen
    assert controller.calls == approx([0.2, 0.4, 0.6, 0.6, 0.6, "freeze"])


def test_multistep_levels():
    schedule = MultistepSchedule(steps=(2, 3, 4), levels=(0.2, 0.4, 0.5, 0.6), initial_level=0.0)
    scheduler = make_scheduler(Controller(), schedule)
    assert scheduler.current_sparsity_level == 0
    assert train(scheduler, epochs=6) == [0.2, 0.2, 0.4, 0.5, 0.6, 0.6]


def test_exponential_levels():
    schedule = ExponentialSchedule(initial_level=0.2, target_level=0.8, target_epoch=2)
    scheduler = make_scheduler(Controller(), schedule)
    assert train(scheduler, epochs=4) == pytest.approx([0.2, 0.6, 0.8, 0.8])


@pytest.mark.parametrize("freeze_epoch", [0, 1, 2, 3])
def test_a_freeze_epoch_not_after_the_target_epoch_does_not_cut_the_schedule_short(freeze_epoch):
    for schedule in (
        PolynomialSchedule(target_level=0.9, target_epoch=3, freeze_epoch=freeze_epoch, power=3),
        ExponentialSchedule(target_level=0.9, target_epoch=3, freeze_epoch=freeze_epoch),
        MultistepSchedule(steps=(1, 3), levels=(0.1, 0.5, 0.9), freeze_epoch=freeze_epoch),
    ):
        controller = Controller()
        train(make_scheduler(controller, schedule), epochs=6)
        assert controller.level == 0.9
        assert controller.calls[-2:] == [0.9, "freeze"]
        assert len(controller.calls) == 5


def test_a_jump_past_the_freeze_epoch_applies_its_level_before_the_freeze():
    controller = Controller()
    make_scheduler(controller, LINEAR).epoch_step(50)
    assert controller.calls == approx([0.6, "freeze"])


def test_adaptive_follows_the_measured_level():
    keeps_up, lags = Controller(), Controller(lag=0.04)
    schedule = AdaptiveSchedule(initial_level=0.1, target_level=0.3)
    for controller in (keeps_up, lags):
        controller.level = 0.1
        scheduler = make_scheduler(controller, schedule)
        train(scheduler, epochs=6)
    assert keeps_up.calls == approx([0.15, 0.2, 0.25, 0.3, 0.3, 0.3])
    assert lags.calls == approx([0.1] * 6)


def test_adaptive_stays_where_it_is_frozen():
    controller = Controller()
    scheduler = make_scheduler(controller, AdaptiveSchedule(freeze_epoch=2))
    assert train(scheduler, epochs=5) == approx([0.05, 0.1, 0.15, 0.15, 0.15])
    assert controller.calls == approx([0.05, 0.1, 0.15, "freeze"])


def test_per_step_levels_change_at_steps_only():
    controller = Controller()
    scheduler = make_scheduler(controller, PER_STEP)
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
    scheduler = make_scheduler(controller, COUNTING)
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
    scheduler = make_scheduler(Controller(), PER_STEP)
    train(scheduler, epochs=1)
    train(scheduler, epochs=1, steps=steps)
    before = scheduler.get_state()
    with pytest.raises(ValueError, match=rf"epoch 1 must have .* = 2 steps, got {steps}"):
        scheduler.epoch_step()
    assert scheduler.get_state() == before


def test_an_epoch_may_be_begun_again():
    controller = Controller()
    scheduler = make_scheduler(controller, PER_STEP)
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
    reference = make_scheduler(whole, schedule)
    drive(reference, events())
    todo = list(events())
    for done in range(len(todo) + 1):
        controller = Controller()
        first = make_scheduler(controller, schedule)
        drive(first, todo[:done])
        state = copy.deepcopy(first.get_state())
        second = make_scheduler(controller, schedule)
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
        return set(make_scheduler(Controller(), schedule).get_state())

    assert keys(LINEAR) == {"current_step", "current_epoch"}
    assert keys(AdaptiveSchedule()) - keys(LINEAR) == {"num_bad_epochs", "current_sparsity_level"}
    # beyond NNCF the place within the epoch, so that a run may be resumed there
    assert keys(PER_STEP) - keys(LINEAR) == {"_steps_per_epoch", "_steps_in_current_epoch"}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_state_that_does_not_fit_names_the_key_and_changes_nothing(schedule):
    scheduler = make_scheduler(Controller(), schedule)
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
    state = make_scheduler(Controller(), PER_STEP).get_state() | {"_steps_per_epoch": 5}
    with pytest.raises(ValueError, match=r"_steps_per_epoch'\] must be 2 as configured, got 5"):
        make_scheduler(Controller(), PER_STEP).load_state(state)
    counting = make_scheduler(Controller(), COUNTING)
    counting.load_state(state)
    assert counting.schedule == PER_STEP.model_copy(update={"steps_per_epoch": 5})


def test_stub_changes_nothing():
    stub = StubScheduler()
    stub.epoch_step()
    stub.step(4)
    stub.load_state({"current_step": 3, "current_epoch": 1})
    assert stub.get_state() == {}
    assert (stub.current_step, stub.current_epoch) == (-1, -1)


def drive(schedule, steps, per_epoch=4, controller=None, scheduler=None, first=0):
    """Step as a training loop does; return the scheduler and what was applied in which step."""
    controller = controller or Controller()
    scheduler = scheduler or make_scheduler(controller, schedule)
    applied = {}
    for step in range(first, steps):
        before = len(controller.calls)
        if step % per_epoch == 0:
            scheduler.epoch_step()
        scheduler.step()
        if new := controller.calls[before:]:
            applied[step] = new
        level = controller.level if controller.calls else schedule.initial_level
        assert scheduler.current_sparsity_level == level
    return scheduler, applied


def test_a_ramp_by_steps_updates_at_its_times_and_then_freezes():
    ramp = RampSchedule(
        target_level=0.8, begin=2, end=7, every=2, freeze=10, shape="linear", initial_level=0.3
    )
    _, applied = drive(ramp, 14)
    expected = {2: [0.3], 4: [0.5], 6: [0.7], 7: [0.8], 8: [0.8], 10: [0.8, "freeze"]}
    assert {step: pytest.approx(calls[:1]) for step, calls in applied.items()} == {
        step: calls[:1] for step, calls in expected.items()
    }
    assert [step for step, calls in applied.items() if "freeze" in calls] == [10]
    # at its end, if nothing else is said
    _, applied = drive(RampSchedule(target_level=0.8, end=3), 6)
    assert applied[3] == [0.8, "freeze"]
    assert list(applied) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("shape", "middle"),
    [
        ("cubic", 0.9 - 0.8 * 0.5**3),
        ("linear", 0.5),
        ("cosine", 0.5),
        ("exponential", 1 - math.sqrt(0.9 * 0.1)),
    ],
)
def test_a_ramps_shapes(shape, middle):
    ramp = RampSchedule(target_level=0.9, initial_level=0.1, begin=10, end=20, shape=shape)
    assert ramp.level(0) == ramp.level(10) == 0.1
    assert ramp.level(15) == pytest.approx(middle, abs=1e-12)
    assert ramp.level(20) == ramp.level(30) == 0.9
    levels = [ramp.level(time) for time in range(10, 21)]
    assert levels == sorted(levels)


def test_a_ramp_by_epochs_counts_steps_where_it_knows_how_many_there_are():
    ramp = RampSchedule(
        target_level=0.8, begin=0.5, end=1.5, every=0.5, unit="epoch", shape="linear"
    )
    with pytest.raises(ValueError, match=r"steps_per_epoch must be given where begin is no whole"):
        make_scheduler(Controller(), ramp)
    known = ramp.model_copy(update={"steps_per_epoch": 4})
    assert drive(known, 9)[1] == {2: [0.0], 4: [0.4], 6: [0.8, "freeze"]}
    whole = RampSchedule(target_level=0.8, end=2, unit="epoch", shape="linear")
    assert drive(whole, 12)[1] == {0: [0.0], 4: [0.4], 8: [0.8, "freeze"]}


def test_a_ramp_makes_the_latest_of_the_updates_that_are_jumped_over():
    ramp = RampSchedule(target_level=0.8, end=8, every=2, shape="linear")
    controller = Controller()
    scheduler = make_scheduler(controller, ramp)
    scheduler.step(5)
    assert controller.calls == [0.4]
    scheduler.step(6)
    scheduler.step(7)
    assert controller.calls == [0.4, pytest.approx(0.6)]
    scheduler.step(100)
    assert controller.calls[-2:] == [0.8, "freeze"]


@pytest.mark.parametrize("cut", [1, 4, 6, 9])
def test_a_ramp_resumes_as_it_would_have_gone_on(cut):
    ramp = RampSchedule(target_level=0.8, begin=1, end=7, every=3, freeze=8)
    _, whole = drive(ramp, 12)
    controller = Controller()
    scheduler, first = drive(ramp, cut, controller=controller)
    resumed = make_scheduler(controller, ramp)
    resumed.load_state(scheduler.get_state())
    _, rest = drive(ramp, 12, controller=controller, scheduler=resumed, first=cut)
    assert first | rest == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"begin": 9.0}, "end must be at least begin 9, got 8"),
        ({"freeze": 7}, "freeze must be at least end 8, got 7"),
        ({"begin": 0.5}, "begin must be whole with unit 'step', got 0.5"),
        ({"every": 0}, "every must be greater than 0, got 0"),
        ({"shape": "square"}, "shape must be 'cubic', 'linear', 'cosine' or 'exponential', got"),
        ({"target_level": 1.0}, "target_level must be less than 1, got 1.0"),
    ],
)
def test_a_ramp_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RampSchedule(**{"target_level": 0.8, "end": 8} | changes)
