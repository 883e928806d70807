"""State: a run goes on bit for bit, in any order, under wrappers; what is damaged is refused."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn, optim

import triton_sparsity as ts

# down and up again: groups return, with the values that they had
UP_AND_DOWN = ts.MultistepSchedule(levels=[0.3, 0.75, 0.5, 0.25, 0.6], steps=[2, 3, 4, 5])
PATTERNS = {
    "unstructured": ts.Unstructured(),
    "blocks": ts.Block(4, 8),
    "skipped blocks": ts.Block(16, 16),
    "N:M": ts.NM(2, 4),
}


def magnitude(pattern="unstructured", **options):
    schedule = UP_AND_DOWN
    if pattern == "N:M":
        schedule = ts.MultistepSchedule(levels=[0.2, 0.5, 0.3, 0.1, 0.4], steps=[2, 3, 4, 5])
    options = {"pattern": PATTERNS[pattern], "schedule": schedule} | options
    return ts.MagnitudeSparsityConfig(**options)


CONFIGS = {
    "set": ts.SETConfig(level=0.6, t_end=100, delta_t=2, alpha=0.5),
    "rigl": ts.RigLConfig(level=0.6, t_end=100, delta_t=2, alpha=0.5, pattern=ts.Block(4, 4)),
    "rb": ts.RBSparsityConfig(seed=0),
    "movement": ts.MovementSparsityConfig(
        warmup_start_epoch=1,
        warmup_end_epoch=4,
        importance_regularization_factor=0.1,
        steps_per_epoch=3,
    ),
    "composite": [
        magnitude(target_scopes=["*0"]),
        ts.RigLConfig(level=0.6, t_end=100, delta_t=2, target_scopes=["*2"]),
    ],
} | {
    f"magnitude, {pattern}, {'' if keep else 'not '}kept": magnitude(
        pattern, keep_pruned_values=keep
    )
    for pattern in PATTERNS
    for keep in (True, False)
}
every_config = pytest.mark.parametrize("kind", CONFIGS)
EPOCHS, BREAK, STEPS = 6, 3, 3


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Run:
    def __init__(self, kind, seed=0, wrap=lambda model: model):
        torch.manual_seed(seed)
        self.inner = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        self.model = wrap(self.inner)
        self.controller = ts.create_controller(
            self.model, CONFIGS[kind], dispatch="sparse" if "skipped" in kind else "auto"
        )
        self.optimizer = optim.AdamW(self.model.parameters(), lr=0.02, weight_decay=0.1)

    def train(self, epochs, steps=STEPS):
        for epoch in epochs:
            self.controller.scheduler.epoch_step()
            for step in range(steps):
                self.controller.scheduler.step()
                x = torch.randn(8, 32, generator=torch.Generator().manual_seed(10 * epoch + step))
                self.optimizer.zero_grad()
                loss = (self.model(x) - x).square().mean() + self.controller.loss()
                loss.backward()
                self.optimizer.step()

    def parts(self):
        """Model, optimiser, controller and random numbers, as they come back from a file."""
        file = io.BytesIO()
        states = [part.state_dict() for part in (self.inner, self.optimizer, self.controller)]
        torch.save([*states, torch.get_rng_state()], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def everything(self):
        infos = self.controller.sparsified_module_info
        return [
            *(parameter.detach().clone() for parameter in self.inner.parameters()),
            *(info.operand.binary_mask for info in infos),
            *(
                i.operand.values.clone()
                for i in infos
                if i.operand.keeps_values and i.operand.values is not None
            ),
        ]

    def load(self, state, order):
        state = copy.deepcopy(state)  # an optimiser takes the tensors themselves
        loaders = {
            "model": lambda: self.inner.load_state_dict(state[0]),
            "optimizer": lambda: self.optimizer.load_state_dict(state[1]),
            "controller": lambda: self.controller.load_state_dict(state[2]),
        }
        for part in order:
            loaders[part]()
        torch.set_rng_state(state[3])


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def finished():
    """Runs to the end with what was saved on the way, made once a kind."""
    known = {}

    def run(kind):
        if kind not in known:
            run = Run(kind)
            run.train(range(BREAK))
            saved, then = run.parts(), run.everything()
            run.train(range(BREAK, EPOCHS))
            known[kind] = saved, then, run.everything(), run.parts()
        return known[kind]

    return run


ORDERS = list(itertools.permutations(["model", "optimizer", "controller"]))


@every_config
@pytest.mark.parametrize(
    ("order", "began"),
    # what is loaded last is loaded fresh once, and once into a run that has begun
    [*zip(ORDERS, (False, False, True, False, True, True), strict=True)],
    ids=str,
)
def test_a_run_goes_on_bit_for_bit_whatever_is_loaded_first(kind, order, began, finished):
    saved, then, want, _ = finished(kind)
    run = Run(kind, seed=1)
    if began:
        run.train(range(2))
    run.load(saved, order)
    assert same(run.everything(), then)
    run.train(range(BREAK, EPOCHS))
    assert same(run.everything(), want)


@every_config
@pytest.mark.parametrize("pair", ["on a wrapper", "on the model"])
def test_a_state_made_on_a_wrapper_loads_on_the_model_and_back(kind, pair, finished):
    saved, then, want, _ = finished(kind)
    if pair == "on the model":
        run = Run(kind, seed=1, wrap=Wrapper)
    else:
        made = Run(kind, wrap=Wrapper)
        made.train(range(BREAK))
        saved = made.parts()
        assert any("module" in name for name in str(saved[2]).split("'"))
        run = Run(kind, seed=1)
    run.load(saved, ["model", "optimizer", "controller"])
    assert same(run.everything(), then)
    run.train(range(BREAK, EPOCHS))
    assert same(run.everything(), want)


@every_config
def test_reading_a_state_changes_nothing(kind, finished):
    *_, want, _ = finished(kind)
    run = Run(kind)
    for epoch in range(EPOCHS):
        run.train([epoch])
        run.controller.get_state()
        run.controller.get_compression_state()
        copy.deepcopy(run.model)
    assert same(run.everything(), want)


@every_config
def test_a_state_is_plain_and_torchs_names_say_the_same(kind):
    run = Run(kind)
    run.train(range(2))
    state, alias = run.controller.get_state(), run.controller.state_dict()
    assert _plain(state)
    assert str(state) == str(alias)
    other = Run(kind, seed=1)
    other.controller.load_state_dict(state)
    assert str(other.controller.get_state()) == str(state)


def _plain(value):
    if isinstance(value, dict):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, torch.Tensor):
        return value.device.type == "cpu" and not value.requires_grad
    return value is None or isinstance(value, (bool, int, float, str))


@pytest.mark.parametrize("pattern", ["unstructured", "blocks", "N:M"])
def test_retained_values_travel_and_are_no_more_than_they_must(pattern):
    kind = f"magnitude, {pattern}, kept"
    run = Run(kind)
    run.controller.set_sparsity_level(0.5)
    weights = run.controller.get_state()["magnitude_sparsity"]["weights"]
    share = 0.5 if pattern == "blocks" else 2
    assert sum(w["values"].numel() for w in weights.values()) == share * 2048 * (
        2 if pattern == "blocks" else 1
    )
    dense = Run(f"magnitude, {pattern}, not kept")
    dense.controller.set_sparsity_level(0.5)
    state = dense.controller.get_state()["magnitude_sparsity"]["weights"]
    assert all(w["values"] is None for w in state.values())
    run.controller.freeze()
    run.train([0])
    state = run.controller.get_state()["magnitude_sparsity"]["weights"]
    assert all(w["values"] is None for w in state.values())


def test_a_state_in_memory_goes_back_in_time():
    kind = "magnitude, blocks, kept"
    run = Run(kind)
    run.train(range(2))
    saved, then = run.parts(), run.everything()
    run.train(range(2, 4))
    run.load(saved, ["model", "optimizer", "controller"])
    assert same(run.everything(), then)
    run.train(range(2, 4))
    again = run.everything()
    twin = Run(kind)
    twin.train(range(4))
    assert same(again, twin.everything())


# damaged states


def _weights(state):
    return state["magnitude_sparsity"]["weights"]


DAMAGES = {
    "values of another length": lambda s: _weights(s)["2"].update(values=torch.zeros(3)),
    "values that are integers": lambda s: _weights(s)["2"].update(
        values=_weights(s)["2"]["values"].int()
    ),
    "values that are a list": lambda s: _weights(s)["2"].update(values=[1.0]),
    "a mask of another shape": lambda s: _weights(s)["2"].update(
        mask=_weights(s)["2"]["mask"][1:]
    ),
    "a mask of floats": lambda s: _weights(s)["2"].update(mask=_weights(s)["2"]["mask"].float()),
    "no mask": lambda s: _weights(s)["2"].pop("mask"),
    "a weight too few": lambda s: _weights(s).pop("2"),
    "a weight too many": lambda s: _weights(s).update({"4": _weights(s)["2"]}),
    "weights that are no mapping": lambda s: s["magnitude_sparsity"].update(weights=[1]),
    "no weights": lambda s: s["magnitude_sparsity"].update(weights={}),
    "no frozen flag": lambda s: s["magnitude_sparsity"].pop("frozen"),
    "another version": lambda s: s["magnitude_sparsity"].update(version=1),
    "another algorithm": lambda s: s.update(rb_sparsity=s.pop("magnitude_sparsity")),
    "a weight that is no mapping": lambda s: _weights(s).update({"2": 1}),
}


@pytest.mark.parametrize("pattern", ["unstructured", "blocks", "N:M"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, pattern):
    run = Run(f"magnitude, {pattern}, kept")
    run.train(range(2))
    state = copy.deepcopy(run.controller.get_state())
    DAMAGES[damage](state)
    other = Run(f"magnitude, {pattern}, kept", seed=1)
    other.train(range(1))
    before, saved = other.everything(), str(other.controller.get_state())
    with pytest.raises(ValueError, match="load_state: "):
        other.controller.load_state(state)
    assert same(other.everything(), before)
    assert str(other.controller.get_state()) == saved


@pytest.mark.parametrize("first", ["0", "2"])
def test_a_mask_that_keeps_too_many_of_a_tuple_is_refused_by_name(first):
    run = Run("magnitude, N:M, kept")
    state = copy.deepcopy(run.controller.get_state())
    for name in {first, "2"}:
        _weights(state)[name]["mask"][-1] = 0b1110111
    before = run.everything()
    with pytest.raises(ValueError, match=f"mask of '{first}' must be 2:4, got another"):
        run.controller.load_state(state)
    assert same(run.everything(), before)


def test_bits_past_the_last_column_count_for_nothing():
    controller = ts.create_controller(nn.Sequential(nn.Linear(13, 5)), magnitude())
    controller.set_sparsity_level(0.5)
    (info,) = controller.sparsified_module_info
    before = info.operand.binary_mask
    state = copy.deepcopy(controller.get_state())
    _weights(state)["0"]["mask"][:, -1] |= 0b11100000
    controller.set_sparsity_level(0.1)
    controller.load_state(state)
    assert torch.equal(info.operand.binary_mask, before)
    assert info.operand.kept == before.sum()
    assert str(controller.get_state()["magnitude_sparsity"]["weights"]) != str(_weights(state))


def test_a_state_of_another_pattern_or_model_is_refused():
    state = Run("magnitude, blocks, kept").controller.get_state()
    for kind in ("magnitude, unstructured, kept", "magnitude, skipped blocks, kept"):
        run = Run(kind, seed=1)
        before = run.everything()
        with pytest.raises(ValueError, match="load_state: "):
            run.controller.load_state(state)
        assert same(run.everything(), before)
