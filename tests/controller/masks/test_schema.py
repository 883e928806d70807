"""States that are wrong anywhere, in any way, are refused by name and change nothing."""

import copy
import math
import random

import pytest
import torch
from torch import nn, optim

import triton_sparsity as ts
from triton_sparsity.controller.masks.schema import check, exactly, integer, number, tensor

BLOCKS = ts.Block(4, 4)
UPDATES = {"t_end": 100, "delta_t": 2, "alpha": 0.5}
CONFIGS = {
    "magnitude": ts.MagnitudeSparsityConfig(
        pattern=BLOCKS, schedule=ts.PolynomialSchedule(target_level=0.7, target_epoch=4)
    ),
    "adaptive": ts.MagnitudeSparsityConfig(schedule=ts.AdaptiveSchedule()),
    "by step": ts.MagnitudeSparsityConfig(
        schedule=ts.PolynomialSchedule(update_per_optimizer_step=True)
    ),
    "N:M": ts.MagnitudeSparsityConfig(
        pattern=ts.NM(2, 4), schedule=ts.MultistepSchedule(levels=[0.25, 0.5], steps=[1])
    ),
    "snip": ts.MagnitudeSparsityConfig(
        weight_importance="snip_momentum", schedule=ts.MultistepSchedule(levels=[0.0], steps=[])
    ),
    "set": ts.SETConfig(level=0.6, **UPDATES),
    "rigl": ts.RigLConfig(level=0.6, pattern=BLOCKS, **UPDATES),
    "rb": ts.RBSparsityConfig(seed=0),
    "movement": ts.MovementSparsityConfig(
        warmup_start_epoch=1, warmup_end_epoch=4, importance_regularization_factor=0.1
    ),
    "a level": ts.MovementSparsityConfig(
        schedule=ts.RampSchedule(target_level=0.5, begin=3, end=20)
    ),
    "sr_ste": ts.SRSTEConfig(),
    "products": ts.MagnitudeSparsityConfig(
        weight_importance="snip", schedule=ts.RampSchedule(target_level=0.5, begin=2, end=20)
    ),
    "composite": [
        ts.MagnitudeSparsityConfig(target_scopes=["*0"]),
        ts.RigLConfig(level=0.6, target_scopes=["*2"], **UPDATES),
    ],
}
NAN = float("nan")
# what no entry of any state may be
JUNK = [
    "no", NAN, 10**400, 10**5000, -7, 3.5j, object(), [NAN], [torch.zeros(2)], {1: 2}, {"x": None},
    {None: 1}, b"\0", torch.zeros(2), torch.full((3,), NAN), torch.zeros(2, device="meta"),
    torch.zeros(2, 2).to_sparse(), range(3), float, ..., {torch.float32}, torch.tensor(True),
]  # fmt: skip


def spoilt(value):
    """Yield tensors like one that is there, each wrong in one way."""
    yield value[..., None]
    yield torch.cat([value, value]) if value.ndim else value[None]
    yield value.to("meta")
    yield value.to(torch.complex64)
    yield value.to(torch.int32)
    yield value.tolist()
    if value.is_floating_point() and value.numel():
        yield torch.full_like(value, NAN)
        yield value.to(torch.float8_e5m2)


def places(state, path=()):
    """List the paths to all entries."""
    found = []
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


def mutate(state, chance):
    """Spoil one entry; return what was done."""
    *path, key = chance.choice(places(state))
    owner = state
    for step in path:
        owner = owner[step]
    value = owner[key]
    kind = chance.choice(["drop", "more", "junk", "junk", "tensor"])
    if kind == "drop" and isinstance(owner, dict) and key not in OPTIONAL.get(tuple(path)[1:], ()):
        del owner[key]
    elif kind == "more" and isinstance(owner, dict):
        key = chance.choice([3, None, "more", (1, 2), NAN, b"x"])
        owner[key] = value
    elif kind == "tensor" and isinstance(value, torch.Tensor):
        overflows = "gradients" in str(path) or "products" in path  # as with AMP
        bad = [v for v in spoilt(value) if not (overflows and torch.is_tensor(v) and nan(v))]
        owner[key] = chance.choice(bad)
    else:
        below = key in ("threshold", "_init_importance_threshold")  # which may be any number
        owner[key] = chance.choice([j for j in JUNK if not (below and type(j) is int)])
    return [*path, key], kind


def nan(value):
    return value.dtype == torch.float32 and not value.is_meta and bool(value.isnan().all())


# what a state may lack
OPTIONAL = {
    ("algorithm_state",): ("momenta", "input_norms", "gradients", "products"),
    ("algorithm_state", "momenta"): ("0", "2"),
    ("algorithm_state", "gradients"): ("0", "2"),
    ("algorithm_state", "products"): ("0", "2"),
    ("algorithm_state", "dense_gradients"): ("0", "2"),
    ("algorithm_state", "structures"): (),
    (): ("algorithm_state",),
}


class Run:
    def __init__(self, kind, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.controller = ts.create_controller(self.model, CONFIGS[kind])
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.1)

    def train(self, epochs):
        for _ in range(epochs):
            self.controller.scheduler.epoch_step()
            for _ in range(3):
                self.controller.scheduler.step()
                self.optimizer.zero_grad()
                loss = self.model(torch.randn(4, 8)).square().mean() + self.controller.loss()
                loss.backward()
                self.optimizer.step()

    def everything(self):
        state = self.controller.get_state()
        return [state, {name: t.clone() for name, t in self.model.state_dict().items()}]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def runs():
    """A run of each kind whose state is loaded, and one that loads it; made once."""
    known = {}

    def make(kind):
        if kind not in known:
            one, other = Run(kind), Run(kind, seed=1)
            one.train(3)
            other.train(2)
            known[kind] = one.controller.get_state(), other
        return known[kind]

    return make


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "seeds", [range(160), pytest.param(range(160, 600), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.filterwarnings("ignore:update_per_optimizer_step")
def test_a_state_that_is_wrong_anywhere_is_refused_by_name_and_changes_nothing(kind, seeds, runs):
    state, run = runs(kind)
    before = run.everything()
    for seed in seeds:
        damaged = copy.deepcopy(state)
        where, how = mutate(damaged, random.Random(seed))
        with pytest.raises(ValueError, match=r"^load_state: ") as caught:
            run.controller.load_state(damaged)
        told = str(caught.value)
        # of a mapping with other weights the message names these
        named = any(repr(key) in told for key in where) or "another model" in told
        assert named, (where, how, told)
        if seed % 10 == 0:
            assert same(run.everything(), before), (where, how)
    assert same(run.everything(), before)
    run.controller.load_state(state)
    assert same(run.controller.get_state(), state)
    run.controller.load_state(before[0])
    run.model.load_state_dict(before[1])


@pytest.mark.parametrize("state", [None, [], "x", 3, {1: 2}, {"magnitude_sparsity": []}, {}])
def test_what_is_no_state_at_all_is_refused(state, runs):
    _, run = runs("magnitude")
    with pytest.raises(ValueError, match=r"^load_state: state"):
        run.controller.load_state(state)
    if state is not None:  # None: no state
        with pytest.raises(ValueError, match="load_state: state"):
            ts.create_controller(nn.Linear(8, 8), CONFIGS["magnitude"], state=state)


@pytest.mark.parametrize(
    ("schema", "value", "told"),
    [
        (integer(), True, "an integer from 0 .*, got True"),
        (integer(), 10**5000, "an integer .*, got a int"),
        (number("a level", 0, 1), 10**400, "a level, got 1000"),
        (number("a level", 0, 1), NAN, "a level, got nan"),
        (exactly(2), 2.0, "2, got 2.0"),
        (
            tensor([(2, None)], [torch.uint8]),
            torch.zeros(2),
            r"uint8 of shape \(2, n\), got .* \(2,\)",
        ),
        (tensor([(2,)], [torch.float32]), torch.tensor([1, math.inf]), "with NaN or Inf"),
        (tensor([(1,)], [torch.float32], least=0), torch.tensor([-1.0]), "from 0, got"),
        ({"a": integer()}, {}, r"must have 'a', got \[\]"),
        ({"a": {"b": integer()}}, {"a": {"b": ""}}, r"\['a'\]\['b'\] must be an integer"),
    ],
    ids="abcdefghij",  # of an integer too long to be printed there is none
)
def test_an_error_says_where_what_and_what_was_given(schema, value, told):
    with pytest.raises(ValueError, match=f"^load_state: x.*{told}"):
        check(value, schema, "x")
