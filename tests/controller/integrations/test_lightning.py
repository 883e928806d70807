"""Under ``lightning.pytorch.Trainer`` one callback does what a loop of one's own would."""

import logging
import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import triton_sparsity as ts

lightning = pytest.importorskip("lightning.pytorch")
Callback = lightning.Callback
EarlyStopping = lightning.callbacks.EarlyStopping
ModelCheckpoint = lightning.callbacks.ModelCheckpoint

HALF = ts.PolynomialSchedule(target_level=0.5, target_epoch=1)
BY_STEP = ts.PolynomialSchedule(
    target_level=0.75, target_epoch=2, update_per_optimizer_step=True, power=3.0
)
BLOCKS = ts.Block(16, 16)
ALGORITHMS = {
    "by step": ts.MagnitudeSparsityConfig(pattern=BLOCKS, schedule=BY_STEP),
    "wanda": ts.MagnitudeSparsityConfig(weight_importance="wanda", schedule=HALF),
    "snip": ts.MagnitudeSparsityConfig(weight_importance="snip", schedule=HALF),
    "rigl": ts.RigLConfig(level=0.5, t_end=12, delta_t=3),
    "rb": ts.RBSparsityConfig(pattern=ts.Block(8, 8), schedule=HALF),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))

    def loss(self, batch):
        return (self.net(batch[0]) - batch[0]).square().mean()

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 60)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": rates, "interval": "step"},
        }


def data():
    examples = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(examples), 8)


def fit(folder, *callbacks, model=None, epochs=4, resume=None, **options):
    """Train 8 batches an epoch, two of them an optimiser step."""
    torch.manual_seed(0)
    model = Model() if model is None else model
    given = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
    }
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=str(folder),
        **given | options,
    )
    trainer.fit(model, data(), data(), ckpt_path=resume, weights_only=True)
    return model, trainer


class Stop(Callback):
    """Breaks training off when an epoch begins."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("killed")


def level_of(model):
    weights = [model.net[0].weight, model.net[2].weight]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_one_line_trains_to_the_target_and_strips(tmp_path):
    callback = ts.LightningCallback(ts.MagnitudeSparsityConfig(schedule=BY_STEP))
    model, trainer = fit(tmp_path, callback)
    assert level_of(model) == pytest.approx(0.75, abs=1e-4)
    assert {type(module) for module in model.net} == {nn.Linear, nn.Tanh}
    assert callback.controller.scheduler.current_step == trainer.global_step - 1 == 15
    assert callback.controller.scheduler.current_epoch == 3
    figures = trainer.callback_metrics
    assert figures["sparsity_level"] == pytest.approx(0.75, abs=1e-4)
    assert figures["sparsity_level_min"] <= 0.75 <= figures["sparsity_level_max"]
    assert 0 <= figures["mask_churn"] < 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_that_was_killed_and_resumed_ends_bit_for_bit_the_same(name, tmp_path):
    config = ALGORITHMS[name]
    saves = [ModelCheckpoint(tmp_path / folder, save_last=True) for folder in "abc"]
    whole, _ = fit(tmp_path, ts.LightningCallback(config), saves[0], epochs=8)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, ts.LightningCallback(config), Stop(3), saves[1], epochs=8)
    callback = ts.LightningCallback(config)
    last = tmp_path / "b" / "last.ckpt"
    resumed, _ = fit(tmp_path, callback, saves[2], epochs=8, resume=last)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert level_of(whole) > 0.3


def test_rb_reaches_its_target_by_a_loss_that_no_step_adds(tmp_path):
    model, _ = fit(tmp_path, ts.LightningCallback(ALGORITHMS["rb"]), epochs=10)
    assert level_of(model) == pytest.approx(0.5, abs=0.1)


def test_the_best_checkpoint_is_one_at_the_target_and_loads_as_a_plain_model(tmp_path):
    schedule = ts.PolynomialSchedule(target_level=0.9, target_epoch=3)
    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="age", mode="min")
    early = EarlyStopping("age", patience=1, mode="min", check_on_train_epoch_end=False)

    class Aging(Model):
        def validation_step(self, batch, index):
            self.log("age", float(self.current_epoch))

    callback = ts.LightningCallback(ts.MagnitudeSparsityConfig(schedule=schedule))
    _, trainer = fit(tmp_path, callback, best, early, model=Aging(), epochs=9)
    # stopping early has not counted the epochs before the target
    assert trainer.current_epoch == 5
    assert best.best_model_path.endswith("epoch=3.ckpt")
    model = Aging.load_from_checkpoint(best.best_model_path, weights_only=True)
    assert level_of(model) == pytest.approx(0.9, abs=1e-3)


def refused(folder, message, callback, **options):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(folder, callback, **options)


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
def test_a_model_that_has_a_controller_is_refused(tmp_path):
    model = Model()
    config = ts.MagnitudeSparsityConfig(schedule=HALF)
    controller = ts.create_controller(model, config)
    message = "is under the masks of another controller"
    refused(tmp_path, message, ts.LightningCallback(config), model=model)
    controller.strip(do_copy=False)


def test_a_checkpoint_without_a_state_is_refused_unless_told_so(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), epochs=2)
    config = ts.MagnitudeSparsityConfig(schedule=HALF)
    message = "the checkpoint to resume from must have a sparsity state"
    dense = tmp_path / "last.ckpt"
    refused(tmp_path, message, ts.LightningCallback(config), resume=dense)
    callback = ts.LightningCallback(config, resume_without_state=True)
    model, _ = fit(tmp_path, callback, resume=dense)
    assert level_of(model) == pytest.approx(0.5, abs=1e-4)


def test_a_target_that_training_cannot_reach_is_said_at_the_start_and_at_the_end(tmp_path):
    late = ts.PolynomialSchedule(target_level=0.5, target_epoch=90)
    callback = ts.LightningCallback(ts.MagnitudeSparsityConfig(schedule=late))
    start = "level 0.5 in epoch 90, counted from 0, but training ends after 4 epochs"
    with (
        pytest.warns(UserWarning, match="training has ended at level 0.0"),
        pytest.warns(UserWarning, match=start),
    ):
        fit(tmp_path, callback)


def test_calibration_logs_nothing_and_leaves_the_random_numbers_alone(tmp_path):
    state = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            state.append(torch.get_rng_state())

    for name in ("wanda", "by step"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(tmp_path, ts.LightningCallback(ALGORITHMS[name]), Watch(), epochs=1)
    assert torch.equal(state[0], state[1])
