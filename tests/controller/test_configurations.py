"""What a user writes builds what trains, or is refused by name and changes nothing."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from torch import nn, optim

import triton_sparsity as ts
from triton_sparsity.controller.algorithms.movement.config import SparseStructure
from triton_sparsity.controller.algorithms.table import ALGORITHMS
from triton_sparsity.controller.config.algorithm import BatchNormAdaptation, Override
from triton_sparsity.controller.nncf import parse_config

pytestmark = pytest.mark.filterwarnings("ignore")

NAN = float("nan")


def importance(evidence):
    return evidence.weight * 2


def constant(evidence):
    return torch.ones_like(evidence.weight)


def wrong(_):
    return "no"


# no field of any configuration takes these
JUNK = [
    "no", NAN, float("inf"), True, False, np.True_, np.array(False), torch.tensor(True), -1, -0.5,
    10**400, 3.5j, object(), b"\0", [NAN], [None], {3: 4}, {"kind": "no"}, {None: 1}, range(2),
    ..., np.array([0.5, 0.2]), np.float32(NAN), np.array(2.5 + 1j), torch.zeros(2),
    torch.tensor(NAN), np.datetime64("2026-01-01"), np.str_("x"),
]  # fmt: skip
LEVELS = [0.0, 0, 0.3, 0.5, 0.9, 0.97, np.float32(0.5), np.float64(0.25), np.float16(0.5),
          np.array(0.75), np.array(0.5, np.float32), torch.tensor(0.5)]  # fmt: skip
WHOLE = [0, 1, 2, 5, 3.0, np.int64(2), np.array(4), np.int8(1), torch.tensor(2)]
PATTERNS = [
    ts.Unstructured(), ts.Block(2, 2), ts.Block(4, 4), ts.Block(16, 16), "unstructured",
    {"block": [4, 2]}, ts.NM(2, 4), ts.NM(1, 4), {"nm": [2, 4]}, ts.NM(2, 4, True), ts.NM(3, 7),
]  # fmt: skip
OVERRIDES = [
    (), [Override(scope="0", pattern=ts.Block(2, 2))], [{"scope": "0", "minimum_level": 0.2}],
    [Override(scope="2", minimum_level=0.2, maximum_level=0.4)], [Override(scope="nothing")],
    [Override(scope="*", maximum_level=0.1)], [Override(scope="2", pattern=ts.NM(2, 4))],
]  # fmt: skip
STRUCTURES = [
    (), [SparseStructure(target_scopes=["0"], mode="block", sparse_factors=[4, 4])],
    [SparseStructure(target_scopes=["0"], mode="block", sparse_factors=[5, 3])],
    [SparseStructure(target_scopes=["*"], mode="per_dim", axis=0)],
    [SparseStructure(target_scopes=["nothing"])],
]  # fmt: skip
SCHEDULES = {
    ts.PolynomialSchedule: {
        "initial_level": LEVELS, "target_level": LEVELS, "target_epoch": WHOLE,
        "freeze_epoch": WHOLE, "power": [1, 0.5, 3.0], "concave": [True, False],
        "update_per_optimizer_step": [True, False], "steps_per_epoch": [None, 1, 3],
    },
    ts.ExponentialSchedule: {
        "initial_level": LEVELS, "target_level": LEVELS, "target_epoch": WHOLE,
        "freeze_epoch": WHOLE,
    },
    ts.MultistepSchedule: {
        "levels": [[0.1, 0.5], [0.5], (np.float32(0.5), 0.75)], "steps": [[1], [], [3.0]],
        "initial_level": LEVELS, "freeze_epoch": WHOLE,
    },
    ts.AdaptiveSchedule: {
        "initial_level": LEVELS, "target_level": LEVELS, "step": [0.05, 1], "eps": [0, 0.1],
        "patience": WHOLE, "freeze_epoch": WHOLE,
    },
    ts.RampSchedule: {
        "target_level": LEVELS, "end": WHOLE, "begin": [0, 1], "unit": ["step", "epoch"],
        "every": [1, 2, 0.5], "shape": ["cubic", "linear", "cosine", "exponential"],
        "initial_level": LEVELS, "freeze": [None, 5, 9], "steps_per_epoch": [None, 3],
    },
}  # fmt: skip
ONE_OF = {
    "pattern": PATTERNS, "targets": [None, "linear", "all"], "overrides": OVERRIDES,
    "target_scopes": [None, ["0"], ["*"], "2", ["{re}^0$"], ["nothing"], ("0", "2")],
    "ignored_scopes": [(), ["0"], ["*"], ["nothing"], "2"], "validate_scopes": [True, False],
    "batchnorm_adaptation": [None, BatchNormAdaptation(num_bn_adaptation_samples=4)],
    "minimum_level": LEVELS, "maximum_level": [None, 1, *LEVELS], "sparsity_init": LEVELS,
    "sparsity_level_setting_mode": ["global", "local"], "level": LEVELS, "t_end": [*WHOLE, 100],
    "weight_importance": [
        "abs", "normed_abs", "snip", "snip_momentum", "taylor", "fisher", "wanda", "random",
        importance, constant, wrong,
    ],
    "block_reduction": ["mean", "max", "sum", "l2"], "distribution": ["uniform", "erk", "owl"],
    "pool": ["global", "weight", "row"], "keep_pruned_values": [True, False], "seed": WHOLE,
    "alpha": [*LEVELS, 1], "drop_schedule": ["cosine", "constant"], "delta_t": [1, 2, 3],
    "initial_masks": ["importance", "random"], "growth": ["gradient", "normed_gradient"],
    "compression_lr_multiplier": [None, 0, 2, 0.5], "decay": [0, 0.1, np.float32(0.5)],
    "warmup_start_epoch": [0, 1], "warmup_end_epoch": [1, 2], "steps_per_epoch": [None, 1, 3],
    "importance_regularization_factor": [0, 0.1], "sparse_structure_by_scopes": STRUCTURES,
    "enable_structured_masking": [None, True, False], "init_importance_threshold": [None, -1, 0.5],
    "final_importance_threshold": [0, 0.1], "power": [1, 3.0],
}  # fmt: skip
FIELDS = {
    name: values for fields in SCHEDULES.values() for name, values in fields.items()
} | ONE_OF
REQUIRED = {
    "set": {"level": 0.5, "t_end": 100, "delta_t": 1},
    "rigl": {"level": 0.5, "t_end": 100, "delta_t": 1},
    "movement_sparsity": {
        "warmup_start_epoch": 0, "warmup_end_epoch": 1, "steps_per_epoch": 2,
        "importance_regularization_factor": 0.1,
    },
}  # fmt: skip


def takes(name, junk):
    """Whether a field takes what most do not."""
    flags = any(type(value) is bool for value in FIELDS[name])
    return (
        (type(junk) in (str, np.str_) and "scopes" in name)
        or (type(junk) in (int, float) and -2 < junk < 0 and "threshold" in name)
        or (type(junk) is bool and flags)
    )


def values_of(fields, chance, share, spoilt):
    """Some fields at random, each of a value that it takes, or of none such, which is noted."""
    found = {}
    for name in chance.sample(sorted(fields), min(len(fields), chance.randrange(4))):
        found[name] = chance.choice(fields[name])
        junk = chance.choice(JUNK)
        if chance.random() < share and not takes(name, junk):
            found[name] = junk
            spoilt.append(name)
    return found


def schedule(chance, share, spoilt):
    kind = chance.choice([*SCHEDULES])
    given = values_of(SCHEDULES[kind], chance, share, spoilt)
    if kind is ts.RampSchedule:
        given = {"target_level": 0.6, "end": 3} | given
    return kind, given


def declared(chance):
    """A configuration class, its arguments, of which a schedule is a class and arguments, and the
    names of those that are wrong in themselves.
    """
    name = chance.choice([*ALGORITHMS])
    config, share, spoilt = ALGORITHMS[name].config, chance.choice([0, 0, 0.4]), []
    fields = {f: ONE_OF[f] for f in config.model_fields if f in ONE_OF}
    given = values_of(fields, chance, share, spoilt)
    if chance.random() < 0.95:
        given = REQUIRED.get(name, {}) | given
    if "schedule" in config.model_fields and chance.random() < 0.5:
        if name == "movement_sparsity" and chance.random() < 0.8:
            given = {key: value for key, value in given.items() if key not in REQUIRED[name]}
        spoilt = [key for key in spoilt if key in given]
        given["schedule"] = schedule(chance, share, spoilt) if chance.random() < 0.9 else None
    if chance.random() < 0.03:
        given["lvel"] = 0.5
        spoilt.append("lvel")
    return config, given, spoilt


def build(config, given):
    if config is parse_config:
        return config(**given)
    given = dict(given)
    if isinstance(given.get("schedule"), tuple):
        kind, inner = given["schedule"]
        given["schedule"] = kind(**inner)
    return config(**given)


class BatchNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8))

    def forward(self, x):
        return self.layers(x)


def make(normed=False):
    torch.manual_seed(0)
    if normed:
        return BatchNormed()
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


HOOKS = [
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_post_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
]  # fmt: skip


def everything(model):
    """What a model is: classes, attributes, hooks, parameters with theirs, and their values."""
    found = []
    for name, module in model.named_modules():
        hooks = {hook: len(getattr(module, hook)) for hook in HOOKS}
        found.append((name, type(module), sorted(vars(module)), hooks, module.training))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        hooks = len(getattr(tensor, "_post_accumulate_grad_hooks", None) or ())
        state = tensor.detach().numpy().tobytes(), tensor.requires_grad, tensor.grad is None
        found.append(
            (name, id(tensor), type(tensor), hooks, len(tensor._backward_hooks or ()), *state)
        )
    return found


def step(model, controller):
    """Train a step, as the algorithm is to be trained."""
    optimizer = optim.SGD([*model.parameters()], lr=0.1)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    if controller.needs_calibration:
        with controller.calibration(), torch.no_grad():
            model(x)
    for number in range(2):
        ((model(x) - x).square().mean() + controller.loss()).backward()
        optimizer.step()
        if number == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
    assert all(p.isfinite().all() for p in model.parameters())


# by what is not there yet, and not by what was written
LATER = re.compile(
    "gradient|no input|importances that differ|calibration|optimiser|steps_per_epoch"
)


def attempt(model, config, given):
    """Return what was refused, or None; hold that a refusal has changed nothing."""
    before = everything(model)
    try:
        built = build(config, given)
        controller = ts.create_controller(model, built, batchnorm_data=[torch.randn(4, 8)])
    except (ValueError, TypeError, RuntimeError) as error:
        refused = error
    else:
        try:
            step(model, controller)
        except (ValueError, RuntimeError) as error:
            return error
        return None
    assert everything(model) == before, (given, refused)
    assert not isinstance(refused, RuntimeError) or LATER.search(str(refused)), (given, refused)
    return refused


def named(error, config, given):
    """Tell whether a message says which argument it is about."""
    text = str(error)
    known = [*config.model_fields, *given]
    known += [*SparseStructure.model_fields, *Override.model_fields]
    if isinstance(given.get("schedule"), tuple):
        known += [*given["schedule"][0].model_fields, *given["schedule"][1]]
    return any(re.search(rf"\b{re.escape(str(name))}\b", text) for name in known)


SECTIONS = [
    {
        "algorithm": "magnitude_sparsity", "sparsity_init": 0.1, "target_scopes": ["0", "2"],
        "params": {
            "schedule": "polynomial", "sparsity_target": 0.6, "sparsity_target_epoch": 2,
            "pattern": {"block": [4, 4]}, "overrides": [{"scope": "2", "maximum_level": 0.9}],
            "weight_importance": "abs", "power": 2.0,
        },
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 4}},
    },
    {
        "algorithm": "rb_sparsity", "ignored_scopes": ["2"], "compression_lr_multiplier": 2.0,
        "params": {
            "schedule": "multistep", "multistep_steps": [1, 2],
            "multistep_sparsity_levels": [0.1, 0.3, np.float32(0.5)], "sparsity_freeze_epoch": 3,
        },
    },
    {
        "algorithm": "movement_sparsity", "sparse_structure_by_scopes": [
            {"mode": "block", "sparse_factors": [4, 4], "target_scopes": ["0"]}
        ],
        "params": {
            "warmup_start_epoch": 0, "warmup_end_epoch": 1, "steps_per_epoch": 2,
            "importance_regularization_factor": 0.1, "enable_structured_masking": False,
        },
    },
    {"algorithm": "rigl", "params": {"level": np.array(0.5), "t_end": 9, "delta_t": 1}},
    {"algorithm": "const_sparsity", "validate_scopes": False, "ignored_scopes": ["nothing"]},
]  # fmt: skip


def places(value, path=()):
    """List the paths to all that is inside of dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def dictionary(chance):
    """NNCF's dictionary, spoilt in one place or in none, and what a message must name of it."""
    section = copy.deepcopy(chance.choice(SECTIONS))
    form = chance.choice([lambda s: s, lambda s: {"compression": s}, lambda s: [s]])
    if chance.random() < 0.2:
        return form(section), None
    *path, key = chance.choice([*places(section)])
    owner = section
    for step in path:
        owner = owner[step]
    if isinstance(owner, dict) and chance.random() < 0.4:
        key = chance.choice([3, None, "lvel", (1, 2), NAN, b"x"])
        owner[key] = 1
        return form(section), [repr(key), str(key)]
    junk = chance.choice([j for j in JUNK if not isinstance(j, str)])
    owner[key] = junk
    return form(section), [str(one) for one in [*path, key] if not isinstance(one, int)]


@pytest.mark.parametrize(
    "seeds", [range(750), pytest.param(range(750, 1250), marks=pytest.mark.slow)], ids=str
)
def test_a_configuration_builds_what_trains_or_is_refused_by_name(seeds):
    trained = 0
    for seed in seeds:
        chance = random.Random(seed)
        config, given, spoilt = declared(chance)
        error = attempt(make(normed=chance.random() < 0.1), config, given)
        trained += error is None
        assert not (spoilt and error is None), (seed, given, spoilt)
        assert error is None or named(error, config, given), (seed, given, error)
        assert "\n" not in str(error), (seed, given, error)
    assert trained > len(seeds) // 5


@pytest.mark.parametrize(
    "seeds", [range(250), pytest.param(range(250, 500), marks=pytest.mark.slow)], ids=str
)
def test_a_dictionary_builds_what_trains_or_is_refused_by_name(seeds):
    for seed in seeds:
        chance = random.Random(seed)
        given, told = dictionary(chance)
        error = attempt(make(), parse_config, {"config": given})
        if told is None or error is None:
            assert told is error, (seed, given, error)
            continue
        assert any(name in str(error) for name in told), (seed, given, error)
        assert "\n" not in str(error), (seed, given, error)
