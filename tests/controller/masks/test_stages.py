"""Stages of a pipeline are pruned as the one pool that they are, bit for bit as in one process."""

import pytest
import torch
from ranks import LocalAdamW, mesh_of
from torch import nn

import triton_sparsity as ts
from triton_sparsity.controller.masks.exchange import full_grid

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch lacks gloo"
)

PATTERNS = {
    "unstructured": ts.Unstructured(),
    "blocks": ts.Block(8, 4),
    "large": ts.Block(16, 16),
    "nm": ts.NM(2, 4),
}
# layers of each stage; of three one has no weights, and one weight is on two
STAGES = {
    2: (("0", "1", "2"), ("3", "4", "6")),
    3: (("0", "1"), ("5",), ("1", "2", "3", "4", "6")),
}
TIED = (("0", "1", "2"), ("1", "3", "4", "6"))  # one weight is on both


class FeedForward(nn.Module):
    """Of channels, which are pruned whole at the end of a warm-up."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.linear2(self.linear1(x).relu())


class Experts(nn.Module):
    """Stored by inputs, so that FSDP2 parts the columns of their matrix."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, 16, 16))

    def forward(self, x):
        return torch.einsum("bi,eio->beo", x, self.gate_up_proj).sum(1)


def net(dtype=torch.float32, ties=False, last=None):
    numbers = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        *(nn.Linear(16, 36), nn.Linear(36, 16, bias=False), nn.Conv2d(8, 24, 2)),
        *(nn.Linear(64, 48), nn.Linear(16, 32), nn.Tanh()),
        *([last()] if last else []),
    )
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=numbers)
        parameter.data = ((values * 2).round() / 4 if ties else values / 4).to(dtype)
    return model


def stage(model, group, here=None):
    """Return the layers that a rank has, under the names that they have in the model."""
    if here is None:
        here = STAGES[group.size()][torch.distributed.get_rank(group)]
    part = nn.Sequential()
    for name in here:
        if name in model._modules:
            part.add_module(name, model.get_submodule(name))
    return part


def config(pattern, importance="abs", pool="global", distribution="uniform", layers=None):
    own = {"target_scopes": layers} if layers else {"ignored_scopes": ["4"]}
    some = {"pattern": PATTERNS[pattern], **own}
    if importance == "const":
        return ts.ConstSparsityConfig(**some)
    if importance in ("set", "rigl"):
        kind = {"set": ts.SETConfig, "rigl": ts.RigLConfig}[importance]
        return kind(level=0.6, t_end=20, delta_t=2, **some)
    schedule = ts.PolynomialSchedule(initial_level=0.0, target_level=0.5, target_epoch=3)
    chosen = {"weight_importance": importance, "pool": pool, "distribution": distribution}
    return ts.MagnitudeSparsityConfig(schedule=schedule, **chosen, **some)


def inputs(name):
    numbers = torch.Generator().manual_seed(int(name))
    shape = {"0": (6, 16), "1": (6, 36), "2": (2, 8, 5, 5), "3": (6, 64)}.get(name, (6, 16))
    return torch.randn(shape, generator=numbers)


def run(model, dtype=torch.float32, halves=(0, 1)):
    """Run each layer by itself, so that a stage does what the whole model does there; that which
    two stages have on halves of its inputs.
    """
    losses = []
    for name, layer in model.named_children():
        x = inputs(name).to(dtype) if name != "5" else None
        parts = [x.chunk(2)[half] for half in halves] if name == "1" else [x]
        if name != "5":
            losses.append(sum(layer(part).square().mean() for part in parts))
    return losses


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def outcome(controller):
    infos = controller.sparsified_module_info
    here = {
        info.module_node_name: (full(info.weight), full(info.operand.binary_mask))
        for info in infos
        if not info.operand.absent
    }
    counts = [(i.operand.pruned_groups(), i.operand.pruned_elements()) for i in infos]
    grids = [full_grid(info.operand).clone() for info in infos]
    return here, counts, grids, controller.mask_level(), controller.statistics().to_str()


def prune(model, controller):
    found, states = [], []
    for level in (0.45, 0.2):
        model.zero_grad()  # FSDP2's before anything is gathered
        if controller.needs_calibration:
            with controller.calibration():
                run(model)
        if controller.needs_gradients and (losses := run(model)):
            sum(losses).backward()
        controller.scheduler.step()
        controller.set_sparsity_level(level)
        found.append(outcome(controller))
        states.append(controller.get_state())
    controller.load_state(states[0])
    return [*found, outcome(controller)], states


def prune_stages(group, chosen, dtype, ties):
    model = stage(net(dtype, ties), group)
    return prune(model, ts.create_controller(model, chosen, process_group=group, stages=True))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check(found, wanted):
    """Compare with one process: of weights and masks what a stage has."""
    seen = set()
    for outcomes in found:
        for (here, *rest), (whole, *others) in zip(outcomes, wanted, strict=True):
            assert here.keys() <= whole.keys()
            assert all(same(own, whole[name]) for name, own in here.items())
            assert same(rest, others)
            seen |= here.keys()
    assert seen == wanted[0][0].keys()


def by_rows(evidence):
    """A score an element, of two weights a group."""
    weight, grid = evidence.weight, evidence.grid
    if evidence.name in ("1", "3"):
        return weight.float().abs().sum(0, keepdim=True)[:, : grid[1]].expand(grid)
    return weight / weight.norm(dim=1, keepdim=True)


def both(one, other):
    """Return configurations of layers of their own, which are on different stages."""
    return [config(*one, layers=["0", "3"]), config(*other, layers=["1", "2", "4"])]


def evidence():
    """Return configurations whose criteria look at passes; one is of layers on two stages."""
    return [
        config("blocks", "taylor", layers=["0", "3"]),
        config("blocks", "wanda", "row", layers=["1"]),
        config("unstructured", "snip_momentum", layers=["2"]),
        config("unstructured", "fisher", layers=["4"]),
    ]


@pytest.mark.parametrize(
    ("hows", "size", "ties"),
    [
        ([("unstructured", "abs")], 3, True),
        ([("blocks", "abs"), ("nm", "abs")], 3, True),
        ([("blocks", "abs", "weight", "erk"), ("unstructured", "abs", "weight", "owl")], 2, True),
        ([("blocks", "abs", "row"), ("unstructured", "random")], 2, False),
        ([("blocks", "normed_abs"), ("unstructured", "normed_abs")], 2, False),
        ([("blocks", "wanda", "global"), ("unstructured", "snip_momentum")], 3, False),
        ([("blocks", "snip"), ("blocks", "taylor")], 2, False),
        ([("blocks", "fisher"), ("blocks", by_rows, "weight")], 3, False),
    ],
)
def test_stages_are_pruned_as_one_process_prunes(ranks, hows, size, ties):
    chosen = both(*hows) if len(hows) == 2 else config(*hows[0])
    dtype = torch.bfloat16 if ties else torch.float32
    model = net(dtype, ties)
    wanted, states = prune(model, ts.create_controller(model, chosen))
    found = ranks.run(size, prune_stages, chosen, dtype, ties)
    check([outcomes for outcomes, _ in found], wanted)
    assert all(same(own, states) for _, own in found)


def sharded_stage(group, kind, dtype=torch.bfloat16, ties=True, last=None, stages=STAGES[2]):
    """Return a stage that two ranks share: FSDP2 shards it, or tensor parallelism some layers, or
    each has all of it.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = mesh_of(group, "stage", "inner")
    here = stages[torch.distributed.get_rank(group) // 2]
    model = stage(net(dtype, ties, last), group, here)
    if kind == "replicas":
        return model
    if kind == "fsdp":
        for layer in model:
            fully_shard(layer, mesh=mesh["inner"])
        return fully_shard(model, mesh=mesh["inner"])
    whole = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    below, beside = ColwiseParallel(**whole), RowwiseParallel(**whole)
    plan = {"1": below, "3": beside}
    plan |= {"4": below} if kind == "blocks" else {"0": below}
    plan |= {"6.linear1": below, "6.linear2": beside} if last is FeedForward else {}
    return parallelize_module(
        model, mesh["inner"], {n: p for n, p in plan.items() if n[0] in here}
    )


def step(model, controller):
    """Take a step; return the weights and masks after it, and after one more update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, foreach=False)
    found = []
    for level in (None, 0.35):
        controller.scheduler.step()
        if level:
            controller.set_sparsity_level(level)
        model.zero_grad()
        sum(run(model, torch.bfloat16)).backward()
        optimizer.step()
        found.append(outcome(controller))
    return found


def prune_sharded_stages(group, chosen, kind, ties):
    model = sharded_stage(group, kind, torch.bfloat16 if ties else torch.float32, ties)
    options = {"dispatch": "sparse", "process_group": group, "stages": True}
    controller = ts.create_controller(model, chosen, **options)
    found, states = prune(model, controller)
    found += step(model, controller) if kind == "fsdp" and ties else []
    skips = [m for m in model.modules() if "BlockSparse" in type(m).__name__]
    return found, states, len(skips)


@pytest.mark.parametrize(
    ("kind", "chosen", "ties"),
    [
        ("fsdp", both(("large", "abs"), ("unstructured", "normed_abs")), True),
        ("fsdp", evidence(), False),
        ("tensor", [config("blocks", "abs", "row")], True),
        (
            "tensor",
            both(("blocks", by_rows, "weight"), ("unstructured", "wanda", "weight", "owl")),
            False,
        ),
    ],
)
def test_stages_that_are_sharded_themselves_are_one_pool_too(ranks, kind, chosen, ties):
    model = net(torch.bfloat16 if ties else torch.float32, ties)
    controller = ts.create_controller(model, chosen, dispatch="sparse")
    wanted, states = prune(model, controller)
    wanted += step(model, controller) if kind == "fsdp" and ties else []
    found = ranks.run(4, prune_sharded_stages, chosen, kind, ties)
    check([outcomes for outcomes, *_ in found], wanted)
    for _, own, skips in found:
        assert same(own, states)
        assert (skips > 0) == (chosen[0].pattern == PATTERNS["large"])


def holed():
    model = net()
    with torch.no_grad():
        model[0].weight[8:24, 4:12] = 0
        model[3].weight[:, 8:40] = 0
    return model


def keep_zeros(group):
    model = stage(holed(), group)
    chosen = config("blocks", "const")
    return outcome(ts.create_controller(model, chosen, process_group=group, stages=True))


def test_zeros_of_each_stage_stay(ranks):
    wanted = outcome(ts.create_controller(holed(), config("blocks", "const")))
    check([[found] for found in ranks.run(2, keep_zeros)], [wanted])


def train(model, controller, steps, group=None):
    """Train; of three stages two do half each of what is done with the weight that both have. At
    the fourth step a state has the gradients of an update that is due.
    """
    here = [*model.parameters()]
    optimizer = LocalAdamW(here, lr=0.05, foreach=False) if here else None
    tied = dict(model.named_children()).get("1")
    for step in range(steps):
        controller.scheduler.step()
        model.zero_grad()
        halves = (0, 1)
        if group is not None and group.size() == 3:
            halves = (min(1, torch.distributed.get_rank(group)),)
        if losses := run(model, halves=halves):
            sum(losses).backward()
        if step == 3:
            saved = controller.get_state()
            rigl = saved.get("rigl")
            assert rigl is None or rigl["algorithm_state"]["dense_gradients"].keys() >= {"1"}
            controller.load_state(saved)
            assert same(controller.get_state(), saved)
        add_up([] if tied is None else [p.grad for p in tied.parameters()], group)
        if optimizer:
            optimizer.step()
    infos = [info for info in controller.sparsified_module_info if not info.operand.absent]
    paths = {info.module_node_name: info.operand.path for info in infos}
    here, counts, *_ = outcome(controller)
    state = saved, controller.get_state()
    x, layer = inputs("0"), dict(model.named_children()).get("0")
    stripped = controller.strip(do_copy=False)
    assert layer is None or torch.equal(stripped.get_submodule("0")(x), layer(x))
    return (here, counts), state, paths, controller


def train_stages(group, chosen, kind):
    plain = {"dtype": torch.float32, "ties": False}
    if kind == "replicas":  # of the second stage, and none of the first
        here = [("0", "1"), ("1", "2", "3", "4", "6")][min(1, torch.distributed.get_rank(group))]
        model = stage(net(), group, here)
    else:
        model = sharded_stage(group, kind, **plain) if kind else stage(net(), group)
    options = {"dispatch": "sparse", "process_group": group, "stages": True}
    return train(model, ts.create_controller(model, chosen, **options), 5, group)[:3]


@pytest.mark.parametrize(
    ("pattern", "size", "kind"),
    [
        ("unstructured", 2, None),
        ("large", 3, None),
        ("blocks", 4, "fsdp"),
        ("blocks", 3, "replicas"),
    ],
)
def test_stages_regrow_as_one_process_does_and_skip_blocks(ranks, pattern, size, kind):
    chosen = [
        config("large", "rigl", layers=["1", "3"]),
        config(pattern, "set", layers=["0", "2", "4"]),
    ]
    model = net()
    controller = ts.create_controller(model, chosen, dispatch="sparse")
    (wanted, counts), state, paths, _ = train(model, controller, 5)
    found = ranks.run(size, train_stages, chosen, kind)
    assert not any(mask.all() for _, mask in wanted.values())
    for (here, own), theirs, _ in found:
        assert own == counts
        assert same(theirs, state)
        assert all(same(mine, wanted[name]) for name, mine in here.items())
    told = dict(path for *_, own in found for path in own.items())
    assert kind or told == paths
    assert "sparse" in paths["1"]
    assert ("sparse" in paths["0"]) == (pattern == "large")


LAST = {"soft": FeedForward}  # the last layer that one process has; as a rule experts


def learned_config(how):
    """Return algorithms of layers of their own, or one of all layers but one."""
    rising = ts.PolynomialSchedule(initial_level=0.0, target_level=0.4, target_epoch=2)
    some = {"target_scopes": ["0", "2", "4", "6.gate_up_proj"]}
    more = {"target_scopes": ["1", "3"], "schedule": rising}
    if how == "in one pool":
        slow = ts.ExponentialSchedule(target_level=0.4, target_epoch=2)
        some["pattern"] = more["pattern"] = PATTERNS["blocks"]
        rb = ts.RBSparsityConfig(seed=5, schedule=slow, **some)
        return [rb, ts.MovementSparsityConfig(pool="global", **more)]
    if how == "each":
        some["pattern"] = more["pattern"] = PATTERNS["large"]
        local = {"sparsity_level_setting_mode": "local", "sparsity_init": 0.5}
        some["target_scopes"].remove("4")
        rb = ts.RBSparsityConfig(seed=5, schedule=None, **local, **some)
        sr_ste = ts.SRSTEConfig(level=0.4, decay=0.1, target_scopes=["4"])
        return [rb, ts.MovementSparsityConfig(pool="weight", **more), sr_ste]
    if how == "sr_ste":
        blocks = ({"scope": "0", "pattern": PATTERNS["blocks"]},)
        return ts.SRSTEConfig(level=0.4, decay=0.1, overrides=blocks, ignored_scopes=["4"])
    return ts.MovementSparsityConfig(
        warmup_start_epoch=1,
        warmup_end_epoch=3,
        importance_regularization_factor=0.05,
        steps_per_epoch=2,
        enable_structured_masking=True,
        sparse_structure_by_scopes=(
            {"mode": "block", "sparse_factors": [2, 4], "target_scopes": ["*"]},
        ),
        ignored_scopes=["4"],
    )


def few_bits(tensor, bits):
    return (tensor * 2**bits).round() / 2**bits


def run_on_few_bits(model, idle):
    """Run each layer by itself, whose gradients are sums that do not round, in whatever order
    ranks add them up; those of ``idle`` ones are 0.
    """
    losses = []
    for name, layer in model.named_children():
        if name != "5":
            y = layer(few_bits(inputs(name), 1))
            pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
            losses.append((y * few_bits(pull, 1)).sum() * float(name not in idle))
    return sum(losses)


def learn(model, controller, steps, group=None):
    """Train; freeze the masks; add up what a tied weight's copies, of which the first is at work,
    have for gradients.
    """
    scores = {*controller.parameters()}
    own = [p for p in model.parameters() if p not in scores]
    groups = [{"params": own}, {"params": [*scores], "lr": 2.0, "weight_decay": 0.0}]
    optimizer = LocalAdamW(groups, lr=0.03, foreach=False) if own else None
    tied = [p for n, p in model.named_parameters() if n.startswith("1.")]
    losses, states = [], []
    first = group is None or torch.distributed.get_rank(group) == 0
    if first:
        controller.loss()  # asks no other stage
    for step in range(steps):
        if step % 2 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        model.train().zero_grad()
        loss = controller.loss()
        losses.append(loss.detach())
        pulls = loss.requires_grad
        if first:
            assert torch.equal(controller.loss(), loss)
        later = group is not None and torch.distributed.get_rank(group) >= 2
        loss = loss + run_on_few_bits(model, ["1"] if later else [])
        if loss.requires_grad:  # not of a stage that has nothing to train
            loss.backward()
        add_up([p.grad for p in tied if p.grad is not None], group)
        if optimizer:
            optimizer.step()
            if group is not None and pulls:
                with pytest.raises(RuntimeError, match="must come before it"):
                    controller.loss()
        with torch.no_grad():
            for parameter in own:
                local(parameter).copy_(few_bits(local(parameter), 6))
        if step == steps - 2:
            states.append(controller.get_state())
    masked = evaluate(model)
    found = [outcome(controller)]
    controller.freeze()
    assert same(evaluate(model), masked)
    found.append(outcome(controller))
    states.append(controller.get_state())
    controller.load_state(states[0])
    if first:
        controller.loss()
    return [*found, outcome(controller)], states, losses, masked


def evaluate(model):
    """Return what layers give, which asks no other stage."""
    names = [name for name in ("0", "1", "6") if name in model.eval()._modules]
    return {name: model.get_submodule(name)(few_bits(inputs(name), 1)).detach() for name in names}


def add_up(gradients, group):
    if group is not None and group.size() > 2:
        every, rank = [None] * group.size(), torch.distributed.get_rank(group)
        here = [*map(local, gradients)]
        torch.distributed.all_gather_object(every, here, group)
        # of four two each have a stage, or a part of it each
        pair = (
            (every[0], every[2]) if group.size() == 3 else (every[rank % 2], every[rank % 2 + 2])
        )
        for gradient, one, other in zip(here, *pair, strict=False):
            gradient.copy_(one + other)


def learn_stages(group, how, steps, kind):
    if kind:
        model = sharded_stage(group, kind, torch.float32, last=LAST.get(how, Experts), stages=TIED)
    else:
        model = stage(net(ties=True, last=LAST.get(how, Experts)), group)
    options = {"dispatch": "sparse", "process_group": group, "stages": True}
    controller = ts.create_controller(model, learned_config(how), **options)
    return learn(model, controller, steps, group)


@pytest.mark.parametrize(
    ("how", "size", "kind"),
    [
        ("in one pool", 3, None),
        ("in one pool", 4, "replicas"),
        ("in one pool", 4, "fsdp"),
        ("each", 4, "fsdp"),
        ("soft", 2, None),
        ("soft", 4, "fsdp"),
        ("soft", 4, "tensor"),
        ("sr_ste", 3, None),
    ],
)
def test_masks_are_learned_on_stages_as_in_one_process(ranks, how, size, kind):
    model = net(ties=True, last=LAST.get(how, Experts))
    controller = ts.create_controller(model, learned_config(how), dispatch="sparse")
    steps = 7 if how == "soft" else 4  # until its warm-up has ended
    wanted, states, losses, masked = learn(model, controller, steps)
    if how == "soft":
        assert "channels: " in wanted[1][4]
    else:
        assert all(groups > 0 for groups, _ in wanted[1][1])
    assert ("block-sparse" in wanted[1][4]) == (how == "each")
    answers = ranks.run(size, learn_stages, how, steps, kind)
    check([outcomes for outcomes, *_ in answers], wanted)
    for _, own, theirs, outputs in answers:
        assert same(own, states)
        # of stages that are sharded the sums are of parts
        assert same(theirs, losses) or kind in ("fsdp", "tensor", "blocks")
        torch.testing.assert_close(theirs, losses, rtol=1e-6, atol=0)
        assert all(same(mine, masked[name]) for name, mine in outputs.items())


def refuse(group, what):
    rank, model = torch.distributed.get_rank(group), stage(net(), group)
    chosen = config("unstructured")
    if what == "scope":
        chosen = chosen.model_copy(update={"ignored_scopes": ["44"]})
    if what == "nothing":
        chosen = chosen.model_copy(update={"ignored_scopes": ["{re}."]})
    if what == "differ":
        model.add_module("1", nn.Linear(8 * (rank + 1), 8))
    if what == "counted anew":
        model = nn.Sequential(model.get_submodule("0" if rank == 0 else "4"))
        model[0].weight.data = torch.full((16, 16), rank + 1.0)
        chosen = chosen.model_copy(update={"ignored_scopes": ()})
    stages = what != "mixed" or rank == 0
    if what == "not said":
        stages = False
    controller = ts.create_controller(model, chosen, process_group=group, stages=stages)
    if what == "nan" and rank == 1:
        model.get_submodule("3").weight.data[3, 4] = torch.nan
    if what == "copies":
        controller.scheduler.step()
        controller.set_sparsity_level(0.5)
        if rank == 2:
            info = next(i for i in controller.sparsified_module_info if i.module_node_name == "1")
            info.operand.mask[0, 0] ^= 1
    controller.set_sparsity_level(0.6)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("scope", "ValueError", "ignored_scopes must match a module each, got '44'"),
        ("nothing", "ValueError", "no weight to sparsify is left on any stage"),
        ("differ", "ValueError", "'1' must be the same weight on every stage that has it"),
        ("counted anew", "ValueError", "got other numbers on rank 1; let modules have the names"),
        ("mixed", "ValueError", "stages must be the same on every rank"),
        ("not said", "ValueError", "the model's parameters must be the same on every rank"),
        ("nan", "ValueError", "the weight of '3' holds NaN or Inf"),
        ("copies", "RuntimeError", "the masks of '1' differ between ranks"),
    ],
)
def test_what_stages_refuse_is_named_on_every_rank(ranks, what, kind, message):
    for raised, text in ranks.errors(3 if what == "copies" else 2, refuse, what):
        assert raised == kind
        assert message in text


def refuse_sharded(group, what):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    first, mesh = torch.distributed.get_rank(group) < 2, mesh_of(group, "stage", "inner")
    if what in ("parts", "groups"):
        kind = "fsdp" if what == "parts" else "tensor"
        model = sharded_stage(group, kind, torch.float32, last=Experts)
        chosen = config("blocks", "fisher") if what == "parts" else learned_config("in one pool")
    else:
        model = stage(net(), group, ("1",))
        chosen = config("unstructured", layers=["1"])
        plan = RowwiseParallel() if what == "differently" and first else ColwiseParallel()
        parallelize_module(model, mesh["inner"], {"1": plan} if what != "later" else {})
    controller = ts.create_controller(model, chosen, process_group=group, stages=True)
    fully_shard(model, mesh=mesh["stage"])
    controller.set_sparsity_level(0.5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("parts", "'fisher' with blocks that lie on two ranks, got that for"),
        ("groups", "tensor parallelism must part '0' by whole groups of 8 rows"),
        ("differently", "'1' must be sharded alike on every stage that has it, got parts"),
        ("later", "must be sharded before create_controller(stages=True), got (Shard"),
        ("further", "must be sharded before create_controller(stages=True), got (_Strided"),
    ],
)
def test_what_sharded_stages_refuse_is_named_on_every_rank(ranks, what, message):
    for raised, text in ranks.errors(4, refuse_sharded, what):
        assert raised == "ValueError"
        assert message in text
