"""Products of sharded weights skip blocks, and are those of one process."""

import warnings

import pytest
import torch
from ranks import LocalAdamW, mesh_of
from torch import nn

import triton_sparsity as ts
from triton_sparsity.kernels import product as product_file
from triton_sparsity.kernels.block_sparse_linear import block_sparse_linear

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch lacks gloo"
)

BLOCK = ts.Block(16, 16)


def net():
    """Heights that no number of ranks divides, and one of which some ranks begin no block."""
    numbers = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(48, 70), nn.Tanh(), nn.Linear(70, 50, bias=False), nn.Tanh())
    model.append(nn.Linear(50, 17))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=numbers) / 4
    return model


def sharded(model, group, how="each", **options):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(group, "replicate", "shard") if how == "copies" else mesh_of(group)
    for layer in (model[0], model[4]) if how != "root" else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def config(algorithm, layers=None):
    some = {"pattern": BLOCK} | ({"target_scopes": layers} if layers else {})
    if algorithm == "const":
        return ts.ConstSparsityConfig(**some)
    if algorithm == "set":
        return ts.SETConfig(level=0.5, t_end=20, delta_t=2, **some)
    if algorithm in ("rigl", "rigl at each step"):
        delta_t = 2 if algorithm == "rigl" else 1
        return ts.RigLConfig(level=0.5, t_end=20, delta_t=delta_t, **some)
    if algorithm == "rb":
        return ts.RBSparsityConfig(**some)
    if algorithm == "movement":
        schedule = ts.PolynomialSchedule(initial_level=0.0, target_level=0.5)
        return ts.MovementSparsityConfig(schedule=schedule, **some)
    schedule = ts.PolynomialSchedule(
        initial_level=0.1, target_level=0.6, target_epoch=2, update_per_optimizer_step=True,
        steps_per_epoch=3,
    )  # fmt: skip
    return ts.MagnitudeSparsityConfig(
        schedule=schedule, weight_importance="abs", pool="weight", **some
    )


def described(model, *chosen):
    """Return configurations, with a state if one learns masks: there they are frozen."""
    controller = ts.create_controller(model, [*chosen])
    each = getattr(controller, "controllers", {controller.name: controller})
    learned = [each[name] for name in ("rb_sparsity", "movement_sparsity") if name in each]
    numbers = torch.Generator().manual_seed(5)
    for one in learned:
        with torch.no_grad():
            for scores in one.parameters():
                scores.copy_(torch.randn(scores.shape, generator=numbers))
        if one.name == "movement_sparsity":
            one.set_sparsity_level(0.5)
        one.freeze()
    return {"config": [*chosen]} | ({"state": controller.get_state()} if learned else {})


def holed():
    model = net()
    with torch.no_grad():
        model[0].weight[16:48, 16:] = 0
        model[2].weight[:32, :48] = 0
    return model


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


class Counted:
    """Counts products that the block-sparse operator makes while it is open."""

    def __enter__(self):
        self.shapes, self.plain = [], product_file.block_sparse_linear

        def counting(x, weight, *args, **kwargs):
            self.shapes.append((tuple(weight.shape), weight.dtype))
            return self.plain(x, weight, *args, **kwargs)

        product_file.block_sparse_linear = counting
        return self.shapes

    def __exit__(self, *_):
        product_file.block_sparse_linear = self.plain


def train(model, controller, steps=3):
    """Train on one batch on every rank, whose mean over two or four is exact."""
    optimizer = LocalAdamW(model.parameters(), lr=0.05, weight_decay=0.1, foreach=False)
    losses = []
    with Counted() as shapes:
        for step in range(steps):
            if step % 3 == 0:
                controller.scheduler.epoch_step()
            controller.scheduler.step()
            optimizer.zero_grad()
            numbers = torch.Generator().manual_seed(step)
            for x in torch.randn(2, 6, 48, generator=numbers):
                loss = model(x).square().mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
    infos = controller.sparsified_module_info
    weights = [full(i.weight) for i in infos]
    return losses, weights, [full(i.operand.binary_mask) for i in infos], shapes


def train_shards(group, some, first, how, options):
    model = holed()
    if first:
        sharded(model, group, how, **options)
    controller = ts.create_controller(model, dispatch="sparse", process_group=group, **some)
    if not first:
        sharded(model, group, how, **options)
    return train(model, controller)


def same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("algorithms", "size", "first", "how", "options"),
    [
        (("magnitude",), 4, True, "copies", {}),
        (("magnitude",), 2, True, "root", {"reshard_after_forward": False}),
        (("movement", "rigl at each step", "magnitude"), 4, False, "each", {}),
        (("const", "set", "magnitude"), 2, False, "each", {}),
        (("const", "rigl", "rb"), 2, True, "each", {}),
    ],
)
def test_gathered_weights_skip_blocks_as_in_one_process(
    ranks, algorithms, size, first, how, options
):
    """Each algorithm has a layer, or one all of them."""
    layers = [["0"], ["2"], ["4"]] if len(algorithms) > 1 else [None]
    some = described(holed(), *map(config, algorithms, layers))
    model = holed()
    controller = ts.create_controller(model, dispatch="sparse", **some)
    wanted = train(model, controller)
    assert len(wanted[3]) == 3 * 2 * 3
    assert not any(mask.all() for mask in wanted[2])
    for found in ranks.run(size, train_shards, some, first, how, options):
        assert same([*found], [*wanted])


class FeedForward(nn.Module):
    """Of small integers, whose sums are exact in any order."""

    def __init__(self, up=nn.Linear, down=nn.Linear):
        super().__init__()
        self.up, self.down = up(64, 96), down(96, 64)
        numbers = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            values = torch.randint(1, 5, parameter.shape, generator=numbers)
            signs = torch.randint(0, 2, parameter.shape, generator=numbers) * 2 - 1
            parameter.data = (values * signs).float() / 8

    def forward(self, x):
        return self.down(torch.relu(self.up(x))).clone()  # FSDP2 warns of views


def parallel(model, group, kind):
    """Part a model over "tensor" ranks, by "sequence" around it, or by "fsdp" beside; or the
    first weight's "columns" alone.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    up, down = ColwiseParallel(), RowwiseParallel()
    if kind == "sequence":
        up, down = (
            ColwiseParallel(input_layouts=Shard(1)),
            RowwiseParallel(output_layouts=Shard(1)),
        )
    if kind != "fsdp":
        mesh = mesh_of(group)
        if kind == "columns":
            return parallelize_module(model.up, mesh, ColwiseParallel(output_layouts=Replicate()))
        return parallelize_module(model, mesh, {"up": up, "down": down})
    mesh = mesh_of(group, "data", "tensor")
    parallelize_module(model, mesh["tensor"], {"up": up, "down": down})
    return fully_shard(model, mesh=mesh["data"])


def half(pattern):
    """Prune half of the blocks, by one update after the first masks."""
    schedule = ts.PolynomialSchedule(initial_level=0.2, target_level=0.5)
    return ts.MagnitudeSparsityConfig(
        pattern=pattern, schedule=schedule, weight_importance="abs", pool="weight"
    )


def numbers():
    return torch.randint(-2, 3, (2, 8, 64), generator=torch.Generator().manual_seed(1)).float()


def once(model, controller, part=slice(None), level=0.5):
    """Return a product, its gradients, and which weights the operator has multiplied."""
    if not controller.frozen:
        controller.set_sparsity_level(level)
    model.zero_grad()
    x = numbers()[:, part].clone().requires_grad_()
    with Counted() as shapes:
        y = model(x)
        y.square().sum().backward()
    # frozen scores have none
    gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return full(y), x.grad.clone(), gradients, shapes


def once_parted(group, kind, some, first):
    model = FeedForward()
    if first:
        parallel(model, group, kind)
    controller = ts.create_controller(model, dispatch="sparse", process_group=group, **some)
    if not first:
        parallel(model, group, kind)
    rank, size = torch.distributed.get_rank(group), group.size()
    part = slice(rank * 8 // size, (rank + 1) * 8 // size) if kind == "sequence" else slice(None)
    return part, once(model, controller, part)


TALL = ts.Block(32, 16)


@pytest.mark.parametrize(
    ("kind", "size", "pattern", "first", "rows"),
    [
        ("tensor", 2, BLOCK, True, [48, 48]),
        ("tensor", 2, TALL, False, [48, 48]),  # the second begins inside a block
        ("columns", 4, BLOCK, True, [24, 0, 24, 0]),  # no product skips blocks of 8 rows
        ("sequence", 2, BLOCK, True, [48, 48]),
        ("fsdp", 4, BLOCK, True, [48] * 4),
        ("fsdp", 4, TALL, False, [48] * 4),
        ("tensor", 2, "movement", True, [48, 48]),
        ("fsdp", 4, "rb", True, [48] * 4),
    ],
)
def test_parts_of_weights_skip_blocks_and_agree_with_the_dense_product(
    ranks, kind, size, pattern, first, rows
):
    model = FeedForward()
    learned = isinstance(pattern, str)
    some = described(FeedForward(), config(pattern) if learned else half(pattern))
    y, x_grad, gradients, _ = once(model, ts.create_controller(model, dispatch="dense", **some))
    assert (gradients["up.weight"] == 0).float().mean() >= 0.4
    found = ranks.run(size, once_parted, kind, some, first)
    for (part, (own_y, own_x_grad, own, shapes)), tall in zip(found, rows, strict=True):
        assert torch.equal(own_y, y[:, part])
        assert torch.equal(own_x_grad, x_grad[:, part])
        for name, gradient in gradients.items():
            assert torch.equal(own[name], gradient), name
        wide = 96 if kind == "columns" else 48
        multiplied = [shape for shape, _ in shapes]
        assert multiplied == [(tall, 64)] * bool(tall) + [(64, wide)]


def turned(layer):
    """Return a linear as Hugging Face's Conv1D, whose weight is stored (in, out)."""
    found = pytest.importorskip("transformers").pytorch_utils.Conv1D(96, 64)
    found.weight.data, found.bias.data = layer.weight.data.T.contiguous(), layer.bias.data
    return found


def multiply(group, kind):
    """Return the product of each placement of weight and inputs, and what it has multiplied."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, found = mesh_of(group), {}
    for weight in (Replicate(), Shard(0), Shard(1)):
        layer = FeedForward().up
        own = {"weight": weight, "bias": weight if weight == Shard(0) else Replicate()}
        if kind == "turned":
            layer = turned(layer)
            own["weight"] = Shard(1 - weight.dim) if isinstance(weight, Shard) else weight
        for name, placement in own.items():
            tensor = distribute_tensor(getattr(layer, name).data, mesh, [placement])
            bare = kind == "no bias" and name == "bias"
            setattr(layer, name, None if bare else nn.Parameter(tensor))
        controller = ts.create_controller(
            layer, half(BLOCK), dispatch="sparse", process_group=group
        )
        controller.set_sparsity_level(0.5)
        # torch 2.11 itself multiplies no parts by parallel sequences
        sequences = [Shard(1)] if weight == Replicate() else []
        for inputs in (Replicate(), Shard(0), Shard(2), *sequences):
            x = distribute_tensor(numbers(), mesh, [inputs]).requires_grad_()
            layer.zero_grad()
            with Counted() as shapes:
                y = layer(x)
                y.square().sum().backward()
            gradients = [full(p.grad) for p in (x, *layer.parameters())]
            key = getattr(inputs, "dim", None), getattr(weight, "dim", None)
            found[key] = [full(y), *gradients], [shape for shape, _ in shapes]
    return found


@pytest.mark.parametrize("kind", ["bias", "no bias", "turned"])
def test_parts_that_do_not_go_together_are_multiplied_dense(ranks, kind):
    layer = FeedForward().up
    layer = turned(layer) if kind == "turned" else layer
    layer.bias = None if kind == "no bias" else layer.bias
    ts.create_controller(layer, half(BLOCK), dispatch="dense").set_sparsity_level(0.5)
    x = numbers().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    wanted = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    parts = {(None, 0): (48, 64), (2, 1): (96, 32)}
    parts |= dict.fromkeys([(None, None), (0, None), (1, None)], (96, 64))
    for found in ranks.run(2, multiply, kind):
        for key, (own, shapes) in found.items():
            assert same(own, wanted), key
            assert shapes == ([parts[key]] if key in parts else []), key


class Halves(nn.Linear):
    """Multiplies as two ranks do, and adds up what they add up, so that one process agrees with
    them to the bit.
    """

    operand = None  # of the mask

    def forward(self, x):
        dim = 0 if self.out_features > self.in_features else 1
        masks, weights = self.operand.mask.chunk(2, dim), self.weight.chunk(2, dim)
        sparse = torch.tensor([True, True, self.operand.dense_gradient_taker is None])
        options = {"pattern": BLOCK, "paths": sparse}
        x = x.view_as(x)  # where the gradients of both halves meet, before any others
        if dim == 0:
            each = zip(weights, masks, self.bias.chunk(2), strict=True)
            return torch.cat([block_sparse_linear(x, w, m, b, **options) for w, m, b in each], -1)
        each = zip(x.chunk(2, -1), weights, masks, strict=True)
        one, other = (
            block_sparse_linear(h, w.contiguous(), m, self.bias / 2, **options) for h, w, m in each
        )
        return one + other


def trained(model, algorithms, **options):
    chosen = [*map(config, algorithms, (["up"], ["down"]))]
    controller = ts.create_controller(model, chosen, dispatch="sparse", **options)
    for info in controller.sparsified_module_info:
        info.module.operand = info.operand
    optimizer = LocalAdamW(model.parameters(), lr=0.02, weight_decay=0.1, foreach=False)
    losses, numbers = [], torch.Generator().manual_seed(1)
    for step in range(4):
        if step % 3 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        loss = model(torch.randn(5, 64, generator=numbers)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    infos = controller.sparsified_module_info
    masks = [full(info.operand.binary_mask) for info in infos]
    return losses, [full(p) for p in model.parameters()], masks


def trained_parts(group, kind, algorithms):
    with Counted() as shapes:
        found = trained(parallel(FeedForward(), group, kind), algorithms, process_group=group)
    assert len(shapes) == 8
    return found


@pytest.mark.parametrize(
    ("kind", "size", "algorithms"),
    [
        ("tensor", 2, ("rigl", "set")),
        ("tensor", 2, ("magnitude", "rigl")),
        ("fsdp", 4, ("rigl", "magnitude")),
    ],
)
def test_training_by_parts_is_that_of_one_process_which_multiplies_by_parts(
    ranks, kind, size, algorithms
):
    wanted = trained(FeedForward(Halves, Halves), algorithms)
    assert not any(mask.all() for mask in wanted[2])
    for found in ranks.run(size, trained_parts, kind, algorithms):
        assert same(found, wanted)


def gather(model, group):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(group)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model, group, **options):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh_of(group), **options)


def compute_in_bfloat16(group, dispatch):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = whole(FeedForward(), group, mp_policy=policy)
    controller = ts.create_controller(model, half(BLOCK), dispatch=dispatch, process_group=group)
    y, *_, shapes = once(model, controller)
    gradients = [full(p.grad) for p in model.parameters()]
    return shapes, y.float(), gradients


def evaluate_first(group):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = set()
    for _ in range(16):  # now and then the gathered weight has the address of the one before
        model = FeedForward()
        controller = ts.create_controller(
            model, half(BLOCK), dispatch="sparse", process_group=group
        )
        # what is around the model gathers its weights before the model itself is called
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        whole(nn.Sequential(model), group, mp_policy=policy)(numbers())
        found |= {info.operand.values.dtype for info in controller.sparsified_module_info}
    return found


def test_a_weight_that_is_gathered_before_its_shard_was_seen_leaves_pruned_values_alone(ranks):
    assert ranks.run(2, evaluate_first) == [{torch.float32}] * 2


def test_a_policy_that_computes_in_bfloat16_skips_blocks_in_it(ranks):
    dense = ranks.run(2, compute_in_bfloat16, "dense")
    sparse = ranks.run(2, compute_in_bfloat16, "sparse")
    for (shapes, y, gradients), (_, dense_y, wanted) in zip(sparse, dense, strict=True):
        assert shapes == [((96, 64), torch.bfloat16), ((64, 96), torch.bfloat16)]
        # the bias is added to what has been rounded
        torch.testing.assert_close(y, dense_y, rtol=2**-6, atol=2**-6)
        for own, gradient in zip(gradients, wanted, strict=True):
            assert own.dtype == torch.float32
            torch.testing.assert_close(own, gradient, rtol=2**-5, atol=0.5)
            assert torch.equal(own == 0, gradient == 0)


def write_on_one(group):
    """Write pruned elements of one rank, before an evaluation and while one goes on."""
    model = gather(FeedForward(), group)
    controller = ts.create_controller(model, half(BLOCK), dispatch="sparse", process_group=group)
    controller.set_sparsity_level(0.5)
    x, operand = torch.ones(2, 64), controller.sparsified_module_info[0].operand
    found = []
    with torch.no_grad():
        model.eval()(x)
        for switch in (True, False):
            found.append(operand.path)
            weight = model.up.weight
            part = torch.zeros_like(weight.to_local())
            part += torch.distributed.get_rank(group)  # zero on rank 0
            weight.add_(type(weight).from_local(part, weight.device_mesh, weight.placements))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                y = (model.eval() if switch else model)(x)
            assert ["of 'up' have been written" in str(one.message) for one in told] == [True]
            model.eval()
            found.append(operand.path)
            hidden = torch.relu(
                nn.functional.linear(x, full(model.up.weight), full(model.up.bias))
            )
            dense = nn.functional.linear(hidden, full(model.down.weight), full(model.down.bias))
            assert torch.equal(y, dense)
            with warnings.catch_warnings(action="ignore"):  # rank 1 tells what it has dropped
                controller.set_sparsity_level(0.5)
        with Counted() as shapes:
            model(x)
        found.append(len(shapes))
    return found


def test_a_write_on_one_rank_makes_the_products_of_all_dense(ranks):
    written = "dense (pruned blocks were written)"
    for found in ranks.run(2, write_on_one):
        assert found == ["block-sparse", written, "block-sparse", written, 2]


def compile_parts(group, kind):
    block = FeedForward()
    wrapped = whole(block, group) if kind == "whole" else parallel(block, group, kind)
    model = nn.Sequential(wrapped)
    controller = ts.create_controller(model, half(BLOCK), dispatch="sparse", process_group=group)
    model[0].compile(backend="aot_eager_default_partitioner", fullgraph=True)
    found = []
    with warnings.catch_warnings(action="ignore"):  # torch warns of what its tracer does
        for level in (0.3, 0.5):  # an update is followed
            controller.set_sparsity_level(level)
            model.zero_grad()
            y = model(numbers())
            y.square().sum().backward()
            found.append((full(y), [full(p.grad) for p in model.parameters()]))
        # a compiled graph does not look at the weight: what it skips is not seen; the graph is
        # that of training, as another would be compiled without gradients
        with Poisoned(controller):
            assert not model(numbers()).isnan().any()
    return found


class Poisoned:
    """Pruned elements are NaN while it is open."""

    def __init__(self, controller):
        self.infos = controller.sparsified_module_info

    def fill(self, value):
        for info in self.infos:
            mask = info.operand.kept_elements()
            info.weight.data.to_local().masked_fill_(~mask, value)

    def __enter__(self):
        self.fill(torch.nan)

    def __exit__(self, *_):
        self.fill(0.0)


@pytest.mark.parametrize("kind", ["whole", "tensor"])
def test_compiled_layers_skip_blocks(ranks, kind):
    model, wanted = FeedForward(), []
    controller = ts.create_controller(model, half(BLOCK), dispatch="dense")
    for level in (0.3, 0.5):
        y, _, gradients, _ = once(model, controller, level=level)
        wanted.append((y, [*gradients.values()]))
    # what FSDP2 gathers is compiled without what ranks say to one another
    for found in ranks.run(1 if kind == "whole" else 2, compile_parts, kind):
        assert same(found, wanted)


def go_on(group, saved, state):
    model = net()
    model.load_state_dict(saved)
    sharded(model, group)
    controller = ts.create_controller(
        model, config("magnitude"), dispatch="sparse", process_group=group
    )
    controller.load_state(state)
    found = train(model, controller)
    controller.set_sparsity_level(0.6)
    x = torch.ones(2, 48)
    y = model(x)
    stripped = controller.strip(do_copy=False)
    assert not any("BlockSparse" in type(module).__name__ for module in stripped.modules())
    with Counted() as shapes:
        torch.testing.assert_close(stripped(x), y)
    assert shapes == []
    return found


def test_a_state_brings_lists_and_strip_takes_them_away(ranks):
    model = net()
    controller = ts.create_controller(model, config("magnitude"), dispatch="sparse")
    train(model, controller)
    saved, state = model.state_dict(), controller.get_state()
    more = net()
    more.load_state_dict(saved)
    resumed = ts.create_controller(more, config("magnitude"), dispatch="sparse", state=state)
    wanted = train(more, resumed)
    for found in ranks.run(2, go_on, saved, state):
        assert same([*found], [*wanted])


COLLECTIVES = ("all_reduce", "all_to_all_single", "broadcast", "all_gather", "all_gather_object")


def count_sent(group, kind):
    """Return what a step and an update send, beside what the wrappers do; blocks of the grids."""
    from torch import distributed

    model = gather(FeedForward(), group) if kind == "gather" else FeedForward()
    if kind != "gather":
        parallel(model, group, kind)
    controller = ts.create_controller(model, half(BLOCK), dispatch="sparse", process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    controller.scheduler.step()
    sent, plain = [], {name: getattr(distributed, name) for name in COLLECTIVES}

    def counting(name):
        def call(tensor, *args, **kwargs):
            sent.append((name, tensor.nbytes if isinstance(tensor, torch.Tensor) else None))
            return plain[name](tensor, *args, **kwargs)

        return call

    try:
        for name in plain:
            setattr(distributed, name, counting(name))
        model(torch.ones(2, 8, 64)).sum().backward()
        model.eval()
        optimizer.step()
        controller.scheduler.step()
        step = [*sent]
        controller.set_sparsity_level(0.4)
    finally:
        for name, function in plain.items():
            setattr(distributed, name, function)
    return (
        step,
        sent,
        [i.operand.product.topology.kept.shape for i in controller.sparsified_module_info],
    )


@pytest.mark.parametrize(("kind", "size"), [("gather", 2), ("tensor", 2), ("fsdp", 4)])
def test_a_step_sends_nothing_and_an_update_one_bit_a_block_that_is_gathered(ranks, kind, size):
    for step, update, grids in ranks.run(size, count_sent, kind):
        assert step == []
        assert {name for name, _ in update} <= {"all_reduce", "all_to_all_single"}
        # 6 rows of 4 blocks and 4 of 6: a byte each
        assert (("all_reduce", 6 + 4) in update) == (kind != "tensor")
        rows = 6 if kind == "gather" else 3
        assert grids == [(rows, 4), (4, rows)]
