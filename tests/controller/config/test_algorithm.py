import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_sparsity.controller.algorithms.magnitude import MagnitudeSparsityConfig
from triton_sparsity.controller.config.algorithm import (
    BatchNormAdaptation,
    Override,
    parse_pattern,
)
from triton_sparsity.controller.config.schedule import (
    AdaptiveSchedule,
    ExponentialSchedule,
    MultistepSchedule,
    PolynomialSchedule,
)
from triton_sparsity.controller.nncf import from_nncf, parse_config
from triton_sparsity.kernels.pattern import NM, Block, Unstructured

SECTION = {"algorithm": "magnitude_sparsity"}

CONFIGS = [
    MagnitudeSparsityConfig(),
    MagnitudeSparsityConfig(sparsity_level_setting_mode="local", sparsity_init=0.3),
    MagnitudeSparsityConfig(
        pattern=Block(32, 16),
        schedule=PolynomialSchedule(target_level=0.8, target_epoch=3),
        weight_importance="abs",
        target_scopes=["encoder", "{re}fc[12]$"],
        ignored_scopes="head",
        validate_scopes=False,
        overrides=[
            Override(scope="encoder.0", pattern=Block(8, 8), maximum_level=0.5),
            Override(scope="*.fc1", pattern=Unstructured(), minimum_level=0.2),
            Override(scope="*.fc2"),
        ],
        batchnorm_adaptation=BatchNormAdaptation(num_bn_adaptation_samples=64),
    ),
    *(
        MagnitudeSparsityConfig(schedule=schedule)
        for schedule in (
            ExponentialSchedule(initial_level=0.1),
            MultistepSchedule(steps=(1, 2), levels=(0.1, 0.2, 0.3)),
            AdaptiveSchedule(patience=3),
        )
    ),
]


def params(**keys):
    return {**SECTION, "params": keys}


def test_defaults_are_those_of_nncf():
    config = MagnitudeSparsityConfig()
    assert config.schedule == PolynomialSchedule()
    assert config.weight_importance == "normed_abs"
    assert config.sparsity_level_setting_mode == "global"
    assert config.pattern == Unstructured()
    assert config.target_scopes is None
    assert config.ignored_scopes == ()
    assert config.validate_scopes
    assert config.batchnorm_adaptation is None
    assert config.initial_level == 0
    assert BatchNormAdaptation().num_bn_adaptation_samples == 2000


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations_are_values(config):
    stored = config.model_dump(mode="json")
    assert MagnitudeSparsityConfig.model_validate(json.loads(json.dumps(stored))) == config
    assert MagnitudeSparsityConfig.model_validate_json(config.model_dump_json()) == config
    assert MagnitudeSparsityConfig(**stored) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(MagnitudeSparsityConfig(**stored)) == hash(config)
    with pytest.raises(ValueError, match="frozen"):
        config.validate_scopes = False


def test_the_initial_level_is_the_schedules():
    schedule = PolynomialSchedule(initial_level=0.2)
    assert MagnitudeSparsityConfig(schedule=schedule).initial_level == 0.2
    local = MagnitudeSparsityConfig(sparsity_level_setting_mode="local", sparsity_init=0.3)
    assert local.schedule is None
    assert local.initial_level == 0.3
    with pytest.raises(ValueError, match=r"sparsity_init must be left out .*, got 0.3"):
        MagnitudeSparsityConfig(schedule=schedule, sparsity_init=0.3)


def test_a_mode_and_a_schedule_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"schedule must be None .*'local'.* got PolynomialSch"):
        MagnitudeSparsityConfig(sparsity_level_setting_mode="local", schedule=PolynomialSchedule())
    with pytest.raises(ValueError, match=r"schedule must be given .*'global', got None"):
        MagnitudeSparsityConfig(schedule=None)


@pytest.mark.parametrize(
    ("spelled", "pattern"),
    [
        ("unstructured", Unstructured()),
        ({"block": [64, 32]}, Block(64, 32)),
        ({"block": (1, 256)}, Block(1, 256)),
        (Unstructured(), Unstructured()),
        (Block(16, 8), Block(16, 8)),
        ({"nm": [1, 3]}, NM(1, 3)),
        ({"nm": (2, 4)}, NM(2, 4)),
        ({"nm": [2, 4], "transposable": True}, NM(2, 4, transposable=True)),
        ({"nm": [2, 4], "transposable": False}, NM(2, 4)),
        (NM(16, 32), NM(16, 32)),
    ],
    ids=str,
)
def test_patterns_are_read(spelled, pattern):
    assert parse_pattern(spelled) == pattern
    assert MagnitudeSparsityConfig(pattern=spelled).pattern == pattern
    assert from_nncf(params(pattern=spelled)).pattern == pattern


@pytest.mark.parametrize(
    "bad",
    [
        "block",
        None,
        7,
        {"block": 64},
        {"block": [64]},
        {"block": [64, 64], "nm": [2, 4]},
        {"block": [48, 64]},
        {"block": [512, 64]},
        {"block": [True, 64]},
        {"nm": [4, 4]},
        {"nm": [2]},
        {"nm": [2.0, 4]},
        {"nm": [2, 4], "transpose": True},
        {"nm": [1, 4], "transposable": True},
        {"nm": [2, 4], "transposable": 1},
        [32, 32],
    ],
    ids=str,
)
def test_what_is_no_pattern_is_refused(bad):
    with pytest.raises(ValueError, match=r"^MagnitudeSparsityConfig: pattern .*must be .*, got "):
        MagnitudeSparsityConfig(pattern=bad)
    with pytest.raises(ValueError, match=r"^compression: params.pattern .*must be .*, got "):
        from_nncf(params(pattern=bad))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": 3}, "schedule must be a schedule such as .*, got 3"),
        ({"schedule": {"kind": "cubic"}}, "schedule must be a schedule .*, got .*cubic"),
        ({"schedule": {"kind": []}}, "schedule must be a schedule .*, got"),
        (
            {"schedule": {"kind": "polynomial", "target_level": 2}},
            "schedule PolynomialSchedule: target_level must be less than 1, got 2",
        ),
        (
            {"weight_importance": "l1"},
            "weight_importance must be 'abs', .*, or a function .*got 'l1'",
        ),
        ({"sparsity_level_setting_mode": "both"}, "must be 'global' or 'local', got 'both'"),
        (
            {"algorithm": "rb_sparsity"},
            "algorithm must be .*magnitude_sparsity.*, got .rb_sparsity.",
        ),
        ({"target_scopes": ()}, r"target_scopes must be None or name a scope, got \(\)"),
        ({"target_scopes": 7}, "target_scopes must be a valid tuple, got 7"),
        ({"target_scopes": ["a", 7]}, r"target_scopes\[1\] must be a valid string, got 7"),
        ({"ignored_scopes": [""]}, r"ignored_scopes\[0\] must be a module path, .*, got ''"),
        ({"ignored_scopes": "{re}a("}, r"ignored_scopes\[0\] scope '{re}a\(' is no valid regular"),
        ({"validate_scopes": "no"}, "validate_scopes must be a valid boolean, got 'no'"),
        ({"overrides": [{"scop": "a"}]}, r"overrides\[0\] Override: .*did you mean 'scope'"),
        ({"overrides": Override(scope="a")}, "overrides must be a valid tuple, got Override"),
        ({"batchnorm_adaptation": True}, "batchnorm_adaptation must be .*, got True"),
        ({"overides": ()}, r"overides is no field \(did you mean 'overrides'\?\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name_and_value(arguments, message):
    with pytest.raises(ValueError, match=rf"^MagnitudeSparsityConfig: .*{message}") as error:
        MagnitudeSparsityConfig(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "scope must be given"),
        ({"scope": "a", "pattern": "nm"}, "pattern must be .*, got 'nm'"),
        ({"scope": "a", "minimum_level": 1}, "minimum_level must be less than 1, got 1"),
        ({"scope": "a", "maximum_level": 1.1}, "maximum_level must be .* 1, got 1.1"),
        ({"scope": "a", "maximum_level": float("nan")}, "maximum_level must be .*, got nan"),
        (
            {"scope": "a", "minimum_level": 0.5, "maximum_level": 0.4},
            "minimum_level must be at most maximum_level 0.4, got 0.5",
        ),
    ],
    ids=str,
)
def test_bad_overrides_are_refused_by_name_and_value(arguments, message):
    with pytest.raises(ValueError, match=rf"^Override: {message}"):
        Override(**arguments)


def test_the_whole_nncf_dictionary_is_read():
    config = from_nncf(
        {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.1,
            "ignored_scopes": ["head"],
            "target_scopes": "encoder",
            "validate_scopes": False,
            "compression_lr_multiplier": 2.0,
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 128}},
            "params": {
                "schedule": "polynomial",
                "sparsity_target": 0.7,
                "sparsity_target_epoch": 5,
                "sparsity_freeze_epoch": 6,
                "power": 3,
                "concave": False,
                "update_per_optimizer_step": True,
                "steps_per_epoch": 10,
                "weight_importance": "abs",
                "sparsity_level_setting_mode": "global",
                "pattern": {"block": [64, 64]},
                "overrides": [{"scope": "encoder.0", "pattern": "unstructured"}],
            },
        }
    )
    assert config == MagnitudeSparsityConfig(
        pattern=Block(64, 64),
        schedule=PolynomialSchedule(
            initial_level=0.1,
            target_level=0.7,
            target_epoch=5,
            freeze_epoch=6,
            power=3.0,
            concave=False,
            update_per_optimizer_step=True,
            steps_per_epoch=10,
        ),
        weight_importance="abs",
        target_scopes=("encoder",),
        ignored_scopes=("head",),
        validate_scopes=False,
        overrides=(Override(scope="encoder.0", pattern=Unstructured()),),
        batchnorm_adaptation=BatchNormAdaptation(num_bn_adaptation_samples=128),
    )


@pytest.mark.parametrize(
    ("section", "schedule"),
    [
        (SECTION, PolynomialSchedule()),
        ({**SECTION, "sparsity_init": 0.2}, PolynomialSchedule(initial_level=0.2)),
        (
            params(schedule="exponential", sparsity_target=0.9, sparsity_target_epoch=3),
            ExponentialSchedule(target_level=0.9, target_epoch=3),
        ),
        (params(schedule="multistep"), MultistepSchedule()),
        (
            params(
                schedule="multistep",
                multistep_steps=[3, 2],
                multistep_sparsity_levels=[0.1, 0.2, 0.3],
                # NNCF lets it be: the last level is the target
                sparsity_target=0.9,
            ),
            MultistepSchedule(steps=(2, 3), levels=(0.1, 0.2, 0.3)),
        ),
        (
            {**params(schedule="multistep"), "sparsity_init": 0.05},
            MultistepSchedule(initial_level=0.05),
        ),
        (
            params(schedule="adaptive", patience=2, step=0.1, eps=0.01, sparsity_freeze_epoch=9),
            AdaptiveSchedule(patience=2, step=0.1, eps=0.01, freeze_epoch=9),
        ),
    ],
    ids=str,
)
def test_nncf_schedules_are_read(section, schedule):
    assert from_nncf(section) == MagnitudeSparsityConfig(schedule=schedule)


def test_local_mode_is_read():
    section = {**params(sparsity_level_setting_mode="local"), "sparsity_init": 0.2}
    want = MagnitudeSparsityConfig(sparsity_level_setting_mode="local", sparsity_init=0.2)
    assert from_nncf(section) == want
    for key, value in {"schedule": "polynomial", "sparsity_target": 0.5}.items():
        with pytest.raises(ValueError, match=rf"params.{key} must be left out .*, got {value!r}"):
            from_nncf(params(sparsity_level_setting_mode="local", **{key: value}))


def test_batchnorm_adaptation_is_configured_by_its_key_alone():
    def adaptation(initializer):
        return from_nncf({**SECTION, "initializer": initializer}).batchnorm_adaptation

    assert adaptation({}) is None
    assert adaptation({"batchnorm_adaptation": {}}) == BatchNormAdaptation()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"algorithm": "quantization"},
            "algorithm must be .*magnitude_sparsity.*, got .quantization.",
        ),
        ({"params": {}}, "algorithm must be .*, got None"),
        ({**SECTION, "parms": {}}, r"unknown key 'parms' \(did you mean 'params'\?\); the keys"),
        ({**SECTION, 3: {}}, "unknown key 3; the keys are algorithm"),
        (params(sparsity_targt=0.5), r"params: unknown key 'sparsity_targt' \(did you mean 'sp"),
        (params(sparsity_init=0.5), "params: unknown key 'sparsity_init'"),
        ({**SECTION, "params": [1]}, r"params must be a dictionary, got \[1\]"),
        ({**SECTION, "initializer": {"range": {}}}, "initializer: unknown key 'range'"),
        (
            {**SECTION, "initializer": {"batchnorm_adaptation": {"samples": 3}}},
            "initializer.batchnorm_adaptation: unknown key 'samples'; .* num_bn_adaptation_sam",
        ),
        (
            {
                **SECTION,
                "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": -1}},
            },
            "initializer.batchnorm_adaptation.num_bn_adaptation_samples must be .*, got -1",
        ),
        ({**SECTION, "sparsity_init": 1}, "sparsity_init must be less than 1, got 1"),
        (params(sparsity_target=1.5), "params.sparsity_target must be less than 1, got 1.5"),
        (params(sparsity_target_epoch=0.5), "params.sparsity_target_epoch must be .*, got 0.5"),
        (
            params(schedule="multistep", multistep_sparsity_levels=[0.1, 2]),
            r"params.multistep_sparsity_levels\[1\] must be less than 1, got 2",
        ),
        (
            params(schedule="multistep", multistep_sparsity_levels=[0.1]),
            r"levels must be one more than the 1 steps, got \(0.1,\)",
        ),
        (params(schedule="cubic"), "params.schedule must be one of .*'adaptive', got 'cubic'"),
        (params(schedule=["cubic"]), "params.schedule must be one of .*, got "),
        (params(weight_importance="l1"), "params.weight_importance must be .*, got 'l1'"),
        (params(overrides=[{"scope": 3}]), r"params.overrides\[0\] Override: scope must be .* 3"),
        ({**SECTION, "ignored_scopes": 3}, "ignored_scopes must be a valid tuple, got 3"),
    ],
    ids=str,
)
def test_what_nncf_has_not_is_refused_as_it_is_spelled(section, message):
    with pytest.raises(ValueError, match=rf"^compression.*{message}") as error:
        parse_config(section)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        MagnitudeSparsityConfig(),
        SECTION,
        [SECTION],
        {"compression": SECTION},
        {"compression": [SECTION], "input_info": {"sample_size": [1, 3]}, "log_dir": "x"},
    ],
    ids=str,
)
def test_every_form_of_a_configuration_is_read(config):
    assert parse_config(config) == [MagnitudeSparsityConfig()]


def test_scopes_beside_the_section_count_as_in_nncf():
    (config,) = parse_config(
        {
            "compression": {**SECTION, "ignored_scopes": "a", "target_scopes": ["b"]},
            "ignored_scopes": ["c"],
            "target_scopes": "d",
        }
    )
    assert config.ignored_scopes == ("c", "a")
    assert config.target_scopes == ("d",)
    with pytest.raises(ValueError, match="ignored_scopes must be a valid tuple, got 3"):
        parse_config({"compression": SECTION, "ignored_scopes": 3})


def test_reading_a_dictionary_leaves_it_alone():
    config = {"compression": {**SECTION, "params": {}}, "ignored_scopes": ["a"]}
    before = json.dumps(config)
    parse_config(config)
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (3, TypeError, "must be a configuration such as MagnitudeSparsityConfig, .*, got 3"),
        ("magnitude_sparsity", TypeError, "got 'magnitude_sparsity'"),
        ([], TypeError, r"got \[\]"),
        ({"compression": None}, TypeError, "got None"),
        ([SECTION, 3], TypeError, "or a list of these, got .* 3"),
        ({"compression": SECTION, "epochs": 3}, ValueError, "^config: unknown key 'epochs'"),
        (
            {"compression": SECTION, "ignore_scopes": []},
            ValueError,
            r"^config: unknown key 'ignore_scopes' \(did you mean 'ignored_scopes'",
        ),
    ],
    ids=str,
)
def test_what_is_no_configuration_is_refused(config, error, message):
    with pytest.raises(error, match=message):
        parse_config(config)


@settings(deadline=None)
@given(
    level=st.floats(0, 1, exclude_max=True),
    epoch=st.integers(0, 10**6),
    rows=st.sampled_from([1, 2, 16, 256]),
    importance=st.sampled_from(["abs", "normed_abs"]),
)
def test_a_dictionary_and_the_objects_say_the_same(level, epoch, rows, importance):
    section = params(
        sparsity_target=level,
        sparsity_target_epoch=epoch,
        pattern={"block": [rows, 8]},
        weight_importance=importance,
    )
    config = MagnitudeSparsityConfig(
        pattern=Block(rows, 8),
        schedule=PolynomialSchedule(target_level=level, target_epoch=epoch),
        weight_importance=importance,
    )
    assert from_nncf(json.loads(json.dumps(section))) == config
    assert MagnitudeSparsityConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("pattern", "level"), [(NM(2, 4), 0.51), (NM(3, 4), 0.5), (NM(1, 3), 0.67)], ids=str
)
def test_a_target_that_n_m_cannot_express_is_refused(pattern, level):
    most = 1 - pattern.n / pattern.m
    with pytest.raises(
        ValueError, match=rf"target_level must be at most .* {most:g} .*{pattern}, got {level}"
    ):
        MagnitudeSparsityConfig(pattern=pattern, schedule=PolynomialSchedule(target_level=level))
    spelled = {"nm": [pattern.n, pattern.m]}
    with pytest.raises(ValueError, match=r"^compression: target_level must be at most"):
        from_nncf(params(pattern=spelled, sparsity_target=level))
    # one of these is a rounding step above the other for 1:3
    for fits in (most, (pattern.m - pattern.n) / pattern.m):
        MagnitudeSparsityConfig(pattern=pattern, schedule=PolynomialSchedule(target_level=fits))


@pytest.mark.parametrize("pattern", [NM(1, 3), NM(2, 4, transposable=True)], ids=str)
def test_n_m_goes_through_json(pattern):
    config = MagnitudeSparsityConfig(pattern=pattern)
    assert MagnitudeSparsityConfig.model_validate_json(config.model_dump_json()) == config
