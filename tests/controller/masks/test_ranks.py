"""Ranks that train one model have one set of masks, and are told where they would not."""

import re
from contextlib import nullcontext

import pytest
import torch
from ranks import mesh_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import triton_sparsity as ts
from triton_sparsity.controller.masks.ranks import Ranks, fingerprint

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch lacks gloo"
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 8), nn.Linear(8, 8))


def schedule(level=0.5, initial=0.2):
    return ts.PolynomialSchedule(initial_level=initial, target_level=level, target_epoch=2)


CONFIGS = {
    "magnitude": lambda: ts.MagnitudeSparsityConfig(schedule=schedule()),
    "blocks": lambda: ts.MagnitudeSparsityConfig(pattern=ts.Block(8, 4), schedule=schedule()),
    "normed": lambda: ts.MagnitudeSparsityConfig(
        schedule=schedule(), weight_importance="normed_abs"
    ),
    "nm": lambda: ts.MagnitudeSparsityConfig(
        pattern=ts.NM(2, 4), ignored_scopes=["2"], schedule=schedule(0.4)
    ),
    "snip": lambda: ts.MagnitudeSparsityConfig(
        schedule=schedule(initial=0.0), weight_importance="snip"
    ),
    "momentum": lambda: ts.MagnitudeSparsityConfig(
        schedule=schedule(initial=0.0), weight_importance="snip_momentum"
    ),
    "set": lambda: ts.SETConfig(level=0.5, t_end=20, delta_t=2),
    "rigl": lambda: ts.RigLConfig(level=0.5, t_end=20, delta_t=2),
    "rigl blocks": lambda: ts.RigLConfig(level=0.5, t_end=20, delta_t=2, pattern=ts.Block(4, 4)),
    "rb": lambda: ts.RBSparsityConfig(schedule=ts.ExponentialSchedule(target_level=0.6)),
}


def train(model, controller, rank, size, steps=8):
    """Train on the global batch, or a rank on its part; dyadic numbers, so that sums are exact."""
    extra = [{"params": controller.parameters()}] if controller.parameters() else []
    known = {id(p) for group in extra for p in group["params"]}
    own = [p for p in model.parameters() if id(p) not in known]
    optimizer = torch.optim.SGD([{"params": own}, *extra], lr=0.125)
    for step in range(steps):
        if step % 4 == 0:
            controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        numbers = torch.Generator().manual_seed(step)
        x = torch.randint(-2, 3, (12, 16), generator=numbers) / 2
        x = x.unflatten(0, (size, -1))[rank]
        (model(x).square().mean() + controller.loss()).backward()
        optimizer.step()


def masks(controller):
    return [info.operand.binary_mask for info in controller.sparsified_module_info]


def weights(controller):
    return [info.weight.detach().clone() for info in controller.sparsified_module_info]


def train_ddp(group, name, wrap_first):
    rank = torch.distributed.get_rank(group)
    model = net()
    wrapped = (
        DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
        if wrap_first
        else None
    )
    controller = ts.create_controller(model, CONFIGS[name](), process_group=group)
    if wrapped is None:
        wrapped = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    train(wrapped, controller, rank, group.size())
    read = [info.module.weight.detach() for info in controller.sparsified_module_info]
    return masks(controller), weights(controller), read


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 2) for name in ("magnitude", "blocks", "nm", "snip", "rigl")),
        *((name, 3) for name in ("magnitude", "normed", "snip", "set", "rigl")),
    ],
)
def test_under_ddp_ranks_agree_and_are_close_to_one_process(ranks, name, size):
    found = ranks.run(size, train_ddp, name, size == 3)
    model = net()
    controller = ts.create_controller(model, CONFIGS[name]())
    train(model, controller, 0, 1)
    for other, own, _ in found[1:]:
        assert all(map(torch.equal, other, found[0][0]))
        assert all(map(torch.equal, own, found[0][1]))
    assert any(not mask.all() for mask in found[0][0])
    for mask, wanted in zip(found[0][0], masks(controller), strict=True):
        # gradients are means of means, which round otherwise
        assert (mask != wanted).float().mean() <= 0.02


@pytest.mark.parametrize("name", ["momentum", "rigl blocks", "rb"])
def test_under_ddp_ranks_agree_where_gradients_and_draws_decide(ranks, name):
    found = ranks.run(2, train_ddp, name, False)
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert name == "rb" or any(not mask.all() for mask in found[0][0])
    assert all(map(torch.equal, found[0][2], found[1][2]))
    assert any((own == 0).any() for own in found[0][2])


def go_on_from_the_first_rank(group, name):
    """Load the first rank's state just before an update on all; return both runs' masks, and what
    is added up from the step of the optimiser on.
    """
    rank, size = torch.distributed.get_rank(group), group.size()
    model = net()
    controller = ts.create_controller(model, CONFIGS[name](), process_group=group)
    wrapped = DistributedDataParallel(model, process_group=group)
    train(wrapped, controller, rank, size, 2)
    state = [controller.get_state(), model.state_dict()] if rank == 0 else [None, None]
    torch.distributed.broadcast_object_list(state, 0, group)
    before = masks(controller)
    controller.scheduler.step()
    resumed = net(1)
    resumed.load_state_dict(state[1])
    other = ts.create_controller(resumed, CONFIGS[name](), process_group=group)
    other.load_state(state[0])
    assert all(map(torch.equal, masks(other), before))
    other.scheduler.step()
    assert not all(map(torch.equal, masks(other), before))
    return masks(controller), masks(other)


@pytest.mark.parametrize("name", ["rigl", "rigl blocks"])
def test_under_ddp_the_first_ranks_state_just_before_an_update_is_everybodys(ranks, name):
    for wanted, found in ranks.run(2, go_on_from_the_first_rank, name):
        assert all(map(torch.equal, found, wanted))


class PartedSGD(torch.optim.SGD):
    """Has an optimiser inside for some weights, on each rank others, as torch's ZeRO does."""

    def step(self):
        rank = torch.distributed.get_rank()
        torch.optim.SGD(self.param_groups[0]["params"][rank::2], lr=0.0).step()


def grow_by_thirds(group, parted):
    """Let two ranks have a batch each in the step before an update, and one of them another one
    behind the optimiser's step; one process has all three.
    """
    rank, size = torch.distributed.get_rank(group), group.size()
    model = net()
    controller = ts.create_controller(model, CONFIGS["rigl"](), process_group=group)
    optimizer = (PartedSGD if parted else torch.optim.SGD)(model.parameters(), lr=0.0)
    batches = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    sizes, plain = [], torch.distributed.all_reduce

    def counting(tensor, *args, **options):
        sizes.append(tensor.nbytes)
        return plain(tensor, *args, **options)

    controller.scheduler.step()
    controller.scheduler.step()
    torch.distributed.all_reduce = counting
    try:
        for batch in batches[rank : rank + 1] if size > 1 else batches:
            model(batch).square().mean().backward()
        optimizer.step()
        at_step = [*sizes]
        optimizer.zero_grad()
        if rank == 1:
            model(batches[2]).square().mean().backward()
        controller.scheduler.step()
    finally:
        torch.distributed.all_reduce = plain
    return masks(controller), at_step


@pytest.mark.parametrize("parted", [False, True])
def test_gradients_behind_an_optimisers_step_are_added_to_those_before(ranks, parted):
    ((wanted, nothing),) = ranks.run(1, grow_by_thirds, False)
    assert nothing == []
    for found, sizes in ranks.run(2, grow_by_thirds, parted):
        assert all(map(torch.equal, found, wanted))
        # who has which gradient, 32 bytes a weight; then each gradient once
        dense = [4 * mask.numel() for mask in wanted if not mask.all()]
        assert sizes == [32 * len(dense), *dense]


class Sometimes(nn.Sequential):
    """Uses its last layer or not."""

    def forward(self, x, whole):
        for layer in [*self] if whole else [*self][:-1]:
            x = layer(x)
        return x


def grow_by_what_the_reducer_sends(group, normed):
    """Train to an update by two micro-batches a step, of which the reducer averages the second;
    one process has all. The second rank does not use the last layer; the first one looks at the
    model without its wrapper too.
    """
    rank, size = torch.distributed.get_rank(group), group.size()
    model = Sometimes(*net())
    growth = "normed_gradient" if normed else "gradient"
    config = ts.RigLConfig(level=0.5, t_end=20, delta_t=2, growth=growth)
    controller = ts.create_controller(model, config, process_group=group)
    wrapped = model
    if size > 1:
        options = {"find_unused_parameters": True, "gradient_as_bucket_view": normed}
        wrapped = DistributedDataParallel(model, process_group=group, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    numbers = torch.Generator().manual_seed(0)
    norms, sizes, plain = [], [], torch.distributed.all_reduce

    def counting(tensor, *args, **options):
        sizes.append(tensor.nbytes)
        return plain(tensor, *args, **options)

    for _ in range(5):
        controller.scheduler.step()
        optimizer.zero_grad()
        batches = torch.randn(4, 4, 16, generator=numbers)
        for i in (2 * rank, 2 * rank + 1) if size > 1 else range(4):
            with wrapped.no_sync() if size > 1 and i % 2 == 0 else nullcontext():
                loss = wrapped(batches[i], i < 2).square().mean() * size / 4
                if rank == 0:
                    model(batches[i], True)
                loss.backward()
        gradients = [i.weight.grad for i in controller.sparsified_module_info]
        pruned = [~i.operand.binary_mask for i in controller.sparsified_module_info]
        assert not any(g[p].any() for g, p in zip(gradients, pruned, strict=True))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
        torch.distributed.all_reduce = counting
        try:
            optimizer.step()
        finally:
            torch.distributed.all_reduce = plain
    return masks(controller), norms, sizes


@pytest.mark.parametrize("normed", [False, True])
def test_under_ddp_the_reducer_averages_what_rigl_grows_by(ranks, normed):
    ((wanted, norms, _),) = ranks.run(1, grow_by_what_the_reducer_sends, normed)
    for found, own, sizes in ranks.run(2, grow_by_what_the_reducer_sends, normed):
        assert all(map(torch.equal, found, wanted))
        assert own == pytest.approx(norms, rel=1e-5)  # of the kept elements alone
        assert sizes == []  # an update is next, twice: the reducer has sent all that it needs


def prune_before_wrapping(group):
    rank = torch.distributed.get_rank(group)
    model = net(rank)  # as under a seed of each rank's own
    config = ts.MagnitudeSparsityConfig(schedule=schedule(), pattern=ts.Block(2, 2))
    controller = ts.create_controller(model, config, process_group=group)
    wrapped = DistributedDataParallel(model, process_group=group)
    first = masks(controller)
    train(wrapped, controller, rank, group.size())
    return first, masks(controller), weights(controller)


def test_the_first_masks_and_values_are_those_of_the_first_rank(ranks):
    found = ranks.run(2, prune_before_wrapping)
    controller = ts.create_controller(
        net(), ts.MagnitudeSparsityConfig(schedule=schedule(), pattern=ts.Block(2, 2))
    )
    for first, last, own in found:
        assert all(map(torch.equal, first, masks(controller)))
        assert all(map(torch.equal, last, found[0][1]))
        assert all(map(torch.equal, own, found[0][2]))


def calibrate(group):
    rank, size = torch.distributed.get_rank(group), group.size()
    model = net()
    config = ts.MagnitudeSparsityConfig(schedule=schedule(initial=0.0), weight_importance="wanda")
    controller = ts.create_controller(model, config, process_group=group)
    calibrate_on(controller, slice(rank, None, size))
    return masks(controller)


def calibrate_on(controller, part):
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    with controller.calibration():
        controller.model(x[part])
    controller.set_sparsity_level(0.5)


def test_wandas_inputs_are_those_of_all_ranks(ranks):
    config = ts.MagnitudeSparsityConfig(schedule=schedule(initial=0.0), weight_importance="wanda")
    controller = ts.create_controller(net(), config)
    calibrate_on(controller, slice(None))
    for found in ranks.run(3, calibrate):
        assert all(map(torch.equal, found, masks(controller)))


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def refuse(group, what):
    from torch.distributed.fsdp import fully_shard

    other = torch.distributed.get_rank(group) == 1
    config = ts.MagnitudeSparsityConfig(schedule=schedule())
    model = net()
    if "shards" in what or (what == "sharded" and other):
        fully_shard(model, mesh=mesh_of(group))
    if what == "config" and other:
        config = ts.MagnitudeSparsityConfig(schedule=schedule(0.6))
    if what == "names" and other:
        model = nn.Sequential(*model[:3])
    if what == "names more" and not other:
        model = nn.Sequential(*model[:3])
    if what == "dtype" and other:
        model.bfloat16()
    if what == "create" and other:
        config = ts.MagnitudeSparsityConfig(schedule=schedule(), ignored_scopes=["nowhere"])
    if what == "inputs":
        none_yet = schedule(initial=0.0)
        config = ts.MagnitudeSparsityConfig(schedule=none_yet, weight_importance="wanda")
    given = {"dispatch": "dense"} if what == "dispatch" and other else {}
    if what == "given" and other:
        given = {"state": {}}
    controller = ts.create_controller(model, config, process_group=group, **given)
    if what == "inputs":
        with controller.calibration():
            model(torch.ones(2, 8 if other else 16))
    controller.scheduler.step()
    info = controller.sparsified_module_info[2]
    with torch.no_grad():
        if what == "flipped" and other:
            mask = info.operand.binary_mask
            mask[3, 5] ^= True
            info.operand.binary_mask = mask
        if what == "weight" and other:
            info.weight[3] = 9.0 * info.operand.binary_mask[3]
        if what == "nan" and other:
            info.weight[3, 4] = torch.nan
    if what.startswith("state"):
        state = controller.get_state()
        own = state["magnitude_sparsity"]
        if what == "state" and other:
            own["weights"].pop("0")
        if what == "states" and other:
            own["weights"]["3"]["mask"][2, 0] ^= 1
        if what == "state of a step" and other:
            own["scheduler_state"]["current_step"] += 1
        controller.load_state(state)
    if what == "frozen" and other:
        controller.freeze()
    before = [*map(local, masks(controller))]
    level = {"level": 0.6, "level on shards": 0.6, "level beyond": 1.5}.get(what, 0.5)
    try:
        controller.set_sparsity_level(
            level if other else 0.5, info if "entry" in what and other else None
        )
    except Exception:
        assert all(map(torch.equal, before, map(local, masks(controller))))
        assert not any(
            (local(i.weight)[~m] != 0).any()
            for i, m in zip(controller.sparsified_module_info, before, strict=True)
        )
        raise


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("config", "ValueError", "config must be the same on every rank"),
        (
            "names",
            "ValueError",
            r"parameters must be .* got \['3.weight \(8, 8\) torch.float32', '3.bias .* on rank 0",
        ),
        ("names more", "ValueError", r"\['3.weight \(8, 8\) torch.float32', .* on rank 1"),
        ("dtype", "ValueError", r"parameters must be .* torch.bfloat16.* on rank 1"),
        ("sharded", "ValueError", r"parameters must be .* \(Shard\(dim=0\),\).* on rank 1"),
        ("dispatch", "ValueError", "dispatch must be .* got 'auto' on rank 0 and 'dense' on"),
        ("given", "ValueError", "whether there is a state must be the same on every rank"),
        ("create", "ValueError", "nowhere"),
        ("flipped", "RuntimeError", "the masks of '3' differ between ranks"),
        ("weight", "RuntimeError", "differ between ranks"),
        ("nan", "ValueError", "the weight of '3' holds NaN or Inf"),
        ("state", "ValueError", "without a mask there"),
        ("states", "RuntimeError", "load_state: the masks of .* differ between ranks"),
        ("state of a step", "ValueError", r"\['scheduler_state'\] must be the same on every rank"),
        ("inputs", "RuntimeError", r"mat1 and mat2 shapes cannot be multiplied \(2x8"),
        ("level", "ValueError", "level must be .* got 0.5 on rank 0 and 0.6 on rank 1"),
        ("level on shards", "ValueError", "level must be .* got 0.5 on rank 0 and 0.6 on rank 1"),
        ("level beyond", "ValueError", r"level must be in \[0, 1\), got 1.5"),
        ("entry", "ValueError", "target_sparsified_module_info must be .* None on rank 0 and '3'"),
        ("frozen", "ValueError", "frozen must be .* got False on rank 0 and True on rank 1"),
    ],
)
def test_what_one_rank_has_otherwise_is_refused_by_all_that_name_it(ranks, what, kind, message):
    found = ranks.errors(2, refuse, what)
    for raised, text in found:
        assert raised == kind
        assert re.search(message, text), text


def wrap_first(group):
    model = DistributedDataParallel(net(), process_group=group)
    ts.create_controller(model, CONFIGS["rb"](), process_group=group)


def test_scores_that_the_reducer_would_not_know_are_refused(ranks):
    for raised, text in ranks.errors(2, wrap_first):
        assert raised == "ValueError"
        assert "create the controller first, then wrap the model" in text


def test_a_group_needs_an_initialised_torch_distributed():
    with pytest.raises(RuntimeError, match="process_group must belong to an initialised"):
        ts.create_controller(net(), CONFIGS["magnitude"](), process_group=object())


def test_a_fingerprint_shows_each_change_and_the_place_of_equal_bytes():
    mask = torch.zeros(3, 7, dtype=torch.uint8)
    seen = {int(fingerprint(mask))}
    for place in range(mask.numel()):
        changed = mask.clone()
        changed.view(-1)[place] = 1
        seen.add(int(fingerprint(changed)))
    assert len(seen) == 1 + mask.numel()
    assert int(fingerprint(mask[:0])) == 0  # of a shard of no rows


def test_one_process_agrees_with_itself():
    alone = Ranks()
    assert alone.gather(3) == [3]
    assert not alone.any(False, torch.device("cpu"))
    with pytest.raises(KeyError), alone.together(torch.device("cpu")):
        raise KeyError("own")
