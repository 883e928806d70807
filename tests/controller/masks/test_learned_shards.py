"""rb and movement on FSDP2's shards: scores are sharded, gathered and trained with their weights.

A step's gradients are one rank's, so that their sum is exact on any number of ranks.
"""

import io

import pytest
import torch
from ranks import LocalAdamW, mesh_of
from torch import nn

import triton_sparsity as ts

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch lacks gloo"
)

PATTERNS = {
    "unstructured": ts.Unstructured(),
    "blocks": ts.Block(4, 2),
    "tall": ts.Block(8, 2),
    "wide": ts.Block(1, 4),
    "nm": ts.NM(2, 4),
}
RISING = ts.PolynomialSchedule(initial_level=0.0, target_level=0.4, target_epoch=3)
WARM_UP = {
    "warmup_start_epoch": 1,
    "warmup_end_epoch": 3,
    "importance_regularization_factor": 0.05,
    "steps_per_epoch": 2,
}


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        parts = [
            p(x).unflatten(-1, (self.num_heads, -1))
            for p in (self.q_proj, self.k_proj, self.v_proj)
        ]
        q, k, v = (part.transpose(-2, -3) for part in parts)
        mixed = nn.functional.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.out_proj(mixed.transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.linear2(self.linear1(x).tanh())


def net():
    """Heights that no number of ranks divides, and one of which some ranks get nothing."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 12),
        Attention(12, 3),
        FeedForward(12, 22),
        nn.Linear(12, 9),
        nn.Linear(9, 8),
        nn.Tanh(),
    )


# algorithms and patterns, each on layers of its own in one model
TOGETHER = {
    "algorithms": {
        ("rb", "tall"): ["0", "3"],
        ("weight", "tall"): ["{re}^1"],
        ("rb local", "tall"): ["{re}^2"],
        ("magnitude", "tall"): ["4"],
    },
    "patterns": {
        ("rb", "unstructured"): ["3"],
        ("soft", "unstructured"): ["0"],
        ("rb", "wide"): ["{re}^2"],
        ("global", "unstructured"): ["1.q_proj", "1.k_proj"],
        ("global", "blocks"): ["1.v_proj", "1.out_proj"],
    },
    "sr_ste": {("sr_ste", "tall"): ["0", "{re}^1"], ("sr_ste", "nm"): ["2.linear1", "3"]},
    "counted": {
        ("rb", "tall"): ["0"],
        ("weight", "blocks"): ["3"],
        ("soft", "blocks"): ["{re}^1", "{re}^2"],
    },
    "evaluated": {
        ("soft", "unstructured"): ["0"],
        ("rb", "tall"): ["2.linear2"],
        ("weight", "unstructured"): ["1.q_proj"],
        ("sr_ste", "nm"): ["3"],
    },
    "heard": {
        ("rb", "tall"): ["0", "3"],
        ("soft", "tall"): ["{re}^1", "{re}^2"],
        ("sr_ste", "tall"): ["4"],
    },
    "in 16 bits": {
        ("rb", "tall"): ["0", "{re}^1"],
        ("weight", "wide"): ["3"],
        ("weight", "unstructured"): ["{re}^2"],
    },
}


def config(how, pattern=None, layers=None):
    if how in TOGETHER and pattern is None:
        return [config(*each, layers) for each, layers in TOGETHER[how].items()]
    own = {"ignored_scopes": ["4"]} if layers is None else {"target_scopes": layers}
    masked = {"pattern": PATTERNS[pattern], **own}
    if how == "rb":
        schedule = ts.ExponentialSchedule(target_level=0.4, target_epoch=2)
        return ts.RBSparsityConfig(schedule=schedule, seed=5, **masked)
    if how == "rb local":
        local = {"sparsity_level_setting_mode": "local", "compression_lr_multiplier": 0.5}
        return ts.RBSparsityConfig(schedule=None, sparsity_init=0.5, seed=5, **local, **masked)
    if how in ("global", "weight"):
        return ts.MovementSparsityConfig(schedule=RISING, pool=how, **masked)
    if how == "sr_ste":
        return ts.SRSTEConfig(level=0.4, decay=0.1, **masked)
    if how == "magnitude":
        return ts.MagnitudeSparsityConfig(
            weight_importance="normed_abs", schedule=RISING, **masked
        )
    # soft: blocks of one importance that divide every height, heads and channels at the end
    factors = {"unstructured": (1, 1), "blocks": (2, 2), "tall": (2, 1), "wide": (1, 2)}[pattern]
    scopes = {"mode": "block", "sparse_factors": list(factors), "target_scopes": ("*",)}
    own = {"ignored_scopes": ["3", "4"]} if layers is None else own
    own |= {"enable_structured_masking": False} if pattern == "unstructured" else {}
    return ts.MovementSparsityConfig(**WARM_UP, sparse_structure_by_scopes=(scopes,), **own)


def sharded(model, group, hybrid=False, **options):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(group, "replicate", "shard") if hybrid else mesh_of(group)
    fully_shard(model[1], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    for layer in (model, model[1]):
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def full(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def optimizer_of(model, controller):
    scores = controller.parameters()
    own = [p for p in model.parameters() if not any(p is score for score in scores)]
    groups = [{"params": own}, {"params": scores, "lr": 1.5, "weight_decay": 0.0}]
    return LocalAdamW(groups, lr=0.03, weight_decay=0.1, foreach=False)


def train(model, controller, steps, speaks=True, optimizer=None):
    """Train; return of each step the loss, and what evaluation gives, then masks and weights.

    Gradients of every other step are of two batches. Not where the loss pulls weights, as that of
    SR-STE: there FSDP2 adds up in another order.
    """
    optimizer = optimizer or optimizer_of(model, controller)
    losses, outputs = [], []
    for step in range(steps):
        if step % 2 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        model.train()
        optimizer.zero_grad()
        pulls = "sr_ste" in getattr(controller, "controllers", ())
        for part in range(1 if pulls else 1 + step % 2):
            x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2 * step + part))
            task, extra = model(x).square().mean(), controller.loss() / 2
            losses.append((task.detach(), extra.detach()))
            (task * float(speaks) + extra).backward()
        optimizer.step()
        if step % 2 == 0:
            model.eval()
            with torch.no_grad():
                outputs.append(model(x))
    infos = controller.sparsified_module_info
    return {
        "losses": losses,
        "outputs": outputs,
        "masks": [full(info.operand.binary_mask) for info in infos],
        "weights": [full(info.weight) for info in infos],
        "counts": [
            (info.operand.pruned_groups(), info.operand.pruned_elements()) for info in infos
        ],
        "level": controller.mask_level(),
    }


def check(found, wanted):
    assert found["level"] == wanted["level"]
    assert found["counts"] == wanted["counts"]
    for name in ("masks", "weights", "outputs"):
        assert all(map(torch.equal, found[name], wanted[name])), name
    for (task, extra), (own, more) in zip(found["losses"], wanted["losses"], strict=True):
        assert torch.equal(task, own)
        torch.testing.assert_close(extra, more, rtol=2e-5, atol=1e-7)


def near(a, b):
    """Compare states. Of torch's sigmoid, in the losses of rb and soft movement, the last bit
    depends on where a tensor ends on a CPU.
    """
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and a.dtype == torch.float32:
        return torch.allclose(a, b, 1e-4, 1e-5)
    if isinstance(a, float):
        return a == pytest.approx(b, rel=1e-5)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def train_shards(group, how, steps, state=None, hybrid=False, wrap_first=False):
    model = net()
    if state is not None:
        model.load_state_dict(state[0])
    if wrap_first:
        sharded(model, group, hybrid)
        model(torch.ones(1, 1, 8)).sum().backward()  # FSDP2 has set itself up
        model.zero_grad()
    controller = ts.create_controller(model, config(*how), process_group=group)
    if not wrap_first:
        sharded(model, group, hybrid)
    if state is not None:
        controller.load_state(state[1])
    speaks = torch.distributed.get_rank(group) == 0
    found = train(model, controller, steps, speaks)
    if state is not None:
        return found
    return found, ({n: full(t) for n, t in model.state_dict().items()}, controller.get_state())


@pytest.mark.parametrize(
    ("how", "size", "wrap_first"),
    [
        *((("rb", "tall"), 1, False), (("algorithms",), 2, True)),
        *((("soft", "tall"), 2, False), (("soft", "blocks"), 2, True)),
        *((("patterns",), 3, False), (("sr_ste",), 2, False)),
    ],
)
def test_learned_masks_on_shards_are_those_of_one_process(ranks, how, size, wrap_first):
    model = net()
    controller = ts.create_controller(model, config(*how))
    wanted = train(model, controller, 4)
    assert wanted["level"] > 0.02
    for found, (_, state) in ranks.run(size, train_shards, how, 4, None, False, wrap_first):
        check(found, wanted)
        assert near(state, controller.get_state())


def test_a_state_goes_on_at_another_number_of_ranks_and_copies_count_once(ranks):
    how = ("counted",)
    saved = ranks.run(2, train_shards, how, 4)[0][1]
    model = net()
    model.load_state_dict(saved[0])
    controller = ts.create_controller(model, config(*how), state=saved[1])
    wanted = train(model, controller, 3)  # until the warm-up has ended
    for found in ranks.run(4, train_shards, how, 3, saved, True):
        check(found, wanted)


def save_and_load(group, folder, resumes):
    """Train, save all by DCP; or load it, and go on."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    with torch.device("meta" if resumes else "cpu"):
        model = net()
    if resumes:
        sharded(model, group).to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.ones_(parameter)
    controller = ts.create_controller(model, config("rb", "tall"), process_group=group)
    if not resumes:
        sharded(model, group)
    speaks = torch.distributed.get_rank(group) == 0
    optimizer = optimizer_of(model, controller)
    if not resumes:
        train(model, controller, 2, speaks, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    assert not any("scores" in name for name in weights)
    saved = {"model": weights, "optimizer": moments, "sparsity": b""}
    if resumes:
        checkpoint.load(saved, checkpoint_id=folder, process_group=group)
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=saved["optimizer"]
        )
        controller.load_state(torch.load(io.BytesIO(saved["sparsity"])))
    else:
        state = io.BytesIO()
        torch.save(controller.get_state(), state)
        saved["sparsity"] = state.getvalue()
        checkpoint.save(saved, checkpoint_id=folder, process_group=group)
    return train(model, controller, 2, speaks, optimizer)


def test_a_distributed_checkpoint_has_the_moments_of_scores_and_loads_at_another_size(
    ranks, tmp_path
):
    wanted = ranks.run(2, save_and_load, str(tmp_path), False)[0]
    for found in ranks.run(3, save_and_load, str(tmp_path), True):
        check(found, wanted)


def strip_shards(group, how, wrap_first):
    model = net()
    kinds = [type(module) for module in model.modules()]
    if wrap_first:
        sharded(model, group)
        names = [name for name, _ in model.named_parameters()]
        wrong = ts.create_controller(net(), config(*how), process_group=group).get_state()
        wrong[next(iter(wrong))]["frozen"] = 3
        with pytest.raises(ValueError, match=r"\['frozen'\]"):
            ts.create_controller(model, config(*how), process_group=group, state=wrong)
        assert names == [name for name, _ in model.named_parameters()]
        model(torch.ones(1, 1, 8)).sum().backward()
        assert names == [name for name, _ in model.named_parameters()]
    controller = ts.create_controller(model, config(*how), process_group=group)
    if not wrap_first:
        sharded(model, group)
    train(model, controller, 5, torch.distributed.get_rank(group) == 0)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(9))
    before, masks = (
        model(x),
        [full(i.operand.binary_mask) for i in controller.sparsified_module_info],
    )
    names = [info.module_node_name for info in controller.sparsified_module_info]
    stripped = controller.strip(do_copy=False)
    assert torch.equal(stripped(x), before)
    assert all(kind in type(m).__mro__ for kind, m in zip(kinds, model.modules(), strict=True))
    for _ in range(2):  # nothing that FSDP2 gathers brings the scores back
        stripped.train()(x).sum().backward()
        assert not any("scores" in name for name, _ in stripped.named_parameters())
    stripped.load_state_dict(stripped.state_dict())
    found = {name.removesuffix(".weight"): full(p) for name, p in stripped.state_dict().items()}
    assert all((found[name][~mask] == 0).all() for name, mask in zip(names, masks, strict=True))
    return sum(int((~mask).sum()) for mask in masks)


@pytest.mark.parametrize(
    ("how", "wrap_first"), [(("rb", "tall"), True), (("soft", "blocks"), False)]
)
def test_a_sharded_model_under_learned_masks_is_stripped_in_place(ranks, how, wrap_first):
    pruned = ranks.run(2, strip_shards, how, wrap_first)
    assert pruned[0] > 0
    assert len({*pruned}) == 1


def evaluate_first(group, how):
    model = net()
    controller = ts.create_controller(model, config(*how), process_group=group)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        controller.parameters()[0].view(-1)[::2] = -1
        masked = model.eval()(x)
    level = controller.mask_level()
    sharded(model, group)
    with torch.no_grad():
        assert torch.equal(model(x), masked)
    model.train()
    (model(x).sum() + controller.loss()).backward()  # before any step of the scheduler
    assert all(type(p.grad) is type(p.data) for p in controller.parameters())
    assert controller.mask_level() == level
    return level


@pytest.mark.parametrize("how", [("rb", "tall"), ("global", "blocks")])
def test_a_model_that_has_just_been_sharded_is_masked_as_before(ranks, how):
    levels = ranks.run(2, evaluate_first, how)
    assert len({*levels}) == 1
    assert (levels[0] > 0) == (how[0] == "rb")


def train_in_16_bits(group):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = net()
    controller = ts.create_controller(model, config("in 16 bits"), process_group=group)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded(model, group, mp_policy=policy)
    found = train(model, controller, 3, torch.distributed.get_rank(group) == 0)
    assert all(p.dtype == torch.float32 for p in controller.parameters())
    return found


def test_a_policy_of_mixed_precision_draws_alike_on_any_number_of_ranks(ranks):
    (wanted,) = ranks.run(1, train_in_16_bits)
    assert wanted["level"] > 0.02
    for found in ranks.run(2, train_in_16_bits):
        check(found, wanted)


MOVES = ("all_reduce", "all_to_all_single", "broadcast", "all_gather", "all_gather_object")


def count_moves(group, how):
    """Return what is sent beside what FSDP2 sends: by the loss, a step, an update, a look at the
    level, and a step under frozen masks.
    """
    from torch import distributed

    model = net()
    controller = ts.create_controller(model, config(*how), process_group=group)
    sharded(model, group)
    train(model, controller, 2, torch.distributed.get_rank(group) == 0)
    controller.scheduler.step()
    model.train()
    found = {}
    plain = {name: getattr(distributed, name) for name in MOVES}

    def counting(name):
        def call(*args, **kwargs):
            sent = [a for a in args if isinstance(a, torch.Tensor)][-1:]
            found[name] = found.get(name, 0) + sum(tensor.nbytes for tensor in sent)
            return plain[name](*args, **kwargs)

        return call

    def since():
        now = dict(found)
        found.clear()
        return now

    try:
        for name in plain:
            setattr(distributed, name, counting(name))
        loss = controller.loss()
        moved = [since()]
        task = model(torch.ones(2, 3, 8)).sum()
        task = task + loss
        found.clear()  # FSDP2's
        task.backward()
        optimizer_of(model, controller).step()
        found.clear()
        controller.scheduler.step()
        moved.append(since())
        controller.set_sparsity_level(0.3)
        moved.append(since())
        controller.mask_level()
        moved.append(since())
        if torch.distributed.get_rank(group) == 0:  # of a model that this rank alone has
            torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()
        controller.mask_level()
        assert since() == {}
        held = [(w.shard.grid, masks_here(w)) for w in controller._weights]
        controller.freeze()
        found.clear()
        controller.scheduler.step()
        controller.loss()
        moved.append(since())
    finally:
        for name, function in plain.items():
            setattr(distributed, name, function)
    scored = [w.scores_shape for w in controller._weights if how == ("soft", "tall")]
    return moved, held, scored


def tall(shape):
    return shape if len(shape) == 2 else (*shape, 1)


def masks_here(weight):
    """Return the sizes of masks that are here, in bytes, of all that a forward pass reads."""
    held = [v for v in vars(weight).values() if getattr(v, "dtype", None) == torch.uint8]
    held += weight._holder.parameters() if hasattr(weight, "_holder") else ()
    return [(t.to_local() if hasattr(t, "to_local") else t).nbytes for t in held]


def test_a_step_moves_counts_and_an_update_one_bit_a_group(ranks):
    for moved, weights, _ in ranks.run(2, count_moves, ("rb", "tall")):
        count = len(weights)
        bits = sum(-(-rows // 2) * -(-cols // 8) for (rows, cols), _ in weights)
        # a level is only compared: masks are drawn
        level = {"all_reduce": 24}
        assert moved == [{}, {"all_reduce": 8 * count}, level, {"all_gather": bits}, {}]
    for (loss, step, update, *rest), weights, _ in ranks.run(2, count_moves, ("weight", "tall")):
        assert (loss, step, rest) == ({}, {}, [{}, {}])
        bits = sum(-(-rows // 2) * -(-cols // 8) for (rows, cols), _ in weights)
        assert update["all_gather"] <= 3 * bits
        assert "all_to_all_single" not in update
    # of importances of several elements each, however small the blocks of the mask
    for (_, step, *_), _, shapes in ranks.run(2, count_moves, ("soft", "tall")):
        assert step["all_gather"] == sum(-(-n // 2) * -(-m // 8) for n, m in map(tall, shapes))


def test_a_rank_holds_the_masks_of_its_own_elements_and_an_update_gathers_none(ranks):
    for how in ("weight", "soft"):
        for moved, weights, _ in ranks.run(3, count_moves, (how, "unstructured")):
            assert not any("all_gather" in one for one in moved)
            assert moved[-1] == {}  # by steps once the masks are frozen
            assert any(cols == 1 for (_, cols), _ in weights) == (how == "soft")  # biases
            for (rows, cols), (own, gathered) in weights:
                assert own <= -(-rows // 3) * -(-cols // 8)
                assert gathered <= 8 * -(-(-(-rows // 3) * -(-cols // 8)) // 8)  # whole 8 bytes


def hear_losses(group):
    """Return losses wherever what they are of has changed, and the masks of a level."""
    model, losses, speaks = net(), [], torch.distributed.get_rank(group) == 0
    controller = ts.create_controller(model, config("heard"), process_group=group)

    def listen():
        losses.append([part.loss().detach() for part in controller.controllers.values()])

    listen()
    if group.size() > 1:
        sharded(model, group)
    listen()
    optimizer = optimizer_of(model, controller)
    for step in range(5):
        if step % 2 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        task = model.train()(torch.ones(2, 3, 8)).square().mean()
        (task * float(speaks) + controller.loss()).backward()
        optimizer.step()
        listen()
        if step == 2:
            state = controller.get_state()
    controller.set_sparsity_level(0.3)
    listen()
    levelled = [full(info.operand.binary_mask) for info in controller.sparsified_module_info]
    controller.load_state(state)
    listen()
    controller.freeze()
    controller.freeze(False)
    listen()
    return losses, levelled


def test_losses_follow_what_they_are_of(ranks):
    ((wanted, levelled),) = ranks.run(1, hear_losses)
    for losses in zip(*wanted, strict=True):
        assert len({round(float(loss), 6) for loss in losses}) > 2
    for found, masks in ranks.run(2, hear_losses):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
        assert all(map(torch.equal, masks, levelled))


def turned():
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(12, 24)
    torch.manual_seed(3)
    nn.init.normal_(layer.weight)
    last = nn.Sequential(nn.Linear(12, 8), nn.Tanh())
    return nn.Sequential(nn.Linear(8, 24), nn.Sequential(layer, nn.Tanh()), last)


TURNED = [config("sr_ste", "nm", ["1"]), config("magnitude", "tall", ["2"])]


def train_turned(group):
    from torch import distributed

    model = sharded(turned(), group)
    controller = ts.create_controller(model, TURNED, process_group=group)
    speaks = distributed.get_rank(group) == 0
    return train(model, controller, 4, speaks), masks_here(controller._weights[0])


def test_a_weight_that_is_stored_by_inputs_has_its_mask_gathered_too(ranks):
    model = turned()
    wanted = train(model, ts.create_controller(model, TURNED), 4)
    for found, (own, gathered) in ranks.run(3, train_turned):
        check(found, wanted)
        assert own == 12  # of 8 inputs each
        assert gathered == 8 * 2  # by these inputs, of 12 outputs


def count_parameters(group):
    """Return how many parameters FSDP2 gathers, as states are loaded and masks frozen."""
    from torch.distributed.fsdp import FSDPModule

    model = sharded(net(), group)
    names = [name for name, _ in model.named_parameters()]
    controller = ts.create_controller(
        model, config("sr_ste", "nm", ["{re}^1", "3"]), process_group=group
    )
    train(model, controller, 2)
    assert [name for name, _ in model.named_parameters()] == names
    model.requires_grad_(False).requires_grad_(True)

    def count():
        parts = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
        groups = [getattr(p, "_fsdp_param_groups", [p._fsdp_param_group]) for p in parts]
        return sum(len(group.fsdp_params) for each in groups for group in each if group)

    found, state = [count()], controller.get_state()
    for change in (
        *(lambda: controller.load_state(state), lambda: controller.freeze(False)),
        *(controller.freeze, lambda: controller.freeze(False)),
        lambda: controller.strip(do_copy=False),
    ):
        change()
        found.append(count())
    return found, len(names)


def test_masks_that_are_gathered_are_no_parameters_of_the_model_and_come_once(ranks):
    for found, count in ranks.run(2, count_parameters):
        assert found == [count + 5, count + 5, count + 5, count, count + 5, count]


def evaluate_around_updates(group, how, rests=None):
    """Evaluate before each step, which leaves the outermost weights gathered, or all of them on
    as many ranks as ``rests`` says; and behind each update, whose masks inference gathers first.
    """
    model = net()
    controller = ts.create_controller(model, config(*how), process_group=group)
    sharded(model, group, **({} if rests is None else {"reshard_after_forward": rests}))
    optimizer = optimizer_of(model, controller)
    speaks, found = torch.distributed.get_rank(group) == 0, []
    for step in range(4):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            found.append(model.eval()(x))
        if step % 2 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        if step > 0:
            with torch.inference_mode():
                found.append(model(x).clone())
        task = model.train()(x).square().mean() * float(speaks)
        found.append(controller.loss())
        (task + found[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    infos = controller.sparsified_module_info
    return [t.detach() for t in found], [full(info.operand.binary_mask) for info in infos]


@pytest.mark.parametrize(
    ("how", "size", "rests"),
    [
        (("soft", "unstructured", ["0", "3"]), 3, None),
        (("sr_ste", "nm", ["0", "3"]), 2, False),
        (("evaluated",), 4, 2),
    ],
)
def test_evaluations_may_come_right_before_a_step_and_right_behind_an_update(
    ranks, how, size, rests
):
    ((outputs, masks),) = ranks.run(1, evaluate_around_updates, how)
    assert not any(mask.all() for mask in masks if mask.ndim > 1)
    for found, own in ranks.run(size, evaluate_around_updates, how, rests):
        assert all(map(torch.equal, own, masks))
        torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-6)


def load_by_assigning(group, assign):
    model = sharded(net(), group)
    controller = ts.create_controller(
        model, config("sr_ste", "nm", ["3", "1.q_proj"]), process_group=group
    )
    train(model, controller, 2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=assign)
    found = train(model, controller, 1)
    return found["losses"], found["outputs"]


def test_a_load_that_assigns_parameters_is_as_one_that_copies(ranks):
    copied = ranks.run(2, load_by_assigning, False)
    for found, wanted in zip(ranks.run(2, load_by_assigning, True), copied, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class Experts(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 8, 8) / 3)

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.gate_up_proj).sum(1)


def train_experts(group, how, pattern):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Experts(3))
    controller = ts.create_controller(model, config(how, pattern, ["1*"]), process_group=group)
    names = ("replicate", "shard") if group.size() == 4 else ()
    fully_shard(model, mesh=mesh_of(group, *names))
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    optimizer = optimizer_of(model, controller)
    speaks = torch.distributed.get_rank(group) == 0
    for step in range(5):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        (model.train()(x).square().mean() * float(speaks) + controller.loss()).backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(x), full(controller.sparsified_module_info[0].operand.binary_mask)


@pytest.mark.parametrize(("how", "size"), [(("rb", "unstructured"), 4), (("sr_ste", "nm"), 2)])
def test_experts_are_masked_whose_number_the_ranks_do_not_divide(ranks, how, size):
    ((wanted, mask),) = ranks.run(1, train_experts, *how)
    assert not mask.all()
    for found, own in ranks.run(size, train_experts, *how):
        assert torch.equal(own, mask)
        torch.testing.assert_close(found, wanted)


def refuse(group, what):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    model = net()
    mesh = mesh_of(group)
    if what in ("bits", "columns"):
        model.to(torch.bfloat16 if what == "bits" else torch.float32)
        fully_shard(
            model[3],
            mesh=mesh,
            shard_placement_fn=lambda p: Shard(int(what == "columns" and p.ndim == 2)),
        )
    if what == "alone":
        model[3].weight = nn.Parameter(distribute_tensor(model[3].weight, mesh, [Shard(0)]))
    controller = ts.create_controller(model, config("rb", "tall"), process_group=group)
    if what == "ignored":
        fully_shard(model, mesh=mesh, ignored_params={*controller.parameters()})
        controller.scheduler.step()
    sharded(model, group)
    for _ in range(2):
        controller.scheduler.step()
        optimizer = optimizer_of(model, controller)
        loss = model(torch.ones(2, 3, 8)).sum()
        loss.backward()
        optimizer.step()
    controller.scheduler.epoch_step()
    controller.scheduler.epoch_step()


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        (
            "ignored",
            "ValueError",
            "the scores of '0' must be sharded as their weight is, got Param",
        ),
        (
            "bits",
            "ValueError",
            "the weight of '3' must be float32, and sharded by the dimension that",
        ),
        ("columns", "ValueError", "got torch.float32 and (Shard(dim=1),)"),
        ("alone", "ValueError", "must part '3' by whole groups of 8 rows"),
        ("loss", "RuntimeError", "controller.loss() was not part of the loss in 2 steps"),
    ],
)
def test_what_learned_shards_refuse_is_named_on_every_rank(ranks, what, kind, message):
    for raised, text in ranks.errors(2, refuse, what):
        assert raised == kind
        assert message in text


def gather_around(group, how):
    """Let FSDP2 gather weights with what is around the controller's model."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    around = fully_shard(nn.Sequential(model), mesh=mesh_of(group))
    controller = ts.create_controller(model, config(*how), process_group=group)
    controller.scheduler.epoch_step()
    for rests in (True, False):
        with torch.no_grad():
            around(torch.ones(2, 3, 8))
        if rests:
            around.reshard()
        controller.scheduler.epoch_step()


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (("magnitude", "tall"), "RuntimeError", "call reshard() of that module first"),
        (("sr_ste", "nm", ["3"]), "ValueError", "create the controller for the model that is aro"),
    ],
)
def test_weights_that_are_gathered_around_the_controllers_model_are_named(
    ranks, how, kind, message
):
    for raised, text in ranks.errors(2, gather_around, how):
        assert raised == kind
        assert message in text


def part(group):
    """Write the scores of one copy of a shard."""
    model = net()
    controller = ts.create_controller(model, config("rb", "tall"), process_group=group)
    sharded(model, group, hybrid=True)
    controller.scheduler.step()
    if torch.distributed.get_rank(group) == 2:
        controller.parameters()[1].detach().to_local()[0, 0] = -1
    controller.scheduler.epoch_step()


def test_copies_of_scores_that_part_are_told_of_on_every_rank(ranks):
    for kind, text in ranks.errors(4, part):
        assert kind == "RuntimeError"
        assert "epoch_step: the masks of '1.q_proj' differ between ranks" in text
