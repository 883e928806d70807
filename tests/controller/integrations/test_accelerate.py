"""Accelerate: a controller among its checkpoints, prepared models and optimisers, accumulation."""

import os
import signal
from contextlib import suppress

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import triton_sparsity as ts
from forks import fork

accelerate = pytest.importorskip("accelerate")

GRADUAL = ts.PolynomialSchedule(
    initial_level=0.25, target_level=0.75, target_epoch=2, steps_per_epoch=4,
    update_per_optimizer_step=True,
)  # fmt: skip
CONFIGS = {
    "blocks": ts.MagnitudeSparsityConfig(pattern=ts.Block(16, 16), schedule=GRADUAL),
    "unstructured": ts.MagnitudeSparsityConfig(schedule=GRADUAL),
    "rb": ts.RBSparsityConfig(seed=0, schedule=GRADUAL),
}
every_config = pytest.mark.parametrize("kind", CONFIGS)
every_precision = pytest.mark.parametrize("precision", ["no", "bf16"])
ACCUMULATE = 2
EPOCHS, BATCHES = 3, 8  # four optimiser steps an epoch


class Killed(Exception):
    pass


def accelerator(precision="no"):
    # its state is the process's
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATE
    )


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 32))


def batches():
    x = torch.randn(BATCHES * 4, 32, generator=torch.Generator().manual_seed(5))
    # a generator of its own: else a loader that is begun again draws from the global one
    return DataLoader(TensorDataset(x), batch_size=4, generator=torch.Generator())


class Run:
    """What a user writes: a model, an optimiser, a controller, all prepared and registered."""

    def __init__(self, kind, precision="no", seed=0, first="controller"):
        self.accelerator = accelerator(precision)
        model, config = net(seed), CONFIGS[kind]
        dispatch = "sparse" if kind == "blocks" else "auto"
        if first == "controller":
            self.controller = ts.create_controller(model, config, dispatch=dispatch)
        else:
            model = self.accelerator.prepare(model)
            self.controller = ts.create_controller(model, config, dispatch=dispatch)
        scores = self.controller.parameters()
        rest = [p for p in model.parameters() if not any(p is one for one in scores)]
        groups = [{"params": rest}, *({"params": [one], "lr": 2.0} for one in scores)]
        prepared = [optim.AdamW(groups, 0.02), batches()]
        if first == "controller":
            prepared.insert(0, model)
        *models, self.optimizer, self.loader = self.accelerator.prepare(*prepared)
        self.model = models[0] if models else model
        self.controller.optimizer = self.optimizer
        self.accelerator.register_for_checkpointing(self.controller)

    def train(self, epochs=EPOCHS, kill_after=None, folder=None, skip=0):
        """Train; save after ``kill_after`` optimiser steps, and stop as if killed."""
        scheduler = self.controller.scheduler
        for epoch in range(max(scheduler.current_epoch, 0) if skip else 0, epochs):
            loader = self.loader
            if skip:
                loader = self.accelerator.skip_first_batches(loader, skip)
            else:
                scheduler.epoch_step()
            for batch, (x,) in enumerate(loader, skip):
                if batch % ACCUMULATE == 0:
                    scheduler.step()
                with self.accelerator.accumulate(self.model):
                    loss = (self.model(x) - x).square().mean() + self.controller.loss()
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if kill_after == (epoch, batch):
                    self.accelerator.save_state(folder)
                    raise Killed
            skip = 0

    def everything(self):
        model = self.accelerator.unwrap_model(self.model)
        infos = self.controller.sparsified_module_info
        return [
            *(parameter.detach().clone() for parameter in model.parameters()),
            *(info.operand.binary_mask for info in infos),
            *(v.clone() for i in infos if (v := i.operand.values) is not None),
            *(m.clone() for state in self.optimizer.state.values() for m in state.values()),
        ]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def zeros_of(controller):
    return all(
        not i.weight[~i.operand.binary_mask].any()
        for i in controller.sparsified_module_info
        if i.operand.holds_zeros
    )


@every_config
@every_precision
@pytest.mark.parametrize("first", ["controller", "model"])
def test_killed_within_an_epoch_a_run_goes_on_bit_for_bit(kind, precision, first, tmp_path):
    whole = Run(kind, precision, first=first)
    whole.train()
    killed = Run(kind, precision, first=first)
    with pytest.raises(Killed):
        killed.train(kill_after=(1, 3), folder=tmp_path)
    then = killed.everything()
    resumed = Run(kind, precision, seed=1, first=first)
    resumed.accelerator.load_state(tmp_path)
    assert same(resumed.everything(), then)
    resumed.train(skip=4)
    assert same(resumed.everything(), whole.everything())
    assert zeros_of(resumed.controller)


def be_killed(folder):
    with suppress(Killed):
        Run("blocks").train(kill_after=(1, 3), folder=folder)
        return
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_has_saved_goes_on_in_another(tmp_path):
    killed = fork(be_killed, tmp_path, folder=tmp_path)
    assert killed.wait() == -signal.SIGKILL, killed.err.read_text()
    whole = Run("blocks")
    whole.train()
    resumed = Run("blocks", seed=7)
    resumed.accelerator.load_state(tmp_path)
    resumed.train(skip=4)
    assert same(resumed.everything(), whole.everything())


@every_precision
@pytest.mark.parametrize("first", ["controller", "model"])
@every_config
def test_stripped_unwrapped_the_model_is_plain_and_gives_the_same(kind, precision, first):
    run = Run(kind, precision, first=first)
    run.train()
    run.controller.freeze()
    run.model.eval()
    x, bf16 = torch.randn(3, 32), precision == "bf16"
    want = run.model(x)
    for do_copy in (True, False):
        stripped = run.controller.strip_model(
            run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False), do_copy=do_copy
        )
        assert [type(m) for m in stripped] == [type(m) for m in net(0)]
        assert (stripped[0].weight == 0).any()
        assert list(stripped.state_dict()) == list(net(0).state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            close = {"atol": 1e-2, "rtol": 1e-2} if bf16 else {"atol": 1e-5, "rtol": 1e-5}
            torch.testing.assert_close(stripped(x).float(), want, **close)


@every_config
def test_a_prepared_optimiser_is_as_good_as_its_own(kind):
    """Told before its first step, it forgets at an update what it remembers of the pruned."""
    run = Run(kind)
    inner = run.optimizer.optimizer
    run.controller.optimizer = run.optimizer
    known = [o for guard in run.controller._guards for o in guard._cleared]
    assert known == [inner]
    run.train()
    assert [o for guard in run.controller._guards for o in guard._cleared] == [inner]
    run.controller.freeze()
    for info in run.controller.sparsified_module_info:
        moments = inner.state[info.weight]
        pruned = ~info.operand.binary_mask
        if kind != "rb":  # there the weights were dense when they were trained
            assert not moments["exp_avg"][pruned].any()
        assert moments["exp_avg"].any()


def test_the_state_of_another_model_is_refused_and_the_controller_stays(tmp_path):
    run = Run("unstructured")
    run.train(epochs=1)
    run.accelerator.save_state(tmp_path)
    other = Run("blocks", seed=1)
    before = [i.operand.binary_mask for i in other.controller.sparsified_module_info]
    with pytest.raises(
        ValueError, match=r"load_state: .*'0'\]\['pattern'\] must be 'block 16x16'"
    ):
        other.accelerator.load_state(tmp_path)
    after = [i.operand.binary_mask for i in other.controller.sparsified_module_info]
    assert same(before, after)
    assert zeros_of(other.controller)
    assert other.controller.scheduler.current_epoch == -1


def test_a_state_without_a_controller_is_refused_by_name(tmp_path):
    accelerator_ = accelerator()
    model = accelerator_.prepare(net(0))
    accelerator_.register_for_checkpointing(
        optim.lr_scheduler.LambdaLR(optim.SGD(model.parameters(), 0.1), lambda step: 1.0)
    )
    accelerator_.save_state(tmp_path)
    run = Run("unstructured")
    accelerator_ = accelerator()
    accelerator_.prepare(net(0))
    accelerator_.register_for_checkpointing(run.controller)
    with pytest.raises(ValueError, match="load_state: state must have 'magnitude_sparsity'"):
        accelerator_.load_state(tmp_path)
