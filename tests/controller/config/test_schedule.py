import copy
import math
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sparsity.controller.config.schedule import (
    AdaptiveSchedule,
    AdaptiveState,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
)

SCHEDULES = [PolynomialSchedule, ExponentialSchedule, MultistepSchedule, AdaptiveSchedule]
LEVELS = st.floats(0, 1, exclude_max=True)
EPOCHS = st.integers(0, 200)
POLYNOMIALS = st.builds(
    PolynomialSchedule,
    initial_level=LEVELS,
    target_level=LEVELS,
    target_epoch=EPOCHS,
    power=st.floats(0.01, 20),
    concave=st.booleans(),
    update_per_optimizer_step=st.booleans(),
    steps_per_epoch=st.none() | st.integers(1, 50),
)
EXPONENTIALS = st.builds(
    ExponentialSchedule, initial_level=LEVELS, target_level=LEVELS, target_epoch=EPOCHS
)


def levels(schedule, epochs):
    return [schedule.level(epoch) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        (
            PolynomialSchedule(
                initial_level=0.2, target_level=0.6, target_epoch=2, power=1, freeze_epoch=4
            ),
            [0.2, 0.4, 0.6, 0.6, 0.6, 0.6],
        ),
        (
            PolynomialSchedule(
                initial_level=0.1, target_level=0.5, target_epoch=3, power=2, concave=False
            ),
            [0.1, 13 / 90, 25 / 90, 0.5, 0.5],
        ),
        (
            PolynomialSchedule(initial_level=0.1, target_level=0.5, target_epoch=3, power=2),
            [0.1, 29 / 90, 41 / 90, 0.5, 0.5],
        ),
        (PolynomialSchedule(initial_level=0.1, target_level=0.7, target_epoch=0), [0.7, 0.7]),
        (
            MultistepSchedule(steps=(2, 3, 4), levels=(0.2, 0.4, 0.5, 0.6)),
            [0.2, 0.2, 0.4, 0.5, 0.6, 0.6],
        ),
        # density 0.8 * (0.2 / 0.8)^(epoch / 2) = 0.8, 0.4, 0.2
        (
            ExponentialSchedule(initial_level=0.2, target_level=0.8, target_epoch=2),
            [0.2, 0.6, 0.8, 0.8],
        ),
        # density (1 / 8)^(epoch / 3) = 1, 1/2, 1/4, 1/8
        (ExponentialSchedule(target_level=0.875, target_epoch=3), [0, 0.5, 0.75, 0.875, 0.875]),
        (ExponentialSchedule(initial_level=0.1, target_level=0.7, target_epoch=0), [0.7, 0.7]),
    ],
    ids=str,
)
def test_levels_follow_the_formula(schedule, want):
    assert levels(schedule, len(want)) == pytest.approx(want, abs=1e-15)


def test_defaults_are_those_of_nncf():
    polynomial, exponential = PolynomialSchedule(), ExponentialSchedule()
    for schedule in (polynomial, exponential):
        assert (schedule.initial_level, schedule.target_level) == (0.0, 0.5)
        assert (schedule.target_epoch, schedule.freeze_epoch) == (90, 100)
    assert (polynomial.power, polynomial.concave) == (0.9, True)
    assert not polynomial.update_per_optimizer_step
    assert polynomial.steps_per_epoch is None
    # what NNCF 2.19.0 returns for the defaults
    assert levels(polynomial, 90)[::30] == pytest.approx(
        [0, 0.15287341866919646, 0.31397947099434925]
    )
    assert levels(exponential, 90)[::30] == pytest.approx(
        [0, 0.2062994740159002, 0.3700394750525634]
    )
    multistep, adaptive = MultistepSchedule(), AdaptiveSchedule()
    assert (multistep.steps, multistep.levels) == ((90,), (0.1, 0.5))
    assert (multistep.initial_level, multistep.freeze_epoch) == (0.1, 100)
    assert (adaptive.step, adaptive.eps, adaptive.patience) == (0.05, 0.03, 1)


def test_polynomial_counts_steps_as_fractions_of_an_epoch():
    schedule = PolynomialSchedule(
        target_level=0.8,
        target_epoch=2,
        power=1,
        update_per_optimizer_step=True,
        steps_per_epoch=4,
    )
    got = [schedule.level(epoch, step) for epoch in range(3) for step in range(4)]
    assert got == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8])


@pytest.mark.parametrize("known", [{"steps_per_epoch": 4}, {"update_per_optimizer_step": True}])
def test_steps_do_not_count_unless_asked_for_and_known(known):
    schedule = PolynomialSchedule(target_epoch=2, **known)
    assert schedule.level(1, step=3) == schedule.level(1)


@settings(deadline=None)
@given(schedule=POLYNOMIALS | EXPONENTIALS, epoch=EPOCHS, step=st.integers(0, 60))
def test_level_stays_between_its_ends(schedule, epoch, step):
    ends = schedule.initial_level, schedule.target_level
    assert min(ends) <= schedule.level(epoch, step) <= max(ends) < 1


@settings(deadline=None)
@given(schedule=POLYNOMIALS | EXPONENTIALS, epoch=EPOCHS)
def test_level_never_turns_back(schedule, epoch):
    now, then = schedule.level(epoch), schedule.level(epoch + 1)
    if schedule.initial_level <= schedule.target_level:
        assert now <= then
    else:
        assert now >= then


@settings(deadline=None)
@given(schedule=POLYNOMIALS | EXPONENTIALS, later=st.integers(0, 1000))
def test_target_is_met_exactly_from_its_epoch_on(schedule, later):
    assert schedule.level(schedule.target_epoch + later) == schedule.target_level


@settings(deadline=None)
@given(schedule=POLYNOMIALS | EXPONENTIALS)
def test_first_epoch_is_at_the_initial_level(schedule):
    if schedule.target_epoch and schedule.initial_level <= schedule.target_level:
        assert schedule.level(0) == pytest.approx(schedule.initial_level, abs=1e-15)


def test_concave_is_fast_at_first_and_convex_slow():
    for epoch in range(1, 5):
        middle = PolynomialSchedule(target_epoch=5, power=1).level(epoch)
        assert PolynomialSchedule(target_epoch=5, power=3).level(epoch) > middle
        assert PolynomialSchedule(target_epoch=5, power=3, concave=False).level(epoch) < middle


def test_multistep_sorts_its_steps_and_not_its_levels():
    schedule = MultistepSchedule(steps=(4, 2), levels=(0.5, 0.1, 0.3))
    assert schedule.steps == (2, 4)
    assert levels(schedule, 6) == [0.5, 0.5, 0.1, 0.1, 0.3, 0.3]
    assert (schedule.target_level, schedule.target_epoch) == (0.3, 4)


def test_multistep_starts_from_the_initial_level_if_that_is_given():
    assert MultistepSchedule(levels=(0.2, 0.4)).initial_level == 0.2
    schedule = MultistepSchedule(levels=(0.2, 0.4), initial_level=0.0)
    assert schedule.initial_level == 0.0
    assert schedule.level(0) == 0.2


def test_multistep_may_have_one_level_and_no_step():
    schedule = MultistepSchedule(steps=(), levels=(0.4,))
    assert levels(schedule, 2) == [0.4, 0.4]
    assert schedule.target_epoch == 0


def test_adaptive_rises_while_the_model_keeps_up():
    schedule = AdaptiveSchedule(initial_level=0.2, target_level=0.33)
    state = AdaptiveState(0.2, bad_epochs=0)
    got = []
    for measured in (0.2, 0.1, 0.22, 0.25, 0.3, 0.33):
        state = schedule.advance(state, measured)
        got.append(state.level)
    # 0.1 is behind 0.25 - 0.03, 0.22 is not
    assert got == pytest.approx([0.25, 0.25, 0.3, 0.3, 0.33, 0.33])


def test_adaptive_waits_for_its_patience():
    schedule = AdaptiveSchedule(patience=3)
    state = AdaptiveState(0.0, bad_epochs=0)
    got = []
    for _ in range(6):
        state = schedule.advance(state, 0.5)
        got.append((round(state.level, 2), state.bad_epochs))
    assert got == [(0, 1), (0, 2), (0.05, 0), (0.05, 1), (0.05, 2), (0.1, 0)]


def test_adaptive_reaches_its_target_in_as_many_epochs_as_steps_fit():
    schedule = AdaptiveSchedule(target_level=0.5, step=0.05)
    state = AdaptiveState(0.0, bad_epochs=0)
    for _ in range(10):
        state = schedule.advance(state, state.level)
    assert state.level == 0.5


@settings(deadline=None)
@given(st.lists(LEVELS, max_size=50), st.integers(0, 3))
def test_adaptive_never_falls_nor_passes_its_target(measured, patience):
    schedule = AdaptiveSchedule(target_level=0.7, patience=patience)
    state = AdaptiveState(0.0, bad_epochs=0)
    for level in measured:
        ahead = schedule.advance(state, level)
        assert state.level <= ahead.level <= 0.7
        state = ahead


@pytest.mark.parametrize("cls", SCHEDULES)
@pytest.mark.parametrize("bad", [-0.1, 1, 1.0, 1.5, math.nan, math.inf, "0.5", None, True])
@pytest.mark.parametrize("field", ["initial_level", "target_level"])
def test_a_level_that_is_none_is_refused_by_name_and_value(cls, field, bad):
    if cls is MultistepSchedule:
        field, argument = "levels[1]", {"levels": (0.1, bad)}
    else:
        argument = {field: bad}
    message = rf"^{cls.__name__}: {re.escape(field)} must be [^\n]*, got {re.escape(repr(bad))}$"
    with pytest.raises(ValueError, match=message):
        cls(**argument)


@pytest.mark.parametrize("cls", SCHEDULES)
@pytest.mark.parametrize("bad", [-1, 1.5, math.nan, math.inf, "3", None, True])
def test_an_epoch_that_is_none_is_refused(cls, bad):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: freeze_epoch must be .*, got"):
        cls(freeze_epoch=bad)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (PolynomialSchedule, {"target_epoch": -1}),
        (PolynomialSchedule, {"power": 0}),
        (PolynomialSchedule, {"power": -1.0}),
        (PolynomialSchedule, {"power": math.nan}),
        (PolynomialSchedule, {"power": math.inf}),
        (PolynomialSchedule, {"concave": 1}),
        (PolynomialSchedule, {"update_per_optimizer_step": "yes"}),
        (PolynomialSchedule, {"steps_per_epoch": 0}),
        (PolynomialSchedule, {"kind": "exponential"}),
        (ExponentialSchedule, {"target_epoch": -1}),
        (MultistepSchedule, {"steps": (1, -2)}),
        (MultistepSchedule, {"steps": 3}),
        (MultistepSchedule, {"steps": (1, 2)}),
        (MultistepSchedule, {"levels": (0.5,)}),
        (MultistepSchedule, {"levels": {0.1, 0.2}}),
        (MultistepSchedule, {"levels": "ab"}),
        (AdaptiveSchedule, {"step": 0}),
        (AdaptiveSchedule, {"eps": -0.1}),
        (AdaptiveSchedule, {"eps": math.nan}),
        (AdaptiveSchedule, {"patience": -1}),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name_and_value(cls, arguments):
    (name,) = arguments
    # the lengths of steps and levels are wrong together
    named = "levels" if name == "steps" and arguments[name] == (1, 2) else name
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: {named}.* must be .*, got "):
        cls(**arguments)


@pytest.mark.parametrize("cls", SCHEDULES)
def test_an_unknown_field_is_refused_with_its_neighbour(cls):
    with pytest.raises(
        ValueError, match=r"frezee_epoch is no field \(did you mean 'freeze_epoch'"
    ):
        cls(frezee_epoch=3)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"target_level .*got 2.*; power .*got 0"):
        PolynomialSchedule(target_level=2, power=0)


@pytest.mark.parametrize("cls", SCHEDULES)
def test_schedules_are_values(cls):
    schedule = cls(freeze_epoch=7)
    assert schedule == cls(freeze_epoch=7.0) == pickle.loads(pickle.dumps(schedule))
    assert len({schedule, copy.deepcopy(schedule), cls()}) == 2
    with pytest.raises(ValueError, match="frozen"):
        schedule.freeze_epoch = 3
    assert cls.model_validate(schedule.model_dump(mode="json")) == schedule
    assert cls.model_validate_json(schedule.model_dump_json()) == schedule
