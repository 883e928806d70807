"""Tensor parallelism's columns and rows are pruned as the one pool that they are."""

from functools import cache
from unittest import mock

import pytest
import torch
from ranks import LocalAdamW, mesh_of
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import triton_sparsity as ts
from triton_sparsity.controller.masks.exchange import full_grid
from triton_sparsity.kernels import line_score

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch lacks gloo"
)

PATTERNS = {
    "unstructured": ts.Unstructured(),
    "blocks": ts.Block(8, 4),
    "tall": ts.Block(16, 2),
    "nm": ts.NM(2, 4),
    "tiles": ts.NM(2, 4, transposable=True),
}


class Halves(nn.Linear):
    """Multiplies as two ranks do, and adds up what they add up, so that one process agrees with
    them to the bit.
    """

    def __init__(self, *sizes, dim, **options):
        super().__init__(*sizes, **options)
        self.dim = dim

    def forward(self, x):
        weights = self.weight.chunk(2, self.dim)
        x = x.view_as(x)  # where the gradients of both halves meet, before any others
        if self.dim == 0:
            biases = self.bias.chunk(2)
            found = [functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
            return torch.cat(found, -1)
        both = zip(x.chunk(2, -1), weights, strict=True)
        parts = [functional.linear(h, w.contiguous(), self.bias / 2) for h, w in both]
        return parts[0] + parts[1]


class Net(nn.Module):
    """An embedding, and columns before rows, as in a transformer's feed-forward.

    The shapes are few, and those of ``Transformer``: for each DTensors find out anew what to do.
    """

    def __init__(self, up=nn.Linear, down=nn.Linear):
        super().__init__()
        self.tokens = nn.Embedding(24, 32)
        self.up = up(32, 48)
        self.down = down(48, 32)
        self.gate = nn.Linear(32, 32)
        self.head = up(32, 48)

    def forward(self, x):
        x = self.tokens(x)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x * torch.tanh(self.gate(x))).clone()  # FSDP2 warns of views


def halves(dim):
    return lambda *sizes: Halves(*sizes, dim=dim)


def net(dtype=torch.float32, ties=False, as_two=False):
    numbers = torch.Generator().manual_seed(3)
    model = Net(halves(0), halves(1)) if as_two else Net()
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=numbers)
        parameter.data = ((values * 2).round() / 4 if ties else values / 4).to(dtype)
    model.down.weight.data[3:20, 22:26] *= 32  # outliers, on both sides of an edge
    return model


def mesh_by(group, kind):

    if kind == "tensor":
        return mesh_of(group, "tensor")
    return mesh_of(group, "data", "tensor")


def part(model, mesh):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh["tensor"], plan)


def wrapped(model, group, kind="tensor"):
    """Part a model over "tensor" ranks, or by fully_shard or copies over "data" ranks too."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = mesh_by(group, kind)
    part(model, mesh)
    if kind == "fsdp":
        return fully_shard(model, mesh=mesh["data"])
    if kind == "copies":
        for module in (model.up, model.down, model.head, model.gate, model.tokens):
            weight = module.weight
            placed = getattr(weight, "placements", (Replicate(),))
            whole = full(weight)
            parts = distribute_tensor(whole, mesh, (Replicate(), *placed))
            module.weight = nn.Parameter(parts)
    return model


def by_lines(evidence):
    """Sums that are exact in any order."""
    squares = evidence.weight.float().square()
    return evidence.weight / (1 + squares.sum(0, keepdim=True) + squares.sum(1, keepdim=True))


BANDS = "lines that share a size"  # by 16, as those of a huge model do
# algorithms, each on columns and on rows of one model
TOGETHER = {
    "weights and gradients": {
        ("tall", "normed_gradient"): ["up", "down"],
        ("tall", "normed_abs"): ["tokens", "gate", "head"],
    },
    "sums of gradients": {
        ("tall", "snip_momentum"): ["up", "down"],
        ("tall", "taylor"): ["tokens", "gate", "head"],
    },
    "draws and squares": {
        ("unstructured", "set"): ["up", "down"],
        ("unstructured", "fisher"): ["tokens", "gate", "head"],
    },
    BANDS: {
        ("tall", "normed_gradient"): ["up", "down"],
        ("unstructured", "normed_gradient"): ["tokens", "gate", "head"],
    },
}
# as much, but without training
PRUNED_TOGETHER = {
    "blocks and elements": {
        ("tall", "abs"): ["up", "down"],
        ("unstructured", "abs"): ["tokens", "gate", "head"],
    },
    "functions and norms": {
        ("tall", by_lines): ["up", "down"],
        ("unstructured", "normed_abs"): ["tokens", "gate", "head"],
    },
    "patterns": {
        ("tall", "abs"): ["up", "gate"],
        ("nm", "abs"): ["down"],
        ("unstructured", "abs"): ["tokens", "head"],
    },
    "rows and norms": {
        ("nm", "abs", "row"): ["up", "down"],
        ("unstructured", "normed_abs"): ["tokens", "gate", "head"],
    },
    "draws and outliers": {
        ("tall", "random"): ["tokens", "gate", "head"],
        ("tall", "abs", "weight", "owl"): ["up", "down"],
    },
    "blocks and rows": {
        ("tall", "abs"): ["up", "down"],
        ("nm", "abs", "row"): ["tokens", "gate", "head"],
    },
    "pools": {
        ("unstructured", "abs", "weight"): ["up", "down"],
        ("nm", "abs", "weight"): ["tokens", "gate", "head"],
    },
    "pools of blocks": {
        ("blocks", "abs", "weight"): ["up", "down"],
        ("blocks", "abs", "row"): ["tokens", "gate", "head"],
    },
    "elements and norms": {
        ("unstructured", "abs", "row"): ["up", "down"],
        ("tall", "normed_abs"): ["tokens", "gate", "head"],
    },
}


def config(pattern, importance="abs", pool="global", distribution="uniform", layers=None):
    if pattern in (together := TOGETHER | PRUNED_TOGETHER):
        return [config(*how, layers=layers) for how, layers in together[pattern].items()]
    left = {"pattern": PATTERNS[pattern], "targets": "all"}
    left["ignored_scopes"] = ["tokens"] if pattern == "tiles" else []  # no part has whole tiles
    if layers:
        left |= {"target_scopes": layers}
    if importance == "set":
        return ts.SETConfig(level=0.6, t_end=40, delta_t=2, **left)
    if importance in ("gradient", "normed_gradient"):
        return ts.RigLConfig(level=0.6, t_end=40, delta_t=2, growth=importance, **left)
    return ts.MagnitudeSparsityConfig(
        schedule=ts.PolynomialSchedule(initial_level=0.0, target_level=0.5, target_epoch=3),
        weight_importance=importance,
        pool=pool,
        distribution=distribution,
        **left,
    )


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def prune(controller):
    found = []
    for level in (0.45, 0.2):
        controller.scheduler.step()
        controller.set_sparsity_level(level)
        infos = controller.sparsified_module_info
        found += [
            (full_grid(i.operand).clone(), i.operand.kept, i.operand.pruned_elements())
            for i in infos
        ]
    last = [(full(i.weight), full(i.operand.binary_mask)) for i in infos]
    return found, last, controller.mask_level()


def prune_parts(group, how, dtype, ties, first, kind):
    model = net(dtype, ties)
    if first:
        wrapped(model, group, kind)
    controller = ts.create_controller(model, config(how), process_group=group)
    if not first:
        wrapped(model, group, kind)
    return prune(controller)


def check(found, wanted):
    for got, last, level in found:
        assert level == wanted[2]
        for (grid, *counts), (whole, *own) in zip(got, wanted[0], strict=True):
            assert counts == own
            assert torch.equal(grid, whole)
        for both, whole in zip(last, wanted[1], strict=True):
            assert all(map(torch.equal, both, whole))


@pytest.mark.parametrize("how", ["blocks", "nm", "tiles", *PRUNED_TOGETHER])
def test_columns_and_rows_are_pruned_as_one_process_prunes(ranks, how):
    wanted = prune(ts.create_controller(net(torch.bfloat16, True), config(how)))
    if how == "draws and outliers":
        uniform = [one.model_copy(update={"distribution": "uniform"}) for one in config(how)]
        without = prune(ts.create_controller(net(torch.bfloat16, True), uniform))
        assert [kept for _, kept, _ in wanted[0]] != [kept for _, kept, _ in without[0]]
    size = 4 if how == "blocks and elements" else 2  # of which parts are less than a block
    check(ranks.run(size, prune_parts, how, torch.bfloat16, True, True, "tensor"), wanted)


@pytest.mark.parametrize(
    "how", ["blocks", "tiles", "pools", "elements and norms", "draws and outliers"]
)
def test_a_model_may_be_parted_when_it_is_pruned_already(ranks, how):
    wanted = prune(ts.create_controller(net(), config(how)))
    check(ranks.run(2, prune_parts, how, torch.float32, False, False, "tensor"), wanted)


@pytest.mark.parametrize(
    ("kind", "first", "how"),
    [
        ("fsdp", True, "functions and norms"),
        ("fsdp", True, "draws and outliers"),
        ("fsdp", False, "blocks and rows"),
        ("copies", True, "functions and norms"),
        ("copies", True, "blocks and rows"),
    ],
)
def test_two_dimensions_are_pruned_as_one_process_prunes(ranks, kind, first, how):
    wanted = prune(ts.create_controller(net(torch.bfloat16, True), config(how)))
    check(ranks.run(4, prune_parts, how, torch.bfloat16, True, first, kind), wanted)


def shard_parts(group):
    from torch.distributed.fsdp import fully_shard

    model, mesh = net(torch.bfloat16, True), mesh_by(group, "fsdp")
    part(model, mesh)
    controller = ts.create_controller(model, config("patterns"), process_group=group)
    controller.set_sparsity_level(0.4)
    fully_shard(model, mesh=mesh["data"])
    masks = []
    for info in controller.sparsified_module_info:
        info.operand.follow()
        masks.append(full(info.operand.binary_mask))
    return *prune(controller), masks


def test_parts_may_be_sharded_when_they_are_pruned_already(ranks):
    controller = ts.create_controller(net(torch.bfloat16, True), config("patterns"))
    controller.set_sparsity_level(0.4)
    before = [info.operand.binary_mask for info in controller.sparsified_module_info]
    wanted = prune(controller)
    for *found, masks in ranks.run(4, shard_parts):
        assert same(masks, before)
        check([found], wanted)


def train(model, controller, steps):
    optimizer = LocalAdamW(model.parameters(), lr=0.02, weight_decay=0.1, foreach=False)
    losses = []
    for step in range(steps):
        if step % 2 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        x = torch.randint(0, 24, (6, 5), generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    masks = [full(info.operand.binary_mask) for info in controller.sparsified_module_info]
    return losses, {name: full(p) for name, p in model.named_parameters()}, masks


def controlled(model, what, **options):
    most = 15 if what == BANDS else line_score.MOST_BANDS
    with mock.patch.object(line_score, "MOST_BANDS", most):
        return ts.create_controller(model, config(what), **options)


def train_parts(group, what, steps, kind, state=None, first=True):
    model = net()
    if state is not None:
        model.load_state_dict(state[0])
    if first:
        wrapped(model, group, kind)
    controller = controlled(model, what, process_group=group)
    if not first:
        wrapped(model, group, kind)
    if state is not None:
        controller.load_state(state[1])
    found = train(model, controller, steps)
    return (found, controller.get_state()) if state is None else found


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *((what, "tensor") for what in TOGETHER if what != BANDS),
        *((what, "fsdp") for what in ("draws and squares", BANDS)),
    ],
)
def test_training_is_that_of_one_process_and_goes_on_from_its_state(ranks, what, kind):
    model = net(as_two=True)
    controller = controlled(model, what, dispatch="dense")
    wanted = [*train(model, controller, 3)]  # an update is next
    own = controller.get_state()
    size = 2 if kind == "tensor" else 4
    for found, state in ranks.run(size, train_parts, what, 3, kind):
        assert same([*found], wanted)
        assert same(state, own)
    for algorithm in controller.controllers.values():
        masks = [info.operand.binary_mask for info in algorithm.sparsified_module_info]
        assert not all(mask.all() for mask in masks)
    saved = wanted[1], own
    model = net(as_two=True)
    model.load_state_dict(wanted[1])
    resumed = controlled(model, what, dispatch="dense", state=own)
    wanted = [*train(model, resumed, 2)]
    for found in ranks.run(size, train_parts, what, 2, kind, saved, kind == "tensor"):
        assert same([*found], wanted)


LEARNED_TOGETHER = {
    "draws and updates": {
        ("rb", "unstructured"): ["tokens", "gate", "head"],
        ("hard", "blocks"): ["up", "down"],
    },
    "draws and patterns": {
        ("rb", "blocks"): ["up", "down"],
        ("sr_ste", "nm"): ["gate"],
        ("hard", "unstructured"): ["head"],
    },
}


def learned_config(how, pattern=None, layers=("up", "down", "gate", "head")):
    if how in LEARNED_TOGETHER:
        return [learned_config(*each, own) for each, own in LEARNED_TOGETHER[how].items()]
    masked = {"pattern": PATTERNS[pattern], "target_scopes": layers, "targets": "all"}
    if how == "rb":
        schedule = ts.ExponentialSchedule(target_level=0.4, target_epoch=2)
        return ts.RBSparsityConfig(schedule=schedule, seed=5, **masked)
    if how == "sr_ste":
        return ts.SRSTEConfig(level=0.3, decay=0.1, **masked)
    if how == "hard":
        schedule = ts.PolynomialSchedule(initial_level=0.0, target_level=0.5, target_epoch=3)
        return ts.MovementSparsityConfig(schedule=schedule, pool="global", **masked)
    scopes = {"mode": "block", "sparse_factors": [4, 2], "target_scopes": ("up", "down")}
    return ts.MovementSparsityConfig(
        warmup_start_epoch=1,
        warmup_end_epoch=3,
        importance_regularization_factor=0.05,
        steps_per_epoch=2,
        enable_structured_masking=False,
        sparse_structure_by_scopes=(scopes,),
        target_scopes=layers,
    )


def learn_masks(model, controller, steps):
    scores = controller.parameters()
    own = [p for p in model.parameters() if not any(p is score for score in scores)]
    groups = [{"params": own}, {"params": scores, "lr": 1.5, "weight_decay": 0.0}]
    optimizer = LocalAdamW(groups, lr=0.02, weight_decay=0.1, foreach=False)
    outputs = []
    for step in range(steps):
        if step % 2 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        x = torch.randint(0, 24, (6, 5), generator=torch.Generator().manual_seed(step))
        task = model.train()(x).square().mean()
        (task + controller.loss()).backward()
        optimizer.step()
        outputs.append(task.detach())
    with torch.no_grad():
        outputs.append(model.eval()(x))
    infos = controller.sparsified_module_info
    counts = [(info.operand.pruned_groups(), info.operand.pruned_elements()) for info in infos]
    masks = [full(info.operand.binary_mask) for info in infos]
    weights = {n: full(p) for n, p in model.state_dict().items()}
    return outputs, counts, masks, weights, controller.mask_level()


def learn_parts_of_masks(group, how, steps, kind, state=None):
    from torch.distributed.fsdp import fully_shard

    model = net()
    if state is not None:
        model.load_state_dict(state[0])
    later = kind == "fsdp later"
    if later:
        part(model, mesh_by(group, "fsdp"))
    else:
        wrapped(model, group, kind)
    controller = ts.create_controller(model, learned_config(*how), process_group=group)
    if later:
        fully_shard(model, mesh=mesh_by(group, "fsdp")["data"])
    if state is not None:
        controller.load_state(state[1])
    found = learn_masks(model, controller, steps)
    if state is not None:
        return found
    state, x = controller.get_state(), torch.arange(24)[None]
    with torch.no_grad():
        masked = model(x)
        assert torch.equal(controller.fold(model)(x), masked)
    assert not any("scores" in name for name, _ in model.named_parameters())
    return found, state


def near(a, b):
    """As the last bit of a sum of sigmoids depends on where the tensors end."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and a.dtype == torch.float32:
        return torch.allclose(a, b, 1e-4, 1e-5)
    return a == pytest.approx(b, rel=1e-5) if isinstance(a, float) else same(a, b)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *((how, "tensor") for how in (("draws and updates",), ("soft", "unstructured"))),
        (("sr_ste", "nm"), "tensor"),
        (("soft", "unstructured"), "fsdp"),
        (("draws and patterns",), "fsdp later"),
    ],
)
def test_masks_are_learned_on_parts_as_on_one_process(ranks, how, kind):
    model = net(as_two=True)
    controller = ts.create_controller(model, learned_config(*how))
    wanted, own = learn_masks(model, controller, 4), controller.get_state()
    assert wanted[-1] > 0.02
    size = 2 if kind == "tensor" else 4
    for found, state in ranks.run(size, learn_parts_of_masks, how, 4, kind):
        assert same([*found], [*wanted])
        assert near(state, own)
    if kind == "fsdp later":
        return
    saved = wanted[3], own
    model = net(as_two=True)
    model.load_state_dict(wanted[3])
    controller = ts.create_controller(model, learned_config(*how), state=own)
    steps = 3 if how[0] == "soft" else 2  # until its warm-up has ended
    wanted = learn_masks(model, controller, steps)
    for found in ranks.run(size, learn_parts_of_masks, how, steps, kind, saved):
        assert same([*found], [*wanted])


class Sent(TorchDispatchMode):
    """Counts all collectives, torch's own and others', while it is open."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if DTensor in types:  # what it does on each rank comes here
            return NotImplemented
        if "c10d" in function.namespace:
            self.counts[str(function)] = self.counts.get(str(function), 0) + 1
        return function(*args, **(kwargs or {}))


def count_collectives(group, how):
    """Return what passes send without masks and with them, loss and optimiser included, and what
    statistics do.
    """
    model, found = wrapped(net(), group), []
    x, controller = torch.randint(0, 24, (6, 5)), None
    for masked in (False, True):
        if masked:
            controller = ts.create_controller(model, learned_config(*how), process_group=group)
            learn_masks(model, controller, 3)
            controller.scheduler.step()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.zero_grad()
        with Sent() as sent:
            for _ in range(2):
                loss = model.train()(x).square().mean()
                if masked:
                    loss = loss + controller.loss()
                loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.eval()(x)
        found.append(sent.counts)
    assert (controller.loss() != 0) == (how[0] != "hard")
    assert all(score.grad is not None for score in controller.parameters())
    with Sent() as sent:
        controller.statistics()
    return *found, sent.counts


@pytest.mark.parametrize(
    "how",
    [("rb", "unstructured"), ("hard", "blocks"), ("soft", "unstructured"), ("sr_ste", "nm")],
    ids="-".join,
)
def test_steps_under_learned_masks_send_what_dense_ones_do(ranks, how):
    for dense, masked, asked in ranks.run(2, count_collectives, how):
        assert sum(dense.values()) > 0
        assert masked == dense
        assert (sum(asked.values()) > 0) == (how[0] == "rb")


def learn_turned(group, dim, how):
    """Learn a mask of a weight stored (in, out), of small integers, whose sums are exact."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(24, 16)
    layer.weight.data.mul_(50).round_()
    model = nn.Sequential(layer, nn.ReLU())  # FSDP2 warns of views
    x = torch.randint(-2, 3, (6, 16)).float()
    mesh = None if group is None else mesh_of(group)
    if group is not None and group.size() == 4:
        mesh = mesh_by(group, "fsdp")
    if isinstance(dim, int) and mesh is not None:
        parts = mesh if mesh.ndim == 1 else mesh["tensor"]
        x = distribute_tensor(x, parts, [Replicate()])
        for name, placed in (("weight", Shard(dim)), ("bias", Replicate())):
            tensor = distribute_tensor(getattr(layer, name).data, parts, [placed])
            setattr(layer, name, nn.Parameter(tensor))
    if mesh is not None and mesh.ndim == 2:
        fully_shard(model, mesh=mesh["data"]).set_gradient_divide_factor(2.0)
    elif dim in ("rows", "columns"):
        place = {"shard_placement_fn": lambda p: Shard(int(p.ndim == 2 and dim == "columns"))}
        fully_shard(model, mesh=mesh, **place)
    chosen = ts.SRSTEConfig(pattern=ts.NM(2, 4), decay=0.0)
    if how == "rb":
        chosen = ts.RBSparsityConfig(
            pattern=ts.Block(4, 2), seed=5, schedule=ts.ExponentialSchedule(target_level=0.5)
        )
    controller = ts.create_controller(model, chosen, process_group=group)
    scores = controller.parameters()
    optimizer = torch.optim.SGD(scores or model.parameters(), lr=16.0)
    (info,), found = controller.sparsified_module_info, []
    for _ in range(4):
        controller.scheduler.step()
        model.zero_grad()
        y = model(x)
        y = y.full_tensor() if hasattr(y, "full_tensor") else y
        y.sum().backward()
        optimizer.step()
        grads = [full(parameter.grad) for parameter in (info.weight, *scores)]
        found.append((*grads, full(info.operand.binary_mask), controller.mask_level()))
    y = model.eval()(x)
    assert how == "rb" or info.operand._passed is None  # no rank has the mask of what is gathered
    controller.freeze()
    state = controller.get_state()
    controller.freeze(False)
    controller.load_state(state)
    return found, full(y), full(info.weight), state, controller.mask_level()


@pytest.mark.parametrize(
    ("how", "size", "dim"),
    [
        *(("rb", 2, dim) for dim in (0, 1, "rows")),
        *(("sr_ste", 2, "columns"), ("sr_ste", 4, 0), ("sr_ste", 4, 1)),
    ],
)
def test_masks_are_learned_of_weights_that_lie_turned(ranks, how, size, dim):
    wanted = learn_turned(None, None, how)
    assert 0.1 < wanted[-1] < 0.9
    for found in ranks.run(size, learn_turned, dim, how):
        assert same(found, wanted)


class Transformer(nn.Module):
    """A layer of attention and feed-forward, by heads of 8 features."""

    def __init__(self, up, down):
        super().__init__()
        self.tokens = nn.Embedding(24, 32)
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(3)])
        self.q, self.k, self.v, self.o = up(32, 32), up(32, 32), up(32, 32), down(32, 32)
        self.up, self.down = up(32, 48), down(48, 32)
        self.head = nn.Linear(32, 24)

    def forward(self, x):
        x = self.tokens(x)
        y = self.norms[0](x)
        q, k, v = (m(y).unflatten(-1, (-1, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x)).clone()


def algorithms():
    """Return every algorithm, each on a layer of its own."""

    def on(layer, pattern):
        return {"target_scopes": [layer], "pattern": PATTERNS[pattern]}

    rising = ts.PolynomialSchedule(initial_level=0.1, target_level=0.5, target_epoch=5)
    from_none = ts.PolynomialSchedule(initial_level=0.0, target_level=0.5, target_epoch=5)
    slow = ts.ExponentialSchedule(target_level=0.4, target_epoch=3)
    moves = {"level": 0.6, "t_end": 28, "delta_t": 6}
    by_norm = {"weight_importance": "normed_abs", "schedule": rising}
    return [
        ts.ConstSparsityConfig(**on("q", "blocks")),
        ts.SETConfig(**moves, **on("k", "unstructured")),
        ts.MovementSparsityConfig(schedule=from_none, **on("v", "unstructured")),
        ts.MagnitudeSparsityConfig(**by_norm, **on("o", "tall")),
        ts.RBSparsityConfig(schedule=slow, seed=5, **on("up", "blocks")),
        ts.RigLConfig(**moves, **on("down", "tall")),
        ts.MagnitudeSparsityConfig(weight_importance="abs", schedule=rising, **on("head", "nm")),
    ]


def learn(wrap, group=None):
    """Train for 30 steps; return the losses, and three times weights and masks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    tensor = wrap == "tensor"
    model = Transformer(*((nn.Linear, nn.Linear) if tensor else (halves(0), halves(1))))
    with torch.no_grad():
        model.q.weight[4:, 10:31] = 0  # some of which const keeps
    mesh = None if group is None else mesh_of(group)
    if tensor:
        plan = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
        plan |= {name: RowwiseParallel() for name in ("o", "down")}
        parallelize_module(model, mesh, plan)
    elif wrap == "fsdp":
        fully_shard(model, mesh=mesh)
    controller = ts.create_controller(model, algorithms(), dispatch="dense", process_group=group)
    trained = model
    if wrap == "ddp":
        trained = nn.parallel.DistributedDataParallel(model, process_group=group)
    scores = {*controller.parameters()}
    own = [p for p in model.parameters() if p not in scores]
    groups = [{"params": own}, {"params": [*scores], "lr": 0.5, "weight_decay": 0.0}]
    optimizer = LocalAdamW(groups, lr=0.01, foreach=False)
    losses, found = [], []
    for step in range(30):
        if step % 5 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        numbers = torch.Generator().manual_seed(step)
        x = torch.randint(0, 24, (6, 5), generator=numbers)
        loss = functional.cross_entropy(trained(x).flatten(0, 1), (x + 1).flatten() % 24)
        (loss + controller.loss()).backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            infos = controller.sparsified_module_info
            found += [(full(i.weight), full(i.operand.binary_mask)) for i in infos]
    return losses, found


def learn_parts(group, wrap):
    return learn(wrap, group)


def test_a_transformer_learns_by_every_algorithm_the_same_under_every_wrapper(ranks):
    losses, wanted = learn(None)
    assert not any(mask.all() for _, mask in wanted[-7:])
    assert losses[-1] < losses[0] / 2
    for wrap in ("ddp", "fsdp", "tensor"):
        for found in ranks.run(2, learn_parts, wrap):
            assert same(found, (losses, wanted)), wrap


def calibrate(model, controller):
    for seed in (1, 2):
        with controller.calibration():
            model(torch.randint(0, 24, (6, 5), generator=torch.Generator().manual_seed(seed)))
        controller.set_sparsity_level(seed / 4)
    return [full(i.operand.binary_mask) for i in controller.sparsified_module_info]


def wanda(pool):
    schedule = ts.PolynomialSchedule(initial_level=0.0, target_level=0.5, target_epoch=3)
    return ts.MagnitudeSparsityConfig(
        schedule=schedule, weight_importance="wanda", pool=pool, ignored_scopes=["tokens"]
    )


def calibrate_parts(group, pool, kind):
    model = wrapped(net(), group, kind)
    return calibrate(model, ts.create_controller(model, wanda(pool), process_group=group))


@pytest.mark.parametrize(("pool", "size", "kind"), [("row", 2, "tensor"), ("global", 4, "fsdp")])
def test_inputs_of_columns_are_measured_where_they_are(ranks, pool, size, kind):
    model = net(as_two=True)
    wanted = calibrate(model, ts.create_controller(model, wanda(pool), dispatch="dense"))
    for found in ranks.run(size, calibrate_parts, pool, kind):
        assert same(found, wanted)


class Odd(nn.Module):
    """Weights of few columns, of which some ranks have none, and of more than two dimensions."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(5, 12)
        self.image = nn.Conv2d(6, 8, 3)
        self.turned = pytest.importorskip("transformers").pytorch_utils.Conv1D(24, 16)


def by_peaks(evidence):
    """Peaks are the same in any order."""
    sizes = evidence.weight.abs()
    return sizes / (sizes.amax(0, keepdim=True) + sizes.amax(1, keepdim=True))


def odd(group, placements, importance):
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    model = Odd()
    if group is not None:
        mesh = mesh_of(group)
        for name, dim in placements.items():
            module = model.get_submodule(name)
            module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, [Shard(dim)]))
    controller = ts.create_controller(
        model,
        ts.MagnitudeSparsityConfig(
            schedule=ts.PolynomialSchedule(initial_level=0.0, target_level=0.5),
            weight_importance=importance,
            overrides=[ts.Override(scope="turned", pattern=ts.Block(8, 4))],
        ),
        process_group=group,
    )
    found = prune(controller)
    state = controller.get_state()
    controller.set_sparsity_level(0.7)
    controller.load_state(state)
    masks = [full(info.operand.binary_mask) for info in controller.sparsified_module_info]
    return *found, state, masks


@pytest.mark.parametrize(
    ("dims", "size", "importance"),
    [((1, 1, 0), 4, "abs"), ((0, 0, 1), 2, "abs"), ((1, 1, 0), 2, by_peaks)],
)
def test_odd_shapes_are_pruned_as_one_process_prunes(ranks, dims, size, importance):
    pytest.importorskip("transformers")
    *wanted, state, masks = odd(None, {}, importance)
    placements = dict(zip(("narrow", "image", "turned"), dims, strict=True))
    for *found, own, loaded in ranks.run(size, odd, placements, importance):
        check([found], wanted)
        assert same(own, state)
        assert same(loaded, masks)


def uneven(group, kind):
    """Prune 35 rows, 35 columns and 9 rows, on two ranks by two that copy or part them."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 35), nn.Linear(35, 16), nn.Linear(16, 9))
    if kind:
        mesh = mesh_by(group, "fsdp")
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": ColwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    if kind == "parts":
        fully_shard(model, mesh=mesh["data"])
    schedule = ts.PolynomialSchedule(initial_level=0.0, target_level=0.5)
    chosen = ts.MagnitudeSparsityConfig(
        pattern=ts.Block(8, 1), schedule=schedule, weight_importance="abs", pool="global"
    )
    return prune(ts.create_controller(model, chosen, process_group=group))


@pytest.mark.parametrize("kind", ["copies", "parts"])
def test_uneven_parts_on_a_mesh_that_is_a_part_of_another(ranks, kind):
    check(ranks.run(4, uneven, kind), uneven(None, None))


@cache
def whole_mesh(**sizes):
    from torch.distributed.device_mesh import init_device_mesh

    # torch compares such a mesh by identity
    return init_device_mesh("cpu", (*sizes.values(),), mesh_dim_names=(*sizes,))


def multiply(group=None, sizes=None, named=None, first=True):
    """Prune, multiply and train, by numbers whose sums are exact; of weights on one mesh of all
    dimensions, some of which fully_shard is told by name.
    """
    numbers = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 48))
    for parameter in model.parameters():
        parameter.data = torch.randint(-8, 9, parameter.shape, generator=numbers) / 8
    x = torch.randint(-2, 3, (4, 16), generator=numbers).float()

    def shard():
        from torch.distributed import fsdp

        fsdp.fully_shard(model, mesh=mesh, dp_mesh_dims=fsdp.DataParallelMeshDims(**named))

    if sizes:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = whole_mesh(**sizes)
        copied = [Replicate()] * (mesh.ndim - 1)
        placed = ((0, "weight", Shard(0)), (0, "bias", Shard(0)), (2, "weight", Shard(1)))
        for i, name, place in (*placed, (2, "bias", Replicate())):
            parts = distribute_tensor(getattr(model[i], name).data, mesh, [*copied, place])
            setattr(model[i], name, nn.Parameter(parts))
        x = distribute_tensor(x, mesh, [*copied, Replicate()])
        if first:
            shard()
    chosen = ts.MagnitudeSparsityConfig(
        schedule=ts.PolynomialSchedule(initial_level=0.0, target_level=0.5),
        pattern=ts.Block(16, 16),
        weight_importance="abs",
        pool="global",
    )
    controller = ts.create_controller(model, chosen, dispatch="sparse", process_group=group)
    if sizes and not first:
        shard()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    found = []
    for level in (0.25, 0.5):
        controller.scheduler.step()
        controller.set_sparsity_level(level)
        optimizer.zero_grad()
        y = model(x)
        y.sum().backward()
        optimizer.step()
        infos = controller.sparsified_module_info
        found += [full(y), *(full(i.weight) for i in infos)]
        found += [full(i.operand.binary_mask) for i in infos]
    return found, [info.operand.path for info in infos]


@pytest.mark.parametrize(
    ("sizes", "named", "first"),
    [
        ({"data": 2, "more": 1, "tensor": 2}, {"shard": ("data", "more")}, False),
        ({"copies": 2, "data": 2, "tensor": 1}, {"replicate": "copies", "shard": "data"}, True),
    ],
)
def test_dimensions_that_fully_shard_is_told_by_name(ranks, sizes, named, first):
    from torch.distributed import fsdp

    if not hasattr(fsdp, "DataParallelMeshDims"):
        pytest.skip("this torch takes no names of dimensions")
    wanted = multiply()
    assert wanted[1] == ["block-sparse"] * 2
    for found in ranks.run(4, multiply, sizes, named, first):
        assert same([*found], [*wanted])


def flip(group):
    model = wrapped(net(), group, "fsdp")
    controller = ts.create_controller(model, config("unstructured"), process_group=group)
    controller.set_sparsity_level(0.5)
    controller.scheduler.step()
    if torch.distributed.get_rank(group) == 1:
        gate = next(w for w in controller._weights if w.name == "gate")
        gate.mask[0, 0] ^= 1
    controller.set_sparsity_level(0.6)


def test_copies_of_parts_that_differ_are_told_of_on_every_rank(ranks):
    for kind, message in ranks.errors(4, flip):
        assert kind == "RuntimeError"
        assert "the masks of 'gate' differ between ranks" in message


def refuse(group, what):
    from torch.distributed.tensor import Shard, distribute_tensor

    model, chosen = net(), config("unstructured")
    if what == "edges":
        chosen = config("blocks")
        chosen = chosen.model_copy(update={"pattern": ts.Block(4, 32)})
    elif what == "dimension":
        model.image = nn.Conv2d(6, 8, 3)
        weight = distribute_tensor(model.image.weight.data, mesh_by(group, "tensor"), [Shard(2)])
        model.image.weight = nn.Parameter(weight)
    elif what == "sixteenths":
        chosen = config("unstructured", "normed_abs")
    elif what == "set":
        chosen = config("unstructured", "set")
    elif what == "outliers":
        chosen = config("unstructured", "abs", "weight", "owl")
    elif what == "heights":
        chosen = learned_config("rb", "tall")
    ts.create_controller(wrapped(model, group), chosen, process_group=group)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("edges", "the shards of 'down' must be of whole groups of 32 columns for block 4x32"),
        ("dimension", "'image' must be sharded on rows or columns of its matrix"),
        ("sixteenths", "'down' must lie on ranks by sixteenths of its inputs"),
        ("set", "'down' must lie on ranks by sixteenths of its inputs"),
        ("outliers", "'down' must lie on ranks by sixteenths of its inputs"),
        ("heights", "tensor parallelism must part 'up' by whole groups of 16 rows"),
    ],
)
def test_what_is_not_covered_is_refused_on_every_rank(ranks, what, message):
    size = {"sixteenths": 3, "set": 3, "outliers": 3}.get(what, 2)
    for kind, text in ranks.errors(size, refuse, what):
        assert kind == "ValueError"
        assert message in text
