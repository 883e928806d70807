"""What every algorithm must do, under every pattern that fits it.

To join: a line in ``ALGORITHMS``, with what makes its configuration for a pattern; a pattern in
``PATTERNS``; in ``DOES_NOT_FIT`` what does not go together.
"""

import copy
import io

import pytest
import torch
from torch import nn

import triton_sparsity as ts

STEPS_PER_EPOCH = 4
STEPS = 3 * STEPS_PER_EPOCH
CLIMB = ts.PolynomialSchedule(target_level=0.75, target_epoch=2, power=1.0)
PATTERNS = [ts.Unstructured(), ts.Block(4, 4), ts.Block(2, 16), ts.NM(1, 4)]


def magnitude(importance):
    return lambda pattern: ts.MagnitudeSparsityConfig(
        pattern=pattern, schedule=CLIMB, weight_importance=importance
    )


def regrowth(config, **options):
    return lambda pattern: config(
        level=0.75, t_end=10, delta_t=3, alpha=0.5, pattern=pattern, **options
    )


def rb(**options):
    return lambda pattern: ts.RBSparsityConfig(pattern=pattern, seed=0, **options)


def movement(**options):
    return lambda pattern: ts.MovementSparsityConfig(
        warmup_start_epoch=1,
        warmup_end_epoch=2,
        importance_regularization_factor=0.1,
        steps_per_epoch=STEPS_PER_EPOCH,
        pattern=pattern,
        # what is a multiple of no other pattern's sides
        sparse_structure_by_scopes=({"mode": "per_dim", "axis": 0, "target_scopes": "5"},),
        **options,
    )


def hard_movement(pattern):
    schedule = ts.RampSchedule(target_level=0.75, end=5, freeze=9)
    return ts.MovementSparsityConfig(pattern=pattern, schedule=schedule)


def learned_composite(pattern):
    return [
        rb(schedule=CLIMB, target_scopes=("3",))(pattern),
        movement(target_scopes=("5",))(ts.Unstructured()),
        ts.MagnitudeSparsityConfig(pattern=pattern, schedule=CLIMB, target_scopes=("0",)),
    ]


def composite(pattern):
    return [
        ts.RigLConfig(level=0.75, t_end=10, delta_t=2, pattern=pattern, target_scopes=("3",)),
        ts.MagnitudeSparsityConfig(pattern=pattern, schedule=CLIMB, ignored_scopes=("3",)),
    ]


ALGORITHMS = {
    "magnitude abs": magnitude("abs"),
    "magnitude normed_abs": magnitude("normed_abs"),
    "magnitude snip": magnitude("snip"),
    "magnitude snip_momentum": magnitude("snip_momentum"),
    "magnitude wanda": magnitude("wanda"),
    "magnitude random": magnitude("random"),
    "const": lambda pattern: ts.ConstSparsityConfig(pattern=pattern),
    "set": regrowth(ts.SETConfig),
    "set snip_momentum": regrowth(ts.SETConfig, weight_importance="snip_momentum"),
    "rigl": regrowth(ts.RigLConfig),
    "rigl from importance": regrowth(ts.RigLConfig, initial_masks="importance"),
    "composite": composite,
    "sr_ste": lambda pattern: ts.SRSTEConfig(level=0.75, pattern=pattern),
    "sr_ste frozen": lambda pattern: ts.SRSTEConfig(level=0.75, t_end=7, pattern=pattern),
    "rb": rb(schedule=CLIMB),
    "rb local": rb(sparsity_level_setting_mode="local", schedule=None, sparsity_init=0.5),
    "rb scaled": rb(schedule=CLIMB, compression_lr_multiplier=0.5),
    "movement": movement(),
    "movement scaled": movement(compression_lr_multiplier=0.5, init_importance_threshold=-0.1),
    "hard movement": hard_movement,
    "learned composite": learned_composite,
}
# where training decides how much is pruned
LEARNED = {"rb", "rb local", "rb scaled", "movement", "movement scaled", "learned composite"}
# these alone choose within tuples
WITH_TUPLES = ("magnitude", "const", "sr_ste")
DOES_NOT_FIT = {(a, ts.NM(1, 4)) for a in ALGORITHMS if not a.startswith(WITH_TUPLES)}
# 30 rows in blocks of 4: movement's structures must divide the weight
DOES_NOT_FIT |= {(a, ts.Block(4, 4)) for a in ("movement", "movement scaled")}
# what else can be said of one of the others differs where no pattern is asked for: each has two
VARIANTS = {
    "magnitude snip": 0, "magnitude random": 1, "set snip_momentum": 0, "sr_ste frozen": 1,
    "rigl from importance": 1, "rb local": 0, "rb scaled": 1, "movement scaled": 0,
}  # fmt: skip
CASES = [
    (algorithm, pattern)
    for algorithm in ALGORITHMS
    for i, pattern in enumerate(PATTERNS)
    if (algorithm, pattern) not in DOES_NOT_FIT and VARIANTS.get(algorithm, i % 2) == i % 2
]


class Run:
    """A model in training; two that start alike go alike."""

    def __init__(self, algorithm, pattern):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 20), nn.GELU(),
            nn.Linear(20, 6),
        )  # fmt: skip
        if algorithm == "const":
            schedule = ts.PolynomialSchedule(initial_level=0.75, target_level=0.75)
            config = ts.MagnitudeSparsityConfig(pattern=pattern, schedule=schedule)
            ts.create_controller(self.model, config).strip(do_copy=False)
        self.controller = ts.create_controller(self.model, ALGORITHMS[algorithm](pattern))
        own = {id(scores) for scores in self.controller.parameters()}
        rest = [p for p in self.model.parameters() if id(p) not in own]
        self.optimizer = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
        if own:
            scores = {"params": self.controller.parameters(), "lr": 0.6, "weight_decay": 0}
            self.optimizer.add_param_group(scores)
        self.controller.optimizer = self.optimizer
        if algorithm.endswith("wanda"):
            with self.controller.calibration():
                self.model(self.batch(99))

    @staticmethod
    def batch(step):
        return torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(step))

    def train(self, steps):
        self.model.train()
        for step in steps:
            if step % STEPS_PER_EPOCH == 0:
                self.controller.scheduler.epoch_step()
            self.controller.scheduler.step()
            x = self.batch(step)
            loss = (self.model(x) - x.flatten(1)[:, :6]).square().mean()
            loss = loss + self.controller.loss()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def memory(self):
        """All there is; the controller's state just as it gives it."""
        state = self.model.state_dict(), self.optimizer.state_dict()
        return *copy.deepcopy(state), self.controller.get_state(), torch.get_rng_state()

    def state(self):
        """All there is, as it comes back from a file."""
        file = io.BytesIO()
        torch.save(self.memory(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state):
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        self.controller.load_state(state[2])
        torch.set_rng_state(state[3])


def assert_same(a, b, path="state"):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert a == b, path


# Wanda in one pool takes the last layer, whose inputs are small
@pytest.mark.filterwarnings("ignore:at level 0.75 these weights are pruned to nothing")
@pytest.mark.parametrize(("algorithm", "pattern"), CASES, ids=str)
def test_it_trains_reports_saves_resumes_and_strips(algorithm, pattern):
    run = Run(algorithm, pattern)
    controller = run.controller
    start = [p.detach().clone() for p in run.model.parameters()]
    saved = {}
    for step in range(STEPS):
        run.train([step])
        # in the middle of an epoch, at its end, and in the step before RigL's update
        if step in (4, 7, 8):
            saved[step] = run.state()
    end = run.state()

    # it has trained, and has the level it was to reach
    assert all((a != b).any() for a, b in zip(start, run.model.parameters(), strict=True))
    infos = controller.sparsified_module_info
    pruned = sum(info.operand.pruned_groups() for info in infos)
    groups = sum(info.operand.groups for info in infos)
    assert controller.compression_rate == pruned / groups
    if algorithm in LEARNED:
        assert pruned > 0
        assert controller.compression_stage() != ts.CompressionStage.UNCOMPRESSED
    else:
        assert abs(pruned - 0.75 * groups) <= 1
        assert controller.compression_stage() == ts.CompressionStage.FULLY_COMPRESSED

    # it reports
    layers = [
        layer
        for part in vars(controller.statistics()).values()
        for layer in part.model_statistics.sparsified_layers_summary
    ]
    assert sum(layer.pruned_groups for layer in layers) == pruned
    assert all(layer.name in controller.statistics().to_str() for layer in layers)

    # a resumed run ends where this one did, bit for bit
    for step, state in saved.items():
        resumed = Run(algorithm, pattern)
        resumed.load(state)
        resumed.train(range(step + 1, STEPS))
        assert_same(resumed.state(), end)

    # so does one that goes back to a state in memory, which training has not changed since
    resumed = Run(algorithm, pattern)
    resumed.train(range(9))
    memory = resumed.memory()
    resumed.train(range(9, STEPS))
    resumed.load(memory)
    resumed.train(range(9, STEPS))
    assert_same(resumed.state(), end)

    # it strips
    x = run.batch(0)
    run.model.eval()
    stripped = controller.strip()
    zeros = {name: p == 0 for name, p in stripped.named_parameters()}
    for info in infos:
        pruned = ~info.operand.binary_mask
        name = info.module_node_name
        key = name if name in zeros else f"{name}.{info.parameter_name}"
        assert zeros[key][pruned].all()
    assert stripped.state_dict().keys() == run.model.state_dict().keys()
    assert not any("Sparse" in type(module).__name__ for module in stripped.modules())
    assert torch.equal(stripped(x), run.model(x))
