"""``lightning.Trainer``: one callback; masks that are learned need nothing more."""

import lightning
import torch
from torch import nn

import triton_sparsity as ts

torch.manual_seed(0)
inputs = torch.randn(512, 64)
targets = torch.tanh(inputs @ torch.randn(64, 64) / 8)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), 32)


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def training_step(self, batch, _):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


model = Model()
# the loss by which rb pulls its masks to the level is added by the callback
config = ts.RBSparsityConfig(
    pattern=ts.Block(8, 8), schedule=ts.ExponentialSchedule(target_level=0.6, target_epoch=5)
)
trainer = lightning.Trainer(
    max_epochs=10,
    callbacks=[ts.LightningCallback(config)],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(model, data)
figures = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}
print(figures)
assert 0.5 < figures["sparsity_level"] < 0.7
assert type(model.net[0]) is nn.Linear
