from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

import triton_sparsity as ts
from triton_sparsity.bench.finetune import options as written
from triton_sparsity.bench.finetune.options import Options, checked, with_defaults
from triton_sparsity.bench.finetune.sparsity import sparsity_config
from triton_sparsity.bench.finetune.tasks import Recipe
from triton_sparsity.bench.measure import options as measuring
from triton_sparsity.controller.algorithms.table import ALGORITHMS as TABLE
from triton_sparsity.controller.config.algorithm import Pool
from triton_sparsity.controller.selection.criteria import NAMES, Reduction
from triton_sparsity.controller.selection.scorer import BY_GRADIENT, SUMMED
from triton_sparsity.kernels import tuning

RECIPE = Recipe(dense_epochs=3, epochs=10, steps_per_epoch=4, batch_size=2, dense_lr=1e-2, lr=1e-3)


def test_n_m_is_reached_by_default_and_no_level_above_it_is_taken():
    assert checked(Options(pattern="nm:1:4")).level == 0.75
    assert with_defaults(Options(pattern="nm:2:4"), RECIPE).level == 0.5
    assert checked(Options(pattern="nm:1:4", level=0.3)).level == 0.3
    with pytest.raises(ValueError, match=r"level must be at most 1 - n/m = 0.5 .*nm:2:4, got 0.8"):
        checked(Options(pattern="nm:2:4", level=0.8))
    for algorithm in ("set", "rigl"):
        with pytest.raises(
            ValueError, match=rf"algorithm must be one of .*nm:2:4, got '{algorithm}'"
        ):
            checked(Options(pattern="nm:2:4", algorithm=algorithm))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("level", 1.0),
        ("level", -0.1),
        ("level", float("nan")),
        ("initial_level", 0.9),
        ("ramp", 0.0),
        ("ramp", 1.1),
        ("dense_epochs", -1),
        ("epochs", 0),
        ("steps_per_epoch", 0),
        ("batch_size", 0),
        ("dense_lr", 0.0),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("eval_batches", 0),
        ("save_every", 0),
        ("threads", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("schedule", "linear"),
        ("importance", "l2"),
        ("algorithm", "none"),
        ("initial_masks", "dense"),
        ("distribution", "er"),
        ("alpha", 1.5),
        ("alpha", float("nan")),
        ("delta_t", 0),
        ("growth", "random"),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("device", "cuda:x"),
        ("device", f"cuda:{torch.cuda.device_count()}"),
        ("backend", "cudnn"),
    ],
)
def test_what_an_option_cannot_be_is_named_and_shown(name, value):
    with pytest.raises(ValueError, match=name.replace("_", "-")) as caught:
        checked(Options(**{name: value}))
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "unstructured"},
        {"pattern": "nm:2:4"},
        {"pattern": "block:16", "level": 0.0},
        {"pattern": "block:16", "algorithm": "movement"},
    ],
    ids=str,
)
def test_permute_needs_blocks_and_a_level(options):
    with pytest.raises(ValueError, match="permute is for a pattern of blocks and a level, got"):
        checked(Options(permute=True, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill_weight": 0.7}, "distill-weight is of what a teacher is learned by, got 0.7"),
        ({"temperature": 1.0}, "temperature is of what a teacher is learned by, got 1.0"),
        ({"teacher": "x", "distill_weight": 1.5}, "distill-weight must be in \\[0, 1\\]"),
        ({"teacher": "x", "temperature": 0.0}, "temperature must be positive and finite"),
        ({"teacher": "x", "task": "minilm"}, "teacher must be left out with task minilm"),
    ],
    ids=str,
)
def test_what_is_learned_from_a_teacher_needs_one_with_logits(options, message):
    with pytest.raises(ValueError, match=message):
        checked(Options(**options))


def test_defaults_are_valid_and_checking_changes_nothing_twice():
    options = with_defaults(checked(Options()), RECIPE)
    assert checked(options) == options
    assert with_defaults(options, RECIPE) == options


def test_a_checkpoint_stands_for_the_dense_training_unless_more_is_asked_for():
    assert with_defaults(Options(checkpoint="x"), RECIPE).dense_epochs == 0
    assert with_defaults(Options(checkpoint="x", dense_epochs=5), RECIPE).dense_epochs == 5
    assert with_defaults(Options(), RECIPE).dense_epochs == 3


@pytest.mark.parametrize("schedule", ["polynomial", "exponential", "multistep"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 10])
def test_the_target_is_reached_at_the_end_of_the_ramp(schedule, epochs):
    config = sparsity_config(
        with_defaults(Options(schedule=schedule, epochs=epochs, initial_level=0.1), RECIPE)
    )
    # a single epoch is time enough for a schedule by steps
    times = range(4 if schedule == "polynomial" and epochs == 1 else epochs)
    levels = [config.schedule.level(time) for time in times]
    assert levels == sorted(levels)
    assert levels[-1] == 0.8
    assert (levels[0] < 0.8) == (len(times) > 1)
    if epochs == 10:
        assert levels[7] == 0.8
        assert 0.1 <= levels[0] < levels[3] < levels[6] < 0.8


def test_the_ramp_is_the_tasks_unless_one_is_given():
    early = replace(RECIPE, ramp=0.2)
    for given, first in ((None, 2), (0.5, 5)):
        schedule = sparsity_config(with_defaults(Options(ramp=given), early)).schedule
        assert schedule.level(first - 1) < schedule.level(first) == 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(importance="wanda", initial_level=0.1), "start from initial-level 0"),
        (Options(importance="snip", algorithm="rigl"), "start from random masks"),
        (Options(importance="fisher", algorithm="const"), "adds up the steps of a training"),
    ],
)
def test_first_masks_that_nothing_can_judge_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        checked(options)
    checked(Options(importance="snip", algorithm="rigl", initial_masks="random"))


@pytest.mark.parametrize(("name", "config"), [("set", ts.SETConfig), ("rigl", ts.RigLConfig)])
def test_masks_move_until_the_end_of_the_ramp(name, config):
    options = with_defaults(
        Options(algorithm=name, epochs=100, ramp=0.75, alpha=0.2, seed=5, level=0.9), RECIPE
    )
    found = sparsity_config(options)
    assert type(found) is config
    assert (found.t_end, found.delta_t, found.level) == (300, 15, 0.9)
    assert (found.alpha, found.seed, found.distribution) == (0.2, 5, "erk")
    assert sparsity_config(replace(options, delta_t=7)).delta_t == 7
    if config is ts.RigLConfig:
        assert found.growth == "gradient"
        normed = sparsity_config(replace(options, growth="normed_gradient"))
        assert normed.growth == "normed_gradient"


def test_movement_is_hard_with_a_level_and_soft_without():
    options = with_defaults(Options(algorithm="movement", epochs=4, pool="global"), RECIPE)
    hard = sparsity_config(replace(checked(options), level=0.9, ramp=0.5))
    assert isinstance(hard, ts.MovementSparsityConfig)
    assert (hard.schedule.target_level, hard.schedule.target_epoch, hard.pool) == (
        0.9,
        2,
        "global",
    )
    assert hard.importance_regularization_factor is None
    soft = sparsity_config(replace(checked(options), pool=None))
    assert soft.schedule is None
    assert soft.importance_regularization_factor == 0.1
    with pytest.raises(ValueError, match="pool must be left out without a schedule"):
        sparsity_config(checked(options))


def test_the_adaptive_schedule_ends_at_the_target_if_there_is_time():
    schedule = sparsity_config(
        with_defaults(Options(schedule="adaptive", level=0.2, epochs=10), RECIPE)
    ).schedule
    assert schedule.target_level == 0.2
    assert schedule.freeze_epoch >= 10


def test_the_configuration_carries_pattern_scopes_and_importance():
    options = with_defaults(
        Options(
            pattern="block:2x4",
            importance="normed_abs",
            scope=("0", "2"),
            ignore=("2",),
            level=0.5,
            epochs=1,
            schedule="exponential",
        ),
        RECIPE,
    )
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    controller = ts.create_controller(model, sparsity_config(options))
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    (info,) = controller.sparsified_module_info
    assert info.module_node_name == "0"
    assert int((~info.operand.binary_mask).sum()) == 32


def test_what_is_written_out_is_what_the_library_has():
    configs = {row.short: row.config for row in TABLE.values()}
    assert tuple(configs) == written.ALGORITHMS
    assert tuple(name for name, config in configs.items() if config.takes_nm) == written.WITH_NM
    assert get_args(Reduction) == written.REDUCTIONS
    assert get_args(Pool) == written.POOLS
    assert written.SUMMED == SUMMED
    assert {*written.GRADIENT_OR_INPUT} == {*BY_GRADIENT, "wanda"}
    assert {*written.IMPORTANCE} == {*NAMES, "obs"}
    assert {*measuring.DTYPES} == {*tuning.DTYPES}
